//! `tlbridge vm` as a user runs it.

use std::time::Duration;

use tests::guest_or_skip;
use tests::processes::{Tool, descendants, kill, survivors};

/// A boot, a command and two ends, on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(20);

#[test]
fn test_vm_when_given_a_command_has_its_output_and_exit_code() {
    let rig = guest_or_skip!();
    let kernel = rig.kernel.image.to_str().unwrap();
    let modules = rig.kernel.modules.as_ref().unwrap().to_str().unwrap();
    // A kernel of the user's own, with a module of it that depends on others.
    let arguments = [
        "vm",
        "--model",
        "gru",
        "--kernel",
        kernel,
        "--modules",
        modules,
        "--load",
        "virtio_net",
        "--",
    ];
    let script = "lsmod | grep -c ^net_failover; cat /sys/bus/pci/devices/0000:00:01.0/vendor; exit 7";
    let ended = Tool::start(&[&arguments[..], &["sh", "-c", script]].concat())
        .wait(LIMIT)
        .expect("tlbridge vm does not end");
    assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    assert_eq!(ended.stdout, "1\n0x10a9\n", "{ended:?}");
}

#[test]
fn test_vm_when_without_a_command_is_a_shell_until_the_input_ends() {
    let rig = guest_or_skip!();
    let kernel = rig.kernel.image.to_str().unwrap();
    // Standard input is empty: the shell sees the end at once.
    let ended = Tool::start(&["vm", "--model", "gru", "--kernel", kernel])
        .wait(LIMIT)
        .expect("tlbridge vm does not end");
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("built-in shell"), "{ended:?}");
}

#[test]
fn test_vm_when_it_cannot_run_the_command_has_exit_codes_of_its_own() {
    let rig = guest_or_skip!();
    let kernel = rig.kernel.image.to_str().unwrap();
    let vm = |rest: &[&str]| {
        let arguments = [&["vm", "--model", "gru", "--kernel", kernel], rest].concat();
        Tool::start(&arguments)
            .wait(LIMIT)
            .expect("tlbridge vm does not end")
    };
    let late = vm(&["--timeout", "1", "--", "sleep", "1000"]);
    assert_eq!(late.status.code(), Some(124), "{late:?}");
    let gone = vm(&["--", "poweroff", "-f"]);
    assert_eq!(gone.status.code(), Some(125), "{gone:?}");
    assert!(gone.stderr.contains("powered off"), "{gone:?}");
    let missing = vm(&[
        "--load",
        "no_such_module",
        "--modules",
        "/nonexistent",
        "--",
        "true",
    ]);
    assert_eq!(missing.status.code(), Some(125), "{missing:?}");
    assert!(missing.stderr.contains("/nonexistent/modules.dep"), "{missing:?}");
}

#[test]
fn test_vm_when_of_two_guests_runs_the_command_in_both_and_has_the_worst_code() {
    let rig = guest_or_skip!();
    let kernel = rig.kernel.image.to_str().unwrap();
    let place = tempfile::tempdir().unwrap();
    let log = place.path().join("vm.log");
    let mut arguments = vec!["vm", "--model", "gru", "--guests", "2", "--kernel", kernel];
    arguments.extend(["--log", log.to_str().unwrap(), "--", "sh", "-c"]);
    let script = "echo $GUEST_INDEX of $GUESTS; cat /sys/bus/pci/devices/0000:00:01.0/vendor; exit $((GUEST_INDEX + 3))";
    arguments.push(script);
    let ended = Tool::start(&arguments)
        .wait(LIMIT)
        .expect("tlbridge vm does not end");
    assert_eq!(ended.status.code(), Some(4), "{ended:?}");
    let mut lines: Vec<_> = ended.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["0: 0 of 2", "0: 0x10a9", "1: 0x10a9", "1: 1 of 2"],
        "{ended:?}"
    );
    for name in ["vm-0.log", "vm-1.log"] {
        assert!(
            std::fs::read_to_string(place.path().join(name)).is_ok_and(|t| t.contains('[')),
            "{name}"
        );
    }
    // One that is gone is an error; the other one has run to its end.
    arguments.pop();
    arguments.push("if [ $GUEST_INDEX = 0 ]; then poweroff -f; fi; echo here");
    let ended = Tool::start(&arguments)
        .wait(LIMIT)
        .expect("tlbridge vm does not end");
    assert_eq!(ended.status.code(), Some(125), "{ended:?}");
    assert_eq!(ended.stdout, "1: here\n", "{ended:?}");
    assert!(ended.stderr.contains("guest 0"), "{ended:?}");
}

#[test]
fn test_vm_when_the_driver_is_not_in_the_kernel_any_more_says_so() {
    let rig = guest_or_skip!();
    if let Err(why) = rig.lab.find_kernel(lab::kernel::Series::Backports) {
        println!("SKIP: {why:#}");
        return;
    }
    let ended = Tool::start(&[
        "vm",
        "--model",
        "gru",
        "--kernel-series",
        "backports",
        "--",
        "true",
    ])
    .wait(LIMIT)
    .expect("tlbridge vm does not end");
    assert_eq!(ended.status.code(), Some(125), "{ended:?}");
    assert!(ended.stderr.contains("no sgi-gru driver"), "{ended:?}");
}

#[test]
fn test_vm_when_interrupted_or_killed_leaves_nothing_behind() {
    let rig = guest_or_skip!();
    let kernel = rig.kernel.image.to_str().unwrap();
    for signal in [2, 9] {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("vm.log");
        let mut arguments = vec!["vm", "--model", "gru", "--kernel", kernel];
        arguments.extend(["--log", log.to_str().unwrap(), "--", "sleep", "1000"]);
        let mut tool = Tool::start(&arguments);
        assert!(tool.child_of_role("device").is_some(), "no device process");
        // The guest has begun when its console has something.
        let begin = std::time::Instant::now();
        while !std::fs::read_to_string(&log).is_ok_and(|text| text.contains('[')) {
            assert!(begin.elapsed() < LIMIT, "no console");
            std::thread::sleep(Duration::from_millis(20));
        }
        let children = descendants(tool.pid());
        assert!(children.len() >= 2, "{children:?}");
        kill(tool.pid(), signal);
        let ended = tool.wait(LIMIT).expect("tlbridge vm does not end");
        if signal == 2 {
            assert_eq!(ended.status.code(), Some(130), "{ended:?}");
        }
        assert_eq!(
            survivors(&children, SOON),
            Vec::<u32>::new(),
            "after signal {signal}"
        );
    }
}
