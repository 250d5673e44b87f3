//! Fuzzing without instrumentation: mutated inputs from a seeded generator. What stands for coverage is
//! what the server answers: an input that brings a combination of command, errno and size that was not
//! seen before joins the corpus.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arbitrary::{Arbitrary, Unstructured};
use device::faults::BreakPlan;

use super::actions::Session;
use super::codec;
use super::gru::GruUnderTest;
use super::gru_actions::Sequence;
use super::live::{Live, Violation};
use super::mlx5::{self, Mlx5UnderTest};

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After that many inputs.
    Executions(u64),
    /// After that long.
    Elapsed(Duration),
}

/// A run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The same seed gives the same inputs (as long as the server gives the same answers).
    pub seed: u64,
    /// When to stop.
    pub until: Until,
    /// Directory of seeds; may be missing.
    pub corpus: PathBuf,
    /// Where inputs that found something go.
    pub artifacts: PathBuf,
    /// Print a line every minute.
    pub progress: bool,
}

/// What a run did.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// Inputs tried.
    pub executions: u64,
    /// How long.
    pub elapsed: Duration,
    /// Inputs in the corpus at the end, seeds included.
    pub corpus: usize,
    /// Different answers seen (command, errno, size in bits).
    pub answers: usize,
    /// Inputs that found something: where they are, and what.
    pub crashes: Vec<(PathBuf, String)>,
}

impl std::fmt::Display for Statistics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.elapsed.as_secs_f64();
        write!(
            f,
            "{} execs in {seconds:.0} s ({:.0}/s), corpus {}, answers {}, crashes {}",
            self.executions,
            self.executions as f64 / seconds.max(1e-9),
            self.corpus,
            self.answers,
            self.crashes.len()
        )
    }
}

/// Hostile sessions against a live server.
///
/// # Errors
/// When no server can be started at all.
pub fn sessions(run: &Run) -> Result<Statistics, Violation> {
    let mut live = Some(Live::start()?);
    let statistics = drive("actions", run, 2048, |input| {
        let Ok(session) = Session::arbitrary(&mut Unstructured::new(input)) else {
            return Ok(BTreeSet::new());
        };
        let server = match &mut live {
            Some(server) => server,
            none => none.insert(Live::start()?),
        };
        server.run(&session).map_err(|violation| {
            // What it left behind would be held against the next session.
            let end = live.take().expect("it has just been used").finish();
            match end {
                Ok(()) => violation,
                Err(end) => Violation(format!("{violation}; {end}")),
            }
        })
    });
    if let Some(live) = live {
        live.finish()?;
    }
    Ok(statistics)
}

/// Sequences of BAR accesses to a GRU.
///
/// # Errors
/// When no device can be started at all.
pub fn gru(run: &Run) -> Result<Statistics, Violation> {
    let mut device = Some(GruUnderTest::start(BreakPlan::default())?);
    Ok(drive("gru", run, 2048, |input| {
        let Ok(sequence) = Sequence::arbitrary(&mut Unstructured::new(input)) else {
            return Ok(BTreeSet::new());
        };
        let under_test = match &mut device {
            Some(device) => device,
            none => none.insert(GruUnderTest::start(BreakPlan::default())?),
        };
        let result = under_test.run(&sequence);
        if result.is_err() {
            device = None;
        }
        result
    }))
}

/// Sequences of commands, work requests and doorbells to an HCA.
///
/// # Errors
/// When no HCA can be started at all.
pub fn mlx5(run: &Run) -> Result<Statistics, Violation> {
    let mut device = Some(Mlx5UnderTest::start()?);
    Ok(drive("mlx5", run, 1024, |input| {
        let Ok(sequence) = mlx5::Sequence::arbitrary(&mut Unstructured::new(input)) else {
            return Ok(BTreeSet::new());
        };
        let under_test = match device.take() {
            Some(device) => device,
            None => Mlx5UnderTest::start()?,
        };
        let (under_test, seen) = under_test.run(&sequence)?;
        device = Some(under_test);
        Ok(seen)
    }))
}

/// Any bytes through the codecs.
#[must_use]
pub fn codecs(run: &Run) -> Statistics {
    drive("decoder", run, 512, |input| {
        catch_unwind(AssertUnwindSafe(|| codec::decode(input)))
            .map(|()| BTreeSet::new())
            .map_err(|panic| {
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                Violation(text.unwrap_or("a panic").to_owned())
            })
    })
}

fn drive(
    name: &str,
    run: &Run,
    max_len: usize,
    mut execute: impl FnMut(&[u8]) -> Result<BTreeSet<(u16, u32, u32)>, Violation>,
) -> Statistics {
    let begin = Instant::now();
    let mut statistics = Statistics::default();
    let mut corpus = seeds(&run.corpus);
    let mut answers = BTreeSet::new();
    let mut random = Random(run.seed);
    let mut printed = begin;
    let seed_count = corpus.len() as u64;
    loop {
        match run.until {
            Until::Executions(n) if statistics.executions >= n => break,
            Until::Elapsed(limit) if begin.elapsed() >= limit => break,
            _ => {}
        }
        let input = if statistics.executions < seed_count {
            corpus[statistics.executions as usize].clone()
        } else {
            random.input(&corpus, max_len)
        };
        match execute(&input) {
            Ok(seen) => {
                let before = answers.len();
                answers.extend(seen);
                if answers.len() > before && statistics.executions >= seed_count {
                    corpus.push(input);
                }
            }
            Err(violation) => {
                let path = keep(&run.artifacts, name, &input);
                println!("fuzz {name}: {violation}\n  input: {}", path.display());
                statistics.crashes.push((path, violation.0));
            }
        }
        statistics.executions += 1;
        (statistics.elapsed, statistics.corpus, statistics.answers) =
            (begin.elapsed(), corpus.len(), answers.len());
        if run.progress && printed.elapsed() >= Duration::from_secs(60) {
            printed = Instant::now();
            println!("fuzz {name}: {statistics}");
        }
    }
    if let Some(path) = std::env::var_os("TLBRIDGE_FUZZ_KEEP") {
        for input in &corpus[seed_count as usize..] {
            keep(Path::new(&path), name, input);
        }
    }
    statistics
}

fn seeds(directory: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    paths.sort();
    paths.iter().filter_map(|p| std::fs::read(p).ok()).collect()
}

/// Writes an input under a name made of its content.
fn keep(directory: &Path, name: &str, input: &[u8]) -> PathBuf {
    // FNV-1a: only a name.
    let hash = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    });
    let path = directory.join(format!("{name}-{hash:016x}"));
    if let Err(error) = std::fs::create_dir_all(directory).and_then(|()| std::fs::write(&path, input)) {
        println!("fuzz {name}: {} cannot be written: {error}", path.display());
    }
    path
}

/// splitmix64: one word of state, any seed is good.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn input(&mut self, corpus: &[Vec<u8>], max_len: usize) -> Vec<u8> {
        if corpus.is_empty() || self.below(5) == 0 {
            let len = self.below(max_len);
            return self.bytes(len);
        }
        let mut input = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(4) {
            self.mutate(&mut input, corpus);
        }
        input.truncate(max_len);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let len = self.below(16).min(input.len() - at);
        match self.below(7) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.next() as u8,
            2 => {
                let len = self.below(32);
                let new = self.bytes(len);
                input.splice(at..at, new);
            }
            3 => drop(input.drain(at..at + len)),
            4 => {
                let copy = input[at..at + len].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            5 => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let value = [0, 1, 16, 0x7f, 0x80, 0xff][self.below(6)];
                input[at..at + len].fill(value);
            }
        }
    }
}
