//! The kernel's own sgi-gru driver, compiled without a change, on our device, in every way to reach the device's
//! memory. What runs in the guest is `gru-guest` (tests/guest); here are the device's side and the verdicts. Every device
//! has its sanitizer on, which may find nothing but what is broken on purpose.
//!
//! Short forms, unless `TLBRIDGE_GUEST_ROUNDS` says how many rounds of the driver's own tests to run: the others
//! then take longer in proportion (`cargo xtask soak`).

use std::time::Duration;

use lab::guest::Guest;
use lab::initramfs::Initramfs;
use serde_json::Value;
use tests::guest::counters::Counters;
use tests::guest::findings::{assert_faultless, assert_stale_fills};
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
const HUGE_PAGES: &str = "echo 8 >/proc/sys/vm/nr_hugepages";
const RELOAD: &str =
    "rmmod gru && rmmod tlbridge_uv && insmod /lab/modules/tlbridge_uv.ko && insmod /lab/modules/gru.ko";
const STORMS: [&str; 9] = [
    "madvise", "munmap", "mremap", "mprotect", "fork", "hugetlb", "thp", "ksm", "memcg",
];

/// How often a test goes round: in the short form, and in a soak of [`FULL`] rounds.
#[derive(Clone, Copy)]
struct Rounds {
    short: u64,
    full: u64,
}

/// Rounds of the driver's own tests in a full soak.
const FULL: u64 = 300;
const KTEST: Rounds = Rounds { short: 3, full: FULL };
const INSTRUCTIONS: Rounds = Rounds { short: 1, full: 10 };
const FAULTS: Rounds = Rounds {
    short: 40,
    full: 2000,
};
const UNLOAD: Rounds = Rounds { short: 30, full: 300 };
const STORM: Rounds = Rounds { short: 40, full: 300 };
const STEAL: Rounds = Rounds { short: 2, full: 20 };
const RELOADS: Rounds = Rounds { short: 5, full: 50 };
const STALE: Rounds = Rounds { short: 40, full: 300 };
const UNPLUG: Rounds = Rounds { short: 1, full: 10 };

impl Rounds {
    fn now(self) -> u64 {
        let wanted = std::env::var("TLBRIDGE_GUEST_ROUNDS").map_or(0, |text| {
            text.parse()
                .unwrap_or_else(|e| panic!("TLBRIDGE_GUEST_ROUNDS={text}: {e}"))
        });
        self.short.max(self.full * wanted / FULL)
    }

    /// A limit for them, from one of the short form.
    fn limit(self, short: Duration) -> Duration {
        short * u32::try_from(self.now().div_ceil(self.short)).expect("fewer rounds")
    }
}

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

/// A guest with the driver on a device, and what both have counted up to the last test.
struct Subject {
    doorbell: &'static str,
    device: Device,
    guest: Guest,
    counted: Counters,
}

impl Subject {
    fn boot(rig: &Rig, files: &Initramfs, name: &str, doorbell: &'static str, more: &[&str]) -> Self {
        Self::boot_larger(rig, files, name, doorbell, more, (2, 1024))
    }

    fn boot_larger(
        rig: &Rig,
        files: &Initramfs,
        name: &str,
        doorbell: &'static str,
        more: &[&str],
        (cpus, memory_mib): (u32, u64),
    ) -> Self {
        let mut device = Device::gru(&[&["--doorbell", doorbell, "--sanitize"], more].concat());
        let mut spec = rig.spec(&format!("gru-{name}-{doorbell}"), files, &[&device]);
        (spec.cpus, spec.memory_mib) = (cpus, memory_mib);
        let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{doorbell}: {e}"));
        let counted = Counters::read(&mut guest, &mut device);
        Self {
            doorbell,
            device,
            guest,
            counted,
        }
    }

    fn shell(&mut self, command: &str) {
        let done = self.guest.run(command, SOON).unwrap();
        assert_eq!(done.code, 0, "{command}: {}", done.output);
    }

    /// Runs one of gru-guest's tests to its end.
    fn run(&mut self, test: &str, rounds: Rounds, limit: Duration) {
        let command = format!("gru-guest {test} --rounds {}", rounds.now());
        let doorbell = self.doorbell;
        let finished = self
            .guest
            .run(&command, rounds.limit(limit))
            .unwrap_or_else(|e| panic!("{doorbell}: {command}: {e}"));
        print!("{doorbell}: {}", finished.output);
        assert_eq!(finished.code, 0, "{doorbell}: {command}: {}", finished.output);
        assert!(finished.output.contains("PASS"), "{command}: {}", finished.output);
    }

    /// The same; what driver and device have counted meanwhile must agree.
    fn check(&mut self, test: &str, rounds: Rounds, limit: Duration) -> Counters {
        self.run(test, rounds, limit);
        let now = Counters::read(&mut self.guest, &mut self.device);
        let meanwhile = now.since(&self.counted);
        let found = meanwhile.contradictions();
        assert!(
            found.is_empty(),
            "{}: {test}: {found:#?}\n{meanwhile:?}",
            self.doorbell
        );
        self.counted = now;
        meanwhile
    }

    /// The driver was loaded anew and has begun to count from 0.
    fn forget(&mut self) {
        self.counted = Counters::read(&mut self.guest, &mut self.device);
    }

    /// Ends the guest; what the device's sanitizer has found.
    fn findings(mut self) -> Value {
        let complaints = self.guest.power_off().unwrap();
        assert!(complaints.is_empty(), "{}: {complaints:?}", self.doorbell);
        self.device.findings()
    }

    fn end(self) {
        let doorbell = self.doorbell;
        let findings = self.findings();
        assert_faultless(doorbell, &findings);
        println!(
            "{doorbell}: the sanitizer has checked {} accesses and fills, 0 defects",
            findings["checked"]
        );
    }
}

/// Everything that runs in one guest.
fn every_suite(doorbell: &'static str) {
    let rig = guest_or_skip!();
    let Some(files) = files(&rig, &["zram"]) else {
        return;
    };
    let mut subject = Subject::boot(&rig, &files, "suites", doorbell, &[]);
    let begin = subject.counted.clone();
    subject.shell(SWAP);
    subject.shell(HUGE_PAGES);
    subject.check("ktest", KTEST, MINUTE);
    subject.check("instructions", INSTRUCTIONS, 2 * MINUTE);
    subject.check("faults", FAULTS, MINUTE);
    subject.check("unload", UNLOAD, 2 * MINUTE);
    for kind in STORMS {
        let meanwhile = subject.check(&format!("storm {kind}"), STORM, 3 * MINUTE);
        assert!(meanwhile.device["tgh_purges"] > 0, "{kind}: {meanwhile:?}");
    }
    subject.check("steal", STEAL, 5 * MINUTE);
    let all = subject.counted.since(&begin);
    for name in [
        "fills",
        "misses",
        "misses_in_fault_map",
        "misses_withdrawn",
        "tgh_purges",
    ] {
        assert!(
            all.device[name] > 0,
            "{doorbell}: {name} was never counted: {all:?}"
        );
    }
    let device = |name: &str| all.device[name];
    println!(
        "{doorbell}: driver and device agree on {} misses ({} by interrupt, {} withdrawn), {} fills ({} killed), {} TLBINV",
        device("misses"),
        device("misses_in_fault_map"),
        device("misses_withdrawn"),
        device("fills"),
        device("fills_killed"),
        device("tgh_purges"),
    );
    subject.shell(RELOAD);
    subject.forget();
    subject.check("ktest", KTEST, MINUTE);
    subject.run("reload", RELOADS, 2 * MINUTE);
    subject.forget();
    subject.check("faults", FAULTS, MINUTE);
    subject.end();
}

#[test]
fn test_driver_when_every_access_is_trapped_passes_every_suite() {
    every_suite("trap");
}

#[test]
fn test_driver_when_starts_ring_a_bell_passes_every_suite() {
    every_suite("bell");
}

#[test]
fn test_driver_when_engines_poll_passes_every_suite() {
    every_suite("poll");
}

#[test]
fn test_stale_dropins_when_held_back_are_refused_and_without_the_kill_bit_are_reported() {
    let rig = guest_or_skip!();
    let Some(files) = files(&rig, &[]) else {
        return;
    };
    for doorbell in DOORBELLS {
        for (switch, code) in [("--delay", 0), ("--break", 1)] {
            let name = format!("stale{switch}");
            let mut subject = Subject::boot(&rig, &files, &name, doorbell, &[switch, "kill-bit"]);
            let finished = subject
                .guest
                .run(
                    &format!("gru-guest stale-dropin --rounds {}", STALE.now()),
                    STALE.limit(3 * MINUTE),
                )
                .unwrap_or_else(|e| panic!("{doorbell}: {e}"));
            print!("{doorbell}, {switch}: {}", finished.output);
            assert_eq!(finished.code, code, "{doorbell}, {switch}: {}", finished.output);
            let found = finished.output.contains("stale accesses in") && finished.output.contains("FAIL");
            assert_eq!(found, code != 0, "{doorbell}, {switch}: {}", finished.output);
            let counted = Counters::read(&mut subject.guest, &mut subject.device).since(&subject.counted);
            assert_eq!(
                counted.device["fills_killed"] > 0,
                code == 0,
                "{doorbell}, {switch}: {counted:?}"
            );
            // Entered or not: the driver has sent them, and counted them.
            let contradictions = counted.contradictions();
            assert!(
                contradictions.is_empty(),
                "{doorbell}, {switch}: {contradictions:#?}"
            );
            if code == 0 {
                subject.end();
            } else {
                let findings = subject.findings();
                println!("{doorbell}, {switch}: {} defects", findings["defects"]);
                assert_stale_fills(doorbell, &findings, &finished.output);
            }
        }
    }
}

#[test]
fn test_device_when_taken_from_open_contexts_can_be_had_again() {
    let rig = guest_or_skip!();
    let Some(files) = files(&rig, &[]) else {
        return;
    };
    for doorbell in DOORBELLS {
        let mut subject = Subject::boot(&rig, &files, "unplug", doorbell, &[]);
        for _ in 0..UNPLUG.now() {
            subject.run("unplug", Rounds { short: 1, full: 1 }, 2 * MINUTE);
            subject.shell(
                "rmmod gru && rmmod tlbridge_uv && echo 1 >/sys/bus/pci/rescan && \
                 insmod /lab/modules/tlbridge_uv.ko && insmod /lab/modules/gru.ko",
            );
            subject.forget();
            subject.check("ktest", KTEST, MINUTE);
        }
        subject.end();
    }
}

#[test]
fn test_driver_when_there_are_18_processors_and_5_gib_serves_all() {
    let rig = guest_or_skip!();
    let Some(files) = files(&rig, &[]) else {
        return;
    };
    for doorbell in DOORBELLS {
        let mut subject = Subject::boot_larger(&rig, &files, "18", doorbell, &[], (18, 5 * 1024));
        subject.check("ktest", Rounds { short: 1, full: 30 }, 5 * MINUTE);
        subject.check(
            "faults",
            Rounds {
                short: 20,
                full: 1000,
            },
            5 * MINUTE,
        );
        let guest = subject.guest;
        guest.power_off().unwrap();
        assert_faultless(doorbell, &subject.device.findings());
    }
}
