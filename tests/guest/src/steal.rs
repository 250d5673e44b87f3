//! More contexts than the device has: the driver takes them from each other.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};

use crate::Outcome;
use crate::driver::{Gru, Misses, Shape};
use crate::memory::{PAGE, Region};
use crate::statistics::counter;

/// 32 are there.
const CONTEXTS: usize = 40;
const PROCESSES: usize = 2;

pub fn run(rounds: u64) -> Outcome {
    let before = counter("steal_user_context")?;
    let program = std::env::current_exe().context("this program")?;
    let children: Vec<_> = (0..PROCESSES)
        .map(|_| {
            Command::new(&program)
                .args(["steal-part", "--rounds", &rounds.to_string()])
                .spawn()
                .context("starting a part")
        })
        .collect::<Result<_>>()?;
    for mut child in children {
        let status = child.wait().context("a part")?;
        ensure!(status.success(), "a part has failed: {status}");
    }
    let stolen = counter("steal_user_context")? - before;
    ensure!(stolen > 0, "no context was stolen: the test says nothing");
    Ok(format!(
        "{CONTEXTS} contexts in {PROCESSES} processes, {rounds} rounds each, stolen {stolen} times"
    ))
}

pub fn part(gru: &Gru, rounds: u64) -> Outcome {
    let count = CONTEXTS / PROCESSES;
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..count)
            .map(|number| scope.spawn(move || one(gru, number, rounds).with_context(|| format!("context {number}"))))
            .collect();
        for thread in threads {
            thread.join().expect("no panic")?;
        }
        Ok(())
    })?;
    Ok(format!("{count} contexts"))
}

/// Its data segment, control block and memory must survive whatever happens to it.
fn one(gru: &Gru, number: usize, rounds: u64) -> Result<()> {
    let misses = Misses::BOTH[number % 2];
    let gseg = gru.context(Shape {
        ds: 1024,
        misses,
        ..Shape::default()
    })?;
    let region = Region::anonymous(2 * PAGE)?;
    let pattern = |round: u64| -> Vec<u64> { (0..64).map(|i| (number as u64) << 32 | round << 8 | i).collect() };
    gseg.write_ds(0, &pattern(0));
    for round in 0..rounds {
        let want = pattern(round);
        ensure!(gseg.read_ds(0, 64) == want, "round {round}: the data segment is another one");
        let at = region.va(PAGE - 256);
        gseg.run(0, &Instruction::vstore(at, 0, XType::DWORD, 64, 1))?.done()?;
        ensure!(region.words(PAGE - 256, 512) == want, "round {round}: wrong data was stored");
        region.store(PAGE, !0);
        gseg.run(1, &Instruction::vload(at, 512, XType::DWORD, 64, 1))?.done()?;
        let mut changed = want;
        changed[32] = !0;
        ensure!(gseg.read_ds(512, 64) == changed, "round {round}: wrong data was loaded");
        gseg.write_ds(0, &pattern(round + 1));
    }
    Ok(())
}
