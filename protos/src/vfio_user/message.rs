//! The header and the fixed-size payloads.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::flags;

/// Message command (spec, "Commands"). Open: unknown values survive and are answered with an error.
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct Command(pub u16);

impl Command {
    /// Agree on version and capabilities; the first message.
    pub const VERSION: Self = Self(1);
    /// Client memory appears.
    pub const DMA_MAP: Self = Self(2);
    /// Client memory disappears.
    pub const DMA_UNMAP: Self = Self(3);
    /// Device flags, number of regions and interrupt types.
    pub const DEVICE_GET_INFO: Self = Self(4);
    /// One region.
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    /// File descriptors that stand for writes to parts of a region.
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    /// One interrupt type.
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    /// Route, mask, trigger interrupts.
    pub const DEVICE_SET_IRQS: Self = Self(8);
    /// Read from a region.
    pub const REGION_READ: Self = Self(9);
    /// Write to a region.
    pub const REGION_WRITE: Self = Self(10);
    /// Server reads client memory.
    pub const DMA_READ: Self = Self(11);
    /// Server writes client memory.
    pub const DMA_WRITE: Self = Self(12);
    /// Reset the device.
    pub const DEVICE_RESET: Self = Self(13);
    /// Dirty page logging of earlier revisions (QEMU `hw/vfio-user/protocol.h`).
    pub const DIRTY_PAGES: Self = Self(14);
    /// Several writes in one message.
    pub const REGION_WRITE_MULTI: Self = Self(15);
    /// Get, set or probe a feature.
    pub const DEVICE_FEATURE: Self = Self(16);
    /// Read migration data.
    pub const MIG_DATA_READ: Self = Self(17);
    /// Write migration data.
    pub const MIG_DATA_WRITE: Self = Self(18);

    /// The name in the specification, without its prefix.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::VERSION => "VERSION",
            Self::DMA_MAP => "DMA_MAP",
            Self::DMA_UNMAP => "DMA_UNMAP",
            Self::DEVICE_GET_INFO => "DEVICE_GET_INFO",
            Self::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            Self::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            Self::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            Self::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            Self::REGION_READ => "REGION_READ",
            Self::REGION_WRITE => "REGION_WRITE",
            Self::DMA_READ => "DMA_READ",
            Self::DMA_WRITE => "DMA_WRITE",
            Self::DEVICE_RESET => "DEVICE_RESET",
            Self::DIRTY_PAGES => "DIRTY_PAGES",
            Self::REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            Self::DEVICE_FEATURE => "DEVICE_FEATURE",
            Self::MIG_DATA_READ => "MIG_DATA_READ",
            Self::MIG_DATA_WRITE => "MIG_DATA_WRITE",
            _ => return None,
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "command {}", self.0),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What bits 0 to 3 of the flags say (spec, "Header").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    /// A request.
    Command,
    /// The answer to one.
    Reply,
    /// Not defined.
    Unknown(u8),
}

flags! {
    /// Flags of a message (spec, "Header"). Bits 0 to 3 are a number, see [`MessageFlags::message_type`].
    MessageFlags {
        /// Type: reply.
        REPLY = 1;
        /// No reply is wanted.
        NO_REPLY = 1 << 4;
        /// The command failed; `Header::error` says why.
        ERROR = 1 << 5;
    }
}

impl MessageFlags {
    /// Type: command; no flag.
    pub const COMMAND: Self = Self(0);

    /// Bits 0 to 3.
    #[must_use]
    pub const fn message_type(self) -> MessageType {
        match self.0 & 0xf {
            0 => MessageType::Command,
            1 => MessageType::Reply,
            other => MessageType::Unknown(other as u8),
        }
    }
}

/// Message header, 16 bytes (spec, "Header").
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender, echoed in the reply.
    pub message_id: u16,
    /// What is asked; echoed in the reply.
    pub command: Command,
    /// Bytes of the whole message, header included.
    pub message_size: u32,
    /// Type and flags.
    pub flags: MessageFlags,
    /// errno; valid in a reply with [`MessageFlags::ERROR`].
    pub error: u32,
}

/// A header whose size field cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Smaller than a header.
    #[error("message size {0} is smaller than its header (16 bytes)")]
    TooSmall(u32),
    /// Larger than the limit that was negotiated.
    #[error("message size {size} is over the limit of {limit} bytes")]
    TooLarge {
        /// What the header says.
        size: u32,
        /// What is accepted.
        limit: usize,
    },
}

impl Header {
    /// Bytes of a header.
    pub const SIZE: usize = 16;

    /// A request.
    ///
    /// # Panics
    /// When the message would not fit a 32-bit size: callers send bounded payloads.
    #[must_use]
    pub fn command(message_id: u16, command: Command, payload: usize, flags: MessageFlags) -> Self {
        let message_size = u32::try_from(Self::SIZE + payload).expect("a message fits 32 bits");
        Self {
            message_id,
            command,
            message_size,
            flags,
            error: 0,
        }
    }

    /// The good answer to `self`.
    ///
    /// # Panics
    /// When the message would not fit a 32-bit size.
    #[must_use]
    pub fn reply(&self, payload: usize) -> Self {
        Self {
            flags: MessageFlags::REPLY,
            ..Self::command(self.message_id, self.command, payload, self.flags)
        }
    }

    /// The bad answer to `self`: the header alone (spec: "the reply message must only include the reply
    /// header").
    ///
    /// # Panics
    /// When `errno` is 0: clients take that for success.
    #[must_use]
    pub fn error_reply(&self, errno: u32) -> Self {
        assert_ne!(errno, 0, "an error reply needs an errno");
        Self {
            flags: MessageFlags::REPLY | MessageFlags::ERROR,
            error: errno,
            ..self.reply(0)
        }
    }

    /// As [`Self::error_reply`], but `payload` bytes (of zeros) follow: for clients that read the reply to
    /// some commands at full size without looking at the flag.
    ///
    /// # Panics
    /// When `errno` is 0.
    #[must_use]
    pub fn padded_error_reply(&self, errno: u32, payload: usize) -> Self {
        Self {
            message_size: self.reply(payload).message_size,
            ..self.error_reply(errno)
        }
    }

    /// Bytes that follow the header.
    ///
    /// # Errors
    /// When the size field is below 16 or the message is larger than `limit` bytes.
    pub fn payload_len(&self, limit: usize) -> Result<usize, HeaderError> {
        let size = self.message_size as usize;
        if size < Self::SIZE {
            return Err(HeaderError::TooSmall(self.message_size));
        }
        if size > limit {
            return Err(HeaderError::TooLarge {
                size: self.message_size,
                limit,
            });
        }
        Ok(size - Self::SIZE)
    }

    /// The sender does not want an answer.
    #[must_use]
    pub const fn no_reply(&self) -> bool {
        self.flags.contains(MessageFlags::NO_REPLY)
    }
}

flags! {
    /// Rights in DMA_MAP (spec; the same bits as `VFIO_DMA_MAP_FLAG_*`).
    DmaFlags {
        /// The device may read.
        READ = 1;
        /// The device may write.
        WRITE = 2;
    }
}

/// Payload of DMA_MAP, 32 bytes. The reply has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaMap {
    /// Size of this structure.
    pub argsz: u32,
    /// Rights.
    pub flags: DmaFlags,
    /// Offset in the file that comes with the message; 0 without one.
    pub offset: u64,
    /// IOVA.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

flags! {
    /// Flags of DMA_UNMAP (`VFIO_DMA_UNMAP_FLAG_*` of `<linux/vfio.h>`).
    DmaUnmapFlags {
        /// Answer with the dirty bitmap.
        GET_DIRTY_BITMAP = 1;
        /// Everything; address and size mean nothing.
        ALL = 2;
        /// Not used by vfio-user.
        VADDR = 4;
    }
}

/// Payload of DMA_UNMAP, 24 bytes; the reply repeats it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaUnmap {
    /// Room for the reply's payload.
    pub argsz: u32,
    /// Flags.
    pub flags: DmaUnmapFlags,
    /// IOVA.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

flags! {
    /// Device flags (`VFIO_DEVICE_FLAGS_*` of `<linux/vfio.h>`).
    DeviceFlags {
        /// DEVICE_RESET is supported.
        RESET = 1;
        /// A PCI device.
        PCI = 2;
    }
}

/// Payload of DEVICE_GET_INFO and of its reply, 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DeviceInfo {
    /// Room for (request), or size of (reply) the reply's payload.
    pub argsz: u32,
    /// Device flags.
    pub flags: DeviceFlags,
    /// Regions.
    pub num_regions: u32,
    /// Interrupt types.
    pub num_irqs: u32,
}

/// Head of the payload of REGION_READ, REGION_WRITE and their replies, 16 bytes; data follows in the
/// write request and in the read reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset in the region.
    pub offset: u64,
    /// Region number.
    pub region: u32,
    /// Bytes of data.
    pub count: u32,
}

/// One write of REGION_WRITE_MULTI, 24 bytes (spec, "Single Device Write Format"). The payload is their
/// number as a u64, then this for each; the reply's payload is the number of writes done, a u64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RegionWriteOne {
    /// Offset in the region.
    pub offset: u64,
    /// Region number.
    pub region: u32,
    /// Bytes of data, at most 8.
    pub count: u32,
    /// The data; bytes from `count` on mean nothing.
    pub data: [u8; 8],
}

impl RegionWriteOne {
    /// Bytes.
    pub const SIZE: usize = size_of::<Self>();
}

/// Head of the payload of DMA_READ, DMA_WRITE and their replies, 16 bytes; data follows in the write
/// request and in the read reply.
///
/// QEMU 10.1 (`hw/vfio-user/protocol.h`; 11.1.3 was seen to do as specified) has a 32-bit count and its data directly after it, at
/// [`DmaAccess::SHORT_SIZE`]; its messages are nevertheless as long as if the head had 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct DmaAccess {
    /// IOVA.
    pub address: u64,
    /// Bytes of data.
    pub count: u64,
}

impl DmaAccess {
    /// Bytes.
    pub const SIZE: usize = size_of::<Self>();
    /// Where the data begins in QEMU's layout.
    pub const SHORT_SIZE: usize = 12;
}

const _: () = assert!(size_of::<RegionWriteOne>() == 24);
const _: () = assert!(size_of::<DmaAccess>() == 16);
const _: () = assert!(size_of::<Header>() == Header::SIZE);
const _: () = assert!(size_of::<DmaMap>() == 32);
const _: () = assert!(size_of::<DmaUnmap>() == 24);
const _: () = assert!(size_of::<DeviceInfo>() == 16);
const _: () = assert!(size_of::<RegionAccess>() == 16);
const _: () = assert!(std::mem::offset_of!(Header, message_size) == 4);
const _: () = assert!(std::mem::offset_of!(Header, flags) == 8);
const _: () = assert!(std::mem::offset_of!(Header, error) == 12);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn test_header_when_encoded_has_the_specified_bytes() {
        let header = Header::command(0x1234, Command::REGION_WRITE, 24, MessageFlags::NO_REPLY);
        assert_eq!(
            header.as_bytes(),
            [0x34, 0x12, 10, 0, 40, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]
        );
        let error = header.error_reply(22);
        assert_eq!(
            error.as_bytes(),
            [0x34, 0x12, 10, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0]
        );
        assert_eq!(
            header.reply(16).as_bytes(),
            [0x34, 0x12, 10, 0, 32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn test_multi_write_and_dma_access_when_encoded_have_the_specified_bytes() {
        let one = RegionWriteOne {
            offset: 0x108,
            region: 2,
            count: 4,
            data: [1, 2, 3, 4, 0, 0, 0, 0],
        };
        assert_eq!(
            one.as_bytes(),
            [
                8, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0
            ]
        );
        let access = DmaAccess {
            address: 0x1000,
            count: 8,
        };
        assert_eq!(
            access.as_bytes(),
            [0, 0x10, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]
        );
        let request = Header::command(7, Command::REGION_READ, 16, MessageFlags::COMMAND);
        let padded = request.padded_error_reply(22, 24);
        assert_eq!(
            (padded.message_size, padded.error, padded.flags.0),
            (40, 22, 0x21)
        );
    }

    #[test]
    fn test_payload_len_when_size_is_at_the_limits_accepts_exactly_them() {
        let with = |size| Header {
            message_size: size,
            ..Header::command(0, Command::VERSION, 0, MessageFlags::COMMAND)
        };
        assert_eq!(with(0).payload_len(64), Err(HeaderError::TooSmall(0)));
        assert_eq!(with(15).payload_len(64), Err(HeaderError::TooSmall(15)));
        assert_eq!(with(16).payload_len(64), Ok(0));
        assert_eq!(with(64).payload_len(64), Ok(48));
        assert_eq!(
            with(65).payload_len(64),
            Err(HeaderError::TooLarge { size: 65, limit: 64 })
        );
        assert!(with(u32::MAX).payload_len(64).is_err());
    }

    #[test]
    #[should_panic(expected = "needs an errno")]
    fn test_error_reply_when_errno_is_zero_panics() {
        let _ = Header::command(0, Command::VERSION, 0, MessageFlags::COMMAND).error_reply(0);
    }

    #[test]
    fn test_dma_structures_when_encoded_have_the_specified_bytes() {
        let map = DmaMap {
            argsz: 32,
            flags: DmaFlags::READ | DmaFlags::WRITE,
            offset: 0x1000,
            address: 0x1_0000_0000,
            size: 0x2000,
        };
        let bytes = map.as_bytes();
        assert_eq!(bytes[..8], [32, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[8..16], 0x1000u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 0x1_0000_0000u64.to_ne_bytes());
        assert_eq!(bytes[24..], 0x2000u64.to_ne_bytes());
        assert_eq!(DmaUnmapFlags::ALL.0, 2);
    }

    proptest! {
        #[test]
        fn test_any_bytes_when_parsed_round_trip(bytes in any::<[u8; 32]>(), limit in 0usize..1 << 21) {
            let header = Header::read_from_bytes(&bytes[..16]).unwrap();
            prop_assert_eq!(header.as_bytes(), &bytes[..16]);
            if let Ok(len) = header.payload_len(limit) {
                prop_assert!(len + 16 <= limit.max(16));
                prop_assert_eq!(len + 16, header.message_size as usize);
            }
            let _ = (format!("{header:?}"), header.flags.message_type(), header.flags.unknown());
            let map = DmaMap::read_from_bytes(&bytes[..]).unwrap();
            prop_assert_eq!(map.as_bytes(), &bytes[..]);
            let unmap = DmaUnmap::read_from_bytes(&bytes[..24]).unwrap();
            prop_assert_eq!(unmap.as_bytes(), &bytes[..24]);
            let info = DeviceInfo::read_from_bytes(&bytes[..16]).unwrap();
            prop_assert_eq!(info.as_bytes(), &bytes[..16]);
            let access = RegionAccess::read_from_bytes(&bytes[16..]).unwrap();
            prop_assert_eq!(access.as_bytes(), &bytes[16..]);
        }
    }
}
