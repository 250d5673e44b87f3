//! When a peer is lost: wait until it is *gone*, not until a time has passed. A stopped process could resume in
//! the middle of a copy.

use crate::state::{State, cause, phase};
use crate::sys;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

/// Longest sleep between two looks at what has no file descriptor (the device's reset count, the table).
const LOOK_MS: u64 = 20;

/// Note that the daemon is lost. The first cause stays.
pub(crate) fn lost(state: &State, why: u32) {
    let _ = state
        .cause
        .compare_exchange(0, why, Ordering::AcqRel, Ordering::Acquire);
    let now = sys::now_ms();
    let _ = state
        .fencing_since_ms
        .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
    let _ = state.phase.compare_exchange(
        phase::ATTACHED,
        phase::FENCING,
        Ordering::AcqRel,
        Ordering::Acquire,
    );
}

/// Whether the daemon has ended the session by itself: it has taken every translation back before it says so.
pub(crate) fn session_closed(state: &State) -> bool {
    state
        .table()
        .is_some_and(|t| t.header.closed.load(Ordering::Acquire) != 0)
        || (state.detaching.load(Ordering::Acquire) != 0 && state.hung_up.load(Ordering::Acquire) != 0)
}

/// Whether the daemon process is gone.
pub(crate) fn daemon_dead(state: &State) -> bool {
    let pid = state.daemon_pid.load(Ordering::Relaxed);
    if pid == sys::getpid() {
        // A daemon in this very process lives as long as its socket.
        return state.hung_up.load(Ordering::Acquire) != 0;
    }
    let fd = state.daemon_pidfd.load(Ordering::Relaxed);
    fd > 0 && sys::poll([fd], 0)[0].readable
}

/// Whether the device can no longer reach this process' memory. Only asked when the daemon is gone.
fn device_stopped(state: &State) -> bool {
    let device = state.device_pid.load(Ordering::Relaxed);
    if state.device_lost.load(Ordering::Acquire) != 0
        || (device != 0 && device == state.daemon_pid.load(Ordering::Relaxed))
    {
        return true;
    }
    // The device cleans up when its client's connection breaks, and counts that.
    if state
        .device_resets()
        .is_some_and(|n| n != state.reset_count.load(Ordering::Relaxed))
    {
        return true;
    }
    let fd = state.device_pidfd.load(Ordering::Relaxed);
    fd > 0 && sys::poll([fd], 0)[0].readable
}

/// Wait until nothing reaches this process' memory any more. From then on calls are not covered.
pub(crate) fn wait(state: &State) {
    lost(state, cause::SILENT);
    loop {
        if state.phase() != phase::FENCING {
            return;
        }
        if sys::poll([state.notice.load(Ordering::Relaxed)], 0)[0].hung_up {
            state.hung_up.store(1, Ordering::Release);
        }
        let closed = session_closed(state);
        let dead = closed || daemon_dead(state);
        if dead
            && state
                .daemon_dead_ms
                .compare_exchange(0, sys::now_ms(), Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
            && !closed
        {
            let _ = state
                .cause
                .compare_exchange(0, cause::EXITED, Ordering::AcqRel, Ordering::Acquire);
        }
        if closed || (dead && device_stopped(state)) {
            let _ = state.phase.compare_exchange(
                phase::FENCING,
                phase::GONE,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            return;
        }
        let (who, pid, pidfd, since) = if dead {
            (
                "the device process",
                state.device_pid.load(Ordering::Relaxed),
                state.device_pidfd.load(Ordering::Relaxed),
                state.daemon_dead_ms.load(Ordering::Acquire),
            )
        } else {
            (
                "the host daemon",
                state.daemon_pid.load(Ordering::Relaxed),
                state.daemon_pidfd.load(Ordering::Relaxed),
                state.fencing_since_ms.load(Ordering::Acquire),
            )
        };
        let limit = state.fence_timeout_ms.load(Ordering::Relaxed);
        if limit != 0 && sys::now_ms().saturating_sub(since) >= limit {
            kill(state, who, pid, pidfd);
        }
        sys::poll([if pidfd > 0 { pidfd } else { -1 }], LOOK_MS);
    }
}

/// Fence one process. What cannot be done is said once a second: the caller keeps waiting.
fn kill(state: &State, who: &str, pid: u32, pidfd: RawFd) {
    let said = state.said_ms.load(Ordering::Relaxed);
    let now = sys::now_ms();
    let may_say = now.saturating_sub(said) >= 1000
        && state
            .said_ms
            .compare_exchange(said, now, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
    if pidfd <= 0 || pid == sys::getpid() {
        if may_say {
            sys::say(format_args!(
                "{who} may still reach this memory and cannot be fenced (it has no process of its own that \
                 is known here); waiting, stop it to go on"
            ));
        }
        return;
    }
    if sys::traced(pid) {
        if may_say {
            sys::say(format_args!(
                "{who} (pid {pid}) does not answer and has a debugger attached: waiting"
            ));
        }
        return;
    }
    match sys::kill_by_pidfd(pidfd) {
        Ok(()) if may_say => sys::say(format_args!(
            "{who} (pid {pid}) did not answer within the fence timeout: killed, waiting for its end"
        )),
        Err(errno) if may_say && errno != libc::ESRCH => sys::say(format_args!(
            "{who} (pid {pid}) does not answer and cannot be killed (errno {errno}): waiting; stop it to go on"
        )),
        _ => {}
    }
}

/// Whether a wait for the daemon that began at `since_ms` has lasted too long.
pub(crate) fn overdue(state: &State, since_ms: u64) -> bool {
    let limit = state.fence_timeout_ms.load(Ordering::Relaxed);
    limit != 0
        && sys::now_ms().saturating_sub(since_ms) >= limit
        && !sys::traced(state.daemon_pid.load(Ordering::Relaxed))
}
