//! The agent's state: one mapping that is zero (detached) until attach, and zero again in a forked child.
#![allow(
    unsafe_code,
    reason = "the state lives in a mapping of its own, which fork wipes"
)]

use crate::intervals::{CAPACITY, Intervals};
use crate::lock::Locked;
use crate::range_lock::RangeLock;
use crate::sys::{self, RegisterMode};
use protos::bridge::control::MAX_PACKET;
use protos::bridge::shared::SharedTable;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Values of [`State::phase`], the wipe-on-fork word.
pub(crate) mod phase {
    /// No attachment: every call is the plain system call. What a forked child finds.
    pub const DETACHED: u32 = 0;
    /// attach() is at work.
    pub const ATTACHING: u32 = 1;
    /// Calls are covered.
    pub const ATTACHED: u32 = 2;
    /// The daemon is lost; calls over cached ranges wait until the device is known to have stopped.
    pub const FENCING: u32 = 3;
    /// Nothing reaches the memory any more: every call is the plain system call. Until detach.
    pub const GONE: u32 = 4;
}

/// Values of [`State::cause`].
pub(crate) mod cause {
    /// The daemon's pidfd became readable.
    pub const EXITED: u32 = 1;
    /// The daemon closed the session's sockets.
    pub const HUNG_UP: u32 = 2;
    /// The daemon said that the session ends.
    pub const CLOSED: u32 = 3;
    /// The daemon did not answer within the fence timeout.
    pub const SILENT: u32 = 4;
    /// This process detached.
    pub const DETACHED: u32 = 5;
}

/// A file that the daemon has been asked about.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct KnownFile {
    /// st_dev.
    pub dev: u64,
    /// st_ino.
    pub ino: u64,
    /// Bytes announced; 0 = the daemon refused it.
    pub len: u64,
}

/// Files that the daemon has been asked about. The daemon keeps each open, so an inode number is not reused.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct KnownFiles {
    len: usize,
    entries: [KnownFile; 512],
}

impl KnownFiles {
    /// What is known of a file.
    pub(crate) fn find(&self, dev: u64, ino: u64) -> Option<KnownFile> {
        self.entries[..self.len]
            .iter()
            .find(|f| f.dev == dev && f.ino == ino)
            .copied()
    }
    /// Whether another file can be remembered.
    pub(crate) fn has_room(&self) -> bool {
        self.len < self.entries.len()
    }
    /// Forget all of them.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }
    /// Remember a file; false = the table is full.
    pub(crate) fn set(&mut self, file: KnownFile) -> bool {
        let at = self.entries[..self.len]
            .iter()
            .position(|f| f.dev == file.dev && f.ino == file.ino)
            .unwrap_or(self.len);
        if at == self.entries.len() {
            return false;
        }
        self.entries[at] = file;
        self.len = self.len.max(at + 1);
        true
    }
}

/// Attached System V segments, by address (shmdt names no length).
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Segments {
    /// (address, length); length 0 = free.
    pub entries: [(u64, u64); 64],
}

/// Text of the last notice, for errors.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Reason {
    /// Bytes used.
    pub len: usize,
    /// UTF-8, cut.
    pub text: [u8; 512],
}

/// One packet of the control socket.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Packet {
    /// The bytes.
    pub bytes: [u8; MAX_PACKET],
}

/// Counters (statistics only: relaxed).
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Counters {
    pub calls: AtomicU64,
    pub hops: AtomicU64,
    pub event_path: AtomicU64,
    pub register_failed: AtomicU64,
    pub unregister_failed: AtomicU64,
    pub interval_overflow: AtomicU64,
    pub hop_sleeps: AtomicU64,
    pub hop_ns: AtomicU64,
    pub files_refused: AtomicU64,
}

/// Everything. All zero bytes are a valid value: detached.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct State {
    /// One of [`phase`].
    pub phase: AtomicU32,
    /// One of [`cause`]; 0 while all is well.
    pub cause: AtomicU32,
    /// detach() has asked the daemon to end the session.
    pub detaching: AtomicU32,
    /// When detach() asked; 0 = it has not.
    pub detaching_since_ms: AtomicU64,
    /// 1 while the watchdog runs (futex word).
    pub watchdog: AtomicU32,
    /// The device process is known to be gone.
    pub device_lost: AtomicU32,
    /// The daemon's side of the notice socket is closed.
    pub hung_up: AtomicU32,
    /// Number of this attachment in the process' life, from 1.
    pub attach_id: AtomicU64,
    /// The shared table. Never unmapped: see detach.
    pub table: AtomicPtr<SharedTable>,
    /// The BAR0 page with the device's reset count; null until a context was created.
    pub status_page: AtomicPtr<AtomicU32>,
    /// reset_count when the daemon was last known to be alive.
    pub reset_count: AtomicU32,
    /// Descriptors. 0 is not used: attach makes sure that none of them is 0.
    pub uffd: AtomicI32,
    pub control: AtomicI32,
    pub notice: AtomicI32,
    pub daemon_pidfd: AtomicI32,
    pub device_pidfd: AtomicI32,
    pub daemon_pid: AtomicU32,
    pub device_pid: AtomicU32,
    pub session: AtomicU32,
    /// 1 = missing mode, 0 = write-protect mode.
    pub missing_mode: AtomicU32,
    /// Spins before a thread that waits for the daemon sleeps.
    pub spins: AtomicU32,
    pub fence_timeout_ms: AtomicU64,
    /// When fencing began; 0 = not.
    pub fencing_since_ms: AtomicU64,
    /// When the daemon was seen to be dead; 0 = not.
    pub daemon_dead_ms: AtomicU64,
    /// When something about the fence was last said on standard error.
    pub said_ms: AtomicU64,
    /// Largest registered part of a range that is unregistered rather than left to the event path.
    pub unregister_max: AtomicU64,
    pub calls: RangeLock,
    /// Only one call at a time may hold two mailbox slots: 64 of them could starve each other.
    pub two_slots: Locked<()>,
    pub intervals: Locked<Intervals<CAPACITY>>,
    pub files: Locked<KnownFiles>,
    pub segments: Locked<Segments>,
    pub reason: Locked<Reason>,
    /// The control socket: whoever holds this may send a request and has to take its reply.
    pub packet: Locked<Packet>,
    pub counters: Counters,
}

impl State {
    /// The phase.
    pub(crate) fn phase(&self) -> u32 {
        self.phase.load(Ordering::Acquire)
    }

    /// The shared table, in the phases that have one.
    pub(crate) fn table(&self) -> Option<&'static SharedTable> {
        let at = self.table.load(Ordering::Acquire);
        // SAFETY: attach stores a mapping of TABLE_BYTES that is never unmapped and whose every field is an
        // atomic (or reserved); a child finds null, because the state is wiped.
        unsafe { at.as_ref() }
    }

    /// The device's reset count.
    pub(crate) fn device_resets(&self) -> Option<u32> {
        let at = self.status_page.load(Ordering::Acquire);
        // SAFETY: a mapped page (never unmapped), see map_status_page; the word at byte 4 is inside it.
        unsafe { at.as_ref().map(|_| (*at.add(1)).load(Ordering::Acquire)) }
    }

    /// Remember the reset count; only while the daemon is known to be alive.
    pub(crate) fn sample_resets(&self) {
        if let Some(count) = self.device_resets() {
            self.reset_count.store(count, Ordering::Relaxed);
        }
    }

    /// Map the device's status page for the fence, once per attachment.
    pub(crate) fn map_status_page(&self, bar0: RawFd, offset: u64) -> io::Result<()> {
        if self.status_page.load(Ordering::Acquire).is_null() {
            let page = sys::map_dontfork(bar0, offset, sys::PAGE as usize, false)?.cast::<AtomicU32>();
            // SAFETY: just mapped; the word at byte 4 is the device's reset count.
            let count = unsafe { (*page.add(1)).load(Ordering::Acquire) };
            self.reset_count.store(count, Ordering::Relaxed);
            self.status_page.store(page, Ordering::Release);
        }
        Ok(())
    }

    /// How ranges are registered.
    pub(crate) fn register_mode(&self) -> RegisterMode {
        if self.missing_mode.load(Ordering::Relaxed) != 0 {
            RegisterMode::Missing
        } else {
            RegisterMode::Wp
        }
    }
}

static STATE: AtomicPtr<State> = AtomicPtr::new(std::ptr::null_mut());

/// The state, if this process (or an ancestor) has ever attached.
pub(crate) fn state() -> Option<&'static State> {
    // SAFETY: `create` stores a mapping that is never unmapped; zero bytes are a valid State.
    unsafe { STATE.load(Ordering::Acquire).as_ref() }
}

/// The state while calls have to be covered.
pub(crate) fn covering() -> Option<&'static State> {
    let state = state()?;
    match state.phase() {
        phase::ATTACHED | phase::FENCING => Some(state),
        phase::DETACHED => {
            // The child of a raw clone, which ran no fork handler: its first call closes the descriptors.
            close_inherited();
            None
        }
        _ => None,
    }
}

/// The state; made at the first call.
pub(crate) fn create() -> io::Result<&'static State> {
    if let Some(state) = state() {
        return Ok(state);
    }
    let size = size_of::<State>().next_multiple_of(sys::PAGE as usize);
    let at = sys::map_wiped_on_fork(size)?;
    if STATE
        .compare_exchange(
            std::ptr::null_mut(),
            at.cast(),
            Ordering::AcqRel,
            Ordering::Acquire,
        )
        .is_err()
    {
        // SAFETY: lost the race; nobody has seen this mapping.
        unsafe { sys::unmap(at, size) };
    }
    state().ok_or_else(|| io::Error::other("the agent's state is missing"))
}

/// Descriptors that a forked child has to close: outside the wiped mapping, or it would not know them.
pub(crate) static INHERITED: [AtomicI32; 5] = [const { AtomicI32::new(-1) }; 5];
/// Process that [`INHERITED`] belongs to; 0 = nobody's.
pub(crate) static INHERITED_BY: AtomicU32 = AtomicU32::new(0);

/// In a child: close the parent's descriptors. Its copy of the userfaultfd would keep the parent's unmaps
/// waiting once the daemon is dead, and its sockets would hide hang-ups.
pub(crate) fn close_inherited() {
    let owner = INHERITED_BY.load(Ordering::Acquire);
    if owner == 0 || owner == sys::getpid() {
        return;
    }
    if INHERITED_BY
        .compare_exchange(owner, 0, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
    {
        for fd in &INHERITED {
            sys::close(fd.swap(-1, Ordering::AcqRel));
        }
    }
}
