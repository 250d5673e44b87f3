//! Locks that work from zeroed memory, without malloc and in signal handlers (their users block signals).
#![allow(unsafe_code, reason = "a lock's cell")]

use crate::sys;
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

const FREE: u32 = 0;
const HELD: u32 = 1;
const HELD_WITH_SLEEPERS: u32 = 2;

/// A value behind a futex lock. All zero bytes are a free lock. Lock it only with signals blocked.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Locked<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, of which there is one at a time.
unsafe impl<T: Send> Sync for Locked<T> {}

/// The lock, held.
#[derive(Debug)]
pub(crate) struct Guard<'a, T> {
    lock: &'a Locked<T>,
}

impl<T> Locked<T> {
    /// A free lock.
    #[cfg(test)]
    pub(crate) const fn new(value: T) -> Self {
        Self {
            word: AtomicU32::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Wait for the lock.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        if self
            .word
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            while self.word.swap(HELD_WITH_SLEEPERS, Ordering::Acquire) != FREE {
                sys::futex_wait(&self.word, HELD_WITH_SLEEPERS, 1000);
            }
        }
        Guard { lock: self }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held, and this guard is borrowed exclusively.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        if self.lock.word.swap(FREE, Ordering::Release) == HELD_WITH_SLEEPERS {
            sys::futex_wake(&self.lock.word, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_lock_when_threads_contend_loses_no_increment() {
        let lock = Locked::new(0u64);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..20_000 {
                        *lock.lock() += 1;
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), 80_000);
    }
}
