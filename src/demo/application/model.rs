//! A device, a kernel and a notifier in a few lines, for tests of the oracles: correct, or wrong in a
//! chosen way.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, Opc, XType};
use protos::gru::cbe::ecause;

use super::calls::{Calls, Path};
use super::executor::{Broken, Executor, Outcome};
use super::frames::PAGE;
use super::slots::Prot;
use super::words::WORDS_PER_PAGE;

/// What is wrong with the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// No call purges anything.
    NoPurge,
    /// A purge reaches the first page only.
    FirstPageOnly,
    /// A discard purges nothing (contents stay, so only the generation shows it).
    NoPurgeOnDiscard,
    /// mprotect purges nothing.
    NoPurgeOnProtect,
    /// Stores are lost.
    LostStores,
    /// Every access faults.
    AlwaysExcept,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    page: usize,
    prot: Prot,
    tag: u64,
}

/// Page table, device TLB and memory.
#[derive(Debug)]
pub struct Machine<'m> {
    memory: &'m [AtomicU64],
    fault: Fault,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    mapped: BTreeMap<u64, (usize, Prot)>,
    tlb: HashMap<u64, Entry>,
    generation: u64,
}

impl<'m> Machine<'m> {
    pub fn new(memory: &'m [AtomicU64], fault: Fault) -> Self {
        Self {
            memory,
            fault,
            tables: Mutex::default(),
        }
    }

    /// One access, as atomic as one guard of the device.
    fn access(&self, va: u64, write: bool, f: impl FnOnce(&AtomicU64)) -> Option<u64> {
        if self.fault == Fault::AlwaysExcept {
            return None;
        }
        let mut tables = self.tables.lock().unwrap();
        let page = va / PAGE;
        let usable = tables.tlb.get(&page).copied().filter(|e| e.prot.allows(write));
        let entry = match usable {
            Some(entry) => entry,
            None => {
                let (frame, prot) = *tables.mapped.get(&page)?;
                if !prot.allows(write) {
                    return None;
                }
                let entry = Entry {
                    page: frame,
                    prot,
                    tag: tables.generation,
                };
                tables.tlb.insert(page, entry);
                entry
            }
        };
        let word = entry.page * WORDS_PER_PAGE + (va % PAGE / 8) as usize;
        f(&self.memory[word]);
        Some(entry.tag)
    }

    fn change(&self, kind: Fault, ranges: &[(u64, u64)], f: impl FnOnce(&mut Tables)) -> io::Result<u64> {
        let mut tables = self.tables.lock().unwrap();
        f(&mut tables);
        tables.generation += 1;
        for (start, len) in ranges {
            let pages = match self.fault {
                Fault::NoPurge => 0,
                Fault::FirstPageOnly => 1,
                fault if fault != Fault::None && fault == kind => 0,
                _ => len / PAGE,
            };
            for page in start / PAGE..start / PAGE + pages {
                tables.tlb.remove(&page);
            }
        }
        Ok(tables.generation)
    }
}

impl Calls for Machine<'_> {
    fn map_over(&self, _: Path, va: u64, len: u64, offset: u64, prot: Prot) -> io::Result<u64> {
        self.change(Fault::None, &[(va, len)], |t| {
            for i in 0..len / PAGE {
                t.mapped
                    .insert(va / PAGE + i, ((offset / PAGE + i) as usize, prot));
            }
        })
    }
    fn unmap(&self, _: Path, va: u64, len: u64) -> io::Result<u64> {
        self.change(Fault::None, &[(va, len)], |t| {
            for page in va / PAGE..(va + len) / PAGE {
                t.mapped.remove(&page);
            }
        })
    }
    fn relocate(&self, _: Path, from: u64, to: u64, len: u64) -> io::Result<u64> {
        self.change(Fault::None, &[(from, len), (to, len)], |t| {
            for i in 0..len / PAGE {
                let moved = t.mapped.remove(&(from / PAGE + i)).expect("the source is mapped");
                t.mapped.insert(to / PAGE + i, moved);
            }
        })
    }
    fn discard(&self, _: Path, va: u64, len: u64) -> io::Result<u64> {
        self.change(Fault::NoPurgeOnDiscard, &[(va, len)], |_| {})
    }
    fn remove(&self, _: Path, va: u64, len: u64) -> io::Result<u64> {
        self.change(Fault::None, &[(va, len)], |t| {
            for page in va / PAGE..(va + len) / PAGE {
                let first = t.mapped[&page].0 * WORDS_PER_PAGE;
                for word in &self.memory[first..first + WORDS_PER_PAGE] {
                    word.store(0, Ordering::Relaxed);
                }
            }
        })
    }
    fn protect(&self, va: u64, len: u64, prot: Prot) -> io::Result<u64> {
        self.change(Fault::NoPurgeOnProtect, &[(va, len)], |t| {
            for page in va / PAGE..(va + len) / PAGE {
                t.mapped.get_mut(&page).expect("mapped").1 = prot;
            }
        })
    }
    fn fork(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A context of the machine.
#[derive(Debug)]
pub struct Context<'m> {
    machine: &'m Machine<'m>,
    ds: Vec<u64>,
}

impl<'m> Context<'m> {
    pub fn new(machine: &'m Machine<'m>) -> Self {
        Self {
            machine,
            ds: vec![0; 1024],
        }
    }

    fn read(&self, va: u64, tag: &mut u64) -> Option<u64> {
        let mut value = 0;
        let used = self
            .machine
            .access(va, false, |w| value = w.load(Ordering::Relaxed))?;
        *tag = used.min(*tag);
        Some(value)
    }

    fn write(&self, va: u64, value: u64, tag: &mut u64) -> Option<()> {
        let lost = self.machine.fault == Fault::LostStores;
        let used = self.machine.access(va, true, |w| {
            if !lost {
                w.store(value, Ordering::Relaxed);
            }
        })?;
        *tag = used.min(*tag);
        Some(())
    }

    fn run(&mut self, i: &Instruction) -> Option<Outcome> {
        let mut tag = u64::MAX;
        let mut avalue = 0;
        let (va, n, stride) = (i.baddr0, i.nelem, i.stride_op1);
        let tri0 = i.control.tri0() as usize / 8;
        let tri1 = i.idef4 as usize / 8;
        match i.control.opc() {
            Opc::VLOAD => {
                for e in 0..n {
                    self.ds[tri0 + e as usize] = self.read(va + e * stride * 8, &mut tag)?;
                }
            }
            Opc::VSTORE => {
                for e in 0..n {
                    self.write(va + e * stride * 8, self.ds[tri0 + e as usize], &mut tag)?;
                }
            }
            Opc::VSET => {
                for e in 0..n {
                    self.write(va + e * stride * 8, i.baddr1_value_op2, &mut tag)?;
                }
            }
            Opc::IVLOAD => {
                for e in 0..n as usize {
                    self.ds[tri0 + e] = self.read(va + self.ds[tri1 + e], &mut tag)?;
                }
            }
            Opc::IVSTORE => {
                for e in 0..n as usize {
                    self.write(va + self.ds[tri1 + e], self.ds[tri0 + e], &mut tag)?;
                }
            }
            Opc::BCOPY => {
                assert_eq!(i.control.xtype(), XType::CACHE_LINE);
                for e in 0..n * 8 {
                    let value = self.read(va + e * 8, &mut tag)?;
                    self.write(i.baddr1_value_op2 + e * 8, value, &mut tag)?;
                }
            }
            opc @ (Opc::GAMIR | Opc::GAMER) => {
                let op = i.control.exopc();
                let (op1, op2) = (i.stride_op1, i.baddr1_value_op2);
                let implicit = opc == Opc::GAMIR;
                tag = self.machine.access(va, true, |w| {
                    avalue = w.load(Ordering::Relaxed);
                    let new = match (implicit, op) {
                        (true, op) if op == ImplicitOp::FETCH.0 => avalue,
                        (true, op) if op == ImplicitOp::INC.0 => avalue.wrapping_add(1),
                        (true, op) if op == ImplicitOp::DEC.0 => avalue.wrapping_sub(1),
                        (false, op) if op == ExplicitOp::SWAP.0 => op1,
                        (false, op) if op == ExplicitOp::ADD.0 => avalue.wrapping_add(op1),
                        (false, op) if op == ExplicitOp::XOR.0 => avalue ^ op1,
                        (false, op) if op == ExplicitOp::CSWAP.0 && avalue == op2 => op1,
                        (false, op) if op == ExplicitOp::CSWAP.0 => avalue,
                        other => panic!("the model has no atomic {other:?}"),
                    };
                    w.store(new, Ordering::Relaxed);
                })?;
            }
            other => panic!("the model has no {other:?}"),
        }
        Some(Outcome::Completed { avalue, tag })
    }
}

impl Executor for Context<'_> {
    fn ds_bytes(&self) -> usize {
        self.ds.len() * 8
    }
    fn write_ds(&mut self, offset: u32, words: &[u64]) -> Result<(), Broken> {
        self.ds[offset as usize / 8..][..words.len()].copy_from_slice(words);
        Ok(())
    }
    fn read_ds(&mut self, offset: u32, words: &mut [u64]) -> Result<(), Broken> {
        words.copy_from_slice(&self.ds[offset as usize / 8..][..words.len()]);
        Ok(())
    }
    fn execute(&mut self, instruction: &Instruction) -> Result<Outcome, Broken> {
        Ok(self.run(instruction).unwrap_or(Outcome::Exception {
            ecause: ecause::OS_FATAL_TLB_FAULT,
        }))
    }
}
