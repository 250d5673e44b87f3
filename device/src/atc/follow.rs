//! Reads the log of changes in the client's memory, for the sanitizer's level 2.
//!
//! The log is the client's, like any memory: it may be unmapped or truncated at any time, or hold anything. What it says
//! is compared with numbers and printed, nothing more.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use protos::bridge::changes::{CHANGE_BYTES, CHANGES, LOG_BYTES};

use super::cache::Atc;
use super::changes::Change;
use crate::dma::Resolved;

/// Nobody has named a log.
const NOWHERE: u64 = u64::MAX;

/// How far the log has been read.
#[derive(Debug)]
pub(super) struct Follower {
    /// IOVA of the log.
    log: AtomicU64,
    /// Number of the next change.
    next: Mutex<u64>,
}

impl Default for Follower {
    fn default() -> Self {
        Self {
            log: AtomicU64::new(NOWHERE),
            next: Mutex::new(0),
        }
    }
}

enum Next {
    NotYet,
    Change(Change),
    /// The writers have come round: this one is to be read next.
    Overtaken(u64),
}

impl Atc {
    /// Sanitizer, level 2: a log of changes is at this IOVA from now on, to be read from its beginning, or there is none
    /// any more. No entry is older than the call. Nothing happens without [`super::AtcConfig::follow`].
    pub fn follow_changes(&self, log: Option<u64>) {
        if !self.follows {
            return;
        }
        let follower = &self.follower;
        let mut next = follower.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = 0;
        self.core.tell(|shadow| shadow.forget_changes());
        follower.log.store(log.unwrap_or(NOWHERE), Ordering::Release);
    }

    /// What has been told until now is in the record. The number of the last event.
    #[cold]
    pub(super) fn hear(&self) -> u64 {
        let follower = &self.follower;
        if follower.log.load(Ordering::Relaxed) != NOWHERE {
            let mut next = follower.next.lock().unwrap_or_else(PoisonError::into_inner);
            let at = follower.log.load(Ordering::Acquire);
            if at != NOWHERE {
                self.read_log(at, &mut next);
            }
        }
        self.core.events()
    }

    fn read_log(&self, at: u64, next: &mut u64) {
        let log = match self.dma().resolve(at, LOG_BYTES as u64, false) {
            Ok(log) => log,
            Err(error) => {
                tracing::warn!(%error, "the log of changes is gone; the sanitizer goes on without");
                self.follower.log.store(NOWHERE, Ordering::Release);
                return;
            }
        };
        // Bounded: the client may write faster than this reads.
        for _ in 0..CHANGES {
            let read = read(&log, *next);
            if log.check().is_err() {
                // Zeros, perhaps. The next attempt finds no log.
                return;
            }
            match read {
                Next::NotYet => return,
                Next::Change(change) => {
                    *next += 1;
                    self.core.tell(|shadow| shadow.changed(change));
                }
                Next::Overtaken(first) => {
                    tracing::debug!(from = *next, to = first, "changes were lost to the sanitizer");
                    *next = first;
                }
            }
        }
    }
}

fn read(log: &Resolved<'_>, number: u64) -> Next {
    let record = (number % CHANGES as u64) as usize * CHANGE_BYTES;
    let word = |index: usize| {
        let mut bytes = [0; 8];
        log.window().read(record + 8 * index, &mut bytes);
        u64::from_ne_bytes(bytes)
    };
    let found = word(0);
    if found <= number {
        return Next::NotYet;
    }
    fence(Ordering::Acquire);
    let change = Change {
        start: word(1),
        end: word(2),
        generation: word(3),
    };
    fence(Ordering::Acquire);
    if found == number + 1 && word(0) == found {
        return Next::Change(change);
    }
    // The oldest that may still be there, and a margin for those that are being written. Never backwards: the client
    // may have written anything.
    let oldest = found.saturating_sub(CHANGES as u64 / 2);
    Next::Overtaken(oldest.max(number + 1))
}
