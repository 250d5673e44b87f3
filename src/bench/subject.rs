//! The measured process: maps memory, lets the device use it, and measures munmap.
#![allow(unsafe_code, reason = "mmap and munmap, plain and by the agent")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent::{Agent, AttachOptions, ContextOptions, FaultMode, GruContext, Memory};
use anyhow::{Context, Result};
use protos::bridge::control::UffdMode;
use protos::gru::cb::{Instruction, XType};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cases::{Case, SIZES, blocks_of, wanted};
use super::monitor::Monitor;
use super::statistics::{Block, Paired, paired, quantile};
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
    /// The figures.
    #[serde(flatten)]
    pub paired: Paired,
    /// Voluntary context switches of the caller, per subject call.
    pub voluntary_context_switches_per_call: f64,
}

/// Figures of the floors that no munmap is part of.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct WakeFloor {
    /// A byte to another thread and back, by socket, after both have slept as long as the device has in the row
    /// that it is compared with: two wakes.
    pub socket_echo_p50_ns: u64,
    /// From a write to an eventfd until the thread that slept on it runs: one wake.
    pub wake_p50_ns: u64,
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
    stop::say(&json!({ "wake_floor": wake_floor(if args.quick { 100 } else { 1000 })? }));
    for case in Case::ALL {
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
        for size in SIZES {
            if stop.requested() {
                break;
            }
            if wanted(size, case, self.args.quick) {
                let row = self.measure(case, size)?;
                stop::say(&json!({ "row": row }));
            }
        }
        drop((busy, peer));
        Ok(())
    }

    fn measure(&self, case: Case, size: usize) -> Result<Row> {
        let mut switches = 0;
        let mut blocks = Vec::new();
        // The first block warms caches and allocators up.
        for i in 0..=blocks_of(size, self.args.quick) {
            let first = self.floor(size)?;
            let before = switches;
            let (one, s1) = self.subject(case, size)?;
            let (two, s2) = self.subject(case, size)?;
            switches += s1 + s2;
            let last = self.floor(size)?;
            if i == 0 {
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
            paired: paired(&blocks, self.args.seed),
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
        if case == Case::AgentLiveParked {
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

/// What telling somebody who sleeps costs at least: in the same state as the parked row, since an idle
/// processor takes longer to answer than a warm one.
fn wake_floor(rounds: usize) -> Result<WakeFloor> {
    let (mut here, mut there) = UnixStream::pair().context("socket pair")?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while there
            .read_exact(&mut byte)
            .and_then(|()| there.write_all(&byte))
            .is_ok()
        {}
    });
    let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("eventfd")?);
    let (woken, wakes) = std::sync::mpsc::channel();
    let sleeper = {
        let bell = Arc::clone(&bell);
        std::thread::spawn(move || {
            let mut count = [0; 8];
            while rustix::io::read(&*bell, &mut count).is_ok() && woken.send(Instant::now()).is_ok() {}
        })
    };
    let (mut echoes, mut latencies) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        std::thread::sleep(PARKED);
        let start = Instant::now();
        here.write_all(&[1])?;
        here.read_exact(&mut [0])?;
        echoes.push(start.elapsed().as_nanos() as u64);

        std::thread::sleep(PARKED);
        let start = Instant::now();
        rustix::io::write(&*bell, &1u64.to_ne_bytes()).context("eventfd")?;
        let ran = wakes.recv().context("the sleeping thread ended")?;
        latencies.push(ran.saturating_duration_since(start).as_nanos() as u64);
    }
    drop((here, wakes));
    rustix::io::write(&*bell, &1u64.to_ne_bytes()).context("eventfd")?;
    for thread in [echo, sleeper] {
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread of the wake floor panicked"))?;
    }
    echoes.sort_unstable();
    latencies.sort_unstable();
    Ok(WakeFloor {
        socket_echo_p50_ns: quantile(&echoes, 0.5),
        wake_p50_ns: quantile(&latencies, 0.5),
    })
}
