//! What two tlbridge processes must agree on: types and codecs only.
//!
//! No I/O and no `unsafe` lives here. Each constant cites the header or the specification section
//! it comes from.

pub mod bridge;
pub mod gru;
pub mod ib;
pub mod mlx5;
pub mod pci;
pub mod vfio_user;
