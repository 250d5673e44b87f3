//! A host daemon in this process, for the agent's tests: it speaks the protocol, keeps a log, and answers when
//! the test lets it.
#![allow(unsafe_code, reason = "the shared table and userfaultfd messages")]
#![allow(dead_code, reason = "each test binary uses a part")]

use protos::bridge::control::{MAX_FDS, MAX_PACKET, Notice, NoticeReply, Reply, Request, UffdMode, VERSION};
use protos::bridge::shared::{self, SharedTable, TABLE_BYTES, slot_op, slot_state};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the daemon saw, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// A START that was taken (answered once the gate is open).
    Start {
        range: (u64, u64),
        generation: u64,
        event: u32,
    },
    /// An END.
    End { range: (u64, u64), generation: u64 },
    /// A userfaultfd event, by its number.
    Event { event: u8, range: (u64, u64) },
    /// AddMemory.
    Memory { len: u64, new: bool },
    /// A request by name.
    Request(&'static str),
}

/// How the daemon is to behave.
#[derive(Debug, Clone)]
pub struct Options {
    pub uffd_mode: UffdMode,
    pub fence_timeout_ms: u64,
    /// Process that is shown as the daemon; `None` = this process.
    pub daemon: Option<u32>,
    /// Process that is shown as the device; `None` = the daemon; 0 = unknown.
    pub device: Option<u32>,
    /// Read userfaultfd events.
    pub monitor: bool,
    /// Refuse AddMemory.
    pub refuse_memory: bool,
    /// Do not notice that the application hangs up, like a daemon that is stopped.
    pub ignore_hang_up: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            uffd_mode: UffdMode::Missing,
            fence_timeout_ms: 5000,
            daemon: None,
            device: None,
            monitor: true,
            refuse_memory: false,
            ignore_hang_up: false,
        }
    }
}

/// Device memory behind the contexts that the mock hands out.
#[derive(Debug)]
pub struct FakeDevice {
    pub bar2: File,
    pub bar0: File,
    pub doorbell: OwnedFd,
}

pub struct Mock {
    dir: tempfile::TempDir,
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

pub struct Inner {
    options: Options,
    pub table: &'static SharedTable,
    table_fd: OwnedFd,
    seen: Mutex<Vec<Seen>>,
    changed: Condvar,
    gate: AtomicBool,
    stop: AtomicBool,
    served: AtomicU32,
    connections: Mutex<Vec<OwnedFd>>,
    pub device: FakeDevice,
    /// (memfd, offset of the range's first byte): what PeerResolve answers; `None` = being changed.
    pub peer_page: Mutex<Option<(OwnedFd, u64)>>,
    pub zapped: Mutex<Vec<NoticeReply>>,
}

/// Offset of the fake context's GSEG.
pub const GSEG_OFFSET: u64 = 0x40_0000;

/// Whether attaching can work here; says why not.
pub fn available() -> bool {
    agent::userfaultfd_available()
        .inspect_err(|e| eprintln!("SKIPPED: {e}"))
        .is_ok()
}

fn memfd(name: &str, len: u64) -> File {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}

impl Mock {
    pub fn start(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let table_fd: OwnedFd = memfd("table", TABLE_BYTES as u64).into();
        // SAFETY: a new mapping, kept for the test's process; every field is atomic or reserved.
        let table = unsafe {
            let at =
                agent::raw::mmap(0, TABLE_BYTES, 3, libc::MAP_SHARED, Some(table_fd.as_fd()), 0).unwrap();
            &*(at as *const SharedTable)
        };
        table.header.magic.store(shared::MAGIC, Ordering::SeqCst);
        table.header.version.store(shared::VERSION, Ordering::SeqCst);
        let inner = Arc::new(Inner {
            options,
            table,
            table_fd,
            seen: Mutex::default(),
            changed: Condvar::new(),
            gate: AtomicBool::new(true),
            stop: AtomicBool::new(false),
            served: AtomicU32::new(0),
            connections: Mutex::default(),
            device: FakeDevice {
                bar2: memfd("bar2", GSEG_OFFSET + protos::gru::map::GSEG_PAGE),
                bar0: memfd("bar0", 64 * 1024),
                doorbell: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
            },
            peer_page: Mutex::default(),
            zapped: Mutex::default(),
        });
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::bind(
            &listener,
            &SocketAddrUnix::new(dir.path().join("socket")).unwrap(),
        )
        .unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        // A real daemon is another process: this one's signal handlers must not run on its threads (and make
        // calls that only those threads can answer). Threads inherit the mask.
        let mask = block_signals();
        let mut threads = Vec::new();
        let for_accept = Arc::clone(&inner);
        threads.push(std::thread::spawn(move || accept(&for_accept, &listener)));
        for _ in 0..2 {
            let for_mailbox = Arc::clone(&inner);
            threads.push(std::thread::spawn(move || mailbox(&for_mailbox)));
        }
        restore_signals(&mask);
        Self { dir, inner, threads }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn attach(&self) -> &'static agent::Agent {
        agent::Agent::attach(&agent::AttachOptions {
            socket: self.socket(),
            name: "test".into(),
        })
        .unwrap()
    }

    pub fn inner(&self) -> &Inner {
        &self.inner
    }

    /// With the gate closed STARTs are taken and not answered.
    pub fn set_gate(&self, open: bool) {
        self.inner.gate.store(open, Ordering::SeqCst);
        let _guard = self.inner.seen.lock().unwrap();
        self.inner.changed.notify_all();
    }

    /// Pretend that a device has cached a page.
    pub fn count(&self, va: usize) {
        self.inner.table.cached[shared::bucket_of(va as u64)].fetch_add(1, Ordering::SeqCst);
        self.inner
            .table
            .header
            .cached_total
            .fetch_add(1, Ordering::SeqCst);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    /// Wait until the log satisfies `f`.
    pub fn wait_until(&self, what: &str, f: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        let mut seen = self.inner.seen.lock().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !f(&seen) {
            let left = deadline.checked_duration_since(std::time::Instant::now());
            let left = left.unwrap_or_else(|| panic!("never seen: {what}; log: {seen:?}"));
            seen = self.inner.changed.wait_timeout(seen, left).unwrap().0;
        }
        seen.clone()
    }

    /// Every counter of the table that has to be zero between calls.
    pub fn assert_idle(&self) {
        let t = self.inner.table;
        assert!(t.in_progress.iter().all(|c| c.load(Ordering::SeqCst) == 0));
        assert_eq!(t.header.all_in_progress.load(Ordering::SeqCst), 0);
        assert_eq!(t.header.silent_calls.load(Ordering::SeqCst), 0);
    }

    /// Wait until the daemon has freed every slot.
    pub fn wait_slots_free(&self) {
        self.wait_until("free slots", |_| {
            self.inner
                .table
                .slots
                .iter()
                .all(|s| s.state.load(Ordering::SeqCst) == slot_state::FREE)
        });
    }

    /// Break every connection without a word, like a process that dies.
    pub fn die(&self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        for fd in self.inner.connections.lock().unwrap().drain(..) {
            let _ = rustix::net::shutdown(&fd, rustix::net::Shutdown::Both);
        }
        self.set_gate(false);
        self.ring();
    }

    /// Send a notice to whoever has attached last.
    pub fn notify(&self, notice: &Notice) {
        let connections = self.inner.connections.lock().unwrap();
        let text = serde_json::to_vec(notice).unwrap();
        send(connections.last().unwrap().as_fd(), &text, &[]);
    }

    fn ring(&self) {
        let bell = &self.inner.table.header.bell;
        bell.fetch_add(1, Ordering::SeqCst);
        futex_wake(bell);
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        self.set_gate(true);
        self.inner.stop.store(true, Ordering::SeqCst);
        self.ring();
        for fd in self.inner.connections.lock().unwrap().drain(..) {
            let _ = rustix::net::shutdown(&fd, rustix::net::Shutdown::Both);
        }
        // Wakes the accept.
        let waker = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        let _ = rustix::net::connect(&waker, &SocketAddrUnix::new(self.socket()).unwrap());
        for t in self.threads.drain(..) {
            t.join().unwrap();
        }
    }
}

impl Inner {
    fn log(&self, what: Seen) {
        self.seen.lock().unwrap().push(what);
        self.changed.notify_all();
    }
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

fn accept(inner: &Arc<Inner>, listener: &OwnedFd) {
    let mut threads = Vec::new();
    while let Ok(connection) = rustix::net::accept(listener) {
        if inner.stopped() {
            break;
        }
        let inner = Arc::clone(inner);
        threads.push(std::thread::spawn(move || serve(&inner, &connection)));
    }
    for t in threads {
        t.join().unwrap();
    }
}

/// One connection until it ends.
fn serve(inner: &Arc<Inner>, connection: &OwnedFd) {
    let mut memories = HashMap::new();
    let mut monitor = None;
    let mut notice_mine = None;
    inner
        .connections
        .lock()
        .unwrap()
        .push(connection.try_clone().unwrap());
    while let Some((bytes, fds)) = receive(connection.as_fd()) {
        let request: Request = serde_json::from_slice(&bytes).unwrap();
        let mut reply_fds: Vec<OwnedFd> = Vec::new();
        let reply = match request {
            Request::Attach { version, pid, .. } => {
                assert_eq!(version, VERSION);
                assert_ne!(pid, 0);
                let mut fds = fds.into_iter();
                let uffd = fds.next().unwrap();
                if inner.options.monitor {
                    let inner = Arc::clone(inner);
                    let stop = Arc::new(AtomicBool::new(false));
                    let for_thread = Arc::clone(&stop);
                    let t = std::thread::spawn(move || watch(&inner, &uffd, &for_thread));
                    monitor = Some((stop, t));
                }
                let (mine, theirs) = rustix::net::socketpair(
                    AddressFamily::UNIX,
                    SocketType::SEQPACKET,
                    SocketFlags::CLOEXEC,
                    None,
                )
                .unwrap();
                inner.connections.lock().unwrap().push(mine.try_clone().unwrap());
                notice_mine = Some(mine);
                let daemon = inner.options.daemon.unwrap_or_else(std::process::id);
                let device = inner.options.device.unwrap_or(daemon);
                reply_fds.push(inner.table_fd.try_clone().unwrap());
                reply_fds.push(theirs);
                reply_fds.push(pidfd(daemon));
                if device != 0 {
                    reply_fds.push(pidfd(device));
                }
                Reply::Attached {
                    version: VERSION,
                    daemon_pid: daemon,
                    device_pid: device,
                    session: 1,
                    uffd_mode: inner.options.uffd_mode,
                    fence_timeout_ms: inner.options.fence_timeout_ms,
                }
            }
            Request::AttachPeer { .. } => {
                let (mine, theirs) = rustix::net::socketpair(
                    AddressFamily::UNIX,
                    SocketType::SEQPACKET,
                    SocketFlags::CLOEXEC,
                    None,
                )
                .unwrap();
                inner.connections.lock().unwrap().push(mine.try_clone().unwrap());
                let inner = Arc::clone(inner);
                std::thread::spawn(move || {
                    while let Some((bytes, _)) = receive(mine.as_fd()) {
                        let reply = serde_json::from_slice(&bytes).unwrap();
                        inner.zapped.lock().unwrap().push(reply);
                        inner.log(Seen::Request("zapped"));
                    }
                });
                reply_fds.push(theirs);
                Reply::PeerAttached { session: 1 }
            }
            Request::PeerResolve { .. } => {
                inner.log(Seen::Request("resolve"));
                match &*inner.peer_page.lock().unwrap() {
                    Some((fd, offset)) => {
                        reply_fds.push(fd.try_clone().unwrap());
                        Reply::PeerPage {
                            offset: *offset,
                            len: 4096,
                            writable: false,
                            generation: 1,
                        }
                    }
                    None => Reply::Error {
                        errno: libc::EAGAIN,
                        message: "being changed".into(),
                    },
                }
            }
            Request::AddMemory { .. } if inner.options.refuse_memory => Reply::Error {
                errno: libc::ENOSPC,
                message: "no room".into(),
            },
            Request::AddMemory { len } => {
                let file = File::from(fds.into_iter().next().unwrap());
                let meta = file.metadata().unwrap();
                let next = memories.len() as u32 + 1;
                let key = (meta.dev(), meta.ino());
                let new = !memories.contains_key(&key);
                let (number, _) = *memories.entry(key).or_insert((next, file.as_raw_fd()));
                if new {
                    // Kept open, as the real daemon does.
                    std::mem::forget(file);
                }
                inner.log(Seen::Memory { len, new });
                Reply::Memory {
                    memory: number,
                    iova: u64::from(number) << 32,
                }
            }
            Request::CreateContext { cbs, ds_bytes, .. } => {
                inner.log(Seen::Request("create_context"));
                reply_fds.push(inner.device.bar2.try_clone().unwrap().into());
                reply_fds.push(inner.device.bar0.try_clone().unwrap().into());
                reply_fds.push(inner.device.doorbell.try_clone().unwrap());
                Reply::Context {
                    context: 1,
                    chiplet: 0,
                    ctxnum: 0,
                    gseg_offset: GSEG_OFFSET,
                    cbs,
                    ds_bytes,
                    mappable: true,
                    status_offset: 0x1000,
                }
            }
            Request::DestroyContext { .. } => {
                inner.log(Seen::Request("destroy_context"));
                Reply::Done
            }
            Request::Stats => Reply::Stats { stats: "{}".into() },
            _ => Reply::Error {
                errno: libc::EOPNOTSUPP,
                message: "the mock does not do that".into(),
            },
        };
        let text = serde_json::to_vec(&reply).unwrap();
        let borrowed: Vec<_> = reply_fds.iter().map(AsFd::as_fd).collect();
        send(connection.as_fd(), &text, &borrowed);
    }
    if inner.options.ignore_hang_up {
        let mut seen = inner.seen.lock().unwrap();
        while !inner.stopped() {
            seen = inner.changed.wait(seen).unwrap();
        }
    }
    if let Some((stop, thread)) = monitor {
        stop.store(true, Ordering::SeqCst);
        thread.join().unwrap();
    }
    // The session is over: nothing is cached any more, then the notice socket closes.
    if !inner.stopped() {
        inner.table.header.closed.store(1, Ordering::SeqCst);
    }
    if let Some(notice) = notice_mine {
        let _ = rustix::net::shutdown(&notice, rustix::net::Shutdown::Both);
    }
    for fd in memories.values() {
        // SAFETY: the descriptor that was kept open above.
        unsafe { libc::close(fd.1) };
    }
}

/// A mailbox worker.
fn mailbox(inner: &Inner) {
    let header = &inner.table.header;
    while !inner.stopped() {
        let bell = header.bell.load(Ordering::SeqCst);
        let mut worked = false;
        for slot in &inner.table.slots {
            let take = |from| {
                slot.state
                    .compare_exchange(from, slot_state::SERVING, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            };
            let range = || (slot.start.load(Ordering::SeqCst), slot.end.load(Ordering::SeqCst));
            let generation = || slot.generation.load(Ordering::SeqCst);
            if take(slot_state::REQUEST) {
                assert_eq!(slot.op.load(Ordering::SeqCst), slot_op::START);
                worked = true;
                inner.log(Seen::Start {
                    range: range(),
                    generation: generation(),
                    event: slot.event.load(Ordering::SeqCst),
                });
                let mut seen = inner.seen.lock().unwrap();
                while !inner.gate.load(Ordering::SeqCst) && !inner.stopped() {
                    seen = inner.changed.wait(seen).unwrap();
                }
                drop(seen);
                if inner.stopped() {
                    return;
                }
                slot.state.store(slot_state::DONE, Ordering::SeqCst);
                futex_wake(&slot.state);
            } else if take(slot_state::REQUEST_DETACHED) {
                assert_eq!(slot.op.load(Ordering::SeqCst), slot_op::END);
                worked = true;
                let what = Seen::End {
                    range: range(),
                    generation: generation(),
                };
                slot.state.store(slot_state::FREE, Ordering::SeqCst);
                inner.log(what);
            }
        }
        if !worked {
            header.bell_sleepers.fetch_add(1, Ordering::SeqCst);
            futex_wait(&header.bell, bell);
            header.bell_sleepers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// The safety net's part: read events (and serve missing faults).
fn watch(inner: &Inner, uffd: &OwnedFd, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) && !inner.stopped() {
        let mut fds = [rustix::event::PollFd::new(uffd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        if rustix::event::poll(&mut fds, Some(&limit)).unwrap_or(0) == 0 {
            continue;
        }
        let mut message = [0u8; 32];
        if rustix::io::read(uffd, &mut message) != Ok(32) {
            continue;
        }
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
        if message[0] == 18 {
            // A fault of a page that was punched out: zero.
            let mut zeropage = [word(16) & !4095, 4096, 0, 0];
            // SAFETY: struct uffdio_zeropage on this stack.
            unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc020_aa04, zeropage.as_mut_ptr()) };
            continue;
        }
        // remove and unmap: start, end; remap: from, to.
        let range = (word(8), word(16));
        inner.log(Seen::Event {
            event: message[0],
            range,
        });
    }
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets live on this stack.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        assert_eq!(
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old),
            0
        );
        old
    }
}

fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: the set that block_signals has given.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}

pub fn pidfd(pid: u32) -> OwnedFd {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
}

fn send(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // The other side may be gone.
    let _ = rustix::net::sendmsg(fd, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
}

fn receive(fd: BorrowedFd<'_>) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let n = loop {
        match rustix::net::recvmsg(
            fd,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.ok()?.bytes,
        }
    };
    let fds = ancillary
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    bytes.truncate(n);
    (n != 0).then_some((bytes, fds))
}

fn futex_wait(word: &AtomicU32, expected: u32) {
    let limit = libc::timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    // SAFETY: the word outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            &raw const limit,
        )
    };
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE does not access the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
