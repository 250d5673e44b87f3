//! The protocol under the model checker: each test twice, as it is (nothing may be found) and with one
//! part switched off (something must be found).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p tlbridge-device --release --lib loom_`
//!
//! Models of two threads are explored completely; those of three up to [`PREEMPTIONS`] forced switches a
//! run (switches at waits are free), which takes seconds instead of minutes. Both were run once without
//! any bound.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::core::Core;
use super::defect::Initiator;
use super::reach::Reach;
use super::slot::Entry;
use super::spin::SpinLock;
use super::types::{AtcConfig, Checks, FillRefused, Purge, SpaceId};

pub(super) const PREEMPTIONS: usize = 4;
pub(super) const SPACE: u64 = 5;

/// Explore everything.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    explore_to(None, model);
}

/// Explore up to a number of forced switches.
pub(super) fn explore_to(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 2_000;
    builder.check(model);
}

/// Explore, and something that says `what` has to be found.
pub(super) fn must_find(what: &str, model: impl Fn() + Send + Sync + 'static) {
    let panic = catch_unwind(AssertUnwindSafe(|| explore(model)))
        .expect_err("the model checker found nothing although a part of the protocol is off");
    let said = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_default();
    assert!(said.contains(what), "found something else than {what:?}: {said}");
}

/// What loom says when memory is used without being owned.
const RACE: &str = "Causality violation";
/// What it says when threads wait for each other (waiting is a loop that yields).
const STUCK: &str = "exceeded maximum number of branches";

pub(super) fn core(engines: usize, ways: usize, checks: Checks) -> Arc<Core> {
    let core = Arc::new(Core::new(&AtcConfig {
        sets: 1,
        ways,
        tickets: 1,
        by_message: false,
        engines,
        checks,
        drain_warning: std::time::Duration::MAX,
        ..AtcConfig::default()
    }));
    for engine in 0..engines {
        assert_eq!(core.claim(), Some(engine));
    }
    core
}

pub(super) fn entry(va: u64, shift: u8, tag: u64) -> Entry {
    Entry {
        space: SPACE,
        va,
        shift,
        writable: true,
        storable: true,
        host: tag << 12,
        iova: 0,
        tag,
    }
}

pub(super) fn page(va: u64) -> Reach {
    Reach::from(Purge::Range {
        space: SpaceId(SPACE),
        start: va,
        end: va + 0x1000,
    })
}

/// Before the threads start.
pub(super) fn preload(core: &Core, entry: &Entry) {
    core.open(0, entry.space, entry.va, Initiator::default());
    core.fill(0, entry).expect("fill without a purge");
    core.close(0);
}

/// The tag that an access finds, if any.
fn look(core: &Core, engine: usize, va: u64) -> Option<u64> {
    let tag = core
        .access(engine, SPACE, va, false)
        .ok()
        .map(|(found, _)| found.tag)?;
    core.leave(engine);
    Some(tag)
}

// ---- a reader against a drain (S2) ----

/// The page belongs to the device while an access may use it, and to the caller after the purge.
fn reader_and_purge(checks: Checks) {
    let core = core(1, 1, checks);
    preload(&core, &entry(0, 12, 1));
    let memory = Arc::new(UnsafeCell::new(0u64));
    let reader = {
        let (core, memory) = (Arc::clone(&core), Arc::clone(&memory));
        thread::spawn(move || {
            // Twice: an epoch that is entered again must not be taken for the old one, nor block.
            for _ in 0..2 {
                if core.access(0, SPACE, 0, false).is_ok() {
                    // loom checks the access itself; there is nothing to read.
                    memory.with(|_| ());
                    core.leave(0);
                }
            }
        })
    };
    let begun = core.begin(page(0));
    core.finish(begun);
    memory.with_mut(|_| ());
    reader.join().expect("reader");
}

#[test]
fn loom_s2_purge_when_an_access_runs_returns_after_it() {
    explore(|| reader_and_purge(Checks::ALL));
}

#[test]
fn loom_s2_purge_when_drain_fence_order_or_clearing_is_off_is_found() {
    let all = Checks::ALL;
    for checks in [
        Checks { drain: false, ..all },
        Checks { fence: false, ..all },
        Checks {
            publish_first: false,
            ..all
        },
        Checks { clear: false, ..all },
        Checks {
            release: false,
            ..all
        },
    ] {
        must_find(RACE, move || reader_and_purge(checks));
    }
}

// ---- look-up against a rewrite of its slot ----

fn reader_and_rewrite(checks: Checks) {
    let core = core(1, 1, checks);
    preload(&core, &entry(0, 12, 1));
    let reader = {
        let core = Arc::clone(&core);
        thread::spawn(move || {
            if let Ok((found, shift)) = core.access(0, SPACE, 0, false) {
                assert_eq!((found.host, shift), (found.tag << 12, 12), "torn entry");
                core.leave(0);
            }
        })
    };
    preload(&core, &entry(0, 12, 2));
    reader.join().expect("reader");
}

#[test]
fn loom_lookup_when_its_slot_is_rewritten_takes_one_entry() {
    explore(|| reader_and_rewrite(Checks::ALL));
}

#[test]
fn loom_lookup_when_the_sequence_is_ignored_is_found() {
    must_find("torn entry", || {
        reader_and_rewrite(Checks {
            sequence: false,
            ..Checks::ALL
        });
    });
}

// ---- two purgers and a filler (S1, kill) ----

/// The page table has one word, its generation. Who changes it purges, and then no access may find
/// anything older. The filler looks the word up after its miss and fills with it.
fn purgers_and_filler(checks: Checks) {
    let core = core(2, 1, checks);
    let table = Arc::new(AtomicU64::new(1));
    let purger = |engine: usize| {
        let (core, table) = (Arc::clone(&core), Arc::clone(&table));
        move || {
            let now = table.fetch_add(1, Ordering::Relaxed) + 1;
            let begun = core.begin(page(0));
            core.finish(begun);
            if let Some(tag) = look(&core, engine, 0) {
                assert!(tag >= now, "stale entry");
            }
        }
    };
    let filler = {
        let (core, table) = (Arc::clone(&core), Arc::clone(&table));
        thread::spawn(move || {
            core.open(0, SPACE, 0, Initiator::default());
            let tag = table.load(Ordering::Relaxed);
            let _ = core.fill(0, &entry(0, 12, tag));
        })
    };
    let other = thread::spawn(purger(1));
    purger(0)();
    other.join().expect("purger");
    filler.join().expect("filler");
    if let Some(tag) = look(&core, 0, 0) {
        assert_eq!(tag, 3, "stale entry");
    }
}

#[test]
fn loom_s1_fill_when_two_purges_overlap_enters_nothing_stale() {
    explore_to(Some(PREEMPTIONS), || purgers_and_filler(Checks::ALL));
}

#[test]
fn loom_s1_fill_when_the_kill_is_off_is_found() {
    must_find("stale entry", || {
        purgers_and_filler(Checks {
            kill: false,
            ..Checks::ALL
        });
    });
}

/// Between the two halves of a purge nothing is entered, whenever the miss was issued.
fn filler_inside_a_purge(checks: Checks) {
    let core = core(1, 1, checks);
    let filler = {
        let core = Arc::clone(&core);
        thread::spawn(move || {
            core.open(0, SPACE, 0, Initiator::default());
            let _ = core.fill(0, &entry(0, 12, 1));
        })
    };
    // A purge of something else comes and goes meanwhile: one "in progress" bit would be lost.
    let begun = core.begin(page(0));
    let other = core.begin(page(0x9000));
    core.finish(other);
    assert!(look(&core, 0, 0).is_none(), "entered during a purge");
    core.finish(begun);
    filler.join().expect("filler");
}

#[test]
fn loom_s1_fill_when_a_purge_is_in_progress_is_refused() {
    explore(|| filler_inside_a_purge(Checks::ALL));
}

#[test]
fn loom_s1_fill_when_purges_in_progress_are_ignored_is_found() {
    must_find("entered during a purge", || {
        filler_inside_a_purge(Checks {
            active: false,
            ..Checks::ALL
        });
    });
}

// ---- a fill that is larger than its miss ----

/// The miss is at 0, the answer covers 2 MiB, what is purged is page 7 of it.
fn large_fill(checks: Checks) {
    let core = core(1, 1, checks);
    let table = Arc::new(AtomicU64::new(1));
    let filler = {
        let (core, table) = (Arc::clone(&core), Arc::clone(&table));
        thread::spawn(move || {
            core.open(0, SPACE, 0, Initiator::default());
            let tag = table.load(Ordering::Relaxed);
            let _ = core.fill(0, &entry(0, 21, tag));
        })
    };
    for now in [2, 3] {
        table.store(now, Ordering::Relaxed);
        let begun = core.begin(page(0x7000));
        core.finish(begun);
        if let Some(tag) = look(&core, 0, 0x7000) {
            assert!(tag >= now, "stale entry");
        }
    }
    filler.join().expect("filler");
    if let Some(tag) = look(&core, 0, 0x7000) {
        assert_eq!(tag, 3, "stale entry");
    }
}

#[test]
fn loom_s1_fill_when_larger_than_its_miss_is_checked_over_its_span() {
    explore(|| large_fill(Checks::ALL));
}

#[test]
fn loom_s1_fill_when_only_the_missed_page_is_checked_is_found() {
    must_find("stale entry", || {
        large_fill(Checks {
            span: false,
            ..Checks::ALL
        });
    });
}

#[test]
fn loom_s2_purge_when_it_only_clears_entries_that_begin_in_it_is_found() {
    must_find("stale entry", || {
        large_fill(Checks {
            overlap: false,
            ..Checks::ALL
        });
    });
}

// ---- the deadlocks that leaving the epoch avoids ----

/// Two engines that access memory and then execute a purge themselves.
fn purging_engines(hold: bool) {
    let core = core(2, 1, Checks::ALL);
    preload(&core, &entry(0, 12, 1));
    let worker = |engine: usize| {
        let core = Arc::clone(&core);
        move || {
            let inside = core.access(engine, SPACE, 0, false).is_ok();
            if inside && !hold {
                core.leave(engine);
            }
            // Not its own page: it would never return if it held that.
            let begun = core.begin(page(0x9000));
            if hold {
                // Not even when it knows better than to wait for itself.
                core.finish_inside(&begun, engine);
            } else {
                core.finish(begun);
            }
            if inside && hold {
                core.leave(engine);
            }
        }
    };
    let other = thread::spawn(worker(1));
    worker(0)();
    other.join().expect("worker");
}

#[test]
fn loom_purge_when_two_engines_purge_outside_their_accesses_returns() {
    explore(|| purging_engines(false));
}

#[test]
fn loom_purge_when_two_engines_purge_inside_their_accesses_is_found() {
    must_find(STUCK, || purging_engines(true));
}

/// A number that others wait for without spinning: two threads that wait by yielding could take turns
/// forever in the model while the third never runs.
struct Gate(Mutex<usize>, Condvar);

impl Gate {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(0), Condvar::new()))
    }

    fn set(&self, value: usize) {
        *self.0.lock().expect("gate") = value;
        self.1.notify_all();
    }

    fn wait_for(&self, value: usize) {
        let mut now = self.0.lock().expect("gate");
        while *now < value {
            now = self.1.wait(now).expect("gate");
        }
    }
}

/// A copy misses on its destination while an invalidation is in progress. Software answers the miss
/// after the invalidation, which waits for the drain.
fn copy_that_misses(hold: bool) {
    let core = core(1, 2, Checks::ALL);
    preload(&core, &entry(0, 12, 1));
    let (missed, answered, invalidated) = (Gate::new(), Gate::new(), Gate::new());
    let filled = Arc::new(AtomicBool::new(false));
    let purger = {
        let (core, invalidated) = (Arc::clone(&core), Arc::clone(&invalidated));
        thread::spawn(move || {
            let begun = core.begin(page(0x1000));
            core.finish(begun);
            invalidated.set(1);
        })
    };
    let software = {
        let (core, missed, filled) = (Arc::clone(&core), Arc::clone(&missed), Arc::clone(&filled));
        let (answered, invalidated) = (Arc::clone(&answered), Arc::clone(&invalidated));
        thread::spawn(move || {
            for round in 1.. {
                missed.wait_for(round);
                invalidated.wait_for(1);
                let verdict = core.fill(0, &entry(0x1000, 12, 2));
                filled.store(verdict.is_ok(), Ordering::Relaxed);
                answered.set(round);
                match verdict {
                    Ok(()) => break,
                    // The miss came before the purge: the instruction restarts and misses again.
                    Err(refused) => assert_eq!((refused, round), (FillRefused::Killed, 1)),
                }
            }
        })
    };
    // The engine: source into the bounce buffer, then the destination.
    let inside = core.access(0, SPACE, 0, false).is_ok();
    assert!(inside, "nothing purges the source");
    if !hold {
        core.leave(0);
    }
    for round in 1.. {
        core.open(0, SPACE, 0x1000, Initiator::default());
        missed.set(round);
        answered.wait_for(round);
        if filled.load(Ordering::Relaxed) {
            break;
        }
    }
    if hold {
        core.leave(0);
    }
    purger.join().expect("purger");
    software.join().expect("software");
    assert_eq!(look(&core, 0, 0x1000), Some(2), "the copy goes on");
}

#[test]
fn loom_copy_when_the_destination_misses_during_an_invalidation_completes() {
    explore_to(Some(PREEMPTIONS), || copy_that_misses(false));
}

#[test]
fn loom_copy_when_it_holds_its_source_while_it_waits_is_found() {
    must_find(STUCK, || copy_that_misses(true));
}

// ---- the lock ----

#[test]
fn loom_spin_lock_when_two_threads_take_it_excludes() {
    explore(|| {
        let lock = Arc::new(SpinLock::new(0));
        let other = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || *lock.lock() += 1)
        };
        *lock.lock() += 1;
        other.join().expect("other");
        assert_eq!(*lock.lock(), 2);
    });
}
