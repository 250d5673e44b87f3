//! The fuzz targets, bounded: fixed seeds, a fixed number of inputs. `TLBRIDGE_FUZZ_MINUTES` makes it the
//! long run, with a seed from the clock; `TLBRIDGE_FUZZ_SEED` names one.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tests::fuzzing::runner::{Run, Statistics, Until, codecs, sessions};

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
    let statistics = sessions(&run("actions", 6_000, 95)).expect("a server starts");
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
