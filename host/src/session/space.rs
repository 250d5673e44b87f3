//! One application's address space, as everything in a session sees it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock, RwLock, Weak};
use std::time::{Duration, Instant};

use protos::bridge::shared::SharedTable;
use tokio::sync::watch;

use super::held::HeldPages;
use super::identity::FileId;
use super::memory::UsedFile;
use super::refusal::Refusal;
use crate::mm::{Access, Busy, ChangeGuard, ChangeLog, FillTable, Lookup, MappedTable, MmCache, Vma};
use crate::notifier::{Chain, Ctx, Event, MaySleep, NotifierRange, StartError, Started, Unrecorded};
use crate::subscribers::{HeldMemory, Paused, Reclaimer, Xpmem};
use crate::uffd::SafetyNetStats;

/// Longest wait for the covered calls that were silent when a subscriber joins. A system call over the largest
/// mapping takes a fraction of it.
pub const LONGEST_SILENT_CALLS: Duration = Duration::from_secs(5);

/// What is counted about faults.
#[derive(Debug, Default)]
pub struct FaultStats {
    /// Answered with a page.
    pub served: AtomicU64,
    /// Of those, with a page larger than 4 KiB.
    pub served_large: AtomicU64,
    /// Put off: the range was being changed.
    pub deferred: AtomicU64,
    /// Refused: nothing is mapped there.
    pub refused_unmapped: AtomicU64,
    /// Refused: mapped, but not for that access.
    pub refused_protection: AtomicU64,
    /// Refused: mapped, but not shared memory that the session knows.
    pub refused_private: AtomicU64,
    /// Refused: the address space has ended, or could not be asked.
    pub refused_ended: AtomicU64,
}

/// What is counted about an address space.
#[derive(Debug, Default)]
pub struct SpaceStats {
    /// Faults.
    pub faults: FaultStats,
    /// Events that nobody had announced.
    pub safety_net: SafetyNetStats,
    /// Blockable starts that failed (a subscriber's bug).
    pub starts_failed: AtomicU64,
}

/// An application's address space: the shared table, the chain, what is cached, which memory is known.
#[derive(Debug)]
pub struct AddressSpace {
    id: u32,
    pid: u32,
    table: Arc<MappedTable>,
    chain: Arc<Chain>,
    fills: Arc<FillTable>,
    cache: MmCache,
    gru: OnceLock<Weak<driver::gru::Mm>>,
    xpmem: Arc<Xpmem>,
    /// Where the device holds pages: those, and the subscriber that takes them away.
    held: OnceLock<(Arc<HeldPages>, Arc<HeldMemory>)>,
    reclaimer: OnceLock<Arc<Reclaimer>>,
    /// What a device that checks itself is told.
    changes: OnceLock<Arc<ChangeLog>>,
    /// Read by faults; written when memory is added. Never held during a message to the device.
    files: RwLock<HashMap<FileId, Arc<UsedFile>>>,
    /// Faults that wait for a change to end, as this daemon counts them (the table's word belongs to both).
    deferred: AtomicU32,
    next_file: AtomicU32,
    /// Subscribers other than the GRU driver: their translations are not in `fills`.
    others: AtomicU32,
    /// Set once the session cannot go on, with the reason.
    ended: watch::Sender<Option<String>>,
    /// Figures.
    pub stats: SpaceStats,
}

impl AddressSpace {
    /// An empty address space over its table.
    #[must_use]
    pub fn new(id: u32, pid: u32, fills: Arc<FillTable>, cache: MmCache, xpmem: Arc<Xpmem>) -> Arc<Self> {
        Arc::new(Self {
            id,
            pid,
            table: fills.table().clone(),
            chain: Chain::new(),
            fills,
            cache,
            gru: OnceLock::new(),
            xpmem,
            held: OnceLock::new(),
            reclaimer: OnceLock::new(),
            changes: OnceLock::new(),
            files: RwLock::default(),
            deferred: AtomicU32::new(0),
            next_file: AtomicU32::new(1),
            others: AtomicU32::new(0),
            ended: watch::Sender::new(None),
            stats: SpaceStats::default(),
        })
    }

    /// The session's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The application's pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The table that is shared with the application.
    #[must_use]
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// The same, for who has to pass it on.
    #[must_use]
    pub fn mapped_table(&self) -> &Arc<MappedTable> {
        &self.table
    }

    /// The notifier chain.
    #[must_use]
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The exact set of pages that devices may cache.
    #[must_use]
    pub fn fills(&self) -> &Arc<FillTable> {
        &self.fills
    }

    /// What is mapped where.
    #[must_use]
    pub fn cache(&self) -> &MmCache {
        &self.cache
    }

    /// The sleeping subscriber: processes that have attached memory of this application.
    #[must_use]
    pub fn xpmem(&self) -> &Arc<Xpmem> {
        &self.xpmem
    }

    /// The reclaimer, once the application has offered memory.
    #[must_use]
    pub fn reclaimer(&self) -> Option<&Arc<Reclaimer>> {
        self.reclaimer.get()
    }

    /// The reclaimer, made now if need be. The caller has raised `must_hop` before the first.
    pub fn reclaimer_or_init(&self, seed: u64) -> &Arc<Reclaimer> {
        self.reclaimer.get_or_init(|| {
            let seed = seed ^ u64::from(self.id);
            let mut reclaimer = Reclaimer::new(self.chain.clone(), self.table.clone(), seed);
            if let Some(changes) = self.changes.get() {
                reclaimer.publish_to(changes.clone(), self.id);
            }
            Arc::new(reclaimer)
        })
    }

    /// Names the GRU driver's side of this address space, whose deferred misses are to be retried.
    ///
    /// # Panics
    /// When called twice.
    pub fn set_gru(&self, gru: &Arc<driver::gru::Mm>) {
        assert!(
            self.gru.set(Arc::downgrade(gru)).is_ok(),
            "one GRU address space a session"
        );
    }

    /// The device looks at a log of changes.
    ///
    /// # Panics
    /// When called twice.
    pub fn set_changes(&self, changes: Arc<ChangeLog>) {
        assert!(self.changes.set(changes).is_ok(), "one device a session");
    }

    /// A change is over, as far as devices are concerned: nobody may use a translation of `[start, end)` from before
    /// `generation`. Said before the application hears of it. Neither sleeps nor allocates.
    pub fn publish_change(&self, start: u64, end: u64, generation: u64) {
        if let Some(changes) = self.changes.get() {
            changes.publish(self.id, (start, end), generation);
        }
    }

    /// The device holds pages.
    ///
    /// # Panics
    /// When called twice.
    pub fn set_held(&self, pages: Arc<HeldPages>, memory: Arc<HeldMemory>) {
        assert!(self.held.set((pages, memory)).is_ok(), "one device a session");
    }

    /// The pages that the device holds, if it is one that does.
    #[must_use]
    pub fn held(&self) -> Option<&Arc<HeldPages>> {
        self.held.get().map(|(pages, _)| pages)
    }

    /// An unannounced discard of `[start, end)` has been reported: takes away what the device holds of it.
    pub fn drop_held(&self, start: u64, end: u64) {
        if let Some((pages, memory)) = self.held.get() {
            pages.unannounced(memory.begin(start, end));
        }
    }

    /// Runs `invalidate_range_start` of the chain. What it took is to be recorded by the caller, once it has answered.
    ///
    /// # Errors
    /// An errno: EINVAL for an empty range, EAGAIN for a refused non-blockable start, EIO when a subscriber
    /// broke C4.
    pub fn start(&self, range: NotifierRange, token: &MaySleep) -> Result<(Started, Unrecorded), i32> {
        // What is unmapped is nobody's to discard any more; what is mapped there next was not offered.
        if range.event == Event::Unmap
            && range.end != u64::MAX
            && let Some(reclaimer) = self.reclaimer.get()
        {
            reclaimer.forget(range.start, range.end, token);
        }
        self.chain
            .start_and_record_later(range, Ctx::MaySleep(token))
            .map_err(|error| match error {
                StartError::Empty { .. } => libc::EINVAL,
                StartError::Again { .. } => libc::EAGAIN,
                StartError::Broken { .. } => {
                    self.stats.starts_failed.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(session = self.id, %error, "the chain could not start");
                    libc::EIO
                }
            })
    }

    /// Blocks fills of the whole space and raises the generation, until the guard is dropped.
    pub fn block_fills(&self) -> ChangeGuard {
        self.table.begin_change(0, u64::MAX)
    }

    /// Whether no subscriber can have a translation. Only meaningful while fills are blocked.
    #[must_use]
    pub fn nothing_cached(&self) -> bool {
        fence(Ordering::SeqCst);
        let fills = self.fills.stats();
        fills.cached_pages == 0 && !fills.overflowed && self.others.load(Ordering::SeqCst) == 0
    }

    /// Stops the reclaimer for a change whose range is not known yet.
    pub fn pause_reclaimer(&self, token: &MaySleep) -> Option<Paused<'_>> {
        self.reclaimer.get().map(|reclaimer| reclaimer.pause(token))
    }

    /// What is mapped at `va` for that access, and the generation that the answer stands for.
    ///
    /// # Errors
    /// EAGAIN while the range is being changed, EFAULT when nothing (allowed) is mapped, ESHUTDOWN when the
    /// address space has ended.
    pub fn mapping_at(&self, va: u64, access: Access) -> Result<(Vma, u64), Refusal> {
        let again = || Refusal::new(libc::EAGAIN, format!("{va:#x} is being changed; ask again"));
        let permit = self.fills.begin_fill(va, 12).map_err(|busy| match busy {
            Busy::InProgress => again(),
            Busy::Closed => Refusal::new(libc::ESHUTDOWN, "the session has ended"),
        })?;
        match self.cache.lookup(va, access, &permit) {
            Ok(Lookup::Mapped(vma)) => Ok((vma, permit.generation())),
            Ok(Lookup::Busy) => Err(again()),
            Ok(Lookup::NotMapped) => Err(Refusal::new(
                libc::EFAULT,
                format!("nothing is mapped at {va:#x}"),
            )),
            Ok(Lookup::Denied(_)) => Err(Refusal::new(
                libc::EFAULT,
                format!("{va:#x} is mapped without that right"),
            )),
            Err(error) => Err(Refusal::new(
                libc::ESHUTDOWN,
                format!("the application's mappings: {error}"),
            )),
        }
    }

    /// Makes every covered call hop from now on, for a subscriber that is about to join, and waits until the
    /// calls that have told nobody are over (S10). Undone by [`Self::lower_must_hop`].
    ///
    /// # Errors
    /// EBUSY when they are not over within [`LONGEST_SILENT_CALLS`].
    pub fn join(&self, _token: &MaySleep) -> Result<(), Refusal> {
        self.raise_must_hop();
        let deadline = Instant::now() + LONGEST_SILENT_CALLS;
        // A word that the agent lowers without telling anybody: looked at until it is zero once.
        while self.silent_calls() != 0 {
            if Instant::now() > deadline {
                self.lower_must_hop();
                return Err(Refusal::new(
                    libc::EBUSY,
                    "the application's calls in progress do not end; try again, or see whether it is stopped",
                ));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Declares that a fault is put off. The caller looks at the range once more after this: a change that
    /// ended before it was declared rings for nobody.
    pub fn defer_fault(&self) {
        self.table.header.fault_waiters.fetch_add(1, Ordering::SeqCst);
        self.deferred.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Takes a [`Self::defer_fault`] back.
    pub fn undefer_fault(&self) {
        let one = self
            .deferred
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        // 0: a retry has taken it meanwhile, and has lowered the table's word for it.
        if one.is_ok() {
            self.table.header.fault_waiters.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether a fault is put off.
    #[must_use]
    pub fn faults_are_deferred(&self) -> bool {
        self.deferred.load(Ordering::SeqCst) != 0
    }

    /// Looks again at every fault that was put off. Those whose range is still being changed are put off
    /// again. Neither sleeps nor allocates.
    pub fn retry_deferred(&self) {
        if self.deferred.load(Ordering::SeqCst) == 0 {
            return;
        }
        let waiters = self.deferred.swap(0, Ordering::SeqCst);
        self.table
            .header
            .fault_waiters
            .fetch_sub(waiters, Ordering::SeqCst);
        if let Some(gru) = self.gru.get().and_then(Weak::upgrade) {
            gru.retry_deferred();
        }
    }

    /// Wakes the mailbox workers.
    pub fn ring(&self) {
        self.table.ring();
        // Unconditionally as well: `bell_sleepers` is the application's to spoil.
        let _ = rustix::thread::futex::wake(
            &self.table.header.bell,
            rustix::thread::futex::Flags::empty(),
            i32::MAX as u32,
        );
    }

    /// A subscriber other than the GRU driver is about to register: from now on every covered call hops.
    /// Returns without waiting for the silent calls that are under way; see [`Self::silent_calls`].
    pub fn raise_must_hop(&self) {
        self.others.fetch_add(1, Ordering::SeqCst);
        self.table.header.must_hop.fetch_add(1, Ordering::SeqCst);
        // Pairs with the agent's fence between raising silent_calls and reading must_hop.
        fence(Ordering::SeqCst);
        // Ends that nobody was woken for: they are waited for by whoever registers now.
        self.ring();
    }

    /// The opposite of [`Self::raise_must_hop`], after the subscriber is gone.
    pub fn lower_must_hop(&self) {
        self.table.header.must_hop.fetch_sub(1, Ordering::SeqCst);
        self.others.fetch_sub(1, Ordering::SeqCst);
    }

    /// Covered calls that are under way and have told nobody. A subscriber that registers waits until this
    /// has been zero once after [`Self::raise_must_hop`] (S10).
    #[must_use]
    pub fn silent_calls(&self) -> u32 {
        self.table.header.silent_calls.load(Ordering::SeqCst)
    }

    /// A file that the session knows.
    #[must_use]
    pub fn file(&self, id: FileId) -> Option<Arc<UsedFile>> {
        self.files
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .get(&id)
            .cloned()
    }

    /// Makes a file known (or known with more bytes).
    pub fn put_file(&self, file: UsedFile) {
        self.files
            .write()
            .unwrap_or_else(|e| e.into_inner())
            .insert(file.id, Arc::new(file));
    }

    /// A number for a file that is not known yet.
    pub fn next_file_number(&self) -> u32 {
        self.next_file.fetch_add(1, Ordering::Relaxed)
    }

    /// How many files are known.
    #[must_use]
    pub fn file_count(&self) -> usize {
        self.files.read().unwrap_or_else(|e| e.into_inner()).len()
    }

    /// Forgets every file, and says which they were.
    #[must_use]
    pub fn take_files(&self) -> Vec<FileId> {
        let mut files = self.files.write().unwrap_or_else(|e| e.into_inner());
        files.drain().map(|(id, _)| id).collect()
    }

    /// Gives the session up: the daemon tears it down. The first reason counts. The agent is told when its
    /// last translation is gone, not before: until then its calls have to be answered.
    pub fn end(&self, reason: impl Into<String>) {
        self.ended.send_if_modified(|now| {
            let first = now.is_none();
            if first {
                *now = Some(reason.into());
            }
            first
        });
    }

    /// Whether [`Self::end`] has been called.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// To wait for [`Self::end`].
    #[must_use]
    pub fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.subscribe()
    }
}
