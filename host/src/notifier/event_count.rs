//! Waiting for a condition over atomics, where the side that makes the condition true must not sleep.
//!
//! A condition variable would need a mutex on the notifying side. Here notifying is one atomic addition, a
//! fence, a load, and a `FUTEX_WAKE` (which does not block) only when somebody sleeps.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::thread::futex;

use super::context::{MaySleep, might_sleep};

/// See the module's text.
#[derive(Debug, Default)]
pub struct EventCount {
    sequence: AtomicU32,
    waiters: AtomicU32,
}

impl EventCount {
    /// Sleeps until `ready` returns something. `ready` is called again after every [`Self::notify`].
    pub fn wait_for<T>(&self, _token: &MaySleep, place: &str, mut ready: impl FnMut() -> Option<T>) -> T {
        might_sleep(place);
        loop {
            if let Some(value) = ready() {
                return value;
            }
            self.waiters.fetch_add(1, Ordering::Relaxed);
            let key = self.sequence.load(Ordering::Acquire);
            // Pairs with the fence in `notify`: either it sees this waiter, or `ready` sees what it did.
            fence(Ordering::SeqCst);
            let value = ready();
            if value.is_none() {
                // EAGAIN (notified in between) and EINTR both mean: look again.
                let _ = futex::wait(&self.sequence, futex::Flags::PRIVATE, key, None);
            }
            self.waiters.fetch_sub(1, Ordering::Relaxed);
            if let Some(value) = value {
                return value;
            }
        }
    }

    /// Makes every waiter look again. Call it after the change. Never blocks.
    pub fn notify(&self) {
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            self.sequence.fetch_add(1, Ordering::Release);
            let _ = futex::wake(&self.sequence, futex::Flags::PRIVATE, i32::MAX as u32);
        }
    }

    /// Threads that wait now. For tests that must know that somebody waits, and for dumps.
    #[must_use]
    pub fn waiters(&self) -> u32 {
        self.waiters.load(Ordering::SeqCst)
    }
}
