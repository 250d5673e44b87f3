//! Control blocks: acceptance, execution, completion (reference section 7).
//!
//! A CB is executed by whichever engine gets its CBR's lock. Progress is in the CBE after every step, so an
//! instruction survives INTERRUPT, save by software, and restore on another CBR.

use std::ops::ControlFlow;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use protos::gru::cb::SubStatus;
use protos::gru::cbe::{self, ecause, execstatus};
use protos::gru::{cb, map};

use super::cch::physical_cbrs;
use super::chiplet::{CbrState, Chiplet, Context, Inside, Phase, bits};
use super::engine::Bench;
use super::hardware::Hardware;
use super::instructions::{Env, Operation, Step, Stop, Waiting};
use crate::atc::Initiator;
use crate::faults::Injection;

/// A polling CBR rests between its looks, longer each time: no engine spins for it.
const FIRST_REST: Duration = Duration::from_micros(10);
const LAST_REST: Duration = Duration::from_millis(1);

impl Hardware {
    /// One step for every CB that can make one. `between` runs after each step, when nothing is held.
    pub(super) fn run_contexts(
        &self,
        chiplet: &Chiplet,
        bench: &mut Bench,
        mut between: impl FnMut() -> ControlFlow<()>,
    ) {
        for number in bits(u64::from(chiplet.active.load(Ordering::Acquire))) {
            let context = &chiplet.contexts[number];
            let Some(inside) = context.enter() else {
                continue;
            };
            for (logical, cbr) in physical_cbrs(context).enumerate() {
                if inside.must_leave() || self.pausing.load(Ordering::Relaxed) {
                    break;
                }
                if self.has_work(chiplet, (number, logical), cbr)
                    && self.step(chiplet, (context, &inside), (number, logical), cbr, bench)
                    && between().is_break()
                {
                    return;
                }
            }
        }
    }

    /// Whether a CB could be stepped by this engine.
    pub(super) fn cb_waiting(&self, chiplet: &Chiplet) -> bool {
        bits(u64::from(chiplet.active.load(Ordering::Acquire))).any(|number| {
            let mut cbrs = physical_cbrs(&chiplet.contexts[number]).enumerate();
            cbrs.any(|(logical, cbr)| {
                self.has_work(chiplet, (number, logical), cbr) && chiplet.cbrs[cbr].try_lock().is_some()
            })
        })
    }

    fn has_work(&self, chiplet: &Chiplet, (number, logical): (usize, usize), cbr: usize) -> bool {
        match chiplet.cbrs[cbr].phase() {
            Phase::Ready => {
                let rests = self.rests(chiplet, cbr);
                if rests {
                    self.watch_passed_by(chiplet, cbr);
                }
                !rests
            }
            Phase::Idle => {
                self.memory
                    .word(chiplet.cb(number, logical))
                    .load(Ordering::Relaxed)
                    & 1
                    != 0
            }
            Phase::Polling => !self.rests(chiplet, cbr),
            Phase::MissFmm | Phase::MissUpm | Phase::Asking => false,
        }
    }

    pub(super) fn rests(&self, chiplet: &Chiplet, cbr: usize) -> bool {
        let until = chiplet.cbrs[cbr].rests_until.load(Ordering::Relaxed);
        until != 0 && self.now() < until
    }

    /// How long the CBRs that rest go on doing so; `None` when none does.
    pub(super) fn shortest_rest(&self) -> Option<Duration> {
        let until = |chiplet: &Chiplet| {
            bits(u64::from(chiplet.active.load(Ordering::Acquire)))
                .flat_map(|number| physical_cbrs(&chiplet.contexts[number]))
                .filter(|&cbr| matches!(chiplet.cbrs[cbr].phase(), Phase::Polling | Phase::Ready))
                .map(|cbr| chiplet.cbrs[cbr].rests_until.load(Ordering::Relaxed))
                .filter(|&until| until != 0)
                .min()
        };
        let until = self.chiplets.iter().filter_map(until).min()?;
        Some(Duration::from_nanos(until.saturating_sub(self.now())).max(FIRST_REST))
    }

    /// Returns whether the CB has made progress: a poll that goes on does not count.
    fn step(
        &self,
        chiplet: &Chiplet,
        context: (&Context, &Inside<'_>),
        owner: (usize, usize),
        cbr: usize,
        bench: &mut Bench,
    ) -> bool {
        let Some(mut held) = chiplet.cbrs[cbr].try_lock() else {
            return false;
        };
        let before = chiplet.cbrs[cbr].phase();
        let worked = self.step_held(chiplet, context, owner, (cbr, &mut held), bench);
        let asks = before != Phase::Asking && chiplet.cbrs[cbr].phase() == Phase::Asking;
        // They could not have had it before.
        drop(held);
        if asks {
            self.couriers.call();
        }
        worked
    }

    /// As [`Hardware::step`], for the holder of the CBR's lock.
    pub(super) fn step_held(
        &self,
        chiplet: &Chiplet,
        (context, inside): (&Context, &Inside<'_>),
        owner: (usize, usize),
        (cbr, held): (usize, &mut CbrState),
        bench: &mut Bench,
    ) -> bool {
        let resource = &chiplet.cbrs[cbr];
        let is_courier = !bench.room.is_empty();
        let cbe_at = chiplet.cbe(cbr);
        let mut fresh = false;
        let mut operation = match resource.phase() {
            Phase::Asking if !is_courier => return false,
            Phase::Ready | Phase::Polling | Phase::Asking => {
                resource.rests_until.store(0, Ordering::Relaxed);
                Operation::load(|offset| self.memory.word(cbe_at + offset).load(Ordering::Relaxed))
            }
            Phase::Idle => match self.accept(chiplet, owner) {
                Some(operation) => {
                    held.tag = u64::MAX;
                    held.rest = FIRST_REST;
                    fresh = true;
                    operation
                }
                None => return false,
            },
            Phase::MissFmm | Phase::MissUpm => return false,
        };
        let engine = &mut bench.engines[chiplet.index];
        engine.works_for(Initiator::new(owner.0, cbr));
        let mut asked = 0;
        let mut env = Env {
            engine,
            context,
            memory: &self.memory,
            ds: chiplet.ds(owner.0),
            ds_bytes: context.ds_bytes(),
            bounce: &mut bench.bounce,
            tag: &mut held.tag,
            store_miss: self.config.store_miss_cause,
            index_unit: self.config.index_unit,
            bstore_source: self.config.bstore_source,
            regions: self.config.regions,
            dma: &self.dma,
            unmapped: false,
            exchanging: &self.exchanging,
            injector: &self.injector,
            waiting: Waiting {
                inside,
                pausing: &self.pausing,
                wake: &self.wake,
            },
            room: &mut bench.room,
            asked: &mut asked,
        };
        let result = if fresh && self.injector.strikes(Injection::ExecutionError).is_some() {
            Err(Stop::Exception(ecause::EXECUTION_HW_ERROR))
        } else {
            operation.step(&mut env)
        };
        let pending = match operation.issued.ima() & cb::ima::INTERRUPT {
            0 => execstatus::PENDING,
            _ => execstatus::PENDING | execstatus::CB_INT_PENDING,
        };
        let save = |state, ecause, execstatus| {
            let status = cbe::Status::new().with_cbrstate(state).with_ecause(ecause);
            let status = status.with_cbrexecstatus(execstatus);
            operation.save(status, |offset, value| {
                self.memory.word(cbe_at + offset).store(value, Ordering::Release);
            });
        };
        self.counters.asked.add(asked);
        match result {
            Ok(Step::More) => {
                save(cbe::State::REQUEST_ISSUE, 0, pending);
                // What asked once is likely to ask again.
                let next = if asked > 0 { Phase::Asking } else { Phase::Ready };
                resource.set_phase(held, next);
            }
            Err(Stop::ByMessage | Stop::Again) => {
                save(cbe::State::WAIT_RESPONSE, 0, pending);
                resource.set_phase(held, Phase::Asking);
            }
            Ok(Step::Wait) => {
                save(cbe::State::WAIT_RESPONSE, 0, pending);
                let until = self.now().saturating_add(held.rest.as_nanos() as u64);
                held.rest = (held.rest * 2).clamp(FIRST_REST, LAST_REST);
                resource.rests_until.store(until, Ordering::Relaxed);
                resource.set_phase(held, Phase::Polling);
                return false;
            }
            Ok(Step::Done(old)) => {
                save(cbe::State::IDLE, 0, 0);
                self.store_avalue(chiplet, owner, old);
                self.counters.instructions.bump();
                let ending = (cb::Status::IDLE, SubStatus::NONE);
                self.finish(chiplet, context, owner, cbr, held, ending);
            }
            Err(Stop::Exception(cause)) => {
                save(cbe::State::IDLE, cause, execstatus::EXCEPTION);
                self.counters.exceptions.bump();
                let ending = (cb::Status::EXCEPTION, SubStatus::NONE);
                self.finish(chiplet, context, owner, cbr, held, ending);
            }
            Err(Stop::Message { substatus, avalue }) => {
                // No error of the instruction: ecause stays empty, the substatus says it all.
                save(cbe::State::IDLE, 0, execstatus::EXCEPTION);
                self.store_avalue(chiplet, owner, avalue);
                self.counters.messages_refused.bump();
                let ending = (cb::Status::EXCEPTION, substatus);
                self.finish(chiplet, context, owner, cbr, held, ending);
            }
            Err(Stop::Fault(fault)) => {
                save(cbe::State::WAIT_RESPONSE, 0, pending);
                self.raise_miss(chiplet, owner, cbr, held, fault);
            }
        }
        true
    }

    fn store_avalue(&self, chiplet: &Chiplet, (number, logical): (usize, usize), value: Option<u64>) {
        if let Some(value) = value {
            let word = self.memory.word(chiplet.cb(number, logical) + cb::AVALUE);
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Takes a command if there is one: icmd goes, istatus is ACTIVE.
    fn accept(&self, chiplet: &Chiplet, (number, logical): (usize, usize)) -> Option<Operation> {
        let at = chiplet.cb(number, logical);
        let accepted = |word| {
            let control = cb::Control::from_bits(word);
            let taken = control
                .with_icmd(false)
                .with_istatus(cb::Status::ACTIVE)
                .with_isubstatus(0);
            control.icmd().then_some(taken.into_bits())
        };
        let word = self.memory.word(at + cb::CONTROL);
        // Acquire: the operands were stored before the command.
        let control = word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, accepted)
            .ok()?;
        let operand = |offset| self.memory.word(at + offset).load(Ordering::Relaxed);
        Some(Operation::issue(cb::Control::from_bits(control), operand))
    }

    /// Ends an instruction: payload and CBE are stored; now the tag, then istatus, then the interrupt.
    fn finish(
        &self,
        chiplet: &Chiplet,
        context: &Context,
        (number, logical): (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        ending: (cb::Status, SubStatus),
    ) {
        let tag = self.memory.word(chiplet.cb(number, logical) + map::CB_EXT_TAG);
        tag.store(held.tag, Ordering::Relaxed);
        chiplet.cbrs[cbr].set_phase(held, Phase::Idle);
        let copied = self
            .memory
            .word(chiplet.cbe(cbr) + cbe::COPY)
            .load(Ordering::Relaxed);
        fence(Ordering::Release);
        self.set_ending(chiplet, number, logical, ending);
        let control = context.control();
        let wanted = cbe::Copied::from_bits(copied).ima() & cb::ima::INTERRUPT != 0;
        if wanted && control.tfm_done_bit_enable() {
            let tfm = usize::from(control.tlb_int_select());
            self.tfm_done(chiplet, tfm, cbr, control.cb_int_enable());
        }
    }

    /// Ends an instruction whose miss was answered badly; its progress is in the CBE.
    pub(super) fn exception(
        &self,
        chiplet: &Chiplet,
        owner: (usize, usize),
        cbr: usize,
        held: &mut CbrState,
        cause: u32,
    ) {
        let word = self.memory.word(chiplet.cbe(cbr) + cbe::STATE);
        let status = cbe::Status::from_bits(word.load(Ordering::Acquire)).with_cbrstate(cbe::State::IDLE);
        let status = status
            .with_ecause(cause)
            .with_cbrexecstatus(execstatus::EXCEPTION);
        word.store(status.into_bits(), Ordering::Release);
        self.counters.exceptions.bump();
        tracing::debug!(
            chiplet = chiplet.index,
            cbr,
            cause,
            "miss answered with an exception"
        );
        self.finish(
            chiplet,
            &chiplet.contexts[owner.0],
            owner,
            cbr,
            held,
            (cb::Status::EXCEPTION, SubStatus::NONE),
        );
    }
}
