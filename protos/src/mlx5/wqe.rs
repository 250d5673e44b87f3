//! Work queue entries: segments of 16 bytes and multiples (reference 5 and 6; `qp.h`).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::open;

/// Bytes of a block of the send queue.
pub const BLOCK: usize = 64;
/// Unit of [`Control::ds`].
pub const SEGMENT: usize = 16;
/// Most segments of a WQE: `ds` has six bits.
pub const MAX_SEGMENTS: usize = 63;

open! {
    /// Opcode of a send WQE (`MLX5_OPCODE_*`).
    Opcode(u8) {
        /// Nothing.
        NOP = 0x00,
        /// Send with invalidate.
        SEND_INVALIDATE = 0x01,
        /// RDMA write.
        RDMA_WRITE = 0x08,
        /// RDMA write with immediate.
        RDMA_WRITE_IMM = 0x09,
        /// Send.
        SEND = 0x0a,
        /// Send with immediate.
        SEND_IMM = 0x0b,
        /// RDMA read.
        RDMA_READ = 0x10,
        /// Compare and swap.
        ATOMIC_CS = 0x11,
        /// Fetch and add.
        ATOMIC_FA = 0x12,
        /// Invalidate or register memory.
        UMR = 0x25,
    }
}

/// What each send WQE begins with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Control {
    /// Modifier, index, opcode.
    pub opmod_idx_opcode: U32,
    /// QP number, segments.
    pub qpn_ds: U32,
    /// Signature.
    pub signature: u8,
    /// Not used.
    pub reserved: [u8; 2],
    /// Fence mode in bits 7:5, CQE in bits 3:2, solicited event in bit 1.
    pub fm_ce_se: u8,
    /// Immediate data, key to invalidate, or key of a UMR.
    pub imm: U32,
}
const _: () = assert!(size_of::<Control>() == 16 && std::mem::offset_of!(Control, fm_ce_se) == 11);

/// [`Control::fm_ce_se`]: mask of when there is a CQE.
pub const CE_MASK: u8 = 3 << 2;
/// [`Control::fm_ce_se`]: always a CQE.
pub const CE_ALWAYS: u8 = 2 << 2;
/// [`Control::fm_ce_se`]: solicited event at the other side.
pub const SOLICITED: u8 = 1 << 1;
/// [`Control::fm_ce_se`]: mask of the fence mode.
pub const FENCE_MASK: u8 = 7 << 5;

impl Control {
    /// Of a WQE at block `index`.
    #[must_use]
    pub fn new(opcode: Opcode, index: u16, qpn: u32, segments: u8) -> Self {
        let mut new = Self::new_zeroed();
        new.opmod_idx_opcode = (u32::from(index) << 8 | u32::from(opcode.0)).into();
        new.qpn_ds = (qpn << 8 | u32::from(segments)).into();
        new
    }

    /// Its opcode.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        Opcode(self.opmod_idx_opcode.get() as u8)
    }

    /// Its segments, itself included.
    #[must_use]
    pub fn ds(&self) -> usize {
        (self.qpn_ds.get() & 0x3f) as usize
    }

    /// Whether a CQE is wanted when it succeeds.
    #[must_use]
    pub fn wants_cqe(&self) -> bool {
        self.fm_ce_se & CE_MASK >= CE_ALWAYS
    }

    /// Whether the other side's event is solicited.
    #[must_use]
    pub fn solicited(&self) -> bool {
        self.fm_ce_se & SOLICITED != 0
    }
}

/// Remote address.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RemoteAddress {
    /// Address.
    pub address: U64,
    /// Key.
    pub rkey: U32,
    /// Not used.
    pub reserved: U32,
}
const _: () = assert!(size_of::<RemoteAddress>() == SEGMENT);

/// Operands of an atomic.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Atomic {
    /// New value, or what is added.
    pub swap_add: U64,
    /// Compared with.
    pub compare: U64,
}
const _: () = assert!(size_of::<Atomic>() == SEGMENT);

/// A piece of local memory.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Data {
    /// Bytes in bits 30:0; 0 = 2 GiB. With [`INLINE`] the bytes follow this word.
    pub byte_count: U32,
    /// Key.
    pub lkey: U32,
    /// Address.
    pub address: U64,
}
const _: () = assert!(size_of::<Data>() == SEGMENT);
/// [`Data::byte_count`]: the bytes follow.
pub const INLINE: u32 = 1 << 31;
/// Bytes of inline data.
pub const INLINE_MASK: u32 = 0x3ff;
/// [`Data::lkey`] that ends a receive list.
pub const INVALID_LKEY: u32 = 0x100;

/// Where an XRC request goes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Xrc {
    /// SRQ.
    pub srqn: U32,
    /// Not used.
    pub reserved: [u8; 12],
}
const _: () = assert!(size_of::<Xrc>() == SEGMENT);

/// Where a datagram goes (`mlx5_av`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AddressVector {
    /// Q_Key.
    pub qkey: U32,
    /// Not used.
    pub reserved: U32,
    /// Destination QP; bit 31: the long form follows.
    pub dqp: U32,
    /// Static rate, service level.
    pub stat_rate_sl: u8,
    /// Source path bits.
    pub fl_mlid: u8,
    /// Destination LID.
    pub rlid: U16,
    /// Not used.
    pub reserved2: [u8; 4],
    /// MAC (Ethernet).
    pub rmac: [u8; 6],
    /// Traffic class.
    pub tclass: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Bit 30: there is a GRH; source GID in bits 27:20, flow label below.
    pub grh_gid_fl: U32,
    /// Destination GID.
    pub rgid: [u8; 16],
}
const _: () =
    assert!(size_of::<AddressVector>() == 48 && std::mem::offset_of!(AddressVector, grh_gid_fl) == 28);
/// [`AddressVector::dqp`]: the long form.
pub const AV_EXTENDED: u32 = 1 << 31;
/// [`AddressVector::grh_gid_fl`]: there is a GRH.
pub const AV_GRH: u32 = 1 << 30;
/// Bytes of the short form.
pub const AV_SHORT: usize = 16;

/// Head of a UMR.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UmrControl {
    /// `UMR_*`.
    pub flags: u8,
    /// Not used.
    pub reserved: [u8; 3],
    /// Translations, in 16 bytes.
    pub xlt_octowords: U16,
    /// Where they go, in 16 bytes, bits 15:0.
    pub xlt_offset: U16,
    /// [`super::mkey::mask`].
    pub mkey_mask: U64,
    /// Where they go, upper bits.
    pub xlt_offset_47_16: U32,
    /// Not used.
    pub reserved2: [u8; 28],
}
const _: () = assert!(size_of::<UmrControl>() == 48 && std::mem::offset_of!(UmrControl, mkey_mask) == 8);
/// [`UmrControl::flags`]: translations follow in the WQE.
pub const UMR_INLINE: u8 = 0x80;
/// [`UmrControl::flags`]: the key must be free. (The header calls it `CHECK_NOT_FREE`: it fails for a key that is not.)
pub const UMR_CHECK_FREE: u8 = 0x20;
/// [`UmrControl::flags`]: the key must not be free. (The header calls it `CHECK_FREE`.)
pub const UMR_CHECK_NOT_FREE: u8 = 0x40;
/// [`UmrControl::flags`]: [`UmrControl::xlt_offset`] counts; the rest of the table stays.
pub const UMR_OFFSET: u8 = 0x10;
