//! What the sanitizer has to say.

use std::fmt;

use protos::bridge::changes::Shown;

use super::types::{Access, PageSize, Purge, SpaceId};

/// A class of defect. `docs/sanitizer.md` has the rules and what each is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Defect {
    /// A fill was accepted although a purge had met its span since the miss.
    FillAfterKill,
    /// A purge was complete while an engine that had entered before it held a guard on the range.
    CompletionBeforeDrain,
    /// An access used an entry that a purge had cleared before.
    UseAfterPurge,
    /// An access used an entry whose memory had been unmapped before.
    UseAfterUnmap,
    /// An access used a space that does not live.
    DeadSpace,
    /// A store used an entry that does not allow stores.
    WriteThroughClean,
    /// Level 2: a translation was used (or entered) that was older than a change of its addresses which was over.
    StaleTranslation,
    /// A command was carried out, and its handle says that it was not.
    WrongStatus,
    /// A fault or done bit was set with its interrupt enabled, and the vector was not raised.
    LostInterrupt,
    /// A fault bit was set of a control block that has no miss.
    SpuriousFault,
    /// An engine passed a control block by that was ready to run.
    LateRestart,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::FillAfterKill,
        Self::CompletionBeforeDrain,
        Self::UseAfterPurge,
        Self::UseAfterUnmap,
        Self::DeadSpace,
        Self::WriteThroughClean,
        Self::StaleTranslation,
        Self::WrongStatus,
        Self::LostInterrupt,
        Self::SpuriousFault,
        Self::LateRestart,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FillAfterKill => "fill-after-kill",
            Self::CompletionBeforeDrain => "completion-before-drain",
            Self::UseAfterPurge => "use-after-purge",
            Self::UseAfterUnmap => "use-after-unmap",
            Self::DeadSpace => "dead-space",
            Self::WriteThroughClean => "write-through-clean",
            Self::StaleTranslation => "stale-translation",
            Self::WrongStatus => "wrong-status",
            Self::LostInterrupt => "lost-interrupt",
            Self::SpuriousFault => "spurious-fault",
            Self::LateRestart => "late-restart",
        }
    }

    /// What has happened, in a sentence's rest.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::FillAfterKill => "a fill was accepted although a purge had met its span since the miss",
            Self::CompletionBeforeDrain => "a purge was complete while an engine was still inside the range",
            Self::UseAfterPurge => "an access used an entry that a purge had cleared before",
            Self::UseAfterUnmap => "an access used an entry whose memory had been unmapped before",
            Self::DeadSpace => "an access used an address space that is not in use",
            Self::WriteThroughClean => "a store used an entry that does not allow stores",
            Self::StaleTranslation => "the mapping had been changed, and the old translation was still there",
            Self::WrongStatus => "a command was carried out, and its handle says EXCEPTION",
            Self::LostInterrupt => "a fault map bit was set, and its vector was not raised",
            Self::SpuriousFault => "a fault bit was set of a control block that has no miss",
            Self::LateRestart => "a control block was ready to run, and an engine passed it by",
        }
    }

    /// The rule that is broken: an invariant of the mmu notifier contract (`docs/sanitizer.md` lists those that are
    /// named here), or one of the device's own.
    #[must_use]
    pub const fn rule(self) -> &'static str {
        match self {
            Self::FillAfterKill => {
                "S1: between an invalidation's start and its end no translation of the range is created (the kill bit)"
            }
            Self::CompletionBeforeDrain => {
                "S2: when start returns, the device can no longer use an old translation: drained, not just queued"
            }
            Self::UseAfterPurge => "S2: a purge removes every entry that meets its range",
            Self::UseAfterUnmap => {
                "C5: memory is given back after the device has let go of it (ARCHITECTURE: DMA_UNMAP purges by target)"
            }
            Self::DeadSpace => {
                "S12: after release no translation is used (ASIDs are loaded by START, and end with the context)"
            }
            Self::WriteThroughClean => {
                "S11: dirty state reaches the page: a store needs an entry that software made writable"
            }
            Self::StaleTranslation => {
                "S2: when a change of the mapping is over, no translation of before is in use (the host daemon's log)"
            }
            Self::WrongStatus => "GRU handles: status says what has become of the command",
            Self::LostInterrupt => {
                "GRU fault maps: each bit that is set with its interrupt enabled raises the vector"
            }
            Self::SpuriousFault => "GRU fault maps: a fault bit stands for an outstanding miss",
            Self::LateRestart => "GRU control blocks: whoever looks at one that is ready runs it",
        }
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// When something happened: its place in the order of events, and the time since the sanitizer's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Stamp {
    /// Number of the event: misses, fills, purges' beginnings and ends, changes of spaces.
    pub event: u64,
    /// Microseconds.
    pub time_us: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = (self.time_us / 1_000_000, self.time_us % 1_000_000);
        write!(f, "event {} ({seconds}.{micros:06} s)", self.event)
    }
}

/// Who asked for an access or a fill, in the model's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Initiator {
    /// GRU: the context.
    pub context: Option<u32>,
    /// GRU: the physical CBR.
    pub queue: Option<u32>,
}

impl Initiator {
    /// A context's queue.
    #[must_use]
    pub fn new(context: usize, queue: usize) -> Self {
        Self {
            context: u32::try_from(context).ok(),
            queue: u32::try_from(queue).ok(),
        }
    }
}

/// A model's words for what an ATC knows by numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Whose ATC it is.
    pub unit: &'static str,
    /// Which of them.
    pub number: usize,
    /// A space.
    pub space: &'static str,
    /// A queue.
    pub queue: &'static str,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            unit: "device",
            number: 0,
            space: "space",
            queue: "queue",
        }
    }
}

/// An entry's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct EntryLife {
    /// Number of the fill (the GRU's dropin).
    pub fill: u64,
    /// Whose miss it answered.
    pub by: Initiator,
    /// First address.
    pub va: u64,
    /// Span.
    pub size: PageSize,
    /// First IOVA of the target.
    pub iova: u64,
    /// Stores allowed.
    pub writable: bool,
    /// The mapping allows stores.
    pub storable: bool,
    /// Software's generation.
    pub tag: u64,
    /// When its miss was opened.
    pub missed: Stamp,
    /// When it was entered.
    pub filled: Stamp,
}

/// A purge that met what a report is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct PurgeLife {
    /// Number of the purge.
    pub purge: u64,
    /// What it covered.
    pub what: Purge,
    /// When it had cleared.
    pub begun: Stamp,
    /// When it was complete.
    pub finished: Option<Stamp>,
}

/// One defect. What comes again (same class, space and page) is counted.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// What kind.
    pub class: Defect,
    /// How often it was seen.
    pub count: u64,
    /// The broken rule.
    pub rule: &'static str,
    /// The ATC: "chiplet 0".
    pub unit: String,
    /// The words that the text uses.
    #[serde(skip)]
    pub names: Names,
    /// Whose address.
    pub space: SpaceId,
    /// The address.
    pub va: u64,
    /// Where it leads to.
    pub iova: Option<u64>,
    /// The engine.
    pub engine: Option<usize>,
    /// For whom.
    pub by: Initiator,
    /// What the access was.
    pub access: Option<Access>,
    /// More about it.
    pub detail: String,
    /// When it was first seen.
    pub at: Stamp,
    /// The entry.
    pub entry: Option<EntryLife>,
    /// Purges that met the entry (or its miss), oldest first; the last few of them.
    pub purges: Vec<PurgeLife>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names;
        write!(f, "sanitizer: {}: {}", self.class, self.class.what())?;
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        write!(
            f,
            "\n  where   {}, {} {:#x}, va {:#x}",
            self.unit, names.space, self.space.0, self.va
        )?;
        if let Some(iova) = self.iova {
            write!(f, ", IOVA {iova:#x}")?;
        }
        if let Some(access) = self.access {
            let access = match access {
                Access::Read => "load",
                Access::Write => "store",
            };
            write!(f, ", {access}")?;
        }
        if let Some(engine) = self.engine {
            write!(f, ", engine {engine}")?;
        }
        say_initiator(f, names, self.by)?;
        write!(f, "\n  when    {}", self.at)?;
        write!(f, "\n  rule    {}", self.rule)?;
        if !self.detail.is_empty() {
            write!(f, "\n  detail  {}", self.detail)?;
        }
        if let Some(entry) = &self.entry {
            let stores = match (entry.writable, entry.storable) {
                (true, _) => "writable",
                (false, true) => "clean",
                (false, false) => "read-only memory",
            };
            write!(
                f,
                "\n  entry   fill {}: va {:#x}+{:#x} to IOVA {:#x}, {stores}, generation {}",
                entry.fill,
                entry.va,
                entry.size.bytes(),
                entry.iova,
                Shown(entry.tag)
            )?;
            say_initiator(f, names, entry.by)?;
            write!(
                f,
                "\n          missed at {}, filled at {}",
                entry.missed, entry.filled
            )?;
        }
        for purge in &self.purges {
            write!(f, "\n  purge   {}: ", purge.purge)?;
            match purge.what {
                Purge::Range { space, start, end } => {
                    write!(f, "{} {:#x}, va {start:#x} to {end:#x}", names.space, space.0)?;
                }
                Purge::Space(space) => write!(f, "all of {} {:#x}", names.space, space.0)?,
                Purge::All => write!(f, "everything")?,
                Purge::Target { start, end } => write!(f, "DMA_UNMAP of IOVA {start:#x} to {end:#x}")?,
            }
            write!(f, ", begun at {}", purge.begun)?;
            match purge.finished {
                Some(finished) => write!(f, ", finished at {finished}")?,
                None => write!(f, ", not finished")?,
            }
        }
        Ok(())
    }
}

fn say_initiator(f: &mut fmt::Formatter<'_>, names: Names, by: Initiator) -> fmt::Result {
    if let Some(context) = by.context {
        write!(f, ", context {context}")?;
    }
    if let Some(queue) = by.queue {
        write!(f, ", {} {queue}", names.queue)?;
    }
    Ok(())
}

/// Everything that a sanitizer has found.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct Findings {
    /// Defects seen, each occurrence.
    pub defects: u64,
    /// What was found, once each; at most [`Findings::MAX_REPORTS`] for each ATC.
    pub reports: Vec<Report>,
    /// Defects that came when there was no room for another report.
    pub defects_without_report: u64,
    /// Events looked at: accesses and fills.
    pub checked: u64,
    /// Of these: those whose history was not complete any more, so that nothing can be said.
    pub unjudged: u64,
    /// Level 2: changes of mappings that a host daemon has told. `None`: level 1.
    pub changes: Option<u64>,
}

impl Findings {
    /// Most reports that an ATC's sanitizer keeps.
    pub const MAX_REPORTS: usize = 64;

    /// Adds those of another ATC.
    pub fn add(&mut self, other: Self) {
        self.defects += other.defects;
        self.reports.extend(other.reports);
        self.defects_without_report += other.defects_without_report;
        self.checked += other.checked;
        self.unjudged += other.unjudged;
        // Every ATC reads the same log.
        self.changes = self.changes.max(other.changes);
    }

    /// How often each class was seen (in those that have a report).
    #[must_use]
    pub fn of(&self, class: Defect) -> u64 {
        let reports = self.reports.iter().filter(|report| report.class == class);
        reports.map(|report| report.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names_when_all_are_listed_are_those_of_the_json() {
        for (index, class) in Defect::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, index);
            assert_eq!(serde_json::to_value(class).unwrap(), class.name());
            assert!(!class.rule().is_empty() && !class.what().is_empty());
        }
    }
}
