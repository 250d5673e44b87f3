//! Device memory that this process has mapped: the only unsafe code of the GRU driver.
//!
//! Everything behind a [`Mapping`] is written by the device (another process) at any moment, so it is
//! touched by atomic accesses only, never by references to plain data.
#![allow(unsafe_code)] // mmap and atomics on device memory; confined to this file

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// A shared mapping of a part of a BAR. Not inherited by fork: a child must not drive the device.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the memory is only reached through atomics and stays mapped until drop.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference that outlives the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `[offset, offset + len)` of `fd`.
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let prot = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let ptr = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }?;
        let base = NonNull::new(ptr.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { base, len, writable };
        // SAFETY: the range was mapped above and belongs to this value.
        unsafe { madvise(ptr, len, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    fn at(&self, offset: u64, bytes: usize) -> NonNull<u8> {
        let offset = usize::try_from(offset).expect("offset of a mapping");
        assert!(
            offset.is_multiple_of(bytes) && offset.checked_add(bytes).is_some_and(|end| end <= self.len),
            "access of {bytes} bytes at {offset:#x} of a mapping of {:#x} bytes",
            self.len
        );
        // SAFETY: within the mapping by the assertion.
        unsafe { self.base.add(offset) }
    }

    fn u64_at(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: in bounds and aligned by `at` (the base is page aligned), mapped as long as self, and
        // nothing in this process accesses it otherwise than by atomics.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).as_ptr().cast()) }
    }

    fn u8_at(&self, offset: u64) -> &AtomicU8 {
        // SAFETY: as `u64_at`.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1).as_ptr()) }
    }

    /// Reads a word; what the device stored before it is visible afterwards (Acquire).
    pub(crate) fn load(&self, offset: u64) -> u64 {
        self.u64_at(offset).load(Ordering::Acquire)
    }

    /// Reads a 32-bit word (SeqCst: half of the doorbell's store/fence/load protocol).
    pub(crate) fn load32(&self, offset: u64) -> u32 {
        // SAFETY: as `u64_at`.
        let word = unsafe { AtomicU32::from_ptr(self.at(offset, 4).as_ptr().cast()) };
        word.load(Ordering::SeqCst)
    }

    /// Stores a word after everything stored before it (Release).
    pub(crate) fn store(&self, offset: u64, value: u64) {
        assert!(self.writable, "store to a read-only mapping");
        self.u64_at(offset).store(value, Ordering::Release);
    }

    /// Exchanges a word.
    pub(crate) fn swap(&self, offset: u64, value: u64) -> u64 {
        assert!(self.writable, "exchange on a read-only mapping");
        self.u64_at(offset).swap(value, Ordering::SeqCst)
    }

    /// Replaces `old` by `new`; false when the word had another value.
    pub(crate) fn replace(&self, offset: u64, old: u64, new: u64) -> bool {
        assert!(self.writable, "exchange on a read-only mapping");
        self.u64_at(offset)
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Copies out, word by word where alignment allows.
    pub(crate) fn read_bytes(&self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            if at.is_multiple_of(8) && rest.len() >= 8 {
                let (word, tail) = rest.split_at_mut(8);
                word.copy_from_slice(&self.u64_at(at).load(Ordering::Relaxed).to_le_bytes());
                (at, rest) = (at + 8, tail);
            } else {
                let (byte, tail) = rest.split_at_mut(1);
                byte[0] = self.u8_at(at).load(Ordering::Relaxed);
                (at, rest) = (at + 1, tail);
            }
        }
    }

    /// Copies in, word by word where alignment allows.
    pub(crate) fn write_bytes(&self, offset: u64, data: &[u8]) {
        assert!(self.writable, "store to a read-only mapping");
        let mut at = offset;
        let mut rest = data;
        while let Some(first) = rest.first() {
            if let (true, Some((word, tail))) = (at.is_multiple_of(8), rest.split_first_chunk::<8>()) {
                self.u64_at(at)
                    .store(u64::from_le_bytes(*word), Ordering::Relaxed);
                (at, rest) = (at + 8, tail);
            } else {
                self.u8_at(at).store(*first, Ordering::Relaxed);
                (at, rest) = (at + 1, &rest[1..]);
            }
        }
    }

    /// Bytes mapped.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and no reference into it outlives self.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        assert!(
            unmapped.is_ok(),
            "munmap of a mapping of this process: {unmapped:?}"
        );
    }
}
