//! `tlbridge bench`.

mod cases;
pub mod doorbell;
pub mod guest;
pub mod hog;
pub mod mmio;
mod monitor;
mod placement;
pub mod rdma;
#[cfg(feature = "verbs")]
pub mod register;
mod report;
mod statistics;
pub mod subject;
mod targets;
pub mod wake;

pub use cases::Case;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::{BenchArgs, Doorbell, ModelName, UffdModeName};
use crate::demo::{args, name};
use crate::latency::human;
use crate::stop::Stop;
use crate::supervise::{START_LIMIT, Service};
use placement::{Placement, Unpin, pin};
use report::{Absent, BenchResult};
use subject::Row;
use tempfile::TempDir;

/// A cell that takes longer hangs.
const CELL_LIMIT: Duration = Duration::from_secs(120);

/// Measures invalidations and prints the table.
///
/// # Errors
/// A process cannot be started, or ends early.
pub fn invalidate(args: &BenchArgs, out: &mut impl Write) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    let modes = match args.uffd_mode {
        Some(mode) => vec![mode],
        None => vec![UffdModeName::Wp, UffdModeName::Missing],
    };
    let start = Instant::now();
    let mut result = BenchResult::new(args);
    for mode in modes {
        let dir = tempdir()?;
        let run = Run {
            args,
            mode,
            dir: dir.path(),
            stop: &stop,
            doorbell: Doorbell::Poll,
            most_bytes: None,
        };
        run.measure(Placement::Free, &args.cases, &mut result)?;
        if !args.cases.is_empty() && !args.cases.contains(&Case::AgentLiveParked) {
            continue;
        }
        for placement in [Placement::OneProcessor, Placement::DeviceApart] {
            // (Ends of a run leave their sockets to nobody.)
            let dir = tempdir()?;
            let run = Run {
                dir: dir.path(),
                ..run
            };
            run.measure(placement, &[Case::AgentLiveParked], &mut result)?;
        }
    }
    result.elapsed_ms = start.elapsed().as_millis() as u64;
    print(args.json.as_deref(), &result.json(), || result.table(), out)
}

/// The table to `out`, or the JSON to a file (`-` = to `out` instead of the table).
fn print(
    file: Option<&Path>,
    json: &serde_json::Value,
    table: impl FnOnce() -> String,
    out: &mut impl Write,
) -> Result<()> {
    match file {
        Some(path) if path == Path::new("-") => writeln!(out, "{json}")?,
        Some(path) => {
            std::fs::write(path, format!("{json:#}\n"))
                .with_context(|| format!("cannot write {}", path.display()))?;
            write!(out, "{}", table())?;
        }
        None => write!(out, "{}", table())?,
    }
    Ok(())
}

fn tempdir() -> Result<TempDir> {
    // Mode 0700: nobody else reaches the sockets.
    tempfile::Builder::new()
        .prefix("tlbridge-")
        .tempdir()
        .context("cannot make a private directory for the sockets (TMPDIR)")
}

/// One set of processes.
#[derive(Clone, Copy)]
struct Run<'a> {
    args: &'a BenchArgs,
    mode: UffdModeName,
    dir: &'a Path,
    stop: &'a Stop,
    doorbell: Doorbell,
    /// Only ranges up to that length.
    most_bytes: Option<usize>,
}

impl Run<'_> {
    /// Starts the processes, takes the rows (none named = all), ends them.
    fn measure(&self, placement: Placement, cases: &[Case], result: &mut BenchResult) -> Result<()> {
        let unpin = Unpin::later()?;
        let processors = match placement.processors(unpin.allowed()) {
            Ok(processors) => processors,
            Err(why) => {
                result.absent.push(Absent {
                    placement,
                    uffd_mode: self.mode.into(),
                    reason: format!("{why:#}"),
                });
                return Ok(());
            }
        };
        let (dir, stop) = (self.dir, self.stop);
        let (device_socket, host_socket) = (dir.join("device.sock"), dir.join("host.sock"));
        if let Some((_, there)) = processors {
            pin(there)?;
        }
        let more = args!["--doorbell", name(self.doorbell), "--map-tfh"];
        let mut device = crate::device::start(ModelName::Gru, dir, &device_socket, more, stop)?;
        if let Some((here, _)) = processors {
            pin(here)?;
        }
        let mut host = Service::start(
            "host daemon",
            args![
                "host",
                "--socket",
                &host_socket,
                "--device",
                &device_socket,
                "--private-dir",
                dir,
                "--uffd-mode",
                self.mode.name(),
            ],
        )?;
        host.expect("ready", START_LIMIT, stop)?;
        let mut list = args![
            "bench-subject",
            "--private-dir",
            dir,
            "--socket",
            &host_socket,
            "--seed",
            self.args.seed.to_string()
        ];
        if self.args.quick {
            list.push(OsString::from("--quick"));
        }
        if let Some(most) = self.most_bytes {
            list.extend(args!["--most-bytes", most.to_string()]);
        }
        if let Some((_, there)) = processors {
            list.extend(args!["--device-cpu", there.to_string()]);
        }
        for case in cases {
            list.extend(args!["--case", name(*case)]);
        }
        let mut subject = Service::start("bench subject", list)?;
        drop(unpin);
        subject.expect("ready", START_LIMIT, stop)?;
        follow(&mut subject, placement, stop, result).with_context(|| {
            let ended: Vec<String> = [&mut device, &mut host]
                .into_iter()
                .filter_map(Service::ended)
                .collect();
            if ended.is_empty() {
                "the benchmark was cut short".to_owned()
            } else {
                ended.join("; ")
            }
        })?;
        result.host.push(crate::inspect::daemon_stats(&host_socket)?);
        for service in [subject, host, device] {
            service.end_cleanly()?;
        }
        Ok(())
    }
}

fn follow(subject: &mut Service, placement: Placement, stop: &Stop, result: &mut BenchResult) -> Result<()> {
    let mut last = Instant::now();
    loop {
        let Some(mut line) = subject.next(Duration::from_millis(200))? else {
            if stop.requested() {
                bail!("interrupted");
            }
            if last.elapsed() > CELL_LIMIT {
                bail!(
                    "no row for {CELL_LIMIT:?}: the measured process (pid {}) hangs",
                    subject.pid()
                );
            }
            continue;
        };
        last = Instant::now();
        if let Some(row) = line.get_mut("row") {
            let mut row: Row = serde_json::from_value(row.take()).context("a row of the benchmark")?;
            row.placement = placement;
            eprintln!(
                "{:>8?}  {:<42}{:>10}  {:>10}  {:.2} times",
                row.uffd_mode,
                report::title(&row),
                report::size(row.size_bytes),
                human(row.paired.p50_ns),
                row.paired.ratio.median
            );
            result.rows.push(row);
        } else if line.get("done").is_some() {
            return Ok(());
        }
    }
}
