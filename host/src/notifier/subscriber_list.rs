// Reason: a subscriber is read without a lock while the list changes (the part that SRCU plays in the kernel).
#![allow(unsafe_code)]
//! The subscribers of a chain: a preallocated array that readers walk without a lock.
//!
//! Each place counts its readers. Taking a subscriber out closes the place to new readers, waits for those
//! inside, and only then drops the value. A reader costs one compare-and-swap in and one subtraction out.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::context::MaySleep;
use super::event_count::EventCount;

/// Set while the place has a subscriber that new readers may enter.
const LIVE: u32 = 1 << 31;

/// One place of the list.
#[derive(Debug)]
pub(super) struct Place<T: ?Sized> {
    /// [`LIVE`] and the number of readers inside.
    state: AtomicU32,
    /// Written only while the state is 0 and by the one owner that `publish` and `close` name.
    value: UnsafeCell<Option<Arc<T>>>,
}

// SAFETY: `value` is reached through shared references by readers that have been counted in `state` while
// LIVE was set; it is written only when no reader is inside and none can come in (state 0). T itself is
// shared and, as the last Arc may be dropped anywhere, sent: hence the bounds.
unsafe impl<T: ?Sized + Send + Sync> Sync for Place<T> {}

/// A counted reader.
#[derive(Debug)]
pub(super) struct Entered<'a, T: ?Sized> {
    place: &'a Place<T>,
    emptied: &'a EventCount,
}

impl<T: ?Sized> Default for Place<T> {
    fn default() -> Self {
        Self {
            state: AtomicU32::new(0),
            value: UnsafeCell::new(None),
        }
    }
}

impl<T: ?Sized> Place<T> {
    /// Enters as a reader. `None` when nobody lives here.
    pub(super) fn enter<'a>(&'a self, emptied: &'a EventCount) -> Option<Entered<'a, T>> {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state & LIVE == 0 {
                return None;
            }
            match self
                .state
                .compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => {
                    return Some(Entered { place: self, emptied });
                }
                Err(now) => state = now,
            }
        }
    }

    /// Puts a subscriber in and opens the place.
    ///
    /// # Safety
    /// The caller owns the place: it was never published, or [`Self::take`] has returned since; and nobody
    /// else publishes into it meanwhile.
    pub(super) unsafe fn publish(&self, value: Arc<T>) {
        assert_eq!(
            self.state.load(Ordering::Acquire),
            0,
            "a free place has no reader"
        );
        // SAFETY: the state is 0, so no reader is inside and none can enter; by contract no other writer.
        unsafe { *self.value.get() = Some(value) };
        self.state.store(LIVE, Ordering::Release);
    }

    /// Closes the place: no new reader comes in. Returns whether it was open (one caller gets `true`).
    pub(super) fn close(&self) -> bool {
        self.state.fetch_and(!LIVE, Ordering::AcqRel) & LIVE != 0
    }

    /// Waits until no reader is inside.
    pub(super) fn wait_readers(&self, emptied: &EventCount, token: &MaySleep, place: &str) {
        emptied.wait_for(token, place, || {
            (self.state.load(Ordering::Acquire) == 0).then_some(())
        });
    }

    /// Takes the value out of a closed place.
    ///
    /// # Safety
    /// The caller is the one whose [`Self::close`] returned `true`.
    pub(super) unsafe fn take(&self) -> Arc<T> {
        assert_eq!(
            self.state.load(Ordering::Acquire),
            0,
            "closed, and no reader inside"
        );
        // SAFETY: state 0: no reader is inside and none can enter; by contract this is the only writer.
        let value = unsafe { (*self.value.get()).take() };
        value.expect("a place that was open has a value")
    }
}

impl<T: ?Sized> std::ops::Deref for Entered<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this reader was counted while LIVE was set, and `take` and `publish` run only at state 0,
        // so the value is there and is not written until this guard is dropped.
        let value = unsafe { (*self.place.value.get()).as_deref() };
        value.expect("an open place has a value")
    }
}

impl<T: ?Sized> Drop for Entered<'_, T> {
    fn drop(&mut self) {
        // Release: what the callback did happens before the value is dropped.
        if self.place.state.fetch_sub(1, Ordering::Release) == 1 {
            self.emptied.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_place_when_closed_lets_nobody_in_and_returns_the_value() {
        let place: Place<u32> = Place::default();
        let emptied = EventCount::default();
        let token = MaySleep::claim("test");
        assert!(place.enter(&emptied).is_none());
        // SAFETY: the place is new and this is the only thread.
        unsafe { place.publish(Arc::new(7)) };
        assert_eq!(*place.enter(&emptied).unwrap(), 7);
        assert!(place.close());
        assert!(!place.close(), "only one owner");
        assert!(place.enter(&emptied).is_none());
        place.wait_readers(&emptied, &token, "test");
        // SAFETY: the first `close` returned true here.
        assert_eq!(*unsafe { place.take() }, 7);
    }

    #[test]
    fn test_s7_place_when_reader_is_inside_waits_for_it() {
        let place: Place<u32> = Place::default();
        let emptied = EventCount::default();
        // SAFETY: the place is new and this is the only thread that publishes.
        unsafe { place.publish(Arc::new(7)) };
        let reader = place.enter(&emptied).unwrap();
        std::thread::scope(|s| {
            let taker = s.spawn(|| {
                let token = MaySleep::claim("taker");
                assert!(place.close());
                place.wait_readers(&emptied, &token, "test");
                // SAFETY: this thread's `close` returned true.
                drop(unsafe { place.take() });
            });
            while emptied.waiters() == 0 {
                std::thread::yield_now();
            }
            assert!(!taker.is_finished(), "a reader is still inside");
            assert_eq!(*reader, 7);
            drop(reader);
        });
    }
}
