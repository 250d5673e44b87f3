//! Copies to and from memory that its owner changes at the same time.
#![allow(unsafe_code)] // Raw accesses to client memory: there is no safe type for memory shared with a peer.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A piece of client memory that is mapped for as long as the window lives.
///
/// Never turned into a slice: its owner writes to it whenever it likes.
#[derive(Debug)]
pub(crate) struct Window {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
}

impl Window {
    /// # Safety
    /// `[start, start + len)` is mapped, readable (and writable, if so said) for the whole life of the
    /// window, and no Rust reference to it exists.
    pub(crate) unsafe fn new(start: NonNull<u8>, len: usize, writable: bool) -> Self {
        Self { start, len, writable }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Start of `[offset, offset + len)`, which must be inside the window.
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "access to bytes {offset}+{len} of a window of {} bytes",
            self.len
        );
        // SAFETY: offset is at most len, so the result is inside or one past the mapped range.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Copy out. A naturally aligned 1, 2, 4 or 8 bytes are one access.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len()).cast_const();
        // SAFETY: `at` checked the bounds, `new` promised that they are mapped; `to` is ours alone. The
        // peer may write meanwhile: volatile word accesses and memcpy on raw pointers give some mix of
        // old and new bytes, and every bit pattern is a valid u8.
        unsafe {
            match to.len() {
                1 => to[0] = from.read_volatile(),
                2 if from.addr().is_multiple_of(2) => {
                    to.copy_from_slice(&from.cast::<u16>().read_volatile().to_ne_bytes());
                }
                4 if from.addr().is_multiple_of(4) => {
                    to.copy_from_slice(&from.cast::<u32>().read_volatile().to_ne_bytes());
                }
                8 if from.addr().is_multiple_of(8) => {
                    to.copy_from_slice(&from.cast::<u64>().read_volatile().to_ne_bytes());
                }
                len => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len),
            }
        }
    }

    /// Copy in. A naturally aligned 1, 2, 4 or 8 bytes are one access.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        assert!(
            self.writable,
            "write through a window that was opened for reading"
        );
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`, and the window is writable.
        unsafe {
            match *from {
                [a] => to.write_volatile(a),
                [a, b] if to.addr().is_multiple_of(2) => {
                    to.cast::<u16>().write_volatile(u16::from_ne_bytes([a, b]))
                }
                [a, b, c, d] if to.addr().is_multiple_of(4) => {
                    to.cast::<u32>().write_volatile(u32::from_ne_bytes([a, b, c, d]));
                }
                [a, b, c, d, e, f, g, h] if to.addr().is_multiple_of(8) => {
                    to.cast::<u64>()
                        .write_volatile(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
                }
                _ => std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()),
            }
        }
    }

    /// Copy as many bytes as this window has from the start of `from`, which may be the same memory.
    pub(crate) fn copy(&self, from: &Self) {
        assert!(
            self.writable,
            "write through a window that was opened for reading"
        );
        let (to, from) = (self.at(0, self.len), from.at(0, self.len).cast_const());
        // SAFETY: as in `read` and `write`: both are mapped, and `at` checked that the source has so many bytes.
        unsafe { std::ptr::copy(from, to, self.len) }
    }

    /// Set all bytes of `[offset, offset + len)`.
    pub(crate) fn fill(&self, offset: usize, len: usize, byte: u8) {
        assert!(
            self.writable,
            "write through a window that was opened for reading"
        );
        let to = self.at(offset, len);
        // SAFETY: as in `write`.
        unsafe { std::ptr::write_bytes(to, byte, len) }
    }

    /// The 64-bit word at the start; `None` when the window is shorter, not aligned or not writable.
    pub(crate) fn atomic64(&self) -> Option<&AtomicU64> {
        self.atomic64_at(0)
    }

    /// The 64-bit word at `offset`; `None` as for the start.
    pub(crate) fn atomic64_at(&self, offset: usize) -> Option<&AtomicU64> {
        if !self.writable || offset.checked_add(8).is_none_or(|end| end > self.len) {
            return None;
        }
        let ptr = self.at(offset, 8).cast::<u64>();
        if !ptr.is_aligned() {
            return None;
        }
        // SAFETY: aligned, mapped and writable while `self` lives; other accesses to client memory are
        // its owner's own business and can be any mix of sizes (x86 and arm64 keep aligned words whole).
        Some(unsafe { AtomicU64::from_ptr(ptr) })
    }

    /// The 32-bit word at the start; `None` when the window is shorter, not aligned or not writable.
    pub(crate) fn atomic32(&self) -> Option<&AtomicU32> {
        let ptr = self.start.as_ptr().cast::<u32>();
        if self.len < 4 || !ptr.is_aligned() || !self.writable {
            return None;
        }
        // SAFETY: as in `atomic64`.
        Some(unsafe { AtomicU32::from_ptr(ptr) })
    }
}
