//! Access to memory through the ATC: engines and guards.
#![allow(unsafe_code)] // A guard turns the address of an entry into a window.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::dma::{Lost, Window, lost};

use super::CHUNK;
use super::cache::Atc;
use super::defect::Initiator;
use super::shadow::Seen;
use super::slot::Found;
use super::types::{Access, Miss, SpaceId};

thread_local! {
    /// Guards that this thread holds, on any ATC.
    static HELD: Cell<u32> = const { Cell::new(0) };
}

/// A thread that holds a guard must not purge, park or wait: the purge that it (or the one that answers
/// it) waits for waits for the guard.
pub(crate) fn assert_no_guard(what: &str) {
    let held = HELD.get();
    assert!(
        held == 0,
        "{what} while this thread holds {held} ATC guard(s): a drain would wait for them forever"
    );
}

/// The right of one thread to access memory through an [`Atc`]. The slot goes back on drop.
#[derive(Debug)]
pub struct Engine {
    pub(super) atc: Arc<Atc>,
    pub(super) slot: usize,
    pub(super) by: Initiator,
}

impl Engine {
    pub(super) fn new(atc: Arc<Atc>, slot: usize) -> Self {
        Self {
            atc,
            slot,
            by: Initiator::default(),
        }
    }

    /// The ATC it belongs to.
    #[must_use]
    pub fn atc(&self) -> &Arc<Atc> {
        &self.atc
    }

    /// For whom the next accesses are: the sanitizer's reports say so.
    #[inline]
    pub fn works_for(&mut self, by: Initiator) {
        self.by = by;
    }

    /// What the sanitizer has seen until now; 0 without one.
    #[inline]
    pub(super) fn events(&self) -> u64 {
        match self.atc.core.events() {
            0 => 0,
            _ if self.atc.follows => self.atc.hear(),
            events => events,
        }
    }

    /// Translate, and hold the translation: until the guard is dropped no purge of it completes.
    ///
    /// The guard covers `len` bytes, or fewer: it ends with the page and with the 64 KiB chunk that `va`
    /// is in. No lock, allocation or system call.
    ///
    /// # Errors
    /// [`Miss`]; the engine holds nothing then.
    #[inline]
    pub fn access(&mut self, space: SpaceId, va: u64, len: u64, access: Access) -> Result<Guard<'_>, Miss> {
        let write = access == Access::Write;
        let after = self.events();
        let (found, shift) = self.atc.core.access(self.slot, space.0, va, write)?;
        if found.host == 0 {
            self.atc.core.leave(self.slot);
            return Err(Miss::ByMessage);
        }
        Ok(self.guard(space, (va, len), access, (found, shift), after))
    }

    /// The access has been entered and has found memory that is here; `after`: what the sanitizer had seen before.
    #[inline]
    pub(super) fn guard(
        &mut self,
        space: SpaceId,
        (va, len): (u64, u64),
        access: Access,
        (found, shift): (Found, u8),
        after: u64,
    ) -> Guard<'_> {
        let write = access == Access::Write;
        HELD.set(HELD.get() + 1);
        let page = 1u64 << shift;
        let offset = va & (page - 1);
        let len = len.min(page - offset).min(CHUNK - (va & (CHUNK - 1)));
        // Exposed when the entry was filled from a mapping.
        let host = std::ptr::with_exposed_provenance_mut::<u8>((found.host + offset) as usize);
        let start = NonNull::new(host).expect("no mapping is at address 0");
        // SAFETY: the entry points into a mapping that permits this access (checked by the fill, and for
        // stores by the look-up, whatever is switched off). The mapping goes away only after a purge of its IOVA has drained,
        // and that waits for this engine to leave, which the guard's drop does.
        let window = unsafe { Window::new(start, len as usize, write) };
        let guard = Guard {
            window,
            tag: found.tag,
            page_left: page - offset,
            engine: self,
        };
        if guard.engine.atc.onlookers.load(Ordering::Relaxed) {
            let seen = Seen {
                engine: guard.engine.slot,
                after,
                space: space.0,
                va,
                len,
                shift,
                host: found.host,
                access,
                by: guard.engine.by,
            };
            guard.engine.atc.show(seen, found.tag);
        }
        guard
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.atc.core.release(self.slot);
    }
}

/// A translation in use. Dropping it leaves the access: keep it for one copy, and never across a wait.
#[derive(Debug)]
pub struct Guard<'e> {
    window: Window,
    tag: u64,
    page_left: u64,
    /// Borrowed for as long as the guard lives: an engine holds one guard at a time.
    engine: &'e mut Engine,
}

impl Guard<'_> {
    /// Host address. Valid while the guard lives.
    #[must_use]
    pub fn ptr(&self) -> *mut u8 {
        self.window.as_ptr()
    }

    /// Bytes that the guard covers; may be fewer than asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.window.len()
    }

    /// Whether it covers nothing (an access of 0 bytes).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// After a copy or an atomic: whether the memory was there all the time.
    ///
    /// # Errors
    /// [`Lost`]: the client truncated the file behind it. What was read may be zeros, what was written may
    /// be lost.
    #[inline]
    pub fn check(&self) -> Result<(), Lost> {
        lost::check(self.window.as_ptr())
    }

    /// Generation that software gave to the translation.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// Bytes from the start of the guard to the end of the entry's page, which may be more than it covers.
    #[must_use]
    pub fn page_left(&self) -> u64 {
        self.page_left
    }

    pub(crate) fn window(&self) -> &Window {
        &self.window
    }

    /// Copy out from the start of the guard, as many bytes as `to` has. A naturally aligned 1, 2, 4 or 8
    /// bytes are one access.
    ///
    /// # Panics
    /// When `to` is longer than the guard.
    #[inline]
    pub fn read_into(&self, to: &mut [u8]) {
        self.window.read(0, to);
    }

    /// Copy in to the start of the guard. A naturally aligned 1, 2, 4 or 8 bytes are one access.
    ///
    /// # Panics
    /// When `from` is longer than the guard, or the access was a [`Access::Read`].
    #[inline]
    pub fn write_from(&self, from: &[u8]) {
        self.window.write(0, from);
    }

    /// As [`Guard::read_into`], from `offset`.
    ///
    /// # Panics
    /// When the range is not inside the guard.
    #[inline]
    pub fn read_at(&self, offset: usize, to: &mut [u8]) {
        self.window.read(offset, to);
    }

    /// As [`Guard::write_from`], to `offset`.
    ///
    /// # Panics
    /// When the range is not inside the guard, or the access was a [`Access::Read`].
    #[inline]
    pub fn write_at(&self, offset: usize, from: &[u8]) {
        self.window.write(offset, from);
    }

    /// Fill the guard with as many bytes from the start of another engine's, without a buffer between.
    ///
    /// # Panics
    /// When `from` is shorter, or the access was a [`Access::Read`].
    #[inline]
    pub fn copy_from(&self, from: &Guard<'_>) {
        self.window.copy(&from.window);
    }

    /// Set every byte of the guard.
    ///
    /// # Panics
    /// When the access was a [`Access::Read`].
    pub fn fill(&self, byte: u8) {
        self.window.fill(0, self.len(), byte);
    }

    /// The 64-bit word at the start, for an atomic operation. `None` when the guard is shorter, the
    /// address is not a multiple of 8, or the access is no [`Access::Write`].
    #[must_use]
    pub fn atomic64(&self) -> Option<&AtomicU64> {
        self.window.atomic64()
    }

    /// The 32-bit word at the start. `None` as for [`Guard::atomic64`].
    #[must_use]
    pub fn atomic32(&self) -> Option<&AtomicU32> {
        self.window.atomic32()
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
        let core = &self.engine.atc.core;
        if core.sanitized {
            self.engine.atc.hear();
            core.leaving(self.engine.slot);
        }
        core.leave(self.engine.slot);
    }
}
