//! Contexts are unloaded, and so saved and loaded again, while their instructions run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};

use crate::Outcome;
use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::memory::{PAGE, Region};
use crate::numbers::Numbers;

const PAGES: usize = 8;
const LINES: u64 = (PAGES * PAGE / 64) as u64;

pub fn run(gru: &Gru, rounds: u64, seed: u64) -> Outcome {
    // The driver saves no kernel context, but unload_all would have it try.
    gru.ktest(99).context("unloading the kernel's contexts")?;
    let mut copies = 0;
    for misses in Misses::BOTH {
        let gseg = gru.context(Shape {
            misses,
            preload: 4,
            ..Shape::default()
        })?;
        let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
        copies += std::thread::scope(|scope| -> Result<u64> {
            let work = scope.spawn(|| {
                let result = copy(&gseg, &stop, &made);
                stop.store(true, Ordering::Release);
                result
            });
            let mut numbers = Numbers::new(seed);
            let mut done = 0;
            while done < rounds && !stop.load(Ordering::Acquire) {
                match numbers.below(4) {
                    0 => gru.unload_all().context("unloading every context")?,
                    _ => gseg.unload().context("GRU_USER_UNLOAD_CONTEXT")?,
                }
                // Somewhere in the middle of an instruction.
                for _ in 0..numbers.below(2000) {
                    std::hint::spin_loop();
                }
                done += 1;
                // A copy may be unloaded several times, but it must come to its end.
                let before = made.load(Ordering::Acquire);
                while done % 4 == 0 && made.load(Ordering::Acquire) == before && !stop.load(Ordering::Acquire)
                {
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Release);
            work.join().expect("no panic")
        })
        .with_context(|| format!("{misses:?}"))?;
    }
    ensure!(copies > 0, "not one copy was made: the test says nothing");
    let loaded = crate::statistics::counter("load_user_context")?;
    Ok(format!(
        "{copies} verified copies, contexts loaded {loaded} times so far"
    ))
}

/// Copies back and forth until told to stop, and at least once.
fn copy(gseg: &Gseg<'_>, stop: &AtomicBool, made: &AtomicU64) -> Result<u64> {
    let (from, to) = (Region::anonymous(PAGES * PAGE)?, Region::anonymous(PAGES * PAGE)?);
    // The upper part of the data segment is not used by the copies and must survive every unload.
    let kept: Vec<u64> = (0..64).map(|i| i * 0x1_0001 + 5).collect();
    gseg.write_ds(2048, &kept);
    let mut copies = 0;
    loop {
        for page in 0..PAGES {
            from.fill(page * PAGE, PAGE, copies << 8 | page as u64 | 1 << 60);
        }
        let instruction = Instruction::bcopy(from.va(0), to.va(0), 0, 16, XType::CACHE_LINE, LINES);
        gseg.run((copies % 2) as u32, &instruction)?
            .done()
            .with_context(|| format!("copy {copies}"))?;
        for page in 0..PAGES {
            let want = copies << 8 | page as u64 | 1 << 60;
            let wrong = to
                .words(page * PAGE, PAGE)
                .into_iter()
                .position(|word| word != want);
            ensure!(
                wrong.is_none(),
                "copy {copies}: page {page} is wrong from word {wrong:?} on"
            );
        }
        ensure!(
            gseg.read_ds(2048, 64) == kept,
            "the data segment has changed over an unload"
        );
        copies += 1;
        made.store(copies, Ordering::Release);
        if stop.load(Ordering::Acquire) {
            return Ok(copies);
        }
    }
}
