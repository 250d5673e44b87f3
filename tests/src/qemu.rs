//! QEMU without a guest: its `qtest` accelerator runs no instruction, and a socket stands for the processor
//! (port and memory accesses); QMP is as always. Both connect to sockets of the test, so nothing has to be
//! polled for.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lab::qmp::{Qmp, QmpError};
use serde_json::Value;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a read of nothing gives.
pub const ALL_ONES: u32 = u32::MAX;

/// The QEMU to test with: `TLBRIDGE_QEMU`, the one that `cargo xtask lab` has made, or one on PATH, if it has
/// the device.
///
/// # Errors
/// Why there is none: the reason of a visible skip.
pub fn find() -> Result<PathBuf, String> {
    lab::Lab::locate()
        .and_then(|lab| lab.find_qemu())
        .map_err(|error| format!("{error:#}"))
}

/// A running QEMU. Dropping it ends it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    qtest: BufReader<UnixStream>,
    qmp: Qmp,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

/// QEMU has ended, or said something that is no answer.
#[derive(Debug)]
pub struct Gone(pub String);

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Gone {}

impl From<QmpError> for Gone {
    fn from(error: QmpError) -> Self {
        Self(error.to_string())
    }
}

impl From<io::Error> for Gone {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// How guest memory is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// A memfd, shared: what a vfio-user device wants.
    Shared,
    /// A memfd, `share=off`: QEMU gives no file descriptor away.
    Private,
    /// Anonymous memory, as QEMU does by itself.
    Anonymous,
}

impl Qemu {
    /// Starts a q35 machine of 256 MiB with these further arguments.
    ///
    /// # Errors
    /// It does not start: what it said.
    pub fn start(program: &Path, memory: Memory, arguments: &[String]) -> Result<Self, Gone> {
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name);
        let (qtest, qmp) = (UnixListener::bind(at("qtest"))?, UnixListener::bind(at("qmp"))?);
        let log = at("qemu.log");
        let mut command = Command::new(program);
        command
            .args(["-accel", "qtest", "-display", "none", "-nodefaults", "-m", "256M"])
            .arg("-qtest")
            .arg(format!("unix:{}", at("qtest").display()))
            .args(["-qtest-log", "/dev/null"])
            .arg("-qmp")
            .arg(format!("unix:{}", at("qmp").display()));
        match memory {
            Memory::Anonymous => command.args(["-M", "q35"]),
            with_file => command
                .args(["-M", "q35,memory-backend=mem0", "-object"])
                .arg(format!(
                    "memory-backend-memfd,id=mem0,size=256M,share={}",
                    if with_file == Memory::Shared { "on" } else { "off" }
                )),
        };
        let child = command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let mut child = Ended(Some(child));
        let mut accept = |listener: &UnixListener| -> Result<UnixStream, Gone> {
            let deadline = Instant::now() + PATIENCE;
            listener.set_nonblocking(true)?;
            loop {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false)?;
                        stream.set_read_timeout(Some(PATIENCE))?;
                        return Ok(stream);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e.into()),
                }
                let process = child.0.as_mut().expect("not taken yet");
                if process.try_wait()?.is_some() || Instant::now() > deadline {
                    let said = std::fs::read_to_string(&log).unwrap_or_default();
                    return Err(Gone(format!("QEMU does not start: {said}")));
                }
                // Either it connects or it ends: looking at both in turns.
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let (qmp, qtest) = (accept(&qmp)?, accept(&qtest)?);
        let qmp = Qmp::new(qmp)?;
        Ok(Self {
            child: child.0.take().expect("not taken yet"),
            qtest: BufReader::new(qtest),
            qmp,
            log,
            _directory: directory,
        })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard error.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("waitpid") {
                return status;
            }
            assert!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A QMP command; its `return`.
    ///
    /// # Errors
    /// QEMU has ended, or answers with an error.
    pub fn qmp(&mut self, command: &str, arguments: &Value) -> Result<Value, Gone> {
        self.qmp.execute(command, arguments).map_err(|e| self.gone(&e))
    }

    /// Waits for an event about a device (or any, with "").
    ///
    /// # Errors
    /// QEMU has ended, or the event does not come.
    pub fn event(&mut self, name: &str, device: &str) -> Result<(), Gone> {
        match self.qmp.event(name, device) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.gone(&error)),
        }
    }

    fn gone(&self, error: &QmpError) -> Gone {
        Gone(format!("{error}; QEMU said: {}", self.said()))
    }

    /// A qtest command; the number that it answers (0 if none).
    ///
    /// # Errors
    /// QEMU has ended, or refuses.
    pub fn qtest(&mut self, command: &str) -> Result<u64, Gone> {
        self.qtest
            .get_mut()
            .write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        let read = self.qtest.read_line(&mut line);
        if !matches!(read, Ok(1..)) {
            return Err(Gone(format!("no answer ({read:?}); QEMU said: {}", self.said())));
        }
        let rest = line
            .trim()
            .strip_prefix("OK")
            .ok_or_else(|| Gone(format!("{command}: {line}")))?
            .trim();
        if rest.is_empty() {
            return Ok(0);
        }
        let digits = rest.strip_prefix("0x").unwrap_or(rest);
        u64::from_str_radix(digits, 16).map_err(|e| Gone(format!("{command}: {line}: {e}")))
    }

    fn select(&mut self, (bus, device): (u8, u8), offset: u8) -> Result<u32, Gone> {
        let address = 0x8000_0000 | u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(offset & !3);
        self.qtest(&format!("outl 0xcf8 {address:#x}"))?;
        Ok(0xcfc + u32::from(offset & 3))
    }

    /// Reads 32 bits of config space, as a processor does (ports 0xcf8 and 0xcfc).
    ///
    /// # Errors
    /// [`Gone`].
    pub fn config_read(&mut self, slot: (u8, u8), offset: u8) -> Result<u32, Gone> {
        let port = self.select(slot, offset)?;
        Ok(self.qtest(&format!("inl {port:#x}"))? as u32)
    }

    /// Writes 32 bits of config space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn config_write(&mut self, slot: (u8, u8), offset: u8, value: u32) -> Result<(), Gone> {
        let port = self.select(slot, offset)?;
        self.qtest(&format!("outl {port:#x} {value:#x}")).map(|_| ())
    }

    /// Writes 16 bits of config space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn config_write16(&mut self, slot: (u8, u8), offset: u8, value: u16) -> Result<(), Gone> {
        let port = self.select(slot, offset)?;
        self.qtest(&format!("outw {port:#x} {value:#x}")).map(|_| ())
    }

    /// Reads 32 bits of memory space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn read32(&mut self, address: u64) -> Result<u32, Gone> {
        Ok(self.qtest(&format!("readl {address:#x}"))? as u32)
    }

    /// Reads 64 bits of memory space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn read64(&mut self, address: u64) -> Result<u64, Gone> {
        self.qtest(&format!("readq {address:#x}"))
    }

    /// Writes 32 bits of memory space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn write32(&mut self, address: u64, value: u32) -> Result<(), Gone> {
        self.qtest(&format!("writel {address:#x} {value:#x}")).map(|_| ())
    }

    /// Writes 64 bits of memory space.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn write64(&mut self, address: u64, value: u64) -> Result<(), Gone> {
        self.qtest(&format!("writeq {address:#x} {value:#x}")).map(|_| ())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a QEMU that did not get as far as a [`Qemu`].
struct Ended(Option<Child>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
