//! The steps of `cargo xtask test` and `cargo xtask soak`.

use crate::run::{Outcome, Totals, step};
use crate::{lab, layering, provision};
use ::lab::packages::on_path;
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// A named step of a run.
struct Step {
    name: &'static str,
    what: &'static str,
    limit: Duration,
    command: fn(&Path) -> Command,
}

/// How often the soak runs each GRU test in each doorbell mode.
const GRU_ROUNDS: &str = "20";

/// Rounds of the soak's tests that count rounds; those that have a whole form run that.
const ROUNDS: &str = "200";

/// Runs of the hammer, each of which takes as long as it is told.
const HAMMERS: u64 = 5;

/// Tests that need no process, socket or privilege beyond their own process.
const IN_PROCESS: &[&str] = &[
    "gru_in_process",
    "gru_nonsleeping",
    "mlx5_in_process",
    "mlx5_in_process_cq",
    "mlx5_in_process_xrc",
    "mlx5_paging",
];

/// Tests that boot guests in QEMU: `guest_*.rs`.
const GUEST: &str = "guest_";

const STEPS: &[Step] = &[
    Step {
        name: "format",
        what: "rustfmt",
        limit: MINUTE,
        command: |_| cargo(&["fmt", "--all", "--check"]),
    },
    Step {
        name: "clippy",
        what: "warnings denied",
        limit: Duration::from_secs(15 * 60),
        command: |_| cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    },
    Step {
        name: "unit",
        what: "each crate's own tests",
        limit: Duration::from_secs(20 * 60),
        command: |_| {
            cargo(&[
                "test",
                "--workspace",
                "--exclude",
                "tlbridge-tests",
                "--lib",
                "--bins",
                "--tests",
                "--",
                "--show-output",
            ])
        },
    },
    Step {
        // Apart from "unit": cargo does not run --doc with other targets.
        name: "doc-tests",
        what: "the examples in documentation, and those that must not compile",
        limit: Duration::from_secs(15 * 60),
        command: |_| cargo(&["test", "--workspace", "--exclude", "tlbridge-tests", "--doc"]),
    },
    Step {
        name: "model-checking",
        what: "loom on the device TLB's protocol",
        limit: Duration::from_secs(15 * 60),
        command: |root| {
            let mut c = cargo(&["test", "--release", "-p", "tlbridge-device", "--lib", "loom_"]);
            c.env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TARGET_DIR", root.join("target/loom"));
            c
        },
    },
    Step {
        name: "build",
        what: "release binary and agent library",
        limit: Duration::from_secs(20 * 60),
        command: |_| cargo(&["build", "--release", "--workspace"]),
    },
    Step {
        name: "in-process",
        what: "the real driver on the real device, one process",
        limit: Duration::from_secs(15 * 60),
        command: |root| integration(root, Tier::InProcess),
    },
    Step {
        name: "sandbox",
        what: "processes, sockets, userfaultfd",
        limit: Duration::from_secs(40 * 60),
        command: |root| integration(root, Tier::Sandbox),
    },
    Step {
        name: "guest",
        what: "stock kernels in QEMU with our devices",
        limit: Duration::from_secs(60 * 60),
        command: |root| integration(root, Tier::Guest),
    },
];

fn cargo(arguments: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO"));
    c.args(arguments).env("CARGO_TERM_COLOR", "never");
    c
}

/// What an integration test may assume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tier {
    InProcess,
    Sandbox,
    Guest,
}

impl Tier {
    fn of(test: &str) -> Self {
        if IN_PROCESS.contains(&test) {
            Self::InProcess
        } else if test.starts_with(GUEST) {
            Self::Guest
        } else {
            Self::Sandbox
        }
    }
}

fn integration(root: &Path, tier: Tier) -> Command {
    let mut c = cargo(&["test", "--no-fail-fast", "--release", "-p", "tlbridge-tests"]);
    // What the sandbox tests start: the binary and the agent library of the step before.
    c.env("TLBRIDGE_BIN", root.join("target/release/tlbridge"));
    c.env(
        "TLBRIDGE_AGENT_LIB",
        root.join("target/release/libtlbridge_agent.so"),
    );
    if tier == Tier::InProcess {
        // Its own tests: of what the tests share.
        c.arg("--lib");
    }
    for name in test_targets(root) {
        if Tier::of(&name) == tier {
            c.args(["--test", &name]);
        }
    }
    // One at a time: these tests measure, and they start several busy processes each.
    c.args(["--", "--show-output", "--test-threads=1"]);
    c
}

fn test_targets(root: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(root.join("tests/tests"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            e.file_name()
                .to_str()
                .and_then(|n| n.strip_suffix(".rs"))
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

pub fn root() -> anyhow::Result<PathBuf> {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest
        .parent()
        .context("xtask has no parent directory")?
        .to_owned())
}

/// Runs the steps; true if all passed. The last line is the totals.
pub fn test(only: &[String], keep_going: bool) -> anyhow::Result<bool> {
    for name in only {
        if !["layering", "lab"].contains(&name.as_str()) && !STEPS.iter().any(|s| s.name == name) {
            let names: Vec<_> = STEPS.iter().map(|s| s.name).collect();
            bail!(
                "no step is called {name}; there are: layering, lab, {}",
                names.join(", ")
            );
        }
    }
    let root = root()?;
    std::env::set_current_dir(&root).with_context(|| format!("entering {}", root.display()))?;
    let logs = root.join("target/xtask");
    std::fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    provision::need("cc", &["gcc", "libc6-dev"]);
    describe_machine();

    let begin = Instant::now();
    let mut totals = Totals::default();
    let mut failed_steps = Vec::new();
    if only.is_empty() || only.iter().any(|o| o == "layering") {
        layering::check()?;
    }
    if only.is_empty()
        || only
            .iter()
            .any(|o| ["lab", "sandbox", "guest"].contains(&o.as_str()))
    {
        println!("== lab: QEMU, kernel and modules for guests");
        let missing = lab::provide(true)?;
        println!("-- lab: {}", if missing.is_empty() { "ok" } else { "incomplete" });
        totals.skips.extend(missing);
    }
    for s in STEPS
        .iter()
        .filter(|s| only.is_empty() || only.iter().any(|o| o == s.name))
    {
        println!("== {}: {}", s.name, s.what);
        let log = logs.join(format!("{}.log", s.name));
        let outcome = step(s.name, &mut (s.command)(&root), &log, s.limit)?;
        report(s.name, &outcome, &log);
        totals.add(&outcome.totals);
        if !outcome.ok {
            failed_steps.push(s.name);
            if !keep_going {
                break;
            }
        }
    }
    println!("== deny: licences and advisories");
    if on_path("cargo-deny") {
        let log = logs.join("deny.log");
        let outcome = step(
            "deny",
            &mut cargo(&["deny", "check", "licenses", "bans", "sources"]),
            &log,
            5 * MINUTE,
        )?;
        report("deny", &outcome, &log);
        if !outcome.ok {
            failed_steps.push("deny");
        }
    } else {
        totals
            .skips
            .push("cargo-deny is not installed (cargo install cargo-deny): deny.toml not checked".into());
    }
    println!("left out (long forms): cargo xtask soak");
    summary(&totals, &failed_steps, begin.elapsed());
    Ok(failed_steps.is_empty() && totals.failed == 0)
}

fn report(name: &str, outcome: &Outcome, log: &Path) {
    let verdict = if outcome.ok { "ok" } else { "FAILED" };
    println!(
        "-- {name}: {verdict}, {} passed, {} failed, {:.0} s",
        outcome.totals.passed,
        outcome.totals.failed,
        outcome.took.as_secs_f64()
    );
    if !outcome.ok {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(80)..] {
            println!("   | {line}");
        }
        println!("   whole output: {}", log.display());
    }
}

fn summary(totals: &Totals, failed_steps: &[&str], took: Duration) {
    println!("== summary after {:.1} minutes", took.as_secs_f64() / 60.0);
    for skip in &totals.skips {
        println!("skipped: {skip}");
    }
    for name in &totals.failures {
        println!("failed: {name}");
    }
    if !failed_steps.is_empty() {
        println!("failed steps: {}", failed_steps.join(", "));
    }
    let failed = totals.failed.max(failed_steps.len() as u64);
    println!(
        "{} passed, {} failed, {} skipped",
        totals.passed,
        failed,
        totals.skips.len() as u64 + totals.ignored
    );
}

/// The capabilities that decide what is tested here.
fn describe_machine() {
    let read = |p: &str| std::fs::read_to_string(p).unwrap_or_default().trim().to_owned();
    println!(
        "machine: Linux {}, {} CPUs, vm.unprivileged_userfaultfd={}, /dev/userfaultfd {}",
        read("/proc/sys/kernel/osrelease"),
        std::thread::available_parallelism().map_or(0, usize::from),
        read("/proc/sys/vm/unprivileged_userfaultfd"),
        if Path::new("/dev/userfaultfd").exists() {
            "present"
        } else {
            "absent"
        }
    );
}

/// Long forms of the tests.
pub fn soak(minutes: u64, fuzz_minutes: u64, guest_rounds: u64) -> anyhow::Result<bool> {
    let root = root()?;
    std::env::set_current_dir(&root).with_context(|| format!("entering {}", root.display()))?;
    let logs = root.join("target/xtask");
    std::fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    let begin = Instant::now();
    let mut totals = Totals::default();
    let mut failed_steps = Vec::new();
    if minutes > 0 || guest_rounds > 0 {
        let build = step(
            "build",
            &mut cargo(&["build", "--release", "--workspace"]),
            &logs.join("soak-build.log"),
            20 * MINUTE,
        )?;
        report("build", &build, &logs.join("soak-build.log"));
        if !build.ok {
            return Ok(false);
        }
    }
    if minutes > 0 {
        let mut command = integration(&root, Tier::Sandbox);
        command
            .env("TLBRIDGE_HAMMER_SECONDS", (minutes * 60).to_string())
            .env("TLBRIDGE_ROUNDS", ROUNDS)
            .env("TLBRIDGE_GRU_ROUNDS", GRU_ROUNDS);
        let log = logs.join("soak.log");
        println!(
            "== soak: hammer of {minutes} minutes, {ROUNDS} rounds where rounds count, each GRU test {GRU_ROUNDS} times"
        );
        let limit = Duration::from_secs(minutes * 60 * HAMMERS) + 180 * MINUTE;
        let outcome = step("soak", &mut command, &log, limit)?;
        report("soak", &outcome, &log);
        totals.add(&outcome.totals);
        if !outcome.ok {
            failed_steps.push("soak");
        }
        let mut command = integration(&root, Tier::InProcess);
        command.env("TLBRIDGE_GRU_ROUNDS", GRU_ROUNDS);
        let log = logs.join("soak-in-process.log");
        println!("== soak: the driver on the device in one process, each test {GRU_ROUNDS} times");
        let outcome = step("soak-in-process", &mut command, &log, 60 * MINUTE)?;
        report("soak-in-process", &outcome, &log);
        totals.add(&outcome.totals);
        if !outcome.ok {
            failed_steps.push("soak-in-process");
        }
    }
    if guest_rounds > 0 {
        totals.skips.extend(lab::provide(true)?);
        let mut command = integration(&root, Tier::Guest);
        command.env("TLBRIDGE_GUEST_ROUNDS", guest_rounds.to_string());
        let log = logs.join("soak-guest.log");
        println!(
            "== soak: guests, {guest_rounds} rounds of the driver's own tests in each mode, all of rdma-core's on rxe and mlx5"
        );
        // 300 rounds take half an hour where nothing else runs, all of rdma-core's tests up to 12 minutes, on each of two
        // devices, and on mlx5 those of implicit paging as long again.
        let limit = 105 * MINUTE + MINUTE * u32::try_from(guest_rounds / 2).unwrap_or(u32::MAX / 64);
        let outcome = step("soak-guest", &mut command, &log, limit)?;
        report("soak-guest", &outcome, &log);
        totals.add(&outcome.totals);
        if !outcome.ok {
            failed_steps.push("soak-guest");
        }
    }
    if fuzz_minutes > 0 {
        for (mut command, what) in fuzz_commands(&root, fuzz_minutes) {
            println!("== fuzz: {what}");
            let log = logs.join(format!("fuzz-{}.log", what.split(' ').next().unwrap_or_default()));
            // Building with instrumentation takes minutes.
            let limit = Duration::from_secs(fuzz_minutes * 60) + 40 * MINUTE;
            let outcome = step("fuzz", &mut command, &log, limit)?;
            report("fuzz", &outcome, &log);
            totals.add(&outcome.totals);
            if !outcome.ok {
                failed_steps.push("fuzz");
            }
        }
    }
    summary(&totals, &failed_steps, begin.elapsed());
    Ok(failed_steps.is_empty() && totals.failed == 0)
}

/// cargo-fuzz with its coverage where it is installed (with a nightly toolchain), else the stable runner.
/// A twentieth of the time is for the decoder, which is thousands of times faster, and most of it for the server.
fn fuzz_commands(root: &Path, minutes: u64) -> Vec<(Command, String)> {
    let nightly = Command::new("rustc")
        .args(["+nightly", "--version"])
        .output()
        .is_ok_and(|o| o.status.success());
    if !(on_path("cargo-fuzz") && nightly) {
        let mut command = cargo(&[
            "test",
            "--release",
            "-p",
            "tlbridge-tests",
            "--test",
            "fuzz_bounded",
        ]);
        command
            .args(["--", "--nocapture", "--test-threads=1"])
            .env("TLBRIDGE_FUZZ_MINUTES", minutes.to_string())
            .env("RUST_LOG", "off");
        let what = format!(
            "stable runner without coverage, {minutes} minutes (cargo install cargo-fuzz and a nightly toolchain \
             give coverage)"
        );
        return vec![(command, what)];
    }
    [("decoder", 5), ("gru", 30), ("mlx5", 15), ("actions", 50)]
        .map(|(target, share)| {
            let seconds = (minutes * 60 * share / 100).max(10);
            let found = root.join("target/fuzz/corpus").join(target);
            // A failure shows when libFuzzer cannot use it.
            let _ = std::fs::create_dir_all(&found);
            // Not the cargo that runs this: rustup's, which knows +nightly.
            let mut command = Command::new("cargo");
            command
                .current_dir(root.join("fuzz"))
                .env_remove("RUSTUP_TOOLCHAIN")
                .env_remove("CARGO")
                .args(["+nightly", "fuzz", "run", target, "--target-dir"])
                .arg(root.join("target/cargo-fuzz"))
                // New inputs go to the first corpus; the second one is in the tree.
                .arg(&found)
                .arg(root.join("fuzz/corpus").join(target))
                .args([
                    "--",
                    &format!("-max_total_time={seconds}"),
                    "-print_final_stats=1",
                    "-rss_limit_mb=4096",
                    // What is allocated by an unchecked size shows here.
                    "-malloc_limit_mb=512",
                    // Threads that are just ending still hold what the C library keeps for them.
                    "-detect_leaks=0",
                ]);
            (command, format!("{target} with cargo-fuzz, {seconds} s"))
        })
        .into()
}
