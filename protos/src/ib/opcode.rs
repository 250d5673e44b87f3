//! BTH opcodes (section 9.2.1, table "OpCode field").

use std::fmt;

/// Transport service: bits 7 to 5 of an opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ServiceType {
    /// Reliable connection.
    Rc = 0,
    /// Unreliable connection.
    Uc = 1,
    /// Unreliable datagram.
    Ud = 3,
    /// Extended reliable connection (annex A14).
    Xrc = 5,
}

/// Where a packet stands in its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// First of several.
    First,
    /// Neither first nor last.
    Middle,
    /// Last of several.
    Last,
    /// The only one.
    Only,
}

impl Place {
    /// Begins a message.
    #[must_use]
    pub const fn begins(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }
    /// Ends a message.
    #[must_use]
    pub const fn ends(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }
    /// From both.
    #[must_use]
    pub const fn new(begins: bool, ends: bool) -> Self {
        match (begins, ends) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, true) => Self::Last,
            (false, false) => Self::Middle,
        }
    }
}

/// What the last packet of a message carries besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Extended {
    /// Nothing.
    None,
    /// Four bytes for the receiver.
    Immediate,
    /// An R_Key that the receiver invalidates.
    Invalidate,
}

/// Bits 4 to 0 of an opcode, understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// SEND.
    Send(Place, Extended),
    /// RDMA WRITE.
    Write(Place, Extended),
    /// RDMA READ request.
    ReadRequest,
    /// RDMA READ response.
    ReadResponse(Place),
    /// Acknowledge.
    Acknowledge,
    /// ATOMIC acknowledge.
    AtomicAcknowledge,
    /// Compare and swap.
    CompareSwap,
    /// Fetch and add.
    FetchAdd,
}

/// The opcode of a packet. Unknown values survive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Opcode(pub u8);

impl Opcode {
    /// Of an operation of a service. (Not every service has every operation.)
    #[must_use]
    pub const fn new(service: ServiceType, operation: Operation) -> Self {
        let code = match operation {
            Operation::Send(Place::First, _) => 0x00,
            Operation::Send(Place::Middle, _) => 0x01,
            Operation::Send(Place::Last, Extended::None) => 0x02,
            Operation::Send(Place::Last, Extended::Immediate) => 0x03,
            Operation::Send(Place::Only, Extended::None) => 0x04,
            Operation::Send(Place::Only, Extended::Immediate) => 0x05,
            Operation::Write(Place::First, _) => 0x06,
            Operation::Write(Place::Middle, _) => 0x07,
            Operation::Write(Place::Last, Extended::Immediate) => 0x09,
            Operation::Write(Place::Last, _) => 0x08,
            Operation::Write(Place::Only, Extended::Immediate) => 0x0b,
            Operation::Write(Place::Only, _) => 0x0a,
            Operation::ReadRequest => 0x0c,
            Operation::ReadResponse(Place::First) => 0x0d,
            Operation::ReadResponse(Place::Middle) => 0x0e,
            Operation::ReadResponse(Place::Last) => 0x0f,
            Operation::ReadResponse(Place::Only) => 0x10,
            Operation::Acknowledge => 0x11,
            Operation::AtomicAcknowledge => 0x12,
            Operation::CompareSwap => 0x13,
            Operation::FetchAdd => 0x14,
            Operation::Send(Place::Last, Extended::Invalidate) => 0x16,
            Operation::Send(Place::Only, Extended::Invalidate) => 0x17,
        };
        Self((service as u8) << 5 | code)
    }

    /// The service; `None` for one that is not implemented.
    #[must_use]
    pub const fn service(self) -> Option<ServiceType> {
        match self.0 >> 5 {
            0 => Some(ServiceType::Rc),
            1 => Some(ServiceType::Uc),
            3 => Some(ServiceType::Ud),
            5 => Some(ServiceType::Xrc),
            _ => None,
        }
    }

    /// The operation; `None` for one that the service does not have.
    #[must_use]
    pub const fn operation(self) -> Option<Operation> {
        use {Extended as E, Operation as O, Place as P};
        let Some(service) = self.service() else {
            return None;
        };
        let operation = match self.0 & 0x1f {
            0x00 => O::Send(P::First, E::None),
            0x01 => O::Send(P::Middle, E::None),
            0x02 => O::Send(P::Last, E::None),
            0x03 => O::Send(P::Last, E::Immediate),
            0x04 => O::Send(P::Only, E::None),
            0x05 => O::Send(P::Only, E::Immediate),
            0x06 => O::Write(P::First, E::None),
            0x07 => O::Write(P::Middle, E::None),
            0x08 => O::Write(P::Last, E::None),
            0x09 => O::Write(P::Last, E::Immediate),
            0x0a => O::Write(P::Only, E::None),
            0x0b => O::Write(P::Only, E::Immediate),
            0x0c => O::ReadRequest,
            0x0d => O::ReadResponse(P::First),
            0x0e => O::ReadResponse(P::Middle),
            0x0f => O::ReadResponse(P::Last),
            0x10 => O::ReadResponse(P::Only),
            0x11 => O::Acknowledge,
            0x12 => O::AtomicAcknowledge,
            0x13 => O::CompareSwap,
            0x14 => O::FetchAdd,
            0x16 => O::Send(P::Last, E::Invalidate),
            0x17 => O::Send(P::Only, E::Invalidate),
            _ => return None,
        };
        let fits = match service {
            ServiceType::Rc | ServiceType::Xrc => true,
            ServiceType::Uc => {
                matches!(operation, O::Send(_, E::None | E::Immediate) | O::Write(..))
            }
            ServiceType::Ud => matches!(operation, O::Send(P::Only, E::None | E::Immediate)),
        };
        if fits { Some(operation) } else { None }
    }
}

impl fmt::Debug for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.service(), self.operation()) {
            (Some(service), Some(operation)) => write!(f, "{service:?} {operation:?}"),
            _ => write!(f, "opcode {:#x}", self.0),
        }
    }
}
