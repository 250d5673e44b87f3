//! The hop: START to the daemon through a mailbox slot, and END (see `protos::bridge::shared`).

use crate::fence;
use crate::intervals::Interval;
use crate::state::{State, cause, phase};
use crate::sys;
use protos::bridge::shared::{SLOTS, SharedTable, Slot, slot_op, slot_state};
use std::sync::atomic::{Ordering, fence as memory_fence};

/// The daemon is gone and so is the device: go on without it.
#[derive(Debug)]
pub(crate) struct GoneBy;

/// The clock of a caller that waits for the daemon.
struct Patience {
    /// [`sys::now_ms`] of the last sign of life that counts.
    since: u64,
    served: u32,
    taken: bool,
}

impl Patience {
    fn new(table: &SharedTable) -> Self {
        Self {
            since: sys::now_ms(),
            served: table.header.served.load(Ordering::Acquire),
            taken: false,
        }
    }

    /// Begin again when the daemon has served somebody else meanwhile, or has taken this request. Not after that:
    /// one request takes no longer than the fence timeout allows for.
    fn renew(&mut self, table: &SharedTable, slot: Option<&Slot>) {
        if self.taken {
            return;
        }
        let served = table.header.served.load(Ordering::Acquire);
        self.taken = slot.is_some_and(|s| s.state.load(Ordering::Acquire) == slot_state::SERVING);
        if self.taken || served != self.served {
            self.served = served;
            self.since = sys::now_ms();
        }
    }
}

// (Inlined where it waits or wakes: see `sys::syscall`.)
/// Ask for `invalidate_range_start` and wait until it has returned. The slot comes back claimed, for END.
#[inline(always)]
pub(crate) fn start(
    state: &State,
    table: &SharedTable,
    range: Interval,
    event: u32,
    generation: u64,
) -> Result<usize, GoneBy> {
    let since = sys::now_ms();
    let mut patience = Patience::new(table);
    let tid = sys::gettid();
    let index = claim(state, table, tid, &mut patience)?;
    let slot = &table.slots[index];
    slot.tid.store(tid, Ordering::Relaxed);
    loop {
        fill(slot, slot_op::START, range, event, generation);
        slot.result.store(0, Ordering::Relaxed);
        table.header.rung_slot.store(index as u32, Ordering::Relaxed);
        slot.state.store(slot_state::REQUEST, Ordering::Release);
        ring(table);
        // If nobody answers, the slot stays as it is: the daemon that could still write to it is gone, or has
        // given the table up.
        wait(state, table, slot, &mut patience)?;
        let result = slot.result.load(Ordering::Acquire);
        if result == 0 {
            state.sample_resets();
            return Ok(index);
        }
        // C4: a blockable start must succeed. Nothing may be changed after a refusal (C3), and the caller
        // cannot be refused: ask again, and fence a daemon that goes on refusing.
        if fence::overdue(state, since) {
            sys::say(format_args!(
                "the host daemon refuses an invalidation (errno {}): treating it as broken",
                -result
            ));
            fence::wait(state);
            return Err(GoneBy);
        }
        sys::futex_wait(&slot.state, slot_state::DONE, 1);
    }
}

/// Send `invalidate_range_end`; nobody waits for it, and the daemon frees the slot.
///
/// Nobody is woken for it either, unless a subscriber beside the GRU's driver is there: that driver has nothing to
/// do at an end (faults that were put off are rung for when `in_progress` is lowered), and a worker that is woken
/// here would take the processor from the caller before its call has returned. The next ring, or the worker's own
/// look, finds the slot; a subscriber that registers rings after it has raised `must_hop`.
#[inline(always)]
pub(crate) fn end(table: &SharedTable, index: usize, range: Interval, event: u32, generation: u64) {
    let slot = &table.slots[index];
    fill(slot, slot_op::END, range, event, generation);
    slot.state.store(slot_state::REQUEST_DETACHED, Ordering::Release);
    table.header.bell.fetch_add(1, Ordering::SeqCst);
    memory_fence(Ordering::SeqCst);
    if table.header.must_hop.load(Ordering::SeqCst) != 0 {
        wake_worker(table);
    }
}

/// Make the daemon look: at slots, or at faults that were put off.
#[inline(always)]
pub(crate) fn ring(table: &SharedTable) {
    table.header.bell.fetch_add(1, Ordering::SeqCst);
    memory_fence(Ordering::SeqCst);
    wake_worker(table);
}

/// After the bell was counted up, and a fence.
#[inline(always)]
fn wake_worker(table: &SharedTable) {
    if table.header.bell_sleepers.load(Ordering::SeqCst) != 0 {
        sys::futex_wake(&table.header.bell, 1);
    }
}

fn fill(slot: &Slot, op: u32, range: Interval, event: u32, generation: u64) {
    slot.op.store(op, Ordering::Relaxed);
    slot.start.store(range.start, Ordering::Relaxed);
    slot.end.store(range.end, Ordering::Relaxed);
    slot.generation.store(generation, Ordering::Relaxed);
    slot.event.store(event, Ordering::Relaxed);
    slot.sleeping.store(0, Ordering::Relaxed);
}

/// Take a free slot: each thread begins at one of its own. More than [`SLOTS`] callers wait for one.
#[inline(always)]
fn claim(state: &State, table: &SharedTable, tid: u32, patience: &mut Patience) -> Result<usize, GoneBy> {
    let preferred = tid as usize % SLOTS;
    loop {
        for i in 0..SLOTS {
            let index = (preferred + i) % SLOTS;
            if table.slots[index]
                .state
                .compare_exchange(
                    slot_state::FREE,
                    slot_state::CLAIMED,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                )
                .is_ok()
            {
                return Ok(index);
            }
        }
        patience.renew(table, None);
        look(state, table, patience.since)?;
        // Slots whose end nobody was woken for are free once a worker has looked.
        ring(table);
        // The daemon frees slots without waking anybody: look again soon.
        let slot = &table.slots[preferred].state;
        sys::futex_wait(slot, slot.load(Ordering::Relaxed), 1);
    }
}

/// Wait for DONE.
#[inline(always)]
fn wait(state: &State, table: &SharedTable, slot: &Slot, patience: &mut Patience) -> Result<(), GoneBy> {
    for _ in 0..state.spins.load(Ordering::Relaxed) {
        if slot.state.load(Ordering::Acquire) == slot_state::DONE {
            return Ok(());
        }
        std::hint::spin_loop();
    }
    let mut slept = false;
    loop {
        slot.sleeping.store(1, Ordering::SeqCst);
        memory_fence(Ordering::SeqCst);
        let seen = slot.state.load(Ordering::SeqCst);
        if seen == slot_state::DONE {
            slot.sleeping.store(0, Ordering::Relaxed);
            return Ok(());
        }
        // Not before the first sleep: it takes system calls, and the daemon's worker may wait for this processor.
        if slept {
            patience.renew(table, Some(slot));
            look(state, table, patience.since)?;
        }
        slept = true;
        state.counters.hop_sleeps.fetch_add(1, Ordering::Relaxed);
        sys::futex_wait(&slot.state, seen, 100);
        slot.sleeping.store(0, Ordering::SeqCst);
    }
}

/// Whether there is still somebody to wait for; if not, returns only when the device has stopped too.
fn look(state: &State, table: &SharedTable, since: u64) -> Result<(), GoneBy> {
    let why = if table.header.closed.load(Ordering::Acquire) != 0 {
        cause::CLOSED
    } else if state.phase() != phase::ATTACHED {
        cause::HUNG_UP
    } else if fence::daemon_dead(state) {
        cause::EXITED
    } else if fence::overdue(state, since) {
        // The clock of the fence began when this call began to wait.
        let _ = state
            .fencing_since_ms
            .compare_exchange(0, since, Ordering::AcqRel, Ordering::Acquire);
        cause::SILENT
    } else {
        return Ok(());
    };
    fence::lost(state, why);
    fence::wait(state);
    Err(GoneBy)
}
