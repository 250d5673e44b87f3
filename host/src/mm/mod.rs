//! The cache of one address space. **A cache of the kernel's VMAs, never the truth.**
//!
//! Ends and events only make it forget; contents come from [`VmaSource::query`] while nothing changes the
//! place. Parts:
//! * [`MappedTable`]: the table that agent and daemon share (`protos::bridge::shared`), mapped; and
//!   [`ChangeGuard`], the daemon's own "this range is changing".
//! * [`FillTable`]: the exact set of pages that were handed to devices; keeps the shared counts and runs the
//!   fill protocol ([`FillTable::begin_fill`]).
//! * [`MmCache`]: what is mapped where, good for one generation.
//! * [`ProcMaps`]: asks the kernel.
//! * [`ChangeLog`]: what a device that checks itself is told about changes that are over.
//!
//! # Serving a fault
//! 1. the miss is known (the device has its ticket open: its kill bit covers what starts later);
//! 2. `permit = fills.begin_fill(va, page_shift)?` (Busy: put the fault off, see [`FillTable::fault_waiter`]);
//! 3. `cache.lookup(va, access, &permit)?`;
//! 4. hand the translation to the device with `permit.generation()` as its tag.

mod cache;
mod change_log;
mod fill_table;
mod proc_maps;
mod protocol;
mod shared_map;
mod vma;

pub use cache::{Access, Lookup, MmCache, MmCacheStats};
pub use change_log::ChangeLog;
pub use fill_table::{Busy, FaultWaiter, FillPermit, FillTable, FillTableStats};
pub use proc_maps::ProcMaps;
pub use protocol::{AgentWords, Fence, FullFence, Word, announce_call, announce_fill};
pub use shared_map::{ChangeGuard, MappedTable, TableError};
pub use vma::{Vma, VmaSource};
