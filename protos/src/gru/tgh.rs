//! TGH, the TLB flush handle (section 4).

use super::{HandleStatus, open_enum};
use bitfield_struct::bitfield;

open_enum! {
    /// TGH operation.
    Opc {
        /// Nothing.
        TLBNOP = 0,
        /// Invalidate, kill, drain.
        TLBINV = 1,
    }
}
open_enum! {
    /// TGH state.
    State {
        /// Idle.
        IDLE = 0,
        /// Engines being stopped.
        PE_INVAL = 1,
        /// Contexts being interrupted.
        INTERRUPT_INVAL = 2,
        /// Draining.
        WAITDONE = 3,
        /// Contexts being restarted.
        RESTART_CTX = 4,
    }
}

/// Byte offset of DW0.
pub const CONTROL: u64 = 0x00;
/// Byte offset of the start address.
pub const VADDR: u64 = 0x08;
/// Byte offset of DW2 (asid, page size, global).
pub const SCOPE: u64 = 0x10;
/// Byte offset of DW3 (address mask, n).
pub const COUNT: u64 = 0x18;
/// Byte offset of DW4 (context bitmap).
pub const CTXBITMAP: u64 = 0x20;
/// `n` that means "everything that matches".
pub const N_ALL: u16 = 1023;
/// All ones in `vaddrmask`.
pub const VADDRMASK_ALL: u64 = (1 << 39) - 1;

/// DW0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// Go.
    pub cmd: bool,
    /// Software's lock; the device stores it and never acts on it.
    pub delresp: bool,
    #[bits(1)]
    pub opc: Opc,
    #[bits(13)]
    __: u16,
    #[bits(2)]
    pub status: HandleStatus,
    #[bits(2)]
    __: u8,
    #[bits(3)]
    pub state: State,
    #[bits(1)]
    __: u8,
    #[bits(3)]
    pub cause: u8,
    #[bits(37)]
    __: u64,
}

/// DW2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Scope {
    #[bits(24)]
    pub asid: u32,
    __: u8,
    /// Code of [`super::page_size`]: the step of `n`.
    #[bits(5)]
    pub pagesize: u8,
    #[bits(11)]
    __: u16,
    /// Every ASID.
    pub global: bool,
    #[bits(15)]
    __: u16,
}

/// DW3.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Count {
    #[bits(39)]
    pub vaddrmask: u64,
    #[bits(9)]
    __: u16,
    /// Pages minus one; [`N_ALL`] = everything that matches.
    #[bits(10)]
    pub n: u16,
    #[bits(6)]
    __: u8,
}
