//! What the daemon is told when it starts, and how it is told to stop.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use protos::bridge::control::UffdMode;
use rustix::event::{EventfdFlags, eventfd};

/// Default of [`HostConfig::fence_timeout`].
pub const DEFAULT_FENCE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a host daemon behaves. [`HostConfig::new`] fills in the defaults.
#[derive(Debug)]
pub struct HostConfig {
    /// Path of the control socket (SOCK_SEQPACKET, mode 0600). A file that a dead daemon left there is
    /// replaced; a live daemon is an error that names its pid.
    pub socket: PathBuf,
    /// Path of the device's vfio-user socket.
    pub device: PathBuf,
    /// How agents have to register memory with userfaultfd. Default: [`UffdMode::Wp`].
    pub uffd_mode: UffdMode,
    /// After this long without an answer a peer (attached process, device) is fenced, that is killed and
    /// seen to be gone. Zero = never. Default: 5 s.
    pub fence_timeout: Duration,
    /// Discard purgeable memory now and then, with non-blockable invalidations. Default: off.
    pub reclaim: Option<ReclaimConfig>,
    /// For experiments only: the safety net reads the event first and purges afterwards, which lets the
    /// application's system call return while stale translations are alive. Default: off.
    pub break_safety_net: bool,
    /// For experiments only: pages that the kernel holds for a device of `/dev/vfio` stay the device's while they
    /// are discarded. Default: off.
    pub break_held_pages: bool,
    /// Delay of the safety net, for experiments: between `read()` and the purge when
    /// [`HostConfig::break_safety_net`] is set, else (the control) between readiness and the purge.
    pub safety_net_delay: Duration,
    /// Fill translations larger than 4 KiB (up to 2 MiB) where address, file offset and IOVA are
    /// congruent. Default: off.
    pub large_pages: bool,
    /// Called once, on the daemon's thread, when the socket accepts sessions.
    pub ready: Option<ReadyCallback>,
}

/// See [`HostConfig::ready`].
pub struct ReadyCallback(pub Box<dyn FnOnce(&Ready) + Send>);

impl fmt::Debug for ReadyCallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReadyCallback")
    }
}

/// What a daemon says about itself once it accepts sessions.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The control socket.
    pub socket: PathBuf,
    /// The device process, if it is another process and its pid is known.
    pub device_pid: Option<u32>,
}

/// The reclaimer: it plays the part of the kernel's OOM reaper, whose invalidations must not block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReclaimConfig {
    /// Time between two picks.
    pub period: Duration,
    /// Seed of the choice of ranges: the same seed makes the same picks.
    pub seed: u64,
}

impl HostConfig {
    /// A configuration with every default.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>, device: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            device: device.into(),
            uffd_mode: UffdMode::Wp,
            fence_timeout: DEFAULT_FENCE_TIMEOUT,
            reclaim: None,
            break_safety_net: false,
            break_held_pages: false,
            safety_net_delay: Duration::ZERO,
            large_pages: false,
            ready: None,
        }
    }

    /// Sets [`HostConfig::ready`].
    #[must_use]
    pub fn on_ready(mut self, ready: impl FnOnce(&Ready) + Send + 'static) -> Self {
        self.ready = Some(ReadyCallback(Box::new(ready)));
        self
    }
}

/// When the daemon ends.
#[derive(Debug)]
pub struct Stop(pub(super) StopSource);

#[derive(Debug)]
pub(super) enum StopSource {
    Fd(OwnedFd),
    Signals,
}

/// Ends the daemon that holds the other half. Dropping it does not.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<OwnedFd>);

impl Stop {
    /// A pair: the daemon ends when [`StopHandle::stop`] is called.
    ///
    /// # Errors
    /// No eventfd to be had (file limit).
    pub fn new() -> io::Result<(Self, StopHandle)> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let handle = StopHandle(Arc::new(fd.try_clone()?));
        Ok((Self(StopSource::Fd(fd)), handle))
    }

    /// Ends when `fd` becomes readable or hangs up (eventfd, pipe, signalfd, pidfd).
    #[must_use]
    pub fn when_readable(fd: OwnedFd) -> Self {
        Self(StopSource::Fd(fd))
    }

    /// Ends on SIGINT or SIGTERM (their handlers are installed while the daemon runs).
    #[must_use]
    pub fn on_signals() -> Self {
        Self(StopSource::Signals)
    }
}

impl StopHandle {
    /// Asks the daemon to end. May be called again, and from any thread.
    pub fn stop(&self) {
        // The counter's only failure is overflow, and then the daemon has been told already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for StopHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
