//! The interval form: a subscriber that cares about one range and closes the fill/invalidate race with a
//! sequence (HMM's and RDMA ODP's way; `mm/mmu_notifier.c` and `mm/hmm.c` in Linux 6.12).
//!
//! The set's sequence starts at 2. It is odd while an invalidation runs that touches some interval. A callback
//! stores the odd value in its interval; a reader that finds that value waits, and a reader whose value is no
//! longer the interval's starts over.
//!
//! What the kernel asks of each user is built in here:
//! * S4: the interval owns the user's lock. The sequence is stored under it, before the user's callback runs,
//!   always; [`IntervalGuard::read_retry`] exists only on the guard of the same lock.
//! * S5: [`IntervalNotifier::read_begin`] returns the only [`Sequence`] that `read_retry` accepts.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};

use super::context::{Ctx, MaySleep, in_callback, might_sleep};
use super::event_count::EventCount;
use super::range::{Event, NotifierRange};
use super::spin::SpinMutex;
use super::{Again, Subscriber, UnregisterError};

/// What read_begin saw. Only good for the interval that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence(u64);

/// Why a read could not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadBusy {
    /// An invalidation of the interval runs ([`IntervalNotifier::try_read_begin`] only).
    #[error("an invalidation of this interval is running; try again after its end")]
    Invalidating,
    /// The address space has ended (S12).
    #[error("the address space has been released; nothing can be looked up in it any more")]
    Released,
}

/// The user's side of an interval.
pub trait IntervalOps: Send + Sync + 'static {
    /// What the user's lock protects: the translations.
    type Protected: Send + 'static;

    /// Drop the translations of the range and wait until the device has let go of them (S2). Called with the
    /// lock held and the sequence already stored. `range` may reach beyond the interval.
    ///
    /// # Errors
    /// [`Again`] when it would have to sleep in [`Ctx::NonSleeping`].
    fn invalidate(
        &self,
        protected: &mut Self::Protected,
        range: &NotifierRange,
        ctx: Ctx<'_>,
    ) -> Result<(), Again>;
}

/// One interval and its user's lock.
#[derive(Debug)]
pub struct IntervalNotifier<O: IntervalOps> {
    start: u64,
    end: u64,
    ops: O,
    set: Weak<IntervalNotifiers>,
    sequence: AtomicU64,
    /// Written under `protected`.
    removed: AtomicBool,
    released: AtomicBool,
    protected: Mutex<O::Protected>,
}

/// The user's lock, held.
#[derive(Debug)]
pub struct IntervalGuard<'a, O: IntervalOps> {
    interval: &'a IntervalNotifier<O>,
    guard: MutexGuard<'a, O::Protected>,
}

trait AnyInterval: Send + Sync {
    fn meets(&self, range: &NotifierRange) -> bool;
    fn invalidate(&self, range: &NotifierRange, sequence: u64, ctx: Ctx<'_>) -> Result<(), Again>;
    fn release(&self, range: &NotifierRange, sequence: u64, token: &MaySleep);
}

struct State {
    sequence: u64,
    active: u64,
    intervals: Arc<Vec<Arc<dyn AnyInterval>>>,
    released: bool,
}

/// The intervals of one address space. Register it with the chain.
///
/// Lock order: `writers`, then an interval's lock, then `state` (a spin lock, held for a few instructions).
pub struct IntervalNotifiers {
    state: SpinMutex<State>,
    /// Serialises insertion and removal, which allocate outside `state` (S8).
    writers: Mutex<()>,
    /// The sequence has become even.
    evened: EventCount,
}

impl std::fmt::Debug for IntervalNotifiers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("IntervalNotifiers")
            .field("sequence", &state.sequence)
            .field("active", &state.active)
            .field("intervals", &state.intervals.len())
            .finish_non_exhaustive()
    }
}

impl IntervalNotifiers {
    /// An empty set.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: SpinMutex::new(State {
                sequence: 2,
                active: 0,
                intervals: Arc::default(),
                released: false,
            }),
            writers: Mutex::new(()),
            evened: EventCount::default(),
        })
    }

    /// Adds an interval `[start, end)`. While an invalidation runs, the new interval counts as being
    /// invalidated until it has ended, whatever its range (S10).
    ///
    /// # Errors
    /// [`ReadBusy::Released`].
    ///
    /// # Panics
    /// When the interval is empty.
    pub fn insert<O: IntervalOps>(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        ops: O,
        protected: O::Protected,
        _token: &MaySleep,
    ) -> Result<Arc<IntervalNotifier<O>>, ReadBusy> {
        might_sleep("IntervalNotifiers::insert");
        assert!(start < end, "an interval needs start < end: {start:#x}..{end:#x}");
        let interval = Arc::new(IntervalNotifier {
            start,
            end,
            ops,
            set: Arc::downgrade(self),
            sequence: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            released: AtomicBool::new(false),
            protected: Mutex::new(protected),
        });
        let writers = lock(&self.writers);
        let mut list = Vec::clone(&self.state.lock().intervals);
        list.push(interval.clone() as Arc<dyn AnyInterval>);
        let list = Arc::new(list);
        let mut state = self.state.lock();
        if state.released {
            return Err(ReadBusy::Released);
        }
        if state.active != 0 {
            state.sequence |= 1;
        }
        // Odd and current: readers wait. Else: a value that no invalidation will have.
        let first = if state.sequence & 1 == 1 {
            state.sequence
        } else {
            state.sequence - 1
        };
        interval.sequence.store(first, Ordering::Relaxed);
        let old = std::mem::replace(&mut state.intervals, list);
        drop(state);
        drop(old);
        drop(writers);
        Ok(interval)
    }

    /// Takes an interval out. No callback of it runs when this returns, and none will.
    ///
    /// # Errors
    /// [`UnregisterError::FromCallback`] inside a callback (S7); [`UnregisterError::NotRegistered`] the second
    /// time.
    pub fn remove<O: IntervalOps>(
        &self,
        interval: &Arc<IntervalNotifier<O>>,
        _token: &MaySleep,
    ) -> Result<(), UnregisterError> {
        if in_callback() {
            return Err(UnregisterError::FromCallback);
        }
        might_sleep("IntervalNotifiers::remove");
        let _writers = lock(&self.writers);
        {
            let _guard = lock(&interval.protected);
            if interval.removed.swap(true, Ordering::Relaxed) {
                return Err(UnregisterError::NotRegistered);
            }
        }
        let this = Arc::as_ptr(interval).cast::<()>();
        let mut list = Vec::clone(&self.state.lock().intervals);
        list.retain(|i| Arc::as_ptr(i).cast::<()>() != this);
        let list = Arc::new(list);
        let old = std::mem::replace(&mut self.state.lock().intervals, list);
        drop(old);
        Ok(())
    }

    /// Invalidations that run now.
    #[must_use]
    pub fn active(&self) -> u64 {
        self.state.lock().active
    }

    /// Threads that sleep in [`IntervalNotifier::read_begin`].
    #[must_use]
    pub fn waiting_readers(&self) -> u32 {
        self.evened.waiters()
    }

    fn end(&self) {
        let mut state = self.state.lock();
        assert!(state.active > 0, "C2: an end without a start");
        state.active -= 1;
        if state.active != 0 || state.sequence & 1 == 0 {
            return;
        }
        state.sequence += 1;
        drop(state);
        self.evened.notify();
    }
}

impl Subscriber for IntervalNotifiers {
    fn name(&self) -> &'static str {
        "interval notifiers"
    }

    fn sleeping(&self) -> bool {
        true
    }

    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        let (intervals, sequence) = {
            let mut state = self.state.lock();
            state.active += 1;
            if state.intervals.iter().any(|i| i.meets(range)) {
                state.sequence |= 1;
            }
            (state.intervals.clone(), state.sequence)
        };
        let mut answer = Ok(());
        for interval in intervals.iter().filter(|i| i.meets(range)) {
            // All are called, also after one has refused (C6).
            answer = answer.and(interval.invalidate(range, sequence, ctx));
        }
        if answer.is_err() {
            // Nobody calls the end of a start that was refused (C3).
            self.end();
        }
        answer
    }

    fn invalidate_range_end(&self, _range: &NotifierRange, _ctx: Ctx<'_>) {
        self.end();
    }

    fn release(&self) {
        let token = MaySleep::claim("release of interval notifiers");
        let (intervals, sequence) = {
            let mut state = self.state.lock();
            state.released = true;
            state.active += 1;
            state.sequence |= 1;
            (state.intervals.clone(), state.sequence)
        };
        let range = NotifierRange::all(Event::Release, true);
        for interval in intervals.iter() {
            interval.release(&range, sequence, &token);
        }
        self.end();
    }
}

impl<O: IntervalOps> IntervalNotifier<O> {
    /// First byte.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The user's side.
    #[must_use]
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// Begins a read: call it before the page look-up (S5). Sleeps while an invalidation of the interval runs.
    ///
    /// # Errors
    /// [`ReadBusy::Released`].
    pub fn read_begin(&self, token: &MaySleep) -> Result<Sequence, ReadBusy> {
        might_sleep("IntervalNotifier::read_begin");
        let set = self.set.upgrade().ok_or(ReadBusy::Released)?;
        set.evened.wait_for(token, "IntervalNotifier::read_begin", || {
            match self.begin_in(&set) {
                Err(ReadBusy::Invalidating) => None,
                answer => Some(answer),
            }
        })
    }

    /// [`Self::read_begin`] that does not sleep.
    ///
    /// # Errors
    /// [`ReadBusy`].
    pub fn try_read_begin(&self) -> Result<Sequence, ReadBusy> {
        let set = self.set.upgrade().ok_or(ReadBusy::Released)?;
        self.begin_in(&set)
    }

    fn begin_in(&self, set: &IntervalNotifiers) -> Result<Sequence, ReadBusy> {
        let state = set.state.lock();
        if state.released {
            return Err(ReadBusy::Released);
        }
        let sequence = self.sequence.load(Ordering::Acquire);
        if sequence == state.sequence {
            return Err(ReadBusy::Invalidating);
        }
        Ok(Sequence(sequence))
    }

    /// Takes the user's lock.
    #[must_use]
    pub fn lock(&self, _token: &MaySleep) -> IntervalGuard<'_, O> {
        might_sleep("IntervalNotifier::lock");
        IntervalGuard {
            interval: self,
            guard: lock(&self.protected),
        }
    }

    /// Whether the read has certainly been overtaken. A hint only (S6): `false` promises nothing.
    #[must_use]
    pub fn check_retry(&self, sequence: Sequence) -> bool {
        self.sequence.load(Ordering::Relaxed) != sequence.0
    }
}

impl<O: IntervalOps> IntervalGuard<'_, O> {
    /// Whether the look-up between `read_begin` and this must be thrown away (S5). `false` is good for as long
    /// as this guard lives: install the translation under it.
    #[must_use]
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        self.interval.released.load(Ordering::Acquire)
            || self.interval.removed.load(Ordering::Relaxed)
            || self.interval.sequence.load(Ordering::Relaxed) != sequence.0
    }
}

impl<O: IntervalOps> Deref for IntervalGuard<'_, O> {
    type Target = O::Protected;
    fn deref(&self) -> &O::Protected {
        &self.guard
    }
}

impl<O: IntervalOps> DerefMut for IntervalGuard<'_, O> {
    fn deref_mut(&mut self) -> &mut O::Protected {
        &mut self.guard
    }
}

impl<O: IntervalOps> AnyInterval for IntervalNotifier<O> {
    fn meets(&self, range: &NotifierRange) -> bool {
        range.meets(self.start, self.end)
    }

    fn invalidate(&self, range: &NotifierRange, sequence: u64, ctx: Ctx<'_>) -> Result<(), Again> {
        let mut guard = match ctx {
            Ctx::MaySleep(_) => lock(&self.protected),
            Ctx::NonSleeping(_) => match self.protected.try_lock() {
                Ok(guard) => guard,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return Err(Again),
            },
        };
        if self.removed.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.sequence.store(sequence, Ordering::Release);
        self.ops.invalidate(&mut guard, range, ctx)
    }

    fn release(&self, range: &NotifierRange, sequence: u64, token: &MaySleep) {
        let mut guard = lock(&self.protected);
        self.released.store(true, Ordering::Release);
        self.sequence.store(sequence, Ordering::Release);
        if !self.removed.load(Ordering::Relaxed)
            && self
                .ops
                .invalidate(&mut guard, range, Ctx::MaySleep(token))
                .is_err()
        {
            tracing::error!(
                start = self.start,
                end = self.end,
                "C4: an interval refused a blockable release"
            );
        }
    }
}

/// A panic of a user's callback leaves its data as it is; the sequence protects readers.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
