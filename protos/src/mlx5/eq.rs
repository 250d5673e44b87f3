//! Event queues: context (`eqc`) and entries (reference 5).

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{layout, open};

layout! {
    /// EQ context.
    Eqc[64] {
        /// 0 = good.
        STATUS = bits(0x00, 28, 4),
        /// Overrun is ignored.
        OVERRUN_IGNORE = bits(0x00, 17, 1),
        /// 9 armed, 10 fired.
        STATE = bits(0x00, 8, 4),
        /// Offset in the first page, in units of its size / 64.
        PAGE_OFFSET = bits(0x08, 6, 6),
        /// Logarithm of the entries.
        LOG_SIZE = bits(0x0c, 24, 5),
        /// Doorbell page.
        UAR_PAGE = bits(0x0c, 0, 24),
        /// MSI-X vector.
        INTR = bits(0x14, 0, 12),
        /// Logarithm of a page's bytes, minus 12.
        LOG_PAGE_SIZE = bits(0x18, 24, 5),
        /// As of the last doorbell.
        CONSUMER = bits(0x28, 0, 24),
        /// Entries written.
        PRODUCER = bits(0x2c, 0, 24),
    }
}

/// [`Eqc::STATE`]: an interrupt comes with the next event.
pub const STATE_ARMED: u32 = 0x9;
/// [`Eqc::STATE`]: one has come.
pub const STATE_FIRED: u32 = 0xa;

open! {
    /// Type of an event (`MLX5_EVENT_TYPE_*`).
    Event(u8) {
        /// A CQ that was armed.
        COMPLETION = 0x00,
        /// Communication established.
        COMM_EST = 0x02,
        /// A send queue is drained.
        SQ_DRAINED = 0x03,
        /// CQ error (overrun).
        CQ_ERROR = 0x04,
        /// A work queue's memory cannot be reached.
        WQ_CATASTROPHIC = 0x05,
        /// Port state.
        PORT_CHANGE = 0x09,
        /// Commands are done.
        COMMAND = 0x0a,
        /// The device wants pages.
        PAGE_REQUEST = 0x0b,
        /// A page is missing.
        PAGE_FAULT = 0x0c,
        /// A request that the QP must refuse.
        WQ_INVALID_REQUEST = 0x10,
        /// An access that the QP must refuse.
        WQ_ACCESS_ERROR = 0x11,
        /// A shared receive queue's memory cannot be reached.
        SRQ_CATASTROPHIC = 0x12,
        /// The last receive WQE of a QP in error has been taken from its SRQ.
        SRQ_LAST_WQE = 0x13,
        /// An SRQ is below its limit.
        SRQ_LIMIT = 0x14,
    }
}

/// An event.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Eqe {
    /// Not used.
    pub reserved: u8,
    /// [`Event`].
    pub kind: u8,
    /// Not used.
    pub reserved2: u8,
    /// Depends on the type.
    pub sub_type: u8,
    /// Not used.
    pub reserved3: [u8; 28],
    /// Depends on the type.
    pub data: [U32; 7],
    /// Not used.
    pub reserved4: [u8; 3],
    /// (producer >> log size) & 1, written last.
    pub owner: u8,
}
const _: () = assert!(size_of::<Eqe>() == 64);
const _: () = assert!(std::mem::offset_of!(Eqe, data) == 0x20 && std::mem::offset_of!(Eqe, owner) == 63);
/// Bytes of an event.
pub const EQE_SIZE: u64 = 64;
/// Word of [`Eqe::data`] with the CQ number of a [`Event::COMPLETION`] or the number of a QP or SRQ.
pub const DATA_NUMBER: usize = 6;
/// Word of [`Eqe::data`] whose upper byte is the type of queue of a QP or SRQ event.
pub const DATA_QUEUE_TYPE: usize = 5;

impl Eqe {
    /// An event of that type with nothing in it.
    #[must_use]
    pub fn new(kind: Event, sub_type: u8) -> Self {
        let mut new = Self::new_zeroed();
        new.kind = kind.0;
        new.sub_type = sub_type;
        new
    }

    /// With one word of data.
    #[must_use]
    pub fn with(mut self, word: usize, value: u32) -> Self {
        self.data[word] = value.into();
        self
    }
}

/// Sub type of [`Event::PAGE_FAULT`] in the memory scheme.
pub const PAGE_FAULT_MEMORY: u8 = 2;
/// Flag of a page fault: the last event of its token, which is to be resumed.
pub const PAGE_FAULT_LAST: u8 = 1 << 7;

/// A page fault of the memory scheme: `pages` of 4 KiB from `va` on are absent under `key`.
#[must_use]
pub fn page_fault(flags: u8, token: u64, pages: u32, key: u32, va: u64) -> Eqe {
    Eqe::new(Event::PAGE_FAULT, PAGE_FAULT_MEMORY)
        .with(0, u32::from(flags) << 24)
        .with(1, (token >> 32) as u32 & 0xffff)
        .with(2, token as u32)
        .with(3, pages << 12)
        .with(4, key)
        .with(5, (va >> 32) as u32)
        .with(6, va as u32)
}

/// Sub types of [`Event::PORT_CHANGE`].
pub mod port_change {
    /// The port went down.
    pub const DOWN: u8 = 1;
    /// The port is active.
    pub const ACTIVE: u8 = 4;
    /// LID.
    pub const LID: u8 = 6;
    /// P_Key table.
    pub const PKEY: u8 = 7;
    /// GUID table.
    pub const GUID: u8 = 8;
    /// Reregister with the subnet manager.
    pub const CLIENT_REREGISTER: u8 = 9;
}
