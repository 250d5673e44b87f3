//! User-space drivers of the emulated devices over a [`backing::Backing`].
//!
//! The same driver code runs against a vfio-user socket, an in-process device (the tests supply that
//! backing) and `/dev/vfio`.
//!
//! Not implemented: what the modules list.

pub mod backing;
pub mod gru;
pub mod mlx5;
pub mod vfio;
pub mod vfio_user;
