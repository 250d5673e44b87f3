//! What this process knows to be registered with userfaultfd: sorted, disjoint, of fixed capacity, no malloc.
//!
//! The table may know too little, never too much on purpose: a range that the kernel has registered and the
//! table has not is left to the event path, which is slower and as correct. (It can know too much after a raw
//! munmap; unregistering such a range fails, and the event path takes over as well.)

/// Entries: 64 KiB.
pub(crate) const CAPACITY: usize = 4096;

/// `[start, end)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct Interval {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Interval {
    /// `[start, end)`.
    pub(crate) const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }
    /// Nothing in it.
    pub(crate) const fn is_empty(self) -> bool {
        self.end <= self.start
    }
    /// Bytes.
    pub(crate) const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
    /// A common byte.
    pub(crate) const fn overlaps(self, other: Self) -> bool {
        !self.is_empty() && !other.is_empty() && self.start < other.end && other.start < self.end
    }
}

/// Something did not fit: that part is left to the event path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overflow;

/// A set of addresses. All zero bytes are the empty set.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Intervals<const N: usize> {
    len: usize,
    entries: [Interval; N],
}

impl<const N: usize> Intervals<N> {
    /// Index of the first entry that ends after `at`.
    fn first_ending_after(&self, at: u64) -> usize {
        self.entries[..self.len].partition_point(|e| e.end <= at)
    }

    /// Add a range, merging with what touches it.
    pub(crate) fn add(&mut self, range: Interval) -> Result<(), Overflow> {
        if range.is_empty() {
            return Ok(());
        }
        // Entries first..last touch or overlap the range.
        let first = self.entries[..self.len].partition_point(|e| e.end < range.start);
        let last = self.entries[..self.len].partition_point(|e| e.start <= range.end);
        if first == last {
            if self.len == N {
                return Err(Overflow);
            }
            self.entries.copy_within(first..self.len, first + 1);
            self.entries[first] = range;
            self.len += 1;
            return Ok(());
        }
        self.entries[first] = Interval::new(
            self.entries[first].start.min(range.start),
            self.entries[last - 1].end.max(range.end),
        );
        self.entries.copy_within(last..self.len, first + 1);
        self.len -= last - first - 1;
        Ok(())
    }

    /// Take a range out. When a split does not fit, what lies behind the hole is forgotten.
    pub(crate) fn remove(&mut self, range: Interval) -> Result<(), Overflow> {
        if range.is_empty() {
            return Ok(());
        }
        let mut first = self.first_ending_after(range.start);
        if first == self.len || self.entries[first].start >= range.end {
            return Ok(());
        }
        let entry = self.entries[first];
        if entry.start < range.start && entry.end > range.end {
            self.entries[first].end = range.start;
            if self.len == N {
                return Err(Overflow);
            }
            self.entries.copy_within(first + 1..self.len, first + 2);
            self.entries[first + 1] = Interval::new(range.end, entry.end);
            self.len += 1;
            return Ok(());
        }
        if entry.start < range.start {
            self.entries[first].end = range.start;
            first += 1;
        }
        let mut last = self.entries[..self.len].partition_point(|e| e.start < range.end);
        if last > first && self.entries[last - 1].end > range.end {
            last -= 1;
            self.entries[last].start = range.end;
        }
        self.entries.copy_within(last..self.len, first);
        self.len -= last - first;
        Ok(())
    }

    /// The first known part of `range`.
    pub(crate) fn first_in(&self, range: Interval) -> Option<Interval> {
        let entry = self.entries[..self.len].get(self.first_ending_after(range.start))?;
        entry
            .overlaps(range)
            .then(|| Interval::new(entry.start.max(range.start), entry.end.min(range.end)))
    }

    /// Known bytes of `range`.
    pub(crate) fn bytes_in(&self, range: Interval) -> u64 {
        self.entries[self.first_ending_after(range.start)..self.len]
            .iter()
            .take_while(|e| e.overlaps(range))
            .map(|e| Interval::new(e.start.max(range.start), e.end.min(range.end)).len())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn empty<const N: usize>() -> Intervals<N> {
        Intervals {
            len: 0,
            entries: [Interval::default(); N],
        }
    }

    fn list<const N: usize>(t: &Intervals<N>) -> Vec<(u64, u64)> {
        t.entries[..t.len].iter().map(|e| (e.start, e.end)).collect()
    }

    #[test]
    fn test_add_when_ranges_touch_merges_them() {
        let mut t = empty::<4>();
        t.add(Interval::new(10, 20)).unwrap();
        t.add(Interval::new(30, 40)).unwrap();
        t.add(Interval::new(20, 30)).unwrap();
        assert_eq!(list(&t), [(10, 40)]);
    }

    #[test]
    fn test_add_when_full_reports_overflow_and_keeps_the_rest() {
        let mut t = empty::<2>();
        t.add(Interval::new(10, 20)).unwrap();
        t.add(Interval::new(30, 40)).unwrap();
        assert_eq!(t.add(Interval::new(50, 60)), Err(Overflow));
        assert_eq!(list(&t), [(10, 20), (30, 40)]);
        t.add(Interval::new(15, 35)).unwrap();
        assert_eq!(list(&t), [(10, 40)]);
    }

    #[test]
    fn test_remove_when_a_split_does_not_fit_forgets_the_tail() {
        let mut t = empty::<1>();
        t.add(Interval::new(10, 40)).unwrap();
        assert_eq!(t.remove(Interval::new(20, 30)), Err(Overflow));
        assert_eq!(list(&t), [(10, 20)]);
    }

    #[test]
    fn test_first_in_when_partly_known_clips() {
        let mut t = empty::<4>();
        t.add(Interval::new(10, 20)).unwrap();
        t.add(Interval::new(30, 40)).unwrap();
        assert_eq!(t.first_in(Interval::new(15, 35)), Some(Interval::new(15, 20)));
        assert_eq!(t.first_in(Interval::new(20, 35)), Some(Interval::new(30, 35)));
        assert_eq!(t.first_in(Interval::new(20, 30)), None);
        assert_eq!(t.bytes_in(Interval::new(15, 35)), 10);
    }

    proptest! {
        /// Against a set of units; the capacity is small, so overflow happens: then the table may know
        /// less than the model, never more, and is exact as long as nothing overflowed.
        #[test]
        fn test_intervals_when_operations_are_random_never_know_too_much(
            ops in prop::collection::vec((any::<bool>(), 0u64..200, 1u64..40), 1..120)
        ) {
            let mut table = empty::<8>();
            let mut model = std::collections::BTreeSet::new();
            let mut exact = true;
            for (add, start, len) in ops {
                let range = Interval::new(start, start + len);
                let r = if add { table.add(range) } else { table.remove(range) };
                exact &= r.is_ok();
                for unit in start..start + len {
                    if add { model.insert(unit); } else { model.remove(&unit); }
                }
                let known: Vec<u64> =
                    list(&table).iter().flat_map(|&(s, e)| s..e).collect();
                prop_assert!(list(&table).windows(2).all(|w| w[0].1 < w[1].0));
                if exact {
                    prop_assert!(known.iter().copied().eq(model.iter().copied()));
                } else {
                    prop_assert!(known.iter().all(|u| model.contains(u)));
                }
                let probe = Interval::new(start.saturating_sub(5), start + len + 5);
                let inside = known.iter().filter(|u| probe.start <= **u && **u < probe.end).count() as u64;
                prop_assert_eq!(table.bytes_in(probe), inside);
            }
        }
    }
}
