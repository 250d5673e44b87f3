//! What names a port, a queue pair, a packet.

use std::fmt;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Local identifier of a port (section 4.1.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Lid(pub u16);

impl Lid {
    /// Not assigned.
    pub const NONE: Self = Self(0);
    /// Any port: subnet management before LIDs are assigned.
    pub const PERMISSIVE: Self = Self(0xffff);
    /// First multicast LID.
    pub const FIRST_MULTICAST: Self = Self(0xc000);
    /// Last multicast LID.
    pub const LAST_MULTICAST: Self = Self(0xfffe);
    /// Last unicast LID.
    pub const LAST_UNICAST: Self = Self(0xbfff);

    /// Whether it names a multicast group.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0 >= Self::FIRST_MULTICAST.0 && self.0 <= Self::LAST_MULTICAST.0
    }
    /// Whether it names one port.
    #[must_use]
    pub const fn is_unicast(self) -> bool {
        self.0 != 0 && self.0 <= Self::LAST_UNICAST.0
    }
}

impl fmt::Debug for Lid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Lid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Global identifier (section 4.1.1).
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
    Serialize,
    Deserialize,
)]
#[repr(transparent)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// All zeros.
    pub const NONE: Self = Self([0; 16]);
    /// Prefix of a subnet that nobody configured (section 4.1.1, "default GID").
    pub const DEFAULT_PREFIX: u64 = 0xfe80_0000_0000_0000;

    /// From a subnet prefix and a GUID.
    #[must_use]
    pub fn new(prefix: u64, guid: u64) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&prefix.to_be_bytes());
        bytes[8..].copy_from_slice(&guid.to_be_bytes());
        Self(bytes)
    }
    /// Upper half.
    #[must_use]
    pub fn prefix(self) -> u64 {
        u64::from_be_bytes(*self.0.first_chunk().expect("16 bytes"))
    }
    /// Lower half.
    #[must_use]
    pub fn guid(self) -> u64 {
        u64::from_be_bytes(*self.0.last_chunk().expect("16 bytes"))
    }
    /// Whether it names a multicast group.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] == 0xff
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::net::Ipv6Addr::from(self.0))
    }
}

/// Declares a 24-bit number; higher bits are cut off.
macro_rules! number24 {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        pub struct $name(u32);
        impl $name {
            /// All values.
            pub const MASK: u32 = 0xff_ffff;
            /// The lower 24 bits.
            #[must_use]
            pub const fn new(value: u32) -> Self {
                Self(value & Self::MASK)
            }
            /// The number.
            #[must_use]
            pub const fn get(self) -> u32 {
                self.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

number24! {
    /// Queue pair number (section 3.5.1).
    Qpn
}

impl Qpn {
    /// Subnet management interface.
    pub const SMI: Self = Self(0);
    /// General services interface.
    pub const GSI: Self = Self(1);
    /// Destination of multicast packets (section 9.2.4).
    pub const MULTICAST: Self = Self(0xff_ffff);
}

number24! {
    /// Packet sequence number (section 9.2.8): a place on a circle, so there is no "greater" but a distance. (The
    /// derived order is that of the numbers; use [`Psn::distance`].)
    Psn
}

impl Psn {
    /// The number `count` packets later.
    #[must_use]
    pub const fn add(self, count: u32) -> Self {
        Self::new(self.0.wrapping_add(count))
    }
    /// The number one packet earlier.
    #[must_use]
    pub const fn before(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }
    /// How many packets this one comes after `other`; negative: before it. Half of the circle each.
    #[must_use]
    pub const fn distance(self, other: Self) -> i32 {
        ((self.0.wrapping_sub(other.0) << 8) as i32) >> 8
    }
}

/// Partition key (section 10.9): 15 bits, and the membership on top.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Pkey(pub u16);

impl Pkey {
    /// The default partition, full member.
    pub const DEFAULT: Self = Self(0xffff);

    /// Section 10.9.3: same partition, and not two limited members.
    #[must_use]
    pub const fn matches(self, other: Self) -> bool {
        (self.0 ^ other.0) & 0x7fff == 0 && (self.0 | other.0) & 0x8000 != 0 && self.0 & 0x7fff != 0
    }
}

impl fmt::Debug for Pkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Queue key of a datagram queue pair (section 3.5.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Qkey(pub u32);

impl Qkey {
    /// Of [`Qpn::GSI`] (section 16.1.1, "well-known Q_Key").
    pub const GSI: Self = Self(0x8001_0000);

    /// Section 10.2.5: with this bit a request's key is replaced by the sending queue pair's own.
    #[must_use]
    pub const fn is_privileged(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

impl fmt::Debug for Qkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Most payload bytes of a packet (section 7.7.8; code as in PathRecord and QP contexts).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mtu(u8);

impl Mtu {
    /// 256 bytes.
    pub const B256: Self = Self(1);
    /// 1024 bytes.
    pub const B1024: Self = Self(3);
    /// 2048 bytes.
    pub const B2048: Self = Self(4);
    /// 4096 bytes.
    pub const B4096: Self = Self(5);

    /// From the code, 1 to 5.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1..=5 => Some(Self(code)),
            _ => None,
        }
    }
    /// The code.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        128 << self.0
    }
    /// How many packets a message of `len` bytes takes: at least one.
    #[must_use]
    pub const fn packets(self, len: u32) -> u32 {
        let packets = len.div_ceil(self.bytes());
        if packets == 0 { 1 } else { packets }
    }
}
