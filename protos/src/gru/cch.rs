//! CCH, the context configuration handle (section 5).

use super::{HandleStatus, open_enum};
use bitfield_struct::bitfield;

open_enum! {
    /// CCH operation.
    Opc {
        /// Let the context run; reloads asid[], enables and tlb_int_select.
        START = 1,
        /// Take the resources of the allocation maps.
        ALLOCATE = 2,
        /// Stop.
        INTERRUPT = 3,
        /// Give the resources back.
        DEALLOCATE = 4,
        /// Stop and wait until quiet.
        INTERRUPT_SYNC = 5,
    }
}
open_enum! {
    /// CCH state.
    State {
        /// Nothing allocated.
        INACTIVE = 0,
        /// Allocated, not running.
        MAPPED = 1,
        /// Running.
        ACTIVE = 2,
        /// Stopped.
        INTERRUPTED = 3,
    }
}
open_enum! {
    /// Why a CCH command was refused.
    Cause {
        /// No error.
        NONE = 0,
        /// Region register write error.
        REGION_REGISTER_WRITE_ERROR = 1,
        /// Unknown opc.
        ILLEGAL_OPCODE = 2,
        /// START in the wrong state.
        INVALID_START = 3,
        /// ALLOCATE in the wrong state.
        INVALID_ALLOCATION = 4,
        /// DEALLOCATE in the wrong state.
        INVALID_DEALLOCATION = 5,
        /// INTERRUPT in the wrong state.
        INVALID_INTERRUPT = 6,
        /// Busy.
        CCH_BUSY = 7,
        /// Empty cbr_allocation_map.
        NO_CBRS_TO_ALLOCATE = 8,
        /// Fault-map configuration.
        BAD_TFM_CONFIG = 9,
        /// A CBR bit belongs to another context.
        CBR_OVERSUBSCRIBED = 10,
        /// A DSR bit belongs to another context.
        DSR_OVERSUBSCRIBED = 11,
        /// CBR still in use at DEALLOCATE.
        CBR_DEALLOCATION_ERROR = 12,
    }
}

/// Byte offset of DW0.
pub const CONTROL: u64 = 0x00;
/// Byte offset of the CBR allocation map.
pub const CBR_MAP: u64 = 0x08;
/// Byte offset of asid[8], u32 each.
pub const ASID: u64 = 0x10;
/// Byte offset of sizeavail[8], u16 each.
pub const SIZEAVAIL: u64 = 0x30;
/// Address regions (asid[], sizeavail[]).
pub const REGIONS: usize = 8;

/// Region of an address: three bits (section 16.4), so that addresses below 2^61 are region 0.
#[must_use]
pub const fn region_of(va: u64) -> usize {
    (va >> 61) as usize
}

/// DW0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// Go.
    pub cmd: bool,
    /// Software's lock; the device stores it and never acts on it.
    pub delresp: bool,
    #[bits(3)]
    pub opc: Opc,
    /// May bypass the TLB.
    pub unmap_enable: bool,
    pub req_slice_set_enable: bool,
    #[bits(2)]
    pub req_slice: u8,
    pub cb_int_enable: bool,
    /// Raise the vector at a miss.
    pub tlb_int_enable: bool,
    /// Report misses in the fault map (FMM); clear = user polling (UPM).
    pub tfm_fault_bit_enable: bool,
    /// TFM and vector.
    #[bits(4)]
    pub tlb_int_select: u8,
    #[bits(2)]
    pub status: HandleStatus,
    #[bits(2)]
    pub state: State,
    #[bits(4)]
    __: u8,
    #[bits(4)]
    pub cause: Cause,
    pub tfm_done_bit_enable: bool,
    #[bits(3)]
    __: u8,
    pub dsr_allocation_map: u32,
}
