//! Doorbells (reference 4): offsets in a UAR page, and doorbell records in the driver's memory.

/// CQ arm: 8 bytes.
pub const CQ_ARM: u64 = 0x20;
/// EQ: consumer index and arm, 4 bytes.
pub const EQ_ARM: u64 = 0x40;
/// EQ: consumer index only, 4 bytes.
pub const EQ_UPDATE: u64 = 0x48;
/// First send doorbell: 8 bytes, the head of the control segment.
pub const SQ: u64 = 0x800;
/// Send doorbells end here.
pub const SQ_END: u64 = 0x1000;

/// What is written to [`EQ_ARM`] and [`EQ_UPDATE`].
#[must_use]
pub const fn eq_doorbell(eqn: u8, consumer: u32) -> u32 {
    (eqn as u32) << 24 | (consumer & 0xff_ffff)
}

/// First word of a CQ arm, also `dbr[1]` of a CQ: sequence number, solicited only, consumer index.
pub mod cq_arm {
    /// Only solicited completions notify.
    pub const SOLICITED: u32 = 1 << 24;
    /// Mask of the consumer index.
    pub const CONSUMER: u32 = 0xff_ffff;
    /// Bits of the sequence number.
    pub const SEQUENCE_SHIFT: u32 = 28;
}

/// Offset of a QP's receive counter in its doorbell record (16 bits in a 32-bit word). Also an SRQ's.
pub const DBR_RECEIVE: u64 = 0;
/// Offset of a QP's send counter.
pub const DBR_SEND: u64 = 4;
/// Offset of a CQ's consumer index.
pub const DBR_CQ_CONSUMER: u64 = 0;
/// Offset of a CQ's arm word.
pub const DBR_CQ_ARM: u64 = 4;
