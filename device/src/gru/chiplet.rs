//! One chiplet: its contexts, control-block resources and TLB.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use protos::gru::{cch, map};

use super::Regions;
use super::cch::Configuration;
use crate::atc::Atc;

/// What a CBR is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nothing, until software sets icmd.
    Idle,
    /// An instruction can make progress.
    Ready,
    /// A fault-map miss waits for its TFH.
    MissFmm,
    /// A user-polling miss waits for its TFH.
    MissUpm,
    /// EPOLL or NPOLL: memory does not say yet what it waits for.
    Polling,
    /// An instruction can make progress, but has to ask the client for its memory: a courier's work.
    Asking,
}

impl Phase {
    fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Idle,
            1 => Self::Ready,
            2 => Self::MissFmm,
            3 => Self::MissUpm,
            4 => Self::Polling,
            5 => Self::Asking,
            other => unreachable!("a phase is stored by this module only, found {other}"),
        }
    }

    /// A miss is outstanding.
    pub(super) fn is_miss(self) -> bool {
        matches!(self, Self::MissFmm | Self::MissUpm)
    }
}

/// What only the holder of a CBR's lock touches.
#[derive(Debug)]
pub(super) struct CbrState {
    /// Smallest fill tag that the running instruction has used.
    pub(super) tag: u64,
    /// How long a polling CBR rests before its next look.
    pub(super) rest: Duration,
}

impl CbrState {
    const NEW: Self = Self {
        tag: u64::MAX,
        rest: Duration::ZERO,
    };
}

/// A control-block resource. Its instruction's progress lives in the CBE (so that it survives a save and
/// restore by software); here is only what has no place there.
#[derive(Debug)]
pub(super) struct Cbr {
    /// Engines and connections take it with `try_lock` only: who does not get it leaves the work to the next look, so none
    /// of them ever sleeps on another's chunk. A courier holds it while it waits for the client, and takes what the ATC
    /// and DMA take under it.
    pub(super) state: Mutex<CbrState>,
    /// Changed only under `state`; read without it to skip quickly.
    phase: AtomicU8,
    /// A fill is being held back by the fault plan: the TFH is not looked at.
    pub(super) held: AtomicBool,
    /// A courier is at it.
    pub(super) courier: AtomicBool,
    /// [`Phase::Polling`], or held up by the fault plan: the device's time (nanoseconds) before which the CBR rests.
    pub(super) rests_until: AtomicU64,
}

impl Cbr {
    pub(super) fn phase(&self) -> Phase {
        Phase::from_bits(self.phase.load(Ordering::Acquire))
    }
    /// The holder of the lock moves on.
    pub(super) fn set_phase(&self, _held: &mut CbrState, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }
    /// Back to the state after a reset; engines are stopped.
    pub(super) fn clear(&self) {
        let mut state = self.state.lock().expect("an engine died inside an instruction");
        *state = CbrState::NEW;
        self.set_phase(&mut state, Phase::Idle);
        self.rests_until.store(0, Ordering::SeqCst);
        self.held.store(false, Ordering::SeqCst);
    }
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, CbrState>> {
        match self.state.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::WouldBlock) => None,
            Err(std::sync::TryLockError::Poisoned(_)) => panic!("an engine died inside an instruction"),
        }
    }
}

/// A context as engines see it: everything is set while the context is stopped.
#[derive(Debug, Default)]
pub(super) struct Context {
    /// Engines may run it.
    open: AtomicBool,
    /// Engines that are inside it.
    running: AtomicU32,
    /// Fault-map misses that nobody has answered yet.
    pub(super) fault_map_misses: AtomicU32,
    /// CCH DW0 as of the last START: enables and tlb_int_select.
    pub(super) control: AtomicU64,
    /// CBR allocation map.
    pub(super) cbr_map: AtomicU64,
    /// DSR allocation map.
    pub(super) dsr_map: AtomicU32,
    /// Address-space ids by region.
    pub(super) asid: [AtomicU32; cch::REGIONS],
    /// Page-size codes that may be entered, by region.
    pub(super) sizeavail: [AtomicU32; cch::REGIONS],
}

impl Context {
    /// Enters the context, or not if it is stopped. INTERRUPT closes the gate and then waits for those inside:
    /// both sides write their word, fence, read the other's.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        if !self.open.load(Ordering::Relaxed) {
            return None;
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        let inside = Inside(self);
        self.open.load(Ordering::SeqCst).then_some(inside)
    }
    pub(super) fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
    }
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }
    /// Nobody is inside and no fault-map miss is unserved (section 17.4).
    pub(super) fn is_quiet(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0 && self.fault_map_misses.load(Ordering::SeqCst) == 0
    }
    pub(super) fn control(&self) -> cch::Control {
        cch::Control::from_bits(self.control.load(Ordering::Relaxed))
    }
    pub(super) fn cbs(&self) -> usize {
        map::cbs_of(self.cbr_map.load(Ordering::Relaxed))
    }
    pub(super) fn ds_bytes(&self) -> u64 {
        u64::from(self.dsr_map.load(Ordering::Relaxed).count_ones()) * map::DSR_AU as u64
    }
    pub(super) fn asid_of(&self, va: u64, regions: Regions) -> u32 {
        self.asid[regions.of(va)].load(Ordering::Relaxed)
    }
    /// Back to the state after a reset.
    pub(super) fn clear(&self) {
        self.set_open(false);
        self.fault_map_misses.store(0, Ordering::SeqCst);
        self.control.store(0, Ordering::Relaxed);
        self.cbr_map.store(0, Ordering::Relaxed);
        self.dsr_map.store(0, Ordering::Relaxed);
        for region in 0..cch::REGIONS {
            self.asid[region].store(0, Ordering::Relaxed);
            self.sizeavail[region].store(0, Ordering::Relaxed);
        }
    }
}

/// Proof that INTERRUPT waits for the holder.
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Context);

impl Inside<'_> {
    /// INTERRUPT wants the context: leave soon.
    pub(super) fn must_leave(&self) -> bool {
        !self.0.is_open()
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One chiplet.
#[derive(Debug)]
pub(super) struct Chiplet {
    pub(super) index: usize,
    pub(super) atc: Arc<Atc>,
    pub(super) contexts: [Context; map::CONTEXTS],
    pub(super) cbrs: Vec<Cbr>,
    /// Contexts between ALLOCATE and DEALLOCATE.
    pub(super) allocated: AtomicU32,
    /// Contexts that engines look at.
    pub(super) active: AtomicU32,
    /// CBRs of allocated contexts.
    pub(super) allocated_cbrs: [AtomicU64; 2],
    /// CBRs with an outstanding miss.
    pub(super) missing: [AtomicU64; 2],
    /// TGHs that some engine executes.
    pub(super) tgh_claims: AtomicU32,
    /// CCH commands that could not be finished at once.
    pub(super) pending_cch: AtomicU32,
    /// Context states and pending commands. Held for a few stores, never while waiting. Before a CBR's lock.
    pub(super) configuration: Mutex<Configuration>,
}

impl Chiplet {
    pub(super) fn new(index: usize, atc: Arc<Atc>) -> Self {
        let cbr = |_| Cbr {
            state: Mutex::new(CbrState::NEW),
            phase: AtomicU8::new(Phase::Idle as u8),
            held: AtomicBool::new(false),
            courier: AtomicBool::new(false),
            rests_until: AtomicU64::new(0),
        };
        Self {
            index,
            atc,
            contexts: Default::default(),
            cbrs: (0..map::CBRS).map(cbr).collect(),
            allocated: AtomicU32::new(0),
            active: AtomicU32::new(0),
            allocated_cbrs: Default::default(),
            missing: Default::default(),
            tgh_claims: AtomicU32::new(0),
            pending_cch: AtomicU32::new(0),
            configuration: Mutex::new(Configuration::default()),
        }
    }

    fn base(&self) -> u64 {
        self.index as u64 * map::CHIPLET_SIZE
    }
    /// BAR2 offset of a context's GSEG.
    pub(super) fn gseg(&self, context: usize) -> u64 {
        self.base() + context as u64 * map::GSEG_STRIDE
    }
    /// BAR2 offset of a logical CB.
    pub(super) fn cb(&self, context: usize, logical: usize) -> u64 {
        self.gseg(context) + map::GSEG_CB + logical as u64 * map::HANDLE_STRIDE
    }
    /// BAR2 offset of a context's data segment.
    pub(super) fn ds(&self, context: usize) -> u64 {
        self.gseg(context) + map::GSEG_DS
    }
    /// BAR2 offset of a fault map.
    pub(super) fn tfm(&self, index: usize) -> u64 {
        self.base() + map::TFM + index as u64 * map::HANDLE_STRIDE
    }
    /// BAR2 offset of a TGH.
    pub(super) fn tgh(&self, index: usize) -> u64 {
        self.base() + map::TGH + index as u64 * map::HANDLE_STRIDE
    }
    /// BAR2 offset of a CBE.
    pub(super) fn cbe(&self, cbr: usize) -> u64 {
        self.base() + map::CBE + cbr as u64 * map::HANDLE_STRIDE
    }
    /// BAR2 offset of a TFH.
    pub(super) fn tfh(&self, cbr: usize) -> u64 {
        self.base() + map::TFH + cbr as u64 * map::HANDLE_STRIDE
    }
    /// BAR2 offset of a CCH.
    pub(super) fn cch(&self, context: usize) -> u64 {
        self.base() + map::CCH + context as u64 * map::HANDLE_STRIDE
    }

    pub(super) fn set_missing(&self, cbr: usize, missing: bool) {
        let (word, bit) = (&self.missing[cbr / 64], 1u64 << (cbr % 64));
        if missing {
            word.fetch_or(bit, Ordering::SeqCst);
        } else {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }
}

/// Set bits, lowest first.
pub(super) fn bits(mut map: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if map == 0 {
            return None;
        }
        let bit = map.trailing_zeros() as usize;
        map &= map - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_enter_when_gate_is_closed_is_refused_and_context_is_quiet() {
        let context = Context::default();
        assert!(context.enter().is_none());
        context.set_open(true);
        let inside = context.enter().expect("open");
        assert!(!context.is_quiet());
        context.set_open(false);
        assert!(inside.must_leave());
        drop(inside);
        assert!(context.is_quiet());
        context.fault_map_misses.store(1, Ordering::SeqCst);
        assert!(!context.is_quiet());
    }

    #[test]
    fn test_bits_when_map_has_edges_returns_them_in_order() {
        assert_eq!(bits(1 | 1 << 63 | 1 << 7).collect::<Vec<_>>(), [0, 7, 63]);
        assert_eq!(bits(0).count(), 0);
    }
}
