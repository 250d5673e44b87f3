// Reason: maps the log and views it as its type.
#![allow(unsafe_code)]
//! The log of changes (`protos::bridge::changes`), as this daemon writes it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use protos::bridge::changes::{CHANGES, ChangeLog as Layout, LOG_BYTES, generation_in};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A log, mapped. The device reads it by its file.
#[derive(Debug)]
pub struct ChangeLog {
    layout: NonNull<Layout>,
    fd: OwnedFd,
    next: AtomicU64,
}

// SAFETY: the mapping is owned, lives as long as this value, and consists of atomics.
unsafe impl Send for ChangeLog {}
// SAFETY: as above.
unsafe impl Sync for ChangeLog {}

impl ChangeLog {
    /// An empty log on a sealed memfd.
    ///
    /// # Errors
    /// Those of memfd_create(2), ftruncate(2), fcntl(2), mmap(2).
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create(
            "tlbridge-changes",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        ftruncate(&fd, LOG_BYTES as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                LOG_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        Ok(Self {
            layout: NonNull::new(address.cast()).expect("mmap does not return the null page"),
            fd,
            next: AtomicU64::new(0),
        })
    }

    /// The memfd, for the device.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// `[start, end)` of address space `space` has been changed: translations of before `generation` are stale from
    /// now on. To be said when the device has been told, and before the application is. Neither sleeps nor allocates.
    pub fn publish(&self, space: u32, (start, end): (u64, u64), generation: u64) {
        // SAFETY: the mapping is as long as the type and page aligned, any bit pattern is valid, every word is an
        // atomic, and it is unmapped only in drop.
        let layout = unsafe { self.layout.as_ref() };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let change = &layout.changes[(number % CHANGES as u64) as usize];
        change.number.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        change.start.store(start, Ordering::Relaxed);
        change.end.store(end, Ordering::Relaxed);
        change
            .generation
            .store(generation_in(space, generation), Ordering::Relaxed);
        change.number.store(number + 1, Ordering::Release);
    }
}

impl Drop for ChangeLog {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping and references into it borrow this value.
        let _ = unsafe { munmap(self.layout.as_ptr().cast(), LOG_BYTES) };
    }
}
