//! Memory keys: context (`mkc`) and translations (reference 6).

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{layout, open};

layout! {
    /// Memory key context.
    Mkc[64] {
        /// Nothing may use it.
        FREE = bits(0x00, 30, 1),
        /// Upper bits of the [`AccessMode`].
        MODE_HIGH = bits(0x00, 26, 3),
        /// UMR may change it.
        UMR_ENABLE = bits(0x00, 15, 1),
        /// Remote atomics.
        ATOMIC = bits(0x00, 14, 1),
        /// Remote writes.
        REMOTE_WRITE = bits(0x00, 13, 1),
        /// Remote reads.
        REMOTE_READ = bits(0x00, 12, 1),
        /// Local writes.
        LOCAL_WRITE = bits(0x00, 11, 1),
        /// Local reads.
        LOCAL_READ = bits(0x00, 10, 1),
        /// Lower bits of the [`AccessMode`].
        MODE_LOW = bits(0x00, 8, 2),
        /// The only QP that may use it; all ones = any.
        QPN = bits(0x04, 8, 24),
        /// Lowest byte of the key.
        KEY = bits(0x04, 0, 8),
        /// All addresses.
        LENGTH64 = bits(0x0c, 31, 1),
        /// Remote invalidate is allowed.
        REMOTE_INVALIDATE = bits(0x0c, 24, 1),
        /// Protection domain.
        PD = bits(0x0c, 0, 24),
        /// First address.
        START = wide(0x10),
        /// Bytes.
        LENGTH = wide(0x18),
        /// Room for translations, in 16 bytes.
        TRANSLATIONS = bits(0x34, 0, 32),
        /// Logarithm of a page's bytes.
        LOG_PAGE_SIZE = bits(0x38, 0, 6),
    }
}

/// [`Mkc::QPN`]: any QP.
pub const ANY_QP: u32 = 0xff_ffff;

open! {
    /// How addresses are translated (`MLX5_MKC_ACCESS_MODE_*`).
    AccessMode(u8) {
        /// Not at all.
        PA = 0x0,
        /// By pages of one size.
        MTT = 0x1,
        /// By pieces of other keys.
        KLM = 0x2,
        /// By pieces of other keys, all of one size.
        KSM = 0x3,
    }
}

impl Mkc {
    /// How addresses are translated.
    #[must_use]
    pub fn mode(&self) -> AccessMode {
        use super::Layout;
        AccessMode((self.get(Self::MODE_HIGH) << 2 | self.get(Self::MODE_LOW)) as u8)
    }
}

/// Low bits of an MTT entry: reads.
pub const MTT_READ: u64 = 1 << 0;
/// Low bits of an MTT entry: writes.
pub const MTT_WRITE: u64 = 1 << 1;
/// Bits of an MTT entry that are the address.
pub const MTT_ADDRESS: u64 = !0xfff;

/// A piece of another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Klm {
    /// Bytes (KLM; of no meaning in a KSM).
    pub byte_count: U32,
    /// The key.
    pub key: U32,
    /// Address under that key.
    pub va: U64,
}
const _: () = assert!(size_of::<Klm>() == 16 && std::mem::offset_of!(Klm, va) == 8);

/// `mkey_mask` of UMR: what it changes.
pub mod mask {
    /// Length.
    pub const LENGTH: u64 = 1 << 0;
    /// Page size.
    pub const PAGE_SIZE: u64 = 1 << 1;
    /// Start address.
    pub const START: u64 = 1 << 6;
    /// Protection domain.
    pub const PD: u64 = 1 << 7;
    /// Remote invalidate.
    pub const REMOTE_INVALIDATE: u64 = 1 << 8;
    /// Signature error counter.
    pub const SIGNATURE_ERRORS: u64 = 1 << 9;
    /// Signature.
    pub const BSF: u64 = 1 << 12;
    /// Lowest byte of the key.
    pub const KEY: u64 = 1 << 13;
    /// QP number.
    pub const QPN: u64 = 1 << 14;
    /// Local read.
    pub const LR: u64 = 1 << 17;
    /// Local write.
    pub const LW: u64 = 1 << 18;
    /// Remote read.
    pub const RR: u64 = 1 << 19;
    /// Remote write.
    pub const RW: u64 = 1 << 20;
    /// Atomic.
    pub const A: u64 = 1 << 21;
    /// Small fence after reads.
    pub const SMALL_FENCE: u64 = 1 << 23;
    /// Relaxed ordering of writes.
    pub const RELAXED_WRITE: u64 = 1 << 25;
    /// Free.
    pub const FREE: u64 = 1 << 29;
    /// Relaxed ordering of reads.
    pub const RELAXED_READ: u64 = 1 << 47;
}
