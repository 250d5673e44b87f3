//! The ATC's lock: spins, then gives the CPU away. Never sleeps in the kernel, so a purge may take it.
#![allow(unsafe_code)] // A lock hands out &mut from a shared cell.

use std::ops::{Deref, DerefMut};

use crate::sync::{AtomicBool, AtomicU64, Ordering, UnsafeCell, spin_loop, yield_now};

/// Iterations before the CPU is given away. Critical sections last well below a microsecond, except a
/// scan of all slots (some microseconds).
const SPINS: u32 = if cfg!(loom) { 0 } else { 256 };

/// Mutual exclusion without system calls other than sched_yield.
#[derive(Debug)]
pub(super) struct SpinLock<T> {
    locked: AtomicBool,
    yields: AtomicU64,
    value: UnsafeCell<T>,
}

// SAFETY: `lock` hands the value to one thread at a time.
unsafe impl<T: Send> Sync for SpinLock<T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<T: Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            locked: AtomicBool::new(false),
            yields: AtomicU64::new(0),
            value: UnsafeCell::new(value),
        }
    }

    pub(super) fn lock(&self) -> Held<'_, T> {
        let mut spins = 0;
        while self
            .locked
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            // Look without writing until it seems free.
            while self.locked.load(Ordering::Relaxed) {
                if spins < SPINS {
                    spins += 1;
                    spin_loop();
                } else {
                    self.yields.fetch_add(1, Ordering::Relaxed);
                    yield_now();
                }
            }
        }
        Held { lock: self }
    }

    /// Times the CPU was given away.
    pub(super) fn yields(&self) -> u64 {
        self.yields.load(Ordering::Relaxed)
    }
}

/// The lock is held while this lives.
#[derive(Debug)]
pub(super) struct Held<'a, T> {
    lock: &'a SpinLock<T>,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held, so nobody has a mutable reference.
        self.lock.value.with(|value| unsafe { &*value })
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held, and `self` is borrowed mutably: this is the only reference.
        self.lock.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.lock.locked.store(false, Ordering::Release);
    }
}

/// In the model checker the core's lock is loom's own: spinning would multiply the states, and the spin
/// lock is checked by itself.
#[cfg(loom)]
#[derive(Debug)]
pub(super) struct ModelLock<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T> ModelLock<T> {
    pub(super) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().expect("no model thread panics and goes on")
    }

    pub(super) fn yields(&self) -> u64 {
        0
    }
}
