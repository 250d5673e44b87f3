//! `tlbridge demo`: four processes and a verdict.

pub mod application;
pub mod peer;
mod progress;
mod result;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use ::host::daemon::vfio_address;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::cli::{DemoArgs, Fault, ModelName};
use crate::inspect;
use crate::stop::Stop;
use crate::supervise::{START_LIMIT, Service};
use application::report::Report;
use progress::Progress;
pub use result::DemoResult;

/// Time that an answer to a question may take.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Runs the demo and prints its result. Returns whether everything was right.
///
/// # Errors
/// A process cannot be started, or ends early.
pub fn run(args: &DemoArgs, out: &mut impl Write) -> Result<Verdict> {
    check(args)?;
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    // Mode 0700: nobody else reaches the sockets.
    let dir = tempfile::Builder::new()
        .prefix("tlbridge-")
        .tempdir()
        .context("cannot make a private directory for the sockets (TMPDIR)")?;
    let result = run_in(args, dir.path(), &stop);
    dir.close().or_else(|error| match error.kind() {
        // The last process to end may have removed it already.
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error).context("cannot remove the sockets' directory"),
    })?;
    let result = result?;
    if args.json {
        writeln!(out, "{}", result.json())?;
    } else {
        write!(out, "{}", result.table())?;
    }
    Ok(result.verdict())
}

/// Whether the broken check is one of something that takes part.
fn check(args: &DemoArgs) -> Result<()> {
    let device = args.device.as_deref();
    match args.break_check.or(args.delay) {
        Some(fault @ (Fault::KillBit | Fault::Drain)) if device.is_some() => bail!(
            "{} is a check of the device: start that with `tlbridge device --break {0}`, and the demo without",
            fault.name()
        ),
        Some(Fault::HeldPages) if device.and_then(vfio_address).is_none() => {
            bail!("only a device behind the kernel's VFIO holds pages: --device vfio:ADDRESS")
        }
        _ => Ok(()),
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every result was right.
    Right,
    /// A result was wrong without being stale.
    Wrong,
    /// A stale access was found.
    Stale,
    /// The device's sanitizer has found something, and nobody else.
    Defective,
}

/// Arguments of a child, of whatever type.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { vec![$(std::ffi::OsString::from($arg)),*] };
}
pub(crate) use args;

/// The value's name on the command line.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .expect("no value is skipped")
        .get_name()
        .to_owned()
}

fn run_in(args: &DemoArgs, dir: &Path, stop: &Stop) -> Result<DemoResult> {
    let (device_socket, host_socket) = (dir.join("device.sock"), dir.join("host.sock"));
    let mut device = match &args.device {
        Some(_) => None,
        None => Some(crate::device::start(
            ModelName::Gru,
            dir,
            &device_socket,
            device_args(args),
            stop,
        )?),
    };
    let device_name = args.device.as_deref().unwrap_or(&device_socket);
    let mut host = Service::start("host daemon", host_args(args, dir, device_name, &host_socket))?;
    host.expect("ready", START_LIMIT, stop)?;
    let mut application = Service::start("application", application_args(args, dir, &host_socket))?;
    let ready = application.expect("ready", START_LIMIT, stop)?;
    let mut peer = match args.no_peer {
        true => None,
        false => Some(Service::start(
            "xpmem peer",
            peer_args(&application, &ready, dir, &host_socket)?,
        )?),
    };
    if let Some(peer) = &mut peer {
        peer.expect("ready", START_LIMIT, stop)?;
    }

    let report = follow(args, &mut application, stop).with_context(|| {
        let others = device.iter_mut().chain([&mut host]).chain(&mut peer);
        let ended: Vec<String> = others.filter_map(Service::ended).collect();
        if ended.is_empty() {
            "the run was cut short".to_owned()
        } else {
            ended.join("; ")
        }
    })?;
    let host_stats = inspect::daemon_stats(&host_socket)?;
    let device_stats = match &mut device {
        None => Value::Null,
        Some(device) => {
            device.ask("stats")?;
            device.expect("stats", ANSWER_LIMIT, &Stop::new()?)?
        }
    };
    let peer_stats = match &mut peer {
        None => Value::Null,
        Some(peer) => {
            peer.ask("stats")?;
            peer.expect("stats", ANSWER_LIMIT, &Stop::new()?)?
        }
    };

    // The application first: while it is there, the others are in use.
    for service in [peer, Some(application), Some(host), device]
        .into_iter()
        .flatten()
    {
        service.end_cleanly()?;
    }
    Ok(DemoResult {
        configuration: result::configuration(args),
        application: report,
        host: host_stats,
        device: device_stats,
        peer: peer_stats,
    })
}

/// Shows progress until the application reports.
fn follow(args: &DemoArgs, application: &mut Service, stop: &Stop) -> Result<Report> {
    let progress = Progress::new(args.seconds);
    let mut told = false;
    // The run itself, and time for the threads to end.
    let limit = std::time::Instant::now() + Duration::from_secs(args.seconds + 30);
    loop {
        if stop.requested() && !told {
            told = true;
            application.ask("end")?;
        }
        let Some(mut line) = application.next(Duration::from_millis(100))? else {
            if std::time::Instant::now() > limit {
                bail!(
                    "the application (pid {}) does not end; RUST_LOG=debug shows what hangs",
                    application.pid()
                );
            }
            continue;
        };
        if let Some(now) = line.get("progress") {
            progress.show(now);
        } else if let Some(report) = line.get_mut("report") {
            progress.finish();
            return serde_json::from_value(report.take()).context("the application's report is not one");
        }
    }
}

fn device_args(args: &DemoArgs) -> Vec<OsString> {
    let mut list = args![
        "--doorbell",
        name(args.doorbell),
        // The driver behind the daemon is ours.
        "--map-tfh",
        "--engines",
        args.engines.to_string(),
    ];
    if let Some(level) = args.sanitize {
        list.extend(args![format!("--sanitize={level}")]);
    }
    for (option, fault) in [("--break", args.break_check), ("--delay", args.delay)] {
        if let Some(fault @ (Fault::KillBit | Fault::Drain)) = fault {
            list.extend(args![option, fault.name()]);
        }
    }
    list
}

fn host_args(args: &DemoArgs, dir: &Path, device: &Path, socket: &Path) -> Vec<OsString> {
    let mut list = args![
        "host",
        "--socket",
        socket,
        "--device",
        device,
        "--private-dir",
        dir,
        "--uffd-mode",
        args.uffd_mode.name(),
        "--reclaim",
    ];
    for (option, fault) in [("--break", args.break_check), ("--delay", args.delay)] {
        if let Some(fault @ (Fault::SafetyNet | Fault::HeldPages)) = fault {
            list.extend(args![option, fault.name()]);
        }
    }
    list
}

fn peer_args(application: &Service, ready: &Value, dir: &Path, socket: &Path) -> Result<Vec<OsString>> {
    let address = |key: &str| {
        ready[key]
            .as_u64()
            .map(|a| a.to_string())
            .with_context(|| format!("the application named no {key}"))
    };
    Ok(args![
        "peer",
        "--private-dir",
        dir,
        "--socket",
        socket,
        "--pid",
        application.pid().to_string(),
        "--start",
        address("shared_start")?,
        "--end",
        address("shared_end")?,
    ])
}

fn application_args(args: &DemoArgs, dir: &Path, socket: &Path) -> Vec<OsString> {
    let (raw_every, probe_every, aim_every) = match args.break_check.or(args.delay) {
        // Held pages need no window: a discard is enough.
        None | Some(Fault::HeldPages) => (3, 4, 6),
        // While the safety net is delayed nothing can be filled: with many raw calls nothing would run.
        Some(Fault::SafetyNet) => (24, 2, 6),
        // The window is open for an instruction that is under way: aim there. The safety net's purges of
        // everything would close most windows before the call that matters, and each probe's own fill or
        // store is delayed as well.
        Some(Fault::KillBit | Fault::Drain) => (100, 16, 2),
    };
    let mut list = args![
        "application",
        "--private-dir",
        dir,
        "--socket",
        socket,
        "--seconds",
        args.seconds.to_string(),
        "--threads",
        args.threads.to_string(),
        "--seed",
        args.seed.to_string(),
        "--memory-mib",
        args.memory_mib.to_string(),
        "--raw-every",
        raw_every.to_string(),
        "--probe-every",
        probe_every.to_string(),
        "--aim-every",
        aim_every.to_string(),
    ];
    // Nothing says when an unannounced MADV_REMOVE has happened, and a device behind the kernel's VFIO would keep
    // the page that it had.
    if args.device.as_deref().and_then(vfio_address).is_some() {
        list.extend(args!["--announce-removal"]);
    }
    list
}

/// A figure of a process' statistics: the sum of every number with that key, at whatever depth (each session
/// of a daemon and each chiplet of a device has its own).
pub(crate) fn total(stats: &Value, key: &str) -> u64 {
    match stats {
        Value::Object(object) => object
            .iter()
            .map(|(name, value)| match value.as_u64() {
                Some(number) if name == key => number,
                _ => total(value, key),
            })
            .sum(),
        Value::Array(items) => items.iter().map(|item| total(item, key)).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn test_total_when_key_is_nested_sums_numbers_only() {
        let stats = json!({"hits": 1, "tlb": [{"hits": 2}, {"hits": 3, "misses": 9}], "x": {"hits": "no"}});
        assert_eq!(total(&stats, "hits"), 6);
        assert_eq!(total(&stats, "misses"), 9);
        assert_eq!(total(&stats, "absent"), 0);
    }
}
