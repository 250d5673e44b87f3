//! The seam between a driver and whatever carries its accesses to a device.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// One BAR as a driver sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BarInfo {
    /// Size in bytes; 0 = not there.
    pub size: u64,
    /// Page-aligned (offset, size) areas that can be mapped. Empty: every access is a message.
    pub mappable: Vec<(u64, u64)>,
}

/// Rights of a DMA mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaProt {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl DmaProt {
    /// Both.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };
}

/// A device as its driver reaches it. Shaped so that `/dev/vfio` fits: BARs by read/write or by mapping,
/// MSI-X by eventfd, DMA by IOVA.
///
/// All calls may block (they are messages or system calls) and none may be made on the non-sleeping
/// invalidate path: that path uses mapped memory only, or says that it sleeps.
pub trait Backing: Send + Sync + std::fmt::Debug {
    /// The BAR's size and mappable areas.
    fn bar(&self, bar: usize) -> BarInfo;
    /// The file behind the BAR's mappable areas and the file offset of BAR offset 0.
    fn bar_fd(&self, bar: usize) -> Option<(BorrowedFd<'_>, u64)>;
    /// Read from a BAR by message.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Write to a BAR by message; answered (the device has taken it when this returns).
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn write(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Write without waiting for an answer where the transport can; ordered with later accesses.
    ///
    /// # Errors
    /// The transport's.
    fn write_posted(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(bar, offset, data)
    }
    /// Read config space.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Write config space.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn config_write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Number of MSI-X vectors.
    fn msix_vectors(&self) -> u32;
    /// Route a vector to an eventfd (a duplicate is kept), or to nothing.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn set_msix(&self, vector: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()>;
    /// Let the device reach `[offset, offset + len)` of a file at `iova`.
    ///
    /// # Errors
    /// EEXIST on overlap, EINVAL on bad alignment, ENOSPC at the mapping limit, the transport's.
    fn dma_map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>, offset: u64, prot: DmaProt) -> io::Result<()>;
    /// Take the memory away. When this returns the device cannot reach it any more: caches purged,
    /// accesses drained.
    ///
    /// # Errors
    /// ENOENT when nothing is mapped there, EINVAL when a mapping would be cut, the transport's.
    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<()>;
    /// Whether a mapping holds the pages that the file has when it is made, instead of meaning whatever the file
    /// has: what is discarded from the file later is then still the device's, so a mapping must be taken away before
    /// a discard and made again after it.
    fn holds_pages(&self) -> bool {
        false
    }
    /// An eventfd that stands for a write to `offset` of the BAR, where the device offers one.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn io_eventfd(&self, bar: usize, offset: u64) -> io::Result<Option<OwnedFd>>;
    /// Reset the device.
    ///
    /// # Errors
    /// The device's errno, or the transport's.
    fn reset(&self) -> io::Result<()>;
    /// The device process, for fencing: readable when it is gone. `None` when it is this process.
    fn pidfd(&self) -> Option<BorrowedFd<'_>>;
    /// The device process' pid, for messages.
    fn pid(&self) -> Option<u32> {
        None
    }
    /// False once the transport has failed for good (socket closed, device process gone).
    fn alive(&self) -> bool;
}
