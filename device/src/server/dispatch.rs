//! What each command does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protos::vfio_user::{
    Capabilities, Command, DeviceFlags, DeviceInfo, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, Header, IoFd,
    IoFdType, IoFdsInfo, IrqIndex, IrqInfo, IrqInfoFlags, IrqSetError, RegionAccess, RegionFlags,
    RegionIndex, RegionInfo, RegionWriteOne, SparseArea, SparseMmapHeader, TwinSocket, VERSION_MAJOR,
    VERSION_MINOR, VersionData, VersionError, VersionHeader, encode_sparse_mmap,
};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ErrorReplies;
use super::connection::Session;
use super::frame::{Ended, Fds, MAX_FDS};
use super::mask_events::MAX_MASK_EVENTS;
use super::requests::Outgoing;
use crate::dma::{DmaError, MAX_MAPPINGS, Prot};
use crate::model::IoEventFd;
use crate::pci::RegionError;

/// Writes in one REGION_WRITE_MULTI: what QEMU sends at most (`VFIO_USER_MULTI_MAX`).
pub(super) const MAX_MULTI_WRITES: usize = 200;

/// What the reply to VERSION may be longer than the request, for clients that know twin sockets. (No client
/// is known that does and has no room for a longer reply; QEMU has none and does not know them.)
const TWIN_ROOM: usize = 64;

/// Why a message was refused. It had no effect, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("VERSION has to come first")]
    NotNegotiated,
    #[error("VERSION has been agreed on already")]
    AlreadyNegotiated,
    #[error("VERSION cannot go without a reply")]
    VersionNoReply,
    #[error("version {0}.{1} is not spoken here (0.1 is)")]
    Version(u16, u16),
    #[error(transparent)]
    VersionData(#[from] VersionError),
    #[error("this command is not supported")]
    Unsupported,
    #[error("message type {0}")]
    MessageType(u8),
    #[error("a reply, but nothing was asked")]
    UnexpectedReply,
    #[error("more than {0} file descriptors")]
    TooManyFds(usize),
    #[error("{0} file descriptors where none belong")]
    UnexpectedFds(usize),
    #[error("{got} bytes of payload where {expected} are needed")]
    Size { expected: usize, got: usize },
    #[error("argsz {got} is below {expected}")]
    Argsz { expected: usize, got: u32 },
    #[error("flags {0:#x} are not known")]
    Flags(u32),
    #[error("{count} bytes are over the limit of {limit}")]
    Count { count: u32, limit: u32 },
    #[error("{0} writes are over the limit of {MAX_MULTI_WRITES}")]
    Writes(u64),
    #[error("a file offset without a file")]
    OffsetWithoutFile,
    #[error("no socket pair for the twin socket: {0}")]
    Twin(Errno),
    #[error("no {what} {index}")]
    NoIndex { what: &'static str, index: u32 },
    #[error(transparent)]
    Dma(#[from] DmaError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    IrqSet(#[from] IrqSetError),
    #[error("more than {MAX_MASK_EVENTS} eventfds for MASK and UNMASK")]
    MaskEvents,
    #[error("an eventfd for MASK or UNMASK cannot be watched: {0}")]
    MaskEvent(Errno),
    #[error("file descriptor {0} is not an eventfd")]
    NotAnEventFd(usize),
}

impl Refusal {
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::Unsupported => Errno::NOTSUP,
            Self::Count { .. } | Self::Writes(_) => Errno::TOOBIG,
            Self::Twin(errno) | Self::MaskEvent(errno) => *errno,
            Self::MaskEvents => Errno::NOSPC,
            Self::Dma(error) => error.errno(),
            Self::Region(error) => error.errno(),
            _ => Errno::INVAL,
        }
    }
}

/// File descriptors that go with a reply.
pub(super) enum ReplyFds<'f> {
    None,
    Region(BorrowedFd<'f>),
    Io(Vec<IoEventFd>),
    Twin(OwnedFd),
}

impl ReplyFds<'_> {
    /// Sends the reply that they go with.
    pub(super) fn send_with(&self, out: &Outgoing, message: &[u8]) -> Result<(), Ended> {
        match self {
            Self::None => out.send(message, &[]),
            Self::Region(fd) => out.send(message, &[*fd]),
            Self::Twin(fd) => out.send(message, &[fd.as_fd()]),
            Self::Io(list) => {
                let fds: Vec<_> = list.iter().map(|io| io.fd.as_fd()).collect();
                out.send(message, &fds)
            }
        }
    }
}

/// A reply, in a buffer that is used again: room for the header, then the payload.
#[derive(Debug, Default)]
pub(super) struct ReplyBuffer(Vec<u8>);

impl ReplyBuffer {
    /// Start a reply without payload.
    pub(super) fn clear(&mut self) {
        self.0.clear();
        self.0.resize(Header::SIZE, 0);
    }

    /// The whole message that answers `request`.
    pub(super) fn finish(&mut self, request: &Header) -> &[u8] {
        let header = request.reply(self.0.len() - Header::SIZE);
        self.0[..Header::SIZE].copy_from_slice(header.as_bytes());
        &self.0
    }

    /// A message that is a header and `padding` bytes of zeros.
    pub(super) fn padded(&mut self, header: &Header, padding: usize) -> &[u8] {
        self.0.clear();
        self.0.extend_from_slice(header.as_bytes());
        self.0.resize(Header::SIZE + padding, 0);
        &self.0
    }

    fn put(&mut self, value: &(impl IntoBytes + Immutable)) {
        self.0.extend_from_slice(value.as_bytes());
    }

    /// Append `len` zero bytes to be overwritten.
    fn space(&mut self, len: usize) -> &mut [u8] {
        let start = self.0.len();
        self.0.resize(start + len, 0);
        &mut self.0[start..]
    }
}

/// A body that is exactly one structure.
pub(super) fn exactly<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, Refusal> {
    T::read_from_bytes(body).map_err(|_| Refusal::Size {
        expected: size_of::<T>(),
        got: body.len(),
    })
}

/// A body that starts with a structure.
pub(super) fn starts_with<T: FromBytes + KnownLayout + Immutable>(
    body: &[u8],
) -> Result<(T, &[u8]), Refusal> {
    T::read_from_prefix(body).map_err(|_| Refusal::Size {
        expected: size_of::<T>(),
        got: body.len(),
    })
}

fn check_argsz(argsz: u32, expected: usize) -> Result<(), Refusal> {
    if (argsz as usize) < expected {
        return Err(Refusal::Argsz { expected, got: argsz });
    }
    Ok(())
}

impl<'f> Session<'f> {
    pub(super) fn dispatch(
        &mut self,
        header: &Header,
        body: &[u8],
        fds: &mut Fds,
        reply: &mut ReplyBuffer,
    ) -> Result<ReplyFds<'f>, Refusal> {
        let command = header.command;
        if command == Command::VERSION {
            return self.version(header, body, fds, reply);
        }
        if self.negotiated.is_none() {
            return Err(Refusal::NotNegotiated);
        }
        if fds.len() > 0 && !matches!(command, Command::DMA_MAP | Command::DEVICE_SET_IRQS) {
            return Err(Refusal::UnexpectedFds(fds.len()));
        }
        match command {
            Command::REGION_READ => self.region_read(body, reply)?,
            Command::REGION_WRITE => self.region_write(body, reply)?,
            Command::REGION_WRITE_MULTI if self.write_multiple => self.region_write_multi(body, reply)?,
            Command::DMA_MAP => self.dma_map(body, fds)?,
            Command::DMA_UNMAP => self.dma_unmap(body, reply)?,
            Command::DEVICE_GET_INFO => self.device_info(body, reply)?,
            Command::DEVICE_GET_REGION_INFO => return self.region_info(body, reply),
            Command::DEVICE_GET_REGION_IO_FDS => return self.region_io_fds(body, reply),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(body, reply)?,
            Command::DEVICE_SET_IRQS => {
                super::irqs::set_irqs(self.function, body, fds, &mut self.mask_events)?;
            }
            Command::DEVICE_RESET => {
                if !body.is_empty() {
                    return Err(Refusal::Size {
                        expected: 0,
                        got: body.len(),
                    });
                }
                self.function.reset();
            }
            _ => return Err(Refusal::Unsupported),
        }
        Ok(ReplyFds::None)
    }

    fn version(
        &mut self,
        header: &Header,
        body: &[u8],
        fds: &Fds,
        reply: &mut ReplyBuffer,
    ) -> Result<ReplyFds<'f>, Refusal> {
        if self.negotiated.is_some() {
            return Err(Refusal::AlreadyNegotiated);
        }
        if header.no_reply() {
            return Err(Refusal::VersionNoReply);
        }
        if fds.len() > 0 {
            return Err(Refusal::UnexpectedFds(fds.len()));
        }
        let (version, data) = VersionData::parse(body)?;
        if version.major != VERSION_MAJOR {
            return Err(Refusal::Version(version.major, version.minor));
        }
        let theirs = data.capabilities.clone().unwrap_or_default();
        let ours = Capabilities {
            max_msg_fds: Some(MAX_FDS as u32),
            max_data_xfer_size: Some(self.options.max_data_xfer_size),
            pgsizes: Some(rustix::param::page_size() as u64),
            max_dma_maps: Some(MAX_MAPPINGS as u32),
            write_multiple: Some(true),
            // Its file descriptor comes with the reply.
            twin_socket: (theirs.max_msg_fds() > 0).then_some(TwinSocket {
                supported: true,
                fd_index: Some(0),
            }),
        };
        let minor = version.minor.min(VERSION_MINOR);
        let answer = VersionData {
            capabilities: data.capabilities.as_ref().map(|theirs| ours.answer_to(theirs)),
        };
        // A client that can do a twin socket could not name the descriptor: there is more to be said to it.
        let twin = answer
            .capabilities
            .as_ref()
            .is_some_and(|answer| answer.twin_socket.is_some());
        let limit = body.len() + if twin { TWIN_ROOM } else { 0 };
        let sent = answer.encode_within(
            VersionHeader {
                major: VERSION_MAJOR,
                minor,
            },
            limit,
            &mut reply.0,
        );
        tracing::debug!(?version, ?theirs, "version agreed on");
        let agreed = sent.capabilities.unwrap_or_default();
        let reply_fds = match agreed.twin_socket {
            None => ReplyFds::None,
            Some(_) => {
                let (ours, client) = super::twin::pair().map_err(Refusal::Twin)?;
                self.twin = Some(ours);
                ReplyFds::Twin(client)
            }
        };
        self.write_multiple = agreed.write_multiple == Some(true);
        self.negotiated = Some(theirs);
        if self.options.error_replies == ErrorReplies::Auto {
            self.padded_errors = VersionData::is_from_vfio_user_crate(body);
        }
        Ok(reply_fds)
    }

    fn device_info(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let request: DeviceInfo = exactly(body)?;
        check_argsz(request.argsz, size_of::<DeviceInfo>())?;
        reply.put(&DeviceInfo {
            argsz: size_of::<DeviceInfo>() as u32,
            flags: DeviceFlags::RESET | DeviceFlags::PCI,
            num_regions: RegionIndex::COUNT,
            num_irqs: IrqIndex::COUNT,
        });
        Ok(())
    }

    /// File descriptors that the client takes in one message.
    fn client_fds(&self) -> usize {
        self.negotiated.as_ref().map_or(1, Capabilities::max_msg_fds) as usize
    }

    fn region_info(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<ReplyFds<'f>, Refusal> {
        let request: RegionInfo = exactly(body)?;
        check_argsz(request.argsz, RegionInfo::SIZE)?;
        let index = request.index;
        let region = self.function.region(index).ok_or(Refusal::NoIndex {
            what: "region",
            index: index.0,
        })?;
        let mut info = RegionInfo {
            argsz: RegionInfo::SIZE as u32,
            flags: RegionFlags::default(),
            index,
            cap_offset: 0,
            size: region.size,
            offset: 0,
        };
        if region.size > 0 {
            info.flags |= RegionFlags::READ | RegionFlags::WRITE;
        }
        // What cannot be handed over cannot be mapped.
        let takes_fds = self.client_fds() > 0;
        let Some(mmap) = region.mmap.filter(|mmap| takes_fds && !mmap.areas.is_empty()) else {
            reply.put(&info);
            return Ok(ReplyFds::None);
        };
        info.flags |= RegionFlags::MMAP;
        if mmap.areas != [(0, region.size)] {
            info.flags |= RegionFlags::CAPS;
            let areas = mmap.areas.len() * size_of::<SparseArea>();
            info.argsz += (size_of::<SparseMmapHeader>() + areas) as u32;
            // Also in a short reply: QEMU refuses the flag with an offset below 32.
            info.cap_offset = RegionInfo::SIZE as u32;
        }
        reply.put(&info);
        if request.argsz < info.argsz {
            // A short reply tells the size; the file descriptor comes with the full one.
            return Ok(ReplyFds::None);
        }
        if info.flags.contains(RegionFlags::CAPS) {
            encode_sparse_mmap(&mmap.areas, &mut reply.0);
        }
        Ok(ReplyFds::Region(mmap.fd.as_fd()))
    }

    fn region_io_fds(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<ReplyFds<'f>, Refusal> {
        let request: IoFdsInfo = exactly(body)?;
        check_argsz(request.argsz, IoFdsInfo::SIZE)?;
        if request.flags != 0 {
            return Err(Refusal::Flags(request.flags));
        }
        let index = request.index;
        self.function.region(index).ok_or(Refusal::NoIndex {
            what: "region",
            index: index.0,
        })?;
        let mut list = self.function.io_eventfds(index);
        list.truncate(MAX_FDS.min(self.client_fds()));
        let full = IoFdsInfo::SIZE + list.len() * IoFd::SIZE;
        reply.put(&IoFdsInfo {
            argsz: full as u32,
            flags: 0,
            index,
            count: list.len() as u32,
        });
        if (request.argsz as usize) < full || list.is_empty() {
            return Ok(ReplyFds::None);
        }
        for (fd_index, io) in list.iter().enumerate() {
            reply.put(&IoFd {
                offset: io.offset,
                size: io.size,
                fd_index: fd_index as u32,
                kind: IoFdType::IOEVENTFD,
                flags: 0,
                padding: 0,
                datamatch: 0,
            });
        }
        Ok(ReplyFds::Io(list))
    }

    fn irq_info(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let request: IrqInfo = exactly(body)?;
        check_argsz(request.argsz, size_of::<IrqInfo>())?;
        let index = request.index;
        if index.0 >= IrqIndex::COUNT {
            return Err(Refusal::NoIndex {
                what: "interrupt type",
                index: index.0,
            });
        }
        let count = self.function.irq_count(index);
        let mut flags = IrqInfoFlags::default();
        if count > 0 {
            flags |= IrqInfoFlags::EVENTFD | IrqInfoFlags::MASKABLE;
            if index == IrqIndex::INTX {
                flags |= IrqInfoFlags::AUTOMASKED;
            }
        }
        reply.put(&IrqInfo {
            argsz: size_of::<IrqInfo>() as u32,
            flags,
            index,
            count,
        });
        Ok(())
    }

    fn check_count(&self, count: u32) -> Result<(), Refusal> {
        let limit = self.options.max_data_xfer_size;
        if count > limit {
            return Err(Refusal::Count { count, limit });
        }
        Ok(())
    }

    fn region_read(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let access: RegionAccess = exactly(body)?;
        self.check_count(access.count)?;
        reply.put(&access);
        let data = reply.space(access.count as usize);
        self.function
            .region_read(RegionIndex(access.region), access.offset, data)?;
        Ok(())
    }

    fn region_write(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let (access, data): (RegionAccess, _) = starts_with(body)?;
        self.check_count(access.count)?;
        if data.len() != access.count as usize {
            let expected = size_of::<RegionAccess>() + access.count as usize;
            return Err(Refusal::Size {
                expected,
                got: body.len(),
            });
        }
        self.function
            .region_write(RegionIndex(access.region), access.offset, data)?;
        reply.put(&access);
        Ok(())
    }

    /// All writes are checked before one is done; then each is done, as if it had come by itself. One that the
    /// model does not decode has no effect, as on a bus. The reply says how many had one.
    fn region_write_multi(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let (count, rest): (u64, _) = starts_with(body)?;
        if count > MAX_MULTI_WRITES as u64 {
            return Err(Refusal::Writes(count));
        }
        let expected = count as usize * RegionWriteOne::SIZE;
        if rest.len() != expected {
            return Err(Refusal::Size {
                expected: size_of::<u64>() + expected,
                got: body.len(),
            });
        }
        let writes = || {
            rest.chunks_exact(RegionWriteOne::SIZE)
                .map(|one| RegionWriteOne::read_from_bytes(one).expect("an exact chunk"))
        };
        for one in writes() {
            let limit = one.data.len() as u32;
            if one.count > limit {
                return Err(Refusal::Count {
                    count: one.count,
                    limit,
                });
            }
            self.function
                .check_access(RegionIndex(one.region), one.offset, one.count as usize)?;
        }
        let mut done = 0u64;
        let mut failed = None;
        for one in writes() {
            let data = &one.data[..one.count as usize];
            match self
                .function
                .region_write(RegionIndex(one.region), one.offset, data)
            {
                Ok(()) => done += 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) if done == 0 => return Err(error.into()),
            Some(error) => tracing::debug!(%error, done, count, "not all writes of a message had an effect"),
            None => {}
        }
        reply.put(&done);
        Ok(())
    }

    fn dma_map(&self, body: &[u8], fds: &mut Fds) -> Result<(), Refusal> {
        let map: DmaMap = exactly(body)?;
        check_argsz(map.argsz, size_of::<DmaMap>())?;
        if map.flags.unknown() != 0 {
            return Err(Refusal::Flags(map.flags.0));
        }
        let prot = Prot {
            read: map.flags.contains(DmaFlags::READ),
            write: map.flags.contains(DmaFlags::WRITE),
        };
        let dma = self.function.dma();
        match fds.len() {
            // QEMU: ROMs, RAM without share=on, BARs of other devices.
            0 if map.offset != 0 => return Err(Refusal::OffsetWithoutFile),
            0 => dma.map_by_message(map.address, map.size, prot)?,
            1 => {
                let fd = fds.take(0).expect("one file descriptor came");
                dma.map(map.address, map.size, fd, map.offset, prot)?;
            }
            several => return Err(Refusal::UnexpectedFds(several)),
        }
        Ok(())
    }

    fn dma_unmap(&self, body: &[u8], reply: &mut ReplyBuffer) -> Result<(), Refusal> {
        let unmap: DmaUnmap = exactly(body)?;
        check_argsz(unmap.argsz, size_of::<DmaUnmap>())?;
        if unmap.flags.contains(DmaUnmapFlags::GET_DIRTY_BITMAP) {
            return Err(Refusal::Unsupported);
        }
        let dma = self.function.dma();
        match unmap.flags {
            DmaUnmapFlags::ALL => dma.unmap_all(),
            DmaUnmapFlags(0) => {
                // QEMU unmaps the whole space as two halves, the second of which ends at 2^64. Nothing can be
                // mapped on its last page, so one byte less is as good and does not wrap.
                let to_the_top = unmap.size > 0 && unmap.address.wrapping_add(unmap.size) == 0;
                dma.unmap(unmap.address, unmap.size - u64::from(to_the_top))?;
            }
            flags => return Err(Refusal::Flags(flags.0)),
        }
        // Space::unmap has returned: no engine can use the range any more. This reply says so.
        reply.put(&unmap);
        Ok(())
    }
}
