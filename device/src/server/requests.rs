//! Commands of the server to its client: DMA_READ and DMA_WRITE.
//!
//! They cross the client's own commands, on the same socket or on a twin. A device's worker sends one and
//! waits here; the thread that reads the socket goes on serving and hands the answer over. Whoever takes the
//! memory away ([`Messenger::abort`]) wakes the worker with an error; the message id stays taken until the
//! late answer has come and has been thrown away, so that it is never taken for another one's.
//!
//! A DMA_READ that is not answered in time fails and is forgotten. A DMA_WRITE cannot be forgotten: the client may do
//! it at any later time, when the memory means something else to whoever gave the device its address. So the client
//! is disconnected.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protos::vfio_user::{Command, DmaAccess, Header, MessageFlags};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use zerocopy::{FromBytes, IntoBytes};

use super::frame::{self, Ended};
use crate::dma::{DmaError, Interest, Messenger};

/// Most message ids in use, those of answers that never came included.
const MAX_TICKETS: usize = 1024;

/// Buffers for answers that are kept, and the largest of them.
const KEPT: usize = 8;
const KEPT_BYTES: usize = 128 << 10;

thread_local! {
    /// This thread reads a client's socket.
    static SERVING: Cell<bool> = const { Cell::new(false) };
}

/// From now on this thread may not wait for a client.
pub(super) fn this_thread_serves() {
    SERVING.set(true);
}

/// A socket that several threads send on.
#[derive(Debug)]
pub(super) struct Outgoing {
    socket: Arc<OwnedFd>,
    /// Held for one whole message (at most `client_timeout`, then the connection ends).
    whole: Mutex<()>,
}

impl Outgoing {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            socket,
            whole: Mutex::new(()),
        })
    }

    pub(super) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Send a message, and `fds` with its first byte.
    #[inline(always)]
    pub(super) fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Ended> {
        let _whole = self.lock();
        frame::send_message(&self.socket, message, fds)
    }
}

/// Where a client has the data in DMA_READ and DMA_WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Layout {
    /// It has not been asked.
    Unknown,
    /// Behind a 64-bit count.
    Specified,
    /// Behind a 32-bit count (QEMU).
    Short,
}

/// How requests are made to one client.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestOptions {
    /// Most data bytes of one request.
    pub(super) max_transfer: usize,
    /// How long an answer may take.
    pub(super) timeout: Duration,
    /// The client may have QEMU's layout: find out before the first access.
    pub(super) may_be_short: bool,
}

/// One access.
#[derive(Debug)]
struct Ticket {
    iova: u64,
    len: u64,
    command: Command,
    /// A request was sent, and no answer has come.
    outstanding: bool,
    aborted: bool,
    /// Nobody waits any more.
    abandoned: bool,
    answer: Option<Result<Vec<u8>, Errno>>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    next: u16,
    tickets: HashMap<u16, Ticket>,
    /// Buffers for answers.
    spare: Vec<Vec<u8>>,
}

/// What one client is asked.
#[derive(Debug)]
pub(super) struct Requests {
    out: Arc<Outgoing>,
    /// What is shut down when the client cannot be trusted any more: the socket of its own commands.
    connection: Arc<OwnedFd>,
    options: RequestOptions,
    layout: AtomicU8,
    /// Taken inside `out`'s lock, or alone.
    state: Mutex<State>,
    changed: Condvar,
}

impl Requests {
    /// `out` is where requests go, `connection` the socket of the client's own commands.
    pub(super) fn new(out: Arc<Outgoing>, connection: Arc<OwnedFd>, options: RequestOptions) -> Arc<Self> {
        let layout = if options.may_be_short {
            Layout::Unknown
        } else {
            Layout::Specified
        };
        Arc::new(Self {
            out,
            connection,
            options,
            layout: AtomicU8::new(layout as u8),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection is over: everybody who waits gets an error.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Hand an answer to the one who waits for it. False: nobody ever asked that.
    pub(super) fn deliver(&self, header: &Header, body: &[u8]) -> bool {
        let mut state = self.lock();
        let id = header.message_id;
        let Some(ticket) = state.tickets.get_mut(&id) else {
            return false;
        };
        if !ticket.outstanding || ticket.command != header.command {
            return false;
        }
        ticket.outstanding = false;
        if ticket.abandoned {
            tracing::debug!(id, command = %header.command, "late answer thrown away");
            state.tickets.remove(&id);
            return true;
        }
        let answer = if header.flags.contains(MessageFlags::ERROR) {
            let errno = i32::try_from(header.error)
                .ok()
                .filter(|errno| (1..4096).contains(errno));
            Err(errno.map_or(Errno::IO, Errno::from_raw_os_error))
        } else {
            let mut bytes = state.spare.pop().unwrap_or_default();
            bytes.clear();
            bytes.extend_from_slice(body);
            Ok(bytes)
        };
        if let Some(ticket) = state.tickets.get_mut(&id) {
            ticket.answer = Some(answer);
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// The ticket is not needed any more.
    fn finish(&self, id: u16) {
        let mut state = self.lock();
        match state.tickets.get_mut(&id) {
            Some(ticket) if ticket.outstanding => ticket.abandoned = true,
            _ => {
                state.tickets.remove(&id);
            }
        }
    }

    /// An answer's buffer is not needed any more.
    fn give_back(&self, answer: Vec<u8>) {
        let mut state = self.lock();
        if state.spare.len() < KEPT && answer.capacity() <= KEPT_BYTES {
            state.spare.push(answer);
        }
    }

    /// The client may still do what it was asked to, and nobody will know when.
    fn cut_off(&self, iova: u64) {
        tracing::warn!(
            iova,
            timeout = ?self.options.timeout,
            "the client has not answered a DMA_WRITE in time: it is disconnected, as it could still write there later"
        );
        let _ = shutdown(&*self.connection, Shutdown::Both);
        self.close();
    }

    /// Send a request and wait for the answer's payload, which goes to [`Requests::give_back`].
    fn exchange(
        &self,
        id: u16,
        command: Command,
        payload: [&[u8]; 3],
        interest: &dyn Interest,
    ) -> Result<Vec<u8>, DmaError> {
        let len = payload.iter().map(|part| part.len()).sum();
        let header = Header::command(id, command, len, MessageFlags::COMMAND);
        let writes = command == Command::DMA_WRITE;
        {
            // Looked at under the lock of the stream: what is aborted before an unmap's reply is sent is not
            // sent after it.
            let _whole = self.out.lock();
            let mut state = self.lock();
            let closed = state.closed;
            let ticket = state.tickets.get_mut(&id).expect("an open ticket");
            ticket.ended(closed)?;
            let wanted = if writes {
                interest.commit()
            } else {
                interest.wanted()
            };
            ticket.still(wanted)?;
            ticket.command = command;
            ticket.outstanding = true;
            drop(state);
            let [first, second, third] = payload;
            let mut pieces = [header.as_bytes(), first, second, third].map(IoSlice::new);
            if let Err(ended) = frame::send_pieces(&self.out.socket, &mut pieces) {
                tracing::warn!(%command, reason = %ended, "a request cannot be sent; the connection ends");
                // The stream may end in the middle of a message.
                let _ = shutdown(&*self.out.socket, Shutdown::Both);
                self.close();
            }
        }
        let deadline = Instant::now().checked_add(self.options.timeout);
        let mut state = self.lock();
        loop {
            let closed = state.closed;
            let ticket = state.tickets.get_mut(&id).expect("an open ticket");
            ticket.ended(closed)?;
            let (iova, len) = (ticket.iova, ticket.len);
            if let Some(answer) = ticket.answer.take() {
                return answer.map_err(|errno| DmaError::Refused { iova, len, errno });
            }
            ticket.still(writes || interest.wanted())?;
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        drop(state);
                        if writes {
                            self.cut_off(iova);
                        }
                        return Err(DmaError::NoAnswer { iova, len });
                    }
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Find out which layout the client has. The request reads nothing: by the specification it asks for 4
    /// GiB, which is over every limit and refused; with a 32-bit count it asks for 0 bytes.
    fn learn_layout(&self, id: u16, iova: u64, interest: &dyn Interest) -> Result<Layout, DmaError> {
        let known = self.layout.load(Ordering::Relaxed);
        if known != Layout::Unknown as u8 {
            return Ok(if known == Layout::Short as u8 {
                Layout::Short
            } else {
                Layout::Specified
            });
        }
        let probe = DmaAccess {
            address: iova,
            count: 1 << 32,
        };
        let layout = match self.exchange(id, Command::DMA_READ, [probe.as_bytes(), &[], &[]], interest) {
            Ok(answer) => {
                self.give_back(answer);
                Layout::Short
            }
            Err(DmaError::Refused { .. }) => Layout::Specified,
            Err(error) => return Err(error),
        };
        tracing::debug!(?layout, "the client's layout of DMA_READ and DMA_WRITE");
        self.layout.store(layout as u8, Ordering::Relaxed);
        Ok(layout)
    }

    fn read_now(&self, id: u16, iova: u64, to: &mut [u8], interest: &dyn Interest) -> Result<(), DmaError> {
        let layout = self.learn_layout(id, iova, interest)?;
        let access = DmaAccess {
            address: iova,
            count: to.len() as u64,
        };
        let answer = self.exchange(id, Command::DMA_READ, [access.as_bytes(), &[], &[]], interest)?;
        let result = take_data(layout, &access, &answer, to);
        self.give_back(answer);
        result
    }

    fn write_now(&self, id: u16, iova: u64, from: &[u8], interest: &dyn Interest) -> Result<(), DmaError> {
        let layout = self.learn_layout(id, iova, interest)?;
        let access = DmaAccess {
            address: iova,
            count: from.len() as u64,
        };
        let head = access.as_bytes();
        let parts: [&[u8]; 3] = match layout {
            Layout::Short => {
                let (head, rest) = head.split_at(DmaAccess::SHORT_SIZE);
                [head, from, rest]
            }
            _ => [head, from, &[]],
        };
        let answer = self.exchange(id, Command::DMA_WRITE, parts, interest)?;
        let echoed = DmaAccess::read_from_prefix(&answer)
            .is_ok_and(|(echoed, _)| echoed.address == iova && echoed.count as u32 == access.count as u32);
        self.give_back(answer);
        if !echoed {
            return Err(DmaError::Refused {
                iova,
                len: access.count,
                errno: Errno::PROTO,
            });
        }
        Ok(())
    }
}

/// The data of an answer to DMA_READ.
fn take_data(layout: Layout, access: &DmaAccess, answer: &[u8], to: &mut [u8]) -> Result<(), DmaError> {
    let bad = DmaError::Refused {
        iova: access.address,
        len: access.count,
        errno: Errno::PROTO,
    };
    if answer.len() != DmaAccess::SIZE + to.len() {
        return Err(bad);
    }
    let (head, data) = match layout {
        Layout::Short => answer.split_at(DmaAccess::SHORT_SIZE),
        _ => answer.split_at(DmaAccess::SIZE),
    };
    if head != &access.as_bytes()[..head.len()] {
        return Err(bad);
    }
    to.copy_from_slice(&data[..to.len()]);
    Ok(())
}

impl Ticket {
    fn still(&self, wanted: bool) -> Result<(), DmaError> {
        let (iova, len) = (self.iova, self.len);
        wanted.then_some(()).ok_or(DmaError::Unwanted { iova, len })
    }

    fn ended(&self, closed: bool) -> Result<(), DmaError> {
        let why = if self.aborted {
            "the memory was unmapped, or the function reset"
        } else if closed {
            "the client is gone"
        } else {
            return Ok(());
        };
        Err(DmaError::Aborted {
            iova: self.iova,
            len: self.len,
            why,
        })
    }
}

impl Messenger for Requests {
    fn max_transfer(&self) -> usize {
        self.options.max_transfer.max(1)
    }

    fn open(&self, iova: u64, len: u64) -> Result<u16, DmaError> {
        if SERVING.get() {
            return Err(DmaError::ServingThread { iova });
        }
        let mut state = self.lock();
        let why = if state.closed {
            "the client is gone"
        } else if state.tickets.len() >= MAX_TICKETS {
            "too many answers are outstanding"
        } else {
            loop {
                let id = state.next;
                state.next = id.wrapping_add(1);
                if let std::collections::hash_map::Entry::Vacant(free) = state.tickets.entry(id) {
                    free.insert(Ticket {
                        iova,
                        len,
                        command: Command::DMA_READ,
                        outstanding: false,
                        aborted: false,
                        abandoned: false,
                        answer: None,
                    });
                    return Ok(id);
                }
            }
        };
        Err(DmaError::Aborted { iova, len, why })
    }

    fn read(&self, ticket: u16, iova: u64, to: &mut [u8], interest: &dyn Interest) -> Result<(), DmaError> {
        let result = self.read_now(ticket, iova, to, interest);
        self.finish(ticket);
        result
    }

    fn write(&self, ticket: u16, iova: u64, from: &[u8], interest: &dyn Interest) -> Result<(), DmaError> {
        let result = self.write_now(ticket, iova, from, interest);
        self.finish(ticket);
        result
    }

    fn abort(&self, iova: Range<u64>) {
        let mut state = self.lock();
        for ticket in state.tickets.values_mut() {
            // Inside one mapping, and mappings do not wrap.
            ticket.aborted |= ticket.iova < iova.end && iova.start < ticket.iova + ticket.len;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn recheck(&self) {
        // Under the lock: whoever looked before waits by now.
        let state = self.lock();
        drop(state);
        self.changed.notify_all();
    }
}
