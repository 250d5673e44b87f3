//! TFH, the TLB fault handle (section 6).

use super::{HandleStatus, open_enum};
use bitfield_struct::bitfield;

open_enum! {
    /// TFH operation.
    Opc {
        /// Nothing.
        NOOP = 0,
        /// Retry without a new translation.
        RESTART = 1,
        /// Enter a translation, leave the CBR waiting.
        WRITE_ONLY = 2,
        /// Enter a translation unless killed, then retry.
        WRITE_RESTART = 3,
        /// Abort the instruction.
        EXCEPTION = 4,
        /// Convert an FMM miss into a UPM miss.
        USER_POLLING_MODE = 7,
    }
}
open_enum! {
    /// TFH state.
    State {
        /// Not in use.
        INACTIVE = 0,
        /// No miss.
        IDLE = 1,
        /// A miss that the user has to report.
        MISS_UPM = 2,
        /// A miss that the fault map reports.
        MISS_FMM = 3,
        /// Hardware error.
        HW_ERR = 4,
        /// Entering a translation.
        WRITE_TLB = 5,
        /// Restarting the CBR.
        RESTART_CBR = 6,
    }
}
open_enum! {
    /// Why.
    Cause {
        /// Nothing.
        NONE = 0,
        /// No entry.
        TLB_MISS = 1,
        /// Store through a clean entry.
        TLB_MOD = 2,
        /// Hardware error.
        HW_ERROR_RR = 3,
        /// Hardware error.
        HW_ERROR_MAIN_ARRAY = 4,
        /// Hardware error.
        HW_ERROR_VALID = 5,
        /// Hardware error.
        HW_ERROR_PAGESIZE = 6,
        /// The instruction raised an exception.
        INSTRUCTION_EXCEPTION = 7,
        /// Uncorrectable error.
        UNCORRECTIBLE_ERROR = 8,
    }
}

/// Byte offset of DW0.
pub const CONTROL: u64 = 0x00;
/// Byte offset of DW1, the missing address.
pub const MISSVADDR: u64 = 0x08;
/// Byte offset of DW2 (asids, dirty, gaa).
pub const ASIDS: u64 = 0x10;
/// Byte offset of DW3 (pfn, page size).
pub const TARGET: u64 = 0x18;
/// Byte offset of DW4, the address to fill.
pub const FILLVADDR: u64 = 0x20;
/// Byte offset of DW5: our extension, the software tag (generation) of the fill. Reserved on hardware.
pub const FILLTAG: u64 = 0x28;
/// gaa and iaa: ordinary memory.
pub const GAA_RAM: u8 = 0;

/// DW0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// Go.
    pub cmd: bool,
    /// Software's.
    pub delresp: bool,
    #[bits(2)]
    __: u8,
    #[bits(3)]
    pub opc: Opc,
    #[bits(9)]
    __: u16,
    #[bits(2)]
    pub status: HandleStatus,
    #[bits(2)]
    __: u8,
    #[bits(3)]
    pub state: State,
    #[bits(1)]
    __: u8,
    #[bits(6)]
    pub cause: Cause,
    /// The instruction had asked for a completion interrupt.
    pub cb_int: bool,
    #[bits(1)]
    __: u8,
    #[bits(12)]
    pub indexway: u16,
    #[bits(4)]
    __: u8,
    #[bits(4)]
    pub ctxnum: u8,
    #[bits(12)]
    __: u16,
}

/// DW2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Asids {
    #[bits(24)]
    pub missasid: u32,
    __: u8,
    #[bits(24)]
    pub fillasid: u32,
    /// 1 = the entry may be written through.
    pub dirty: bool,
    #[bits(2)]
    pub gaa: u8,
    #[bits(5)]
    __: u8,
}

/// DW3.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Target {
    /// Physical address (here: IOVA) >> 12, whatever the page size.
    #[bits(41)]
    pub pfn: u64,
    #[bits(7)]
    __: u8,
    /// Code of [`super::page_size`].
    #[bits(5)]
    pub pagesize: u8,
    #[bits(11)]
    __: u16,
}

/// Whether the driver takes a cause for a write access (`cause & 2`, section 6).
#[must_use]
pub const fn is_write(cause: Cause) -> bool {
    cause.0 & 2 != 0
}
