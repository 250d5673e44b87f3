//! The benchmark's memory: a client's, as a device has it, through a device TLB.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use device::atc::{Access, Atc, AtcConfig, Engine, Fill, Guard, PageSize, SpaceId};
use device::dma::{Prot, Space};
use device::transport::{Gone, Lender, Lent, Loan, Place, Shown};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The one address space: its addresses are IOVAs.
const SPACE: SpaceId = SpaceId(1);
/// As of a region on huge pages.
const PAGE: u64 = 2 << 20;

/// Engines and tickets: the owner's, and that of its desk.
const OWN: usize = 0;
const DESK: usize = 1;

/// One thread's way to the memory.
#[derive(Debug)]
struct Way {
    engine: Engine,
    ticket: usize,
}

impl Way {
    /// Enters the page of an address that is not there.
    fn fill(&self, va: u64) -> bool {
        let atc = self.engine.atc();
        atc.open_miss(self.ticket, SPACE, va);
        let result = atc.fill(
            self.ticket,
            Fill {
                space: SPACE,
                va,
                size: PageSize::new(PAGE.trailing_zeros() as u8).expect("2 MiB"),
                iova: va / PAGE * PAGE,
                writable: true,
                tag: 0,
            },
        );
        atc.close_miss(self.ticket);
        result.is_ok()
    }

    /// Goes through `len` bytes from `va` on, guard by guard. Whether all of them are memory.
    fn walk(&mut self, va: u64, len: usize, access: Access, mut each: impl FnMut(&Guard<'_>, usize)) -> bool {
        let mut done = 0;
        while done < len {
            let at = va + done as u64;
            if let Ok(guard) = self.engine.access(SPACE, at, (len - done) as u64, access) {
                each(&guard, done);
                done += guard.len();
            } else if !self.fill(at) {
                return false;
            }
        }
        true
    }
}

/// What the other side sees of memory that is lent to it.
#[derive(Debug)]
struct Desk(Mutex<Way>);

impl Lender for Desk {
    fn show(
        &self,
        place: Place,
        len: usize,
        take: &mut dyn FnMut(Shown<'_>) -> usize,
    ) -> Result<usize, Gone> {
        let mut way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < len {
            let at = place.va + done as u64;
            if let Ok(guard) = way.engine.access(SPACE, at, (len - done) as u64, Access::Read) {
                let taken = take(Shown::Guard(&guard));
                if taken == 0 {
                    break;
                }
                done += taken;
            } else if !way.fill(at) {
                return Err(Gone);
            }
        }
        Ok(done)
    }
}

/// Memory of one owner.
#[derive(Debug)]
pub struct Memory {
    len: u64,
    own: Way,
    desk: Arc<Desk>,
}

impl Memory {
    /// Present, and entered in the device TLB.
    ///
    /// # Errors
    /// The system has none.
    pub fn new(len: usize) -> Result<Self> {
        let len = (len as u64).next_multiple_of(PAGE);
        let fd = memfd_create("tlbridge-bench", MemfdFlags::CLOEXEC).context("memfd_create")?;
        ftruncate(&fd, len).context("the size of the benchmark's memory")?;
        let dma = Space::new();
        dma.map(0, len, fd, 0, Prot::READ_WRITE)?;
        let config = AtcConfig {
            engines: 2,
            tickets: 2,
            ..AtcConfig::default()
        };
        let atc = Atc::new(config, dma);
        let way = |ticket| -> Result<Way> {
            let engine = atc.engine().context("the device TLB has two engines")?;
            Ok(Way { engine, ticket })
        };
        let mut memory = Self {
            len,
            own: way(OWN)?,
            desk: Arc::new(Desk(Mutex::new(way(DESK)?))),
        };
        memory
            .own
            .walk(0, len as usize, Access::Write, |guard, _| guard.fill(1));
        Ok(memory)
    }

    /// Whether these are its own.
    pub fn has(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies out.
    pub fn load(&mut self, at: u64, into: &mut [u8]) -> bool {
        let len = into.len();
        self.own.walk(at, len, Access::Read, |guard, done| {
            guard.read_into(&mut into[done..done + guard.len()]);
        })
    }

    /// Copies in.
    pub fn store(&mut self, at: u64, data: &[u8]) -> bool {
        self.own.walk(at, data.len(), Access::Write, |guard, done| {
            guard.write_from(&data[done..done + guard.len()]);
        })
    }

    /// Copies from one place to another one, at once: a look-up for either, and memcpy.
    pub fn copy(&mut self, from: u64, to: u64, len: usize) -> bool {
        let mut way = self.desk.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = &mut self.own;
        // (The look-ups of both sides find something; where they do not, it is entered and begun anew.)
        while own.walk(to, len, Access::Write, |_, _| ()) {
            let mut copied = 0;
            let there = way.walk(from, len, Access::Read, |source, offset| {
                let at = to + offset as u64;
                if let Ok(guard) = own.engine.access(SPACE, at, source.len() as u64, Access::Write)
                    && guard.len() == source.len()
                {
                    guard.copy_from(source);
                    copied += guard.len();
                }
            });
            if !there || copied == len {
                return there;
            }
        }
        false
    }

    /// Adds to the word at `at`.
    pub fn add(&mut self, at: u64, add: u64) -> Option<u64> {
        let mut old = None;
        self.own.walk(at, 8, Access::Write, |guard, _| {
            let word = guard.atomic64();
            old = word.map(|word| word.fetch_add(add, std::sync::atomic::Ordering::SeqCst));
        });
        old
    }

    /// Lends what is at `at`.
    pub fn lend(&self, at: u64) -> Lent {
        Lent {
            lender: Arc::clone(&self.desk) as Arc<dyn Lender>,
            place: Place {
                space: SPACE.0,
                key: 0,
                va: at,
            },
        }
    }

    /// Copies the rest of a loan to `at`.
    pub fn pull(&mut self, at: u64, loan: &Loan, from: usize) -> Result<bool, Gone> {
        let own = &mut self.own;
        let (len, mut done) = (loan.len() - from, 0);
        while done < len {
            let taken = loan.show(from + done, len - done, &mut |shown| {
                let Shown::Guard(source) = shown else {
                    return 0;
                };
                let to = at + done as u64;
                let Ok(guard) = own.engine.access(SPACE, to, source.len() as u64, Access::Write) else {
                    return 0;
                };
                guard.copy_from(source);
                done += guard.len();
                guard.len()
            })?;
            if taken == 0 && !own.fill(at + done as u64) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
