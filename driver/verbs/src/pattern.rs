//! Contents that tell where they came from.

/// A sequence of 64-bit words that is made from a seed: the word at an offset differs from that at any other offset,
/// and from that of other seeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern(u64);

impl Pattern {
    /// Of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The word at that index.
    #[must_use]
    pub fn word(self, index: usize) -> u64 {
        // Odd, so that discarded memory (zeros) is never right.
        mix(self.0.wrapping_add(index as u64)) | 1
    }
}

/// The finalizer of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_pattern_when_seed_or_place_differ_differs() {
        let (one, two) = (Pattern::new(1), Pattern::new(2));
        let words: std::collections::HashSet<u64> =
            (0..1000).flat_map(|i| [one.word(i), two.word(i)]).collect();
        assert_eq!(words.len(), 2000);
        assert!(!words.contains(&0));
    }
}
