//! Address spaces: who resolves their addresses, and how the device forgets them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use protos::gru::map::CHIPLETS;

use super::asid::Tracker;
use super::context::{Context, ContextOptions};
use super::error::GruError;
use super::{Gru, flush};

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// IOVA of the page's first byte (lower bits, as of the missing address, are ignored).
    pub iova: u64,
    /// Size of the page as a shift; 12 or more. A size that the GRU lacks is entered as the next smaller.
    pub page_shift: u8,
    /// Whether stores may go through. A store that misses on a page that is not writable is answered with an
    /// exception.
    pub writable: bool,
    /// Generation of the address space when the page was looked up: travels with the entry, and each
    /// instruction reports the smallest one that it used.
    pub generation: u64,
}

/// A pager's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// There is a page.
    Page(Translation),
    /// An invalidation of that address is in progress (invariant S1). The miss waits until
    /// [`Mm::retry_deferred`].
    Retry,
    /// There is no such memory, or not with that right: the instruction ends in an exception.
    Bad,
}

/// The page tables of one address space, as a driver sees them.
pub trait Pager: Send + Sync {
    /// Resolves a miss. Called by the fault service and by [`Context::call_os`], on any thread; may sleep, but
    /// must not wait for an invalidation to end ([`Fault::Retry`] is for that) nor call back into the address
    /// space's contexts.
    ///
    /// The miss is known to the device before this is called, so an invalidation that begins during the
    /// look-up drops the answer (the kill bit). What the pager has to see by itself is an invalidation that is
    /// already in progress: it looks for one *before* it looks the page up.
    fn fault(&self, va: u64, write: bool) -> Fault;
}

/// An address space's state that the fault service shares.
pub(crate) struct Space {
    pub(crate) pager: Arc<dyn Pager>,
    pub(crate) trackers: [Tracker; CHIPLETS],
    /// Address regions (top three bits of an address) in which a miss has been looked up.
    pub(crate) regions: AtomicU8,
    /// Raised by each `retry_deferred`.
    pub(crate) retries: AtomicU64,
    /// A miss of this space is on a chiplet's deferred list.
    pub(crate) has_deferred: AtomicBool,
    /// Every later miss ends in an exception (invariant S12).
    pub(crate) closed: AtomicBool,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("trackers", &[self.trackers[0].get(), self.trackers[1].get()])
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

/// An address space of the device.
#[derive(Debug)]
pub struct Mm {
    pub(crate) gru: Arc<Gru>,
    pub(crate) space: Arc<Space>,
}

impl Mm {
    pub(crate) fn new(gru: Arc<Gru>, pager: Arc<dyn Pager>) -> Arc<Self> {
        Arc::new(Self {
            gru,
            space: Arc::new(Space {
                pager,
                trackers: Default::default(),
                regions: AtomicU8::new(1),
                retries: AtomicU64::new(0),
                has_deferred: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            }),
        })
    }

    /// Allocates a context and loads it: its GSEG exists and its instructions run when this returns.
    ///
    /// # Errors
    /// [`GruError::NoResources`] when no chiplet (or not the one asked for) has that much left, `Argument`,
    /// `Closed`, `DeviceGone`, or the transport's error.
    pub fn create_context(self: &Arc<Self>, options: ContextOptions) -> Result<Context, GruError> {
        Context::create(self, options)
    }

    /// Removes the translations of `[start, end)` from the device, whatever the size of their pages. When
    /// this returns the device can no longer use one of them: accesses that did are finished, and a fill that
    /// was prepared before is dropped (invariant S2).
    ///
    /// Takes no lock that sleeps, allocates nothing and makes no blocking system call when
    /// [`Mm::flush_is_nonsleeping`]; may be called by many threads at once. Where no context is loaded the
    /// ASID is dropped instead, without any device operation.
    ///
    /// Returns only when the device has answered, or has ended.
    pub fn flush(&self, start: u64, end: u64) {
        flush::range(&self.gru.core, &self.space, start, end);
    }

    /// [`Mm::flush`] of every address.
    pub fn flush_all(&self) {
        flush::all(&self.gru.core, &self.space);
    }

    /// Whether the flush handles are in mapped memory, so that [`Mm::flush`] neither sends nor awaits a
    /// message.
    #[must_use]
    pub fn flush_is_nonsleeping(&self) -> bool {
        self.gru.flush_is_nonsleeping()
    }

    /// Looks again at every miss that was answered with [`Fault::Retry`]: to be called after an invalidation
    /// has ended (after the state that the pager looks at has changed). Neither sleeps nor allocates.
    pub fn retry_deferred(&self) {
        self.space.retries.fetch_add(1, Ordering::SeqCst);
        // Pairs with the fence of the fault service between "deferred" and its second look at `retries`.
        fence(Ordering::SeqCst);
        if self.space.has_deferred.swap(false, Ordering::SeqCst) {
            self.gru.core.kick();
        }
    }

    /// Gives the address space new ASIDs on each chiplet where it has contexts loaded: the contexts are
    /// stopped, the old ASID's entries removed, and the contexts started with the new one (update in place,
    /// section 5.1). Another way to forget everything; sleeps.
    ///
    /// # Errors
    /// `DeviceGone` or the transport's error.
    pub fn renew_asids(&self) -> Result<(), GruError> {
        super::context::renew_asids(&self.gru.core, &self.space)
    }

    /// Ends the address space (invariant S12): when this returns the device holds no translation of it and
    /// none can be created; instructions that miss end in an exception. Contexts stay allocated until they
    /// are dropped; no new one can be created.
    pub fn close(&self) {
        self.space.closed.store(true, Ordering::SeqCst);
        // A look-up that saw `closed` unset belongs to a miss that was open before this: the flush kills it.
        fence(Ordering::SeqCst);
        self.flush_all();
        self.retry_deferred();
    }

    /// Whether [`Mm::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.space.closed.load(Ordering::SeqCst)
    }

    /// The ASID on a chiplet (0 = none at the moment) and how many contexts are loaded there; for reports.
    #[must_use]
    pub fn asid(&self, chiplet: usize) -> (u32, u32) {
        let track = self.space.trackers[chiplet].get();
        (track.asid, track.contexts.count_ones())
    }
}
