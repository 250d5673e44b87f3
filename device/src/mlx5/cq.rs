//! Completion queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protos::mlx5::cq::{Cqc, Cqe, STATE_ARMED, STATE_FIRED, STATE_SOLICITED_ARMED, STATUS_OVERFLOW};
use protos::mlx5::eq::{DATA_NUMBER, Eqe, Event};
use protos::mlx5::{Layout, uar};
use zerocopy::IntoBytes;

use super::buffer::Buffer;
use super::eq::Eq;
use super::memory::Port;
use crate::pci::Interrupts;

const MASK: u32 = 0xff_ffff;

/// What a driver asked to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Armed {
    No,
    Next,
    Solicited,
}

/// A completion queue. `state` is held while an entry or an event is written.
#[derive(Debug)]
pub(super) struct Cq {
    pub(super) cqn: u32,
    pub(super) uar_page: u32,
    eq: Arc<Eq>,
    dbr: u64,
    state: Mutex<State>,
    destroyed: AtomicBool,
}

#[derive(Debug)]
struct State {
    context: Cqc,
    buffer: Buffer,
    log_size: u32,
    /// Logarithm of an entry's bytes.
    stride: u32,
    produced: u32,
    /// Of the doorbell record, when it was last read.
    consumed: u32,
    armed: Armed,
    /// One more than the index of the last solicited (or failed) completion.
    solicited: Option<u32>,
    overflow: bool,
}

/// What the caller has to tell the driver besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Posted {
    /// Nothing.
    Yes,
    /// An entry was lost: a CQ error.
    Overflow,
}

impl Cq {
    pub(super) fn new(cqn: u32, context: Cqc, buffer: Buffer, eq: Arc<Eq>) -> Self {
        Self {
            cqn,
            uar_page: context.get(Cqc::UAR_PAGE),
            eq,
            dbr: context.wide(Cqc::DBR_ADDR),
            state: Mutex::new(State {
                log_size: context.get(Cqc::LOG_SIZE),
                stride: entry_shift(&context),
                context,
                buffer,
                produced: 0,
                consumed: 0,
                armed: Armed::No,
                solicited: None,
                overflow: false,
            }),
            destroyed: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is written any more when this returns.
    pub(super) fn destroy(&self) {
        self.destroyed.store(true, Ordering::SeqCst);
        drop(self.state());
    }

    pub(super) fn reports_to(&self, eqn: u8) -> bool {
        self.eq.eqn == eqn
    }

    /// The context as it is now.
    pub(super) fn query(&self) -> Cqc {
        let state = self.state();
        let armed = match state.armed {
            Armed::No => STATE_FIRED,
            Armed::Next => STATE_ARMED,
            Armed::Solicited => STATE_SOLICITED_ARMED,
        };
        state
            .context
            .clone()
            .with(Cqc::STATUS, if state.overflow { STATUS_OVERFLOW } else { 0 })
            .with(Cqc::STATE, armed)
            .with(Cqc::CONSUMER, state.consumed)
            .with(Cqc::PRODUCER, state.produced)
    }

    /// Writes a completion and, if the queue is armed for it, an event.
    pub(super) fn post(
        &self,
        port: &mut Port,
        interrupts: &Interrupts,
        cqe: &Cqe,
        solicited: bool,
    ) -> Posted {
        let mut state = self.state();
        if self.destroyed.load(Ordering::SeqCst) || state.overflow {
            return Posted::Yes;
        }
        let state = &mut *state;
        let size = 1u32 << state.log_size;
        let full = |state: &State| state.produced.wrapping_sub(state.consumed) & MASK >= size;
        if full(state) {
            // Read only when it matters: the record is a line that the driver writes.
            if let Ok(consumed) = port.read_be32(self.dbr.wrapping_add(uar::DBR_CQ_CONSUMER)) {
                state.consumed = consumed & MASK;
            }
            if full(state) {
                state.overflow = true;
                tracing::warn!(cqn = self.cqn, "a completion queue is full; it is in error now");
                return Posted::Overflow;
            }
        }
        let index = state.produced;
        let mut place = u64::from(index & (size - 1)) << state.stride;
        // In a 128-byte entry the upper half is the one that counts.
        place += (1 << state.stride) - 64;
        let (iova, _) = state.buffer.at(place);
        let mut cqe = *cqe;
        cqe.op_own |= (index >> state.log_size & 1) as u8;
        if let Err(error) = port.hand_over(iova, cqe.as_bytes()) {
            tracing::warn!(cqn = self.cqn, iova, %error, "a completion cannot be written");
            state.overflow = true;
            return Posted::Overflow;
        }
        state.produced = index.wrapping_add(1) & MASK;
        let solicited = solicited || cqe.syndrome().is_some();
        if solicited {
            state.solicited = Some(state.produced);
        }
        if state.armed == Armed::Next || (state.armed == Armed::Solicited && solicited) {
            state.armed = Armed::No;
            self.fire(port, interrupts);
        }
        Posted::Yes
    }

    /// The driver's arm doorbell: its first word.
    pub(super) fn arm(&self, port: &mut Port, interrupts: &Interrupts, word: u32) {
        let mut state = self.state();
        if self.destroyed.load(Ordering::SeqCst) {
            return;
        }
        let consumed = word & uar::cq_arm::CONSUMER;
        state.consumed = consumed;
        let unread = |end: u32| {
            let ahead = end.wrapping_sub(consumed) & MASK;
            ahead != 0 && ahead <= MASK / 2
        };
        let (armed, due) = if word & uar::cq_arm::SOLICITED == 0 {
            (Armed::Next, unread(state.produced))
        } else {
            (Armed::Solicited, state.solicited.is_some_and(unread))
        };
        state.armed = if due { Armed::No } else { armed };
        if due {
            self.fire(port, interrupts);
        }
    }

    fn fire(&self, port: &mut Port, interrupts: &Interrupts) {
        let eqe = Eqe::new(Event::COMPLETION, 0).with(DATA_NUMBER, self.cqn);
        self.eq.post(port, interrupts, &eqe);
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        let state = self.state();
        serde_json::json!({
            "cqn": self.cqn, "eqn": self.eq.eqn, "entries": 1u32 << state.log_size, "produced": state.produced,
            "consumed": state.consumed, "armed": format!("{:?}", state.armed), "overflow": state.overflow,
        })
    }
}

/// Logarithm of an entry's bytes.
pub(super) fn entry_shift(context: &Cqc) -> u32 {
    if context.get(Cqc::CQE_SIZE) == 0 { 6 } else { 7 }
}
