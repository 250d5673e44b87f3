//! One client: read a message, answer it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protos::vfio_user::{Capabilities, Header, MessageType};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use zerocopy::IntoBytes;

use super::ServerOptions;
use super::dispatch::{Refusal, ReplyBuffer, ReplyFds};
use super::frame::{self, Ended, Fds, MAX_FDS, Receiver};
use crate::pci::Function;

/// Refusals of one connection that are logged as warnings; later ones only at debug level, as a client can
/// cause any number of them.
const LOGGED_REFUSALS: u64 = 16;

/// What a client has said about itself, and the function it talks to. The buffers are apart
/// ([`Connection`]), so that a message can be looked at while the state changes.
pub(super) struct Session<'f> {
    pub(super) function: &'f Function,
    pub(super) options: &'f ServerOptions,
    /// The client's capabilities, once VERSION has been answered.
    pub(super) negotiated: Option<Capabilities>,
}

pub(super) struct Connection<'f> {
    socket: Arc<OwnedFd>,
    session: Session<'f>,
    stopping: &'f AtomicBool,
    receiver: Receiver,
    reply: ReplyBuffer,
    fds: Fds,
    refusals: u64,
}

impl<'f> Connection<'f> {
    pub(super) fn new(
        socket: Arc<OwnedFd>,
        function: &'f Function,
        options: &'f ServerOptions,
        stopping: &'f AtomicBool,
    ) -> Self {
        Self {
            socket,
            session: Session {
                function,
                options,
                negotiated: None,
            },
            stopping,
            receiver: Receiver::new(options.busy_poll),
            reply: ReplyBuffer::default(),
            fds: Fds::default(),
            refusals: 0,
        }
    }

    /// Serve until the client goes, or has to. Says why.
    pub(super) fn run(mut self) -> Ended {
        let timeout = self.session.options.client_timeout;
        if let Err(errno) = set_socket_timeout(&*self.socket, Timeout::Send, Some(timeout)) {
            return Ended::Socket(errno);
        }
        if let Err(ended) = frame::wait_readable(&self.socket, timeout, "send VERSION") {
            return ended;
        }
        loop {
            if let Err(ended) = self.one_message() {
                // A stop shuts the socket down, which looks as if the client had closed it.
                return if self.stopping.load(Ordering::SeqCst) {
                    Ended::Stopped
                } else {
                    ended
                };
            }
            if self.stopping.load(Ordering::Relaxed) {
                return Ended::Stopped;
            }
        }
    }

    fn one_message(&mut self) -> Result<(), Ended> {
        let timeout = self.session.options.client_timeout;
        let header = self.receiver.next(&self.socket, &mut self.fds, timeout)?;
        // Head of a region access, and its data: nothing is longer.
        let limit = Header::SIZE + 16 + self.session.options.max_data_xfer_size as usize;
        let len = match header.payload_len(limit) {
            Ok(len) => len,
            Err(error) => {
                // Where the next message starts is unknown (or very far away): answer, then hang up.
                self.send_error(&header, Errno::MSGSIZE)?;
                return Err(error.into());
            }
        };
        let body = self.receiver.body(&self.socket, len, &mut self.fds, timeout)?;

        self.reply.clear();
        let outcome = match header.flags.message_type() {
            MessageType::Command if self.fds.overflow => Err(Refusal::TooManyFds(MAX_FDS)),
            MessageType::Command => self
                .session
                .dispatch(&header, body, &mut self.fds, &mut self.reply),
            // Never answer an answer.
            MessageType::Reply => {
                self.log_refusal(&header, &Refusal::UnexpectedReply);
                self.fds.clear();
                return Ok(());
            }
            MessageType::Unknown(kind) => Err(Refusal::MessageType(kind)),
        };
        // What nobody took is closed now, not when the next message comes.
        self.fds.clear();
        match outcome {
            Err(refusal) => {
                self.log_refusal(&header, &refusal);
                self.send_error(&header, refusal.errno())
            }
            Ok(_) if header.no_reply() => Ok(()),
            Ok(fds) => {
                let message = self.reply.finish(&header);
                match fds {
                    ReplyFds::None => frame::send_message(&self.socket, message, &[]),
                    ReplyFds::Region(fd) => frame::send_message(&self.socket, message, &[fd]),
                    ReplyFds::Io(list) => {
                        let fds: Vec<_> = list.iter().map(|io| io.fd.as_fd()).collect();
                        frame::send_message(&self.socket, message, &fds)
                    }
                }
            }
        }
    }

    fn send_error(&self, request: &Header, errno: Errno) -> Result<(), Ended> {
        if request.no_reply() {
            return Ok(());
        }
        // 0 would read as success, and a negative one as nonsense.
        let errno = u32::try_from(errno.raw_os_error())
            .ok()
            .filter(|errno| *errno != 0);
        let errno = errno.unwrap_or(Errno::IO.raw_os_error() as u32);
        frame::send_message(&self.socket, request.error_reply(errno).as_bytes(), &[])
    }

    fn log_refusal(&mut self, header: &Header, refusal: &Refusal) {
        self.refusals += 1;
        if self.refusals <= LOGGED_REFUSALS {
            tracing::warn!(command = %header.command, id = header.message_id, %refusal, "message refused");
        } else {
            tracing::debug!(command = %header.command, id = header.message_id, %refusal, "message refused");
        }
    }
}
