//! Deadlines of queue pairs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Time;

/// A heap by deadline. A queue pair has one valid entry (`Qp::alarm`); an entry that is not valid any more is thrown
/// away when it comes up, and a deadline that moved back is entered anew then. So an acknowledgement, which moves a
/// deadline, costs nothing here.
#[derive(Debug, Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Time, u32)>>,
}

impl Timers {
    /// Wake `slot` at `deadline`; `alarm` is its valid entry.
    pub(super) fn arm(&mut self, slot: u32, alarm: &mut Option<Time>, deadline: Time) {
        if alarm.is_none_or(|at| deadline < at) {
            *alarm = Some(deadline);
            self.heap.push(Reverse((deadline, slot)));
        }
    }

    /// Forgets everything but these entries.
    pub(super) fn refill(&mut self, valid: impl Iterator<Item = (Time, u32)>) {
        self.heap.clear();
        self.heap.extend(valid.map(Reverse));
    }

    /// The next entry that is due.
    pub(super) fn due(&mut self, now: Time) -> Option<(Time, u32)> {
        let Reverse((at, _)) = self.heap.peek()?;
        if *at > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry)
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }

    /// The next entry; it may be one that does not count any more.
    pub(super) fn next(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }
}
