//! Every instruction with every element size, on memory that straddles pages, compared with what the processor
//! computes. Where the reference leaves the meaning open, the device's decision is what is tested (see
//! device/src/gru).

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, XType};
use protos::gru::cbe::ecause;
use protos::gru::map;

use crate::Outcome;
use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::issue::End;
use crate::memory::{PAGE, Region};
use crate::numbers::Numbers;
use crate::queue;

const SIZES: [XType; 5] = [
    XType::BYTE,
    XType::SHORT,
    XType::WORD,
    XType::DWORD,
    XType::CACHE_LINE,
];
const PAGES: usize = 8;
/// Bytes of the data segment.
const DS: usize = 8192;

pub fn run(gru: &Gru, ways: &[Misses], rounds: u64, seed: u64) -> Outcome {
    let mut count = 0;
    for (number, &misses) in ways.iter().enumerate() {
        let gseg = gru.context(Shape {
            cbs: 4,
            ds: DS as u32,
            misses,
            preload: 2,
            chiplet: Some(number as u8 % 2),
        })?;
        for round in 0..rounds {
            let mut bench = Bench {
                gseg: &gseg,
                region: Region::anonymous(PAGES * PAGE)?,
                numbers: Numbers::new(seed + round),
                count: 0,
            };
            bench
                .all()
                .with_context(|| format!("{misses:?}, round {round}"))?;
            count += bench.count;
        }
    }
    Ok(format!("{count} instructions, {ways:?}"))
}

/// A context, memory, and what the processor thinks is in it.
struct Bench<'a> {
    gseg: &'a Gseg<'a>,
    region: Region,
    numbers: Numbers,
    count: u64,
}

/// Bytes of words.
fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Words of bytes.
fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .map(|chunk| u64::from_le_bytes(chunk.try_into().expect("eight bytes")))
        .collect()
}

impl Bench<'_> {
    fn all(&mut self) -> Result<()> {
        self.nothing().context("NOP")?;
        for size in SIZES {
            self.vectors(size)
                .with_context(|| format!("vectors of {size:?}"))?;
            self.indexed(size)
                .with_context(|| format!("indexed vectors of {size:?}"))?;
            self.copies(size).with_context(|| format!("copies of {size:?}"))?;
            self.flush(size).with_context(|| format!("VFLUSH of {size:?}"))?;
        }
        for size in [XType::WORD, XType::DWORD] {
            self.implicit(size)
                .with_context(|| format!("implicit atomics of {size:?}"))?;
            self.explicit(size)
                .with_context(|| format!("explicit atomics of {size:?}"))?;
            self.polls(size).with_context(|| format!("polls of {size:?}"))?;
        }
        self.exchange().context("GAMXR")?;
        self.refused().context("what is no instruction")?;
        queue::test(self.gseg).context("MESQ")?;
        self.count += queue::MESSAGES;
        Ok(())
    }

    fn run(&mut self, cb: u32, instruction: &Instruction) -> Result<u64> {
        self.count += 1;
        let (opc, exopc) = (instruction.control.opc(), instruction.control.exopc());
        self.gseg
            .run(cb, instruction)?
            .done()
            .with_context(|| format!("{opc:?} ({exopc:#x}) of {} elements", instruction.nelem))
    }

    /// Random contents, known to the caller.
    fn scramble(&mut self) -> Vec<u8> {
        let contents: Vec<u64> = (0..PAGES * PAGE / 8).map(|_| self.numbers.word()).collect();
        for (i, &word) in contents.iter().enumerate() {
            self.region.store(8 * i, word);
        }
        bytes(&contents)
    }

    fn scramble_ds(&mut self) -> Vec<u8> {
        let contents: Vec<u64> = (0..DS / 8).map(|_| self.numbers.word()).collect();
        self.gseg.write_ds(0, &contents);
        bytes(&contents)
    }

    fn expect_memory(&self, want: &[u8]) -> Result<()> {
        same("memory", &bytes(&self.region.words(0, PAGES * PAGE)), want)
    }

    fn expect_ds(&self, want: &[u8]) -> Result<()> {
        same("the data segment", &bytes(&self.gseg.read_ds(0, DS / 8)), want)
    }

    fn nothing(&mut self) -> Result<()> {
        for cb in 0..self.gseg.shape().cbs {
            self.run(cb, &Instruction::nop())?;
        }
        Ok(())
    }

    fn vectors(&mut self, size: XType) -> Result<()> {
        let element = size.bytes().expect("a size of the list") as usize;
        for (count, stride) in [(1usize, 1usize), (7, 1), (33, 1), (5, 3), (16, 9)] {
            let tri = 64 * self.numbers.below(4) + 64;
            // Across an edge between pages.
            let at = 2 * PAGE - (count * stride * element / 2).next_multiple_of(64).min(PAGE);
            let va = self.region.va(at);
            let place = |i: usize| at + i * stride * element;

            let (memory, mut ds) = (self.scramble(), self.scramble_ds());
            self.run(
                0,
                &Instruction::vload(va, tri as u32, size, count as u64, stride as u64),
            )?;
            for i in 0..count {
                ds[tri + i * element..][..element].copy_from_slice(&memory[place(i)..][..element]);
            }
            self.expect_ds(&ds).context("VLOAD")?;

            let (mut memory, ds) = (self.scramble(), self.scramble_ds());
            self.run(
                1,
                &Instruction::vstore(va, tri as u32, size, count as u64, stride as u64),
            )?;
            for i in 0..count {
                memory[place(i)..][..element].copy_from_slice(&ds[tri + i * element..][..element]);
            }
            self.expect_memory(&memory).context("VSTORE")?;

            // A line is set by repeating the value.
            let value = self.numbers.word();
            let mut memory = self.scramble();
            self.run(
                2,
                &Instruction::vset(va, value, size, count as u64, stride as u64),
            )?;
            for i in 0..count {
                for b in 0..element {
                    memory[place(i) + b] = value.to_le_bytes()[b % 8];
                }
            }
            self.expect_memory(&memory).context("VSET")?;
        }
        Ok(())
    }

    fn indexed(&mut self, size: XType) -> Result<()> {
        let element = size.bytes().expect("a size of the list") as usize;
        let (count, tri, index) = (24, 256, 4096);
        let (memory, mut ds) = (self.scramble(), self.scramble_ds());
        // Everywhere, in no order, and no two at the same place.
        let places: Vec<usize> = (0..count)
            .map(|i| (i * 7 % count) * (PAGES * PAGE / count) / 64 * 64 + 64 * (i % 3))
            .collect();
        for (i, &place) in places.iter().enumerate() {
            ds[index + 8 * i..][..8].copy_from_slice(&(place as u64).to_le_bytes());
        }
        self.gseg.write_ds(0, &words(&ds));
        let va = self.region.va(0);
        self.run(0, &Instruction::ivload(va, tri, index as u32, size, count as u64))?;
        for (i, &place) in places.iter().enumerate() {
            ds[tri as usize + i * element..][..element].copy_from_slice(&memory[place..][..element]);
        }
        self.expect_ds(&ds).context("IVLOAD")?;

        let mut memory = self.scramble();
        self.run(
            1,
            &Instruction::ivstore(va, tri, index as u32, size, count as u64),
        )?;
        for (i, &place) in places.iter().enumerate() {
            memory[place..][..element].copy_from_slice(&ds[tri as usize + i * element..][..element]);
        }
        self.expect_memory(&memory).context("IVSTORE")?;

        let value = self.numbers.word();
        self.run(
            2,
            &Instruction::ivset(va, index as u32, value, size, count as u64),
        )?;
        for &place in &places {
            for b in 0..element {
                memory[place + b] = value.to_le_bytes()[b % 8];
            }
        }
        self.expect_memory(&memory).context("IVSET")
    }

    fn copies(&mut self, size: XType) -> Result<()> {
        let element = size.bytes().expect("a size of the list") as usize;
        for len in [element, 64, 200 / element * element, PAGE, 2 * PAGE + 64] {
            if len < element {
                continue;
            }
            let mut memory = self.scramble();
            // Both across pages, and not in step with each other.
            let (from, to) = (PAGE - 64, 4 * PAGE + 128);
            let copy = Instruction::bcopy(
                self.region.va(from),
                self.region.va(to),
                0,
                4,
                size,
                (len / element) as u64,
            );
            self.run(3, &copy)?;
            memory.copy_within(from..from + len, to);
            self.expect_memory(&memory)
                .with_context(|| format!("BCOPY of {len} bytes"))?;
        }
        let (mut memory, ds) = (self.scramble(), self.scramble_ds());
        let (tri, to, count) = (512, 3 * PAGE - 64, 40 / element.min(8));
        let block = Instruction::bstore(0, self.region.va(to), tri as u32, size, count as u64);
        self.run(0, &block)?;
        memory[to..][..count * element].copy_from_slice(&ds[tri..][..count * element]);
        self.expect_memory(&memory).context("BSTORE")
    }

    fn flush(&mut self, size: XType) -> Result<()> {
        let memory = self.scramble();
        self.run(0, &Instruction::vflush(self.region.va(PAGE - 64), size, 64, 1))?;
        self.expect_memory(&memory)
    }

    /// Two processors' worth of a word: what an atomic found, and what it left.
    fn atomic(
        &mut self,
        instruction: &Instruction,
        size: XType,
        at: usize,
        old: u64,
        new: u64,
    ) -> Result<()> {
        let part = if size == XType::WORD {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        };
        let other = !part & 0x5555_5555_5555_5555;
        self.region.store(at, other | old & part);
        let found = self.run(1, instruction)?;
        ensure!(
            found & part == old & part,
            "{:?} {:#x} has found {found:#x}, not {old:#x}",
            instruction.control.opc(),
            instruction.control.exopc()
        );
        let left = self.region.load(at);
        ensure!(
            left == other | new & part,
            "{:?} {:#x} of {old:#x} has left {left:#x}, not {new:#x}",
            instruction.control.opc(),
            instruction.control.exopc()
        );
        Ok(())
    }

    fn implicit(&mut self, size: XType) -> Result<()> {
        let at = 3 * PAGE + 8;
        let va = self.region.va(at);
        for old in [0, 1, 5, u64::MAX] {
            for (op, new) in [
                (ImplicitOp::FETCH, old),
                (ImplicitOp::CLEAR, 0),
                (ImplicitOp::INC, old.wrapping_add(1)),
                (ImplicitOp::DEC, old.wrapping_sub(1)),
            ] {
                self.atomic(&Instruction::gamir(va, op, size), size, at, old, new)?;
                self.atomic(&Instruction::gamirr(va, op, size), size, at, old, new)?;
            }
            let least = old.saturating_sub(1);
            self.atomic(
                &Instruction::gamirr(va, ImplicitOp::DECZ, size),
                size,
                at,
                old,
                least,
            )?;
        }
        Ok(())
    }

    fn explicit(&mut self, size: XType) -> Result<()> {
        let at = 5 * PAGE + 16;
        let va = self.region.va(at);
        let (old, a, b) = (
            0xf0f0_1234_8765_4321,
            0x0ff0_00ff_1111_ffff,
            0xf0f0_1234_8765_4321,
        );
        for (op, op2, new) in [
            (ExplicitOp::SWAP, 0, a),
            (ExplicitOp::OR, 0, old | a),
            (ExplicitOp::AND, 0, old & a),
            (ExplicitOp::XOR, 0, old ^ a),
            (ExplicitOp::ADD, 0, u64::wrapping_add(old, a)),
            (ExplicitOp::CSWAP, b, a),
            (ExplicitOp::CSWAP, b + 1, old),
        ] {
            self.atomic(&Instruction::gamer(va, op, a, op2, size), size, at, old, new)?;
            self.atomic(&Instruction::gamerr(va, op, a, op2, size), size, at, old, new)?;
        }
        Ok(())
    }

    /// A poll ends when the processor writes what it waits for, and not before.
    fn polls(&mut self, size: XType) -> Result<()> {
        let at = 6 * PAGE + 24;
        let va = self.region.va(at);
        for (op, before, after) in [(ExplicitOp::EPOLL, 1, 77), (ExplicitOp::NPOLL, 77, 1)] {
            self.region.store(at, before);
            let ended = AtomicBool::new(false);
            let gseg = self.gseg;
            let found = std::thread::scope(|scope| -> Result<u64> {
                gseg.start(2, &Instruction::gamerr(va, op, 77, 0, size));
                let waiting = scope.spawn(|| {
                    let end = gseg.wait(2);
                    ended.store(true, Ordering::SeqCst);
                    end
                });
                // Others go on meanwhile.
                for _ in 0..5 {
                    gseg.run(0, &Instruction::nop())?.done()?;
                }
                let early = ended.load(Ordering::SeqCst);
                self.region.store(at, after);
                let found = waiting.join().expect("no panic")?.done()?;
                ensure!(!early, "the poll has ended before the word changed");
                Ok(found)
            })
            .with_context(|| format!("{op:?}"))?;
            ensure!(found == after, "{op:?} has found {found}");
            self.count += 6;
        }
        Ok(())
    }

    fn exchange(&mut self) -> Result<()> {
        let at = 7 * PAGE + 64;
        let va = self.region.va(at);
        let old = [0x11u64, 0x22, 0x33, 0x44];
        let new = [0xaaau64, 0xbbb, 0xccc, 0xddd];
        let mask = [0xff0u64, 0, u64::MAX, 0xf];
        for equal in [true, false] {
            for (i, &word) in old.iter().enumerate() {
                self.region.store(at + 8 * i, word);
            }
            let mut compare = old;
            compare[1] ^= 0xff; // not under the mask
            if !equal {
                compare[2] ^= 1;
            }
            let operands: Vec<u64> = new.into_iter().chain(compare).chain(mask).collect();
            self.gseg.write_ds(0, &operands);
            let found = self.run(0, &Instruction::gamxr(va, 0, 4))?;
            ensure!(found == old[0], "avalue is {found:#x}");
            ensure!(
                self.gseg.read_ds(96, 4) == old,
                "the old words are not in the data segment"
            );
            for i in 0..4 {
                let want = if equal {
                    old[i] & !mask[i] | new[i] & mask[i]
                } else {
                    old[i]
                };
                let got = self.region.load(at + 8 * i);
                ensure!(
                    got == want,
                    "word {i} is {got:#x}, not {want:#x} (equal: {equal})"
                );
            }
        }
        Ok(())
    }

    /// Exceptions, with the detail that the driver fetches from the extended control block.
    fn refused(&mut self) -> Result<()> {
        let va = self.region.va(0);
        let beyond = Instruction::vload(va, DS as u32 - 8, XType::DWORD, 2, 1);
        let no_such = Instruction::gamir(va, ImplicitOp(0x1f), XType::DWORD);
        let privileged = Instruction::vload(va, 0, XType::DWORD, 1, 1).with_ima(2);
        for (instruction, cause, opc) in [
            (beyond, ecause::DATA_SEGMENT_LIMIT_EXCEEDED, 2),
            (no_such, ecause::INVALID_INSTRUCTION, 0x0a),
            (privileged, ecause::UNMAPPED_MODE_FORBIDDEN, 2),
        ] {
            self.count += 1;
            match self.gseg.run(3, &instruction)? {
                End::Exception { detail, .. } => ensure!(
                    detail.ecause as u32 & cause != 0
                        && detail.opc == opc
                        && detail.cb == self.gseg.va() + map::GSEG_CB + 3 * map::HANDLE_STRIDE,
                    "{instruction:?}: {detail:x?}"
                ),
                End::Done(_) => anyhow::bail!("{instruction:?} was executed"),
            }
        }
        // The control block works again.
        self.run(3, &Instruction::nop()).map(drop)
    }
}

fn same(what: &str, got: &[u8], want: &[u8]) -> Result<()> {
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        let to = (at + 16).min(got.len());
        anyhow::bail!(
            "{what} differs from byte {at:#x} on: {:02x?}, not {:02x?}",
            &got[at..to],
            &want[at..to]
        );
    }
    Ok(())
}
