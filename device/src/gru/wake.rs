//! Who is awake, and how a store reaches an engine that sleeps.
//!
//! The status page carries `awake`, the number of engines that will look at all of device memory again
//! before they sleep. Software stores its command, fences, and rings only if it reads 0. An engine lowers the
//! count, fences, and looks once more before it sleeps. So one of the two sees the other. Each GSEG has a copy for
//! its user, who can map nothing else. In bell mode software always reads 0, in trap mode 1.
//!
//! Sleeping engines wait on one epoll instance that watches two eventfds edge-triggered: a ring wakes exactly
//! one of them, and the others go on listening. So an engine that is busy with something that may take long (a
//! fill that populates pages, a park by the fault plan) just counts as asleep meanwhile.
//!
//! One eventfd is the client's doorbell, the other one the device's own bell. The client holds a duplicate of the
//! doorbell: it can empty it, fill it up, or take its O_NONBLOCK away. Nothing that the device itself relies on
//! goes through it, and the device never makes a call on it that can wait.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::ReadWriteFlags;

use protos::gru::doorbell::Mode;
use protos::gru::{map, pci};

use super::Doorbell;
use super::memory::BarMemory;

/// Doorbell, `awake` word and sleeping engines.
#[derive(Debug)]
pub(super) struct Wake {
    status: BarMemory,
    /// BAR2: the copies in the GSEGs.
    chiplets: Arc<BarMemory>,
    mode: Mode,
    /// Shared with the client.
    doorbell: OwnedFd,
    /// The device's own.
    bell: OwnedFd,
    sleepers: OwnedFd,
    /// Engines that will hear a ring: from before their last look until they are back.
    listening: AtomicU32,
    sleeping: AtomicU32,
    /// Engines awake. The published word is a copy that a client could spoil; it is written only under this
    /// lock, so it never lags behind.
    count: Mutex<u32>,
    awake: AtomicU32,
    stop: AtomicBool,
    resets: AtomicU32,
    pub(super) rings: AtomicU64,
    pub(super) parks: AtomicU64,
}

impl Wake {
    /// `status` is BAR0, `chiplets` is BAR2.
    pub(super) fn new(doorbell: Doorbell, status: BarMemory, chiplets: Arc<BarMemory>) -> io::Result<Self> {
        let mode = match doorbell {
            Doorbell::Trap => Mode::TRAP,
            Doorbell::Bell => Mode::BELL,
            Doorbell::Poll => Mode::POLL,
        };
        let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let sleepers = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&sleepers, &doorbell, epoll::EventData::new_u64(0), flags)?;
        epoll::add(&sleepers, &bell, epoll::EventData::new_u64(1), flags)?;
        let wake = Self {
            status,
            chiplets,
            mode,
            doorbell,
            bell,
            sleepers,
            listening: AtomicU32::new(0),
            sleeping: AtomicU32::new(0),
            count: Mutex::new(0),
            awake: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            resets: AtomicU32::new(0),
            rings: AtomicU64::new(0),
            parks: AtomicU64::new(0),
        };
        wake.publish();
        Ok(wake)
    }

    /// BAR0's memory.
    pub(super) fn status(&self) -> &BarMemory {
        &self.status
    }

    /// The eventfd that stands for a write to the doorbell page.
    pub(super) fn doorbell(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    fn change(&self, by: i32) {
        let mut count = self.count();
        let before = *count;
        *count = count
            .checked_add_signed(by)
            .expect("an engine leaves as often as it enters");
        self.awake.store(*count, Ordering::SeqCst);
        if self.mode == Mode::POLL {
            self.status
                .word32(pci::STATUS_OFFSET + pci::STATUS_AWAKE)
                .store(*count, Ordering::SeqCst);
            if (before == 0) != (*count == 0) {
                self.publish_gsegs(*count);
            }
        }
        drop(count);
        fence(Ordering::SeqCst);
    }

    fn count(&self) -> MutexGuard<'_, u32> {
        self.count.lock().expect("no thread dies while it counts engines")
    }

    /// What software is to see of a count.
    fn shown(&self, count: u32) -> u32 {
        match self.mode {
            Mode::TRAP => 1,
            Mode::BELL => 0,
            _ => count,
        }
    }

    /// Writes everything that software reads, whatever a client has done to it.
    fn publish(&self) {
        let count = self.count();
        let word = |offset| self.status.word32(pci::STATUS_OFFSET + offset);
        word(pci::STATUS_AWAKE).store(self.shown(*count), Ordering::SeqCst);
        word(pci::STATUS_MODE).store(u32::from(self.mode.0), Ordering::SeqCst);
        self.status
            .word(pci::STATUS_OFFSET + pci::STATUS_MAGIC)
            .store(pci::STATUS_MAGIC_VALUE, Ordering::Release);
        self.publish_gsegs(*count);
        drop(count);
        fence(Ordering::SeqCst);
    }

    /// The caller holds the count.
    fn publish_gsegs(&self, count: u32) {
        for chiplet in 0..map::CHIPLETS as u64 {
            for context in 0..map::CONTEXTS as u64 {
                self.publish_gseg(count, chiplet * map::CHIPLET_SIZE + context * map::GSEG_STRIDE);
            }
        }
    }

    fn publish_gseg(&self, count: u32, gseg: u64) {
        // One store of awake and mode.
        let value = u64::from(self.shown(count) != 0) | u64::from(self.mode.0) << (8 * map::GSEG_STATUS_MODE);
        let word = self
            .chiplets
            .word(gseg + map::GSEG_STATUS + map::GSEG_STATUS_AWAKE);
        word.store(value, Ordering::SeqCst);
    }

    /// The GSEG at this offset of BAR2 gets a new owner: what the last one may have stored there goes.
    pub(super) fn show_to(&self, gseg: u64) {
        let count = self.count();
        self.publish_gseg(*count, gseg);
    }

    /// A reset begins: said before anything is cleared.
    pub(super) fn begin_reset(&self) {
        let begun = self.resets.load(Ordering::SeqCst) + 1;
        self.status
            .word32(pci::STATUS_OFFSET + pci::STATUS_RESETS_BEGUN)
            .store(begun, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// A reset is complete.
    pub(super) fn count_reset(&self) {
        self.publish();
        let resets = self.resets.fetch_add(1, Ordering::SeqCst) + 1;
        self.status
            .word32(pci::STATUS_OFFSET + pci::STATUS_RESETS)
            .store(resets, Ordering::Release);
    }

    /// Completed resets.
    pub(super) fn resets(&self) -> u32 {
        self.resets.load(Ordering::SeqCst)
    }

    /// After a store: make sure that some engine sees it.
    pub(super) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.awake.load(Ordering::SeqCst) == 0 {
            self.rings.fetch_add(1, Ordering::Relaxed);
            self.write_bell();
        }
    }

    /// The calling engine starts to look at device memory.
    pub(super) fn enter(&self) {
        self.change(1);
    }

    fn leave(&self) {
        self.change(-1);
    }

    /// The calling engine will not look again before [`Wake::come_back`], except once: after this call and before
    /// [`Wake::sleep`]. From here on it hears a [`Wake::call`], also one that comes during that look.
    pub(super) fn doze(&self) {
        self.listening.fetch_add(1, Ordering::SeqCst);
        self.leave();
        self.empty();
    }

    /// Keeps the counters low. Here and not after the wake, where somebody waits: an eventfd that still counts wakes
    /// nobody by itself, each ring is an edge. A ring that is swallowed here is answered by the look that follows.
    fn empty(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        // Not `read`: whether that waits is the client's choice. (u64::MAX: a file without a position. Kernels
        // before 5.8 refuse, and the counter stays as it is.)
        let mut count = [0; 8];
        let mut into = [IoSliceMut::new(&mut count)];
        let _ = rustix::io::preadv2(&self.doorbell, &mut into, u64::MAX, ReadWriteFlags::NOWAIT);
    }

    /// After [`Wake::doze`]: the calling engine looks at device memory again.
    pub(super) fn come_back(&self) {
        self.listening.fetch_sub(1, Ordering::SeqCst);
        self.enter();
    }

    /// Engines that wait for a ring.
    pub(super) fn asleep(&self) -> u32 {
        self.sleeping.load(Ordering::SeqCst)
    }

    /// Another engine than the calling one looks at device memory.
    pub(super) fn others_awake(&self) -> bool {
        self.awake.load(Ordering::Relaxed) > 1
    }

    /// The calling engine will be busy for long, until its next [`Wake::enter`]: if `pending` says that
    /// somebody stored without ringing (it saw us awake), another engine takes that over now.
    pub(super) fn hand_over(&self, pending: impl FnOnce() -> bool) {
        self.leave();
        if pending() {
            self.call();
        }
    }

    /// Wakes one more engine, if one sleeps or is about to.
    pub(super) fn call(&self) {
        fence(Ordering::SeqCst);
        if self.listening.load(Ordering::SeqCst) > 0 {
            self.write_bell();
        }
    }

    fn write_bell(&self) {
        // Cannot fail: nobody else has this descriptor, and its counter never comes near its limit.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Sleeps until the doorbell or the bell rings, or `limit` (fault plans only) has passed. The caller dozes, and
    /// has looked once more since.
    pub(super) fn sleep(&self, limit: Option<Duration>) {
        self.parks.fetch_add(1, Ordering::Relaxed);
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        if !self.stopping() {
            let timeout = limit.map(|limit| Timespec {
                tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(limit.subsec_nanos()),
            });
            let mut events = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            // EINTR is a spurious wake.
            let _ = epoll::wait(&self.sleepers, &mut events, timeout.as_ref());
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }

    /// Ends all sleep for good.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.write_bell();
    }

    /// The calling engine ends because of [`Wake::stop`]: the next one is woken.
    pub(super) fn pass_on_stop(&self) {
        self.leave();
        self.write_bell();
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    fn wake() -> Arc<Wake> {
        let status = BarMemory::new("test", pci::BAR_DOORBELL_SIZE).unwrap();
        let chiplets = BarMemory::new("test", pci::BAR_CHIPLETS_SIZE).unwrap();
        Arc::new(Wake::new(Doorbell::Poll, status, Arc::new(chiplets)).unwrap())
    }

    /// [`Wake::sleep`] without a limit has to end because something rang.
    fn sleep_ends(wake: &Arc<Wake>) {
        let (send, receive) = mpsc::channel();
        let wake = Arc::clone(wake);
        std::thread::spawn(move || {
            wake.sleep(None);
            let _ = send.send(());
        });
        receive
            .recv_timeout(Duration::from_secs(20))
            .expect("the engine sleeps on");
    }

    #[test]
    fn test_hand_over_when_the_other_engine_has_just_looked_is_heard() {
        let wake = wake();
        wake.enter();
        wake.enter();
        // One engine has looked for the last time; software then stored (it saw the other one awake, so it did
        // not ring), and that one is now busy for long.
        wake.doze();
        wake.hand_over(|| true);
        sleep_ends(&wake);
    }

    #[test]
    fn test_sleep_when_the_client_made_its_doorbell_blocking_or_full_hears_the_device() {
        let wake = wake();
        let client = wake.doorbell().try_clone_to_owned().unwrap();
        fcntl_setfl(&client, OFlags::empty()).unwrap();
        // Empty and blocking: a plain read of it would wait.
        for _ in 0..3 {
            wake.enter();
            wake.doze();
            wake.call();
            sleep_ends(&wake);
            wake.come_back();
            wake.leave();
        }
        // Full: a write to it would wait. It is emptied for whoever comes next.
        rustix::io::write(&client, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        wake.ring();
        sleep_ends(&wake);
        wake.enter();
        wake.doze();
        fcntl_setfl(&client, OFlags::NONBLOCK).unwrap();
        rustix::io::write(&client, &1u64.to_ne_bytes()).expect("there is room again");
        sleep_ends(&wake);
    }
}
