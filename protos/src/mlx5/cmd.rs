//! The command interface (reference 1.2): queue entries, mailboxes, opcodes, statuses.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::open;

/// Entries of the queue.
pub const ENTRIES: usize = 32;
/// Bytes of input or output that the entry itself holds.
pub const INLINE: usize = 16;
/// `type` of an entry: the PCI command interface.
pub const TYPE_PCI: u8 = 7;

/// A queue entry.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Entry {
    /// [`TYPE_PCI`].
    pub kind: u8,
    /// Not used.
    pub reserved: [u8; 3],
    /// Bytes of input.
    pub inlen: U32,
    /// First input mailbox.
    pub in_ptr: U64,
    /// The input's first bytes.
    pub input: [u8; INLINE],
    /// The output's first bytes.
    pub output: [u8; INLINE],
    /// First output mailbox.
    pub out_ptr: U64,
    /// Bytes of output that the driver has room for.
    pub outlen: U32,
    /// Repeated in each mailbox.
    pub token: u8,
    /// Not used: the checksum is off.
    pub sig: u8,
    /// Not used.
    pub reserved2: u8,
    /// Bit 0: the device owns the entry. Above it the [`Delivery`] status.
    pub status_own: u8,
}
const _: () = assert!(size_of::<Entry>() == 64);
/// Offset of [`Entry::output`].
pub const ENTRY_OUTPUT: u64 = 32;
/// Offset of [`Entry::status_own`].
pub const ENTRY_STATUS_OWN: u64 = 63;
const _: () = assert!(std::mem::offset_of!(Entry, output) as u64 == ENTRY_OUTPUT);
const _: () = assert!(std::mem::offset_of!(Entry, status_own) as u64 == ENTRY_STATUS_OWN);

/// Bytes of data in a mailbox.
pub const MAILBOX_DATA: usize = 512;

/// A mailbox: a piece of a long input or output.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Mailbox {
    /// The piece.
    pub data: [u8; MAILBOX_DATA],
    /// Not used.
    pub reserved: [u8; 48],
    /// The next one; 0 = the last.
    pub next: U64,
    /// Its number, from 0.
    pub block_num: U32,
    /// Not used.
    pub reserved2: u8,
    /// As the entry's.
    pub token: u8,
    /// Not used.
    pub ctrl_sig: u8,
    /// Not used.
    pub sig: u8,
}
const _: () = assert!(size_of::<Mailbox>() == 576);
/// Offset of [`Mailbox::next`].
pub const MAILBOX_NEXT: u64 = 560;
const _: () = assert!(std::mem::offset_of!(Mailbox, next) as u64 == MAILBOX_NEXT);
const _: () = assert!(std::mem::offset_of!(Mailbox, token) == 573);

open! {
    /// Whether an entry could be executed at all (`status_own >> 1`; `MLX5_CMD_DELIVERY_STAT_*`).
    Delivery(u8) {
        /// Yes: the output has its own status.
        OK = 0x0,
        /// The token of a mailbox differs.
        TOKEN = 0x2,
        /// A mailbox's number is not the next one.
        BLOCK_NUMBER = 0x3,
        /// An output mailbox cannot be reached.
        OUT_POINTER = 0x4,
        /// An input mailbox cannot be reached.
        IN_POINTER = 0x5,
        /// The input's length makes no sense.
        IN_LENGTH = 0x7,
        /// The output's length makes no sense.
        OUT_LENGTH = 0x8,
        /// The entry's type is unknown.
        DESCRIPTOR = 0x10,
    }
}

open! {
    /// First byte of each output (`MLX5_CMD_STAT_*`).
    Status(u8) {
        /// Done.
        OK = 0x0,
        /// Internal error.
        INTERNAL = 0x1,
        /// No such command, or not with this modifier.
        BAD_OP = 0x2,
        /// A parameter makes no sense.
        BAD_PARAM = 0x3,
        /// Not in this state of the device.
        BAD_SYSTEM_STATE = 0x4,
        /// No such object.
        BAD_RESOURCE = 0x5,
        /// The object is in use.
        RESOURCE_BUSY = 0x6,
        /// A limit is exceeded.
        LIMIT = 0x8,
        /// Not in this state of the object.
        BAD_RESOURCE_STATE = 0x9,
        /// An index is out of range.
        BAD_INDEX = 0xa,
        /// Nothing is left.
        NO_RESOURCE = 0xf,
        /// Not in this state of the QP.
        BAD_QP_STATE = 0x10,
        /// A MAD that cannot be answered.
        BAD_PACKET = 0x30,
        /// Completions that are outstanding do not fit.
        BAD_OUTSTANDING_CQES = 0x40,
        /// The input's length.
        BAD_INPUT_LENGTH = 0x50,
        /// The output's length.
        BAD_OUTPUT_LENGTH = 0x51,
    }
}

open! {
    /// First half-word of each input (`MLX5_CMD_OP_*`); those that this device knows.
    Opcode(u16) {
        /// Capabilities.
        QUERY_HCA_CAP = 0x100,
        /// Board identity.
        QUERY_ADAPTER = 0x101,
        /// Start the HCA.
        INIT_HCA = 0x102,
        /// Stop it.
        TEARDOWN_HCA = 0x103,
        /// Enable the function.
        ENABLE_HCA = 0x104,
        /// Disable it.
        DISABLE_HCA = 0x105,
        /// How many pages the device wants.
        QUERY_PAGES = 0x107,
        /// Pages given or taken.
        MANAGE_PAGES = 0x108,
        /// Choose capabilities.
        SET_HCA_CAP = 0x109,
        /// Interface steps that are supported.
        QUERY_ISSI = 0x10a,
        /// Choose one.
        SET_ISSI = 0x10b,
        /// Make a memory key.
        CREATE_MKEY = 0x200,
        /// Its context.
        QUERY_MKEY = 0x201,
        /// Destroy it.
        DESTROY_MKEY = 0x202,
        /// Reserved keys.
        QUERY_SPECIAL_CONTEXTS = 0x203,
        /// A page fault has been handled.
        PAGE_FAULT_RESUME = 0x204,
        /// Make an event queue.
        CREATE_EQ = 0x301,
        /// Destroy it.
        DESTROY_EQ = 0x302,
        /// Its context.
        QUERY_EQ = 0x303,
        /// Make a completion queue.
        CREATE_CQ = 0x400,
        /// Destroy it.
        DESTROY_CQ = 0x401,
        /// Its context.
        QUERY_CQ = 0x402,
        /// Moderation, size.
        MODIFY_CQ = 0x403,
        /// Make a queue pair.
        CREATE_QP = 0x500,
        /// Destroy it.
        DESTROY_QP = 0x501,
        /// Transition.
        RST2INIT_QP = 0x502,
        /// Transition.
        INIT2RTR_QP = 0x503,
        /// Transition.
        RTR2RTS_QP = 0x504,
        /// Transition.
        RTS2RTS_QP = 0x505,
        /// Transition.
        SQERR2RTS_QP = 0x506,
        /// Transition from any state.
        TO_ERR_QP = 0x507,
        /// Transition from any state.
        TO_RST_QP = 0x50a,
        /// Its context.
        QUERY_QP = 0x50b,
        /// A MAD for the device itself.
        MAD_IFC = 0x50d,
        /// Transition.
        INIT2INIT_QP = 0x50e,
        /// Make a shared receive queue with an XRC domain.
        CREATE_XRC_SRQ = 0x705,
        /// Destroy it.
        DESTROY_XRC_SRQ = 0x706,
        /// Its context.
        QUERY_XRC_SRQ = 0x707,
        /// Set its limit.
        ARM_XRC_SRQ = 0x708,
        /// Port and GUIDs.
        QUERY_HCA_VPORT_CONTEXT = 0x762,
        /// GIDs.
        QUERY_HCA_VPORT_GID = 0x764,
        /// P_Keys.
        QUERY_HCA_VPORT_PKEY = 0x765,
        /// Port counters.
        QUERY_VPORT_COUNTER = 0x770,
        /// Protection domain.
        ALLOC_PD = 0x800,
        /// Give it back.
        DEALLOC_PD = 0x801,
        /// Doorbell page.
        ALLOC_UAR = 0x802,
        /// Give it back.
        DEALLOC_UAR = 0x803,
        /// Access registers.
        ACCESS_REG = 0x805,
        /// Multicast.
        ATTACH_TO_MCG = 0x806,
        /// Multicast.
        DETACH_FROM_MCG = 0x807,
        /// Nothing.
        NOP = 0x80d,
        /// XRC domain.
        ALLOC_XRCD = 0x80e,
        /// Give it back.
        DEALLOC_XRCD = 0x80f,
        /// Make a receive memory pool (a shared receive queue).
        CREATE_RMP = 0x90c,
        /// State, limit.
        MODIFY_RMP = 0x90d,
        /// Destroy it.
        DESTROY_RMP = 0x90e,
        /// Its context.
        QUERY_RMP = 0x90f,
    }
}
