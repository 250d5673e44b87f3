//! Pages that the kernel holds for a device, one by one.
//!
//! A device behind the kernel's VFIO ([`Backing::holds_pages`]) does not see a file: it sees the pages that the file
//! had when they were mapped. A discard takes pages out of the file and leaves them with the device, whose reads would
//! then be stale and whose writes lost. So:
//!
//! * a page is mapped when a fault first wants it, not with its file;
//! * before a discard of a range of a file, its pages are unmapped, and no page of the range is mapped until the
//!   discard is over: what is mapped after that is what the file has then. The range is one of the *file*, so other
//!   mappings of the same bytes, by whatever address space, are covered.
//!
//! Moving, unmapping and protecting change no page of a file and need nothing here.
//!
//! **What is not covered**: discards that nobody announces until they are over. A raw `MADV_REMOVE` is reported by
//! userfaultfd before it happens (the pages go then), but nothing says when it *has* happened: a fault in between maps
//! the old page again. `fallocate` and `ftruncate` are not reported at all. Behind `/dev/vfio` an application must
//! discard through the agent, or not at all.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use driver::backing::{Backing, DmaProt};

use super::identity::FileId;
use super::space::AddressSpace;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct HeldFile {
    /// Offset in the file -> IOVA.
    pages: BTreeMap<u64, u64>,
    /// Ranges that are being discarded.
    discards: Vec<(u64, u64)>,
}

/// What is counted.
#[derive(Debug, Default)]
pub struct HeldStats {
    /// Pages mapped.
    pub held: AtomicU64,
    /// Pages unmapped before a discard.
    pub dropped: AtomicU64,
    /// Of those, in discards that only userfaultfd reported: an `MADV_REMOVE` among them is not covered, see the
    /// module.
    pub unannounced: AtomicU64,
    /// Times that everything was unmapped because the kernel takes no more mappings.
    pub evictions: AtomicU64,
}

/// The pages of every file that a device has.
#[derive(Debug)]
pub struct HeldPages {
    backing: Arc<dyn Backing>,
    /// For experiments only: pages stay with the device while they are discarded.
    keep: bool,
    /// Held across the system calls on purpose: a discard must not begin while one of its pages is being mapped.
    /// Never taken by a subscriber that must not sleep.
    files: Mutex<HashMap<FileId, HeldFile>>,
    /// Whose faults may wait for a discard to end. A leaf.
    spaces: Mutex<Vec<Weak<AddressSpace>>>,
    /// Figures.
    pub stats: HeldStats,
}

/// Answer of [`HeldPages::hold`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The device has the page that the file has.
    Held,
    /// The range is being discarded: put the fault off.
    Busy,
}

/// A discard that has begun. Ends with [`HeldPages::end_discard`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the range stays unusable until the discard has ended"]
pub struct Discard {
    id: FileId,
    range: (u64, u64),
    /// Pages that the device lost.
    pages: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole at every step.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl HeldPages {
    /// Nothing is held yet. `keep`, for experiments only: pages stay with the device while they are discarded.
    #[must_use]
    pub fn new(backing: Arc<dyn Backing>, keep: bool) -> Self {
        Self {
            backing,
            keep,
            files: Mutex::default(),
            spaces: Mutex::default(),
            stats: HeldStats::default(),
        }
    }

    /// An address space whose faults are to be looked at again when a discard has ended.
    pub fn add_space(&self, space: &Arc<AddressSpace>) {
        let mut spaces = locked(&self.spaces);
        spaces.retain(|space| space.strong_count() > 0);
        spaces.push(Arc::downgrade(space));
    }

    /// Maps the page at `offset` of a file at `iova`, unless it is.
    ///
    /// # Errors
    /// The kernel's: memory that may not be locked, mostly.
    pub fn hold(&self, id: FileId, file: BorrowedFd<'_>, offset: u64, iova: u64) -> io::Result<Hold> {
        assert!(offset.is_multiple_of(PAGE), "{offset:#x} is no page");
        let mut files = locked(&self.files);
        let held = files.entry(id).or_default();
        if held.pages.contains_key(&offset) {
            return Ok(Hold::Held);
        }
        if held
            .discards
            .iter()
            .any(|(start, end)| (*start..*end).contains(&offset))
        {
            return Ok(Hold::Busy);
        }
        let map = || {
            self.backing
                .dma_map(iova, PAGE, file, offset, DmaProt::READ_WRITE)
        };
        if let Err(error) = map() {
            if error.raw_os_error() != Some(libc::ENOSPC) {
                return Err(error);
            }
            // The kernel limits the number of mappings (dma_entry_limit of vfio_iommu_type1). Whatever is used
            // comes back by faults.
            for held in files.values_mut() {
                self.unmap(std::mem::take(&mut held.pages));
            }
            self.stats.evictions.fetch_add(1, Ordering::Relaxed);
            map()?;
        }
        files.entry(id).or_default().pages.insert(offset, iova);
        self.stats.held.fetch_add(1, Ordering::Relaxed);
        Ok(Hold::Held)
    }

    /// `[start, end)` of a file is about to be discarded: takes its pages from the device.
    pub fn begin_discard(&self, id: FileId, start: u64, end: u64) -> Discard {
        let (first, last) = (
            start & !(PAGE - 1),
            end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX),
        );
        let mut files = locked(&self.files);
        let held = files.entry(id).or_default();
        held.discards.push((first, last));
        let mut pages = match self.keep {
            false => held.pages.split_off(&first),
            true => BTreeMap::new(),
        };
        held.pages.append(&mut pages.split_off(&last));
        let count = pages.len() as u64;
        self.stats.dropped.fetch_add(count, Ordering::Relaxed);
        self.unmap(pages);
        Discard {
            id,
            range: (first, last),
            pages: count,
        }
    }

    /// A discard that nobody had announced: its pages go now, and what is mapped afterwards may be the old page
    /// again, if it was an `MADV_REMOVE` that has not come to it yet. Said once, counted always.
    pub fn unannounced(&self, discards: Vec<Discard>) {
        let pages: u64 = discards.iter().map(|discard| discard.pages).sum();
        let before = self.stats.unannounced.fetch_add(pages, Ordering::Relaxed);
        if before == 0 && pages > 0 {
            tracing::warn!(
                pages,
                "a discard that the agent did not announce met pages that the kernel holds for the device; if it was \
                 MADV_REMOVE the device may go on with an old page: make such calls through the agent"
            );
        }
        self.end_discard(discards);
    }

    /// The discards are over: lets faults have the pages that the files have now.
    pub fn end_discard(&self, ended: Vec<Discard>) {
        if ended.is_empty() {
            return;
        }
        {
            let mut files = locked(&self.files);
            for discard in ended {
                let Some(held) = files.get_mut(&discard.id) else {
                    continue;
                };
                if let Some(at) = held.discards.iter().position(|range| *range == discard.range) {
                    held.discards.swap_remove(at);
                }
            }
        }
        let spaces: Vec<_> = locked(&self.spaces).iter().filter_map(Weak::upgrade).collect();
        for space in spaces {
            space.retry_deferred();
        }
    }

    /// Takes every page of a file from the device.
    pub fn release(&self, id: FileId) {
        if let Some(held) = locked(&self.files).remove(&id) {
            self.unmap(held.pages);
        }
    }

    /// Pages that the device has.
    #[must_use]
    pub fn pages(&self) -> usize {
        locked(&self.files).values().map(|held| held.pages.len()).sum()
    }

    /// Neighbours go in one call.
    fn unmap(&self, pages: BTreeMap<u64, u64>) {
        let mut run: Option<(u64, u64)> = None;
        let iovas = pages.into_values().map(Some).chain([None]);
        for iova in iovas {
            match (&mut run, iova) {
                (Some((_, end)), Some(iova)) if *end == iova => *end += PAGE,
                (old, iova) => {
                    let done = std::mem::replace(old, iova.map(|iova| (iova, iova + PAGE)));
                    if let Some((start, end)) = done {
                        self.unmap_run(start, end - start);
                    }
                }
            }
        }
    }

    fn unmap_run(&self, iova: u64, len: u64) {
        match self.backing.dma_unmap(iova, len) {
            Ok(()) => {}
            Err(error) if !self.backing.alive() => {
                tracing::debug!(%error, iova, "unmap on a device that is gone");
            }
            // The device would go on with pages that are no longer the file's: nothing may go on with it.
            Err(error) => panic!("the kernel does not unmap {len} bytes at IOVA {iova:#x}: {error}"),
        }
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
