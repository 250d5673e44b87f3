//! The fuzz targets, bounded: fixed seeds, a fixed number of inputs. `TLBRIDGE_FUZZ_MINUTES` makes it the
//! long run, with a seed from the clock; `TLBRIDGE_FUZZ_SEED` names one.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use device::faults::BreakPlan;
use protos::gru::cb::Opc;
use tests::fuzzing::gru::GruUnderTest;
use tests::fuzzing::gru_actions::{Action, Change, ContextNumber, Instruction, PurgeKind, Sequence};
use tests::fuzzing::runner::{Run, Statistics, Until, codecs, gru, mlx5, sessions};

/// The runs count the process's file descriptors: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn run(target: &str, executions: u64, share: u32) -> Run {
    let project = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the project")
        .to_owned();
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let minutes = number("TLBRIDGE_FUZZ_MINUTES");
    let clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        now.as_nanos() as u64
    };
    let seed = number("TLBRIDGE_FUZZ_SEED").unwrap_or_else(|| if minutes.is_some() { clock() } else { 1 });
    println!("fuzz {target}: seed {seed}");
    Run {
        seed,
        until: minutes.map_or(Until::Executions(executions), |m| {
            Until::Elapsed(Duration::from_secs(m * 60) * share / 100)
        }),
        corpus: project.join("fuzz/corpus").join(target),
        artifacts: project.join("target/fuzz"),
        progress: minutes.is_some(),
    }
}

fn check(target: &str, statistics: &Statistics) {
    println!("fuzz {target}: {statistics}");
    assert!(
        statistics.crashes.is_empty(),
        "fuzz {target}: {:#?}",
        statistics.crashes
    );
}

#[test]
fn test_server_when_sessions_are_hostile_keeps_its_promises() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let statistics = sessions(&run("actions", 6_000, 50)).expect("a server starts");
    check("actions", &statistics);
    // A runner whose sessions get nowhere would find nothing either.
    assert!(
        statistics.answers > 30,
        "only {} different answers",
        statistics.answers
    );
}

#[test]
fn test_codecs_when_given_any_bytes_never_panic_and_round_trip() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    check("decoder", &codecs(&run("decoder", 300_000, 5)));
}

#[test]
fn test_gru_when_its_bar_is_accessed_in_any_order_has_only_entries_of_the_page_table() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let statistics = gru(&run("gru", 3_000, 30)).expect("a device starts");
    check("gru", &statistics);
    assert!(
        statistics.answers > 20,
        "only {} different ends of instructions",
        statistics.answers
    );
}

#[test]
fn test_hca_when_its_driver_does_anything_lives_and_is_as_new_after_a_reset() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let statistics = mlx5(&run("mlx5", 600, 15)).expect("an HCA starts");
    check("mlx5", &statistics);
    assert!(
        statistics.answers > 40,
        "only {} different ends of commands and requests",
        statistics.answers
    );
}

/// A program stores, its miss is answered with what was right before the page moved.
fn stale_answer() -> Sequence {
    let context = ContextNumber(0);
    let mut actions = vec![
        Action::Start {
            context,
            cbrs: 1,
            segment: 1,
            space: 0,
            polling: false,
        },
        Action::Issue {
            context,
            cb: 0,
            instruction: Instruction {
                opc: Opc::VSTORE.0,
                exopc: 0,
                xtype: 3,
                page: 2,
                other: 0,
                offset: 0,
                segment: 0,
                nelem: 1,
                stride: 1,
                interrupt: false,
            },
        },
        Action::Stale {
            which: 0,
            purge: PurgeKind::Page,
            handle: 0,
            to: Change::Move,
            only_write: false,
        },
    ];
    // A fill that a broken device holds back comes later.
    actions.extend(vec![Action::Settle; 50]);
    Sequence { actions }
}

#[test]
fn test_gru_when_its_kill_bit_is_broken_is_found_out() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut good = GruUnderTest::start(BreakPlan::default()).unwrap();
    good.run(&stale_answer())
        .expect("a good device refuses the old answer");
    assert_eq!(good.stats().fills_killed, 1, "and the sequence does give it");
    let broken = BreakPlan {
        kill_bit: true,
        ..BreakPlan::default()
    };
    let mut broken = GruUnderTest::start(broken).unwrap();
    let found = broken
        .run(&stale_answer())
        .expect_err("an oracle that finds nothing");
    assert!(found.0.contains("the page table"), "{found}");
}
