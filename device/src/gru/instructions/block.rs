//! BSTORE and VFLUSH.

use std::sync::atomic::{Ordering, fence};

use super::{Env, Operation, STEP_BYTES, STEP_ELEMENTS, Step, Stop};
use crate::atc::Access;
use crate::gru::BstoreSource;

impl Operation {
    /// mem[baddr1 + i] = the source's element i. The driver's header does not say what the source is (section
    /// 16.6): see [`BstoreSource`].
    pub(super) fn bstore(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let element = self.element_bytes()?;
        if env.bstore_source == BstoreSource::Memory {
            return self.copy(env, element);
        }
        self.check_segment(env, self.tri0, element)?;
        let mut budget = STEP_BYTES;
        while self.left > 0 && budget >= element {
            let want = self.left.saturating_mul(element).min(budget - budget % element);
            let ds = env.ds + u64::from(self.tri0);
            let moved = env.store_segment(self.idef3, ds, want, element)? as u64;
            budget -= moved;
            self.idef3 = self.idef3.wrapping_add(moved);
            self.left -= moved / element;
            // Inside the data segment: checked before.
            self.tri0 += moved as u32;
        }
        Ok(self.more_or_done())
    }

    /// Client memory is coherent: nothing has to be written back. What remains of a flush is that every element
    /// is translated (and misses, and fails, like a load), and that everything before it is visible after it.
    pub(super) fn vflush(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let element = self.element_bytes()?;
        let step = self.idef6.wrapping_mul(element);
        for _ in 0..self.left.min(STEP_ELEMENTS) {
            let covered = env.covered(self.baddr0, element, Access::Read)?;
            if covered < element {
                env.covered(self.baddr0.wrapping_add(covered), element - covered, Access::Read)?;
            }
            self.baddr0 = self.baddr0.wrapping_add(step);
            self.left -= 1;
        }
        fence(Ordering::SeqCst);
        Ok(self.more_or_done())
    }
}
