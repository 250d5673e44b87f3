//! TLB flush handles (reference section 4): kill, clear, drain, and only then idle.
//!
//! Any engine executes any TGH, between chunks and never under a guard, and so does the thread that takes its store or
//! ring from the client. Nothing on the way sleeps or allocates, but where the client is asked for memory: a purge that
//! meets such an access takes the locks of those that wait for the client, under which an answer is copied.
//! Two TGHs that purge the same context at once are independent: each waits for its own drain. One that meets a write
//! which the client has been sent (memory without a file) stays ACTIVE until that is answered, and holds up nobody.
//!
//! Decided here (section 16): matching is by overlap, whatever the entry's page size, unless
//! [`PurgeMatch::Exact`](super::PurgeMatch) says otherwise; `n` = 1023 and any
//! `vaddrmask` but all ones purge the whole ASID (of the command's page size, where matching is exact); `ctxbitmap` is not needed (the ATC kills and drains by
//! address space, which covers every context that can use it); `delresp` is stored and never looked at.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard};

use protos::gru::tgh::{self, Control, Count, Opc, Scope, State};
use protos::gru::{HandleStatus, map, page_size};

use super::PurgeMatch;
use super::chiplet::Chiplet;
use super::hardware::Hardware;
use crate::atc::{PageSize, Purge, PurgeMark, PurgeToken, SpaceId};
use crate::faults::Injection;

/// DW0 bits that the device owns: cmd, status, state, cause.
const DEVICE_BITS: u64 = Control::new()
    .with_cmd(true)
    .with_status(HandleStatus(3))
    .with_state(State(7))
    .with_cause(7)
    .into_bits();

/// What a command purges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scoped {
    All,
    Asid(u32),
    Range(u32, Range<u64>),
}

/// Decodes the operands (DW1 to DW3).
pub(super) fn decode(vaddr: u64, scope: Scope, count: Count) -> Scoped {
    if scope.global() {
        return Scoped::All;
    }
    let shift = page_size::shift_of_code(scope.pagesize());
    let (Some(shift), tgh::VADDRMASK_ALL) = (shift, count.vaddrmask()) else {
        // Not what any known software asks for: purging too much is always safe.
        return Scoped::Asid(scope.asid());
    };
    if count.n() == tgh::N_ALL {
        return Scoped::Asid(scope.asid());
    }
    let start = vaddr >> shift << shift;
    let bytes = (u64::from(count.n()) + 1) << shift;
    Scoped::Range(scope.asid(), start..start.saturating_add(bytes))
}

/// A purge that met a write which the client has been sent: it completes when that has been answered. No engine waits
/// for that.
#[derive(Debug)]
pub(super) struct Owed {
    chiplet: usize,
    handle: usize,
    token: PurgeToken,
    /// The fault plan has answered it already.
    early: bool,
}

/// All of them: at most one for each handle.
#[derive(Debug)]
pub(super) struct Owing {
    /// Leaf lock, but for the ATC's. Room for all of them: a flush allocates nothing.
    list: Mutex<Vec<Owed>>,
    count: AtomicUsize,
}

impl Default for Owing {
    fn default() -> Self {
        Self {
            list: Mutex::new(Vec::with_capacity(map::CHIPLETS * map::TGHS)),
            count: AtomicUsize::new(0),
        }
    }
}

impl Owing {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Owed>> {
        self.list.lock().expect("no thread dies while it owes a purge")
    }

    fn put(&self, owed: Owed) {
        let mut list = self.lock();
        list.push(owed);
        self.count.store(list.len(), Ordering::SeqCst);
    }

    /// One that is `due`.
    pub(super) fn take(&self, due: impl Fn(&Owed) -> bool) -> Option<Owed> {
        let mut list = self.lock();
        let owed = list.iter().position(due).map(|at| list.swap_remove(at));
        self.count.store(list.len(), Ordering::SeqCst);
        owed
    }

    /// A reset: nobody asks the client any more.
    pub(super) fn settle_all(&self, finish: impl Fn(usize, PurgeToken)) {
        while let Some(owed) = self.take(|_| true) {
            finish(owed.chiplet, owed.token);
        }
    }
}

impl Hardware {
    /// Executes every TGH that has a command. Returns whether there was one.
    pub(super) fn tgh_scan(&self, chiplet: &Chiplet) -> bool {
        let mut worked = false;
        for handle in 0..map::TGHS {
            let control = self.memory.word(chiplet.tgh(handle) + tgh::CONTROL);
            if control.load(Ordering::Relaxed) & 1 != 0 {
                worked |= self.tgh_claim(chiplet, handle);
            }
        }
        worked
    }

    /// Whether a TGH waits for an engine. One that is claimed does not: whoever has claimed it looks again before it goes
    /// to sleep or on to something else, or has left it to [`Hardware::tgh_settle`]; and others must not take the CPU from the
    /// access that its drain waits for.
    pub(super) fn tgh_waiting(&self, chiplet: &Chiplet) -> bool {
        // Whoever has just given a claim back sees the next command, or its writer's engine sees no claim.
        fence(Ordering::SeqCst);
        let claims = chiplet.tgh_claims.load(Ordering::SeqCst);
        let commanded = |handle| {
            claims >> handle & 1 == 0
                && self
                    .memory
                    .word(chiplet.tgh(handle) + tgh::CONTROL)
                    .load(Ordering::Relaxed)
                    & 1
                    != 0
        };
        (0..map::TGHS).any(commanded)
    }

    /// In the thread that has taken a command or a ring from its client, who will look at the handle next and would
    /// otherwise wait for an engine to be woken. Not while an engine is inside an access: that is its drain's time, and
    /// others must be served meanwhile. Returns whether a command was executed.
    pub(super) fn tgh_at_once(&self, chiplet: &Chiplet) -> bool {
        if !chiplet.atc.is_quiet() {
            return false;
        }
        // A reset is under way otherwise, and takes the command with it.
        let Ok(_working) = self.quiesce.try_read() else {
            return false;
        };
        self.tgh_scan(chiplet)
    }

    fn tgh_claim(&self, chiplet: &Chiplet, handle: usize) -> bool {
        let bit = 1u32 << handle;
        if chiplet.tgh_claims.fetch_or(bit, Ordering::Acquire) & bit != 0 {
            return false;
        }
        // The other engine may have finished it between the look and the claim.
        let word = self.memory.word(chiplet.tgh(handle) + tgh::CONTROL);
        let control = Control::from_bits(word.load(Ordering::Acquire));
        if control.cmd() && !self.tgh_execute(chiplet, handle, control) {
            // The claim stays: it is finished later.
            return true;
        }
        chiplet.tgh_claims.fetch_and(!bit, Ordering::Release);
        control.cmd()
    }

    /// Finishes the TGHs that waited for the client. Returns whether there was one.
    pub(super) fn tgh_settle(&self) -> bool {
        if self.owed.count.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let mut settled = false;
        while let Some(owed) = self.owed.take(|owed| !self.tgh_is_held_up(owed)) {
            let chiplet = &self.chiplets[owed.chiplet];
            let mark = owed.token.mark();
            chiplet.atc.purge_finish(owed.token);
            self.counters.tgh_purges.bump();
            if !owed.early {
                self.tgh_answer(chiplet, owed.handle, Some(mark));
            }
            chiplet
                .tgh_claims
                .fetch_and(!(1 << owed.handle), Ordering::Release);
            settled = true;
        }
        settled
    }

    /// Whether [`Hardware::tgh_settle`] would find something.
    pub(super) fn tgh_settles(&self) -> bool {
        self.owed.count.load(Ordering::SeqCst) != 0
            && self.owed.lock().iter().any(|owed| !self.tgh_is_held_up(owed))
    }

    fn tgh_is_held_up(&self, owed: &Owed) -> bool {
        self.chiplets[owed.chiplet]
            .atc
            .purge_waits_for_client(&owed.token)
    }

    /// False: it is not finished yet, as the client has been sent a write that it meets.
    fn tgh_execute(&self, chiplet: &Chiplet, handle: usize, control: Control) -> bool {
        let base = chiplet.tgh(handle);
        let word = self.memory.word(base + tgh::CONTROL);
        if control.opc() == Opc::TLBINV {
            let operand = |offset| self.memory.word(base + offset).load(Ordering::Relaxed);
            let scope = Scope::from_bits(operand(tgh::SCOPE));
            let scoped = decode(operand(tgh::VADDR), scope, Count::from_bits(operand(tgh::COUNT)));
            let purge = match &scoped {
                Scoped::All => Purge::All,
                Scoped::Asid(asid) => Purge::Space(SpaceId(u64::from(*asid))),
                Scoped::Range(asid, range) => Purge::Range {
                    space: SpaceId(u64::from(*asid)),
                    start: range.start,
                    end: range.end,
                },
            };
            word.fetch_or(
                Control::new().with_state(State::WAITDONE).into_bits(),
                Ordering::Relaxed,
            );
            let exact = self.config.purge_match == PurgeMatch::Exact;
            let only = page_size::shift_of_code(scope.pagesize())
                .and_then(PageSize::new)
                .filter(|_| exact && !scope.global());
            let token = chiplet.atc.purge_begin_of_size(purge, only);
            let mark = token.mark();
            let early = self.injector.strikes(Injection::EarlyCompletion).is_some();
            if early {
                self.tgh_answer(chiplet, handle, Some(mark));
            }
            if token.report().asked > 0 {
                // Takes a lock, but only in the company of a client that is asked: whoever waits for it misses again.
                self.dma.recheck_messages();
            }
            if chiplet.atc.purge_waits_for_client(&token) {
                self.owed.put(Owed {
                    chiplet: chiplet.index,
                    handle,
                    token,
                    early,
                });
                return false;
            }
            let report = chiplet.atc.purge_finish(token);
            self.counters.tgh_purges.bump();
            tracing::trace!(chiplet = chiplet.index, handle, ?scoped, ?report, "TLBINV");
            if !early {
                self.tgh_answer(chiplet, handle, Some(mark));
            }
            return true;
        }
        self.tgh_answer(chiplet, handle, None);
        true
    }

    /// Everything that the purge promises is done before software can see idle. An atomic AND: software's delresp may
    /// change under us, everything else is set absolutely.
    fn tgh_answer(&self, chiplet: &Chiplet, handle: usize, purge: Option<PurgeMark>) {
        let word = self.memory.word(chiplet.tgh(handle) + tgh::CONTROL);
        let injected = self.injector.strikes(Injection::WrongStatus);
        let status = injected.map_or(HandleStatus::IDLE, |_| HandleStatus::EXCEPTION);
        self.watch_tgh(chiplet, handle, purge, status);
        fence(Ordering::Release);
        if let Some(count) = injected {
            let wrong = Control::new()
                .with_status(status)
                .with_cause((count % 7) as u8)
                .into_bits();
            let answered = |word: u64| Some(word & !DEVICE_BITS | wrong);
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, answered);
            return;
        }
        word.fetch_and(!DEVICE_BITS, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(n: u16) -> Count {
        Count::new().with_vaddrmask(tgh::VADDRMASK_ALL).with_n(n)
    }

    #[test]
    fn test_decode_when_range_is_small_covers_whole_pages() {
        let scope = Scope::new().with_asid(9);
        assert_eq!(decode(0x1234, scope, count(1)), Scoped::Range(9, 0x1000..0x3000));
        let huge = scope.with_pagesize(5);
        assert_eq!(
            decode(0x20_0000, huge, count(0)),
            Scoped::Range(9, 0x20_0000..0x40_0000)
        );
        let top = decode(u64::MAX - 4095, scope, count(9));
        assert_eq!(top, Scoped::Range(9, u64::MAX - 4095..u64::MAX));
    }

    #[test]
    fn test_decode_when_n_is_1023_purges_the_whole_asid() {
        let scope = Scope::new().with_asid(9);
        assert_eq!(decode(0x5000, scope, count(1023)), Scoped::Asid(9));
        assert_eq!(
            decode(0x5000, scope, Count::new().with_n(3)),
            Scoped::Asid(9),
            "mask"
        );
        assert_eq!(
            decode(0x5000, scope.with_pagesize(31), count(3)),
            Scoped::Asid(9),
            "size"
        );
        assert_eq!(decode(0, scope.with_global(true), count(0)), Scoped::All);
    }
}
