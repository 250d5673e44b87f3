//! A raw client. Encodes and decodes by the specification's tables, byte by byte, and shares nothing with this
//! project's own codecs: a mistake in those must not hide here.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};

/// An answer that takes longer does not come.
pub const LIMIT: Duration = Duration::from_secs(5);

// Section "Commands".
pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_REGION_IO_FDS: u16 = 6;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const REGION_WRITE_MULTI: u16 = 15;

// Section "Header", flags.
pub const REPLY: u32 = 1;
pub const NO_REPLY: u32 = 1 << 4;
pub const ERROR: u32 = 1 << 5;

/// A message that came.
#[derive(Debug)]
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// What came, or that the server closed the connection (which it may do where it refuses).
#[derive(Debug)]
pub enum Answer {
    Message(Message),
    Closed,
}

/// A little-endian (x86-64: the host's) number in a body.
pub fn u32_at(body: &[u8], at: usize) -> Result<u32> {
    let bytes = body.get(at..at + 4).context("a reply is too short")?;
    Ok(u32::from_ne_bytes(bytes.try_into()?))
}

/// See [`u32_at`].
pub fn u64_at(body: &[u8], at: usize) -> Result<u64> {
    let bytes = body.get(at..at + 8).context("a reply is too short")?;
    Ok(u64::from_ne_bytes(bytes.try_into()?))
}

/// 32-bit fields one after the other.
pub fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_ne_bytes()).collect()
}

/// Header and body.
pub fn encode(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(body);
    bytes
}

/// Body of REGION_READ and REGION_WRITE.
pub fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_ne_bytes().to_vec();
    body.extend(words(&[region, count]));
    body.extend(data);
    body
}

/// A connection.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    next_id: u16,
    unread: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Wire {
    pub fn connect(path: &Path) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).context("socket")?;
        let address = SocketAddrUnix::new(path).context("socket path")?;
        connect(&socket, &address).with_context(|| format!("cannot connect to {}", path.display()))?;
        Self::over(socket)
    }

    /// On a socket that is connected.
    pub fn over(socket: OwnedFd) -> Result<Self> {
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).context("SO_RCVTIMEO")?;
        set_socket_timeout(&socket, Timeout::Send, Some(LIMIT)).context("SO_SNDTIMEO")?;
        Ok(Self {
            socket,
            next_id: 0x1230,
            unread: Vec::new(),
            fds: VecDeque::new(),
        })
    }

    /// A new message id.
    pub fn id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Sends bytes; file descriptors go with the first. False: the server has closed the connection.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        ensure!(
            fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)),
            "too many fds"
        );
        let mut sent = 0;
        while sent < bytes.len() {
            let rest = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(Errno::AGAIN) => bail!("the server does not read for {LIMIT:?}"),
                Err(errno) => return Err(errno).context("sendmsg"),
            }
            control.clear();
        }
        Ok(true)
    }

    fn fill(&mut self, len: usize, deadline: Instant) -> Result<bool> {
        while self.unread.len() < len {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut chunk = vec![0; len - self.unread.len()];
            let mut iov = [IoSliceMut::new(&mut chunk)];
            match recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => {
                    for ancillary in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(list) = ancillary {
                            self.fds.extend(list);
                        }
                    }
                    if message.bytes == 0 {
                        ensure!(
                            self.unread.is_empty(),
                            "closed in the middle of a message: {} bytes of it came",
                            self.unread.len()
                        );
                        return Ok(false);
                    }
                    self.unread.extend(&chunk[..message.bytes]);
                }
                Err(Errno::INTR) if Instant::now() < deadline => {}
                Err(Errno::CONNRESET) => return Ok(false),
                Err(Errno::AGAIN | Errno::INTR) => bail!("no answer within {LIMIT:?}"),
                Err(errno) => return Err(errno).context("recvmsg"),
            }
        }
        Ok(true)
    }

    /// The next message, or the end.
    pub fn receive(&mut self) -> Result<Answer> {
        let deadline = Instant::now() + LIMIT;
        if !self.fill(16, deadline)? {
            return Ok(Answer::Closed);
        }
        let head = self.unread.clone();
        let size = u32_at(&head, 4)? as usize;
        ensure!(
            (16..1 << 24).contains(&size),
            "a reply says that it has {size} bytes"
        );
        ensure!(
            self.fill(size, deadline)?,
            "closed in the middle of a message of {size} bytes"
        );
        let body = self.unread.split_off(16);
        self.unread.clear();
        Ok(Answer::Message(Message {
            id: u16::from_ne_bytes([head[0], head[1]]),
            command: u16::from_ne_bytes([head[2], head[3]]),
            flags: u32_at(&head, 8)?,
            error: u32_at(&head, 12)?,
            body,
            fds: self.fds.drain(..).collect(),
        }))
    }

    /// A reply to that message: checks what holds for every reply.
    pub fn reply_to(&mut self, id: u16, command: u16) -> Result<Message> {
        let Answer::Message(message) = self.receive()? else {
            bail!("the server closed the connection instead of answering command {command}");
        };
        ensure!(
            message.flags & 0xf == REPLY,
            "the type bits of a reply are {:#x}, not 1",
            message.flags & 0xf
        );
        ensure!(
            message.id == id,
            "message id {:#x} is answered as {:#x}",
            id,
            message.id
        );
        ensure!(
            message.command == command,
            "command {command} is answered as command {}",
            message.command
        );
        if message.flags & ERROR != 0 {
            ensure!(
                message.body.is_empty(),
                "an error reply has {} bytes after its header",
                message.body.len()
            );
        }
        Ok(message)
    }

    pub fn call_with_fds(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        let id = self.id();
        let sent = self.send(&encode(id, command, 0, body), fds)?;
        ensure!(sent, "the server closed the connection before command {command}");
        self.reply_to(id, command)
    }

    pub fn call(&mut self, command: u16, body: &[u8]) -> Result<Message> {
        self.call_with_fds(command, body, &[])
    }

    /// A call that has to work.
    pub fn good(&mut self, command: u16, body: &[u8]) -> Result<Message> {
        let message = self.call(command, body)?;
        ensure!(
            message.flags & ERROR == 0,
            "command {command} failed with errno {}",
            message.error
        );
        Ok(message)
    }

    /// A call that has to fail, with the connection usable afterwards. Its errno.
    pub fn bad(&mut self, command: u16, body: &[u8], why: &str) -> Result<u32> {
        let message = self.call(command, body)?;
        ensure!(message.flags & ERROR != 0, "{why}: accepted");
        self.still_works()
            .with_context(|| format!("{why}: refused, but the next message"))?;
        Ok(message.error)
    }

    /// A message where an error reply and the end of the connection are both fine.
    pub fn refused(&mut self, bytes: &[u8], why: &str) -> Result<()> {
        if !self.send(bytes, &[])? {
            return Ok(());
        }
        match self.receive().with_context(|| why.to_owned())? {
            Answer::Closed => Ok(()),
            Answer::Message(message) => {
                ensure!(message.flags & ERROR != 0, "{why}: accepted");
                Ok(())
            }
        }
    }

    pub fn still_works(&mut self) -> Result<()> {
        let info = self.good(GET_INFO, &words(&[16, 0, 0, 0]))?;
        ensure!(info.body.len() >= 16, "device info of {} bytes", info.body.len());
        Ok(())
    }
}
