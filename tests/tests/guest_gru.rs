//! The kernel's own sgi-gru driver, compiled without a change, on our device. What runs in the guest is
//! `gru-guest` (tests/guest); here are the device's side and the verdicts.

use std::time::Duration;

use lab::guest::Guest;
use lab::initramfs::Initramfs;
use tests::guest::{Device, Rig};
use tests::guest_or_skip;
use tests::processes::binary;

const SOON: Duration = Duration::from_secs(30);

const MINUTE: Duration = Duration::from_secs(60);
/// Every way to reach the device's memory.
const DOORBELLS: [&str; 3] = ["trap", "bell", "poll"];
/// What the storm of a memory cgroup wants: swap (in compressed memory), and the controllers.
const SWAP: &str = "mount -t cgroup2 none /sys/fs/cgroup && echo 64M >/sys/block/zram0/disksize && \
                    mkswap /dev/zram0 && swapon /dev/zram0";

/// What a guest with the driver starts with; `None` (and a visible skip) without its modules.
fn files(rig: &Rig, more: &[&str]) -> Option<Initramfs> {
    let modules = match rig.gru_modules() {
        Ok(modules) => modules,
        Err(why) => {
            println!("SKIP: {why}");
            return None;
        }
    };
    let mut files = rig.initramfs();
    for module in rig.kernel.with_dependencies(more).unwrap() {
        files.add_module(&rig.lab, &module).unwrap();
    }
    for module in modules {
        files.add_module(&rig.lab, &module).unwrap();
    }
    let program = binary().with_file_name("gru-guest");
    assert!(
        program.exists(),
        "{} is not there: cargo build --workspace",
        program.display()
    );
    files.add_program(&program).unwrap();
    Some(files)
}

fn boot(rig: &Rig, name: &str, device: &Device) -> Option<Guest> {
    let files = files(rig, &[])?;
    Some(
        rig.boot(name, &files, &[device])
            .unwrap_or_else(|e| panic!("{e}")),
    )
}

/// Runs one of gru-guest's tests to its end.
fn check(guest: &mut Guest, test: &str, limit: Duration) {
    let finished = guest
        .run(&format!("gru-guest {test}"), limit)
        .unwrap_or_else(|e| panic!("{test}: {e}"));
    print!("{}", finished.output);
    assert_eq!(finished.code, 0, "{test}: {}", finished.output);
    assert!(finished.output.contains("PASS"), "{test}: {}", finished.output);
}

#[test]
fn test_driver_when_loaded_twice_passes_its_own_tests() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(mut guest) = boot(&rig, "gru-ktest", &device) else {
        return;
    };
    assert_eq!(guest.run("ls /proc/sgi_uv/gru/statistics", SOON).unwrap().code, 0);
    check(&mut guest, "ktest --rounds 3", Duration::from_secs(120));
    let again = guest
        .run("rmmod gru && rmmod tlbridge_uv && insmod /lab/modules/tlbridge_uv.ko && insmod /lab/modules/gru.ko", SOON)
        .unwrap();
    assert_eq!(again.code, 0, "{}", again.output);
    check(&mut guest, "ktest --rounds 1", Duration::from_secs(120));
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_instructions_and_faults_when_on_the_driver_are_right_in_every_doorbell_mode() {
    let rig = guest_or_skip!();
    for doorbell in DOORBELLS {
        let device = Device::gru(&["--doorbell", doorbell]);
        let Some(mut guest) = boot(&rig, &format!("gru-instructions-{doorbell}"), &device) else {
            return;
        };
        for test in [
            "ktest --rounds 1",
            "instructions",
            "faults --rounds 40",
            "unload --rounds 30",
        ] {
            check(&mut guest, test, 2 * MINUTE);
        }
        let complaints = guest.power_off().unwrap();
        assert!(complaints.is_empty(), "{doorbell}: {complaints:?}");
    }
}

#[test]
fn test_storms_when_memory_is_torn_away_find_nothing_stale() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(files) = files(&rig, &["zram"]) else {
        return;
    };
    let mut guest = rig
        .boot("gru-storms", &files, &[&device])
        .unwrap_or_else(|e| panic!("{e}"));
    let swap = guest.run(SWAP, SOON).unwrap();
    assert_eq!(swap.code, 0, "{}", swap.output);
    let huge = guest.run("echo 8 >/proc/sys/vm/nr_hugepages", SOON).unwrap();
    assert_eq!(huge.code, 0, "{}", huge.output);
    for kind in [
        "madvise", "munmap", "mremap", "mprotect", "fork", "hugetlb", "thp", "ksm", "memcg",
    ] {
        check(&mut guest, &format!("storm {kind} --rounds 40"), 3 * MINUTE);
    }
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_steal_when_there_are_40_contexts_keeps_every_ones_data() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(mut guest) = boot(&rig, "gru-steal", &device) else {
        return;
    };
    check(&mut guest, "steal", 5 * MINUTE);
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_stale_dropins_when_held_back_are_refused_and_without_the_kill_bit_are_found() {
    let rig = guest_or_skip!();
    for (switch, code) in [("--delay", 0), ("--break", 1)] {
        let device = Device::gru(&["--doorbell", "trap", switch, "kill-bit"]);
        let Some(mut guest) = boot(&rig, &format!("gru-stale{switch}"), &device) else {
            return;
        };
        let finished = guest
            .run("gru-guest stale-dropin --rounds 60", 3 * MINUTE)
            .unwrap_or_else(|e| panic!("{e}"));
        print!("{}", finished.output);
        assert_eq!(finished.code, code, "{switch} kill-bit: {}", finished.output);
        let found = finished.output.contains("stale accesses in") && finished.output.contains("FAIL");
        assert_eq!(found, code != 0, "{switch} kill-bit: {}", finished.output);
        guest.power_off().unwrap();
    }
}

#[test]
fn test_device_when_taken_from_open_contexts_can_be_had_again() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(mut guest) = boot(&rig, "gru-unplug", &device) else {
        return;
    };
    for _ in 0..2 {
        check(&mut guest, "unplug", 2 * MINUTE);
        let again = guest
            .run(
                "rmmod gru && rmmod tlbridge_uv && echo 1 >/sys/bus/pci/rescan && \
                 insmod /lab/modules/tlbridge_uv.ko && insmod /lab/modules/gru.ko",
                SOON,
            )
            .unwrap();
        assert_eq!(again.code, 0, "{}", again.output);
        check(&mut guest, "ktest --rounds 1", 2 * MINUTE);
    }
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_driver_when_there_are_18_processors_and_5_gib_serves_all() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(files) = files(&rig, &[]) else {
        return;
    };
    let mut spec = rig.spec("gru-18", &files, &[&device]);
    (spec.cpus, spec.memory_mib) = (18, 5 * 1024);
    let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}"));
    check(&mut guest, "ktest --rounds 1", 5 * MINUTE);
    check(&mut guest, "faults --rounds 20", 5 * MINUTE);
    guest.power_off().unwrap();
}
