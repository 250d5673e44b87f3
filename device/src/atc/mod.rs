//! The device TLB: look-up, fill, purge, drain, statistics.
//!
//! In the words of PCIe ATS this is the address translation cache; [`Atc::purge`] is an invalidate
//! request whose return is the invalidate completion. The protocol is in `core.rs`; this file adds what
//! the protocol does not know: mappings and pointers.
//!
//! With [`AtcConfig::sanitize`] a record of its own (`shadow.rs`) looks on and finds contradictions: [`Atc::findings`].
//!
//! Rules for callers:
//! * [`Engine::access`] first; on a [`Miss`] drop everything, [`Atc::open_miss`], tell software, and let
//!   the thread go on with something else. The answer comes as [`Atc::fill`].
//! * The ticket is open *before* software can see the miss.
//! * A thread holds no guard when it purges, fills, opens a miss or waits for anything (asserted).

#[cfg_attr(loom, allow(dead_code))] // The model checker's engines ask for nothing.
mod asked;
#[cfg(not(loom))]
mod asking;
#[cfg(not(loom))]
mod cache;
#[cfg_attr(loom, allow(dead_code))] // The model checker has no client that tells of changes.
mod changes;
mod core;
mod defect;
#[cfg(not(loom))]
mod engine;
#[cfg(not(loom))]
mod follow;
#[cfg(all(test, loom))]
mod loom_by_message;
#[cfg(all(test, loom))]
mod loom_tests;
mod reach;
mod shadow;
mod slot;
mod spin;
#[cfg(all(test, not(loom)))]
mod tests;
mod types;

#[cfg(not(loom))]
pub use asking::{Asking, Translation};
#[cfg(not(loom))]
pub use cache::{Atc, Hooks, HooksAlreadySet, PurgeMark, PurgeToken};
#[cfg(not(loom))]
pub use defect::{Defect, EntryLife, Findings, Initiator, Names, PurgeLife, Report, Stamp};
#[cfg(not(loom))]
pub(crate) use engine::assert_no_guard;
#[cfg(not(loom))]
pub use engine::{Engine, Guard};
pub use types::{
    Access, AtcConfig, AtcStats, Checks, EntryDump, Fill, FillRefused, Miss, PageSize, Purge, PurgeProgress,
    PurgeReport, SpaceId,
};

/// A guard never crosses a multiple of this: the longest copy that a drain can have to wait for.
pub const CHUNK: u64 = 64 << 10;
