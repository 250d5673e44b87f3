//! InfiniBand: addresses, packet headers, management datagrams.
//!
//! Source of every layout and constant: InfiniBand Architecture Specification, volume 1; section numbers below
//! are its. Everything on the wire is big-endian.
//!
//! Not implemented: reliable datagrams (RDETH), raw packets, congestion control and its annexes' headers, the
//! general management classes other than subnet management, subnet administration and performance.

mod address;
mod crc;
pub(crate) mod header;
pub mod mad;
mod opcode;
#[cfg(test)]
mod tests;
pub mod trunk;

pub use address::{Gid, Lid, Mtu, Pkey, Psn, Qkey, Qpn};
pub use crc::{icrc, vcrc};
pub use header::{
    Aeth, AtomicAckEth, AtomicEth, Bth, Deth, Grh, Ieth, ImmDt, LinkNextHeader, Lrh, NakCode, Reth, Syndrome,
    Xrceth, rnr_delay,
};
pub use opcode::{Extended, Opcode, Operation, Place, ServiceType};
