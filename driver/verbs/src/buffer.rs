//! Memory that a device reads and writes.
#![allow(
    unsafe_code,
    reason = "memory that is shared with a device is reached by pointers only"
)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::Pattern;

const WORD: usize = size_of::<u64>();

/// Which pages the kernel may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// As the system is set up.
    Default,
    /// Base pages only.
    Small,
    /// Huge ones where possible.
    Huge,
}

/// Private anonymous memory of whole pages. A device may write to it at any time, so nobody gets a reference into it:
/// its methods copy.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<c_void>,
    length: usize,
}

/// A page.
#[must_use]
pub fn page_size() -> usize {
    rustix::param::page_size()
}

impl Buffer {
    /// Maps that many bytes, without a page in them yet.
    ///
    /// # Errors
    /// No memory, or not a multiple of a page.
    pub fn map(length: usize, pages: Pages) -> io::Result<Self> {
        if length == 0 || !length.is_multiple_of(page_size()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a buffer of {length} bytes has no whole pages"),
            ));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches nobody's memory.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let buffer = Self {
            start: NonNull::new(start).ok_or_else(|| io::Error::other("memory at address 0"))?,
            length,
        };
        let advice = match pages {
            Pages::Default => return Ok(buffer),
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Huge => Advice::LinuxHugepage,
        };
        match buffer.advise(0..length, advice) {
            // A kernel without huge pages has small ones.
            Err(error) if pages == Pages::Small && error.raw_os_error() == Some(libc::EINVAL) => {}
            other => other?,
        }
        Ok(buffer)
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// Bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Makes every page present and writable.
    ///
    /// # Errors
    /// No memory.
    pub fn populate(&self) -> io::Result<()> {
        match self.advise(0..self.length, Advice::LinuxPopulateWrite) {
            // Before Linux 5.14.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for offset in (0..self.length).step_by(page_size()) {
                    self.set_word(offset / WORD, 0);
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Gives the pages back (MADV_DONTNEED): what is read afterwards is zero.
    ///
    /// # Errors
    /// The system call's, such as EINVAL while it is locked.
    pub fn discard(&self) -> io::Result<()> {
        self.advise(0..self.length, Advice::LinuxDontNeed)
    }

    fn advise(&self, range: Range<usize>, advice: Advice) -> io::Result<()> {
        let at = self.at(&range);
        // SAFETY: the range is in this mapping, to which nobody has a reference.
        unsafe { rustix::mm::madvise(at.cast(), range.len(), advice) }.map_err(Into::into)
    }

    /// mlock.
    ///
    /// # Errors
    /// RLIMIT_MEMLOCK, most of all.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: this mapping.
        unsafe { rustix::mm::mlock(self.start.as_ptr(), self.length) }.map_err(Into::into)
    }

    /// munlock.
    ///
    /// # Errors
    /// The system call's.
    pub fn unlock(&self) -> io::Result<()> {
        // SAFETY: this mapping.
        unsafe { rustix::mm::munlock(self.start.as_ptr(), self.length) }.map_err(Into::into)
    }

    /// Writes a pattern, from its first word.
    pub fn fill(&self, pattern: Pattern) {
        for index in 0..self.length / WORD {
            self.set_word(index, pattern.word(index));
        }
    }

    /// Copies from another buffer (or this one).
    ///
    /// # Panics
    /// When one of the ranges is not in its buffer.
    pub fn copy_from(&self, offset: usize, from: &Buffer, from_offset: usize, length: usize) {
        let to = self.at(&(offset..offset + length));
        let from = from.at(&(from_offset..from_offset + length));
        // SAFETY: both ranges are mapped; they may overlap.
        unsafe { std::ptr::copy(from, to, length) };
    }

    /// The first offset in the range where the words are not those that `expected` gives for their index in this
    /// buffer.
    ///
    /// # Panics
    /// When the range is not in the buffer, or not of whole words.
    #[must_use]
    pub fn first_wrong(&self, range: Range<usize>, expected: impl Fn(usize) -> u64) -> Option<usize> {
        assert!(
            range.start.is_multiple_of(WORD) && range.end.is_multiple_of(WORD),
            "{range:?} has no whole words"
        );
        (range.start / WORD..range.end / WORD)
            .find(|index| self.word(*index) != expected(*index))
            .map(|index| index * WORD)
    }

    fn word(&self, index: usize) -> u64 {
        let at = self.at(&(index * WORD..(index + 1) * WORD));
        // SAFETY: mapped, and aligned because pages are.
        unsafe { at.cast::<u64>().read_volatile() }
    }

    fn set_word(&self, index: usize, value: u64) {
        let at = self.at(&(index * WORD..(index + 1) * WORD));
        // SAFETY: mapped, and aligned because pages are.
        unsafe { at.cast::<u64>().write_volatile(value) }
    }

    fn at(&self, range: &Range<usize>) -> *mut u8 {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?} is not in a buffer of {} bytes",
            self.length
        );
        // SAFETY: inside the mapping.
        unsafe { self.start.as_ptr().cast::<u8>().add(range.start) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference, and regions keep their buffers.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.length) } {
            tracing::error!(address = self.address(), length = self.length, %error, "munmap of a buffer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_buffer_when_filled_copied_and_discarded_has_what_it_should() {
        let size = 3 * page_size();
        let one = Buffer::map(size, Pages::Small).unwrap();
        let two = Buffer::map(size, Pages::Default).unwrap();
        one.populate().unwrap();
        let pattern = Pattern::new(7);
        one.fill(pattern);
        two.copy_from(page_size(), &one, 0, 2 * page_size());
        let shift = page_size() / WORD;
        assert_eq!(
            two.first_wrong(page_size()..size, |i| pattern.word(i - shift)),
            None
        );
        assert_eq!(two.first_wrong(0..page_size(), |_| 0), None);
        assert_eq!(two.first_wrong(0..size, |_| 0), Some(page_size()));
        one.discard().unwrap();
        assert_eq!(one.first_wrong(0..size, |_| 0), None);
    }

    #[test]
    fn test_buffer_when_not_of_whole_pages_is_refused() {
        for length in [0, 1, page_size() + 8] {
            assert!(Buffer::map(length, Pages::Default).is_err(), "{length}");
        }
    }

    #[test]
    #[should_panic(expected = "is not in a buffer")]
    fn test_copy_when_beyond_the_end_panics() {
        let one = Buffer::map(page_size(), Pages::Small).unwrap();
        one.copy_from(8, &one, 0, page_size());
    }
}
