//! User-space drivers of the emulated devices over a [`backing::Backing`].
//!
//! The same driver code runs against a vfio-user socket, an in-process device (the tests supply that
//! backing) and `/dev/vfio`.
//!
//! Not implemented yet: the mlx5 driver.

pub mod backing;
pub mod gru;
pub mod vfio;
pub mod vfio_user;
