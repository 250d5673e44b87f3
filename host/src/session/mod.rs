//! Sessions.
pub mod identity;
pub mod memory;
pub mod packet;
