//! Numbers of objects.

use std::collections::HashSet;

/// Numbers that are handed out in turn, so that one that was given back is not the next one.
#[derive(Debug)]
pub(super) struct Numbers {
    first: u32,
    end: u32,
    next: u32,
    taken: HashSet<u32>,
}

impl Numbers {
    /// `first..end`.
    pub(super) fn new(first: u32, end: u32) -> Self {
        Self {
            first,
            end,
            next: first,
            taken: HashSet::new(),
        }
    }

    /// The next free one.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.taken.len() >= (self.end - self.first) as usize {
            return None;
        }
        loop {
            let number = self.next;
            self.next = if number + 1 == self.end {
                self.first
            } else {
                number + 1
            };
            if self.taken.insert(number) {
                return Some(number);
            }
        }
    }

    /// Whether it was taken.
    pub(super) fn give_back(&mut self, number: u32) -> bool {
        self.taken.remove(&number)
    }

    pub(super) fn contains(&self, number: u32) -> bool {
        self.taken.contains(&number)
    }

    pub(super) fn len(&self) -> usize {
        self.taken.len()
    }

    pub(super) fn clear(&mut self) {
        self.taken.clear();
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_numbers_when_all_are_taken_are_refused_until_one_comes_back() {
        let mut numbers = Numbers::new(3, 6);
        assert_eq!(
            [numbers.take(), numbers.take(), numbers.take()],
            [Some(3), Some(4), Some(5)]
        );
        assert_eq!(numbers.take(), None);
        assert!(numbers.give_back(4));
        assert!(!numbers.give_back(4));
        assert_eq!(numbers.take(), Some(4));
    }

    #[test]
    fn test_number_when_given_back_is_not_the_next_one() {
        let mut numbers = Numbers::new(0, 10);
        let first = numbers.take().unwrap();
        numbers.give_back(first);
        assert_ne!(numbers.take(), Some(first));
    }
}
