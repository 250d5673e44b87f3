//! The host daemon: it plays the part that the kernel's mmu notifier plays for an in-kernel driver.
//!
//! Not implemented: a hook into this kernel's own mmu notifier (the chain here is a user-space
//! implementation of its contract, fed by userfaultfd and by the agent), sessions of another pid
//! namespace, more than one device a daemon.

pub mod daemon;
