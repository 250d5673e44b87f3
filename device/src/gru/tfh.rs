//! TLB fault handles (reference section 6): how a miss is reported and how software answers it.
//!
//! Decided here (section 16): RESTART of a killed miss is a plain restart; WRITE_ONLY is killed like
//! WRITE_RESTART (its status is then EXCEPTION instead of IDLE); EXCEPTION sets ecause bit 6, unless
//! `GruConfig::fatal_fault_ecause` names another.
//!
//! What software fills with wrong operands hits its own instruction: a page-size code that the context does
//! not list in sizeavail leaves state HW_ERR, cause HW_ERROR_PAGESIZE and ends the instruction with
//! TLBHW_ERROR; a target that is not mapped ends it with ADDRESS_SPACE_DECODE_ERROR; a gaa other than RAM
//! with IAA_GAA_MISMATCH, or with ADDRESS_SPACE_DECODE_ERROR if the instruction asked for that class (there is only
//! RAM).

use std::sync::atomic::{Ordering, fence};

use protos::gru::cbe::{self, ecause};
use protos::gru::tfh::{self, Asids, Cause, Control, Opc, State, Target};
use protos::gru::{HandleStatus, cb, page_size};

use super::chiplet::{CbrState, Chiplet, Phase, bits};
use super::hardware::Hardware;
use crate::atc::{Fill, FillRefused, PageSize, SpaceId};
use crate::faults::Injection;

/// What injected misses give as their cause: all of them count as writes for the driver (`cause & 2`).
const MISS_CAUSES: [Cause; 3] = [
    Cause::HW_ERROR_RR,
    Cause::HW_ERROR_PAGESIZE,
    Cause::INSTRUCTION_EXCEPTION,
];

/// A miss to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) va: u64,
    pub(super) cause: Cause,
}

impl Hardware {
    /// Reports a miss and parks the CBR. No guard is held.
    pub(super) fn raise_miss(
        &self,
        chiplet: &Chiplet,
        (number, logical): (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        fault: Fault,
    ) {
        let context = &chiplet.contexts[number];
        let control = context.control();
        let asid = context.asid_of(fault.va, self.config.regions);
        self.counters.misses.bump();
        // Every purge from here on is collected; only then may software learn of the miss.
        chiplet.atc.open_miss(cbr, SpaceId(u64::from(asid)), fault.va);
        let fault_map = control.tfm_fault_bit_enable();
        let (phase, state) = if fault_map {
            self.counters.misses_in_fault_map.bump();
            context.fault_map_misses.fetch_add(1, Ordering::SeqCst);
            (Phase::MissFmm, State::MISS_FMM)
        } else {
            (Phase::MissUpm, State::MISS_UPM)
        };
        let base = chiplet.tfh(cbr);
        let word = |offset| self.memory.word(base + offset);
        word(tfh::MISSVADDR).store(fault.va, Ordering::Relaxed);
        word(tfh::ASIDS).store(Asids::new().with_missasid(asid).into_bits(), Ordering::Relaxed);
        word(tfh::FILLTAG).store(0, Ordering::Relaxed);
        let copied = self
            .memory
            .word(chiplet.cbe(cbr) + cbe::COPY)
            .load(Ordering::Relaxed);
        let cb_int = cbe::Copied::from_bits(copied).ima() & cb::ima::INTERRUPT != 0;
        let cause = match self.injector.strikes(Injection::MissCause) {
            // A read that is taken for a write is safe, a write that is taken for a read never ends.
            Some(count) => MISS_CAUSES[count as usize % MISS_CAUSES.len()],
            None => fault.cause,
        };
        let report = Control::new()
            .with_status(HandleStatus::EXCEPTION)
            .with_state(state)
            .with_cause(cause)
            .with_cb_int(cb_int)
            .with_ctxnum(number as u8);
        chiplet.cbrs[cbr].set_phase(held, phase);
        chiplet.set_missing(cbr, true);
        fence(Ordering::Release);
        word(tfh::CONTROL).store(report.into_bits(), Ordering::Release);
        if fault_map {
            let tfm = usize::from(control.tlb_int_select());
            self.tfm_fault(chiplet, tfm, cbr, control.tlb_int_enable());
        } else {
            self.set_istatus(chiplet, number, logical, cb::Status::CALL_OS);
        }
    }

    /// Executes TFH commands: of CBRs with a miss, or (`all`) of every allocated CBR. Returns whether there was one.
    pub(super) fn tfh_scan(&self, chiplet: &Chiplet, all: bool) -> bool {
        let maps = if all {
            &chiplet.allocated_cbrs
        } else {
            &chiplet.missing
        };
        let mut worked = false;
        for (half, map) in maps.iter().enumerate() {
            for bit in bits(map.load(Ordering::Acquire)) {
                // A reset waits for one fill at most, not for a chiplet's worth of them.
                if self.pausing.load(Ordering::Relaxed) {
                    return worked;
                }
                let cbr = half * 64 + bit;
                if self.tfh_commanded(chiplet, cbr) {
                    worked |= self.tfh_execute(chiplet, cbr);
                }
            }
        }
        worked
    }

    /// Whether a TFH waits for an engine and is free.
    pub(super) fn tfh_waiting(&self, chiplet: &Chiplet) -> bool {
        chiplet.allocated_cbrs.iter().enumerate().any(|(half, map)| {
            bits(map.load(Ordering::Acquire))
                .map(|bit| half * 64 + bit)
                .any(|cbr| self.tfh_commanded(chiplet, cbr) && chiplet.cbrs[cbr].try_lock().is_some())
        })
    }

    fn tfh_commanded(&self, chiplet: &Chiplet, cbr: usize) -> bool {
        let control = self
            .memory
            .word(chiplet.tfh(cbr) + tfh::CONTROL)
            .load(Ordering::Relaxed);
        control & 1 != 0 && !chiplet.cbrs[cbr].held.load(Ordering::Relaxed)
    }

    fn tfh_execute(&self, chiplet: &Chiplet, cbr: usize) -> bool {
        let resource = &chiplet.cbrs[cbr];
        // Somebody else is at it: the next look finds what is left.
        let Some(mut held) = resource.try_lock() else {
            return false;
        };
        let control = Control::from_bits(
            self.memory
                .word(chiplet.tfh(cbr) + tfh::CONTROL)
                .load(Ordering::Acquire),
        );
        if !control.cmd() || resource.held.load(Ordering::Relaxed) {
            return false;
        }
        let Some(owner) = self.owner(chiplet, cbr) else {
            return false;
        };
        let miss = resource.phase().is_miss();
        match control.opc() {
            // Nothing waits: nothing may be entered (there is no ticket that would know of purges).
            _ if !miss => self.answer(chiplet, cbr, HandleStatus::IDLE, State::IDLE),
            Opc::WRITE_ONLY => {
                let status = match self.enter(chiplet, owner.0, cbr, &self.operands(chiplet, cbr)) {
                    Ok(()) => HandleStatus::IDLE,
                    Err(_) => HandleStatus::EXCEPTION,
                };
                self.answer(chiplet, cbr, status, control.state());
            }
            Opc::WRITE_RESTART => {
                let operands = self.operands(chiplet, cbr);
                if self.hold_fill(chiplet, owner.0, cbr, &operands) {
                    return true;
                }
                self.write_restart(chiplet, owner, cbr, &mut held, &operands);
            }
            Opc::RESTART => self.restart(chiplet, owner, cbr, &mut held),
            Opc::EXCEPTION => {
                self.end_miss(chiplet, owner, cbr, &mut held, Phase::Idle);
                self.answer(chiplet, cbr, HandleStatus::IDLE, State::IDLE);
                let ecause = 1 << self.config.fatal_fault_ecause;
                self.exception(chiplet, owner, cbr, &mut held, ecause);
            }
            Opc::USER_POLLING_MODE => {
                if resource.phase() == Phase::MissFmm {
                    let context = &chiplet.contexts[owner.0];
                    resource.set_phase(&mut held, Phase::MissUpm);
                    context.fault_map_misses.fetch_sub(1, Ordering::SeqCst);
                }
                self.answer(chiplet, cbr, HandleStatus::EXCEPTION, State::MISS_UPM);
                // After the TFH: its user calls the operating system, which looks there.
                self.set_istatus(chiplet, owner.0, owner.1, cb::Status::CALL_OS);
            }
            // NOOP and what is not defined: the miss goes on waiting.
            _ => self.answer(chiplet, cbr, HandleStatus::EXCEPTION, control.state()),
        }
        true
    }

    /// The held-back or immediate second half of WRITE_RESTART.
    pub(super) fn write_restart(
        &self,
        chiplet: &Chiplet,
        owner: (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        operands: &Operands,
    ) {
        match self.enter(chiplet, owner.0, cbr, operands) {
            Ok(()) | Err(Refusal::Killed) => self.restart(chiplet, owner, cbr, held),
            Err(Refusal::Wrong { cause, ecause }) => {
                self.end_miss(chiplet, owner, cbr, held, Phase::Idle);
                let (status, state) = (HandleStatus::EXCEPTION, State::HW_ERR);
                let control = Control::new()
                    .with_status(status)
                    .with_state(state)
                    .with_cause(cause);
                let control = control.with_ctxnum(owner.0 as u8);
                self.memory
                    .word(chiplet.tfh(cbr))
                    .store(control.into_bits(), Ordering::Release);
                self.exception(chiplet, owner, cbr, held, ecause);
            }
        }
    }

    fn restart(&self, chiplet: &Chiplet, owner: (usize, usize), cbr: usize, held: &mut CbrState) {
        let context = &chiplet.contexts[owner.0];
        let was_user_polling = chiplet.cbrs[cbr].phase() == Phase::MissUpm;
        // A context that is stopped (or being stopped) does not run it: what is saved now goes on after a START.
        if context.is_open() {
            self.set_cbrstate(chiplet, cbr, cbe::State::QUEUED);
        } else {
            self.set_interrupted(chiplet, cbr, cbe::State::INTERRUPTED);
        }
        // The TFH is answered before the CBR can run: it may miss again and report it there.
        self.answer(chiplet, cbr, HandleStatus::IDLE, State::IDLE);
        if was_user_polling {
            self.set_istatus(chiplet, owner.0, owner.1, cb::Status::ACTIVE);
        }
        if self.injector.strikes(Injection::DelayedRestart).is_some() {
            let margin = u64::try_from(self.config.faults.margin.as_nanos()).unwrap_or(u64::MAX);
            let until = self.now().saturating_add(margin);
            chiplet.cbrs[cbr].rests_until.store(until, Ordering::Relaxed);
        }
        self.end_miss(chiplet, owner, cbr, held, Phase::Ready);
        let control = context.control();
        if !was_user_polling && self.injector.strikes(Injection::DuplicateFault).is_some() {
            let tfm = usize::from(control.tlb_int_select());
            self.tfm_fault(chiplet, tfm, cbr, control.tlb_int_enable());
        }
    }

    fn end_miss(
        &self,
        chiplet: &Chiplet,
        owner: (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        next: Phase,
    ) {
        let before = chiplet.cbrs[cbr].phase();
        chiplet.set_missing(cbr, false);
        chiplet.atc.close_miss(cbr);
        chiplet.cbrs[cbr].set_phase(held, next);
        if before == Phase::MissFmm {
            // Last: a waiting INTERRUPT may complete from here on.
            chiplet.contexts[owner.0]
                .fault_map_misses
                .fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Writes status and state absolutely; cause, ctxnum and cb_int stay for dumps.
    fn answer(&self, chiplet: &Chiplet, cbr: usize, status: HandleStatus, state: State) {
        let status = match self.injector.strikes(Injection::WrongStatus) {
            Some(_) => HandleStatus::EXCEPTION,
            None => status,
        };
        let changed = |word| {
            let control = Control::from_bits(word).with_cmd(false).with_status(status);
            Some(control.with_state(state).into_bits())
        };
        let word = self.memory.word(chiplet.tfh(cbr) + tfh::CONTROL);
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, changed);
    }

    fn operands(&self, chiplet: &Chiplet, cbr: usize) -> Operands {
        let word = |offset| {
            self.memory
                .word(chiplet.tfh(cbr) + offset)
                .load(Ordering::Relaxed)
        };
        Operands {
            asids: Asids::from_bits(word(tfh::ASIDS)),
            target: Target::from_bits(word(tfh::TARGET)),
            fillvaddr: word(tfh::FILLVADDR),
            tag: word(tfh::FILLTAG),
        }
    }

    /// Checks the operands and enters the translation.
    fn enter(
        &self,
        chiplet: &Chiplet,
        context: usize,
        cbr: usize,
        operands: &Operands,
    ) -> Result<(), Refusal> {
        let fill = self.fill_of(chiplet, context, cbr, operands)?;
        // Populates pages and may wait for the IOVA map.
        let result = self.while_away(|| chiplet.atc.fill(cbr, fill));
        match result {
            Ok(()) => {
                self.counters.fills.bump();
                Ok(())
            }
            Err(FillRefused::Killed | FillRefused::Purging) => {
                self.counters.fills_killed.bump();
                tracing::trace!(chiplet = chiplet.index, cbr, ?fill, "killed");
                Err(Refusal::Killed)
            }
            Err(FillRefused::Target(error)) => {
                tracing::debug!(chiplet = chiplet.index, cbr, ?fill, %error, "fill refused");
                Err(Refusal::Wrong {
                    cause: Cause::HW_ERROR_RR,
                    ecause: ecause::ADDRESS_SPACE_DECODE_ERROR,
                })
            }
            Err(FillRefused::NoTicket) => unreachable!("CBR {cbr} has a miss and thus an open ticket"),
        }
    }

    fn fill_of(
        &self,
        chiplet: &Chiplet,
        context: usize,
        cbr: usize,
        operands: &Operands,
    ) -> Result<Fill, Refusal> {
        let gaa = operands.asids.gaa();
        if gaa != tfh::GAA_RAM {
            let copied = self
                .memory
                .word(chiplet.cbe(cbr) + cbe::COPY)
                .load(Ordering::Relaxed);
            let copied = cbe::Copied::from_bits(copied);
            let asked_for = copied.iaa0() == gaa || copied.iaa1() == gaa;
            let ecause = if asked_for {
                ecause::ADDRESS_SPACE_DECODE_ERROR
            } else {
                ecause::IAA_GAA_MISMATCH
            };
            let cause = Cause::HW_ERROR_RR;
            return Err(Refusal::Wrong { cause, ecause });
        }
        let region = self.config.regions.of(operands.fillvaddr);
        let available = chiplet.contexts[context].sizeavail[region].load(Ordering::Relaxed);
        operands.fill(self.config.check_sizeavail.then_some(available))
    }

    /// Fault plan: keeps the operands of a fill and lets the thread go on. True when it was taken.
    fn hold_fill(&self, chiplet: &Chiplet, context: usize, cbr: usize, operands: &Operands) -> bool {
        if !self.held_fills.picks() {
            return false;
        }
        let Ok(fill) = self.fill_of(chiplet, context, cbr, operands) else {
            return false;
        };
        chiplet.cbrs[cbr].held.store(true, Ordering::SeqCst);
        self.held_fills.hold(chiplet.index, cbr, fill, *operands);
        true
    }

    /// Fault plan: executes the fills whose time has come. Returns whether there was one.
    pub(super) fn release_held_fills(&self) -> bool {
        let progress =
            |chiplet: usize, cbr, fill: &Fill| self.chiplets[chiplet].atc.purge_progress(cbr, fill);
        let due = self.held_fills.due(progress);
        for (chiplet, cbr, operands) in &due {
            let (chiplet, cbr) = (&self.chiplets[*chiplet], *cbr);
            // Others only try this lock, for a moment: the CBR waits for its fill, so nobody runs it.
            let mut held = chiplet.cbrs[cbr]
                .state
                .lock()
                .expect("an engine died inside an instruction");
            // DEALLOCATE has waited for this.
            let owner = self
                .owner(chiplet, cbr)
                .expect("a CBR whose fill is held stays allocated");
            assert!(
                chiplet.cbrs[cbr].phase().is_miss(),
                "the miss of a held fill stays open"
            );
            chiplet.cbrs[cbr].held.store(false, Ordering::SeqCst);
            self.write_restart(chiplet, owner, cbr, &mut held, operands);
        }
        !due.is_empty()
    }
}

enum Refusal {
    /// Met by a purge: nothing entered, the instruction misses again.
    Killed,
    /// Software's mistake.
    Wrong { cause: Cause, ecause: u32 },
}

/// What software stored for a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operands {
    asids: Asids,
    target: Target,
    fillvaddr: u64,
    tag: u64,
}

impl Operands {
    /// `available`: the page-size codes that may be entered, if that is checked.
    fn fill(&self, available: Option<u32>) -> Result<Fill, Refusal> {
        let code = self.target.pagesize();
        let listed = available.is_none_or(|available| code < 16 && available >> code & 1 != 0);
        let size = page_size::shift_of_code(code)
            .and_then(PageSize::new)
            .filter(|_| listed);
        let Some(size) = size else {
            return Err(Refusal::Wrong {
                cause: Cause::HW_ERROR_PAGESIZE,
                ecause: ecause::TLBHW_ERROR,
            });
        };
        Ok(Fill {
            space: SpaceId(u64::from(self.asids.fillasid())),
            va: self.fillvaddr,
            size,
            // The pfn names the 4 KiB frame of the fault; the entry begins with its page.
            iova: size.base(self.target.pfn() << 12),
            writable: self.asids.dirty(),
            tag: self.tag,
        })
    }
}
