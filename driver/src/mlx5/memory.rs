//! Memory of the HCA: a memfd that it reaches by IOVA.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};

use super::Mlx5Error;

/// IOVA of the first byte: neither zero nor the offset in the file.
pub const IOVA_BASE: u64 = 0x2_4000_0000;

/// The memory. Pieces are handed out once and never given back.
#[derive(Debug)]
pub struct HcaMemory {
    file: File,
    len: u64,
    next: AtomicU64,
}

/// A piece of it, from a multiple of 4 KiB on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where the HCA sees it.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
}

impl HcaMemory {
    /// `len` bytes, all zero.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn new(len: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("mlx5-memory", MemfdFlags::CLOEXEC)?);
        file.set_len(len)?;
        Ok(Self {
            file,
            len,
            next: AtomicU64::new(0),
        })
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A piece of at least `len` bytes.
    ///
    /// # Errors
    /// Nothing is left.
    pub fn take(&self, len: u64) -> Result<Region, Mlx5Error> {
        let pages = len.max(1).next_multiple_of(4096);
        let offset = self.next.fetch_add(pages, Ordering::SeqCst);
        if offset + pages > self.len {
            return Err(Mlx5Error::NoMemory {
                wanted: pages,
                left: self.len.saturating_sub(offset),
            });
        }
        Ok(Region {
            iova: IOVA_BASE + offset,
            len: pages,
        })
    }

    /// Reads what the HCA has at `iova`.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn read(&self, iova: u64, to: &mut [u8]) {
        let offset = iova.checked_sub(IOVA_BASE).expect("an IOVA of this memory");
        self.file.read_exact_at(to, offset).expect("inside the memory");
    }

    /// Writes it.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn write(&self, iova: u64, from: &[u8]) {
        let offset = iova.checked_sub(IOVA_BASE).expect("an IOVA of this memory");
        assert!(offset + from.len() as u64 <= self.len, "outside the memory");
        self.file.write_all_at(from, offset).expect("inside the memory");
    }
}
