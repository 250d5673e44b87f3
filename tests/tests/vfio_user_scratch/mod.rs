//! A trivial device model, a server around it, and a client that can send anything.
#![allow(dead_code)] // Each test file uses its part.

use std::convert::Infallible;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use device::model::{AccessError, BarMmap, BarSpec, Identity, IoEventFd, Model, ModelContext, MsixSpec};
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use protos::vfio_user::{
    Command, DmaAccess, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, Header, MessageFlags,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

pub const REGISTERS: u64 = 16;
/// Any write is remembered in order.
pub const LOG: u64 = 0x100;
/// Raises the vector written.
pub const RAISE: u64 = 0x108;
/// Copies 8 bytes from the IOVA written to register 0; all ones when that fails.
pub const FETCH: u64 = 0x110;
/// Stores register 1 at the IOVA written; register 2 is 1 when that worked, else 0.
pub const STORE: u64 = 0x118;
/// Reading waits at the barrier, twice.
pub const WAIT: u64 = 0x120;
/// Stands for an eventfd.
pub const BELL: u64 = 0x200;
/// As [`FETCH`] into register 3, by a thread of the device; vector 1 is raised when it is done.
pub const ASK: u64 = 0x128;
/// As [`STORE`] of register 1, by a thread of the device; then register 4 is 1 when that worked, else 2, and
/// vector 2 is raised.
pub const TELL: u64 = 0x130;
pub const PAGE: u64 = 0x1000;
pub const BAR0_SIZE: u64 = 0x10000;
pub const BAR2_SIZE: u64 = 0x10_0000;
pub const VECTORS: u16 = 140;
pub const MSIX: MsixSpec = MsixSpec {
    vectors: VECTORS,
    bar: 0,
    table_offset: 0x8000,
    pba_offset: 0x9000,
};

/// Where a [`Scratch`] has MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Msix {
    /// Nowhere.
    None,
    /// As [`MSIX`] says: in BAR 0, beside a mappable page.
    Shared,
    /// In BAR 4, which has this size and nothing else.
    OwnBar(u64),
}

impl Msix {
    fn spec(self) -> Option<MsixSpec> {
        match self {
            Self::None => None,
            Self::Shared => Some(MSIX),
            Self::OwnBar(size) => Some(MsixSpec {
                vectors: VECTORS,
                bar: 4,
                table_offset: 0,
                pba_offset: size - 0x400,
            }),
        }
    }
}

/// A few registers, a mappable page in BAR0, a wholly mappable BAR2.
#[derive(Debug)]
pub struct Scratch {
    context: ModelContext,
    page: OwnedFd,
    memory: OwnedFd,
    pub bell: OwnedFd,
    pub barrier: Arc<Barrier>,
    state: Arc<Mutex<State>>,
    msix: Msix,
}

#[derive(Debug, Default)]
struct State {
    registers: [u64; REGISTERS as usize],
    log: Vec<u64>,
    resets: u64,
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("scratch", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

impl Scratch {
    pub fn new(context: ModelContext) -> Arc<Self> {
        Self::build(context, Msix::Shared)
    }

    pub fn build(context: ModelContext, msix: Msix) -> Arc<Self> {
        Arc::new(Self {
            context,
            page: memfd(BAR0_SIZE),
            memory: memfd(BAR2_SIZE),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            barrier: Arc::new(Barrier::new(2)),
            state: Arc::default(),
            msix,
        })
    }

    pub fn log(&self) -> Vec<u64> {
        self.state.lock().unwrap().log.clone()
    }

    pub fn resets(&self) -> u64 {
        self.state.lock().unwrap().resets
    }
}

fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = data.len().min(8);
    bytes[..len].copy_from_slice(&data[..len]);
    u64::from_le_bytes(bytes)
}

impl Model for Scratch {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1234,
            device: 0x5678,
            subsystem_vendor: 1,
            subsystem: 2,
            class: 0xff_00_00,
            revision: 1,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        let page = BarMmap {
            fd: self.page.try_clone().unwrap(),
            areas: vec![(PAGE, 0x1000)],
        };
        let memory = BarMmap {
            fd: self.memory.try_clone().unwrap(),
            areas: vec![(0, BAR2_SIZE)],
        };
        let own = match self.msix {
            Msix::OwnBar(size) => Some(BarSpec {
                index: 4,
                size,
                is_64bit: false,
                prefetchable: false,
                mmap: None,
            }),
            _ => None,
        };
        let mut bars = vec![
            BarSpec {
                index: 0,
                size: BAR0_SIZE,
                is_64bit: true,
                prefetchable: false,
                mmap: Some(page),
            },
            BarSpec {
                index: 2,
                size: BAR2_SIZE,
                is_64bit: false,
                prefetchable: true,
                mmap: Some(memory),
            },
        ];
        bars.extend(own);
        bars
    }

    fn msix(&self) -> Option<MsixSpec> {
        self.msix.spec()
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if bar == 2 || (PAGE..PAGE + 0x1000).contains(&offset) {
            let file = if bar == 2 { &self.memory } else { &self.page };
            assert_eq!(rustix::io::pread(file, &mut *data, offset).unwrap(), data.len());
            return Ok(());
        }
        if offset == WAIT {
            self.barrier.wait();
            self.barrier.wait();
            data.fill(0);
            return Ok(());
        }
        let state = self.state.lock().unwrap();
        let register = state
            .registers
            .get((offset / 8) as usize)
            .filter(|_| offset % 8 + data.len() as u64 <= 8);
        let Some(register) = register else {
            return Err(AccessError::Unassigned {
                bar,
                offset,
                len: data.len(),
            });
        };
        let at = (offset % 8) as usize;
        data.copy_from_slice(&register.to_le_bytes()[at..at + data.len()]);
        Ok(())
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        if bar == 2 || (PAGE..PAGE + 0x1000).contains(&offset) {
            let file = if bar == 2 { &self.memory } else { &self.page };
            assert_eq!(rustix::io::pwrite(file, data, offset).unwrap(), data.len());
            return Ok(());
        }
        let value = number(data);
        let mut state = self.state.lock().unwrap();
        match offset {
            LOG => state.log.push(value),
            RAISE => {
                self.context.interrupts.trigger(value as u32);
            }
            FETCH => {
                let mut bytes = [0; 8];
                let read = self.context.dma.fetch(value, &mut bytes);
                state.registers[0] = read.map_or(u64::MAX, |()| u64::from_le_bytes(bytes));
            }
            STORE => {
                let bytes = state.registers[1].to_le_bytes();
                state.registers[2] = u64::from(self.context.dma.store(value, &bytes).is_ok());
            }
            ASK => {
                let (context, state) = (self.context.clone(), Arc::clone(&self.state));
                std::thread::spawn(move || {
                    let mut bytes = [0; 8];
                    let read = context.dma.fetch(value, &mut bytes);
                    state.lock().unwrap().registers[3] =
                        read.map_or(u64::MAX, |()| u64::from_le_bytes(bytes));
                    context.interrupts.trigger(1);
                });
            }
            TELL => {
                let (context, shared) = (self.context.clone(), Arc::clone(&self.state));
                let bytes = state.registers[1].to_le_bytes();
                std::thread::spawn(move || {
                    let stored = context.dma.store(value, &bytes).is_ok();
                    shared.lock().unwrap().registers[4] = if stored { 1 } else { 2 };
                    context.interrupts.trigger(2);
                });
            }
            _ if offset.is_multiple_of(8) && offset / 8 < REGISTERS => {
                state.registers[(offset / 8) as usize] = value
            }
            _ => {
                return Err(AccessError::Unassigned {
                    bar,
                    offset,
                    len: data.len(),
                });
            }
        }
        Ok(())
    }

    fn io_eventfds(&self, bar: usize) -> Vec<IoEventFd> {
        match bar {
            0 => vec![IoEventFd {
                offset: BELL,
                size: 8,
                fd: self.bell.try_clone().unwrap(),
            }],
            _ => Vec::new(),
        }
    }

    fn reset(&self) {
        let mut state = self.state.lock().unwrap();
        state.registers = Default::default();
        state.resets += 1;
    }
}

/// A function around a new [`Scratch`].
pub fn function() -> (Arc<Function>, Arc<Scratch>) {
    let mut model = None;
    let function = Function::new(|context| {
        let scratch = Scratch::new(context);
        model = Some(Arc::clone(&scratch));
        Ok::<_, Infallible>(scratch as Arc<dyn Model>)
    })
    .unwrap();
    (function, model.unwrap())
}

/// A server on a socket of its own, stopped and joined when dropped.
pub struct Rig {
    pub path: PathBuf,
    pub function: Arc<Function>,
    pub model: Arc<Scratch>,
    pub stop: StopFd,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    _directory: tempfile::TempDir,
}

impl Rig {
    pub fn start() -> Self {
        Self::with(ServerOptions {
            client_timeout: Duration::from_secs(60),
            ..ServerOptions::default()
        })
    }

    pub fn with(options: ServerOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.sock");
        let (function, model) = function();
        let server = Server::bind(&path, Arc::clone(&function), options).unwrap();
        let stop = StopFd::new().unwrap();
        let for_thread = stop.clone();
        let thread = std::thread::spawn(move || server.run(&for_thread));
        Self {
            path,
            function,
            model,
            stop,
            thread: Some(thread),
            _directory: directory,
        }
    }

    /// Stop and wait until the server has ended (and the socket is gone).
    pub fn finish(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .expect("the server panicked")
                .expect("the server failed");
        }
    }

    pub fn client(&self) -> driver::vfio_user::VfioUserClient {
        driver::vfio_user::VfioUserClient::connect(&self.path).unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.finish();
            assert!(!self.path.exists(), "the socket stays behind");
        }
    }
}

/// A client that sends what it is told to.
pub struct Raw {
    pub stream: UnixStream,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { stream }
    }

    /// Connected and past VERSION.
    pub fn negotiated(path: &Path) -> Self {
        Self::with_capabilities(path, "\"max_msg_fds\":16")
    }

    /// As [`Self::negotiated`], proposing these capabilities.
    pub fn with_capabilities(path: &Path, capabilities: &str) -> Self {
        let mut raw = Self::connect(path);
        let json = format!("{{\"capabilities\":{{{capabilities}}}}}\0");
        raw.send(1000, Command::VERSION, &[b"\0\0\x01\0", json.as_bytes()].concat());
        let (header, payload) = raw.reply();
        assert_eq!((header.message_id, header.flags), (1000, MessageFlags::REPLY));
        assert!(payload.starts_with(b"\0\0\x01\0{"));
        raw
    }

    pub fn frame(id: u16, command: Command, body: &[u8]) -> Vec<u8> {
        let mut frame = Header::command(id, command, body.len(), MessageFlags::COMMAND)
            .as_bytes()
            .to_vec();
        frame.extend_from_slice(body);
        frame
    }

    pub fn send(&mut self, id: u16, command: Command, body: &[u8]) {
        self.stream.write_all(&Self::frame(id, command, body)).unwrap();
    }

    pub fn send_with_fds(&mut self, id: u16, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes_with_fds(&Self::frame(id, command, body), fds);
    }

    /// What need not be a whole message.
    pub fn send_bytes_with_fds(&mut self, frame: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(
            self.stream.as_fd(),
            &[IoSlice::new(frame)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(frame.len()));
    }

    pub fn reply(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        let header = Header::read_from_bytes(&head).unwrap();
        let mut payload = vec![0; header.message_size as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// The payload of the next reply, and how many file descriptors came with it.
    pub fn reply_and_fds(&mut self) -> (Vec<u8>, usize) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // File descriptors come with a message's first byte.
        let mut head = [0; 16];
        let mut to = [IoSliceMut::new(&mut head[..1])];
        let received = recvmsg(&self.stream, &mut to, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(received.bytes, 1);
        let fds = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(list) => list.count(),
            _ => 0,
        });
        let fds = fds.sum();
        self.stream.read_exact(&mut head[1..]).unwrap();
        let header = Header::read_from_bytes(&head).unwrap();
        assert_eq!((header.flags, header.error), (MessageFlags::REPLY, 0));
        let mut payload = vec![0; header.message_size as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        (payload, fds)
    }

    /// The next reply is this error for that message.
    #[track_caller]
    pub fn expect_error(&mut self, id: u16, errno: i32) {
        let (header, payload) = self.reply();
        assert_eq!(header.message_id, id);
        assert_eq!(header.flags, MessageFlags::REPLY | MessageFlags::ERROR);
        assert_eq!(header.error, errno as u32);
        assert!(payload.is_empty());
    }

    /// The next reply is good; its payload.
    #[track_caller]
    pub fn expect_ok(&mut self, id: u16) -> Vec<u8> {
        let (header, payload) = self.reply();
        assert_eq!(
            (header.message_id, header.flags, header.error),
            (id, MessageFlags::REPLY, 0)
        );
        payload
    }

    /// The server has hung up.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        let end = self.stream.read(&mut [0; 64]);
        let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(matches!(&end, Ok(0)) || end.as_ref().is_err_and(reset), "{end:?}");
    }

    /// Map `len` bytes at `iova` without a file, for reading and writing.
    pub fn map_without_file(&mut self, id: u16, iova: u64, len: u64) {
        self.send(id, Command::DMA_MAP, dma_map(iova, len).as_bytes());
        self.expect_ok(id);
    }

    /// The next message is this command of the server's; its header and the access.
    #[track_caller]
    pub fn expect_asked(&mut self, command: Command) -> (Header, DmaAccess, Vec<u8>) {
        let (header, body) = self.reply();
        assert_eq!((header.command, header.flags), (command, MessageFlags::COMMAND));
        let (access, data) = DmaAccess::read_from_prefix(&body).unwrap();
        (header, access, data.to_vec())
    }

    /// Answer a command of the server's.
    pub fn answer(&mut self, request: &Header, body: &[&[u8]]) {
        let body = body.concat();
        let reply = request.reply(body.len());
        self.stream
            .write_all(&[reply.as_bytes(), &body].concat())
            .unwrap();
    }

    pub fn read_register(&mut self, id: u16, offset: u64) -> u64 {
        self.send(id, Command::REGION_READ, &access(offset, 0, 8, &[]));
        number(&self.expect_ok(id)[16..])
    }
}

/// Body of REGION_READ and REGION_WRITE.
pub fn access(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = protos::vfio_user::RegionAccess {
        offset,
        region,
        count,
    }
    .as_bytes()
    .to_vec();
    body.extend_from_slice(data);
    body
}

/// Body of DMA_MAP, offset 0.
pub fn dma_map(iova: u64, len: u64) -> DmaMap {
    DmaMap {
        argsz: 32,
        flags: DmaFlags::READ | DmaFlags::WRITE,
        offset: 0,
        address: iova,
        size: len,
    }
}

/// Body of DMA_UNMAP.
pub fn dma_unmap(iova: u64, len: u64) -> DmaUnmap {
    DmaUnmap {
        argsz: 24,
        flags: DmaUnmapFlags(0),
        address: iova,
        size: len,
    }
}

/// Negotiated, memory decoding and bus mastering on.
pub fn ready(path: &Path) -> Raw {
    let mut raw = Raw::negotiated(path);
    switch_on(&mut raw);
    raw
}

/// Turn memory decoding and bus mastering on.
pub fn switch_on(raw: &mut Raw) {
    raw.send(1, Command::REGION_WRITE, &access(4, 7, 2, &[6, 0]));
    raw.expect_ok(1);
}

/// Turn memory decoding and bus mastering on.
pub fn enable(client: &dyn driver::backing::Backing) {
    client.config_write(4, &6u16.to_le_bytes()).unwrap();
}
