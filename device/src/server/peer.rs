//! The client's process, for messages.
#![allow(unsafe_code)] // getsockopt(SO_PEERCRED): rustix' type cannot hold the pid 0 that it may give.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(Option<(i32, u32)>);

impl Peer {
    pub(super) fn of(socket: &OwnedFd) -> Self {
        let mut credentials = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: `credentials` is valid for writes of `len` bytes, `len` for reads and writes; a ucred is
        // three integers, so any bytes are valid.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut credentials).cast(),
                &raw mut len,
            )
        };
        Self((result == 0).then_some((credentials.pid, credentials.uid)))
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            // Not shown in this pid namespace.
            Some((0, uid)) => write!(f, "a process of uid {uid}"),
            Some((pid, uid)) => write!(f, "pid {pid} (uid {uid})"),
            None => f.write_str("an unknown process"),
        }
    }
}
