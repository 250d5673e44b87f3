//! The hostile client's socket: it never waits for the server, and checks the form of what comes.

use std::collections::BTreeSet;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use protos::vfio_user::{Command, Header, MessageFlags, MessageType};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::actions::{MAX_DATA, Serving};
use super::live::Violation;

/// What was answered: command, errno, and the reply's size as its number of bits.
pub(super) type Seen = (u16, u32, u32);

pub(super) struct Peer {
    pub(super) socket: UnixStream,
    received: Vec<u8>,
    /// Sent together with the next message.
    glued: Vec<u8>,
    serving: Serving,
    pub(super) seen: BTreeSet<Seen>,
    /// The server has hung up, or takes nothing more.
    pub(super) over: bool,
}

impl Peer {
    pub(super) fn connect(path: &Path, serving: Serving) -> Result<Self, Violation> {
        let socket = UnixStream::connect(path).map_err(|e| Violation(format!("cannot connect: {e}")))?;
        socket
            .set_nonblocking(true)
            .map_err(|e| Violation(e.to_string()))?;
        Ok(Self {
            socket,
            received: Vec::new(),
            glued: Vec::new(),
            serving,
            seen: BTreeSet::new(),
            over: false,
        })
    }

    /// Keep for the next [`Self::send`].
    pub(super) fn glue(&mut self, bytes: &[u8]) {
        self.glued.extend_from_slice(bytes);
    }

    /// Send; `fds` go with the first byte that this call sends. Reads what comes meanwhile if `reading`,
    /// gives up after 200 ms without progress.
    pub(super) fn send(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        reading: bool,
    ) -> Result<(), Violation> {
        let mut all = std::mem::take(&mut self.glued);
        all.extend_from_slice(bytes);
        let (mut rest, mut fds) = (&all[..], fds);
        let mut progress = Instant::now();
        while !rest.is_empty() && !self.over {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    (rest, fds) = (&rest[sent..], &[]);
                    progress = Instant::now();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if reading && self.drain(usize::MAX)? > 0 {
                        progress = Instant::now();
                    }
                    if progress.elapsed() > Duration::from_millis(200) {
                        self.over = true;
                    }
                    let events = if reading {
                        PollFlags::IN | PollFlags::OUT
                    } else {
                        PollFlags::OUT
                    };
                    self.wait(events, 20);
                }
                // The server has hung up (or this process has too many file descriptors in flight).
                Err(_) => self.over = true,
            }
        }
        if reading {
            self.drain(usize::MAX)?;
        }
        Ok(())
    }

    fn wait(&self, events: PollFlags, milliseconds: i64) {
        let limit = Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: (milliseconds % 1000) * 1_000_000,
        };
        let _ = poll(&mut [PollFd::new(&self.socket, events)], Some(&limit));
    }

    /// Read what is there, up to `limit` bytes; how many that were.
    pub(super) fn drain(&mut self, limit: usize) -> Result<usize, Violation> {
        let mut total = 0;
        let mut buffer = [0; 16 << 10];
        while total < limit {
            let room = buffer.len().min(limit - total);
            match self.socket.read(&mut buffer[..room]) {
                Ok(0) => {
                    self.over = true;
                    break;
                }
                Ok(n) => {
                    total += n;
                    self.received.extend_from_slice(&buffer[..n]);
                    self.parse()?;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.over = true;
                    break;
                }
            }
        }
        Ok(total)
    }

    /// Read until the server has hung up.
    pub(super) fn drain_to_the_end(&mut self, limit: Duration) -> Result<(), Violation> {
        let deadline = Instant::now() + limit;
        while !self.over {
            if Instant::now() > deadline {
                return Err(Violation(format!(
                    "the server has not hung up {limit:?} after the client did"
                )));
            }
            self.wait(PollFlags::IN, 100);
            self.drain(usize::MAX)?;
        }
        Ok(())
    }

    /// Wait for one answer more than there were.
    pub(super) fn await_answer(&mut self, limit: Duration) -> Result<(), Violation> {
        let deadline = Instant::now() + limit;
        while !self.over && self.drain(usize::MAX)? == 0 {
            if Instant::now() > deadline {
                return Err(Violation(format!("no answer within {limit:?}")));
            }
            self.wait(PollFlags::IN, 100);
        }
        Ok(())
    }

    /// Whole messages are looked at and dropped.
    fn parse(&mut self) -> Result<(), Violation> {
        while let Ok((header, _)) = Header::read_from_prefix(&self.received[..]) {
            let bad = |what: &str| Err(Violation(format!("the server sent {what}: {header:?}")));
            let limit = Header::SIZE + 32 + MAX_DATA as usize;
            let Ok(len) = header.payload_len(limit) else {
                return bad("a message of impossible size");
            };
            match header.flags.message_type() {
                MessageType::Reply => {
                    let failed = header.flags.contains(MessageFlags::ERROR);
                    if failed && (header.error == 0 || header.error > 4095 || len != 0) {
                        return bad("an error reply with a body or without an errno");
                    }
                    if !failed && header.error != 0 {
                        return bad("a good reply with an errno");
                    }
                }
                MessageType::Command => {
                    if !matches!(header.command, Command::DMA_READ | Command::DMA_WRITE) || len < 16 {
                        return bad("a command that is not a client's business");
                    }
                }
                MessageType::Unknown(_) => return bad("a message of unknown type"),
            }
            if self.received.len() < Header::SIZE + len {
                return Ok(());
            }
            let bits = usize::BITS - len.leading_zeros();
            let kind = u32::from(header.flags.message_type() == MessageType::Command) << 16;
            // Unknown commands are all the same.
            let command = header.command.name().map_or(u16::MAX, |_| header.command.0);
            self.seen.insert((command, header.error | kind, bits));
            let message: Vec<u8> = self.received.drain(..Header::SIZE + len).collect();
            if header.flags.message_type() == MessageType::Command {
                self.serve(&header, &message[Header::SIZE..]);
            }
        }
        Ok(())
    }

    /// Answer the server's DMA_READ or DMA_WRITE, in the way of this session.
    fn serve(&mut self, request: &Header, body: &[u8]) {
        let count = u64::from_ne_bytes(body[8..16].try_into().expect("8 bytes"));
        let count = usize::try_from(count).unwrap_or(0).min(MAX_DATA as usize);
        let mut payload = body[..16].to_vec();
        if request.command == Command::DMA_READ {
            payload.resize(16 + count, 0x5a);
        }
        let mut header = request.reply(payload.len());
        match self.serving {
            Serving::Good => {}
            Serving::Refuse => {
                header = request.error_reply(19);
                payload.clear();
            }
            Serving::WrongSize => {
                payload.truncate(payload.len() / 2);
                header = request.reply(payload.len());
            }
            Serving::WrongId => header.message_id = header.message_id.wrapping_add(1),
            Serving::Silent => return,
        }
        self.glued.extend_from_slice(header.as_bytes());
        self.glued.extend_from_slice(&payload);
        let bytes = std::mem::take(&mut self.glued);
        // As much as the socket takes: a client need not care for the server's stream.
        let _ = rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}
