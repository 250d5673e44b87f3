//! XPMEM's part: other processes map an application's pages, so an invalidation is a message to them and a wait
//! for their real unmapping. It has to sleep, and refuses where it must not.
//!
//! # What a peer owes
//! Pages are asked for on the control socket, zaps come on the notice socket, and neither waits for the other.
//! So a peer counts the zaps it has handled, under the lock that it also maps under: it notes the count, asks
//! (`PeerResolve`), takes the lock, and maps only if the count is still the same; a zap takes the lock, unmaps,
//! counts, and then answers `Zapped`. This is read_begin / read_retry across a socket.
//!
//! # What the daemon does to answer a `PeerResolve`
//! [`Xpmem::resolve_begin`], the look-up, [`Xpmem::resolve_retry`] just before the reply is sent.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Instant;

use protos::bridge::control::{MAX_PACKET, Notice, NoticeReply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::fence::{Fence, Outcome, Peer, Progress};
use crate::notifier::{Again, Ctx, MaySleep, NotifierRange, SpinMutex, Subscriber, might_sleep};

/// Old answers read at one look, so that a peer that floods the socket cannot keep the deadline from being seen.
const PACKETS_PER_LOOK: usize = 64;

/// One attached process.
#[derive(Debug)]
pub struct PeerLink {
    peer: Peer,
    socket: OwnedFd,
    start: u64,
    end: u64,
    gone: AtomicBool,
    /// Held from a zap until its answer: one at a time on the socket.
    wire: Mutex<()>,
}

impl PeerLink {
    /// A peer that has attached `[start, end)`; `socket` is its notice socket (SEQPACKET).
    #[must_use]
    pub fn new(peer: Peer, socket: OwnedFd, start: u64, end: u64) -> Arc<Self> {
        Arc::new(Self {
            peer,
            socket,
            start,
            end,
            gone: AtomicBool::new(false),
            wire: Mutex::new(()),
        })
    }

    /// The process.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether the process has been found gone (or was fenced).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn meets(&self, range: &NotifierRange) -> bool {
        !self.is_gone() && range.meets(self.start, self.end)
    }

    /// Whether the peer has closed its end. Takes nothing from the socket.
    fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::RDHUP)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
            && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP)
    }

    /// Ends the attachment of a peer that has nothing mapped any more. The caller has the wire.
    fn dismiss(&self, reason: &str) {
        self.gone.store(true, Ordering::Release);
        // Without room the hang-up says the same.
        let _ = self.try_send(&Notice::Closing {
            reason: reason.into(),
        });
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// One look at a zap that has been sent, or is still to be.
    fn look_for_zapped(
        &self,
        zap: &Notice,
        sent: &mut Result<bool, Errno>,
        seq: u64,
        buffer: &mut [u8],
    ) -> Progress<u64> {
        if *sent == Ok(false) {
            *sent = self.try_send(zap);
        }
        match sent {
            Ok(true) => self.try_receive(seq, buffer),
            Ok(false) => Progress::NoRoom,
            Err(errno) => Progress::Never(format!("sending to it failed: {errno}")),
        }
    }

    /// `Ok(false)` = no room.
    fn try_send(&self, notice: &Notice) -> Result<bool, Errno> {
        let packet = serde_json::to_vec(notice).expect("a notice is plain data");
        match send(&self.socket, &packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    fn try_receive(&self, seq: u64, buffer: &mut [u8]) -> Progress<u64> {
        for _ in 0..PACKETS_PER_LOOK {
            let packet = match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok((_, 0)) => return Progress::Never("it closed its notice socket".into()),
                Ok((_, length)) if length > buffer.len() => {
                    return Progress::Never(format!("its notice reply has {length} bytes"));
                }
                Ok((_, length)) => &buffer[..length],
                Err(Errno::AGAIN | Errno::INTR) => return Progress::NotYet,
                Err(errno) => return Progress::Never(format!("its notice socket failed: {errno}")),
            };
            match serde_json::from_slice::<NoticeReply>(packet) {
                Ok(NoticeReply::Zapped {
                    seq: answered,
                    unmapped_bytes,
                }) if answered == seq => return Progress::Reply(unmapped_bytes),
                // An answer to a zap whose waiter was overtaken by an error.
                Ok(NoticeReply::Zapped { seq: answered, .. }) if answered < seq => {}
                Ok(other) => return Progress::Never(format!("its answer {other:?} is to no request")),
                Err(error) => return Progress::Never(format!("its answer is malformed: {error}")),
            }
        }
        Progress::NotYet
    }
}

/// The sequence that a resolve began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "ask resolve_retry before the reply is sent"]
pub struct PeerSequence(u64);

/// Why a peer's page cannot be looked up now: answer EAGAIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerBusy {
    /// The range is between a start and its end.
    #[error("EAGAIN: the range is being changed; ask again after ZapEnd")]
    Changing,
    /// The address space has ended.
    #[error("the application is gone; nothing can be attached any more")]
    Released,
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct XpmemStats {
    /// Zaps sent.
    pub zaps: u64,
    /// Bytes that peers say they have unmapped.
    pub unmapped_bytes: u64,
    /// Non-blockable starts refused.
    pub refused: u64,
    /// Peers that were found gone or killed during a zap.
    pub peers_gone: u64,
    /// Peers attached now.
    pub peers: u64,
    /// Zap ends that could not be sent.
    pub ends_lost: u64,
}

#[derive(Debug, Default)]
struct Counters {
    zaps: AtomicU64,
    unmapped_bytes: AtomicU64,
    refused: AtomicU64,
    peers_gone: AtomicU64,
    ends_lost: AtomicU64,
}

#[derive(Debug)]
struct Retry {
    in_progress: u64,
    /// Union of the ranges in progress.
    range: (u64, u64),
    sequence: u64,
    released: bool,
}

/// A zap whose end is still to come.
#[derive(Debug)]
struct OpenZap {
    range: NotifierRange,
    seq: u64,
    links: Vec<Arc<PeerLink>>,
}

/// The subscriber for all peers of one address space.
///
/// Lock order: `peers` (not held during I/O), then each link's `wire` in the order of `peers`; `open` and
/// `retry` are leaves.
#[derive(Debug)]
pub struct Xpmem {
    fence: Arc<Fence>,
    peers: Mutex<Vec<Arc<PeerLink>>>,
    open: Mutex<Vec<OpenZap>>,
    retry: SpinMutex<Retry>,
    next_seq: AtomicU64,
    counters: Counters,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// `None` when somebody else has it.
fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Xpmem {
    /// Without peers. Register it with the chain before the first is attached.
    #[must_use]
    pub fn new(fence: Arc<Fence>) -> Arc<Self> {
        Arc::new(Self {
            fence,
            peers: Mutex::default(),
            open: Mutex::default(),
            retry: SpinMutex::new(Retry {
                in_progress: 0,
                range: (u64::MAX, 0),
                sequence: 0,
                released: false,
            }),
            next_seq: AtomicU64::new(1),
            counters: Counters::default(),
        })
    }

    /// Adds a peer. It has nothing mapped yet, and nothing of a range that is changing now can be resolved
    /// (S10). In the shared table `must_hop` has to be raised, and `silent_calls` seen at zero, before this.
    pub fn attach(&self, link: Arc<PeerLink>, _token: &MaySleep) {
        might_sleep("Xpmem::attach");
        lock(&self.peers).push(link);
    }

    /// Removes a peer: zaps all that it has, unless it has closed its notice socket (which says that it has
    /// unmapped everything) or is gone. Returns whether it was attached.
    pub fn detach(&self, link: &Arc<PeerLink>, token: &MaySleep) -> bool {
        might_sleep("Xpmem::detach");
        let wire = lock(&link.wire);
        if !link.is_gone() {
            let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
            let zap = Notice::Zap {
                seq,
                start: link.start,
                end: link.end,
            };
            let mut sent = link.try_send(&zap);
            let mut buffer = vec![0; MAX_PACKET];
            let look = || {
                if link.has_hung_up() {
                    return Progress::Reply(0);
                }
                link.look_for_zapped(&zap, &mut sent, seq, &mut buffer)
            };
            let outcome = self.fence.wait(&link.peer, link.socket.as_fd(), token, look);
            if let Err(error) = outcome {
                panic!("waiting for {} (pid {}): {error}", link.peer.name, link.peer.pid);
            }
            link.dismiss("detached");
        }
        drop(wire);
        let mut peers = lock(&self.peers);
        let before = peers.len();
        peers.retain(|other| !Arc::ptr_eq(other, link));
        before != peers.len()
    }

    /// Before a page of a peer's range is looked up (S5).
    ///
    /// # Errors
    /// [`PeerBusy`].
    pub fn resolve_begin(&self, start: u64, end: u64) -> Result<PeerSequence, PeerBusy> {
        let retry = self.retry.lock();
        if retry.released {
            return Err(PeerBusy::Released);
        }
        if retry.in_progress != 0 && start < retry.range.1 && retry.range.0 < end {
            return Err(PeerBusy::Changing);
        }
        Ok(PeerSequence(retry.sequence))
    }

    /// After the look-up, just before the reply is sent: whether it must be thrown away.
    #[must_use]
    pub fn resolve_retry(&self, sequence: PeerSequence, start: u64, end: u64) -> bool {
        match self.resolve_begin(start, end) {
            Ok(now) => now != sequence,
            Err(_) => true,
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> XpmemStats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let c = &self.counters;
        XpmemStats {
            zaps: read(&c.zaps),
            unmapped_bytes: read(&c.unmapped_bytes),
            refused: read(&c.refused),
            peers_gone: read(&c.peers_gone),
            peers: lock(&self.peers).len() as u64,
            ends_lost: read(&c.ends_lost),
        }
    }

    fn begin(&self, range: &NotifierRange) {
        let mut retry = self.retry.lock();
        retry.range = match retry.in_progress {
            0 => (range.start, range.end),
            _ => (retry.range.0.min(range.start), retry.range.1.max(range.end)),
        };
        retry.in_progress += 1;
    }

    fn finish(&self) {
        let mut retry = self.retry.lock();
        assert!(retry.in_progress > 0, "C2: an end without a start");
        retry.sequence += 1;
        retry.in_progress -= 1;
    }

    fn refuse(&self) -> Result<(), Again> {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        // Nobody calls the end of a start that was refused (C3).
        self.finish();
        Err(Again)
    }

    /// Zaps the range in every peer that it meets and waits for all of them.
    fn zap(&self, range: &NotifierRange, token: &MaySleep) -> Option<OpenZap> {
        let links: Vec<_> = lock(&self.peers)
            .iter()
            .filter(|link| link.meets(range))
            .cloned()
            .collect();
        if links.is_empty() {
            return None;
        }
        let wires: Vec<_> = links.iter().map(|link| lock(&link.wire)).collect();
        // Somebody who had the wire first may have found the peer gone, or dismissed it.
        let links: Vec<_> = links.iter().filter(|link| !link.is_gone()).cloned().collect();
        // Numbered under the wires: on each socket the numbers only grow.
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        let zap = Notice::Zap {
            seq,
            start: range.start,
            end: range.end,
        };
        // To all at first, so that they work at the same time, and against one clock: who waits for this start has
        // patience for one timeout, not for one of each peer.
        let asked = Instant::now();
        let mut sent: Vec<_> = links.iter().map(|link| link.try_send(&zap)).collect();
        let mut buffer = vec![0; MAX_PACKET];
        for (link, sent) in links.iter().zip(&mut sent) {
            self.counters.zaps.fetch_add(1, Ordering::Relaxed);
            let outcome = self.wait_zapped(asked, link, &zap, sent, seq, &mut buffer, token);
            match outcome {
                Ok(Outcome::Replied(bytes)) => {
                    self.counters.unmapped_bytes.fetch_add(bytes, Ordering::Relaxed);
                }
                Ok(Outcome::Gone { .. }) => self.lost(link),
                // The kernel cannot poll: the one thing that is certain to end the peer's access is its end.
                Err(error) => panic!("waiting for {} (pid {}): {error}", link.peer.name, link.peer.pid),
            }
        }
        drop(wires);
        Some(OpenZap {
            range: *range,
            seq,
            links,
        })
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one call, all of it the state of one zap"
    )]
    fn wait_zapped(
        &self,
        asked: Instant,
        link: &PeerLink,
        zap: &Notice,
        sent: &mut Result<bool, Errno>,
        seq: u64,
        buffer: &mut [u8],
        token: &MaySleep,
    ) -> io::Result<Outcome<u64>> {
        self.fence
            .wait_since(asked, &link.peer, link.socket.as_fd(), token, || {
                link.look_for_zapped(zap, sent, seq, buffer)
            })
    }

    fn lost(&self, link: &PeerLink) {
        link.gone.store(true, Ordering::Release);
        self.counters.peers_gone.fetch_add(1, Ordering::Relaxed);
        lock(&self.peers).retain(|other| !std::ptr::eq(&**other, link));
    }
}

impl Subscriber for Xpmem {
    fn name(&self) -> &'static str {
        "xpmem"
    }

    fn sleeping(&self) -> bool {
        true
    }

    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        // First, so that no resolve that begins now gets through (S1), also for peers that attach later.
        self.begin(range);
        let Ok(token) = ctx.may_sleep() else {
            let free = try_lock(&self.peers).is_some_and(|peers| !peers.iter().any(|p| p.meets(range)));
            return if free { Ok(()) } else { self.refuse() };
        };
        if let Some(zap) = self.zap(range, token) {
            lock(&self.open).push(zap);
        }
        Ok(())
    }

    fn invalidate_range_end(&self, range: &NotifierRange, ctx: Ctx<'_>) {
        self.finish();
        if !range.blockable {
            // Its start succeeded because no peer had anything of it.
            return;
        }
        let open = match ctx {
            Ctx::MaySleep(_) => Some(lock(&self.open)),
            Ctx::NonSleeping(_) => try_lock(&self.open),
        };
        let zap = open.and_then(|mut open| {
            let index = open.iter().position(|zap| zap.range == *range)?;
            Some(open.swap_remove(index))
        });
        let Some(zap) = zap else { return };
        for link in zap.links.iter().filter(|link| !link.is_gone()) {
            // Without room the peer reads nothing: its next zap will find out. A lost end is tolerable, the
            // peer asks again by itself or at its next access.
            if link.try_send(&Notice::ZapEnd { seq: zap.seq }) != Ok(true) {
                self.counters.ends_lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn release(&self) {
        let token = MaySleep::claim("release of xpmem");
        self.retry.lock().released = true;
        let range = NotifierRange::all(crate::notifier::Event::Release, true);
        let _ = self.zap(&range, &token);
        let peers = std::mem::take(&mut *lock(&self.peers));
        for link in peers {
            // Nobody ends these zaps any more: whoever waits for an end over there is told that none comes.
            let _wire = lock(&link.wire);
            if !link.is_gone() {
                link.dismiss("the application has ended");
            }
        }
    }
}

#[cfg(test)]
#[path = "xpmem_tests.rs"]
mod tests;
