//! Tasks of the project. `cargo xtask --help` lists them.

mod lab;
mod layering;
mod provision;
mod run;
mod tiers;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of the tlbridge project")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that must pass before a change lands: format, layering, clippy, unit, model checking,
    /// in-process, sandbox.
    Test {
        /// Run only these steps (repeatable); the names are those that a run prints.
        #[arg(long = "only", value_name = "STEP")]
        only: Vec<String>,
        /// Go on after a failed step and fail at the end.
        #[arg(long)]
        keep_going: bool,
    },
    /// The long forms of the tests: hammer, fault injection, kill rounds and fuzzing.
    Soak {
        /// Minutes for the hammer test.
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// Minutes for the fuzz targets together; 0 leaves them out.
        #[arg(long, default_value_t = 30)]
        fuzz_minutes: u64,
    },
    /// Find or make what guests take, below target/lab: a QEMU with vfio-user-pci, a stock kernel, modules,
    /// RDMA programs.
    Lab {
        /// What not every guest takes, too: the backports' kernel, and the root image with rdma-core's own tests.
        #[arg(long)]
        all: bool,
    },
    /// Check the direction of the dependencies between the crates.
    Layering,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Test { only, keep_going } => tiers::test(&only, keep_going),
        Task::Soak {
            minutes,
            fuzz_minutes,
        } => tiers::soak(minutes, fuzz_minutes),
        Task::Lab { all } => lab::run(all),
        Task::Layering => layering::check().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
