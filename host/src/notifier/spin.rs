//! A lock for the non-sleeping path.
//!
//! Waiters spin and then yield; they never enter a futex wait, because only `try_lock` is used (and a mutex
//! that nobody waits for in the kernel is released without a system call). Whoever holds it must not sleep:
//! holding is an atomic section, so [`might_sleep`](super::might_sleep) finds that. Nor may it allocate (S8):
//! the allocator takes locks of its own; [`held`] lets an allocator in a test check it.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, TryLockError};

use super::context::NonSleeping;

thread_local! {
    static HELD: Cell<u32> = const { Cell::new(0) };
    static YIELDS: Cell<u64> = const { Cell::new(0) };
}

/// Spins before each yield: long enough for any critical section here when its holder runs.
const SPINS_PER_YIELD: u32 = 200;

/// Spin locks that this thread holds.
#[must_use]
pub fn held() -> u32 {
    HELD.try_with(Cell::get).unwrap_or(0)
}

/// `sched_yield` calls that this thread has made while waiting for spin locks. (A yield is not counted as a
/// voluntary context switch by the kernel, so it has to be counted here.)
#[must_use]
pub fn yields() -> u64 {
    YIELDS.get()
}

/// The lock.
#[derive(Debug, Default)]
pub struct SpinMutex<T>(Mutex<T>);

/// Access to what the lock protects.
#[derive(Debug)]
pub struct SpinGuard<'a, T> {
    guard: MutexGuard<'a, T>,
    _section: NonSleeping,
}

impl<T> SpinMutex<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Takes the lock. Bounded by the longest critical section plus scheduling delay.
    pub fn lock(&self) -> SpinGuard<'_, T> {
        let section = NonSleeping::enter();
        let mut spins = 0u32;
        let guard = loop {
            match self.0.try_lock() {
                Ok(guard) => break guard,
                // What is protected has no half-done states that outlive a panic of a callback.
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    spins += 1;
                    if spins.is_multiple_of(SPINS_PER_YIELD) {
                        YIELDS.set(YIELDS.get() + 1);
                        std::thread::yield_now();
                    } else {
                        std::hint::spin_loop();
                    }
                }
            }
        };
        HELD.set(HELD.get() + 1);
        SpinGuard {
            guard,
            _section: section,
        }
    }
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notifier::might_sleep;

    #[test]
    #[should_panic(expected = "S9")]
    fn test_s9_sleep_when_spin_lock_is_held_panics() {
        let lock = SpinMutex::new(());
        let _guard = lock.lock();
        might_sleep("test");
    }

    #[test]
    fn test_spin_lock_when_contended_excludes() {
        let lock = SpinMutex::new(0u64);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..2000 {
                        let mut guard = lock.lock();
                        let seen = *guard;
                        std::hint::black_box(&seen);
                        *guard = seen + 1;
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), 6000);
        assert_eq!(held(), 0);
    }
}
