//! Context configuration handles: allocation and the state machine (reference section 5).
//!
//! `INACTIVE -ALLOCATE-> MAPPED -START-> ACTIVE -INTERRUPT-> INTERRUPTED -START-> ACTIVE` and
//! `MAPPED|INTERRUPTED -DEALLOCATE-> INACTIVE`; every other pair is answered with EXCEPTION and its cause.
//!
//! Decided here, as nothing but their names is known: REGION_REGISTER_WRITE_ERROR is a START with an asid of more than 24
//! bits; CBR_DEALLOCATION_ERROR a DEALLOCATE with another cbr_allocation_map than the one that was allocated;
//! BAD_TFM_CONFIG tlb_int_enable without tfm_fault_bit_enable.
//!
//! Commands run on the thread that stores them, because CCHs are always trapped. That thread does not wait:
//! what cannot be finished at once (INTERRUPT while an engine is inside the context or a fault-map miss is
//! unserved) stays ACTIVE and is finished by an engine.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use protos::gru::cch::{self, Cause, Control, Opc, State};
use protos::gru::{HandleStatus, cb, cbe, map};

use super::chiplet::{CbrState, Chiplet, Context, Phase, bits};
use super::hardware::Hardware;
use crate::faults::Injection;

/// States of a chiplet's contexts. The state field of a CCH is only its image: software writes that word.
#[derive(Debug, Default)]
pub(super) struct Configuration {
    pub(super) states: [State; map::CONTEXTS],
    pending: [Option<Control>; map::CONTEXTS],
}

enum Outcome {
    Done,
    Refused(Cause),
    /// To be tried again by an engine.
    NotYet,
}

impl Hardware {
    /// A CCH store with cmd set has arrived.
    pub(super) fn cch_command(&self, chiplet: &Chiplet, context: usize, command: Control) {
        let mut configuration = lock(chiplet);
        if configuration.pending[context].is_some() {
            // The earlier command still completes by itself, later.
            self.cch_answer(chiplet, context, &configuration, Err(Cause::CCH_BUSY));
            return;
        }
        self.cch_try(chiplet, context, command, &mut configuration);
        drop(configuration);
        // START makes work, a pending INTERRUPT needs an engine to finish it.
        self.ring();
    }

    /// Engines: finish what had to wait. Returns whether anything was finished.
    pub(super) fn cch_retry(&self, chiplet: &Chiplet) -> bool {
        let waiting = chiplet.pending_cch.load(Ordering::SeqCst);
        if waiting == 0 {
            return false;
        }
        let mut finished = false;
        let mut configuration = lock(chiplet);
        for context in bits(u64::from(waiting)) {
            if let Some(command) = configuration.pending[context].take() {
                finished |= self.cch_try(chiplet, context, command, &mut configuration);
            }
        }
        finished
    }

    /// Whether a command that had to wait may be finished now.
    pub(super) fn cch_waiting(&self, chiplet: &Chiplet) -> bool {
        let waiting = chiplet.pending_cch.load(Ordering::SeqCst);
        bits(u64::from(waiting)).any(|context| chiplet.contexts[context].is_quiet())
    }

    fn cch_try(
        &self,
        chiplet: &Chiplet,
        context: usize,
        command: Control,
        configuration: &mut Configuration,
    ) -> bool {
        let outcome = self.cch_execute(chiplet, context, command, configuration);
        let result = match outcome {
            Outcome::Done => Ok(()),
            Outcome::Refused(cause) => Err(cause),
            Outcome::NotYet => {
                configuration.pending[context] = Some(command);
                chiplet.pending_cch.fetch_or(1 << context, Ordering::SeqCst);
                return false;
            }
        };
        chiplet.pending_cch.fetch_and(!(1 << context), Ordering::SeqCst);
        self.cch_answer(chiplet, context, configuration, result);
        true
    }

    fn cch_answer(
        &self,
        chiplet: &Chiplet,
        context: usize,
        configuration: &Configuration,
        result: Result<(), Cause>,
    ) {
        if let Err(cause) = result {
            tracing::debug!(chiplet = chiplet.index, context, ?cause, "CCH command refused");
        }
        let (status, cause) = match result {
            Ok(()) => (HandleStatus::IDLE, Cause::NONE),
            Err(cause) => (HandleStatus::EXCEPTION, cause),
        };
        let state = configuration.states[context];
        let answered = |word| {
            let control = Control::from_bits(word).with_cmd(false).with_status(status);
            Some(control.with_state(state).with_cause(cause).into_bits())
        };
        // A read-modify-write: delresp is software's lock and may change under us.
        let word = self.memory.word(chiplet.cch(context) + cch::CONTROL);
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, answered);
    }

    fn cch_execute(
        &self,
        chiplet: &Chiplet,
        number: usize,
        command: Control,
        configuration: &mut Configuration,
    ) -> Outcome {
        let state = &mut configuration.states[number];
        let context = &chiplet.contexts[number];
        match (command.opc(), *state) {
            (Opc::ALLOCATE, State::INACTIVE) => {
                let outcome = self.allocate(chiplet, number, command);
                if matches!(outcome, Outcome::Done) {
                    *state = State::MAPPED;
                }
                outcome
            }
            (Opc::ALLOCATE, _) => Outcome::Refused(Cause::INVALID_ALLOCATION),
            (Opc::START, State::MAPPED | State::INTERRUPTED) => {
                if bad_fault_map_configuration(command) {
                    return Outcome::Refused(Cause::BAD_TFM_CONFIG);
                }
                if self.bad_region_registers(chiplet, number) {
                    return Outcome::Refused(Cause::REGION_REGISTER_WRITE_ERROR);
                }
                let Some(mut cbrs) = lock_cbrs(chiplet, context) else {
                    return Outcome::NotYet;
                };
                let fresh = *state == State::MAPPED;
                for (logical, (cbr, held)) in cbrs.iter_mut().enumerate() {
                    self.resume(chiplet, (number, logical), *cbr, held, fresh);
                }
                self.load_registers(chiplet, number, command);
                self.watch_start(chiplet, number);
                *state = State::ACTIVE;
                context.set_open(true);
                chiplet.active.fetch_or(1 << number, Ordering::SeqCst);
                Outcome::Done
            }
            (Opc::START, _) => Outcome::Refused(Cause::INVALID_START),
            (Opc::INTERRUPT | Opc::INTERRUPT_SYNC, State::ACTIVE) => {
                chiplet.active.fetch_and(!(1 << number), Ordering::SeqCst);
                context.set_open(false);
                if !context.is_quiet() {
                    // A courier may be waiting for the client on its behalf.
                    self.dma.recheck_messages();
                    self.show_busy(chiplet, context);
                    return Outcome::NotYet;
                }
                let Some(cbrs) = lock_cbrs(chiplet, context) else {
                    return Outcome::NotYet;
                };
                for (cbr, _held) in &cbrs {
                    let state = match chiplet.cbrs[*cbr].phase() {
                        Phase::Idle => continue,
                        Phase::Ready | Phase::Polling | Phase::Asking => cbe::State::INTERRUPTED,
                        Phase::MissUpm => cbe::State::INTERRUPTED_MISS_UPM,
                        Phase::MissFmm => unreachable!("a quiet context has no fault-map miss"),
                    };
                    self.set_interrupted(chiplet, *cbr, state);
                }
                chiplet.atc.holds(number, &[]);
                *state = State::INTERRUPTED;
                Outcome::Done
            }
            (Opc::INTERRUPT | Opc::INTERRUPT_SYNC, _) => Outcome::Refused(Cause::INVALID_INTERRUPT),
            (Opc::DEALLOCATE, State::MAPPED | State::INTERRUPTED) => {
                if self.cbr_map_word(chiplet, number) != context.cbr_map.load(Ordering::Relaxed) {
                    return Outcome::Refused(Cause::CBR_DEALLOCATION_ERROR);
                }
                let Some(mut cbrs) = lock_cbrs(chiplet, context) else {
                    return Outcome::NotYet;
                };
                if cbrs
                    .iter()
                    .any(|(cbr, _)| chiplet.cbrs[*cbr].held.load(Ordering::SeqCst))
                {
                    return Outcome::NotYet;
                }
                for (cbr, held) in &mut cbrs {
                    self.release_cbr(chiplet, *cbr, held);
                }
                drop(cbrs);
                chiplet.allocated.fetch_and(!(1 << number), Ordering::SeqCst);
                context.clear();
                self.publish_allocation(chiplet);
                *state = State::INACTIVE;
                Outcome::Done
            }
            (Opc::DEALLOCATE, _) => Outcome::Refused(Cause::INVALID_DEALLOCATION),
            _ => Outcome::Refused(Cause::ILLEGAL_OPCODE),
        }
    }

    fn allocate(&self, chiplet: &Chiplet, number: usize, command: Control) -> Outcome {
        let cbr_map = self.cbr_map_word(chiplet, number);
        let dsr_map = command.dsr_allocation_map();
        if cbr_map == 0 {
            return Outcome::Refused(Cause::NO_CBRS_TO_ALLOCATE);
        }
        if bad_fault_map_configuration(command) {
            return Outcome::Refused(Cause::BAD_TFM_CONFIG);
        }
        for other in bits(u64::from(chiplet.allocated.load(Ordering::SeqCst))) {
            let other = &chiplet.contexts[other];
            if other.cbr_map.load(Ordering::Relaxed) & cbr_map != 0 {
                return Outcome::Refused(Cause::CBR_OVERSUBSCRIBED);
            }
            if other.dsr_map.load(Ordering::Relaxed) & dsr_map != 0 {
                return Outcome::Refused(Cause::DSR_OVERSUBSCRIBED);
            }
        }
        let context = &chiplet.contexts[number];
        context.cbr_map.store(cbr_map, Ordering::Relaxed);
        context.dsr_map.store(dsr_map, Ordering::Relaxed);
        // Nothing of an earlier owner shows: control blocks, data segment and what belongs to the CBRs.
        for logical in 0..context.cbs() {
            self.memory
                .store_bytes(chiplet.cb(number, logical), &[0; map::HANDLE_STRIDE as usize]);
        }
        for unit in 0..u64::from(dsr_map.count_ones()) {
            let at = chiplet.ds(number) + unit * map::DSR_AU as u64;
            self.memory.store_bytes(at, &[0; map::DSR_AU]);
        }
        self.wake.show_to(chiplet.gseg(number));
        for cbr in physical_cbrs(context) {
            self.clear_cbr_handles(chiplet, cbr);
        }
        chiplet.allocated.fetch_or(1 << number, Ordering::SeqCst);
        self.publish_allocation(chiplet);
        Outcome::Done
    }

    /// The allocation map as software has it in the CCH now.
    fn cbr_map_word(&self, chiplet: &Chiplet, number: usize) -> u64 {
        let word = self.memory.word(chiplet.cch(number) + cch::CBR_MAP);
        word.load(Ordering::Acquire)
    }

    /// An ASID has 24 bits.
    fn bad_region_registers(&self, chiplet: &Chiplet, number: usize) -> bool {
        const BEYOND: u64 = 0xff00_0000_ff00_0000;
        (0..cch::REGIONS as u64 / 2).any(|pair| {
            let word = self.memory.word(chiplet.cch(number) + cch::ASID + 8 * pair);
            word.load(Ordering::Acquire) & BEYOND != 0
        })
    }

    /// While an INTERRUPT waits: what each CBR keeps it waiting with.
    fn show_busy(&self, chiplet: &Chiplet, context: &Context) {
        for cbr in physical_cbrs(context) {
            // Somebody looks at it right now: the next try shows it.
            let Some(_held) = chiplet.cbrs[cbr].try_lock() else {
                continue;
            };
            let state = match chiplet.cbrs[cbr].phase() {
                Phase::Idle => continue,
                Phase::Ready | Phase::Polling | Phase::Asking => cbe::State::BUSY_INTERRUPT,
                Phase::MissFmm => cbe::State::BUSY_INTERRUPT_MISS_FMM,
                Phase::MissUpm => cbe::State::BUSY_INTERRUPTED_MISS_UPM,
            };
            self.set_cbrstate(chiplet, cbr, state);
        }
    }

    fn publish_allocation(&self, chiplet: &Chiplet) {
        let mut cbrs = [0u64; 2];
        for number in bits(u64::from(chiplet.allocated.load(Ordering::SeqCst))) {
            for cbr in physical_cbrs(&chiplet.contexts[number]) {
                cbrs[cbr / 64] |= 1 << (cbr % 64);
            }
        }
        for (word, value) in chiplet.allocated_cbrs.iter().zip(cbrs) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// The ASID that a context's CCH names for a region, whatever the context has loaded.
    pub(super) fn asid_in_cch(&self, chiplet: &Chiplet, number: usize, region: usize) -> u32 {
        let pair = self
            .memory
            .word(chiplet.cch(number) + cch::ASID + region as u64 / 2 * 8)
            .load(Ordering::Acquire);
        (pair >> (region % 2 * 32)) as u32 & 0xff_ffff
    }

    fn load_registers(&self, chiplet: &Chiplet, number: usize, command: Control) {
        let (context, base) = (&chiplet.contexts[number], chiplet.cch(number));
        context.control.store(command.into_bits(), Ordering::Relaxed);
        let stale = self.injector.strikes(Injection::StaleAsid).is_some();
        for region in 0..cch::REGIONS {
            let asid = self.asid_in_cch(chiplet, number, region);
            if !stale {
                context.asid[region].store(asid, Ordering::Relaxed);
            }
            let four = self
                .memory
                .word(base + cch::SIZEAVAIL + region as u64 / 4 * 8)
                .load(Ordering::Acquire);
            let sizes = (four >> (region % 4 * 16)) as u32 & 0xffff;
            context.sizeavail[region].store(sizes, Ordering::Relaxed);
        }
    }

    /// Whether a CBR goes on is decided from its CBE alone (section 17.3): software may have restored it, and
    /// may have written anything into the CB's istatus.
    fn resume(
        &self,
        chiplet: &Chiplet,
        (context, logical): (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        fresh: bool,
    ) {
        let state = self.cbrstate(chiplet, cbr);
        if !fresh {
            match chiplet.cbrs[cbr].phase() {
                Phase::Ready | Phase::Polling => self.set_cbrstate(chiplet, cbr, cbe::State::QUEUED),
                // The engine that meets the memory again hands it over again.
                Phase::Asking => {
                    self.set_cbrstate(chiplet, cbr, cbe::State::QUEUED);
                    chiplet.cbrs[cbr].set_phase(held, Phase::Ready);
                }
                // Miss and TFH have survived; the CBR goes on waiting.
                Phase::MissUpm => self.set_cbrstate(chiplet, cbr, cbe::State::WAIT_RESPONSE),
                Phase::Idle | Phase::MissFmm => {}
            }
        } else if !matches!(state, cbe::State::INACTIVE | cbe::State::IDLE) {
            // A miss that was outstanding when the context was saved is found again by running on.
            held.tag = u64::MAX;
            self.set_cbrstate(chiplet, cbr, cbe::State::QUEUED);
            self.set_istatus(chiplet, context, logical, cb::Status::ACTIVE);
            chiplet.cbrs[cbr].set_phase(held, Phase::Ready);
        }
    }

    fn release_cbr(&self, chiplet: &Chiplet, cbr: usize, held: &mut CbrState) {
        let resource = &chiplet.cbrs[cbr];
        if resource.phase().is_miss() {
            self.counters.misses_withdrawn.bump();
            chiplet.set_missing(cbr, false);
            chiplet.atc.close_miss(cbr);
        }
        resource.set_phase(held, Phase::Idle);
        resource.rests_until.store(0, Ordering::Relaxed);
        self.clear_cbr_handles(chiplet, cbr);
    }

    fn clear_cbr_handles(&self, chiplet: &Chiplet, cbr: usize) {
        for word in 0..map::HANDLE_BYTES as u64 / 8 {
            self.memory
                .word(chiplet.cbe(cbr) + 8 * word)
                .store(0, Ordering::Release);
            self.memory
                .word(chiplet.tfh(cbr) + 8 * word)
                .store(0, Ordering::Release);
        }
    }
}

fn bad_fault_map_configuration(command: Control) -> bool {
    command.tlb_int_enable() && !command.tfm_fault_bit_enable()
}

/// Physical CBRs of a context in logical order.
pub(super) fn physical_cbrs(context: &Context) -> impl Iterator<Item = usize> + use<> {
    let map = context.cbr_map.load(Ordering::Relaxed);
    bits(map).flat_map(|unit| (0..map::CBR_AU).map(move |i| unit * map::CBR_AU + i))
}

fn lock(chiplet: &Chiplet) -> MutexGuard<'_, Configuration> {
    chiplet
        .configuration
        .lock()
        .expect("no thread dies while it configures a context")
}

/// Every CBR of the context in logical order, or `None` while an engine holds one.
fn lock_cbrs<'a>(chiplet: &'a Chiplet, context: &Context) -> Option<Vec<(usize, MutexGuard<'a, CbrState>)>> {
    physical_cbrs(context)
        .map(|cbr| Some((cbr, chiplet.cbrs[cbr].try_lock()?)))
        .collect()
}
