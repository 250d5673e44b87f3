// Reason: getrusage has no wrapper in rustix.
#![allow(unsafe_code)]
//! What an invalidation costs, recorded without a lock and without allocation.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::range::Event;

/// Sub-buckets of each power of two, as a shift: values are kept to within 1/16.
const SUB_SHIFT: u32 = 4;
/// Values from 2^41 ns (36 minutes) on share the last bucket.
const BUCKETS: usize = 38 << SUB_SHIFT;

fn index_of(value: u64) -> usize {
    if value < 1 << SUB_SHIFT {
        return value as usize;
    }
    let octave = 63 - value.leading_zeros() - SUB_SHIFT;
    let index = ((octave as usize) << SUB_SHIFT) + (value >> octave) as usize;
    index.min(BUCKETS - 1)
}

/// Largest value that falls into the bucket.
fn upper_bound(index: usize) -> u64 {
    if index < 2 << SUB_SHIFT {
        return index as u64;
    }
    let octave = (index >> SUB_SHIFT) - 1;
    let mantissa = (index & ((1 << SUB_SHIFT) - 1)) + (1 << SUB_SHIFT);
    ((mantissa as u64 + 1) << octave) - 1
}

/// A fixed histogram of nanoseconds: sixteen buckets for each power of two.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Adds a value. Three relaxed atomic operations.
    pub fn record(&self, value: u64) {
        self.buckets[index_of(value)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
        self.max.fetch_max(value, Ordering::Relaxed);
    }

    /// The usual figures.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max = self.max.load(Ordering::Relaxed);
        let at = |per_mille: u64| {
            let rank = (count * per_mille).div_ceil(1000).max(1);
            let mut seen = 0;
            counts
                .iter()
                .position(|n| {
                    seen += n;
                    seen >= rank
                })
                .map_or(0, |index| upper_bound(index).min(max))
        };
        Summary {
            count,
            mean_ns: self.sum.load(Ordering::Relaxed).checked_div(count).unwrap_or(0),
            p50_ns: at(500),
            p90_ns: at(900),
            p99_ns: at(990),
            p999_ns: at(999),
            max_ns: max,
        }
    }
}

/// Figures of a [`Histogram`], nanoseconds, percentiles rounded up by at most 1/16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
pub struct Summary {
    /// Values recorded.
    pub count: u64,
    /// Arithmetic mean.
    pub mean_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// Largest value.
    pub max_ns: u64,
}

/// What is recorded for each event.
#[derive(Debug, Default)]
pub struct EventRecord {
    /// Duration of the non-sleeping subscribers' part of a start.
    pub nonsleeping: Histogram,
    /// Duration of the whole start.
    pub whole: Histogram,
    /// Voluntary context switches of the calling thread during the non-sleeping part. 0, or S9 is broken.
    pub switches: AtomicU64,
    /// Allocator calls of the calling thread during the non-sleeping part, where the program counts them (see
    /// [`count_allocations_by`]). 0, or S8 is at risk.
    pub allocations: AtomicU64,
    /// Starts that were refused.
    pub refused: AtomicU64,
    /// Ends.
    pub ends: AtomicU64,
}

/// [`EventRecord`] as figures.
#[derive(Debug, Clone, Serialize)]
pub struct EventSummary {
    /// Which event; `None` for `invalidate_page`.
    pub event: Option<Event>,
    /// Duration of the non-sleeping part.
    pub nonsleeping: Summary,
    /// Duration of the whole start.
    pub whole: Summary,
    /// Voluntary context switches in the non-sleeping part.
    pub voluntary_context_switches: u64,
    /// Allocator calls in the non-sleeping part; `None`: this program does not count them.
    pub allocations: Option<u64>,
    /// Refused starts.
    pub refused: u64,
    /// Ends.
    pub ends: u64,
}

/// What a round of callbacks took, for its record. Taking it costs little; entering it touches memory that nothing else
/// does, so that whoever is waited for enters it afterwards.
#[derive(Debug)]
#[must_use = "what is not recorded is missing in the figures"]
pub struct Unrecorded {
    event: Option<Event>,
    /// Of the thread, before the part that must not sleep.
    switches_before: u64,
    /// In that part; `None`: nothing has run since that may sleep.
    switches: Option<u64>,
    allocations: u64,
    nonsleeping_ns: u64,
    whole_ns: u64,
}

impl Unrecorded {
    /// The part that must not sleep begins.
    pub(super) fn begin(event: Option<Event>) -> Self {
        Self {
            event,
            switches_before: thread_switches(),
            switches: None,
            allocations: thread_allocations(),
            nonsleeping_ns: 0,
            whole_ns: 0,
        }
    }

    /// It is over.
    pub(super) fn end_of_nonsleeping(&mut self, nanoseconds: u64) {
        self.nonsleeping_ns = nanoseconds;
        self.allocations = thread_allocations().saturating_sub(self.allocations);
    }

    /// What follows may sleep.
    pub(super) fn before_sleeping(&mut self) {
        self.switches = Some(thread_switches().saturating_sub(self.switches_before));
    }

    /// Everything is over.
    pub(super) fn end(&mut self, nanoseconds: u64) {
        self.whole_ns = nanoseconds;
    }
}

/// All records of a chain: one for each event, and one for `invalidate_page`.
#[derive(Debug, Default)]
pub struct Recorder {
    records: [EventRecord; Event::ALL.len() + 1],
}

impl Recorder {
    /// The record of an event; `None` = `invalidate_page`.
    #[must_use]
    pub fn of(&self, event: Option<Event>) -> &EventRecord {
        &self.records[event.map_or(Event::ALL.len(), |e| e as usize)]
    }

    /// Enters what a round took. On the thread that ran it, which has not slept since.
    pub(super) fn enter(&self, round: Unrecorded) {
        let record = self.of(round.event);
        let since = || thread_switches().saturating_sub(round.switches_before);
        let switches = round.switches.unwrap_or_else(since);
        record.switches.fetch_add(switches, Ordering::Relaxed);
        record.allocations.fetch_add(round.allocations, Ordering::Relaxed);
        record.nonsleeping.record(round.nonsleeping_ns);
        record.whole.record(round.whole_ns);
    }

    /// Figures of every event that has happened.
    #[must_use]
    pub fn summaries(&self) -> Vec<EventSummary> {
        Event::ALL
            .into_iter()
            .map(Some)
            .chain([None])
            .map(|event| {
                let record = self.of(event);
                EventSummary {
                    event,
                    nonsleeping: record.nonsleeping.summary(),
                    whole: record.whole.summary(),
                    voluntary_context_switches: record.switches.load(Ordering::Relaxed),
                    allocations: ALLOCATION_COUNTER
                        .get()
                        .map(|_| record.allocations.load(Ordering::Relaxed)),
                    refused: record.refused.load(Ordering::Relaxed),
                    ends: record.ends.load(Ordering::Relaxed),
                }
            })
            .filter(|s| s.whole.count != 0)
            .collect()
    }
}

static ALLOCATION_COUNTER: OnceLock<fn() -> u64> = OnceLock::new();

/// Names the function that tells how often the calling thread has called the allocator. Only a program can
/// know: the allocator is its own. The first call counts, later ones change nothing.
pub fn count_allocations_by(counter: fn() -> u64) {
    let _ = ALLOCATION_COUNTER.set(counter);
}

/// Allocator calls of this thread so far; 0 where nobody counts them.
#[must_use]
pub(super) fn thread_allocations() -> u64 {
    ALLOCATION_COUNTER.get().map_or(0, |count| count())
}

/// Voluntary context switches of this thread so far (`ru_nvcsw` of `RUSAGE_THREAD`, getrusage(2)).
#[must_use]
pub fn thread_switches() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the pointer is valid for one rusage, which the call fills in when it returns 0.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) != 0 {
            return 0;
        }
        usage.assume_init()
    };
    usage.ru_nvcsw as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_histogram_when_value_is_any_lands_in_bucket_that_covers_it() {
        let mut previous = 0;
        for shift in 0..41 {
            for value in [(1u64 << shift) - 1, 1 << shift, (1 << shift) + (1 << shift) / 3] {
                let index = index_of(value);
                assert!(index >= previous || value < 4, "monotonic at {value}");
                previous = previous.max(index);
                let upper = upper_bound(index);
                assert!(upper >= value, "{value} above its bucket's bound {upper}");
                assert!(upper - value <= value / 16, "{value} rounded to {upper}");
            }
        }
        assert_eq!(index_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn test_histogram_when_filled_returns_percentiles() {
        let h = Histogram::default();
        assert_eq!(h.summary(), Summary::default());
        (1..=1000).for_each(|v| h.record(v));
        let s = h.summary();
        assert_eq!((s.count, s.max_ns, s.mean_ns), (1000, 1000, 500));
        assert!((500..=532).contains(&s.p50_ns), "{s:?}");
        assert!((990..=1000).contains(&s.p99_ns), "{s:?}");
    }

    #[test]
    fn test_switches_when_thread_sleeps_are_counted() {
        let before = thread_switches();
        rustix::event::poll(
            &mut [],
            Some(&rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 1_000_000,
            }),
        )
        .unwrap();
        assert!(thread_switches() > before);
    }
}
