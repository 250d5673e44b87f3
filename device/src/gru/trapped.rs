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
    /// A read of the bytes under `mask`. The look and its memory are one step: a write of another thread between the
    /// two would take away what it has not seen.
    pub(super) fn read(&self, offset: u64, mask: u64, load: impl FnOnce() -> u64) -> u64 {
        self.change(offset, |seen| {
            let value = load();
            *seen = *seen & !mask | value & mask;
            value
        })
    }

    /// A write: `change` gets what the last reads returned (zero when nothing was read), and says what of it is
    /// still to be given back. No other access to these words comes between.
    pub(super) fn change<T>(&self, offset: u64, change: impl FnOnce(&mut u64) -> T) -> T {
        change(self.lock().entry(offset).or_default())
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
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn test_read_when_lanes_differ_keeps_the_others() {
        let trapped = Trapped::default();
        assert_eq!(trapped.read(8, u64::MAX, || 0x1122_3344), 0x1122_3344);
        assert_eq!(trapped.read(8, 0xff, || 0x5500), 0x5500);
        assert_eq!(trapped.change(8, |seen| *seen), 0x1122_3300);
        trapped.clear();
        assert_eq!(trapped.change(8, |seen| *seen), 0);
    }

    /// Between a look at the word and the memory of it nobody may write: the write would clear a bit for which the
    /// device may since have had another event, and the memory would then clear that one unseen.
    #[test]
    fn test_change_when_another_thread_is_looking_waits_for_it() {
        let trapped = Trapped::default();
        let (send, receive) = mpsc::channel();
        std::thread::scope(|scope| {
            let trapped = &trapped;
            trapped.read(8, u64::MAX, || {
                scope.spawn(move || send.send(trapped.change(8, std::mem::take)));
                let early = receive.recv_timeout(Duration::from_millis(50));
                assert!(early.is_err(), "a write came in between: {early:?}");
                5
            });
            assert_eq!(receive.recv().unwrap(), 5);
        });
    }
}
