//! One instruction with everything needed to judge its result.

use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, XType};

use super::frames::PAGE;
use super::random::Random;
use super::slots::Slot;
use super::words::{self, WORDS_PER_PAGE};

/// A word of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Position in [`Plan::slots`].
    pub operand: usize,
    /// Word number inside the slot.
    pub word: usize,
}

/// Where the words that were read turn up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Result {
    /// In the data segment, one after the other.
    DataSegment {
        /// First byte.
        offset: u32,
    },
    /// In avalue.
    AValue,
    /// In the memory that was written (BCOPY).
    Written,
    /// Nothing was read.
    None,
}

/// What a written word becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum New {
    /// That.
    Value(u64),
    /// The n-th word that was read.
    Read(usize),
    /// The word itself after an atomic operation.
    Atomic(Atomic),
}

/// Atomic operations, so that the expected result can be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Atomic {
    /// Unchanged.
    Fetch,
    /// + 1.
    Increment,
    /// - 1.
    Decrement,
    /// The operand.
    Swap(u64),
    /// + operand.
    Add(u64),
    /// ^ operand.
    Xor(u64),
    /// The new value if it was the old one.
    CompareSwap {
        /// Old.
        expected: u64,
        /// New.
        new: u64,
    },
}

impl Atomic {
    /// The word after the operation.
    pub fn apply(self, old: u64) -> u64 {
        match self {
            Self::Fetch => old,
            Self::Increment => old.wrapping_add(1),
            Self::Decrement => old.wrapping_sub(1),
            Self::Swap(v) => v,
            Self::Add(v) => old.wrapping_add(v),
            Self::Xor(v) => old ^ v,
            Self::CompareSwap { expected, new } => {
                if old == expected {
                    new
                } else {
                    old
                }
            }
        }
    }

    fn instruction(self, va: u64) -> Instruction {
        let explicit = |op, op1, op2| Instruction::gamer(va, op, op1, op2, XType::DWORD);
        match self {
            Self::Fetch => Instruction::gamir(va, ImplicitOp::FETCH, XType::DWORD),
            Self::Increment => Instruction::gamir(va, ImplicitOp::INC, XType::DWORD),
            Self::Decrement => Instruction::gamir(va, ImplicitOp::DEC, XType::DWORD),
            Self::Swap(v) => explicit(ExplicitOp::SWAP, v, 0),
            Self::Add(v) => explicit(ExplicitOp::ADD, v, 0),
            Self::Xor(v) => explicit(ExplicitOp::XOR, v, 0),
            Self::CompareSwap { expected, new } => explicit(ExplicitOp::CSWAP, new, expected),
        }
    }
}

/// An instruction on one or two slots.
#[derive(Debug)]
pub struct Plan {
    /// Its name, for reports and statistics.
    pub name: &'static str,
    /// What is issued.
    pub instruction: Instruction,
    /// Slots it touches, and whether it stores there (a FETCH may be either).
    pub slots: Vec<Operand>,
    /// Words it reads, in order.
    pub reads: Vec<Place>,
    /// Where they turn up.
    pub result: Result,
    /// Words it writes.
    pub writes: Vec<(Place, New)>,
    /// Words next to those, which must stay as they are.
    pub untouched: Vec<Place>,
    /// Words to put into the data segment first: (byte offset, words).
    pub data: Vec<(u32, Vec<u64>)>,
}

/// How a plan uses a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Number of the slot.
    pub slot: usize,
    /// What it needs.
    pub need: Need,
}

/// Rights that an access needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Readable.
    Read,
    /// Writable.
    Write,
    /// An atomic that changes nothing: the device may treat it as a load or as a store.
    ReadOrWrite,
}

/// Draws plans.
#[derive(Debug)]
pub struct Planner {
    random: Random,
    operation: u64,
    ds_words: usize,
}

impl Planner {
    /// For a data segment of `ds_bytes`.
    pub fn new(random: Random, ds_bytes: usize) -> Self {
        let ds_words = ds_bytes / 8;
        assert!(ds_words >= 128, "a data segment of {ds_bytes} bytes is too small");
        Self {
            random,
            operation: 0,
            ds_words,
        }
    }

    /// A plan on `slot`; a copy goes from `slot` to `other`.
    pub fn draw(&mut self, slot: &Slot, other: &Slot) -> Plan {
        self.operation += 1;
        match self.random.below(16) {
            0..=3 => self.load(slot),
            4..=7 => self.store(slot),
            8 => self.set(slot),
            9 | 10 => self.copy(slot, other),
            11 => self.gather(slot),
            12 => self.scatter(slot),
            _ => self.atomic(slot),
        }
    }

    fn read_only(name: &'static str, slot: &Slot, instruction: Instruction) -> Plan {
        Plan {
            name,
            instruction,
            slots: vec![Operand {
                slot: slot.index,
                need: Need::Read,
            }],
            reads: Vec::new(),
            result: Result::None,
            writes: Vec::new(),
            untouched: Vec::new(),
            data: Vec::new(),
        }
    }

    fn writing(name: &'static str, slot: &Slot, instruction: Instruction) -> Plan {
        let mut plan = Self::read_only(name, slot, instruction);
        plan.slots[0].need = Need::Write;
        plan
    }

    /// (first word, elements, stride): sometimes strided, often across page edges.
    fn run(&mut self, slot: &Slot, most: usize) -> (usize, usize, usize) {
        let words = slot.pages * WORDS_PER_PAGE;
        let stride = if self.random.chance(1, 4) {
            1 + self.random.below(96)
        } else {
            1
        };
        let most = most.min((words - 1) / stride + 1);
        // Short and long runs alike: half of them below 64 elements.
        let count = 1 + if self.random.chance(1, 2) {
            self.random.below(most.min(64))
        } else {
            self.random.below(most)
        };
        let first = self.random.below(words - (count - 1) * stride);
        (first, count, stride)
    }

    fn neighbours(slot: &Slot, first: usize, count: usize, stride: usize) -> Vec<Place> {
        let words = slot.pages * WORDS_PER_PAGE;
        let last = first + (count - 1) * stride;
        let mut places = Vec::new();
        if first > 0 {
            places.push(first - 1);
        }
        if last + 1 < words {
            places.push(last + 1);
        }
        if stride > 1 && count > 1 {
            places.push(first + 1);
        }
        places
            .into_iter()
            .map(|word| Place { operand: 0, word })
            .collect()
    }

    fn load(&mut self, slot: &Slot) -> Plan {
        let (first, count, stride) = self.run(slot, self.ds_words);
        let va = slot.va + first as u64 * 8;
        let instruction = Instruction::vload(va, 0, XType::DWORD, count as u64, stride as u64);
        let mut plan = Self::read_only("vload", slot, instruction);
        plan.reads = (0..count)
            .map(|i| Place {
                operand: 0,
                word: first + i * stride,
            })
            .collect();
        plan.result = Result::DataSegment { offset: 0 };
        plan
    }

    fn store(&mut self, slot: &Slot) -> Plan {
        let (first, count, stride) = self.run(slot, self.ds_words);
        let va = slot.va + first as u64 * 8;
        let instruction = Instruction::vstore(va, 0, XType::DWORD, count as u64, stride as u64);
        let mut plan = Self::writing("vstore", slot, instruction);
        let values: Vec<u64> = (0..count)
            .map(|i| words::store(slot.index, self.operation, first + i * stride))
            .collect();
        plan.writes = (0..count)
            .map(|i| {
                let place = Place {
                    operand: 0,
                    word: first + i * stride,
                };
                (place, New::Value(values[i]))
            })
            .collect();
        plan.untouched = Self::neighbours(slot, first, count, stride);
        plan.data = vec![(0, values)];
        plan
    }

    fn set(&mut self, slot: &Slot) -> Plan {
        let (first, count, stride) = self.run(slot, 4 * WORDS_PER_PAGE);
        let value = words::set(slot.index, self.operation);
        let va = slot.va + first as u64 * 8;
        let instruction = Instruction::vset(va, value, XType::DWORD, count as u64, stride as u64);
        let mut plan = Self::writing("vset", slot, instruction);
        plan.writes = (0..count)
            .map(|i| {
                let place = Place {
                    operand: 0,
                    word: first + i * stride,
                };
                (place, New::Value(value))
            })
            .collect();
        plan.untouched = Self::neighbours(slot, first, count, stride);
        plan
    }

    fn copy(&mut self, from: &Slot, to: &Slot) -> Plan {
        // Cache lines of 64 bytes; at most four pages, through a buffer of a quarter of the data segment.
        let lines = |slot: &Slot| slot.pages * PAGE as usize / 64;
        let most = lines(from).min(lines(to)).min(4 * PAGE as usize / 64);
        let mut count = 1 + self.random.below(most);
        let (mut source, mut target) = (
            self.random.below(lines(from) - count + 1),
            self.random.below(lines(to) - count + 1),
        );
        if from.index == to.index {
            // Inside one slot the two ranges must not overlap.
            count = count.min(lines(from) / 2);
            source = self.random.below(lines(from) / 2 - count + 1);
            target = lines(from) / 2 + self.random.below(lines(from) / 2 - count + 1);
        }
        let buffer_lines = (self.ds_words / 4 / 8).clamp(1, 63) as u32;
        let instruction = Instruction::bcopy(
            from.va + source as u64 * 64,
            to.va + target as u64 * 64,
            0,
            buffer_lines,
            XType::CACHE_LINE,
            count as u64,
        );
        let mut plan = Self::read_only("bcopy", from, instruction);
        let target_operand = if from.index == to.index {
            plan.slots[0].need = Need::Write;
            0
        } else {
            plan.slots.push(Operand {
                slot: to.index,
                need: Need::Write,
            });
            1
        };
        plan.reads = (0..count * 8)
            .map(|i| Place {
                operand: 0,
                word: source * 8 + i,
            })
            .collect();
        plan.result = Result::Written;
        plan.writes = (0..count * 8)
            .map(|i| {
                let place = Place {
                    operand: target_operand,
                    word: target * 8 + i,
                };
                (place, New::Read(i))
            })
            .collect();
        plan
    }

    /// Distinct word numbers inside the slot.
    fn scattered(&mut self, slot: &Slot) -> Vec<usize> {
        let words = slot.pages * WORDS_PER_PAGE;
        let mut chosen: Vec<usize> = (0..1 + self.random.below(48))
            .map(|_| self.random.below(words))
            .collect();
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    fn gather(&mut self, slot: &Slot) -> Plan {
        let chosen = self.scattered(slot);
        let half = (self.ds_words / 2 * 8) as u32;
        let instruction = Instruction::ivload(slot.va, 0, half, XType::DWORD, chosen.len() as u64);
        let mut plan = Self::read_only("ivload", slot, instruction);
        plan.data = vec![(half, chosen.iter().map(|w| *w as u64 * 8).collect())];
        plan.reads = chosen
            .into_iter()
            .map(|word| Place { operand: 0, word })
            .collect();
        plan.result = Result::DataSegment { offset: 0 };
        plan
    }

    fn scatter(&mut self, slot: &Slot) -> Plan {
        let chosen = self.scattered(slot);
        let half = (self.ds_words / 2 * 8) as u32;
        let instruction = Instruction::ivstore(slot.va, 0, half, XType::DWORD, chosen.len() as u64);
        let mut plan = Self::writing("ivstore", slot, instruction);
        let values: Vec<u64> = chosen
            .iter()
            .map(|w| words::store(slot.index, self.operation, *w))
            .collect();
        plan.data = vec![
            (0, values.clone()),
            (half, chosen.iter().map(|w| *w as u64 * 8).collect()),
        ];
        plan.writes = chosen
            .into_iter()
            .zip(values)
            .map(|(word, value)| (Place { operand: 0, word }, New::Value(value)))
            .collect();
        plan
    }

    fn atomic(&mut self, slot: &Slot) -> Plan {
        let word = self.random.below(slot.pages * WORDS_PER_PAGE);
        let new = words::store(slot.index, self.operation, word);
        let (name, atomic) = match self.random.below(7) {
            0 => ("gamir fetch", Atomic::Fetch),
            1 => ("gamir inc", Atomic::Increment),
            2 => ("gamir dec", Atomic::Decrement),
            3 => ("gamer swap", Atomic::Swap(new)),
            4 => ("gamer add", Atomic::Add(self.random.next() >> 40)),
            5 => ("gamer xor", Atomic::Xor(self.random.next() >> 40)),
            // The worker sets `expected` to what it sees, see `Plan::aim`.
            _ => ("gamer cswap", Atomic::CompareSwap { expected: 0, new }),
        };
        let place = Place { operand: 0, word };
        let mut plan = Self::writing(name, slot, atomic.instruction(slot.va + word as u64 * 8));
        if atomic == Atomic::Fetch {
            plan.slots[0].need = Need::ReadOrWrite;
        }
        plan.reads = vec![place];
        plan.result = Result::AValue;
        plan.writes = vec![(place, New::Atomic(atomic))];
        plan.untouched = Self::neighbours(slot, word, 1, 1);
        plan
    }
}

impl Plan {
    /// Gives a compare-and-swap the value that its word has now, so that it succeeds (three times in
    /// four: a failing one has to leave the word alone).
    pub fn aim(&mut self, seen: u64) {
        if let [(_, New::Atomic(atomic @ Atomic::CompareSwap { .. }))] = &mut self.writes[..]
            && let Atomic::CompareSwap { expected, .. } = atomic
        {
            *expected = if seen.is_multiple_of(4) { !seen } else { seen };
            self.instruction = atomic.instruction(self.instruction.baddr0);
        }
    }

    /// Bytes of memory that the instruction reads and writes.
    pub fn bytes(&self) -> u64 {
        8 * (self.reads.len() + self.writes.len()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_plans_when_drawn_stay_inside_slot_and_data_segment() {
        let mut planner = Planner::new(Random::new(1, 1), 8192);
        let slots = [Slot::new(0, 0x10_0000, 1), Slot::new(1, 0x20_0000, 64)];
        let mut names = std::collections::BTreeSet::new();
        for i in 0..20_000 {
            let (a, b) = (&slots[i % 2], &slots[i / 2 % 2]);
            let plan = planner.draw(a, b);
            names.insert(plan.name);
            for place in plan
                .reads
                .iter()
                .chain(plan.writes.iter().map(|(p, _)| p))
                .chain(&plan.untouched)
            {
                let slot = &slots[plan.slots[place.operand].slot];
                assert!(place.word < slot.pages * WORDS_PER_PAGE, "{plan:?}");
            }
            assert!(!plan.reads.is_empty() || !plan.writes.is_empty());
            for (offset, words) in &plan.data {
                assert!(*offset as usize + words.len() * 8 <= 8192, "{plan:?}");
            }
            if let Result::DataSegment { offset } = plan.result {
                assert!(offset as usize + plan.reads.len() * 8 <= 8192);
            }
            let mut written: Vec<_> = plan.writes.iter().map(|(p, _)| (p.operand, p.word)).collect();
            written.sort_unstable();
            written.dedup();
            assert_eq!(written.len(), plan.writes.len(), "no word is written twice");
        }
        assert_eq!(names.len(), 13, "{names:?}");
    }
}
