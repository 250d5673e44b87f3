//! The process at the other end.
#![allow(unsafe_code)] // getsockopt of SO_PEERPIDFD (which rustix does not have) and SO_PEERCRED (see there).

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

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
        let pid = peer_pid(socket);
        let pidfd = match pid {
            Some(pid) if pid == getpid() => None,
            // By number only where the kernel cannot do better: the number may have a new owner by now.
            _ => peer_pidfd(socket).or_else(|| pidfd_open(pid?, PidfdFlags::empty()).ok()),
        };
        Self {
            pid: pid.map(|pid| pid.as_raw_nonzero().get().unsigned_abs()),
            pidfd,
            socket: socket.try_clone().ok(),
        }
    }

    /// The connection is closed at the other end, or the process is gone.
    pub(super) fn hung_up(&self) -> bool {
        let ready = |fd: &OwnedFd, flags| {
            let mut fds = [PollFd::new(fd, flags)];
            matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
        };
        self.socket.as_ref().is_some_and(|fd| ready(fd, PollFlags::RDHUP))
            || self.pidfd.as_ref().is_some_and(|fd| ready(fd, PollFlags::IN))
    }
}

/// # Safety
/// Any bytes that the kernel writes for the option are a valid `T`.
unsafe fn get_option<T>(socket: &OwnedFd, option: libc::c_int) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for writes of `len` bytes, `len` for reads and writes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 || len as usize != size_of::<T>() {
        return None;
    }
    // SAFETY: the kernel has written all of it, and the caller says that any value is valid.
    Some(unsafe { value.assume_init() })
}

/// The pid is 0 for a process that this pid namespace does not show, which rustix' type cannot say.
fn peer_pid(socket: &OwnedFd) -> Option<Pid> {
    // SAFETY: a ucred is three integers.
    let credentials: libc::ucred = unsafe { get_option(socket, libc::SO_PEERCRED)? };
    Pid::from_raw(credentials.pid).filter(|_| credentials.pid > 0)
}

fn peer_pidfd(socket: &OwnedFd) -> Option<OwnedFd> {
    // SAFETY: the value is an int.
    let fd: libc::c_int = unsafe { get_option(socket, SO_PEERPIDFD)? };
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}
