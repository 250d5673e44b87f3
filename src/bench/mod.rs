//! `tlbridge bench`.

mod cases;
pub mod doorbell;
pub mod mmio;
mod monitor;
mod report;
mod statistics;
pub mod subject;
mod targets;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::{BenchArgs, UffdModeName};
use crate::demo::args;
use crate::latency::human;
use crate::stop::Stop;
use crate::supervise::{START_LIMIT, Service};
use report::BenchResult;
use subject::Row;

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
        // Mode 0700: nobody else reaches the sockets.
        let dir = tempfile::Builder::new()
            .prefix("tlbridge-")
            .tempdir()
            .context("cannot make a private directory for the sockets (TMPDIR)")?;
        measure(args, mode, dir.path(), &stop, &mut result)?;
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

fn measure(
    args: &BenchArgs,
    mode: UffdModeName,
    dir: &Path,
    stop: &Stop,
    result: &mut BenchResult,
) -> Result<()> {
    let (device_socket, host_socket) = (dir.join("device.sock"), dir.join("host.sock"));
    let mut device = Service::start(
        "device",
        args![
            "device",
            "--model",
            "gru",
            "--socket",
            &device_socket,
            "--private-dir",
            dir,
            "--doorbell",
            "poll",
            "--map-tfh"
        ],
    )?;
    device.expect("ready", START_LIMIT, stop)?;
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
            mode.name(),
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
        args.seed.to_string()
    ];
    if args.quick {
        list.push(OsString::from("--quick"));
    }
    let mut subject = Service::start("bench subject", list)?;
    subject.expect("ready", START_LIMIT, stop)?;
    follow(&mut subject, stop, result).with_context(|| {
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

fn follow(subject: &mut Service, stop: &Stop, result: &mut BenchResult) -> Result<()> {
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
            let row: Row = serde_json::from_value(row.take()).context("a row of the benchmark")?;
            eprintln!(
                "{:>8?}  {:<28}{:>10}  {:>10}  {:.2} times",
                row.uffd_mode,
                row.case.label(),
                report::size(row.size_bytes),
                human(row.paired.p50_ns),
                row.paired.ratio.median
            );
            result.rows.push(row);
        } else if let Some(floor) = line.get_mut("wake_floor") {
            result.wake = Some(serde_json::from_value(floor.take()).context("the wake floor")?);
        } else if line.get("done").is_some() {
            return Ok(());
        }
    }
}
