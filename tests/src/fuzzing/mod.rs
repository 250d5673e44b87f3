//! Fuzzing of the vfio-user server: what a client may do ([`actions`]), a live server that it is done to
//! ([`live`]), the codecs alone ([`codec`]), what software may do to a GRU
//! ([`gru_actions`], [`gru`]), what a driver may do to an HCA ([`mlx5`]), and a runner that needs no instrumentation ([`runner`]).
//!
//! The same code serves cargo-fuzz (`fuzz/`), the bounded run of the tests and the long run of
//! `cargo xtask soak`.

pub mod actions;
pub mod codec;
pub mod gru;
pub mod gru_actions;
pub mod live;
pub mod mlx5;
pub mod model;
mod peer;
pub mod runner;
