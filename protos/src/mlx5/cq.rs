//! Completion queues: context (`cqc`) and entries (reference 5).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{layout, open};

layout! {
    /// CQ context.
    Cqc[64] {
        /// 0 good, 9 overflow.
        STATUS = bits(0x00, 28, 4),
        /// 0: 64 bytes, 1: 128 bytes, [`CQE_PADDED`].
        CQE_SIZE = bits(0x00, 21, 3),
        /// Collapsed: one entry.
        COLLAPSED = bits(0x00, 20, 1),
        /// Overrun is ignored.
        OVERRUN_IGNORE = bits(0x00, 17, 1),
        /// 6 solicited armed, 9 armed, 10 fired.
        STATE = bits(0x00, 8, 4),
        /// Offset in the first page, in units of its size / 64.
        PAGE_OFFSET = bits(0x08, 6, 6),
        /// Logarithm of the entries.
        LOG_SIZE = bits(0x0c, 24, 5),
        /// Doorbell page.
        UAR_PAGE = bits(0x0c, 0, 24),
        /// Moderation: microseconds.
        PERIOD = bits(0x10, 16, 12),
        /// Moderation: completions.
        MAX_COUNT = bits(0x10, 0, 16),
        /// Event queue.
        EQN = bits(0x14, 0, 8),
        /// Logarithm of a page's bytes, minus 12.
        LOG_PAGE_SIZE = bits(0x18, 24, 5),
        /// As of the last arm.
        CONSUMER = bits(0x28, 0, 24),
        /// Entries written.
        PRODUCER = bits(0x2c, 0, 24),
        /// Doorbell record.
        DBR_ADDR = wide(0x38),
    }
}

/// [`Cqc::CQE_SIZE`]: 128 bytes, all of which are written.
pub const CQE_PADDED: u32 = 2;

/// [`Cqc::STATUS`]: an entry was lost.
pub const STATUS_OVERFLOW: u32 = 9;
/// [`Cqc::STATE`]: the next solicited completion notifies.
pub const STATE_SOLICITED_ARMED: u32 = 6;
/// [`Cqc::STATE`]: the next completion notifies.
pub const STATE_ARMED: u32 = 9;
/// [`Cqc::STATE`]: it has notified.
pub const STATE_FIRED: u32 = 0xa;

/// MODIFY_CQ, field select: [`Cqc::PERIOD`].
pub const MODIFY_PERIOD: u32 = 1 << 0;
/// MODIFY_CQ, field select: [`Cqc::MAX_COUNT`].
pub const MODIFY_COUNT: u32 = 1 << 1;
/// MODIFY_CQ with op_mod 1, field select: size.
pub const RESIZE_SIZE: u32 = 1 << 0;
/// MODIFY_CQ with op_mod 1, field select: page offset.
pub const RESIZE_PAGE_OFFSET: u32 = 1 << 1;
/// MODIFY_CQ with op_mod 1, field select: page size.
pub const RESIZE_LOG_PAGE_SIZE: u32 = 1 << 2;

open! {
    /// Upper half of the last byte of a CQE (`MLX5_CQE_*`).
    CqeOpcode(u8) {
        /// A send work request is done.
        REQUESTER = 0,
        /// RDMA write with immediate, received.
        RESPONDER_WRITE_IMM = 1,
        /// Received.
        RESPONDER_SEND = 2,
        /// Received with immediate.
        RESPONDER_SEND_IMM = 3,
        /// Received with invalidate.
        RESPONDER_SEND_INVALIDATE = 4,
        /// A resize ends the old buffer.
        RESIZE = 5,
        /// A send work request failed.
        REQUESTER_ERROR = 13,
        /// A receive work request failed.
        RESPONDER_ERROR = 14,
        /// Never written by the device.
        INVALID = 15,
    }
}

open! {
    /// Syndrome of an error CQE (`MLX5_CQE_SYNDROME_*`).
    Syndrome(u8) {
        /// The message does not fit.
        LOCAL_LENGTH = 0x01,
        /// The WQE makes no sense.
        LOCAL_QP_OPERATION = 0x02,
        /// A key, its PD, its rights or its bounds.
        LOCAL_PROTECTION = 0x04,
        /// Flushed.
        FLUSHED = 0x05,
        /// A window cannot be bound.
        MW_BIND = 0x06,
        /// The other side answers nonsense.
        BAD_RESPONSE = 0x10,
        /// A resource is missing here.
        LOCAL_ACCESS = 0x11,
        /// The other side refused the request as such.
        REMOTE_INVALID_REQUEST = 0x12,
        /// The other side refused the access.
        REMOTE_ACCESS = 0x13,
        /// The other side failed.
        REMOTE_OPERATION = 0x14,
        /// No answer.
        TRANSPORT_RETRY = 0x15,
        /// The other side has no receive WQE.
        RNR_RETRY = 0x16,
        /// Aborted.
        REMOTE_ABORTED = 0x22,
    }
}

/// A completion (64 bytes; the upper half of a 128-byte one).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Cqe {
    /// Not used on InfiniBand. Inline scattered data, if any, is here.
    pub reserved: [u8; 17],
    /// Source path bits.
    pub ml_path: u8,
    /// Not used.
    pub reserved2: [u8; 4],
    /// Source LID.
    pub slid: U16,
    /// GRH in bits 29:28, service level in bits 27:24, source QP below.
    pub flags_rqpn: U32,
    /// Not used.
    pub reserved3: [u8; 4],
    /// SRQ number, or the QP's user index.
    pub srqn_uidx: U32,
    /// Immediate data, invalidated key, or P_Key.
    pub imm_inval_pkey: U32,
    /// Not used.
    pub reserved4: [u8; 4],
    /// Bytes received, read or fetched.
    pub byte_cnt: U32,
    /// Ticks of the init segment's timer.
    pub timestamp: U64,
    /// WQE's opcode in the upper byte, QP number.
    pub sop_drop_qpn: U32,
    /// Which WQE.
    pub wqe_counter: U16,
    /// Not used.
    pub signature: u8,
    /// Opcode in the upper half, owner in bit 0: written last.
    pub op_own: u8,
}
const _: () = assert!(size_of::<Cqe>() == 64);
const _: () = assert!(
    std::mem::offset_of!(Cqe, slid) == 22
        && std::mem::offset_of!(Cqe, flags_rqpn) == 24
        && std::mem::offset_of!(Cqe, srqn_uidx) == 32
        && std::mem::offset_of!(Cqe, imm_inval_pkey) == 36
        && std::mem::offset_of!(Cqe, byte_cnt) == 44
        && std::mem::offset_of!(Cqe, timestamp) == 48
        && std::mem::offset_of!(Cqe, sop_drop_qpn) == 56
        && std::mem::offset_of!(Cqe, wqe_counter) == 60
);
/// Offset of a failed CQE's vendor syndrome (over the timestamp).
pub const ERROR_VENDOR_SYNDROME: usize = 54;
/// Offset of a failed CQE's [`Syndrome`].
pub const ERROR_SYNDROME: usize = 55;
/// Bit of [`Cqe::flags_rqpn`]: a GRH is in the first 40 bytes of the buffer.
pub const FLAGS_GRH: u32 = 1 << 28;
/// Shift of the service level in [`Cqe::flags_rqpn`].
pub const FLAGS_SL_SHIFT: u32 = 24;

impl Cqe {
    /// A completion of that kind; the owner bit is the queue's business.
    #[must_use]
    pub fn new(opcode: CqeOpcode, qpn: u32, wqe_counter: u16) -> Self {
        let mut new = Self::new_zeroed();
        new.op_own = opcode.0 << 4;
        new.sop_drop_qpn = (qpn & 0xff_ffff).into();
        new.wqe_counter = wqe_counter.into();
        new
    }

    /// A failed one.
    #[must_use]
    pub fn error(opcode: CqeOpcode, qpn: u32, wqe_counter: u16, syndrome: Syndrome, vendor: u8) -> Self {
        let mut new = Self::new(opcode, qpn, wqe_counter);
        let bytes = new.as_mut_bytes();
        bytes[ERROR_VENDOR_SYNDROME] = vendor;
        bytes[ERROR_SYNDROME] = syndrome.0;
        new
    }

    /// Its opcode.
    #[must_use]
    pub fn opcode(&self) -> CqeOpcode {
        CqeOpcode(self.op_own >> 4)
    }

    /// Its syndrome, if it failed.
    #[must_use]
    pub fn syndrome(&self) -> Option<Syndrome> {
        matches!(
            self.opcode(),
            CqeOpcode::REQUESTER_ERROR | CqeOpcode::RESPONDER_ERROR
        )
        .then(|| Syndrome(self.as_bytes()[ERROR_SYNDROME]))
    }
}
