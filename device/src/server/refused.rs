//! Clients that came while another one was connected: each is told so in answer to its own VERSION.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use protos::vfio_user::{Command, Header, MessageFlags, MessageType};
use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use zerocopy::{FromBytes, IntoBytes};

use super::frame;

/// Clients that wait for their answer. The longest waiting one makes room for one more.
const MAX_REFUSED: usize = 16;

/// Most bytes of a first message that are read.
const LONGEST: usize = 64 << 10;

/// The refused clients. Never blocks: the acceptor looks at them when they have sent something.
#[derive(Debug)]
pub(super) struct RefusedClients {
    /// The longest waiting one is first.
    clients: VecDeque<Client>,
    /// How long each may take to send VERSION. Nobody waits for it meanwhile.
    patience: Duration,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    until: Instant,
    header: [u8; Header::SIZE],
    /// Bytes of its message that have been read.
    read: usize,
}

impl RefusedClients {
    pub(super) fn new(client_timeout: Duration) -> Self {
        Self {
            clients: VecDeque::new(),
            patience: client_timeout,
        }
    }

    /// Refuse one more.
    pub(super) fn add(&mut self, socket: OwnedFd) {
        while self.clients.len() >= MAX_REFUSED {
            self.drop_oldest();
        }
        self.clients.push_back(Client {
            socket,
            until: frame::deadline(self.patience),
            header: [0; Header::SIZE],
            read: 0,
        });
    }

    /// Their file descriptors are needed.
    pub(super) fn clear(&mut self) {
        while !self.clients.is_empty() {
            self.drop_oldest();
        }
    }

    /// What to poll for.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let clients = self.clients.iter();
        clients.map(|client| PollFd::new(&client.socket, PollFlags::IN))
    }

    /// When [`Self::serve`] has something to do even if nobody sends anything.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.clients.front().map(|client| client.until)
    }

    /// Read what has come, answer those that have said what they want, and those that have not in time.
    pub(super) fn serve(&mut self) {
        self.clients.retain_mut(Client::still_talks);
        let now = Instant::now();
        while self.clients.front().is_some_and(|client| client.until <= now) {
            self.drop_oldest();
        }
    }

    /// It has not sent VERSION: what it is told is for message id 0, which is what clients start with.
    fn drop_oldest(&mut self) {
        if let Some(client) = self.clients.pop_front() {
            client.answer(&Header::command(0, Command::VERSION, 0, MessageFlags::COMMAND));
        }
    }
}

impl Client {
    /// Read what is there. False when that was all.
    fn still_talks(&mut self) -> bool {
        // A bound for each look, so that nobody else waits for a client that does not stop.
        for _ in 0..8 {
            let mut scrap = [0; 4096];
            let to = match self.header() {
                None => &mut self.header[self.read..],
                Some(header) => {
                    // Whole, or hopeless. Read to its end, as closing a socket with unread bytes is a reset.
                    let Some(rest) = header.payload_len(LONGEST).ok().and_then(|payload| {
                        let rest = Header::SIZE + payload - self.read;
                        (rest > 0).then_some(rest)
                    }) else {
                        self.answer(&header);
                        return false;
                    };
                    &mut scrap[..rest.min(4096)]
                }
            };
            // Without room for file descriptors: the kernel closes any that come.
            match retry_on_intr(|| recv(&self.socket, &mut *to, RecvFlags::DONTWAIT)) {
                Ok((0, _)) => return false,
                Ok((_, bytes)) => self.read += bytes,
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// Once it is there.
    fn header(&self) -> Option<Header> {
        let header = Header::read_from_bytes(&self.header).expect("16 bytes are a header");
        (self.read >= Header::SIZE).then_some(header)
    }

    fn answer(&self, request: &Header) {
        if request.no_reply() || request.flags.message_type() != MessageType::Command {
            return;
        }
        let busy = request.error_reply(Errno::BUSY.raw_os_error() as u32);
        // The first bytes on this socket: there is room for them, unless the client is gone.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = retry_on_intr(|| send(&self.socket, busy.as_bytes(), flags));
    }
}
