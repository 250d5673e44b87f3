//! userfaultfd: changes of an address space that nobody announced.

mod ioctl;
mod message;
mod safety_net;

pub use message::{MESSAGE_BYTES, Message};
pub use safety_net::{Injection, KINDS, KindStats, SafetyNet, SafetyNetStats};
