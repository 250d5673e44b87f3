//! Storms under stores: what must not change any more, does not.

#![allow(unsafe_code)] // fork

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};
use rustix::mm::MprotectFlags;

use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::memory::{PAGE, Region};

const PAGES: usize = 8;
const PAGE_WORDS: u64 = PAGE as u64 / 8;
/// Looks at memory that must not change, each a whole page.
const LOOKS: usize = 20;

struct Writing<'a> {
    gseg: &'a Gseg<'a>,
    region: &'a Region,
    /// Odd from before memory becomes read-only until after it is writable again.
    perhaps: AtomicU64,
    /// Odd while it is read-only for certain.
    certainly: AtomicU64,
    stop: AtomicBool,
}

#[derive(Default)]
struct Written {
    pages: u64,
    refused: u64,
}

impl<'a> Writing<'a> {
    fn new(gseg: &'a Gseg<'a>, region: &'a Region) -> Self {
        Self {
            gseg,
            region,
            perhaps: AtomicU64::new(0),
            certainly: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    fn windows(&self) -> (u64, u64) {
        (
            self.perhaps.load(Ordering::SeqCst),
            self.certainly.load(Ordering::SeqCst),
        )
    }

    /// Sets page after page until told to stop, and at least once.
    fn write(&self) -> Result<Written> {
        let mut written = Written::default();
        for round in 1u64.. {
            let page = round as usize % PAGES;
            let (perhaps, certainly) = self.windows();
            let store = Instruction::vset(self.region.va(page * PAGE), round, XType::DWORD, PAGE_WORDS, 1);
            let refused = self.gseg.run(0, &store)?.no_memory()?;
            let (perhaps_now, certainly_now) = self.windows();
            if refused {
                let writable = perhaps == perhaps_now && perhaps.is_multiple_of(2);
                ensure!(!writable, "a store to writable memory was refused");
                written.refused += 1;
            } else {
                let forbidden = certainly == certainly_now && !certainly.is_multiple_of(2);
                ensure!(
                    !forbidden,
                    "STALE: a store that began when memory was read-only has succeeded"
                );
                written.pages += 1;
                let words = self.region.words(page * PAGE, PAGE);
                ensure!(
                    words.iter().all(|&word| word == round),
                    "LOST: a store of {round} to page {page} is done, and there is {:#x}",
                    words.iter().find(|&&word| word != round).expect("one of them")
                );
            }
            if self.stop.load(Ordering::Acquire) {
                break;
            }
        }
        Ok(written)
    }

    /// Looks at every page until it is likely that a store that was under way has ended; nothing may change.
    fn unchanged(&self) -> Result<()> {
        let before: Vec<_> = (0..PAGES)
            .map(|page| self.region.words(page * PAGE, PAGE))
            .collect();
        for _ in 0..LOOKS {
            for (page, before) in before.iter().enumerate() {
                ensure!(
                    self.region.words(page * PAGE, PAGE) == *before,
                    "STALE: page {page} has changed when it was read-only"
                );
            }
        }
        Ok(())
    }
}

/// mprotect to read-only, and back.
pub fn protected(gru: &Gru, misses: Misses, rounds: u64) -> Result<String> {
    let gseg = gru.context(Shape {
        misses,
        ..Shape::default()
    })?;
    let region = Region::anonymous(PAGES * PAGE)?;
    region.fill(0, PAGES * PAGE, 0);
    let writing = Writing::new(&gseg, &region);
    let written = under_stores(
        &writing,
        |_| {
            writing.perhaps.fetch_add(1, Ordering::SeqCst);
            region.protect(0, PAGES * PAGE, MprotectFlags::READ)?;
            writing.certainly.fetch_add(1, Ordering::SeqCst);
            writing.unchanged()?;
            writing.certainly.fetch_add(1, Ordering::SeqCst);
            region.protect(0, PAGES * PAGE, MprotectFlags::READ | MprotectFlags::WRITE)?;
            writing.perhaps.fetch_add(1, Ordering::SeqCst);
            Ok(())
        },
        rounds,
    )?;
    ensure!(
        written.refused > 0,
        "no store was ever refused: the test says nothing"
    );
    Ok(format!(
        "{misses:?}: {rounds} rounds, {} pages stored, {} refused",
        written.pages, written.refused
    ))
}

/// fork: the child's memory stays as it was.
pub fn forked(gru: &Gru, misses: Misses, rounds: u64) -> Result<String> {
    let gseg = gru.context(Shape {
        misses,
        ..Shape::default()
    })?;
    let region = Region::anonymous(PAGES * PAGE)?;
    region.fill(0, PAGES * PAGE, 0);
    let writing = Writing::new(&gseg, &region);
    let mut before = vec![0; PAGES * PAGE / 8];
    let written = under_stores(
        &writing,
        |_| {
            // SAFETY: the child only reads memory and ends, by _exit.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let code = i32::from(changes(&region, &mut before));
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(code) }
            }
            ensure!(child > 0, "fork: {}", std::io::Error::last_os_error());
            let mut status = 0;
            // SAFETY: our own child.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            ensure!(waited == child, "waitpid: {}", std::io::Error::last_os_error());
            ensure!(
                status == 0,
                "STALE: the child's memory has changed (status {status:#x})"
            );
            Ok(())
        },
        rounds,
    )?;
    Ok(format!(
        "{misses:?}: {rounds} children, {} pages stored",
        written.pages
    ))
}

/// In the child: whether memory changes. Allocates nothing.
fn changes(region: &Region, before: &mut [u64]) -> bool {
    for (i, word) in before.iter_mut().enumerate() {
        *word = region.load(8 * i);
    }
    (0..LOOKS).any(|_| {
        before
            .iter()
            .enumerate()
            .any(|(i, &word)| region.load(8 * i) != word)
    })
}

fn under_stores(
    writing: &Writing<'_>,
    mut strike: impl FnMut(u64) -> Result<()>,
    rounds: u64,
) -> Result<Written> {
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let result = writing.write();
            writing.stop.store(true, Ordering::Release);
            result
        });
        let mut all = || -> Result<()> {
            for round in 0..rounds {
                if writing.stop.load(Ordering::Acquire) {
                    break;
                }
                strike(round).with_context(|| format!("round {round}"))?;
            }
            Ok(())
        };
        let struck = all();
        writing.stop.store(true, Ordering::Release);
        let written = writer.join().expect("no panic")?;
        struck?;
        Ok(written)
    })
}
