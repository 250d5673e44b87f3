//! PCI: config space, BARs, MSI-X, and the composition of a model with them.
//!
//! A [`Function`] is a [`crate::model::Model`] with config space, interrupts and a DMA space. The
//! vfio-user server and the in-process tests drive it in the same way, by VFIO's region numbers.
//!
//! ## Where this follows VFIO rather than a bare slot
//! * **Memory enable** (command register bit 1) off: BAR accesses by message read all ones and are ignored
//!   when they write, as in a machine. Parts of a BAR that a client has mapped stay mapped: a client takes
//!   its mappings away itself, and a device reached through one simply works.
//! * **DEVICE_RESET** keeps config space, MSI-X table and eventfds, as the kernel's `VFIO_DEVICE_RESET`
//!   does (it saves and restores them around the reset). Function level reset by the PCI Express
//!   capability, and the loss of the client, give config space its reset values.
//! * **Routing a vector to an eventfd enables it**: the kernel's VFIO programs the MSI-X table itself, and
//!   QEMU keeps the table that its guest sees to itself, so a client that sets an eventfd may never write
//!   the table. Setting one therefore clears the vector's mask bit; the table and function masks that are
//!   set later are obeyed. The MSI-X enable bit is kept but decides nothing.
//!
//! Not implemented: I/O BARs, expansion ROM, MSI, extended capabilities, INTx level semantics (a model
//! without MSI-X has one edge-like interrupt that masks itself until UNMASK; INTx disable holds it back, and
//! Interrupt Status shows that it is pending).

mod config;
mod function;
mod interrupts;
mod signal;

pub use config::ConfigSpace;
pub use function::{ComposeError, Function, RegionError, RegionInfo};
pub use interrupts::{Interrupts, Trigger};
