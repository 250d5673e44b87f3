//! Latency histograms and the context-switch counters around them.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Times of one kind of call, in nanoseconds.
#[derive(Debug, Clone)]
pub struct Latency(Histogram<u64>);

impl Default for Latency {
    fn default() -> Self {
        // Up to one minute with three significant digits; longer values count as that.
        Self(Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("constant bounds are valid"))
    }
}

/// The figures that tables and JSON show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Calls.
    pub count: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Slowest.
    pub max_ns: u64,
}

impl Latency {
    /// Adds one call.
    pub fn record(&mut self, elapsed: Duration) {
        self.0.saturating_record((elapsed.as_nanos() as u64).max(1));
    }
    /// Adds all of another histogram's calls.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }
    /// Its figures.
    pub fn summary(&self) -> LatencySummary {
        if self.0.is_empty() {
            return LatencySummary::default();
        }
        LatencySummary {
            count: self.0.len(),
            p50_ns: self.0.value_at_quantile(0.5),
            p99_ns: self.0.value_at_quantile(0.99),
            max_ns: self.0.max(),
        }
    }
}

/// A duration as a person reads it.
pub fn human(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// Voluntary context switches of the calling thread so far (getrusage, RUSAGE_THREAD).
#[allow(unsafe_code, reason = "rustix has no getrusage")]
pub fn voluntary_switches() -> u64 {
    // SAFETY: rusage is plain data, and all zeroes are a valid value of it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid rusage for the duration of the call.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    assert_eq!(result, 0, "RUSAGE_THREAD is known since Linux 2.6.26");
    usage.ru_nvcsw as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_latency_when_recorded_summarises_quantiles() {
        let mut latency = Latency::default();
        assert_eq!(latency.summary(), LatencySummary::default());
        for us in 1..=100 {
            latency.record(Duration::from_micros(us));
        }
        let mut other = Latency::default();
        other.record(Duration::from_secs(90));
        latency.merge(&other);
        let s = latency.summary();
        assert_eq!(s.count, 101);
        assert!(s.p50_ns.abs_diff(51_000) < 1_000, "{s:?}");
        assert!(s.max_ns >= 60_000_000_000, "a longer call is not lost: {s:?}");
    }

    #[test]
    fn test_human_when_scaled_keeps_the_unit() {
        assert_eq!(human(999), "999 ns");
        assert_eq!(human(1_500), "1.5 us");
        assert_eq!(human(2_500_000), "2.5 ms");
        assert_eq!(human(3_210_000_000), "3.21 s");
    }

    #[test]
    fn test_voluntary_switches_when_thread_sleeps_count_up() {
        let before = voluntary_switches();
        std::thread::sleep(Duration::from_millis(2));
        assert!(voluntary_switches() > before);
    }
}
