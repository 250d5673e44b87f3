//! Guests at once: a device process and a log for each, commands when all have booted, power off when all
//! commands have ended.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::Lab;
use lab::guest::{Failure, Guest, Spec};
use serde_json::json;
use tempfile::TempDir;

use super::NO_GUEST;
use crate::cli::{Doorbell, VmArgs, VmModel};
use crate::demo::{ANSWER_LIMIT, args, name};
use crate::device::only_gru;
use crate::inspect::print_text;
use crate::sanitizer;
use crate::stop::Stop;
use crate::supervise::Service;

/// A guest that does not run yet, with what it needs.
#[derive(Debug)]
pub(super) struct Machine {
    /// What it is called in messages: nothing if it is the only one.
    name: String,
    index: u32,
    spec: Spec,
    log_is_temporary: bool,
    /// Of the device's socket. Mode 0700: nobody else reaches it.
    _directory: TempDir,
}

/// Starts the devices.
pub(super) fn prepare(
    args: &VmArgs,
    lab: &Lab,
    stop: &Stop,
    spec: impl Fn(PathBuf) -> Spec,
) -> Result<Vec<(Machine, Option<Service>)>> {
    let count = args.guests as usize;
    ensure!(
        args.device.len().is_multiple_of(count),
        "--device is given {} times, which {count} guests cannot share evenly",
        args.device.len()
    );
    ensure!(
        count == 1 || (args.gdb.is_none() && !args.terminal && !args.command.is_empty()),
        "--guests {count} takes a COMMAND, and neither --terminal nor --gdb"
    );
    if args.model == Some(VmModel::Mlx5) {
        // The device would say so of --sanitize as well; here nothing has been started.
        ensure!(!args.sanitize, "{}", only_gru("--sanitize"));
        ensure!(args.doorbell.is_none(), "{}", only_gru("--doorbell"));
    }
    let each = args.device.len() / count;
    (0..args.guests)
        .map(|index| {
            let (log, log_is_temporary) = match &args.log {
                Some(log) => (log_of(log, index, args.guests), false),
                None => {
                    let name = format!("vm-{}.log", std::process::id());
                    let name = log_of(Path::new(&name), index, args.guests);
                    (default_log(lab, &name.to_string_lossy()), true)
                }
            };
            let mut spec = spec(std::path::absolute(&log).context("the log's path")?);
            let directory = tempfile::Builder::new()
                .prefix("tlbridge-")
                .tempdir()
                .context("cannot make a private directory for the socket (TMPDIR)")?;
            let mut device = None;
            if let Some(model) = args.model.and_then(VmModel::device) {
                let socket = directory.path().join("device.sock");
                let arguments = device_args(args);
                device = Some(crate::device::start(
                    model,
                    directory.path(),
                    &socket,
                    arguments,
                    stop,
                )?);
                spec.devices.push(socket);
            }
            spec.devices
                .extend(args.device.iter().skip(index as usize * each).take(each).cloned());
            let machine = Machine {
                name: match args.guests {
                    1 => String::new(),
                    _ => format!("guest {index}: "),
                },
                index,
                spec,
                log_is_temporary,
                _directory: directory,
            };
            Ok((machine, device))
        })
        .collect()
}

/// Runs them to their ends; the greatest exit code. What kept a guest from its command is said for each, and
/// the first one is the error.
pub(super) fn run(
    args: &VmArgs,
    machines: Vec<(Machine, Option<Service>)>,
    command: Option<&str>,
    stop: &Stop,
) -> Result<u8> {
    let (machines, mut devices): (Vec<_>, Vec<_>) = machines.into_iter().unzip();
    // Nothing runs before all are there, and nobody goes while another one may need it.
    let booted = at_once(&machines, machines.iter().map(|_| ()), |machine, ()| {
        let guest = Guest::start(&machine.spec, Some(stop.as_fd()))?;
        tracing::info!(guest = machine.index, took = ?guest.booted_in(), log = %machine.spec.log.display(), "booted");
        Ok::<_, Failure>(guest)
    });
    let all = booted.iter().all(Result::is_ok);
    let ran = at_once(&machines, booted, |machine, guest: Result<_, Failure>| {
        let mut guest = guest?;
        // The others' boots are the errors then.
        let code = if all {
            Some(command_in(&mut guest, args, machine, command, stop)?)
        } else {
            None
        };
        Ok((guest, code))
    });
    let ended = at_once(&machines, ran, |_, ran: Result<(Guest, _), Failure>| {
        let (guest, code) = ran?;
        Ok((code, guest.power_off()?))
    });
    let mut first = None;
    let mut defects = 0;
    let sanitized = sanitizer::wanted(args.sanitize);
    if args.device_stats || sanitized {
        for (machine, device) in machines.iter().zip(&mut devices) {
            let Some(device) = device else { continue };
            match stats(&machine.name, device, args.device_stats) {
                Ok(found) => defects += found,
                // Nobody knows what it has found.
                Err(error) if sanitized && first.is_none() => {
                    first = Some(error.context("the device's statistics").context_of(&machine.name));
                }
                Err(error) => eprintln!("tlbridge: {}the device's statistics: {error:#}", machine.name),
            }
        }
    }
    let mut worst = 0;
    for ((machine, device), ended) in machines.into_iter().zip(devices).zip(ended) {
        let name = machine.name.clone();
        match machine.end(device, ended) {
            Ok(code) => worst = worst.max(code),
            Err(error) if first.is_none() => first = Some(error.context_of(&name)),
            Err(error) => eprintln!("tlbridge: {name}{error:#}"),
        }
    }
    match first {
        Some(error) => Err(error),
        None if defects == 0 => Ok(worst),
        None => {
            if worst != 0 {
                eprintln!("tlbridge: the command's exit code was {worst}");
            }
            Ok(sanitizer::VM_EXIT_CODE)
        }
    }
}

/// A step of all guests, each in its thread.
fn at_once<T: Send, R: Send>(
    machines: &[Machine],
    of_each: impl IntoIterator<Item = T>,
    step: impl Fn(&Machine, T) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = machines
            .iter()
            .zip(of_each)
            .map(|(machine, it)| {
                let step = &step;
                scope.spawn(move || step(machine, it))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

fn command_in(
    guest: &mut Guest,
    args: &VmArgs,
    machine: &Machine,
    command: Option<&str>,
    stop: &Stop,
) -> Result<i32, Failure> {
    let place = format!("export GUEST_INDEX={} GUESTS={}\n", machine.index, args.guests);
    match command {
        Some(command) if !args.terminal => {
            let mut output: Box<dyn Write> = match args.guests {
                1 => Box::new(io::stdout()),
                _ => Box::new(Prefixed {
                    prefix: format!("{}: ", machine.index),
                    line: Vec::new(),
                }),
            };
            let code = guest.run_to(
                &format!("{place}{command}"),
                args.timeout.map(Duration::from_secs),
                &mut output,
                Some(stop.as_fd()),
            )?;
            Ok(code)
        }
        command => {
            if io::stdin().is_terminal() {
                eprintln!(
                    "tlbridge: Ctrl-A x ends the guest; its console: {}",
                    machine.spec.log.display()
                );
            }
            let command = command.unwrap_or("exec sh -l");
            guest.run_on_terminal(&format!("{place}{command}"), Some(stop.as_fd()))
        }
    }
}

impl Machine {
    /// Says what its kernel complained of, ends its device, and has its exit code.
    fn end(
        self,
        mut device: Option<Service>,
        ended: Result<(Option<i32>, Vec<String>), Failure>,
    ) -> Result<u8> {
        let device_end = match device.as_mut().and_then(Service::ended) {
            // It was needed to the end.
            Some(early) => Err(anyhow::anyhow!(early)),
            None => device.map_or(Ok(()), Service::end_cleanly),
        };
        let (code, complaints) = match (ended, device_end) {
            (Err(failure), Err(device)) => return Err(failure).with_context(|| format!("{device:#}")),
            (Err(failure), Ok(())) => return Err(failure.into()),
            (Ok(_), Err(device)) => return Err(device),
            (Ok(good), Ok(())) => good,
        };
        for complaint in &complaints {
            eprintln!("tlbridge: {}the guest's kernel: {complaint}", self.name);
        }
        let log = &self.spec.log;
        if !complaints.is_empty() {
            eprintln!("tlbridge: {}the guest's console: {}", self.name, log.display());
        } else if self.log_is_temporary && code == Some(0) {
            let _ = std::fs::remove_file(log);
        }
        // A guest's shell knows no others; without a command it is another guest's error.
        Ok(code.map_or(0, |code| u8::try_from(code).unwrap_or(NO_GUEST)))
    }
}

/// An error with the guest that it is about, if there are several.
trait ContextOf {
    fn context_of(self, name: &str) -> Self;
}

impl ContextOf for anyhow::Error {
    fn context_of(self, name: &str) -> Self {
        match name.strip_suffix(": ") {
            Some(name) => self.context(name.to_owned()),
            None => self,
        }
    }
}

/// Whole lines on standard output, each with its guest's index.
struct Prefixed {
    prefix: String,
    line: Vec<u8>,
}

impl Prefixed {
    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        let mut whole = self.prefix.clone().into_bytes();
        whole.extend_from_slice(line);
        io::stdout().lock().write_all(&whole)
    }
}

impl Write for Prefixed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        while let Some(at) = self.line.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.line.drain(..=at).collect();
            self.put(&line)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Drop for Prefixed {
    /// The rest of an output that does not end with a line's end.
    fn drop(&mut self) {
        let mut line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            line.push(b'\n');
            // Nobody is left to be told.
            let _ = self.put(&line);
        }
    }
}

/// Whatever became of the guest: what the device has counted (if asked for), and its sanitizer's findings. Defects.
fn stats(name: &str, device: &mut Service, show: bool) -> Result<u64> {
    device.ask("stats")?;
    let dump = device.expect("stats", ANSWER_LIMIT, &Stop::new()?)?;
    let mut err = io::stderr().lock();
    if show {
        if let Some(name) = name.strip_suffix(": ") {
            writeln!(err, "{name}").context("stderr")?;
        }
        print_text(&json!({ "device": dump["stats"] }), 0, &mut err)?;
    }
    let findings = &dump["sanitizer"];
    if let Some(summary) = sanitizer::summary(findings) {
        writeln!(err, "tlbridge: {name}the device's {summary}").context("stderr")?;
    }
    Ok(sanitizer::defects(findings))
}

fn device_args(args: &VmArgs) -> Vec<OsString> {
    let mut all = Vec::new();
    let says = |argument: &OsString| argument.to_string_lossy().starts_with("--doorbell");
    let gru = args.model == Some(VmModel::Gru);
    if gru && (args.doorbell.is_some() || !args.device_arg.iter().any(says)) {
        // Strict: a guest's driver need not know of doorbells, and its register writes are posted.
        all.extend(args!["--doorbell", name(args.doorbell.unwrap_or(Doorbell::Trap))]);
    }
    if args.sanitize {
        all.extend(args!["--sanitize"]);
    }
    all.extend(args.device_arg.iter().cloned());
    all
}

/// `vm.log`, or `vm-1.log` if there are several guests.
fn log_of(log: &Path, index: u32, guests: u32) -> PathBuf {
    if guests == 1 {
        return log.to_owned();
    }
    let stem = log.file_stem().unwrap_or_default().to_string_lossy();
    let extension = log.extension().map(|e| format!(".{}", e.to_string_lossy()));
    log.with_file_name(format!("{stem}-{index}{}", extension.unwrap_or_default()))
}

/// Where a guest's log is when nobody says: in the lab if that belongs to this user.
pub fn default_log(lab: &Lab, name: &str) -> PathBuf {
    let directory = lab.directory().join("logs");
    let place = directory.join(name);
    match std::fs::create_dir_all(&directory).and_then(|()| std::fs::write(&place, "")) {
        Ok(()) => place,
        Err(_) => std::env::temp_dir().join(format!("tlbridge-{name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_device_when_nothing_is_said_about_doorbells_traps_every_access() {
        use clap::Parser;
        let of = |model: &str, more: &[&str]| -> Vec<String> {
            let words = [&["tlbridge", "vm", "--model", model], more].concat();
            match crate::cli::Cli::try_parse_from(words).unwrap().command {
                Some(crate::cli::Command::Vm(args)) => device_args(&args)
                    .into_iter()
                    .map(|word| word.to_string_lossy().into_owned())
                    .collect(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(of("gru", &[]), ["--doorbell", "trap"]);
        assert_eq!(
            of("gru", &["--device-arg=--engines=4"]),
            ["--doorbell", "trap", "--engines=4"]
        );
        assert_eq!(of("gru", &["--doorbell", "poll"]), ["--doorbell", "poll"]);
        assert_eq!(of("gru", &["--device-arg=--doorbell=bell"]), ["--doorbell=bell"]);
        // The HCA has none.
        assert!(of("mlx5", &[]).is_empty());
        assert_eq!(of("mlx5", &["--device-arg=--workers=4"]), ["--workers=4"]);
    }

    #[test]
    fn test_log_when_of_several_guests_has_the_index() {
        let log = Path::new("/x/vm.log");
        assert_eq!(log_of(log, 0, 1), Path::new("/x/vm.log"));
        assert_eq!(log_of(log, 1, 2), Path::new("/x/vm-1.log"));
        assert_eq!(log_of(Path::new("plain"), 0, 2), Path::new("plain-0"));
    }
}
