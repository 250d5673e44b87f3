//! Engine threads: symmetric, each does whatever there is.
//!
//! TGHs come first and are looked at again after every step of an instruction, when no guard is held. An
//! engine that finds nothing spins for a while (if it is the only one awake), then sleeps: an idle device
//! costs nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Doorbell;
use super::hardware::Hardware;
use crate::atc;

/// A pass in this many looks at the TFHs of CBRs that have no miss, too.
const FULL_LOOK: u32 = 64;

/// What belongs to one engine thread.
#[derive(Debug)]
pub(super) struct Bench {
    /// One for each chiplet.
    pub(super) engines: Vec<atc::Engine>,
    pub(super) bounce: Box<[u8]>,
}

/// How long to look for work before sleeping: doubled when work came while spinning, halved when not.
#[derive(Debug)]
struct Spin {
    limit: Duration,
    budget: Duration,
    since: Option<Instant>,
    /// See [`Hardware::polite`].
    polite: bool,
}

impl Spin {
    fn new(limit: Duration, polite: bool) -> Self {
        Self {
            limit,
            budget: limit,
            since: None,
            polite,
        }
    }
    fn found(&mut self) {
        if self.since.take().is_some() {
            self.budget = (self.budget * 2).min(self.limit);
        }
    }
    fn again(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.budget {
            if self.polite {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
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
struct Vital;

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
    let limit = match hardware.config.doorbell {
        Doorbell::Bell => Duration::ZERO,
        Doorbell::Trap | Doorbell::Poll => hardware.config.spin,
    };
    let mut spin = Spin::new(limit, hardware.polite);
    let mut passes = 0u32;
    let mut full = true;
    let mut timed = false;
    wake.enter();
    while !wake.stopping() {
        passes = passes.wrapping_add(1);
        if hardware.pass(
            &mut bench,
            std::mem::take(&mut full) || passes.is_multiple_of(FULL_LOOK),
        ) {
            spin.found();
            timed = false;
            continue;
        }
        // Who wakes by the clock and finds nothing sleeps again: polls cost no spinning.
        if !timed && !wake.others_awake() && spin.again() {
            continue;
        }
        wake.doze();
        // Whoever stored before the count was lowered did not ring.
        timed = false;
        if !hardware.work_waits() {
            let keeper = hardware.keep_time();
            let limit = hardware
                .next_look()
                .or(keeper.as_ref().map(|keeper| keeper.limit));
            timed = limit.is_some();
            wake.sleep(limit);
        }
        full = true;
        wake.come_back();
    }
    wake.pass_on_stop();
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
    /// Looks at everything once and does what it finds. Returns whether there was anything.
    fn pass(&self, bench: &mut Bench, full: bool) -> bool {
        // A reset excludes this. (A poisoned lock would mean that a reset died: its assertion has been reported.)
        let _working = self
            .quiesce
            .read()
            .expect("no thread dies while it resets the device");
        let mut worked = self.flush_handles();
        for chiplet in &self.chiplets {
            worked |= self.tfh_scan(chiplet, full);
            worked |= self.cch_retry(chiplet);
        }
        worked |= self.release_held_fills();
        let mut steps = 0;
        for chiplet in &self.chiplets {
            self.run_contexts(chiplet, bench, || {
                steps += 1;
                self.flush_handles();
                if steps == 2 {
                    // A backlog: this look has found more than one thing to run.
                    self.wake.call();
                }
            });
        }
        worked || steps > 0
    }

    /// Whether there is something that this engine could do: a look that changes nothing. What another engine is
    /// doing right now does not count; it looks again by itself.
    pub(super) fn work_waits(&self) -> bool {
        let _working = self
            .quiesce
            .read()
            .expect("no thread dies while it resets the device");
        self.chiplets.iter().any(|chiplet| {
            self.tgh_waiting(chiplet)
                || self.tfh_waiting(chiplet)
                || self.cch_waiting(chiplet)
                || self.cb_waiting(chiplet)
        })
    }

    /// Around what may take long: the calling engine counts as asleep, so that a purge does not wait for it.
    pub(super) fn while_away<T>(&self, long: impl FnOnce() -> T) -> T {
        self.wake
            .hand_over(|| self.chiplets.iter().any(|chiplet| self.tgh_waiting(chiplet)));
        let result = long();
        self.wake.enter();
        result
    }

    fn flush_handles(&self) -> bool {
        let flushed = self
            .chiplets
            .iter()
            .fold(false, |worked, chiplet| worked | self.tgh_scan(chiplet));
        if flushed && self.polite {
            // Whoever spins on the handle may wait for this processor, and everything else can wait for it.
            std::thread::yield_now();
        }
        flushed
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

    #[test]
    fn test_spin_when_nothing_comes_shrinks_and_ends() {
        let mut spin = Spin::new(Duration::from_micros(80), true);
        while spin.again() {}
        assert_eq!(spin.budget, Duration::from_micros(40));
        for _ in 0..9 {
            while spin.again() {}
        }
        assert_eq!(spin.budget, Duration::from_micros(10));
        spin.again();
        spin.found();
        assert_eq!(spin.budget, Duration::from_micros(20));
        let mut none = Spin::new(Duration::ZERO, false);
        assert!(!none.again());
    }
}
