//! Pages whose contents say when they were written.
//!
//! A word is generation and page. A change of a page counts `started` up, tears the page away, writes the next
//! generation, and counts `stable` up. A load that begins when `stable` is g and ends when `started` is h may find
//! generations g to h in any mixture, and zero (memory that was just made) only if g < h. Anything older than g
//! came through a translation that should have been gone.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};

use crate::driver::Gseg;
use crate::memory::{PAGE, Region};
use crate::numbers::Numbers;

#[derive(Debug, Default)]
struct Page {
    offset: usize,
    started: AtomicU64,
    stable: AtomicU64,
}

/// What may happen to the pages.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// While one changes there may be nothing at all.
    pub vanish: bool,
    /// Every page has the same contents in the same generation.
    pub alike: bool,
    /// Pages that a copy takes at once.
    pub run: usize,
}

/// Pages of a region, and what may be in them.
#[derive(Debug)]
pub struct Pages<'a> {
    region: &'a Region,
    pages: Vec<Page>,
    rules: Rules,
    /// Copies that were started.
    begun: AtomicU64,
}

/// What the loads have found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// Copies that were compared.
    pub copies: u64,
    /// Copies that ended because there was no memory.
    pub vanished: u64,
}

impl<'a> Pages<'a> {
    /// Tracks the pages at these offsets, and writes their first generation.
    #[must_use]
    pub fn new(region: &'a Region, offsets: &[usize], rules: Rules) -> Self {
        assert!(rules.run <= 4 && !offsets.is_empty() && offsets.len() < 1 << 15);
        let pages = offsets.iter().map(|&offset| Page {
            offset,
            ..Page::default()
        });
        let pages = Self {
            region,
            pages: pages.collect(),
            rules,
            begun: AtomicU64::new(0),
        };
        for page in 0..pages.pages.len() {
            pages.change(page, || Ok(())).expect("nothing that could fail");
        }
        pages
    }

    /// Copies that were started so far.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Where a page is in the region.
    #[must_use]
    pub fn offset(&self, page: usize) -> usize {
        self.pages[page].offset
    }

    /// The word of a page's generation.
    #[must_use]
    pub fn word(&self, page: usize, generation: u64) -> u64 {
        let mark = if self.rules.alike { 0 } else { page as u64 + 1 };
        generation << 16 | mark
    }

    /// The generation that a page will have after the next change.
    #[must_use]
    pub fn next(&self, page: usize) -> u64 {
        self.pages[page].stable.load(Ordering::SeqCst) + 1
    }

    /// Tears a page away and writes its next generation. One thread changes pages.
    ///
    /// # Errors
    /// What `tear` says.
    pub fn change(&self, page: usize, tear: impl FnOnce() -> Result<()>) -> Result<()> {
        self.change_all(&[page], tear)
    }

    /// The same for several at once.
    ///
    /// # Errors
    /// What `tear` says.
    pub fn change_all(&self, pages: &[usize], tear: impl FnOnce() -> Result<()>) -> Result<()> {
        for &page in pages {
            self.pages[page].started.store(self.next(page), Ordering::SeqCst);
        }
        tear()?;
        for &page in pages {
            self.region
                .fill(self.offset(page), PAGE, self.word(page, self.next(page)));
        }
        self.settle(pages);
        Ok(())
    }

    /// The same, with the words written by `write`.
    ///
    /// # Errors
    /// What `write` says.
    pub fn change_by(&self, page: usize, write: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let next = self.next(page);
        self.pages[page].started.store(next, Ordering::SeqCst);
        write(self.word(page, next))?;
        self.settle(&[page]);
        Ok(())
    }

    fn settle(&self, pages: &[usize]) {
        for &page in pages {
            self.pages[page].stable.store(self.next(page), Ordering::SeqCst);
        }
    }

    /// Copies some pages with the GRU and looks at what it has found.
    ///
    /// # Errors
    /// A word that may not be there.
    pub fn look(&self, gseg: &Gseg<'_>, into: &Region, numbers: &mut Numbers, seen: &mut Seen) -> Result<()> {
        let run = 1 + numbers.below(self.rules.run);
        let first = numbers.below(self.pages.len() + 1 - run);
        let pages = first..first + run;
        let low: Vec<_> = pages
            .clone()
            .map(|p| self.pages[p].stable.load(Ordering::SeqCst))
            .collect();
        let from = self.region.va(self.offset(first));
        let lines = (run * PAGE / 64) as u64;
        let copy = Instruction::bcopy(from, into.va(0), 0, 16, XType::CACHE_LINE, lines);
        gseg.start(0, &copy);
        self.begun.fetch_add(1, Ordering::SeqCst);
        let vanished = gseg
            .wait(0)?
            .no_memory()
            .with_context(|| format!("copy of page {first}"))?;
        let high: Vec<_> = pages
            .clone()
            .map(|p| self.pages[p].started.load(Ordering::SeqCst))
            .collect();
        if vanished {
            ensure!(
                self.rules.vanish,
                "pages {first}+{run} were always there, and the GRU did not find them"
            );
            ensure!(
                low.iter().zip(&high).any(|(low, high)| low < high),
                "pages {first}+{run} did not change, and the GRU did not find them"
            );
            seen.vanished += 1;
            return Ok(());
        }
        for (i, page) in pages.enumerate() {
            let words = into.words(i * PAGE, PAGE);
            for (at, &word) in words.iter().enumerate() {
                let (generation, mark) = (word >> 16, word & 0xffff);
                let may_be = generation >= low[i] && generation <= high[i] && mark == self.word(page, 0);
                ensure!(
                    may_be || word == 0 && low[i] < high[i],
                    "STALE: word {at} of page {page} is {word:#x} (generation {generation}), where generations {} to {} \
                     may be",
                    low[i],
                    high[i]
                );
            }
        }
        seen.copies += 1;
        Ok(())
    }
}
