//! A real server on a real socket, a hostile session, and what must be true afterwards.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use protos::vfio_user::{Command, Header, MessageFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use zerocopy::FromBytes;

use super::actions::{
    Action, Delivery, Ending, FileCount, Files, IrqFlags, Kind, MAX_DATA, Opening, Session, Step, frame,
};
use super::model::{FuzzModel, VENDOR};
use super::peer::{Peer, Seen};

/// Memory that the process may gain over its size after [`WARM_UP`] sessions, in bytes: many times what a
/// message of [`MAX_DATA`] bytes can ask for, and far below what an unchecked size can.
const MEMORY_LIMIT: u64 = 96 << 20;
const WARM_UP: u64 = 200;
/// Far longer than anything takes on a busy machine; only a server that hangs gets there.
const PATIENCE: Duration = Duration::from_secs(30);
const MEMORY_PAGES: u64 = 16;
const VERSION: &[u8] = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":16,\"write_multiple\":true}}\0";

/// What the server must not do, and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Violation {}

impl From<io::Error> for Violation {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<rustix::io::Errno> for Violation {
    fn from(errno: rustix::io::Errno) -> Self {
        Self(errno.to_string())
    }
}

/// A server that is being fuzzed.
#[derive(Debug)]
pub struct Live {
    path: PathBuf,
    stop: StopFd,
    thread: Option<JoinHandle<io::Result<()>>>,
    kit: Kit,
    /// Open file descriptors while one good client is connected.
    fds: usize,
    sessions: u64,
    resident: u64,
    memory_is_watched: bool,
    _directory: tempfile::TempDir,
}

/// File descriptors to send. The same ones for all sessions, but for the memory.
#[derive(Debug)]
struct Kit {
    sealed: OwnedFd,
    event: OwnedFd,
    full: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    directory: OwnedFd,
    socket: OwnedFd,
}

impl Kit {
    fn new() -> Result<Self, Violation> {
        let sealed = memfd_create("fuzz-sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&sealed, MEMORY_PAGES << 12)?;
        fcntl_add_seals(&sealed, SealFlags::SHRINK | SealFlags::GROW)?;
        let full = eventfd(0, EventfdFlags::CLOEXEC)?;
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
        Ok(Self {
            sealed,
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            full,
            pipe: rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?,
            directory: std::fs::File::open("/")?.into(),
            socket: UnixStream::pair()?.0.into(),
        })
    }

    /// What the open file descriptors are. Without pipes that are not this kit's: an instrumented process talks
    /// to a symbolizer by some, from its first finding on.
    fn open_files(&self) -> Result<Vec<String>, Violation> {
        let ours = std::fs::read_link(format!("/proc/self/fd/{}", self.pipe.0.as_raw_fd()))?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fd")? {
            let target = std::fs::read_link(entry?.path()).unwrap_or_default();
            let name = target.display().to_string();
            if target == ours || !name.starts_with("pipe:") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn get<'a>(&'a self, kind: Kind, memory: &'a OwnedFd) -> BorrowedFd<'a> {
        match kind {
            Kind::Memory => memory.as_fd(),
            Kind::Sealed => self.sealed.as_fd(),
            Kind::Event => self.event.as_fd(),
            Kind::FullEvent => self.full.as_fd(),
            Kind::Pipe => self.pipe.1.as_fd(),
            Kind::Directory => self.directory.as_fd(),
            Kind::Socket => self.socket.as_fd(),
        }
    }
}

impl Live {
    /// Starts a server around a [`FuzzModel`].
    ///
    /// # Errors
    /// What the system refuses, or a server that does not serve even a good client.
    pub fn start() -> Result<Self, Violation> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("fuzz.sock");
        let function =
            Function::new(|context| Ok::<_, Infallible>(FuzzModel::new(context) as Arc<dyn Model>))
                .map_err(|e| Violation(e.to_string()))?;
        #[allow(clippy::needless_update)] // Limits are added.
        let options = ServerOptions {
            max_data_xfer_size: MAX_DATA,
            client_timeout: Duration::from_secs(10),
            // A client that does not answer keeps the server for that long.
            dma_timeout: Duration::from_millis(50),
            ..ServerOptions::default()
        };
        let server = Server::bind(&path, function, options).map_err(|e| Violation(e.to_string()))?;
        let stop = StopFd::new()?;
        let for_thread = stop.clone();
        let thread = std::thread::spawn(move || server.run(&for_thread));
        let mut live = Self {
            path,
            stop,
            thread: Some(thread),
            kit: Kit::new()?,
            fds: 0,
            sessions: 0,
            resident: 0,
            memory_is_watched: true,
            _directory: directory,
        };
        // What the process makes once, at its first interrupt, is no leak of a session.
        let step = |action| Step {
            action,
            delivery: Delivery::Whole,
        };
        live.session(&Session {
            version: Opening::Ready,
            serving: super::actions::Serving::Good,
            steps: vec![
                step(Action::Irqs {
                    flags: IrqFlags::Pair(2, 2),
                    index: 0,
                    start: 0,
                    count: 1,
                    files: Files {
                        kind: Kind::Event,
                        count: FileCount::Right,
                    },
                }),
                step(Action::Raise(0)),
            ],
            ending: Ending::Clean,
        })?;
        live.fds = live.good_client()?;
        Ok(live)
    }

    /// Leaves the memory to libFuzzer: an instrumented process does not give back what is freed.
    #[must_use]
    pub fn without_memory_check(mut self) -> Self {
        self.memory_is_watched = false;
        self
    }

    /// Runs a session and checks that the server is as before. The combinations of command, errno and size
    /// that were answered.
    ///
    /// # Errors
    /// [`Violation`]: what the server did wrong. It should not be used any more then.
    pub fn run(&mut self, session: &Session) -> Result<BTreeSet<Seen>, Violation> {
        let seen = self.session(session)?;
        let fds = self.good_client()?;
        if fds != self.fds {
            return Err(Violation(format!(
                "{fds} file descriptors are open, before the session it were {}: {}",
                self.fds,
                self.kit.open_files()?.join(" ")
            )));
        }
        self.sessions += 1;
        if self.sessions == WARM_UP {
            self.resident = resident()?;
        } else if self.memory_is_watched && self.sessions > WARM_UP && self.sessions.is_multiple_of(64) {
            let now = resident()?;
            if now > self.resident + MEMORY_LIMIT {
                return Err(Violation(format!(
                    "{} MiB of memory are in use, after {WARM_UP} sessions it were {}",
                    now >> 20,
                    self.resident >> 20
                )));
            }
        }
        Ok(seen)
    }

    /// Stops the server.
    ///
    /// # Errors
    /// It panicked, or failed.
    pub fn finish(mut self) -> Result<(), Violation> {
        self.stop.stop();
        match self.thread.take().expect("not joined before").join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Violation(format!("the server failed: {error}"))),
            Err(_) => Err(Violation("the server panicked".into())),
        }
    }

    fn session(&self, session: &Session) -> Result<BTreeSet<Seen>, Violation> {
        let memory = memfd_create("fuzz-memory", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, MEMORY_PAGES << 12)?;
        let mut peer = Peer::connect(&self.path, session.serving)?;
        if session.version != Opening::Silent {
            peer.send(
                &frame(0, Command::VERSION, MessageFlags::COMMAND, VERSION),
                &[],
                false,
            )?;
            peer.await_answer(PATIENCE)?;
        }
        if matches!(session.version, Opening::Ready | Opening::ReadyToo) {
            // Command register: memory space, bus mastering.
            let body = [4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0, 6, 0];
            peer.send(
                &frame(1, Command::REGION_WRITE, MessageFlags::COMMAND, &body),
                &[],
                false,
            )?;
            peer.await_answer(PATIENCE)?;
        }
        for (id, step) in (2..).zip(&session.steps) {
            if peer.over {
                break;
            }
            self.step(&mut peer, id, step, &memory)?;
        }
        match session.ending {
            Ending::Clean => {
                peer.send(&[], &[], true)?;
                let _ = peer.socket.shutdown(Shutdown::Write);
                peer.drain_to_the_end(PATIENCE)?;
            }
            Ending::Abrupt => {}
            Ending::Cut => peer.send(
                &frame(9, Command::REGION_READ, MessageFlags::COMMAND, &[])[..10],
                &[],
                false,
            )?,
        }
        Ok(std::mem::take(&mut peer.seen))
    }

    fn step(&self, peer: &mut Peer, id: u16, step: &Step, memory: &OwnedFd) -> Result<(), Violation> {
        match &step.action {
            Action::Truncate(pages) => {
                ftruncate(memory, u64::from(pages % 32) << 12)?;
                return Ok(());
            }
            Action::Drain(bytes) => return peer.drain(usize::from(*bytes)).map(|_| ()),
            Action::Pause(n) => {
                // Not for synchronisation: the server gets a different distance ahead.
                std::thread::sleep(Duration::from_micros(u64::from(*n) * 8));
                return Ok(());
            }
            Action::SecondClient => {
                let mut second = Peer::connect(&self.path, super::actions::Serving::Silent)?;
                return second.send(
                    &frame(0, Command::VERSION, MessageFlags::COMMAND, VERSION),
                    &[],
                    true,
                );
            }
            Action::Shutdown { write, rarely } => {
                if *rarely < 16 {
                    let how = if *write { Shutdown::Write } else { Shutdown::Read };
                    let _ = peer.socket.shutdown(how);
                }
                return Ok(());
            }
            _ => {}
        }
        let Some(wire) = step.action.wire(id) else {
            return Ok(());
        };
        let (mut bytes, files) = (wire.bytes, wire.files);
        let fds: Vec<BorrowedFd<'_>> =
            files.map_or_else(Vec::new, |(kind, count)| vec![self.kit.get(kind, memory); count]);
        let end = bytes.len();
        match step.delivery {
            Delivery::Whole => peer.send(&bytes, &fds, true),
            Delivery::Unread => peer.send(&bytes, &fds, false),
            Delivery::Glued if fds.is_empty() => {
                peer.glue(&bytes);
                Ok(())
            }
            Delivery::Glued => peer.send(&bytes, &fds, false),
            Delivery::Pieces(size) => {
                let size = (usize::from(size) + 1).max(end / 64);
                for (index, piece) in bytes.chunks(size).enumerate() {
                    peer.send(piece, if index == 0 { &fds } else { &[] }, true)?;
                }
                Ok(())
            }
            Delivery::LateFds(at) => {
                let at = usize::from(at).min(end);
                peer.send(&bytes[..at], &[], false)?;
                peer.send(&bytes[at..], &fds, true)
            }
            Delivery::Cut(part) => peer.send(&bytes[..end * usize::from(part) / 256], &fds, true),
            Delivery::WrongSize(off) => {
                if let Some(field) = bytes.get_mut(4..8) {
                    let size = (end as u32).wrapping_add_signed(i32::from(off));
                    field.copy_from_slice(&size.to_ne_bytes());
                }
                peer.send(&bytes, &fds, true)
            }
            Delivery::Size(size) => {
                if let Some(field) = bytes.get_mut(4..8) {
                    field.copy_from_slice(&size.to_ne_bytes());
                }
                peer.send(&bytes, &fds, true)
            }
            Delivery::Flip(at, value) => {
                if end > 0 {
                    bytes[usize::from(at) % end] ^= value;
                }
                peer.send(&bytes, &fds, true)
            }
        }
    }

    /// A client as it should be: it is served, and reads the identity. The file descriptors that are open
    /// while it is connected.
    fn good_client(&self) -> Result<usize, Violation> {
        let mut socket = UnixStream::connect(&self.path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut ask = |id, command, body: &[u8]| -> Result<Vec<u8>, Violation> {
            let what = |e: io::Error| Violation(format!("a good client's {command} is not answered: {e}"));
            socket
                .write_all(&frame(id, command, MessageFlags::COMMAND, body))
                .map_err(what)?;
            let mut head = [0; Header::SIZE];
            socket.read_exact(&mut head).map_err(what)?;
            let header = Header::read_from_bytes(&head).expect("16 bytes");
            if header.message_id != id || header.flags != MessageFlags::REPLY || header.command != command {
                return Err(Violation(format!("a good client's {command} gets {header:?}")));
            }
            let len = header
                .payload_len(Header::SIZE + 4096)
                .map_err(|e| Violation(e.to_string()))?;
            let mut payload = vec![0; len];
            socket.read_exact(&mut payload).map_err(what)?;
            Ok(payload)
        };
        ask(0, Command::VERSION, VERSION)?;
        let identity = ask(
            1,
            Command::REGION_READ,
            &[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0, 0],
        )?;
        if identity.get(16..18) != Some(&VENDOR.to_le_bytes()[..]) {
            return Err(Violation(format!(
                "a good client reads the identity {identity:x?}"
            )));
        }
        let register = ask(
            2,
            Command::REGION_READ,
            &[4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0],
        )?;
        if register.get(16..18) != Some(&[0, 0]) {
            return Err(Violation(format!(
                "the command register was not reset: {register:x?}"
            )));
        }
        Ok(self.kit.open_files()?.len())
    }
}

fn resident() -> Result<u64, Violation> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    Ok(pages.ok_or(Violation("/proc/self/statm has no second field".into()))? * 4096)
}
