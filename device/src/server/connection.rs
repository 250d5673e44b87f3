//! One client: read a message, answer it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use protos::vfio_user::{
    Capabilities, Command, DmaUnmap, Header, IrqInfo, MessageType, RegionAccess, RegionWriteOne,
};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use zerocopy::{FromBytes, IntoBytes};

use super::dispatch::{MAX_MULTI_WRITES, Refusal, ReplyBuffer, ReplyFds};
use super::frame::{self, Ended, Fds, MAX_FDS, Receiver};
use super::mask_events::MaskEvents;
use super::requests::{Outgoing, RequestOptions, Requests, this_thread_serves};
use super::twin::Twin;
use super::{ErrorReplies, ServerOptions};
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
    /// REGION_WRITE_MULTI was agreed on.
    pub(super) write_multiple: bool,
    /// Our end of the twin socket, if one was agreed on.
    pub(super) twin: Option<OwnedFd>,
    /// The client reads some error replies at full size.
    pub(super) padded_errors: bool,
    /// Eventfds for MASK and UNMASK, if there are any.
    pub(super) mask_events: Option<MaskEvents>,
}

pub(super) struct Connection<'f> {
    out: Arc<Outgoing>,
    session: Session<'f>,
    stopping: &'f AtomicBool,
    /// What the client is asked, once VERSION has been answered.
    requests: Option<Arc<Requests>>,
    twin: Option<Twin>,
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
            out: Outgoing::new(socket),
            session: Session {
                function,
                options,
                negotiated: None,
                write_multiple: false,
                twin: None,
                padded_errors: options.error_replies == ErrorReplies::Full,
                mask_events: None,
            },
            stopping,
            requests: None,
            twin: None,
            receiver: Receiver::new(options.busy_poll),
            reply: ReplyBuffer::default(),
            fds: Fds::default(),
            refusals: 0,
        }
    }

    /// Serve until the client goes, or has to. Says why.
    pub(super) fn run(mut self) -> Ended {
        this_thread_serves();
        let ended = self.serve();
        if let Some(requests) = self.requests.take() {
            requests.close();
            self.session.function.dma().set_messenger(None);
        }
        if let Some(twin) = self.twin.take() {
            twin.join();
        }
        ended
    }

    fn serve(&mut self) -> Ended {
        let timeout = self.session.options.client_timeout;
        if let Err(errno) = set_socket_timeout(&**self.out.socket(), Timeout::Send, Some(timeout)) {
            return Ended::Socket(errno);
        }
        let version_by = frame::deadline(timeout);
        loop {
            // A command that comes too early is refused, and gives no more time.
            let awaited = match self.session.negotiated {
                None => self.await_version(version_by),
                Some(_) => Ok(()),
            };
            if let Err(ended) = awaited.and_then(|()| self.one_message()) {
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

    /// Wait for the next message, while VERSION has not been agreed on.
    #[cold]
    fn await_version(&self, until: Instant) -> Result<(), Ended> {
        const WHAT: &str = "agree on VERSION";
        if !self.receiver.has_begun() {
            frame::wait_readable(self.out.socket(), until, WHAT)
        } else if Instant::now() < until {
            Ok(())
        } else {
            Err(Ended::Timeout(WHAT))
        }
    }

    /// Inlined, as what it calls for every message: see [`super::frame`].
    #[inline(always)]
    fn one_message(&mut self) -> Result<(), Ended> {
        let timeout = self.session.options.client_timeout;
        if let Some(events) = &mut self.session.mask_events {
            let interrupts = self.session.function.interrupts();
            events.before_message(self.out.socket(), self.receiver.has_begun(), interrupts)?;
        }
        let header = self.receiver.next(self.out.socket(), &mut self.fds, timeout)?;
        let limit = longest_message(self.session.options.max_data_xfer_size);
        let len = match header.payload_len(limit) {
            Ok(len) => len,
            Err(error) => {
                // Where the next message starts is unknown (or very far away): answer, then hang up.
                self.send_error(&header, Errno::MSGSIZE, 0)?;
                return Err(error.into());
            }
        };
        let body = self
            .receiver
            .body(self.out.socket(), len, &mut self.fds, timeout)?;

        self.reply.clear();
        let outcome = match header.flags.message_type() {
            MessageType::Command if self.fds.overflow => Err(Refusal::TooManyFds(MAX_FDS)),
            MessageType::Command => self
                .session
                .dispatch(&header, body, &mut self.fds, &mut self.reply),
            // Never answer an answer.
            MessageType::Reply => {
                // With a twin socket nothing was asked here.
                self.fds.clear();
                let requests = self.requests.as_ref().filter(|_| self.twin.is_none());
                if requests.is_some_and(|requests| requests.deliver(&header, body)) {
                    return Ok(());
                }
                self.log_refusal(&header, &Refusal::UnexpectedReply);
                return Ok(());
            }
            MessageType::Unknown(kind) => Err(Refusal::MessageType(kind)),
        };
        // What nobody took is closed now, not when the next message comes.
        self.fds.clear();
        match outcome {
            Err(refusal) => {
                let padding = if self.session.padded_errors {
                    let limit = self.session.options.max_data_xfer_size;
                    reply_len(header.command, body, limit)
                } else {
                    0
                };
                self.log_refusal(&header, &refusal);
                self.send_error(&header, refusal.errno(), padding)
            }
            Ok(_) if header.no_reply() => Ok(()),
            Ok(fds) => {
                let message = self.reply.finish(&header);
                match fds {
                    ReplyFds::None => self.out.send(message, &[])?,
                    fds => fds.send_with(&self.out, message)?,
                }
                if self.requests.is_none() && self.session.negotiated.is_some() {
                    self.start_requests()?;
                }
                Ok(())
            }
        }
    }

    /// VERSION has been agreed on: from now on the device can ask this client for its memory.
    fn start_requests(&mut self) -> Result<(), Ended> {
        let Some(theirs) = &self.session.negotiated else {
            return Ok(());
        };
        let options = self.session.options;
        let request_options = RequestOptions {
            max_transfer: options.max_data_xfer_size.min(theirs.max_data_xfer_size()) as usize,
            timeout: options.dma_timeout,
            // QEMU proposes this, and only QEMU's layout may be short (10.1; not 11.1.3).
            may_be_short: theirs.write_multiple == Some(true),
        };
        let requests = match self.session.twin.take() {
            None => Requests::new(
                Arc::clone(&self.out),
                Arc::clone(self.out.socket()),
                request_options,
            ),
            Some(socket) => {
                set_socket_timeout(&socket, Timeout::Send, Some(options.client_timeout))
                    .map_err(Ended::Socket)?;
                let out = Outgoing::new(Arc::new(socket));
                let connection = Arc::clone(self.out.socket());
                let requests = Requests::new(Arc::clone(&out), connection, request_options);
                self.twin = Some(Twin::start(out, &requests, *options)?);
                requests
            }
        };
        self.requests = Some(Arc::clone(&requests));
        self.session.function.dma().set_messenger(Some(requests));
        Ok(())
    }

    /// `padding` bytes of zeros follow the header.
    fn send_error(&mut self, request: &Header, errno: Errno, padding: usize) -> Result<(), Ended> {
        if request.no_reply() {
            return Ok(());
        }
        // 0 would read as success, and a negative one as nonsense.
        let errno = u32::try_from(errno.raw_os_error())
            .ok()
            .filter(|errno| *errno != 0);
        let errno = errno.unwrap_or(Errno::IO.raw_os_error() as u32);
        if padding == 0 {
            return self.out.send(request.error_reply(errno).as_bytes(), &[]);
        }
        let header = request.padded_error_reply(errno, padding);
        self.out.send(self.reply.padded(&header, padding), &[])
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

/// Nothing that is accepted is longer: a region access (or an answer to DMA_READ) with its data, or a
/// REGION_WRITE_MULTI.
pub(super) fn longest_message(max_data_xfer_size: u32) -> usize {
    let multi = size_of::<u64>() + MAX_MULTI_WRITES * RegionWriteOne::SIZE;
    Header::SIZE + multi.max(size_of::<RegionAccess>() + max_data_xfer_size as usize)
}

/// Bytes of payload that a good reply would have had, for the commands whose replies Cloud Hypervisor reads
/// at full size whatever the header says.
fn reply_len(command: Command, body: &[u8], limit: u32) -> usize {
    match command {
        Command::REGION_READ => {
            let count = RegionAccess::read_from_prefix(body).map_or(0, |(access, _)| access.count);
            size_of::<RegionAccess>() + if count <= limit { count as usize } else { 0 }
        }
        Command::REGION_WRITE => size_of::<RegionAccess>(),
        Command::DMA_UNMAP => size_of::<DmaUnmap>(),
        Command::DEVICE_GET_IRQ_INFO => size_of::<IrqInfo>(),
        _ => 0,
    }
}
