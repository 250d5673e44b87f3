//! Memory that a step may touch, however it was found.

use std::sync::atomic::{AtomicU32, AtomicU64};

use super::Stop;
use crate::atc::Guard;
use crate::dma::{Resolved, Window, lost};

/// A piece of client memory. Keep it for one copy.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// Through the TLB.
    Translated(Guard<'a>),
    /// Unmapped mode: by IOVA.
    Physical(Resolved<'a>),
}

impl Place<'_> {
    fn window(&self) -> &Window {
        match self {
            Self::Translated(guard) => guard.window(),
            Self::Physical(resolved) => resolved.window(),
        }
    }
    pub(super) fn len(&self) -> usize {
        self.window().len()
    }
    /// Bytes to the end of the translation's page. Physical memory has no pages.
    pub(super) fn page_left(&self) -> u64 {
        match self {
            Self::Translated(guard) => guard.page_left(),
            Self::Physical(_) => u64::MAX,
        }
    }
    pub(super) fn read_into(&self, to: &mut [u8]) {
        self.window().read(0, to);
    }
    pub(super) fn write_from(&self, from: &[u8]) {
        self.window().write(0, from);
    }
    pub(super) fn write_at(&self, offset: usize, from: &[u8]) {
        self.window().write(offset, from);
    }
    /// A naturally aligned double word of memory that was asked for to be stored to.
    pub(super) fn word64(&self, offset: usize) -> &AtomicU64 {
        self.window()
            .atomic64_at(offset)
            .expect("a naturally aligned double word is inside one page")
    }
    /// The word at the start, as [`Place::word64`].
    pub(super) fn word32(&self) -> &AtomicU32 {
        self.window()
            .atomic32()
            .expect("a naturally aligned word is inside one page")
    }
    /// After a copy or an atomic: the memory was there all the time.
    pub(super) fn check(&self) -> Result<(), Stop> {
        lost::check(self.window().as_ptr()).map_err(|_| Stop::LOST)
    }
}
