// Reason: maps the shared table and views it as its type.
#![allow(unsafe_code)]
//! The shared table, mapped from its memfd.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use protos::bridge::shared::{Header, MAGIC, SharedTable, TABLE_BYTES, VERSION, buckets_of};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::futex;

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// A system call failed.
    #[error("shared table: {0}")]
    Io(#[from] io::Error),
    /// The file has another size.
    #[error(
        "shared table: the file has {got} bytes instead of {TABLE_BYTES}; both sides need the same version"
    )]
    Size {
        /// What it has.
        got: u64,
    },
    /// The file could be cut under the mapping.
    #[error("shared table: the memfd is not sealed against shrinking; create it with MappedTable::create")]
    NotSealed,
    /// Not a table, or another version.
    #[error("shared table: magic {magic:#x}, version {version}; this side speaks version {VERSION}")]
    Version {
        /// What it has.
        magic: u64,
        /// What it has.
        version: u32,
    },
}

impl From<rustix::io::Errno> for TableError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A mapped shared table. Dereferences to [`SharedTable`]; every word in it is atomic and may be changed by
/// the application at any time.
#[derive(Debug)]
pub struct MappedTable {
    address: NonNull<SharedTable>,
    fd: OwnedFd,
}

// SAFETY: the mapping is owned, lives as long as this value, and consists of atomics (and reserved words that
// are never read).
unsafe impl Send for MappedTable {}
// SAFETY: as above.
unsafe impl Sync for MappedTable {}

impl MappedTable {
    /// A new table on a sealed memfd, all zero but for magic and version.
    ///
    /// # Errors
    /// Those of memfd_create(2), ftruncate(2), fcntl(2), mmap(2).
    pub fn create() -> Result<Arc<Self>, TableError> {
        let fd = memfd_create("tlbridge-table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, TABLE_BYTES as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let table = Self::map(fd)?;
        table.header.version.store(VERSION, Ordering::Relaxed);
        table.header.magic.store(MAGIC, Ordering::Release);
        Ok(Arc::new(table))
    }

    /// Maps a table that the other side created.
    ///
    /// # Errors
    /// [`TableError`]; nothing of the file's content is used before its size, seals and version are checked.
    pub fn open(fd: OwnedFd) -> Result<Arc<Self>, TableError> {
        let got = fstat(&fd)?.st_size as u64;
        if got != TABLE_BYTES as u64 {
            return Err(TableError::Size { got });
        }
        if !fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(TableError::NotSealed);
        }
        let table = Self::map(fd)?;
        let magic = table.header.magic.load(Ordering::Acquire);
        let version = table.header.version.load(Ordering::Relaxed);
        if magic != MAGIC || version != VERSION {
            return Err(TableError::Version { magic, version });
        }
        Ok(Arc::new(table))
    }

    fn map(fd: OwnedFd) -> Result<Self, TableError> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                TABLE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        let address = NonNull::new(address.cast()).expect("mmap does not return the null page");
        Ok(Self { address, fd })
    }

    /// The memfd, to be passed on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Declares `[start, end)` to be changing, as a covered call does (steps 1 to 3): fills of it are put off
    /// until the guard is dropped, and the generation is raised. For changes that the daemon makes or learns
    /// of itself: the safety net's block of the whole space (`0..u64::MAX`), the reclaimer.
    pub fn begin_change(self: &Arc<Self>, start: u64, end: u64) -> ChangeGuard {
        self.adjust(start, end, |word| {
            word.fetch_add(1, Ordering::Relaxed);
        });
        fence(Ordering::SeqCst);
        let generation = self.header.generation.fetch_add(1, Ordering::SeqCst) + 1;
        ChangeGuard {
            table: self.clone(),
            start,
            end,
            generation,
        }
    }

    fn adjust(&self, start: u64, end: u64, change: impl Fn(&std::sync::atomic::AtomicU32)) {
        match buckets_of(start, end) {
            Some(buckets) => buckets.for_each(|bucket| change(&self.in_progress[bucket])),
            None => change(&self.header.all_in_progress),
        }
    }

    /// Rings the bell when faults have been put off (step 7). Never blocks.
    pub fn ring_if_faults_wait(&self) {
        fence(Ordering::SeqCst);
        if self.header.fault_waiters.load(Ordering::Relaxed) != 0 {
            self.ring();
        }
    }

    /// Rings the mailbox's bell: wakes the daemon's workers if any sleeps. Never blocks.
    pub fn ring(&self) {
        let Header {
            bell, bell_sleepers, ..
        } = &self.header;
        bell.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        if bell_sleepers.load(Ordering::Relaxed) != 0 {
            let _ = futex::wake(bell, futex::Flags::empty(), i32::MAX as u32);
        }
    }
}

impl Deref for MappedTable {
    type Target = SharedTable;
    fn deref(&self) -> &SharedTable {
        // SAFETY: the mapping has TABLE_BYTES bytes (checked or made so, and sealed), is page aligned as the
        // type asks, any bit pattern is a valid SharedTable (FromBytes), and it is unmapped only in drop. All
        // words that anybody writes are atomics.
        unsafe { self.address.as_ref() }
    }
}

impl Drop for MappedTable {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping and references into it borrow this value.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), TABLE_BYTES) };
    }
}

/// A range that the daemon itself has declared to be changing. Dropping it is the end (step 7).
#[derive(Debug)]
#[must_use = "dropping the guard ends the change"]
pub struct ChangeGuard {
    table: Arc<MappedTable>,
    start: u64,
    end: u64,
    generation: u64,
}

impl ChangeGuard {
    /// The generation of this change: translations with a smaller tag that meet the range are stale once it
    /// is over.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Drop for ChangeGuard {
    fn drop(&mut self) {
        self.table.adjust(self.start, self.end, |word| {
            word.fetch_sub(1, Ordering::Release);
        });
        self.table.ring_if_faults_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protos::bridge::shared::bucket_of;

    #[test]
    fn test_open_when_table_was_created_shares_words() {
        let ours = MappedTable::create().unwrap();
        let theirs = MappedTable::open(ours.fd().try_clone_to_owned().unwrap()).unwrap();
        theirs.header.bell.store(7, Ordering::Relaxed);
        assert_eq!(ours.header.bell.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn test_open_when_file_is_wrong_is_refused() {
        let fd = || memfd_create("wrong", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let short = fd();
        ftruncate(&short, 4096).unwrap();
        assert!(matches!(
            MappedTable::open(short),
            Err(TableError::Size { got: 4096 })
        ));
        let unsealed = fd();
        ftruncate(&unsealed, TABLE_BYTES as u64).unwrap();
        assert!(matches!(MappedTable::open(unsealed), Err(TableError::NotSealed)));
        let blank = fd();
        ftruncate(&blank, TABLE_BYTES as u64).unwrap();
        fcntl_add_seals(&blank, SealFlags::SHRINK).unwrap();
        assert!(matches!(
            MappedTable::open(blank),
            Err(TableError::Version { .. })
        ));
    }

    #[test]
    fn test_change_when_guard_lives_keeps_words_raised() {
        let table = MappedTable::create().unwrap();
        let change = table.begin_change(0x20_0000, 0x40_0001);
        assert_eq!(change.generation(), 1);
        for va in [0x20_0000, 0x40_0000] {
            assert_eq!(table.in_progress[bucket_of(va)].load(Ordering::Relaxed), 1);
        }
        assert_eq!(table.in_progress[bucket_of(0x60_0000)].load(Ordering::Relaxed), 0);
        let all = table.begin_change(0, u64::MAX);
        assert_eq!(table.header.all_in_progress.load(Ordering::Relaxed), 1);
        drop((change, all));
        assert!(table.in_progress.iter().all(|w| w.load(Ordering::Relaxed) == 0));
        assert_eq!(table.header.all_in_progress.load(Ordering::Relaxed), 0);
        assert_eq!(
            table.header.bell.load(Ordering::Relaxed),
            0,
            "nobody waits: no ring"
        );
    }

    #[test]
    fn test_change_when_faults_wait_rings_at_its_end() {
        let table = MappedTable::create().unwrap();
        table.header.fault_waiters.store(1, Ordering::Relaxed);
        let change = table.begin_change(0x1000, 0x2000);
        assert_eq!(table.header.bell.load(Ordering::Relaxed), 0);
        drop(change);
        assert_eq!(table.header.bell.load(Ordering::Relaxed), 1);
    }
}
