//! Sessions: one for each application that has attached.
//!
//! * [`Connection`]: a control connection and its requests; [`packet`] is the transport, [`identity`] says who
//!   is there and whether descriptors are what they claim to be.
//! * [`Session`]: an application's address space, threads, contexts; closed as a whole.
//! * [`space::AddressSpace`]: what all parts of a session share.
//! * [`mailbox`]: covered calls; [`SpacePager`]: the device's misses; [`memory`]: what the device may reach;
//!   [`held`]: page by page, behind the kernel's VFIO.

pub mod connection;
pub mod held;
pub mod identity;
pub mod mailbox;
pub mod memory;
pub mod packet;
mod pager;
mod peer;
mod purgeable;
mod refusal;
#[allow(clippy::module_inception, reason = "the session of the sessions' module")]
mod session;
pub mod space;

pub use connection::{Answer, Connection};
pub use pager::SpacePager;
pub use refusal::Refusal;
pub use session::{Admission, MAX_FILES, Session, SessionOptions};
