//! Shared receive queues: with an XRC domain (`xrc_srqc`) or as a receive memory pool (`rmpc` with its `wq`).

use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::layout;

layout! {
    /// Context of an SRQ with an XRC domain.
    XrcSrqc[64] {
        /// 0 good, 1 error.
        STATE = bits(0x00, 28, 4),
        /// Logarithm of the entries.
        LOG_SIZE = bits(0x00, 24, 4),
        /// WQEs are signed.
        WQ_SIGNATURE = bits(0x04, 31, 1),
        /// Logarithm of a WQE's bytes, minus 4.
        LOG_STRIDE = bits(0x04, 24, 3),
        /// XRC domain.
        XRCD = bits(0x04, 0, 24),
        /// Offset in the first page, in units of its size / 64.
        PAGE_OFFSET = bits(0x08, 26, 6),
        /// Completion queue.
        CQN = bits(0x08, 0, 24),
        /// The user index is the SRQ number.
        USER_INDEX_IS_NUMBER = bits(0x10, 31, 1),
        /// Logarithm of a page's bytes, minus 12.
        LOG_PAGE_SIZE = bits(0x10, 24, 6),
        /// What CQEs carry when the CQE version is 1.
        USER_INDEX = bits(0x10, 0, 24),
        /// Protection domain.
        PD = bits(0x18, 0, 24),
        /// Limit.
        LWM = bits(0x1c, 16, 16),
        /// WQEs posted and not consumed.
        WQE_COUNT = bits(0x1c, 0, 16),
        /// Doorbell record.
        DBR_ADDR = wide(0x28),
    }
}

layout! {
    /// Context of a receive memory pool, with its work queue.
    Rmpc[240] {
        /// 1 ready, 3 error.
        STATE = bits(0x00, 20, 4),
        /// Cyclic list instead of a linked one.
        BASIC_CYCLIC = bits(0x04, 31, 1),
        /// 0 linked list, 1 cyclic.
        WQ_TYPE = bits(0x30, 28, 4),
        /// WQEs are signed.
        WQ_SIGNATURE = bits(0x30, 27, 1),
        /// Offset in the first page, in units of its size / 64.
        PAGE_OFFSET = bits(0x34, 16, 5),
        /// Limit.
        LWM = bits(0x34, 0, 16),
        /// Protection domain.
        PD = bits(0x38, 0, 24),
        /// Doorbell page.
        UAR_PAGE = bits(0x3c, 0, 24),
        /// Doorbell record.
        DBR_ADDR = wide(0x40),
        /// WQEs consumed.
        HW_COUNTER = bits(0x48, 0, 32),
        /// WQEs posted.
        SW_COUNTER = bits(0x4c, 0, 32),
        /// Logarithm of a WQE's bytes.
        LOG_STRIDE = bits(0x50, 16, 4),
        /// Logarithm of a page's bytes, minus 12.
        LOG_PAGE_SIZE = bits(0x50, 8, 5),
        /// Logarithm of the entries.
        LOG_SIZE = bits(0x50, 0, 5),
    }
}

/// [`Rmpc::STATE`]: ready.
pub const RMP_READY: u32 = 1;
/// [`Rmpc::STATE`]: error.
pub const RMP_ERROR: u32 = 3;
/// MODIFY_RMP: bit of the field mask for the limit.
pub const MODIFY_RMP_LWM: u64 = 1;

/// What each WQE of a shared receive queue begins with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NextSegment {
    /// Not used.
    pub reserved: [u8; 2],
    /// Index of the next WQE in the list.
    pub next: U16,
    /// Signature.
    pub signature: u8,
    /// Not used.
    pub reserved2: [u8; 11],
}
const _: () = assert!(size_of::<NextSegment>() == 16 && std::mem::offset_of!(NextSegment, next) == 2);
