//! `gru-guest`: programs that run in a guest on the kernel's own GRU driver, through `/dev/gru`, with the GRU of
//! tlbridge behind it. Each test prints one line that begins with `verdict:`, and the exit code is 0 if it has
//! passed.
//!
//! Not here: what needs the device's side (delays, counters): the host starts the device and compares.

mod driver;
mod faults;
mod found;
mod instructions;
mod invalidate;
mod issue;
mod ktest;
mod memory;
mod numbers;
mod queue;
mod reload;
mod stale;
mod statistics;
mod steal;
mod storms;
mod unload;
mod unplug;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::driver::{Gru, Misses};

/// Tests of the GRU through the kernel's driver.
#[derive(Debug, Parser)]
#[command(name = "gru-guest")]
struct Cli {
    /// How much of it: each test has its own meaning of a round.
    #[arg(long, global = true)]
    rounds: Option<u64>,
    /// Begins the sequence of random choices.
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    #[command(subcommand)]
    test: Test,
}

#[derive(Debug, Subcommand)]
enum Test {
    /// The driver's own tests 0 to 3 and 99, on every processor.
    Ktest,
    /// Every instruction, with verified data.
    Instructions {
        /// How misses are served (default: both ways, one after the other).
        #[arg(long)]
        misses: Option<Misses>,
    },
    /// Misses of loads and stores, served in both ways, and addresses where nothing is.
    Faults,
    /// Instructions on memory that is torn away.
    Storm {
        /// What tears.
        kind: storms::Kind,
    },
    /// More contexts than the device has.
    Steal,
    /// One process's share of `steal`.
    #[command(hide = true)]
    StealPart,
    /// Contexts are unloaded under their users.
    Unload,
    /// Translations that arrive after the invalidation of their page.
    StaleDropin,
    /// Times of invalidations, for `tlbridge bench invalidate --guest`.
    Invalidate,
    /// A process without a device, for `invalidate`.
    #[command(hide = true)]
    InvalidateFloor,
    /// The driver is unloaded and loaded again under programs that use it. Needs root.
    Reload {
        /// Where tlbridge_uv.ko and gru.ko are.
        #[arg(long, default_value = "/lab/modules")]
        modules: PathBuf,
    },
    /// Prints the driver's counters.
    Statistics,
    /// Takes the device away from open contexts. Needs root; nothing works afterwards until gru.ko is loaded anew.
    Unplug,
    /// What is wrong in the driver itself: docs/found.md. Some of these end the guest.
    Found {
        /// Which.
        fault: found::Fault,
    },
}

impl Test {
    fn name(&self) -> String {
        let debug = match self {
            Self::Storm { kind } => return format!("storm {kind:?}").to_lowercase(),
            Self::Found { fault } => return format!("found {fault:?}").to_lowercase(),
            other => format!("{other:?}"),
        };
        let word = debug.split_whitespace().next().unwrap_or_default();
        word.to_lowercase()
    }
}

/// What a test has to say when it has passed.
type Outcome = Result<String>;

fn run(cli: &Cli) -> Outcome {
    let (rounds, seed) = (|default| cli.rounds.unwrap_or(default), cli.seed);
    if let Test::Reload { modules } = &cli.test {
        // Not while this program has the device.
        return reload::run(modules, rounds(10));
    }
    if let Test::InvalidateFloor = &cli.test {
        return invalidate::floor().map(|()| "ended with its input".into());
    }
    statistics::switch_on()?;
    let gru = Gru::open()?;
    match &cli.test {
        Test::Ktest => ktest::run(&gru, rounds(20)),
        Test::Instructions { misses } => {
            let ways = misses.map_or(Misses::BOTH.to_vec(), |one| vec![one]);
            instructions::run(&gru, &ways, rounds(1), seed)
        }
        Test::Faults => faults::run(&gru, rounds(100)),
        Test::Storm { kind } => storms::run(&gru, *kind, rounds(200), seed),
        Test::Steal => steal::run(rounds(3)),
        Test::StealPart => steal::part(&gru, rounds(3)),
        Test::Unload => unload::run(&gru, rounds(100), seed),
        Test::StaleDropin => stale::run(&gru, rounds(150)),
        Test::Invalidate => invalidate::run(&gru, rounds(100)),
        Test::Reload { .. } | Test::InvalidateFloor => unreachable!("run above"),
        Test::Statistics => statistics::print(),
        Test::Unplug => unplug::run(&gru),
        Test::Found { fault } => found::run(&gru, *fault, rounds(1000)),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let begin = Instant::now();
    let result = run(&cli);
    let seconds = begin.elapsed().as_secs_f64();
    let name = cli.test.name();
    match result {
        Ok(said) => {
            println!("verdict: {name} PASS in {seconds:.1} s: {said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("verdict: {name} FAIL in {seconds:.1} s: {error:#}");
            ExitCode::FAILURE
        }
    }
}
