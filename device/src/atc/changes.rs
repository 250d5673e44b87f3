//! Level 2 of the sanitizer: what a host daemon says about the mappings (`protos::bridge::changes`).
//!
//! A change that has been heard is over: nothing may use a translation from before it. That is compared with every access
//! that begins later, with every fill, and with the accesses that are running when it is heard. Changes are heard before
//! an access looks up and before it leaves, so that one which was over by then has been heard.

use std::collections::VecDeque;

use protos::bridge::changes::{Shown, is_older};

use super::defect::{Defect, Report, Stamp};
use super::reach::Span;
use super::shadow::{Inside, Record, Seen, Shadow};

/// Changes that are remembered.
const REMEMBERED: usize = 1024;

/// A change, as it was heard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) generation: u64,
}

impl Change {
    fn outdates(&self, tag: u64, span: Span) -> bool {
        is_older(tag, self.generation) && self.start <= span.last && span.first < self.end
    }
}

#[derive(Debug, Clone, Copy)]
struct Heard {
    change: Change,
    at: Stamp,
}

/// All that have been heard, and are remembered.
#[derive(Debug)]
pub(super) struct Changes {
    last: VecDeque<Heard>,
    /// All of them.
    pub(super) heard: u64,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            last: VecDeque::with_capacity(REMEMBERED),
            heard: 0,
        }
    }
}

impl Changes {
    /// The newest that outdates a translation of `span`, heard by event `by`.
    fn outdating(&self, tag: u64, span: Span, by: u64) -> Option<Heard> {
        let mut all = self.last.iter().rev();
        all.find(|heard| heard.at.event <= by && heard.change.outdates(tag, span))
            .copied()
    }
}

fn bytes_of(seen: &Seen) -> Span {
    Span {
        first: seen.va,
        last: seen.va + (seen.len.max(1) - 1),
    }
}

impl Shadow {
    /// A change is over.
    pub(super) fn changed(&mut self, change: Change) {
        let at = self.event();
        let heard = Heard { change, at };
        let changes = self.changes.as_mut().expect("changes are heard at level 2 only");
        changes.heard += 1;
        if changes.last.len() == REMEMBERED {
            changes.last.pop_front();
        }
        changes.last.push_back(heard);
        self.mark_outdated(|record| change.outdates(record.entry.tag, record.entry.span()));
        for engine in 0..self.guards.len() {
            let Some(inside) = self.guards[engine].filter(Inside::counts) else {
                continue;
            };
            if change.outdates(inside.record.entry.tag, bytes_of(&inside.seen)) {
                self.report_stale(
                    &inside.record,
                    Some(&inside.seen),
                    heard,
                    "the access was still running",
                );
            }
        }
    }

    /// Whatever was heard is forgotten: its teller is gone, and every entry with it.
    pub(super) fn forget_changes(&mut self) {
        if let Some(changes) = &mut self.changes {
            changes.last.clear();
        }
    }

    /// An access has found an entry that some change outdates.
    pub(super) fn used_outdated(&mut self, seen: &Seen, record: &Record) {
        let found = self
            .changes
            .as_ref()
            .and_then(|changes| changes.outdating(record.entry.tag, bytes_of(seen), seen.after));
        if let Some(heard) = found {
            self.report_stale(record, Some(seen), heard, "the access began later");
        }
    }

    /// A translation has been entered.
    pub(super) fn filled_late(&mut self, record: &mut Record) {
        let entry = &record.entry;
        let found = self
            .changes
            .as_ref()
            .and_then(|changes| changes.outdating(entry.tag, entry.span(), u64::MAX));
        if let Some(heard) = found {
            record.outdated = true;
            self.report_stale(record, None, heard, "the translation was entered later");
        }
    }

    fn report_stale(&mut self, record: &Record, seen: Option<&Seen>, heard: Heard, how: &str) {
        let Change {
            start,
            end,
            generation,
        } = heard.change;
        let entry = &record.entry;
        let va = seen.map_or(entry.va, |seen| seen.va);
        let report = Report {
            iova: Some(entry.iova + (va - entry.va)),
            engine: seen.map(|seen| seen.engine),
            by: seen.map_or(record.by, |seen| seen.by),
            access: seen.map(|seen| seen.access),
            detail: format!(
                "the daemon's change of {start:#x} to {end:#x}, generation {}, was over at {}; {how}",
                Shown(generation),
                heard.at
            ),
            entry: Some(record.life()),
            purges: self.purges_of(record),
            ..self.blank(Defect::StaleTranslation, entry.space, va)
        };
        self.found(report);
    }
}
