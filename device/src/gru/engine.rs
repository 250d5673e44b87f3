//! Engine threads: symmetric, each does whatever there is.
//!
//! TGHs come first and are looked at again after every step of an instruction, when no guard is held. An
//! engine that finds nothing spins for a while (if it is the only one awake), then sleeps: an idle device
//! costs nothing.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::Doorbell;
use super::hardware::Hardware;
use crate::atc;

/// A pass in this many looks at the TFHs of CBRs that have no miss, too.
const FULL_LOOK: u32 = 64;
/// A yield that takes so long has let somebody else compute.
const CROWDED: Duration = Duration::from_micros(200);
/// After such a yield so many are not made.
const AVOIDED: u32 = 256;
/// After so many sleeps that ended by TGHs alone the engine comes up once, and empties the bells on its way back.
const FLUSHES_IN_SLEEP: u32 = 256;

/// What belongs to one engine thread.
#[derive(Debug)]
pub(super) struct Bench {
    /// One for each chiplet.
    pub(super) engines: Vec<atc::Engine>,
    pub(super) bounce: Box<[u8]>,
    /// Room for what the client is asked for; a courier's is one chunk long, an engine's empty: it does not wait.
    pub(super) room: Box<[u8]>,
}

/// Giving the processor up while the engine counts as awake: free of charge where nobody else wants it, a slice of
/// somebody else's where programs compute on it, and so long nobody rings for what is stored meanwhile. Which of the two
/// it is shows by how long it takes.
#[derive(Debug, Default)]
struct Yielding {
    /// How often it is yet to be avoided.
    crowded: u32,
}

impl Yielding {
    fn yield_now(&mut self) {
        let since = Instant::now();
        std::thread::yield_now();
        if since.elapsed() >= CROWDED {
            self.crowded = AVOIDED;
        }
    }

    /// Whether the last one that was made took long; asked instead of one.
    fn is_dear(&mut self) -> bool {
        let dear = self.crowded > 0;
        self.crowded = self.crowded.saturating_sub(1);
        dear
    }
}

/// How long to look for work before sleeping: doubled when work came while spinning, halved when not.
#[derive(Debug)]
struct Spin {
    limit: Duration,
    /// Somebody has chosen the limit: it holds whoever else wants the processor.
    chosen: bool,
    budget: Duration,
    since: Option<Instant>,
}

impl Spin {
    fn new(doorbell: Doorbell, chosen: Option<Duration>) -> Self {
        let few = || std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() <= 2);
        let limit = match (doorbell, chosen) {
            (Doorbell::Bell, _) => Duration::ZERO,
            (_, Some(limit)) => limit,
            (_, None) => Duration::from_micros(if few() { 50 } else { 200 }),
        };
        Self {
            limit,
            chosen: chosen.is_some(),
            budget: limit,
            since: None,
        }
    }
    fn found(&mut self) {
        if self.since.take().is_some() {
            self.budget = (self.budget * 2).min(self.limit);
        }
    }
    /// Where the engine is to be polite it gives the processor up between two looks, by `yielding`.
    fn again(&mut self, yielding: Option<&mut Yielding>) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.budget {
            match yielding {
                None => std::hint::spin_loop(),
                Some(yielding) => {
                    if !self.chosen && yielding.is_dear() {
                        self.since = None;
                        return false;
                    }
                    yielding.yield_now();
                }
            }
            return true;
        }
        self.since = None;
        self.budget = (self.budget / 2).max(self.limit / 8);
        false
    }
}

/// An engine that dies (a broken invariant) still counts as awake: nobody would ring, and the device would live on
/// without an answer. Its peers understand the end of the process; they wait for ever for a silent one.
#[derive(Debug)]
pub(super) struct Vital;

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a GRU engine died; the device process ends");
            std::process::abort();
        }
    }
}

/// Body of an engine thread.
pub(super) fn run(hardware: &Arc<Hardware>, mut bench: Bench) {
    let _vital = Vital;
    let wake = &hardware.wake;
    let mut spin = Spin::new(hardware.config.doorbell, hardware.config.spin);
    let mut yielding = Yielding::default();
    let mut passes = 0u32;
    let mut full = true;
    let mut timed = false;
    wake.enter();
    while !wake.stopping() {
        passes = passes.wrapping_add(1);
        let full_look = std::mem::take(&mut full) || passes.is_multiple_of(FULL_LOOK);
        let found = hardware.pass(&mut bench, full_look);
        if found.flushed && hardware.polite {
            // Whoever waits for the flush may wait for this processor, and everything else can wait for it. (Not during
            // the look: a reset waits for its end.)
            if yielding.is_dear() {
                // Another engine takes what waits, and who stores something meanwhile rings.
                wake.hand_over(|| hardware.work_waits());
                std::thread::yield_now();
                wake.enter();
            } else {
                yielding.yield_now();
            }
        }
        if found.worked {
            spin.found();
            timed = false;
            continue;
        }
        // Who wakes by the clock and finds nothing sleeps again: polls cost no spinning.
        if !timed && !wake.others_awake() && spin.again(hardware.polite.then_some(&mut yielding)) {
            continue;
        }
        wake.doze();
        timed = hardware.sleep_and_flush();
        full = true;
        wake.come_back();
    }
    wake.pass_on_stop();
}

/// What a look came to.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// There was something.
    worked: bool,
    /// A TGH was among it.
    flushed: bool,
}

/// The engine that sleeps by the clock.
#[derive(Debug)]
struct TimeKeeper<'a> {
    kept: &'a AtomicBool,
    limit: Duration,
}

impl Drop for TimeKeeper<'_> {
    fn drop(&mut self) {
        self.kept.store(false, Ordering::SeqCst);
    }
}

impl Hardware {
    /// Looks at everything once and does what it finds.
    fn pass(&self, bench: &mut Bench, full: bool) -> Found {
        let _working = self.working();
        let mut flushed = self.execute_tghs();
        let mut worked = flushed;
        for chiplet in &self.chiplets {
            worked |= self.tfh_scan(chiplet, full);
            worked |= self.cch_retry(chiplet);
        }
        worked |= self.release_held_fills();
        let mut steps = 0;
        for chiplet in &self.chiplets {
            self.run_contexts(chiplet, bench, || {
                steps += 1;
                let flushed_now = self.execute_tghs();
                flushed |= flushed_now;
                if steps == 2 {
                    // A backlog: this look has found more than one thing to run.
                    self.wake.call();
                }
                if flushed_now && self.polite {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            });
        }
        Found {
            worked: worked || steps > 0,
            flushed,
        }
    }

    /// Sleeps, and executes the TGHs that it is woken for; returns when there is, or may be, something else to do. Whether
    /// the last sleep had a limit.
    ///
    /// The engine counts as asleep throughout: who stores rings, and what rings now is found by the look before the next
    /// sleep or ends that sleep at once. So a TGH is executed without telling everybody that the device is up (one
    /// store into the page of each GSEG) before the one who waits for it is answered; and where that one waits for this
    /// very processor, it gets it as soon as nothing else is to be done here.
    fn sleep_and_flush(&self) -> bool {
        let mut timed = false;
        for _ in 0..FLUSHES_IN_SLEEP {
            // Whoever stored before the count was lowered, or while TGHs were executed, may not have been heard.
            if self.work_waits() {
                return false;
            }
            let keeper = self.keep_time();
            let limit = self.next_look().or(keeper.as_ref().map(|keeper| keeper.limit));
            timed = limit.is_some();
            self.wake.sleep(limit);
            drop(keeper);
            // Rung for something else, or processors enough to look for more work before sleeping.
            if !self.flush_when_woken() || !self.polite {
                break;
            }
        }
        timed
    }

    /// The TGHs alone. Nobody who waits for the device to be quiet waits for a yield here: there is none.
    fn flush_when_woken(&self) -> bool {
        let _working = self.working();
        self.execute_tghs()
    }

    /// A reset excludes this. (A poisoned lock would mean that a reset died: its assertion has been reported.)
    fn working(&self) -> RwLockReadGuard<'_, ()> {
        self.quiesce
            .read()
            .expect("no thread dies while it resets the device")
    }

    /// Those that waited for the client, too.
    fn execute_tghs(&self) -> bool {
        let scan = |worked, chiplet| worked | self.tgh_scan(chiplet);
        self.chiplets.iter().fold(self.tgh_settle(), scan)
    }

    /// Whether there is something that this engine could do: a look that changes nothing. What another engine is
    /// doing right now does not count; it looks again by itself.
    pub(super) fn work_waits(&self) -> bool {
        let _working = self.working();
        self.tgh_settles()
            || self.chiplets.iter().any(|chiplet| {
                self.tgh_waiting(chiplet)
                    || self.tfh_waiting(chiplet)
                    || self.cch_waiting(chiplet)
                    || self.cb_waiting(chiplet)
            })
    }

    /// Around what may take long: the calling engine counts as asleep, so that a purge does not wait for it.
    pub(super) fn while_away<T>(&self, long: impl FnOnce() -> T) -> T {
        self.wake.hand_over(|| {
            self.tgh_settles() || self.chiplets.iter().any(|chiplet| self.tgh_waiting(chiplet))
        });
        let result = long();
        self.wake.enter();
        result
    }

    /// One engine at a time sleeps with a limit, so that CBRs which rest get their next look.
    fn keep_time(&self) -> Option<TimeKeeper<'_>> {
        let limit = self.shortest_rest()?;
        let taken = self.time_kept.swap(true, Ordering::SeqCst);
        (!taken).then_some(TimeKeeper {
            kept: &self.time_kept,
            limit,
        })
    }

    /// How long an engine may sleep: for ever, except while the fault plan holds fills.
    fn next_look(&self) -> Option<Duration> {
        (!self.held_fills.is_empty()).then_some(Duration::from_millis(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn test_spin_when_nothing_comes_shrinks_and_ends() {
        let mut spin = Spin::new(Doorbell::Poll, Some(Duration::from_micros(80)));
        while spin.again(None) {}
        assert_eq!(spin.budget, Duration::from_micros(40));
        for _ in 0..9 {
            while spin.again(None) {}
        }
        assert_eq!(spin.budget, Duration::from_micros(10));
        spin.again(None);
        spin.found();
        assert_eq!(spin.budget, Duration::from_micros(20));
        let mut none = Spin::new(Doorbell::Poll, Some(Duration::ZERO));
        assert!(!none.again(None));
    }

    #[test]
    fn test_spin_when_yields_are_dear_ends_at_once_for_a_while() {
        let mut yielding = Yielding { crowded: AVOIDED };
        let mut spin = Spin {
            chosen: false,
            ..Spin::new(Doorbell::Poll, Some(HOUR))
        };
        for _ in 0..AVOIDED {
            assert!(!spin.again(Some(&mut yielding)));
        }
        assert!(spin.again(Some(&mut yielding)), "one is tried again");
    }

    #[test]
    fn test_spin_when_its_limit_was_chosen_goes_on_where_yields_are_dear() {
        let mut yielding = Yielding { crowded: AVOIDED };
        let mut spin = Spin::new(Doorbell::Poll, Some(HOUR));
        for _ in 0..AVOIDED {
            assert!(spin.again(Some(&mut yielding)));
        }
        assert!(!Spin::new(Doorbell::Bell, Some(HOUR)).again(Some(&mut yielding)));
    }
}
