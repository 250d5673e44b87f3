//! Reading and writing messages on a stream socket.
//!
//! A read takes as many bytes as the next message is likely to have, so that most messages cost one system
//! call. It may run into the message after that, which raises the question of whose the file descriptors
//! are: see [`Receiver`].
//!
//! What runs for every message is inlined into the connection's loop, system calls included. The kernel leaves
//! nothing of the processor's return predictions, so each function that returns after a system call it made costs
//! about half a microsecond (measured on Zen 4 with Safe RET: 6% of a round trip).

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

/// When `timeout` from now is over.
pub(super) fn deadline(timeout: Duration) -> Instant {
    // Any clock can add an hour.
    Instant::now() + timeout.min(Duration::from_secs(3600))
}

/// Wait until `socket` is readable. Nothing is waited for when `until` has passed, readable or not: a client
/// that always has a byte more is no better than a silent one.
#[cold]
pub(super) fn wait_readable(socket: &OwnedFd, until: Instant, what: &'static str) -> Result<(), Ended> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Ended::Timeout(what));
        }
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
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

/// Bytes of a read after a posted write: these come in bursts, with no answer to wait for.
const BURST: usize = 4096;

/// The bytes that have been read and not used yet.
///
/// **Whose file descriptors?** They travel with the bytes of one sendmsg. The kernel joins these to bytes
/// sent before them that carried none, and ends the read with them (`unix_stream_read_generic` in
/// net/unix/af_unix.c stops after a buffer that had file descriptors). So the bytes they came with are the
/// *last* of the read, and they belong to the message that the read's last byte belongs to. The one thing that
/// this takes for granted is that nobody sends a message with file descriptors and the next message in one
/// sendmsg; even that works unless the read was a long one, after a region access.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Grows to the largest message seen, which is bounded.
    buffer: Vec<u8>,
    /// Where the message being looked at starts in `buffer`.
    start: usize,
    /// Bytes from there on.
    filled: usize,
    /// Bytes of the message being looked at, once its header is there.
    current: usize,
    /// What the next message is likely to need.
    expected: usize,
    /// File descriptors that came with a message after the current one, which starts so far behind `start`.
    ahead: Option<(usize, Fds)>,
    /// When the message being looked at has to be complete. Set when it is found to come in parts: most come
    /// whole, and need no clock.
    deadline: Option<Instant>,
    /// How long to ask again and again before waiting; see [`super::ServerOptions::busy_poll`].
    busy_poll: Duration,
}

impl Receiver {
    pub(super) fn new(busy_poll: Duration) -> Self {
        Self {
            buffer: vec![0; BURST],
            start: 0,
            filled: 0,
            current: 0,
            expected: FIRST_READ,
            ahead: None,
            deadline: None,
            busy_poll,
        }
    }

    /// The next message's header; `fds` become the file descriptors that have come with the message so far.
    /// Waits for ever for the first byte; `timeout` is for all the rest, however many parts it comes in.
    #[inline(always)]
    pub(super) fn next(
        &mut self,
        socket: &OwnedFd,
        fds: &mut Fds,
        timeout: Duration,
    ) -> Result<Header, Ended> {
        fds.clear();
        let used = self.current.min(self.filled);
        self.start += used;
        self.filled -= used;
        self.current = 0;
        self.deadline = None;
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
            Command::REGION_WRITE if header.no_reply() => BURST,
            Command::REGION_READ | Command::REGION_WRITE if self.current <= MAX_EXPECTED => {
                self.current.max(FIRST_READ)
            }
            _ => FIRST_READ,
        };
        Ok(header)
    }

    /// The body of the message whose header has been returned, `len` bytes as that header says.
    #[inline(always)]
    pub(super) fn body(
        &mut self,
        socket: &OwnedFd,
        len: usize,
        fds: &mut Fds,
        timeout: Duration,
    ) -> Result<&[u8], Ended> {
        let end = Header::SIZE + len;
        if self.filled < end {
            self.rest(socket, end, fds, timeout)?;
        }
        Ok(&self.buffer[self.start..][Header::SIZE..end])
    }

    /// Bytes of the next message are here already.
    pub(super) fn has_begun(&self) -> bool {
        self.filled > self.current
    }

    /// The header so far behind `start`.
    fn header_at(&self, at: usize) -> Header {
        let bytes = &self.buffer[self.start + at..][..Header::SIZE];
        Header::read_from_bytes(bytes).expect("16 bytes are a header")
    }

    /// Read to the message's end and no further.
    #[inline(never)]
    fn rest(&mut self, socket: &OwnedFd, end: usize, fds: &mut Fds, timeout: Duration) -> Result<(), Ended> {
        while self.filled < end {
            self.read(socket, end, fds, timeout, "send the rest of a message")?;
        }
        Ok(())
    }

    /// Read once, up to `until` bytes from `start` on.
    #[inline(always)]
    fn read(
        &mut self,
        socket: &OwnedFd,
        until: usize,
        fds: &mut Fds,
        timeout: Duration,
        what: &'static str,
    ) -> Result<(), Ended> {
        self.buffer.copy_within(self.start..self.start + self.filled, 0);
        self.start = 0;
        if self.buffer.len() < until {
            self.buffer.resize(until, 0);
        }
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
                Err(Errno::AGAIN) => {
                    let until = *self.deadline.get_or_insert_with(|| deadline(timeout));
                    wait_readable(socket, until, what)?;
                }
                Err(Errno::CONNRESET) if idle => return Err(Ended::Closed),
                Err(errno) => return Err(Ended::Socket(errno)),
            }
        };
        if message.bytes == 0 {
            return Err(if idle { Ended::Closed } else { Ended::Truncated });
        }
        self.filled += message.bytes;
        // None, nearly always: room for them is made when there is one.
        let mut received: Option<Fds> = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(list) = message {
                list.for_each(|fd| received.get_or_insert_default().push(fd));
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            received.get_or_insert_default().overflow = true;
        }
        if let Some(received) = received {
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

    /// How far behind `start` the last message starts.
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
#[inline(always)]
pub(super) fn send_message(socket: &OwnedFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Ended> {
    let mut sent = 0;
    if !fds.is_empty() {
        sent = send_with_fds(socket, message, fds)?;
    }
    while sent < message.len() {
        sent += retry_on_intr(|| send(socket, &message[sent..], SendFlags::NOSIGNAL)).map_err(send_error)?;
    }
    Ok(())
}

/// Send a message that is in pieces.
pub(super) fn send_pieces(socket: &OwnedFd, mut pieces: &mut [IoSlice<'_>]) -> Result<(), Ended> {
    IoSlice::advance_slices(&mut pieces, 0);
    while !pieces.is_empty() {
        let mut control = SendAncillaryBuffer::default();
        let sent = retry_on_intr(|| sendmsg(socket, pieces, &mut control, SendFlags::NOSIGNAL));
        IoSlice::advance_slices(&mut pieces, sent.map_err(send_error)?);
    }
    Ok(())
}

/// Send the beginning of a message, with its file descriptors. Returns the bytes sent.
#[inline(never)]
fn send_with_fds(socket: &OwnedFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Ended> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(
        control.push(SendAncillaryMessage::ScmRights(fds)),
        "a reply carries at most {MAX_FDS} fds"
    );
    let all = [IoSlice::new(message)];
    let result = retry_on_intr(|| sendmsg(socket, &all, &mut control, SendFlags::NOSIGNAL));
    result.map_err(send_error)
}

#[cold]
fn send_error(errno: Errno) -> Ended {
    match errno {
        // SO_SNDTIMEO.
        Errno::AGAIN => Ended::Timeout("take an answer"),
        Errno::PIPE | Errno::CONNRESET => Ended::Closed,
        errno => Ended::Socket(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use protos::vfio_user::MessageFlags;
    use rustix::io::ioctl_fionread;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use zerocopy::IntoBytes;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    /// Command, payload bytes, file descriptors (an odd number of bytes of a write: posted). Among them everything that is short, everything that comes in
    /// runs (and so makes the next read longer) and everything that carries file descriptors.
    const KINDS: [(Command, usize, usize); 8] = [
        (Command::DEVICE_RESET, 0, 0),
        (Command::REGION_READ, 16, 0),
        (Command::REGION_WRITE, 24, 0),
        (Command::REGION_WRITE, MAX_EXPECTED - 16, 0),
        (Command::REGION_WRITE, 300, 0),
        (Command::REGION_WRITE, 17, 0),
        (Command::DMA_MAP, 32, 1),
        (Command::DEVICE_SET_IRQS, 20, 2),
    ];

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    /// A message whose payload can be told from its neighbours'.
    fn message(id: usize, kind: usize) -> Vec<u8> {
        let (command, payload, _) = KINDS[kind];
        let flags = if payload % 2 == 1 {
            MessageFlags::NO_REPLY
        } else {
            MessageFlags::COMMAND
        };
        let header = Header::command(id as u16, command, payload, flags);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend((0..payload).map(|at| (at + 37 * id) as u8));
        bytes
    }

    fn send_with(socket: &OwnedFd, bytes: &[u8], fds: usize) {
        if !bytes.is_empty() {
            let list = vec![socket.as_fd(); fds];
            send_message(socket, bytes, &list).unwrap();
        }
    }

    /// The sequence number `n` of all those of `len` kinds.
    fn sequence(mut n: usize, len: usize) -> Vec<usize> {
        (0..len)
            .map(|_| {
                let kind = n % KINDS.len();
                n /= KINDS.len();
                kind
            })
            .collect()
    }

    fn expect(receiver: &mut Receiver, socket: &OwnedFd, kinds: &[usize], case: &str) {
        let mut fds = Fds::default();
        for (id, &kind) in kinds.iter().enumerate() {
            let (command, payload, count) = KINDS[kind];
            let header = receiver.next(socket, &mut fds, TIMEOUT).unwrap();
            assert_eq!(
                (header.message_id, header.command),
                (id as u16, command),
                "{case}"
            );
            let body = receiver.body(socket, payload, &mut fds, TIMEOUT).unwrap();
            assert_eq!(body, &message(id, kind)[16..], "{case}, message {id}");
            assert_eq!((fds.len(), fds.overflow), (count, false), "{case}, message {id}");
        }
    }

    /// Sends the messages, the one that has the byte `cut` of the stream in two pieces; `between` is called
    /// between these.
    fn send_cut(socket: &OwnedFd, kinds: &[usize], cut: usize, mut between: impl FnMut()) {
        let mut start = 0;
        for (id, &kind) in kinds.iter().enumerate() {
            let bytes = message(id, kind);
            let at = cut.saturating_sub(start).min(bytes.len());
            start += bytes.len();
            if at == 0 || at == bytes.len() {
                send_with(socket, &bytes, KINDS[kind].2);
                continue;
            }
            send_with(socket, &bytes[..at], KINDS[kind].2);
            between();
            send_with(socket, &bytes[at..], 0);
        }
    }

    #[test]
    fn test_messages_when_glued_and_cut_anywhere_keep_their_file_descriptors() {
        for n in 0..KINDS.len().pow(3) {
            let kinds = sequence(n, 3);
            let total: usize = kinds.iter().map(|&kind| 16 + KINDS[kind].1).sum();
            // Where reads can end: everything near the start, and samples of long payloads.
            for cut in (0..total).filter(|cut| *cut < 150 || cut % 17 == 0) {
                let (here, there) = pair();
                send_cut(&there, &kinds, cut, || {});
                let mut receiver = Receiver::new(Duration::ZERO);
                expect(&mut receiver, &here, &kinds, &format!("{kinds:?} cut at {cut}"));
                assert_eq!(ioctl_fionread(&here), Ok(0));
                assert_eq!(receiver.filled, receiver.current, "bytes are left over");
            }
        }
    }

    #[test]
    fn test_messages_when_the_rest_comes_later_keep_their_file_descriptors() {
        for busy_poll in [Duration::ZERO, Duration::from_millis(1)] {
            for n in 0..KINDS.len().pow(2) {
                let kinds = sequence(n, 2);
                let total: usize = kinds.iter().map(|&kind| 16 + KINDS[kind].1).sum();
                for cut in [1, 15, 16, 17, 31, 32, 33, 36, 47, 48, 49, 60, 70, 100, 200].into_iter() {
                    if cut >= total {
                        continue;
                    }
                    let (here, there) = pair();
                    std::thread::scope(|scope| {
                        let reader = &here;
                        let kinds = &kinds;
                        scope.spawn(move || {
                            send_cut(&there, kinds, cut, || {
                                // What was sent has been read: the rest is a read of its own.
                                while ioctl_fionread(reader) != Ok(0) {
                                    std::thread::yield_now();
                                }
                            });
                        });
                        let mut receiver = Receiver::new(busy_poll);
                        expect(&mut receiver, &here, kinds, &format!("{kinds:?} cut at {cut}"));
                    });
                }
            }
        }
    }

    #[test]
    fn test_file_descriptors_when_they_come_in_the_middle_belong_to_that_message() {
        for first in [5, 16, 20, 47] {
            let (here, there) = pair();
            let bytes = message(0, 6);
            send_with(&there, &bytes[..first], 0);
            send_with(&there, &bytes[first..], 1);
            send_with(&there, &message(1, 1), 0);
            let mut receiver = Receiver::new(Duration::ZERO);
            expect(&mut receiver, &here, &[6, 1], &format!("cut at {first}"));
        }
    }

    #[test]
    fn test_file_descriptors_when_too_many_for_one_message_do_not_touch_the_next() {
        let (here, there) = pair();
        let bytes = message(0, 6);
        // Two bytes with file descriptors each: more than one message may have.
        for chunk in bytes.chunks(2) {
            send_with(&there, chunk, 1);
        }
        send_with(&there, &message(1, 7), 2);
        let (mut receiver, mut fds) = (Receiver::new(Duration::ZERO), Fds::default());
        receiver.next(&here, &mut fds, TIMEOUT).unwrap();
        receiver.body(&here, 32, &mut fds, TIMEOUT).unwrap();
        assert_eq!((fds.len(), fds.overflow), (MAX_FDS, true));
        receiver.next(&here, &mut fds, TIMEOUT).unwrap();
        receiver.body(&here, 20, &mut fds, TIMEOUT).unwrap();
        assert_eq!((fds.len(), fds.overflow), (2, false));
    }

    #[test]
    fn test_receive_when_the_peer_leaves_says_whether_a_message_was_cut() {
        for (sent, closed) in [(0, true), (1, false), (16, false), (31, false), (32, true)] {
            let (here, there) = pair();
            send_with(&there, &message(0, 1)[..sent], 0);
            drop(there);
            let (mut receiver, mut fds) = (Receiver::new(Duration::ZERO), Fds::default());
            let ended = loop {
                if let Err(ended) = receiver.next(&here, &mut fds, TIMEOUT) {
                    break ended;
                }
                if let Err(ended) = receiver.body(&here, 16, &mut fds, TIMEOUT) {
                    break ended;
                }
            };
            let expected = if closed {
                matches!(ended, Ended::Closed)
            } else {
                matches!(ended, Ended::Truncated)
            };
            assert!(expected, "{sent} bytes: {ended}");
        }
    }

    #[test]
    fn test_receive_when_the_rest_does_not_come_ends_in_time() {
        let (here, there) = pair();
        send_with(&there, &message(0, 1)[..20], 0);
        let (mut receiver, mut fds) = (Receiver::new(Duration::ZERO), Fds::default());
        let short = Duration::from_millis(20);
        receiver.next(&here, &mut fds, short).unwrap();
        let ended = receiver.body(&here, 16, &mut fds, short).unwrap_err();
        assert!(matches!(ended, Ended::Timeout(_)), "{ended}");
    }

    #[test]
    fn test_receive_when_a_byte_comes_now_and_then_ends_in_time() {
        let (here, there) = pair();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Each byte well within the limit, all of them far over it. Ends when the other end does.
                for byte in Header::command(0, Command::REGION_WRITE, 1 << 16, MessageFlags::COMMAND)
                    .as_bytes()
                    .iter()
                    .chain(std::iter::repeat_n(&0, 1 << 16))
                {
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                    send_with(&there, &[*byte], 0);
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            let (mut receiver, mut fds) = (Receiver::new(Duration::ZERO), Fds::default());
            let limit = Duration::from_millis(500);
            let ended = match receiver.next(&here, &mut fds, limit) {
                Ok(_) => receiver.body(&here, 1 << 16, &mut fds, limit).map(|_| ()),
                Err(ended) => Err(ended),
            };
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(matches!(ended, Err(Ended::Timeout(_))), "{ended:?}");
        });
    }
}
