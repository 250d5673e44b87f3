//! The dedicated test of the kill bit: a translation is looked up by the driver, and before the device enters it
//! the page changes. To be run on a device that holds translations back (`tlbridge device --delay kill-bit`: 0
//! stale; `--break kill-bit`: this test must fail).
//!
//! Old pages stay where they are (both are pages of a file), so that a stale access is seen for sure: a load
//! finds the old page's word, and a store changes it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protos::gru::cb::{Instruction, Status, XType};

use crate::Outcome;
use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::memory::{PAGE, PagePair};

const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    for_both_misses(
        gru,
        rounds,
        "stale accesses",
        "with a translation on its way",
        one,
    )
}

/// Rounds of a test that opens a window and looks whether something slipped through, in contexts of both kinds.
/// `one` returns what did, and counts the `opened` windows that it saw.
pub fn for_both_misses(
    gru: &Gru,
    rounds: u64,
    violations: &str,
    opened_how: &str,
    one: impl Fn(&Gseg<'_>, u64, &mut u64) -> Result<Option<String>>,
) -> Outcome {
    let mut found = Vec::new();
    let mut opened = 0;
    for misses in Misses::BOTH {
        let gseg = gru.context(Shape {
            misses,
            ..Shape::default()
        })?;
        for round in 0..rounds {
            match one(&gseg, round, &mut opened).with_context(|| format!("{misses:?}, round {round}"))? {
                None => {}
                Some(what) => found.push(format!("{misses:?}, round {round}: {what}")),
            }
        }
    }
    ensure!(
        found.is_empty(),
        "{} {violations} in {} rounds, first {}",
        found.len(),
        2 * rounds,
        found[0]
    );
    Ok(format!(
        "0 {violations} in {} rounds, {opened} {opened_how}",
        2 * rounds
    ))
}

fn one(gseg: &Gseg<'_>, round: u64, opened: &mut u64) -> Result<Option<String>> {
    let pages = PagePair::new()?;
    let (old, new) = (2 * round + 1, 2 * round + 2);
    pages.fixed.fill(0, PAGE, old);
    pages.fixed.fill(PAGE, PAGE, new);
    let at = pages.window.va(0);

    // A miss, and the driver's answer to it.
    let before = gseg.statistics()?.dropins;
    gseg.start(0, &Instruction::vload(at, 0, XType::DWORD, 1, 1));
    let begin = Instant::now();
    loop {
        match gseg.control(0).istatus() {
            Status::ACTIVE => {}
            Status::CALL_OS => {
                // The answer is on its way when the call returns.
                let _ = gseg.call_os(0);
            }
            _ => break,
        }
        if gseg.statistics()?.dropins > before {
            *opened += u64::from(gseg.control(0).istatus() == Status::ACTIVE);
            break;
        }
        if begin.elapsed() > PATIENCE {
            bail!("no miss and no end: {:?}", gseg.control(0));
        }
    }
    // The page changes. When this has returned, its old contents may not be had through the window.
    pages.window.remap_file(0, PAGE, &pages.file, PAGE)?;
    gseg.wait(0)?.done().context("the load that missed")?;

    // Whatever the first load got, it began before the change. The second one did not.
    gseg.run(0, &Instruction::vload(at, 8, XType::DWORD, 1, 1))?
        .done()
        .context("the load after the change")?;
    let got = gseg.read_ds(8, 1)[0];
    if got != new {
        return Ok(Some(format!(
            "loaded {got}, not {new} (the page before had {old})"
        )));
    }
    gseg.run(0, &Instruction::vset(at, 1 << 40, XType::DWORD, 1, 1))?
        .done()
        .context("the store after the change")?;
    if pages.fixed.load(0) != old {
        return Ok(Some("a store went to the page before".into()));
    }
    ensure!(
        pages.fixed.load(PAGE) == 1 << 40,
        "a store went neither to the page before nor to the present one"
    );
    Ok(None)
}
