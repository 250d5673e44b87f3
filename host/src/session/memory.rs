//! Memory that the device may reach: files, mapped at IOVAs, shared between sessions.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use driver::backing::{Backing, DmaProt};
use protos::bridge::changes::LOG_BYTES;

use super::held::HeldPages;
use super::identity::{FileId, duplicate};
use crate::daemon::iova::IovaAllocator;
use crate::mm::ChangeLog;

/// `[offset, offset + len)` of a file is at `iova`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Address in the device's IOVA space.
    pub iova: u64,
}

#[derive(Debug, Default)]
struct Mapped {
    /// Sessions that use the file.
    users: usize,
    /// In the order of their offsets, without holes.
    pieces: Arc<[Piece]>,
}

#[derive(Debug, Default)]
struct Inner {
    iova: IovaAllocator,
    files: HashMap<FileId, Mapped>,
}

/// Every file that is mapped for the device, by any session.
#[derive(Debug)]
pub struct DeviceMemory {
    backing: Arc<dyn Backing>,
    /// Where the device holds pages: files get addresses here, and their pages are mapped one by one.
    held: Option<Arc<HeldPages>>,
    /// Held across DMA_MAP and DMA_UNMAP messages on purpose: who adds the same file must wait until the
    /// device knows it. Never taken on the fault path or on the invalidate path, which read a session's own
    /// list of pieces.
    inner: Mutex<Inner>,
    /// What a device that checks itself is told.
    changes: OnceLock<Arc<ChangeLog>>,
}

/// Why memory was not mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The IOVA space is full.
    #[error("no room for {0} bytes in the device's address space; detach memory that is not needed")]
    NoRoom(u64),
    /// The device refused.
    #[error("the device refused {len} bytes at IOVA {iova:#x}: {source}")]
    Device {
        /// Address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// Its reason.
        source: io::Error,
    },
}

/// A session's use of a file. [`DeviceMemory::release`] takes it back.
#[derive(Debug)]
pub struct UsedFile {
    /// Which file.
    pub id: FileId,
    /// Number in the session.
    pub number: u32,
    /// Bytes that this session was given, from offset 0.
    pub len: u64,
    /// Where they are. Covers at least `len`.
    pub pieces: Arc<[Piece]>,
    /// The file.
    pub fd: OwnedFd,
}

impl UsedFile {
    /// Where a byte of the file is: the IOVA, and how many bytes follow it without a break inside what this
    /// session was given. `None` outside.
    #[must_use]
    pub fn iova_of(&self, offset: u64) -> Option<(u64, u64)> {
        if offset >= self.len {
            return None;
        }
        let piece = self
            .pieces
            .iter()
            .find(|p| offset - p.offset.min(offset) < p.len && offset >= p.offset)?;
        let skip = offset - piece.offset;
        Some((piece.iova + skip, (piece.len - skip).min(self.len - offset)))
    }
}

impl DeviceMemory {
    /// Nothing is mapped yet. `keep_held`: see [`HeldPages::new`].
    #[must_use]
    pub fn new(backing: Arc<dyn Backing>, keep_held: bool) -> Self {
        Self {
            held: backing
                .holds_pages()
                .then(|| Arc::new(HeldPages::new(backing.clone(), keep_held))),
            backing,
            inner: Mutex::default(),
            changes: OnceLock::new(),
        }
    }

    /// The pages that the device holds, if it is one that does.
    #[must_use]
    pub fn held(&self) -> Option<&Arc<HeldPages>> {
        self.held.as_ref()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each step below leaves the maps consistent, so a panic elsewhere does not spoil them.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes `[0, len)` of a file reachable and counts a user, unless `already_used`. What is mapped already
    /// is not mapped again; growth is one more piece.
    ///
    /// # Errors
    /// [`MapError`]; nothing has changed then.
    pub fn acquire(
        &self,
        id: FileId,
        fd: impl AsFd,
        len: u64,
        already_used: bool,
    ) -> Result<Arc<[Piece]>, MapError> {
        let mut inner = self.inner();
        let have = inner
            .files
            .get(&id)
            .map_or_else(|| Arc::from([]), |m| m.pieces.clone());
        let mapped: u64 = have.iter().map(|p| p.len).sum();
        let pieces = if mapped >= len {
            have
        } else {
            let more = len - mapped;
            let iova = inner.iova.allocate(more).ok_or(MapError::NoRoom(more))?;
            if self.held.is_none()
                && let Err(source) = self
                    .backing
                    .dma_map(iova, more, fd.as_fd(), mapped, DmaProt::READ_WRITE)
            {
                inner.iova.release(iova);
                return Err(MapError::Device {
                    iova,
                    len: more,
                    source,
                });
            }
            have.iter()
                .copied()
                .chain([Piece {
                    offset: mapped,
                    len: more,
                    iova,
                }])
                .collect()
        };
        let file = inner.files.entry(id).or_default();
        file.users += usize::from(!already_used);
        file.pieces = pieces.clone();
        Ok(pieces)
    }

    /// A session stops using a file; with the last user the device loses it. Returns when the device cannot
    /// reach it any more (or is gone).
    ///
    /// # Panics
    /// When nobody uses the file.
    pub fn release(&self, id: FileId) {
        let mut inner = self.inner();
        let file = inner.files.get_mut(&id).expect("released by its user");
        file.users -= 1;
        if file.users > 0 {
            return;
        }
        let file = inner.files.remove(&id).expect("just seen");
        if let Some(held) = &self.held {
            held.release(id);
            for piece in file.pieces.iter() {
                inner.iova.release(piece.iova);
            }
            return;
        }
        for piece in file.pieces.iter() {
            match self.backing.dma_unmap(piece.iova, piece.len) {
                Ok(()) => inner.iova.release(piece.iova),
                // A device that is gone reaches nothing. A living one that refuses keeps the address: giving
                // it out again could show one session's memory to another.
                Err(error) if !self.backing.alive() => {
                    tracing::debug!(%error, iova = piece.iova, "unmap on a device that is gone");
                    inner.iova.release(piece.iova);
                }
                Err(error) => {
                    tracing::error!(%error, iova = piece.iova, len = piece.len, "the device keeps a mapping; its address is not used again");
                }
            }
        }
    }

    /// Makes a log of changes and maps it for the device, for as long as that is this daemon's. Its IOVA.
    ///
    /// # Errors
    /// The log cannot be made, or the device refuses it.
    ///
    /// # Panics
    /// When called twice.
    pub fn log_changes(&self) -> io::Result<u64> {
        let log = Arc::new(ChangeLog::create()?);
        let mut inner = self.inner();
        let len = LOG_BYTES as u64;
        let iova = inner.iova.allocate(len).ok_or(io::ErrorKind::OutOfMemory)?;
        let read_only = DmaProt {
            read: true,
            write: false,
        };
        self.backing
            .dma_map(iova, len, log.fd(), 0, read_only)
            .inspect_err(|_| inner.iova.release(iova))?;
        assert!(self.changes.set(log).is_ok(), "one log for a device");
        Ok(iova)
    }

    /// The log of changes, if the device looks at one.
    #[must_use]
    pub fn changes(&self) -> Option<&Arc<ChangeLog>> {
        self.changes.get()
    }

    /// (files, mappings) that the device has now.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        let inner = self.inner();
        (inner.files.len(), inner.iova.ranges())
    }

    /// A file for [`UsedFile::fd`].
    ///
    /// # Errors
    /// The file limit.
    pub fn keep(fd: impl AsFd) -> io::Result<OwnedFd> {
        duplicate(fd)
    }
}
