//! The command-line tool: parses, calls, prints.
//!
//! Exit codes: 0 fine, 1 error, 2 wrong usage, 3 a stale access was found, 4 a
//! device's sanitizer has found something; `vm` has its own.

mod allocations;
mod bench;
mod cli;
mod conformance;
mod demo;
mod device;
mod gru_options;
mod host;
mod inspect;
mod inspectable;
mod latency;
mod sanitizer;
mod stop;
mod supervise;
mod vm;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use cli::{BenchCommand, Cli, Command};
use demo::Verdict;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tlbridge: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let mut out = std::io::stdout();
    match cli.command {
        None => demo::run(&cli.demo, &mut out).map(exit_code),
        Some(Command::Demo(args)) => demo::run(&args, &mut out).map(exit_code),
        Some(Command::Device(args)) => device::run(&args, &mut out),
        Some(Command::Host(args)) => host::run(&args).map(done),
        Some(Command::Bench(BenchCommand::Mmio(args))) => bench::mmio::run(&args, &mut out).map(done),
        Some(Command::Bench(BenchCommand::Rdma(args))) => bench::rdma::run(&args, &mut out).map(done),
        Some(Command::Bench(BenchCommand::Doorbell(args))) => bench::doorbell::run(&args, &mut out).map(done),
        Some(Command::BenchHog(args)) => bench::hog::run(&args).map(done),
        #[cfg(feature = "verbs")]
        Some(Command::Bench(BenchCommand::Register(args))) => bench::register::run(&args, &mut out).map(done),
        Some(Command::BenchWake(args)) => bench::wake::run(&args).map(done),
        Some(Command::BenchEcho(args)) => bench::mmio::echo::run(&args).map(done),
        Some(Command::Conformance(args)) => conformance::run(&args, &mut out).map(|good| match good {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(1),
        }),
        Some(Command::Bench(BenchCommand::Invalidate(args))) if args.guest => {
            bench::guest::run(&args, &mut out).map(done)
        }
        Some(Command::Bench(BenchCommand::Invalidate(args))) => bench::invalidate(&args, &mut out).map(done),
        Some(Command::Inspect(args)) => inspect::run(&args, &mut out).map(done),
        Some(Command::Vm(args)) => vm::run(&args),
        Some(Command::Application(args)) => demo::application::run(&args).map(done),
        Some(Command::Peer(args)) => demo::peer::run(&args).map(done),
        Some(Command::BenchSubject(args)) => bench::subject::run(&args).map(done),
    }
}

fn done(_: ()) -> ExitCode {
    ExitCode::SUCCESS
}

fn exit_code(verdict: Verdict) -> ExitCode {
    ExitCode::from(match verdict {
        Verdict::Right => 0,
        Verdict::Wrong => 1,
        Verdict::Stale => 3,
        Verdict::Defective => sanitizer::EXIT_CODE,
    })
}
