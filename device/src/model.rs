//! The seam between a device model and everything generic (server, PCI, DMA, ATC).
//!
//! A model implements [`Model`]. It is composed with config space, MSI-X and a DMA space into a
//! [`crate::pci::Function`], which the vfio-user server and in-process tests drive in the same way.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{dma, pci::Interrupts};

/// Number of BARs of a type 0 header.
pub const BARS: usize = 6;

/// What identifies the function in config space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// 24-bit class code: base class, sub class, programming interface.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

/// A BAR that the model decodes.
#[derive(Debug)]
pub struct BarSpec {
    /// BAR number; a 64-bit BAR also takes the next one.
    pub index: usize,
    /// Size in bytes: a power of two, at least 4096.
    pub size: u64,
    /// 64-bit memory BAR.
    pub is_64bit: bool,
    /// Prefetchable.
    pub prefetchable: bool,
    /// Parts that a client may map, if any.
    pub mmap: Option<BarMmap>,
}

/// The mappable parts of a BAR: one file whose offsets are the BAR's offsets.
#[derive(Debug)]
pub struct BarMmap {
    /// memfd as large as the BAR.
    pub fd: OwnedFd,
    /// Page-aligned (offset, size) areas. Everything outside them is trapped.
    pub areas: Vec<(u64, u64)>,
}

/// Where MSI-X lives. The generic PCI code answers accesses to table and PBA, not the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixSpec {
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR that holds table and PBA.
    pub bar: usize,
    /// Offset of the table (16 bytes a vector).
    pub table_offset: u64,
    /// Offset of the pending-bit array.
    pub pba_offset: u64,
}

/// A write to this BAR range may be replaced by a write to an eventfd (vfio-user REGION_IO_FDS).
#[derive(Debug)]
pub struct IoEventFd {
    /// Offset in the BAR.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// The eventfd.
    pub fd: OwnedFd,
}

/// Why a BAR access was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum AccessError {
    /// Nothing is decoded there.
    #[error("no register at BAR{bar}+{offset:#x} ({len} bytes)")]
    Unassigned {
        /// BAR number.
        bar: usize,
        /// Offset in it.
        offset: u64,
        /// Length of the access.
        len: usize,
    },
}

/// What the generic side hands to a model.
#[derive(Debug, Clone)]
pub struct ModelContext {
    /// The client's memory, by IOVA.
    pub dma: Arc<dma::Space>,
    /// MSI-X (or INTx) vectors.
    pub interrupts: Arc<Interrupts>,
}

/// A device model.
///
/// `bar_read` and `bar_write` are called on a connection's thread: they are short, never wait for
/// client memory, for an engine or for a lock that is held across I/O. Accesses have any length and
/// alignment that the client chose; the model decides what it accepts.
pub trait Model: Send + Sync + std::fmt::Debug {
    /// Config-space identity.
    fn identity(&self) -> Identity;
    /// The BARs. Called once, when the function is composed.
    fn bars(&self) -> Vec<BarSpec>;
    /// MSI-X, if the model has it.
    fn msix(&self) -> Option<MsixSpec>;
    /// Read from a BAR.
    ///
    /// # Errors
    /// [`AccessError`] when nothing is decoded there; the client gets EINVAL.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;
    /// Write to a BAR.
    ///
    /// # Errors
    /// [`AccessError`] when nothing is decoded there; the client gets EINVAL.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), AccessError>;
    /// Ranges whose writes can be replaced by an eventfd.
    fn io_eventfds(&self, bar: usize) -> Vec<IoEventFd> {
        let _ = bar;
        Vec::new()
    }
    /// Device reset (vfio-user DEVICE_RESET, or the client is gone). When it returns no engine touches
    /// client memory, every cache is empty and registers have their reset values. Bounded in time: at
    /// most one chunk's copy, or one fill that makes its pages present, for each engine.
    fn reset(&self);
    /// What the model's sanitizer has found; `None` when it has none, or it is off.
    fn findings(&self) -> Option<crate::atc::Findings> {
        None
    }
    /// State for `tlbridge inspect` and for error reports.
    fn dump(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
