//! GAMXR: masked compare-exchange of a fragment of a cache line.
//!
//! The driver's header names the instruction (4 double words) and no layout of its operands. Decided here: the
//! data segment has four vectors of nelem double words at tri0: the new value, the value to compare with, the
//! mask, and room for the old value. The fragment is replaced under the mask if it equals the second vector
//! under the mask. avalue is the fragment's first double word as it was.
//!
//! nelem is 1, 2, 4 or 8, and the fragment is naturally aligned. It is one decision against every other GAMXR of
//! the device. Other atomics, and the client's processors, can come between the comparison and the double words
//! when there are several under the mask: then each is exchanged by itself. (No processor has such an atomic.)

use std::sync::atomic::{AtomicBool, Ordering};

use protos::gru::cb::{ExchangeOp, XType};

use super::{Env, Operation, Step, Stop};
use crate::atc::Access;
use crate::gru::memory::BarMemory;

const WORD: u64 = 8;
/// Double words of a cache line.
const MOST: usize = 8;

/// Held by the GAMXR that is being executed. Who does not get it tries again at the next look.
#[derive(Debug)]
struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn take(taken: &'a AtomicBool) -> Option<Self> {
        (!taken.swap(true, Ordering::Acquire)).then_some(Self(taken))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn load(memory: &BarMemory, at: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.load_bytes(at, &mut bytes);
    u64::from_le_bytes(bytes)
}

impl Operation {
    pub(super) fn exchange(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let size = self.nelem.saturating_mul(WORD);
        if ExchangeOp(self.issued.exopc()) != ExchangeOp::CSWAP
            || self.issued.xtype() != XType::DWORD
            || !matches!(self.nelem, 1 | 2 | 4 | 8)
            || !self.baddr0.is_multiple_of(size)
        {
            return Err(Stop::INVALID);
        }
        if u64::from(self.tri0) + 4 * size > env.ds_bytes {
            return Err(Stop::SEGMENT);
        }
        let count = self.nelem as usize;
        let operands = env.ds + u64::from(self.tri0);
        let (mut new, mut compare, mut mask) = ([0; MOST], [0; MOST], [0; MOST]);
        for (vector, into) in [&mut new, &mut compare, &mut mask].into_iter().enumerate() {
            for (index, word) in into[..count].iter_mut().enumerate() {
                *word = load(env.memory, operands + vector as u64 * size + index as u64 * WORD);
            }
        }
        let (taken, memory) = (env.exchanging, env.memory);
        let place = env.atomic(self.baddr0, size, Access::Write)?;
        let Some(turn) = Turn::take(taken) else {
            return Ok(Step::More);
        };
        let word = |index: usize| place.word64(8 * index);
        let mut old = [0; MOST];
        if mask[..count].iter().filter(|&&mask| mask != 0).count() <= 1 {
            let only = mask[..count].iter().position(|&mask| mask != 0).unwrap_or(0);
            // One double word at most: truly atomic.
            for (index, old) in old[..count].iter_mut().enumerate() {
                *old = word(index).load(Ordering::Acquire);
            }
            let change = |found: u64| {
                let equal = (found ^ compare[only]) & mask[only] == 0;
                equal.then_some(found & !mask[only] | new[only] & mask[only])
            };
            let result = word(only).fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
            old[only] = result.unwrap_or_else(|found| found);
        } else {
            for (index, old) in old[..count].iter_mut().enumerate() {
                *old = word(index).load(Ordering::Acquire);
            }
            if (0..count).all(|i| (old[i] ^ compare[i]) & mask[i] == 0) {
                for i in (0..count).filter(|&i| mask[i] != 0) {
                    let change = |found: u64| Some(found & !mask[i] | new[i] & mask[i]);
                    old[i] = word(i)
                        .fetch_update(Ordering::AcqRel, Ordering::Acquire, change)
                        .unwrap_or_else(|found| found);
                }
            }
        }
        place.check()?;
        drop(turn);
        for (index, old) in old[..count].iter().enumerate() {
            memory.store_bytes(operands + 3 * size + index as u64 * WORD, &old.to_le_bytes());
        }
        self.left = 0;
        Ok(Step::Done(Some(old[0])))
    }
}
