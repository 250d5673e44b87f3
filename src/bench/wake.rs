//! The floor of what wakes somebody: other processes that sleep until they are told, in the same state and at the
//! same place as the daemon (which answers: a socket echo) and the device (which is only woken).

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use super::placement::{Unpin, pin};
use crate::cli::WakeArgs;
use crate::demo::args;
use crate::stop::{self, Stop};
use crate::supervise::{Leftovers, START_LIMIT, Service};

/// Nanoseconds on a clock that all processes share.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn fifo(socket: &Path) -> PathBuf {
    socket.with_extension("fifo")
}

/// The other end: echoes bytes, and says when it saw what was written to its FIFO.
///
/// # Errors
/// Socket or FIFO cannot be made.
pub fn run(args: &WakeArgs) -> Result<()> {
    let stop = Stop::new()?;
    stop.on_signals(true)?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    let fifo = fifo(&args.socket);
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .with_context(|| format!("cannot make {}", fifo.display()))?;
    let listener =
        UnixListener::bind(&args.socket).with_context(|| format!("cannot bind {}", args.socket.display()))?;
    stop::obey(&stop, |_| json!({}))?;
    stop::say(&json!({ "ready": {} }));
    std::thread::Builder::new()
        .name("wake".into())
        .spawn(move || serve(&listener, &fifo))
        .context("thread")?;
    while !stop.wait_for(Duration::from_secs(3600)) {}
    Ok(())
}

fn serve(listener: &UnixListener, fifo: &Path) -> Result<()> {
    let (mut echo, _) = listener.accept()?;
    let (mut woken, _) = listener.accept()?;
    let mut bell: File = open(fifo, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into();
    std::thread::spawn(move || {
        let mut byte = [0];
        while bell.read_exact(&mut byte).is_ok() && woken.write_all(&now().to_ne_bytes()).is_ok() {}
    });
    let mut byte = [0];
    while echo.read_exact(&mut byte).is_ok() && echo.write_all(&byte).is_ok() {}
    Ok(())
}

/// One such process, and the way to it.
#[derive(Debug)]
struct Peer {
    _service: Service,
    echo: UnixStream,
    woken: UnixStream,
    bell: File,
}

impl Peer {
    fn start(dir: &Path, name: &str, cpu: Option<usize>, stop: &Stop) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let _unpin = Unpin::later()?;
        if let Some(cpu) = cpu {
            // The child inherits it.
            pin(cpu)?;
        }
        let mut service = Service::start(
            "wake floor",
            args!["bench-wake", "--socket", &socket, "--private-dir", dir],
        )?;
        service.expect("ready", START_LIMIT, stop)?;
        let connect =
            || UnixStream::connect(&socket).with_context(|| format!("cannot reach {}", socket.display()));
        let (echo, woken) = (connect()?, connect()?);
        let path = fifo(&socket);
        let bell = open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("cannot open {}", path.display()))?;
        // Both ends are open; the names are the next floor's.
        for name in [&path, &socket] {
            std::fs::remove_file(name).with_context(|| format!("cannot remove {}", name.display()))?;
        }
        Ok(Self {
            _service: service,
            echo,
            woken,
            bell: bell.into(),
        })
    }
}

/// Both.
#[derive(Debug)]
pub struct WakeFloor {
    daemon: Peer,
    device: Peer,
}

impl WakeFloor {
    /// Starts the processes: one where this one runs, one at the device's place.
    ///
    /// # Errors
    /// They cannot be started.
    pub fn start(dir: &Path, device_cpu: Option<usize>, stop: &Stop) -> Result<Self> {
        Ok(Self {
            daemon: Peer::start(dir, "floor-daemon", None, stop)?,
            device: Peer::start(dir, "floor-device", device_cpu, stop)?,
        })
    }

    /// A byte to the daemon's stand-in and back: two wakes.
    ///
    /// # Errors
    /// It is gone.
    pub fn echo(&mut self) -> Result<u64> {
        let start = Instant::now();
        self.daemon.echo.write_all(&[1])?;
        self.daemon.echo.read_exact(&mut [0])?;
        Ok(start.elapsed().as_nanos() as u64)
    }

    /// From a write to a pipe until the device's stand-in, which slept on it, runs.
    ///
    /// # Errors
    /// It is gone.
    pub fn wake(&mut self) -> Result<u64> {
        let start = now();
        self.device.bell.write_all(&[1])?;
        let mut ran = [0; 8];
        self.device.woken.read_exact(&mut ran)?;
        Ok(u64::from_ne_bytes(ran).saturating_sub(start))
    }
}
