//! The process at the other end.
#![allow(unsafe_code)] // getsockopt(SO_PEERPIDFD), which rustix does not have.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// `SO_PEERPIDFD`, Linux 6.5 (`include/uapi/asm-generic/socket.h`).
const SO_PEERPIDFD: libc::c_int = 77;

#[derive(Debug)]
pub(super) struct Peer {
    /// For messages.
    pub(super) pid: Option<u32>,
    /// Readable when the process is gone. `None` when it is this process, or nothing can be found out.
    pub(super) pidfd: Option<OwnedFd>,
    /// A duplicate of the socket, to look at without the transport's lock.
    socket: Option<OwnedFd>,
}

impl Peer {
    pub(super) fn of(socket: &OwnedFd) -> Self {
        let pid = socket_peercred(socket).ok().map(|credentials| credentials.pid);
        let pidfd = match pid {
            Some(pid) if pid == getpid() => None,
            // By number only where the kernel cannot do better: the number may have a new owner by now.
            _ => peer_pidfd(socket).or_else(|| pidfd_open(pid?, PidfdFlags::empty()).ok()),
        };
        let pid = pid.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
        Self {
            pid,
            pidfd,
            socket: socket.try_clone().ok(),
        }
    }

    /// The connection is closed at the other end, or the process is gone.
    pub(super) fn hung_up(&self) -> bool {
        let readable = |fd: &OwnedFd, flags| {
            let mut fds = [PollFd::new(fd, flags)];
            matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
        };
        self.socket
            .as_ref()
            .is_some_and(|fd| readable(fd, PollFlags::RDHUP))
            || self.pidfd.as_ref().is_some_and(|fd| readable(fd, PollFlags::IN))
    }
}

fn peer_pidfd(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option value is one int; `fd` and `len` are valid for writes of their sizes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result != 0 || fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
