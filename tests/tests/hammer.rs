//! The hammer: the whole chain on real processes, with every kind of change, in every doorbell mode and
//! both registration modes of userfaultfd. `TLBRIDGE_HAMMER_SECONDS` sets the length of each run.

use std::time::Duration;
use tests::processes::{self, Tool};

fn seconds() -> u64 {
    std::env::var("TLBRIDGE_HAMMER_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(8)
}

fn hammer(arguments: &[&str]) {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: hammer {arguments:?}: {reason}");
        return;
    }
    let length = seconds().to_string();
    let mut all = vec!["demo", "--json", "--seconds", &length];
    all.extend(arguments);
    let ended = Tool::start(&all)
        .wait(Duration::from_secs(seconds() * 2 + 60))
        .unwrap_or_else(|| panic!("the demo with {arguments:?} hangs"));
    assert!(
        ended.status.success(),
        "{arguments:?}: {:?}\n{}\n{}",
        ended.status,
        ended.stdout,
        ended.stderr
    );
    let report = ended.json();
    let count = |key: &str| {
        report[key]
            .as_u64()
            .unwrap_or_else(|| panic!("{key} is missing: {report}"))
    };
    assert_eq!(count("stale_accesses"), 0, "{report}");
    assert!(count("operations") > 100, "{report}");
    assert!(count("verified_bytes") > 0, "{report}");
    assert!(count("tlb_misses") > 0, "{report}");
    assert!(count("tlb_hits") > 0, "{report}");
    assert!(!report["invalidations"].is_null(), "{report}");
    println!(
        "{arguments:?}: {} operations, {} bytes verified",
        count("operations"),
        count("verified_bytes")
    );
}

#[test]
fn test_hammer_when_polled_and_write_protect_mode_has_no_stale_access() {
    hammer(&["--seed", "1"]);
}

#[test]
fn test_hammer_when_polled_and_missing_mode_has_no_stale_access() {
    hammer(&["--seed", "2", "--uffd-mode", "missing"]);
}

#[test]
fn test_hammer_when_trapped_has_no_stale_access() {
    hammer(&["--seed", "3", "--doorbell", "trap"]);
}

#[test]
fn test_hammer_when_belled_has_no_stale_access() {
    hammer(&["--seed", "5", "--doorbell", "bell"]);
}

#[test]
fn test_hammer_when_many_threads_has_no_stale_access() {
    hammer(&["--seed", "4", "--threads", "6"]);
}
