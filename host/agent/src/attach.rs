//! Attach, detach, fork.
#![allow(unsafe_code, reason = "pthread_atfork")]

use crate::control;
use crate::state::{self, INHERITED, INHERITED_BY, State, phase};
use crate::sys;
use crate::watchdog;
use crate::{Agent, AgentError, AttachOptions, Result};
use protos::bridge::control::{MAX_PACKET, Reply, Request, UffdMode, VERSION};
use protos::bridge::shared::{self, SharedTable, TABLE_BYTES};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest registered part of a range that is unregistered in write-protect mode (in missing mode the cost of
/// unregistering hardly depends on the size). Overridden by `TLBRIDGE_UNREGISTER_MAX` (bytes).
///
/// Measured with `examples/covered_munmap.rs --sizes`: unregistering and registering adds 2 us to the
/// unmapping of a page, 45 us to that of 2 MiB, 1.8 ms to that of 64 MiB, 12 ms to that of 256 MiB, always
/// about two fifths of the unmapping itself. The event path adds 10 to 30 us by itself, but takes every
/// translation of the address space with it, and each has to be faulted in again (tens of us): above this
/// size that is the smaller evil.
pub const UNREGISTER_MAX_WP: u64 = 64 << 20;

/// Attachments so far, in this process and its ancestors.
static ATTACHMENTS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn attach(agent: &'static Agent, options: &AttachOptions) -> Result<&'static Agent> {
    state::close_inherited();
    let system = |what| move |source| AgentError::System { what, source };
    let state = state::create().map_err(system("mapping the agent's state"))?;
    at_fork_once().map_err(system("pthread_atfork"))?;
    state
        .phase
        .compare_exchange(
            phase::DETACHED,
            phase::ATTACHING,
            Ordering::AcqRel,
            Ordering::Acquire,
        )
        .map_err(|_| AgentError::AlreadyAttached)?;
    match connect(state, options) {
        Ok(()) => Ok(agent),
        Err(e) => {
            give_back(state);
            state.phase.store(phase::DETACHED, Ordering::Release);
            Err(e)
        }
    }
}

/// A SEQPACKET connection to the daemon.
pub(crate) fn open_socket(path: &Path) -> Result<OwnedFd> {
    let failed = |source: rustix::io::Errno| AgentError::Connect {
        socket: path.display().to_string(),
        source: source.into(),
    };
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    // A daemon that takes the connection and never answers must not hold anybody for ever.
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(std::time::Duration::from_secs(60)),
    )
    .map_err(failed)?;
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    rustix::net::connect(&socket, &address).map_err(failed)?;
    Ok(socket)
}

/// One request on a socket that is not the session's yet.
pub(crate) fn first_request(
    what: &'static str,
    socket: BorrowedFd<'_>,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Reply, [Option<OwnedFd>; protos::bridge::control::MAX_FDS])> {
    let system = |e: rustix::io::Errno| AgentError::System {
        what,
        source: e.into(),
    };
    let text = serde_json::to_vec(request).map_err(|e| AgentError::Protocol {
        what,
        why: e.to_string(),
    })?;
    control::send(socket, &text, fds).map_err(system)?;
    let mut packet = vec![0; MAX_PACKET];
    let received = control::receive(socket, &mut packet)
        .map_err(system)?
        .ok_or_else(|| AgentError::Protocol {
            what,
            why: "the connection was closed instead of an answer".into(),
        })?;
    Ok((control::parse(what, received.slice(&packet))?, received.fds))
}

fn connect(state: &'static State, options: &AttachOptions) -> Result<()> {
    let what = "attach";
    let protocol = |why: &str| AgentError::Protocol {
        what,
        why: why.into(),
    };
    let system = |what| move |source: io::Error| AgentError::System { what, source };
    reset(state);
    let uffd = sys::userfaultfd()?;
    let maps = std::fs::File::open("/proc/self/maps").map_err(system("opening /proc/self/maps"))?;
    let socket = open_socket(&options.socket)?;
    let wp = uffd.wp;
    // From here on these are closed by number, also in a forked child.
    let socket = keep(&state.control, 0, socket)?;
    let uffd = keep(&state.uffd, 1, uffd.fd)?;
    INHERITED_BY.store(sys::getpid(), Ordering::Release);
    let request = Request::Attach {
        version: VERSION,
        pid: sys::getpid(),
        name: options.name.clone(),
    };
    let (reply, fds) = first_request(what, socket, &request, &[uffd, maps.as_fd()])?;
    let Reply::Attached {
        version,
        daemon_pid,
        device_pid,
        session,
        uffd_mode,
        fence_timeout_ms,
    } = reply
    else {
        return Err(protocol("an answer of another kind"));
    };
    if version != VERSION {
        return Err(protocol(&format!(
            "the daemon speaks version {version}, this agent {VERSION}"
        )));
    }
    if uffd_mode == UffdMode::Wp && !wp {
        return Err(AgentError::Features {
            missing: "PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM (or use the daemon's missing mode)".into(),
        });
    }
    let [Some(table), Some(notice), Some(daemon_pidfd), device_pidfd, ..] = fds else {
        return Err(protocol("table, notice socket or the daemon's pidfd is missing"));
    };
    let table = map_table(&table)?;
    keep(&state.notice, 2, notice)?;
    keep(&state.daemon_pidfd, 3, daemon_pidfd)?;
    if let Some(fd) = device_pidfd {
        keep(&state.device_pidfd, 4, fd)?;
    }
    state.table.store(table, Ordering::Release);
    state.daemon_pid.store(daemon_pid, Ordering::Relaxed);
    state.device_pid.store(device_pid, Ordering::Relaxed);
    state.session.store(session, Ordering::Relaxed);
    let missing = uffd_mode == UffdMode::Missing;
    state.missing_mode.store(u32::from(missing), Ordering::Relaxed);
    state.fence_timeout_ms.store(fence_timeout_ms, Ordering::Relaxed);
    let default = if missing { u64::MAX } else { UNREGISTER_MAX_WP };
    state.unregister_max.store(
        std::env::var("TLBRIDGE_UNREGISTER_MAX")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(default),
        Ordering::Relaxed,
    );
    // Spinning for an answer helps only when the daemon can run meanwhile. On two processors it does not: the
    // kernel wakes the daemon's worker on the caller's own, in the hope that it sleeps (measured with a
    // device that was asleep: 67 to 91 us without a spin, 112 to 118 us with one of 80 us).
    let spins = match std::thread::available_parallelism().map_or(1, usize::from) {
        0..=2 => 0,
        _ => 2000,
    };
    state.spins.store(spins, Ordering::Relaxed);
    let id = ATTACHMENTS.fetch_add(1, Ordering::Relaxed) + 1;
    state.attach_id.store(id, Ordering::Release);
    state.phase.store(phase::ATTACHED, Ordering::Release);
    if let Err(e) = watchdog::spawn(state) {
        // Nobody was told of the attachment yet, but covered calls of other threads may be inside.
        state.phase.store(phase::ATTACHING, Ordering::SeqCst);
        wait_until_nobody_is_inside(state);
        return Err(system("starting the watchdog thread")(e));
    }
    Ok(())
}

/// Keep a descriptor by number, in the state and in the list for forked children. Never number 0, which
/// stands for "none" in the zeroed state.
fn keep<'fd>(place: &std::sync::atomic::AtomicI32, index: usize, fd: OwnedFd) -> Result<BorrowedFd<'fd>> {
    let fd = if fd.as_raw_fd() == 0 {
        let moved = rustix::io::fcntl_dupfd_cloexec(&fd, 3).map_err(|e| AgentError::System {
            what: "moving a descriptor away from 0",
            source: e.into(),
        })?;
        drop(fd);
        moved
    } else {
        fd
    };
    let raw = fd.into_raw_fd();
    place.store(raw, Ordering::Release);
    INHERITED[index].store(raw, Ordering::Release);
    Ok(control::borrow(raw))
}

fn map_table(fd: &OwnedFd) -> Result<*mut SharedTable> {
    let invalid = |why: &str| AgentError::Protocol {
        what: "attach",
        why: why.into(),
    };
    let system = |what| move |source: io::Error| AgentError::System { what, source };
    let stat = rustix::fs::fstat(fd).map_err(|e| system("fstat of the shared table")(e.into()))?;
    if (stat.st_size as u64) < TABLE_BYTES as u64 {
        return Err(invalid("the shared table is too small"));
    }
    let at = sys::map_dontfork(fd.as_raw_fd(), 0, TABLE_BYTES, true)
        .map_err(system("mapping the shared table"))?
        .cast::<SharedTable>();
    // SAFETY: TABLE_BYTES are mapped at a page boundary; every field is an atomic or reserved.
    let header = unsafe { &(*at).header };
    if header.magic.load(Ordering::Acquire) != shared::MAGIC
        || header.version.load(Ordering::Acquire) != shared::VERSION
    {
        // SAFETY: nobody else has seen the mapping.
        unsafe { sys::unmap(at.cast(), TABLE_BYTES) };
        return Err(invalid("the shared table is of another version"));
    }
    Ok(at)
}

/// Zero what an earlier attachment has left (the locks and counters inside stay as they are: they are idle).
fn reset(state: &State) {
    state.cause.store(0, Ordering::Relaxed);
    state.detaching.store(0, Ordering::Relaxed);
    state.detaching_since_ms.store(0, Ordering::Relaxed);
    state.device_lost.store(0, Ordering::Relaxed);
    state.hung_up.store(0, Ordering::Relaxed);
    state.fencing_since_ms.store(0, Ordering::Relaxed);
    state.daemon_dead_ms.store(0, Ordering::Relaxed);
    state.status_page.store(std::ptr::null_mut(), Ordering::Relaxed);
    let mask = sys::block_signals();
    state.reason.lock().len = 0;
    state.files.lock().clear();
    sys::restore_signals(mask);
}

fn wait_until_nobody_is_inside(state: &State) {
    let mask = sys::block_signals();
    std::sync::atomic::fence(Ordering::SeqCst);
    state.calls.wait_empty();
    sys::restore_signals(mask);
}

/// Close every descriptor.
fn give_back(state: &State) {
    INHERITED_BY.store(0, Ordering::Release);
    for (place, inherited) in [
        &state.control,
        &state.uffd,
        &state.notice,
        &state.daemon_pidfd,
        &state.device_pidfd,
    ]
    .into_iter()
    .zip(&INHERITED)
    {
        inherited.store(-1, Ordering::Release);
        let fd = place.swap(0, Ordering::AcqRel);
        if fd > 0 {
            sys::close(fd);
        }
    }
}

/// End the attachment. Calls stay covered until the daemon has taken every translation back.
pub(crate) fn detach() -> Result<()> {
    let state = state::state().ok_or(AgentError::NotAttached)?;
    let attached = |p| matches!(p, phase::ATTACHED | phase::FENCING | phase::GONE);
    if !attached(state.phase()) || state.detaching.swap(1, Ordering::AcqRel) != 0 {
        return Err(AgentError::NotAttached);
    }
    // A daemon that is stopped does not see the hang-up: the watchdog fences it, by this clock.
    state.detaching_since_ms.store(sys::now_ms(), Ordering::Release);
    let control = state.control.load(Ordering::Acquire);
    let _ = rustix::net::shutdown(control::borrow(control), rustix::net::Shutdown::Both);
    // The daemon ends the session and closes its sockets; the watchdog sees that (or fences the daemon).
    watchdog::wait_end(state);
    state.phase.store(phase::ATTACHING, Ordering::SeqCst);
    wait_until_nobody_is_inside(state);
    // Requests that are on their way see the socket closed; whoever holds the lock leaves.
    let mask = sys::block_signals();
    drop(state.packet.lock());
    sys::restore_signals(mask);
    // The table stays mapped: `generation` and contexts may be reading it in other threads.
    state.table.store(std::ptr::null_mut(), Ordering::Release);
    give_back(state);
    state.phase.store(phase::DETACHED, Ordering::Release);
    Ok(())
}

fn at_fork_once() -> io::Result<()> {
    static ONCE: Once = Once::new();
    static RESULT: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(0);
    ONCE.call_once(|| {
        // SAFETY: the handler makes system calls only and lives as long as the process.
        let r = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        RESULT.store(r, Ordering::Release);
    });
    match RESULT.load(Ordering::Acquire) {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// In a forked child. The state is zero by itself (detached, every lock free), so nothing has to be locked
/// around a fork; what is left are the descriptors.
extern "C" fn in_child() {
    state::close_inherited();
}
