//! One covered call at a time over each address: overlapping calls queue, first come first served.
//!
//! A call enters its ranges under a ticket and runs when no overlapping entry has a smaller one. Entries are
//! in a fixed array: no malloc.

use crate::intervals::Interval;
use crate::lock::Locked;
use crate::sys;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Covered calls that can be inside at once; more wait for a place.
pub(crate) const PLACES: usize = 128;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Place {
    ticket: u64,
    ranges: [Interval; 2],
    /// [`sys::now_ms`] when the call went into a system call that may wait for an event to be read; else 0.
    event_since_ms: u64,
}

#[derive(Debug)]
#[repr(C)]
struct Places {
    used: u128,
    next_ticket: u64,
    places: [Place; PLACES],
}

/// The lock. All zero bytes are a free one. Use it only with signals blocked.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct RangeLock {
    places: Locked<Places>,
    /// Raised at every release while somebody waits: the futex word.
    released: AtomicU32,
    waiters: AtomicU32,
    /// Waits so far (statistics).
    pub waits: AtomicU64,
}

/// A held place.
#[derive(Debug)]
pub(crate) struct Held {
    place: usize,
}

impl RangeLock {
    /// Enter; returns when no earlier call overlaps. Hand the result back to [`RangeLock::release`].
    pub(crate) fn acquire(&self, ranges: [Interval; 2]) -> Held {
        let place = self.enter(ranges);
        let mut counted = false;
        loop {
            let seen = self.released.load(Ordering::Acquire);
            if !self.must_wait(place) {
                return Held { place };
            }
            self.sleep(seen, &mut counted);
        }
    }

    fn enter(&self, ranges: [Interval; 2]) -> usize {
        let mut counted = false;
        loop {
            let seen = self.released.load(Ordering::Acquire);
            {
                let mut p = self.places.lock();
                let free = (!p.used).trailing_zeros() as usize;
                if free < PLACES {
                    p.used |= 1 << free;
                    p.next_ticket += 1;
                    p.places[free] = Place {
                        ticket: p.next_ticket,
                        ranges,
                        event_since_ms: 0,
                    };
                    return free;
                }
            }
            self.sleep(seen, &mut counted);
        }
    }

    fn must_wait(&self, place: usize) -> bool {
        let p = self.places.lock();
        let mine = p.places[place];
        occupied(p.used).any(|i| {
            let other = &p.places[i];
            other.ticket < mine.ticket
                && mine
                    .ranges
                    .iter()
                    .any(|m| other.ranges.iter().any(|o| o.overlaps(*m)))
        })
    }

    /// The waiter count is raised before the word is compared by the kernel, and a release raises the word
    /// after it left its place: one of the two sees the other.
    fn sleep(&self, seen: u32, counted: &mut bool) {
        if !std::mem::replace(counted, true) {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
        self.waiters.fetch_add(1, Ordering::SeqCst);
        sys::futex_wait(&self.released, seen, 1000);
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Leave.
    pub(crate) fn release(&self, held: Held) {
        self.places.lock().used &= !(1 << held.place);
        self.released.fetch_add(1, Ordering::SeqCst);
        if self.waiters.load(Ordering::SeqCst) != 0 {
            sys::futex_wake(&self.released, i32::MAX);
        }
    }

    /// Say that the call may now wait in the kernel for its event to be read.
    pub(crate) fn note_event(&self, held: &Held, since_ms: u64) {
        self.places.lock().places[held.place].event_since_ms = since_ms;
    }

    /// Since when the longest of such waits lasts.
    pub(crate) fn oldest_event_ms(&self) -> Option<u64> {
        let p = self.places.lock();
        occupied(p.used)
            .map(|i| p.places[i].event_since_ms)
            .filter(|&t| t != 0)
            .min()
    }

    /// Wait until nobody is inside.
    pub(crate) fn wait_empty(&self) {
        loop {
            let seen = self.released.load(Ordering::Acquire);
            if self.places.lock().used == 0 {
                return;
            }
            self.sleep(seen, &mut true);
        }
    }
}

fn occupied(mut used: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let i = used.trailing_zeros() as usize;
        used &= used.wrapping_sub(1);
        (i < PLACES).then_some(i)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const NOTHING: Interval = Interval::new(0, 0);

    fn lock() -> RangeLock {
        let place = Place {
            ticket: 0,
            ranges: [NOTHING; 2],
            event_since_ms: 0,
        };
        RangeLock {
            places: Locked::new(Places {
                used: 0,
                next_ticket: 0,
                places: [place; PLACES],
            }),
            released: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
            waits: AtomicU64::new(0),
        }
    }

    #[test]
    fn test_lock_when_ranges_do_not_overlap_lets_both_in() {
        let l = lock();
        let a = l.acquire([Interval::new(0, 10), NOTHING]);
        let b = l.acquire([Interval::new(10, 20), Interval::new(30, 40)]);
        l.release(a);
        l.release(b);
        assert_eq!(l.waits.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn test_lock_when_second_range_overlaps_waits_for_the_first_call() {
        let l = lock();
        let first_left = AtomicBool::new(false);
        let a = l.acquire([Interval::new(0, 10), NOTHING]);
        std::thread::scope(|s| {
            let t = s.spawn(|| {
                let b = l.acquire([Interval::new(100, 110), Interval::new(5, 6)]);
                assert!(first_left.load(Ordering::SeqCst));
                l.release(b);
            });
            while l.waits.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            first_left.store(true, Ordering::SeqCst);
            l.release(a);
            t.join().unwrap();
        });
    }

    #[test]
    fn test_lock_when_more_threads_than_places_serialises_all() {
        let l = lock();
        let inside = AtomicU32::new(0);
        std::thread::scope(|s| {
            for _ in 0..PLACES + 8 {
                s.spawn(|| {
                    for _ in 0..20 {
                        let h = l.acquire([Interval::new(0, 10), NOTHING]);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        l.release(h);
                    }
                });
            }
        });
        l.wait_empty();
    }
}
