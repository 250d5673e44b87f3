//! What two tlbridge processes must agree on: types and codecs only.
//!
//! No I/O and no `unsafe` lives here. Each constant cites the header or the specification section
//! it comes from.
//!
//! Not implemented yet: the mlx5 layouts.

pub mod bridge;
pub mod gru;
pub mod ib;
pub mod pci;
pub mod vfio_user;
