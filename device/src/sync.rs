//! The one place that chooses between std's synchronisation and loom's.

#[cfg(loom)]
pub(crate) use loom::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread::yield_now,
};
#[cfg(not(loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;

/// std's cell with the shape of loom's, so that the code that uses it is checked by both.
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

/// Orders everything before it against everything after it, as `fence(SeqCst)` does.
///
/// x86: compilers emit `mfence` for that fence; a locked operation on the stack orders the same (ordinary,
/// write-back memory) at less than half the cost, which is most of an ATC hit (15 ns instead of 33 ns on
/// an AMD EPYC; `examples/atc_hit.rs`). Linux' smp_mb() is the same instruction.
#[inline(always)]
#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
#[allow(unsafe_code)] // One instruction.
pub(crate) fn full_fence() {
    // SAFETY: the instruction writes back what it read, below the stack pointer, atomically: no value
    // changes. The asm block clobbers memory for the compiler, so nothing is moved across it.
    unsafe { std::arch::asm!("lock or dword ptr [rsp - 4], 0", options(nostack)) };
}

/// Orders everything before it against everything after it.
#[inline(always)]
#[cfg(any(not(target_arch = "x86_64"), loom, miri))]
pub(crate) fn full_fence() {
    fence(Ordering::SeqCst);
}
