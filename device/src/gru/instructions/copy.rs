//! BCOPY.
//!
//! The data passes through the engine's own buffer, not through the data segment: the buffer that the
//! instruction names is checked against the segment's limit and then left alone. Source and destination
//! advance together; a miss on the destination drops what was staged, and the source is read again.

use super::{Env, Operation, STEP_BYTES, Step, Stop};
use protos::gru::map::HANDLE_BYTES;

impl Operation {
    pub(super) fn bcopy(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        let element = self.element_bytes()?;
        let buffer = u64::from(self.idef4) * HANDLE_BYTES as u64;
        if buffer + u64::from(self.issued.tri0()) > env.ds_bytes {
            return Err(Stop::SEGMENT);
        }
        self.copy(env, element)
    }

    /// Memory at baddr0 to memory at baddr1.
    pub(super) fn copy(&mut self, env: &mut Env<'_>, element: u64) -> Result<Step, Stop> {
        let mut budget = STEP_BYTES;
        let result = loop {
            if self.left == 0 || budget < element {
                break Ok(self.more_or_done());
            }
            let want = self.left.saturating_mul(element).min(budget - budget % element);
            if let Err(stop) = self.copy_some(env, want, element) {
                break Err(stop);
            }
            budget -= want;
        };
        // What a preloading driver reads: source lines that remain (section 17.7).
        let bytes = self.left.saturating_mul(element);
        self.idef6 = bytes.div_ceil(HANDLE_BYTES as u64);
        result
    }

    /// One guard's worth from the source, and all of that to the destination.
    fn copy_some(&mut self, env: &mut Env<'_>, want: u64, element: u64) -> Result<(), Stop> {
        let loaded = env.load(self.baddr0, want, element)?;
        let mut stored = 0;
        while stored < loaded {
            let moved = env.store(self.idef3, stored, (loaded - stored) as u64, element)?;
            stored += moved;
            self.baddr0 = self.baddr0.wrapping_add(moved as u64);
            self.idef3 = self.idef3.wrapping_add(moved as u64);
            self.left -= moved as u64 / element;
        }
        Ok(())
    }
}
