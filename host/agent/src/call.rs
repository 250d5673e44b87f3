//! One covered call, from start to end: see `protos::bridge::shared` for the steps.

use crate::intervals::Interval;
use crate::mailbox;
use crate::range_lock::Held;
use crate::state::{self, State, phase};
use crate::sys::{self, SignalMask};
use protos::bridge::shared::{SharedTable, USER_END, buckets_of};
use std::sync::atomic::{AtomicU64, Ordering, fence as memory_fence};

/// No range.
pub(crate) const NOTHING: Interval = Interval::new(0, 0);
/// A covered call between start and end. Signals are blocked, the ranges are locked, and the daemon has been
/// told if it had to be.
#[derive(Debug)]
pub(crate) struct Call {
    state: &'static State,
    table: &'static SharedTable,
    held: Held,
    mask: SignalMask,
    ranges: [Interval; 2],
    slots: [Option<usize>; 2],
    event: u32,
    silent: bool,
    /// The call's generation.
    pub generation: u64,
}

/// What [`Call::suspend`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Suspended {
    /// What was known to be registered is not registered now (or nothing was).
    Yes,
    /// The range is left to the event path: it stays registered, and the daemon reads the event while the
    /// system call waits.
    LeftToEvents,
}

/// The pages that `[addr, addr + len)` touches, or `None` when the system call will refuse it anyway.
pub(crate) fn pages(addr: u64, len: u64) -> Option<Interval> {
    let end = addr.checked_add(len)?.checked_next_multiple_of(sys::PAGE)?;
    (len != 0 && addr.is_multiple_of(sys::PAGE) && end <= USER_END).then(|| Interval::new(addr, end))
}

/// The address without what a program may keep in its upper bits (arm64's top byte, x86's LAM): madvise and
/// mprotect ignore that. An address that the kernel refuses costs a purge of something else.
pub(crate) fn untagged(addr: u64) -> u64 {
    addr & (USER_END - 1)
}

impl Call {
    /// `start`. `None`: this process is not attached (any more): make the plain system call.
    #[inline(always)]
    pub(crate) fn begin(ranges: [Interval; 2], event: u32) -> Option<Self> {
        let state = state::covering()?;
        let mask = sys::block_signals();
        let held = state.calls.acquire(ranges);
        // detach() changes the phase and then waits until nobody is inside: this look comes after entering.
        memory_fence(Ordering::SeqCst);
        let table = match state.table() {
            Some(table) if matches!(state.phase(), phase::ATTACHED | phase::FENCING) => table,
            _ => {
                state.calls.release(held);
                sys::restore_signals(mask);
                return None;
            }
        };
        let mut call = Self {
            state,
            table,
            held,
            mask,
            ranges,
            slots: [None; 2],
            event,
            silent: true,
            generation: 0,
        };
        call.start();
        Some(call)
    }

    /// Steps 1 to 4.
    #[inline(always)]
    fn start(&mut self) {
        let header = &self.table.header;
        header.silent_calls.fetch_add(1, Ordering::SeqCst);
        self.raise();
        memory_fence(Ordering::SeqCst);
        self.generation = header.generation.fetch_add(1, Ordering::SeqCst) + 1;
        bump(&self.state.counters.calls);
        let hop = self.ranges.map(|r| !r.is_empty() && self.must_tell(r));
        if hop == [false; 2] {
            bump(&header.calls_silent);
            return;
        }
        // Who is told of one half is told of the other: a call that counts as silent no longer must keep nothing to
        // itself (S10).
        let hop = self.ranges.map(|r| !r.is_empty());
        self.silent = false;
        header.silent_calls.fetch_sub(1, Ordering::SeqCst);
        bump(&header.calls_hopped);
        // Held while the second slot is claimed: everybody else holds at most one.
        let _one_at_a_time = (hop == [true; 2]).then(|| self.state.two_slots.lock());
        for i in (0..2).filter(|&i| hop[i]) {
            bump(&self.state.counters.hops);
            match mailbox::start(
                self.state,
                self.table,
                self.ranges[i],
                self.event,
                self.generation,
            ) {
                Ok(slot) => self.slots[i] = Some(slot),
                // Daemon and device are gone: nobody is left to tell.
                Err(mailbox::GoneBy) => break,
            }
        }
    }

    fn must_tell(&self, range: Interval) -> bool {
        let header = &self.table.header;
        if header.must_hop.load(Ordering::SeqCst) != 0 {
            return true;
        }
        match buckets_of(range.start, range.end) {
            Some(mut buckets) => buckets.any(|b| self.table.cached[b].load(Ordering::SeqCst) != 0),
            None => header.cached_total.load(Ordering::SeqCst) != 0,
        }
    }

    fn raise(&self) {
        for r in self.ranges {
            match buckets_of(r.start, r.end) {
                Some(buckets) => {
                    for b in buckets {
                        self.table.in_progress[b].fetch_add(1, Ordering::SeqCst);
                    }
                }
                None => {
                    self.table.header.all_in_progress.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    }

    /// Steps 6 and 7. Always called, also when the system call failed.
    #[inline(always)]
    pub(crate) fn end(self) -> u64 {
        let header = &self.table.header;
        for (i, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = *slot {
                mailbox::end(self.table, slot, self.ranges[i], self.event, self.generation);
            }
        }
        for r in self.ranges {
            match buckets_of(r.start, r.end) {
                Some(buckets) => {
                    for b in buckets {
                        self.table.in_progress[b].fetch_sub(1, Ordering::SeqCst);
                    }
                }
                None => {
                    header.all_in_progress.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
        if self.silent {
            header.silent_calls.fetch_sub(1, Ordering::SeqCst);
        }
        memory_fence(Ordering::SeqCst);
        if header.fault_waiters.load(Ordering::SeqCst) != 0 {
            mailbox::ring(self.table);
        }
        self.state.calls.release(self.held);
        sys::restore_signals(self.mask);
        self.generation
    }

    /// Before the system call: unregister what is known to be registered of `range`, so that the call raises
    /// no event. Above the threshold, and when the kernel refuses, the event path is left on: `start` has
    /// been done, and the daemon reads the event while the system call waits for that.
    #[inline(always)]
    pub(crate) fn suspend(&self, range: Interval) -> Suspended {
        let known = self.state.intervals.lock().bytes_in(range);
        if known == 0 {
            return Suspended::Yes;
        }
        if known > self.state.unregister_max.load(Ordering::Relaxed) {
            self.expect_event();
            return Suspended::LeftToEvents;
        }
        let uffd = self.state.uffd.load(Ordering::Relaxed);
        let mut refused = false;
        self.each_known(range, |piece| {
            if sys::uffd_unregister(uffd, piece.start, piece.end).is_err() {
                bump(&self.state.counters.unregister_failed);
                refused = true;
            }
        });
        if refused {
            self.expect_event();
        }
        Suspended::Yes
    }

    /// The system call that follows may wait until the daemon has read its event: the watchdog looks at how
    /// long.
    fn expect_event(&self) {
        bump(&self.state.counters.event_path);
        self.state.calls.note_event(&self.held, sys::now_ms());
    }

    /// Run `f` on each known part of `range`. The table's lock is not held meanwhile: this call's range lock
    /// keeps other covered calls away from these addresses.
    #[inline(always)]
    fn each_known(&self, range: Interval, mut f: impl FnMut(Interval)) {
        let mut rest = range;
        loop {
            let Some(piece) = self.state.intervals.lock().first_in(rest) else {
                return;
            };
            f(piece);
            rest.start = piece.end;
        }
    }

    /// After the system call: nothing of `range` is registered any more.
    pub(crate) fn forget(&self, range: Interval) {
        if self.state.intervals.lock().remove(range).is_err() {
            bump(&self.state.counters.interval_overflow);
        }
    }

    /// After a system call that left the mappings in place: register the known parts again.
    pub(crate) fn resume(&self, range: Interval, suspended: Suspended) {
        if suspended == Suspended::LeftToEvents {
            return;
        }
        let uffd = self.state.uffd.load(Ordering::Relaxed);
        let mode = self.state.register_mode();
        self.each_known(range, |piece| {
            if sys::uffd_register(uffd, piece.start, piece.end, mode).is_err() {
                // Changed behind this library's back. What the kernel still has registered there takes the
                // event path from now on.
                bump(&self.state.counters.register_failed);
                self.forget(piece);
            }
        });
    }

    /// After the system call: device-visible memory is mapped at `range` now.
    pub(crate) fn register(&self, range: Interval) {
        if range.is_empty() {
            return;
        }
        if let Err(e) = register(self.state, range)
            && e == libc::EBUSY
        {
            sys::say(format_args!(
                "{:#x}..{:#x} is registered with another userfaultfd: only this library's calls are covered there",
                range.start, range.end
            ));
        }
    }

    /// Whether any part of `range` is known to be registered.
    pub(crate) fn knows(&self, range: Interval) -> bool {
        self.state.intervals.lock().bytes_in(range) != 0
    }
}

/// Register with the kernel, then remember. Does not fit: the kernel has it, and so the event path.
pub(crate) fn register(state: &State, range: Interval) -> Result<(), i32> {
    let uffd = state.uffd.load(Ordering::Relaxed);
    if let Err(e) = sys::uffd_register(uffd, range.start, range.end, state.register_mode()) {
        bump(&state.counters.register_failed);
        return Err(e);
    }
    if state.intervals.lock().add(range).is_err() {
        bump(&state.counters.interval_overflow);
    }
    Ok(())
}

/// Count.
pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
