//! The device process: a vfio-user server, PCI, DMA, the device TLB (ATC) and the device models.
//!
//! Nothing here knows about userfaultfd or about who changes page tables: a device sees BARs,
//! interrupts and DMA_MAP / DMA_UNMAP.
//!
//! Not implemented yet: the mlx5 model, the fabric, migration.

pub mod atc;
pub mod dma;
#[cfg(not(loom))]
pub mod faults;
#[cfg(not(loom))] // built on threads and a mapped memfd: nothing that loom can run
pub mod gru;
pub mod model;
pub mod pci;
pub mod server;
mod sync;
