//! `tlbridge vm`: a device process, a guest that has the device, and a command in it.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;
use lab::guest::{Failure, Guest, Spec};
use lab::initramfs::Initramfs;
use lab::kernel::{Kernel, Series};
use serde_json::json;

use crate::cli::{GuestKind, VmArgs, VmModel};
use crate::demo::{ANSWER_LIMIT, args, name};
use crate::inspect::print_text;
use crate::stop::Stop;
use crate::supervise::Service;

/// As of `timeout`.
const TIMED_OUT: u8 = 124;
/// The guest did not run the command to its end.
const NO_GUEST: u8 = 125;
/// As a shell's, for SIGINT.
const INTERRUPTED: u8 = 130;

/// Boots, runs, ends. What keeps the guest from running the command is said on stderr, and has exit codes of
/// its own, as the others are the command's.
///
/// # Errors
/// None: they are exit codes.
pub fn run(args: &VmArgs) -> Result<ExitCode> {
    let stop = Stop::new()?;
    Ok(match run_until(args, &stop) {
        Ok(code) => ExitCode::from(code),
        Err(error) if stop.requested() => {
            eprintln!("tlbridge: interrupted");
            tracing::info!("{error:#}");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("tlbridge: {error:#}");
            ExitCode::from(match error.downcast_ref::<Failure>() {
                Some(Failure::Interrupted { .. }) => INTERRUPTED,
                Some(Failure::Hang { .. }) => TIMED_OUT,
                _ => NO_GUEST,
            })
        }
    })
}

fn run_until(args: &VmArgs, stop: &Stop) -> Result<u8> {
    stop.on_signals(false)?;
    let lab = Lab::locate()?;
    let qemu = lab.provide_qemu()?;
    let stock = lab.provide_kernel(Series::Stable)?;
    let kernel = match &args.kernel {
        None => stock,
        Some(image) => Kernel {
            image: image.clone(),
            modules: args.modules.clone(),
        },
    };
    let found = lab.acceleration()?;
    let (initramfs, command) = pack(args, &lab, &kernel)?;
    let (log, log_is_temporary) = match &args.log {
        Some(log) => (log.clone(), false),
        None => (default_log(&lab), true),
    };
    let mut spec = Spec::new(
        qemu,
        kernel.image.clone(),
        initramfs.to_bytes()?,
        std::path::absolute(&log).context("the log's path")?,
    );
    spec.accelerator = found.accelerator;
    spec.boot = found.boot;
    spec.cpus = args.cpus;
    spec.memory_mib = args.memory;
    spec.append = args.append.clone();
    spec.qemu_arguments = args.qemu_arg.clone();
    spec.panic_on_oops = !args.survive_oops;
    if kind(args) == GuestKind::Debian {
        spec.disks.push(lab.provide_image()?);
    }
    if let Some(port) = args.gdb {
        debuggable(&mut spec, port, args.gdb_wait);
    }

    // Mode 0700: nobody else reaches the socket.
    let directory = tempfile::Builder::new()
        .prefix("tlbridge-")
        .tempdir()
        .context("cannot make a private directory for the socket (TMPDIR)")?;
    let mut device = match args.model.and_then(VmModel::device) {
        None => None,
        Some(model) => {
            let socket = directory.path().join("device.sock");
            let device = crate::device::start(model, directory.path(), &socket, device_args(args), stop)?;
            spec.devices.push(socket);
            Some(device)
        }
    };
    spec.devices.extend(args.device.iter().cloned());

    let result = guest(args, &spec, command.as_deref(), stop);
    if args.device_stats
        && let Some(device) = &mut device
        && let Err(error) = say_stats(device)
    {
        eprintln!("tlbridge: the device's statistics: {error:#}");
    }
    let device_end = match device.as_mut().and_then(Service::ended) {
        // It was needed to the end.
        Some(early) => Err(anyhow::anyhow!(early)),
        None => device.map_or(Ok(()), Service::end_cleanly),
    };
    let (code, complaints) = match (result, device_end) {
        (Err(failure), Err(device)) => return Err(failure).with_context(|| format!("{device:#}")),
        (Err(failure), Ok(())) => return Err(failure),
        (Ok(_), Err(device)) => return Err(device),
        (Ok(good), Ok(())) => good,
    };
    for complaint in &complaints {
        eprintln!("tlbridge: the guest's kernel: {complaint}");
    }
    if !complaints.is_empty() {
        eprintln!("tlbridge: the guest's console: {}", log.display());
    } else if log_is_temporary && code == 0 {
        let _ = std::fs::remove_file(&log);
    }
    Ok(code)
}

/// A guest that a debugger on this machine can attach to.
fn debuggable(spec: &mut Spec, port: u16, wait: bool) {
    spec.qemu_arguments
        .extend(args!["-gdb", format!("tcp:127.0.0.1:{port}")]);
    if wait {
        spec.qemu_arguments.push("-S".into());
        eprintln!("tlbridge: the guest waits for gdb: target remote 127.0.0.1:{port}, then continue");
    }
    spec.append.push_str(" nokaslr");
    // Whoever looks at it has stopped it.
    spec.boot_limit = Some(Duration::from_secs(24 * 3600));
}

/// What the device has counted, whatever became of the guest.
fn say_stats(device: &mut Service) -> Result<()> {
    device.ask("stats")?;
    let dump = device.expect("stats", ANSWER_LIMIT, &Stop::new()?)?;
    print_text(
        &json!({ "device": dump["stats"] }),
        0,
        &mut std::io::stderr().lock(),
    )
}

/// The guest's life: exit code and what its kernel complained of.
fn guest(args: &VmArgs, spec: &Spec, command: Option<&str>, stop: &Stop) -> Result<(u8, Vec<String>)> {
    let mut guest = Guest::start(spec, Some(stop.as_fd()))?;
    tracing::info!(took = ?guest.booted_in(), log = %spec.log.display(), "booted");
    let code = match command {
        Some(command) if !args.terminal => guest.run_to(
            command,
            args.timeout.map(Duration::from_secs),
            &mut std::io::stdout().lock(),
            Some(stop.as_fd()),
        )?,
        command => {
            if std::io::stdin().is_terminal() {
                eprintln!(
                    "tlbridge: Ctrl-A x ends the guest; its console: {}",
                    spec.log.display()
                );
            }
            guest.run_on_terminal(command.unwrap_or("exec sh -l"), Some(stop.as_fd()))?
        }
    };
    let complaints = guest.power_off()?;
    // A guest's shell knows no others.
    Ok((u8::try_from(code).unwrap_or(NO_GUEST), complaints))
}

/// What the guest starts with, and its command.
fn pack(args: &VmArgs, lab: &Lab, kernel: &Kernel) -> Result<(Initramfs, Option<String>)> {
    let mut files = Initramfs::new(lab)?;
    if let Some(initrd) = &args.initrd {
        let archive = std::fs::read(initrd).with_context(|| format!("reading {}", initrd.display()))?;
        files.add_archive_before(&archive);
    }
    let wanted: Vec<&str> = args.load.iter().map(String::as_str).collect();
    for module in kernel.with_dependencies(&wanted)? {
        files.add_module(lab, &module)?;
    }
    match kind(args) {
        GuestKind::Small => {}
        GuestKind::Rdma => {
            lab.provide_rdma()?;
            files.add_rdma(lab, kernel)?;
        }
        GuestKind::Debian => {
            files.enter_image(lab, kernel)?;
            files.add_rdma_modules(lab, kernel)?;
        }
    }
    if args.model == Some(VmModel::Gru) {
        if args.kernel.is_none() {
            for module in lab.provide_gru_modules(Series::Stable)? {
                files.add_module(lab, &module)?;
            }
        } else if args.module.is_empty() {
            eprintln!(
                "tlbridge: no driver for the GRU in this guest: driver/kmod/gru/build.sh makes tlbridge_uv.ko and \
                 gru.ko for a kernel, --module loads them"
            );
        }
    }
    for module in &args.module {
        files.add_module(lab, module)?;
    }
    for program in &args.program {
        files.add_program(program)?;
    }
    for file in &args.file {
        let name = file_name(file)?;
        files.add_copy(&format!("root/{name}"), file)?;
    }
    let mut words = args.command.clone();
    if let Some(first) = words.first_mut()
        && first.contains('/')
        && !files.contains(first)
        && Path::new(first.as_str()).is_file()
    {
        let program = PathBuf::from(first.as_str());
        files.add_program(&program)?;
        *first = file_name(&program)?.to_owned();
    }
    let command: Vec<String> = words.iter().map(|w| quoted(w)).collect();
    Ok((files, (!command.is_empty()).then(|| command.join(" "))))
}

/// What the guest has beside busybox.
fn kind(args: &VmArgs) -> GuestKind {
    let of_the_model = args.model.map_or(GuestKind::Small, VmModel::guest);
    args.guest.unwrap_or(of_the_model)
}

fn device_args(args: &VmArgs) -> Vec<OsString> {
    let mut all = Vec::new();
    if let Some(doorbell) = args.doorbell {
        all.extend(args!["--doorbell", name(doorbell)]);
    }
    all.extend(args.device_arg.iter().cloned());
    all
}

/// In the lab if that belongs to this user.
fn default_log(lab: &Lab) -> PathBuf {
    let name = format!("vm-{}.log", std::process::id());
    let directory = lab.directory().join("logs");
    match std::fs::create_dir_all(&directory).and_then(|()| std::fs::write(directory.join(&name), "")) {
        Ok(()) => directory.join(name),
        Err(_) => std::env::temp_dir().join(format!("tlbridge-{name}")),
    }
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|n| n.to_str())
        .with_context(|| format!("{} has no name that the guest could use", path.display()))
}

/// As one word of the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_word_when_quoted_is_one_word_of_the_shell() {
        for word in ["", "a b", "it's", "$(reboot)", "\"", "\\", "*"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
