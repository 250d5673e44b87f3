//! What can go wrong.

use std::io;
use std::time::Duration;

use protos::mlx5::cmd::{Delivery, Opcode, Status};

/// Why a call of the driver failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Mlx5Error {
    /// The device did not answer an access, or the memory cannot be had.
    #[error("mlx5: {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The transport's error.
        source: io::Error,
    },
    /// Something else answers behind this backing.
    #[error(
        "not an mlx5: vendor {vendor:#06x} device {device:#06x} (wanted 0x15b3:0x1017); is this the socket of `tlbridge device --model mlx5`?"
    )]
    NotAnMlx5 {
        /// Vendor id found.
        vendor: u16,
        /// Device id found.
        device: u16,
    },
    /// The command interface could not take a command.
    #[error("mlx5: {opcode:?} was not delivered: {delivery:?}")]
    NotDelivered {
        /// Which command.
        opcode: Opcode,
        /// Why.
        delivery: Delivery,
    },
    /// A command failed.
    #[error("mlx5: {opcode:?} failed: {status:?}")]
    Refused {
        /// Which command.
        opcode: Opcode,
        /// Why.
        status: Status,
    },
    /// The HCA did not do it.
    #[error("mlx5: no {what} within {limit:?}; is the device process alive?")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The old buffer of a completion queue has no entry that ends it.
    #[error("mlx5: completion queue {cqn:#x} was resized, but nothing ends its old buffer")]
    Unended {
        /// Which queue.
        cqn: u32,
    },
    /// The HCA's memory is used up.
    #[error(
        "mlx5: {wanted} more bytes of memory were asked for, {left} are left; bring the HCA up with more"
    )]
    NoMemory {
        /// Asked for.
        wanted: u64,
        /// Left.
        left: u64,
    },
}

impl Mlx5Error {
    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
