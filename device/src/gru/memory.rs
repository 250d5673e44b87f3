//! Device memory behind the BARs: one memfd each, mapped here and, where a BAR is mappable, in clients.
//!
//! Every word that software and device both write is accessed with 64-bit atomics. Data segment bytes
//! are copied in bulk: a client that races with its own instruction sees a mix, as on hardware.
#![allow(unsafe_code)] // The mapping is shared with other processes and exists only as a raw pointer.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A memfd and its mapping.
#[derive(Debug)]
pub(super) struct BarMemory {
    base: NonNull<u8>,
    len: u64,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the value, is never moved and is only reached through atomics and raw
// copies, both of which may be used from any thread.
unsafe impl Send for BarMemory {}
// SAFETY: as above; no method hands out a plain reference into the mapping.
unsafe impl Sync for BarMemory {}

impl BarMemory {
    /// `len` bytes of zeros (a multiple of the page size). Pages appear when they are touched.
    pub(super) fn new(name: &str, len: u64) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, len)?;
        // A client that gets this descriptor must not be able to cut pages from under the device (SIGBUS).
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let bytes = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a fresh mapping at an address that the kernel chooses; nothing else is touched.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )
        }?;
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, len, fd })
    }

    /// The file, for clients.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "device memory: {offset:#x}+{len:#x} is outside {:#x} bytes",
            self.len
        );
        // SAFETY: checked above; the mapping is `len` bytes long (`usize` as `new` converted it).
        unsafe { self.base.as_ptr().add(offset as usize) }
    }

    /// The 64-bit word at an 8-byte aligned offset.
    pub(super) fn word(&self, offset: u64) -> &AtomicU64 {
        assert_eq!(offset % 8, 0, "device memory: unaligned word {offset:#x}");
        let at = self.at(offset, 8).cast::<u64>();
        // SAFETY: in range, aligned, mapped read-write as long as `self` lives; other processes that
        // write it use whole machine accesses, and all accesses here are atomic.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// The 32-bit word at a 4-byte aligned offset. Only for words that are never accessed with another width.
    pub(super) fn word32(&self, offset: u64) -> &AtomicU32 {
        assert_eq!(offset % 4, 0, "device memory: unaligned word {offset:#x}");
        let at = self.at(offset, 4).cast::<u32>();
        // SAFETY: as for `word`.
        unsafe { AtomicU32::from_ptr(at) }
    }

    /// Replaces the bytes that `mask` covers in the word at `offset`. A whole word is one store.
    pub(super) fn merge(&self, offset: u64, mask: u64, value: u64) {
        let word = self.word(offset);
        if mask == u64::MAX {
            word.store(value, Ordering::Release);
        } else {
            let merged = |old: u64| Some(old & !mask | value & mask);
            // The closure never refuses, so there is no error to handle.
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, merged);
        }
    }

    /// Copies bytes out in bulk.
    pub(super) fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        let from = self.at(offset, to.len() as u64);
        // SAFETY: in range (`at`); a private slice cannot overlap the mapping, of which no reference exists.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in in bulk.
    pub(super) fn store_bytes(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len() as u64);
        // SAFETY: as for `load_bytes`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Zeros a range by giving its pages back; every mapping of the file sees it.
    pub(super) fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let result = rustix::fs::fallocate(&self.fd, how, offset, len);
        // The compiler does not know that the call changes the mapping: without the fence it may hand out bytes
        // that it saw stored before.
        fence(Ordering::SeqCst);
        Ok(result?)
    }
}

impl Drop for BarMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; no reference into it outlives `self`.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len as usize) };
        if let Err(error) = result {
            tracing::error!(%error, "unmapping device memory failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_merge_when_part_of_a_word_is_written_keeps_the_rest() {
        let memory = BarMemory::new("test", 8192).unwrap();
        memory.merge(8, u64::MAX, 0x1122_3344_5566_7788);
        memory.merge(8, 0xff00, 0xaa00);
        assert_eq!(memory.word(8).load(Ordering::Relaxed), 0x1122_3344_5566_aa88);
        let mut bytes = [0; 3];
        memory.load_bytes(8, &mut bytes);
        assert_eq!(bytes, [0x88, 0xaa, 0x66]);
    }

    #[test]
    fn test_clear_when_memory_was_written_leaves_zeros() {
        let memory = BarMemory::new("test", 8192).unwrap();
        memory.store_bytes(4090, &[7; 12]);
        memory.clear(0, 8192).unwrap();
        let mut bytes = [1; 12];
        memory.load_bytes(4090, &mut bytes);
        assert_eq!(bytes, [0; 12]);
    }
}
