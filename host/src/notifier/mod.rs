//! The notifier chain: a user-space implementation of the mmu notifier contract.
//!
//! **Nothing here hooks this kernel's own chain.** The invalidations come from an application's agent and
//! from userfaultfd; the chain carries them to subscribers under the rules that Linux 6.12
//! (`mm/mmu_notifier.c`, `include/linux/mmu_notifier.h`) and the "mmu notifier #v13" patches (2008) set.
//! The invariants C1-C7 (caller) and S1-S12 (subscriber) are named where they are held.
//!
//! # In short
//! ```
//! use host::notifier::{Chain, Ctx, Event, MaySleep, NonSleeping, NotifierRange};
//! let chain = Chain::new();
//! let token = MaySleep::claim("worker");
//! // chain.register(subscriber, &token)?
//! let range = NotifierRange { start: 0x1000, end: 0x3000, event: Event::Unmap, blockable: true };
//! let started = chain.invalidate_range_start(range, Ctx::MaySleep(&token)).unwrap();
//! // ... the change ...
//! chain.invalidate_range_end(started, Ctx::MaySleep(&token));
//! chain.release(&token);
//! ```
//! * [`Chain`]: register, unregister, invalidate_range_start / _end, invalidate_page, clear_flush_young,
//!   release, statistics ([`Recorder`]).
//! * [`Subscriber`]: what a secondary MMU implements. `sleeping() == false` promises that no callback ever
//!   sleeps; such subscribers are called first, in an atomic section.
//! * [`MaySleep`], [`NonSleeping`], [`Ctx`], [`might_sleep`]: who may sleep.
//! * [`IntervalNotifiers`], [`IntervalNotifier`]: the interval form (read_begin / read_retry), itself one
//!   subscriber of a chain.
//! * [`SpinMutex`], [`EventCount`]: what the non-sleeping path uses instead of locks that sleep.
//!
//! # Differences from the kernel's chain
//! * The chain remembers which subscribers' starts succeeded, so a subscriber that can refuse may still have
//!   an end (stronger than S3): the refused call gets none.
//! * Registration waits for running invalidations instead of taking every lock of the address space.
//! * [`Started`] makes pairing (C2) a matter of ownership; a dropped one is ended and counted.

mod active;
mod chain;
mod context;
mod event_count;
mod interval;
mod measure;
mod range;
pub mod spin;
mod subscriber_list;

pub use chain::{Chain, ChainStats, MAX_SUBSCRIBERS, Registration, Started};
pub use context::{Ctx, MaySleep, NonSleeping, atomic_depth, in_callback, might_sleep};
pub use event_count::EventCount;
pub use interval::{IntervalGuard, IntervalNotifier, IntervalNotifiers, IntervalOps, ReadBusy, Sequence};
pub use measure::{
    EventRecord, EventSummary, Histogram, Recorder, Summary, Unrecorded, count_allocations_by,
    thread_switches,
};
pub use range::{Event, NotifierRange};
pub use spin::{SpinGuard, SpinMutex};

/// "Not now, not without sleeping": the only way in which a start can fail (EAGAIN).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the invalidation would have to sleep here; try again where sleeping is allowed")]
pub struct Again;

/// Why [`Chain::invalidate_range_start`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// A non-blockable start was refused: change nothing (C3).
    #[error("EAGAIN: {subscriber} would have to sleep; change nothing and try elsewhere or later")]
    Again {
        /// The first that refused.
        subscriber: &'static str,
    },
    /// A blockable start was refused: a bug of that subscriber (C4).
    #[error("C4: {subscriber} refused a blockable invalidation, which it must not; fence what it serves")]
    Broken {
        /// The first that refused.
        subscriber: &'static str,
    },
    /// The range has no byte.
    #[error("empty range {start:#x}..{end:#x}; an invalidation needs start < end")]
    Empty {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
}

/// Why [`Chain::register`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The address space has ended.
    #[error("the address space has been released; attach again")]
    Released,
    /// No place is left.
    #[error("{name}: the chain has {MAX_SUBSCRIBERS} subscribers already; unregister one")]
    Full {
        /// Who wanted in.
        name: &'static str,
    },
    /// Registration waits for running invalidations, so a callback must not do it.
    #[error("S10: a callback cannot register (it would wait for its own invalidation); do it elsewhere")]
    FromCallback,
}

/// Why [`Chain::unregister`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnregisterError {
    /// S7.
    #[error("S7: a callback cannot unregister (it would wait for itself); hand it to another thread")]
    FromCallback,
    /// It has been taken out already.
    #[error("not registered any more (unregistered before, or the address space was released)")]
    NotRegistered,
}

/// A secondary MMU.
pub trait Subscriber: Send + Sync {
    /// For errors, logs and statistics.
    fn name(&self) -> &'static str;

    /// Whether callbacks may sleep when the range is blockable. `false` promises that none ever sleeps.
    fn sleeping(&self) -> bool;

    /// The range is about to change. When this returns `Ok`, the device can no longer use an old translation
    /// (S2: drained), and none is created until the end (S1).
    ///
    /// # Errors
    /// [`Again`] only in [`Ctx::NonSleeping`] and only when it would have to sleep (S9).
    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again>;

    /// The change is over. Called once for each start that succeeded.
    fn invalidate_range_end(&self, range: &NotifierRange, ctx: Ctx<'_>);

    /// One page has been unmapped and is still referenced (v13). The default is a start and an end.
    ///
    /// # Errors
    /// As for [`Self::invalidate_range_start`].
    fn invalidate_page(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        self.invalidate_range_start(range, ctx)?;
        self.invalidate_range_end(range, ctx);
        Ok(())
    }

    /// Has the device used `[start, end)`? Clears the marks and flushes. Never sleeps.
    fn clear_flush_young(&self, start: u64, end: u64) -> bool {
        let _ = (start, end);
        false
    }

    /// Like [`Self::clear_flush_young`], without the flush.
    fn clear_young(&self, start: u64, end: u64) -> bool {
        let _ = (start, end);
        false
    }

    /// Has the device used `[start, end)`? Changes nothing.
    fn test_young(&self, start: u64, end: u64) -> bool {
        let _ = (start, end);
        false
    }

    /// The address space ends, or the subscriber is being taken out. Called once. Afterwards no translation
    /// is left and none can be created (S12).
    fn release(&self);
}
