//! The sleeping subscriber's side (XPMEM's part): another process maps the application's pages at its own
//! addresses and really unmaps them when told.
//!
//! The peer keeps a reservation (PROT_NONE) as long as the application's range. A page is mapped into it when
//! it is first read; a `Zap` puts the reservation back in its place before it is answered.
#![allow(unsafe_code, reason = "maps another process' pages and reads them")]

use crate::attach::{first_request, open_socket};
use crate::sys;
use crate::{AgentError, Result, control, raw};
use protos::bridge::control::{MAX_PACKET, Notice, NoticeReply, Reply, Request, VERSION};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Counters of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct PeerStats {
    /// Zaps served.
    pub zaps: u64,
    /// Bytes really unmapped by them.
    pub unmapped_bytes: u64,
    /// Pages mapped on demand.
    pub mapped_pages: u64,
    /// Look-ups answered "being changed, again".
    pub resolve_retries: u64,
}

/// An attachment to `[start, end)` of another process.
#[derive(Debug)]
pub struct Peer {
    shared: Arc<Shared>,
    /// Requests and their replies; never held together with the pages' lock, because a zap that waits for that
    /// one may be what the daemon's answer waits for.
    control: Mutex<OwnedFd>,
    server: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    start: u64,
    end: u64,
    /// Where `start` is in this process.
    base: usize,
    notice: OwnedFd,
    pages: Mutex<Pages>,
    /// A zap has ended.
    zap_ended: Condvar,
    stopped: AtomicBool,
    zaps: AtomicU64,
    unmapped_bytes: AtomicU64,
    mapped_pages: AtomicU64,
    resolve_retries: AtomicU64,
}

#[derive(Debug, Default)]
struct Pages {
    /// Application addresses of the mapped pages.
    mapped: BTreeSet<u64>,
    /// Zaps that have not ended: nothing of their ranges may be mapped.
    zapping: BTreeMap<u64, (u64, u64)>,
    /// Raised by every zap: a look-up that began before it must not be used after it.
    sequence: u64,
}

impl Peer {
    /// Attach to `[start, end)` of application `pid`.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn attach(socket: &Path, pid: u32, start: u64, end: u64) -> Result<Self> {
        let what = "attaching as a peer";
        if start >= end || !start.is_multiple_of(sys::PAGE) || !end.is_multiple_of(sys::PAGE) {
            return Err(AgentError::Invalid {
                what: "peer range",
                why: "empty or not page aligned",
            });
        }
        let system = |what| move |source| AgentError::System { what, source };
        let control = open_socket(socket)?;
        let request = Request::AttachPeer {
            version: VERSION,
            pid,
            start,
            end,
        };
        let (reply, fds) = first_request(what, control.as_fd(), &request, &[])?;
        let (Reply::PeerAttached { .. }, [Some(notice), ..]) = (reply, fds) else {
            return Err(AgentError::Protocol {
                what,
                why: "an answer of another kind, or without a notice socket".into(),
            });
        };
        let len = (end - start) as usize;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe { raw::mmap(0, len, libc::PROT_NONE, RESERVATION, None, 0) }
            .map_err(system("reserving addresses for a peer"))?;
        let shared = Arc::new(Shared {
            start,
            end,
            base,
            notice,
            pages: Mutex::default(),
            zap_ended: Condvar::new(),
            stopped: AtomicBool::new(false),
            zaps: AtomicU64::new(0),
            unmapped_bytes: AtomicU64::new(0),
            mapped_pages: AtomicU64::new(0),
            resolve_retries: AtomicU64::new(0),
        });
        let for_server = Arc::clone(&shared);
        let server = std::thread::Builder::new()
            .name("tlbridge-peer".into())
            .spawn(move || serve(&for_server))
            .map_err(system("starting a peer's thread"))?;
        Ok(Self {
            shared,
            control: Mutex::new(control),
            server: Some(server),
        })
    }

    /// The 8 bytes at `va` (the application's address; aligned), mapped on demand. `None`: nothing is
    /// mapped there, outside the range, or the daemon is gone. Waits while the page is being changed.
    #[must_use]
    pub fn read(&self, va: u64) -> Option<u64> {
        let page = va & !(sys::PAGE - 1);
        if !va.is_multiple_of(8) || va < self.shared.start || va >= self.shared.end {
            return None;
        }
        loop {
            let sequence = {
                let pages = self.shared.lock();
                if pages.mapped.contains(&page) {
                    return Some(self.shared.load(&pages, va));
                }
                let pages = self.shared.wait_zaps(pages, page)?;
                pages.sequence
            };
            let Some((memfd, offset)) = self.resolve(page)? else {
                self.shared.resolve_retries.fetch_add(1, Ordering::Relaxed);
                // Being changed: its end, or the zap that announces it, comes by the notice socket. Some
                // changes concern no page that this peer has: look again soon.
                let pages = self.shared.lock();
                let _ = self
                    .shared
                    .zap_ended
                    .wait_timeout(pages, std::time::Duration::from_millis(1));
                continue;
            };
            let mut pages = self.shared.lock();
            // S5: the look-up is void if a zap has come since.
            if pages.sequence == sequence {
                self.shared.map(&mut pages, page, memfd.as_fd(), offset)?;
                return Some(self.shared.load(&pages, va));
            }
        }
    }

    /// Where the page is: `None` = gone or nothing there, `Some(None)` = being changed.
    fn resolve(&self, page: u64) -> Option<Option<(OwnedFd, u64)>> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let request = Request::PeerResolve { va: page };
        match first_request("resolving a peer's page", control.as_fd(), &request, &[]) {
            Ok((Reply::PeerPage { offset, .. }, [Some(memfd), ..])) => Some(Some((memfd, offset))),
            Err(AgentError::Refused { errno, .. }) if errno == libc::EAGAIN => Some(None),
            _ => None,
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        let s = &self.shared;
        PeerStats {
            zaps: s.zaps.load(Ordering::Relaxed),
            unmapped_bytes: s.unmapped_bytes.load(Ordering::Relaxed),
            mapped_pages: s.mapped_pages.load(Ordering::Relaxed),
            resolve_retries: s.resolve_retries.load(Ordering::Relaxed),
        }
    }

    /// Pages of the application that are mapped here now.
    #[must_use]
    pub fn mapped_pages(&self) -> usize {
        self.shared.lock().mapped.len()
    }

    /// Whether the daemon still serves this peer.
    #[must_use]
    pub fn alive(&self) -> bool {
        !self.shared.stopped.load(Ordering::Acquire)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The order matters: a hang-up on the notice socket while the daemon waits for a zap is a peer of which
        // nothing is known, and such a peer is killed. So: have nothing, say so by closing the control
        // connection, and go on answering zaps until the daemon has let go.
        self.shared.zap(u64::MAX, self.shared.start, self.shared.end);
        let control = self.control.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = rustix::net::shutdown(&*control, rustix::net::Shutdown::Both);
        let pages = self.shared.lock();
        let _ = self
            .shared
            .zap_ended
            .wait_timeout_while(pages, LET_GO, |_| !self.shared.stopped.load(Ordering::Acquire));
        let _ = rustix::net::shutdown(&self.shared.notice, rustix::net::Shutdown::Both);
        if let Some(server) = self.server.take() {
            // A panic of that thread has been printed already.
            let _ = server.join();
        }
        // SAFETY: the reservation; nothing refers into it outside the pages' lock.
        let _ = unsafe { raw::munmap(self.shared.base, (self.shared.end - self.shared.start) as usize) };
    }
}

/// Longest wait for a daemon to let go of a peer that ends.
const LET_GO: std::time::Duration = std::time::Duration::from_secs(10);

/// Flags of the reservation.
const RESERVATION: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn here(&self, va: u64) -> usize {
        self.base + (va - self.start) as usize
    }

    /// Wait until no zap covers `page`; `None` when the daemon is gone.
    fn wait_zaps<'a>(&self, mut pages: MutexGuard<'a, Pages>, page: u64) -> Option<MutexGuard<'a, Pages>> {
        while pages.zapping.values().any(|&(s, e)| s <= page && page < e) {
            if self.stopped.load(Ordering::Acquire) {
                return None;
            }
            pages = self.zap_ended.wait(pages).unwrap_or_else(PoisonError::into_inner);
        }
        (!self.stopped.load(Ordering::Acquire)).then_some(pages)
    }

    /// Load from a mapped page: under the lock, so that no zap takes it away meanwhile.
    fn load(&self, pages: &Pages, va: u64) -> u64 {
        assert!(pages.mapped.contains(&(va & !(sys::PAGE - 1))));
        // SAFETY: the page is mapped (checked under the lock), va is aligned and inside it. Other processes
        // store to it, hence an atomic.
        unsafe { (*(self.here(va) as *const AtomicU64)).load(Ordering::SeqCst) }
    }

    fn map(&self, pages: &mut Pages, page: u64, memfd: BorrowedFd<'_>, offset: u64) -> Option<()> {
        // A file that ends before the page would fault at the load.
        let size = rustix::fs::fstat(memfd).ok()?.st_size as u64;
        if offset.checked_add(sys::PAGE)? > size.next_multiple_of(sys::PAGE) {
            return None;
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: replaces one page of the reservation, which belongs to this peer.
        unsafe {
            raw::mmap(
                self.here(page),
                sys::PAGE as usize,
                libc::PROT_READ,
                flags,
                Some(memfd),
                offset,
            )
        }
        .ok()?;
        pages.mapped.insert(page);
        self.mapped_pages.fetch_add(1, Ordering::Relaxed);
        Some(())
    }

    /// Take `[start, end)` away, really. Returns the bytes that were mapped.
    fn zap(&self, seq: u64, start: u64, end: u64) -> u64 {
        let (start, end) = (start.max(self.start), end.min(self.end));
        let mut pages = self.lock();
        pages.sequence += 1;
        pages.zapping.insert(seq, (start, end));
        self.zaps.fetch_add(1, Ordering::Relaxed);
        if start >= end {
            return 0;
        }
        let hit: Vec<u64> = pages.mapped.range(start..end).copied().collect();
        for page in &hit {
            let flags = RESERVATION | libc::MAP_FIXED;
            // SAFETY: puts the reservation back in the place of a page of this peer.
            let r = unsafe {
                raw::mmap(
                    self.here(*page),
                    sys::PAGE as usize,
                    libc::PROT_NONE,
                    flags,
                    None,
                    0,
                )
            };
            // Answering for a page that is still mapped would be the stale access that all this prevents.
            assert!(r.is_ok(), "a peer's page cannot be unmapped: {r:?}");
            pages.mapped.remove(page);
        }
        let bytes = hit.len() as u64 * sys::PAGE;
        self.unmapped_bytes.fetch_add(bytes, Ordering::Relaxed);
        bytes
    }
}

/// The notice socket's thread.
fn serve(shared: &Shared) {
    let mut packet = vec![0u8; MAX_PACKET];
    while let Ok(Some(received)) = control::receive(shared.notice.as_fd(), &mut packet) {
        match serde_json::from_slice(received.slice(&packet)) {
            Ok(Notice::Zap { seq, start, end }) => {
                let reply = NoticeReply::Zapped {
                    seq,
                    unmapped_bytes: shared.zap(seq, start, end),
                };
                let Ok(text) = serde_json::to_vec(&reply) else {
                    break;
                };
                if control::send(shared.notice.as_fd(), &text, &[]).is_err() {
                    break;
                }
            }
            Ok(Notice::ZapEnd { seq }) => {
                shared.lock().zapping.remove(&seq);
                shared.zap_ended.notify_all();
            }
            Ok(Notice::Closing { .. }) => break,
            _ => {}
        }
    }
    // Nobody will say when the pages change: none may stay.
    shared.zap(u64::MAX, shared.start, shared.end);
    {
        let _pages = shared.lock();
        shared.stopped.store(true, Ordering::Release);
    }
    shared.zap_ended.notify_all();
}
