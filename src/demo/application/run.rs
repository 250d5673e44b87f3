//! The application process: attaches, starts its threads, reports.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use agent::{Agent, AttachOptions, ContextOptions, FaultMode};
use anyhow::{Context as _, Result, anyhow};
use serde_json::json;

use super::arena::Arena;
use super::context::{CONTROL_BLOCKS, Context};
use super::disturber::{Disturber, DisturberCounts, Habits};
use super::frames::{Frame, Frames, PAGE};
use super::mapping::{self, Mapper};
use super::oracles::Oracles;
use super::probe::PROBE_DS_BYTES;
use super::purgeable::{PURGEABLE_BYTES, Purgeable, PurgeableCounts};
use super::random::Random;
use super::report::{Report, calls_of};
use super::slots::{Hot, Slot, layout};
use super::worker::{Worker, WorkerCounts};
use crate::cli::ApplicationArgs;
use crate::stop::{self, Stop};
use crate::supervise::Leftovers;

/// How long a page that was left behind is watched. Longer than the delays of `--break`.
const QUARANTINE: Duration = Duration::from_millis(25);
/// Time between two progress lines.
const PROGRESS: Duration = Duration::from_millis(200);
/// Longest pause of a disturber between two calls.
const PAUSE_US: usize = 1600;

/// What the threads add to while they run.
#[derive(Debug, Default)]
struct Progress {
    operations: AtomicU64,
    verified_bytes: AtomicU64,
    calls: AtomicU64,
    ended: AtomicBool,
    error: Mutex<Option<anyhow::Error>>,
}

impl Progress {
    fn fail(&self, error: anyhow::Error) {
        self.ended.store(true, Ordering::SeqCst);
        self.error.lock().unwrap().get_or_insert(error);
    }
    fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// Runs the application.
///
/// # Errors
/// It cannot attach, or the device or the daemon goes away.
pub fn run(args: &ApplicationArgs) -> Result<()> {
    let stop = Stop::new()?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    stop.on_signals(true)?;
    // "end" ends the run early; the process stays until its stdin ends.
    let end = Stop::new()?;
    stop::obey(&stop, {
        let end = end.clone();
        move |_| {
            end.request();
            json!({})
        }
    })?;
    let options = AttachOptions {
        socket: args.socket.clone(),
        name: "demo".into(),
    };
    let agent = Agent::attach(&options)?;
    let report = compute(args, agent, [&stop, &end])?;
    stop::say(&json!({ "report": report }));
    // The supervisor reads the other processes' figures while this one is still attached.
    stop.wait_for(Duration::from_secs(60));
    agent.detach()?;
    Ok(())
}

fn compute(args: &ApplicationArgs, agent: &'static Agent, ends: [&Stop; 2]) -> Result<Report> {
    let bytes = args.memory_mib << 20;
    let memory = agent.memory(bytes, "tlbridge-demo")?;
    let alias = mapping::alias(&memory).context("cannot map the demo's memory")?;
    let pages = (bytes / PAGE) as usize;
    let slot_pages = pages * 11 / 20;
    // Alignment of the largest slots can cost as much again.
    let base = mapping::arena(4 * bytes, args.seed)?;
    let slots = layout(base, slot_pages);
    let arena_end = slots.last().map_or(base, |s| s.va + s.len());
    let arena = Arena {
        hot: Hot::new(args.threads as usize),
        frames: Frames::new(alias, QUARANTINE),
        oracles: Oracles::default(),
        slots,
    };
    let (slots, frames, oracles) = (&arena.slots, &arena.frames, &arena.oracles);
    for frame in stock(pages, slots) {
        frames.add(frame);
    }

    let purgeable = agent.memory(PURGEABLE_BYTES, "tlbridge-demo-purgeable")?;
    let purgeable_alias = mapping::alias(&purgeable).context("cannot map purgeable memory")?;
    let purgeable_va = arena_end.next_multiple_of(PURGEABLE_BYTES) + PURGEABLE_BYTES;
    let mapper = Mapper::new(agent, &memory);
    map_purgeable(agent, &purgeable, purgeable_va)?;

    let threads = args.threads as usize;
    let context = |ds_bytes| -> Result<Context> {
        let options = ContextOptions {
            cbs: CONTROL_BLOCKS,
            ds_bytes,
            fault_mode: FaultMode::Interrupt,
        };
        Ok(Context::new(agent.create_context(&options)?))
    };
    let mut contexts = Vec::new();
    for _ in 0..threads {
        contexts.push(context(ds_bytes(threads))?);
    }
    let habits = Habits {
        raw_every: args.raw_every as usize,
        announce_removal: args.announce_removal,
        probe_every: args.probe_every as usize,
        aim_every: args.aim_every as usize,
        fork: true,
    };
    let mut disturbers = (0..threads)
        .map(|n| {
            let mine = (0..slots.len()).filter(|i| i / 3 % threads == n).collect();
            let random = Random::new(args.seed, 1000 + n as u64);
            let context = context(PROBE_DS_BYTES)?;
            Ok(Disturber::new(&arena, mine, &mapper, context, habits, random))
        })
        .collect::<Result<Vec<_>>>()?;
    for disturber in &mut disturbers {
        disturber.populate().context("cannot map the demo's memory")?;
    }
    // The sleeping subscriber gets an eighth of the arena: some invalidations have to wait for it, most not.
    let shared = &slots[..slots.len().div_ceil(8)];
    let shared_end = shared.last().map_or(base, |s| s.va + s.len());
    stop::say(&json!({ "ready": {
        "pid": std::process::id(), "shared_start": base, "shared_end": shared_end,
    }}));

    let progress = Progress::default();
    let start = Instant::now();
    let mut workers = WorkerCounts::default();
    let mut purged = PurgeableCounts::default();
    let mut disturbed = DisturberCounts::default();
    std::thread::scope(|scope| -> Result<()> {
        let disturbing: Vec<_> = disturbers
            .into_iter()
            .enumerate()
            .map(|(n, disturber)| {
                let (progress, random) = (&progress, Random::new(args.seed, 2000 + n as u64));
                scope.spawn(move || disturb(disturber, random, progress))
            })
            .collect();
        let working: Vec<_> = contexts
            .into_iter()
            .enumerate()
            .map(|(n, context)| {
                let worker = Worker::new(&arena, (n, threads), context, args.seed);
                let area = (n == 0).then(|| {
                    Purgeable::new(
                        purgeable_va,
                        purgeable_alias,
                        oracles,
                        Random::new(args.seed, 3000),
                    )
                });
                let progress = &progress;
                scope.spawn(move || work(worker, area, progress))
            })
            .collect();
        watch(args, agent, ends, &progress, oracles, start);
        for thread in disturbing {
            disturbed.merge(&thread.join().map_err(|_| anyhow!("a disturber panicked"))?);
        }
        for thread in working {
            let (counts, area) = thread.join().map_err(|_| anyhow!("a worker panicked"))?;
            workers.merge(&counts);
            if let Some(area) = area {
                purged = area;
            }
        }
        Ok(())
    })?;
    let elapsed = start.elapsed();
    if let Some(error) = progress.error.lock().unwrap().take() {
        // Who is gone says more than what failed because of it.
        agent.alive()?;
        return Err(error);
    }
    // Late writes would have landed by now: the device has no work any more.
    frames.release_due(true, oracles);
    Ok(Report {
        elapsed_ms: elapsed.as_millis() as u64,
        workers,
        calls: calls_of(&disturbed),
        probes: disturbed.probes,
        forks: disturbed.forks,
        agent_call_voluntary_switches: disturbed.agent_call_switches,
        purgeable: purged,
        canary_pages_checked: frames.canaries_checked.load(Ordering::Relaxed),
        oracles: oracles.into(),
        agent: serde_json::to_value(agent.stats())?,
    })
}

fn map_purgeable(agent: &'static Agent, memory: &agent::Memory, va: u64) -> Result<()> {
    use super::calls::{Calls, Path};
    use super::slots::Prot;
    Mapper::new(agent, memory)
        .map_over(Path::Agent, va, PURGEABLE_BYTES, 0, Prot::ReadWrite)
        .context("cannot map purgeable memory")?;
    agent.set_purgeable(va as usize..(va + PURGEABLE_BYTES) as usize)?;
    Ok(())
}

/// Data segment of a worker: each chiplet has 32 KiB, of which the probes want 1 KiB a thread.
fn ds_bytes(threads: usize) -> u32 {
    (40 * 1024 / threads as u32 / 1024 * 1024).clamp(2048, 8192)
}

/// Frames for the memory: one for each slot, and about as many again that are free or in quarantine.
fn stock(pages: usize, slots: &[Slot]) -> Vec<Frame> {
    let mut sizes: Vec<usize> = slots.iter().map(|s| s.pages).collect();
    // Large ones first, so that each is aligned to its size in the file.
    sizes.sort_unstable_by_key(|s| std::cmp::Reverse(*s));
    let (mut frames, mut used) = (Vec::new(), 0);
    let needed: usize = sizes.iter().sum();
    let mut spare = pages - needed;
    for size in sizes {
        let copies = if size <= spare { 2 } else { 1 };
        if copies == 2 {
            spare -= size;
        }
        for _ in 0..copies {
            frames.push(Frame {
                first_page: used,
                pages: size,
            });
            used += size;
        }
    }
    assert!(used <= pages, "frames fit the memory");
    frames
}

/// Waits for the end of the run and reports on the way.
fn watch(
    args: &ApplicationArgs,
    agent: &Agent,
    [stop, end]: [&Stop; 2],
    progress: &Progress,
    oracles: &Oracles,
    start: Instant,
) {
    let deadline = start + Duration::from_secs(args.seconds);
    while !progress.ended() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || end.requested() || stop.wait_for(left.min(PROGRESS)) {
            break;
        }
        if let Err(gone) = agent.alive() {
            progress.fail(gone.into());
        }
        stop::say(&json!({ "progress": {
            "elapsed_ms": start.elapsed().as_millis() as u64,
            "operations": progress.operations.load(Ordering::Relaxed),
            "verified_bytes": progress.verified_bytes.load(Ordering::Relaxed),
            "invalidations": progress.calls.load(Ordering::Relaxed),
            "stale_accesses": oracles.stale_accesses(),
        }}));
    }
    progress.ended.store(true, Ordering::SeqCst);
}

fn work(
    mut worker: Worker<'_, Context>,
    mut area: Option<Purgeable<'_>>,
    progress: &Progress,
) -> (WorkerCounts, Option<PurgeableCounts>) {
    let mut seen = (0, 0);
    while !progress.ended() {
        let mut result = worker.step();
        if let Some(area) = &mut area
            && worker.counts.operations.is_multiple_of(16)
        {
            result = result.and_then(|()| area.step(worker.executor()));
        }
        if let Err(error) = result {
            progress.fail(error.into());
        }
        if worker.counts.operations - seen.0 >= 64 {
            let now = (worker.counts.operations, worker.counts.verified_bytes);
            progress.operations.fetch_add(now.0 - seen.0, Ordering::Relaxed);
            progress
                .verified_bytes
                .fetch_add(now.1 - seen.1, Ordering::Relaxed);
            seen = now;
        }
    }
    (worker.counts.clone(), area.map(|a| a.counts))
}

fn disturb(
    mut disturber: Disturber<'_, Mapper<'_>, Context>,
    mut random: Random,
    progress: &Progress,
) -> DisturberCounts {
    while !progress.ended() {
        if let Err(error) = disturber.step() {
            progress.fail(error);
        }
        progress.calls.fetch_add(1, Ordering::Relaxed);
        // Pace only: leaves the workers time for results that can be judged strictly.
        std::thread::sleep(Duration::from_micros(random.below(PAUSE_US) as u64));
    }
    std::mem::take(&mut disturber.counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_stock_when_memory_is_small_or_large_gives_each_slot_a_frame() {
        for mib in [16usize, 64, 256, 2048] {
            let pages = mib << 8;
            let slots = layout(0x1000_0000_0000, pages * 11 / 20);
            let frames = stock(pages, &slots);
            assert!(
                frames.len() > slots.len() * 5 / 4,
                "{mib} MiB: spare frames for the quarantine"
            );
            let mut end = 0;
            for frame in frames {
                assert!(frame.first_page >= end && frame.first_page.is_multiple_of(frame.pages));
                end = frame.first_page + frame.pages;
            }
            assert!(end <= pages);
        }
    }

    #[test]
    fn test_ds_bytes_when_all_workers_have_one_fits_two_chiplets() {
        for threads in 1..=16usize {
            let each = ds_bytes(threads) as usize;
            assert!(each.is_multiple_of(1024) && each >= 2048);
            assert!(
                threads.div_ceil(2) * each <= 32 * 1024,
                "{threads} threads of {each} bytes"
            );
        }
    }
}
