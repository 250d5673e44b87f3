//! Memory registration over libibverbs, on whatever HCA it finds: an emulated one, Soft-RoCE, a real one.
//!
//! * [`Library`]: libibverbs.so.1, loaded when it is wanted. Not there is an error with a reason, not a program that
//!   does not start.
//! * [`Context`], [`ProtectionDomain`], [`Region`]: a device, and memory that it may reach: pinned, on demand, or the
//!   whole address space; prefetching.
//! * [`Pair`]: two RC queue pairs of one device, connected with each other, for RDMA WRITE and READ.
//! * [`Buffer`]: memory that a device writes to behind the program's back: nobody ever has a reference into it.
//! * [`cache`]: a registration cache, as communication libraries have one.
//!
//! # Why its own binding
//!
//! `sideway` (0.4) has neither `ibv_advise_mr` nor a device's on-demand paging capabilities, and its licence
//! (MPL-2.0) is not among those that deny.toml allows. `rdma-mummy-sys` (0.2), which is below it, is kept well and
//! has all calls, but is built with a C compiler, cmake and libclang with its headers, for raw bindings to what is
//! wanted here: twenty functions and three pointers in tables. So `libloading` and [`abi`]: no need at build time
//! beyond a Rust toolchain, which lets the benchmark be part of the default build.
//!
//! Not here: other transports than RC, receive queues, completion channels, atomics, memory windows, dmabuf.

pub mod abi;
mod buffer;
pub mod cache;
mod device;
mod error;
mod library;
mod pair;
mod pattern;
mod region;

pub use buffer::{Buffer, Pages, page_size};
pub use device::{Context, Device, LinkLayer, OnDemand, Port};
pub use error::Error;
pub use library::Library;
pub use pair::{Direction, Pair, Remote, Transfer};
pub use pattern::Pattern;
pub use region::{Paging, ProtectionDomain, Region};
