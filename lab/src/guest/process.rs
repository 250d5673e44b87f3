//! A child process that ends with this one, and whose end can be waited for from any thread.
//!
//! `unsafe` is allowed here for the step between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

/// The child. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    /// Readable when the child has ended.
    pidfd: OwnedFd,
    keeper: Option<JoinHandle<io::Result<ExitStatus>>>,
}

impl Process {
    /// Starts it in a process group of its own, so that Ctrl-C reaches only this process.
    pub(super) fn start(mut command: Command) -> io::Result<Self> {
        let parent = rustix::process::getpid();
        command.process_group(0);
        // SAFETY: between fork and exec only async-signal-safe system calls are made: prctl and getppid.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // A parent that died before that call sends nothing any more.
                match rustix::process::getppid() {
                    Some(now) if now == parent => Ok(()),
                    _ => Err(io::ErrorKind::BrokenPipe.into()),
                }
            });
        }
        // The signal comes when the *thread* that forked ends: so a thread of its own forks and stays.
        let (sender, receiver) = mpsc::sync_channel(1);
        let keeper = std::thread::Builder::new().name("guest".into()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let kind = error.kind();
                    let _ = sender.send(Err(error));
                    return Err(kind.into());
                }
            };
            let opened = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
            if opened.is_err() {
                // Nobody could end it otherwise.
                let _ = child.kill();
            }
            let _ = sender.send(opened.map(|pidfd| (child.id(), pidfd)).map_err(Into::into));
            child.wait()
        })?;
        let (pid, pidfd) = receiver
            .recv()
            .map_err(|_| io::Error::other("the thread that starts it is gone"))??;
        Ok(Self {
            pid,
            pidfd,
            keeper: Some(keeper),
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end, at most until `deadline`; whether it has ended.
    pub(super) fn ended_by(&self, deadline: Instant) -> bool {
        loop {
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&left_until(deadline))) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll on a pidfd: {error}"),
            }
        }
    }

    pub(super) fn kill(&self) {
        // It may have ended by itself meanwhile.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end. `None`: somebody has asked before.
    pub(super) fn wait(&mut self) -> Option<ExitStatus> {
        let keeper = self.keeper.take()?;
        keeper.join().expect("waiting does not panic").ok()
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            self.kill();
            let _ = self.wait();
        }
    }
}

/// For poll.
pub(super) fn left_until(deadline: Instant) -> rustix::time::Timespec {
    let left: Duration = deadline.saturating_duration_since(Instant::now());
    rustix::time::Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}
