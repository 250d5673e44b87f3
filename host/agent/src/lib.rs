//! The agent in an application: exact invalidation of covered calls, device-visible memory, GRU contexts, and
//! (in another process) the sleeping subscriber's side.
//!
//! * [`Agent::attach`] connects this process to a host daemon, one attachment at a time.
//! * The covered calls ([`Agent::munmap`] and so on) return when no device can reach the old pages any more,
//!   and answer with the generation that this happened at. When nothing is cached of a range they talk to
//!   nobody. They may be used in signal handlers. [`raw`] has the plain system calls.
//! * [`Agent::memory`] makes memory that devices may reach; [`GruContext`] lets the GRU compute on it.
//! * After a fork the child is not attached: its calls are plain system calls until it attaches by itself.
//! * When the daemon dies, calls over ranges that a device may have cached wait until the device has stopped
//!   too (it resets by itself, or is killed after the fence timeout); then every call is the plain one.
//!
//! Not implemented: giving a memory back to the daemon before the session ends (the protocol has no such
//! request), coverage of `process_madvise` and `remap_file_pages` (the safety net sees them), page sizes other
//! than 4096.

mod attach;
mod call;
mod context;
mod control;
pub mod covered;
mod error;
mod fence;
mod files;
mod intervals;
mod lock;
mod mailbox;
pub mod peer;
mod range_lock;
pub mod raw;
mod state;
mod sys;
mod watchdog;

pub use attach::UNREGISTER_MAX_WP;
pub use context::GruContext;
pub use error::{AgentError, Gone};
pub use protos::bridge::control::FaultMode;
pub use protos::gru::cb::Instruction;

use protos::bridge::control::{Reply, Request};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Result of the agent's own operations.
pub type Result<T> = std::result::Result<T, AgentError>;

/// Where to attach and under which name.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// Path of the daemon's socket.
    pub socket: PathBuf,
    /// Name for messages and statistics.
    pub name: String,
}

/// Result of a covered call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Covered<T> {
    /// What the system call returned.
    pub value: T,
    /// The call's generation: translations of the range with a smaller tag are stale since its return.
    pub generation: u64,
}

/// Counters of the agent, since it attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Covered calls (each range of a call counts).
    pub calls: u64,
    /// Of those: told to the daemon.
    pub hops: u64,
    /// Ranges that were left to the event path.
    pub event_path: u64,
    /// Failed userfaultfd registrations (the range is covered by this library only).
    pub register_failed: u64,
    /// Failed userfaultfd unregistrations (left to the event path).
    pub unregister_failed: u64,
    /// Ranges that did not fit the interval table (left to the event path).
    pub interval_overflow: u64,
    /// Waits for an overlapping covered call.
    pub lock_waits: u64,
    /// Futex sleeps while waiting for the daemon.
    pub hop_sleeps: u64,
    /// Files that the daemon did not want to know (their mappings are not device-visible).
    pub files_refused: u64,
}

/// What the daemon knows about a piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryId {
    /// Number of the file in the session.
    pub memory: u32,
    /// Its address in the device's IOVA space.
    pub iova: u64,
}

/// Device-visible memory: a sealed memfd that the daemon knows.
#[derive(Debug)]
pub struct Memory {
    fd: OwnedFd,
    len: u64,
    id: MemoryId,
}

impl Memory {
    /// The memfd, for mappings.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The memfd. Mappings of it stay device-visible.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
    /// What the daemon calls it.
    #[must_use]
    pub fn id(&self) -> MemoryId {
        self.id
    }
}

/// What a context is to be.
#[derive(Debug, Clone)]
pub struct ContextOptions {
    /// Control blocks (rounded up to 2).
    pub cbs: u32,
    /// Data segment bytes (rounded up to 1024).
    pub ds_bytes: u32,
    /// Who serves misses.
    pub fault_mode: FaultMode,
}

/// A finished instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Old value of an atomic.
    pub avalue: u64,
    /// Smallest generation of the translations it used; `u64::MAX` if none.
    pub tag: u64,
}

/// A failed instruction.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the instruction failed: opc {opc:#x} exopc {exopc:#x} ecause {ecause:#x} at {exceptdet0:#x}")]
pub struct GruException {
    /// Operation code.
    pub opc: u32,
    /// Extended operation code.
    pub exopc: u32,
    /// Cause bits.
    pub ecause: u32,
    /// Address the instruction had reached.
    pub exceptdet0: u64,
    /// Low half of idef3upd.
    pub exceptdet1: u32,
    /// CBE state.
    pub cbrstate: u32,
    /// CBE execution status bits.
    pub cbrexecstatus: u32,
}

/// Why an instruction did not complete.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The device raised an exception.
    #[error(transparent)]
    Exception(#[from] GruException),
    /// The agent or a peer.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// The attachment of this process to a host daemon. One at a time.
#[derive(Debug)]
pub struct Agent {
    _private: (),
}

static AGENT: Agent = Agent { _private: () };

/// The attachment, if there is one (never in a forked child that has not attached by itself). It is still
/// there when the daemon has died: see [`Agent::alive`].
#[must_use]
pub fn current() -> Option<&'static Agent> {
    let state = state::state()?;
    matches!(
        state.phase(),
        state::phase::ATTACHED | state::phase::FENCING | state::phase::GONE
    )
    .then_some(&AGENT)
}

/// Whether this process may create a userfaultfd with the features the bridge needs.
///
/// # Errors
/// What is missing and which permission or sysctl to set.
pub fn userfaultfd_available() -> Result<()> {
    sys::userfaultfd().map(drop)
}

fn os<T>(result: covered::Outcome<T>) -> io::Result<Covered<T>> {
    result.map_err(io::Error::from_raw_os_error)
}

fn attached() -> Result<&'static state::State> {
    current()
        .and_then(|_| state::state())
        .ok_or(AgentError::NotAttached)
}

#[allow(
    unsafe_code,
    reason = "mapping calls can pull memory away from under references"
)]
impl Agent {
    /// Attach this process to the daemon. Mappings that exist already are not registered with the safety
    /// net; the covered calls cover them all the same.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn attach(options: &AttachOptions) -> Result<&'static Self> {
        attach::attach(&AGENT, options)
    }
    /// End the attachment: returns when the daemon has taken every translation back (or is gone) and no
    /// covered call is inside. Contexts answer with errors from then on. Not for signal handlers.
    ///
    /// # Errors
    /// Not attached.
    pub fn detach(&self) -> Result<()> {
        attach::detach()
    }
    /// The address space's generation now; 0 without an attachment.
    #[must_use]
    pub fn generation(&self) -> u64 {
        state::state()
            .and_then(state::State::table)
            .map_or(0, |t| t.header.generation.load(Ordering::SeqCst))
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let Some(state) = state::state() else {
            return Stats::default();
        };
        let c = &state.counters;
        Stats {
            calls: c.calls.load(Ordering::Relaxed),
            hops: c.hops.load(Ordering::Relaxed),
            event_path: c.event_path.load(Ordering::Relaxed),
            register_failed: c.register_failed.load(Ordering::Relaxed),
            unregister_failed: c.unregister_failed.load(Ordering::Relaxed),
            interval_overflow: c.interval_overflow.load(Ordering::Relaxed),
            lock_waits: state.calls.waits.load(Ordering::Relaxed),
            hop_sleeps: c.hop_sleeps.load(Ordering::Relaxed),
            files_refused: c.files_refused.load(Ordering::Relaxed),
        }
    }
    /// Whether daemon and device are there.
    ///
    /// # Errors
    /// Who is gone and why.
    pub fn alive(&self) -> std::result::Result<(), Gone> {
        let Some(state) = state::state() else {
            return Err(Gone {
                who: "host daemon".into(),
                why: "this process is not attached".into(),
            });
        };
        if state.phase() == state::phase::ATTACHED
            && state.device_lost.load(Ordering::Acquire) == 0
            && !fence::daemon_dead(state)
        {
            return Ok(());
        }
        Err(control::gone(state))
    }
    /// Statistics of the daemon, as a JSON object.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn daemon_stats(&self) -> Result<String> {
        let what = "reading the daemon's statistics";
        match control::request(attached()?, what, &Request::Stats, &[])?.0 {
            Reply::Stats { stats } => Ok(stats),
            _ => Err(other_kind(what)),
        }
    }
    /// New device-visible memory of `len` bytes (rounded up to pages): a memfd, sealed against resizing and
    /// known to the daemon. Its pages are allocated at once when the daemon uses userfaultfd's missing mode,
    /// because there a page that is not allocated when it is touched is a fault for the daemon.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn memory(&self, len: u64, name: &str) -> Result<Memory> {
        let memory = self.memory_sparse(len, name)?;
        if attached()?.register_mode() == sys::RegisterMode::Missing {
            let mode = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&memory.fd, mode, 0, memory.len).map_err(|e| AgentError::System {
                what: "allocating the pages of a memfd",
                source: e.into(),
            })?;
        }
        Ok(memory)
    }
    /// As [`Agent::memory`], without allocating pages.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn memory_sparse(&self, len: u64, name: &str) -> Result<Memory> {
        attached()?;
        let invalid = |what, why| AgentError::Invalid { what, why };
        let name = CString::new(name).map_err(|_| invalid("memory name", "contains a zero byte"))?;
        let len = len
            .checked_next_multiple_of(sys::PAGE)
            .filter(|&l| l != 0 && i64::try_from(l).is_ok())
            .ok_or_else(|| invalid("memory length", "zero or too large"))?;
        let fd = files::sealed_memfd(&name, len).map_err(|e| AgentError::System {
            what: "creating a memfd",
            source: io::Error::from_raw_os_error(e),
        })?;
        let id = self.add_memory(fd.as_fd(), len)?;
        Ok(Memory { fd, len, id })
    }
    /// Make `len` bytes of a memfd or tmpfs file known to the daemon; covered mappings of it are
    /// device-visible from then on. Seal it against resizing, see [`Agent::memory`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn add_memory(&self, fd: BorrowedFd<'_>, len: u64) -> Result<MemoryId> {
        let state = attached()?;
        files::announce(state, fd.as_raw_fd(), len).map_err(|e| control::explain(state, "adding memory", e))
    }
    /// Register a range that raw calls mapped with the safety net (userfaultfd). The range's translations
    /// are purged.
    ///
    /// # Errors
    /// The kernel's: EBUSY for a range that another userfaultfd has, EPERM for a read-only file, EINVAL for
    /// other memory than anonymous or shared memory.
    pub fn register(&self, addr: usize, len: usize) -> io::Result<()> {
        covered::register(addr as u64, len as u64).map_err(io::Error::from_raw_os_error)
    }
    /// The opposite of [`Agent::register`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn unregister(&self, addr: usize, len: usize) -> io::Result<()> {
        covered::unregister(addr as u64, len as u64).map_err(io::Error::from_raw_os_error)
    }
    /// The range may be discarded by the daemon's reclaimer at any time.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn set_purgeable(&self, range: std::ops::Range<usize>) -> Result<()> {
        let what = "making memory purgeable";
        let request = Request::SetPurgeable {
            start: range.start as u64,
            end: range.end as u64,
        };
        match control::request(attached()?, what, &request, &[])?.0 {
            Reply::Done => Ok(()),
            _ => Err(other_kind(what)),
        }
    }
    /// A GRU context on this process' address space.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn create_context(&self, options: &ContextOptions) -> Result<GruContext> {
        context::create(None, options)
    }
    /// A GRU context on the address space of process `pid` (tools of the same user).
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn create_context_on(&self, pid: u32, options: &ContextOptions) -> Result<GruContext> {
        context::create(Some(pid), options)
    }
    /// Covered mmap. `addr` is the hint or, with `MAP_FIXED`, the address.
    ///
    /// # Safety
    /// As mmap: with `MAP_FIXED` the range is replaced.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn mmap(
        &self,
        addr: usize,
        len: usize,
        prot: i32,
        flags: i32,
        fd: Option<BorrowedFd<'_>>,
        offset: u64,
    ) -> io::Result<Covered<usize>> {
        let fd = fd.map_or(-1, |f| f.as_raw_fd());
        // SAFETY: the caller's promise.
        os(unsafe { covered::mmap(addr, len, prot, flags, fd, offset) })
    }
    /// Covered munmap.
    ///
    /// # Safety
    /// As munmap: nothing may refer to the range.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn munmap(&self, addr: usize, len: usize) -> io::Result<Covered<()>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::munmap(addr, len) })
    }
    /// Covered mremap. `new_addr` is used with `MREMAP_FIXED` only.
    ///
    /// # Safety
    /// As mremap: nothing may refer to the old range.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn mremap(
        &self,
        old: usize,
        old_len: usize,
        new_len: usize,
        flags: i32,
        new_addr: usize,
    ) -> io::Result<Covered<usize>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::mremap(old, old_len, new_len, flags, new_addr) })
    }
    /// Covered madvise.
    ///
    /// # Safety
    /// As madvise: content may be discarded.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn madvise(&self, addr: usize, len: usize, advice: i32) -> io::Result<Covered<()>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::madvise(addr, len, advice) })
    }
    /// Covered mprotect.
    ///
    /// # Safety
    /// As mprotect.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn mprotect(&self, addr: usize, len: usize, prot: i32) -> io::Result<Covered<()>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::mprotect(addr, len, prot) })
    }
    /// Covered shmat.
    ///
    /// # Safety
    /// As shmat: `SHM_REMAP` replaces mappings.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn shmat(&self, id: i32, addr: usize, flags: i32) -> io::Result<Covered<usize>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::shmat(id, addr, flags) })
    }
    /// Covered shmdt.
    ///
    /// # Safety
    /// As shmdt: nothing may refer to the segment.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn shmdt(&self, addr: usize) -> io::Result<Covered<()>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::shmdt(addr) })
    }
    /// Covered brk. Returns the break.
    ///
    /// # Safety
    /// As brk: nothing may refer to what is cut off.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn brk(&self, addr: usize) -> io::Result<Covered<usize>> {
        // SAFETY: the caller's promise.
        os(unsafe { covered::brk(addr) })
    }
}

fn other_kind(what: &'static str) -> AgentError {
    AgentError::Protocol {
        what,
        why: "an answer of another kind".into(),
    }
}
