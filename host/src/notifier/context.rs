//! Who may sleep: tokens that the compiler checks and a depth that the running program checks.
//!
//! A function that can sleep takes `&MaySleep`. Such a token comes from [`MaySleep::claim`] only, which
//! panics inside an atomic section, and it can neither be cloned nor sent to another thread nor kept in a
//! [`Subscriber`](super::Subscriber) (which is `Sync`). A callback that is handed [`Ctx::NonSleeping`]
//! therefore has nothing to call such a function with:
//!
//! ```compile_fail,E0308
//! use host::notifier::{MaySleep, NonSleeping};
//! fn waits(_: &MaySleep) {}
//! let section = NonSleeping::enter();
//! waits(&section); // a NonSleeping is not a MaySleep and cannot be turned into one
//! ```
//! ```compile_fail,E0277
//! use host::notifier::MaySleep;
//! let token = MaySleep::claim("doc");
//! std::thread::scope(|s| { s.spawn(|| { let _ = &token; }); }); // neither Send nor Sync
//! ```
//!
//! [`might_sleep`] is the second line: it knows what the types cannot, for example a token that lives in an
//! outer frame of the same thread.

use std::cell::Cell;
use std::marker::PhantomData;

use super::Again;

thread_local! {
    static ATOMIC_DEPTH: Cell<u32> = const { Cell::new(0) };
    static CALLBACK_DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Panics when this thread is in a section that must not sleep. Call it first in everything that can block:
/// the bug is then found on every call, not only on the rare one that really blocks.
///
/// # Panics
/// In an atomic section, in release builds too: a sleep there is invariant S9 broken.
#[track_caller]
pub fn might_sleep(place: &str) {
    let depth = ATOMIC_DEPTH.get();
    assert!(
        depth == 0,
        "S9: {place} can sleep and was called in an atomic section (depth {depth}); refuse with Again or do it \
         without sleeping"
    );
}

/// Nesting of atomic sections on this thread.
#[must_use]
pub fn atomic_depth() -> u32 {
    ATOMIC_DEPTH.get()
}

/// Whether this thread is inside a callback of some chain.
#[must_use]
pub fn in_callback() -> bool {
    CALLBACK_DEPTH.get() != 0
}

/// Proof that the holder was allowed to sleep when it was made. One thread only.
#[derive(Debug)]
pub struct MaySleep {
    this_thread_only: PhantomData<*const ()>,
}

impl MaySleep {
    /// A token for the calling thread, claimed where a thread's work begins.
    ///
    /// # Panics
    /// In an atomic section: a context that must not sleep cannot make one.
    #[must_use]
    #[track_caller]
    pub fn claim(place: &str) -> Self {
        might_sleep(place);
        Self {
            this_thread_only: PhantomData,
        }
    }
}

/// An atomic section of this thread, and the proof of being in one. Ends when dropped.
#[derive(Debug)]
pub struct NonSleeping {
    this_thread_only: PhantomData<*const ()>,
}

impl NonSleeping {
    /// Enters a section (they nest).
    #[must_use]
    pub fn enter() -> Self {
        ATOMIC_DEPTH.set(ATOMIC_DEPTH.get() + 1);
        Self {
            this_thread_only: PhantomData,
        }
    }
}

impl Drop for NonSleeping {
    fn drop(&mut self) {
        ATOMIC_DEPTH.set(ATOMIC_DEPTH.get() - 1);
    }
}

/// Marks that a callback runs on this thread (S7, S9 of the chain itself).
#[derive(Debug)]
pub(super) struct InCallback(PhantomData<*const ()>);

impl InCallback {
    pub(super) fn enter() -> Self {
        CALLBACK_DEPTH.set(CALLBACK_DEPTH.get() + 1);
        Self(PhantomData)
    }
}

impl Drop for InCallback {
    fn drop(&mut self) {
        CALLBACK_DEPTH.set(CALLBACK_DEPTH.get() - 1);
    }
}

/// What a callback, or a caller of the chain, is allowed to do.
#[derive(Debug, Clone, Copy)]
pub enum Ctx<'a> {
    /// May sleep.
    MaySleep(&'a MaySleep),
    /// Must not: do it without sleeping, or refuse (S9).
    NonSleeping(&'a NonSleeping),
}

impl<'a> Ctx<'a> {
    /// The token, or the refusal that S9 asks for: `let sleep = ctx.may_sleep()?;`
    ///
    /// # Errors
    /// [`Again`] in a context that must not sleep.
    pub fn may_sleep(self) -> Result<&'a MaySleep, Again> {
        match self {
            Ctx::MaySleep(token) => Ok(token),
            Ctx::NonSleeping(_) => Err(Again),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "S9: waits can sleep")]
    fn test_s9_might_sleep_when_in_atomic_section_panics() {
        let _section = NonSleeping::enter();
        might_sleep("waits");
    }

    #[test]
    #[should_panic(expected = "S9")]
    fn test_s9_token_when_claimed_in_atomic_section_panics() {
        let _outer = NonSleeping::enter();
        drop(NonSleeping::enter());
        let _ = MaySleep::claim("test");
    }

    #[test]
    fn test_s9_token_when_section_has_ended_is_given() {
        drop(NonSleeping::enter());
        let token = MaySleep::claim("test");
        assert_eq!(atomic_depth(), 0);
        assert!(Ctx::MaySleep(&token).may_sleep().is_ok());
        let section = NonSleeping::enter();
        assert_eq!(Ctx::NonSleeping(&section).may_sleep().unwrap_err(), Again);
    }

    #[test]
    fn test_s9_section_when_callback_panics_is_left() {
        let _ = std::panic::catch_unwind(|| {
            let _section = NonSleeping::enter();
            panic!("subscriber bug");
        });
        assert_eq!(atomic_depth(), 0);
    }
}
