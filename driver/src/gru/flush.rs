//! TGH: removing translations (section 4).
//!
//! Nothing here takes a lock that sleeps, allocates, or logs before the device is known to be gone. What an
//! address space has on a chiplet is one atomic word ([`super::asid::Tracker`]). A context's bit is in that
//! word before the context can miss for the first time; so a flush that does not see the bit began before
//! any miss of the context, and the pager of that miss sees the invalidation that the flush belongs to:
//! caller: "in progress" raised, fence, word read; loader: bit set, fence, "in progress" read.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::Instant;

use protos::gru::map::{self, CHIPLETS, TGHS};
use protos::gru::{HandleStatus, cch, tgh};

use super::asid::Track;
use super::core::{Core, Patience, handle};
use super::error::{GruError, HandleKind};
use super::mm::Space;
use super::window::Device;

const PAGE_SHIFT: u32 = 12;

/// One TLBINV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Operation {
    vaddr: u64,
    scope: tgh::Scope,
    count: tgh::Count,
    contexts: u16,
}

impl Operation {
    /// Pages of 4 KiB from `start` (its region's ASID) to `end`; more than 1023 pages = the whole ASID.
    fn range(track: Track, start: u64, end: u64) -> Self {
        let first = start >> PAGE_SHIFT;
        let last = (end - 1) >> PAGE_SHIFT;
        let n = (last - first).min(u64::from(tgh::N_ALL));
        Self {
            vaddr: first << PAGE_SHIFT,
            scope: tgh::Scope::new().with_asid(track.asid + cch::region_of(start) as u32),
            count: tgh::Count::new()
                .with_vaddrmask(tgh::VADDRMASK_ALL)
                .with_n(n as u16),
            contexts: track.contexts,
        }
    }

    /// One ASID.
    fn asid(track: Track, region: u32) -> Self {
        Self {
            vaddr: u64::from(region) << 61,
            scope: tgh::Scope::new().with_asid(track.asid + region),
            count: tgh::Count::new()
                .with_vaddrmask(tgh::VADDRMASK_ALL)
                .with_n(tgh::N_ALL),
            contexts: track.contexts,
        }
    }

    /// Everything (section 4: global, page size code 1, n 1023, all contexts).
    fn global() -> Self {
        Self {
            vaddr: 0,
            scope: tgh::Scope::new().with_global(true).with_pagesize(1),
            count: tgh::Count::new()
                .with_vaddrmask(tgh::VADDRMASK_ALL)
                .with_n(tgh::N_ALL),
            contexts: u16::MAX,
        }
    }
}

/// This thread's TGH: threads spread over the handles, so a claim rarely meets another.
fn own_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    OWN.with(|own| {
        if own.get() == usize::MAX {
            own.set(NEXT.fetch_add(1, Ordering::Relaxed) % TGHS);
        }
        own.get()
    })
}

/// A TLBINV that runs.
#[derive(Debug)]
struct Running {
    chiplet: usize,
    index: usize,
    device: Device,
}

/// Claims a handle and starts the operation; `None` when the device is gone.
fn start(core: &Core, chiplet: usize, op: Operation) -> Option<Running> {
    if core.is_known_gone() {
        return None;
    }
    let claims = &core.chiplets[chiplet].claims;
    let own = own_index();
    let mut patience = Patience::new(HandleKind::Tgh, chiplet, own);
    let index = loop {
        if let Some(index) = claims.try_take(own) {
            break index;
        }
        if patience.pause(core, None) {
            return None;
        }
    };
    patience.account(core);
    // A transport that fails here is no reason to return: the device may still be running. Only its end is.
    let device = loop {
        match store(core, chiplet, index, op) {
            Ok(device) => break device,
            Err(e) if patience.pause(core, Some(e.kind())) => {
                claims.put(index);
                return None;
            }
            Err(_) => {}
        }
    };
    core.window.counters.tgh_operations.one();
    Some(Running {
        chiplet,
        index,
        device,
    })
}

fn store(core: &Core, chiplet: usize, index: usize, op: Operation) -> io::Result<Device> {
    let at = handle(chiplet, map::TGH, index);
    core.window.store(at + tgh::VADDR, op.vaddr)?;
    core.window.store(at + tgh::SCOPE, op.scope.into_bits())?;
    core.window.store(at + tgh::COUNT, op.count.into_bits())?;
    core.window.store(at + tgh::CTXBITMAP, u64::from(op.contexts))?;
    // The whole word: nothing of it survives from the last use, and status is ACTIVE before the device
    // looks, so that a poll never sees a stale IDLE (section 2).
    let go = tgh::Control::new()
        .with_cmd(true)
        .with_opc(tgh::Opc::TLBINV)
        .with_status(HandleStatus::ACTIVE);
    core.window.start(at + tgh::CONTROL, go.into_bits())
}

/// Waits for the device's answer, or its end.
fn finish(core: &Core, running: Running) {
    let answer = core.wait(HandleKind::Tgh, running.chiplet, running.index, running.device);
    core.chiplets[running.chiplet].claims.put(running.index);
    if let Ok(word) = answer {
        let control = tgh::Control::from_bits(word);
        // A refused TLBINV means that driver and device disagree about the handle: going on would leave
        // stale translations behind.
        assert!(
            control.status() == HandleStatus::IDLE,
            "TLBINV refused: {control:?}"
        );
    }
}

/// One operation, from claim to answer.
fn run(core: &Core, chiplet: usize, op: Operation) {
    if let Some(running) = start(core, chiplet, op) {
        finish(core, running);
    }
}

/// What is to be done about a chiplet: `None` when the address space has nothing there (any more).
fn loaded(core: &Core, space: &Space, chiplet: usize) -> Option<Track> {
    let tracker = &space.trackers[chiplet];
    loop {
        let track = tracker.get();
        if track.contexts != 0 {
            return Some(track);
        }
        if track.asid == 0 {
            return None;
        }
        // No context: what the TLB holds of the ASID is out of reach once the number is forgotten. A load
        // that comes at the same moment makes the exchange fail, or gets a new number (section 11).
        if tracker.replace(track, Track { asid: 0, ..track }) {
            core.window.counters.flushes_by_dropping_asid.one();
            return None;
        }
    }
}

/// Flush of `[start, end)`.
pub(crate) fn range(core: &Core, space: &Space, start_va: u64, end_va: u64) {
    if start_va >= end_va {
        return;
    }
    let (first, last) = (cch::region_of(start_va), cch::region_of(end_va - 1));
    timed(core, || {
        for region in first..=last {
            // One operation covers one region only: the ASID is that of its start (section 4).
            let low = start_va.max((region as u64) << 61);
            let high = if region == last {
                end_va
            } else {
                (region as u64 + 1) << 61
            };
            on_each_chiplet(core, space, |track| Operation::range(track, low, high));
        }
    });
}

/// Flush of everything that an address space has.
pub(crate) fn all(core: &Core, space: &Space) {
    timed(core, || {
        fence(Ordering::SeqCst);
        let regions = space.regions.load(Ordering::SeqCst);
        for region in (0..cch::REGIONS as u32).filter(|r| regions >> r & 1 != 0) {
            on_each_chiplet(core, space, |track| Operation::asid(track, region));
        }
    });
}

/// The ASID of one chiplet, all used regions; used when its last context goes or its number changes.
pub(crate) fn asid(core: &Core, space: &Space, chiplet: usize) {
    let track = space.trackers[chiplet].get();
    if track.asid == 0 {
        return;
    }
    let regions = space.regions.load(Ordering::SeqCst);
    for region in (0..cch::REGIONS as u32).filter(|r| regions >> r & 1 != 0) {
        run(core, chiplet, Operation::asid(track, region));
    }
}

/// Every entry of a chiplet.
pub(crate) fn everything(core: &Core, chiplet: usize) -> Result<(), GruError> {
    core.window.counters.tgh_global.one();
    run(core, chiplet, Operation::global());
    if core.is_gone() {
        Err(GruError::DeviceGone)
    } else {
        Ok(())
    }
}

/// Starts on every chiplet first, then waits: the chiplets work side by side. Handles are claimed in
/// ascending order of chiplets by everybody, and whoever has all of its claims needs no other.
fn on_each_chiplet(core: &Core, space: &Space, op: impl Fn(Track) -> Operation) {
    fence(Ordering::SeqCst);
    let running: [Option<Running>; CHIPLETS] = std::array::from_fn(|chiplet| {
        let track = loaded(core, space, chiplet)?;
        start(core, chiplet, op(track))
    });
    for running in running.into_iter().flatten() {
        finish(core, running);
    }
}

fn timed(core: &Core, work: impl FnOnce()) {
    let since = Instant::now();
    work();
    let ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let counters = &core.window.counters;
    counters.flushes.one();
    counters.flush_total_ns.add(ns);
    counters.flush_max_ns.max(ns);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACK: Track = Track {
        asid: 0x40,
        contexts: 0b101,
        generation: 1,
    };

    #[test]
    fn test_operation_when_range_is_unaligned_covers_every_touched_page() {
        let op = Operation::range(TRACK, 0x1fff, 0x3001);
        assert_eq!((op.vaddr, op.count.n()), (0x1000, 2));
        let op = Operation::range(TRACK, 0x1000, 0x2000);
        assert_eq!((op.vaddr, op.count.n()), (0x1000, 0));
    }

    #[test]
    fn test_operation_when_range_is_long_means_everything() {
        // 1023 pages still fit (n = 1022); from 1024 pages on n is 1023, which the device takes for all.
        assert_eq!(Operation::range(TRACK, 0, 1023 << 12).count.n(), 1022);
        for pages in [1024u64, 1025, 1 << 30] {
            assert_eq!(Operation::range(TRACK, 0, pages << 12).count.n(), tgh::N_ALL);
        }
        assert_eq!(Operation::range(TRACK, 0, u64::MAX).count.n(), tgh::N_ALL);
    }

    #[test]
    fn test_operation_when_built_names_asid_and_contexts_of_the_reference() {
        let op = Operation::range(TRACK, 3 << 61, (3 << 61) + 4096);
        assert_eq!((op.scope.asid(), op.contexts), (0x43, 0b101));
        assert_eq!(op.count.vaddrmask(), tgh::VADDRMASK_ALL);
        let op = Operation::global();
        assert!(op.scope.global());
        assert_eq!(
            (op.scope.pagesize(), op.count.n(), op.contexts),
            (1, tgh::N_ALL, u16::MAX)
        );
    }
}
