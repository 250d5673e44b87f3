//! What to break, when: injected faults, seeded and reproducible.
//!
//! A [`BreakPlan`] switches a check of the coherence protocol off; a [`FaultPlan`] delays things so that the
//! window which the check closes is really open. The same delays with the check on are the control: they
//! must lead to no stale access. Breaking something without naming a delay adds the delay that fits.
//!
//! * `dropin-delay`: an answered miss is held back until an invalidation of its span has finished (then a
//!   little longer), and only then entered. With the kill bit it is refused; without, a stale translation is
//!   installed. Opens the window of `kill-bit`.
//! * `drain-delay`: an engine parks inside an access for store until an invalidation of that address has
//!   begun (then a little longer), and only then stores. With the drain the invalidation waits; without, the
//!   store lands after it has returned. Opens the window of `drain`.
//!
//! What else can go wrong, every n-th time, is an [`Injection`]: `early-completion`, `lost-interrupt`,
//! `duplicate-fault`, `delayed-restart`, `wrong-status`, `stale-asid`, `miss-cause`, `execution-error`, and for message
//! queues `lb-overflow`, `amo-nack`, `put-nack`.
//!
//! `clean` and `unmap` need no window: the next store through a clean entry, or access of unmapped memory, shows them.
//!
//! Neither of the two delays holds up the handling of invalidations: a held fill keeps no thread, and one engine at most is
//! parked while another goes on (so `drain-delay` wants two engines).

mod inject;

use std::fmt::Debug;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub(crate) use inject::Injector;
pub use inject::{Injection, Injections};

use crate::atc::{Access, Checks, Fill, Hooks, Purge, PurgeProgress, SpaceId};

/// Checks that are switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BreakPlan {
    /// Fills are entered although a purge has met them (the GRU's kill bit).
    pub kill_bit: bool,
    /// Purges return without waiting for running accesses.
    pub drain: bool,
    /// Stores go through entries that do not allow them.
    pub clean: bool,
    /// Entries outlive the unmapping of their memory.
    pub unmap: bool,
}

/// Delays that open the windows. Defaults: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultPlan {
    /// Hold every n-th fill back.
    pub dropin_delay: Option<u32>,
    /// Park inside every n-th access for store.
    pub drain_delay: Option<u32>,
    /// What goes wrong at once.
    pub inject: Injections,
    /// Moves the phase of both.
    pub seed: u64,
    /// A delay that waits for an invalidation gives up after this.
    pub limit: Duration,
    /// How long after the invalidation a delay goes on: the caller has returned by then.
    pub margin: Duration,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            dropin_delay: None,
            drain_delay: None,
            inject: Injections::default(),
            seed: 0,
            limit: Duration::from_millis(300),
            margin: Duration::from_millis(5),
        }
    }
}

impl FaultPlan {
    /// Every how many fills one is held back, unless the plan says otherwise.
    pub const DROPIN_EVERY: u32 = 4;
    /// Every how many stores one parks, unless the plan says otherwise.
    pub const DRAIN_EVERY: u32 = 64;

    /// The plan with the delays that show what `broken` breaks.
    #[must_use]
    pub fn with_windows_of(mut self, broken: BreakPlan) -> Self {
        if broken.kill_bit {
            self.dropin_delay.get_or_insert(Self::DROPIN_EVERY);
        }
        if broken.drain {
            self.drain_delay.get_or_insert(Self::DRAIN_EVERY);
        }
        self
    }
}

impl BreakPlan {
    /// The checks that remain.
    #[must_use]
    pub fn checks(self) -> Checks {
        Checks {
            kill: !self.kill_bit,
            drain: !self.drain,
            clean: !self.clean,
            unmap: !self.unmap,
            ..Checks::ALL
        }
    }
}

/// A plan cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum PlanError {
    /// Not a name of a plan.
    #[error("'{name}' is nothing to {what}; known: {known}")]
    Unknown {
        /// The word.
        name: String,
        /// "break" or "inject".
        what: &'static str,
        /// The words that exist.
        known: &'static str,
    },
    /// Not a number, or zero.
    #[error("'{name}={value}': the value must be a positive number")]
    Value {
        /// The word.
        name: String,
        /// What it was set to.
        value: String,
    },
}

fn words(plan: &str) -> impl Iterator<Item = &str> {
    plan.split(',').map(str::trim).filter(|word| !word.is_empty())
}

/// `kill-bit`, `drain`, `clean`, `unmap`, separated by commas; empty = nothing.
impl FromStr for BreakPlan {
    type Err = PlanError;
    fn from_str(plan: &str) -> Result<Self, PlanError> {
        let mut broken = Self::default();
        for word in words(plan) {
            match word {
                "kill-bit" => broken.kill_bit = true,
                "drain" => broken.drain = true,
                "clean" => broken.clean = true,
                "unmap" => broken.unmap = true,
                name => {
                    return Err(PlanError::Unknown {
                        name: name.to_owned(),
                        what: "break",
                        known: "kill-bit, drain, clean, unmap",
                    });
                }
            }
        }
        Ok(broken)
    }
}

/// `dropin-delay[=n]`, `drain-delay[=n]`, the word of an [`Injection`] (`[=n]`), `seed=n`, `limit-ms=n`,
/// `margin-ms=n`, separated by commas.
impl FromStr for FaultPlan {
    type Err = PlanError;
    fn from_str(plan: &str) -> Result<Self, PlanError> {
        let mut faults = Self::default();
        for word in words(plan) {
            let (name, value) = word
                .split_once('=')
                .map_or((word, None), |(name, value)| (name, Some(value)));
            let number = |default: u32| match value {
                None => Ok(default),
                Some(value) => value
                    .parse()
                    .ok()
                    .filter(|&n| n > 0)
                    .ok_or_else(|| PlanError::Value {
                        name: name.to_owned(),
                        value: value.to_owned(),
                    }),
            };
            match name {
                "dropin-delay" => faults.dropin_delay = Some(number(Self::DROPIN_EVERY)?),
                "drain-delay" => faults.drain_delay = Some(number(Self::DRAIN_EVERY)?),
                "seed" => faults.seed = u64::from(number(1)?),
                "limit-ms" => faults.limit = Duration::from_millis(u64::from(number(300)?)),
                "margin-ms" => faults.margin = Duration::from_millis(u64::from(number(5)?)),
                name => match Injection::of_word(name) {
                    Some(kind) => faults.inject = faults.inject.with(kind, number(Injections::EVERY)?),
                    None => {
                        return Err(PlanError::Unknown {
                            name: name.to_owned(),
                            what: "inject",
                            known: "dropin-delay, drain-delay, early-completion, lost-interrupt, duplicate-fault, \
                                    delayed-restart, wrong-status, stale-asid, miss-cause, execution-error, \
                                    lb-overflow, amo-nack, put-nack, seed, limit-ms, margin-ms",
                        });
                    }
                },
            }
        }
        Ok(faults)
    }
}

/// Counts events and picks every n-th.
#[derive(Debug)]
struct EveryNth {
    every: u64,
    seen: AtomicU64,
}

impl EveryNth {
    fn new(every: u32, seed: u64) -> Self {
        let every = u64::from(every.max(1));
        Self {
            every,
            seen: AtomicU64::new(seed % every),
        }
    }
    fn picks(&self) -> bool {
        self.seen.fetch_add(1, Ordering::Relaxed) % self.every == self.every - 1
    }
}

/// How often the delays found their window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FaultStats {
    /// Fills held back.
    pub fills_held: u64,
    /// Of these: until an invalidation of their span had finished.
    pub fills_overtaken: u64,
    /// Engines parked inside an access.
    pub engines_parked: u64,
    /// Of these: until an invalidation of their address had begun.
    pub engines_overtaken: u64,
    /// [`Injection`]s of all kinds.
    pub injected: u64,
}

struct HeldFill<T> {
    chiplet: usize,
    ticket: usize,
    fill: Fill,
    operands: T,
    since: Instant,
    overtaken: Option<Instant>,
}

/// Fills that are held back: operands `T`, by chiplet and ticket.
pub(crate) struct HeldFills<T> {
    pick: Option<EveryNth>,
    limit: Duration,
    margin: Duration,
    count: AtomicUsize,
    /// Leaf lock.
    fills: Mutex<Vec<HeldFill<T>>>,
    held: AtomicU64,
    overtaken: AtomicU64,
}

impl<T> Debug for HeldFills<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldFills")
            .field("pick", &self.pick)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl<T: Copy> HeldFills<T> {
    pub(crate) fn new(plan: &FaultPlan) -> Self {
        Self {
            pick: plan.dropin_delay.map(|every| EveryNth::new(every, plan.seed)),
            limit: plan.limit,
            margin: plan.margin,
            count: AtomicUsize::new(0),
            fills: Mutex::new(Vec::new()),
            held: AtomicU64::new(0),
            overtaken: AtomicU64::new(0),
        }
    }

    /// Whether this fill is to be held back.
    pub(crate) fn picks(&self) -> bool {
        self.pick.as_ref().is_some_and(EveryNth::picks)
    }

    /// Holds a fill back.
    pub(crate) fn hold(&self, chiplet: usize, ticket: usize, fill: Fill, operands: T) {
        let since = Instant::now();
        self.lock().push(HeldFill {
            chiplet,
            ticket,
            fill,
            operands,
            since,
            overtaken: None,
        });
        self.held.fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// Nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// Takes the fills whose time has come: (chiplet, ticket, operands).
    pub(crate) fn due(
        &self,
        progress: impl Fn(usize, usize, &Fill) -> PurgeProgress,
    ) -> Vec<(usize, usize, T)> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut due = Vec::new();
        let mut fills = self.lock();
        fills.retain_mut(|held| {
            if held.overtaken.is_none()
                && progress(held.chiplet, held.ticket, &held.fill) == PurgeProgress::Finished
            {
                held.overtaken = Some(Instant::now());
                self.overtaken.fetch_add(1, Ordering::Relaxed);
            }
            let waited = held.overtaken.is_some_and(|since| since.elapsed() >= self.margin);
            let keep = !waited && held.since.elapsed() < self.limit;
            if !keep {
                due.push((held.chiplet, held.ticket, held.operands));
            }
            keep
        });
        self.count.fetch_sub(due.len(), Ordering::SeqCst);
        due
    }

    /// Drops everything (reset).
    pub(crate) fn forget(&self) {
        let mut fills = self.lock();
        fills.clear();
        self.count.store(0, Ordering::SeqCst);
    }

    pub(crate) fn count_into(&self, stats: &mut FaultStats) {
        stats.fills_held = self.held.load(Ordering::Relaxed);
        stats.fills_overtaken = self.overtaken.load(Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<HeldFill<T>>> {
        self.fills
            .lock()
            .expect("no thread dies while it holds the list of held fills")
    }
}

/// What must happen around a park, so that others go on: called before (true) and after (false).
pub(crate) type OnPark = Box<dyn Fn(bool) + Send + Sync>;

/// Parks engines inside accesses, one at a time over all ATCs of a device.
pub(crate) struct Parking {
    pick: EveryNth,
    limit: Duration,
    margin: Duration,
    on_park: OnPark,
    taken: AtomicBool,
    /// Resets and stops do not wait for a fault plan.
    interrupted: AtomicBool,
    parked: AtomicU64,
    overtaken: AtomicU64,
}

impl Debug for Parking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parking")
            .field("pick", &self.pick)
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}

impl Parking {
    /// `None` when the plan parks nobody.
    pub(crate) fn new(plan: &FaultPlan, on_park: OnPark) -> Option<Arc<Self>> {
        let pick = EveryNth::new(plan.drain_delay?, plan.seed);
        Some(Arc::new(Self {
            pick,
            limit: plan.limit,
            margin: plan.margin,
            on_park,
            taken: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            parked: AtomicU64::new(0),
            overtaken: AtomicU64::new(0),
        }))
    }

    /// Hooks for one ATC.
    pub(crate) fn hooks(self: &Arc<Self>) -> Arc<dyn Hooks> {
        Arc::new(ParkInAccess {
            parking: Arc::clone(self),
            space: AtomicU64::new(0),
            va: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            overtaken: AtomicBool::new(false),
        })
    }

    /// While set nobody parks, and who is parked goes on.
    pub(crate) fn interrupt(&self, interrupted: bool) {
        self.interrupted.store(interrupted, Ordering::SeqCst);
    }

    pub(crate) fn count_into(&self, stats: &mut FaultStats) {
        stats.engines_parked = self.parked.load(Ordering::Relaxed);
        stats.engines_overtaken = self.overtaken.load(Ordering::Relaxed);
    }

    fn wait_until(&self, deadline: Instant, done: impl Fn() -> bool) {
        while !done() && !self.interrupted.load(Ordering::SeqCst) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

#[derive(Debug)]
struct ParkInAccess {
    parking: Arc<Parking>,
    space: AtomicU64,
    va: AtomicU64,
    /// `space` and `va` are those of a parked engine.
    waiting: AtomicBool,
    overtaken: AtomicBool,
}

impl ParkInAccess {
    fn meets(&self, what: &Purge) -> bool {
        let (own, va) = (
            SpaceId(self.space.load(Ordering::SeqCst)),
            self.va.load(Ordering::SeqCst),
        );
        match *what {
            Purge::Range { space, start, end } => space == own && (end < start || start <= va && va < end),
            Purge::Space(space) => space == own,
            // Which IOVA the access is at is not known here: go on rather than keep an unmap waiting.
            Purge::All | Purge::Target { .. } => true,
        }
    }
}

impl Hooks for ParkInAccess {
    fn translated(&self, space: SpaceId, va: u64, access: Access, _tag: u64) {
        let parking = &self.parking;
        if access != Access::Write || !parking.pick.picks() || parking.interrupted.load(Ordering::SeqCst) {
            return;
        }
        if parking.taken.swap(true, Ordering::SeqCst) {
            return;
        }
        self.space.store(space.0, Ordering::SeqCst);
        self.va.store(va, Ordering::SeqCst);
        self.overtaken.store(false, Ordering::SeqCst);
        self.waiting.store(true, Ordering::SeqCst);
        parking.parked.fetch_add(1, Ordering::Relaxed);
        (parking.on_park)(true);
        let overtaken = || self.overtaken.load(Ordering::SeqCst);
        parking.wait_until(Instant::now() + parking.limit, overtaken);
        if overtaken() {
            parking.overtaken.fetch_add(1, Ordering::Relaxed);
            parking.wait_until(Instant::now() + parking.margin, || false);
        }
        self.waiting.store(false, Ordering::SeqCst);
        (parking.on_park)(false);
        parking.taken.store(false, Ordering::SeqCst);
    }

    fn purge_begun(&self, what: &Purge) {
        if self.waiting.load(Ordering::SeqCst) && self.meets(what) {
            self.overtaken.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atc::PageSize;

    #[test]
    fn test_plan_when_text_is_valid_is_read() {
        let broken: BreakPlan = "kill-bit, drain".parse().unwrap();
        assert!(broken.kill_bit && broken.drain);
        let plan: FaultPlan = "dropin-delay=3,drain-delay,seed=7,limit-ms=50".parse().unwrap();
        assert_eq!(
            (plan.dropin_delay, plan.drain_delay),
            (Some(3), Some(FaultPlan::DRAIN_EVERY))
        );
        assert_eq!((plan.seed, plan.limit), (7, Duration::from_millis(50)));
        assert_eq!("".parse::<FaultPlan>().unwrap(), FaultPlan::default());
        let injected = "put-nack=3,lost-interrupt".parse::<FaultPlan>().unwrap().inject;
        assert_eq!(injected.every(Injection::PutNack), Some(3));
        assert_eq!(injected.every(Injection::LostInterrupt), Some(Injections::EVERY));
        assert_eq!(injected.every(Injection::AmoNack), None);
        let windows = FaultPlan::default().with_windows_of(broken);
        assert!(windows.dropin_delay.is_some() && windows.drain_delay.is_some());
    }

    #[test]
    fn test_plan_when_text_is_wrong_names_the_word() {
        assert!(
            "drains"
                .parse::<BreakPlan>()
                .unwrap_err()
                .to_string()
                .contains("'drains'")
        );
        assert!(
            "dropin-delay=0"
                .parse::<FaultPlan>()
                .unwrap_err()
                .to_string()
                .contains("dropin-delay=0")
        );
    }

    #[test]
    fn test_every_nth_when_seeded_picks_one_in_n() {
        let pick = EveryNth::new(4, 1);
        let picked: Vec<_> = (0..8).filter(|_| pick.picks()).collect();
        assert_eq!(picked, [2, 6]);
    }

    fn fill() -> Fill {
        Fill {
            space: SpaceId(8),
            va: 0x1000,
            size: PageSize::SIZE_4K,
            iova: 0,
            writable: true,
            tag: 0,
        }
    }

    #[test]
    fn test_held_fill_when_purge_has_finished_is_due_after_the_margin() {
        let plan = FaultPlan {
            dropin_delay: Some(1),
            margin: Duration::ZERO,
            limit: Duration::from_secs(60),
            ..FaultPlan::default()
        };
        let fills = HeldFills::new(&plan);
        assert!(fills.picks());
        fills.hold(0, 5, fill(), 'x');
        assert_eq!(fills.due(|_, _, _| PurgeProgress::None), []);
        assert_eq!(fills.due(|_, _, _| PurgeProgress::Running), []);
        assert_eq!(fills.due(|_, _, _| PurgeProgress::Finished), [(0, 5, 'x')]);
        assert!(fills.is_empty());
    }

    #[test]
    fn test_held_fill_when_no_purge_comes_is_due_at_the_limit() {
        let plan = FaultPlan {
            dropin_delay: Some(1),
            limit: Duration::ZERO,
            ..FaultPlan::default()
        };
        let fills = HeldFills::new(&plan);
        fills.hold(1, 6, fill(), 'y');
        assert_eq!(fills.due(|_, _, _| PurgeProgress::None), [(1, 6, 'y')]);
    }
}
