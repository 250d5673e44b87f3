//! Changes the slots' mappings under the workers.

use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use super::arena::Arena;
use super::calls::{Calls, Kind, Path};
use super::executor::Executor;
use super::frames::{Departure, Frame};
use super::probe::Probe;
use super::random::Random;
use super::slots::{Mapping, Prot, Slot};
use crate::latency::Latency;

/// What a disturber has done.
#[derive(Debug, Default)]
pub struct DisturberCounts {
    /// Time of each call, by kind and path.
    pub calls: BTreeMap<(Kind, Path), Latency>,
    /// Calls that were preceded and followed by a probe.
    pub probes: u64,
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
        self.probes += other.probes;
        self.forks += other.forks;
        self.agent_call_switches += other.agent_call_switches;
    }
}

/// How a disturber behaves.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    /// One call in so many is a raw system call.
    pub raw_every: usize,
    /// Discard by MADV_REMOVE through the agent only.
    pub announce_removal: bool,
    /// One call in so many is preceded and followed by a probe.
    pub probe_every: usize,
    /// One call in so many is aimed at a slot that a worker is using at that moment.
    pub aim_every: usize,
    /// Fork now and then.
    pub fork: bool,
}

/// One disturber thread. No other one touches its slots.
#[derive(Debug)]
pub struct Disturber<'a, C, E> {
    arena: &'a Arena<'a>,
    mine: Vec<usize>,
    calls: &'a C,
    executor: E,
    habits: Habits,
    random: Random,
    /// What it has done.
    pub counts: DisturberCounts,
}

impl<'a, C: Calls, E: Executor> Disturber<'a, C, E> {
    /// A disturber of the slots `mine`.
    pub fn new(
        arena: &'a Arena<'a>,
        mine: Vec<usize>,
        calls: &'a C,
        executor: E,
        habits: Habits,
        random: Random,
    ) -> Self {
        assert!(!mine.is_empty(), "a disturber needs a slot");
        Self {
            arena,
            mine,
            calls,
            executor,
            habits,
            random,
            counts: DisturberCounts::default(),
        }
    }

    /// Maps something into every slot.
    ///
    /// # Errors
    /// A call fails, or the device is gone.
    pub fn populate(&mut self) -> Result<()> {
        for i in self.mine.clone() {
            if let Some(frame) = self.arena.frames.take(self.arena.slots[i].pages) {
                self.map_over(i, Path::Agent, frame, Prot::ReadWrite)?;
            }
        }
        Ok(())
    }

    /// Releases what has been in quarantine for long enough, then changes one slot.
    ///
    /// # Errors
    /// A call fails, or the device is gone.
    pub fn step(&mut self) -> Result<()> {
        self.arena.frames.release_due(false, &self.arena.oracles);
        let any = self.mine[self.random.below(self.mine.len())];
        let used = match self.random.chance(1, self.habits.aim_every) {
            true => self.arena.hot.used(self.random.below(64)),
            false => None,
        };
        let index = used.filter(|slot| self.mine.contains(slot)).unwrap_or(any);
        let slot = &self.arena.slots[index];
        let path = if self.random.chance(1, self.habits.raw_every) {
            Path::Raw
        } else {
            Path::Agent
        };
        let Some(mapping) = slot.view().mapping else {
            return self.map_something(index, path);
        };
        match self.random.below(40) {
            0..=5 => self.unmap(index, path, mapping),
            6..=13 => self.map_something(index, path),
            14..=19 => self.relocate(index, path, mapping),
            20..=24 => self.change(index, Kind::Discard, path, mapping, mapping.prot),
            25..=28 if mapping.prot == Prot::ReadWrite => {
                let path = match self.habits.announce_removal {
                    true => Path::Agent,
                    false => path,
                };
                self.change(index, Kind::Remove, path, mapping, mapping.prot)
            }
            29 if self.habits.fork && self.random.chance(1, 16) => {
                self.counts.forks += 1;
                self.calls.fork().context("fork")
            }
            _ => {
                let prot = match self.random.below(8) {
                    0 => Prot::None,
                    1..=3 => Prot::Read,
                    _ => Prot::ReadWrite,
                };
                self.change(index, Kind::Protect, Path::Agent, mapping, prot)
            }
        }
    }

    fn timed<T>(&mut self, kind: Kind, path: Path, call: impl FnOnce(&C) -> io::Result<T>) -> Result<T> {
        let switches = crate::latency::voluntary_switches();
        let start = Instant::now();
        let result = call(self.calls).with_context(|| format!("{} ({}) failed", kind.name(), path.name()))?;
        let elapsed = start.elapsed();
        if path == Path::Agent {
            self.counts.agent_call_switches += crate::latency::voluntary_switches() - switches;
        }
        self.counts.calls.entry((kind, path)).or_default().record(elapsed);
        Ok(result)
    }

    fn map_something(&mut self, index: usize, path: Path) -> Result<()> {
        // All frames of that size may be in quarantine: then nothing is done this time.
        let Some(frame) = self.arena.frames.take(self.arena.slots[index].pages) else {
            return Ok(());
        };
        let prot = if self.random.chance(1, 5) {
            Prot::Read
        } else {
            Prot::ReadWrite
        };
        self.map_over(index, path, frame, prot)
    }

    fn map_over(&mut self, index: usize, path: Path, frame: Frame, prot: Prot) -> Result<()> {
        let slot = &self.arena.slots[index];
        let old = slot.view().mapping;
        let new = Some(Mapping { frame, prot });
        self.call(Kind::MapOver, path, &[Change { slot, old, new }], |calls| {
            calls.map_over(path, slot.va, slot.len(), frame.offset(), prot)
        })
    }

    fn unmap(&mut self, index: usize, path: Path, mapping: Mapping) -> Result<()> {
        let slot = &self.arena.slots[index];
        let (old, new) = (Some(mapping), None);
        self.call(Kind::Unmap, path, &[Change { slot, old, new }], |calls| {
            calls.unmap(path, slot.va, slot.len())
        })
    }

    fn relocate(&mut self, from: usize, path: Path, mapping: Mapping) -> Result<()> {
        let pages = self.arena.slots[from].pages;
        let targets: Vec<usize> = self
            .mine
            .iter()
            .copied()
            .filter(|i| *i != from && self.arena.slots[*i].pages == pages)
            .collect();
        if targets.is_empty() {
            return Ok(());
        }
        let to = targets[self.random.below(targets.len())];
        let (source, target) = (&self.arena.slots[from], &self.arena.slots[to]);
        let changes = [
            Change {
                slot: source,
                old: Some(mapping),
                new: None,
            },
            Change {
                slot: target,
                old: target.view().mapping,
                new: Some(mapping),
            },
        ];
        self.call(Kind::Move, path, &changes, |calls| {
            calls.relocate(path, source.va, target.va, source.len())
        })
    }

    /// Calls that leave the same pages mapped.
    fn change(&mut self, index: usize, kind: Kind, path: Path, old: Mapping, prot: Prot) -> Result<()> {
        let slot = &self.arena.slots[index];
        let change = Change {
            slot,
            old: Some(old),
            new: Some(Mapping { prot, ..old }),
        };
        self.call(kind, path, &[change], |calls| match kind {
            Kind::Discard => calls.discard(path, slot.va, slot.len()),
            Kind::Remove => calls.remove(path, slot.va, slot.len()),
            Kind::Protect => calls.protect(slot.va, slot.len(), prot),
            Kind::Unmap | Kind::MapOver | Kind::Move => unreachable!("these replace the pages"),
        })
    }

    /// One call with everything around it.
    fn call(
        &mut self,
        kind: Kind,
        path: Path,
        changes: &[Change<'a>],
        call: impl FnOnce(&C) -> io::Result<u64>,
    ) -> Result<()> {
        let probe = self.random.chance(1, self.habits.probe_every).then(|| {
            self.counts.probes += 1;
            Probe::new(self.random.below(changes[0].slot.pages), self.counts.probes)
        });
        if let Some(probe) = probe {
            for change in changes {
                probe.warm(change.slot, change.old, &mut self.executor)?;
            }
        }
        for change in changes {
            change.slot.begin();
        }
        let generation = self.timed(kind, path, call)?;
        let name = format!("{} ({})", kind.name(), path.name());
        // Poisoned before the new state is published: whoever sees the new state sees the poison.
        let stays = |frame| changes.iter().any(|c| c.new.is_some_and(|m| m.frame == frame));
        for change in changes {
            if let Some(old) = change.old
                && !stays(old.frame)
            {
                let left = Departure {
                    slot: change.slot.index,
                    call: name.clone(),
                    va: change.slot.va,
                    generation,
                };
                self.arena.frames.quarantine(old.frame, left);
            }
        }
        if let Some(probe) = probe {
            for change in changes {
                let call = (name.as_str(), generation);
                probe.judge(
                    change.slot,
                    change.new,
                    call,
                    &mut self.executor,
                    &self.arena.oracles,
                )?;
            }
        }
        for change in changes {
            change.slot.end(change.new, generation);
            self.arena.hot.set_changed(change.slot.index);
        }
        Ok(())
    }
}

/// What a call does to a slot.
#[derive(Debug, Clone, Copy)]
struct Change<'a> {
    slot: &'a Slot,
    old: Option<Mapping>,
    new: Option<Mapping>,
}
