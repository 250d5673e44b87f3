//! The sanitizer's own record of what the ATC was told and what it did.
//!
//! It is kept beside the ATC, never looked at by it, and is made from the commands alone: which misses were opened,
//! which purges came and ended, which fills were accepted, who is inside an access. It does not know about the ATC's
//! own verdicts (unions of purged ranges, purges that are active, epochs), so that a mistake in those shows as a
//! contradiction. Events are put in order by being recorded in the critical section in which they happen.
//!
//! Bounded: two entries for each slot of the TLB, [`PURGES`] purges, one guard for each engine, and
//! [`Findings::MAX_REPORTS`] reports. What is not remembered any more counts as unjudged, never as a defect.

use std::collections::VecDeque;
use std::time::Instant;

use super::changes::Changes;
use super::defect::{Defect, EntryLife, Findings, Initiator, Names, PurgeLife, Report, Stamp};
use super::reach::{Reach, Span};
use super::slot::Entry;
use super::types::{Access, PageSize, Purge, SpaceId};

/// Purges that are remembered.
const PURGES: usize = 4096;
/// Purges that a report lists.
const LISTED: usize = 6;
/// Not in the list of live slots.
const NOWHERE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Line {
    number: u64,
    reach: Reach,
    what: Purge,
    begun: Stamp,
    finished: Option<Stamp>,
}

impl Line {
    fn life(&self) -> PurgeLife {
        PurgeLife {
            purge: self.number,
            what: self.what,
            begun: self.begun,
            finished: self.finished,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct OpenMiss {
    opened: Stamp,
    by: Initiator,
    /// Number of the first purge that comes after it.
    next_purge: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub(super) entry: Entry,
    fill: u64,
    pub(super) by: Initiator,
    missed: Stamp,
    filled: Stamp,
    next_purge: u64,
    /// The first purge that met it, and that purge's beginning.
    killed: Option<(u64, u64, Reach)>,
    /// Level 2: a change outdates it.
    pub(super) outdated: bool,
}

impl Record {
    pub(super) fn life(&self) -> EntryLife {
        EntryLife {
            fill: self.fill,
            by: self.by,
            va: self.entry.va,
            size: PageSize::new(self.entry.shift).expect("only valid sizes are entered"),
            iova: self.entry.iova,
            writable: self.entry.writable,
            storable: self.entry.storable,
            tag: self.entry.tag,
            missed: self.missed,
            filled: self.filled,
        }
    }
}

/// An access, as the engine says it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) engine: usize,
    /// Number of the last event before it entered.
    pub(super) after: u64,
    pub(super) space: u64,
    pub(super) va: u64,
    pub(super) len: u64,
    pub(super) shift: u8,
    /// Host address of the page that it found.
    pub(super) host: u64,
    pub(super) access: Access,
    pub(super) by: Initiator,
}

/// How far an access by message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Not by message.
    No,
    /// The client is being asked; what it says is thrown away if need be.
    Open,
    /// A request to write has been sent.
    Sent,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Inside {
    pub(super) seen: Seen,
    pub(super) record: Record,
    asked: Asked,
    /// Number of the first purge that comes after it.
    next_purge: u64,
}

impl Inside {
    /// Memory may be accessed just now.
    pub(super) fn counts(&self) -> bool {
        self.asked != Asked::Open
    }
}

/// The record.
#[derive(Debug)]
pub(super) struct Shadow {
    names: Names,
    started: Instant,
    events: u64,
    fills: u64,
    /// By slot of the TLB: what was entered last, and before that.
    records: Box<[[Option<Record>; 2]]>,
    /// Slots whose last entry no purge has met; and where each is in this list.
    live: Vec<u32>,
    place: Box<[u32]>,
    misses: Box<[Option<OpenMiss>]>,
    purges: VecDeque<Line>,
    next_purge: u64,
    /// Purges that are not finished.
    running: Vec<u64>,
    pub(super) guards: Box<[Option<Inside>]>,
    /// Level 2.
    pub(super) changes: Option<Changes>,
    /// Who holds which spaces; `None`: nobody has ever said so, and nothing is checked.
    holders: Option<Vec<(usize, Vec<u64>)>>,
    findings: Findings,
    /// Reports that nobody has printed yet.
    unsaid: usize,
}

impl Shadow {
    pub(super) fn new(names: Names, slots: usize, tickets: usize, engines: usize, follow: bool) -> Self {
        Self {
            names,
            started: Instant::now(),
            events: 0,
            fills: 0,
            records: vec![[None; 2]; slots].into(),
            live: Vec::with_capacity(slots),
            place: vec![NOWHERE; slots].into(),
            misses: vec![None; tickets].into(),
            purges: VecDeque::with_capacity(PURGES),
            next_purge: 1,
            running: Vec::with_capacity(64),
            guards: vec![None; engines].into(),
            changes: follow.then(Changes::default),
            holders: None,
            findings: Findings::default(),
            unsaid: 0,
        }
    }

    /// The number of the last event.
    pub(super) fn events(&self) -> u64 {
        self.events
    }

    fn now(&self) -> Stamp {
        Stamp {
            event: self.events,
            time_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
        }
    }

    pub(super) fn event(&mut self) -> Stamp {
        self.events += 1;
        self.now()
    }

    // ---- misses and fills ----

    pub(super) fn opened(&mut self, ticket: usize, by: Initiator) {
        let opened = self.event();
        self.misses[ticket] = Some(OpenMiss {
            opened,
            by,
            next_purge: self.next_purge,
        });
    }

    pub(super) fn closed(&mut self, ticket: usize) {
        self.misses[ticket] = None;
    }

    /// A fill was accepted, and is in `slot` now.
    pub(super) fn filled(&mut self, slot: usize, ticket: usize, entry: &Entry) {
        let filled = self.event();
        self.fills += 1;
        self.findings.checked += 1;
        let miss = self.misses[ticket];
        let mut record = Record {
            entry: *entry,
            fill: self.fills,
            by: miss.map_or(Initiator::default(), |miss| miss.by),
            missed: miss.map_or(filled, |miss| miss.opened),
            filled,
            next_purge: self.next_purge,
            killed: None,
            outdated: false,
        };
        self.filled_late(&mut record);
        let [last, before] = &mut self.records[slot];
        *before = last.replace(record);
        if self.place[slot] == NOWHERE {
            self.place[slot] = self.live.len() as u32;
            self.live.push(slot as u32);
        }
        let since = miss.map_or(self.next_purge, |miss| miss.next_purge);
        let met = self.met(&record, since, filled.event);
        let hit = met.iter().any(|line| {
            // Memory that was unmapped before is another one now, or the fill would have found none.
            line.finished.is_none() || !line.reach.frees_memory()
        });
        if hit {
            let report = Report {
                entry: Some(record.life()),
                purges: met.iter().map(Line::life).collect(),
                iova: Some(record.entry.iova),
                by: record.by,
                ..self.blank(Defect::FillAfterKill, record.entry.space, record.entry.va)
            };
            self.found(report);
        } else if self.purges.front().is_some_and(|oldest| since < oldest.number) {
            self.findings.unjudged += 1;
        }
    }

    /// Purges that meet an entry: those numbered from `since` on, and those that had not finished at `event`.
    fn met(&self, record: &Record, since: u64, event: u64) -> Vec<Line> {
        let entry = &record.entry;
        let meets = |line: &&Line| line.reach.meets(entry.space, entry.span(), entry.target());
        let mut met: Vec<Line> = self
            .running
            .iter()
            .filter_map(|&number| self.line(number))
            .filter(|line| line.number < since && line.begun.event <= event)
            .filter(meets)
            .copied()
            .collect();
        let first = self.purges.front().map_or(since, |oldest| oldest.number);
        let skip = usize::try_from(since.saturating_sub(first)).unwrap_or(usize::MAX);
        met.extend(self.purges.iter().skip(skip).filter(meets));
        met.drain(..met.len().saturating_sub(LISTED));
        met
    }

    /// Where a purge is in the list, unless it is no longer remembered.
    fn place_of(&self, number: u64) -> Option<usize> {
        let first = self.purges.front()?.number;
        usize::try_from(number.checked_sub(first)?).ok()
    }

    fn line(&self, number: u64) -> Option<&Line> {
        self.purges.get(self.place_of(number)?)
    }

    /// What has met an entry in its life.
    pub(super) fn purges_of(&self, record: &Record) -> Vec<PurgeLife> {
        let met = self.met(record, record.next_purge, record.filled.event);
        met.iter().map(Line::life).collect()
    }

    /// Marks those of the living entries.
    pub(super) fn mark_outdated(&mut self, is: impl Fn(&Record) -> bool) {
        for &slot in &self.live {
            let record = self.records[slot as usize][0].as_mut();
            let record = record.expect("a slot in the list has an entry");
            record.outdated |= is(record);
        }
    }

    // ---- purges ----

    /// A purge has cleared. (Called after the clearing: whoever enters later may not find what was there.) Its number.
    pub(super) fn begun(&mut self, what: Purge) -> u64 {
        let begun = self.event();
        let number = self.next_purge;
        self.next_purge += 1;
        let reach = Reach::from(what);
        if self.purges.len() == PURGES {
            self.purges.pop_front();
        }
        self.purges.push_back(Line {
            number,
            reach,
            what,
            begun,
            finished: None,
        });
        self.running.push(number);
        let mut at = 0;
        while at < self.live.len() {
            let slot = self.live[at] as usize;
            let record = self.records[slot][0]
                .as_mut()
                .expect("a slot in the list has an entry");
            let entry = &record.entry;
            if !reach.meets(entry.space, entry.span(), entry.target()) {
                at += 1;
                continue;
            }
            record.killed = Some((number, begun.event, reach));
            self.place[slot] = NOWHERE;
            self.live.swap_remove(at);
            if let Some(&moved) = self.live.get(at) {
                self.place[moved as usize] = at as u32;
            }
        }
        number
    }

    /// Somebody who waits for a purge can see that it is complete. Said by `who`.
    pub(super) fn complete(&mut self, number: u64, who: impl Fn() -> String) {
        let Some(&line) = self.line(number) else { return };
        for engine in 0..self.guards.len() {
            let Some(inside) = self.guards[engine] else {
                continue;
            };
            let (seen, entry) = (inside.seen, inside.record.entry);
            // A request whose answer is thrown away holds up nobody, nor does one to memory that the client takes back.
            let by_message = inside.asked != Asked::No;
            if !inside.counts() || by_message && line.reach.frees_memory() {
                continue;
            }
            // Who entered later, or by an entry that came later, is none of this purge's business.
            if seen.after >= line.begun.event || inside.record.filled.event > line.begun.event {
                continue;
            }
            let offset = seen.va - entry.va;
            let bytes = |first: u64| Span {
                first,
                last: first + (seen.len.max(1) - 1),
            };
            if !line
                .reach
                .meets(seen.space, bytes(seen.va), bytes(entry.iova + offset))
            {
                continue;
            }
            let report = Report {
                iova: Some(entry.iova + offset),
                engine: Some(engine),
                by: seen.by,
                access: Some(seen.access),
                detail: match by_message {
                    false => format!("purge {number} {}", who()),
                    true => format!("purge {number} {}; the store has been sent by message", who()),
                },
                entry: Some(inside.record.life()),
                purges: vec![line.life()],
                ..self.blank(Defect::CompletionBeforeDrain, seen.space, seen.va)
            };
            self.found(report);
        }
    }

    /// A purge is over.
    pub(super) fn finished(&mut self, number: u64) {
        let finished = self.event();
        self.running.retain(|&running| running != number);
        if let Some(line) = self.place_of(number).and_then(|at| self.purges.get_mut(at)) {
            line.finished = Some(finished);
        }
    }

    // ---- spaces ----

    /// From now on `holder` uses exactly these spaces.
    pub(super) fn holds(&mut self, holder: usize, spaces: &[SpaceId]) {
        self.event();
        let holders = self.holders.get_or_insert_default();
        holders.retain(|(who, _)| *who != holder);
        if !spaces.is_empty() {
            holders.push((holder, spaces.iter().map(|space| space.0).collect()));
        }
    }

    // ---- accesses ----

    /// An access has found an entry in one of `slots`, and is inside from now on.
    pub(super) fn entered(&mut self, seen: Seen, slots: std::ops::Range<usize>) {
        self.enter(seen, slots, Asked::No);
    }

    /// As [`Shadow::entered`], where the client will be asked for the memory.
    pub(super) fn asked(&mut self, seen: Seen, slots: std::ops::Range<usize>) {
        self.enter(seen, slots, Asked::Open);
    }

    fn enter(&mut self, seen: Seen, slots: std::ops::Range<usize>, asked: Asked) {
        self.findings.checked += 1;
        let page = (1u64 << seen.shift) - 1;
        // The last of those that say the same: an earlier life of it may still stand in another way.
        let same = |record: &&Record| {
            let entry = &record.entry;
            (entry.space, entry.va, entry.shift, entry.host)
                == (seen.space, seen.va & !page, seen.shift, seen.host)
        };
        let all = self.records[slots].iter().flatten().flatten();
        let found = all.filter(same).max_by_key(|record| record.filled.event);
        // Replaced twice since the access found it.
        let Some(&record) = found else {
            self.findings.unjudged += 1;
            return;
        };
        let inside = Inside {
            seen,
            record,
            asked,
            next_purge: self.next_purge,
        };
        self.guards[seen.engine] = Some(inside);
        let class = match (record.killed, seen.access) {
            (Some((_, begun, reach)), _) if begun <= seen.after => Some(if reach.frees_memory() {
                Defect::UseAfterUnmap
            } else {
                Defect::UseAfterPurge
            }),
            (_, Access::Write) if !record.entry.writable => Some(Defect::WriteThroughClean),
            _ if !self.lives(seen.space) => Some(Defect::DeadSpace),
            _ => None,
        };
        let Some(class) = class else {
            if record.outdated {
                self.used_outdated(&seen, &record);
            }
            return;
        };
        let detail = match class {
            Defect::DeadSpace => self.who_lives(),
            _ => String::new(),
        };
        self.misused(class, &inside, detail);
    }

    fn misused(&mut self, class: Defect, inside: &Inside, detail: String) {
        let Inside { seen, record, .. } = inside;
        let report = Report {
            iova: Some(record.entry.iova + (seen.va - record.entry.va)),
            engine: Some(seen.engine),
            by: seen.by,
            access: Some(seen.access),
            detail,
            entry: Some(record.life()),
            purges: self.purges_of(record),
            ..self.blank(class, seen.space, seen.va)
        };
        self.found(report);
    }

    /// A request to write is about to be sent to the client.
    pub(super) fn sent(&mut self, engine: usize) {
        if let Some(inside) = &mut self.guards[engine] {
            inside.asked = Asked::Sent;
        }
        self.look_for_purges(
            engine,
            "the store was sent by message although it had been purged",
        );
    }

    /// The client has answered (or is not waited for any more), and what it has said is `used`.
    pub(super) fn answered(&mut self, engine: usize, used: bool) {
        let load = self.guards[engine].is_some_and(|inside| inside.asked == Asked::Open);
        if used && load {
            self.look_for_purges(
                engine,
                "what the client said was used although it had been purged",
            );
        }
        self.guards[engine] = None;
    }

    /// A purge that has come since an access by message began has taken its translation away.
    fn look_for_purges(&mut self, engine: usize, detail: &str) {
        let Some(inside) = self.guards[engine] else { return };
        let seen = &inside.seen;
        let entry = &inside.record.entry;
        let bytes = |first: u64| Span {
            first,
            last: first + (seen.len.max(1) - 1),
        };
        let (va, target) = (bytes(seen.va), bytes(entry.iova + (seen.va - entry.va)));
        let since = self.purges.iter().rev();
        let mut since = since.take_while(|line| line.number >= inside.next_purge);
        let Some(line) = since.find(|line| line.reach.meets(seen.space, va, target)) else {
            return;
        };
        let class = match line.reach.frees_memory() {
            true => Defect::UseAfterUnmap,
            false => Defect::UseAfterPurge,
        };
        self.misused(class, &inside, detail.to_owned());
    }

    pub(super) fn left(&mut self, engine: usize) {
        self.guards[engine] = None;
    }

    fn lives(&self, space: u64) -> bool {
        self.holders
            .as_ref()
            .is_none_or(|holders| holders.iter().any(|(_, spaces)| spaces.contains(&space)))
    }

    fn who_lives(&self) -> String {
        let holders = self.holders.iter().flatten();
        let all: Vec<_> = holders
            .filter_map(|(holder, spaces)| Some(format!("{:#x} of context {holder}", spaces.first()?)))
            .collect();
        if all.is_empty() {
            format!("no {} is in use", self.names.space)
        } else {
            format!("in use, first of each: {}", all.join(", "))
        }
    }

    // ---- reports ----

    pub(super) fn blank(&self, class: Defect, space: u64, va: u64) -> Report {
        Report {
            class,
            count: 1,
            rule: class.rule(),
            unit: format!("{} {}", self.names.unit, self.names.number),
            names: self.names,
            space: SpaceId(space),
            va,
            iova: None,
            engine: None,
            by: Initiator::default(),
            access: None,
            detail: String::new(),
            at: self.now(),
            entry: None,
            purges: Vec::new(),
        }
    }

    /// A defect that is not the ATC's own.
    pub(super) fn told(&mut self, class: Defect, (space, va): (SpaceId, u64), by: Initiator, detail: String) {
        let report = Report {
            by,
            detail,
            ..self.blank(class, space.0, va)
        };
        self.found(report);
    }

    pub(super) fn found(&mut self, report: Report) {
        self.findings.defects += 1;
        let page = |va: u64| va >> PageSize::MIN_SHIFT;
        let same = |known: &&mut Report| {
            (known.class, known.space, page(known.va)) == (report.class, report.space, page(report.va))
        };
        if let Some(known) = self.findings.reports.iter_mut().find(same) {
            known.count += 1;
        } else if self.findings.reports.len() < Findings::MAX_REPORTS {
            self.findings.reports.push(report);
        } else {
            self.findings.defects_without_report += 1;
        }
    }

    /// Reports that have come since the last call.
    pub(super) fn fresh(&mut self) -> Vec<Report> {
        let fresh = self.findings.reports[self.unsaid..].to_vec();
        self.unsaid = self.findings.reports.len();
        fresh
    }

    pub(super) fn has_fresh(&self) -> bool {
        self.unsaid < self.findings.reports.len()
    }

    pub(super) fn findings(&self) -> Findings {
        Findings {
            changes: self.changes.as_ref().map(|changes| changes.heard),
            ..self.findings.clone()
        }
    }
}
