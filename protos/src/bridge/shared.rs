//! The memory that an agent and the host daemon share: mailbox slots and the translation counts.
//!
//! # The protocol of a covered call (agent side)
//! 1. [`SharedTable::in_progress`] of every bucket the range touches is raised (`fetch_add`), or
//!    [`Header::all_in_progress`] when the range spans more than [`MAX_BUCKETS_PER_CALL`] buckets.
//! 2. `fence(SeqCst)`.
//! 3. [`Header::generation`] is raised by one; the value *after* the increment is the call's
//!    generation: every translation that carries a smaller tag and overlaps the range is stale once
//!    the call has returned.
//! 4. If [`Header::must_hop`] is zero and every touched [`SharedTable::cached`] count is zero, nothing
//!    has to be told to anybody. Else a [`Slot`] carries `START` to the daemon and the agent waits for
//!    its answer (the chain's `invalidate_range_start` has returned: drained, invariant S2).
//! 5. The system call.
//! 6. If step 4 used the mailbox: `END` by the same slot. Not waited for, and nobody is woken for it while
//!    [`Header::must_hop`] is zero: the GRU's driver has nothing to do at an end. Whoever registers later rings
//!    after it has raised `must_hop`, so that such ends are served before it waits for them.
//! 7. `in_progress` is lowered; `fence(SeqCst)`; if [`Header::fault_waiters`] is not zero the bell is
//!    rung so that deferred faults are looked at again.
//!
//! # The protocol of a fill (daemon side)
//! 1. `cached[bucket]` is raised (once per page that is not yet in the daemon's own exact set).
//! 2. `fence(SeqCst)`.
//! 3. The generation is read (the tag of the fill). If `in_progress[bucket]` or `all_in_progress` is not
//!    zero then: the fill is put off (invariant S1). In this order: a call that is in progress and not seen
//!    has raised the generation later than it was read, so what is remembered under the tag cannot hide it.
//! 4. The page is looked up, and the translation is handed to the device. The device's kill bit covers what
//!    starts after step 3.
//!
//! Steps 1-3 of both sides are a Dekker pair: each side writes its word, fences, reads the other's.
//!
//! The table is written by an application that the daemon need not trust: a wrong count hurts only
//! that application's own memory, and the daemon never uses a value from here as an index or size
//! without checking it.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Value of [`Header::magic`]: "tlbridge" read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"tlbridge");
/// Layout version. A daemon refuses an agent of another version by name.
pub const VERSION: u32 = 1;
/// Mailbox slots: as many covered calls can be inside the daemon at once; more wait for a slot.
pub const SLOTS: usize = 64;
/// Span of one bucket, as a shift: 2 MiB.
pub const BUCKET_SHIFT: u32 = 21;
/// Buckets of the table (a power of two). Addresses 32 GiB apart share a bucket: a false positive
/// costs one hop, never a missed invalidation.
pub const BUCKETS: usize = 16384;
/// Ranges that touch more buckets than this use the whole-space counters: 2 GiB.
pub const MAX_BUCKETS_PER_CALL: usize = 1024;

/// One past the last address that a range may name: 5-level page tables leave an application 56 bits.
pub const USER_END: u64 = 1 << 56;

/// Index of the bucket that an address belongs to.
#[must_use]
pub fn bucket_of(va: u64) -> usize {
    ((va >> BUCKET_SHIFT) as usize) & (BUCKETS - 1)
}

/// The bucket indexes that `[start, end)` touches, or `None` when the whole-space counters must be
/// used. An empty range touches nothing.
#[must_use]
pub fn buckets_of(start: u64, end: u64) -> Option<impl Iterator<Item = usize> + Clone> {
    let (first, last) = if end <= start {
        (1, 0)
    } else {
        (start >> BUCKET_SHIFT, (end - 1) >> BUCKET_SHIFT)
    };
    if last >= first && last - first >= MAX_BUCKETS_PER_CALL as u64 {
        return None;
    }
    Some((first..last.wrapping_add(1).max(first)).map(|b| (b as usize) & (BUCKETS - 1)))
}

/// Life of a mailbox slot. `Free -> Claimed -> Request -> Serving -> Done -> (Claimed ...) -> Free`.
pub mod slot_state {
    /// Nobody uses the slot.
    pub const FREE: u32 = 0;
    /// An agent thread owns it and fills it in.
    pub const CLAIMED: u32 = 1;
    /// The operands are valid; the daemon may take it.
    pub const REQUEST: u32 = 2;
    /// A daemon worker has taken it.
    pub const SERVING: u32 = 3;
    /// `result` and `generation` are valid; the agent thread owns the slot again.
    pub const DONE: u32 = 4;
    /// An `END` request: like `REQUEST`, but the daemon frees the slot itself and nobody waits.
    pub const REQUEST_DETACHED: u32 = 5;
}

/// What a slot asks for.
pub mod slot_op {
    /// `invalidate_range_start` of the chain; answered when every subscriber's start has returned.
    pub const START: u32 = 1;
    /// `invalidate_range_end`.
    pub const END: u32 = 2;
}

/// The kernel's event names, `include/linux/mmu_notifier.h` (enum mmu_notifier_event).
pub mod slot_event {
    /// munmap, a replaced mapping, mremap's source.
    pub const UNMAP: u32 = 0;
    /// MADV_DONTNEED, hole punch, truncate.
    pub const CLEAR: u32 = 1;
    /// mprotect.
    pub const PROTECTION_VMA: u32 = 2;
}

/// One mailbox slot (64 bytes, one cache line).
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(64))]
pub struct Slot {
    /// One of [`slot_state`]. A futex word: agents wait here for `DONE`.
    pub state: AtomicU32,
    /// One of [`slot_op`].
    pub op: AtomicU32,
    /// First byte of the range.
    pub start: AtomicU64,
    /// One past the last byte of the range.
    pub end: AtomicU64,
    /// The call's generation.
    pub generation: AtomicU64,
    /// One of [`slot_event`].
    pub event: AtomicU32,
    /// 0, or a negative errno.
    pub result: AtomicI32,
    /// Thread id of the caller, for messages.
    pub tid: AtomicU32,
    /// 1 while a thread sleeps on `state` (so that the daemon can skip the wake).
    pub sleeping: AtomicU32,
    /// Nanoseconds that the non-sleeping subscribers took (informative).
    pub nonsleeping_ns: AtomicU32,
    /// Nanoseconds of the whole chain (informative).
    pub chain_ns: AtomicU32,
    /// Reserved.
    pub reserved: [u32; 2],
}
const _: () = assert!(size_of::<Slot>() == 64);

/// Head of the table (one page).
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
pub struct Header {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// Raised by the daemon when it has given the session up (see its log); agents stop hopping and
    /// report the daemon as gone.
    pub closed: AtomicU32,
    /// Generation of the address space: raised by every invalidation, see the module's text.
    pub generation: AtomicU64,
    /// Calls in progress over ranges too large for buckets, and the safety net's block of the whole space.
    pub all_in_progress: AtomicU32,
    /// Non-zero: a subscriber other than the GRU driver has an interest in this address space, every
    /// covered call has to hop.
    pub must_hop: AtomicU32,
    /// All pages that the daemon's fills have raised and not yet lowered: the count for ranges that use
    /// `all_in_progress`.
    pub cached_total: AtomicU32,
    /// Faults that wait for an `in_progress` to be lowered.
    pub fault_waiters: AtomicU32,
    /// Doorbell of the mailbox: a futex word, incremented for each request.
    pub bell: AtomicU32,
    /// Daemon workers that are asleep on `bell`: 0 means a ring needs no system call.
    pub bell_sleepers: AtomicU32,
    /// Covered calls that are between start and end without having hopped (a subscriber that
    /// registers waits until this has been zero once after it raised `must_hop`: S10).
    pub silent_calls: AtomicU32,
    /// Raised by the daemon for each slot that it has served: a sign of life for callers whose turn has not
    /// come, because those before them may each wait for a peer that the daemon is about to fence.
    pub served: AtomicU32,
    /// Slot of the last request (below [`SLOTS`], or the daemon takes what is left of it): where a worker looks first.
    pub rung_slot: AtomicU32,
    /// Reserved.
    pub reserved_word: u32,
    /// Covered calls that needed no hop (statistics).
    pub calls_silent: AtomicU64,
    /// Covered calls that hopped (statistics).
    pub calls_hopped: AtomicU64,
    /// Reserved.
    pub reserved: [[u64; 32]; 15],
    /// Reserved.
    pub reserved_tail: [u64; 22],
}
const _: () = assert!(size_of::<Header>() == 4096);

/// The whole table. Map [`TABLE_BYTES`] bytes, shared, and view them as this.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
pub struct SharedTable {
    /// The counters.
    pub header: Header,
    /// The mailbox.
    pub slots: [Slot; SLOTS],
    /// Covered calls in progress, per bucket.
    pub in_progress: [AtomicU32; BUCKETS],
    /// Pages that may be cached by a device, per bucket.
    pub cached: [AtomicU32; BUCKETS],
}

/// Size of [`SharedTable`] in bytes: what the memfd must hold.
pub const TABLE_BYTES: usize = size_of::<SharedTable>();
const _: () = assert!(TABLE_BYTES == 4096 + 64 * SLOTS + 8 * BUCKETS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_buckets_when_range_is_small_returns_each_bucket_once() {
        let two_mib = 1u64 << BUCKET_SHIFT;
        let b: Vec<_> = buckets_of(two_mib - 1, two_mib + 1).unwrap().collect();
        assert_eq!(b, [0, 1]);
        assert_eq!(buckets_of(4096, 4096).unwrap().count(), 0);
        assert_eq!(buckets_of(0, two_mib).unwrap().count(), 1);
    }

    #[test]
    fn test_buckets_when_range_is_huge_returns_none() {
        assert!(buckets_of(0, (MAX_BUCKETS_PER_CALL as u64 + 1) << BUCKET_SHIFT).is_none());
        assert!(buckets_of(0, (MAX_BUCKETS_PER_CALL as u64) << BUCKET_SHIFT).is_some());
        assert!(buckets_of(0, u64::MAX).is_none());
    }
}
