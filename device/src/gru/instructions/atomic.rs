//! GAMIR and GAMER: atomics on client memory, truly atomic against the client's own.
//!
//! The translation for the store is found first, then the operation is done once, in the step that completes
//! the instruction. Elements are 4 or 8 bytes, naturally aligned; anything else is an invalid instruction.

use std::sync::atomic::Ordering;

use protos::gru::cb::{ExplicitOp, ImplicitOp};

use super::{Env, Operation, Step, Stop};
use crate::atc::{Access, Guard};

/// A read-modify-write of one word; `None` = leave it.
#[derive(Debug, Clone, Copy)]
enum Change {
    Swap(u64),
    Add(u64),
    Or(u64),
    And(u64),
    Xor(u64),
    CompareSwap { new: u64, expected: u64 },
}

impl Operation {
    pub(super) fn implicit_atomic(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let change = match ImplicitOp(self.issued.exopc()) {
            // Does not store: an entry that allows loads is enough.
            ImplicitOp::FETCH => return self.fetch(env),
            ImplicitOp::CLEAR => Change::Swap(0),
            ImplicitOp::INC => Change::Add(1),
            ImplicitOp::DEC => Change::Add(u64::MAX),
            _ => return Err(Stop::INVALID),
        };
        self.atomic(env, change)
    }

    pub(super) fn explicit_atomic(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let (op1, op2) = (self.idef6, self.idef3);
        let change = match ExplicitOp(self.issued.exopc()) {
            ExplicitOp::SWAP => Change::Swap(op1),
            ExplicitOp::OR => Change::Or(op1),
            ExplicitOp::AND => Change::And(op1),
            ExplicitOp::XOR => Change::Xor(op1),
            ExplicitOp::ADD => Change::Add(op1),
            ExplicitOp::CSWAP => Change::CompareSwap {
                new: op1,
                expected: op2,
            },
            _ => return Err(Stop::INVALID),
        };
        self.atomic(env, change)
    }

    fn word_bytes(&self) -> Result<u64, Stop> {
        match self.element_bytes()? {
            bytes @ (4 | 8) if self.baddr0.is_multiple_of(bytes) => Ok(bytes),
            _ => Err(Stop::INVALID),
        }
    }

    fn fetch(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let bytes = self.word_bytes()?;
        let guard = env.access(self.baddr0, bytes, Access::Read)?;
        let mut word = [0; 8];
        // Naturally aligned: one access.
        guard.read_into(&mut word[..bytes as usize]);
        guard.check().map_err(|_| Stop::LOST)?;
        self.left = 0;
        Ok(Step::Done(Some(u64::from_le_bytes(word))))
    }

    fn atomic(&mut self, env: &mut Env<'_>, change: Change) -> Result<Step, Stop> {
        let bytes = self.word_bytes()?;
        let guard = env.access(self.baddr0, bytes, Access::Write)?;
        let old = if bytes == 8 {
            change64(&guard, change)
        } else {
            change32(&guard, change)
        };
        guard.check().map_err(|_| Stop::LOST)?;
        self.left = 0;
        Ok(Step::Done(Some(old)))
    }
}

fn change64(guard: &Guard<'_>, change: Change) -> u64 {
    let word = guard
        .atomic64()
        .expect("a naturally aligned word is inside one page");
    match change {
        Change::Swap(value) => word.swap(value, Ordering::AcqRel),
        Change::Add(value) => word.fetch_add(value, Ordering::AcqRel),
        Change::Or(value) => word.fetch_or(value, Ordering::AcqRel),
        Change::And(value) => word.fetch_and(value, Ordering::AcqRel),
        Change::Xor(value) => word.fetch_xor(value, Ordering::AcqRel),
        Change::CompareSwap { new, expected } => word
            .compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_else(|found| found),
    }
}

fn change32(guard: &Guard<'_>, change: Change) -> u64 {
    let word = guard
        .atomic32()
        .expect("a naturally aligned word is inside one page");
    // The low half of an operand counts.
    u64::from(match change {
        Change::Swap(value) => word.swap(value as u32, Ordering::AcqRel),
        Change::Add(value) => word.fetch_add(value as u32, Ordering::AcqRel),
        Change::Or(value) => word.fetch_or(value as u32, Ordering::AcqRel),
        Change::And(value) => word.fetch_and(value as u32, Ordering::AcqRel),
        Change::Xor(value) => word.fetch_xor(value as u32, Ordering::AcqRel),
        Change::CompareSwap { new, expected } => word
            .compare_exchange(expected as u32, new as u32, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_else(|found| found),
    })
}
