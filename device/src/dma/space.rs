//! The IOVA map.
#![allow(unsafe_code)] // Windows onto mappings that the read lock keeps alive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use super::mapping::Mapping;
use super::{DmaError, MAX_MAPPINGS, Prot, TargetCache, Window};

/// IOVA map of one client.
///
/// Bus mastering starts **on**; the PCI function switches it by its command register
/// ([`Space::set_bus_master`]), whose reset value is off.
#[derive(Debug)]
pub struct Space {
    /// Lock order: `table` before a cache's own lock; `caches` is never held while anything else is.
    table: RwLock<Table>,
    caches: Mutex<Vec<Weak<dyn TargetCache>>>,
    limit: usize,
    counters: Counters,
}

#[derive(Debug)]
struct Table {
    maps: BTreeMap<u64, Mapping>,
    bus_master: bool,
}

#[derive(Debug, Default)]
struct Counters {
    maps: AtomicU64,
    unmaps: AtomicU64,
    populates: AtomicU64,
    resolve_failures: AtomicU64,
}

/// Counters of a [`Space`], since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct SpaceStats {
    /// Mappings now.
    pub mappings: usize,
    /// Bytes mapped now.
    pub mapped_bytes: u64,
    /// Successful maps.
    pub maps: u64,
    /// Mappings taken away.
    pub unmaps: u64,
    /// Populate system calls made for fills.
    pub populates: u64,
    /// Refused resolves.
    pub resolve_failures: u64,
    /// Whether the function may reach memory at all.
    pub bus_master: bool,
}

/// One mapping, for dumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MappingInfo {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the client's file.
    pub offset: u64,
    /// Rights.
    pub prot: Prot,
    /// The file cannot shrink (F_SEAL_SHRINK): no SIGBUS is possible.
    pub sealed: bool,
}

impl Space {
    /// Nothing mapped.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_limit(MAX_MAPPINGS)
    }

    pub(super) fn with_limit(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            table: RwLock::new(Table {
                maps: BTreeMap::new(),
                bus_master: true,
            }),
            caches: Mutex::new(Vec::new()),
            counters: Counters::default(),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let the device reach `[offset, offset + len)` of a file at `iova`. Waits for fills that are making their
    /// pages present (at most [`super::POPULATE_LIMIT`] each).
    ///
    /// # Errors
    /// [`DmaError`]: nothing has changed then.
    pub fn map(&self, iova: u64, len: u64, fd: OwnedFd, offset: u64, prot: Prot) -> Result<(), DmaError> {
        let page = rustix::param::page_size() as u64;
        if len == 0 {
            return Err(DmaError::Empty { iova });
        }
        for (what, value) in [("IOVA", iova), ("length", len), ("file offset", offset)] {
            if !value.is_multiple_of(page) {
                return Err(DmaError::Unaligned {
                    what,
                    value,
                    align: page,
                });
            }
        }
        // `iova + len == 2^64` does not fit either: the last page of the space is not mappable.
        let end = iova
            .checked_add(len)
            .ok_or(DmaError::Wraps { start: iova, len })?;
        if !prot.read && !prot.write {
            return Err(DmaError::NoAccess { iova });
        }
        // Mapped before the lock is taken: mmap may sleep, and fills wait for this lock.
        let mapping = Mapping::new(iova, len, &fd, offset, prot)?;
        let mut table = self.write();
        if let Some((&other, map)) = table.maps.range(..end).next_back()
            && other + map.len() > iova
        {
            return Err(DmaError::Overlap {
                iova,
                len,
                other,
                other_len: map.len(),
            });
        }
        if table.maps.len() >= self.limit {
            return Err(DmaError::TooMany { limit: self.limit });
        }
        table.maps.insert(iova, mapping);
        self.counters.maps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Take every mapping inside `[iova, iova + len)` away. When this returns the device cannot reach
    /// that memory any more: no new access can start and none is running.
    ///
    /// The caller holds no [`Resolved`] of this space and no guard of an attached cache.
    ///
    /// # Errors
    /// [`DmaError::Cut`] when a mapping is only partly inside; nothing has changed then. That nothing is
    /// mapped there is no error.
    pub fn unmap(&self, iova: u64, len: u64) -> Result<(), DmaError> {
        if len == 0 {
            return Err(DmaError::Empty { iova });
        }
        let end = iova
            .checked_add(len)
            .ok_or(DmaError::Wraps { start: iova, len })?;
        let mut table = self.write();
        // Mappings do not overlap, so only the last one before each edge can straddle it.
        for edge in [iova, end] {
            if let Some((&other, map)) = table.maps.range(..edge).next_back()
                && other + map.len() > edge
            {
                return Err(DmaError::Cut {
                    iova,
                    len,
                    other,
                    other_len: map.len(),
                });
            }
        }
        let starts: Vec<u64> = table.maps.range(iova..end).map(|(&start, _)| start).collect();
        let dead: Vec<Mapping> = starts.iter().filter_map(|s| table.maps.remove(s)).collect();
        drop(table);
        self.bury(iova..end, dead);
        Ok(())
    }

    /// [`Space::unmap`] of everything (reset, the client is gone).
    pub fn unmap_all(&self) {
        let dead = std::mem::take(&mut self.write().maps);
        self.bury(0..u64::MAX, dead.into_values().collect());
    }

    /// The mappings are out of the table: no resolve finds them. A fill that had resolved one held the
    /// read lock until its entry was in, so the purge sees it.
    fn bury(&self, iova: Range<u64>, dead: Vec<Mapping>) {
        if dead.is_empty() {
            return;
        }
        self.purge_caches(iova);
        self.counters
            .unmaps
            .fetch_add(dead.len() as u64, Ordering::Relaxed);
        // munmap: only now, everybody is out.
        drop(dead);
    }

    fn purge_caches(&self, iova: Range<u64>) {
        let caches: Vec<_> = {
            let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
            caches.retain(|cache| cache.strong_count() > 0);
            caches.iter().filter_map(Weak::upgrade).collect()
        };
        for cache in caches {
            cache.purge_target(iova.clone());
        }
    }

    /// PCI command register, bit 2. Switching it off purges every attached cache and returns when no
    /// access is running; until it is on again every resolve is refused.
    pub fn set_bus_master(&self, on: bool) {
        let was = std::mem::replace(&mut self.write().bus_master, on);
        if was && !on {
            self.purge_caches(0..u64::MAX);
        }
    }

    /// Whether the function may reach memory.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.read().bus_master
    }

    /// Find memory for one access. `len` bytes must be inside one mapping; the memory stays mapped (and
    /// unmaps wait) while the result lives.
    ///
    /// # Errors
    /// [`DmaError`]: not mapped, not permitted, bus mastering off.
    pub fn resolve(&self, iova: u64, len: u64, write: bool) -> Result<Resolved<'_>, DmaError> {
        let need = Prot { read: !write, write };
        self.resolve_for(iova, len, need)
    }

    /// As [`Space::resolve`], for any combination of rights.
    pub(crate) fn resolve_for(&self, iova: u64, len: u64, need: Prot) -> Result<Resolved<'_>, DmaError> {
        let found = self.find(iova, len, need);
        if found.is_err() {
            self.counters.resolve_failures.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn find(&self, iova: u64, len: u64, need: Prot) -> Result<Resolved<'_>, DmaError> {
        let table = self.read();
        if !table.bus_master {
            return Err(DmaError::BusMasterOff);
        }
        let end = iova
            .checked_add(len)
            .ok_or(DmaError::Wraps { start: iova, len })?;
        let (start, map) = table
            .maps
            .range(..=iova)
            .next_back()
            .map(|(&start, map)| (start, map))
            .filter(|(start, map)| end <= start + map.len())
            .ok_or(DmaError::NotMapped { iova, len })?;
        let prot = map.prot();
        for (needed, allowed, access) in [
            (need.read, prot.read, "reads"),
            (need.write, prot.write, "writes"),
        ] {
            if needed && !allowed {
                return Err(DmaError::Protection { iova, access });
            }
        }
        let ptr = map.at(iova - start, len);
        // SAFETY: the mapping covers the range with these rights, and it cannot leave the table (let
        // alone be unmapped) while the read lock is held, which the result does.
        let window = unsafe { Window::new(ptr, len as usize, need.write) };
        Ok(Resolved {
            window,
            iova,
            start,
            table,
            space: self,
        })
    }

    /// Purge this cache, too, whenever memory is taken away.
    pub fn attach_cache(&self, cache: Weak<dyn TargetCache>) {
        self.caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(cache);
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> SpaceStats {
        let table = self.read();
        SpaceStats {
            mappings: table.maps.len(),
            mapped_bytes: table.maps.values().map(Mapping::len).sum(),
            maps: self.counters.maps.load(Ordering::Relaxed),
            unmaps: self.counters.unmaps.load(Ordering::Relaxed),
            populates: self.counters.populates.load(Ordering::Relaxed),
            resolve_failures: self.counters.resolve_failures.load(Ordering::Relaxed),
            bus_master: table.bus_master,
        }
    }

    /// The mappings, by IOVA.
    #[must_use]
    pub fn mappings(&self) -> Vec<MappingInfo> {
        self.read()
            .maps
            .iter()
            .map(|(&iova, map)| MappingInfo {
                iova,
                len: map.len(),
                offset: map.offset(),
                prot: map.prot(),
                sealed: map.sealed(),
            })
            .collect()
    }
}

/// Memory that stays mapped while this lives. Holds a read lock: keep it short, and never unmap or wait
/// for anything meanwhile.
#[derive(Debug)]
pub struct Resolved<'a> {
    window: Window,
    iova: u64,
    start: u64,
    table: RwLockReadGuard<'a, Table>,
    space: &'a Space,
}

impl Resolved<'_> {
    /// Where it is mapped. Valid while `self` lives.
    #[must_use]
    pub fn ptr(&self) -> NonNull<u8> {
        NonNull::new(self.window.as_ptr()).expect("a mapping is never at address 0")
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.window.len()
    }

    /// Rights of the mapping that it is in.
    #[must_use]
    pub fn prot(&self) -> Prot {
        self.table.maps[&self.start].prot()
    }

    /// Whether the range is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copy out, from the start of the range.
    ///
    /// # Panics
    /// When `to` is longer than the range.
    pub fn read_into(&self, to: &mut [u8]) {
        self.window.read(0, to);
    }

    /// Copy in, to the start of the range.
    ///
    /// # Panics
    /// When `from` is longer than the range, or the range was not resolved for writing.
    pub fn write_from(&self, from: &[u8]) {
        self.window.write(0, from);
    }

    /// Make the pages present, at most [`super::POPULATE_LIMIT`] around `focus` (an offset in the range).
    pub(crate) fn populate(&self, focus: u64, write: bool) -> Result<(), DmaError> {
        let map = &self.table.maps[&self.start];
        let offset = self.iova - self.start;
        let len = self.window.len() as u64;
        self.space.counters.populates.fetch_add(1, Ordering::Relaxed);
        map.populate(offset, len, offset.saturating_add(focus), write)
            .map_err(|errno| DmaError::System {
                call: "madvise (populate)",
                iova: self.iova,
                len,
                errno,
            })
    }
}
