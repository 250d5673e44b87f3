//! The log of changes: what a host daemon tells a device that checks itself (sanitizer level 2).
//!
//! A ring of [`CHANGES`] records in memory that the device may only read. Each says: `[start, end)` of an address space
//! has been changed, and every translation of it with a smaller generation is stale. A change stands here when nobody
//! may use what was before any more: when the chain's starts have returned and the caller is about to be told so, or
//! when the event of an unannounced change has been read.
//!
//! What is *not* here: calls that told nobody, because by the shared table nothing was cached.
//!
//! # Who writes what
//! Writer n (numbers go upward from 0, one for each change) stores 0 to [`Change::number`], fences, stores the operands,
//! and then stores n + 1 (release). A reader that looks for n + 1 and finds less has seen everything; finds more: has
//! been overtaken, and some changes are lost to it. It reads the number again after the operands.
//!
//! # Whose generations
//! Generations of several address spaces stand in one log, and in the translations of one device. Their upper bits
//! ([`SPACE_SHIFT`]) name the address space: only those of one space are compared. 0 is nobody's: translations of a
//! driver that knows no generations.

use std::fmt;
use std::sync::atomic::AtomicU64;

use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Records of the ring.
pub const CHANGES: usize = 4096;
/// Bytes of a record.
pub const CHANGE_BYTES: usize = size_of::<Change>();
/// Bytes of the log.
pub const LOG_BYTES: usize = CHANGES * CHANGE_BYTES;
/// A generation's bits from here on name the address space.
pub const SPACE_SHIFT: u32 = 40;

/// One change.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(32))]
pub struct Change {
    /// Number of the change, plus 1.
    pub number: AtomicU64,
    /// First byte.
    pub start: AtomicU64,
    /// One past the last byte.
    pub end: AtomicU64,
    /// Translations with a smaller one are stale.
    pub generation: AtomicU64,
}
const _: () = assert!(CHANGE_BYTES == 32);

/// The log.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct ChangeLog {
    /// Change n is in record n modulo [`CHANGES`].
    pub changes: [Change; CHANGES],
}

/// The generation as one of address space `space`, whatever its upper bits said.
#[must_use]
pub fn generation_in(space: u32, generation: u64) -> u64 {
    u64::from(space) << SPACE_SHIFT | generation & ((1 << SPACE_SHIFT) - 1)
}

/// Whether a translation tagged `tag` is older than a change of `generation`, in the same address space.
#[must_use]
pub fn is_older(tag: u64, generation: u64) -> bool {
    tag >> SPACE_SHIFT == generation >> SPACE_SHIFT && tag >> SPACE_SHIFT != 0 && tag < generation
}

/// A generation as people read it.
#[derive(Debug, Clone, Copy)]
pub struct Shown(pub u64);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", generation_in(0, self.0))?;
        match self.0 >> SPACE_SHIFT {
            0 => Ok(()),
            space => write!(f, " of session {space}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_generations_when_spaces_differ_are_never_older() {
        let (a, b) = (generation_in(1, 7), generation_in(2, u64::MAX));
        assert_eq!((a, b >> SPACE_SHIFT), (1 << 40 | 7, 2));
        assert!(is_older(a, generation_in(1, 8)));
        assert!(!is_older(a, a) && !is_older(a, b) && !is_older(b, a));
        assert!(!is_older(0, 5), "nobody's");
        assert_eq!(Shown(a).to_string(), "7 of session 1");
        assert_eq!(Shown(0).to_string(), "0");
    }
}
