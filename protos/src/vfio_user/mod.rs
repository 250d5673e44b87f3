//! vfio-user: message layouts and codecs.
//!
//! Sources: the protocol specification (QEMU `docs/interop/vfio-user.rst`; "spec" below) and, for the
//! structures and flags that it takes over from VFIO, `<linux/vfio.h>` and `<linux/kvm.h>`.
//! All data is in the byte order of the host (spec, "Protocol Specification").
//!
//! A message is a [`Header`], then a payload of `message_size - 16` bytes. Reading and writing them is the
//! business of the server and of the client; nothing here does I/O.
//!
//! Not implemented: DEVICE_FEATURE and MIG_DATA layouts, ioregionfd sub-regions.

mod irq;
mod message;
mod region;
mod version;

pub use irq::{IrqAction, IrqData, IrqIndex, IrqInfo, IrqInfoFlags, IrqSet, IrqSetError, IrqSetFlags};
pub use message::{
    Command, DeviceFlags, DeviceInfo, DmaAccess, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, Header,
    HeaderError, MessageFlags, MessageType, RegionAccess, RegionWriteOne,
};
pub use region::{
    CapabilityHeader, IoFd, IoFdType, IoFdsInfo, RegionFlags, RegionIndex, RegionInfo, SparseArea,
    SparseMmapHeader, SparseReply, SparseReplyError, encode_sparse_mmap, parse_sparse_mmap,
};
pub use version::{Capabilities, TwinSocket, VersionData, VersionError, VersionHeader};

/// Protocol version spoken here (spec, "Version"): 0.1, as QEMU and libvfio-user.
pub const VERSION_MAJOR: u16 = 0;
/// See [`VERSION_MAJOR`].
pub const VERSION_MINOR: u16 = 1;
/// Default of `max_data_xfer_size` (spec, VERSION capabilities).
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;
/// Default of `max_msg_fds` (spec, VERSION capabilities).
pub const DEFAULT_MAX_MSG_FDS: u32 = 1;
/// Default of `max_dma_maps` (spec, VERSION capabilities).
pub const DEFAULT_MAX_DMA_MAPS: u32 = 65535;
/// Default of `pgsizes` (spec, VERSION capabilities): 4 KiB only.
pub const DEFAULT_PGSIZES: u64 = 4096;

/// Declares a flag word: an open newtype, so that unknown bits survive and can be refused.
macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Default, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout,
            zerocopy::Immutable,
        )]
        #[repr(transparent)]
        pub struct $name(pub u32);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self($value);)*
            /// Every bit that has a name here.
            pub const KNOWN: Self = Self(0 $(| $value)*);

            /// All bits of `other` are set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Bits without a name.
            #[must_use]
            pub const fn unknown(self) -> u32 {
                self.0 & !Self::KNOWN.0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl std::ops::BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x}"), self.0)?;
                $(if self.0 & $value != 0 { f.write_str(concat!(" ", stringify!($bit)))?; })*
                f.write_str(")")
            }
        }
    };
}
use flags;
