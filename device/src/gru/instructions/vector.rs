//! VLOAD, VSTORE, VSET and their indexed forms.

use protos::gru::cb::Opc;

use super::{Env, Operation, STEP_BYTES, STEP_ELEMENTS, Step, Stop};
use crate::gru::IndexUnit;

/// Bytes of an index in the data segment (section 16.6).
const INDEX_BYTES: u64 = 8;

impl Operation {
    pub(super) fn vector(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let element = self.element_bytes()?;
        if self.issued.opc() != Opc::VSET {
            self.check_segment(env, self.tri0, element)?;
        }
        if self.idef6 == 1 {
            self.contiguous(env, element)
        } else {
            self.strided(env, element)
        }
    }

    /// Stride 1: one copy for each guard.
    fn contiguous(&mut self, env: &mut Env<'_>, element: u64) -> Result<Step, Stop> {
        let mut budget = STEP_BYTES;
        if self.issued.opc() == Opc::VSET {
            let all = self.left.saturating_mul(element).min(budget) as usize;
            pattern(&mut env.bounce[..all], self.idef3, element);
        }
        while self.left > 0 && budget >= element {
            let want = self.left.saturating_mul(element).min(budget - budget % element);
            let moved = self.transfer(env, self.baddr0, want, element)?;
            budget -= moved;
            self.baddr0 = self.baddr0.wrapping_add(moved);
            self.advance(moved / element, element);
        }
        Ok(self.more_or_done())
    }

    fn strided(&mut self, env: &mut Env<'_>, element: u64) -> Result<Step, Stop> {
        let step = self.idef6.wrapping_mul(element);
        if self.issued.opc() == Opc::VSET {
            pattern(&mut env.bounce[..element as usize], self.idef3, element);
        }
        for _ in 0..self.left.min(STEP_ELEMENTS) {
            self.transfer(env, self.baddr0, element, element)?;
            self.baddr0 = self.baddr0.wrapping_add(step);
            self.advance(1, element);
        }
        Ok(self.more_or_done())
    }

    /// IVLOAD, IVSTORE, IVSET: baddr0 stays, the index vector is walked.
    pub(super) fn indexed(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let element = self.element_bytes()?;
        if self.issued.opc() != Opc::IVSET {
            self.check_segment(env, self.tri0, element)?;
        } else {
            pattern(&mut env.bounce[..element as usize], self.idef3, element);
        }
        self.check_segment(env, self.idef4_now, INDEX_BYTES)?;
        let unit = match env.index_unit {
            IndexUnit::Bytes => 1,
            IndexUnit::Elements => element,
        };
        for _ in 0..self.left.min(STEP_ELEMENTS) {
            let mut index = [0; INDEX_BYTES as usize];
            env.memory
                .load_bytes(env.ds + u64::from(self.idef4_now), &mut index);
            let offset = u64::from_le_bytes(index).wrapping_mul(unit);
            self.transfer(env, self.baddr0.wrapping_add(offset), element, element)?;
            self.idef4_now += INDEX_BYTES as u32;
            self.advance(1, element);
        }
        Ok(self.more_or_done())
    }

    /// Moves whole elements, at least one and at most `want` bytes, between `va` and the data segment at the
    /// current offset, or sets them. Returns the bytes.
    fn transfer(&self, env: &mut Env<'_>, va: u64, want: u64, element: u64) -> Result<u64, Stop> {
        let ds = env.ds + u64::from(self.tri0);
        let moved = match self.issued.opc() {
            Opc::VLOAD | Opc::IVLOAD => env.load_segment(va, ds, want, element)?,
            Opc::VSTORE | Opc::IVSTORE => env.store_segment(va, ds, want, element)?,
            // The pattern is in the buffer.
            _ => env.store(va, 0, want, element)?,
        };
        Ok(moved as u64)
    }

    fn advance(&mut self, elements: u64, element: u64) {
        self.left -= elements;
        if !matches!(self.issued.opc(), Opc::VSET | Opc::IVSET) {
            // Inside the data segment: checked before.
            self.tri0 += (elements * element) as u32;
        }
    }

    pub(super) fn more_or_done(&self) -> Step {
        if self.left == 0 {
            Step::Done(None)
        } else {
            Step::More
        }
    }
}

/// Fills `to` with elements of `value`; a line is eight times the value.
fn pattern(to: &mut [u8], value: u64, element: u64) {
    let bytes = value.to_le_bytes();
    let one = &bytes[..element.min(8) as usize];
    for piece in to.chunks_mut(one.len()) {
        let count = piece.len();
        piece.copy_from_slice(&one[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_pattern_when_element_is_small_repeats_its_bytes() {
        let mut bytes = [0; 8];
        pattern(&mut bytes, 0xaabb_ccdd_1122_3344, 2);
        assert_eq!(bytes, [0x44, 0x33, 0x44, 0x33, 0x44, 0x33, 0x44, 0x33]);
        let mut line = [0; 64];
        pattern(&mut line, 0x0102_0304_0506_0708, 64);
        assert_eq!(line[56..], 0x0102_0304_0506_0708u64.to_le_bytes());
    }
}
