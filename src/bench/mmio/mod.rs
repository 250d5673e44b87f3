//! `tlbridge bench mmio`: what the vfio-user server adds to the socket.
//!
//! The floor is a process that echoes messages of the same sizes ([`echo`]), measured in the same blocks, by
//! the same client code, on the same processor as the server. Both ends share one processor, so that a wake
//! is a context switch and not an interrupt to an idle processor, whose time depends on the machine's idle
//! states. Only the polling case has a processor for each end.

pub mod echo;
mod report;
mod wire;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use driver::backing::Backing;
use driver::vfio_user::VfioUserClient;
use rustix::thread::CpuSet;
use zerocopy::IntoBytes;

use super::placement::{Unpin, pin, wait_for_ones_turn};
use super::statistics::{Block, bootstrap, paired, quantile};
use crate::cli::{MmioArgs, ModelName};
use crate::demo::args;
use crate::latency::Latency;
use crate::stop::Stop;
use crate::supervise::{START_LIMIT, Service};
use echo::{Plan, Receive};
use report::{Absent, Case, MmioResult, Row};
use wire::{Exchange, Place, Wire};

/// The floor as a subject: an echo that receives with room for file descriptors, against one that cannot.
const ECHO: &str = "recvmsg echo";

/// How long polling ends ask before they sleep. Longer than any answer takes; short enough that the one that
/// is not being measured soon leaves the processor.
const BUSY_POLL: Duration = Duration::from_micros(300);
/// Time for the other one to fall asleep.
const QUIET: Duration = Duration::from_millis(2);
/// The lower address word of the first entry of the GRU's MSI-X table: a register without side effects.
const GRU_PLACE: Place = Place {
    region: 0,
    offset: 0x8000,
};

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Amount {
    blocks: usize,
    /// Round trips of which a block takes the median.
    calls: usize,
    /// Posted writes that a block sends at a time.
    posted: u32,
}

impl Amount {
    fn of(args: &MmioArgs) -> Self {
        match args.measuring.quick {
            true => Self {
                blocks: 8,
                calls: 100,
                posted: 500,
            },
            false => Self {
                blocks: 60,
                calls: 400,
                posted: 4000,
            },
        }
    }
}

/// Measures and prints the table.
///
/// # Errors
/// A process cannot be started or ends early; a server refuses what a case needs.
pub fn run(args: &MmioArgs, out: &mut impl Write) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(false)?;
    // Mode 0700: nobody else reaches the sockets.
    let dir = tempfile::Builder::new()
        .prefix("tlbridge-")
        .tempdir()
        .context("cannot make a private directory for the sockets (TMPDIR)")?;
    let start = Instant::now();
    let mut result = MmioResult::new(args.measuring.quick, args.measuring.seed);
    let unpin = Unpin::later()?;
    wait_for_ones_turn()?;
    measure(args, dir.path(), unpin.allowed(), &stop, &mut result)?;
    drop(unpin);
    result.elapsed_ms = start.elapsed().as_millis() as u64;
    super::print(
        args.measuring.json.as_deref(),
        &result.json(),
        || result.table(),
        out,
    )
}

fn measure(
    args: &MmioArgs,
    dir: &Path,
    allowed: &CpuSet,
    stop: &Stop,
    result: &mut MmioResult,
) -> Result<()> {
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let here = cpus.next().context("this thread may run nowhere")?;
    // Children inherit the processor.
    pin(here)?;
    let bench = Bench::new(dir, "floor", Amount::of(args), args.measuring.seed, stop)?;
    {
        let (device, socket) = gru(dir, "gru", Duration::ZERO, stop)?;
        let server = Wire::connect(&socket, false)?;
        server.negotiate()?;
        bench.descriptors(result)?;
        bench.messages("tlbridge", &server, GRU_PLACE, result)?;
        drop(server);
        result.push(bench.client(&socket)?);
        device.end_cleanly()?;
    }
    match libvfio_user(args) {
        None => result.absent.push(Absent {
            subject: "libvfio-user",
            reason: "no server of it on this machine (--libvfio-user PATH names one)".into(),
        }),
        Some(program) => {
            let socket = dir.join("libvfio-user.sock");
            let _server = Foreign::start(&program, &socket)?;
            let wire = connect_soon(&socket)?;
            wire.negotiate().context("libvfio-user's server")?;
            let place = wire.find_place().context("libvfio-user's server")?;
            bench.messages("libvfio-user", &wire, place, result)?;
        }
    }
    bench.floor.end_cleanly()?;
    let Some(there) = cpus.next() else {
        result.absent.push(Absent {
            subject: "both ends polling",
            reason: "needs two processors, this process may use one".into(),
        });
        return Ok(());
    };
    pin(there)?;
    let bench = Bench::new(dir, "polling-floor", Amount::of(args), args.measuring.seed, stop)?;
    let (device, socket) = gru(dir, "polling-gru", BUSY_POLL, stop)?;
    pin(here)?;
    let server = Wire::connect(&socket, true)?;
    server.negotiate()?;
    result.push(bench.round_trips(
        Case::ReadPolling,
        "tlbridge",
        &server,
        &wire::read(GRU_PLACE),
        true,
    )?);
    drop(server);
    device.end_cleanly()?;
    bench.floor.end_cleanly()
}

fn gru(dir: &Path, name: &str, busy_poll: Duration, stop: &Stop) -> Result<(Service, PathBuf)> {
    let socket = dir.join(format!("{name}.sock"));
    let more = args!["--busy-poll", busy_poll.as_micros().to_string()];
    let device = crate::device::start(ModelName::Gru, dir, &socket, more, stop)?;
    Ok((device, socket))
}

/// The floor's process, and how to measure against it.
struct Bench<'a> {
    floor: Service,
    socket: PathBuf,
    amount: Amount,
    seed: u64,
    stop: &'a Stop,
}

impl<'a> Bench<'a> {
    fn new(dir: &Path, name: &str, amount: Amount, seed: u64, stop: &'a Stop) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let mut floor = Service::start(
            "echo",
            args!["bench-echo", "--socket", &socket, "--private-dir", dir],
        )?;
        floor.expect("ready", START_LIMIT, stop)?;
        Ok(Self {
            floor,
            socket,
            amount,
            seed,
            stop,
        })
    }

    fn floor(
        &self,
        request: usize,
        answer: usize,
        every: u32,
        receive: Receive,
        polling: bool,
    ) -> Result<Wire> {
        let wire = Wire::connect(&self.socket, polling)?;
        let busy_poll_us = if polling { BUSY_POLL.as_micros() as u32 } else { 0 };
        let plan = Plan {
            request: request as u32,
            answer: answer as u32,
            every,
            busy_poll_us,
            receive: receive as u32,
        };
        wire.send(plan.as_bytes())?;
        Ok(wire)
    }

    /// What room for file descriptors costs: one floor against the other.
    fn descriptors(&self, result: &mut MmioResult) -> Result<()> {
        let exchange = wire::read(GRU_PLACE);
        let (request, answer) = (exchange.request.len(), exchange.answer);
        let subject = self.floor(request, answer, 1, Receive::WithDescriptors, false)?;
        result.push(self.round_trips(Case::Read, ECHO, &subject, &exchange, false)?);
        Ok(())
    }

    /// The cases of one server.
    fn messages(
        &self,
        subject: &'static str,
        server: &Wire,
        place: Place,
        result: &mut MmioResult,
    ) -> Result<()> {
        result.push(self.round_trips(Case::Read, subject, server, &wire::read(place), false)?);
        let write = wire::write(place, false);
        result.push(self.round_trips(Case::Write, subject, server, &write, false)?);
        result.push(self.round_trips(Case::ReadBytesOnly, subject, server, &wire::read(place), false)?);
        result.push(self.round_trips(Case::WriteBytesOnly, subject, server, &write, false)?);
        result.push(self.posted(subject, server, place)?);
        Ok(())
    }

    fn round_trips(
        &self,
        case: Case,
        subject: &'static str,
        server: &Wire,
        exchange: &Exchange,
        polling: bool,
    ) -> Result<Row> {
        // Polling ends are held against the cheaper one.
        let bytes_only = matches!(case, Case::ReadBytesOnly | Case::WriteBytesOnly);
        let receive = if polling || bytes_only || subject == ECHO {
            Receive::Bytes
        } else {
            Receive::WithDescriptors
        };
        let floor = self.floor(exchange.request.len(), exchange.answer, 1, receive, polling)?;
        let quiet = if polling { QUIET } else { Duration::ZERO };
        let on = |wire: &Wire, latency: &mut Latency| {
            self.block(latency, quiet, || {
                let mut answer = [0; echo::MAX];
                wire.send(&exchange.request)?;
                wire.receive(&mut answer[..exchange.answer])
            })
        };
        self.interleave(
            case,
            subject,
            |latency| on(&floor, latency),
            |latency| on(server, latency),
        )
    }

    /// Through this project's client, against the same floor.
    fn client(&self, socket: &Path) -> Result<Row> {
        let client = VfioUserClient::connect(socket).context("cannot attach")?;
        client
            .config_write(4, &2u16.to_le_bytes())
            .context("memory space enable")?;
        let exchange = wire::read(GRU_PLACE);
        let floor = self.floor(
            exchange.request.len(),
            exchange.answer,
            1,
            Receive::WithDescriptors,
            false,
        )?;
        let on_floor = |latency: &mut Latency| {
            self.block(latency, Duration::ZERO, || {
                floor.send(&exchange.request)?;
                floor.receive(&mut [0; wire::LONG])
            })
        };
        let on_client = |latency: &mut Latency| {
            self.block(latency, Duration::ZERO, || {
                client.read(GRU_PLACE.region as usize, GRU_PLACE.offset, &mut [0; wire::DATA])?;
                Ok(())
            })
        };
        self.interleave(Case::ReadByClient, "tlbridge", on_floor, on_client)
    }

    /// The median of some calls, which all go to `latency`.
    fn block(
        &self,
        latency: &mut Latency,
        quiet: Duration,
        mut call: impl FnMut() -> Result<()>,
    ) -> Result<u64> {
        ensure!(!self.stop.requested(), "interrupted");
        if !quiet.is_zero() {
            std::thread::sleep(quiet);
        }
        // Caches, and whoever was asleep.
        for _ in 0..self.amount.calls / 10 {
            call()?;
        }
        let mut times = Vec::with_capacity(self.amount.calls);
        for _ in 0..self.amount.calls {
            let start = Instant::now();
            call()?;
            let elapsed = start.elapsed();
            latency.record(elapsed);
            times.push(elapsed.as_nanos() as u64);
        }
        times.sort_unstable();
        Ok(quantile(&times, 0.5))
    }

    fn interleave(
        &self,
        case: Case,
        subject: &'static str,
        mut floor: impl FnMut(&mut Latency) -> Result<u64>,
        mut server: impl FnMut(&mut Latency) -> Result<u64>,
    ) -> Result<Row> {
        let (mut on_floor, mut on_server) = (Latency::default(), Latency::default());
        let mut blocks = Vec::with_capacity(self.amount.blocks);
        for _ in 0..self.amount.blocks {
            let first = floor(&mut on_floor)?;
            let pair = [server(&mut on_server)?, server(&mut on_server)?];
            blocks.push(Block {
                floor: [first, floor(&mut on_floor)?],
                subject: pair,
            });
        }
        let (floor, server) = (on_floor.summary(), on_server.summary());
        Ok(Row {
            case,
            subject,
            blocks: blocks.len(),
            floor_p50_ns: floor.p50_ns,
            floor_p99_ns: floor.p99_ns,
            p50_ns: server.p50_ns,
            p99_ns: server.p99_ns,
            floor_messages_per_second: None,
            messages_per_second: None,
            ratio: paired(&blocks, self.seed).ratio,
        })
    }

    /// Posted writes, the last of which is answered: that ends the measurement at both ends alike.
    fn posted(&self, subject: &'static str, server: &Wire, place: Place) -> Result<Row> {
        let count = self.amount.posted;
        let (posted, last) = (wire::write(place, true), wire::write(place, false));
        let floor = self.floor(posted.request.len(), last.answer, count, Receive::Bytes, false)?;
        let burst = |wire: &Wire| -> Result<u64> {
            ensure!(!self.stop.requested(), "interrupted");
            let start = Instant::now();
            for _ in 1..count {
                wire.send(&posted.request)?;
            }
            wire.send(&last.request)?;
            wire.receive(&mut [0; wire::SHORT])?;
            Ok(start.elapsed().as_nanos() as u64)
        };
        // A floor that takes whatever is there in one call would say more about its buffer than about the
        // socket: this one receives message by message.
        let (mut floors, mut subjects, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.amount.blocks {
            let first = burst(&floor)?;
            let pair = [burst(server)?, burst(server)?];
            let second = burst(&floor)?;
            // Of rates, so the other way round.
            ratios.push((first + second) as f64 / (pair[0] + pair[1]).max(1) as f64);
            floors.extend([first, second]);
            subjects.extend(pair);
        }
        let rate = |times: &mut Vec<u64>| {
            times.sort_unstable();
            f64::from(count) * 1e9 / quantile(times, 0.5).max(1) as f64
        };
        let each = |times: &[u64], q| quantile(times, q) / u64::from(count);
        let (floor_rate, subject_rate) = (rate(&mut floors), rate(&mut subjects));
        Ok(Row {
            case: Case::Posted,
            subject,
            blocks: self.amount.blocks,
            floor_p50_ns: each(&floors, 0.5),
            floor_p99_ns: each(&floors, 0.99),
            p50_ns: each(&subjects, 0.5),
            p99_ns: each(&subjects, 0.99),
            floor_messages_per_second: Some(floor_rate),
            messages_per_second: Some(subject_rate),
            ratio: bootstrap(&ratios, self.seed),
        })
    }
}

/// libvfio-user's sample server (`samples/server SOCKET`), from the option or `$PATH`.
fn libvfio_user(args: &MmioArgs) -> Option<PathBuf> {
    if let Some(path) = &args.libvfio_user {
        return Some(path.clone());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("libvfio-user-server"))
        .find(|program| program.is_file())
}

/// A server that knows nothing of our supervision.
struct Foreign(Child);

impl Foreign {
    fn start(program: &Path, socket: &Path) -> Result<Self> {
        std::process::Command::new(program)
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map(Self)
            .with_context(|| format!("cannot start {}", program.display()))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It serves for ever; either call fails when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that does not say when it is ready: try until it is.
fn connect_soon(socket: &Path) -> Result<Wire> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match Wire::connect(socket, false) {
            Ok(wire) => return Ok(wire),
            Err(error) if Instant::now() >= deadline => {
                bail!("the server does not come up within {START_LIMIT:?}: {error:#}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
