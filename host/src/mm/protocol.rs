//! The Dekker pair between a covered call and a fill, apart from where the words live.
//!
//! Generic so that a model checker can run exactly this code over its own atomics
//! (`host/tests/dekker_model.rs`). Each side writes its word, fences, and reads the other's: at least one
//! of them sees the other, so a page is never handed out during a call that told nobody.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A counter that both sides share.
pub trait Word {
    /// Reads it.
    fn read(&self) -> u64;
    /// Adds; wraps.
    fn add(&self, n: u32);
    /// Subtracts; wraps.
    fn sub(&self, n: u32);
}

impl Word for AtomicU32 {
    fn read(&self) -> u64 {
        u64::from(self.load(Ordering::Relaxed))
    }
    fn add(&self, n: u32) {
        self.fetch_add(n, Ordering::Relaxed);
    }
    fn sub(&self, n: u32) {
        self.fetch_sub(n, Ordering::Relaxed);
    }
}

impl Word for AtomicU64 {
    fn read(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }
    fn add(&self, n: u32) {
        self.fetch_add(u64::from(n), Ordering::Relaxed);
    }
    fn sub(&self, n: u32) {
        self.fetch_sub(u64::from(n), Ordering::Relaxed);
    }
}

/// The fence between writing one's own word and reading the other's.
pub trait Fence {
    /// A sequentially consistent fence.
    fn full();
}

/// The real one.
#[derive(Debug, Clone, Copy)]
pub struct FullFence;

impl Fence for FullFence {
    fn full() {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// The words that a covered call uses.
#[derive(Debug, Clone, Copy)]
pub struct AgentWords<'a, W, G> {
    /// Raised: `in_progress` of the bucket, or the whole-space word.
    pub in_progress: &'a W,
    /// Raised.
    pub generation: &'a G,
    /// Read: pages handed out in the bucket (or in total).
    pub cached: &'a W,
    /// Read: somebody wants to hear of every call.
    pub must_hop: &'a W,
}

/// Times that the generation may move under the reader before the older value is taken.
const STABLE_READS: usize = 8;

/// A fill's steps 1 to 4: `announce` raises `cached` (or `must_hop`), `busy` reads the `in_progress` words.
/// Returns the generation, or `None` when a call is in progress.
///
/// The generation is read *before* `busy` is asked: a call that is in progress and not seen has raised the
/// generation after the value read here, so nothing that is remembered under this value can hide its change.
/// It is read again after, so that the value is also the newest that this look-up can stand for; when it keeps
/// moving (calls elsewhere) the older one is used, which is only stricter.
pub fn announce_fill<G: Word, F: Fence>(
    announce: impl FnOnce(),
    busy: impl Fn() -> bool,
    generation: &G,
) -> Option<u64> {
    announce();
    F::full();
    let mut before = generation.read();
    for _ in 0..STABLE_READS {
        F::full();
        if busy() {
            return None;
        }
        F::full();
        let after = generation.read();
        if after == before {
            break;
        }
        before = after;
    }
    F::full();
    // After the last round `before` may be newer than its `busy`.
    let quiet = !busy();
    // The look-up comes after what `busy` has read: a call that it saw to be over is over in the page tables.
    F::full();
    quiet.then_some(before)
}

/// Steps 1 to 4 of a covered call: whether it has to hop, and its generation. The agent runs its own code;
/// this is the daemon's part when it changes a range itself, and the other half of the model.
pub fn announce_call<W: Word, G: Word, F: Fence>(words: &AgentWords<'_, W, G>) -> bool {
    words.in_progress.add(1);
    F::full();
    words.generation.add(1);
    words.must_hop.read() != 0 || words.cached.read() != 0
}
