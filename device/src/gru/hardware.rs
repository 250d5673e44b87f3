//! The state that connections and engines share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use protos::gru::{cb, cbe, map, pci};

use super::chiplet::{Chiplet, bits};
use super::courier::Couriers;
use super::memory::BarMemory;
use super::tfh::Operands;
use super::tgh::Owing;
use super::trapped::Trapped;
use super::wake::Wake;
use super::{Counters, GruConfig};
use crate::dma;
use crate::faults::{HeldFills, Injector, Parking};
use crate::pci::Interrupts;

/// Everything but the threads.
///
/// Lock order: `quiesce`, then a chiplet's configuration, then a CBR's state, then what the ATC and DMA take.
#[derive(Debug)]
pub(super) struct Hardware {
    pub(super) config: GruConfig,
    /// BAR2.
    pub(super) memory: Arc<BarMemory>,
    pub(super) wake: Arc<Wake>,
    pub(super) couriers: Couriers,
    /// Flushes that wait for the client.
    pub(super) owed: Owing,
    pub(super) chiplets: Vec<Chiplet>,
    pub(super) interrupts: Arc<Interrupts>,
    /// For unmapped mode.
    pub(super) dma: Arc<dma::Space>,
    /// A GAMXR is being executed.
    pub(super) exchanging: AtomicBool,
    pub(super) injector: Injector,
    /// Beginning of the device's time.
    pub(super) started: Instant,
    /// An engine sleeps with a time limit, for those CBRs that rest.
    pub(super) time_kept: AtomicBool,
    pub(super) held_fills: HeldFills<Operands>,
    pub(super) parking: Option<Arc<Parking>>,
    pub(super) trapped: Trapped,
    pub(super) counters: Counters,
    /// Engines, couriers (also while they wait for the client: a reset ends that first) and connections that execute a TGH
    /// hold it for reading; a reset takes it for writing.
    pub(super) quiesce: RwLock<()>,
    /// Engines are to end their look after the step they are at.
    pub(super) pausing: AtomicBool,
    /// With few processors the one whom an engine waits for, or has just answered, may need the engine's.
    pub(super) polite: bool,
}

impl Hardware {
    /// After a store that may start something.
    pub(super) fn ring(&self) {
        self.wake.ring();
    }

    /// Nanoseconds since the device was made.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Resets and stops do not wait for the fault plan.
    pub(super) fn interrupt_delays(&self, interrupted: bool) {
        if let Some(parking) = &self.parking {
            parking.interrupt(interrupted);
        }
    }

    // ---- words of CB and CBE ----

    pub(super) fn cbrstate(&self, chiplet: &Chiplet, cbr: usize) -> cbe::State {
        let word = self
            .memory
            .word(chiplet.cbe(cbr) + cbe::STATE)
            .load(Ordering::Acquire);
        cbe::Status::from_bits(word).cbrstate()
    }

    pub(super) fn set_cbrstate(&self, chiplet: &Chiplet, cbr: usize, state: cbe::State) {
        let word = self.memory.word(chiplet.cbe(cbr) + cbe::STATE);
        let status = cbe::Status::from_bits(word.load(Ordering::Acquire));
        word.store(status.with_cbrstate(state).into_bits(), Ordering::Release);
    }

    /// An INTERRUPT has met an instruction that goes on after the next START.
    pub(super) fn set_interrupted(&self, chiplet: &Chiplet, cbr: usize, state: cbe::State) {
        let word = self.memory.word(chiplet.cbe(cbr) + cbe::STATE);
        let status = cbe::Status::from_bits(word.load(Ordering::Acquire));
        let status = status.with_cbrexecstatus(status.cbrexecstatus() | cbe::execstatus::INT_OCC);
        word.store(status.with_cbrstate(state).into_bits(), Ordering::Release);
    }

    /// Changes istatus (and isubstatus to none) of a CB and nothing else; everything before is visible first.
    pub(super) fn set_istatus(&self, chiplet: &Chiplet, context: usize, logical: usize, status: cb::Status) {
        self.set_ending(chiplet, context, logical, (status, cb::SubStatus::NONE));
    }

    /// As [`Hardware::set_istatus`], with a substatus.
    pub(super) fn set_ending(
        &self,
        chiplet: &Chiplet,
        context: usize,
        logical: usize,
        (status, substatus): (cb::Status, cb::SubStatus),
    ) {
        let changed = |word| {
            let control = cb::Control::from_bits(word)
                .with_istatus(status)
                .with_isubstatus(substatus.0);
            Some(control.into_bits())
        };
        let word = self.memory.word(chiplet.cb(context, logical) + cb::CONTROL);
        // An atomic change: software that has just been answered may already store the next command.
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, changed);
    }

    /// Context and logical CB of a physical CBR.
    pub(super) fn owner(&self, chiplet: &Chiplet, cbr: usize) -> Option<(usize, usize)> {
        bits(u64::from(chiplet.allocated.load(Ordering::Acquire))).find_map(|context| {
            let cbr_map = chiplet.contexts[context].cbr_map.load(Ordering::Relaxed);
            map::logical_cb(cbr_map, cbr).map(|logical| (context, logical))
        })
    }

    /// A log of changes is there from now on, or nowhere ([`pci::CHANGE_LOG_WANTED`]).
    pub(super) fn follow_changes(&self, log: u64) {
        if !(self.config.sanitize && self.config.follow_changes) {
            return;
        }
        let word = self.wake.status().word(pci::CHANGE_LOG_OFFSET);
        word.store(log, Ordering::Release);
        for chiplet in &self.chiplets {
            chiplet
                .atc
                .follow_changes((log != pci::CHANGE_LOG_WANTED).then_some(log));
        }
    }

    /// Everything as after power-on. Engines finish their chunk first; nothing of the client's memory is cached
    /// or touched when this returns.
    pub(super) fn reset(&self) {
        self.interrupt_delays(true);
        self.pausing.store(true, Ordering::SeqCst);
        self.dma.recheck_messages();
        let quiet = self.quiesce.write().expect("no engine dies while it works");
        self.wake.begin_reset();
        self.owed.settle_all(|chiplet, token| {
            self.chiplets[chiplet].atc.purge_finish(token);
        });
        for chiplet in &self.chiplets {
            *chiplet
                .configuration
                .lock()
                .expect("no thread dies while it configures a context") = Default::default();
            for word in [
                &chiplet.allocated,
                &chiplet.active,
                &chiplet.pending_cch,
                &chiplet.tgh_claims,
            ] {
                word.store(0, Ordering::SeqCst);
            }
            for word in chiplet.allocated_cbrs.iter().chain(&chiplet.missing) {
                word.store(0, Ordering::SeqCst);
            }
            for context in &chiplet.contexts {
                context.clear();
            }
            for (number, cbr) in chiplet.cbrs.iter().enumerate() {
                if cbr.phase().is_miss() {
                    self.counters.misses_withdrawn.bump();
                }
                cbr.clear();
                chiplet.atc.close_miss(number);
            }
            chiplet.atc.purge(crate::atc::Purge::All);
            for context in 0..map::CONTEXTS {
                chiplet.atc.holds(context, &[]);
            }
        }
        self.follow_changes(pci::CHANGE_LOG_WANTED);
        self.held_fills.forget();
        self.trapped.clear();
        if let Err(error) = self.memory.clear(0, pci::BAR_CHIPLETS_SIZE) {
            tracing::error!(%error, "device memory could not be cleared: registers keep old values");
        }
        self.wake.count_reset();
        self.pausing.store(false, Ordering::SeqCst);
        self.interrupt_delays(false);
        drop(quiet);
        self.ring();
    }
}

/// A relaxed statistics counter.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn add(&self, count: u64) {
        if count > 0 {
            self.0.fetch_add(count, Ordering::Relaxed);
        }
    }
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
