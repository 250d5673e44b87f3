//! What an invalidation costs its caller: munmap and MADV_DONTNEED of memory that the device has translated, against
//! the same calls of a process whose memory no device watches. Printed as lines for whoever has started this
//! (`tlbridge bench invalidate --guest`); times are nanoseconds.
//!
//! * `block CASE BYTES FLOOR SUBJECT SUBJECT FLOOR`: four calls, one after the other.
//! * `flushes CASE BYTES COUNT AVERAGE LONGEST`: what the driver itself says about tgh_invalidate in that case.
//! * `access WHAT P50 P99`: what an access to the device costs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use protos::gru::cb::{Instruction, XType};
use protos::gru::map;
use rustix::mm::Advice;

use crate::Outcome;
use crate::driver::{Gru, Gseg, Shape};
use crate::memory::{PAGE, Region};
use crate::statistics;

/// A kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Munmap,
    Madvise,
}

/// What is measured: name, call, whether the device has translated the memory, bytes.
const CASES: [(&str, Call, bool, usize); 4] = [
    ("munmap-nothing-cached", Call::Munmap, false, PAGE),
    ("munmap-live", Call::Munmap, true, PAGE),
    ("madvise-live", Call::Madvise, true, PAGE),
    ("munmap-live", Call::Munmap, true, 16 * PAGE),
];
/// Accesses of each kind that are timed.
const ACCESSES: usize = 400;
/// A part of a GSEG where nothing is: trapped in every mode, and without an effect.
const NOTHING: u64 = 0x3_0000;
const _: () = assert!(NOTHING >= map::GSEG_MAPPABLE && NOTHING < map::GSEG_BELL);

pub fn run(gru: &Gru, rounds: u64) -> Outcome {
    let gseg = gru.context(Shape::default())?;
    // Loaded.
    gseg.run(0, &Instruction::nop())?.done()?;
    accesses(&gseg)?;
    let mut floor = Floor::start()?;
    for (name, call, live, bytes) in CASES {
        let subject = || one(call, bytes, live.then_some(&gseg));
        // Whatever is done for the first time.
        floor.one(call, bytes)?;
        subject()?;
        statistics::forget_operations()?;
        for _ in 0..rounds {
            let first = floor.one(call, bytes)?;
            let pair = [subject()?, subject()?];
            let last = floor.one(call, bytes)?;
            println!("block {name} {bytes} {first} {} {} {last}", pair[0], pair[1]);
        }
        let flushes = statistics::operation("tgh_invalidate")?;
        ensure!(
            flushes.count >= 2 * rounds,
            "{name}: the driver has flushed {} times in {rounds} rounds",
            flushes.count
        );
        println!(
            "flushes {name} {bytes} {} {} {}",
            flushes.count, flushes.average, flushes.longest
        );
    }
    Ok(format!("{} cases, {rounds} rounds each", CASES.len()))
}

/// One call, after one like it that is not timed: whoever has waited meanwhile is cold.
fn one(call: Call, bytes: usize, live: Option<&Gseg<'_>>) -> Result<u64> {
    let mut time = 0;
    for _ in 0..2 {
        let region = Region::anonymous(bytes)?;
        for page in 0..bytes / PAGE {
            region.store(page * PAGE, 7);
        }
        if let Some(gseg) = live {
            // A word of each page.
            let stride = PAGE as u64 / 8;
            let load = Instruction::vload(region.va(0), 0, XType::DWORD, (bytes / PAGE) as u64, stride);
            gseg.run(0, &load)?.done()?;
        }
        let begin = Instant::now();
        match call {
            Call::Munmap => region.unmap(0, bytes)?,
            Call::Madvise => region.advise(0, bytes, Advice::LinuxDontNeed)?,
        }
        time = begin.elapsed().as_nanos() as u64;
        if call == Call::Munmap {
            // For its end.
            region.remap_anonymous(0, bytes)?;
        }
    }
    Ok(time)
}

/// A process of whose memory no device knows.
struct Floor {
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Floor {
    fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe().context("this program")?)
            .arg("invalidate-floor")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the floor")?;
        Ok(Self {
            questions: child.stdin.take(),
            answers: BufReader::new(child.stdout.take().context("piped")?),
            child,
        })
    }

    fn one(&mut self, call: Call, bytes: usize) -> Result<u64> {
        let questions = self.questions.as_mut().context("the floor has not ended")?;
        writeln!(questions, "{call:?} {bytes}").context("the floor is gone")?;
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the floor's answer")?;
        line.trim()
            .parse()
            .with_context(|| format!("the floor: {line:?}"))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        drop(self.questions.take());
        // It ends with its input.
        let _ = self.child.wait();
    }
}

/// The other process: a call and a length on each line, a time for each.
pub fn floor() -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("stdin")?;
        let (call, bytes) = line.split_once(' ').context("two words")?;
        let call = match call {
            "Munmap" => Call::Munmap,
            "Madvise" => Call::Madvise,
            _ => bail!("no call {call:?}"),
        };
        println!("{}", one(call, bytes.parse().context("a length")?, None)?);
    }
    Ok(())
}

fn accesses(gseg: &Gseg<'_>) -> Result<()> {
    let time = |what: &str, access: &dyn Fn() -> Result<()>| -> Result<()> {
        let mut times = Vec::with_capacity(ACCESSES);
        for _ in 0..ACCESSES {
            let begin = Instant::now();
            access()?;
            times.push(begin.elapsed().as_nanos() as u64);
        }
        times.sort_unstable();
        println!(
            "access {what} {} {}",
            times[ACCESSES / 2],
            times[ACCESSES * 99 / 100]
        );
        Ok(())
    };
    time("trapped-read", &|| {
        let _ = gseg.load(NOTHING);
        Ok(())
    })?;
    time("trapped-write", &|| {
        gseg.store(NOTHING, 1);
        Ok(())
    })?;
    time("control-block-read", &|| {
        let _ = gseg.load(gseg.cb(1));
        Ok(())
    })?;
    time("data-segment-write", &|| {
        gseg.write_ds(0, &[1]);
        Ok(())
    })?;
    let region = Region::anonymous(PAGE)?;
    region.store(0, 3);
    let load = Instruction::vload(region.va(0), 0, XType::DWORD, 1, 1);
    time("vload-hit", &|| {
        gseg.run(0, &load)?.done()?;
        Ok(())
    })
}
