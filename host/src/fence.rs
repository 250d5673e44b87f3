//! Fencing: waiting for a peer that may never answer, without ever guessing.
//!
//! A peer that holds memory counts as *gone* only when its pidfd is readable: a process that is merely stopped
//! could resume in the middle of a copy, so a timeout alone proves nothing. At the timeout the peer is killed
//! (SIGKILL by pidfd, so never a recycled number) and the wait goes on until the kernel says that it is gone.
//! If killing is not permitted, the wait goes on and says so each second.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;

use crate::notifier::{MaySleep, might_sleep};

/// How often a wait that cannot end by itself is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A process that this one waits for.
#[derive(Debug)]
pub struct Peer {
    /// Its number, for messages and for /proc.
    pub pid: u32,
    /// What it is, for messages.
    pub name: String,
    /// The handle.
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Opens a handle to a running process.
    ///
    /// # Errors
    /// pidfd_open(2)'s; ESRCH when there is none.
    pub fn open(pid: u32, name: impl Into<String>) -> io::Result<Self> {
        let number = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Self {
            pid,
            name: name.into(),
            pidfd: pidfd_open(number, PidfdFlags::empty())?,
        })
    }

    /// Whether the kernel says that the process is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        is_gone(self, Duration::ZERO).unwrap_or(false)
    }
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<R> {
    /// The peer answered.
    Replied(R),
    /// The peer's process is gone, and with it everything that it had mapped.
    Gone {
        /// Whether it was killed here.
        killed: bool,
    },
}

/// What came of a look at the peer's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<R> {
    /// The answer.
    Reply(R),
    /// Nothing useful yet; look again when the channel is readable.
    NotYet,
    /// There is something to send and no room for it; look again when the channel is writable or readable.
    NoRoom,
    /// There will be no answer on this channel (hang-up, or the peer broke the protocol): fence it now.
    Never(String),
}

/// Sends a signal; replaceable so that a refusal can be tested.
type Kill = fn(&Peer) -> Result<(), Errno>;

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FenceStats {
    /// Peers killed.
    pub kills: u64,
    /// Peers found gone.
    pub gone: u64,
    /// Lines that said that a wait goes on.
    pub reports: u64,
}

/// How peers are fenced.
#[derive(Debug)]
pub struct Fence {
    timeout: Option<Duration>,
    kill: Kill,
    kills: AtomicU64,
    gone: AtomicU64,
    reports: AtomicU64,
}

impl Fence {
    /// Peers get `timeout` to answer; `None` = as long as they like.
    #[must_use]
    pub fn new(timeout: Option<Duration>) -> Self {
        Self {
            timeout,
            kill: |peer| pidfd_send_signal(&peer.pidfd, Signal::KILL),
            kills: AtomicU64::new(0),
            gone: AtomicU64::new(0),
            reports: AtomicU64::new(0),
        }
    }

    /// The timeout.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> FenceStats {
        FenceStats {
            kills: self.kills.load(Ordering::Relaxed),
            gone: self.gone.load(Ordering::Relaxed),
            reports: self.reports.load(Ordering::Relaxed),
        }
    }

    /// Waits until `look` finds the peer's answer on `channel`, or the peer is gone. `look` is called once at
    /// first and then whenever the channel is readable; it must not block.
    ///
    /// # Errors
    /// Only those of poll(2): a refused kill is waited out, not returned.
    pub fn wait<R>(
        &self,
        peer: &Peer,
        channel: BorrowedFd<'_>,
        token: &MaySleep,
        look: impl FnMut() -> Progress<R>,
    ) -> io::Result<Outcome<R>> {
        self.wait_since(Instant::now(), peer, channel, token, look)
    }

    /// As [`Self::wait`], for a peer that was asked at `asked`: several that were asked together get one timeout
    /// together, not one after the other.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_since<R>(
        &self,
        asked: Instant,
        peer: &Peer,
        channel: BorrowedFd<'_>,
        _token: &MaySleep,
        mut look: impl FnMut() -> Progress<R>,
    ) -> io::Result<Outcome<R>> {
        might_sleep("Fence::wait");
        let deadline = self.timeout.map(|timeout| asked + timeout);
        loop {
            let interest = match look() {
                Progress::Reply(reply) => return Ok(Outcome::Replied(reply)),
                Progress::NotYet => PollFlags::IN,
                Progress::NoRoom => PollFlags::IN | PollFlags::OUT,
                Progress::Never(why) => return self.fence(peer, &why),
            };
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                if let Some(who) = debugger(peer.pid) {
                    // A person is looking: neither side is expected to be in time.
                    self.report(peer, &format!("{who}; no fence while it is"));
                    let ready = wait_ready(
                        &[(channel, interest), (peer.pidfd.as_fd(), PollFlags::IN)],
                        Some(REPORT_EVERY),
                    )?;
                    if ready[1] && !ready[0] {
                        return Ok(self.found_gone(peer, false));
                    }
                    continue;
                }
                let why = format!("no answer within {:?}", self.timeout.unwrap_or_default());
                return self.fence(peer, &why);
            }
            let ready = wait_ready(&[(channel, interest), (peer.pidfd.as_fd(), PollFlags::IN)], left)?;
            // An answer that came before the end counts: look at the channel first.
            if ready[1] {
                return Ok(match look() {
                    Progress::Reply(reply) => Outcome::Replied(reply),
                    _ => self.found_gone(peer, false),
                });
            }
        }
    }

    /// Kills the peer and waits until it is gone.
    ///
    /// # Errors
    /// poll(2)'s.
    pub fn kill_and_wait(&self, peer: &Peer, why: &str, _token: &MaySleep) -> io::Result<bool> {
        might_sleep("Fence::kill_and_wait");
        match self.fence::<()>(peer, why)? {
            Outcome::Gone { killed } => Ok(killed),
            Outcome::Replied(()) => Ok(false),
        }
    }

    fn fence<R>(&self, peer: &Peer, why: &str) -> io::Result<Outcome<R>> {
        if is_gone(peer, Duration::ZERO)? {
            return Ok(self.found_gone(peer, false));
        }
        let mut killed = false;
        loop {
            if !killed {
                match (self.kill)(peer) {
                    Ok(()) => {
                        killed = true;
                        self.kills.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(pid = peer.pid, peer = %peer.name, why, "fenced: killed");
                    }
                    Err(Errno::SRCH) => {}
                    Err(errno) => self.report(
                        peer,
                        &format!("{why}, and killing it failed ({errno}); still waiting for its end"),
                    ),
                }
            } else {
                self.report(peer, &format!("{why}; killed, and still not gone"));
            }
            if is_gone(peer, REPORT_EVERY)? {
                return Ok(self.found_gone(peer, killed));
            }
        }
    }

    fn found_gone<R>(&self, peer: &Peer, killed: bool) -> Outcome<R> {
        self.gone.fetch_add(1, Ordering::Relaxed);
        tracing::info!(pid = peer.pid, peer = %peer.name, killed, "peer is gone");
        Outcome::Gone { killed }
    }

    fn report(&self, peer: &Peer, text: &str) {
        self.reports.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(pid = peer.pid, peer = %peer.name, "waiting: {text}");
    }
}

/// Who is being debugged, if the peer or this process is.
fn debugger(pid: u32) -> Option<String> {
    if let Some(tracer) = tracer_of(&pid.to_string()) {
        return Some(format!("the peer is traced by process {tracer}"));
    }
    let tracer = tracer_of("self")?;
    Some(format!("this process is traced by process {tracer}"))
}

/// TracerPid of `/proc/PID/status`, proc_pid_status(5); `None` when there is none.
fn tracer_of(pid: &str) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse_tracer(&status)
}

fn parse_tracer(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|pid| *pid != 0)
}

/// Waits for the peer's end for at most `timeout`.
fn is_gone(peer: &Peer, timeout: Duration) -> io::Result<bool> {
    Ok(wait_ready(&[(peer.pidfd.as_fd(), PollFlags::IN)], Some(timeout))?[0])
}

/// Which of the descriptors are ready (or hung up, or in error) before the time is over. At most two.
fn wait_ready(fds: &[(BorrowedFd<'_>, PollFlags)], timeout: Option<Duration>) -> io::Result<[bool; 2]> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|(fd, interest)| PollFd::from_borrowed_fd(*fd, *interest))
        .collect();
    let timeout = timeout.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok([false; 2]),
        Err(errno) => return Err(errno.into()),
    }
    let ready = |index: usize| polled.get(index).is_some_and(|p| !p.revents().is_empty());
    Ok([ready(0), ready(1)])
}

#[cfg(test)]
#[path = "fence_tests.rs"]
mod tests;
