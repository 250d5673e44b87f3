//! GAMIR, GAMIRR, GAMER and GAMERR: atomics on client memory, truly atomic against the client's own.
//!
//! The translation for the store is found first, then the operation is done once, in the step that completes
//! the instruction. Elements are 4 or 8 bytes, naturally aligned; anything else is an invalid instruction.
//!
//! The "registered" forms differ in the operations that they have. Decided here: DECZ leaves a zero alone; the polls
//! compare with op1 and return what they saw.

use std::sync::atomic::Ordering;

use protos::gru::cb::{ExplicitOp, ImplicitOp, Opc};

use super::place::Place;
use super::{Env, Operation, Step, Stop};
use crate::atc::Access;

/// A read-modify-write of one word; `None` = leave it.
#[derive(Debug, Clone, Copy)]
enum Change {
    Swap(u64),
    Add(u64),
    /// Minus one, unless zero.
    CountDown,
    Or(u64),
    And(u64),
    Xor(u64),
    CompareSwap {
        new: u64,
        expected: u64,
    },
}

impl Operation {
    pub(super) fn implicit_atomic(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let change = match (ImplicitOp(self.issued.exopc()), self.issued.opc()) {
            // Does not store: an entry that allows loads is enough.
            (ImplicitOp::FETCH, _) => {
                let value = self.fetch(env)?;
                self.left = 0;
                return Ok(Step::Done(Some(value)));
            }
            (ImplicitOp::CLEAR, _) => Change::Swap(0),
            (ImplicitOp::INC, _) => Change::Add(1),
            (ImplicitOp::DEC, _) => Change::Add(u64::MAX),
            (ImplicitOp::DECZ, Opc::GAMIRR) => Change::CountDown,
            (ImplicitOp::QCHK1, Opc::GAMIR) => return self.queue_check(env, 1),
            (ImplicitOp::QCHK2, Opc::GAMIR) => return self.queue_check(env, 2),
            _ => return Err(Stop::INVALID),
        };
        self.atomic(env, change)
    }

    pub(super) fn explicit_atomic(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let (op1, op2) = (self.idef6, self.idef3);
        let change = match (ExplicitOp(self.issued.exopc()), self.issued.opc()) {
            (ExplicitOp::SWAP, _) => Change::Swap(op1),
            (ExplicitOp::OR, _) => Change::Or(op1),
            (ExplicitOp::AND, _) => Change::And(op1),
            (ExplicitOp::XOR, _) => Change::Xor(op1),
            (ExplicitOp::ADD, _) => Change::Add(op1),
            (ExplicitOp::CSWAP, _) => Change::CompareSwap {
                new: op1,
                expected: op2,
            },
            (ExplicitOp::CADD, Opc::GAMER) => return self.queue_check(env, op1),
            (ExplicitOp::EPOLL, Opc::GAMERR) => return self.poll(env, |equal| equal),
            (ExplicitOp::NPOLL, Opc::GAMERR) => return self.poll(env, |equal| !equal),
            _ => return Err(Stop::INVALID),
        };
        self.atomic(env, change)
    }

    /// One look; the control block parks until the next one.
    fn poll(&mut self, env: &mut Env<'_>, enough: impl Fn(bool) -> bool) -> Result<Step, Stop> {
        let wanted = match self.word_bytes()? {
            8 => self.idef6,
            _ => self.idef6 & u64::from(u32::MAX),
        };
        let value = self.fetch(env)?;
        if !enough(value == wanted) {
            return Ok(Step::Wait);
        }
        self.left = 0;
        Ok(Step::Done(Some(value)))
    }

    pub(super) fn word_bytes(&self) -> Result<u64, Stop> {
        match self.element_bytes()? {
            bytes @ (4 | 8) if self.baddr0.is_multiple_of(bytes) => Ok(bytes),
            _ => Err(Stop::INVALID),
        }
    }

    fn fetch(&self, env: &mut Env<'_>) -> Result<u64, Stop> {
        let bytes = self.word_bytes()?;
        let place = env.atomic(self.baddr0, bytes, Access::Read)?;
        let mut word = [0; 8];
        // Naturally aligned: one access.
        place.read_into(&mut word[..bytes as usize]);
        place.check()?;
        Ok(u64::from_le_bytes(word))
    }

    fn atomic(&mut self, env: &mut Env<'_>, change: Change) -> Result<Step, Stop> {
        let bytes = self.word_bytes()?;
        let place = env.atomic(self.baddr0, bytes, Access::Write)?;
        let old = if bytes == 8 {
            change64(&place, change)
        } else {
            change32(&place, change)
        };
        place.check()?;
        self.left = 0;
        Ok(Step::Done(Some(old)))
    }
}

fn change64(place: &Place<'_>, change: Change) -> u64 {
    let word = place.word64(0);
    match change {
        Change::Swap(value) => word.swap(value, Ordering::AcqRel),
        Change::Add(value) => word.fetch_add(value, Ordering::AcqRel),
        Change::CountDown => word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| old.checked_sub(1))
            .unwrap_or_else(|zero| zero),
        Change::Or(value) => word.fetch_or(value, Ordering::AcqRel),
        Change::And(value) => word.fetch_and(value, Ordering::AcqRel),
        Change::Xor(value) => word.fetch_xor(value, Ordering::AcqRel),
        Change::CompareSwap { new, expected } => word
            .compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_else(|found| found),
    }
}

fn change32(place: &Place<'_>, change: Change) -> u64 {
    let word = place.word32();
    // The low half of an operand counts.
    u64::from(match change {
        Change::Swap(value) => word.swap(value as u32, Ordering::AcqRel),
        Change::Add(value) => word.fetch_add(value as u32, Ordering::AcqRel),
        Change::CountDown => word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| old.checked_sub(1))
            .unwrap_or_else(|zero| zero),
        Change::Or(value) => word.fetch_or(value as u32, Ordering::AcqRel),
        Change::And(value) => word.fetch_and(value as u32, Ordering::AcqRel),
        Change::Xor(value) => word.fetch_xor(value as u32, Ordering::AcqRel),
        Change::CompareSwap { new, expected } => word
            .compare_exchange(expected as u32, new as u32, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_else(|found| found),
    })
}
