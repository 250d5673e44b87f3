//! What the driver counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Declares the counters once: the live atomics and their snapshot.
macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident),* $(,)?) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: Counter,)* }
        /// A snapshot of the driver's counters; all count from [`super::Gru::open`].
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct GruStats { $($(#[$meta])* pub $name: u64,)* }
        impl Counters {
            pub(crate) fn snapshot(&self) -> GruStats {
                GruStats { $($name: self.$name.get(),)* }
            }
        }
        impl GruStats {
            /// Name and value of each counter, for reports.
            #[must_use]
            pub fn entries(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Misses that were answered (by whatever answer).
    faults_served,
    /// Misses put off because an invalidation of their address was in progress.
    faults_deferred,
    /// Misses answered with an exception.
    faults_bad,
    /// Misses sent back without a translation (the context's ASID had changed, or it was being closed).
    faults_restarted,
    /// Misses handed to their user because they carried no ASID.
    faults_to_user,
    /// Look-ups that found no miss (somebody else had answered it).
    faults_spurious,
    /// Translations handed to the device with a restart.
    fills,
    /// Translations handed to the device ahead of their use (BCOPY).
    preloads,
    /// Interrupts seen by the fault service.
    interrupts,
    /// Calls of flush.
    flushes,
    /// Flushes of an address space that had no context loaded: its ASID was dropped instead.
    flushes_by_dropping_asid,
    /// TLBINV operations that were started.
    tgh_operations,
    /// TLBINV operations over everything (ASIDs used up).
    tgh_global,
    /// Longest flush, in nanoseconds.
    flush_max_ns,
    /// All flushes together, in nanoseconds.
    flush_total_ns,
    /// Iterations that waited for a handle without giving up the processor.
    spins,
    /// Iterations that gave up the processor (sched_yield).
    yields,
    /// Waits that passed the stall limit.
    stalls,
    /// Times that a store had to be followed by a doorbell.
    rings,
    /// Contexts loaded.
    contexts_loaded,
    /// Contexts unloaded.
    contexts_unloaded,
    /// Contexts that were stopped, given other operands and started again.
    contexts_updated,
    /// ASIDs handed out.
    asids_assigned,
    /// Times that the ASIDs started again from the bottom.
    asid_generations,
}

/// One counter. Relaxed: nothing is ordered by it.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    pub(crate) fn one(&self) {
        self.add(1);
    }
    pub(crate) fn max(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
