//! CB, the control block: one instruction (section 7).

use super::open_enum;
use bitfield_struct::bitfield;

open_enum! {
    /// Operation codes (section 7.1).
    Opc {
        /// Completes.
        NOP = 0x00,
        /// memory(baddr0) -> memory(baddr1) through a DS buffer.
        BCOPY = 0x01,
        /// DS[tri0 + i] = mem[baddr0 + i * stride].
        VLOAD = 0x02,
        /// Gather: DS[tri0 + i] = mem[baddr0 + index_i].
        IVLOAD = 0x03,
        /// mem[baddr0 + i * stride] = DS[tri0 + i].
        VSTORE = 0x04,
        /// Scatter.
        IVSTORE = 0x05,
        /// mem[baddr0 + i * stride] = value.
        VSET = 0x06,
        /// Indexed set.
        IVSET = 0x07,
        /// Send lines to a message queue.
        MESQ = 0x08,
        /// Masked compare-exchange of a line fragment.
        GAMXR = 0x09,
        /// Atomic with implicit operand.
        GAMIR = 0x0a,
        /// GAMIR on a registered address.
        GAMIRR = 0x0b,
        /// Atomic with explicit operands.
        GAMER = 0x0c,
        /// GAMER on a registered address; adds the polls.
        GAMERR = 0x0d,
        /// Block store.
        BSTORE = 0x0e,
        /// Flush lines.
        VFLUSH = 0x0f,
    }
}
open_enum! {
    /// Extended operation codes of GAMIR and GAMIRR (section 7.1).
    ImplicitOp {
        /// Return the old value.
        FETCH = 0x01,
        /// Store zero.
        CLEAR = 0x02,
        /// Add one.
        INC = 0x05,
        /// Subtract one.
        DEC = 0x07,
        /// GAMIR: queue check, 64-byte step.
        QCHK1 = 0x0d,
        /// GAMIR: queue check, 128-byte step.
        QCHK2 = 0x0e,
        /// GAMIRR: subtract one, but leave zero alone.
        DECZ = 0x0f,
    }
}
open_enum! {
    /// Extended operation codes of GAMER and GAMERR (section 7.1).
    ExplicitOp {
        /// mem = op1.
        SWAP = 0x00,
        /// mem |= op1.
        OR = 0x01,
        /// mem &= op1.
        AND = 0x02,
        /// mem ^= op1.
        XOR = 0x03,
        /// mem += op1.
        ADD = 0x04,
        /// if mem == op2 then mem = op1.
        CSWAP = 0x08,
        /// GAMERR: wait until mem == op1.
        EPOLL = 0x09,
        /// GAMERR: wait until mem != op1.
        NPOLL = 0x0a,
        /// GAMER: queue check, step of op1 cache lines.
        CADD = 0x0c,
    }
}
open_enum! {
    /// Extended operation code of GAMXR (section 7.1).
    ExchangeOp {
        /// Masked compare-exchange.
        CSWAP = 0x0b,
    }
}
open_enum! {
    /// Low three bits of isubstatus: what has become of a message (section 10).
    SubStatus {
        /// Nothing to say.
        NONE = 0,
        /// Congestion: try again.
        LB_OVERFLOWED = 1,
        /// The half is full; avalue has head and limit.
        QLIMIT_REACHED = 2,
        /// The message would cross a page.
        PAGE_OVERFLOW = 3,
        /// Congestion: try again.
        AMO_NACKED = 4,
        /// The slot is reserved (avalue has its head), the data is not stored.
        PUT_NACKED = 5,
    }
}
open_enum! {
    /// istatus.
    Status {
        /// Done, or never started.
        IDLE = 0,
        /// Failed; the CBE's ecause says why.
        EXCEPTION = 1,
        /// Running.
        ACTIVE = 2,
        /// A miss that the user has to report to the operating system.
        CALL_OS = 3,
    }
}
open_enum! {
    /// Element types.
    XType {
        /// 1 byte.
        BYTE = 0,
        /// 2 bytes.
        SHORT = 1,
        /// 4 bytes.
        WORD = 2,
        /// 8 bytes.
        DWORD = 3,
        /// 64 bytes.
        CACHE_LINE = 6,
    }
}

impl XType {
    /// Bytes of an element, or `None` for a reserved type.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        match self {
            Self::BYTE => Some(1),
            Self::SHORT => Some(2),
            Self::WORD => Some(4),
            Self::DWORD => Some(8),
            Self::CACHE_LINE => Some(64),
            _ => None,
        }
    }
}

/// `ima` bits.
pub mod ima {
    /// Delay the response until the status changes.
    pub const CB_DELAY: u8 = 1;
    /// No TLB.
    pub const UNMAPPED: u8 = 2;
    /// Interrupt at completion.
    pub const INTERRUPT: u8 = 4;
}

/// Byte offset of DW0.
pub const CONTROL: u64 = 0x00;
/// Byte offset of idef4: tri1, or BCOPY's buffer size in cache lines.
pub const IDEF4: u64 = 0x08;
/// Byte offset of idef1: baddr0.
pub const BADDR0: u64 = 0x10;
/// Byte offset of idef5: nelem.
pub const NELEM: u64 = 0x18;
/// Byte offset of idef6: stride in elements, or operand 1.
pub const STRIDE_OP1: u64 = 0x20;
/// Byte offset of idef3: baddr1, value, or operand 2.
pub const BADDR1_VALUE_OP2: u64 = 0x28;
/// Byte offset of avalue: old value of an atomic.
pub const AVALUE: u64 = 0x38;

/// DW0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// Go.
    pub icmd: bool,
    #[bits(3)]
    pub ima: u8,
    #[bits(4)]
    __: u8,
    #[bits(3)]
    pub xtype: XType,
    #[bits(2)]
    pub iaa0: u8,
    #[bits(2)]
    pub iaa1: u8,
    #[bits(1)]
    __: u8,
    #[bits(8)]
    pub opc: Opc,
    #[bits(8)]
    pub exopc: u8,
    /// idef2: tri0, a byte offset in the context's data segment.
    #[bits(22)]
    pub tri0: u32,
    #[bits(2)]
    __: u8,
    #[bits(2)]
    pub istatus: Status,
    /// [`SubStatus`] in the low three bits; bit 3 = implicit abort active.
    #[bits(4)]
    pub isubstatus: u8,
    #[bits(1)]
    __: u8,
    pub tlb_fault_color: bool,
}

impl Control {
    /// What has become of a message.
    #[must_use]
    pub const fn substatus(self) -> SubStatus {
        SubStatus(self.isubstatus() & 7)
    }
}

/// A whole instruction, as software stores it: DW1..DW5 first, then DW0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Instruction {
    /// DW0, with icmd set and istatus ACTIVE.
    pub control: Control,
    /// DW1.
    pub idef4: u64,
    /// DW2.
    pub baddr0: u64,
    /// DW3.
    pub nelem: u64,
    /// DW4.
    pub stride_op1: u64,
    /// DW5.
    pub baddr1_value_op2: u64,
}

impl Instruction {
    fn start(opc: Opc, exopc: u8, xtype: XType) -> Self {
        Self {
            control: Control::new()
                .with_icmd(true)
                .with_istatus(Status::ACTIVE)
                .with_opc(opc)
                .with_exopc(exopc)
                .with_xtype(xtype),
            ..Self::default()
        }
    }
    /// NOP.
    #[must_use]
    pub fn nop() -> Self {
        Self::start(Opc::NOP, 0, XType::BYTE)
    }
    /// Load `nelem` elements, `stride` elements apart, into the data segment at byte `tri0`.
    #[must_use]
    pub fn vload(va: u64, tri0: u32, xtype: XType, nelem: u64, stride: u64) -> Self {
        let mut i = Self::start(Opc::VLOAD, 0, xtype);
        (i.control, i.baddr0, i.nelem, i.stride_op1) = (i.control.with_tri0(tri0), va, nelem, stride);
        i
    }
    /// Store `nelem` elements from the data segment.
    #[must_use]
    pub fn vstore(va: u64, tri0: u32, xtype: XType, nelem: u64, stride: u64) -> Self {
        let mut i = Self::vload(va, tri0, xtype, nelem, stride);
        i.control = i.control.with_opc(Opc::VSTORE);
        i
    }
    /// Gather: element i comes from `va` + index i (bytes, u64 each, in the data segment at byte `tri1`).
    #[must_use]
    pub fn ivload(va: u64, tri0: u32, tri1: u32, xtype: XType, nelem: u64) -> Self {
        let mut i = Self::start(Opc::IVLOAD, 0, xtype);
        (i.control, i.baddr0, i.nelem) = (i.control.with_tri0(tri0), va, nelem);
        i.idef4 = u64::from(tri1);
        i
    }
    /// Scatter.
    #[must_use]
    pub fn ivstore(va: u64, tri0: u32, tri1: u32, xtype: XType, nelem: u64) -> Self {
        let mut i = Self::ivload(va, tri0, tri1, xtype, nelem);
        i.control = i.control.with_opc(Opc::IVSTORE);
        i
    }
    /// Set `nelem` elements to `value`.
    #[must_use]
    pub fn vset(va: u64, value: u64, xtype: XType, nelem: u64, stride: u64) -> Self {
        let mut i = Self::start(Opc::VSET, 0, xtype);
        (i.baddr0, i.nelem, i.stride_op1, i.baddr1_value_op2) = (va, nelem, stride, value);
        i
    }
    /// Copy `nelem` elements from `src` to `dst` through `lines` cache lines of the data segment at byte
    /// `tri0`.
    #[must_use]
    pub fn bcopy(src: u64, dst: u64, tri0: u32, lines: u32, xtype: XType, nelem: u64) -> Self {
        let mut i = Self::start(Opc::BCOPY, 0, xtype);
        (i.control, i.baddr0, i.nelem) = (i.control.with_tri0(tri0), src, nelem);
        (i.baddr1_value_op2, i.idef4) = (dst, u64::from(lines));
        i
    }
    /// Atomic with implicit operand; the old value lands in avalue.
    #[must_use]
    pub fn gamir(va: u64, op: ImplicitOp, xtype: XType) -> Self {
        let mut i = Self::start(Opc::GAMIR, op.0, xtype);
        (i.baddr0, i.nelem) = (va, 1);
        i
    }
    /// GAMIR's like on a registered address.
    #[must_use]
    pub fn gamirr(va: u64, op: ImplicitOp, xtype: XType) -> Self {
        let mut i = Self::gamir(va, op, xtype);
        i.control = i.control.with_opc(Opc::GAMIRR);
        i
    }
    /// Atomic with explicit operands; the old value lands in avalue.
    #[must_use]
    pub fn gamer(va: u64, op: ExplicitOp, op1: u64, op2: u64, xtype: XType) -> Self {
        let mut i = Self::start(Opc::GAMER, op.0, xtype);
        (i.baddr0, i.nelem, i.stride_op1, i.baddr1_value_op2) = (va, 1, op1, op2);
        i
    }
    /// GAMER's like on a registered address; has the polls.
    #[must_use]
    pub fn gamerr(va: u64, op: ExplicitOp, op1: u64, op2: u64, xtype: XType) -> Self {
        let mut i = Self::gamer(va, op, op1, op2, xtype);
        i.control = i.control.with_opc(Opc::GAMERR);
        i
    }
    /// Masked compare-exchange of `nelem` double words at `va`; the operands are in the data segment at byte
    /// `tri0`.
    #[must_use]
    pub fn gamxr(va: u64, tri0: u32, nelem: u64) -> Self {
        let mut i = Self::start(Opc::GAMXR, ExchangeOp::CSWAP.0, XType::DWORD);
        (i.control, i.baddr0, i.nelem) = (i.control.with_tri0(tri0), va, nelem);
        i
    }
    /// Indexed set: element i at `va` + index i becomes `value`.
    #[must_use]
    pub fn ivset(va: u64, tri1: u32, value: u64, xtype: XType, nelem: u64) -> Self {
        let mut i = Self::ivload(va, 0, tri1, xtype, nelem);
        i.control = i.control.with_opc(Opc::IVSET);
        i.baddr1_value_op2 = value;
        i
    }
    /// Send `lines` cache lines of the data segment at byte `tri0` to the message queue at `queue`.
    #[must_use]
    pub fn mesq(queue: u64, tri0: u32, lines: u64) -> Self {
        let mut i = Self::start(Opc::MESQ, 0, XType::CACHE_LINE);
        (i.control, i.baddr0, i.nelem) = (i.control.with_tri0(tri0), queue, lines);
        i
    }
    /// Block store of `nelem` elements to `dst`.
    #[must_use]
    pub fn bstore(src: u64, dst: u64, tri0: u32, xtype: XType, nelem: u64) -> Self {
        let mut i = Self::start(Opc::BSTORE, 0, xtype);
        (i.control, i.baddr0, i.nelem) = (i.control.with_tri0(tri0), src, nelem);
        i.baddr1_value_op2 = dst;
        i
    }
    /// Flush `nelem` elements, `stride` elements apart.
    #[must_use]
    pub fn vflush(va: u64, xtype: XType, nelem: u64, stride: u64) -> Self {
        let mut i = Self::start(Opc::VFLUSH, 0, xtype);
        (i.baddr0, i.nelem, i.stride_op1) = (va, nelem, stride);
        i
    }
    /// The same instruction with these bits of [`ima`], too.
    #[must_use]
    pub fn with_ima(mut self, bits: u8) -> Self {
        self.control = self.control.with_ima(self.control.ima() | bits);
        self
    }
}
