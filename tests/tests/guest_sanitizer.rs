//! The kernel's own driver on a device that is broken, under the device's sanitizer: what is injected is named, by the
//! sanitizer and, where it can see it, by the program in the guest; the same delays with nothing broken are not. (The
//! kill bit's part is in `guest_gru.rs`, in every doorbell mode.)

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lab::guest::Guest;
use serde_json::Value;
use tests::guest::findings::{assert_looked, classes, number};
use tests::guest::{Device, Rig};
use tests::guest_or_skip;
use tests::processes::binary;

const MINUTE: Duration = Duration::from_secs(60);

/// A guest with the driver and `gru-guest`; `None` (and a visible skip) without the modules.
fn boot(rig: &Rig, name: &str, device: &Device) -> Option<Guest> {
    let modules = match rig.gru_modules() {
        Ok(modules) => modules,
        Err(why) => {
            println!("SKIP: {why}");
            return None;
        }
    };
    let mut files = rig.initramfs();
    for module in modules {
        files.add_module(&rig.lab, &module).expect("a module");
    }
    let program = binary().with_file_name("gru-guest");
    assert!(program.exists(), "{}: cargo build --workspace", program.display());
    files.add_program(&program).expect("a program");
    Some(
        rig.boot(name, &files, &[device])
            .unwrap_or_else(|e| panic!("{e}")),
    )
}

/// One of gru-guest's tests on a device of its own: exit code, what it said, what the sanitizer has found.
fn run(rig: &Rig, name: &str, device: &[&str], command: &str) -> Option<(i32, String, Value)> {
    let arguments = [&["--doorbell", "trap", "--sanitize"], device].concat();
    let mut device = Device::gru(&arguments);
    let mut guest = boot(rig, name, &device)?;
    let finished = guest.run(command, 3 * MINUTE).unwrap_or_else(|e| panic!("{e}"));
    print!("{}", finished.output);
    let findings = device.findings();
    println!(
        "{arguments:?}: {:?}, {} defects",
        classes(&findings),
        findings["defects"]
    );
    assert_looked(name, &findings);
    guest.power_off().unwrap_or_else(|e| panic!("{e}"));
    Some((finished.code, finished.output, findings))
}

#[test]
fn test_late_stores_when_a_tgh_completes_early_are_reported_and_else_nothing_is() {
    let rig = guest_or_skip!();
    let command = "gru-guest late-store --rounds 20";
    let parked = "drain-delay=1,limit-ms=60,margin-ms=30";
    let early = format!("--faults=early-completion=1,{parked}");
    let Some((code, output, findings)) = run(&rig, "gru-sanitize-early", &[&early], command) else {
        return;
    };
    assert_eq!(code, 1, "{output}");
    assert_eq!(
        classes(&findings),
        BTreeSet::from(["completion-before-drain"]),
        "{findings:#}"
    );
    let late = number(&output, " late stores");
    assert!(
        late > 0 && findings["defects"].as_u64() >= Some(late),
        "{late}: {findings:#}"
    );
    let detail = findings["reports"][0]["detail"].as_str().unwrap_or_default();
    assert!(detail.contains("is about to leave ACTIVE"), "{detail}");

    let control = format!("--faults={parked}");
    let Some((code, output, findings)) = run(&rig, "gru-sanitize-parked", &[&control], command) else {
        return;
    };
    assert_eq!(
        (code, findings["defects"].as_u64()),
        (0, Some(0)),
        "{output} {findings:#}"
    );
}

/// The driver goes on as if nothing were wrong with these, and its counters are all that it says.
#[test]
fn test_faults_of_handles_when_injected_are_named() {
    let rig = guest_or_skip!();
    for (fault, class) in [
        ("duplicate-fault=1", "spurious-fault"),
        ("delayed-restart=1,margin-ms=20", "late-restart"),
        ("wrong-status=1", "wrong-status"),
    ] {
        let option = format!("--faults={fault}");
        let command =
            "gru-guest faults --rounds 20; gru-guest statistics | grep -e call_os -e intr_tfh -e dropin";
        let Some((_, output, findings)) = run(&rig, &format!("gru-sanitize-{class}"), &[&option], command)
        else {
            return;
        };
        assert!(output.contains("verdict: faults PASS"), "{fault}: {output}");
        assert_eq!(
            classes(&findings),
            BTreeSet::from([class]),
            "{fault}: {findings:#}"
        );
    }
    // Here the program waits for a miss of which nobody has heard, so this guest cannot end in good order.
    let arguments = ["--doorbell", "trap", "--sanitize", "--faults=lost-interrupt=1"];
    let mut device = Device::gru(&arguments);
    let Some(mut guest) = boot(&rig, "gru-sanitize-lost", &device) else {
        return;
    };
    let before = device.stats()["misses"].as_u64();
    let mut shell = |command: &str| {
        let finished = guest.run(command, MINUTE).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(finished.code, 0, "{command}: {}", finished.output);
        finished.output
    };
    shell("gru-guest faults >/tmp/faults 2>&1 &");
    let begin = Instant::now();
    while device.stats()["misses"].as_u64() == before || device.findings()["defects"].as_u64() == Some(0) {
        assert!(
            begin.elapsed() < 3 * MINUTE,
            "no miss whose interrupt is lost: {:#}, {:#}; {}",
            device.stats(),
            device.findings(),
            shell("cat /tmp/faults")
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = shell("gru-guest statistics | grep intr_tfh");
    assert!(output.contains("statistic intr_tfh 0"), "{output}");
    let findings = device.findings();
    assert_eq!(
        classes(&findings),
        BTreeSet::from(["lost-interrupt"]),
        "{findings:#}"
    );
}
