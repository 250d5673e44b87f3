//! The device process: a vfio-user server, PCI, DMA, the device TLB (ATC) and the device models.
//!
//! Nothing here knows about userfaultfd or about who changes page tables: a device sees BARs,
//! interrupts and DMA_MAP / DMA_UNMAP.
//!
//! Not implemented yet: the mlx5 model, migration.

// Under the model checker only the ATC's protocol is built; what surrounds it is unused.
#![cfg_attr(loom, allow(dead_code))]

pub mod atc;
pub mod dma;
#[cfg(not(loom))]
pub mod fabric;
#[cfg(not(loom))]
pub mod faults;
#[cfg(not(loom))]
pub mod gru;
#[cfg(not(loom))]
pub mod model;
#[cfg(not(loom))]
pub mod pci;
#[cfg(not(loom))]
pub mod server;
mod sync;
#[cfg(not(loom))]
pub mod transport;
