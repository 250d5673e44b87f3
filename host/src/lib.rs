//! The host daemon: the notifier chain, the cache of an address space, its subscribers, and the sessions
//! of the applications whose memory it is.
//!
//! Nothing here hooks this kernel's own mmu notifiers: [`notifier`] is a user-space implementation of their
//! contract, fed by the agent's covered calls and by userfaultfd. And nothing here knows what an entry of a
//! device's TLB looks like: devices are reached through the `driver` crate.
//!
//! Not implemented: mlx5's on-demand paging as a subscriber, a registration cache, agents in another pid
//! namespace than the daemon's.

pub mod daemon;
pub mod fence;
pub mod mm;
pub mod notifier;
pub mod session;
pub mod stats;
pub mod subscribers;
pub mod uffd;
