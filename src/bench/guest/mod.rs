//! `tlbridge bench invalidate --guest`: both sides of the same story. The kernel's own driver in a guest tears memory
//! away from the device, and its tgh_invalidate figures stand beside those of the bridge between processes.
//!
//! Times of an emulated guest are no times of a machine. What can be compared are ratios to a floor that was measured
//! in the same world, call by call in turn: the same call in a process whose memory no device watches.

mod report;
mod transcript;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::Lab;
use lab::acceleration::Acceleration;
use lab::guest::{Accelerator, Guest, Spec};
use lab::initramfs::Initramfs;
use lab::kernel::Series;

use super::placement::Placement;
use super::{BenchResult, Case, Run};
use crate::cli::{BenchArgs, Doorbell, ModelName, UffdModeName};
use crate::demo::{ANSWER_LIMIT, args, name};
use crate::stop::Stop;
use crate::vm::default_log;
use report::{GuestResult, GuestRow, SandboxRow};
use transcript::Transcript;

/// The program that runs in the guest, beside this one.
const PROGRAM: &str = "gru-guest";
/// Sizes that both worlds measure.
const MOST: usize = 16 * 4096;
/// What the sandbox measures of the same.
const CASES: [Case; 2] = [Case::AgentSilent, Case::AgentLiveParked];
const DOORBELLS: [Doorbell; 3] = [Doorbell::Trap, Doorbell::Bell, Doorbell::Poll];

/// Measures and prints the tables.
///
/// # Errors
/// No lab and none to be had; a process or a guest cannot be started or ends early.
pub fn run(args: &BenchArgs, out: &mut impl std::io::Write) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    let begin = Instant::now();
    let machine = Machine::find()?;
    let mut result = GuestResult::new(args, machine.acceleration.accelerator == Accelerator::Tcg);
    for doorbell in DOORBELLS {
        eprintln!("sandbox, {}", name(doorbell));
        let rows = sandbox(args, doorbell, &stop).with_context(|| format!("sandbox, {}", name(doorbell)))?;
        result.sandbox.extend(rows);
        eprintln!("guest, {}", name(doorbell));
        let guest =
            guest(args, &machine, doorbell, &stop).with_context(|| format!("guest, {}", name(doorbell)))?;
        result.guests.push(guest);
    }
    result.elapsed_ms = begin.elapsed().as_millis() as u64;
    super::print(args.json.as_deref(), &result.json(), || result.table(), out)
}

/// munmap by the agent, between processes.
fn sandbox(args: &BenchArgs, doorbell: Doorbell, stop: &Stop) -> Result<Vec<SandboxRow>> {
    let dir = super::tempdir()?;
    let mut result = BenchResult::new(args);
    let run = Run {
        args,
        mode: args.uffd_mode.unwrap_or(UffdModeName::Wp),
        dir: dir.path(),
        stop,
        doorbell,
        most_bytes: Some(MOST),
    };
    run.measure(Placement::Free, &CASES, &mut result)?;
    Ok(result
        .rows
        .into_iter()
        .map(|row| SandboxRow { doorbell, row })
        .collect())
}

/// What guests are made of.
struct Machine {
    lab: Lab,
    qemu: PathBuf,
    kernel: PathBuf,
    acceleration: Acceleration,
    initramfs: Vec<u8>,
}

impl Machine {
    fn find() -> Result<Self> {
        let lab = Lab::locate()?;
        let program = std::env::current_exe()
            .context("cannot find the tlbridge binary that is running")?
            .with_file_name(PROGRAM);
        if !program.is_file() {
            bail!(
                "{} is not there, which runs in the guest: cargo build --release --workspace makes both",
                program.display()
            );
        }
        let (qemu, kernel) = (lab.provide_qemu()?, lab.provide_kernel(Series::Stable)?);
        let mut files = Initramfs::new(&lab)?;
        for module in lab.provide_gru_modules(Series::Stable)? {
            files.add_module(&lab, &module)?;
        }
        files.add_program(&program)?;
        Ok(Self {
            qemu,
            kernel: kernel.image,
            acceleration: lab.acceleration()?,
            initramfs: files.to_bytes()?,
            lab,
        })
    }

    fn spec(&self, doorbell: Doorbell, socket: &Path) -> Spec {
        let file = format!("bench-{}-{}.log", std::process::id(), name(doorbell));
        let mut spec = Spec::new(
            self.qemu.clone(),
            self.kernel.clone(),
            self.initramfs.clone(),
            default_log(&self.lab, &file),
        );
        spec.accelerator = self.acceleration.accelerator;
        spec.boot = self.acceleration.boot;
        spec.devices.push(socket.to_owned());
        spec
    }
}

/// The same calls on the kernel's own driver.
fn guest(args: &BenchArgs, machine: &Machine, doorbell: Doorbell, stop: &Stop) -> Result<GuestRow> {
    let dir = super::tempdir()?;
    let socket = dir.path().join("device.sock");
    let more = args!["--doorbell", name(doorbell)];
    let mut device = crate::device::start(ModelName::Gru, dir.path(), &socket, more, stop)?;
    let spec = machine.spec(doorbell, &socket);
    let mut guest = Guest::start(&spec, Some(stop.as_fd()))?;
    let rounds = if args.quick { 10 } else { 120 };
    let mut said = Vec::new();
    let code = guest.run_to(
        &format!("gru-guest invalidate --rounds {rounds} && gru-guest statistics"),
        Some(Duration::from_secs(if args.quick { 120 } else { 600 })),
        &mut said,
        Some(stop.as_fd()),
    )?;
    let said = String::from_utf8_lossy(&said);
    ensure!(code == 0, "gru-guest ended with {code}: {said}");
    let complaints = guest.power_off()?;
    ensure!(
        complaints.is_empty(),
        "the guest's kernel complains: {complaints:?}; its console: {}",
        spec.log.display()
    );
    device.ask("stats")?;
    let mut stats = device.expect("stats", ANSWER_LIMIT, stop)?;
    device.end_cleanly()?;
    // What went wrong would be in it.
    let _ = std::fs::remove_file(&spec.log);
    let transcript = Transcript::read(&said)?;
    let row = GuestRow::new(doorbell, &transcript, stats["stats"].take(), args.seed);
    for line in row.summary() {
        eprintln!("  {line}");
    }
    Ok(row)
}
