//! The IOVA map.
#![allow(unsafe_code)] // Windows onto mappings that the read lock keeps alive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use super::mapping::Mapping;
use super::{DmaError, MAX_MAPPINGS, Messenger, Prot, TargetCache, Window, lost};

/// IOVA map of one client.
///
/// Bus mastering starts **on**; the PCI function switches it by its command register
/// ([`Space::set_bus_master`]), whose reset value is off.
#[derive(Debug)]
pub struct Space {
    /// Lock order: `table` before a cache's own lock; `caches` is never held while anything else is.
    table: RwLock<Table>,
    caches: Mutex<Vec<Weak<dyn TargetCache>>>,
    /// Mappings that an injected fault keeps alive ([`TargetCache::keeps_targets`]). Leaf lock.
    kept: Mutex<Vec<Memory>>,
    /// Taken with or without `table`, held for no call.
    messenger: Mutex<Option<Arc<dyn Messenger>>>,
    limit: usize,
    counters: Counters,
}

#[derive(Debug)]
struct Table {
    maps: BTreeMap<u64, Memory>,
    bus_master: bool,
    /// [`Quiet`] values that live.
    quiet: usize,
}

/// What is at an IOVA.
#[derive(Debug)]
enum Memory {
    /// A file, mapped here.
    Mapped(Mapping),
    /// Known to the client only.
    ByMessage { len: u64, prot: Prot },
}

impl Memory {
    fn len(&self) -> u64 {
        match self {
            Self::Mapped(map) => map.len(),
            Self::ByMessage { len, .. } => *len,
        }
    }

    fn prot(&self) -> Prot {
        match self {
            Self::Mapped(map) => map.prot(),
            Self::ByMessage { prot, .. } => *prot,
        }
    }
}

impl Table {
    /// The mapping that holds all of `[iova, iova + len)` and permits what is needed.
    fn lookup(&self, iova: u64, len: u64, need: Prot) -> Result<(u64, &Memory), DmaError> {
        if !self.bus_master {
            return Err(DmaError::BusMasterOff);
        }
        let end = iova
            .checked_add(len)
            .ok_or(DmaError::Wraps { start: iova, len })?;
        let (&start, memory) = self
            .maps
            .range(..=iova)
            .next_back()
            .filter(|(start, map)| end <= **start + map.len())
            .ok_or(DmaError::NotMapped { iova, len })?;
        let prot = memory.prot();
        for (needed, allowed, access) in [
            (need.read, prot.read, "reads"),
            (need.write, prot.write, "writes"),
        ] {
            if needed && !allowed {
                return Err(DmaError::Protection { iova, access });
            }
        }
        Ok((start, memory))
    }
}

/// While it lives no access by message starts; those that ran when it was made have been ended.
///
/// A model that is reset waits for its engines, and on the thread that would bring them the client's answers.
#[derive(Debug)]
pub struct Quiet<'a>(&'a Space);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.write().quiet -= 1;
    }
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
    /// The file has shrunk, and an access met that: every further one fails.
    pub lost: bool,
    /// There is no file: the client is asked.
    pub by_message: bool,
}

/// What does not depend on what is mapped; the end of the range.
fn check_map(iova: u64, len: u64, offset: u64, prot: Prot) -> Result<u64, DmaError> {
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
    Ok(end)
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
                quiet: 0,
            }),
            caches: Mutex::new(Vec::new()),
            kept: Mutex::new(Vec::new()),
            messenger: Mutex::new(None),
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
        let end = check_map(iova, len, offset, prot)?;
        // Mapped before the lock is taken: mmap may sleep, and fills wait for this lock.
        let mapping = Mapping::new(iova, len, &fd, offset, prot)?;
        self.insert(iova, end, Memory::Mapped(mapping))
    }

    /// Let the device reach `[iova, iova + len)` by asking the client ([`Space::read_by_message`]): memory
    /// that came without a file.
    ///
    /// # Errors
    /// [`DmaError`]: nothing has changed then.
    pub fn map_by_message(&self, iova: u64, len: u64, prot: Prot) -> Result<(), DmaError> {
        let end = check_map(iova, len, 0, prot)?;
        self.insert(iova, end, Memory::ByMessage { len, prot })
    }

    fn insert(&self, iova: u64, end: u64, memory: Memory) -> Result<(), DmaError> {
        let len = memory.len();
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
        table.maps.insert(iova, memory);
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
        let dead: Vec<Memory> = starts.iter().filter_map(|s| table.maps.remove(s)).collect();
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
    fn bury(&self, iova: Range<u64>, dead: Vec<Memory>) {
        if dead.is_empty() {
            return;
        }
        self.abort_messages(iova.clone());
        let keep = self.purge_caches(iova);
        self.counters
            .unmaps
            .fetch_add(dead.len() as u64, Ordering::Relaxed);
        if keep {
            self.kept
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(dead);
            return;
        }
        // munmap: only now, everybody is out.
        drop(dead);
    }

    /// Whether a cache still points there.
    fn purge_caches(&self, iova: Range<u64>) -> bool {
        let caches: Vec<_> = {
            let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
            caches.retain(|cache| cache.strong_count() > 0);
            caches.iter().filter_map(Weak::upgrade).collect()
        };
        for cache in &caches {
            cache.purge_target(iova.clone());
        }
        caches.iter().any(|cache| cache.keeps_targets())
    }

    /// PCI command register, bit 2. Switching it off purges every attached cache and returns when no
    /// access is running; until it is on again every resolve is refused.
    pub fn set_bus_master(&self, on: bool) {
        let was = std::mem::replace(&mut self.write().bus_master, on);
        if was && !on {
            self.abort_messages(0..u64::MAX);
            self.purge_caches(0..u64::MAX);
        }
    }

    /// Who asks the client, as long as there is one. What was open with the one before is ended.
    pub fn set_messenger(&self, messenger: Option<Arc<dyn Messenger>>) {
        let before = std::mem::replace(
            &mut *self.messenger.lock().unwrap_or_else(PoisonError::into_inner),
            messenger,
        );
        if let Some(before) = before {
            before.abort(0..u64::MAX);
        }
    }

    fn messenger(&self) -> Option<Arc<dyn Messenger>> {
        self.messenger
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// An access that was opened had found its mapping under the table's lock, so the messenger knows it.
    fn abort_messages(&self, iova: Range<u64>) {
        if let Some(messenger) = self.messenger() {
            messenger.abort(iova);
        }
    }

    /// Whoever waits for an answer of the client looks whether it is still wanted ([`super::Interest`]). Does not
    /// wait.
    pub(crate) fn recheck_messages(&self) {
        if let Some(messenger) = self.messenger() {
            messenger.recheck();
        }
    }

    /// End accesses by message, and let none start while the result lives.
    pub fn quiet(&self) -> Quiet<'_> {
        self.write().quiet += 1;
        self.abort_messages(0..u64::MAX);
        Quiet(self)
    }

    /// Open an access by message to as much of `[iova, iova + len)` as one request carries.
    pub(super) fn open_message(
        &self,
        iova: u64,
        len: usize,
        need: Prot,
    ) -> Result<(Arc<dyn Messenger>, u16, usize), DmaError> {
        #[cfg(not(loom))]
        crate::atc::assert_no_guard("client memory was asked for by message");
        let aborted = |why| DmaError::Aborted {
            iova,
            len: len as u64,
            why,
        };
        let messenger = self.messenger().ok_or(aborted("no client is connected"))?;
        let len = len.min(messenger.max_transfer());
        let table = self.read();
        if table.quiet > 0 {
            return Err(aborted("the function is being reset"));
        }
        match table.lookup(iova, len as u64, need)? {
            (_, Memory::ByMessage { .. }) => {}
            (_, Memory::Mapped(_)) => return Err(aborted("the memory there is mapped")),
        }
        let ticket = messenger.open(iova, len as u64)?;
        Ok((Arc::clone(&messenger), ticket, len))
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
        if matches!(&found, Err(error) if !matches!(error, DmaError::ByMessage { .. })) {
            self.counters.resolve_failures.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn find(&self, iova: u64, len: u64, need: Prot) -> Result<Resolved<'_>, DmaError> {
        let table = self.read();
        let (start, map) = match table.lookup(iova, len, need)? {
            (start, Memory::Mapped(map)) => (start, map),
            (_, Memory::ByMessage { .. }) => return Err(DmaError::ByMessage { iova }),
        };
        if map.is_lost() {
            return Err(DmaError::Lost { iova, len });
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

    /// Rights of the mapping without a file that holds all of `[iova, iova + len)`. It stays where it is while the
    /// result lives (a read lock, as with [`Resolved`]).
    ///
    /// # Errors
    /// As [`Space::resolve`]; also when there is a file.
    pub(crate) fn resolve_by_message(
        &self,
        iova: u64,
        len: u64,
        need: Prot,
    ) -> Result<ResolvedByMessage<'_>, DmaError> {
        let table = self.read();
        match table.lookup(iova, len, need)? {
            (_, &Memory::ByMessage { prot, .. }) => Ok(ResolvedByMessage { prot, _table: table }),
            (_, Memory::Mapped(_)) => Err(DmaError::NotMapped { iova, len }),
        }
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
            mapped_bytes: table.maps.values().map(Memory::len).sum(),
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
                prot: map.prot(),
                offset: match map {
                    Memory::Mapped(map) => map.offset(),
                    Memory::ByMessage { .. } => 0,
                },
                sealed: matches!(map, Memory::Mapped(map) if map.sealed()),
                lost: matches!(map, Memory::Mapped(map) if map.is_lost()),
                by_message: matches!(map, Memory::ByMessage { .. }),
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

/// Memory that the client is asked for, and that stays mapped while this lives.
#[derive(Debug)]
pub(crate) struct ResolvedByMessage<'a> {
    pub(crate) prot: Prot,
    _table: RwLockReadGuard<'a, Table>,
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

    pub(crate) fn window(&self) -> &Window {
        &self.window
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

    /// After a copy: whether the memory was there all the time.
    ///
    /// # Errors
    /// [`DmaError::Lost`]: the client truncated the file. What was copied out may be zeros, what was copied
    /// in may be lost.
    pub fn check(&self) -> Result<(), DmaError> {
        lost::check(self.window.as_ptr()).map_err(|_| DmaError::Lost {
            iova: self.iova,
            len: self.window.len() as u64,
        })
    }

    /// Make the pages present, at most [`super::POPULATE_LIMIT`] around `focus` (an offset in the range).
    pub(crate) fn populate(&self, focus: u64, write: bool) -> Result<(), DmaError> {
        let Memory::Mapped(map) = &self.table.maps[&self.start] else {
            unreachable!("only a mapping is resolved, and the lock is held");
        };
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
