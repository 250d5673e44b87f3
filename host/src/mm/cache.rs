//! What is mapped where, remembered for one generation of the address space.
//!
//! Why an answer may be used again: it was looked up under a [`FillPermit`], that is, after the generation had
//! been read and then no change of the page's buckets been seen. A change of those buckets that was not over
//! by then raises the generation later than that, so an equal generation means that none has happened since.
//! That holds for the permit's buckets only: what is remembered is clipped to them, whatever the mapping's size.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::fill_table::{FillPermit, FillTable};
use super::vma::{Vma, VmaSource};

/// Ranges remembered at once.
const CAPACITY: usize = 4096;
/// Times that "nothing there" is asked again when something has changed meanwhile.
const NEGATIVE_RETRIES: usize = 4;

/// What a device wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
}

impl Access {
    fn allowed_by(self, vma: &Vma) -> bool {
        match self {
            Access::Read => vma.read,
            Access::Write => vma.write,
        }
    }
}

/// Answer of [`MmCache::lookup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// The address is mapped and the access allowed.
    Mapped(Vma),
    /// The address is mapped and the access not allowed; asked just now: answer with an exception.
    Denied(Vma),
    /// Nothing is mapped there; asked just now: answer with an exception.
    NotMapped,
    /// The range is being changed: put the fault off.
    Busy,
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MmCacheStats {
    /// Answered from memory.
    pub hits: u64,
    /// Answered by the source.
    pub queries: u64,
    /// Ranges forgotten by name.
    pub discards: u64,
}

#[derive(Debug, Default)]
struct Remembered {
    generation: u64,
    /// First byte -> (last byte, mapping).
    ranges: BTreeMap<u64, (u64, Vma)>,
}

/// The cache of one address space.
pub struct MmCache {
    source: Arc<dyn VmaSource>,
    fills: Arc<FillTable>,
    remembered: Mutex<Remembered>,
    hits: AtomicU64,
    queries: AtomicU64,
    discards: AtomicU64,
}

impl std::fmt::Debug for MmCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmCache")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl MmCache {
    /// An empty cache.
    #[must_use]
    pub fn new(source: Arc<dyn VmaSource>, fills: Arc<FillTable>) -> Self {
        Self {
            source,
            fills,
            remembered: Mutex::default(),
            hits: AtomicU64::new(0),
            queries: AtomicU64::new(0),
            discards: AtomicU64::new(0),
        }
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What is mapped at `va`, for a fill of the permit's page. May sleep.
    ///
    /// # Errors
    /// The source's; ESRCH when the process is gone.
    ///
    /// # Panics
    /// When `va` is not in the permit's page's buckets.
    pub fn lookup(&self, va: u64, access: Access, permit: &FillPermit) -> io::Result<Lookup> {
        crate::notifier::might_sleep("MmCache::lookup");
        let (first, last) = permit.span();
        assert!(
            (first..=last).contains(&va),
            "{va:#x} is outside the permit's {first:#x}..={last:#x}"
        );
        if let Some(vma) = self.recall(va, permit)
            && access.allowed_by(&vma)
        {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(Lookup::Mapped(vma));
        }
        let mut generation = permit.generation();
        for _ in 0..NEGATIVE_RETRIES {
            self.queries.fetch_add(1, Ordering::Relaxed);
            let found = self.source.query(va)?;
            if let Some(vma) = found {
                self.remember(vma, permit);
                if access.allowed_by(&vma) {
                    return Ok(Lookup::Mapped(vma));
                }
            }
            // A refusal ends in an exception that nobody takes back: only when no change was running.
            if !self.fills.is_quiet(permit) {
                return Ok(Lookup::Busy);
            }
            let now = self.fills.generation();
            if now == generation {
                return Ok(found.map_or(Lookup::NotMapped, Lookup::Denied));
            }
            generation = now;
        }
        Ok(Lookup::Busy)
    }

    fn recall(&self, va: u64, permit: &FillPermit) -> Option<Vma> {
        let remembered = self.remembered();
        if remembered.generation != permit.generation() {
            return None;
        }
        let (_, (last, vma)) = remembered.ranges.range(..=va).next_back()?;
        (va <= *last).then_some(*vma)
    }

    fn remember(&self, vma: Vma, permit: &FillPermit) {
        let (first, last) = permit.span();
        let mut remembered = self.remembered();
        if remembered.generation > permit.generation() {
            return;
        }
        if remembered.generation < permit.generation() || remembered.ranges.len() >= CAPACITY {
            remembered.ranges.clear();
            remembered.generation = permit.generation();
        }
        remembered
            .ranges
            .insert(vma.start.max(first), (last.min(vma.end - 1), vma));
    }

    /// Forgets `[start, end)`. A look-up that runs at the same time may remember what it found afterwards:
    /// so declare the range to be changing first ([`super::MappedTable::begin_change`]), which makes that
    /// useless.
    pub fn discard(&self, start: u64, end: u64) {
        self.discards.fetch_add(1, Ordering::Relaxed);
        self.remembered()
            .ranges
            .retain(|first, (last, _)| *first >= end || *last < start);
    }

    /// Forgets everything.
    pub fn discard_all(&self) {
        self.discard(0, u64::MAX);
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> MmCacheStats {
        MmCacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            queries: self.queries.load(Ordering::Relaxed),
            discards: self.discards.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
