//! A broken bridge is caught in every run, and the same delays with the check on find nothing. The device's sanitizer
//! names what is broken in the device; every other run goes without it, as its bookkeeping takes time where a race is.
//! `TLBRIDGE_BREAK_RUNS` sets the number of runs of each kind (default 20).

use std::collections::BTreeSet;
use std::time::Duration;

use tests::gru;
use tests::processes::{self, Tool};

fn runs() -> u64 {
    std::env::var("TLBRIDGE_BREAK_RUNS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(20)
}

/// Whether the device of this run has a sanitizer.
fn sanitized(seed: u64) -> bool {
    seed % 2 == 1 || gru::sanitizing()
}

/// One short run; its exit code and what it printed.
fn run(option: &str, check: &str, seed: u64) -> (Option<i32>, serde_json::Value) {
    let text = seed.to_string();
    let mut arguments = vec!["demo", "--json", "--seconds", "2", "--seed", &text, option, check];
    arguments.extend(sanitized(seed).then_some("--sanitize"));
    let ended = Tool::start(&arguments)
        .wait(Duration::from_secs(60))
        .unwrap_or_else(|| panic!("{arguments:?} does not end"));
    (ended.status.code(), ended.json())
}

/// `class`: what the sanitizer says; `None` when the device does nothing wrong.
fn broken_and_control(check: &str, class: Option<&str>) {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: --break {check}: {reason}");
        return;
    }
    for seed in 1..=runs() {
        let (code, result) = run("--break", check, seed);
        assert_eq!(
            code,
            Some(3),
            "run {seed} with {check} broken is not caught: {result}"
        );
        assert!(
            result["stale_accesses"].as_u64().is_some_and(|n| n > 0),
            "{result}"
        );
        let first = &result["oracles"]["samples"][0];
        assert!(
            first["what"].as_str().is_some_and(|w| !w.is_empty()),
            "a violation says what: {first}"
        );
        if sanitized(seed) {
            let classes: BTreeSet<_> = result["sanitizer"]["reports"]
                .as_array()
                .expect("a sanitizer")
                .iter()
                .filter_map(|report| report["class"].as_str())
                .collect();
            assert_eq!(classes, class.into_iter().collect(), "run {seed}: {result}");
        } else {
            assert!(result["sanitizer"].is_null(), "run {seed}: {result}");
        }

        let (code, result) = run("--delay", check, seed);
        assert_eq!(code, Some(0), "run {seed} with {check} delayed only: {result}");
        assert_eq!(result["stale_accesses"].as_u64(), Some(0), "{result}");
        let defects = result["sanitizer"]["defects"].as_u64();
        assert_eq!(defects, sanitized(seed).then_some(0), "{result}");
        assert!(
            result["operations"].as_u64().is_some_and(|n| n > 0),
            "the control did nothing: {result}"
        );
    }
}

#[test]
fn test_kill_bit_when_broken_is_caught_in_every_run() {
    broken_and_control("kill-bit", Some("fill-after-kill"));
}

#[test]
fn test_drain_when_broken_is_caught_in_every_run() {
    broken_and_control("drain", Some("completion-before-drain"));
}

#[test]
fn test_safety_net_when_broken_is_caught_in_every_run() {
    // The device does what it is told; that it is told too late only the daemon could know.
    broken_and_control("safety-net", None);
}
