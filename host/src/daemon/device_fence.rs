//! A device that does not answer: fenced, from a thread that may sleep.
//!
//! The driver notices a stall in the middle of a flush, where nothing may sleep. There the only thing that
//! happens is a ring of this thread's bell; the flush goes on waiting until the device is *gone*.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use driver::backing::Backing;
use driver::gru::{OnStall, StallAction};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::fence::{Fence, Peer};
use crate::notifier::MaySleep;
use crate::session::identity::duplicate;

/// The thread.
#[derive(Debug)]
pub(super) struct DeviceFence {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

fn bell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn ring(bell: &OwnedFd) {
    // Its only failure is overflow, and then it has been rung.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

impl DeviceFence {
    /// Starts the thread. `None` when there is nothing to fence: no timeout, or a device in this process.
    pub(super) fn start(
        backing: &Arc<dyn Backing>,
        fence: &Arc<Fence>,
        timeout: Duration,
    ) -> io::Result<Option<(Self, OnStall)>> {
        let (Some(pidfd), false) = (backing.pidfd(), timeout.is_zero()) else {
            return Ok(None);
        };
        let peer = Peer {
            pid: backing.pid().unwrap_or(0),
            name: "the device".into(),
            pidfd: duplicate(pidfd)?,
        };
        let (stalled, stop) = (bell()?, bell()?);
        let ringer = stalled.try_clone()?;
        let on_stall: OnStall = Box::new(move |stall| {
            if stall.waited >= timeout {
                ring(&ringer);
            }
            // The driver sees by itself when the process has ended; a timeout alone proves nothing.
            StallAction::KeepWaiting
        });
        let thread_stop = stop.try_clone()?;
        let fence = fence.clone();
        let thread = std::thread::Builder::new()
            .name("device-fence".into())
            .spawn(move || {
                let token = MaySleep::claim("device-fence");
                loop {
                    let mut fds = [
                        PollFd::from_borrowed_fd(thread_stop.as_fd(), PollFlags::IN),
                        PollFd::from_borrowed_fd(stalled.as_fd(), PollFlags::IN),
                    ];
                    if poll(&mut fds, None).is_err() {
                        continue;
                    }
                    if !fds[0].revents().is_empty() {
                        return;
                    }
                    let why = format!("a handle has been busy for more than {timeout:?}");
                    if let Err(error) = fence.kill_and_wait(&peer, &why, &token) {
                        tracing::error!(%error, "the device cannot be fenced");
                    }
                    return;
                }
            })?;
        let this = Self {
            stop,
            thread: Some(thread),
        };
        Ok(Some((this, on_stall)))
    }
}

impl Drop for DeviceFence {
    fn drop(&mut self) {
        ring(&self.stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the device-fence thread panicked");
        }
    }
}
