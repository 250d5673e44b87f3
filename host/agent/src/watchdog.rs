//! The thread that watches the daemon. It is the only one that can help a caller who waits in the kernel for
//! an event that nobody will read.

use crate::fence;
use crate::intervals::Interval;
use crate::state::{Reason, State, cause, phase};
use crate::sys;
use crate::{control, files};
use protos::bridge::control::{MAX_PACKET, Notice};
use std::sync::atomic::Ordering;

/// Between two looks at what has no file descriptor.
const TICK_MS: u64 = 250;

/// Start it, with every signal blocked: handlers belong to the application's own threads.
pub(crate) fn spawn(state: &'static State) -> std::io::Result<()> {
    state.watchdog.store(1, Ordering::Release);
    let mask = sys::block_signals();
    let spawned = std::thread::Builder::new()
        .name("tlbridge-watch".into())
        .stack_size(256 * 1024)
        .spawn(move || run(state));
    sys::restore_signals(mask);
    if spawned.is_err() {
        state.watchdog.store(0, Ordering::Release);
    }
    spawned.map(drop)
}

/// Wait until it has ended.
pub(crate) fn wait_end(state: &State) {
    while state.watchdog.load(Ordering::Acquire) != 0 {
        sys::futex_wait(&state.watchdog, 1, 1000);
    }
}

fn run(state: &'static State) {
    let mut packet = vec![0u8; MAX_PACKET];
    while matches!(state.phase(), phase::ATTACHED | phase::FENCING) {
        look(state, &mut packet);
    }
    release(state);
    state.watchdog.store(0, Ordering::Release);
    sys::futex_wake(&state.watchdog, i32::MAX);
}

/// One round.
fn look(state: &State, packet: &mut [u8]) {
    let notice = state.notice.load(Ordering::Relaxed);
    // A device that is known to be gone stays readable: not a reason to wake up again.
    let device = if state.device_lost.load(Ordering::Relaxed) == 0 {
        positive(state.device_pidfd.load(Ordering::Relaxed))
    } else {
        -1
    };
    let resets = state.device_resets();
    let seen = sys::poll(
        [
            notice,
            positive(state.daemon_pidfd.load(Ordering::Relaxed)),
            device,
        ],
        TICK_MS,
    );
    if seen[2].readable {
        state.device_lost.store(1, Ordering::Release);
    }
    if seen[0].readable || seen[0].hung_up {
        match control::receive(control::borrow(notice), packet) {
            Ok(Some(received)) => {
                if let Ok(notice) = serde_json::from_slice(received.slice(packet)) {
                    take(state, notice);
                }
            }
            Ok(None) | Err(_) => {
                state.hung_up.store(1, Ordering::Release);
                let why = if state.detaching.load(Ordering::Acquire) != 0 {
                    cause::DETACHED
                } else if fence::session_closed(state) {
                    cause::CLOSED
                } else {
                    cause::HUNG_UP
                };
                fence::lost(state, why);
            }
        }
    } else if seen[1].readable {
        fence::lost(state, cause::EXITED);
    } else if let Some(resets) = resets {
        // Read before the daemon was seen to be alive.
        state.reset_count.store(resets, Ordering::Relaxed);
    }
    if state
        .table()
        .is_some_and(|t| t.header.closed.load(Ordering::Acquire) != 0)
    {
        fence::lost(state, cause::CLOSED);
    }
    // A caller in the kernel waits for the daemon to read its event, and cannot look at the clock itself; nor can
    // detach(), which waits for this thread.
    if let Some(since) = oldest_wait(state)
        && fence::overdue(state, since)
    {
        let _ = state
            .fencing_since_ms
            .compare_exchange(0, since, Ordering::AcqRel, Ordering::Acquire);
        fence::lost(state, cause::SILENT);
    }
    if state.phase() == phase::FENCING {
        fence::wait(state);
    }
}

/// Since when somebody waits for the daemon who relies on this thread.
fn oldest_wait(state: &State) -> Option<u64> {
    let detaching = Some(state.detaching_since_ms.load(Ordering::Acquire)).filter(|&t| t != 0);
    [state.calls.oldest_event_ms(), detaching]
        .into_iter()
        .flatten()
        .min()
}

fn positive(fd: i32) -> i32 {
    if fd > 0 { fd } else { -1 }
}

fn take(state: &State, notice: Notice) {
    match notice {
        Notice::Closing { reason } => {
            remember(state, &reason);
            fence::lost(state, cause::CLOSED);
        }
        // The daemon goes on: other subscribers may still have an interest in this memory.
        Notice::DeviceLost { reason } => {
            remember(state, &reason);
            state.device_lost.store(1, Ordering::Release);
        }
        _ => {}
    }
}

fn remember(state: &State, text: &str) {
    let mut reason = state.reason.lock();
    let Reason { len, text: buffer } = &mut *reason;
    *len = text.len().min(buffer.len());
    buffer[..*len].copy_from_slice(&text.as_bytes()[..*len]);
}

/// Nothing reaches the memory any more: give up userfaultfd, so that nobody waits for an event again. Callers
/// that wait in the kernel go on when the last copy of the descriptor is closed.
pub(crate) fn release(state: &State) {
    let uffd = state.uffd.load(Ordering::Relaxed);
    let mut rest = Interval::new(0, u64::MAX);
    loop {
        let piece = state.intervals.lock().first_in(rest);
        let Some(piece) = piece else { break };
        // Closing does this too, unless a forked child still has a copy.
        let _ = sys::uffd_unregister(uffd, piece.start, piece.end);
        rest.start = piece.end;
    }
    sys::replace_by_placeholder(uffd);
    let _ = state.intervals.lock().remove(Interval::new(0, u64::MAX));
    files::forget_all(state);
}
