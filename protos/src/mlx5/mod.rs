//! The mlx5 HCA as its drivers see it: init segment, commands, contexts, WQEs, CQEs, EQEs.
//!
//! Source of every offset and bit: the project's mlx5 hardware reference ("reference N" below) and the names of
//! `include/linux/mlx5/mlx5_ifc.h`, `device.h` and `qp.h` of Linux 6.12, which call a context `xyz_bits` and
//! count its bits from the most significant one of the first big-endian 32-bit word. Here a field is named by
//! the byte offset of its word, its lowest bit in that word, and its width.
//!
//! Everything is big-endian. What a driver hands over is hostile input: a layout is a fixed number of bytes, and
//! any bytes are a valid value of it.
//!
//! Not here: Ethernet contexts (TIR, TIS, RQ, SQ, flow tables), DC, device memory, signature, DevX objects.

pub mod caps;
pub mod cmd;
pub mod commands;
pub mod cq;
pub mod eq;
pub mod iseg;
mod layout;
pub mod mkey;
pub mod pci;
pub mod qp;
pub mod srq;
#[cfg(test)]
mod tests;
pub mod uar;
pub mod wqe;

pub use layout::{Described, Field, Layout, Wide};
