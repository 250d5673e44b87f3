//! Who is awake, and how a store reaches an engine that sleeps.
//!
//! The status page carries `awake`, the number of engines that will look at all of device memory again
//! before they sleep. Software stores its command, fences, and rings only if it reads 0. An engine lowers the
//! count, fences, and looks once more before it sleeps. So one of the two sees the other.
//!
//! One sleeping engine, the listener, blocks on the doorbell's eventfd; the others sleep on a condition
//! variable and are woken by engines only (a backlog, or an engine that is about to be stalled).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use protos::gru::pci;

use super::memory::BarMemory;

#[derive(Debug, Default)]
struct Reserve {
    /// Somebody blocks on the doorbell.
    listener: bool,
    /// Engines that sleep here.
    sleeping: usize,
    /// Wakes that nobody has taken yet.
    wanted: usize,
}

/// Doorbell, `awake` word and sleeping engines.
#[derive(Debug)]
pub(super) struct Wake {
    status: BarMemory,
    doorbell: OwnedFd,
    reserve: Mutex<Reserve>,
    called: Condvar,
    stop: AtomicBool,
    pub(super) rings: AtomicU64,
    pub(super) parks: AtomicU64,
}

impl Wake {
    /// `status` is BAR0.
    pub(super) fn new(status: BarMemory) -> io::Result<Self> {
        status
            .word(pci::STATUS_OFFSET + pci::STATUS_MAGIC)
            .store(pci::STATUS_MAGIC_VALUE, Ordering::Release);
        Ok(Self {
            status,
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            reserve: Mutex::default(),
            called: Condvar::new(),
            stop: AtomicBool::new(false),
            rings: AtomicU64::new(0),
            parks: AtomicU64::new(0),
        })
    }

    /// BAR0's memory.
    pub(super) fn status(&self) -> &BarMemory {
        &self.status
    }

    /// The eventfd that stands for a write to the doorbell page.
    pub(super) fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    fn awake(&self) -> &AtomicU32 {
        self.status.word32(pci::STATUS_OFFSET + pci::STATUS_AWAKE)
    }

    /// A reset is complete.
    pub(super) fn count_reset(&self) {
        self.status
            .word32(pci::STATUS_OFFSET + pci::STATUS_RESETS)
            .fetch_add(1, Ordering::Release);
    }

    /// Completed resets.
    pub(super) fn resets(&self) -> u32 {
        self.status
            .word32(pci::STATUS_OFFSET + pci::STATUS_RESETS)
            .load(Ordering::Acquire)
    }

    /// After a store: make sure that some engine sees it.
    pub(super) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.awake().load(Ordering::SeqCst) == 0 {
            self.rings.fetch_add(1, Ordering::Relaxed);
            // EAGAIN means that the counter is full: then it is readable anyway.
            let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        }
    }

    /// The calling engine starts to look at device memory.
    pub(super) fn enter(&self) {
        self.awake().fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The calling engine will not look again (before [`Wake::enter`]); the caller looks once more after this.
    pub(super) fn leave(&self) {
        let before = self.awake().fetch_sub(1, Ordering::SeqCst);
        // The word is writable only in this process: clients map the page from a file, but the device trusts
        // the count for nothing but rings.
        if before == 0 {
            self.awake().store(0, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    /// Another engine than the calling one looks at device memory.
    pub(super) fn others_awake(&self) -> bool {
        self.awake().load(Ordering::Relaxed) > 1
    }

    /// The calling engine is about to be held inside an access by the fault plan, until its next
    /// [`Wake::enter`]: somebody else takes over.
    pub(super) fn engine_parks(&self) {
        self.leave();
        self.call();
    }

    /// Wakes one more engine, if one sleeps: from the reserve, else the listener.
    pub(super) fn call(&self) {
        let mut reserve = self.lock();
        if reserve.sleeping > reserve.wanted {
            reserve.wanted += 1;
            drop(reserve);
            self.called.notify_one();
        } else if reserve.sleeping == 0 && reserve.listener {
            drop(reserve);
            let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        }
    }

    /// Sleeps until there may be work: the listener until the doorbell rings, the others until they are
    /// called. `limit` (fault plans only) bounds the sleep.
    pub(super) fn sleep(&self, limit: Option<Duration>) {
        self.parks.fetch_add(1, Ordering::Relaxed);
        let mut reserve = self.lock();
        if self.stopping() {
            return;
        }
        if reserve.listener {
            reserve.sleeping += 1;
            while reserve.wanted == 0 && !self.stopping() {
                let died = "no thread dies inside the reserve";
                let Some(limit) = limit else {
                    reserve = self.called.wait(reserve).expect(died);
                    continue;
                };
                let (again, timeout) = self.called.wait_timeout(reserve, limit).expect(died);
                reserve = again;
                if timeout.timed_out() {
                    break;
                }
            }
            reserve.sleeping -= 1;
            reserve.wanted = reserve.wanted.saturating_sub(1);
            return;
        }
        reserve.listener = true;
        drop(reserve);
        self.listen(limit);
        self.lock().listener = false;
    }

    fn listen(&self, limit: Option<Duration>) {
        let mut fds = [PollFd::new(&self.doorbell, PollFlags::IN)];
        let timeout = limit.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        // EINTR is a spurious wake.
        let _ = poll(&mut fds, timeout.as_ref());
        let _ = rustix::io::read(&self.doorbell, &mut [0; 8]);
    }

    /// Ends all sleep for good.
    pub(super) fn stop(&self) {
        let reserve = self.lock();
        self.stop.store(true, Ordering::SeqCst);
        drop(reserve);
        self.called.notify_all();
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Reserve> {
        self.reserve.lock().expect("no thread dies inside the reserve")
    }
}
