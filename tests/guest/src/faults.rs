//! Misses, one at a time: served in the interrupt, served at CALL_OS, and not served.

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};
use protos::gru::cbe::ecause;
use rustix::mm::MprotectFlags;

use crate::Outcome;
use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::issue::End;
use crate::memory::{PAGE, Region};

const PAGES: usize = 16;

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    let mut said = Vec::new();
    for misses in Misses::BOTH {
        let gseg = gru.context(Shape {
            misses,
            ..Shape::default()
        })?;
        served(&gseg, rounds).with_context(|| format!("{misses:?}"))?;
        not_served(&gseg).with_context(|| format!("{misses:?}, no such memory"))?;
        let counted = gseg.statistics()?;
        match misses {
            Misses::Interrupt => ensure!(counted.fmm > 0, "no miss came by interrupt: {counted:?}"),
            Misses::Poll => ensure!(
                counted.fmm == 0 && counted.upm > 0,
                "misses of a polling context came otherwise: {counted:?}"
            ),
        }
        said.push(format!(
            "{misses:?}: {} by interrupt, {} by call, {} entered",
            counted.fmm, counted.upm, counted.dropins
        ));
    }
    Ok(said.join("; "))
}

fn served(gseg: &Gseg<'_>, rounds: u64) -> Result<()> {
    let region = Region::anonymous(PAGES * PAGE)?;
    for round in 0..rounds {
        let page = (round as usize * 5) % PAGES;
        let (at, value) = (page * PAGE + 8 * (round as usize % 512), round << 8 | 1);
        match round % 4 {
            // A load of memory that the processor has written.
            0 => {
                region.store(at, value);
                load(gseg, region.va(at), value)?;
            }
            // A load of memory that nobody has touched: zero.
            1 => {
                region.advise(page * PAGE, PAGE, rustix::mm::Advice::LinuxDontNeed)?;
                load(gseg, region.va(at), 0)?;
            }
            // A store to memory that nobody has touched.
            2 => {
                region.advise(page * PAGE, PAGE, rustix::mm::Advice::LinuxDontNeed)?;
                set(gseg, region.va(at), value)?;
                ensure!(region.load(at) == value, "a store to new memory is not there");
            }
            // A store through an entry that was made for a load.
            _ => {
                gseg.flush(region.va(page * PAGE), PAGE)?;
                load(gseg, region.va(at), region.load(at))?;
                set(gseg, region.va(at), value)?;
                ensure!(region.load(at) == value, "a store after a load is not there");
            }
        }
    }
    Ok(())
}

fn not_served(gseg: &Gseg<'_>) -> Result<()> {
    let region = Region::anonymous(4 * PAGE)?;
    region.fill(0, 4 * PAGE, 7);
    region.unmap(PAGE, PAGE)?;
    expect_none(gseg.run(0, &Instruction::vload(region.va(PAGE), 0, XType::DWORD, 1, 1))?)?;
    region.remap_anonymous(PAGE, PAGE)?;
    load(gseg, region.va(PAGE), 0).context("mapped again")?;

    region.protect(0, PAGE, MprotectFlags::READ)?;
    load(gseg, region.va(0), 7).context("read-only memory")?;
    expect_none(gseg.run(0, &Instruction::vset(region.va(0), 8, XType::DWORD, 1, 1))?)?;
    ensure!(region.load(0) == 7, "a store has reached read-only memory");
    region.protect(0, PAGE, MprotectFlags::READ | MprotectFlags::WRITE)?;
    set(gseg, region.va(0), 8).context("writable again")?;
    ensure!(region.load(0) == 8, "the store after mprotect is not there");

    // Half of it is there: the copy stops at the page that is not.
    region.unmap(3 * PAGE, PAGE)?;
    let half = Instruction::vload(region.va(3 * PAGE - 8), 0, XType::DWORD, 2, 1);
    let detail = expect_none(gseg.run(0, &half)?)?;
    ensure!(
        detail.det0 as u64 == region.va(3 * PAGE),
        "the exception is at {:#x}, the memory ends at {:#x}",
        detail.det0,
        region.va(3 * PAGE)
    );
    region.remap_anonymous(3 * PAGE, PAGE)?;
    // The kernel's half of the address space.
    expect_none(gseg.run(
        0,
        &Instruction::vload(0xffff_8880_0000_0000, 0, XType::DWORD, 1, 1),
    )?)?;
    expect_none(gseg.run(0, &Instruction::vload(0x1000, 0, XType::DWORD, 1, 1))?)?;
    // A GSEG is no memory for a GRU.
    expect_none(gseg.run(0, &Instruction::vload(gseg.va(), 0, XType::DWORD, 1, 1))?)?;
    Ok(())
}

fn expect_none(end: End) -> Result<crate::driver::ExceptionDetail> {
    match end {
        End::Exception { detail, .. } if detail.ecause as u32 == ecause::OS_FATAL_TLB_FAULT => Ok(detail),
        other => anyhow::bail!("not the exception for missing memory: {other:?}"),
    }
}

/// Loads a word and compares.
fn load(gseg: &Gseg<'_>, va: u64, want: u64) -> Result<()> {
    gseg.run(0, &Instruction::vload(va, 0, XType::DWORD, 1, 1))?
        .done()
        .with_context(|| format!("load from {va:#x}"))?;
    let got = gseg.read_ds(0, 1)[0];
    ensure!(
        got == want,
        "{va:#x} holds {want:#x}, the GRU has loaded {got:#x}"
    );
    Ok(())
}

fn set(gseg: &Gseg<'_>, va: u64, value: u64) -> Result<()> {
    gseg.run(0, &Instruction::vset(va, value, XType::DWORD, 1, 1))?
        .done()
        .with_context(|| format!("store to {va:#x}"))?;
    Ok(())
}
