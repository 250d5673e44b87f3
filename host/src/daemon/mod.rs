//! The daemon: one device, one control socket, many sessions.

mod config;
pub mod iova;
mod listener;

pub use config::{DEFAULT_FENCE_TIMEOUT, HostConfig, Ready, ReadyCallback, ReclaimConfig, Stop, StopHandle};

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use driver::backing::Backing;

/// Why a daemon ended, other than being told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The device cannot be reached.
    #[error("cannot connect to the device at {path}: {source}; start one with `tlbridge device --model gru --socket {path}`", path = path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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

/// Connects to the device at `config.device` and serves sessions until `stop`, or until the device is gone.
/// Blocks the calling thread.
///
/// # Errors
/// [`DaemonError`]. A stop that was asked for is `Ok`.
pub fn run(config: HostConfig, stop: Stop) -> Result<(), DaemonError> {
    let _ = (config, stop);
    unimplemented!("filled in below")
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
    let _ = (config, backing, stop);
    unimplemented!("filled in below")
}
