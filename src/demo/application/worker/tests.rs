use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::super::disturber::{Disturber, Habits};
use super::super::frames::{Frame, Frames};
use super::super::model::{Context, Fault, Machine};
use super::super::oracles::{Oracle, Oracles};
use super::super::random::Random;
use super::super::slots::{Hot, layout};
use super::super::words::WORDS_PER_PAGE;
use super::*;

const PAGES: usize = 1400;

fn memory() -> Vec<AtomicU64> {
    (0..PAGES * WORDS_PER_PAGE).map(|_| AtomicU64::new(0)).collect()
}

fn arena(memory: &[AtomicU64], workers: usize) -> Arena<'_> {
    let arena = Arena {
        slots: layout(0x1000_0000_0000, PAGES / 2),
        hot: Hot::new(workers),
        frames: Frames::new(memory, Duration::ZERO),
        oracles: Oracles::default(),
    };
    // As many frames as slots of each size, and some more of the small ones.
    let mut first_page = 0;
    for copy in 0..2 {
        for pages in arena.slots.iter().map(|s| s.pages) {
            if copy == 0 || (pages <= 64 && first_page + pages <= PAGES) {
                arena.frames.add(Frame { first_page, pages });
                first_page += pages;
            }
        }
    }
    arena
}

fn habits(probe_every: usize) -> Habits {
    Habits {
        raw_every: 3,
        announce_removal: false,
        probe_every,
        aim_every: 4,
        fork: true,
    }
}

/// Almost never.
const NO_PROBES: usize = usize::MAX;

/// Instructions and changes in turn, one thread: every verdict is strict.
fn run_in_turn(fault: Fault, steps: usize, probe_every: usize) -> (Oracles, WorkerCounts) {
    let memory = memory();
    let arena = arena(&memory, 1);
    let machine = Machine::new(&memory, fault);
    let all: Vec<usize> = (0..arena.slots.len()).collect();
    let context = Context::new(&machine);
    let mut disturber = Disturber::new(
        &arena,
        all,
        &machine,
        context,
        habits(probe_every),
        Random::new(1, 1),
    );
    disturber.populate().unwrap();
    let mut worker = Worker::new(&arena, (0, 1), Context::new(&machine), 7);
    let mut random = Random::new(3, 3);
    for _ in 0..steps {
        for _ in 0..random.below(8) {
            worker.step().unwrap();
        }
        disturber.step().unwrap();
    }
    arena.frames.release_due(true, &arena.oracles);
    let counts = worker.counts;
    (arena.oracles, counts)
}

#[test]
fn test_probes_when_workers_are_idle_see_each_fault_by_themselves() {
    let probe = |fault| {
        let memory = memory();
        let arena = arena(&memory, 1);
        let machine = Machine::new(&memory, fault);
        let all: Vec<usize> = (0..arena.slots.len()).collect();
        let context = Context::new(&machine);
        let mut disturber = Disturber::new(&arena, all, &machine, context, habits(1), Random::new(2, 2));
        disturber.populate().unwrap();
        for _ in 0..300 {
            disturber.step().unwrap();
        }
        arena.frames.release_due(true, &arena.oracles);
        arena.oracles
    };
    assert_eq!(probe(Fault::None).samples(), []);
    let nothing_purged = probe(Fault::NoPurge);
    for oracle in [Oracle::Canary, Oracle::Address, Oracle::Generation] {
        assert!(nothing_purged.count(oracle) > 0, "{oracle:?} is blind");
    }
    assert!(probe(Fault::NoPurgeOnDiscard).count(Oracle::Generation) > 0);
    assert!(probe(Fault::NoPurgeOnProtect).count(Oracle::Address) > 0);
    assert!(probe(Fault::AlwaysExcept).count(Oracle::Result) > 0);
}

#[test]
fn test_oracles_when_machine_is_correct_stay_silent() {
    let (oracles, counts) = run_in_turn(Fault::None, 4_000, 4);
    assert_eq!(oracles.samples(), []);
    assert_eq!(oracles.stale_accesses(), 0);
    assert_eq!(counts.strict, counts.operations);
    assert!(counts.expected_exceptions > 100, "{counts:?}");
    assert!(counts.verified_bytes > 1_000_000, "{counts:?}");
    assert_eq!(counts.by_instruction.len(), 13, "{counts:?}");
}

#[test]
fn test_oracles_when_nothing_is_purged_all_three_speak() {
    let (oracles, _) = run_in_turn(Fault::NoPurge, 2_000, NO_PROBES);
    for oracle in [Oracle::Canary, Oracle::Address, Oracle::Generation] {
        assert!(oracles.count(oracle) > 0, "{oracle:?} is blind");
    }
}

#[test]
fn test_oracles_when_purge_is_too_short_see_it() {
    let (oracles, _) = run_in_turn(Fault::FirstPageOnly, 2_000, NO_PROBES);
    assert!(oracles.count(Oracle::Canary) > 0);
    assert!(oracles.count(Oracle::Address) > 0);
}

#[test]
fn test_generation_oracle_when_only_discards_are_missed_is_the_one_that_sees_it() {
    let (oracles, _) = run_in_turn(Fault::NoPurgeOnDiscard, 4_000, NO_PROBES);
    assert!(oracles.count(Oracle::Generation) > 0);
    assert_eq!(oracles.count(Oracle::Canary) + oracles.count(Oracle::Address), 0);
}

#[test]
fn test_address_oracle_when_protection_is_missed_sees_the_store() {
    let (oracles, _) = run_in_turn(Fault::NoPurgeOnProtect, 4_000, NO_PROBES);
    assert!(oracles.count(Oracle::Address) > 0);
    assert_eq!(oracles.count(Oracle::Canary), 0, "no page is left behind wrongly");
}

#[test]
fn test_content_check_when_stores_are_lost_sees_it() {
    let (oracles, _) = run_in_turn(Fault::LostStores, 200, NO_PROBES);
    assert!(
        oracles
            .samples()
            .iter()
            .any(|v| v.what.contains("but memory holds"))
    );
}

#[test]
fn test_result_check_when_allowed_access_fails_reports_it_as_not_stale() {
    let (oracles, _) = run_in_turn(Fault::AlwaysExcept, 50, NO_PROBES);
    assert!(oracles.count(Oracle::Result) > 0);
    assert_eq!(oracles.stale_accesses(), 0);
}

/// Workers and disturbers at the same time.
fn run_at_once(fault: Fault, time: Duration) -> (Oracles, WorkerCounts) {
    let memory = memory();
    let arena = arena(&memory, 2);
    let machine = Machine::new(&memory, fault);
    // Disturbers and workers divide the slots in different ways.
    let middle = arena.slots.len() / 2;
    let stop = AtomicBool::new(false);
    let mut counts = WorkerCounts::default();
    let mut disturbers: Vec<_> = [(0..middle).collect(), (middle..arena.slots.len()).collect()]
        .into_iter()
        .enumerate()
        .map(|(n, mine)| {
            let random = Random::new(5, n as u64);
            let context = Context::new(&machine);
            let mut d = Disturber::new(&arena, mine, &machine, context, habits(4), random);
            d.populate().unwrap();
            d
        })
        .collect();
    std::thread::scope(|scope| {
        for disturber in &mut disturbers {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    disturber.step().unwrap();
                }
            });
        }
        let workers: Vec<_> = (0..2)
            .map(|n| {
                let (arena, machine, stop) = (&arena, &machine, &stop);
                scope.spawn(move || {
                    let mut worker = Worker::new(arena, (n, 2), Context::new(machine), 9);
                    while !stop.load(Ordering::Relaxed) {
                        worker.step().unwrap();
                    }
                    worker.counts
                })
            })
            .collect();
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            counts.merge(&worker.join().unwrap());
        }
    });
    arena.frames.release_due(true, &arena.oracles);
    drop(disturbers);
    (arena.oracles, counts)
}

#[test]
fn test_oracles_when_machine_is_correct_and_threads_race_stay_silent() {
    let (oracles, counts) = run_at_once(Fault::None, Duration::from_millis(1500));
    assert_eq!(oracles.samples(), []);
    assert!(counts.lenient > 0 && counts.strict > 0, "{counts:?}");
}

#[test]
fn test_oracles_when_nothing_is_purged_and_threads_race_speak() {
    let (oracles, _) = run_at_once(Fault::NoPurge, Duration::from_millis(500));
    assert!(oracles.stale_accesses() > 0);
}
