//! The ATC over client memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::dma::{self, DmaError, TargetCache};

use super::core::{Begun, Core};
use super::defect::{Defect, Findings, Initiator};
use super::engine::{Engine, assert_no_guard};
use super::follow::Follower;
use super::reach::{Reach, Span};
use super::shadow::Seen;
use super::slot::Entry;
use super::types::{
    Access, AtcConfig, AtcStats, EntryDump, Fill, FillRefused, PageSize, Purge, PurgeProgress, PurgeReport,
    SpaceId,
};

/// Where injected faults get in. None of this is called unless [`Atc::set_hooks`] was.
pub trait Hooks: Send + Sync + std::fmt::Debug {
    /// An access has its translation, and the guard has not been returned yet: blocking here parks an
    /// engine inside a guard.
    fn translated(&self, space: SpaceId, va: u64, access: Access, tag: u64) {
        let _ = (space, va, access, tag);
    }
    /// A purge has killed and cleared; it has not drained yet.
    fn purge_begun(&self, what: &Purge) {
        let _ = what;
    }
    /// A purge is about to return: drained, no longer in progress.
    fn purge_finished(&self, what: &Purge, report: &PurgeReport) {
        let _ = (what, report);
    }
}

/// [`Atc::set_hooks`] was called twice.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
#[error("this ATC has hooks already; set them once, before the engines start")]
pub struct HooksAlreadySet;

/// A device TLB.
#[derive(Debug)]
pub struct Atc {
    pub(super) core: Core,
    by_message: bool,
    dma: Arc<dma::Space>,
    hooks: OnceLock<Arc<dyn Hooks>>,
    /// Accesses are shown to somebody: a sanitizer, or hooks.
    pub(super) onlookers: AtomicBool,
    /// There is a sanitizer of level 2.
    pub(super) follows: bool,
    pub(super) follower: Follower,
}

/// A purge whose second half is owed. Until [`Atc::purge_finish`] takes it, no fill that meets the range
/// is accepted.
#[derive(Debug)]
#[must_use = "a purge that is not finished refuses fills of its range forever"]
pub struct PurgeToken {
    what: Purge,
    begun: Begun,
}

impl PurgeToken {
    /// What was purged.
    #[must_use]
    pub fn what(&self) -> Purge {
        self.what
    }

    /// The first half's figures.
    #[must_use]
    pub fn report(&self) -> PurgeReport {
        self.begun.report
    }

    /// What [`Atc::answered`] wants to know.
    #[must_use]
    pub fn mark(&self) -> PurgeMark {
        PurgeMark(self.begun.number)
    }
}

/// Which purge it was, for the sanitizer.
#[derive(Debug, Clone, Copy)]
pub struct PurgeMark(Option<u64>);

impl Atc {
    /// An empty ATC over the client's memory; `dma` purges it from now on.
    #[must_use]
    pub fn new(config: AtcConfig, dma: Arc<dma::Space>) -> Arc<Self> {
        let atc = Arc::new(Self {
            core: Core::new(&config),
            by_message: config.by_message,
            dma,
            hooks: OnceLock::new(),
            onlookers: AtomicBool::new(config.sanitize.is_some()),
            follows: config.follow && config.sanitize.is_some(),
            follower: Follower::default(),
        });
        let weak: Weak<dyn TargetCache> = Arc::<Self>::downgrade(&atc);
        atc.dma.attach_cache(weak);
        atc
    }

    /// Install fault hooks, once.
    ///
    /// # Errors
    /// [`HooksAlreadySet`].
    pub fn set_hooks(&self, hooks: Arc<dyn Hooks>) -> Result<(), HooksAlreadySet> {
        self.hooks.set(hooks).map_err(|_| HooksAlreadySet)?;
        self.onlookers.store(true, Ordering::Release);
        Ok(())
    }

    /// An access, to the sanitizer, and then to whoever injects faults: an engine that is parked is known to be inside.
    #[cold]
    pub(super) fn show(&self, seen: Seen, tag: u64) {
        if self.core.sanitized {
            self.core.entered(seen);
        }
        if let Some(hooks) = self.hooks.get() {
            hooks.translated(SpaceId(seen.space), seen.va, seen.access, tag);
        }
    }

    /// The client's memory.
    #[must_use]
    pub fn dma(&self) -> &Arc<dma::Space> {
        &self.dma
    }

    /// A handle for one thread; `None` when all of [`AtcConfig::engines`] are taken.
    #[must_use]
    pub fn engine(self: &Arc<Self>) -> Option<Engine> {
        let slot = self.core.claim()?;
        Some(Engine::new(Arc::clone(self), slot))
    }

    /// Publish a miss under `ticket`, before software can learn of it. From now on the ticket collects
    /// purges; if it is open already it starts over.
    ///
    /// # Panics
    /// When `ticket` is not below [`AtcConfig::tickets`], or this thread holds a guard.
    pub fn open_miss(&self, ticket: usize, space: SpaceId, va: u64) {
        self.open_miss_by(ticket, space, va, Initiator::default());
    }

    /// As [`Atc::open_miss`]; the sanitizer's reports say for whom.
    ///
    /// # Panics
    /// As [`Atc::open_miss`].
    pub fn open_miss_by(&self, ticket: usize, space: SpaceId, va: u64, by: Initiator) {
        assert_no_guard("a miss was opened");
        self.core.open(ticket, space.0, va, by);
    }

    /// The miss is answered or given up.
    ///
    /// # Panics
    /// When `ticket` is not below [`AtcConfig::tickets`].
    pub fn close_miss(&self, ticket: usize) {
        self.core.close(ticket);
    }

    /// Whether the missed page itself was purged since the miss was opened. (A fill of a larger span can
    /// be refused although this is false.)
    #[must_use]
    pub fn miss_killed(&self, ticket: usize) -> bool {
        self.core.ticket(ticket).is_some_and(|t| {
            let first = PageSize::SIZE_4K.base(t.va);
            let last = first + (PageSize::SIZE_4K.bytes() - 1);
            t.met(t.space, Span { first, last })
        })
    }

    /// How far the purges that meet `fill`'s span have come since the miss was opened. A fault plan that
    /// wants to answer a miss too late waits for [`PurgeProgress::Finished`].
    #[must_use]
    pub fn purge_progress(&self, ticket: usize, fill: &Fill) -> PurgeProgress {
        let first = fill.size.base(fill.va);
        let last = fill.size.bytes() - 1;
        let target = Span {
            first: fill.iova,
            last: fill.iova.saturating_add(last),
        };
        let va = Span {
            first,
            last: first + last,
        };
        self.core.progress(ticket, fill.space.0, va, target)
    }

    /// Enter a translation that software looked up for the miss under `ticket`. The ticket stays open.
    ///
    /// May sleep: it takes the IOVA map's lock and makes the target's pages present (at most
    /// [`dma::POPULATE_LIMIT`] of them around the missed address) before the entry is visible.
    ///
    /// # Errors
    /// [`FillRefused`]: nothing was entered.
    ///
    /// # Panics
    /// When this thread holds a guard.
    pub fn fill(&self, ticket: usize, fill: Fill) -> Result<(), FillRefused> {
        assert_no_guard("a fill was executed");
        let Some(miss) = self.core.ticket(ticket) else {
            self.core.count_refused();
            return Err(FillRefused::NoTicket);
        };
        let va = fill.size.base(fill.va);
        self.enter(ticket, va, miss.va, &fill).map_err(|refused| {
            let FillRefused::Target(_) = refused else {
                return refused;
            };
            self.core.count_refused();
            // Software that invalidates a range and then takes its memory away has done nothing wrong, though an
            // answer that it prepared before still names that memory.
            match self.purge_progress(ticket, &fill) {
                PurgeProgress::None => refused,
                PurgeProgress::Running => FillRefused::Purging,
                PurgeProgress::Finished => FillRefused::Killed,
            }
        })
    }

    fn enter(&self, ticket: usize, va: u64, missed: u64, fill: &Fill) -> Result<(), FillRefused> {
        let size = fill.size.bytes();
        if !fill.iova.is_multiple_of(size) {
            return Err(FillRefused::Target(DmaError::Unaligned {
                what: "target IOVA",
                value: fill.iova,
                align: size,
            }));
        }
        let need = dma::Prot {
            read: true,
            write: fill.writable,
        };
        // Held until the entry is in: an unmap takes the mapping out of the table under the write lock
        // before it purges, so that purge sees the entry, or this fails.
        let target = match self.dma.resolve_for(fill.iova, size, need) {
            Err(DmaError::ByMessage { .. }) if self.by_message => {
                let target = self.dma.resolve_by_message(fill.iova, size, need)?;
                return self.core.fill(
                    ticket,
                    &Entry {
                        space: fill.space.0,
                        va,
                        shift: fill.size.shift(),
                        writable: fill.writable,
                        storable: target.prot.write,
                        host: 0,
                        iova: fill.iova,
                        tag: fill.tag,
                    },
                );
            }
            target => target?,
        };
        let focus = missed
            .checked_sub(va)
            .filter(|&offset| offset < size)
            .unwrap_or(0);
        target.populate(focus, fill.writable)?;
        self.core.fill(
            ticket,
            &Entry {
                space: fill.space.0,
                va,
                shift: fill.size.shift(),
                writable: fill.writable,
                storable: target.prot().write,
                host: target.ptr().as_ptr().expose_provenance() as u64,
                iova: fill.iova,
                tag: fill.tag,
            },
        )
    }

    /// Kill what is outstanding, clear entries, drain. When it returns no access through an old entry is
    /// running or can start. Takes no lock that can sleep, allocates nothing, makes no system call but
    /// sched_yield (counted in the report).
    ///
    /// # Panics
    /// When this thread holds a guard.
    pub fn purge(&self, what: Purge) -> PurgeReport {
        self.purge_finish(self.purge_begin(what))
    }

    /// Whether no engine is inside an access just now: a purge that begins then has hardly anybody to wait for.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.core.is_quiet()
    }

    /// First half of [`Atc::purge`]: kill and clear.
    ///
    /// # Panics
    /// When this thread holds a guard.
    pub fn purge_begin(&self, what: Purge) -> PurgeToken {
        self.purge_begin_of_size(what, None)
    }

    /// As [`Atc::purge_begin`] for a device whose purges may leave entries of another size than `only` alone. Outstanding
    /// misses are killed by overlap all the same, and memory that goes away takes every entry with it.
    ///
    /// # Panics
    /// As [`Atc::purge_begin`].
    pub fn purge_begin_of_size(&self, what: Purge, only: Option<PageSize>) -> PurgeToken {
        assert_no_guard("a purge was started");
        let only = only.map(PageSize::shift);
        let begun = self.core.begin_of_size(Reach::from(what), only, Some(what));
        if let Some(hooks) = self.hooks.get() {
            hooks.purge_begun(&what);
        }
        PurgeToken { what, begun }
    }

    /// [`Atc::purge_finish`] would have to wait for the client, as a write has been sent to it: do something else, and
    /// look again when one has been answered.
    #[must_use]
    pub fn purge_waits_for_client(&self, token: &PurgeToken) -> bool {
        self.core.waits_for_writes(&token.begun)
    }

    /// Second half of [`Atc::purge`]: wait for running accesses, and for the client if
    /// [`Atc::purge_waits_for_client`].
    ///
    /// # Panics
    /// When this thread holds a guard.
    pub fn purge_finish(&self, token: PurgeToken) -> PurgeReport {
        assert_no_guard("a purge was finished");
        let report = self.core.finish(token.begun);
        if let Some(hooks) = self.hooks.get() {
            hooks.purge_finished(&token.what, &report);
        }
        report
    }

    /// Sanitizer: software can see from now on that a purge is complete, because `who` has said so. Costs nothing
    /// without one.
    pub fn answered(&self, purge: PurgeMark, who: impl Fn() -> String) {
        if let Some(number) = purge.0 {
            self.core.tell(|shadow| shadow.complete(number, who));
        }
    }

    /// Sanitizer: from now on `holder` uses exactly these spaces; none: it is gone. As soon as this has been said
    /// once, an access of a space that nobody holds is a defect.
    pub fn holds(&self, holder: usize, spaces: &[SpaceId]) {
        if self.core.sanitized {
            self.core.tell(|shadow| shadow.holds(holder, spaces));
        }
    }

    /// Sanitizer: a defect that the model itself has found.
    pub fn told(&self, class: Defect, at: (SpaceId, u64), by: Initiator, detail: impl FnOnce() -> String) {
        if self.core.sanitized {
            self.core.told(class, at, by, detail());
        }
    }

    /// Whether [`AtcConfig::sanitize`] is on.
    #[must_use]
    pub fn is_sanitized(&self) -> bool {
        self.core.sanitized
    }

    /// What the sanitizer has found; `None` without one.
    #[must_use]
    pub fn findings(&self) -> Option<Findings> {
        self.core.findings()
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> AtcStats {
        self.core.stats()
    }

    /// Up to `max` entries, in no particular order.
    #[must_use]
    pub fn dump(&self, max: usize) -> Vec<EntryDump> {
        self.core.entries(max).iter().map(Entry::dump).collect()
    }
}

impl TargetCache for Atc {
    fn purge_target(&self, iova: Range<u64>) {
        // The map's bounds are exclusive, and its "everything" ends at u64::MAX, where nothing is mapped.
        let what = Purge::Target {
            start: iova.start,
            end: iova.end,
        };
        if self.core.purges_targets() {
            self.purge(what);
        } else {
            self.core.skip(what);
        }
    }

    fn keeps_targets(&self) -> bool {
        !self.core.purges_targets()
    }
}
