//! PCI config space: offsets, BAR encoding, capabilities.
//!
//! Sources: PCI Local Bus 3.0 section 6 (header, capabilities, MSI-X in 6.8.2), PCI Power Management 1.2
//! section 3.2, PCI Express Base section 7.5; names as in `<linux/pci_regs.h>`.
//!
//! Not implemented: bridges (header type 1), I/O BARs, MSI, extended capabilities.

mod bar;
pub mod capability;
pub mod config;
pub mod msix;

pub use bar::{Bar, BarError};

/// Bytes of a PCI Express function's config space.
pub const CONFIG_SPACE_SIZE: usize = 4096;
