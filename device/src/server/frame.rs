//! Reading and writing messages on a stream socket.
//!
//! A read takes as many bytes as the next message is likely to have, so that most messages cost one system
//! call. It may run into the message after that, which raises the question of whose the file descriptors
//! are: see [`Receiver`].

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use protos::vfio_user::{Command, Header, HeaderError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
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

    fn append(&mut self, more: Self) {
        self.overflow |= more.overflow;
        more.fds.into_iter().flatten().for_each(|fd| self.push(fd));
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

/// Bytes of a first read when nothing is known about the next message: header and the head of a region
/// access. A command that may carry file descriptors is longer, so such a read never glues anything to one.
const FIRST_READ: usize = Header::SIZE + 16;

/// Longest message that is expected again after one of its kind: a region access with little data.
const MAX_EXPECTED: usize = 128;

/// The bytes that have been read and not used yet.
///
/// **Whose file descriptors?** They travel with the bytes of one sendmsg. The kernel joins these to bytes
/// sent before them that carried none, and ends the read with them (`unix_stream_read_generic` in
/// net/unix/af_unix.c stops after a buffer that had file descriptors). So the bytes they came with are the
/// *last* of the read, and they belong to the message that the read's last byte belongs to. A read is short
/// enough (see [`Receiver::next`]) that this one is at most a few small messages ahead.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Starts with the message being looked at; grows to the largest message seen, which is bounded.
    buffer: Vec<u8>,
    /// Bytes in `buffer`.
    filled: usize,
    /// Bytes of the message being looked at, once its header is there.
    current: usize,
    /// What the next message is likely to need.
    expected: usize,
    /// File descriptors that came with a message after the current one, which starts at that offset.
    ahead: Option<(usize, Fds)>,
    /// How long to ask again and again before waiting; see [`super::ServerOptions::busy_poll`].
    busy_poll: Duration,
}

impl Receiver {
    pub(super) fn new(busy_poll: Duration) -> Self {
        Self {
            buffer: vec![0; MAX_EXPECTED],
            filled: 0,
            current: 0,
            expected: FIRST_READ,
            ahead: None,
            busy_poll,
        }
    }

    /// The next message's header; `fds` become the file descriptors that have come with the message so far.
    /// Waits for ever for the first byte; `timeout` is for the rest.
    pub(super) fn next(
        &mut self,
        socket: &OwnedFd,
        fds: &mut Fds,
        timeout: Duration,
    ) -> Result<Header, Ended> {
        fds.clear();
        let used = self.current.min(self.filled);
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
        self.current = 0;
        match self.ahead.take() {
            Some((at, theirs)) if at == used => *fds = theirs,
            Some((at, theirs)) => self.ahead = Some((at - used, theirs)),
            None => {}
        }
        while self.filled < Header::SIZE {
            self.read(socket, self.expected, fds, timeout, "send the rest of a header")?;
        }
        let header = self.header_at(0);
        self.current = (header.message_size as usize).max(Header::SIZE);
        // Region accesses come in runs of one size. Anything else is rare.
        self.expected = match header.command {
            Command::REGION_READ | Command::REGION_WRITE if self.current <= MAX_EXPECTED => {
                self.current.max(FIRST_READ)
            }
            _ => FIRST_READ,
        };
        Ok(header)
    }

    /// The body of the message whose header has been returned, `len` bytes as that header says.
    pub(super) fn body(
        &mut self,
        socket: &OwnedFd,
        len: usize,
        fds: &mut Fds,
        timeout: Duration,
    ) -> Result<&[u8], Ended> {
        let end = Header::SIZE + len;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        while self.filled < end {
            // To the message's end and no further.
            self.read(socket, end, fds, timeout, "send the rest of a message")?;
        }
        Ok(&self.buffer[Header::SIZE..end])
    }

    fn header_at(&self, at: usize) -> Header {
        Header::read_from_bytes(&self.buffer[at..at + Header::SIZE]).expect("16 bytes are a header")
    }

    /// Read once, up to `until` bytes in the buffer.
    fn read(
        &mut self,
        socket: &OwnedFd,
        until: usize,
        fds: &mut Fds,
        timeout: Duration,
        what: &'static str,
    ) -> Result<(), Ended> {
        let idle = self.filled == 0;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut spin_until = (idle && !self.busy_poll.is_zero()).then(|| Instant::now() + self.busy_poll);
        let message = loop {
            let mut iov = [IoSliceMut::new(&mut self.buffer[self.filled..until])];
            let mut flags = RecvFlags::CMSG_CLOEXEC;
            if !idle || spin_until.is_some() {
                flags |= RecvFlags::DONTWAIT;
            }
            match recvmsg(socket, &mut iov, &mut control, flags) {
                Ok(message) => break message,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if idle => {
                    std::hint::spin_loop();
                    spin_until = spin_until.filter(|end| Instant::now() < *end);
                }
                Err(Errno::AGAIN) => wait_readable(socket, timeout, what)?,
                Err(Errno::CONNRESET) if idle => return Err(Ended::Closed),
                Err(errno) => return Err(Ended::Socket(errno)),
            }
        };
        if message.bytes == 0 {
            return Err(if idle { Ended::Closed } else { Ended::Truncated });
        }
        self.filled += message.bytes;
        let mut received = Fds {
            overflow: message.flags.contains(ReturnFlags::CTRUNC),
            ..Fds::default()
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(list) = message {
                list.for_each(|fd| received.push(fd));
            }
        }
        if received.len > 0 || received.overflow {
            match self.last_start() {
                0 => fds.append(received),
                at => {
                    let before = self.ahead.replace((at, received));
                    assert!(before.is_none(), "nothing is read while a whole message is there");
                }
            }
        }
        Ok(())
    }

    /// Where the last message in the buffer starts.
    fn last_start(&self) -> usize {
        let mut at = 0;
        while self.filled - at >= Header::SIZE {
            let size = self.header_at(at).message_size as usize;
            // A size below a header's, or one that is over the limit, ends the connection at that message.
            if size < Header::SIZE || size >= self.filled - at {
                break;
            }
            at += size;
        }
        at
    }
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
