//! Runs instructions on slots that others change meanwhile, and judges every result.

use std::collections::BTreeMap;

use protos::gru::cbe::ecause;

use super::arena::Arena;
use super::executor::{Broken, Executor, Outcome};
use super::oracles::{Oracle, Violation};
use super::plan::{Need, New, Place, Plan, Planner, Result as Where};
use super::random::Random;
use super::slots::{Slot, View};
use super::words;

/// What a worker has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerCounts {
    /// Instructions issued.
    pub operations: u64,
    /// Of those: judged strictly, because nothing changed meanwhile.
    pub strict: u64,
    /// Of those: something changed meanwhile; judged as far as it can be.
    pub lenient: u64,
    /// Bytes read and written by the device that were compared.
    pub verified_bytes: u64,
    /// Exceptions that had to come (nothing mapped, or a store on read-only memory).
    pub expected_exceptions: u64,
    /// Exceptions while the range was being changed.
    pub lenient_exceptions: u64,
    /// By name of the instruction.
    pub by_instruction: BTreeMap<String, u64>,
}

impl WorkerCounts {
    /// Adds another worker's counts.
    pub fn merge(&mut self, other: &Self) {
        self.operations += other.operations;
        self.strict += other.strict;
        self.lenient += other.lenient;
        self.verified_bytes += other.verified_bytes;
        self.expected_exceptions += other.expected_exceptions;
        self.lenient_exceptions += other.lenient_exceptions;
        for (name, count) in &other.by_instruction {
            *self.by_instruction.entry(name.clone()).or_default() += count;
        }
    }
}

/// One worker thread.
#[derive(Debug)]
pub struct Worker<'a, E> {
    arena: &'a Arena<'a>,
    /// Slots that no other worker computes in.
    mine: Vec<usize>,
    number: usize,
    executor: E,
    planner: Planner,
    random: Random,
    /// What it has done.
    pub counts: WorkerCounts,
}

/// The slots of a plan before and after it ran.
#[derive(Debug)]
struct Views {
    before: Vec<View>,
    after: Vec<View>,
}

impl Views {
    fn unchanged(&self) -> bool {
        self.before.iter().zip(&self.after).all(|(b, a)| b.unchanged(a))
    }
}

impl<'a, E: Executor> Worker<'a, E> {
    /// Worker `number` of `workers`: it has each `workers`-th slot to itself (with two workers in one slot
    /// contents could not be judged).
    pub fn new(arena: &'a Arena<'a>, (number, workers): (usize, usize), executor: E, seed: u64) -> Self {
        let mine: Vec<usize> = (0..arena.slots.len()).filter(|i| i % workers == number).collect();
        assert!(!mine.is_empty(), "a worker needs a slot");
        let planner = Planner::new(Random::new(seed, number as u64), executor.ds_bytes());
        Self {
            arena,
            mine,
            number,
            executor,
            planner,
            random: Random::new(seed, !(number as u64)),
            counts: WorkerCounts::default(),
        }
    }

    /// Its control block, between two steps.
    pub fn executor(&mut self) -> &mut E {
        &mut self.executor
    }

    /// Runs and judges one instruction.
    ///
    /// # Errors
    /// The device or the daemon is gone.
    pub fn step(&mut self) -> Result<(), Broken> {
        let any = self.mine[self.random.below(self.mine.len())];
        let changed = self
            .arena
            .hot
            .changed(self.number)
            .filter(|_| self.random.chance(1, 3));
        let slot = &self.arena.slots[changed.unwrap_or(any)];
        self.arena.hot.set_used(self.number, slot.index);
        let other = &self.arena.slots[self.mine[self.random.below(self.mine.len())]];
        let plan = self.planner.draw(slot, other);
        self.run(plan)
    }

    fn run(&mut self, mut plan: Plan) -> Result<(), Broken> {
        let views = |plan: &Plan| -> Vec<View> {
            plan.slots
                .iter()
                .map(|o| self.arena.slots[o.slot].view_again())
                .collect()
        };
        let before = views(&plan);
        let expected = self.look(&before, &plan.reads);
        let untouched = self.look(&before, &plan.untouched);
        if let Some(Some(seen)) = expected.first() {
            plan.aim(*seen);
        }
        for (offset, words) in &plan.data {
            self.executor.write_ds(*offset, words)?;
        }
        let outcome = self.executor.execute(&plan.instruction)?;
        let mut observed = vec![0; plan.reads.len()];
        if let Outcome::Completed { avalue, .. } = outcome {
            match plan.result {
                Where::DataSegment { offset } => self.executor.read_ds(offset, &mut observed)?,
                Where::AValue => observed[0] = avalue,
                Where::Written | Where::None => observed.clear(),
            }
        } else {
            observed.clear();
        }
        // What memory looks like where the plan's slots were mapped before, and where they are now.
        let places: Vec<Place> = plan.writes.iter().map(|(p, _)| *p).collect();
        let written = self.look(&before, &places);
        let untouched_now = self.look(&before, &plan.untouched);
        let moved_to = views(&plan);
        let read_now = self.look(&moved_to, &plan.reads);
        let views = Views {
            before,
            after: moved_to,
        };
        let still = views_again(&self.arena.slots, &plan);

        self.counts.operations += 1;
        *self.counts.by_instruction.entry(plan.name.into()).or_default() += 1;
        self.canary(&plan, &observed);
        if views.unchanged() {
            self.counts.strict += 1;
            let memory = Memory {
                expected,
                written,
                untouched,
                untouched_now,
            };
            self.strict(&plan, &views.before, outcome, &observed, &memory);
        } else {
            self.counts.lenient += 1;
            if matches!(outcome, Outcome::Exception { .. }) {
                self.counts.lenient_exceptions += 1;
            } else if views.after.iter().zip(&still).all(|(a, s)| a.unchanged(s)) {
                self.lenient(&plan, &views, &observed, &expected, &read_now);
            }
        }
        Ok(())
    }

    /// The words at some places, by the alias; `None` where nothing is mapped.
    fn look(&self, views: &[View], places: &[Place]) -> Vec<Option<u64>> {
        places
            .iter()
            .map(|p| {
                views[p.operand]
                    .mapping
                    .map(|m| self.arena.frames.word(m.frame, p.word))
            })
            .collect()
    }

    fn report(&self, oracle: Oracle, plan: &Plan, place: Option<Place>, what: String) {
        let place = place.unwrap_or(Place { operand: 0, word: 0 });
        let slot = &self.arena.slots[plan.slots[place.operand].slot];
        self.arena.oracles.report(Violation {
            oracle,
            slot: slot.index,
            va: slot.va + place.word as u64 * 8,
            what: format!("{} (operation {}): {what}", plan.name, self.counts.operations),
        });
    }

    /// Poison is only ever written after the call that took the page away has returned, so a device read
    /// that returns it is late, whatever happened meanwhile.
    fn canary(&self, plan: &Plan, observed: &[u64]) {
        let poisoned = observed
            .iter()
            .zip(&plan.reads)
            .find(|(word, _)| words::is_poison(**word));
        if let Some((word, place)) = poisoned {
            let what = format!("late device read: {}", words::describe(*word));
            self.report(Oracle::Canary, plan, Some(*place), what);
        }
    }

    fn strict(&mut self, plan: &Plan, views: &[View], outcome: Outcome, observed: &[u64], memory: &Memory) {
        let allowed = |need: Need| {
            plan.slots.iter().zip(views).all(|(o, v)| {
                let prot = v.mapping.map(|m| m.prot);
                prot.is_some_and(|p| p.allows(need_write(o.need, need)))
            })
        };
        // A FETCH on read-only memory may go either way; else both are the same.
        let (must_work, may_work) = (allowed(Need::Write), allowed(Need::Read));
        match outcome {
            Outcome::Exception { ecause } => {
                if must_work {
                    let what = format!("exception (ecause {ecause:#x}) although the access is allowed");
                    self.report(Oracle::Result, plan, None, what);
                } else if ecause & ecause::OS_FATAL_TLB_FAULT == 0 {
                    let what = format!("exception with cause {ecause:#x} instead of OS_FATAL_TLB_FAULT");
                    self.report(Oracle::Result, plan, None, what);
                } else {
                    self.counts.expected_exceptions += 1;
                }
            }
            Outcome::Completed { .. } if !may_work => {
                let state = plan
                    .slots
                    .iter()
                    .zip(views)
                    .map(|(o, v)| match v.mapping {
                        None => format!("slot {} is not mapped", o.slot),
                        Some(m) => format!("slot {} is mapped {:?}", o.slot, m.prot),
                    })
                    .collect::<Vec<_>>()
                    .join(", ");
                let what = format!(
                    "completed although {state} (since generation {})",
                    views.iter().map(|v| v.generation).max().unwrap_or(0)
                );
                self.report(Oracle::Address, plan, None, what);
            }
            Outcome::Completed { tag, .. } => {
                // The tag is the smallest of all slots' translations, so the smallest bound applies.
                let bound = views.iter().map(|v| v.generation).min().unwrap_or(0);
                if tag < bound {
                    let what = format!("used a translation of generation {tag}, the call returned {bound}");
                    self.report(Oracle::Generation, plan, None, what);
                }
                self.content(plan, observed, memory);
                self.counts.verified_bytes += plan.bytes();
            }
        }
    }

    /// Contents, with nothing changed meanwhile: bit by bit.
    fn content(&self, plan: &Plan, observed: &[u64], memory: &Memory) {
        let wrong = observed
            .iter()
            .zip(&plan.reads)
            .zip(&memory.expected)
            .find(|((found, _), expected)| Some(**found) != **expected);
        if let Some(((found, place), expected)) = wrong {
            let what = format!(
                "read {} where memory holds {}",
                words::describe(*found),
                expected.map_or("nothing".into(), words::describe)
            );
            self.report(Oracle::Address, plan, Some(*place), what);
            return;
        }
        for ((place, new), found) in plan.writes.iter().zip(&memory.written) {
            let expected = match new {
                New::Value(value) => Some(*value),
                New::Read(n) => memory.expected[*n],
                New::Atomic(atomic) => memory.expected[0].map(|old| atomic.apply(old)),
            };
            if *found != expected {
                let what = format!(
                    "stored {} but memory holds {}",
                    expected.map_or("nothing".into(), words::describe),
                    found.map_or("nothing".into(), words::describe)
                );
                self.report(Oracle::Address, plan, Some(*place), what);
                return;
            }
        }
        let touched = memory.untouched.iter().zip(&memory.untouched_now);
        for (place, (before, now)) in plan.untouched.iter().zip(touched) {
            if before != now {
                let what = format!(
                    "changed a neighbouring word to {}",
                    now.map_or("nothing".into(), words::describe)
                );
                self.report(Oracle::Result, plan, Some(*place), what);
                return;
            }
        }
    }

    /// The slot changed exactly once, from one mapping to another: each word is the old or the new one.
    fn lenient(
        &mut self,
        plan: &Plan,
        views: &Views,
        observed: &[u64],
        old: &[Option<u64>],
        new: &[Option<u64>],
    ) {
        for (i, (found, place)) in observed.iter().zip(&plan.reads).enumerate() {
            let (before, after) = (&views.before[place.operand], &views.after[place.operand]);
            if !before.unchanged(after) && !before.one_call_before(after) {
                continue;
            }
            // An atomic that reached the new mapping has changed what is seen there now.
            let made = plan.writes.iter().find_map(|(p, new)| match new {
                New::Atomic(a) if p == place => Some(a.apply(*found)),
                _ => None,
            });
            let fits = Some(*found) == old[i]
                || Some(*found) == new[i]
                || (made.is_some() && made == new[i])
                // A punched hole reads as zero before the call has returned.
                || *found == 0;
            if !fits && !words::is_poison(*found) {
                let what = format!(
                    "read {}, neither the old content nor the new",
                    words::describe(*found)
                );
                self.report(Oracle::Address, plan, Some(*place), what);
                return;
            }
        }
        self.counts.verified_bytes += 8 * observed.len() as u64;
    }
}

/// The access that has to be allowed for a slot, when an atomic that only reads counts as `fetch`.
fn need_write(need: Need, fetch: Need) -> bool {
    match need {
        Need::Read => false,
        Need::Write => true,
        Need::ReadOrWrite => fetch == Need::Write,
    }
}

fn views_again(slots: &[Slot], plan: &Plan) -> Vec<View> {
    plan.slots.iter().map(|o| slots[o.slot].view_again()).collect()
}

/// Memory by the alias.
#[derive(Debug)]
struct Memory {
    expected: Vec<Option<u64>>,
    written: Vec<Option<u64>>,
    untouched: Vec<Option<u64>>,
    untouched_now: Vec<Option<u64>>,
}

#[cfg(test)]
mod tests;
