//! Requests and replies on the socket.
//!
//! What a register access goes through is inlined into one function, system calls included: each function that returns
//! after a system call it made costs about half a microsecond (the kernel leaves nothing of the processor's return
//! predictions), as in the server.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protos::vfio_user::{Command, Header, MessageFlags, MessageType};
use rustix::io::{Errno, readv, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};
use zerocopy::{FromBytes, IntoBytes};

use super::POSTED;
use super::asked::{Asked, AskedThread};
use super::error::{CallError, ConnectError};
use super::memory::MemoryMap;

/// File descriptors accepted in one message (`max_msg_fds`).
pub(super) const MAX_FDS: usize = 16;

/// Room for a reply. The payload goes to `head`, what does not fit there to `data`.
pub(super) struct Reply<'a> {
    pub(super) head: &'a mut [u8],
    pub(super) data: &'a mut [u8],
    /// File descriptors; those that come unwanted are closed.
    pub(super) fds: Option<&'a mut Vec<OwnedFd>>,
}

impl Reply<'_> {
    pub(super) fn empty() -> Self {
        Self {
            head: &mut [],
            data: &mut [],
            fds: None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Transport {
    socket: Arc<OwnedFd>,
    /// Who reads the socket, when it is not the caller.
    reader: Option<Arc<Asked>>,
    timeout: Option<Duration>,
    next_id: u16,
    /// Why it cannot be used any more.
    dead: Option<String>,
}

impl Transport {
    pub(super) fn connect(path: &Path, timeout: Option<Duration>) -> Result<Self, ConnectError> {
        let failed = |errno: Errno| match errno {
            Errno::NOENT => ConnectError::NotFound { path: path.into() },
            Errno::CONNREFUSED => ConnectError::NotListening { path: path.into() },
            // The listen queue stayed full for the whole send timeout.
            Errno::AGAIN => ConnectError::Timeout {
                path: path.into(),
                request: "connect",
                timeout: timeout.unwrap_or_default(),
            },
            errno => ConnectError::Failed {
                path: path.into(),
                request: "connect",
                source: errno.into(),
            },
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Recv, timeout).map_err(failed)?;
        set_socket_timeout(&socket, Timeout::Send, timeout).map_err(failed)?;
        connect(&socket, &address).map_err(failed)?;
        Ok(Self {
            socket: Arc::new(socket),
            reader: None,
            timeout,
            next_id: 0,
            dead: None,
        })
    }

    pub(super) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// From now on a thread reads the socket, which answers the server from `memory`.
    pub(super) fn start_reader(&mut self, memory: Arc<MemoryMap>) -> Result<AskedThread, CallError> {
        // It waits for the first byte as long as it takes; calls have their own limit.
        set_socket_timeout(&*self.socket, Timeout::Recv, None).map_err(CallError::System)?;
        let thread = AskedThread::start(Arc::clone(&self.socket), memory)?;
        self.reader = Some(Arc::clone(thread.asked()));
        Ok(thread)
    }

    /// Never use the stream again: where a reply starts is not known any more.
    pub(super) fn fail(&mut self, error: &CallError) {
        self.dead.get_or_insert_with(|| error.reason());
    }

    #[inline(always)]
    fn header(&mut self, command: Command, payload: usize, flags: MessageFlags) -> Result<Header, CallError> {
        if let Some(reason) = &self.dead {
            return Err(CallError::Dead(reason.clone()));
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        Ok(Header::command(id, command, payload, flags))
    }

    /// Send and do not wait for a reply.
    #[inline(always)]
    pub(super) fn post(&mut self, command: Command, head: &[u8], data: &[u8]) -> Result<(), CallError> {
        let header = self.header(command, head.len() + data.len(), POSTED)?;
        self.send([header.as_bytes(), head, data], &[])
    }

    /// Send and wait for the reply. Returns the bytes of its payload.
    #[inline(never)]
    pub(super) fn call(
        &mut self,
        command: Command,
        head: &[u8],
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        reply: &mut Reply<'_>,
    ) -> Result<usize, CallError> {
        self.call_inline(command, head, data, fds, reply)
    }

    /// As [`Self::call`], for what is done often.
    #[inline(always)]
    pub(super) fn call_inline(
        &mut self,
        command: Command,
        head: &[u8],
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        reply: &mut Reply<'_>,
    ) -> Result<usize, CallError> {
        let header = self.header(command, head.len() + data.len(), MessageFlags::COMMAND)?;
        match self.send([header.as_bytes(), head, data], fds) {
            // A server that refuses a client answers and hangs up, perhaps before this request: read it.
            Err(CallError::Closed) if command == Command::VERSION => {}
            result => result?,
        }
        self.receive(&header, reply)
    }

    #[inline(always)]
    fn send(&self, parts: [&[u8]; 3], fds: &[BorrowedFd<'_>]) -> Result<(), CallError> {
        // Answers to the server go the same way.
        let _whole = self.reader.as_deref().map(Asked::sending);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(
                control.push(SendAncillaryMessage::ScmRights(fds)),
                "at most {MAX_FDS} fds in one message"
            );
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut sent = 0;
        while sent < total {
            let mut skip = sent;
            let iov = parts.map(|part| {
                let skipped = skip.min(part.len());
                skip -= skipped;
                IoSlice::new(&part[skipped..])
            });
            match sendmsg(&self.socket, &iov, &mut control, SendFlags::NOSIGNAL) {
                Ok(bytes) => {
                    sent += bytes;
                    control.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(CallError::Timeout(self.timeout.unwrap_or_default())),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(CallError::Closed),
                Err(errno) => return Err(CallError::System(errno)),
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn receive_some(
        &self,
        iov: &mut [IoSliceMut<'_>],
        wanted: Option<&mut Vec<OwnedFd>>,
    ) -> Result<usize, CallError> {
        let result = match wanted {
            // The quicker call, for most replies. The kernel closes file descriptors that come unwanted.
            None => retry_on_intr(|| readv(&self.socket, iov)),
            Some(fds) => return self.receive_with_fds(iov, fds),
        };
        result.map_err(|errno| self.receive_error(errno))
    }

    #[inline(never)]
    fn receive_with_fds(
        &self,
        iov: &mut [IoSliceMut<'_>],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<usize, CallError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = retry_on_intr(|| recvmsg(&self.socket, iov, &mut control, RecvFlags::CMSG_CLOEXEC))
            .map_err(|errno| self.receive_error(errno))?;
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                fds.extend(received);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(CallError::protocol(format!(
                "more than {MAX_FDS} file descriptors came"
            )));
        }
        Ok(message.bytes)
    }

    #[cold]
    fn receive_error(&self, errno: Errno) -> CallError {
        match errno {
            Errno::AGAIN => CallError::Timeout(self.timeout.unwrap_or_default()),
            Errno::CONNRESET => CallError::Closed,
            errno => CallError::System(errno),
        }
    }

    /// As [`Self::receive`], what the thread that reads has got.
    #[inline(never)]
    fn take_reply(
        &self,
        reader: &Asked,
        request: &Header,
        reply: &mut Reply<'_>,
    ) -> Result<usize, CallError> {
        let arrived = reader.reply(self.timeout)?;
        let wanted = check(
            request,
            &arrived.header,
            Header::SIZE + reply.head.len() + reply.data.len(),
        )?;
        refused(&arrived.header)?;
        let (head, data) = arrived.body.split_at(arrived.body.len().min(reply.head.len()));
        reply.head[..head.len()].copy_from_slice(head);
        reply.data[..data.len()].copy_from_slice(data);
        if let Some(fds) = &mut reply.fds {
            fds.extend(arrived.fds);
        }
        Ok(wanted - Header::SIZE)
    }

    /// Only one request is under way and the server asks nothing here, so header and payload can be read at once.
    #[inline(always)]
    fn receive(&self, request: &Header, reply: &mut Reply<'_>) -> Result<usize, CallError> {
        if let Some(reader) = &self.reader {
            return self.take_reply(reader, request, reply);
        }
        let mut head = [0; Header::SIZE];
        let room = Header::SIZE + reply.head.len() + reply.data.len();
        let mut wanted = room;
        let mut filled = 0;
        let mut parsed = None;
        while filled < wanted {
            let mut skip = filled;
            let mut iov = [&mut head[..], &mut *reply.head, &mut *reply.data].map(|part| {
                let skipped = skip.min(part.len());
                skip -= skipped;
                IoSliceMut::new(&mut part[skipped..])
            });
            filled += match self.receive_some(&mut iov, reply.fds.as_deref_mut())? {
                0 => return Err(CallError::Closed),
                bytes => bytes,
            };
            if filled >= Header::SIZE && parsed.is_none() {
                let header = Header::read_from_bytes(&head).expect("16 bytes are a header");
                wanted = check(request, &header, room)?;
                parsed = Some(header);
            }
        }
        let header = parsed.expect("the room for a reply starts with a header");
        if filled > wanted {
            return Err(CallError::protocol(format!(
                "{} bytes after the reply",
                filled - wanted
            )));
        }
        refused(&header)?;
        Ok(wanted - Header::SIZE)
    }
}

/// The errno of an error's reply.
fn refused(header: &Header) -> Result<(), CallError> {
    if !header.flags.contains(MessageFlags::ERROR) {
        return Ok(());
    }
    let errno = i32::try_from(header.error)
        .ok()
        .filter(|errno| *errno > 0 && *errno < 4096);
    Err(CallError::Device(Errno::from_raw_os_error(
        errno.unwrap_or(Errno::IO.raw_os_error()),
    )))
}

/// The reply's size, if it answers `request` and fits.
fn check(request: &Header, reply: &Header, room: usize) -> Result<usize, CallError> {
    // A refused client is told with an id that the server had to guess.
    let refused = request.command == Command::VERSION && reply.flags.contains(MessageFlags::ERROR);
    let matches = reply.command == request.command && (reply.message_id == request.message_id || refused);
    if reply.flags.message_type() != MessageType::Reply || !matches {
        return Err(CallError::protocol(format!(
            "asked {} (id {}), got {} (id {}, flags {:?})",
            request.command, request.message_id, reply.command, reply.message_id, reply.flags
        )));
    }
    match reply.payload_len(room) {
        // An error with a payload, too: some servers fill it up to the size of a good reply.
        Ok(payload) => Ok(Header::SIZE + payload),
        Err(error) => Err(CallError::protocol(error.to_string())),
    }
}
