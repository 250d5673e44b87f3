//! `tlbridge bench doorbell`: what the ways to notice a store cost, and what the device costs when idle.
//!
//! Every mode has a device process of its own; those that are not being measured are stopped (SIGSTOP), because one
//! that spins needs a CPU, and each has a CPU other than the caller's where there are two: on one and the same, a
//! spinning engine's answer is as far away as its next yield. The adaptive poller is compared with an engine that never stops spinning, in ABBA blocks.

mod report;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use driver::backing::{Backing, DmaProt};
use driver::gru::user::Gseg;
use driver::gru::{Context as GruContext, ContextOptions, Fault, Gru, GruOptions, Mm, Pager, Translation};
use driver::vfio_user::VfioUserClient;
use protos::gru::cb::{Instruction, Status, XType};
use protos::gru::{map, pci};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process};

use super::placement::{Placement, Unpin, pin};
use super::statistics::{Block, paired, quantile};
use crate::cli::{DoorbellArgs, ModelName};
use crate::demo::args;
use crate::latency::Latency;
use crate::stop::Stop;
use crate::supervise::Service;
use report::{DoorbellResult, ModeRow};

/// Memory that the device reaches.
const BYTES: u64 = 1 << 20;
const IOVA: u64 = 0x10_0000_0000;
const VA: u64 = 0x7000_0000_0000;
/// A part of a GSEG that nobody has: trapped in every mode, and without an effect.
const NOTHING: u64 = 15 * map::GSEG_STRIDE + map::GSEG_MAPPABLE;
/// An instruction that takes longer does not end.
const LIMIT: Duration = Duration::from_secs(10);
/// No engine of a device that "spins" stops before the benchmark does.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// A way to notice stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// `--doorbell trap`.
    Trap,
    /// `--doorbell bell`.
    Bell,
    /// `--doorbell poll`.
    Poll,
    /// The same without an end of the spinning: the floor.
    Spin,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Trap, Self::Bell, Self::Poll, Self::Spin];

    fn doorbell(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Bell => "bell",
            Self::Poll | Self::Spin => "poll",
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Amount {
    blocks: usize,
    calls: usize,
    idle: Duration,
}

impl Amount {
    fn of(args: &DoorbellArgs) -> Self {
        match args.measuring.quick {
            true => Self {
                blocks: 8,
                calls: 200,
                idle: Duration::from_secs(1),
            },
            false => Self {
                blocks: 60,
                calls: 1000,
                idle: Duration::from_secs(5),
            },
        }
    }
}

/// Measures and prints the table.
///
/// # Errors
/// A process cannot be started or ends early; an instruction fails.
pub fn run(args: &DoorbellArgs, out: &mut impl std::io::Write) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    let dir = super::tempdir()?;
    let amount = Amount::of(args);
    let begin = Instant::now();
    let unpin = Unpin::later()?;
    let processors = Placement::DeviceApart.processors(unpin.allowed());
    let mut result = DoorbellResult::new(args.measuring.quick, args.measuring.seed);
    result.shared_processor = processors.as_ref().err().map(ToString::to_string);
    let processors = processors.unwrap_or_default();
    let mut subjects = Vec::new();
    for mode in Mode::ALL {
        let subject = Subject::start(mode, dir.path(), processors, &stop)?;
        subject.pause()?;
        subjects.push(subject);
    }
    for subject in &subjects {
        subject.resume()?;
        result.push(subject.row(amount, &stop)?);
        subject.pause()?;
    }
    let [_, _, poll, spin] = &subjects[..] else {
        unreachable!("there are four modes")
    };
    result.busy = Some(paired(&compare(spin, poll, amount, &stop)?, args.measuring.seed));
    for subject in subjects {
        subject.end()?;
    }
    result.elapsed_ms = begin.elapsed().as_millis() as u64;
    super::print(
        args.measuring.json.as_deref(),
        &result.json(),
        || result.table(),
        out,
    )
}

/// VLOAD hits, back to back, on both in turn.
fn compare(floor: &Subject, subject: &Subject, amount: Amount, stop: &Stop) -> Result<Vec<Block>> {
    let block = |subject: &Subject| {
        ensure!(!stop.requested(), "interrupted");
        subject.resume()?;
        let time = subject.times(amount.calls, || subject.load());
        subject.pause()?;
        time.map(|times| quantile(&times, 0.5))
    };
    (0..amount.blocks)
        .map(|_| {
            let first = block(floor)?;
            let pair = [block(subject)?, block(subject)?];
            Ok(Block {
                floor: [first, block(floor)?],
                subject: pair,
            })
        })
        .collect()
}

/// Every page of the memory at its place.
struct Straight;

impl Pager for Straight {
    fn fault(&self, va: u64, _write: bool) -> Fault {
        match va.checked_sub(VA) {
            Some(offset) if offset < BYTES => Fault::Page(Translation {
                iova: IOVA + offset,
                page_shift: 12,
                writable: true,
                generation: 0,
            }),
            _ => Fault::Bad,
        }
    }
}

/// A device process and a driver on it. Fields in the order in which they may go.
struct Subject {
    mode: Mode,
    gseg: Gseg,
    _context: GruContext,
    mm: Arc<Mm>,
    backing: Arc<dyn Backing>,
    device: Service,
}

impl Subject {
    fn start(mode: Mode, dir: &Path, processors: Option<(usize, usize)>, stop: &Stop) -> Result<Self> {
        let socket = dir.join(format!("{mode:?}.sock"));
        // The driver is ours.
        let mut more = args!["--doorbell", mode.doorbell(), "--map-tfh"];
        if mode == Mode::Spin {
            more.extend(args!["--spin", FOR_EVER.as_micros().to_string()]);
        }
        if let Some((_, there)) = processors {
            pin(there)?;
        }
        let device = crate::device::start(ModelName::Gru, dir, &socket, more, stop)?;
        if let Some((here, _)) = processors {
            pin(here)?;
        }
        let backing: Arc<dyn Backing> =
            Arc::new(VfioUserClient::connect(&socket).context("cannot attach to the device")?);
        let memory = rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC).context("memfd_create")?;
        rustix::fs::ftruncate(&memory, BYTES).context("ftruncate")?;
        let gru = Gru::open(Arc::clone(&backing), GruOptions::default())?;
        backing
            .dma_map(
                IOVA,
                BYTES,
                std::os::fd::AsFd::as_fd(&memory),
                0,
                DmaProt::READ_WRITE,
            )
            .context("mapping memory for the device")?;
        let mm = gru.address_space(Arc::new(Straight));
        let context = mm.create_context(ContextOptions::default())?;
        Ok(Self {
            mode,
            gseg: context.gseg()?,
            _context: context,
            mm,
            backing,
            device,
        })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.device.pid())
            .ok()
            .and_then(Pid::from_raw)
            .context("the device has no pid")?;
        kill_process(pid, signal).with_context(|| format!("cannot send {signal:?} to the device"))
    }

    fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn end(self) -> Result<()> {
        self.resume()?;
        let Self {
            gseg,
            _context: context,
            mm,
            backing,
            device,
            ..
        } = self;
        drop(gseg);
        context.close()?;
        drop((mm, backing));
        device.end_cleanly()
    }

    /// Nanoseconds of each call, sorted, after some that warm up.
    fn times(&self, calls: usize, mut call: impl FnMut() -> Result<()>) -> Result<Vec<u64>> {
        for _ in 0..calls / 10 {
            call()?;
        }
        let mut times = Vec::with_capacity(calls);
        for _ in 0..calls {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed().as_nanos() as u64);
        }
        times.sort_unstable();
        Ok(times)
    }

    /// VLOAD of one word of a page that is in the TLB.
    fn load(&self) -> Result<()> {
        let since = Instant::now();
        let status = self
            .gseg
            .execute(0, &Instruction::vload(VA, 0, XType::DWORD, 1, 1), &|| {
                since.elapsed() < LIMIT
            })?;
        if status != Status::IDLE {
            bail!("a VLOAD ended with {status:?}");
        }
        Ok(())
    }

    fn row(&self, amount: Amount, stop: &Stop) -> Result<ModeRow> {
        ensure!(!stop.requested(), "interrupted");
        let median = |times: Vec<u64>| quantile(&times, 0.5);
        let calls = amount.calls;
        let mut vload = Latency::default();
        for time in self.times(calls, || self.load())? {
            vload.record(Duration::from_nanos(time));
        }
        let read = || Ok(self.gseg.control(1).map(drop)?);
        let write = || Ok(self.gseg.ds_write(8, &[0; 8])?);
        let register = || {
            // As QEMU does it: without an answer only where nothing of the device can be mapped.
            let data = [0; 4];
            match self.mode {
                Mode::Trap => self.backing.write_posted(pci::BAR_CHIPLETS, NOTHING, &data)?,
                _ => self.backing.write(pci::BAR_CHIPLETS, NOTHING, &data)?,
            }
            Ok(())
        };
        let flush = || {
            self.mm.flush(VA + 4096, VA + 8192);
            Ok(())
        };
        let (cb_read, ds_write) = (self.times(calls, read)?, self.times(calls, write)?);
        let register = self.times(calls, register)?;
        let flush = self.times(calls, flush)?;
        // A rare start finds the engines asleep.
        let rare = (0..calls.min(50))
            .map(|_| {
                std::thread::sleep(Duration::from_millis(2));
                let start = Instant::now();
                self.load()?;
                Ok(start.elapsed().as_nanos() as u64)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut rare = rare;
        rare.sort_unstable();
        let idle = self.idle(amount.idle)?;
        Ok(ModeRow {
            mode: self.mode,
            cb_read_p50_ns: median(cb_read),
            ds_write_p50_ns: median(ds_write),
            register_write_p50_ns: median(register),
            vload_hit: vload.summary(),
            vload_hit_after_idle_p50_ns: median(rare),
            flush_p50_ns: median(flush),
            idle_cpu_percent: idle,
        })
    }

    /// Part of a CPU that the device uses while nobody asks anything of it.
    fn idle(&self, time: Duration) -> Result<f64> {
        // What was under way ends first.
        std::thread::sleep(Duration::from_millis(20));
        let (before, begin) = (self.cpu_time()?, Instant::now());
        std::thread::sleep(time);
        let used = self.cpu_time()?.saturating_sub(before);
        Ok(100.0 * used.as_secs_f64() / begin.elapsed().as_secs_f64())
    }

    /// Time on a CPU of all threads of the device.
    fn cpu_time(&self) -> Result<Duration> {
        let tasks = format!("/proc/{}/task", self.device.pid());
        let mut sum = Duration::ZERO;
        for task in std::fs::read_dir(&tasks).with_context(|| format!("cannot read {tasks}"))? {
            let path = task?.path().join("schedstat");
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {} (CONFIG_SCHED_INFO)", path.display()))?;
            let ns = text.split(' ').next().and_then(|word| word.parse().ok());
            sum += Duration::from_nanos(ns.with_context(|| format!("{}: {text:?}", path.display()))?);
        }
        Ok(sum)
    }
}
