//! One entry in memory: a sequence word and relaxed words, so that look-ups take no lock.

use std::sync::atomic::AtomicBool as Hint;

use crate::sync::{AtomicU64, Ordering, fence, spin_loop};

use super::types::{EntryDump, PageSize, SpaceId};

/// Set in `key` of a slot that holds an entry.
const VALID: u64 = 1 << 8;
/// The page's shift in `key`.
const SHIFT: u64 = 0xff;
/// In `host`: stores are allowed.
const WRITABLE: u64 = 1;
/// In `host`: the mapping itself allows stores, whatever software said.
const STORABLE: u64 = 2;
/// Low bits of a page-aligned word, free for flags.
const LOW: u64 = 0xfff;
/// Look-ups of a slot that is being rewritten before it counts as a miss. (The writer can be preempted;
/// an access never waits for it.)
const RETRIES: u32 = if cfg!(loom) { 1 } else { 64 };

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) space: u64,
    /// First address of the page.
    pub(super) va: u64,
    pub(super) shift: u8,
    /// Software allows stores.
    pub(super) writable: bool,
    /// The mapping allows stores; true where `writable` is.
    pub(super) storable: bool,
    /// Host address of the page's first byte; a multiple of 4096. 0: the client is asked.
    pub(super) host: u64,
    pub(super) iova: u64,
    pub(super) tag: u64,
}

impl Entry {
    pub(super) fn key(va: u64, shift: u8) -> u64 {
        let page = (1u64 << shift) - 1;
        (va & !page) | VALID | u64::from(shift)
    }

    /// Last address of the page.
    pub(super) fn last(&self) -> u64 {
        self.va + ((1u64 << self.shift) - 1)
    }

    /// Last IOVA of the target. (Resolved inside a mapping, so it does not wrap.)
    pub(super) fn target_last(&self) -> u64 {
        self.iova + ((1u64 << self.shift) - 1)
    }

    pub(super) fn dump(&self) -> EntryDump {
        EntryDump {
            space: SpaceId(self.space),
            va: self.va,
            size: PageSize::new(self.shift).expect("only valid sizes are entered"),
            iova: self.iova,
            writable: self.writable,
            tag: self.tag,
        }
    }
}

/// What a look-up takes out of a slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    /// Host address of the page's first byte. 0: the client is asked.
    pub(super) host: u64,
    pub(super) writable: bool,
    pub(super) storable: bool,
    pub(super) tag: u64,
}

/// Written under the ATC's lock, read by anybody. One cache line.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Slot {
    /// Odd while the words are being written.
    seq: AtomicU64,
    /// 0: empty. Else page | VALID | shift.
    key: AtomicU64,
    space: AtomicU64,
    /// Page-aligned | WRITABLE | STORABLE.
    host: AtomicU64,
    tag: AtomicU64,
    iova: AtomicU64,
    /// Looked up since the replacement hand came by. A hint, hence invisible to the model checker.
    used: Hint,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            seq: AtomicU64::new(0),
            key: AtomicU64::new(0),
            space: AtomicU64::new(0),
            host: AtomicU64::new(0),
            tag: AtomicU64::new(0),
            iova: AtomicU64::new(0),
            used: Hint::new(false),
        }
    }

    /// Without the lock: the entry, if this is it. `validate` is always true, except where the model
    /// checker has to find that it matters.
    #[inline]
    pub(super) fn probe(&self, space: u64, key: u64, validate: bool) -> Option<Found> {
        for _ in 0..=RETRIES {
            let seq = self.seq.load(Ordering::Acquire);
            // A slot that does not match now is not the entry: if it is just being written, this look-up
            // came before.
            if self.key.load(Ordering::Relaxed) != key || self.space.load(Ordering::Relaxed) != space {
                return None;
            }
            let host = self.host.load(Ordering::Relaxed);
            let tag = self.tag.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            if !validate || (seq & 1 == 0 && self.seq.load(Ordering::Relaxed) == seq) {
                if !self.used.load(Ordering::Relaxed) {
                    self.used.store(true, Ordering::Relaxed);
                }
                return Some(Found {
                    host: host & !LOW,
                    writable: host & WRITABLE != 0,
                    storable: host & STORABLE != 0,
                    tag,
                });
            }
            spin_loop();
        }
        None
    }

    /// Under the lock.
    pub(super) fn is_live(&self) -> bool {
        self.key.load(Ordering::Relaxed) != 0
    }

    /// Under the lock.
    pub(super) fn entry(&self) -> Option<Entry> {
        let key = self.key.load(Ordering::Relaxed);
        if key == 0 {
            return None;
        }
        let host = self.host.load(Ordering::Relaxed);
        Some(Entry {
            space: self.space.load(Ordering::Relaxed),
            va: key & !LOW,
            shift: (key & SHIFT) as u8,
            writable: host & WRITABLE != 0,
            storable: host & STORABLE != 0,
            host: host & !LOW,
            iova: self.iova.load(Ordering::Relaxed),
            tag: self.tag.load(Ordering::Relaxed),
        })
    }

    /// Under the lock. A single store: a look-up that took the words before it is one that the purge's
    /// drain waits for; the next write of the slot changes the sequence.
    pub(super) fn clear(&self) {
        self.key.store(0, Ordering::Relaxed);
    }

    /// Under the lock.
    pub(super) fn write(&self, entry: &Entry) {
        assert!(
            entry.host & LOW == 0 && entry.va & LOW == 0,
            "entry is not page-aligned"
        );
        assert!(
            entry.storable || !entry.writable,
            "a writable entry for memory that is not"
        );
        let seq = self.seq.load(Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
        // Whoever sees one of the words below sees the odd sequence, too.
        fence(Ordering::Release);
        self.space.store(entry.space, Ordering::Relaxed);
        let flags = (u64::from(entry.writable) * WRITABLE) | (u64::from(entry.storable) * STORABLE);
        self.host.store(entry.host | flags, Ordering::Relaxed);
        self.tag.store(entry.tag, Ordering::Relaxed);
        self.iova.store(entry.iova, Ordering::Relaxed);
        self.key
            .store(Entry::key(entry.va, entry.shift), Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
        self.used.store(true, Ordering::Relaxed);
    }

    /// Under the lock: not looked up since the last call.
    pub(super) fn unused(&self) -> bool {
        !self.used.swap(false, Ordering::Relaxed)
    }
}
