//! Addresses in the device's IOVA space.

use std::collections::BTreeMap;

/// First address that is given out: above 4 GiB, so that a truncated address is never somebody's memory.
pub const FIRST: u64 = 1 << 32;
/// One past the last address: GRU physical addresses have 46 bits, half of them is room enough.
pub const LAST: u64 = 1 << 45;
/// Alignment of every range, so that large pages stay possible, and the unmapped gap after each, so that an
/// access past the end of one range never reaches the next.
pub const ALIGN: u64 = 2 << 20;

/// First-fit allocator. Ranges never touch: at least [`ALIGN`] bytes lie between two of them.
#[derive(Debug, Default)]
pub struct IovaAllocator {
    /// start -> bytes, rounded up and with the gap.
    taken: BTreeMap<u64, u64>,
}

impl IovaAllocator {
    /// Takes a range of at least `len` bytes, aligned to [`ALIGN`]; `None` when nothing fits.
    pub fn allocate(&mut self, len: u64) -> Option<u64> {
        let span = len.checked_next_multiple_of(ALIGN)?.checked_add(ALIGN)?;
        let mut at = FIRST;
        for (&start, &taken) in &self.taken {
            if start - at >= span {
                break;
            }
            at = start + taken;
        }
        if at.checked_add(span)? > LAST {
            return None;
        }
        self.taken.insert(at, span);
        Some(at)
    }

    /// Gives a range back.
    ///
    /// # Panics
    /// When `start` was not given out: two owners of one address would be the next thing to happen.
    pub fn release(&mut self, start: u64) {
        let taken = self.taken.remove(&start);
        assert!(taken.is_some(), "IOVA {start:#x} was never given out");
    }

    /// Ranges that are taken.
    #[must_use]
    pub fn ranges(&self) -> usize {
        self.taken.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_iova_when_ranges_are_released_reuses_the_hole_and_keeps_gaps() {
        let mut iova = IovaAllocator::default();
        let a = iova.allocate(4096).unwrap();
        let b = iova.allocate(ALIGN + 1).unwrap();
        let c = iova.allocate(1).unwrap();
        assert_eq!((a, b, c), (FIRST, FIRST + 2 * ALIGN, FIRST + 5 * ALIGN));
        iova.release(b);
        assert_eq!(iova.allocate(2 * ALIGN), Some(b));
        iova.release(a);
        assert_eq!(
            iova.allocate(ALIGN + 1),
            Some(c + 2 * ALIGN),
            "does not fit into the first hole"
        );
        assert_eq!(iova.ranges(), 3);
    }

    #[test]
    fn test_iova_when_len_is_absurd_returns_none() {
        let mut iova = IovaAllocator::default();
        for len in [u64::MAX, u64::MAX - ALIGN, LAST] {
            assert_eq!(iova.allocate(len), None);
        }
        assert_eq!(iova.ranges(), 0);
    }

    #[test]
    #[should_panic(expected = "never given out")]
    fn test_iova_when_released_twice_panics() {
        let mut iova = IovaAllocator::default();
        let a = iova.allocate(1).unwrap();
        iova.release(a);
        iova.release(a);
    }
}
