//! What a client may do, by `arbitrary`: well-formed messages most of the time (so that the server gets
//! past its first checks), damaged ones, and bytes.
#![allow(missing_docs)] // The fields are those of the messages, of the same name.

use arbitrary::{Arbitrary, Unstructured};
use protos::vfio_user::{
    Command, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, Header, IoFdsInfo, IrqIndex, IrqSet, IrqSetFlags,
    MessageFlags, RegionAccess, RegionIndex, RegionInfo,
};
use zerocopy::IntoBytes;

use super::model::{BELL, FETCH, RAISE, STORE};

/// Data bytes that the fuzzed server accepts in one message: small, so that a message can be too large.
pub const MAX_DATA: u32 = 64 << 10;

/// A whole connection.
#[derive(Debug, Clone)]
pub struct Session {
    /// Say VERSION properly first (the rest is mostly refused without).
    pub version: Opening,
    /// How the client answers what the server asks of it.
    pub serving: Serving,
    /// In this order.
    pub steps: Vec<Step>,
    /// The end.
    pub ending: Ending,
}

/// How a connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Opening {
    /// VERSION, its reply, memory decoding and bus mastering on.
    Ready,
    /// VERSION and its reply.
    Version,
    /// As `Ready`, in a field of the choice so that most sessions get far.
    ReadyToo,
    /// Nothing.
    Silent,
}

/// What the client does with DMA_READ and DMA_WRITE of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Serving {
    /// The right answer.
    Good,
    /// An error.
    Refuse,
    /// A reply of the wrong size.
    WrongSize,
    /// A reply to something else.
    WrongId,
    /// None.
    Silent,
}

/// One thing done.
#[derive(Debug, Clone, Arbitrary)]
pub struct Step {
    /// What.
    pub action: Action,
    /// How its bytes are sent.
    pub delivery: Delivery,
}

/// How a message's bytes are sent.
#[derive(Debug, Clone, Copy)]
pub enum Delivery {
    /// At once, and the answers that are there are read.
    Whole,
    /// At once, nothing is read.
    Unread,
    /// Together with the next message, in one system call.
    Glued,
    /// In pieces of that size + 1, file descriptors with the first one.
    Pieces(u8),
    /// Two pieces; file descriptors with the second one.
    LateFds(u8),
    /// Only that part of 256ths, and the connection goes on with the next message.
    Cut(u8),
    /// The size field is off by that.
    WrongSize(i8),
    /// The size field is this.
    Size(u32),
    /// One byte is another.
    Flip(u16, u8),
}

/// File descriptors that go with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Kind {
    /// A memfd of 64 KiB, shared by the session.
    Memory,
    /// A sealed memfd of 64 KiB.
    Sealed,
    /// An eventfd.
    Event,
    /// An eventfd whose counter is full and which is blocking.
    FullEvent,
    /// A pipe that nobody reads.
    Pipe,
    /// A directory.
    Directory,
    /// A socket, whose own peer is closed.
    Socket,
}

/// Number and kind of file descriptors.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Files {
    /// What.
    pub kind: Kind,
    /// How many, scaled: mostly what the message wants, else up to 253.
    pub count: FileCount,
}

/// How many file descriptors.
#[derive(Debug, Clone, Copy)]
pub enum FileCount {
    /// As many as the message wants.
    Right,
    /// None.
    None,
    /// That many (of the 253 that the kernel takes).
    Some(u8),
}

/// A message, or something else that a client can do.
#[derive(Debug, Clone, Arbitrary)]
pub enum Action {
    /// Any bytes.
    Bytes(Body),
    /// A header of any command with any body.
    Message {
        command: u16,
        flags: u8,
        body: Body,
        files: Files,
    },
    /// A known command (number 1 to 19) with any body.
    Known { command: u8, body: Body, files: Files },
    /// VERSION with that JSON.
    Version { minor: u16, json: Json },
    /// DEVICE_GET_INFO, _REGION_INFO, _REGION_IO_FDS, _IRQ_INFO.
    Info { which: u8, argsz: Argsz, index: u8 },
    /// REGION_READ.
    Read { place: Place, count: Count },
    /// REGION_WRITE.
    Write {
        place: Place,
        count: Count,
        value: u64,
        posted: bool,
    },
    /// Several writes in one message.
    WriteMulti { count: u8, place: Place, value: u64 },
    /// DMA_MAP.
    Map {
        page: u8,
        pages: u8,
        offset: u8,
        rights: u8,
        files: Files,
        odd: u8,
    },
    /// DMA_UNMAP.
    Unmap { page: u8, pages: u8, all: bool, odd: u8 },
    /// The model reads or writes client memory.
    Dma { store: bool, page: u8, within: u16 },
    /// DEVICE_SET_IRQS.
    Irqs {
        flags: IrqFlags,
        index: u8,
        start: u8,
        count: u8,
        files: Files,
    },
    /// The model raises a vector.
    Raise(u8),
    /// DEVICE_RESET.
    Reset,
    /// Change the size of the session's memory, in pages.
    Truncate(u8),
    /// Read what has come, up to that many bytes.
    Drain(u16),
    /// Let the server run, up to a few milliseconds.
    Pause(u8),
    /// Another client comes, says VERSION and goes.
    SecondClient,
    /// Shut one direction down.
    Shutdown { write: bool, rarely: u8 },
}

/// JSON of VERSION.
#[derive(Debug, Clone, Arbitrary)]
pub enum Json {
    /// None at all.
    None,
    /// Well formed.
    Good {
        max_msg_fds: u32,
        max_data_xfer_size: u32,
        multi: bool,
        twin: bool,
    },
    /// Any text.
    Text(Body),
    /// Nested this deep.
    Deep(u8),
}

/// argsz of a request.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Argsz {
    /// The fixed part.
    Fixed,
    /// Large enough for everything.
    Large,
    /// Any.
    Any(u32),
}

/// Where a region access goes.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Place {
    /// A register of BAR 0.
    Register(u8),
    /// A register with an effect.
    Effect(u8),
    /// Config space.
    Config(u8),
    /// MSI-X table or PBA.
    Msix(u16),
    /// Anywhere.
    Any { region: u32, offset: u64 },
    /// In that region, near its start.
    Near { region: u8, offset: u16 },
}

/// Bytes of an access.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Count {
    /// 8.
    Eight,
    /// 4.
    Four,
    /// A few.
    Small(u8),
    /// Thousands.
    Medium(u16),
    /// As said, with no such data.
    Lie(u32),
}

/// Flags of SET_IRQS.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum IrqFlags {
    /// Data form and action by number.
    Pair(u8, u8),
    /// Any.
    Any(u32),
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Ending {
    /// Everything is read, then closed.
    Clean,
    /// Closed with answers unread (the kernel then resets the connection).
    Abrupt,
    /// In the middle of a message.
    Cut,
}

/// Bytes, up to 96 of them.
#[derive(Debug, Clone)]
pub struct Body(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Body {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let len = u.int_in_range(0..=96)?.min(u.len());
        Ok(Self(u.bytes(len)?.to_vec()))
    }
}

impl<'a> Arbitrary<'a> for Session {
    /// As many steps as there are bytes for (at most 48): by default a sequence has two on average.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let (version, serving, ending) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
        let mut steps = Vec::new();
        while !u.is_empty() && steps.len() < 48 {
            steps.push(u.arbitrary()?);
        }
        Ok(Self {
            version,
            serving,
            steps,
            ending,
        })
    }
}

impl<'a> Arbitrary<'a> for Delivery {
    /// Mostly whole: what is damaged mostly ends a connection, and nothing after it counts.
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? {
            0..=159 => Self::Whole,
            160..=179 => Self::Unread,
            180..=204 => Self::Glued,
            205..=219 => Self::Pieces(u.arbitrary()?),
            220..=227 => Self::LateFds(u.arbitrary()?),
            228..=231 => Self::Cut(u.arbitrary()?),
            232..=238 => Self::WrongSize(u.arbitrary()?),
            239..=243 => Self::Size(u.arbitrary()?),
            _ => Self::Flip(u.arbitrary()?, u.arbitrary()?),
        })
    }
}

impl<'a> Arbitrary<'a> for FileCount {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? {
            0..=219 => Self::Right,
            220..=239 => Self::None,
            _ => Self::Some(u.arbitrary()?),
        })
    }
}

/// A message ready to be sent: bytes, and which file descriptors.
#[derive(Debug, Default)]
pub struct Wire {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Kind and number of file descriptors.
    pub files: Option<(Kind, usize)>,
}

impl Place {
    fn resolve(self) -> (u32, u64) {
        match self {
            Self::Register(n) => (0, u64::from(n % 9) * 8),
            Self::Effect(n) => (0, [FETCH, STORE, RAISE, BELL][usize::from(n % 4)]),
            Self::Config(n) => (RegionIndex::CONFIG.0, u64::from(n)),
            Self::Msix(n) => (0, 0x2000 + u64::from(n % 0x2000)),
            Self::Any { region, offset } => (region, offset),
            Self::Near { region, offset } => (u32::from(region % 10), u64::from(offset)),
        }
    }
}

impl Count {
    /// (count field, bytes of data)
    fn resolve(self) -> (u32, usize) {
        let count = match self {
            Self::Eight => 8,
            Self::Four => 4,
            Self::Small(n) => u32::from(n % 32),
            Self::Medium(n) => u32::from(n),
            Self::Lie(n) => return (n, 8),
        };
        (count, count as usize)
    }
}

impl Files {
    fn resolve(self, wanted: usize) -> Option<(Kind, usize)> {
        let count = match self.count {
            FileCount::Right => wanted,
            FileCount::None => 0,
            FileCount::Some(n) => usize::from(n).min(253),
        };
        (count > 0).then_some((self.kind, count))
    }
}

impl Json {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Good {
                max_msg_fds,
                max_data_xfer_size,
                multi,
                twin,
            } => format!(
                "{{\"capabilities\":{{\"max_msg_fds\":{max_msg_fds},\"max_data_xfer_size\":{max_data_xfer_size},\
                 \"write_multiple\":{multi},\"twin_socket\":{{\"supported\":{twin}}},\"pgsizes\":4096}}}}\0"
            )
            .into_bytes(),
            Self::Text(text) => [&text.0[..], b"\0"].concat(),
            Self::Deep(depth) => {
                let depth = usize::from(*depth) * 4;
                [vec![b'['; depth], vec![b']'; depth], vec![0]].concat()
            }
        }
    }
}

/// A command with its body.
#[must_use]
pub fn frame(id: u16, command: Command, flags: MessageFlags, body: &[u8]) -> Vec<u8> {
    let mut bytes = Header::command(id, command, body.len(), flags)
        .as_bytes()
        .to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn access(place: Place, count: u32, data: &[u8]) -> Vec<u8> {
    let (region, offset) = place.resolve();
    let head = RegionAccess {
        offset,
        region,
        count,
    };
    [head.as_bytes(), data].concat()
}

impl Action {
    /// The message, if the action is one.
    #[must_use]
    pub fn wire(&self, id: u16) -> Option<Wire> {
        let plain = |command, body: &[u8]| frame(id, command, MessageFlags::COMMAND, body);
        let (bytes, files) = match self {
            Self::Bytes(bytes) => (bytes.0.clone(), None),
            Self::Message {
                command,
                flags,
                body,
                files,
            } => (
                frame(id, Command(*command), MessageFlags(u32::from(*flags)), &body.0),
                files.resolve(1),
            ),
            Self::Known { command, body, files } => (
                plain(Command(1 + u16::from(command % 19)), &body.0),
                files.resolve(1),
            ),
            Self::Version { minor, json } => {
                let mut body = vec![0, 0];
                body.extend(minor.to_ne_bytes());
                body.extend(json.bytes());
                (plain(Command::VERSION, &body), None)
            }
            Self::Info { which, argsz, index } => (info(id, *which, *argsz, *index), None),
            Self::Read { place, count } => (
                plain(Command::REGION_READ, &access(*place, count.resolve().0, &[])),
                None,
            ),
            Self::Write {
                place,
                count,
                value,
                posted,
            } => {
                let (count, len) = count.resolve();
                let data: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(len).collect();
                let flags = if *posted {
                    MessageFlags::NO_REPLY
                } else {
                    MessageFlags::COMMAND
                };
                let body = access(*place, count, &data);
                (frame(id, Command::REGION_WRITE, flags, &body), None)
            }
            Self::WriteMulti { count, place, value } => {
                let mut body = u64::from(*count).to_le_bytes().to_vec();
                // One write that the number does not count, now and then one too few.
                for _ in 0..count.saturating_sub(count & 1) {
                    body.extend(access(*place, 8, &value.to_le_bytes()));
                }
                (plain(Command::REGION_WRITE_MULTI, &body), None)
            }
            Self::Map {
                page,
                pages,
                offset,
                rights,
                files,
                odd,
            } => {
                let map = DmaMap {
                    argsz: 32,
                    flags: DmaFlags(u32::from(rights % 5)),
                    offset: u64::from(offset % 18) << 12,
                    address: (u64::from(*page) << 12) + u64::from(*odd == 1),
                    size: (u64::from(pages % 18) << 12) + u64::from(*odd == 2),
                };
                (plain(Command::DMA_MAP, map.as_bytes()), files.resolve(1))
            }
            Self::Unmap {
                page,
                pages,
                all,
                odd,
            } => {
                let unmap = DmaUnmap {
                    argsz: 24,
                    flags: if *all {
                        DmaUnmapFlags::ALL
                    } else {
                        DmaUnmapFlags(u32::from(*odd / 200))
                    },
                    address: (u64::from(*page) << 12) + u64::from(*odd == 1),
                    size: match odd {
                        2 => u64::MAX,
                        3 => 0u64.wrapping_sub(u64::from(*page) << 12),
                        _ => u64::from(*pages) << 12,
                    },
                };
                (plain(Command::DMA_UNMAP, unmap.as_bytes()), None)
            }
            Self::Dma { store, page, within } => {
                let iova = (u64::from(*page) << 12) + u64::from(within % 4096);
                let place = Place::Effect(u8::from(*store));
                (
                    plain(Command::REGION_WRITE, &access(place, 8, &iova.to_le_bytes())),
                    None,
                )
            }
            Self::Irqs {
                flags,
                index,
                start,
                count,
                files,
            } => irqs(id, *flags, *index, *start, *count, *files),
            Self::Raise(vector) => {
                let body = access(Place::Effect(2), 8, &u64::from(*vector).to_le_bytes());
                (plain(Command::REGION_WRITE, &body), None)
            }
            Self::Reset => (plain(Command::DEVICE_RESET, &[]), None),
            Self::Truncate(_)
            | Self::Drain(_)
            | Self::Pause(_)
            | Self::SecondClient
            | Self::Shutdown { .. } => {
                return None;
            }
        };
        Some(Wire { bytes, files })
    }
}

fn info(id: u16, which: u8, argsz: Argsz, index: u8) -> Vec<u8> {
    let (command, fixed) = match which % 4 {
        0 => (Command::DEVICE_GET_INFO, 16),
        1 => (Command::DEVICE_GET_REGION_INFO, RegionInfo::SIZE),
        2 => (Command::DEVICE_GET_REGION_IO_FDS, IoFdsInfo::SIZE),
        _ => (Command::DEVICE_GET_IRQ_INFO, 16),
    };
    let argsz = match argsz {
        Argsz::Fixed => fixed as u32,
        Argsz::Large => 4096,
        Argsz::Any(n) => n,
    };
    let mut body = vec![0; fixed];
    body[..4].copy_from_slice(&argsz.to_ne_bytes());
    body[8] = index % 11;
    frame(id, command, MessageFlags::COMMAND, &body)
}

fn irqs(
    id: u16,
    flags: IrqFlags,
    index: u8,
    start: u8,
    count: u8,
    files: Files,
) -> (Vec<u8>, Option<(Kind, usize)>) {
    let flags = match flags {
        IrqFlags::Pair(form, action) => (1 << (form % 3)) | (8 << (action % 3)),
        IrqFlags::Any(bits) => bits,
    };
    let count = u32::from(count % 24);
    let set = IrqSet {
        argsz: 20,
        flags: IrqSetFlags(flags),
        index: if index < 200 {
            IrqIndex::MSIX
        } else {
            IrqIndex(u32::from(index) - 200)
        },
        start: u32::from(start % 24),
        count,
    };
    let mut body = set.as_bytes().to_vec();
    if flags & 2 != 0 {
        body.extend((0..count).map(|n| (n % 2) as u8));
    }
    let wanted = if flags & 4 != 0 { count as usize } else { 0 };
    (
        frame(id, Command::DEVICE_SET_IRQS, MessageFlags::COMMAND, &body),
        files.resolve(wanted),
    )
}
