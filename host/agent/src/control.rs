//! The control socket: one request, one reply.

use crate::fence;
use crate::state::{Packet, State, phase};
use crate::sys;
use crate::{AgentError, Gone, Result};
use protos::bridge::control::{MAX_FDS, Reply, Request};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

/// Longest wait for a reply while the daemon lives. Requests are short; the longest serves a page fault.
const REPLY_LIMIT_MS: u64 = 60_000;

/// Why there is no reply. Plain data: also used where malloc is forbidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExchangeError {
    /// The daemon is gone, or the session is over.
    Gone,
    /// A system call failed with this errno.
    System(i32),
    /// The daemon answered with an error.
    Refused(i32),
    /// The answer is not what the protocol says.
    Protocol,
}

/// A reply: its length in the packet buffer, and its file descriptors.
#[derive(Debug)]
pub(crate) struct Received {
    len: usize,
    /// In the order they were sent.
    pub fds: [Option<OwnedFd>; MAX_FDS],
}

impl Received {
    /// The reply's bytes.
    pub(crate) fn bytes<'p>(&self, packet: &'p Packet) -> &'p [u8] {
        self.slice(&packet.bytes)
    }
    /// The same, of another buffer.
    pub(crate) fn slice<'p>(&self, buffer: &'p [u8]) -> &'p [u8] {
        &buffer[..self.len.min(buffer.len())]
    }
}

/// Send one packet with descriptors. No malloc.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> std::result::Result<(), Errno> {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    loop {
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receive one packet; `Ok(None)` = the other side has closed. No malloc.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> std::result::Result<Option<Received>, Errno> {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = [const { None }; MAX_FDS];
    for m in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = m {
            for (place, fd) in fds.iter_mut().zip(received) {
                *place = Some(fd);
            }
        }
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    Ok(Some(Received {
        len: message.bytes,
        fds,
    }))
}

/// One request and its reply, with signals blocked and the control lock (`packet`) held.
pub(crate) fn exchange(
    state: &State,
    packet: &mut Packet,
    request: &[u8],
    fds: &[RawFd],
) -> std::result::Result<Received, ExchangeError> {
    let control = state.control.load(Ordering::Acquire);
    if control <= 0 || state.phase() != phase::ATTACHED {
        return Err(ExchangeError::Gone);
    }
    let mut borrowed = [borrow(control); MAX_FDS];
    for (place, fd) in borrowed.iter_mut().zip(fds) {
        *place = borrow(*fd);
    }
    let socket = borrow(control);
    send(socket, request, &borrowed[..fds.len().min(MAX_FDS)]).map_err(|e| match e {
        Errno::PIPE | Errno::CONNRESET => ExchangeError::Gone,
        e => ExchangeError::System(e.raw_os_error()),
    })?;
    let since = sys::now_ms();
    loop {
        let seen = sys::poll([control, state.daemon_pidfd.load(Ordering::Relaxed)], 100);
        if seen[0].readable || seen[0].hung_up {
            return match receive(socket, &mut packet.bytes) {
                Ok(Some(received)) => {
                    state.sample_resets();
                    Ok(received)
                }
                Ok(None) | Err(Errno::CONNRESET) => Err(ExchangeError::Gone),
                Err(e) => Err(ExchangeError::System(e.raw_os_error())),
            };
        }
        if state.phase() != phase::ATTACHED || fence::daemon_dead(state) {
            return Err(ExchangeError::Gone);
        }
        if sys::now_ms().saturating_sub(since) > REPLY_LIMIT_MS {
            // The reply may still come, for somebody else's request: this socket is of no use any more.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            return Err(ExchangeError::Gone);
        }
    }
}

/// A descriptor of this library by number.
#[allow(unsafe_code, reason = "descriptors are kept as numbers in the state")]
pub(crate) fn borrow<'fd>(fd: RawFd) -> BorrowedFd<'fd> {
    // SAFETY: the caller's descriptor is open; the state's are only closed by detach, after every user left.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// One typed request. Not for signal handlers (malloc).
pub(crate) fn request(
    state: &State,
    what: &'static str,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Reply, [Option<OwnedFd>; MAX_FDS])> {
    let text = serde_json::to_vec(request).map_err(|e| AgentError::Protocol {
        what,
        why: e.to_string(),
    })?;
    let mut raw = [0; MAX_FDS];
    for (place, fd) in raw.iter_mut().zip(fds) {
        *place = fd.as_raw_fd();
    }
    let mask = sys::block_signals();
    let answer = {
        let mut packet = state.packet.lock();
        exchange(state, &mut packet, &text, &raw[..fds.len().min(MAX_FDS)])
            .map(|received| (received.bytes(&packet).to_vec(), received.fds))
    };
    sys::restore_signals(mask);
    let (bytes, fds) = answer.map_err(|e| explain(state, what, e))?;
    Ok((parse(what, &bytes)?, fds))
}

/// A reply, or the daemon's refusal as an error.
pub(crate) fn parse(what: &'static str, bytes: &[u8]) -> Result<Reply> {
    match serde_json::from_slice(bytes) {
        Ok(Reply::Error { errno, message }) => Err(AgentError::Refused { what, errno, message }),
        Ok(reply) => Ok(reply),
        Err(e) => Err(AgentError::Protocol {
            what,
            why: e.to_string(),
        }),
    }
}

/// An [`ExchangeError`] with names.
pub(crate) fn explain(state: &State, what: &'static str, error: ExchangeError) -> AgentError {
    match error {
        ExchangeError::Gone => AgentError::Gone(gone(state)),
        ExchangeError::System(errno) => AgentError::System {
            what,
            source: std::io::Error::from_raw_os_error(errno),
        },
        ExchangeError::Refused(errno) => AgentError::Refused {
            what,
            errno,
            message: std::io::Error::from_raw_os_error(errno).to_string(),
        },
        ExchangeError::Protocol => AgentError::Protocol {
            what,
            why: "an answer of another kind".into(),
        },
    }
}

/// Who is gone and why.
pub(crate) fn gone(state: &State) -> Gone {
    use crate::state::cause;
    let reason = {
        let mask = sys::block_signals();
        let reason = state.reason.lock();
        let text = String::from_utf8_lossy(&reason.text[..reason.len]).into_owned();
        drop(reason);
        sys::restore_signals(mask);
        text
    };
    let daemon = format!("host daemon (pid {})", state.daemon_pid.load(Ordering::Relaxed));
    let (who, mut why) = match state.cause.load(Ordering::Acquire) {
        cause::EXITED => (daemon, "its process has ended".to_owned()),
        cause::HUNG_UP => (daemon, "it closed the session's sockets".to_owned()),
        cause::CLOSED => (daemon, "it ended the session".to_owned()),
        cause::SILENT => (daemon, "it did not answer within the fence timeout".to_owned()),
        cause::DETACHED => (daemon, "this process has detached".to_owned()),
        _ if state.device_lost.load(Ordering::Acquire) != 0 => (
            format!(
                "device process (pid {})",
                state.device_pid.load(Ordering::Relaxed)
            ),
            "its process has ended".to_owned(),
        ),
        _ => (daemon, "the control socket is closed".to_owned()),
    };
    if !reason.is_empty() {
        why = format!("{why} ({reason})");
    }
    Gone { who, why }
}
