//! One mmap of client memory.
#![allow(unsafe_code)] // mmap, munmap and madvise of memory that this module owns.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::lost::Watch;
use super::{DmaError, POPULATE_LIMIT, Prot};

/// Mapped until dropped. Dropping is the last step of an unmap, after every cache has been drained.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    prot: Prot,
    sealed: bool,
    offset: u64,
    /// Always there, except while it is dropped.
    watch: Option<Watch>,
}

// SAFETY: the pointer is to memory shared with another process and is only used by raw accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in a Mapping changes after it was made.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `[offset, offset + len)` of the file. Arguments are page-aligned (checked by the space).
    pub(super) fn new(iova: u64, len: u64, fd: &OwnedFd, offset: u64, prot: Prot) -> Result<Self, DmaError> {
        let system = |call| {
            move |errno| DmaError::System {
                call,
                iova,
                len,
                errno,
            }
        };
        let end = offset
            .checked_add(len)
            .ok_or(DmaError::Wraps { start: offset, len })?;
        let stat = rustix::fs::fstat(fd).map_err(system("fstat"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if end > size {
            return Err(DmaError::BeyondFile { offset, len, size });
        }
        // Only memfds and shmem answer; anything else can be truncated.
        let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let bytes = usize::try_from(len).map_err(|_| DmaError::Wraps { start: iova, len })?;
        let mut flags = ProtFlags::empty();
        if prot.read {
            flags |= ProtFlags::READ;
        }
        if prot.write {
            flags |= ProtFlags::WRITE;
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, fd, offset) }
                .map_err(system("mmap"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(DmaError::System {
            call: "mmap",
            iova,
            len,
            errno: Errno::NOMEM,
        })?;
        let mut mapping = Self {
            base,
            len: bytes,
            prot,
            sealed,
            offset,
            watch: None,
        };
        mapping.watch = Some(Watch::new(base.as_ptr().addr(), bytes).ok_or(DmaError::System {
            call: "registering the mapping",
            iova,
            len,
            errno: Errno::NOMEM,
        })?);
        Ok(mapping)
    }

    /// Its file was truncated, and an access met that: zeros stand in its place.
    pub(super) fn is_lost(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_lost)
    }

    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    pub(super) fn prot(&self) -> Prot {
        self.prot
    }

    pub(super) fn sealed(&self) -> bool {
        self.sealed
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Host address of `offset`, for an access of `len` bytes that must be inside.
    pub(super) fn at(&self, offset: u64, len: u64) -> NonNull<u8> {
        assert!(
            offset <= self.len() && len <= self.len() - offset,
            "bytes {offset:#x}+{len:#x} of a mapping of {:#x}",
            self.len
        );
        // SAFETY: inside (or one past) the mapping; offset fits because it is at most self.len.
        unsafe { self.base.add(offset as usize) }
    }

    /// Make the pages of `[offset, offset + len)` present, at most [`POPULATE_LIMIT`] around `focus`.
    pub(super) fn populate(&self, offset: u64, len: u64, focus: u64, write: bool) -> Result<(), Errno> {
        let page = rustix::param::page_size() as u64;
        let end = offset + len;
        let first = if len <= POPULATE_LIMIT {
            offset
        } else {
            // A window that is aligned within the range, so that neighbours share one.
            let focus = focus.clamp(offset, end - 1);
            offset + (focus - offset) / POPULATE_LIMIT * POPULATE_LIMIT
        };
        let first = first / page * page;
        let last = end
            .min(first + POPULATE_LIMIT)
            .next_multiple_of(page)
            .min(self.len());
        let advice = if write {
            Advice::LinuxPopulateWrite
        } else {
            Advice::LinuxPopulateRead
        };
        let ptr = self.at(first, last - first).as_ptr().cast();
        loop {
            // SAFETY: the range is inside this mapping, and populating changes no contents.
            match unsafe { rustix::mm::madvise(ptr, (last - first) as usize, advice) } {
                Err(Errno::INTR | Errno::AGAIN) => {}
                // Before Linux 5.14: the accesses fault the pages in themselves.
                Err(Errno::INVAL) => return Ok(()),
                other => return other,
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: the mapping is ours, and whoever drops it has drained everything that points into it.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%errno, len = self.len, "munmap of client memory failed; it stays mapped");
        }
    }
}
