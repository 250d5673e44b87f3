//! Tests of the GRU driver on a GRU, over any backing: each body takes a [`rig::Rig`] and asserts.
//!
//! `tests/gru_in_process.rs` and `tests/gru_vfio_user.rs` choose the backing and the doorbell mode.

pub mod contexts;
pub mod faults;
pub mod flushes;
pub mod instructions;
pub mod memory;
pub mod page_table;
pub mod rig;
