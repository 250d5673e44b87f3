//! The dedicated test of the drain: a store is under way when its page is taken away, and lands after the call has
//! returned. To be run on a device that keeps engines inside their accesses (`--faults=drain-delay=1`: nothing may be
//! found; with `early-completion=1` or `--break drain` this test must fail).
//!
//! The old page stays where it is (a page of a file), so that a late store is seen for sure.

use anyhow::{Context, Result};
use protos::gru::cb::{Instruction, Status, XType};

use crate::Outcome;
use crate::driver::{Gru, Gseg};
use crate::memory::{PAGE, PagePair};
use crate::stale::for_both_misses;

/// What the old page holds when the call has returned.
const POISON: u64 = 0x5a5a_5a5a_5a5a_5a5a;

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    let opened = "with a store under way when the call returned";
    for_both_misses(gru, rounds, "late stores", opened, one)
}

fn one(gseg: &Gseg<'_>, round: u64, opened: &mut u64) -> Result<Option<String>> {
    let pages = PagePair::new()?;
    pages.fixed.fill(0, 2 * PAGE, 1);
    let at = pages.window.va(0);
    let words = PAGE as u64 / 8;
    let store = |value| Instruction::vset(at, value, XType::DWORD, words, 1);
    // The translation is there, for stores.
    gseg.run(0, &store(2))?.done().context("the first store")?;

    gseg.start(0, &store(round + 3));
    pages.window.remap_file(0, PAGE, &pages.file, PAGE)?;
    // The old page belongs to nobody but this program now.
    pages.fixed.fill(0, PAGE, POISON);
    *opened += u64::from(gseg.control(0).istatus() == Status::ACTIVE);
    gseg.wait(0)?.done().context("the store under way")?;
    let changed = pages
        .fixed
        .words(0, PAGE)
        .into_iter()
        .find(|&word| word != POISON);
    Ok(changed.map(|word| format!("the page before has changed to {word:#x} after the call")))
}
