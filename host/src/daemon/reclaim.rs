//! The reclaim thread: one attempt a period, over the sessions in turn.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::config::ReclaimConfig;
use super::core::Core;
use crate::notifier::MaySleep;

/// The thread; stopped and joined when dropped.
#[derive(Debug)]
pub(super) struct ReclaimThread {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl ReclaimThread {
    pub(super) fn start(core: Arc<Core>, config: ReclaimConfig) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let thread_stop = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("reclaim".into())
            .spawn(move || {
                let token = MaySleep::claim("reclaim thread");
                let period = Timespec {
                    tv_sec: i64::try_from(config.period.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: config.period.subsec_nanos().into(),
                };
                let mut turn = 0usize;
                loop {
                    let mut fds = [PollFd::from_borrowed_fd(thread_stop.as_fd(), PollFlags::IN)];
                    if matches!(poll(&mut fds, Some(&period)), Ok(n) if n > 0) {
                        return;
                    }
                    let reclaimers: Vec<_> = core
                        .sessions()
                        .iter()
                        .filter_map(|s| s.space.reclaimer().cloned())
                        .collect();
                    if let Some(reclaimer) = reclaimers.get(turn % reclaimers.len().max(1)) {
                        // Failures are counted and logged there; the next attempt picks another piece.
                        if let Err(error) = reclaimer.reclaim_one(&token) {
                            tracing::debug!(%error, "reclaim");
                        }
                    }
                    turn = turn.wrapping_add(1);
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ReclaimThread {
    fn drop(&mut self) {
        // Its only failure is overflow, and then the thread has been told.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the reclaim thread panicked");
        }
    }
}
