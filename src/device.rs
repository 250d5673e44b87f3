//! `tlbridge device`: one device, served on a socket.

use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use ::device::fabric::Fabric;
use ::device::faults::{BreakPlan, FaultPlan};
use ::device::gru::{Gru, GruConfig};
use ::device::mlx5::{FunctionKind, Mlx5, Mlx5Config};
use ::device::model::Model;
use ::device::pci::Function;
use ::device::server::{ErrorReplies, Server, ServerOptions, StopFd};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cli::{DeviceArgs, DeviceFault, Doorbell, ErrorReplyLength, HcaFunction, ModelName};
use crate::demo::{args, name};
use crate::inspectable::Inspectable;
use crate::sanitizer;
use crate::stop::{self, Stop};
use crate::supervise::{Leftovers, START_LIMIT, Service};

/// Starts `tlbridge device` as a child and waits until it serves. `more`: what goes beyond model and socket.
///
/// # Errors
/// It does not come up.
pub fn start(
    model: ModelName,
    dir: &Path,
    socket: &Path,
    more: impl IntoIterator<Item = OsString>,
    stop: &Stop,
) -> Result<Service> {
    let mut list = args![
        "device",
        "--model",
        name(model),
        "--socket",
        socket,
        "--private-dir",
        dir
    ];
    list.extend(more);
    let mut device = Service::start("device", list)?;
    device.expect("ready", START_LIMIT, stop)?;
    Ok(device)
}

/// Serves until told to end. A sanitizer's findings are an exit code of their own; a supervisor asks for them instead.
///
/// # Errors
/// The socket cannot be used, or the device cannot be built.
pub fn run(args: &DeviceArgs, out: &mut impl Write) -> Result<ExitCode> {
    let stop = Stop::new()?;
    stop.on_signals(args.supervised.supervised)?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    let (function, what) = match args.model {
        ModelName::Gru => {
            let config = config(args);
            let function =
                Function::new(|context| Gru::new(context, config).map(|gru| -> Arc<dyn Model> { gru }))
                    .context("cannot build the GRU")?;
            (function, "a GRU")
        }
        ModelName::Mlx5 => {
            let config = hca_config(args)?;
            let function =
                Function::new(|context| Mlx5::new(context, config).map(|hca| -> Arc<dyn Model> { hca }))
                    .context("cannot build the HCA")?;
            (function, "an mlx5 HCA")
        }
    };
    let options = ServerOptions {
        busy_poll: std::time::Duration::from_micros(args.busy_poll),
        error_replies: match args.error_replies {
            ErrorReplyLength::Auto => ErrorReplies::Auto,
            ErrorReplyLength::Header => ErrorReplies::Header,
            ErrorReplyLength::Full => ErrorReplies::Full,
        },
        ..ServerOptions::default()
    };
    let server = Server::bind(&args.socket, Arc::clone(&function), options)?;
    let end = StopFd::new().context("no file descriptor is left (ulimit -n)")?;
    let inspectable = match &args.inspect {
        None => None,
        Some(path) => {
            let function = Arc::clone(&function);
            Some(Inspectable::start(path, &stop, move || function.model().dump())?)
        }
    };
    if args.supervised.supervised {
        let function = Arc::clone(&function);
        stop::obey(&stop, move |_| json!({ "stats": function.model().dump() }))?;
        stop::say(&json!({ "ready": { "pid": std::process::id() } }));
    } else {
        eprintln!("serving {what} at {} (Ctrl-C ends)", args.socket.display());
    }
    let forward = {
        let (stop, end) = (stop.clone(), end.clone());
        std::thread::spawn(move || {
            while !stop.wait_for(std::time::Duration::from_secs(3600)) {}
            end.stop();
        })
    };
    let result = server.run(&end).context("the device's socket failed");
    stop.request();
    forward.join().expect("forwarding a request cannot fail");
    drop(inspectable);
    result?;
    let findings = match function.model().findings() {
        Some(findings) => serde_json::to_value(findings).context("the sanitizer's findings")?,
        None => Value::Null,
    };
    if args.json {
        writeln!(out, "{findings}")?;
    }
    if args.supervised.supervised {
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(summary) = sanitizer::summary(&findings) {
        eprintln!("{summary}");
    }
    Ok(match sanitizer::defects(&findings) {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(sanitizer::EXIT_CODE),
    })
}

/// # Errors
/// An option that only the GRU has; the fabric cannot be opened.
fn hca_config(args: &DeviceArgs) -> Result<Mlx5Config> {
    // Left aside, they would let a run pass that has looked at nothing.
    for (given, option) in [
        (args.sanitize.is_some(), "--sanitize"),
        (args.break_check.is_some(), "--break"),
        (args.delay.is_some(), "--delay"),
        (args.gru.faults.is_some(), "--faults"),
    ] {
        ensure!(!given, "{}", only_gru(option));
    }
    let node_guid = args.node_guid.unwrap_or_else(|| {
        let mut hasher = DefaultHasher::new();
        std::path::absolute(&args.socket)
            .unwrap_or_else(|_| args.socket.clone())
            .hash(&mut hasher);
        // Even: the port has the next one.
        OUI << 40 | (hasher.finish() & 0xff_ffff_fffe)
    });
    let fabric = Fabric::open(&args.fabric).context("cannot open the fabric (--fabric)")?;
    Ok(Mlx5Config {
        node_guid,
        fabric,
        function: match args.function {
            HcaFunction::Pf => FunctionKind::Pf,
            HcaFunction::Vf => FunctionKind::Vf,
        },
        workers: args.workers as usize,
    })
}

/// What is said to somebody who gives the HCA an option of the GRU.
pub fn only_gru(option: &str) -> String {
    format!("{option} is for --model gru: the mlx5 HCA has nothing that it could act on; leave it out")
}

/// The vendor's part of a GUID.
const OUI: u64 = 0x0002c9;

fn config(args: &DeviceArgs) -> GruConfig {
    let mut broken = BreakPlan::default();
    match args.break_check {
        Some(DeviceFault::KillBit) => broken.kill_bit = true,
        Some(DeviceFault::Drain) => broken.drain = true,
        Some(DeviceFault::Clean) => broken.clean = true,
        Some(DeviceFault::Unmap) => broken.unmap = true,
        None => {}
    }
    let mut faults = FaultPlan {
        // Long enough for the next invalidation of that range to come, short enough to go on when none does.
        limit: std::time::Duration::from_millis(20),
        ..FaultPlan::default()
    };
    match args.delay {
        Some(DeviceFault::KillBit) => faults.dropin_delay = Some(FaultPlan::DROPIN_EVERY),
        Some(DeviceFault::Drain) => faults.drain_delay = Some(FaultPlan::DRAIN_EVERY),
        // Clean and unmap need no window.
        Some(DeviceFault::Clean | DeviceFault::Unmap) | None => {}
    }
    let standard = GruConfig::default();
    let level = sanitizer::wanted(args.sanitize);
    let mut config = GruConfig {
        doorbell: match args.doorbell {
            Doorbell::Trap => ::device::gru::Doorbell::Trap,
            Doorbell::Bell => ::device::gru::Doorbell::Bell,
            Doorbell::Poll => ::device::gru::Doorbell::Poll,
        },
        map_tfh: args.map_tfh,
        engines: args.engines as usize,
        spin: args.spin.map(std::time::Duration::from_micros),
        sanitize: level.is_some(),
        follow_changes: level == Some(sanitizer::WITH_CHANGES),
        broken,
        faults,
        ..standard
    };
    args.gru.apply(&mut config);
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn hca(more: &[&str]) -> Result<Mlx5Config> {
        let words = [&["tlbridge", "device", "--model", "mlx5", "--socket", "x"], more].concat();
        match crate::cli::Cli::try_parse_from(words)?.command {
            Some(crate::cli::Command::Device(args)) => hca_config(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn test_hca_when_an_option_of_the_gru_is_given_is_refused_by_its_name() {
        assert!(hca(&[]).is_ok());
        for (option, value) in [
            ("--sanitize", None),
            ("--break", Some("drain")),
            ("--delay", Some("kill-bit")),
            ("--faults", Some("drain-delay=1")),
        ] {
            let words: Vec<&str> = [option].into_iter().chain(value).collect();
            let why = hca(&words).err().map(|error| format!("{error:#}"));
            assert!(
                why.as_deref()
                    .is_some_and(|why| why.starts_with(&format!("{option} is for --model gru"))),
                "{option}: {why:?}"
            );
        }
    }
}
