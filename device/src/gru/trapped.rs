//! What the last trapped read of a word returned, where a later write must be understood as a change of it.
//!
//! A guest's locked operation on trapped memory arrives as a read and a write. Between the two an engine may
//! have changed the word; the write would undo that (reference section 17).

use std::collections::HashMap;
use std::sync::Mutex;

/// Remembered words by BAR2 offset. Only TFM words and DW0 of TGH and CCH are ever put in: bounded.
#[derive(Debug, Default)]
pub(super) struct Trapped {
    words: Mutex<HashMap<u64, u64>>,
}

impl Trapped {
    /// The bytes under `mask` of the word were read (or set) as `value`.
    pub(super) fn remember(&self, offset: u64, mask: u64, value: u64) {
        let mut words = self.lock();
        let word = words.entry(offset).or_default();
        *word = *word & !mask | value & mask;
    }

    /// What is remembered; zero when nothing was read.
    pub(super) fn remembered(&self, offset: u64) -> u64 {
        self.lock().get(&offset).copied().unwrap_or(0)
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, u64>> {
        self.words
            .lock()
            .expect("no thread dies while it remembers a word")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_remember_when_lanes_differ_keeps_the_others() {
        let trapped = Trapped::default();
        trapped.remember(8, u64::MAX, 0x1122_3344);
        trapped.remember(8, 0xff, 0);
        assert_eq!(trapped.remembered(8), 0x1122_3300);
        trapped.clear();
        assert_eq!(trapped.remembered(8), 0);
    }
}
