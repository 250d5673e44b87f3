//! `kill -9` of each process of the demo at pseudo-random points: the rest ends by itself, the error names
//! who died, and nothing is left behind.

use std::time::Duration;
use tests::processes::{self, Tool};

fn rounds() -> u64 {
    std::env::var("TLBRIDGE_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(4)
}

/// Kills `role` after a delay that differs from round to round; returns what the tool said.
fn kill_one(role: &str, named: &[&str], signal: i32) {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: kill {role}: {reason}");
        return;
    }
    for round in 0..rounds() {
        let mut tool = Tool::start(&["demo", "--seconds", "30", "--seed", &round.to_string(), "--json"]);
        let demo = tool.pid();
        let victim = tool
            .child_of_role(role)
            .unwrap_or_else(|| panic!("round {round}: no child of role {role}"));
        // From the middle of start-up (a few ms) to well into the run: not synchronisation, but the point
        // at which the death is to strike.
        std::thread::sleep(Duration::from_millis((round * 739) % 2500));
        let family = processes::descendants(demo);
        processes::kill(victim, signal);
        let ended = tool
            .wait(Duration::from_secs(40))
            .unwrap_or_else(|| panic!("round {round}: {role} was killed and the demo hangs"));
        assert!(
            !ended.status.success(),
            "round {round}: {role} was killed and the demo says all is well"
        );
        let said = ended.stderr.to_lowercase();
        assert!(
            named.iter().any(|n| said.contains(n)),
            "round {round}: the error does not name the {role}: {}",
            ended.stderr
        );
        assert!(!said.contains("panicked"), "round {round}: {}", ended.stderr);
        let left = processes::survivors(&family, Duration::from_secs(10));
        assert!(
            left.is_empty(),
            "round {round}: processes left after the {role} died: {left:?}"
        );
    }
}

#[test]
fn test_demo_when_device_is_killed_ends_with_its_name() {
    kill_one("device", &["device"], 9);
}

#[test]
fn test_demo_when_host_daemon_is_killed_ends_with_its_name() {
    kill_one("host", &["host daemon", "daemon"], 9);
}

#[test]
fn test_demo_when_application_is_killed_ends_with_its_name() {
    kill_one("application", &["application"], 9);
}

#[test]
fn test_demo_when_itself_is_killed_leaves_no_process() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: kill of the demo itself: {reason}");
        return;
    }
    for round in 0..rounds() {
        let mut tool = Tool::start(&["demo", "--seconds", "30", "--json"]);
        let demo = tool.pid();
        tool.child_of_role("application").expect("the application starts");
        std::thread::sleep(Duration::from_millis((round * 353) % 1500));
        let family = processes::descendants(demo);
        assert!(
            family.len() >= 3,
            "device, host daemon and application run: {family:?}"
        );
        processes::kill(demo, 9);
        let left = processes::survivors(&family, Duration::from_secs(15));
        assert!(left.is_empty(), "round {round}: {left:?} outlive the demo");
        let _ = tool.wait(Duration::from_secs(10));
    }
}

#[test]
fn test_demo_when_interrupted_ends_clean() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: Ctrl-C: {reason}");
        return;
    }
    let mut tool = Tool::start(&["demo", "--seconds", "60"]);
    let demo = tool.pid();
    tool.child_of_role("application").expect("the application starts");
    std::thread::sleep(Duration::from_millis(700));
    let family = processes::descendants(demo);
    processes::kill(demo, 2);
    let ended = tool.wait(Duration::from_secs(20)).expect("ends after Ctrl-C");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let left = processes::survivors(&family, Duration::from_secs(5));
    assert!(left.is_empty(), "{left:?} are left after Ctrl-C");
}
