//! The daemon: one device, one control socket, many sessions.

mod config;
mod core;
mod device_fence;
mod device_watch;
pub mod iova;
mod listener;
mod readiness;
mod reclaim;
mod serve;

pub use self::core::{Core, Options};
pub use self::listener::Listener;
pub use config::{DEFAULT_FENCE_TIMEOUT, HostConfig, Ready, ReadyCallback, ReclaimConfig, Stop, StopHandle};

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use driver::backing::Backing;
use driver::gru::{Gru, GruOptions};
use driver::vfio::VfioDevice;
use driver::vfio_user::VfioUserClient;

use self::device_fence::DeviceFence;
use self::reclaim::ReclaimThread;
use self::serve::Ending;
use crate::fence::Fence;
use crate::session::identity::own_pidfd;
use crate::uffd::Injection;

/// Why a daemon ended, other than being told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The device cannot be reached.
    #[error("cannot connect to the device at {path}: {reason}; start one with `tlbridge device --model gru --socket {path}`", path = path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A device of `/dev/vfio` cannot be had.
    #[error(transparent)]
    Vfio(#[from] driver::vfio::OpenError),
    /// The device is not one that the daemon can drive.
    #[error("the device at {path} cannot be used: {reason}", path = path.display())]
    Device {
        /// Its socket.
        path: PathBuf,
        /// What its driver said.
        reason: String,
    },
    /// The control socket cannot be made.
    #[error("cannot listen on {path}: {reason}", path = path.display())]
    Listen {
        /// The control socket.
        path: PathBuf,
        /// Why, and the way out.
        reason: String,
    },
    /// The device process went away while the daemon used it.
    #[error("the device at {path}{} is gone: {reason}", pid.map(|p| format!(" (pid {p})")).unwrap_or_default(), path = path.display())]
    DeviceLost {
        /// Its socket.
        path: PathBuf,
        /// Its pid, if known.
        pid: Option<u32>,
        /// What was seen.
        reason: String,
    },
    /// A system call that the daemon depends on failed.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What follows `vfio:` in the name of a device: its PCI address. `None` = it is the path of a socket.
#[must_use]
pub fn vfio_address(device: &Path) -> Option<&str> {
    device.to_str()?.strip_prefix("vfio:")
}

/// Connects to the device at `config.device` and serves sessions until `stop`, or until the device is gone.
/// Blocks the calling thread.
///
/// # Errors
/// [`DaemonError`]. A stop that was asked for is `Ok`.
pub fn run(config: HostConfig, stop: Stop) -> Result<(), DaemonError> {
    if let Some(address) = vfio_address(&config.device) {
        let backing = VfioDevice::open(address)?;
        return run_with_backing(config, Arc::new(backing), stop);
    }
    let backing = VfioUserClient::connect(&config.device).map_err(|error| DaemonError::Connect {
        path: config.device.clone(),
        reason: error.to_string(),
    })?;
    run_with_backing(config, Arc::new(backing), stop)
}

/// As [`run`], over a device that is reached in another way (an in-process device, in tests).
///
/// # Errors
/// As [`run`].
pub fn run_with_backing(
    config: HostConfig,
    backing: Arc<dyn Backing>,
    stop: Stop,
) -> Result<(), DaemonError> {
    let system = |what| move |source| DaemonError::System { what, source };
    let timeout = (!config.fence_timeout.is_zero()).then_some(config.fence_timeout);
    let fence = Arc::new(Fence::new(timeout));
    let device_fence = DeviceFence::start(&backing, &fence, config.fence_timeout)
        .map_err(system("starting the thread that fences the device"))?;
    let (_device_fence, on_stall) = device_fence.unzip();
    let mut options = GruOptions {
        on_stall,
        ..GruOptions::default()
    };
    if let Some(timeout) = timeout {
        // Asked often enough for the timeout to mean what it says.
        options.stall_after = options.stall_after.min(timeout / 2).max(Duration::from_millis(1));
    }
    let gru = Gru::open(backing.clone(), options).map_err(|error| DaemonError::Device {
        path: config.device.clone(),
        reason: error.to_string(),
    })?;
    // After the device, so that a path that exists means a daemon that works.
    let listener = Listener::bind(&config.socket)?;
    let core = Core::new(
        Options {
            uffd_mode: config.uffd_mode,
            fence_timeout: config.fence_timeout,
            reclaim: config.reclaim,
            large_pages: config.large_pages,
            keep_held_pages: config.break_held_pages,
            injection: Injection {
                purge_late: config.break_safety_net,
                delay: config.safety_net_delay,
            },
        },
        gru,
        fence,
        own_pidfd().map_err(system("pidfd of this process"))?,
    );
    let _reclaim = match config.reclaim {
        Some(reclaim) => {
            Some(ReclaimThread::start(core.clone(), reclaim).map_err(system("starting the reclaim thread"))?)
        }
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("control")
        .build()
        .map_err(system("starting the control plane"))?;
    tracing::info!(socket = %config.socket.display(), device_pid = backing.pid(), "accepting sessions");
    if let Some(ready) = config.ready {
        (ready.0)(&Ready {
            socket: config.socket.clone(),
            device_pid: backing.pid(),
        });
    }
    let ending = runtime
        .block_on(serve::serve(core, listener, stop))
        .map_err(system("the control plane"))?;
    // Sessions that did not close in time have been named; their threads must not keep the daemon.
    runtime.shutdown_background();
    match ending {
        Ending::Stopped => Ok(()),
        Ending::DeviceGone(reason) => Err(DaemonError::DeviceLost {
            path: config.device,
            pid: backing.pid(),
            reason,
        }),
    }
}
