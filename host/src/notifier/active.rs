//! The ranges that are between start and end: a preallocated table without locks.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::context::MaySleep;
use super::event_count::EventCount;

/// Ranges that can be active at once: twice the mailbox slots of an agent, so that the safety net and
/// reclaimers always find room.
pub(super) const MAX_ACTIVE: usize = 128;
/// The entry's owner is still writing the range.
const CLAIMED: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Entry {
    /// 0 = free, [`CLAIMED`], or the invalidation's number.
    number: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    /// Subscribers whose start has succeeded.
    succeeded: AtomicU64,
}

#[derive(Debug)]
pub(super) struct ActiveTable {
    entries: Box<[Entry]>,
    next_number: AtomicU64,
    hint: AtomicUsize,
    /// An entry has become free.
    freed: EventCount,
}

/// An entry that the holder owns until [`ActiveTable::finish`].
#[derive(Debug)]
pub(super) struct Claim {
    index: usize,
}

impl ActiveTable {
    pub(super) fn new() -> Self {
        Self {
            entries: (0..MAX_ACTIVE).map(|_| Entry::default()).collect(),
            next_number: AtomicU64::new(1),
            hint: AtomicUsize::new(0),
            freed: EventCount::default(),
        }
    }

    /// Takes an entry. `None` when all are taken.
    pub(super) fn claim(&self, start: u64, end: u64) -> Option<Claim> {
        let first = self.hint.fetch_add(1, Ordering::Relaxed);
        (0..MAX_ACTIVE)
            .map(|i| (first.wrapping_add(i)) % MAX_ACTIVE)
            .find_map(|index| {
                let entry = &self.entries[index];
                entry
                    .number
                    .compare_exchange(0, CLAIMED, Ordering::Acquire, Ordering::Relaxed)
                    .ok()?;
                entry.start.store(start, Ordering::Relaxed);
                entry.end.store(end, Ordering::Relaxed);
                entry.succeeded.store(0, Ordering::Relaxed);
                let number = self.next_number.fetch_add(1, Ordering::Relaxed);
                entry.number.store(number, Ordering::Release);
                Some(Claim { index })
            })
    }

    pub(super) fn claim_waiting(&self, start: u64, end: u64, token: &MaySleep) -> Claim {
        self.freed
            .wait_for(token, "a free entry for an invalidation", || {
                self.claim(start, end)
            })
    }

    pub(super) fn succeeded(&self, claim: &Claim, subscriber: usize) {
        self.entries[claim.index]
            .succeeded
            .fetch_or(1 << subscriber, Ordering::Relaxed);
    }

    pub(super) fn succeeded_mask(&self, claim: &Claim) -> u64 {
        self.entries[claim.index].succeeded.load(Ordering::Relaxed)
    }

    pub(super) fn has_succeeded(&self, claim: &Claim, subscriber: usize) -> bool {
        self.succeeded_mask(claim) & 1 << subscriber != 0
    }

    /// A subscriber has left: nobody calls its end any more. Ordered before the place is used again by the
    /// place's own state.
    pub(super) fn forget_subscriber(&self, subscriber: usize) {
        for entry in &self.entries {
            entry.succeeded.fetch_and(!(1 << subscriber), Ordering::Relaxed);
        }
    }

    pub(super) fn finish(&self, claim: &Claim) {
        self.entries[claim.index].number.store(0, Ordering::Release);
        self.freed.notify();
    }

    /// Waits until everything that runs now has finished; what starts later is not waited for.
    ///
    /// The caller has published a subscriber and fenced. Numbers are given before the starter's own fence: a
    /// number that is not yet given here belongs to a start that sees the subscriber.
    pub(super) fn wait_for_running(&self, token: &MaySleep) {
        let first_later = self.next_number.load(Ordering::Relaxed);
        for entry in &self.entries {
            self.freed.wait_for(token, "running invalidations to end", || {
                let mut number = entry.number.load(Ordering::Acquire);
                while number == CLAIMED {
                    // Its starter is a few stores away from giving the number, and nobody is told of that.
                    std::thread::yield_now();
                    number = entry.number.load(Ordering::Acquire);
                }
                (number == 0 || number >= first_later).then_some(())
            });
        }
    }

    pub(super) fn meets(&self, start: u64, end: u64) -> bool {
        self.entries
            .iter()
            .any(|entry| match entry.number.load(Ordering::Acquire) {
                0 => false,
                // Not written yet: could be any range.
                CLAIMED => true,
                _ => entry.start.load(Ordering::Relaxed) < end && start < entry.end.load(Ordering::Relaxed),
            })
    }

    pub(super) fn count(&self) -> u64 {
        let taken = |e: &&Entry| e.number.load(Ordering::Relaxed) != 0;
        self.entries.iter().filter(taken).count() as u64
    }

    pub(super) fn waiters(&self) -> u32 {
        self.freed.waiters()
    }
}
