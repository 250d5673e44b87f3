//! Times, by what was measured and by iteration, so that a row and its floors are compared iteration by iteration.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::bench::statistics::{Interval, bootstrap, quantile};

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// ibv_reg_mr of memory that is there.
    Register,
    /// ibv_reg_mr of memory without a page in it.
    RegisterUnpopulated,
    /// ibv_dereg_mr.
    Deregister,
    /// A registration cache finds a region among many.
    CacheHit,
    /// A registration cache makes a region.
    CacheMiss,
    /// ibv_advise_mr.
    Prefetch,
    /// The HCA writes to memory that is there, for the first time since it was registered.
    FirstTouchWrite,
    /// The HCA reads from it, for the first time since it was registered.
    FirstTouchRead,
    /// The HCA writes again.
    WarmWrite,
    /// The HCA reads again.
    WarmRead,
    /// The program discards the memory.
    Invalidate,
    /// The HCA writes to it after that.
    RefaultWrite,
    /// The HCA reads from it after that.
    RefaultRead,
    /// Floor: mmap with every page present.
    Populate,
    /// Floor: mlock of memory that is there.
    Lock,
    /// Floor: munlock.
    Unlock,
    /// Floor: memcpy of the same bytes by this processor.
    Memcpy,
    /// Floor: madvise of memory that nobody has registered.
    Discard,
    /// Floor: memcpy to memory that was discarded.
    MemcpyRefault,
    /// Floor: an ioctl of the device's file that does nothing.
    NoopIoctl,
}

impl Operation {
    /// For the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::RegisterUnpopulated => "register, no page yet",
            Self::Deregister => "deregister",
            Self::CacheHit => "cache hit",
            Self::CacheMiss => "cache miss",
            Self::Prefetch => "prefetch",
            Self::FirstTouchWrite => "first touch, WRITE",
            Self::FirstTouchRead => "first touch, READ",
            Self::WarmWrite => "touch again, WRITE",
            Self::WarmRead => "touch again, READ",
            Self::Invalidate => "discard",
            Self::RefaultWrite => "re-fault, WRITE",
            Self::RefaultRead => "re-fault, READ",
            Self::Populate => "mmap + populate",
            Self::Lock => "mlock",
            Self::Unlock => "munlock",
            Self::Memcpy => "memcpy",
            Self::Discard => "madvise",
            Self::MemcpyRefault => "memcpy after madvise",
            Self::NoopIoctl => "no-op ioctl",
        }
    }

    /// Whether it is there to compare with.
    pub fn is_floor(self) -> bool {
        self >= Self::Populate
    }

    /// Whether its time is that of the bytes.
    pub fn has_rate(self) -> bool {
        !matches!(self, Self::NoopIoctl | Self::CacheHit)
    }

    /// What it is compared with.
    pub fn floors(self) -> &'static [Self] {
        match self {
            Self::Register | Self::CacheMiss | Self::Prefetch => &[Self::Lock, Self::NoopIoctl],
            Self::RegisterUnpopulated => &[Self::Populate],
            Self::Deregister => &[Self::Unlock, Self::NoopIoctl],
            Self::CacheHit => &[Self::NoopIoctl],
            Self::FirstTouchWrite => &[Self::Memcpy, Self::WarmWrite],
            Self::FirstTouchRead => &[Self::Memcpy, Self::WarmRead],
            Self::WarmWrite | Self::WarmRead => &[Self::Memcpy],
            Self::Invalidate => &[Self::Discard],
            Self::RefaultWrite => &[Self::MemcpyRefault, Self::WarmWrite],
            Self::RefaultRead => &[Self::MemcpyRefault, Self::WarmRead],
            _ => &[],
        }
    }
}

/// A row against one of its floors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Against {
    /// Which.
    pub floor: Operation,
    /// Its median in the same iterations.
    pub floor_p50_ns: u64,
    /// Row over floor, iteration by iteration.
    pub ratio: Interval,
}

/// The figures of one operation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// How many.
    pub samples: usize,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Slowest.
    pub max_ns: u64,
    /// Of the median, where bytes are what takes the time.
    pub bytes_per_second: Option<f64>,
    /// Against what is below it.
    pub floors: Vec<Against>,
}

/// Times of one cell (a mode and a size). Every operation has at most one in an iteration.
#[derive(Debug, Default)]
pub struct Samples {
    times: BTreeMap<Operation, BTreeMap<u32, u64>>,
    iteration: u32,
}

impl Samples {
    /// Begins an iteration.
    pub fn next_iteration(&mut self) {
        self.iteration += 1;
    }

    /// Forgets what there is: it was to warm up.
    pub fn clear(&mut self) {
        self.times.clear();
    }

    /// Times a step that may fail; failures are not counted.
    pub fn time<T, E>(&mut self, operation: Operation, step: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let begin = Instant::now();
        let result = step();
        let elapsed = begin.elapsed();
        if result.is_ok() {
            self.record(operation, elapsed);
        }
        result
    }

    /// Adds a time to this iteration.
    pub fn record(&mut self, operation: Operation, elapsed: Duration) {
        let before = self
            .times
            .entry(operation)
            .or_default()
            .insert(self.iteration, (elapsed.as_nanos() as u64).max(1));
        assert!(before.is_none(), "{operation:?} twice in an iteration");
    }

    /// Adds another cell's iterations.
    pub fn append(&mut self, other: &Self) {
        for (operation, times) in &other.times {
            let mine = self.times.entry(*operation).or_default();
            for (iteration, ns) in times {
                mine.insert(self.iteration + iteration, *ns);
            }
        }
        self.iteration += other.iteration;
    }

    /// What there are times of.
    pub fn operations(&self) -> impl Iterator<Item = Operation> {
        self.times.keys().copied()
    }

    /// An operation's figures for a size; `None` without a sample.
    pub fn figures(&self, operation: Operation, bytes: u64, seed: u64) -> Option<Figures> {
        let times = self.times.get(&operation)?;
        let mut sorted: Vec<u64> = times.values().copied().collect();
        sorted.sort_unstable();
        let p50_ns = quantile(&sorted, 0.5);
        Some(Figures {
            samples: sorted.len(),
            p50_ns,
            p99_ns: quantile(&sorted, 0.99),
            max_ns: *sorted.last()?,
            bytes_per_second: operation.has_rate().then(|| bytes as f64 / (p50_ns as f64 / 1e9)),
            floors: operation
                .floors()
                .iter()
                .filter_map(|floor| self.against(times, *floor, seed))
                .collect(),
        })
    }

    fn against(&self, times: &BTreeMap<u32, u64>, floor: Operation, seed: u64) -> Option<Against> {
        let floors = self.times.get(&floor)?;
        let pairs: Vec<(u64, u64)> = times
            .iter()
            .filter_map(|(iteration, ns)| Some((*ns, *floors.get(iteration)?)))
            .collect();
        let ratios: Vec<f64> = pairs
            .iter()
            .map(|(ns, below)| *ns as f64 / *below as f64)
            .collect();
        let mut below: Vec<u64> = pairs.iter().map(|(_, below)| *below).collect();
        below.sort_unstable();
        (!pairs.is_empty()).then(|| Against {
            floor,
            floor_p50_ns: quantile(&below, 0.5),
            ratio: bootstrap(&ratios, seed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_figures_when_floors_drift_compare_iteration_by_iteration() {
        let mut samples = Samples::default();
        for step in 1..=40 {
            samples.next_iteration();
            samples.record(Operation::Lock, Duration::from_nanos(100 * step));
            if step > 20 {
                samples.record(Operation::Register, Duration::from_nanos(300 * step));
            }
        }
        let register = samples.figures(Operation::Register, 3000, 1).unwrap();
        assert_eq!(
            (register.samples, register.p50_ns, register.max_ns),
            (20, 9000, 12_000)
        );
        let [lock] = register.floors.as_slice() else {
            panic!("{register:?}: the no-op was not measured")
        };
        assert_eq!(
            (lock.floor, lock.floor_p50_ns, lock.ratio.median),
            (Operation::Lock, 3000, 3.0)
        );
        let rate = register.bytes_per_second.unwrap();
        assert!((rate - 3000.0 / 9e-6).abs() < 1.0, "{rate}");
        assert_eq!(samples.figures(Operation::CacheHit, 1, 1), None);
    }

    #[test]
    fn test_append_when_cells_are_joined_keeps_all_iterations() {
        let (mut all, mut one) = (Samples::default(), Samples::default());
        for ns in [5, 7] {
            one.next_iteration();
            one.record(Operation::Memcpy, Duration::from_nanos(ns));
        }
        all.append(&one);
        all.append(&one);
        assert_eq!(all.figures(Operation::Memcpy, 1, 1).unwrap().samples, 4);
    }

    #[test]
    fn test_floors_when_listed_are_floors_or_the_same_touch_again() {
        let all = [Operation::Register, Operation::RefaultRead, Operation::Invalidate];
        for operation in all {
            assert!(!operation.is_floor());
            for floor in operation.floors() {
                assert!(floor.is_floor() || matches!(floor, Operation::WarmWrite | Operation::WarmRead));
            }
        }
        assert!(Operation::Populate.is_floor() && Operation::NoopIoctl.is_floor());
    }
}
