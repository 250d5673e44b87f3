//! More contexts than the device has: the driver takes them from each other.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use protos::gru::cb::{Instruction, XType};

use crate::Outcome;
use crate::driver::{Gru, Misses, Shape};
use crate::memory::{PAGE, Region};
use crate::statistics::counter;

/// 32 are there.
const CONTEXTS: usize = 40;
const PROCESSES: usize = 2;
/// What a part says when it has done its rounds.
const DONE: &str = "done\n";

pub fn run(rounds: u64) -> Outcome {
    let before = counter("steal_user_context")?;
    let program = std::env::current_exe().context("this program")?;
    let mut children: Vec<_> = (0..PROCESSES)
        .map(|_| {
            Command::new(&program)
                .args(["steal-part", "--rounds", &rounds.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("starting a part")
        })
        .collect::<Result<_>>()?;
    // Each says so when it has done its share, and goes on until all have: so all contexts exist at the same time.
    let mut outputs = Vec::new();
    for child in &mut children {
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        output.read_line(&mut line).context("a part says nothing")?;
        ensure!(line == DONE, "a part has failed: {line}");
        outputs.push(output);
    }
    for (mut child, mut output) in children.into_iter().zip(outputs) {
        drop(child.stdin.take());
        let mut rest = String::new();
        output.read_to_string(&mut rest).context("a part's verdict")?;
        let status = child.wait().context("a part")?;
        ensure!(status.success(), "a part has failed: {rest}");
    }
    let stolen = counter("steal_user_context")? - before;
    ensure!(stolen > 0, "no context was stolen: the test says nothing");
    Ok(format!(
        "{CONTEXTS} contexts in {PROCESSES} processes, {rounds} rounds each and more, stolen {stolen} times"
    ))
}

pub fn part(gru: &Gru, rounds: u64) -> Outcome {
    let count = CONTEXTS / PROCESSES;
    let (done, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let all = std::thread::scope(|scope| -> Result<u64> {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let (done, stop) = (&done, &stop);
                scope.spawn(move || {
                    let result =
                        one(gru, number, rounds, done, stop).with_context(|| format!("context {number}"));
                    if result.is_err() {
                        // Nobody has to wait for this one any more.
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                    result
                })
            })
            .collect();
        while done.load(Ordering::SeqCst) < count {
            std::thread::yield_now();
        }
        print!("{DONE}");
        std::io::stdout().flush().context("stdout")?;
        // Closed when the other parts are there, too.
        std::io::stdin().read_to_end(&mut Vec::new()).context("stdin")?;
        stop.store(true, Ordering::SeqCst);
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .sum()
    })?;
    Ok(format!("{count} contexts, {all} rounds"))
}

/// Its data segment, control block and memory must survive whatever happens to it.
fn one(gru: &Gru, number: usize, rounds: u64, done: &AtomicUsize, stop: &AtomicBool) -> Result<u64> {
    let misses = Misses::BOTH[number % 2];
    let gseg = gru.context(Shape {
        ds: 1024,
        misses,
        ..Shape::default()
    })?;
    let region = Region::anonymous(2 * PAGE)?;
    let pattern =
        |round: u64| -> Vec<u64> { (0..64).map(|i| (number as u64) << 32 | round << 8 | i).collect() };
    gseg.write_ds(0, &pattern(0));
    for round in 0u64.. {
        let want = pattern(round);
        ensure!(
            gseg.read_ds(0, 64) == want,
            "round {round}: the data segment is another one"
        );
        let at = region.va(PAGE - 256);
        gseg.run(0, &Instruction::vstore(at, 0, XType::DWORD, 64, 1))?
            .done()?;
        ensure!(
            region.words(PAGE - 256, 512) == want,
            "round {round}: wrong data was stored"
        );
        region.store(PAGE, !0);
        gseg.run(1, &Instruction::vload(at, 512, XType::DWORD, 64, 1))?
            .done()?;
        let mut changed = want;
        changed[32] = !0;
        ensure!(
            gseg.read_ds(512, 64) == changed,
            "round {round}: wrong data was loaded"
        );
        gseg.write_ds(0, &pattern(round + 1));
        if round + 1 == rounds {
            done.fetch_add(1, Ordering::SeqCst);
        }
        if round + 1 >= rounds && stop.load(Ordering::SeqCst) {
            return Ok(round + 1);
        }
    }
    unreachable!("rounds do not end")
}
