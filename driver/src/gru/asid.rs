//! ASIDs: which number an address space has on a chiplet (section 11).
//!
//! Numbers go upward in steps of 8 (one block: base + region) until the next one that a loaded context still
//! holds, or the end. There everything is flushed, once, and the search goes on behind it; from the end it
//! goes back to the bottom and the generation is raised. An address space without a loaded context whose
//! generation is old has to get a new number when it is loaded, because its old one may belong to somebody
//! else by now.

use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers of one block: one for each address region.
pub(crate) const STEP: u32 = 8;
/// First number (section 11).
pub(crate) const FIRST: u32 = 8;
/// One past the last number (section 11).
pub(crate) const END: u32 = 0xff_fff0;
const GENERATION_MASK: u32 = 0xff_ffff;

/// The allocator of one chiplet.
#[derive(Debug)]
pub(crate) struct Asids {
    first: u32,
    end: u32,
    next: u32,
    limit: u32,
    generation: u32,
}

/// What [`Asids::assign`] did besides handing out a number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Assigned {
    pub(crate) asid: u32,
    pub(crate) generation: u32,
}

impl Asids {
    /// Numbers `first..end`.
    pub(crate) fn new(first: u32, end: u32) -> Self {
        Self {
            first,
            end,
            next: first,
            limit: end,
            generation: 1,
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Hands out a number. `in_use`: numbers of loaded contexts. `flush_all` removes every entry of every
    /// ASID from the chiplet; it is called before a number of an earlier pass can be handed out again.
    pub(crate) fn assign<E>(
        &mut self,
        in_use: &[u32],
        flush_all: impl FnOnce() -> Result<(), E>,
    ) -> Result<Assigned, E> {
        if self.next + STEP > self.limit {
            flush_all()?;
            let mut at = self.next;
            let mut wrapped = false;
            loop {
                if at + STEP > self.end {
                    assert!(!wrapped, "more loaded contexts than ASIDs");
                    wrapped = true;
                    at = self.first;
                    self.generation = (self.generation + 1) & GENERATION_MASK;
                } else if in_use.contains(&at) {
                    at += STEP;
                } else {
                    break;
                }
            }
            self.limit = in_use
                .iter()
                .copied()
                .filter(|&a| a > at)
                .min()
                .unwrap_or(self.end);
            self.next = at;
        }
        let asid = self.next;
        self.next += STEP;
        Ok(Assigned {
            asid,
            generation: self.generation,
        })
    }
}

/// What an address space knows about itself on one chiplet, in one word, so that a flush reads it without a
/// lock: ASID (24 bits, 0 = none), bitmap of loaded contexts (16), generation (24).
#[derive(Debug, Default)]
pub(crate) struct Tracker(AtomicU64);

/// The parts of a [`Tracker`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Track {
    pub(crate) asid: u32,
    pub(crate) contexts: u16,
    pub(crate) generation: u32,
}

impl Track {
    fn pack(self) -> u64 {
        u64::from(self.asid) | u64::from(self.contexts) << 24 | u64::from(self.generation) << 40
    }
    fn unpack(word: u64) -> Self {
        Self {
            asid: (word & 0xff_ffff) as u32,
            contexts: (word >> 24) as u16,
            generation: (word >> 40) as u32,
        }
    }
}

impl Tracker {
    pub(crate) fn get(&self) -> Track {
        Track::unpack(self.0.load(Ordering::SeqCst))
    }

    /// Replaces `old` by `new` unless somebody was faster.
    pub(crate) fn replace(&self, old: Track, new: Track) -> bool {
        self.0
            .compare_exchange(old.pack(), new.pack(), Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Changes the word by `f` until nobody else changed it in between; returns what is stored now.
    pub(crate) fn update(&self, mut f: impl FnMut(Track) -> Track) -> Track {
        loop {
            let old = self.get();
            let new = f(old);
            if self.replace(old, new) {
                return new;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::convert::Infallible;

    fn assign(asids: &mut Asids, in_use: &[u32], flushes: &Cell<u32>) -> Assigned {
        asids
            .assign(in_use, || {
                flushes.set(flushes.get() + 1);
                Ok::<_, Infallible>(())
            })
            .unwrap()
    }

    #[test]
    fn test_asids_when_limit_is_reached_flushes_once_and_raises_generation() {
        let flushes = Cell::new(0);
        let mut asids = Asids::new(8, 40);
        let got: Vec<_> = (0..4).map(|_| assign(&mut asids, &[], &flushes).asid).collect();
        assert_eq!((got, flushes.get()), (vec![8, 16, 24, 32], 0));
        let next = assign(&mut asids, &[], &flushes);
        assert_eq!((next.asid, next.generation, flushes.get()), (8, 2, 1));
    }

    #[test]
    fn test_asids_when_a_loaded_context_holds_one_stops_before_it_and_skips_it() {
        let flushes = Cell::new(0);
        let mut asids = Asids::new(8, 48);
        for _ in 0..5 {
            assign(&mut asids, &[], &flushes);
        }
        // 24 stays loaded across the wrap.
        let got: Vec<_> = (0..4)
            .map(|_| assign(&mut asids, &[24], &flushes))
            .map(|a| (a.asid, a.generation))
            .collect();
        assert_eq!(got, [(8, 2), (16, 2), (32, 2), (40, 2)]);
        // One flush for the wrap, one when 24 was reached.
        assert_eq!(flushes.get(), 2);
    }

    #[test]
    fn test_asids_when_end_is_no_multiple_of_the_step_never_hands_out_a_cut_block() {
        let flushes = Cell::new(0);
        let mut asids = Asids::new(8, 30);
        let got: Vec<_> = (0..4).map(|_| assign(&mut asids, &[], &flushes).asid).collect();
        assert_eq!(got, [8, 16, 8, 16]);
    }

    #[test]
    fn test_tracker_when_packed_round_trips_every_field() {
        let t = Track {
            asid: 0xff_ffe8,
            contexts: 0xa5a5,
            generation: 0xff_fffe,
        };
        assert_eq!(Track::unpack(t.pack()), t);
        let tracker = Tracker::default();
        assert!(tracker.replace(Track::default(), t));
        assert!(!tracker.replace(Track::default(), t));
        assert_eq!(tracker.update(|t| Track { contexts: 0, ..t }).contexts, 0);
    }
}
