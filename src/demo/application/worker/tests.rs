use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::super::disturber::{Disturber, Habits};
use super::super::frames::{Frame, Frames};
use super::super::model::{Context, Fault, Machine};
use super::super::oracles::{Oracle, Oracles};
use super::super::random::Random;
use super::super::slots::{Slot, layout};
use super::super::words::WORDS_PER_PAGE;
use super::*;

const PAGES: usize = 1400;

struct Stage {
    memory: Vec<AtomicU64>,
    slots: Vec<Slot>,
}

impl Stage {
    fn new() -> Self {
        Self {
            memory: (0..PAGES * WORDS_PER_PAGE).map(|_| AtomicU64::new(0)).collect(),
            slots: layout(0x1000_0000_0000, PAGES / 2),
        }
    }

    fn frames(&self) -> Frames<'_> {
        let frames = Frames::new(&self.memory, Duration::ZERO);
        let mut page = 0;
        // As many frames as slots of each size and some more of the small ones.
        for slot in &self.slots {
            frames.add(Frame {
                first_page: page,
                pages: slot.pages,
            });
            page += slot.pages;
        }
        for slot in &self.slots {
            if slot.pages <= 64 && page + slot.pages <= PAGES {
                frames.add(Frame {
                    first_page: page,
                    pages: slot.pages,
                });
                page += slot.pages;
            }
        }
        frames
    }
}

const HABITS: Habits = Habits {
    raw: true,
    fork: true,
};

/// Instructions and changes in turn, one thread: every verdict is strict.
fn run_in_turn(fault: Fault, steps: usize) -> (Oracles, WorkerCounts) {
    let (stage, oracles) = (Stage::new(), Oracles::default());
    let frames = stage.frames();
    let machine = Machine::new(&stage.memory, fault);
    let all: Vec<usize> = (0..stage.slots.len()).collect();
    let mut disturber = Disturber::new(
        &stage.slots,
        all.clone(),
        &frames,
        &oracles,
        &machine,
        HABITS,
        Random::new(1, 1),
    );
    disturber.populate().unwrap();
    let mut worker = Worker::new(
        &stage.slots,
        all,
        &frames,
        &oracles,
        Context::new(&machine),
        (7, 7),
    );
    let mut random = Random::new(3, 3);
    for _ in 0..steps {
        for _ in 0..random.below(8) {
            worker.step().unwrap();
        }
        disturber.step().unwrap();
    }
    frames.release_due(true, &oracles);
    let counts = worker.counts;
    (oracles, counts)
}

#[test]
fn test_oracles_when_machine_is_correct_stay_silent() {
    let (oracles, counts) = run_in_turn(Fault::None, 4_000);
    assert_eq!(oracles.samples(), []);
    assert_eq!(oracles.stale_accesses(), 0);
    assert_eq!(counts.strict, counts.operations);
    assert!(counts.expected_exceptions > 100, "{counts:?}");
    assert!(counts.verified_bytes > 1_000_000, "{counts:?}");
    assert_eq!(counts.by_instruction.len(), 13, "{counts:?}");
}

#[test]
fn test_oracles_when_nothing_is_purged_all_three_speak() {
    let (oracles, _) = run_in_turn(Fault::NoPurge, 2_000);
    for oracle in [Oracle::Canary, Oracle::Address, Oracle::Generation] {
        assert!(oracles.count(oracle) > 0, "{oracle:?} is blind");
    }
}

#[test]
fn test_oracles_when_purge_is_too_short_see_it() {
    let (oracles, _) = run_in_turn(Fault::FirstPageOnly, 2_000);
    assert!(oracles.count(Oracle::Canary) > 0);
    assert!(oracles.count(Oracle::Address) > 0);
}

#[test]
fn test_generation_oracle_when_only_discards_are_missed_is_the_one_that_sees_it() {
    let (oracles, _) = run_in_turn(Fault::NoPurgeOnDiscard, 4_000);
    assert!(oracles.count(Oracle::Generation) > 0);
    assert_eq!(oracles.count(Oracle::Canary) + oracles.count(Oracle::Address), 0);
}

#[test]
fn test_address_oracle_when_protection_is_missed_sees_the_store() {
    let (oracles, _) = run_in_turn(Fault::NoPurgeOnProtect, 4_000);
    let samples = oracles.samples();
    assert!(
        samples
            .iter()
            .any(|v| v.oracle == Oracle::Address && v.what.contains("Read")),
        "{samples:?}"
    );
}

#[test]
fn test_content_check_when_stores_are_lost_sees_it() {
    let (oracles, _) = run_in_turn(Fault::LostStores, 200);
    assert!(
        oracles
            .samples()
            .iter()
            .any(|v| v.what.contains("but memory holds"))
    );
}

#[test]
fn test_result_check_when_allowed_access_fails_reports_it_as_not_stale() {
    let (oracles, _) = run_in_turn(Fault::AlwaysExcept, 50);
    assert!(oracles.count(Oracle::Result) > 0);
    assert_eq!(oracles.stale_accesses(), 0);
}

/// Workers and disturbers at the same time.
fn run_at_once(fault: Fault, time: Duration) -> (Oracles, WorkerCounts) {
    let (stage, oracles) = (Stage::new(), Oracles::default());
    let frames = stage.frames();
    let machine = Machine::new(&stage.memory, fault);
    let part = |n: usize| (0..stage.slots.len()).filter(|i| i % 2 == n).collect::<Vec<_>>();
    // Disturbers and workers divide the slots in different ways.
    let half = |n: usize| {
        let middle = stage.slots.len() / 2;
        if n == 0 {
            (0..middle).collect::<Vec<_>>()
        } else {
            (middle..stage.slots.len()).collect()
        }
    };
    let stop = AtomicBool::new(false);
    let mut counts = WorkerCounts::default();
    let mut disturbers: Vec<_> = (0..2)
        .map(|n| {
            let random = Random::new(5, n as u64);
            let mut d = Disturber::new(&stage.slots, half(n), &frames, &oracles, &machine, HABITS, random);
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
                let (part, frames, oracles, machine, slots) =
                    (part(n), &frames, &oracles, &machine, &stage.slots);
                let stop = &stop;
                scope.spawn(move || {
                    let context = Context::new(machine);
                    let mut worker = Worker::new(slots, part, frames, oracles, context, (9, n as u64));
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
    frames.release_due(true, &oracles);
    (oracles, counts)
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
