//! The daemon's exact set of pages that may be in a device's TLB, and the fill protocol over it.
//!
//! Preallocated and lock-free: clearing is on the non-sleeping path. One entry for each 2 MiB of address
//! space, with a bit for each 4 KiB page. The shared counts (`SharedTable::cached`, `cached_total`) are
//! raised *before* a bit is set and lowered *after* it has been cleared, so they are never too small.
//!
//! A bit that is set without need costs one hop of a later call; a bit that is missing would be a missed
//! invalidation. So a fill that turns out to be put off leaves its bits set, and clearing part of a huge page
//! clears the mark of its bucket only (the device drops the whole page, the other buckets keep theirs).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use protos::bridge::shared::{BUCKET_SHIFT, bucket_of};

use super::protocol::{FullFence, Word, announce_fill};
use super::shared_map::MappedTable;

/// Shift of the smallest page.
const PAGE_SHIFT: u32 = 12;
/// Words of a bucket's bitmap: 512 pages.
const WORDS: usize = 8;
/// Entries that are looked at for one bucket.
const PROBE: usize = 32;
/// Entries by default: 8192 * 2 MiB = 16 GiB of address space that devices have touched.
const DEFAULT_ENTRIES: usize = 8192;
/// Largest page: 1 GiB, as the GRU has it.
const MAX_PAGE_SHIFT: u32 = 30;

/// Low bits of [`Entry::owner`]: users of the entry at this moment.
const USERS: u64 = 0xff;
/// All users: one thread has the entry for itself.
const EXCLUSIVE: u64 = 0xff;

/// One bucket's bits.
#[derive(Debug, Default)]
struct Entry {
    /// 0 = never used; else (bucket number + 1) << 8 | users. The bucket changes only while one thread is
    /// [`EXCLUSIVE`] and every bit is clear; it never goes back to 0.
    owner: AtomicU64,
    pages: [AtomicU64; WORDS],
    /// 1: a page that covers the whole bucket.
    huge: AtomicU64,
}

/// An entry whose bucket stays the same until this is dropped.
struct Pinned<'a>(&'a Entry);

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.0.owner.fetch_sub(1, Ordering::Release);
    }
}

/// Spins for the few loads that an exclusive owner needs; yields in case it does not run.
#[derive(Default)]
struct Backoff(u32);

impl Backoff {
    fn pause(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(100) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

fn owner_of(key: u64) -> u64 {
    (key + 1) << 8
}

impl Entry {
    /// Pins the entry if it belongs to the bucket.
    fn pin(&self, key: u64) -> Option<Pinned<'_>> {
        let mut backoff = Backoff::default();
        let mut owner = self.owner.load(Ordering::Acquire);
        loop {
            if owner & !USERS != owner_of(key) {
                return None;
            }
            // One below EXCLUSIVE is left free: 254 users at once, then wait.
            if owner & USERS >= EXCLUSIVE - 1 {
                backoff.pause();
                owner = self.owner.load(Ordering::Acquire);
                continue;
            }
            match self
                .owner
                .compare_exchange_weak(owner, owner + 1, Ordering::Acquire, Ordering::Acquire)
            {
                Ok(_) => return Some(Pinned(self)),
                Err(now) => owner = now,
            }
        }
    }

    /// Takes an entry that has never been used. `Err` = what it is now.
    fn take_unused(&self, key: u64) -> Result<Pinned<'_>, u64> {
        self.owner
            .compare_exchange(0, owner_of(key) + 1, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| Pinned(self))
    }

    /// Takes an entry over from a bucket that has no bit set any more.
    fn take_over(&self, key: u64) -> Option<Pinned<'_>> {
        let owner = self.owner.load(Ordering::Acquire);
        if owner & USERS != 0 {
            return None;
        }
        self.owner
            .compare_exchange(owner, owner | EXCLUSIVE, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        let clear = self
            .pages
            .iter()
            .chain([&self.huge])
            .all(|w| w.load(Ordering::Relaxed) == 0);
        if !clear {
            self.owner.store(owner, Ordering::Release);
            return None;
        }
        self.owner.store(owner_of(key) + 1, Ordering::Release);
        Some(Pinned(self))
    }
}

/// Why a fill cannot begin now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// A change of the page's bucket is in progress (S1).
    #[error("the range is being changed; look again when it has ended")]
    InProgress,
    /// The address space has ended (S12).
    #[error("the address space has been released; nothing may be filled any more")]
    Closed,
}

/// Leave to look a page up and to hand it to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a permit that is not used costs later calls a hop"]
pub struct FillPermit {
    va: u64,
    page_shift: u32,
    generation: u64,
}

impl FillPermit {
    /// The generation that the look-up stands for: tag of the fill.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// First byte and one past the last byte of what may be remembered under this permit: the whole buckets
    /// that the page touches.
    #[must_use]
    pub fn span(&self) -> (u64, u64) {
        let (first, last) = keys_of_page(self.va, self.page_shift);
        (first << BUCKET_SHIFT, (last << BUCKET_SHIFT) | BUCKET_MASK)
    }
}

const BUCKET_MASK: u64 = (1 << BUCKET_SHIFT) - 1;

/// First and last bucket number of the page.
fn keys_of_page(va: u64, page_shift: u32) -> (u64, u64) {
    let mask = (1u64 << page_shift) - 1;
    ((va & !mask) >> BUCKET_SHIFT, (va | mask) >> BUCKET_SHIFT)
}

/// Bits `[first, last]` of 512, as words.
fn bits(first: u64, last: u64) -> [u64; WORDS] {
    std::array::from_fn(|word| {
        let low = word as u64 * 64;
        if last < low || first >= low + 64 {
            return 0;
        }
        let from = first.saturating_sub(low);
        let to = (last - low).min(63);
        (u64::MAX >> (63 - to)) & (u64::MAX << from)
    })
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FillTableStats {
    /// Permits given.
    pub permits: u64,
    /// Fills put off because a change was in progress.
    pub put_off: u64,
    /// Marks set and not cleared (4 KiB pages; a huge page counts one for each bucket).
    pub cached_pages: u64,
    /// Marks cleared so far.
    pub cleared_pages: u64,
    /// Times that no entry was left.
    pub overflows: u64,
    /// Whether every covered call has to hop because of an overflow.
    pub overflowed: bool,
}

#[derive(Debug, Default)]
struct Counters {
    permits: AtomicU64,
    put_off: AtomicU64,
    cached: AtomicU64,
    cleared: AtomicU64,
    overflows: AtomicU64,
}

/// See the module's text.
#[derive(Debug)]
pub struct FillTable {
    table: Arc<MappedTable>,
    entries: Box<[Entry]>,
    overflow: AtomicBool,
    closed: AtomicBool,
    counters: Counters,
}

impl FillTable {
    /// An empty set for an address space.
    #[must_use]
    pub fn new(table: Arc<MappedTable>) -> Arc<Self> {
        Self::with_entries(table, DEFAULT_ENTRIES)
    }

    /// With room for `entries` buckets of 2 MiB (rounded up to a power of two of at least 32).
    #[must_use]
    pub fn with_entries(table: Arc<MappedTable>, entries: usize) -> Arc<Self> {
        let entries = entries.next_power_of_two().max(PROBE);
        Arc::new(Self {
            table,
            entries: (0..entries).map(|_| Entry::default()).collect(),
            overflow: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    /// The shared table that the counts are kept in.
    #[must_use]
    pub fn table(&self) -> &Arc<MappedTable> {
        &self.table
    }

    /// Steps 1 to 4 of the fill protocol for the page of `1 << page_shift` bytes around `va`. Call it only
    /// once the device's ticket for the miss is open: what starts after this is covered by its kill bit.
    ///
    /// # Errors
    /// [`Busy`]: put the fault off.
    ///
    /// # Panics
    /// When `page_shift` is not in 12..=30.
    pub fn begin_fill(&self, va: u64, page_shift: u32) -> Result<FillPermit, Busy> {
        let generation = announce_fill::<_, FullFence>(
            || self.raise(va, page_shift),
            || self.is_busy(va, page_shift),
            &self.table.header.generation,
        );
        let Some(generation) = generation else {
            self.counters.put_off.fetch_add(1, Ordering::Relaxed);
            return Err(match self.closed.load(Ordering::Acquire) {
                true => Busy::Closed,
                false => Busy::InProgress,
            });
        };
        self.counters.permits.fetch_add(1, Ordering::Relaxed);
        Ok(FillPermit {
            va,
            page_shift,
            generation,
        })
    }

    /// Whether nothing has been declared to be changing where the permit's page is. Says nothing about
    /// changes that are over: compare [`Self::generation`] for those.
    #[must_use]
    pub fn is_quiet(&self, permit: &FillPermit) -> bool {
        fence(Ordering::SeqCst);
        !self.is_busy(permit.va, permit.page_shift)
    }

    /// The address space's generation now.
    #[must_use]
    pub fn generation(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.table.header.generation.load(Ordering::Relaxed)
    }

    fn is_busy(&self, va: u64, page_shift: u32) -> bool {
        let (first, last) = keys_of_page(va, page_shift);
        self.closed.load(Ordering::Relaxed)
            || self.table.header.all_in_progress.load(Ordering::Relaxed) != 0
            || (first..=last).any(|key| self.table.in_progress[bucket_of(key << BUCKET_SHIFT)].read() != 0)
    }

    /// Marks a page as possibly cached by a device and raises the shared counts (step 1). Does nothing that
    /// can fail: without room, every covered call is made to hop instead.
    ///
    /// # Panics
    /// When `page_shift` is not in 12..=30.
    pub fn raise(&self, va: u64, page_shift: u32) {
        assert!(
            (PAGE_SHIFT..=MAX_PAGE_SHIFT).contains(&page_shift),
            "page shift {page_shift} is not in 12..=30"
        );
        let (first, last) = keys_of_page(va, page_shift);
        for key in first..=last {
            let Some(entry) = self.find_or_insert(key) else {
                self.overflow();
                return;
            };
            if page_shift >= BUCKET_SHIFT {
                self.set(&entry.0.huge, 1, key);
                continue;
            }
            let page = (va & BUCKET_MASK) >> PAGE_SHIFT;
            let span = (1u64 << (page_shift - PAGE_SHIFT)) - 1;
            for (word, mask) in entry.0.pages.iter().zip(bits(page & !span, page | span)) {
                self.set(word, mask, key);
            }
        }
    }

    fn set(&self, word: &AtomicU64, mask: u64, key: u64) {
        if word.load(Ordering::Acquire) & mask == mask {
            return;
        }
        let count = &self.table.cached[bucket_of(key << BUCKET_SHIFT)];
        // First the counts, then the bits: a second fill that finds the bits set relies on the counts.
        self.count_up(count, mask.count_ones());
        let had = (word.fetch_or(mask, Ordering::AcqRel) & mask).count_ones();
        if had != 0 {
            self.count_down(count, had);
        }
    }

    fn unset(&self, word: &AtomicU64, mask: u64, key: u64) {
        if word.load(Ordering::Acquire) & mask == 0 {
            return;
        }
        let had = (word.fetch_and(!mask, Ordering::AcqRel) & mask).count_ones();
        if had != 0 {
            self.count_down(&self.table.cached[bucket_of(key << BUCKET_SHIFT)], had);
            self.counters.cleared.fetch_add(u64::from(had), Ordering::Relaxed);
        }
    }

    fn count_up(&self, bucket: &AtomicU32, n: u32) {
        bucket.add(n);
        self.table.header.cached_total.add(n);
        self.counters.cached.add(n);
    }

    fn count_down(&self, bucket: &AtomicU32, n: u32) {
        bucket.sub(n);
        self.table.header.cached_total.sub(n);
        self.counters.cached.sub(n);
    }

    fn window(&self, key: u64) -> impl Iterator<Item = &Entry> {
        // Fibonacci hashing: neighbours, the usual case, do not pile up.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let mask = self.entries.len() - 1;
        (0..PROBE).map(move |i| &self.entries[(hash as usize).wrapping_add(i) & mask])
    }

    fn find_or_insert(&self, key: u64) -> Option<Pinned<'_>> {
        for entry in self.window(key) {
            if let Some(pinned) = entry.pin(key) {
                return Some(pinned);
            }
            match entry.take_unused(key) {
                Ok(pinned) => return Some(pinned),
                // Somebody has just taken it for the same bucket, perhaps.
                Err(_) => {
                    if let Some(pinned) = entry.pin(key) {
                        return Some(pinned);
                    }
                }
            }
        }
        // Two threads may end up with two entries for one bucket: clearing looks at all of them.
        self.window(key).find_map(|entry| entry.take_over(key))
    }

    fn overflow(&self) {
        self.counters.overflows.fetch_add(1, Ordering::Relaxed);
        if self.overflow.load(Ordering::Acquire) {
            return;
        }
        // Same order as in `set`: first what the agent reads, then what other fills rely on.
        let must_hop = &self.table.header.must_hop;
        must_hop.fetch_add(1, Ordering::Relaxed);
        if self.overflow.swap(true, Ordering::AcqRel) {
            must_hop.fetch_sub(1, Ordering::Relaxed);
        } else {
            tracing::warn!(
                entries = self.entries.len(),
                "more 2 MiB ranges in device TLBs than the fill table holds: every covered call hops until the \
                 whole address space is invalidated"
            );
        }
    }

    /// Forgets the pages of `[start, end)`: no device can use them any more. Call it after the devices have
    /// been flushed and while the range is still declared to be changing, else a fill in between is lost.
    /// Never sleeps, never allocates.
    pub fn clear(&self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (first, last) = (start >> BUCKET_SHIFT, (end - 1) >> BUCKET_SHIFT);
        if last - first >= self.entries.len() as u64 {
            for entry in &self.entries {
                let owner = entry.owner.load(Ordering::Acquire);
                if owner == 0 {
                    continue;
                }
                let key = (owner >> 8) - 1;
                if (first..=last).contains(&key)
                    && let Some(pinned) = entry.pin(key)
                {
                    self.clear_entry(&pinned, key, start, end - 1);
                }
            }
            return;
        }
        for key in first..=last {
            for entry in self.window(key) {
                if entry.owner.load(Ordering::Acquire) == 0 {
                    // Entries are never given back, so nothing of this bucket lies behind an unused one.
                    break;
                }
                if let Some(pinned) = entry.pin(key) {
                    self.clear_entry(&pinned, key, start, end - 1);
                }
            }
        }
    }

    /// `last` is the last byte.
    fn clear_entry(&self, entry: &Pinned<'_>, key: u64, start: u64, last: u64) {
        let base = key << BUCKET_SHIFT;
        let from = (start.max(base) - base) >> PAGE_SHIFT;
        let to = (last.min(base | BUCKET_MASK) - base) >> PAGE_SHIFT;
        for (word, mask) in entry.0.pages.iter().zip(bits(from, to)) {
            self.unset(word, mask, key);
        }
        self.unset(&entry.0.huge, 1, key);
    }

    /// Forgets everything and, after an overflow, lets calls be silent again. Conditions as for
    /// [`Self::clear`], with the whole space declared to be changing.
    pub fn clear_all(&self) {
        self.clear(0, u64::MAX);
        if self.overflow.swap(false, Ordering::AcqRel) {
            self.table.header.must_hop.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// No fill may begin any more (S12). Flush the devices afterwards.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Whether a page may be cached by a device. For dumps and tests.
    #[must_use]
    pub fn contains(&self, va: u64) -> bool {
        let key = va >> BUCKET_SHIFT;
        let page = (va & BUCKET_MASK) >> PAGE_SHIFT;
        self.overflow.load(Ordering::Acquire)
            || self.window(key).any(|entry| {
                entry.pin(key).is_some_and(|pinned| {
                    pinned.0.huge.load(Ordering::Relaxed) != 0
                        || pinned.0.pages[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1
                            != 0
                })
            })
    }

    /// Declares that a fault waits: whoever ends a change rings the bell. Make the guard, call
    /// [`Self::begin_fill`] once more, and only if it is still busy sleep on the bell.
    #[must_use]
    pub fn fault_waiter(&self) -> FaultWaiter<'_> {
        self.table.header.fault_waiters.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        FaultWaiter { table: &self.table }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> FillTableStats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        FillTableStats {
            permits: read(&self.counters.permits),
            put_off: read(&self.counters.put_off),
            cached_pages: read(&self.counters.cached),
            cleared_pages: read(&self.counters.cleared),
            overflows: read(&self.counters.overflows),
            overflowed: self.overflow.load(Ordering::Relaxed),
        }
    }
}

/// A fault that waits for the end of a change; see [`FillTable::fault_waiter`].
#[derive(Debug)]
pub struct FaultWaiter<'a> {
    table: &'a MappedTable,
}

impl Drop for FaultWaiter<'_> {
    fn drop(&mut self) {
        self.table.header.fault_waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[path = "fill_table_tests.rs"]
mod tests;
