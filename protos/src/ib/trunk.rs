//! What two processes that join their fabrics say to each other over a socket. Little-endian but for packets, which
//! are as on an InfiniBand wire, from the LRH to the ICRC.
//!
//! The one that connects sends [`Hello`]; the one with the subnet manager answers with [`Welcome`]. Then both send
//! [`kind::PORTS`] whenever theirs change, and [`kind::PACKET`]s.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Gid;
use super::header::wire;

/// Of this text.
pub const VERSION: u32 = 1;
/// "tlbfabrc".
pub const MAGIC: u64 = u64::from_le_bytes(*b"tlbfabrc");
/// Longest frame after its header.
pub const LONGEST: usize = 64 << 10;

/// Kinds of frames. Others are skipped.
pub mod kind {
    /// [`super::Hello`].
    pub const HELLO: u8 = 1;
    /// [`super::Welcome`].
    pub const WELCOME: u8 = 2;
    /// [`super::PortRecord`]s: all ports of the sender's process.
    pub const PORTS: u8 = 3;
    /// A packet.
    pub const PACKET: u8 = 4;
}

wire! {
    /// Before each frame.
    FrameHeader, 8 {
        /// Bytes that follow.
        pub len: U32,
        /// Kind.
        pub kind: u8,
        /// 0.
        pub reserved: [u8; 3],
    }
}

wire! {
    /// First frame of the one that connects.
    Hello, 16 {
        /// [`MAGIC`].
        pub magic: U64,
        /// [`VERSION`].
        pub version: U32,
        /// First LID of the block it had before; 0: none.
        pub block: U16,
        /// 0.
        pub reserved: U16,
    }
}

wire! {
    /// The answer.
    Welcome, 28 {
        /// [`MAGIC`].
        pub magic: U64,
        /// [`VERSION`].
        pub version: U32,
        /// LID of the subnet manager.
        pub manager: U16,
        /// First LID for ports of the one that connected.
        pub first: U16,
        /// One past the last.
        pub end: U16,
        /// 0.
        pub reserved: U16,
        /// Prefix of the subnet.
        pub prefix: U64,
    }
}

wire! {
    /// A port.
    PortRecord, 20 {
        /// Its GID.
        pub gid: Gid,
        /// Its LID.
        pub lid: U16,
        /// 0.
        pub reserved: U16,
    }
}
