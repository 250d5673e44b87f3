//! What is mapped at an address.

use std::io;

/// One mapping of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Offset of `start` in the file, in bytes.
    pub offset: u64,
    /// The file's device, as `st_dev` has it; 0 for anonymous memory.
    pub dev: u64,
    /// The file's inode; 0 for anonymous memory.
    pub inode: u64,
    /// PROT_READ.
    pub read: bool,
    /// PROT_WRITE.
    pub write: bool,
    /// MAP_SHARED.
    pub shared: bool,
}

impl Vma {
    /// Offset in the file of the byte at `va`.
    ///
    /// # Panics
    /// When `va` is outside the mapping.
    #[must_use]
    pub fn offset_of(&self, va: u64) -> u64 {
        assert!((self.start..self.end).contains(&va), "{va:#x} is not in {self:?}");
        self.offset + (va - self.start)
    }
}

/// Who knows what is mapped.
pub trait VmaSource: Send + Sync {
    /// The mapping that covers `va` now, else the first one behind it, or `None` when there is none. May sleep.
    ///
    /// # Errors
    /// ESRCH when the process is gone, and whatever the source says.
    fn query_from(&self, va: u64) -> io::Result<Option<Vma>>;

    /// The mapping that covers `va` now, or `None` when nothing does. May sleep.
    ///
    /// # Errors
    /// As [`VmaSource::query_from`].
    fn query(&self, va: u64) -> io::Result<Option<Vma>> {
        Ok(self.query_from(va)?.filter(|vma| vma.start <= va))
    }
}
