//! A blocking vfio-user client.
//!
//! One request at a time: each call sends a message and waits for its reply under one lock, so calls of
//! several threads are served in turn. Writes without a reply ([`Backing::write_posted`]) go the same way
//! and keep their order with everything that follows.
//!
//! When a reply does not come in time, or makes no sense, the stream cannot be used any more (a late reply
//! would be taken for the next one's): the client is dead from then on, says so in each call, and
//! [`Backing::alive`] is false. Connecting anew is the caller's decision.
//!
//! The server can ask for memory that was mapped without a file descriptor
//! ([`VfioUserClient::dma_map_by_message`]), if [`ClientOptions::by_message`] says so: then a thread of the client
//! answers, on a socket of its own or on the one.
//!
//! Not implemented: migration.

mod asked;
mod error;
mod memory;
mod peer;
mod transport;

pub use error::ConnectError;
pub use memory::MessageMemory;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protos::vfio_user::{
    Capabilities, Command, DeviceFlags, DeviceInfo, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, IoFd,
    IoFdType, IoFdsInfo, IrqIndex, IrqInfo, IrqSet, IrqSetFlags, MessageFlags, RegionAccess, RegionFlags,
    RegionIndex, RegionInfo, RegionWriteOne, TwinSocket, VERSION_MAJOR, VERSION_MINOR, VersionData,
    VersionHeader, parse_sparse_mmap,
};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::backing::{Backing, BarInfo, DmaProt};
use asked::AskedThread;
use error::CallError;
use memory::MemoryMap;
use peer::Peer;
use transport::{Reply, Transport};

/// BARs of a type 0 header.
const BARS: usize = 6;
/// Data bytes in one message, unless the server accepts less.
const MAX_DATA: u32 = 1 << 20;
/// Longest reply payload that is read for a query: far more areas or sub-regions than a device has.
const MAX_QUERY: usize = 64 << 10;
/// Room for a query's first try.
const FIRST_QUERY: usize = 1024;

/// Writes in one REGION_WRITE_MULTI: what QEMU sends at most.
const MAX_MULTI_WRITES: usize = 200;

/// Whether the server may ask for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ByMessage {
    /// It may not; memory is mapped with a file descriptor.
    #[default]
    No,
    /// On the one socket, between the replies: a thread reads it and calls wait for that thread.
    OneSocket,
    /// On a socket of its own, if the server can do that, else as `OneSocket`.
    Twin,
}

/// How a client behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientOptions {
    /// How long a call waits for its reply; `None` = for ever (a device process under a debugger).
    pub reply_timeout: Option<Duration>,
    /// Whether the server may ask for memory, and where.
    pub by_message: ByMessage,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            reply_timeout: Some(Duration::from_secs(10)),
            by_message: ByMessage::No,
        }
    }
}

#[derive(Debug, Default)]
struct Bar {
    info: BarInfo,
    /// File of the mappable areas and the file offset of the BAR's start.
    file: Option<(OwnedFd, u64)>,
}

/// A device on a vfio-user socket.
#[derive(Debug)]
pub struct VfioUserClient {
    path: PathBuf,
    transport: Mutex<Transport>,
    /// Mapped without a file; none when the server may not ask.
    memory: Option<Arc<MemoryMap>>,
    /// Answers the server. Dropped with the client, which ends it.
    _asked: Option<AskedThread>,
    /// The server's commands come on a socket of their own.
    twin: bool,
    /// The transport has failed. A copy for those who do not want to wait for the lock.
    failed: AtomicBool,
    peer: Peer,
    server: Capabilities,
    resettable: bool,
    bars: [Bar; BARS],
    msix_vectors: u32,
    max_data: usize,
}

fn fixed<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, CallError> {
    let (value, _) = T::read_from_prefix(bytes)
        .map_err(|_| CallError::protocol(format!("a reply of {} bytes is too short", bytes.len())))?;
    Ok(value)
}

impl VfioUserClient {
    /// Connect with [`ClientOptions::default`].
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ConnectError> {
        Self::connect_with(path, ClientOptions::default())
    }

    /// Connect, agree on the version and ask for the device's regions and interrupts.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect_with(path: impl AsRef<Path>, options: ClientOptions) -> Result<Self, ConnectError> {
        let path = path.as_ref();
        let mut transport = Transport::connect(path, options.reply_timeout)?;
        let fail = |what: &'static str| move |error: CallError| ConnectError::from_call(path, what, error);
        let twin_wanted = options.by_message == ByMessage::Twin;
        let (server, twin) = negotiate(&mut transport, path, twin_wanted)?;
        let max_data = server.max_data_xfer_size().min(MAX_DATA) as usize;
        if max_data < 8 {
            return Err(fail("VERSION")(CallError::protocol(format!(
                "max_data_xfer_size is {max_data}"
            ))));
        }
        let memory =
            (options.by_message != ByMessage::No).then(|| Arc::new(MemoryMap::new(MAX_DATA as usize)));
        let has_twin = twin.is_some();
        let asked = match (&memory, twin) {
            (None, _) => None,
            (Some(memory), Some(twin)) => Some(
                AskedThread::start(Arc::new(twin), Arc::clone(memory)).map_err(fail("the twin socket"))?,
            ),
            (Some(memory), None) => Some(
                transport
                    .start_reader(Arc::clone(memory))
                    .map_err(fail("reading"))?,
            ),
        };
        let info = device_info(&mut transport).map_err(fail("DEVICE_GET_INFO"))?;
        if !info.flags.contains(DeviceFlags::PCI) {
            return Err(ConnectError::NotPci { path: path.into() });
        }
        let mut bars: [Bar; BARS] = Default::default();
        for (index, bar) in bars.iter_mut().enumerate().take(info.num_regions as usize) {
            *bar = bar_info(&mut transport, index as u32).map_err(fail("DEVICE_GET_REGION_INFO"))?;
        }
        let msix_vectors = if info.num_irqs > IrqIndex::MSIX.0 {
            irq_info(&mut transport, IrqIndex::MSIX)
                .map_err(fail("DEVICE_GET_IRQ_INFO"))?
                .count
        } else {
            0
        };
        let peer = Peer::of(transport.socket());
        Ok(Self {
            path: path.into(),
            transport: Mutex::new(transport),
            memory,
            _asked: asked,
            twin: has_twin,
            failed: AtomicBool::new(false),
            peer,
            server,
            resettable: info.flags.contains(DeviceFlags::RESET),
            bars,
            msix_vectors,
            max_data,
        })
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the server said about itself.
    #[must_use]
    pub fn server_capabilities(&self) -> &Capabilities {
        &self.server
    }

    #[inline(always)]
    fn with<T>(&self, call: impl FnOnce(&mut Transport) -> Result<T, CallError>) -> io::Result<T> {
        let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        call(&mut transport).map_err(|error| {
            if !matches!(error, CallError::Device(_)) {
                transport.fail(&error);
                self.failed.store(true, Ordering::Release);
            }
            error.into_io(&self.path)
        })
    }

    #[inline(always)]
    fn region_read(&self, region: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for chunk in data.chunks_mut(self.max_data) {
            let access = RegionAccess {
                offset: at,
                region: region.0,
                count: chunk.len() as u32,
            };
            let len = chunk.len();
            self.with(|transport| {
                let mut head = [0; size_of::<RegionAccess>()];
                let mut reply = Reply {
                    head: &mut head,
                    data: chunk,
                    fds: None,
                };
                let got =
                    transport.call_inline(Command::REGION_READ, access.as_bytes(), &[], &[], &mut reply)?;
                let echoed: RegionAccess = fixed(&head)?;
                if got != head.len() + len || echoed.count as usize != len {
                    return Err(CallError::protocol(format!(
                        "{} bytes asked, {} came",
                        len, echoed.count
                    )));
                }
                Ok(())
            })?;
            at += len as u64;
        }
        Ok(())
    }

    #[inline(always)]
    fn region_write(&self, region: RegionIndex, offset: u64, data: &[u8], posted: bool) -> io::Result<()> {
        let mut at = offset;
        for chunk in data.chunks(self.max_data) {
            let access = RegionAccess {
                offset: at,
                region: region.0,
                count: chunk.len() as u32,
            };
            self.with(|transport| {
                if posted {
                    return transport.post(Command::REGION_WRITE, access.as_bytes(), chunk);
                }
                let mut head = [0; size_of::<RegionAccess>()];
                let mut reply = Reply {
                    head: &mut head,
                    data: &mut [],
                    fds: None,
                };
                let got = transport.call_inline(
                    Command::REGION_WRITE,
                    access.as_bytes(),
                    chunk,
                    &[],
                    &mut reply,
                )?;
                if got != head.len() || fixed::<RegionAccess>(&head)?.count != access.count {
                    return Err(CallError::protocol(format!(
                        "{} bytes sent, not all were taken",
                        chunk.len()
                    )));
                }
                Ok(())
            })?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// Whether the server's commands come on a socket of their own.
    #[must_use]
    pub fn has_twin_socket(&self) -> bool {
        self.twin
    }

    /// Let the device reach memory that has no file: it asks for it, and a thread of this client answers.
    ///
    /// # Errors
    /// EEXIST on overlap, EOPNOTSUPP without [`ClientOptions::by_message`], the device's errno, the transport's.
    pub fn dma_map_by_message(
        &self,
        iova: u64,
        len: u64,
        memory: Arc<dyn MessageMemory>,
        prot: DmaProt,
    ) -> io::Result<()> {
        let map = self.memory.as_ref().ok_or(Errno::OPNOTSUPP)?;
        // Before the device knows: it may ask at once.
        if !map.insert(iova, len, memory, prot) {
            return Err(Errno::EXIST.into());
        }
        let mapped = self.plain(Command::DMA_MAP, map_request(iova, len, 0, prot).as_bytes(), &[]);
        if mapped.is_err() {
            map.remove(iova, 1);
        }
        mapped
    }

    /// Take all memory away, with and without files.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    pub fn dma_unmap_all(&self) -> io::Result<()> {
        self.unmap(0, 0, DmaUnmapFlags::ALL)?;
        if let Some(memory) = &self.memory {
            memory.clear();
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64, flags: DmaUnmapFlags) -> io::Result<()> {
        let unmap = DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags,
            address: iova,
            size: len,
        };
        self.with(|transport| {
            let mut payload = [0; size_of::<DmaUnmap>()];
            let mut reply = Reply {
                head: &mut payload,
                data: &mut [],
                fds: None,
            };
            transport
                .call(Command::DMA_UNMAP, unmap.as_bytes(), &[], &[], &mut reply)
                .map(drop)
        })
    }

    /// Several writes of at most 8 bytes (BAR, offset, data) in as few messages as can be; answered. How many
    /// had an effect.
    ///
    /// # Errors
    /// EINVAL for data of more than 8 bytes or no such BAR, EOPNOTSUPP when the server does not take them (see
    /// [`VfioUserClient::server_capabilities`]), the device's errno, the transport's.
    pub fn write_multi(&self, writes: &[(usize, u64, &[u8])]) -> io::Result<u64> {
        if self.server.write_multiple != Some(true) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let mut done = 0;
        for some in writes.chunks(MAX_MULTI_WRITES) {
            let mut body = (some.len() as u64).as_bytes().to_vec();
            for (bar, offset, data) in some {
                let mut one = RegionWriteOne {
                    offset: *offset,
                    region: self.region_of(*bar)?.0,
                    count: data.len() as u32,
                    data: [0; 8],
                };
                let to = one.data.get_mut(..data.len()).ok_or(Errno::INVAL)?;
                to.copy_from_slice(data);
                body.extend_from_slice(one.as_bytes());
            }
            done += self.with(|transport| {
                let mut count = [0; 8];
                let mut reply = Reply {
                    head: &mut count,
                    data: &mut [],
                    fds: None,
                };
                transport.call(Command::REGION_WRITE_MULTI, &body, &[], &[], &mut reply)?;
                let count: u64 = fixed(&count)?;
                if count > some.len() as u64 {
                    return Err(CallError::protocol(format!(
                        "{} writes, {count} were done",
                        some.len()
                    )));
                }
                Ok(count)
            })?;
        }
        Ok(done)
    }

    /// A call whose reply has no payload.
    fn plain(&self, command: Command, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.with(|transport| {
            transport
                .call(command, payload, &[], fds, &mut Reply::empty())
                .map(drop)
        })
    }

    fn region_of(&self, bar: usize) -> io::Result<RegionIndex> {
        match self.bars.get(bar) {
            Some(_) => Ok(RegionIndex(bar as u32)),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("there is no BAR{bar}; 0 to 5 exist"),
            )),
        }
    }
}

/// The server's capabilities, and the twin socket if one was agreed on.
fn negotiate(
    transport: &mut Transport,
    path: &Path,
    twin: bool,
) -> Result<(Capabilities, Option<OwnedFd>), ConnectError> {
    let ours = Capabilities {
        max_msg_fds: Some(transport::MAX_FDS as u32),
        max_data_xfer_size: Some(MAX_DATA),
        pgsizes: Some(rustix::param::page_size() as u64),
        max_dma_maps: Some(u32::from(u16::MAX)),
        write_multiple: Some(true),
        twin_socket: twin.then_some(TwinSocket {
            supported: true,
            fd_index: None,
        }),
    };
    let mut request = Vec::new();
    let version = VersionHeader {
        major: VERSION_MAJOR,
        minor: VERSION_MINOR,
    };
    VersionData {
        capabilities: Some(ours),
    }
    .encode(version, &mut request);
    let mut room = vec![0; MAX_QUERY];
    let fail = |error| ConnectError::from_call(path, "VERSION", error);
    let mut fds = Vec::new();
    let mut reply = Reply {
        head: &mut room,
        data: &mut [],
        fds: Some(&mut fds),
    };
    let len = transport
        .call(Command::VERSION, &request, &[], &[], &mut reply)
        .map_err(fail)?;
    let (version, data) =
        VersionData::parse(&room[..len]).map_err(|error| fail(CallError::protocol(error.to_string())))?;
    if version.major != VERSION_MAJOR || version.minor > VERSION_MINOR {
        return Err(ConnectError::Version {
            path: path.into(),
            major: version.major,
            minor: version.minor,
        });
    }
    let server = data.capabilities.unwrap_or_default();
    let socket = match server.twin_socket.filter(|socket| twin && socket.supported) {
        None => None,
        Some(socket) => {
            let index = socket.fd_index.unwrap_or_default() as usize;
            let count = fds.len();
            let fd = fds.into_iter().nth(index);
            Some(fd.ok_or_else(|| {
                fail(CallError::protocol(format!(
                    "the twin socket is file descriptor {index} of {count}"
                )))
            })?)
        }
    };
    Ok((server, socket))
}

fn map_request(iova: u64, len: u64, offset: u64, prot: DmaProt) -> DmaMap {
    let mut flags = DmaFlags::default();
    if prot.read {
        flags |= DmaFlags::READ;
    }
    if prot.write {
        flags |= DmaFlags::WRITE;
    }
    DmaMap {
        argsz: size_of::<DmaMap>() as u32,
        flags,
        offset,
        address: iova,
        size: len,
    }
}

fn device_info(transport: &mut Transport) -> Result<DeviceInfo, CallError> {
    let request = DeviceInfo {
        argsz: size_of::<DeviceInfo>() as u32,
        flags: DeviceFlags::default(),
        num_regions: 0,
        num_irqs: 0,
    };
    let mut payload = [0; size_of::<DeviceInfo>()];
    let mut reply = Reply {
        head: &mut payload,
        data: &mut [],
        fds: None,
    };
    let len = transport.call(Command::DEVICE_GET_INFO, request.as_bytes(), &[], &[], &mut reply)?;
    fixed(&payload[..len])
}

fn irq_info(transport: &mut Transport, index: IrqIndex) -> Result<IrqInfo, CallError> {
    let request = IrqInfo {
        argsz: size_of::<IrqInfo>() as u32,
        flags: Default::default(),
        index,
        count: 0,
    };
    let mut payload = [0; size_of::<IrqInfo>()];
    let mut reply = Reply {
        head: &mut payload,
        data: &mut [],
        fds: None,
    };
    let len = transport.call(
        Command::DEVICE_GET_IRQ_INFO,
        request.as_bytes(),
        &[],
        &[],
        &mut reply,
    )?;
    let info: IrqInfo = fixed(&payload[..len])?;
    if info.count > u32::from(protos::pci::msix::MAX_VECTORS) {
        return Err(CallError::protocol(format!(
            "{} interrupts of one type",
            info.count
        )));
    }
    Ok(info)
}

/// Ask with room for an ordinary answer, and again with the room that the server names. `request` makes the
/// payload for a given argsz; every answer starts with its full size.
fn query(
    transport: &mut Transport,
    command: Command,
    request: impl Fn(u32) -> Vec<u8>,
) -> Result<(Vec<u8>, Vec<OwnedFd>), CallError> {
    let mut room = FIRST_QUERY;
    loop {
        let mut payload = vec![0; room];
        let mut fds = Vec::new();
        let mut reply = Reply {
            head: &mut payload,
            data: &mut [],
            fds: Some(&mut fds),
        };
        let len = transport.call(command, &request(room as u32), &[], &[], &mut reply)?;
        payload.truncate(len);
        let argsz = fixed::<u32>(&payload)? as usize;
        if argsz <= room {
            return Ok((payload, fds));
        }
        if argsz > MAX_QUERY || room > FIRST_QUERY {
            return Err(CallError::protocol(format!("{command} needs {argsz} bytes")));
        }
        room = argsz;
    }
}

fn bar_info(transport: &mut Transport, index: u32) -> Result<Bar, CallError> {
    let request = |argsz| {
        let flags = RegionFlags::default();
        RegionInfo {
            argsz,
            flags,
            index: RegionIndex(index),
            cap_offset: 0,
            size: 0,
            offset: 0,
        }
        .as_bytes()
        .to_vec()
    };
    let (payload, fds) = query(transport, Command::DEVICE_GET_REGION_INFO, request)?;
    let reply = parse_sparse_mmap(&payload).map_err(|error| CallError::protocol(error.to_string()))?;
    let info = reply.info;
    let mut bar = Bar {
        info: BarInfo {
            size: info.size,
            mappable: Vec::new(),
        },
        file: None,
    };
    let Some(fd) = fds
        .into_iter()
        .next()
        .filter(|_| info.flags.contains(RegionFlags::MMAP))
    else {
        return Ok(bar);
    };
    let bytes = rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_size as u64);
    let page = rustix::param::page_size() as u64;
    let areas = match reply.areas {
        Some(areas) => areas.iter().map(|area| (area.offset, area.size)).collect(),
        None => vec![(0, info.size)],
    };
    for &(offset, size) in &areas {
        // Mapping what is not there is answered by SIGBUS, much later.
        let inside = offset.checked_add(size).filter(|end| *end <= info.size);
        let in_file = inside
            .and_then(|end| end.checked_add(info.offset))
            .is_some_and(|end| end <= bytes);
        if !in_file || offset % page != 0 || size % page != 0 || info.offset % page != 0 {
            return Err(CallError::protocol(format!(
                "BAR{index}: mappable area {offset:#x}+{size:#x} is unaligned or outside the BAR ({:#x} bytes) or its \
                 file ({bytes:#x} bytes)",
                info.size
            )));
        }
    }
    bar.info.mappable = areas;
    bar.file = Some((fd, info.offset));
    Ok(bar)
}

impl Backing for VfioUserClient {
    fn bar(&self, bar: usize) -> BarInfo {
        self.bars.get(bar).map(|bar| bar.info.clone()).unwrap_or_default()
    }

    fn bar_fd(&self, bar: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let (fd, offset) = self.bars.get(bar)?.file.as_ref()?;
        Some((fd.as_fd(), *offset))
    }

    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.region_read(self.region_of(bar)?, offset, data)
    }

    fn write(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.region_write(self.region_of(bar)?, offset, data, false)
    }

    fn write_posted(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.region_write(self.region_of(bar)?, offset, data, true)
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.region_read(RegionIndex::CONFIG, offset, data)
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.region_write(RegionIndex::CONFIG, offset, data, false)
    }

    fn msix_vectors(&self) -> u32 {
        self.msix_vectors
    }

    fn set_msix(&self, vector: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let set = IrqSet {
            argsz: IrqSet::SIZE as u32,
            flags: IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER,
            index: IrqIndex::MSIX,
            start: vector,
            count: 1,
        };
        self.plain(Command::DEVICE_SET_IRQS, set.as_bytes(), eventfd.as_slice())
    }

    fn dma_map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>, offset: u64, prot: DmaProt) -> io::Result<()> {
        let map = map_request(iova, len, offset, prot);
        self.plain(Command::DMA_MAP, map.as_bytes(), &[fd])
    }

    /// As the trait says, but that nothing is mapped there is no error with a server that accepts unmaps
    /// which cover more than was mapped.
    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        self.unmap(iova, len, DmaUnmapFlags::default())?;
        if let Some(memory) = &self.memory {
            memory.remove(iova, len);
        }
        Ok(())
    }

    fn io_eventfd(&self, bar: usize, offset: u64) -> io::Result<Option<OwnedFd>> {
        let index = self.region_of(bar)?;
        let request = |argsz| {
            IoFdsInfo {
                argsz,
                flags: 0,
                index,
                count: 0,
            }
            .as_bytes()
            .to_vec()
        };
        let answer =
            self.with(
                |transport| match query(transport, Command::DEVICE_GET_REGION_IO_FDS, request) {
                    // A server that does not know the command offers none.
                    Err(CallError::Device(Errno::NOTSUP | Errno::NOSYS)) => Ok(None),
                    other => other.map(Some),
                },
            )?;
        let Some((payload, fds)) = answer else {
            return Ok(None);
        };
        let list = payload.get(IoFdsInfo::SIZE..).unwrap_or_default();
        let found = list
            .chunks_exact(IoFd::SIZE)
            .filter_map(|entry| IoFd::read_from_bytes(entry).ok())
            .find(|entry| entry.kind == IoFdType::IOEVENTFD && entry.flags == 0 && entry.offset == offset);
        Ok(found.and_then(|entry| fds.into_iter().nth(entry.fd_index as usize)))
    }

    fn reset(&self) -> io::Result<()> {
        if !self.resettable {
            return Err(Errno::OPNOTSUPP.into());
        }
        self.plain(Command::DEVICE_RESET, &[], &[])
    }

    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.peer.pidfd.as_ref().map(AsFd::as_fd)
    }

    fn pid(&self) -> Option<u32> {
        self.peer.pid
    }

    fn alive(&self) -> bool {
        // The socket stays open as long as this object lives, so the descriptor may be looked at without
        // the lock (which a call that waits for its reply holds).
        !self.failed.load(Ordering::Acquire) && !self.peer.hung_up()
    }
}

/// The flags of a request that nobody answers.
const POSTED: MessageFlags = MessageFlags::NO_REPLY;
