//! Reading and writing messages on a stream socket.
//!
//! The header is read first, with its file descriptors, then the body: a larger read would glue messages
//! together, and file descriptors would come with the last one of them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use protos::vfio_user::{Header, HeaderError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};
use zerocopy::FromBytes;

/// File descriptors accepted in one message (`max_msg_fds`), and sent in one.
pub(super) const MAX_FDS: usize = 16;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("it closed the connection")]
    Closed,
    #[error("the server stops")]
    Stopped,
    #[error("it closed the connection in the middle of a message")]
    Truncated,
    #[error("it did not {0} in time")]
    Timeout(&'static str),
    #[error("its message cannot be delimited: {0}")]
    Header(#[from] HeaderError),
    #[error("socket error: {0}")]
    Socket(Errno),
}

/// The file descriptors of one message. What is not taken is closed.
#[derive(Debug, Default)]
pub(super) struct Fds {
    fds: [Option<OwnedFd>; MAX_FDS],
    len: usize,
    /// More came than are accepted.
    pub(super) overflow: bool,
}

impl Fds {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        for fd in &mut self.fds[..self.len] {
            *fd = None;
        }
        (self.len, self.overflow) = (0, false);
    }

    fn push(&mut self, fd: OwnedFd) {
        match self.fds.get_mut(self.len) {
            Some(slot) => {
                *slot = Some(fd);
                self.len += 1;
            }
            None => self.overflow = true,
        }
    }

    /// Take one; `None` when it is not there (any more).
    pub(super) fn take(&mut self, index: usize) -> Option<OwnedFd> {
        self.fds.get_mut(index)?.take()
    }

    /// Look at them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &OwnedFd> {
        self.fds[..self.len].iter().flatten()
    }
}

/// Wait until `socket` is readable.
pub(super) fn wait_readable(socket: &OwnedFd, timeout: Duration, what: &'static str) -> Result<(), Ended> {
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec {
        tv_sec: i64::from(i32::MAX),
        tv_nsec: 0,
    });
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        // A signal starts the time anew: signals are rare, and the limit is a protection, not a promise.
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(Ended::Timeout(what)),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Ended::Socket(errno)),
        }
    }
}

/// Read a header and its file descriptors. Waits for ever for the first byte; `timeout` is for the rest.
pub(super) fn recv_header(socket: &OwnedFd, fds: &mut Fds, timeout: Duration) -> Result<Header, Ended> {
    let mut bytes = [0; Header::SIZE];
    let mut filled = 0;
    while filled < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut bytes[filled..])];
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        if filled > 0 {
            flags |= RecvFlags::DONTWAIT;
        }
        let message = match recvmsg(socket, &mut iov, &mut control, flags) {
            Ok(message) => message,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                wait_readable(socket, timeout, "send the rest of a header")?;
                continue;
            }
            Err(Errno::CONNRESET) if filled == 0 => return Err(Ended::Closed),
            Err(errno) => return Err(Ended::Socket(errno)),
        };
        fds.overflow |= message.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                received.for_each(|fd| fds.push(fd));
            }
        }
        if message.bytes == 0 {
            return Err(if filled == 0 {
                Ended::Closed
            } else {
                Ended::Truncated
            });
        }
        filled += message.bytes;
    }
    Ok(Header::read_from_bytes(&bytes).expect("16 bytes are a header"))
}

/// Read a body. File descriptors that come in the middle of one are closed by the kernel.
pub(super) fn recv_body(socket: &OwnedFd, body: &mut [u8], timeout: Duration) -> Result<(), Ended> {
    let mut filled = 0;
    while filled < body.len() {
        match recv(socket, &mut body[filled..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(Ended::Truncated),
            Ok((_, bytes)) => filled += bytes,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_readable(socket, timeout, "send the rest of a message")?,
            Err(errno) => return Err(Ended::Socket(errno)),
        }
    }
    Ok(())
}

/// Send a message, and `fds` with its first byte.
pub(super) fn send_message(socket: &OwnedFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Ended> {
    let mut sent = 0;
    if !fds.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(
            control.push(SendAncillaryMessage::ScmRights(fds)),
            "a reply carries at most {MAX_FDS} fds"
        );
        let all = [IoSlice::new(message)];
        let result = retry_on_intr(|| sendmsg(socket, &all, &mut control, SendFlags::NOSIGNAL));
        sent = result.map_err(send_error)?;
    }
    while sent < message.len() {
        sent += retry_on_intr(|| send(socket, &message[sent..], SendFlags::NOSIGNAL)).map_err(send_error)?;
    }
    Ok(())
}

fn send_error(errno: Errno) -> Ended {
    match errno {
        // SO_SNDTIMEO.
        Errno::AGAIN => Ended::Timeout("take an answer"),
        Errno::PIPE | Errno::CONNRESET => Ended::Closed,
        errno => Ended::Socket(errno),
    }
}
