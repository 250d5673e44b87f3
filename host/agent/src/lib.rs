//! The agent in an application: exact invalidation of covered calls, GRU contexts, peers.
mod error;
pub mod peer;
pub mod raw;

pub use error::{AgentError, Gone};
pub use protos::bridge::control::FaultMode;
pub use protos::gru::cb::Instruction;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

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
        use std::os::fd::AsFd;
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

/// A GRU context of this process.
#[derive(Debug)]
pub struct GruContext {
    _private: (),
}

impl GruContext {
    /// Control blocks granted.
    #[must_use]
    pub fn cbs(&self) -> u32 {
        0
    }
    /// Data segment bytes granted.
    #[must_use]
    pub fn ds_bytes(&self) -> u32 {
        0
    }
    /// Issue an instruction on a control block and wait for its end. `&self`: several threads may use
    /// different control blocks of one context.
    ///
    /// # Errors
    /// The device's exception, or a peer that died.
    pub fn execute(
        &self,
        _cb: u32,
        _instruction: &Instruction,
    ) -> std::result::Result<Completion, ExecuteError> {
        Err(AgentError::NotAttached.into())
    }
    /// Write to the data segment at byte `offset`.
    ///
    /// # Errors
    /// Out of range, or a peer that died.
    pub fn ds_write(&self, _offset: u32, _data: &[u8]) -> Result<()> {
        Err(AgentError::NotAttached)
    }
    /// Read from the data segment at byte `offset`.
    ///
    /// # Errors
    /// Out of range, or a peer that died.
    pub fn ds_read(&self, _offset: u32, _data: &mut [u8]) -> Result<()> {
        Err(AgentError::NotAttached)
    }
}

/// The attachment of this process to a host daemon. One at a time.
#[derive(Debug)]
pub struct Agent {
    _private: (),
}

/// The attachment, if there is one (never in a forked child that has not attached by itself).
#[must_use]
pub fn current() -> Option<&'static Agent> {
    None
}

#[allow(
    unsafe_code,
    reason = "mapping calls can pull memory away from under references"
)]
impl Agent {
    /// Attach this process to the daemon.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn attach(_options: &AttachOptions) -> Result<&'static Self> {
        Err(AgentError::NotAttached)
    }
    /// End the attachment: waits for the covered calls in progress.
    ///
    /// # Errors
    /// Not attached.
    pub fn detach(&self) -> Result<()> {
        Err(AgentError::NotAttached)
    }
    /// The address space's generation now.
    #[must_use]
    pub fn generation(&self) -> u64 {
        0
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
    /// Whether daemon and device are there.
    ///
    /// # Errors
    /// Who is gone and why.
    pub fn alive(&self) -> std::result::Result<(), Gone> {
        Ok(())
    }
    /// Statistics of the daemon, as a JSON object.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn daemon_stats(&self) -> Result<String> {
        Err(AgentError::NotAttached)
    }
    /// New device-visible memory of `len` bytes (rounded up to pages): memfd, sealed against resizing,
    /// known to the daemon.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn memory(&self, _len: u64, _name: &str) -> Result<Memory> {
        Err(AgentError::NotAttached)
    }
    /// Make `len` bytes of a memfd known to the daemon.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn add_memory(&self, _fd: BorrowedFd<'_>, _len: u64) -> Result<MemoryId> {
        Err(AgentError::NotAttached)
    }
    /// Register a range that raw calls mapped with the safety net (userfaultfd).
    ///
    /// # Errors
    /// The kernel's.
    pub fn register(&self, _addr: usize, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::NotConnected.into())
    }
    /// The opposite of [`Agent::register`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn unregister(&self, _addr: usize, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::NotConnected.into())
    }
    /// The range may be discarded by the daemon's reclaimer at any time.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn set_purgeable(&self, _range: std::ops::Range<usize>) -> Result<()> {
        Err(AgentError::NotAttached)
    }
    /// A GRU context on this process' address space.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn create_context(&self, _options: &ContextOptions) -> Result<GruContext> {
        Err(AgentError::NotAttached)
    }
    /// A GRU context on the address space of process `pid` (tools of the same user).
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn create_context_on(&self, _pid: u32, _options: &ContextOptions) -> Result<GruContext> {
        Err(AgentError::NotAttached)
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
        let _ = (addr, len, prot, flags, fd, offset);
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered munmap.
    ///
    /// # Safety
    /// As munmap: nothing may refer to the range.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn munmap(&self, addr: usize, len: usize) -> io::Result<Covered<()>> {
        let _ = (addr, len);
        Err(io::ErrorKind::NotConnected.into())
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
        let _ = (old, old_len, new_len, flags, new_addr);
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered madvise.
    ///
    /// # Safety
    /// As madvise: content may be discarded.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn madvise(&self, addr: usize, len: usize, advice: i32) -> io::Result<Covered<()>> {
        let _ = (addr, len, advice);
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered mprotect.
    ///
    /// # Safety
    /// As mprotect.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn mprotect(&self, addr: usize, len: usize, prot: i32) -> io::Result<Covered<()>> {
        let _ = (addr, len, prot);
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered shmat.
    ///
    /// # Safety
    /// As shmat: `SHM_REMAP` replaces mappings.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn shmat(&self, id: i32, addr: usize, flags: i32) -> io::Result<Covered<usize>> {
        let _ = (id, addr, flags);
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered shmdt.
    ///
    /// # Safety
    /// As shmdt: nothing may refer to the segment.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn shmdt(&self, addr: usize) -> io::Result<Covered<()>> {
        let _ = addr;
        Err(io::ErrorKind::NotConnected.into())
    }
    /// Covered brk. Returns the break.
    ///
    /// # Safety
    /// As brk: nothing may refer to what is cut off.
    ///
    /// # Errors
    /// Those of the system call.
    pub unsafe fn brk(&self, addr: usize) -> io::Result<Covered<usize>> {
        let _ = addr;
        Err(io::ErrorKind::NotConnected.into())
    }
}
