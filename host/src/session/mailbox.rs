//! The mailbox: covered calls that have to be told to the chain.
//!
//! Two workers of each session sleep on the bell. A worker takes a slot by moving its state from `REQUEST` to
//! `SERVING`; the operands are read once, after that, and checked: the application can change them at any
//! time, and then hurts nobody but itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use protos::bridge::shared::{SLOTS, Slot, USER_END, slot_op, slot_state};
use rustix::thread::futex;
use rustix::time::Timespec;

use super::space::AddressSpace;
use crate::notifier::{Ctx, Event, MaySleep, NotifierRange, Started, Unrecorded};
use crate::stats::ByEvent;

/// Worker threads of a session: one can wait for a sleeping subscriber while the other serves the rest.
pub const WORKERS: usize = 2;

/// Longest sleep on the bell. The daemon's own wake-ups do not depend on it; it bounds what an application
/// can do that spoils the bell's words.
const LONGEST_SLEEP: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// How long a worker looks at the bell before it sleeps: a second call often follows at once, and a wake-up costs
/// more than this.
const LINGER: Duration = Duration::from_micros(10);

/// With fewer processors a worker sleeps at once. The caller that it has answered may wait for this one; and a worker
/// that yields is not rung for, nor does it know when it gets its turn again (a slice of some other program later).
const LINGERING_CPUS: usize = 3;

/// What the mailbox counts.
#[derive(Debug, Default)]
pub struct MailboxStats {
    /// Starts served.
    pub starts: AtomicU64,
    /// How long they took, by event.
    pub by_event: ByEvent,
    /// Ends served.
    pub ends: AtomicU64,
    /// Slots whose operands made no sense.
    pub malformed: AtomicU64,
    /// Times that a worker went to sleep.
    pub sleeps: AtomicU64,
}

/// The mailbox of a session, served by [`WORKERS`] threads that call [`Mailbox::work`].
#[derive(Debug)]
pub struct Mailbox {
    space: Arc<AddressSpace>,
    /// The invalidation that a slot has started and not ended. A leaf lock, never held during a callback.
    open: [Mutex<Option<Started>>; SLOTS],
    stop: AtomicBool,
    lingers: bool,
    /// Figures.
    pub stats: MailboxStats,
}

impl Mailbox {
    /// For the address space whose table has the slots.
    #[must_use]
    pub fn new(space: Arc<AddressSpace>) -> Self {
        Self {
            space,
            open: std::array::from_fn(|_| Mutex::new(None)),
            stop: AtomicBool::new(false),
            lingers: std::thread::available_parallelism().map_or(1, usize::from) >= LINGERING_CPUS,
            stats: MailboxStats::default(),
        }
    }

    /// A worker's life: until [`Mailbox::stop`].
    pub fn work(&self) {
        let token = MaySleep::claim("mailbox worker");
        let header = &self.space.table().header;
        loop {
            // Read before the slots are: a request that comes after the scan has rung since.
            let bell = header.bell.load(Ordering::Acquire);
            // Whose ring this most often is: before the cache lines of all the others are looked at.
            let rung = header.rung_slot.load(Ordering::Relaxed) as usize % SLOTS;
            let mut served = self.serve(rung, &token);
            for index in 0..SLOTS {
                served |= self.serve(index, &token);
            }
            self.space.retry_deferred();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if served || self.bell_rings_soon(bell) {
                continue;
            }
            header.bell_sleepers.fetch_add(1, Ordering::Relaxed);
            // Pairs with the ringer's fence between its ring and its look at bell_sleepers.
            fence(Ordering::SeqCst);
            if header.bell.load(Ordering::Relaxed) == bell && !self.stop.load(Ordering::Acquire) {
                self.stats.sleeps.fetch_add(1, Ordering::Relaxed);
                // Rung in between, interrupted, timed out: all of them mean "look again".
                let _ = futex::wait(&header.bell, futex::Flags::empty(), bell, Some(&LONGEST_SLEEP));
            }
            header.bell_sleepers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn bell_rings_soon(&self, bell: u32) -> bool {
        if !self.lingers {
            return false;
        }
        let header = &self.space.table().header;
        let since = Instant::now();
        loop {
            std::hint::spin_loop();
            if header.bell.load(Ordering::Relaxed) != bell {
                return true;
            }
            if since.elapsed() >= LINGER {
                return false;
            }
        }
    }

    /// Makes the workers return. They finish what they are serving.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.space.ring();
    }

    /// After the workers have returned: answers what is still in the slots, ends every invalidation whose end
    /// will never come, and wakes every waiter, so that it looks whether the daemon has closed the table.
    pub fn finish(&self, token: &MaySleep) {
        for index in 0..SLOTS {
            self.serve(index, token);
            if let Some(started) = self.take_open(index) {
                self.space
                    .chain()
                    .invalidate_range_end(started, Ctx::MaySleep(token));
            }
            let state = &self.space.table().slots[index].state;
            let _ = futex::wake(state, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    fn take_open(&self, index: usize) -> Option<Started> {
        self.open[index].lock().unwrap_or_else(|e| e.into_inner()).take()
    }

    fn put_open(&self, index: usize, started: Started) -> Option<Started> {
        let mut open = self.open[index].lock().unwrap_or_else(|e| e.into_inner());
        open.replace(started)
    }

    fn serve(&self, index: usize, token: &MaySleep) -> bool {
        let slot = &self.space.table().slots[index];
        let state = slot.state.load(Ordering::Relaxed);
        let detached = match state {
            slot_state::REQUEST => false,
            slot_state::REQUEST_DETACHED => true,
            _ => return false,
        };
        let claimed =
            slot.state
                .compare_exchange(state, slot_state::SERVING, Ordering::Acquire, Ordering::Relaxed);
        if claimed.is_err() {
            return false;
        }
        let begun = Instant::now();
        let (result, taken) = self.execute(index, slot, token);
        let elapsed = begun.elapsed();
        let nanoseconds = u32::try_from(elapsed.as_nanos()).unwrap_or(u32::MAX);
        slot.chain_ns.store(nanoseconds, Ordering::Relaxed);
        slot.result.store(result, Ordering::Relaxed);
        let next = if detached {
            slot_state::FREE
        } else {
            slot_state::DONE
        };
        slot.state.store(next, Ordering::Release);
        self.space.table().header.served.fetch_add(1, Ordering::Release);
        // Pairs with the sleeper's fence between setting `sleeping` and looking at the state again.
        fence(Ordering::SeqCst);
        if slot.sleeping.load(Ordering::Relaxed) != 0 {
            let _ = futex::wake(&slot.state, futex::Flags::empty(), i32::MAX as u32);
            // It waits for this processor, often: before anything else is looked at.
            std::thread::yield_now();
        }
        if let Some((event, round)) = taken {
            self.space.chain().record(round);
            let nanoseconds = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
            self.stats.by_event.of(event).record(nanoseconds);
        }
        true
    }

    /// Runs one request. The answer is 0 or a negative errno, and what a start took.
    fn execute(&self, index: usize, slot: &Slot, token: &MaySleep) -> (i32, Option<(Event, Unrecorded)>) {
        let (op, start, end) = (
            slot.op.load(Ordering::Relaxed),
            slot.start.load(Ordering::Relaxed),
            slot.end.load(Ordering::Relaxed),
        );
        let event = Event::from_slot(slot.event.load(Ordering::Relaxed));
        match (op, event) {
            (slot_op::START, Some(event)) if start < end && end <= USER_END => {
                // A start in a slot whose invalidation is open: the end was lost, which costs a retry at most.
                if let Some(lost) = self.take_open(index) {
                    self.malformed(index, "start without the end of the last one");
                    self.space
                        .chain()
                        .invalidate_range_end(lost, Ctx::MaySleep(token));
                }
                let range = NotifierRange {
                    start,
                    end,
                    event,
                    blockable: true,
                };
                match self.space.start(range, token) {
                    Ok((started, round)) => {
                        let generation = slot.generation.load(Ordering::Relaxed);
                        self.space.publish_change(start, end, generation);
                        // Before the answer: who has one, is counted.
                        self.stats.starts.fetch_add(1, Ordering::Relaxed);
                        let lost = self.put_open(index, started);
                        if let Some(lost) = lost {
                            // The application has made the slot a request while it was being served.
                            self.malformed(index, "two starts at once");
                            self.space
                                .chain()
                                .invalidate_range_end(lost, Ctx::MaySleep(token));
                        }
                        (0, Some((event, round)))
                    }
                    Err(errno) => (-errno, None),
                }
            }
            (slot_op::END, _) => match self.take_open(index) {
                Some(started) => {
                    self.space
                        .chain()
                        .invalidate_range_end(started, Ctx::MaySleep(token));
                    self.stats.ends.fetch_add(1, Ordering::Relaxed);
                    (0, None)
                }
                None => (self.malformed(index, "end without a start"), None),
            },
            _ => (self.malformed(index, "operands out of range"), None),
        }
    }

    fn malformed(&self, slot: usize, why: &str) -> i32 {
        let before = self.stats.malformed.fetch_add(1, Ordering::Relaxed);
        // The first ones, then every thousandth: the application chooses how many there are.
        if before < 3 || before.is_multiple_of(1000) {
            tracing::warn!(session = self.space.id(), slot, why, "malformed mailbox slot");
        }
        -libc::EINVAL
    }
}

#[cfg(test)]
#[path = "mailbox_tests.rs"]
mod tests;
