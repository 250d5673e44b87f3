//! Memory that the daemon's reclaimer may discard at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use protos::gru::cb::{Instruction, XType};
use serde::{Deserialize, Serialize};

use super::executor::{Broken, Executor, Outcome};
use super::oracles::{Oracle, Oracles, Violation};
use super::random::Random;
use super::words::{self, WORDS_PER_PAGE};

/// Bytes of the purgeable area.
pub const PURGEABLE_BYTES: u64 = 2 << 20;

/// What happened in the purgeable area.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeableCounts {
    /// Loads that were compared.
    pub loads: u64,
    /// Of those: loads that found discarded words.
    pub loads_of_discarded: u64,
    /// Stores that put content back.
    pub stores: u64,
}

/// One thread's use of the area. It is the only writer.
#[derive(Debug)]
pub struct Purgeable<'a> {
    va: u64,
    alias: &'a [AtomicU64],
    oracles: &'a Oracles,
    random: Random,
    operation: u64,
    /// What happened.
    pub counts: PurgeableCounts,
}

/// Slot number in the area's words: one that no slot has.
const SLOT: usize = (1 << 12) - 1;
const RUN: usize = 64;

impl<'a> Purgeable<'a> {
    /// The area at `va`, seen through `alias`.
    pub fn new(va: u64, alias: &'a [AtomicU64], oracles: &'a Oracles, random: Random) -> Self {
        assert!(alias.len() >= RUN, "the area is too small");
        Self {
            va,
            alias,
            oracles,
            random,
            operation: 0,
            counts: PurgeableCounts::default(),
        }
    }

    /// Loads some words, judges them, and stores new ones where they had been discarded.
    ///
    /// # Errors
    /// The device or the daemon is gone.
    pub fn step(&mut self, executor: &mut impl Executor) -> Result<(), Broken> {
        self.operation += 1;
        let first = self.random.below(self.alias.len() - RUN + 1);
        let va = self.va + first as u64 * 8;
        let look = |i: usize| self.alias[first + i].load(Ordering::Relaxed);
        let before: Vec<u64> = (0..RUN).map(look).collect();
        let load = Instruction::vload(va, 0, XType::DWORD, RUN as u64, 1);
        let mut found = [0; RUN];
        match executor.execute(&load)? {
            Outcome::Completed { .. } => executor.read_ds(0, &mut found)?,
            Outcome::Exception { ecause } => {
                self.report(
                    Oracle::Result,
                    va,
                    format!("exception (ecause {ecause:#x}) on a load"),
                );
                return Ok(());
            }
        }
        self.counts.loads += 1;
        for (i, word) in found.iter().enumerate() {
            // Only the reclaimer changes these words meanwhile, and only to zero; a discarded one stays so.
            if *word != before[i] && *word != 0 {
                let what = format!(
                    "read {} where memory held {}",
                    words::describe(*word),
                    words::describe(before[i])
                );
                self.report(Oracle::Address, va + i as u64 * 8, what);
                break;
            }
        }
        if found.contains(&0) {
            self.counts.loads_of_discarded += 1;
            let new: Vec<u64> = (0..RUN)
                .map(|i| words::store(SLOT, self.operation, (first + i) % WORDS_PER_PAGE))
                .collect();
            executor.write_ds(0, &new)?;
            let store = Instruction::vstore(va, 0, XType::DWORD, RUN as u64, 1);
            if let Outcome::Exception { ecause } = executor.execute(&store)? {
                self.report(
                    Oracle::Result,
                    va,
                    format!("exception (ecause {ecause:#x}) on a store"),
                );
            }
            self.counts.stores += 1;
            let seen: Vec<u64> = (0..RUN).map(look).collect();
            if let Some(i) = (0..RUN).find(|i| seen[*i] != new[*i] && seen[*i] != 0) {
                let what = format!("stored words are not there: {}", words::describe(seen[i]));
                self.report(Oracle::Address, va + i as u64 * 8, what);
            }
        }
        Ok(())
    }

    fn report(&self, oracle: Oracle, va: u64, what: String) {
        self.oracles.report(Violation {
            oracle,
            slot: SLOT,
            va,
            what: format!("purgeable memory: {what}"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::calls::{Calls, Path};
    use super::super::model::{Context, Fault, Machine};
    use super::super::slots::Prot;
    use super::*;

    fn run(fault: Fault) -> (Oracles, PurgeableCounts) {
        let memory: Vec<AtomicU64> = (0..8 * WORDS_PER_PAGE).map(|_| AtomicU64::new(0)).collect();
        let machine = Machine::new(&memory, fault);
        machine
            .map_over(Path::Agent, 0x10_0000, 4 * 4096, 0, Prot::ReadWrite)
            .unwrap();
        let oracles = Oracles::default();
        let mut context = Context::new(&machine);
        let alias = &memory[..4 * WORDS_PER_PAGE];
        let mut purgeable = Purgeable::new(0x10_0000, alias, &oracles, Random::new(1, 1));
        for i in 0..400 {
            purgeable.step(&mut context).unwrap();
            if i % 50 == 49 {
                machine.remove(Path::Agent, 0x10_0000, 4 * 4096).unwrap();
            }
        }
        let counts = purgeable.counts;
        (oracles, counts)
    }

    #[test]
    fn test_purgeable_when_discarded_now_and_then_accepts_zeroes_only() {
        let (oracles, counts) = run(Fault::None);
        assert_eq!(oracles.samples(), []);
        assert!(
            counts.loads_of_discarded > 8 && counts.loads_of_discarded < counts.loads,
            "{counts:?}"
        );
    }

    #[test]
    fn test_purgeable_when_access_fails_reports_it() {
        let (oracles, _) = run(Fault::AlwaysExcept);
        assert_eq!(oracles.count(Oracle::Result), 400);
    }
}
