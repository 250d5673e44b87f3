//! The subscribers of a chain, and the reclaimer (a caller of it).
//!
//! | | sleeps | refuses non-blockable starts |
//! |---|---|---|
//! | [`GruSubscriber`] | never | never |
//! | [`ShadowMmu`] | never | never |
//! | [`Xpmem`] | yes | when a peer has attached the range |
//! | [`HeldMemory`] | yes | always (it asks the kernel what is mapped, and unmaps) |

mod gru;
mod held_memory;
mod reclaimer;
mod shadow_mmu;
mod xpmem;

pub use gru::{DeviceFlush, GruSubscriber};
pub use held_memory::HeldMemory;
pub use reclaimer::{Paused, PurgeableRange, Reclaimed, Reclaimer, ReclaimerStats};
pub use shadow_mmu::{FaultResult, ShadowEntry, ShadowMmu, ShadowMmuStats};
pub use xpmem::{PeerBusy, PeerLink, PeerSequence, Xpmem, XpmemStats};
