//! `tlbridge device --sanitize` as a user runs it: reports, exit codes, `tlbridge inspect`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use driver::gru::{FaultMode, GruOptions};
use driver::vfio_user::VfioUserClient;
use serde_json::Value;
use tests::gru::flushes;
use tests::gru::rig::Rig;
use tests::processes::{Tool, binary, kill};

const SOON: Duration = Duration::from_secs(20);

/// A device with all that a user can ask of it, serving.
fn start(directory: &Path, arguments: &[&str]) -> Tool {
    let mut command = Command::new(binary());
    command
        .args(["device", "--model", "gru", "--map-tfh", "--json", "--socket"])
        .arg(directory.join("gru.sock"))
        .arg("--inspect")
        .arg(directory.join("inspect.sock"))
        .args(arguments);
    let mut device = Tool::start_command(command);
    device.expect_on_stderr("serving", SOON);
    device
}

/// Exit code, the object on stdout, what stood on stderr.
fn end(device: Tool) -> (Option<i32>, Value, String) {
    kill(device.pid(), 15);
    let ended = device.wait(SOON).expect("the device ends");
    (ended.status.code(), ended.json(), ended.stderr)
}

fn inspect(directory: &Path, json: bool) -> String {
    let path = directory.join("inspect.sock");
    let mut arguments = vec!["inspect", path.to_str().expect("a plain name")];
    arguments.extend(json.then_some("--json"));
    let ended = Tool::start(&arguments).wait(SOON).expect("inspect ends");
    assert!(ended.status.success(), "{ended:?}");
    ended.stdout
}

/// Invalidations between a look-up and its dropin.
fn late_dropins(directory: &Path) -> bool {
    let client = VfioUserClient::connect(directory.join("gru.sock")).expect("connect");
    catch_unwind(AssertUnwindSafe(|| {
        let rig = Rig::new(Arc::new(client), GruOptions::default(), 4096);
        flushes::s1_invalidation_during_the_look_up(&rig, FaultMode::Interrupt);
    }))
    .is_ok()
}

#[test]
fn test_device_when_its_kill_bit_is_broken_ends_with_reports_and_exit_code_4() {
    let directory = tempfile::tempdir().expect("a directory");
    let device = start(directory.path(), &["--sanitize", "--break", "kill-bit"]);
    assert!(
        !late_dropins(directory.path()),
        "the driver's test sees stale data"
    );

    let text = inspect(directory.path(), false);
    assert!(text.contains("class: fill-after-kill"), "{text}");
    let state: Value = serde_json::from_str(&inspect(directory.path(), true)).expect("JSON");
    let report = &state["sanitizer"]["reports"][0];
    assert_eq!(report["class"], "fill-after-kill", "{state:#}");
    assert!(report["entry"]["fill"].is_u64() && report["purges"][0]["purge"].is_u64());

    let (code, findings, stderr) = end(device);
    assert_eq!(code, Some(4), "{stderr}");
    let defects = findings["defects"].as_u64().expect("a number");
    assert!(defects > 0);
    for says in [
        "sanitizer: fill-after-kill: a fill was accepted",
        "rule    S1",
        ", CBR ",
        "purge   ",
        &format!("sanitizer: {defects} defects in"),
    ] {
        assert!(stderr.contains(says), "{says}: {stderr}");
    }
    assert!(!directory.path().join("inspect.sock").exists());
}

#[test]
fn test_device_when_dropins_are_only_delayed_ends_with_exit_code_0() {
    let directory = tempfile::tempdir().expect("a directory");
    let device = start(directory.path(), &["--sanitize", "--delay", "kill-bit"]);
    assert!(late_dropins(directory.path()));
    let (code, findings, stderr) = end(device);
    assert_eq!(
        (code, findings["defects"].as_u64()),
        (Some(0), Some(0)),
        "{stderr}"
    );
    assert!(
        findings["checked"].as_u64().is_some_and(|checked| checked > 0),
        "{findings}"
    );
    assert!(stderr.contains("sanitizer: 0 defects; "), "{stderr}");
}

#[test]
fn test_device_when_not_sanitized_has_no_findings() {
    let directory = tempfile::tempdir().expect("a directory");
    let device = start(directory.path(), &[]);
    let state: Value = serde_json::from_str(&inspect(directory.path(), true)).expect("JSON");
    assert_eq!(state["model"], "gru");
    let (code, findings, stderr) = end(device);
    if tests::gru::sanitizing() {
        assert_eq!(findings["defects"].as_u64(), Some(0), "{stderr}");
    } else {
        assert!(
            findings.is_null() && !stderr.contains("sanitizer"),
            "{findings}, {stderr}"
        );
    }
    assert_eq!(code, Some(0), "{stderr}");
}
