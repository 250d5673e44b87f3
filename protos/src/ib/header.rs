//! Headers of packets.

use std::time::Duration;

use bitfield_struct::bitfield;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Gid, Lid, Opcode, Pkey, Psn, Qkey, Qpn};

/// What follows the LRH (section 7.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkNextHeader(pub u8);

impl LinkNextHeader {
    /// BTH.
    pub const LOCAL: Self = Self(2);
    /// GRH, then BTH.
    pub const GLOBAL: Self = Self(3);
}

#[bitfield(u16)]
struct LrhFirst {
    #[bits(2)]
    lnh: u8,
    #[bits(2)]
    __: u8,
    #[bits(4)]
    sl: u8,
    #[bits(4)]
    version: u8,
    #[bits(4)]
    vl: u8,
}

/// Declares a structure of the wire with its size.
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident, $size:literal { $($(#[$fmeta:meta])* $vis:vis $field:ident: $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* $vis $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}

pub(crate) use wire;

wire! {
    /// Local route header (section 7.7).
    Lrh, 8 {
        first: U16,
        dlid: U16,
        length: U16,
        slid: U16,
    }
}

impl Lrh {
    /// A header; `words` is the length in 4-byte words from here to the end of the ICRC (section 7.7.8).
    #[must_use]
    pub fn new(slid: Lid, dlid: Lid, sl: u8, next: LinkNextHeader, words: u16) -> Self {
        let vl = if sl == 15 { 15 } else { 0 };
        let first = LrhFirst::new().with_lnh(next.0).with_sl(sl & 15).with_vl(vl);
        Self {
            first: first.into_bits().into(),
            dlid: dlid.0.into(),
            length: (words & 0x7ff).into(),
            slid: slid.0.into(),
        }
    }
    /// Source.
    #[must_use]
    pub fn slid(&self) -> Lid {
        Lid(self.slid.get())
    }
    /// Destination.
    #[must_use]
    pub fn dlid(&self) -> Lid {
        Lid(self.dlid.get())
    }
    /// Service level.
    #[must_use]
    pub fn sl(&self) -> u8 {
        LrhFirst::from_bits(self.first.get()).sl()
    }
    /// Virtual lane.
    #[must_use]
    pub fn vl(&self) -> u8 {
        LrhFirst::from_bits(self.first.get()).vl()
    }
    /// What follows.
    #[must_use]
    pub fn next(&self) -> LinkNextHeader {
        LinkNextHeader(LrhFirst::from_bits(self.first.get()).lnh())
    }
    /// Words to the end of the ICRC.
    #[must_use]
    pub fn words(&self) -> u16 {
        self.length.get() & 0x7ff
    }
}

wire! {
    /// Global route header (section 8.3).
    Grh, 40 {
        first: U32,
        /// Bytes from the end of this header to the end of the ICRC.
        pub payload_length: U16,
        /// 0x1b: BTH.
        pub next_header: u8,
        /// Routers it may pass.
        pub hop_limit: u8,
        /// Source.
        pub sgid: Gid,
        /// Destination.
        pub dgid: Gid,
    }
}

impl Grh {
    /// `next_header` of IBA transport (section 8.3.4).
    pub const NEXT_BTH: u8 = 0x1b;

    /// A header of version 6.
    #[must_use]
    pub fn new(sgid: Gid, dgid: Gid, traffic_class: u8, flow_label: u32, hop_limit: u8) -> Self {
        Self {
            first: (6 << 28 | u32::from(traffic_class) << 20 | flow_label & 0xf_ffff).into(),
            payload_length: 0.into(),
            next_header: Self::NEXT_BTH,
            hop_limit,
            sgid,
            dgid,
        }
    }
    /// 6.
    #[must_use]
    pub fn version(&self) -> u8 {
        (self.first.get() >> 28) as u8
    }
    /// Traffic class.
    #[must_use]
    pub fn traffic_class(&self) -> u8 {
        (self.first.get() >> 20) as u8
    }
    /// Flow label.
    #[must_use]
    pub fn flow_label(&self) -> u32 {
        self.first.get() & 0xf_ffff
    }
}

#[bitfield(u8)]
struct BthFlags {
    #[bits(4)]
    version: u8,
    #[bits(2)]
    pad: u8,
    migrated: bool,
    solicited: bool,
}

wire! {
    /// Base transport header (section 9.2).
    Bth, 12 {
        opcode: u8,
        flags: u8,
        pkey: U16,
        dest_qp: U32,
        psn: U32,
    }
}

impl Bth {
    /// A header. The migration state is "migrated", as of a queue pair without an alternate path.
    #[must_use]
    pub fn new(opcode: Opcode, pkey: Pkey, dest: Qpn, psn: Psn) -> Self {
        Self {
            opcode: opcode.0,
            flags: BthFlags::new().with_migrated(true).into_bits(),
            pkey: pkey.0.into(),
            dest_qp: dest.get().into(),
            psn: psn.get().into(),
        }
    }
    /// With the solicited event bit.
    #[must_use]
    pub fn with_solicited(mut self, solicited: bool) -> Self {
        self.flags = BthFlags::from_bits(self.flags)
            .with_solicited(solicited)
            .into_bits();
        self
    }
    /// With the acknowledge request bit.
    #[must_use]
    pub fn with_ack_request(mut self, request: bool) -> Self {
        self.psn = (self.psn.get() & Psn::MASK | u32::from(request) << 31).into();
        self
    }
    /// With this many bytes of padding.
    #[must_use]
    pub fn with_pad(mut self, pad: u8) -> Self {
        self.flags = BthFlags::from_bits(self.flags).with_pad(pad & 3).into_bits();
        self
    }
    /// Opcode.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        Opcode(self.opcode)
    }
    /// Partition.
    #[must_use]
    pub fn pkey(&self) -> Pkey {
        Pkey(self.pkey.get())
    }
    /// Destination.
    #[must_use]
    pub fn dest_qp(&self) -> Qpn {
        Qpn::new(self.dest_qp.get())
    }
    /// Sequence number.
    #[must_use]
    pub fn psn(&self) -> Psn {
        Psn::new(self.psn.get())
    }
    /// Solicited event.
    #[must_use]
    pub fn solicited(&self) -> bool {
        BthFlags::from_bits(self.flags).solicited()
    }
    /// An acknowledgement is wanted.
    #[must_use]
    pub fn ack_request(&self) -> bool {
        self.psn.get() >> 31 != 0
    }
    /// Bytes of padding after the payload.
    #[must_use]
    pub fn pad(&self) -> u8 {
        BthFlags::from_bits(self.flags).pad()
    }
    /// Transport header version: 0.
    #[must_use]
    pub fn version(&self) -> u8 {
        BthFlags::from_bits(self.flags).version()
    }
}

wire! {
    /// Datagram extended transport header (section 9.3.2).
    Deth, 8 {
        qkey: U32,
        source: U32,
    }
}

impl Deth {
    /// A header.
    #[must_use]
    pub fn new(qkey: Qkey, source: Qpn) -> Self {
        Self {
            qkey: qkey.0.into(),
            source: source.get().into(),
        }
    }
    /// Queue key.
    #[must_use]
    pub fn qkey(&self) -> Qkey {
        Qkey(self.qkey.get())
    }
    /// Source queue pair.
    #[must_use]
    pub fn source(&self) -> Qpn {
        Qpn::new(self.source.get())
    }
}

wire! {
    /// RDMA extended transport header (section 9.3.3).
    Reth, 16 {
        /// Virtual address.
        pub va: U64,
        /// R_Key.
        pub rkey: U32,
        /// Length of the whole message.
        pub len: U32,
    }
}

wire! {
    /// Atomic extended transport header (section 9.3.4).
    AtomicEth, 28 {
        /// Virtual address.
        pub va: U64,
        /// R_Key.
        pub rkey: U32,
        /// What to swap in, or to add.
        pub swap_or_add: U64,
        /// What to compare with.
        pub compare: U64,
    }
}

wire! {
    /// Acknowledge extended transport header (section 9.3.5).
    Aeth, 4 {
        word: U32,
    }
}

impl Aeth {
    /// A header with a message sequence number.
    #[must_use]
    pub fn new(syndrome: Syndrome, msn: u32) -> Self {
        Self {
            word: (u32::from(syndrome.code()) << 24 | msn & Psn::MASK).into(),
        }
    }
    /// What it says.
    #[must_use]
    pub fn syndrome(&self) -> Syndrome {
        Syndrome::from_code((self.word.get() >> 24) as u8)
    }
    /// Message sequence number.
    #[must_use]
    pub fn msn(&self) -> u32 {
        self.word.get() & Psn::MASK
    }
}

wire! {
    /// Atomic acknowledge extended transport header (section 9.3.6).
    AtomicAckEth, 8 {
        /// What was there before.
        pub original: U64,
    }
}

wire! {
    /// Immediate data (section 9.3.7).
    ImmDt, 4 {
        /// The four bytes.
        pub data: U32,
    }
}

wire! {
    /// Invalidate extended transport header (section 9.3.8).
    Ieth, 4 {
        /// R_Key.
        pub rkey: U32,
    }
}

wire! {
    /// XRC extended transport header (annex A14).
    Xrceth, 4 {
        word: U32,
    }
}

impl Xrceth {
    /// A header.
    #[must_use]
    pub fn new(srqn: u32) -> Self {
        Self {
            word: (srqn & 0xff_ffff).into(),
        }
    }
    /// The shared receive queue.
    #[must_use]
    pub fn srqn(&self) -> u32 {
        self.word.get() & 0xff_ffff
    }
}

/// Code of a NAK (section 9.7.5.2, table "NAK codes").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NakCode(pub u8);

impl NakCode {
    /// A packet is missing.
    pub const SEQUENCE_ERROR: Self = Self(0);
    /// The request makes no sense.
    pub const INVALID_REQUEST: Self = Self(1);
    /// R_Key, bounds, rights.
    pub const REMOTE_ACCESS: Self = Self(2);
    /// The responder cannot do it.
    pub const REMOTE_OPERATION: Self = Self(3);
}

/// AETH syndrome (section 9.3.5.1, table "AETH syndrome field").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Syndrome {
    /// Done; with a credit code, 31 = does not say.
    Ack(u8),
    /// No receive request; wait for [`rnr_delay`] of the code.
    RnrNak(u8),
    /// Not done.
    Nak(NakCode),
    /// Not defined.
    Reserved(u8),
}

impl Syndrome {
    /// Done, without a credit count (section 9.7.7.2).
    pub const ACK: Self = Self::Ack(31);

    /// As on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Ack(credits) => credits & 31,
            Self::RnrNak(timer) => 0x20 | timer & 31,
            Self::Nak(code) => 0x60 | code.0 & 31,
            Self::Reserved(code) => code,
        }
    }
    /// From the wire.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code >> 5 {
            0 => Self::Ack(code & 31),
            1 => Self::RnrNak(code & 31),
            3 => Self::Nak(NakCode(code & 31)),
            _ => Self::Reserved(code),
        }
    }
}

/// How long a requester waits after an RNR NAK (section 9.7.5.2.8, table "Encoding for RNR NAK timer field").
#[must_use]
pub const fn rnr_delay(code: u8) -> Duration {
    const MICROSECONDS: [u32; 32] = [
        655_360, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280, 1920, 2560, 3840, 5120,
        7680, 10_240, 15_360, 20_480, 30_720, 40_960, 61_440, 81_920, 122_880, 163_840, 245_760, 327_680,
        491_520,
    ];
    Duration::from_micros(MICROSECONDS[(code & 31) as usize] as u64)
}
