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
use crate::memory::{PAGE, Region, memory_file};

const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    let mut stale = Vec::new();
    let mut opened = 0;
    for misses in Misses::BOTH {
        let gseg = gru.context(Shape {
            misses,
            ..Shape::default()
        })?;
        for round in 0..rounds {
            match one(&gseg, round, &mut opened).with_context(|| format!("{misses:?}, round {round}"))? {
                None => {}
                Some(what) => stale.push(format!("{misses:?}, round {round}: {what}")),
            }
        }
    }
    ensure!(
        stale.is_empty(),
        "{} stale accesses in {} rounds, first {}",
        stale.len(),
        2 * rounds,
        stale[0]
    );
    Ok(format!(
        "0 stale accesses in {} rounds, {opened} with a translation on its way",
        2 * rounds
    ))
}

/// Two pages of a file, seen at a fixed place and, one after the other, through a window.
pub struct Pages {
    /// The file.
    pub file: std::os::fd::OwnedFd,
    /// Both.
    pub fixed: Region,
    /// At first the first.
    pub window: Region,
}

impl Pages {
    /// New ones.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> Result<Self> {
        let file = memory_file(2 * PAGE)?;
        let fixed = Region::shared(&file, 2 * PAGE)?;
        let window = Region::shared(&file, PAGE)?;
        Ok(Self { file, fixed, window })
    }
}

fn one(gseg: &Gseg<'_>, round: u64, opened: &mut u64) -> Result<Option<String>> {
    let pages = Pages::new()?;
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
