//! The reclaimer: plays the OOM reaper's part, the caller that must not wait for subscribers.
//!
//! It discards purgeable memory. Each attempt picks a cold piece, makes a *non-blockable* start, gives up and
//! counts when any subscriber refuses (C3), and otherwise punches the piece out of its memfd, looks whether it
//! is zero, and ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::pread;

use crate::mm::{ChangeLog, MappedTable};
use crate::notifier::{Chain, Ctx, Event, MaySleep, NonSleeping, NotifierRange, StartError, might_sleep};

const PAGE: u64 = 4096;
/// Largest piece that is discarded at once.
const DEFAULT_CHUNK: u64 = 64 * 1024;

/// Memory whose content its owner has given up.
#[derive(Debug, Clone)]
pub struct PurgeableRange {
    /// First byte in the application's address space, page aligned.
    pub va: u64,
    /// Bytes, a multiple of 4096.
    pub len: u64,
    /// The file behind it.
    pub memfd: Arc<OwnedFd>,
    /// Offset of `va` in the file, page aligned.
    pub offset: u64,
}

impl PurgeableRange {
    fn end(&self) -> u64 {
        self.va + self.len
    }

    /// The part of it in `[start, end)`, if any.
    fn part(&self, start: u64, end: u64) -> Option<Self> {
        let from = self.va.max(start);
        let to = self.end().min(end);
        (from < to).then(|| Self {
            va: from,
            len: to - from,
            memfd: self.memfd.clone(),
            offset: self.offset + (from - self.va),
        })
    }
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reclaimed {
    /// There is nothing purgeable.
    Nothing,
    /// A device has used the piece lately; its marks are cleared now.
    Young {
        /// First byte.
        va: u64,
    },
    /// A subscriber would have had to sleep.
    Refused {
        /// First byte.
        va: u64,
        /// Which.
        subscriber: &'static str,
    },
    /// Discarded.
    Discarded {
        /// First byte.
        va: u64,
        /// Bytes.
        len: u64,
        /// Bytes of it that were not zero when looked at afterwards: the application has written there since.
        refilled_bytes: u64,
    },
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct ReclaimerStats {
    /// Attempts that found a piece.
    pub tried: u64,
    /// Pieces left alone because a device had used them.
    pub skipped_young: u64,
    /// Pieces left alone because a subscriber refused.
    pub skipped_again: u64,
    /// Bytes discarded.
    pub discarded_bytes: u64,
    /// Bytes that were not zero after the discard.
    pub refilled_bytes: u64,
    /// Discards that failed.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    tried: AtomicU64,
    skipped_young: AtomicU64,
    skipped_again: AtomicU64,
    discarded_bytes: AtomicU64,
    refilled_bytes: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug)]
struct State {
    ranges: Vec<PurgeableRange>,
    random: u64,
    buffer: Vec<u8>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Reclaimer {
    chain: Arc<Chain>,
    table: Arc<MappedTable>,
    chunk: u64,
    /// Held during an attempt: when [`Self::forget`] returns, nothing of the range is being discarded.
    state: Mutex<State>,
    counters: Counters,
    /// Where changes are told, and whose they are.
    changes: Option<(Arc<ChangeLog>, u32)>,
}

/// Nothing is being discarded while this lives.
#[derive(Debug)]
pub struct Paused<'a>(MutexGuard<'a, State>);

impl Paused<'_> {
    /// As [`Reclaimer::forget`].
    pub fn forget(&mut self, start: u64, end: u64) {
        Reclaimer::cut(&mut self.0.ranges, start, end);
    }
}

impl Reclaimer {
    /// For one address space. The same seed picks the same pieces in the same order.
    #[must_use]
    pub fn new(chain: Arc<Chain>, table: Arc<MappedTable>, seed: u64) -> Self {
        Self {
            chain,
            table,
            chunk: DEFAULT_CHUNK,
            state: Mutex::new(State {
                ranges: Vec::new(),
                random: seed,
                buffer: vec![0; DEFAULT_CHUNK as usize],
            }),
            counters: Counters::default(),
            changes: None,
        }
    }

    /// What it discards is told there, as address space `space`.
    pub fn publish_to(&mut self, changes: Arc<ChangeLog>, space: u32) {
        self.changes = Some((changes, space));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Offers memory for discarding, from now on and at any time.
    ///
    /// # Errors
    /// EINVAL for an empty, unaligned or overflowing range.
    pub fn add(&self, range: PurgeableRange) -> io::Result<()> {
        let aligned = [range.va, range.len, range.offset]
            .iter()
            .all(|n| n.is_multiple_of(PAGE));
        let fits = range.va.checked_add(range.len).is_some() && range.offset.checked_add(range.len).is_some();
        if range.len == 0 || !aligned || !fits {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "purgeable range {:#x}+{:#x} at file offset {:#x}: needs whole pages, and at least one",
                    range.va, range.len, range.offset
                ),
            ));
        }
        let mut state = self.state();
        let (start, end) = (range.va, range.end());
        Self::cut(&mut state.ranges, start, end);
        state.ranges.push(range);
        Ok(())
    }

    /// Takes memory back (also when it is unmapped or moved). Nothing of it is discarded any more.
    pub fn forget(&self, start: u64, end: u64, _token: &MaySleep) {
        might_sleep("Reclaimer::forget");
        Self::cut(&mut self.state().ranges, start, end);
    }

    /// Stops discarding until the result is dropped. For changes whose range is only known once the application
    /// may go on: nothing of it may be discarded between that moment and [`Paused::forget`].
    pub fn pause(&self, _token: &MaySleep) -> Paused<'_> {
        might_sleep("Reclaimer::pause");
        Paused(self.state())
    }

    fn cut(ranges: &mut Vec<PurgeableRange>, start: u64, end: u64) {
        let left = ranges
            .iter()
            .flat_map(|r| [r.part(0, start), r.part(end, u64::MAX)])
            .flatten()
            .collect();
        *ranges = left;
    }

    /// One attempt.
    ///
    /// # Errors
    /// fallocate(2)'s or pread(2)'s; the invalidation has been ended then.
    pub fn reclaim_one(&self, token: &MaySleep) -> io::Result<Reclaimed> {
        might_sleep("Reclaimer::reclaim_one");
        let mut state = self.state();
        let Some(piece) = Self::pick(&mut state, self.chunk) else {
            return Ok(Reclaimed::Nothing);
        };
        let va = piece.va;
        self.counters.tried.fetch_add(1, Ordering::Relaxed);
        if self.chain.clear_flush_young(va, piece.end()) {
            self.counters.skipped_young.fetch_add(1, Ordering::Relaxed);
            return Ok(Reclaimed::Young { va });
        }
        let range = NotifierRange {
            start: va,
            end: piece.end(),
            // The reaper's event in Linux 6.12, mm/oom_kill.c.
            event: Event::Unmap,
            blockable: false,
        };
        // Fills of the piece are put off until this is dropped, whatever comes of the start.
        let change = self.table.begin_change(range.start, range.end);
        let started = {
            let section = NonSleeping::enter();
            self.chain
                .invalidate_range_start(range, Ctx::NonSleeping(&section))
        };
        let started = match started {
            Ok(started) => started,
            Err(StartError::Again { subscriber }) => {
                // C3: nothing is changed, and the chain has ended what had begun.
                self.counters.skipped_again.fetch_add(1, Ordering::Relaxed);
                return Ok(Reclaimed::Refused { va, subscriber });
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        if let Some((changes, space)) = &self.changes {
            changes.publish(*space, (range.start, range.end), change.generation());
        }
        let result = Self::discard(&piece, &mut state.buffer);
        self.chain.invalidate_range_end(started, Ctx::MaySleep(token));
        let refilled_bytes = result.inspect_err(|error| {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(va, len = piece.len, %error, "discarding purgeable memory failed");
        })?;
        self.counters
            .discarded_bytes
            .fetch_add(piece.len, Ordering::Relaxed);
        self.counters
            .refilled_bytes
            .fetch_add(refilled_bytes, Ordering::Relaxed);
        Ok(Reclaimed::Discarded {
            va,
            len: piece.len,
            refilled_bytes,
        })
    }

    fn discard(piece: &PurgeableRange, buffer: &mut [u8]) -> io::Result<u64> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*piece.memfd, flags, piece.offset, piece.len)?;
        let mut refilled = 0;
        let mut done = 0;
        while done < piece.len {
            let want = (piece.len - done).min(buffer.len() as u64) as usize;
            let got = pread(&*piece.memfd, &mut buffer[..want], piece.offset + done)?;
            if got == 0 {
                break;
            }
            refilled += buffer[..got].iter().filter(|b| **b != 0).count() as u64;
            done += got as u64;
        }
        Ok(refilled)
    }

    /// A random piece: every page of every range starts one with the same probability.
    fn pick(state: &mut State, chunk: u64) -> Option<PurgeableRange> {
        let pages: u64 = state.ranges.iter().map(|r| r.len / PAGE).sum();
        if pages == 0 {
            return None;
        }
        let mut page = next_random(&mut state.random) % pages;
        let most = chunk / PAGE;
        let length = 1 + next_random(&mut state.random) % most;
        state.ranges.iter().find_map(|range| {
            let here = range.len / PAGE;
            if page >= here {
                page -= here;
                return None;
            }
            let start = range.va + page * PAGE;
            range.part(start, start.saturating_add(length * PAGE))
        })
    }

    /// Bytes that may be discarded.
    #[must_use]
    pub fn purgeable_bytes(&self) -> u64 {
        self.state().ranges.iter().map(|r| r.len).sum()
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> ReclaimerStats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counters;
        ReclaimerStats {
            tried: read(&c.tried),
            skipped_young: read(&c.skipped_young),
            skipped_again: read(&c.skipped_again),
            discarded_bytes: read(&c.discarded_bytes),
            refilled_bytes: read(&c.refilled_bytes),
            failed: read(&c.failed),
        }
    }
}

/// splitmix64: small, and the same everywhere.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "reclaimer_tests.rs"]
mod tests;
