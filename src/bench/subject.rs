//! The measured process: maps memory, lets the device use it, and measures munmap.
#![allow(unsafe_code, reason = "mmap and munmap, plain and by the agent")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent::{Agent, AttachOptions, ContextOptions, FaultMode, GruContext, Memory};
use anyhow::{Context, Result};
use protos::bridge::control::UffdMode;
use protos::gru::cb::{Instruction, XType};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cases::{Case, PLACED_SIZES, SIZES, blocks_of, wanted};
use super::hog::Hogs;
use super::monitor::Monitor;
use super::placement::Placement;
use super::statistics::{Block, Interval, Paired, bootstrap, paired, quantile};
use super::wake::WakeFloor;
use crate::cli::SubjectArgs;
use crate::demo::args;
use crate::latency::voluntary_switches;
use crate::stop::{self, Stop};
use crate::supervise::{Leftovers, START_LIMIT, Service};

/// Pages that get a live translation before each call: all of a small range, some of a large one.
const LIVE_PAGES: usize = 16;
/// After this long without work the device's engines are asleep (they spin for 0.2 ms at most).
const PARKED: Duration = Duration::from_millis(1);
const PAGE: usize = 4096;
/// Where the ranges are mapped: far below where the kernel puts anything by itself.
const ADDRESS: usize = 0x2000_0000_0000;

/// One row of the result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Registration mode.
    pub uffd_mode: UffdMode,
    /// What was measured.
    pub case: Case,
    /// Length of the range.
    pub size_bytes: u64,
    /// Where the processes ran.
    #[serde(default = "free")]
    pub placement: Placement,
    /// The figures.
    #[serde(flatten)]
    pub paired: Paired,
    /// For rows that wake somebody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wakes: Option<Wakes>,
    /// Voluntary context switches of the caller, per subject call.
    pub voluntary_context_switches_per_call: f64,
}

fn free() -> Placement {
    Placement::Free
}

/// What waking the daemon and a device that sleeps costs at least (see [`super::wake`]), and the row held against
/// it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Wakes {
    /// A socket echo, to the daemon's stand-in and back: two wakes.
    pub socket_echo_p50_ns: u64,
    /// One wake of the device's stand-in.
    pub wake_p50_ns: u64,
    /// 99th percentile of the sums of the two.
    pub floor_p99_ns: u64,
    /// The largest sum.
    pub floor_max_ns: u64,
    /// What the call takes more than the plain one, over the sum of the two; by blocks.
    pub ratio: Interval,
}

/// Measures all cases in one registration mode.
///
/// # Errors
/// It cannot attach, or a call fails.
pub fn run(args: &SubjectArgs) -> Result<()> {
    let stop = Stop::new()?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    stop.on_signals(true)?;
    stop::obey(&stop, |_| json!({}))?;
    let name = "bench".into();
    let agent = Agent::attach(&AttachOptions {
        socket: args.socket.clone(),
        name,
    })?;
    let stats = agent.daemon_stats()?;
    let stats: serde_json::Value = serde_json::from_str(&stats).context("the daemon's statistics")?;
    let mode: UffdMode = serde_json::from_value(stats["daemon"]["uffd_mode"].clone())
        .context("the daemon does not say its uffd_mode")?;
    let largest = SIZES
        .into_iter()
        .filter(|s| wanted(*s, Case::AgentSilent, args.quick))
        .max();
    let memory = agent.memory(largest.unwrap_or(PAGE) as u64, "tlbridge-bench")?;
    let subject = Subject {
        agent,
        memory: &memory,
        monitor: Monitor::start(mode).context("a userfaultfd for the monitor row")?,
        context: agent.create_context(&context_options())?,
        mode,
        args,
    };
    stop::say(&json!({ "ready": {} }));
    let asked = |case: &Case| args.cases.is_empty() || args.cases.contains(case);
    for case in Case::ALL.into_iter().filter(asked) {
        subject.measure_case(case, &stop)?;
    }
    stop::say(&json!({ "done": {} }));
    stop.wait_for(Duration::from_secs(60));
    drop(subject);
    agent.detach()?;
    Ok(())
}

fn context_options() -> ContextOptions {
    ContextOptions {
        cbs: 2,
        ds_bytes: 2048,
        fault_mode: FaultMode::Interrupt,
    }
}

struct Subject<'a> {
    agent: &'static Agent,
    memory: &'a Memory,
    monitor: Monitor,
    context: GruContext,
    mode: UffdMode,
    args: &'a SubjectArgs,
}

impl Subject<'_> {
    fn measure_case(&self, case: Case, stop: &Stop) -> Result<()> {
        let busy = (case == Case::AgentLiveBusy).then(|| self.busy()).transpose()?;
        let peer = (case == Case::AgentSleeping)
            .then(|| self.peer(stop))
            .transpose()?;
        let hogs = (case == Case::AgentLiveCrowded)
            .then(|| Hogs::start(stop))
            .transpose()?;
        let mut wake = case
            .parked()
            .then(|| {
                let dir = self.args.supervised.private_dir.as_deref();
                let dir = dir.context("the benchmark's own processes have a private directory")?;
                WakeFloor::start(dir, self.args.device_cpu, stop)
            })
            .transpose()?;
        let placed = self.args.device_cpu.is_some();
        for size in SIZES {
            if stop.requested() {
                break;
            }
            let short = self.args.most_bytes.is_none_or(|most| size <= most);
            let placed_size = !placed || PLACED_SIZES.contains(&size);
            if short && wanted(size, case, self.args.quick) && placed_size {
                let row = self.measure(case, size, wake.as_mut())?;
                stop::say(&json!({ "row": row }));
            }
        }
        drop((busy, peer, wake, hogs));
        Ok(())
    }

    fn measure(&self, case: Case, size: usize, mut wake: Option<&mut WakeFloor>) -> Result<Row> {
        let mut switches = 0;
        let mut blocks = Vec::new();
        let (mut echoes, mut wakes) = (Vec::new(), Vec::new());
        // The first block warms caches and allocators up.
        for i in 0..=blocks_of(size, self.args.quick) {
            let first = self.floor(size)?;
            let before = switches;
            let (one, s1) = self.subject(case, size)?;
            let (two, s2) = self.subject(case, size)?;
            switches += s1 + s2;
            let last = self.floor(size)?;
            if let Some(wake) = &mut wake {
                // In the same state as the subject: everybody was at work, and has slept for so long since.
                wake.echo()?;
                wake.wake()?;
                std::thread::sleep(PARKED);
                echoes.push(wake.echo()?);
                wake.wake()?;
                std::thread::sleep(PARKED);
                wakes.push(wake.wake()?);
            }
            if i == 0 {
                echoes.clear();
                wakes.clear();
                switches = before;
                continue;
            }
            blocks.push(Block {
                floor: [first, last],
                subject: [one, two],
            });
        }
        Ok(Row {
            uffd_mode: self.mode,
            case,
            size_bytes: size as u64,
            placement: Placement::Free,
            paired: paired(&blocks, self.args.seed),
            wakes: wake.map(|_| held_against(&blocks, echoes, wakes, self.args.seed)),
            voluntary_context_switches_per_call: switches as f64 / (2 * blocks.len()) as f64,
        })
    }

    /// Plain mmap, populated.
    fn map_plain(&self, size: usize) -> Result<usize> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
        );
        let flags = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        unsafe { agent::raw::mmap(ADDRESS, size, prot, flags, Some(self.memory.fd()), 0) }.context("mmap")
    }

    fn map_covered(&self, size: usize) -> Result<usize> {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
        );
        let flags = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        let mapped = unsafe {
            self.agent
                .mmap(ADDRESS, size, prot, flags, Some(self.memory.fd()), 0)
        };
        Ok(mapped.context("mmap by the agent")?.value)
    }

    fn unmap_plain(address: usize, size: usize) -> Result<()> {
        // SAFETY: mapped by this module; no Rust reference points into it.
        unsafe { agent::raw::munmap(address, size) }.context("munmap")
    }

    fn unmap_covered(&self, address: usize, size: usize) -> Result<()> {
        // SAFETY: mapped by this module; no Rust reference points into it.
        unsafe { self.agent.munmap(address, size) }.context("munmap by the agent")?;
        Ok(())
    }

    fn floor(&self, size: usize) -> Result<u64> {
        let address = self.map_plain(size)?;
        let start = Instant::now();
        Self::unmap_plain(address, size)?;
        Ok(start.elapsed().as_nanos() as u64)
    }

    fn subject(&self, case: Case, size: usize) -> Result<(u64, u64)> {
        let address = match case {
            Case::Monitor => {
                let address = self.map_plain(size)?;
                self.monitor.register(address, size).context("UFFDIO_REGISTER")?;
                address
            }
            Case::AgentUnregistered => {
                let address = self.map_covered(size)?;
                self.agent.unregister(address, size).context("unregister")?;
                address
            }
            _ => self.map_covered(size)?,
        };
        if case.live() {
            self.touch(address, size)?;
        }
        if case.parked() {
            // Not synchronisation: the state that the row is about is "idle for so long".
            std::thread::sleep(PARKED);
        }
        let switches = voluntary_switches();
        let start = Instant::now();
        match case {
            Case::Monitor | Case::SafetyNet => Self::unmap_plain(address, size)?,
            _ => self.unmap_covered(address, size)?,
        }
        let elapsed = start.elapsed().as_nanos() as u64;
        Ok((elapsed, voluntary_switches() - switches))
    }

    /// Puts translations of some of the range's pages into the device's TLB.
    fn touch(&self, address: usize, size: usize) -> Result<()> {
        let pages = (size / PAGE).min(LIVE_PAGES);
        let step = size / pages;
        let stride = (step / 8) as u64;
        let load = Instruction::vload(address as u64, 0, XType::DWORD, pages as u64, stride);
        self.context
            .execute(0, &load)
            .context("a load that fills the TLB")?;
        Ok(())
    }

    /// Keeps the device busy with another range until dropped.
    fn busy(&self) -> Result<Busy> {
        let context = self.agent.create_context(&context_options())?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let mapped = unsafe { self.agent.mmap(0, PAGE, prot, flags, Some(self.memory.fd()), 0) };
        let address = mapped.context("mmap by the agent")?.value;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || -> Result<()> {
                let load = Instruction::vload(address as u64, 0, XType::DWORD, 128, 1);
                while !stop.load(Ordering::Relaxed) {
                    context.execute(0, &load).context("the busy device's load")?;
                }
                Ok(())
            })
        };
        Ok(Busy {
            stop,
            thread: Some(thread),
        })
    }

    /// Attaches another process to the range.
    fn peer(&self, stop: &Stop) -> Result<Service> {
        let end = ADDRESS + *SIZES.last().expect("there are sizes");
        let mut peer = Service::start(
            "xpmem peer",
            args![
                "peer",
                "--socket",
                &self.args.socket,
                "--pid",
                std::process::id().to_string(),
                "--start",
                ADDRESS.to_string(),
                "--end",
                end.to_string(),
            ],
        )?;
        peer.expect("ready", START_LIMIT, stop)?;
        Ok(peer)
    }
}

fn held_against(blocks: &[Block], mut echoes: Vec<u64>, mut wakes: Vec<u64>, seed: u64) -> Wakes {
    let mut floors: Vec<u64> = echoes
        .iter()
        .zip(&wakes)
        .map(|(echo, wake)| echo + wake)
        .collect();
    let ratios: Vec<f64> = blocks
        .iter()
        .zip(&floors)
        .map(|(b, floor)| b.difference() / *floor as f64)
        .collect();
    for times in [&mut echoes, &mut wakes, &mut floors] {
        times.sort_unstable();
    }
    Wakes {
        socket_echo_p50_ns: quantile(&echoes, 0.5),
        wake_p50_ns: quantile(&wakes, 0.5),
        floor_p99_ns: quantile(&floors, 0.99),
        floor_max_ns: quantile(&floors, 1.0),
        ratio: bootstrap(&ratios, seed),
    }
}

/// See [`Subject::busy`].
struct Busy {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(std::thread::JoinHandle::join) {
            Some(Ok(Err(error))) => tracing::error!("{error:#}"),
            Some(Err(_)) => tracing::error!("the busy thread panicked"),
            _ => {}
        }
    }
}
