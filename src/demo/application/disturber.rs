//! Changes the slots' mappings under the workers.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use super::calls::{Calls, Kind, Path};
use super::frames::{Departure, Frame, Frames};
use super::oracles::Oracles;
use super::random::Random;
use super::slots::{Mapping, Prot, Slot};
use crate::latency::Latency;

/// What a disturber has done.
#[derive(Debug, Default)]
pub struct DisturberCounts {
    /// Time of each call, by kind and path.
    pub calls: BTreeMap<(Kind, Path), Latency>,
    /// Forks.
    pub forks: u64,
    /// Voluntary context switches of this thread inside calls by the agent.
    pub agent_call_switches: u64,
}

impl DisturberCounts {
    /// Adds another disturber's counts.
    pub fn merge(&mut self, other: &Self) {
        for (key, latency) in &other.calls {
            self.calls.entry(*key).or_default().merge(latency);
        }
        self.forks += other.forks;
        self.agent_call_switches += other.agent_call_switches;
    }
}

/// How a disturber behaves.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    /// Also make raw system calls.
    pub raw: bool,
    /// Fork now and then.
    pub fork: bool,
}

/// One disturber thread. No other one touches its slots.
#[derive(Debug)]
pub struct Disturber<'a, C> {
    slots: &'a [Slot],
    mine: Vec<usize>,
    frames: &'a Frames<'a>,
    oracles: &'a Oracles,
    calls: &'a C,
    habits: Habits,
    random: Random,
    /// What it has done.
    pub counts: DisturberCounts,
}

impl<'a, C: Calls> Disturber<'a, C> {
    /// A disturber of the slots `mine`.
    pub fn new(
        slots: &'a [Slot],
        mine: Vec<usize>,
        frames: &'a Frames<'a>,
        oracles: &'a Oracles,
        calls: &'a C,
        habits: Habits,
        random: Random,
    ) -> Self {
        assert!(!mine.is_empty(), "a disturber needs a slot");
        Self {
            slots,
            mine,
            frames,
            oracles,
            calls,
            habits,
            random,
            counts: DisturberCounts::default(),
        }
    }

    /// Maps something into every slot.
    ///
    /// # Errors
    /// The system call's.
    pub fn populate(&mut self) -> io::Result<()> {
        for i in self.mine.clone() {
            if let Some(frame) = self.frames.take(self.slots[i].pages) {
                self.map_over(i, Path::Agent, frame, Prot::ReadWrite)?;
            }
        }
        Ok(())
    }

    /// Releases what has been in quarantine for long enough, then changes one slot.
    ///
    /// # Errors
    /// The system call's.
    pub fn step(&mut self) -> io::Result<()> {
        self.frames.release_due(false, self.oracles);
        let index = self.mine[self.random.below(self.mine.len())];
        let slot = &self.slots[index];
        let path = if self.habits.raw && self.random.chance(1, 3) {
            Path::Raw
        } else {
            Path::Agent
        };
        let Some(mapping) = slot.view().mapping else {
            return self.map_something(index, path);
        };
        match self.random.below(40) {
            0..=5 => self.unmap(index, path, mapping.frame),
            6..=13 => self.map_something(index, path),
            14..=19 => self.relocate(index, path, mapping),
            20..=24 => self.change(index, Kind::Discard, path, mapping),
            25..=28 if mapping.prot == Prot::ReadWrite => self.change(index, Kind::Remove, path, mapping),
            29 if self.habits.fork && self.random.chance(1, 16) => {
                self.counts.forks += 1;
                self.calls.fork()
            }
            _ => {
                let prot = match self.random.below(8) {
                    0 => Prot::None,
                    1..=3 => Prot::Read,
                    _ => Prot::ReadWrite,
                };
                let next = Mapping { prot, ..mapping };
                self.change(index, Kind::Protect, Path::Agent, next)
            }
        }
    }

    fn timed<T>(&mut self, kind: Kind, path: Path, call: impl FnOnce(&C) -> io::Result<T>) -> io::Result<T> {
        let switches = crate::latency::voluntary_switches();
        let start = Instant::now();
        let result = call(self.calls)?;
        let elapsed = start.elapsed();
        if path == Path::Agent {
            self.counts.agent_call_switches += crate::latency::voluntary_switches() - switches;
        }
        self.counts.calls.entry((kind, path)).or_default().record(elapsed);
        Ok(result)
    }

    fn map_something(&mut self, index: usize, path: Path) -> io::Result<()> {
        // All frames of that size may be in quarantine: then nothing is done this time.
        let Some(frame) = self.frames.take(self.slots[index].pages) else {
            return Ok(());
        };
        let prot = if self.random.chance(1, 5) {
            Prot::Read
        } else {
            Prot::ReadWrite
        };
        self.map_over(index, path, frame, prot)
    }

    fn map_over(&mut self, index: usize, path: Path, frame: Frame, prot: Prot) -> io::Result<()> {
        let slot = &self.slots[index];
        let old = slot.view().mapping;
        slot.begin();
        let generation = self.timed(Kind::MapOver, path, |calls| {
            calls.map_over(path, slot.va, slot.len(), frame.offset(), prot)
        })?;
        // Poisoned before the new state is published: whoever sees the new state sees the poison.
        self.leave(index, Kind::MapOver, path, old, generation);
        self.slots[index].end(Some(Mapping { frame, prot }), generation);
        Ok(())
    }

    fn unmap(&mut self, index: usize, path: Path, frame: Frame) -> io::Result<()> {
        let slot = &self.slots[index];
        let old = Some(Mapping {
            frame,
            prot: Prot::ReadWrite,
        });
        slot.begin();
        let generation = self.timed(Kind::Unmap, path, |calls| calls.unmap(path, slot.va, slot.len()))?;
        self.leave(index, Kind::Unmap, path, old, generation);
        self.slots[index].end(None, generation);
        Ok(())
    }

    fn relocate(&mut self, from: usize, path: Path, mapping: Mapping) -> io::Result<()> {
        let pages = self.slots[from].pages;
        let targets: Vec<usize> = self
            .mine
            .iter()
            .copied()
            .filter(|i| *i != from && self.slots[*i].pages == pages)
            .collect();
        if targets.is_empty() {
            return Ok(());
        }
        let to = targets[self.random.below(targets.len())];
        let (source, target) = (&self.slots[from], &self.slots[to]);
        let replaced = target.view().mapping;
        source.begin();
        target.begin();
        let generation = self.timed(Kind::Move, path, |calls| {
            calls.relocate(path, source.va, target.va, source.len())
        })?;
        self.leave(to, Kind::Move, path, replaced, generation);
        self.slots[from].end(None, generation);
        self.slots[to].end(Some(mapping), generation);
        Ok(())
    }

    /// Calls that leave the same pages mapped.
    fn change(&mut self, index: usize, kind: Kind, path: Path, next: Mapping) -> io::Result<()> {
        let slot = &self.slots[index];
        slot.begin();
        let generation = self.timed(kind, path, |calls| match kind {
            Kind::Discard => calls.discard(path, slot.va, slot.len()),
            Kind::Remove => calls.remove(path, slot.va, slot.len()),
            Kind::Protect => calls.protect(slot.va, slot.len(), next.prot),
            Kind::Unmap | Kind::MapOver | Kind::Move => unreachable!("these replace the pages"),
        })?;
        self.slots[index].end(Some(next), generation);
        Ok(())
    }

    fn leave(&self, index: usize, kind: Kind, path: Path, old: Option<Mapping>, generation: u64) {
        if let Some(old) = old {
            let left = Departure {
                slot: index,
                call: format!("{} ({})", kind.name(), path.name()),
                va: self.slots[index].va,
                generation,
            };
            self.frames.quarantine(old.frame, left);
        }
    }
}
