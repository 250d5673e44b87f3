//! CBE, the extended control block: how far an instruction has come and why it failed (section 8).

use super::open_enum;
use bitfield_struct::bitfield;

open_enum! {
    /// cbrstate.
    State {
        /// Not allocated.
        INACTIVE = 0,
        /// Nothing to do.
        IDLE = 1,
        /// Being checked.
        PE_CHECK = 2,
        /// Accepted.
        QUEUED = 3,
        /// Waiting for data (here: for a translation).
        WAIT_RESPONSE = 4,
        /// Stopped by INTERRUPT.
        INTERRUPTED = 5,
        /// Stopped with an unserved fault-map miss.
        INTERRUPTED_MISS_FMM = 6,
        /// Being stopped with an unserved fault-map miss.
        BUSY_INTERRUPT_MISS_FMM = 7,
        /// Stopped with an unserved user-polling miss.
        INTERRUPTED_MISS_UPM = 8,
        /// Being stopped with an unserved user-polling miss.
        BUSY_INTERRUPTED_MISS_UPM = 9,
        /// Requests being issued.
        REQUEST_ISSUE = 10,
        /// Being stopped.
        BUSY_INTERRUPT = 11,
    }
}

/// `ecause` bits.
pub mod ecause {
    /// RI.
    pub const RI: u32 = 1;
    /// Invalid instruction.
    pub const INVALID_INSTRUCTION: u32 = 1 << 1;
    /// ima asks for unmapped mode in a context that may not.
    pub const UNMAPPED_MODE_FORBIDDEN: u32 = 1 << 2;
    /// Operand check.
    pub const PE_CHECK_DATA_ERROR: u32 = 1 << 3;
    /// iaa and the entry's gaa disagree.
    pub const IAA_GAA_MISMATCH: u32 = 1 << 4;
    /// Outside the context's data segment.
    pub const DATA_SEGMENT_LIMIT_EXCEEDED: u32 = 1 << 5;
    /// The fault was answered with EXCEPTION: no such memory.
    pub const OS_FATAL_TLB_FAULT: u32 = 1 << 6;
    /// Execution hardware error.
    pub const EXECUTION_HW_ERROR: u32 = 1 << 7;
    /// TLB hardware error.
    pub const TLBHW_ERROR: u32 = 1 << 8;
    /// Request timeout.
    pub const RA_REQUEST_TIMEOUT: u32 = 1 << 9;
    /// Request timeout.
    pub const HA_REQUEST_TIMEOUT: u32 = 1 << 10;
    /// Fatal response.
    pub const RA_RESPONSE_FATAL: u32 = 1 << 11;
    /// Non-fatal response.
    pub const RA_RESPONSE_NON_FATAL: u32 = 1 << 12;
    /// Fatal response.
    pub const HA_RESPONSE_FATAL: u32 = 1 << 13;
    /// Non-fatal response.
    pub const HA_RESPONSE_NON_FATAL: u32 = 1 << 14;
    /// The target of an entry is not reachable.
    pub const ADDRESS_SPACE_DECODE_ERROR: u32 = 1 << 15;
    /// Protocol state error.
    pub const PROTOCOL_STATE_DATA_ERROR: u32 = 1 << 16;
    /// Data error in a response.
    pub const RA_RESPONSE_DATA_ERROR: u32 = 1 << 17;
    /// Data error in a response.
    pub const HA_RESPONSE_DATA_ERROR: u32 = 1 << 18;
    /// Forced.
    pub const FORCED_ERROR: u32 = 1 << 19;
    /// What software may answer by setting icmd again (section 7), three times at most.
    pub const RETRYABLE: u32 = EXECUTION_HW_ERROR
        | TLBHW_ERROR
        | RA_REQUEST_TIMEOUT
        | RA_RESPONSE_NON_FATAL
        | HA_RESPONSE_NON_FATAL
        | RA_RESPONSE_DATA_ERROR
        | HA_RESPONSE_DATA_ERROR;
}

/// `cbrexecstatus` bits.
pub mod execstatus {
    /// Abort occurred.
    pub const ABORT_OCC: u8 = 1;
    /// Interrupt occurred.
    pub const INT_OCC: u8 = 1 << 1;
    /// Pending.
    pub const PENDING: u8 = 1 << 2;
    /// Queued.
    pub const QUEUED: u8 = 1 << 3;
    /// TLB invalidate.
    pub const TLB_INVAL: u8 = 1 << 4;
    /// Exception.
    pub const EXCEPTION: u8 = 1 << 5;
    /// Completion interrupt pending.
    pub const CB_INT_PENDING: u8 = 1 << 6;
}

/// Byte offset of DW0 (copy of the instruction's codes).
pub const COPY: u64 = 0x00;
/// Byte offset of DW1 (idef4cpy, idef4upd).
pub const IDEF4: u64 = 0x08;
/// Byte offset of idef1upd: current baddr0.
pub const IDEF1UPD: u64 = 0x10;
/// Byte offset of idef5cpy.
pub const IDEF5CPY: u64 = 0x18;
/// Byte offset of idef6cpy (BCOPY preload reads it as remaining source lines, section 17.7).
pub const IDEF6CPY: u64 = 0x20;
/// Byte offset of idef3upd: current baddr1.
pub const IDEF3UPD: u64 = 0x28;
/// Byte offset of idef5upd: elements left.
pub const IDEF5UPD: u64 = 0x30;
/// Byte offset of DW7.
pub const STATE: u64 = 0x38;

/// DW0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Copied {
    #[bits(1)]
    __: u8,
    #[bits(3)]
    pub ima: u8,
    #[bits(4)]
    __: u8,
    #[bits(3)]
    pub xtype: super::cb::XType,
    #[bits(2)]
    pub iaa0: u8,
    #[bits(2)]
    pub iaa1: u8,
    #[bits(1)]
    __: u8,
    #[bits(8)]
    pub opc: super::cb::Opc,
    #[bits(8)]
    pub exopc: u8,
    #[bits(22)]
    pub tri0: u32,
    #[bits(10)]
    __: u16,
}

/// DW1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Idef4 {
    #[bits(22)]
    pub copied: u32,
    #[bits(10)]
    __: u16,
    #[bits(22)]
    pub updated: u32,
    #[bits(10)]
    __: u16,
}

/// DW7.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Status {
    #[bits(22)]
    pub idef2upd: u32,
    #[bits(10)]
    __: u16,
    /// Bits of [`ecause`].
    #[bits(20)]
    pub ecause: u32,
    #[bits(4)]
    pub cbrstate: State,
    /// Bits of [`execstatus`].
    #[bits(8)]
    pub cbrexecstatus: u8,
}
