//! The coherence protocol, without pointers and mappings: what the model checker runs.
//!
//! Three orders make it work:
//!
//! 1. *Tickets, purges in progress and entries change under one lock.* A purge scans the tickets and
//!    clears entries in the same critical section in which it becomes active; a fill looks at purges and
//!    at its ticket in the same one in which it enters. So a fill came before a purge (and is cleared)
//!    or sees it (and is refused).
//! 2. *An access publishes itself, then looks up; a purge clears, then looks for accesses.* A full fence
//!    stands between the two on either side: the access sees the cleared slot, or the purge sees the
//!    access and waits for it.
//! 3. *An access leaves with a release store*, which the waiting purge acquires: what the access did to
//!    memory happened before the purge returned.
//!
//! An engine's epoch is its own counter, odd inside an access. A purge that finds it odd waits until it
//! changes: a later access of that engine did its fence after the purge's. (One global epoch would do as
//! well, but each purge would write a cache line that each access reads.)

use std::sync::atomic::{AtomicU64 as Counter, Ordering as Relax};

use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering, full_fence, spin_loop, yield_now};

use super::asked::Asked;
use super::defect::{Defect, Findings, Initiator};
use super::reach::{Reach, Span, Ticket};
use super::shadow::{Seen, Shadow};
use super::slot::{Entry, Found, Slot};
use super::types::{
    AtcConfig, AtcStats, Checks, FillRefused, Miss, PageSize, Purge, PurgeProgress, PurgeReport, SpaceId,
};

#[cfg(not(loom))]
type Lock<T> = super::spin::SpinLock<T>;
#[cfg(loom)]
type Lock<T> = super::spin::ModelLock<T>;

const CLASSES: usize = (PageSize::MAX_SHIFT - PageSize::MIN_SHIFT + 1) as usize;
/// Purges in progress that are remembered by range; more at once stop all fills until they are done.
const ACTIVE: usize = if cfg!(loom) { 2 } else { 64 };
/// Iterations of a drain that only spin.
const DRAIN_SPINS: u64 = if cfg!(loom) { 0 } else { 4096 };

/// One thread that accesses memory. Two cache lines: neighbours are prefetched in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct EngineSlot {
    /// Odd: inside an access.
    epoch: AtomicU64,
    taken: AtomicBool,
    /// Written by the engine only.
    hits: Counter,
    misses: Counter,
    mod_misses: Counter,
}

/// Everything that the lock protects.
#[derive(Debug)]
pub(super) struct State {
    /// Live entries by size class.
    counts: [u32; CLASSES],
    live: usize,
    tickets: Box<[Ticket]>,
    /// What each engine asks the client for.
    pub(super) asked: Box<[Option<Asked>]>,
    active: [Option<Reach>; ACTIVE],
    /// Purges in progress that found `active` full.
    unlisted: usize,
    hands: Box<[u8]>,
    fills: u64,
    refused: u64,
    purges: u64,
    purged: u64,
    evictions: u64,
    /// The sanitizer. Written with what it records, read by nothing here.
    shadow: Option<Box<Shadow>>,
}

/// A purge between its two halves.
#[derive(Debug)]
pub(super) struct Begun {
    reach: Reach,
    /// Where it is in `active`; `None`: nowhere, it counts as `unlisted`.
    place: Option<usize>,
    /// The sanitizer's number for it.
    pub(super) number: Option<u64>,
    /// It met a write that the client has been asked for.
    writes: bool,
    pub(super) report: PurgeReport,
}

/// How slots are cleared.
#[derive(Debug, Clone, Copy)]
struct Sweep {
    /// Not this one.
    keep: Option<usize>,
    /// Every entry that meets the range; else only those that begin in it (a fault to inject).
    overlap: bool,
    /// Only entries of this shift.
    only: Option<u8>,
}

/// Slots, tickets, purges and engines.
#[derive(Debug)]
pub(super) struct Core {
    slots: Box<[Slot]>,
    ways: usize,
    set_mask: usize,
    /// Bit per size class that has entries: what an access looks up. A hint: an entry whose bit is not
    /// seen yet is missed, and the miss is answered.
    classes: AtomicU32,
    engines: Box<[EngineSlot]>,
    state: Lock<State>,
    checks: Checks,
    /// There is a shadow.
    pub(super) sanitized: bool,
    /// Number of the last event that the shadow has recorded.
    events: Counter,
    drain_warning: std::time::Duration,
    drain_waits: Counter,
    drain_spins: Counter,
    drain_yields: Counter,
}

impl Core {
    pub(super) fn new(config: &AtcConfig) -> Self {
        let sets = config.sets.max(1).next_power_of_two();
        let ways = config.ways.clamp(1, 255);
        Self {
            slots: (0..sets * ways).map(|_| Slot::new()).collect(),
            ways,
            set_mask: sets - 1,
            classes: AtomicU32::new(0),
            engines: (0..config.engines.max(1))
                .map(|_| EngineSlot {
                    epoch: AtomicU64::new(0),
                    taken: AtomicBool::new(false),
                    hits: Counter::new(0),
                    misses: Counter::new(0),
                    mod_misses: Counter::new(0),
                })
                .collect(),
            state: Lock::new(State {
                counts: [0; CLASSES],
                live: 0,
                tickets: vec![Ticket::CLOSED; config.tickets].into(),
                asked: vec![None; config.engines.max(1)].into(),
                active: [None; ACTIVE],
                unlisted: 0,
                hands: vec![0; sets].into(),
                fills: 0,
                refused: 0,
                purges: 0,
                purged: 0,
                evictions: 0,
                shadow: config.sanitize.map(|names| {
                    let engines = config.engines.max(1);
                    Box::new(Shadow::new(
                        names,
                        sets * ways,
                        config.tickets,
                        engines,
                        config.follow,
                    ))
                }),
            }),
            checks: config.checks,
            sanitized: config.sanitize.is_some(),
            events: Counter::new(0),
            drain_warning: config.drain_warning,
            drain_waits: Counter::new(0),
            drain_spins: Counter::new(0),
            drain_yields: Counter::new(0),
        }
    }

    // ---- engines ----

    /// Take an engine's slot.
    pub(super) fn claim(&self) -> Option<usize> {
        self.engines.iter().position(|engine| {
            engine
                .taken
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// Give it back; the engine is outside.
    pub(super) fn release(&self, engine: usize) {
        let slot = &self.engines[engine];
        assert!(
            slot.epoch.load(Ordering::Relaxed) & 1 == 0,
            "engine {engine} given back inside an access"
        );
        slot.taken.store(false, Ordering::Release);
    }

    #[inline]
    fn enter(&self, slot: &EngineSlot) {
        let epoch = slot.epoch.load(Ordering::Relaxed);
        // (A guard that was forgotten instead of dropped: going on would count as being outside.)
        assert!(epoch & 1 == 0, "an access inside an access");
        // Release although it opens something: a purge that misses the (even) value of the previous leave
        // and reads this one must still acquire what came before.
        slot.epoch.store(epoch.wrapping_add(1), Ordering::Release);
        #[cfg(loom)]
        if !self.checks.fence {
            return;
        }
        full_fence();
    }

    /// Look up; on a hit the engine is inside an access until [`Core::leave`].
    #[inline]
    pub(super) fn access(
        &self,
        engine: usize,
        space: u64,
        va: u64,
        write: bool,
    ) -> Result<(Found, u8), Miss> {
        let slot = &self.engines[engine];
        #[cfg(loom)]
        if !self.checks.publish_first {
            let found = self.lookup(space, va).ok_or(Miss::NoEntry)?;
            self.enter(slot);
            return Ok(found);
        }
        self.enter(slot);
        let miss = match self.lookup(space, va) {
            Some((found, shift)) if !write || found.writable || (!self.checks.clean && found.storable) => {
                bump(&slot.hits);
                return Ok((found, shift));
            }
            Some(_) => {
                bump(&slot.mod_misses);
                Miss::ReadOnly
            }
            None => {
                bump(&slot.misses);
                Miss::NoEntry
            }
        };
        self.leave(engine);
        Err(miss)
    }

    #[inline]
    fn lookup(&self, space: u64, va: u64) -> Option<(Found, u8)> {
        #[cfg(not(loom))]
        let validate = true;
        #[cfg(loom)]
        let validate = self.checks.sequence;
        let mut classes = self.classes.load(Ordering::Relaxed);
        while classes != 0 {
            let shift = PageSize::MIN_SHIFT + classes.trailing_zeros() as u8;
            classes &= classes - 1;
            let key = Entry::key(va, shift);
            let first = self.set(space, va >> shift, shift) * self.ways;
            for slot in &self.slots[first..first + self.ways] {
                if let Some(found) = slot.probe(space, key, validate) {
                    return Some((found, shift));
                }
            }
        }
        None
    }

    /// Leave an access.
    #[inline]
    pub(super) fn leave(&self, engine: usize) {
        let epoch = &self.engines[engine].epoch;
        #[cfg(loom)]
        if !self.checks.release {
            epoch.store(epoch.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
            return;
        }
        // Release: what the access did is done when a drain sees this.
        epoch.store(epoch.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    #[inline]
    fn set(&self, space: u64, page: u64, shift: u8) -> usize {
        // Neighbouring pages go to neighbouring sets; spaces and sizes are spread.
        let mix = space
            .wrapping_add(u64::from(shift) << 32)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            >> 32;
        (page ^ mix) as usize & self.set_mask
    }

    // ---- misses and fills ----

    /// Publish a miss. A ticket that is open already starts over.
    pub(super) fn open(&self, ticket: usize, space: u64, va: u64, by: Initiator) {
        let mut state = self.state.lock();
        state.tickets[ticket] = Ticket {
            open: true,
            space,
            va,
            ..Ticket::CLOSED
        };
        self.record(&mut state, |shadow| shadow.opened(ticket, by));
    }

    pub(super) fn close(&self, ticket: usize) {
        let mut state = self.state.lock();
        state.tickets[ticket] = Ticket::CLOSED;
        self.record(&mut state, |shadow| shadow.closed(ticket));
    }

    /// The ticket, if it is open.
    pub(super) fn ticket(&self, ticket: usize) -> Option<Ticket> {
        self.state.lock().tickets.get(ticket).copied().filter(|t| t.open)
    }

    /// How far purges of `va` in `space` have come since the miss was issued.
    pub(super) fn progress(&self, ticket: usize, space: u64, va: Span, target: Span) -> PurgeProgress {
        let state = self.state.lock();
        let met = state
            .tickets
            .get(ticket)
            .is_some_and(|t| t.open && t.met(space, va));
        if state.purging(space, va, target) {
            PurgeProgress::Running
        } else if met {
            PurgeProgress::Finished
        } else {
            PurgeProgress::None
        }
    }

    /// Enter a translation, or say why not.
    pub(super) fn fill(&self, ticket: usize, entry: &Entry) -> Result<(), FillRefused> {
        let mut state = self.state.lock();
        let verdict = self.admit(&state, ticket, entry);
        if let Err(refused) = verdict {
            state.refused += 1;
            return Err(refused);
        }
        let slot = self.install(&mut state, entry);
        state.fills += 1;
        self.record(&mut state, |shadow| shadow.filled(slot, ticket, entry));
        drop(state);
        self.say();
        Ok(())
    }

    fn admit(&self, state: &State, ticket: usize, entry: &Entry) -> Result<(), FillRefused> {
        let ticket = state
            .tickets
            .get(ticket)
            .filter(|t| t.open)
            .ok_or(FillRefused::NoTicket)?;
        let va = if self.checks.span {
            entry.span()
        } else {
            let page = PageSize::SIZE_4K;
            Span {
                first: page.base(ticket.va),
                last: page.base(ticket.va) + (page.bytes() - 1),
            }
        };
        if self.checks.active && state.purging(entry.space, va, entry.target()) {
            return Err(FillRefused::Purging);
        }
        if self.checks.kill && ticket.met(entry.space, va) {
            return Err(FillRefused::Killed);
        }
        Ok(())
    }

    /// A fill that was refused for a reason outside the protocol.
    pub(super) fn count_refused(&self) {
        self.state.lock().refused += 1;
    }

    /// Where it is now.
    fn install(&self, state: &mut State, entry: &Entry) -> usize {
        let set = self.set(entry.space, entry.va >> entry.shift, entry.shift);
        let ways = set * self.ways..(set + 1) * self.ways;
        let key = Entry::key(entry.va, entry.shift);
        let same = ways.clone().find(|&slot| {
            self.slots[slot]
                .entry()
                .is_some_and(|e| e.space == entry.space && Entry::key(e.va, e.shift) == key)
        });
        // Whatever else translates part of the span: at most one entry answers for an address.
        let reach = Reach::Space {
            space: entry.space,
            span: entry.span(),
        };
        let sweep = Sweep {
            keep: same,
            overlap: true,
            only: None,
        };
        self.clear(state, reach, sweep);
        let slot = same.unwrap_or_else(|| self.victim(state, set));
        if let Some(old) = self.slots[slot].entry() {
            if same.is_none() {
                state.evictions += 1;
            }
            self.count(state, old.shift, false);
        }
        self.slots[slot].write(entry);
        self.count(state, entry.shift, true);
        slot
    }

    /// A free slot of the set, else the first that was not used since the hand came by (clock).
    fn victim(&self, state: &mut State, set: usize) -> usize {
        let first = set * self.ways;
        if let Some(free) = (first..first + self.ways).find(|&slot| !self.slots[slot].is_live()) {
            return free;
        }
        let hand = usize::from(state.hands[set]);
        // One round clears all marks, so the second finds one.
        let turn = (0..=self.ways)
            .map(|step| (hand + step) % self.ways)
            .find(|way| self.slots[first + way].unused())
            .unwrap_or(hand);
        state.hands[set] = ((turn + 1) % self.ways) as u8;
        first + turn
    }

    fn count(&self, state: &mut State, shift: u8, up: bool) {
        let class = usize::from(shift - PageSize::MIN_SHIFT);
        let before = state.counts[class];
        if up {
            state.counts[class] += 1;
            state.live += 1;
        } else {
            state.counts[class] = before
                .checked_sub(1)
                .expect("an entry was counted when it was entered");
            state.live -= 1;
        }
        if (before == 0) != (state.counts[class] == 0) {
            let bit = 1 << class;
            let classes = self.classes.load(Ordering::Relaxed);
            self.classes
                .store(if up { classes | bit } else { classes & !bit }, Ordering::Relaxed);
        }
    }

    // ---- purges ----

    /// Become active, widen the misses, clear the entries.
    #[cfg(all(test, loom))]
    pub(super) fn begin(&self, reach: Reach) -> Begun {
        self.begin_of_size(reach, None, None)
    }

    /// As the head says; only entries of shift `only` are cleared, if given. Misses are widened by overlap in any case.
    /// `what`: for the sanitizer.
    pub(super) fn begin_of_size(&self, reach: Reach, only: Option<u8>, what: Option<Purge>) -> Begun {
        let mut state = self.state.lock();
        let place = state.active.iter().position(Option::is_none);
        match place {
            Some(place) => state.active[place] = Some(reach),
            None => state.unlisted += 1,
        }
        let tickets = state
            .tickets
            .iter_mut()
            .filter_map(|ticket| ticket.open.then(|| ticket.widen(reach)))
            .filter(|&widened| widened)
            .count();
        let (mut asked, mut writes) = (0, false);
        for access in state.asked.iter_mut().flatten() {
            if let Some(committed) = access.purge(reach) {
                asked += 1;
                writes |= committed;
            }
        }
        let entries = if self.checks.clear || reach.frees_memory() {
            let sweep = Sweep {
                keep: None,
                overlap: self.checks.overlap,
                only: only.filter(|_| !reach.frees_memory()),
            };
            self.clear(&mut state, reach, sweep)
        } else {
            0
        };
        state.purges += 1;
        state.purged += entries as u64;
        let number = what.and_then(|what| self.record(&mut state, |shadow| shadow.begun(what)));
        Begun {
            reach,
            place,
            number,
            writes,
            report: PurgeReport {
                entries,
                tickets,
                asked,
                ..PurgeReport::default()
            },
        }
    }

    /// Wait for the accesses that may have found what was cleared, then stop being active.
    pub(super) fn finish(&self, begun: Begun) -> PurgeReport {
        let mut report = begun.report;
        if self.checks.drain || begun.reach.frees_memory() {
            self.drain(&mut report, None);
        }
        if self.checks.drain && begun.writes && !begun.reach.frees_memory() {
            self.wait_for_writes(begun.reach, &mut report);
        }
        self.retire(&begun);
        self.say();
        report
    }

    /// Until the client has answered, or is gone: at most the messenger's time limit.
    fn wait_for_writes(&self, reach: Reach, report: &mut PurgeReport) {
        while self.writes_hold_up(reach) {
            report.yields += 1;
            yield_now();
        }
    }

    fn writes_hold_up(&self, reach: Reach) -> bool {
        let state = self.state.lock();
        state.asked.iter().flatten().any(|access| access.holds_up(reach))
    }

    /// [`Core::finish`] would wait for the client.
    pub(super) fn waits_for_writes(&self, begun: &Begun) -> bool {
        let waits = self.checks.drain && begun.writes && !begun.reach.frees_memory();
        waits && self.writes_hold_up(begun.reach)
    }

    pub(super) fn with_state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock())
    }

    /// Under the lock: the entry that translates `va`.
    pub(super) fn entry_of(&self, state: &State, space: u64, va: u64) -> Option<Entry> {
        let classes = (0..CLASSES).filter(|&class| state.counts[class] != 0);
        classes
            .map(|class| PageSize::MIN_SHIFT + class as u8)
            .find_map(|shift| {
                let key = Entry::key(va, shift);
                let first = self.set(space, va >> shift, shift) * self.ways;
                let slots = &self.slots[first..first + self.ways];
                let mut entries = slots.iter().filter_map(Slot::entry);
                entries.find(|entry| entry.space == space && Entry::key(entry.va, entry.shift) == key)
            })
    }

    /// What a thread inside an access would have to do not to wait for itself; the model checker shows
    /// that it is not enough.
    #[cfg(all(test, loom))]
    pub(super) fn finish_inside(&self, begun: &Begun, own: usize) {
        self.drain(&mut PurgeReport::default(), Some(own));
        self.retire(begun);
    }

    fn retire(&self, begun: &Begun) {
        let mut state = self.state.lock();
        match begun.place {
            Some(place) => {
                let was = state.active[place].take();
                assert_eq!(was, Some(begun.reach), "a purge finished in another one's place");
            }
            None => state.unlisted -= 1,
        }
        if let Some(number) = begun.number {
            self.record(&mut state, |shadow| {
                shadow.complete(number, || "has returned".into());
                shadow.finished(number);
            });
        }
    }

    /// See [`super::Atc::is_quiet`].
    pub fn is_quiet(&self) -> bool {
        self.engines
            .iter()
            .all(|slot| slot.epoch.load(Ordering::Acquire) & 1 == 0)
    }

    fn drain(&self, report: &mut PurgeReport, except: Option<usize>) {
        // After the clearing, before the epochs: see the head of the file.
        full_fence();
        for (engine, slot) in self.engines.iter().enumerate() {
            let epoch = slot.epoch.load(Ordering::Acquire);
            if epoch & 1 == 0 || except == Some(engine) {
                continue;
            }
            report.waited_for += 1;
            self.drain_waits.fetch_add(1, Relax::Relaxed);
            self.wait_for(engine, epoch, report);
        }
        self.drain_spins.fetch_add(report.spins, Relax::Relaxed);
        self.drain_yields.fetch_add(report.yields, Relax::Relaxed);
    }

    fn wait_for(&self, engine: usize, epoch: u64, report: &mut PurgeReport) {
        let mut since = None;
        let mut iterations = 0u64;
        while self.engines[engine].epoch.load(Ordering::Acquire) == epoch {
            iterations += 1;
            if iterations <= DRAIN_SPINS {
                report.spins += 1;
                spin_loop();
                continue;
            }
            report.yields += 1;
            yield_now();
            if !cfg!(loom) && iterations.is_multiple_of(64) && self.drain_warning != std::time::Duration::MAX
            {
                let since = since.get_or_insert_with(Warning::new);
                since.look(engine, self.drain_warning);
            }
        }
    }

    /// Clear what `reach` meets.
    fn clear(&self, state: &mut State, reach: Reach, sweep: Sweep) -> usize {
        if state.live == 0 {
            return 0;
        }
        let (space, span) = match reach {
            Reach::Nothing => return 0,
            Reach::Space { space, span } => (space, span),
            Reach::Target(_) | Reach::All => return self.clear_scan(state, reach, sweep),
        };
        // Page by page where the range is short, else look at every slot once.
        let far = |class: usize| {
            let shift = PageSize::MIN_SHIFT as usize + class;
            (span.last >> shift) - (span.first >> shift) >= self.slots.len() as u64 / self.ways as u64
        };
        if (0..CLASSES).any(|class| state.counts[class] != 0 && far(class)) {
            return self.clear_scan(state, reach, sweep);
        }
        let mut cleared = 0;
        for class in 0..CLASSES {
            if state.counts[class] == 0 {
                continue;
            }
            let shift = PageSize::MIN_SHIFT + class as u8;
            for page in span.first >> shift..=span.last >> shift {
                let first = self.set(space, page, shift) * self.ways;
                for slot in first..first + self.ways {
                    cleared += usize::from(self.clear_slot(state, slot, reach, sweep));
                }
            }
        }
        cleared
    }

    fn clear_scan(&self, state: &mut State, reach: Reach, sweep: Sweep) -> usize {
        let mut cleared = 0;
        for slot in 0..self.slots.len() {
            if state.live == 0 {
                break;
            }
            cleared += usize::from(self.clear_slot(state, slot, reach, sweep));
        }
        cleared
    }

    fn clear_slot(&self, state: &mut State, slot: usize, reach: Reach, sweep: Sweep) -> bool {
        if sweep.keep == Some(slot) {
            return false;
        }
        let Some(entry) = self.slots[slot].entry() else {
            return false;
        };
        if sweep.only.is_some_and(|shift| shift != entry.shift) {
            return false;
        }
        let mut va = entry.span();
        if !sweep.overlap {
            va.last = va.first;
        }
        if !reach.meets(entry.space, va, entry.target()) {
            return false;
        }
        self.slots[slot].clear();
        self.count(state, entry.shift, false);
        true
    }

    // ---- the sanitizer ----

    /// Records an event, if there is a shadow, in the critical section in which it happens.
    pub(super) fn record<R>(&self, state: &mut State, event: impl FnOnce(&mut Shadow) -> R) -> Option<R> {
        let shadow = state.shadow.as_deref_mut()?;
        let result = event(shadow);
        // Release: whoever reads it and then looks an entry up sees what the event has done to the slots.
        self.events.store(shadow.events(), Relax::Release);
        Some(result)
    }

    /// As [`Core::record`], for what happens nowhere else; new reports are printed.
    pub(super) fn tell<R>(&self, event: impl FnOnce(&mut Shadow) -> R) -> Option<R> {
        let result = self.record(&mut self.state.lock(), event);
        self.say();
        result
    }

    /// Number of the last event.
    #[inline]
    pub(super) fn events(&self) -> u64 {
        self.events.load(Relax::Acquire)
    }

    /// An access has found what it says, and is inside.
    #[cold]
    pub(super) fn entered(&self, seen: Seen) {
        let slots = self.slots_of(&seen);
        self.tell(|shadow| shadow.entered(seen, slots));
    }

    /// Where what an access has found may be.
    pub(super) fn slots_of(&self, seen: &Seen) -> std::ops::Range<usize> {
        let first = self.set(seen.space, seen.va >> seen.shift, seen.shift) * self.ways;
        first..first + self.ways
    }

    /// The engine is about to leave its access.
    #[cold]
    pub(super) fn leaving(&self, engine: usize) {
        self.record(&mut self.state.lock(), |shadow| shadow.left(engine));
    }

    pub(super) fn purges_targets(&self) -> bool {
        self.checks.unmap
    }

    /// A purge of memory that is not carried out: an injected fault.
    pub(super) fn skip(&self, what: Purge) {
        self.tell(|shadow| {
            let number = shadow.begun(what);
            shadow.finished(number);
        });
    }

    /// A defect that a model has found.
    pub(super) fn told(&self, class: Defect, at: (SpaceId, u64), by: Initiator, detail: String) {
        self.tell(|shadow| shadow.told(class, at, by, detail));
    }

    pub(super) fn findings(&self) -> Option<Findings> {
        self.state.lock().shadow.as_deref().map(Shadow::findings)
    }

    /// Prints what is new. Not under the lock: it is a spin lock.
    pub(super) fn say(&self) {
        if !self.sanitized {
            return;
        }
        let fresh = {
            let mut state = self.state.lock();
            match state.shadow.as_deref_mut() {
                Some(shadow) if shadow.has_fresh() => shadow.fresh(),
                _ => return,
            }
        };
        for report in fresh {
            tracing::error!("{report}");
        }
    }

    // ---- looking in from outside ----

    pub(super) fn stats(&self) -> AtcStats {
        let mut stats = {
            let state = self.state.lock();
            AtcStats {
                fills: state.fills,
                fills_refused: state.refused,
                purges: state.purges,
                entries_purged: state.purged,
                evictions: state.evictions,
                active_purges: state.active.iter().flatten().count() + state.unlisted,
                live_entries: state.live,
                ..AtcStats::default()
            }
        };
        for engine in &self.engines {
            stats.hits += engine.hits.load(Relax::Relaxed);
            stats.misses += engine.misses.load(Relax::Relaxed);
            stats.mod_misses += engine.mod_misses.load(Relax::Relaxed);
        }
        stats.drain_waits = self.drain_waits.load(Relax::Relaxed);
        stats.drain_spins = self.drain_spins.load(Relax::Relaxed);
        stats.drain_yields = self.drain_yields.load(Relax::Relaxed);
        stats.lock_yields = self.state.yields();
        stats
    }

    /// Up to `max` entries, a slot at a time: the lock is not held for a whole dump.
    pub(super) fn entries(&self, max: usize) -> Vec<Entry> {
        self.slots
            .iter()
            .filter_map(|slot| {
                let _state = self.state.lock();
                slot.entry()
            })
            .take(max)
            .collect()
    }
}

impl State {
    /// Whether a purge in progress meets the span or its target.
    fn purging(&self, space: u64, va: Span, target: Span) -> bool {
        self.unlisted > 0
            || self
                .active
                .iter()
                .flatten()
                .any(|reach| reach.meets(space, va, target))
    }
}

/// Says once that a drain takes long.
struct Warning {
    since: std::time::Instant,
    said: bool,
}

impl Warning {
    fn new() -> Self {
        Self {
            since: std::time::Instant::now(),
            said: false,
        }
    }

    fn look(&mut self, engine: usize, limit: std::time::Duration) {
        if !self.said && self.since.elapsed() >= limit {
            self.said = true;
            tracing::warn!(
                engine,
                seconds = limit.as_secs_f64(),
                "purge still waits for an engine inside an access; it cannot complete before that leaves"
            );
        }
    }
}

/// A counter that one thread writes.
#[inline]
fn bump(counter: &Counter) {
    counter.store(counter.load(Relax::Relaxed).wrapping_add(1), Relax::Relaxed);
}
