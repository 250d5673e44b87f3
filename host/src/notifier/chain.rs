//! The chain: who is told about an invalidation, in which order, and what the caller may then do.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::active::{ActiveTable, Claim};
use super::context::{Ctx, InCallback, MaySleep, NonSleeping, in_callback, might_sleep};
use super::event_count::EventCount;
use super::measure::{Recorder, Unrecorded};
use super::range::{Event, NotifierRange};
use super::subscriber_list::{Entered, Place};
use super::{Again, RegisterError, StartError, Subscriber, UnregisterError};

/// Subscribers that a chain can have at once (bits of a word).
pub const MAX_SUBSCRIBERS: usize = 64;

/// Proof of a registration; needed to undo it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Registration {
    place: usize,
    number: u64,
}

/// Counters of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct ChainStats {
    /// Starts that returned to a caller that may now change the range.
    pub started: u64,
    /// Starts that were refused (non-blockable ones).
    pub refused: u64,
    /// Ends by a call.
    pub ended: u64,
    /// Starts whose token was dropped: the chain ended them itself. A caller's bug (C2).
    pub dropped: u64,
    /// Blockable starts that a subscriber refused. A subscriber's bug (C4).
    pub broken: u64,
    /// Ranges between start and end now.
    pub active: u64,
    /// Subscribers now.
    pub subscribers: u64,
}

#[derive(Debug, Default)]
struct Counters {
    started: AtomicU64,
    refused: AtomicU64,
    ended: AtomicU64,
    dropped: AtomicU64,
    broken: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Occupant {
    #[default]
    Nobody,
    Subscriber(u64),
    /// Being taken out: the place is not free yet.
    Leaving,
}

#[derive(Debug)]
struct Registry {
    occupants: [Occupant; MAX_SUBSCRIBERS],
    next_number: u64,
}

/// The notifier chain of one address space.
///
/// Lock order: `registry` is a leaf and is never held during a callback or a wait; start, end and
/// `invalidate_page` do not take it.
pub struct Chain {
    places: [Place<dyn Subscriber>; MAX_SUBSCRIBERS],
    /// Bits of the places that have a subscriber, or had one a moment ago: set before a place is opened, cleared after
    /// it was closed, so that a walk need not look at 64 places for the one that is taken.
    taken: AtomicU64,
    /// Set once a place's release has been called or is being called: at most once (C7).
    released: [AtomicBool; MAX_SUBSCRIBERS],
    registry: Mutex<Registry>,
    /// A place may have become empty of readers.
    emptied: EventCount,
    active: ActiveTable,
    closed: AtomicBool,
    recorder: Recorder,
    counters: Counters,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// A start that has succeeded: the caller may change the range, then gives this to
/// [`Chain::invalidate_range_end`]. Dropping it ends the invalidation too, but is counted as a bug (C2).
#[derive(Debug)]
#[must_use = "every start needs its end (C2)"]
pub struct Started {
    chain: Arc<Chain>,
    claim: Claim,
    range: NotifierRange,
    open: bool,
}

impl Started {
    /// The range that was started.
    #[must_use]
    pub fn range(&self) -> NotifierRange {
        self.range
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        tracing::error!(range = ?self.range, "C2: a started invalidation was dropped without its end");
        self.chain.counters.dropped.fetch_add(1, Ordering::Relaxed);
        // Dropped where sleeping is allowed or not: subscribers hear what is true here.
        if super::context::atomic_depth() == 0 {
            let token = MaySleep::claim("end of a dropped start");
            self.chain.finish(&self.claim, &self.range, Ctx::MaySleep(&token));
        } else {
            let section = NonSleeping::enter();
            self.chain
                .finish(&self.claim, &self.range, Ctx::NonSleeping(&section));
        }
    }
}

impl Chain {
    /// A chain without subscribers.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            places: std::array::from_fn(|_| Place::default()),
            taken: AtomicU64::new(0),
            released: std::array::from_fn(|_| AtomicBool::new(false)),
            registry: Mutex::new(Registry {
                occupants: [Occupant::Nobody; MAX_SUBSCRIBERS],
                next_number: 1,
            }),
            emptied: EventCount::default(),
            active: ActiveTable::new(),
            closed: AtomicBool::new(false),
            recorder: Recorder::default(),
            counters: Counters::default(),
        })
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Plain data, valid after any panic.
        self.registry
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Adds a subscriber. It is told of every invalidation that starts from now on, and when this returns
    /// every invalidation that was already running has ended: what the subscriber looks up afterwards is
    /// not being changed by anything that it has not been told of (S10).
    ///
    /// So this waits for running invalidations: never call it between a start and its end on the same
    /// thread, nor on the only thread that can end them.
    ///
    /// # Errors
    /// [`RegisterError::Released`] after (or during) [`Self::release`], [`RegisterError::Full`] with
    /// [`MAX_SUBSCRIBERS`], [`RegisterError::FromCallback`] inside a callback.
    pub fn register(
        &self,
        subscriber: Arc<dyn Subscriber>,
        token: &MaySleep,
    ) -> Result<Registration, RegisterError> {
        if in_callback() {
            return Err(RegisterError::FromCallback);
        }
        might_sleep("Chain::register");
        let name = subscriber.name();
        let registration = {
            let mut registry = self.registry();
            if self.closed.load(Ordering::Relaxed) {
                return Err(RegisterError::Released);
            }
            let place = registry
                .occupants
                .iter()
                .position(|o| *o == Occupant::Nobody)
                .ok_or(RegisterError::Full { name })?;
            let number = registry.next_number;
            registry.next_number += 1;
            registry.occupants[place] = Occupant::Subscriber(number);
            self.released[place].store(false, Ordering::Relaxed);
            // SAFETY-relevant order is inside Place: Nobody means that `take` has returned, and the
            // registry lock keeps other publishers out.
            self.publish(place, subscriber);
            Registration { place, number }
        };
        // Pairs with the fence in `start`: an invalidation that did not see the subscriber is seen here.
        fence(Ordering::SeqCst);
        self.active.wait_for_running(token);
        if self.closed.load(Ordering::Acquire) {
            return Err(RegisterError::Released);
        }
        Ok(registration)
    }

    #[allow(unsafe_code)]
    fn publish(&self, place: usize, subscriber: Arc<dyn Subscriber>) {
        // Before the fence in `register`: a start that does not see the bit is waited for there.
        self.taken.fetch_or(1 << place, Ordering::Relaxed);
        // SAFETY: only called with the registry locked and the place's occupant having been Nobody, which it
        // is before the first publish and after `take` has returned.
        unsafe { self.places[place].publish(subscriber) }
    }

    /// Removes a subscriber: calls its release unless that has been done, and returns when no callback of it
    /// runs and none can start.
    ///
    /// # Errors
    /// [`UnregisterError::FromCallback`] inside any callback (S7: it would wait for itself);
    /// [`UnregisterError::NotRegistered`] when it is gone already, for example by [`Self::release`].
    pub fn unregister(&self, registration: Registration, token: &MaySleep) -> Result<(), UnregisterError> {
        if in_callback() {
            return Err(UnregisterError::FromCallback);
        }
        might_sleep("Chain::unregister");
        self.take_occupant(registration.place, Some(registration.number))
            .ok_or(UnregisterError::NotRegistered)?;
        self.retire(registration.place, token);
        Ok(())
    }

    /// Marks the place's subscriber as leaving. One caller gets `Some`.
    fn take_occupant(&self, place: usize, number: Option<u64>) -> Option<()> {
        let mut registry = self.registry();
        match registry.occupants[place] {
            Occupant::Subscriber(n) if number.is_none_or(|wanted| wanted == n) => {
                registry.occupants[place] = Occupant::Leaving;
                Some(())
            }
            _ => None,
        }
    }

    /// Release, close, wait for callbacks, drop. Only for whoever `take_occupant` gave the place to.
    #[allow(unsafe_code)]
    fn retire(&self, place: usize, token: &MaySleep) {
        if let Some(subscriber) = self.places[place].enter(&self.emptied) {
            self.release_once(place, &subscriber);
        }
        assert!(self.places[place].close(), "one owner takes a subscriber out");
        self.places[place].wait_readers(&self.emptied, token, "Chain::unregister");
        // Invalidations that are still between start and end must not call the next occupant's end.
        self.active.forget_subscriber(place);
        // SAFETY: `close` returned true above.
        let subscriber = unsafe { self.places[place].take() };
        self.taken.fetch_and(!(1 << place), Ordering::Relaxed);
        self.registry().occupants[place] = Occupant::Nobody;
        self.emptied.notify();
        drop(subscriber);
    }

    fn release_once(&self, place: usize, subscriber: &Entered<'_, dyn Subscriber>) {
        if !self.released[place].swap(true, Ordering::AcqRel) {
            let _in = InCallback::enter();
            subscriber.release();
        }
    }

    /// The address space ends. Every subscriber's release is called, once (C7); afterwards the chain has no
    /// subscribers and takes none. Returns when no callback runs any more, also of subscribers that another
    /// thread is taking out: the pages may then be freed.
    ///
    /// # Panics
    /// Inside a callback (it would wait for itself) or an atomic section.
    pub fn release(&self, token: &MaySleep) {
        assert!(
            !in_callback(),
            "S7: Chain::release was called from a subscriber's callback"
        );
        might_sleep("Chain::release");
        {
            let _registry = self.registry();
            self.closed.store(true, Ordering::Release);
        }
        for place in 0..MAX_SUBSCRIBERS {
            if self.take_occupant(place, None).is_some() {
                self.retire(place, token);
            }
        }
        // Those that an unregister is taking out at this moment.
        self.emptied.wait_for(token, "Chain::release", || {
            self.registry()
                .occupants
                .iter()
                .all(|o| *o == Occupant::Nobody)
                .then_some(())
        });
    }

    /// Whether [`Self::release`] has begun.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Tells every subscriber that the range is about to change. Non-sleeping ones first, in an atomic
    /// section; then the others, which may sleep when the range is blockable. Each is called even after one
    /// has refused (C6). When this returns `Ok`, no device uses an old translation (S2) and none may create
    /// one (S1) until the end.
    ///
    /// # Errors
    /// [`StartError::Again`]: a non-blockable start was refused; change nothing, call no end: the chain has
    /// given those that had succeeded theirs (C3). [`StartError::Broken`]: a subscriber refused a blockable
    /// start, which it must not (C4); nothing is known about its translations. [`StartError::Empty`].
    ///
    /// # Panics
    /// When a blockable start is made in a context that must not sleep.
    pub fn invalidate_range_start(
        self: &Arc<Self>,
        range: NotifierRange,
        ctx: Ctx<'_>,
    ) -> Result<Started, StartError> {
        let (started, round) = self.start_and_record_later(range, ctx)?;
        self.record(round);
        Ok(started)
    }

    /// What a start took, into the figures. On the thread that made the start, before it sleeps.
    pub fn record(&self, round: Unrecorded) {
        self.recorder.enter(round);
    }

    /// [`Self::invalidate_range_start`] for a caller whom somebody waits for: it answers, and then gives what the start
    /// took to [`Self::record`].
    ///
    /// # Errors
    /// As [`Self::invalidate_range_start`].
    ///
    /// # Panics
    /// As [`Self::invalidate_range_start`].
    pub fn start_and_record_later(
        self: &Arc<Self>,
        range: NotifierRange,
        ctx: Ctx<'_>,
    ) -> Result<(Started, Unrecorded), StartError> {
        let token = self.check(&range, ctx)?;
        let begun = Instant::now();
        let claim = match self.active.claim(range.start, range.end) {
            Some(claim) => claim,
            None => match token {
                Some(token) => self.active.claim_waiting(range.start, range.end, token),
                None => {
                    return Err(self.refuse(Some(range.event), "the chain (table of active ranges is full)"));
                }
            },
        };
        // From here on a panic of a callback ends what was started.
        let mut started = Started {
            chain: self.clone(),
            claim,
            range,
            open: true,
        };
        // Pairs with the fence in `register` (S10).
        fence(Ordering::SeqCst);
        let (refused_by, round) = self.call_all(Some(range.event), begun, token, |place, subscriber, ctx| {
            subscriber.invalidate_range_start(&range, ctx)?;
            self.active.succeeded(&started.claim, place);
            Ok(())
        });
        let Some(subscriber) = refused_by else {
            self.counters.started.fetch_add(1, Ordering::Relaxed);
            return Ok((started, round));
        };
        self.record(round);
        started.open = false;
        self.finish(&started.claim, &range, ctx);
        if range.blockable {
            self.counters.broken.fetch_add(1, Ordering::Relaxed);
            tracing::error!(subscriber, ?range, "C4: a blockable start was refused");
            return Err(StartError::Broken { subscriber });
        }
        Err(self.refuse(Some(range.event), subscriber))
    }

    /// The change is over (C1) and the range may be looked up again. Same kind of context as the start.
    ///
    /// # Panics
    /// When the token is of another chain (C2), or when a blockable invalidation is ended in a context that
    /// must not sleep.
    pub fn invalidate_range_end(self: &Arc<Self>, mut started: Started, ctx: Ctx<'_>) {
        assert!(
            Arc::ptr_eq(self, &started.chain),
            "C2: the start of {:?} was on another chain",
            started.range
        );
        if started.range.blockable {
            assert!(
                matches!(ctx, Ctx::MaySleep(_)),
                "C2: {:?} was started blockable and is ended in a context that must not sleep",
                started.range
            );
            might_sleep("end of a blockable invalidation");
        }
        started.open = false;
        self.finish(&started.claim, &started.range, ctx);
        self.counters.ended.fetch_add(1, Ordering::Relaxed);
        self.recorder
            .of(Some(started.range.event))
            .ends
            .fetch_add(1, Ordering::Relaxed);
    }

    /// mmu notifier v13's single-page operation: the page's entry is gone and flushed, the page itself is
    /// still referenced. One round of callbacks, no end. Never sleeps unless `range.blockable`.
    ///
    /// # Errors
    /// As [`Self::invalidate_range_start`]. After `Again` the caller keeps its reference to the page.
    pub fn invalidate_page(self: &Arc<Self>, range: NotifierRange, ctx: Ctx<'_>) -> Result<(), StartError> {
        let token = self.check(&range, ctx)?;
        let begun = Instant::now();
        fence(Ordering::SeqCst);
        let (refused, round) = self.call_all(None, begun, token, |_, subscriber, ctx| {
            subscriber.invalidate_page(&range, ctx)
        });
        self.record(round);
        match refused {
            None => Ok(()),
            Some(subscriber) if range.blockable => {
                self.counters.broken.fetch_add(1, Ordering::Relaxed);
                tracing::error!(subscriber, ?range, "C4: a blockable invalidate_page was refused");
                Err(StartError::Broken { subscriber })
            }
            Some(subscriber) => Err(self.refuse(None, subscriber)),
        }
    }

    /// Whether any device has used the range since the last call; clears the marks and flushes.
    /// Never sleeps: sleeping subscribers answer from what they know.
    #[must_use]
    pub fn clear_flush_young(&self, start: u64, end: u64) -> bool {
        self.any(|s| s.clear_flush_young(start, end))
    }

    /// Like [`Self::clear_flush_young`] without flushing.
    #[must_use]
    pub fn clear_young(&self, start: u64, end: u64) -> bool {
        self.any(|s| s.clear_young(start, end))
    }

    /// Whether any device has used the range; changes nothing.
    #[must_use]
    pub fn test_young(&self, start: u64, end: u64) -> bool {
        self.any(|s| s.test_young(start, end))
    }

    fn any(&self, mut ask: impl FnMut(&dyn Subscriber) -> bool) -> bool {
        let _section = NonSleeping::enter();
        let mut young = false;
        for index in self.taken_places() {
            if let Some(subscriber) = self.places[index].enter(&self.emptied) {
                let _in = InCallback::enter();
                young |= ask(&*subscriber);
            }
        }
        young
    }

    fn taken_places(&self) -> impl Iterator<Item = usize> {
        let mut left = self.taken.load(Ordering::Relaxed);
        std::iter::from_fn(move || {
            let index = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            (index < MAX_SUBSCRIBERS).then_some(index)
        })
    }

    /// Whether an invalidation that meets `[start, end)` is between its start and its end.
    #[must_use]
    pub fn is_changing(&self, start: u64, end: u64) -> bool {
        self.active.meets(start, end)
    }

    /// Durations and switches by event.
    #[must_use]
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> ChainStats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counters;
        ChainStats {
            started: read(&c.started),
            refused: read(&c.refused),
            ended: read(&c.ended),
            dropped: read(&c.dropped),
            broken: read(&c.broken),
            active: self.active.count(),
            subscribers: self
                .registry()
                .occupants
                .iter()
                .filter(|o| matches!(o, Occupant::Subscriber(_)))
                .count() as u64,
        }
    }

    /// Threads that wait inside [`Self::register`] for running invalidations. For tests and dumps.
    #[must_use]
    pub fn waiting_registrations(&self) -> u32 {
        self.active.waiters()
    }

    /// Threads that wait for callbacks to leave ([`Self::unregister`], [`Self::release`]).
    #[must_use]
    pub fn waiting_removals(&self) -> u32 {
        self.emptied.waiters()
    }

    /// The token when this call may sleep.
    fn check<'a>(&self, range: &NotifierRange, ctx: Ctx<'a>) -> Result<Option<&'a MaySleep>, StartError> {
        if range.start >= range.end {
            return Err(StartError::Empty {
                start: range.start,
                end: range.end,
            });
        }
        if !range.blockable {
            return Ok(None);
        }
        might_sleep("a blockable invalidation");
        match ctx {
            Ctx::MaySleep(token) => Ok(Some(token)),
            Ctx::NonSleeping(_) => panic!("C4: a blockable {range:?} in a context that must not sleep"),
        }
    }

    fn refuse(&self, event: Option<Event>, subscriber: &'static str) -> StartError {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        self.recorder.of(event).refused.fetch_add(1, Ordering::Relaxed);
        StartError::Again { subscriber }
    }

    /// Calls every subscriber, the non-sleeping ones first. Returns the first that refused, and what it took.
    fn call_all(
        &self,
        event: Option<Event>,
        begun: Instant,
        token: Option<&MaySleep>,
        mut call: impl FnMut(usize, &dyn Subscriber, Ctx<'_>) -> Result<(), Again>,
    ) -> (Option<&'static str>, Unrecorded) {
        let mut refused = None;
        let mut sleepers = 0u64;
        let mut round = Unrecorded::begin(event);
        let nonsleeping_begun = Instant::now();
        {
            let section = NonSleeping::enter();
            for index in self.taken_places() {
                let Some(subscriber) = self.places[index].enter(&self.emptied) else {
                    continue;
                };
                if subscriber.sleeping() {
                    sleepers |= 1 << index;
                    continue;
                }
                let _in = InCallback::enter();
                if call(index, &*subscriber, Ctx::NonSleeping(&section)).is_err() {
                    refused = refused.or(Some(subscriber.name()));
                }
            }
        }
        round.end_of_nonsleeping(nanoseconds(nonsleeping_begun));
        if sleepers != 0 {
            round.before_sleeping();
        }
        while sleepers != 0 {
            let index = sleepers.trailing_zeros() as usize;
            sleepers &= sleepers - 1;
            let Some(subscriber) = self.places[index].enter(&self.emptied) else {
                continue;
            };
            let _in = InCallback::enter();
            let answer = match token {
                Some(token) => call(index, &*subscriber, Ctx::MaySleep(token)),
                None => {
                    let section = NonSleeping::enter();
                    call(index, &*subscriber, Ctx::NonSleeping(&section))
                }
            };
            if answer.is_err() {
                refused = refused.or(Some(subscriber.name()));
            }
        }
        round.end(nanoseconds(begun));
        (refused, round)
    }

    /// Gives those whose start succeeded their end, and frees the active entry.
    fn finish(&self, claim: &Claim, range: &NotifierRange, ctx: Ctx<'_>) {
        let ends = self.active.succeeded_mask(claim);
        for want_sleeping in [false, true] {
            let mut left = ends;
            while left != 0 {
                let index = left.trailing_zeros() as usize;
                left &= left - 1;
                let Some(subscriber) = self.places[index].enter(&self.emptied) else {
                    continue;
                };
                // Asked after entering: if the subscriber has been replaced meanwhile, its bit is gone.
                if subscriber.sleeping() != want_sleeping || !self.active.has_succeeded(claim, index) {
                    continue;
                }
                let _in = InCallback::enter();
                match ctx {
                    Ctx::MaySleep(_) if want_sleeping && range.blockable => {
                        subscriber.invalidate_range_end(range, ctx);
                    }
                    _ => {
                        let section = NonSleeping::enter();
                        subscriber.invalidate_range_end(range, Ctx::NonSleeping(&section));
                    }
                }
            }
        }
        self.active.finish(claim);
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
