//! A registration cache: regions are kept after use, and found again by their addresses. What communication libraries
//! do where registering costs more than moving the data.
//!
//! Its catch is what this project is about: a pinned region keeps the pages that were there when it was made. Whoever
//! unmaps, moves or discards memory has to call [`Cache::invalidate`] *before*, or a device goes on with pages that
//! are no longer the program's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Makes regions. They end when they are dropped.
pub trait Registrar {
    /// What it makes.
    type Region;
    /// What can go wrong.
    type Error;
    /// Registers whole pages.
    ///
    /// # Errors
    /// The registration's.
    fn register(&mut self, range: Range<usize>) -> Result<Self::Region, Self::Error>;
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Found.
    pub hits: u64,
    /// Registered.
    pub misses: u64,
    /// Given up for lack of room.
    pub evictions: u64,
    /// Given up because their memory changes.
    pub invalidations: u64,
}

/// Regions by their addresses. No two overlap: one that would is made large enough to replace those that it meets.
#[derive(Debug)]
pub struct Cache<R: Registrar> {
    registrar: R,
    entries: BTreeMap<usize, Entry<R::Region>>,
    page: usize,
    capacity: usize,
    bytes: usize,
    clock: u64,
    counters: Counters,
}

#[derive(Debug)]
struct Entry<T> {
    end: usize,
    region: Rc<T>,
    used: u64,
}

impl<R: Registrar> Cache<R> {
    /// An empty one. Regions that nobody uses are given up while there are more than `capacity` bytes in all.
    ///
    /// # Panics
    /// When the size of a page is no power of two.
    pub fn new(registrar: R, page: usize, capacity: usize) -> Self {
        assert!(page.is_power_of_two(), "a page of {page} bytes");
        Self {
            registrar,
            entries: BTreeMap::new(),
            page,
            capacity,
            bytes: 0,
            clock: 0,
            counters: Counters::default(),
        }
    }

    /// A region that covers these bytes: one that is there, or a new one.
    ///
    /// # Errors
    /// The registration's; the cache is then as it was before.
    pub fn get(&mut self, address: usize, length: usize) -> Result<Rc<R::Region>, R::Error> {
        self.clock += 1;
        let end = address.saturating_add(length.max(1));
        if let Some((_, entry)) = self.entries.range_mut(..=address).next_back()
            && end <= entry.end
        {
            entry.used = self.clock;
            self.counters.hits += 1;
            return Ok(Rc::clone(&entry.region));
        }
        let mut range =
            address & !(self.page - 1)..end.checked_next_multiple_of(self.page).unwrap_or(usize::MAX);
        let met = self.meeting(&range);
        for start in &met {
            range.start = range.start.min(*start);
            range.end = range.end.max(self.entries[start].end);
        }
        let region = Rc::new(self.registrar.register(range.clone())?);
        self.counters.misses += 1;
        for start in met {
            self.remove(start);
        }
        self.bytes += range.len();
        let entry = Entry {
            end: range.end,
            region: Rc::clone(&region),
            used: self.clock,
        };
        self.entries.insert(range.start, entry);
        self.evict();
        Ok(region)
    }

    /// Gives up every region that has one of these bytes, before their memory changes. Returns how many of them
    /// somebody still uses: those end with their last user.
    pub fn invalidate(&mut self, address: usize, length: usize) -> usize {
        let met = self.meeting(&(address..address.saturating_add(length)));
        let mut used = 0;
        for start in met {
            self.counters.invalidations += 1;
            used += usize::from(Rc::strong_count(&self.remove(start)) > 1);
        }
        used
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that are registered by it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Starts of the entries that meet a range. They do not overlap, so their ends are in order too.
    fn meeting(&self, range: &Range<usize>) -> Vec<usize> {
        let mut starts: Vec<usize> = self
            .entries
            .range(..range.end)
            .rev()
            .take_while(|(_, entry)| entry.end > range.start)
            .map(|(start, _)| *start)
            .collect();
        starts.reverse();
        starts
    }

    fn remove(&mut self, start: usize) -> Rc<R::Region> {
        let entry = self.entries.remove(&start).expect("it was just found");
        self.bytes -= entry.end - start;
        entry.region
    }

    fn evict(&mut self) {
        while self.bytes > self.capacity {
            let oldest = self
                .entries
                .iter()
                .filter(|(_, entry)| Rc::strong_count(&entry.region) == 1)
                .min_by_key(|(_, entry)| entry.used);
            let Some((start, _)) = oldest else {
                return;
            };
            let start = *start;
            self.remove(start);
            self.counters.evictions += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Ranges that are registered now.
    type Registered = Rc<RefCell<Vec<Range<usize>>>>;

    struct Registry(Registered);

    struct Held(Range<usize>, Registered);

    impl Drop for Held {
        fn drop(&mut self) {
            let mut all = self.1.borrow_mut();
            let at = all.iter().position(|r| *r == self.0).expect("it is registered");
            all.remove(at);
        }
    }

    impl Registrar for Registry {
        type Region = Held;
        type Error = &'static str;
        fn register(&mut self, range: Range<usize>) -> Result<Held, Self::Error> {
            if range.end > 1 << 30 {
                return Err("no");
            }
            self.0.borrow_mut().push(range.clone());
            Ok(Held(range, Rc::clone(&self.0)))
        }
    }

    fn cache(capacity: usize) -> (Cache<Registry>, Registered) {
        let registered = Registered::default();
        (
            Cache::new(Registry(Rc::clone(&registered)), 4096, capacity),
            registered,
        )
    }

    #[test]
    fn test_get_when_inside_a_region_is_a_hit_and_else_a_miss() {
        let (mut cache, registered) = cache(1 << 20);
        let first = cache.get(0x10_010, 100).ok().unwrap();
        assert_eq!(first.0, 0x10_000..0x11_000, "whole pages");
        let again = cache.get(0x10_ff0, 16).ok().unwrap();
        assert!(Rc::ptr_eq(&first, &again));
        // One byte more is not in it: a larger one replaces it.
        let larger = cache.get(0x10_ff0, 17).ok().unwrap();
        assert_eq!(larger.0, 0x10_000..0x12_000);
        assert_eq!(
            cache.counters(),
            Counters {
                hits: 1,
                misses: 2,
                ..Counters::default()
            }
        );
        assert_eq!(cache.bytes(), 0x2000);
        assert_eq!(registered.borrow().len(), 2, "the smaller one is in use");
        drop((first, again));
        assert_eq!(registered.borrow().as_slice(), std::slice::from_ref(&larger.0));
    }

    #[test]
    fn test_get_when_registration_fails_leaves_the_cache_as_it_was() {
        let (mut cache, registered) = cache(1 << 40);
        cache.get((1 << 30) - 4096, 10).ok().unwrap();
        assert!(cache.get((1 << 30) - 100, 200).is_err());
        assert_eq!((cache.bytes(), registered.borrow().len()), (4096, 1));
        assert!(cache.get((1 << 30) - 100, 100).is_ok());
        assert_eq!(cache.counters().hits, 1);
    }

    #[test]
    fn test_invalidate_when_ranges_meet_gives_up_exactly_those() {
        let (mut cache, registered) = cache(1 << 30);
        for page in [0, 2, 4, 6] {
            cache.get(page << 12, 4096).ok().unwrap();
        }
        let used = cache.get(4 << 12, 1).ok().unwrap();
        // The ends do not belong to it.
        assert_eq!(cache.invalidate((2 << 12) + 4095, (2 << 12) - 4094), 1);
        assert_eq!(cache.counters().invalidations, 2);
        assert_eq!(registered.borrow().len(), 3, "one ends with its user");
        drop(used);
        assert_eq!(*registered.borrow(), [0..4096, 6 << 12..7 << 12]);
        assert_eq!(cache.invalidate(1 << 12, 1 << 12), 0);
        assert_eq!(cache.bytes(), 2 << 12);
        // Invalidated is not found.
        let misses = cache.counters().misses;
        cache.get(2 << 12, 1).ok().unwrap();
        assert_eq!(cache.counters().misses, misses + 1);
    }

    #[test]
    fn test_eviction_when_full_takes_the_longest_unused_that_nobody_uses() {
        let (mut cache, registered) = cache(3 << 12);
        let used = cache.get(0, 1).ok().unwrap();
        cache.get(2 << 12, 1).ok().unwrap();
        cache.get(4 << 12, 1).ok().unwrap();
        cache.get(2 << 12, 1).ok().unwrap();
        cache.get(6 << 12, 1).ok().unwrap();
        assert_eq!(cache.counters().evictions, 1);
        assert_eq!(
            *registered.borrow(),
            [0..4096, 2 << 12..3 << 12, 6 << 12..7 << 12]
        );
        // Nothing can go: more than the capacity, but no region under its user.
        let rest: Vec<_> = [2, 6, 8]
            .map(|p: usize| cache.get(p << 12, 1).ok().unwrap())
            .into();
        assert_eq!((cache.bytes(), rest.len()), (4 << 12, 3));
        assert_eq!(used.0, 0..4096);
    }

    #[test]
    fn test_cache_when_used_at_random_finds_what_a_list_finds() {
        let (mut cache, registered) = cache(usize::MAX >> 1);
        let mut model: Vec<Range<usize>> = Vec::new();
        let mut state = 12_345_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for _ in 0..5000 {
            let (start, length) = (random(64 << 12), 1 + random(4 << 12));
            let (range, page) = (start..start + length, 4096);
            if random(3) == 0 {
                cache.invalidate(start, length);
                model.retain(|r| r.end <= range.start || range.end <= r.start);
            } else {
                let region = cache.get(start, length).ok().unwrap();
                assert!(region.0.start <= range.start && range.end <= region.0.end);
                if !model.iter().any(|r| r.start <= range.start && range.end <= r.end) {
                    let mut new = start / page * page..range.end.next_multiple_of(page);
                    let asked = new.clone();
                    model.retain(|r| {
                        let meets = r.start < asked.end && asked.start < r.end;
                        if meets {
                            new = new.start.min(r.start)..new.end.max(r.end);
                        }
                        !meets
                    });
                    model.push(new);
                }
            }
            let sorted = |ranges: &[Range<usize>]| {
                let mut all: Vec<_> = ranges.iter().map(|r| (r.start, r.end)).collect();
                all.sort_unstable();
                all
            };
            assert_eq!(sorted(&registered.borrow()), sorted(&model));
            assert_eq!(
                cache.bytes(),
                model.iter().map(ExactSizeIterator::len).sum::<usize>()
            );
        }
    }
}
