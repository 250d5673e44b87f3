//! Paired measurement: floor and subject in ABBA blocks, the median of the blocks' ratios with a bootstrap
//! interval.

use serde::{Deserialize, Serialize};

use crate::demo::application::Random;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2000;

/// One ABBA block: floor, subject, subject, floor; nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The two floor calls.
    pub floor: [u64; 2],
    /// The two subject calls.
    pub subject: [u64; 2],
}

impl Block {
    fn ratio(self) -> f64 {
        let sum = |pair: [u64; 2]| (pair[0] + pair[1]).max(1) as f64;
        sum(self.subject) / sum(self.floor)
    }
    /// Subject less floor, nanoseconds.
    pub fn difference(self) -> f64 {
        (self.subject[0] + self.subject[1]) as f64 / 2.0 - (self.floor[0] + self.floor[1]) as f64 / 2.0
    }
}

/// A median with its 95% interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Median of the blocks.
    pub median: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

/// What a case comes to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Blocks measured.
    pub blocks: usize,
    /// Median of the floor's calls.
    pub floor_p50_ns: u64,
    /// 99th percentile of the floor's calls.
    pub floor_p99_ns: u64,
    /// Median of the subject's calls.
    pub p50_ns: u64,
    /// 99th percentile of the subject's calls.
    pub p99_ns: u64,
    /// Slowest of the subject's calls.
    #[serde(default)]
    pub max_ns: u64,
    /// Subject over floor.
    pub ratio: Interval,
    /// Subject less floor.
    pub difference_ns: Interval,
}

/// Figures of some blocks.
///
/// # Panics
/// Without a block.
pub fn paired(blocks: &[Block], seed: u64) -> Paired {
    assert!(!blocks.is_empty(), "a case has blocks");
    let calls = |pick: fn(&Block) -> [u64; 2]| {
        let mut all: Vec<u64> = blocks.iter().flat_map(pick).collect();
        all.sort_unstable();
        all
    };
    let (floor, subject) = (calls(|b| b.floor), calls(|b| b.subject));
    let ratios: Vec<f64> = blocks.iter().map(|b| b.ratio()).collect();
    let differences: Vec<f64> = blocks.iter().map(|b| b.difference()).collect();
    Paired {
        blocks: blocks.len(),
        floor_p50_ns: quantile(&floor, 0.5),
        floor_p99_ns: quantile(&floor, 0.99),
        p50_ns: quantile(&subject, 0.5),
        p99_ns: quantile(&subject, 0.99),
        max_ns: subject[subject.len() - 1],
        ratio: bootstrap(&ratios, seed),
        difference_ns: bootstrap(&differences, seed),
    }
}

/// The smallest value that at least that part of the sorted values does not exceed.
pub fn quantile(sorted: &[u64], q: f64) -> u64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

/// Percentile bootstrap of the median.
pub fn bootstrap(values: &[f64], seed: u64) -> Interval {
    let mut random = Random::new(seed, values.len() as u64);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let mut sample: Vec<f64> = values
                .iter()
                .map(|_| values[random.below(values.len())])
                .collect();
            median(&mut sample)
        })
        .collect();
    medians.sort_unstable_by(f64::total_cmp);
    Interval {
        median: median(&mut values.to_vec()),
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000 - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_paired_when_subject_takes_twice_as_long_says_two() {
        let blocks: Vec<Block> = (0..40)
            .map(|i| Block {
                // Drift over time hits both alike: that is what the blocks are for.
                floor: [1000 + 50 * i, 1000 + 50 * i],
                subject: [2000 + 100 * i, 2000 + 100 * i],
            })
            .collect();
        let result = paired(&blocks, 1);
        assert_eq!(
            (result.ratio.median, result.ratio.low, result.ratio.high),
            (2.0, 2.0, 2.0)
        );
        assert_eq!(result.blocks, 40);
        assert!(result.difference_ns.low <= result.difference_ns.median);
        assert!(result.difference_ns.median <= result.difference_ns.high);
    }

    #[test]
    fn test_bootstrap_when_values_scatter_brackets_the_median() {
        let mut random = Random::new(5, 5);
        let values: Vec<f64> = (0..60).map(|_| 100.0 + random.below(41) as f64 - 20.0).collect();
        let interval = bootstrap(&values, 1);
        assert!(
            interval.low < interval.median && interval.median < interval.high,
            "{interval:?}"
        );
        assert!((90.0..110.0).contains(&interval.median), "{interval:?}");
        assert_eq!(
            interval,
            bootstrap(&values, 1),
            "the same seed gives the same interval"
        );
        // One value far out moves a mean, not this.
        let mut with_outlier = values.clone();
        with_outlier.push(1e9);
        assert!(bootstrap(&with_outlier, 1).high < 120.0);
    }

    #[test]
    fn test_quantile_when_few_values_takes_an_existing_one() {
        let sorted = [1, 2, 3, 4];
        assert_eq!(
            (
                quantile(&sorted, 0.5),
                quantile(&sorted, 0.99),
                quantile(&sorted, 0.0)
            ),
            (2, 4, 1)
        );
    }
}
