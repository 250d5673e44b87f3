//! Memory that a test tears away: mappings, and words in them that say where and when they were written.

#![allow(unsafe_code)] // mappings that change under their users is what is tested

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect,
    mremap_fixed, munmap,
};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE: usize = 2 << 20;
const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A range of address space that is always mapped somehow, so that nothing else gets there. Unmapped when dropped.
#[derive(Debug)]
pub struct Region {
    at: usize,
    len: usize,
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is ours.
        if let Err(error) = unsafe { munmap(self.at as *mut c_void, self.len) } {
            panic!("unmapping {:#x}: {error}", self.at);
        }
    }
}

impl Region {
    fn reserve(len: usize, align: usize) -> Result<Self> {
        // SAFETY: a fresh reservation; the ends are given back.
        unsafe {
            let room = mmap_anonymous(
                std::ptr::null_mut(),
                len + align,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
            .context("address space")? as usize;
            let at = room.next_multiple_of(align);
            if at > room {
                munmap(room as *mut c_void, at - room).context("trimming")?;
            }
            if room + align > at {
                munmap((at + len) as *mut c_void, room + align - at).context("trimming")?;
            }
            Ok(Self { at, len })
        }
    }

    /// Private anonymous memory in pages of 4 KiB.
    ///
    /// # Errors
    /// No memory.
    pub fn anonymous(len: usize) -> Result<Self> {
        let region = Self::reserve(len, HUGE)?;
        region.remap_anonymous(0, len)?;
        region.advise(0, len, Advice::LinuxNoHugepage)?;
        Ok(region)
    }

    /// Private anonymous memory that may be had in huge pages.
    ///
    /// # Errors
    /// No memory.
    pub fn huge(len: usize) -> Result<Self> {
        let region = Self::reserve(len, HUGE)?;
        region.remap_anonymous(0, len)?;
        region.advise(0, len, Advice::LinuxHugepage)?;
        Ok(region)
    }

    /// Reserved huge pages.
    ///
    /// # Errors
    /// None are reserved: /proc/sys/vm/nr_hugepages.
    pub fn hugetlb(len: usize) -> Result<Self> {
        let region = Self::reserve(len, HUGE)?;
        region
            .remap_hugetlb(0, len)
            .context("huge pages: are enough reserved in /proc/sys/vm/nr_hugepages?")?;
        Ok(region)
    }

    /// A file, shared.
    ///
    /// # Errors
    /// No memory.
    pub fn shared(file: impl AsFd, len: usize) -> Result<Self> {
        let region = Self::reserve(len, HUGE)?;
        region.remap_file(0, len, file, 0)?;
        Ok(region)
    }

    /// Its address.
    #[must_use]
    pub fn va(&self, offset: usize) -> u64 {
        (self.at + offset) as u64
    }

    fn part(&self, offset: usize, len: usize) -> *mut c_void {
        assert!(
            offset + len <= self.len,
            "{offset:#x}+{len:#x} of {:#x}",
            self.len
        );
        (self.at + offset) as *mut c_void
    }

    /// Replaces a part by fresh anonymous memory.
    ///
    /// # Errors
    /// No memory.
    pub fn remap_anonymous(&self, offset: usize, len: usize) -> Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: only our own range is replaced; nothing borrows from it.
        unsafe { mmap_anonymous(self.part(offset, len), len, READ_WRITE, flags) }.context("mmap")?;
        Ok(())
    }

    /// Replaces a part by fresh huge pages.
    ///
    /// # Errors
    /// None are left.
    pub fn remap_hugetlb(&self, offset: usize, len: usize) -> Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::HUGETLB;
        // SAFETY: as above.
        unsafe { mmap_anonymous(self.part(offset, len), len, READ_WRITE, flags) }
            .context("mmap of huge pages")?;
        Ok(())
    }

    /// Replaces a part by a part of a file.
    ///
    /// # Errors
    /// No memory.
    pub fn remap_file(&self, offset: usize, len: usize, file: impl AsFd, from: usize) -> Result<()> {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: as above.
        unsafe { mmap(self.part(offset, len), len, READ_WRITE, flags, file, from as u64) }
            .context("mmap of a file")?;
        Ok(())
    }

    /// munmap, and then nothing there that could be touched.
    ///
    /// # Errors
    /// None are known.
    pub fn unmap(&self, offset: usize, len: usize) -> Result<()> {
        // SAFETY: as above. Between the calls nothing of this process maps anything (other threads only compute).
        unsafe { munmap(self.part(offset, len), len) }.context("munmap")?;
        Ok(())
    }

    /// Moves a part over a part of another region; where it was is then unmapped.
    ///
    /// # Errors
    /// None are known.
    pub fn move_to(&self, offset: usize, len: usize, other: &Self, to: usize) -> Result<()> {
        // SAFETY: both ranges are ours.
        unsafe {
            mremap_fixed(
                self.part(offset, len),
                len,
                len,
                MremapFlags::MAYMOVE,
                other.part(to, len),
            )
        }
        .context("mremap")?;
        Ok(())
    }

    /// mprotect.
    ///
    /// # Errors
    /// None are known.
    pub fn protect(&self, offset: usize, len: usize, flags: MprotectFlags) -> Result<()> {
        // SAFETY: as above.
        unsafe { mprotect(self.part(offset, len), len, flags) }.context("mprotect")
    }

    /// madvise.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<()> {
        // SAFETY: as above; data is lost only where the caller says so.
        unsafe { madvise(self.part(offset, len), len, advice) }.with_context(|| format!("madvise {advice:?}"))
    }

    /// MADV_COLLAPSE, which rustix does not name.
    ///
    /// # Errors
    /// No huge page to be had just now.
    pub fn collapse(&self, offset: usize, len: usize) -> std::io::Result<()> {
        const MADV_COLLAPSE: i32 = 25;
        // SAFETY: changes no data.
        match unsafe { libc::madvise(self.part(offset, len), len, MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// A word.
    #[must_use]
    pub fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Stores a word.
    pub fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: a word of our range, aligned; whoever writes it meanwhile does so atomically (or is the device).
        unsafe { AtomicU64::from_ptr(self.part(offset, 8).cast()) }
    }

    /// Fills a part with one word.
    pub fn fill(&self, offset: usize, len: usize, value: u64) {
        for at in (offset..offset + len).step_by(8) {
            self.store(at, value);
        }
    }

    /// The words of a part.
    #[must_use]
    pub fn words(&self, offset: usize, len: usize) -> Vec<u64> {
        (offset..offset + len)
            .step_by(8)
            .map(|at| self.load(at))
            .collect()
    }
}

/// A file of memory.
///
/// # Errors
/// No memory.
pub fn memory_file(len: usize) -> Result<std::os::fd::OwnedFd> {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let file = memfd_create("gru-guest", MemfdFlags::CLOEXEC).context("memfd_create")?;
    ftruncate(&file, len as u64).context("ftruncate")?;
    Ok(file)
}

/// Two pages of a file, seen at a fixed place and, one after the other, through a window.
#[derive(Debug)]
pub struct PagePair {
    /// The file.
    pub file: std::os::fd::OwnedFd,
    /// Both.
    pub fixed: Region,
    /// At first the first.
    pub window: Region,
}

impl PagePair {
    /// New ones.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> Result<Self> {
        let file = memory_file(2 * PAGE)?;
        let fixed = Region::shared(&file, 2 * PAGE)?;
        let window = Region::shared(&file, PAGE)?;
        Ok(Self { file, fixed, window })
    }
}

/// Loads a word of a mapping that is no [`Region`].
pub fn touch(va: u64) {
    // SAFETY: the caller has mapped it.
    unsafe { (va as *const u64).read_volatile() };
}

/// Unmaps what is no [`Region`].
///
/// # Errors
/// The kernel refuses.
pub fn unmap_at(va: u64, len: usize) -> Result<()> {
    // SAFETY: the caller has mapped it and holds nothing in it.
    unsafe { munmap(va as *mut c_void, len) }.context("munmap")
}

/// Moves the page at `va` to a NUMA node.
///
/// # Errors
/// There is no such node, or the page cannot be moved now.
pub fn move_to_node(va: u64, node: i32) -> Result<()> {
    let mut page = va as *mut c_void;
    let mut status = 0i32;
    // SAFETY: one page, one node, one status, as the call has it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            1usize,
            &raw mut page,
            &raw const node,
            &raw mut status,
            2, // MPOL_MF_MOVE
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("move_pages (are there two nodes?)");
    }
    Ok(())
}
