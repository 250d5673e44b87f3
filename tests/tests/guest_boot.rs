//! A stock kernel in QEMU with our device: what it sees of it, what becomes of it when one side dies, and
//! what the runner says about each way in which a guest can end.

use std::time::Duration;

use lab::guest::{Failure, Guest, Next};
use protos::gru::pci;
use tests::guest::Device;
use tests::guest_or_skip;
use tests::processes::{binary, is_alive, survivors};

const SOON: Duration = Duration::from_secs(20);
const GRU: &str = "/sys/bus/pci/devices/0000:00:01.0";

/// A field of the GRU's directory in sysfs.
fn field(guest: &mut Guest, name: &str) -> String {
    let contents = guest.read_file(&format!("{GRU}/{name}"), SOON).unwrap();
    String::from_utf8(contents).unwrap().trim().to_owned()
}

/// Sizes of the six BARs, as the kernel has assigned them.
fn bar_sizes(guest: &mut Guest) -> Vec<u64> {
    let text = field(guest, "resource");
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    text.lines()
        .take(6)
        .map(|line| {
            let words: Vec<u64> = line.split_whitespace().map(number).collect();
            if words[1] == 0 { 0 } else { words[1] - words[0] + 1 }
        })
        .collect()
}

#[test]
fn test_stock_kernel_when_booted_with_a_gru_sees_its_identity_and_bars() {
    let rig = guest_or_skip!();
    for doorbell in ["trap", "poll"] {
        let mut device = Device::gru(&["--doorbell", doorbell]);
        let mut guest = rig
            .boot(&format!("identity-{doorbell}"), &rig.initramfs(), &[&device])
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(field(&mut guest, "vendor"), format!("{:#06x}", pci::VENDOR));
        assert_eq!(field(&mut guest, "device"), format!("{:#06x}", pci::DEVICE));
        assert_eq!(field(&mut guest, "class"), "0x120000");
        let sizes = bar_sizes(&mut guest);
        assert!(sizes[0].is_power_of_two(), "{sizes:x?}");
        assert_eq!(sizes[1..], [0, 256 << 20, 0, 0, 0], "{sizes:x?}");
        // A stock kernel without our modules leaves the function alone.
        assert_eq!(guest.run(&format!("ls {GRU}/driver"), SOON).unwrap().code, 1);
        let complaints = guest.power_off().unwrap();
        assert!(complaints.is_empty(), "{complaints:?}");
        assert!(device.is_running(), "the device does not survive its client");
    }
}

#[test]
fn test_device_when_its_guest_has_gone_serves_the_next_one() {
    let rig = guest_or_skip!();
    let device = Device::gru(&[]);
    let files = rig.initramfs();
    for round in 0..2 {
        let mut guest = rig
            .boot("next-guest", &files, &[&device])
            .unwrap_or_else(|e| panic!("guest {round}: {e}"));
        assert_eq!(field(&mut guest, "vendor"), "0x10a9", "guest {round}");
        let pid = guest.pid();
        // The first one is killed, not powered off.
        drop(guest);
        assert!(!is_alive(pid), "QEMU {pid} outlives its guest");
    }
}

#[test]
fn test_guest_when_an_idle_device_process_is_killed_goes_on() {
    let rig = guest_or_skip!();
    let mut device = Device::gru(&[]);
    let mut guest = rig
        .boot("device-killed", &rig.initramfs(), &[&device])
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(field(&mut guest, "vendor"), "0x10a9");
    device.kill();
    // A read of what is gone is all ones, and no reason to stop.
    let read = format!("hexdump -n 2 -e '1/2 \"%04x\"' {GRU}/config");
    let finished = guest.run(&read, SOON).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(finished.output, "ffff", "{finished:?}");
    assert_eq!(guest.run("echo alive", SOON).unwrap().output, "alive\n");
    guest.power_off().unwrap();
}

/// QEMU 11.1.3 aborts by itself when its server goes away between two errors of one access: that, and
/// nothing else, is let pass, and said.
#[test]
fn test_guest_when_a_busy_device_process_is_killed_goes_on_or_its_qemu_aborts() {
    let rig = guest_or_skip!();
    let mut device = Device::gru(&[]);
    let mut guest = rig
        .boot("device-killed-busy", &rig.initramfs(), &[&device])
        .unwrap_or_else(|e| panic!("{e}"));
    guest
        .begin(&format!(
            "echo working; i=0; while [ $i -lt 300 ]; do cat {GRU}/config >/tmp/config; i=$((i+1)); done; echo done"
        ))
        .unwrap();
    guest.wait_for(|line| line == "working", SOON).unwrap();
    device.kill();
    match guest.finish(SOON) {
        Ok(finished) => {
            assert_eq!((finished.code, finished.output.as_str()), (0, "done\n"));
            guest.power_off().unwrap();
        }
        Err(Failure::QemuEnded { tail, .. })
            if tail.contains("error_setv: Assertion `*errp == NULL' failed") =>
        {
            println!("QEMU aborted (util/error.c, error_setv): a fault of its vfio-user client");
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn test_guests_when_two_run_at_once_have_a_device_each() {
    let rig = guest_or_skip!();
    let devices = [Device::gru(&["--doorbell", "trap"]), Device::gru(&[])];
    let files = rig.initramfs();
    let mut guests: Vec<Guest> = std::thread::scope(|scope| {
        let started: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(index, device)| {
                let (rig, files) = (&rig, &files);
                scope.spawn(move || rig.boot(&format!("two-{index}"), files, &[device]))
            })
            .collect();
        started
            .into_iter()
            .map(|t| t.join().unwrap().unwrap_or_else(|e| panic!("{e}")))
            .collect()
    });
    for (index, guest) in guests.iter_mut().enumerate() {
        assert_eq!(field(guest, "vendor"), "0x10a9", "guest {index}");
        guest.run(&format!("echo {index} > /tmp/own"), SOON).unwrap();
    }
    // One is killed: the other does not notice.
    let other = guests.pop().unwrap();
    let pid = other.pid();
    drop(other);
    assert_eq!(survivors(&[pid], SOON), Vec::<u32>::new());
    let mut first = guests.pop().unwrap();
    assert_eq!(first.read_file("/tmp/own", SOON).unwrap(), b"0\n");
    assert_eq!(field(&mut first, "vendor"), "0x10a9");
    first.power_off().unwrap();
}

#[test]
fn test_commands_when_run_in_one_guest_give_codes_output_and_files() {
    let rig = guest_or_skip!();
    let mut files = rig.initramfs();
    let every: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    files.add_file("root/every", 0o644, &every);
    // A program of this machine with its libraries.
    files.add_program(&binary()).unwrap();
    let mut guest = rig
        .boot("commands", &files, &[])
        .unwrap_or_else(|e| panic!("{e}"));
    for code in [0, 1, 7, 255] {
        assert_eq!(guest.run(&format!("exit {code}"), SOON).unwrap().code, code);
    }
    let killed = guest.run("kill -9 $$", SOON).unwrap();
    assert_eq!(killed.code, 128 + 9);
    let both = guest
        .run("printf 'no end of line'; echo \"it's\" 'err%or' >&2", SOON)
        .unwrap();
    assert_eq!(both.output, "no end of lineit's err%or\n");
    assert_eq!(guest.read_file("/root/every", SOON).unwrap(), every);
    assert!(guest.read_file("/root/none", SOON).is_err());
    let version = guest.run("tlbridge --version", SOON).unwrap();
    assert_eq!(
        (version.code, version.output.starts_with("tlbridge ")),
        (0, true),
        "{version:?}"
    );
    guest
        .begin("for i in 1 2 3; do echo line $i; done; printf rest; exit 3")
        .unwrap();
    let mut seen = Vec::new();
    let code = loop {
        match guest.next(SOON).unwrap() {
            Next::Line(line) => seen.push(line),
            Next::End(code) => break code,
        }
    };
    assert_eq!((code, seen.join("|").as_str()), (3, "line 1|line 2|line 3|rest"));
    guest.power_off().unwrap();
}

#[test]
fn test_runner_when_a_guest_ends_otherwise_says_how() {
    let rig = guest_or_skip!();
    let files = rig.initramfs();
    let boot = |name: &str| rig.boot(name, &files, &[]).unwrap_or_else(|e| panic!("{e}"));
    // The four at once would only wait for each other: two at a time.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut guest = boot("ends-panic");
            match guest.run("echo c > /proc/sysrq-trigger", SOON) {
                Err(Failure::Panic { line, tail, .. }) => {
                    assert!(line.contains("sysrq triggered crash"), "{line}");
                    assert!(tail.contains("Call Trace"), "{tail}");
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(survivors(&[guest.pid()], SOON), Vec::<u32>::new());
            let mut guest = boot("ends-off");
            let end = guest.run("poweroff -f", SOON);
            assert!(matches!(end, Err(Failure::PoweredOff { .. })), "{end:?}");
        });
        scope.spawn(|| {
            let mut guest = boot("ends-hang");
            let begin = std::time::Instant::now();
            match guest.run("sleep 1000", Duration::from_millis(200)) {
                // Where its processors were is in the log.
                Err(Failure::Hang { tail, .. }) => assert!(tail.contains("NMI"), "{tail}"),
                other => panic!("{other:?}"),
            }
            assert!(begin.elapsed() < Duration::from_secs(60));
            let mut guest = boot("ends-killed");
            guest.begin("echo here; sleep 1000").unwrap();
            guest.wait_for(|line| line == "here", SOON).unwrap();
            tests::processes::kill(guest.pid(), 9);
            match guest.next(SOON) {
                Err(Failure::QemuEnded { status, .. }) => assert!(status.contains('9'), "{status}"),
                other => panic!("{other:?}"),
            }
        });
    });
}

#[test]
fn test_boot_when_a_module_does_not_load_says_which() {
    let rig = guest_or_skip!();
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken.ko");
    std::fs::write(&broken, "no ELF file").unwrap();
    let mut files = rig.initramfs();
    files.add_module(&rig.lab, &broken).unwrap();
    match rig.boot("module-broken", &files, &[]) {
        Err(Failure::Module { said, .. }) => assert!(said.contains("broken.ko"), "{said}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn test_boot_when_qemu_refuses_its_arguments_says_what_it_said() {
    let rig = guest_or_skip!();
    let mut spec = rig.spec("qemu-refuses", &rig.initramfs(), &[]);
    spec.qemu_arguments = vec!["-device".into(), "no-such-device".into()];
    match Guest::start(&spec, None) {
        Err(Failure::NotStarted { said }) => assert!(said.contains("no-such-device"), "{said}"),
        other => panic!("{other:?}"),
    }
}
