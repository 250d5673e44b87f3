//! `tlbridge vm`: a device process, a guest that has the device, and a command in it.

mod guests;
mod pack;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use lab::Lab;
use lab::guest::{Failure, Spec};
use lab::kernel::{Kernel, Series};

use crate::cli::{GuestKind, KernelSeries, VmArgs, VmModel};
use crate::demo::args;
use crate::stop::Stop;

pub use guests::default_log;

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
    // What is found out about KVM is found out with this one.
    let stable = lab.provide_kernel(Series::Stable)?;
    let kernel = match &args.kernel {
        None if series(args) == Series::Stable => stable,
        None => lab.provide_kernel(series(args))?,
        Some(image) => Kernel {
            image: image.clone(),
            modules: args.modules.clone(),
        },
    };
    let found = lab.acceleration()?;
    let (initramfs, command) = pack::pack(args, &lab, &kernel)?;
    let initramfs = initramfs.to_bytes()?;
    let image = match kind(args) {
        GuestKind::Debian => Some(lab.provide_image()?),
        GuestKind::Small | GuestKind::Rdma => None,
    };
    let machines = guests::prepare(args, &lab, stop, |log| {
        let mut spec = Spec::new(qemu.clone(), kernel.image.clone(), initramfs.clone(), log);
        spec.accelerator = found.accelerator;
        spec.boot = found.boot;
        spec.cpus = args.cpus;
        spec.memory_mib = args.memory;
        spec.append = args.append.clone();
        spec.qemu_arguments = args.qemu_arg.clone();
        spec.panic_on_oops = !args.survive_oops;
        spec.disks.extend(image.clone());
        if let Some(port) = args.gdb {
            debuggable(&mut spec, port, args.gdb_wait);
        }
        spec
    })?;
    guests::run(args, machines, command.as_deref(), stop)
}

/// Which of the stock kernels.
fn series(args: &VmArgs) -> Series {
    match args.kernel_series {
        KernelSeries::Stable => Series::Stable,
        KernelSeries::Backports => Series::Backports,
    }
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

/// What the guest has beside busybox.
fn kind(args: &VmArgs) -> GuestKind {
    let of_the_model = args.model.map_or(GuestKind::Small, VmModel::guest);
    args.guest.unwrap_or(of_the_model)
}
