//! `tlbridge bench rdma`: what the transport and the fabric inside a process add to copying the bytes.
//!
//! No guest and no driver: queue pairs with a flat memory, on one thread that is both ends, or on two threads. The
//! floor copies the same bytes between the same buffers on the same thread, in the same blocks.

mod owner;
mod report;
mod rig;

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::placement::{Unpin, pin};
use super::statistics::{Block, paired};
use crate::allocations;
use crate::cli::RdmaArgs;
use device::transport::Config;
use owner::Kind;
use report::{RateRow, RdmaResult, Row};
use rig::Rig;

/// Payload of the bandwidth rows.
const LARGE: u32 = 64 << 10;
/// Payload of the rate rows.
const SMALL: u32 = 8;
/// Queue pairs of the rate rows.
const QUEUE_PAIRS: [u32; 4] = [1, 10, 100, 1000];

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Amount {
    blocks: usize,
    /// Messages of 64 KiB at a time.
    large: u32,
    /// Small messages at a time.
    small: u32,
    config: Config,
}

/// Measures and prints the table.
///
/// # Errors
/// The transport fails.
pub fn run(args: &RdmaArgs, out: &mut impl Write) -> Result<()> {
    let mut config = Config::default();
    if let Some(kib) = args.segment {
        config.segment = kib << 10;
        config.send_budget = kib << 10;
    }
    let amount = if args.measuring.quick {
        Amount {
            blocks: 8,
            large: 256,
            small: 20_000,
            config,
        }
    } else {
        Amount {
            blocks: 40,
            large: 1024,
            small: 100_000,
            config,
        }
    };
    let start = Instant::now();
    let cache = last_level_cache();
    // Source and destination together at least four times the cache.
    let half = (2 * cache).max(64 << 20).next_multiple_of(LARGE as usize);
    let mut result = RdmaResult::new(args.measuring.quick, args.measuring.seed, cache, 2 * half);
    let unpin = Unpin::later()?;
    let mut cpus = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| unpin.allowed().is_set(*cpu));
    let here = cpus.next().context("this thread may run nowhere")?;
    let there = cpus.next();
    pin(here)?;
    for kind in [Kind::Write, Kind::Read, Kind::Send] {
        let mut rig = Rig::looped(1, half, amount.config)?;
        let row = bandwidth(&mut rig, kind, 1, 1, amount, args.measuring.seed)?;
        result.push(row);
    }
    for kind in [Kind::Write, Kind::Read, Kind::Send, Kind::Atomic] {
        rates(kind, amount, args.measuring.seed, &mut result)?;
    }
    match there {
        Some(there) => two_threads(there, half, amount, args.measuring.seed, &mut result)?,
        None => result.absent("two threads need two processors, this process may use one"),
    }
    drop(unpin);
    result.elapsed_ms = start.elapsed().as_millis() as u64;
    super::print(
        args.measuring.json.as_deref(),
        &result.json(),
        || result.table(),
        out,
    )
}

/// Bytes of the largest cache of the first processor; 32 MiB where the system does not tell.
fn last_level_cache() -> usize {
    let size = |index: u32| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (0..8).filter_map(size).max().map_or(32 << 20, |kib| kib << 10)
}

fn floor(rig: &mut Rig, count: u32) -> u64 {
    let start = Instant::now();
    for _ in 0..count {
        rig.owner.copy(LARGE as usize);
    }
    start.elapsed().as_nanos() as u64
}

fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos() as u64
}

fn bandwidth(
    rig: &mut Rig,
    kind: Kind,
    queue_pairs: u32,
    workers: u32,
    amount: Amount,
    seed: u64,
) -> Result<Row> {
    let count = amount.large;
    // Buffers are made, pages touched, queues grown.
    floor(rig, count);
    rig.run(kind, LARGE, 2 * count)?;
    let mut blocks = Vec::with_capacity(amount.blocks);
    let before = allocations::of_this_thread();
    for _ in 0..amount.blocks {
        let first = floor(rig, count);
        let subject = [
            nanoseconds(rig.run(kind, LARGE, count)?),
            nanoseconds(rig.run(kind, LARGE, count)?),
        ];
        blocks.push(Block {
            floor: [first, floor(rig, count)],
            subject,
        });
    }
    let messages = 2 * u64::from(count) * amount.blocks as u64;
    let allocated = allocations::of_this_thread() - before;
    let paired = paired(&blocks, seed);
    let bytes = f64::from(count) * f64::from(LARGE);
    Ok(Row {
        kind,
        message_bytes: LARGE,
        queue_pairs,
        workers,
        bytes_per_second: bytes / (paired.p50_ns as f64 / 1e9),
        memcpy_bytes_per_second: bytes / (paired.floor_p50_ns as f64 / 1e9),
        allocations_per_message: allocated as f64 / messages as f64,
        paired,
    })
}

/// Small messages over more and more queue pairs, against one queue pair in the same blocks.
fn rates(kind: Kind, amount: Amount, seed: u64, result: &mut RdmaResult) -> Result<()> {
    let half = 4 << 20;
    let count = amount.small;
    let mut one = Rig::looped(1, half, amount.config)?;
    one.run(kind, SMALL, count)?;
    for queue_pairs in QUEUE_PAIRS {
        let mut many = Rig::looped(queue_pairs, half, amount.config)?;
        many.run(kind, SMALL, 2 * count)?;
        let mut blocks = Vec::with_capacity(amount.blocks);
        let before = allocations::of_this_thread();
        for _ in 0..amount.blocks {
            let first = nanoseconds(one.run(kind, SMALL, count)?);
            let subject = [
                nanoseconds(many.run(kind, SMALL, count)?),
                nanoseconds(many.run(kind, SMALL, count)?),
            ];
            blocks.push(Block {
                floor: [first, nanoseconds(one.run(kind, SMALL, count)?)],
                subject,
            });
        }
        let allocated = allocations::of_this_thread() - before;
        let paired = paired(&blocks, seed);
        result.push_rate(RateRow {
            kind,
            message_bytes: SMALL,
            queue_pairs,
            ns_per_message: paired.p50_ns as f64 / f64::from(count),
            messages_per_second: f64::from(count) / (paired.p50_ns as f64 / 1e9),
            allocations_per_message: allocated as f64 / (4.0 * f64::from(count) * amount.blocks as f64),
            paired,
        });
    }
    Ok(())
}

/// The responder on a processor of its own.
fn two_threads(there: usize, half: usize, amount: Amount, seed: u64, result: &mut RdmaResult) -> Result<()> {
    let (mut here, mut other) = Rig::two(1, half, amount.config)?;
    let (stop, len) = (AtomicBool::new(false), AtomicU32::new(LARGE));
    std::thread::scope(|scope| -> Result<()> {
        let thread = scope.spawn(|| -> Result<()> {
            pin(there)?;
            other.serve(&len, &stop);
            Ok(())
        });
        let measured = [Kind::Write, Kind::Read, Kind::Send]
            .into_iter()
            .try_for_each(|kind| {
                let row = bandwidth(&mut here, kind, 1, 2, amount, seed)?;
                result.push(row);
                Ok(())
            });
        stop.store(true, Ordering::Relaxed);
        thread.join().expect("the other thread panicked")?;
        measured
    })
}
