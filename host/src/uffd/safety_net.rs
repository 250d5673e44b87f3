//! The safety net: changes of the address space that nobody announced.
//!
//! The thread that made the change sleeps until its event has been read. What must be true once its system
//! call has returned is therefore made true *before* `read()`: fills are blocked, every translation of the
//! whole space is purged and drained, and only then one event is read. Readiness does not say which event it
//! is, hence the whole space.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ReadWriteFlags;

use super::ioctl;
use super::message::{MESSAGE_BYTES, Message};
use crate::notifier::{Ctx, Event, Histogram, MaySleep, NotifierRange, Started};
use crate::session::space::AddressSpace;
use crate::subscribers::Paused;

/// Time between attempts to answer a fault whose mapping is being changed. Its event usually comes first and
/// ends the wait.
const FAULT_RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Messages that are served without letting the device's faults through.
const MOST_MESSAGES: u32 = 64;
/// How long they are let through then: time for a few of them.
const DEVICES_TURN: Duration = Duration::from_millis(1);

/// Faults that can wait for a change to end; more are woken and fault again.
const MOST_WAITING_FAULTS: usize = 256;

/// How the safety net is made to misbehave, for experiments.
#[derive(Debug, Clone, Copy, Default)]
pub struct Injection {
    /// Purge after `read()`.
    pub purge_late: bool,
    /// Between `read()` and the purge when `purge_late`, else between readiness and the purge.
    pub delay: Duration,
}

/// What the safety net counts, for one kind of message.
#[derive(Debug, Default)]
pub struct KindStats {
    /// From readiness to the event having been read: how much longer the system call took.
    pub ready_to_read: Histogram,
    /// Of the messages, those whose purge could be skipped: nothing was cached anywhere.
    pub purges_skipped: AtomicU64,
}

/// Kinds of messages, in the order of [`SafetyNetStats::kinds`].
pub const KINDS: [&str; 6] = ["page_fault", "fork", "remap", "remove", "unmap", "other"];

/// What the safety net counts.
#[derive(Debug, Default)]
pub struct SafetyNetStats {
    /// By kind, named by [`KINDS`].
    pub kinds: [KindStats; KINDS.len()],
    /// Zero pages put in place (missing mode).
    pub zero_pages: AtomicU64,
    /// Attempts that found the mapping being changed.
    pub zero_page_retries: AtomicU64,
    /// Readiness without a message: the thread that waited was killed.
    pub empty_reads: AtomicU64,
}

fn kind_of(message: Message) -> usize {
    match message {
        Message::PageFault { .. } => 0,
        Message::Fork { .. } => 1,
        Message::Remap { .. } => 2,
        Message::Remove { .. } => 3,
        Message::Unmap { .. } => 4,
        Message::Other(_) => 5,
    }
}

/// The reader of one session's userfaultfd.
#[derive(Debug)]
pub struct SafetyNet {
    uffd: OwnedFd,
    space: Arc<AddressSpace>,
    injection: Injection,
    /// Pages that could not be answered while their mapping was being changed.
    waiting: Vec<u64>,
}

impl SafetyNet {
    /// `uffd` has been checked: a userfaultfd, initialised, non-blocking.
    #[must_use]
    pub fn new(uffd: OwnedFd, space: Arc<AddressSpace>, injection: Injection) -> Self {
        Self {
            uffd,
            space,
            injection,
            waiting: Vec::new(),
        }
    }

    /// The thread's life: until `stop` is readable, or the userfaultfd fails (its process is gone).
    pub fn run(mut self, stop: impl AsFd) {
        let token = MaySleep::claim("uffd thread");
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN),
            ];
            let timeout = (!self.waiting.is_empty()).then_some(&FAULT_RETRY);
            match poll(&mut fds, timeout) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    self.space
                        .end(format!("its userfaultfd cannot be polled: {error}"));
                    return;
                }
            }
            let (stopped, events) = (!fds[0].revents().is_empty(), fds[1].revents());
            if stopped {
                return;
            }
            if events.contains(PollFlags::IN) {
                self.serve(&token);
                if self.space.has_ended() {
                    return;
                }
            } else if !events.is_empty() {
                self.space.end(format!("its userfaultfd has failed ({events:?})"));
                return;
            }
            self.retry_faults();
        }
    }

    /// Serves messages until none is pending, or there have been many. Fills stay blocked from before the first
    /// purge until after the last discard: a second event may have arrived in between.
    fn serve(&mut self, token: &MaySleep) {
        let block = self.space.block_fills();
        let mut ready = Instant::now();
        for served in 1.. {
            // Each event is a change of its own: what was looked up before it carries an older generation.
            let change = self.space.block_fills();
            let mut purged = None;
            if !self.injection.purge_late {
                self.delay();
                purged = self.purge(token);
            }
            // What was unmapped is nobody's to discard from the moment of the read on, and which range that is, is
            // known only after it.
            let space = self.space.clone();
            let mut paused = space.pause_reclaimer(token);
            let message = self.read();
            if let Ok(Some(message)) = message {
                self.forget(message, paused.as_mut());
                // Whoever made the change goes on.
                for (start, end) in message.discards() {
                    self.space.publish_change(start, end, change.generation());
                }
            }
            drop(paused);
            let read_after = ready.elapsed();
            if self.injection.purge_late {
                self.delay();
                purged = self.purge(token);
            }
            match message {
                Ok(Some(message)) => {
                    let stats = &self.space.stats.safety_net.kinds[kind_of(message)];
                    stats
                        .ready_to_read
                        .record(u64::try_from(read_after.as_nanos()).unwrap_or(u64::MAX));
                    if purged.is_none() {
                        stats.purges_skipped.fetch_add(1, Ordering::Relaxed);
                    }
                    self.handle(message);
                }
                Ok(None) => {
                    self.space
                        .stats
                        .safety_net
                        .empty_reads
                        .fetch_add(1, Ordering::Relaxed);
                }
                // Without events the translations cannot be kept true. When the application is just gone, its
                // session ends anyway.
                Err(ref error) => self.space.end(format!("its userfaultfd cannot be read: {error}")),
            }
            if let Some(started) = purged {
                self.space
                    .chain()
                    .invalidate_range_end(started, Ctx::MaySleep(token));
            }
            drop(change);
            if !matches!(message, Ok(Some(_))) || !self.pending() {
                break;
            }
            if served >= MOST_MESSAGES && self.space.faults_are_deferred() {
                // Threads that keep sending events must not keep the device out for ever. Nothing is lost: who
                // sent an event sleeps until it is read, and that comes after another purge.
                drop(block);
                self.space.retry_deferred();
                std::thread::sleep(DEVICES_TURN);
                return;
            }
            ready = Instant::now();
        }
        drop(block);
        self.space.retry_deferred();
    }

    fn delay(&self) {
        if !self.injection.delay.is_zero() {
            std::thread::sleep(self.injection.delay);
        }
    }

    /// Purges the whole space. `None` when nothing can be cached: fills are blocked and none is left.
    fn purge(&self, token: &MaySleep) -> Option<Started> {
        if self.space.nothing_cached() {
            return None;
        }
        match self.space.start(NotifierRange::all(Event::Unmap, true), token) {
            Ok((started, round)) => {
                self.space.chain().record(round);
                Some(started)
            }
            Err(errno) => {
                // A blockable start that fails is a subscriber's bug (C4). The event must be read all the
                // same, or the application hangs; what can be done is to say so.
                tracing::error!(session = self.space.id(), errno, "the safety net could not purge");
                None
            }
        }
    }

    fn pending(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.uffd.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
            && fds[0].revents().contains(PollFlags::IN)
    }

    fn read(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; MESSAGE_BYTES];
        loop {
            return match self.read_bytes(&mut bytes) {
                Ok(MESSAGE_BYTES) => Ok(Some(Message::parse(&bytes))),
                Ok(n) => Err(io::Error::other(format!("userfaultfd message of {n} bytes"))),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Never waits, where the kernel can be told so (6.10): `O_NONBLOCK` belongs to the open file, which the
    /// application has too.
    fn read_bytes(&self, bytes: &mut [u8]) -> rustix::io::Result<usize> {
        let mut into = [std::io::IoSliceMut::new(bytes)];
        match rustix::io::preadv2(&self.uffd, &mut into, u64::MAX, ReadWriteFlags::NOWAIT) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                rustix::io::read(&self.uffd, bytes)
            }
            other => other,
        }
    }

    /// Forgets what was known about the ranges of an event.
    fn forget(&self, message: Message, mut reclaimer: Option<&mut Paused<'_>>) {
        let unmapped = !matches!(message, Message::Remove { .. });
        for (start, end) in message.discards() {
            self.space.cache().discard(start, end);
            if !unmapped {
                self.space.drop_held(start, end);
            }
            if unmapped && let Some(reclaimer) = &mut reclaimer {
                reclaimer.forget(start, end);
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Fork { child } => drop(own(child)),
            Message::PageFault { address, .. } => self.answer_fault(address),
            Message::Other(event) => {
                tracing::warn!(session = self.space.id(), event, "unknown userfaultfd event");
            }
            Message::Remap { .. } | Message::Remove { .. } | Message::Unmap { .. } => {}
        }
    }

    fn retry_faults(&mut self) {
        for address in std::mem::take(&mut self.waiting) {
            self.answer_fault(address);
        }
    }

    /// Missing mode: a page that was punched out is zero again. A fault that cannot be answered with a page
    /// is woken: the thread faults again and gets what the mapping says by then.
    fn answer_fault(&mut self, address: u64) {
        let stats = &self.space.stats.safety_net;
        match ioctl::zero_page(&self.uffd, address) {
            Ok(()) => {
                stats.zero_pages.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                stats.zero_page_retries.fetch_add(1, Ordering::Relaxed);
                if self.waiting.len() < MOST_WAITING_FAULTS {
                    self.waiting.push(address);
                    return;
                }
            }
            Err(error) => {
                tracing::trace!(session = self.space.id(), address, %error, "zero page");
            }
        }
        if let Err(error) = ioctl::wake(&self.uffd, address) {
            tracing::debug!(session = self.space.id(), address, %error, "wake of a faulting thread");
        }
    }
}

#[allow(unsafe_code, reason = "a descriptor arrives as a number inside the message")]
fn own(child: i32) -> OwnedFd {
    // SAFETY: the kernel has just installed this descriptor in this process for the reader of the message.
    unsafe { OwnedFd::from_raw_fd(child) }
}
