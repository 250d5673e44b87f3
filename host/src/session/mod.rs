//! Sessions: one for each application that has attached.

pub mod identity;
pub mod mailbox;
pub mod memory;
pub mod packet;
mod pager;
pub mod space;

pub use pager::SpacePager;
