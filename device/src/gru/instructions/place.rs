//! Memory that a step may touch, however it was found.

use std::sync::atomic::{AtomicU32, AtomicU64};

use super::Stop;
use super::message_place::Message;
use crate::atc::Guard;
use crate::dma::{Resolved, Window, lost};

/// A piece of client memory. Keep it for one copy.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// Through the TLB.
    Translated(Guard<'a>),
    /// Unmapped mode: by IOVA.
    Physical(Resolved<'a>),
    /// Read from the client before, or written to it by [`Place::check`].
    Message { message: Message<'a>, write: bool },
}

impl Place<'_> {
    /// What is mapped here.
    fn window(&self) -> &Window {
        match self {
            Self::Translated(guard) => guard.window(),
            Self::Physical(resolved) => resolved.window(),
            Self::Message { .. } => unreachable!("atomics refuse memory without a file"),
        }
    }
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Message { message, .. } => message.data.borrow().len(),
            _ => self.window().len(),
        }
    }
    /// Bytes to the end of the translation's page. Physical memory has no pages.
    pub(super) fn page_left(&self) -> u64 {
        match self {
            Self::Translated(guard) => guard.page_left(),
            Self::Physical(_) | Self::Message { .. } => u64::MAX,
        }
    }
    pub(super) fn read_into(&self, to: &mut [u8]) {
        match self {
            Self::Message { message, .. } => to.copy_from_slice(&message.data.borrow()[..to.len()]),
            _ => self.window().read(0, to),
        }
    }
    /// As many bytes as the place has, where it is a message.
    pub(super) fn write_from(&self, from: &[u8]) {
        match self {
            Self::Message { message, .. } => message.data.borrow_mut().copy_from_slice(from),
            _ => self.window().write(0, from),
        }
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
    /// After a copy or an atomic: the memory was there all the time, and has what was written.
    pub(super) fn check(&self) -> Result<(), Stop> {
        match self {
            Self::Message { message, write: true } => message.store(),
            Self::Message { .. } => Ok(()),
            _ => lost::check(self.window().as_ptr()).map_err(|_| Stop::LOST),
        }
    }
}
