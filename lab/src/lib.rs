//! The guest lab: a QEMU with `vfio-user-pci`, kernels with their modules, what it takes to build more
//! modules, and guests that run with all that. Everything comes from Debian's packages, is put into one
//! directory, and needs no network after the first time.
//!
//! * [`Lab`] is that directory. Its methods find a part, or make it (`provide_*`); a part is renamed into
//!   place when it is complete, and one process at a time makes parts.
//! * [`initramfs::Initramfs`] packs what a guest starts with.
//! * [`guest`] runs guests.
//!
//! Not here: kernels of other architectures, anything but Linux guests.

pub mod acceleration;
mod apt;
mod archive;
pub mod guest;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod packages;
mod place;
mod programs;
pub mod qemu;
pub mod qmp;
pub mod rdma;
mod steps;
mod tree;

pub use place::Lab;
