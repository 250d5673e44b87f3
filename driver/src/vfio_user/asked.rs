//! The thread that answers the server: on a twin socket it reads the server's commands, on one socket those
//! and the replies to our own, which it hands to the call that waits.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use protos::vfio_user::{DmaAccess, Header, MessageType};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, Shutdown, recvmsg, send,
    shutdown,
};
use zerocopy::FromBytes;

use super::MAX_DATA;
use super::error::CallError;
use super::memory::MemoryMap;
use super::transport::MAX_FDS;

/// Longest message of the server: a DMA_WRITE with its data, or a reply to a region read.
const LONGEST: usize = Header::SIZE + DmaAccess::SIZE + MAX_DATA as usize;

/// A reply for the call that waits.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    reply: Option<Arrived>,
    /// The thread has ended.
    ended: Option<String>,
}

/// A socket that a thread reads.
#[derive(Debug)]
pub(super) struct Asked {
    socket: Arc<OwnedFd>,
    /// Held for one whole message.
    sending: Mutex<()>,
    memory: Arc<MemoryMap>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Ends the thread when dropped.
#[derive(Debug)]
pub(super) struct AskedThread {
    asked: Arc<Asked>,
    thread: Option<JoinHandle<()>>,
}

impl AskedThread {
    /// Read `socket` from now on.
    ///
    /// # Errors
    /// No thread is left.
    pub(super) fn start(socket: Arc<OwnedFd>, memory: Arc<MemoryMap>) -> Result<Self, CallError> {
        let asked = Arc::new(Asked {
            socket,
            sending: Mutex::new(()),
            memory,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let for_thread = Arc::clone(&asked);
        let thread = std::thread::Builder::new()
            .name("vfio-user-dma".into())
            .spawn(move || {
                let why = for_thread.read_on();
                tracing::debug!(why, "the server's socket is not read any more");
                for_thread.lock().ended = Some(why);
                for_thread.changed.notify_all();
            })
            .map_err(|error| {
                let errno = error
                    .raw_os_error()
                    .map_or(Errno::NOMEM, Errno::from_raw_os_error);
                CallError::System(errno)
            })?;
        Ok(Self {
            asked,
            thread: Some(thread),
        })
    }

    pub(super) fn asked(&self) -> &Arc<Asked> {
        &self.asked
    }
}

impl Drop for AskedThread {
    fn drop(&mut self) {
        let _ = shutdown(&*self.asked.socket, Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that answers the server has panicked");
        }
    }
}

impl Asked {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody else sends meanwhile.
    pub(super) fn sending(&self) -> MutexGuard<'_, ()> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next reply.
    pub(super) fn reply(&self, timeout: Option<Duration>) -> Result<Arrived, CallError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        loop {
            if let Some(reply) = state.reply.take() {
                return Ok(reply);
            }
            if state.ended.is_some() {
                return Err(CallError::Closed);
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(CallError::Timeout(timeout.unwrap_or_default()));
                    }
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn read_on(&self) -> String {
        loop {
            if let Err(why) = self.one_message() {
                return why;
            }
        }
    }

    fn one_message(&self) -> Result<(), String> {
        let mut fds = Vec::new();
        let mut head = [0; Header::SIZE];
        self.fill(&mut head, &mut fds)?;
        let header = Header::read_from_bytes(&head).expect("16 bytes are a header");
        let len = header.payload_len(LONGEST).map_err(|error| error.to_string())?;
        let mut body = vec![0; len];
        self.fill(&mut body, &mut fds)?;
        match header.flags.message_type() {
            MessageType::Reply => {
                let mut state = self.lock();
                if state.reply.is_some() {
                    return Err("two replies to one request".into());
                }
                state.reply = Some(Arrived { header, body, fds });
                drop(state);
                self.changed.notify_all();
                Ok(())
            }
            MessageType::Command => {
                let Some(answer) = self.memory.answer(&header, &body) else {
                    return Ok(());
                };
                let _whole = self.sending();
                let mut sent = 0;
                while sent < answer.len() {
                    let result = retry_on_intr(|| send(&self.socket, &answer[sent..], SendFlags::NOSIGNAL));
                    sent += result.map_err(|errno| format!("an answer cannot be sent: {errno}"))?;
                }
                Ok(())
            }
            MessageType::Unknown(kind) => Err(format!("message type {kind}")),
        }
    }

    fn fill(&self, mut to: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), String> {
        while !to.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [IoSliceMut::new(to)];
            let message = match recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => message,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.to_string()),
            };
            for ancillary in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                    fds.extend(received);
                }
            }
            if message.flags.contains(ReturnFlags::CTRUNC) {
                return Err(format!("more than {MAX_FDS} file descriptors came"));
            }
            if message.bytes == 0 {
                return Err("closed".into());
            }
            to = &mut to[message.bytes..];
        }
        Ok(())
    }
}
