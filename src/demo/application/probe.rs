//! A look at a range right before and right after its call: the translation is in the TLB when the call
//! begins, and an instruction is submitted as soon as it has returned. The most direct question that can be
//! put to the bridge, and not a matter of luck.

use protos::gru::cb::{Instruction, XType};
use protos::gru::cbe::ecause;

use super::executor::{Broken, Executor, Outcome};
use super::frames::PAGE;
use super::oracles::{Oracle, Oracles, Violation};
use super::slots::{Mapping, Prot, Slot};
use super::words;

/// Words that a probe loads.
const RUN: usize = 8;
/// Data segment that a probe needs, in bytes.
pub const PROBE_DS_BYTES: u32 = 1024;

/// A place to be probed.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// Word number inside the slot.
    word: usize,
    /// Distinguishes what probes store.
    number: u64,
}

impl Probe {
    /// Some words of page `page` of a slot.
    pub fn new(page: usize, number: u64) -> Self {
        let within = number as usize % (words::WORDS_PER_PAGE / RUN) * RUN;
        Self {
            word: page * (PAGE as usize / 8) + within,
            number,
        }
    }

    fn load(self, slot: &Slot) -> Instruction {
        Instruction::vload(self.va(slot), 0, XType::DWORD, RUN as u64, 1)
    }

    fn va(self, slot: &Slot) -> u64 {
        slot.va + self.word as u64 * 8
    }

    /// Puts the translation into the TLB, writable if it may be.
    ///
    /// # Errors
    /// The device or the daemon is gone.
    pub fn warm(
        self,
        slot: &Slot,
        mapping: Option<Mapping>,
        executor: &mut impl Executor,
    ) -> Result<(), Broken> {
        if let Some(mapping) = mapping {
            executor.execute(&self.load(slot))?;
            if mapping.prot == Prot::ReadWrite {
                // A FETCH asks for the right to store and changes nothing.
                let fetch =
                    Instruction::gamir(self.va(slot), protos::gru::cb::ImplicitOp::FETCH, XType::DWORD);
                executor.execute(&fetch)?;
            }
        }
        Ok(())
    }

    /// Judges what the device does now that `call` has returned `generation` and `mapping` is there.
    ///
    /// # Errors
    /// The device or the daemon is gone.
    pub fn judge(
        self,
        slot: &Slot,
        mapping: Option<Mapping>,
        (call, generation): (&str, u64),
        executor: &mut impl Executor,
        oracles: &Oracles,
    ) -> Result<(), Broken> {
        let report = |oracle, what: String| {
            oracles.report(Violation {
                oracle,
                slot: slot.index,
                va: self.va(slot),
                what: format!("right after {call} returned {generation}: {what}"),
            });
        };
        let prot = mapping.map_or(Prot::None, |m| m.prot);
        match executor.execute(&self.load(slot))? {
            Outcome::Completed { tag, .. } => {
                let mut found = [0; RUN];
                executor.read_ds(0, &mut found)?;
                if let Some(word) = found.into_iter().find(|w| words::is_poison(*w)) {
                    report(
                        Oracle::Canary,
                        format!("late device read: {}", words::describe(word)),
                    );
                } else if prot == Prot::None {
                    report(
                        Oracle::Address,
                        "a load completed where nothing may be read".into(),
                    );
                } else if tag < generation {
                    report(
                        Oracle::Generation,
                        format!("a load used a translation of generation {tag}"),
                    );
                }
            }
            Outcome::Exception { ecause } if prot != Prot::None => {
                report(
                    Oracle::Result,
                    format!("a load ended in an exception (ecause {ecause:#x})"),
                );
            }
            Outcome::Exception { ecause } if ecause & ecause::OS_FATAL_TLB_FAULT == 0 => {
                report(Oracle::Result, format!("exception with cause {ecause:#x}"));
            }
            Outcome::Exception { .. } => {}
        }
        if prot != Prot::ReadWrite {
            let value = words::store(slot.index, self.number, self.word);
            let store = Instruction::vset(self.va(slot), value, XType::DWORD, 1, 1);
            if let Outcome::Completed { .. } = executor.execute(&store)? {
                report(
                    Oracle::Address,
                    "a store completed where nothing may be stored".into(),
                );
            }
        }
        Ok(())
    }
}
