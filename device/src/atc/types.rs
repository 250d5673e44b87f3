//! What callers of the ATC say and hear.

use crate::dma::DmaError;

/// Whose addresses: an ASID (GRU, 24 bits), an mkey, a PASID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct SpaceId(pub u64);

/// What an access does to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Access {
    /// Loads only.
    Read,
    /// Stores, or a read-modify-write.
    Write,
}

/// Span of one entry: a power of two from 4 KiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub struct PageSize(u8);

impl PageSize {
    /// Smallest shift.
    pub const MIN_SHIFT: u8 = 12;
    /// Largest shift.
    pub const MAX_SHIFT: u8 = 30;
    /// 4 KiB.
    pub const SIZE_4K: Self = Self(12);
    /// 2 MiB.
    pub const SIZE_2M: Self = Self(21);
    /// 1 GiB.
    pub const SIZE_1G: Self = Self(30);

    /// From the logarithm of the size; `None` outside 12..=30.
    #[must_use]
    pub const fn new(shift: u8) -> Option<Self> {
        if shift < Self::MIN_SHIFT || shift > Self::MAX_SHIFT {
            return None;
        }
        Some(Self(shift))
    }

    /// Logarithm of the size.
    #[must_use]
    pub const fn shift(self) -> u8 {
        self.0
    }

    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// First address of the page that `va` is in.
    #[must_use]
    pub const fn base(self, va: u64) -> u64 {
        va & !(self.bytes() - 1)
    }
}

/// Which parts of the protocol run. All of them, except to show that each is needed: `--break` and the
/// model-checking tests switch single ones off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// A fill is refused when a purge since its miss met the span (the GRU's kill bit).
    pub kill: bool,
    /// A fill is refused while a purge that meets its span is in progress.
    pub active: bool,
    /// The two above look at the whole span that is filled; off: only at the missed page.
    pub span: bool,
    /// A purge clears every entry that meets the range; off: only entries that begin in it.
    pub overlap: bool,
    /// A purge clears entries at all.
    pub clear: bool,
    /// A purge waits for running accesses.
    pub drain: bool,
    /// A store through a clean entry is refused.
    pub clean: bool,
    /// Memory that is unmapped takes its entries with it. (Whoever switches it off keeps the memory mapped.)
    pub unmap: bool,
    /// Model checking only: the full fence between publishing an access and looking an entry up.
    #[cfg(loom)]
    pub fence: bool,
    /// Model checking only: an access is published before the look-up, not after it.
    #[cfg(loom)]
    pub publish_first: bool,
    /// Model checking only: a look-up takes an entry's words as one.
    #[cfg(loom)]
    pub sequence: bool,
    /// Model checking only: leaving an access publishes what it did.
    #[cfg(loom)]
    pub release: bool,
}

impl Checks {
    /// Everything on.
    pub const ALL: Self = Self {
        kill: true,
        active: true,
        span: true,
        overlap: true,
        clear: true,
        drain: true,
        clean: true,
        unmap: true,
        #[cfg(loom)]
        fence: true,
        #[cfg(loom)]
        publish_first: true,
        #[cfg(loom)]
        sequence: true,
        #[cfg(loom)]
        release: true,
    };
}

impl Default for Checks {
    fn default() -> Self {
        Self::ALL
    }
}

/// Dimensions of an ATC. Everything is allocated when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtcConfig {
    /// Sets; rounded up to a power of two.
    pub sets: usize,
    /// Entries in a set.
    pub ways: usize,
    /// Misses that can be outstanding (GRU: physical CBRs).
    pub tickets: usize,
    /// Threads that can access memory at the same time.
    pub engines: usize,
    /// Memory without a file may be entered. Its accesses end with [`Miss::ByMessage`]. Else such fills are refused.
    pub by_message: bool,
    /// What is switched on.
    pub checks: Checks,
    /// A record of its own looks for broken promises, and speaks of them with these words. Off: costs nothing but a branch.
    pub sanitize: Option<super::defect::Names>,
    /// The sanitizer's level 2: it can be told where a log of changes is ([`super::Atc::follow_changes`]).
    pub follow: bool,
    /// A drain that takes longer says so once, and keeps waiting: it cannot return before the engine
    /// has left, and killing the process that holds it up is the business of whoever waits.
    pub drain_warning: std::time::Duration,
}

impl Default for AtcConfig {
    fn default() -> Self {
        Self {
            sets: 1024,
            ways: 4,
            tickets: 128,
            engines: 16,
            by_message: false,
            checks: Checks::ALL,
            sanitize: None,
            follow: false,
            drain_warning: std::time::Duration::from_secs(1),
        }
    }
}

/// What a purge removes. Overlap matching: every entry whose span meets the range goes, whatever its
/// size. Ends are exclusive; an empty range meets nothing; a range with `end < start` (it wrapped
/// around) is taken for the whole space: purging too much is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Purge {
    /// Addresses of one space.
    Range {
        /// Whose.
        space: SpaceId,
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// All of one space.
    Space(SpaceId),
    /// Everything.
    All,
    /// Entries that point into this IOVA range.
    Target {
        /// First IOVA.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
}

/// A translation to enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Fill {
    /// Whose addresses.
    pub space: SpaceId,
    /// Any address in the page.
    pub va: u64,
    /// Span of the entry.
    pub size: PageSize,
    /// Where the page begins in the client's memory: a multiple of `size`.
    pub iova: u64,
    /// Stores are allowed (GRU: the dirty bit).
    pub writable: bool,
    /// Generation that software gave to the translation; comes back with each access.
    pub tag: u64,
}

/// Why a fill entered nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum FillRefused {
    /// The span met a purge since the miss was issued. Let the instruction miss again.
    #[error("a purge met the span since the miss was issued; let the access miss again")]
    Killed,
    /// A purge of the span is in progress. Let the instruction miss again.
    #[error("a purge of the span is in progress; let the access miss again")]
    Purging,
    /// The target cannot be reached: the page's IOVA is wrong.
    #[error("the target of the translation cannot be reached: {0}")]
    Target(#[from] DmaError),
    /// The ticket is not open.
    #[error("no miss is outstanding under this ticket; open it first")]
    NoTicket,
}

/// Why an access found no usable entry.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum Miss {
    /// No entry (TLB_MISS).
    #[error("no entry")]
    NoEntry,
    /// A store, and the entry is clean (TLB_MOD).
    #[error("the entry does not allow stores")]
    ReadOnly,
    /// There is an entry, and the memory has no file: the client has to be asked ([`super::Engine::translate`]).
    #[error("the memory can only be reached by asking the client")]
    ByMessage,
}

/// What a purge did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct PurgeReport {
    /// Entries cleared.
    pub entries: usize,
    /// Outstanding misses whose union it widened.
    pub tickets: usize,
    /// Accesses by message whose translation it took away.
    pub asked: usize,
    /// Engines that were inside an access and had to be waited for.
    pub waited_for: usize,
    /// Iterations of the waiting loop that spun.
    pub spins: u64,
    /// Iterations that gave the CPU away (sched_yield).
    pub yields: u64,
}

/// How far the purges of a range have come since a miss was issued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum PurgeProgress {
    /// None met it.
    None,
    /// One meets it and has not finished.
    Running,
    /// At least one met it, and all that did have finished.
    Finished,
}

/// Counters since the ATC was made, and one gauge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct AtcStats {
    /// Accesses that found an entry.
    pub hits: u64,
    /// Accesses that found none.
    pub misses: u64,
    /// Stores that found a clean entry.
    pub mod_misses: u64,
    /// Fills that entered a translation.
    pub fills: u64,
    /// Fills that entered nothing.
    pub fills_refused: u64,
    /// Purges begun.
    pub purges: u64,
    /// Entries that purges cleared.
    pub entries_purged: u64,
    /// Engines that drains had to wait for; counted when the wait begins.
    pub drain_waits: u64,
    /// Iterations of drains that spun.
    pub drain_spins: u64,
    /// Iterations of drains that gave the CPU away.
    pub drain_yields: u64,
    /// Times the ATC's lock was busy for so long that the CPU was given away.
    pub lock_yields: u64,
    /// Entries that made room for a fill.
    pub evictions: u64,
    /// Purges in progress.
    pub active_purges: usize,
    /// Entries now.
    pub live_entries: usize,
}

/// One entry, for dumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct EntryDump {
    /// Whose.
    pub space: SpaceId,
    /// First address.
    pub va: u64,
    /// Span.
    pub size: PageSize,
    /// First IOVA of the target.
    pub iova: u64,
    /// Stores allowed.
    pub writable: bool,
    /// Software's generation.
    pub tag: u64,
}
