//! The result as a table and as JSON, with the targets.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::owner::Kind;
use crate::bench::statistics::Paired;

/// WRITEs of 64 KiB on one thread, as a part of memcpy's bandwidth.
const LEAST_BANDWIDTH: f64 = 0.8;
/// Time for a message with 1,000 queue pairs over that with one.
const MOST_GROWTH: f64 = 1.3;

/// Bandwidth.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Operation.
    pub kind: Kind,
    /// Bytes of a message.
    pub message_bytes: u32,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Threads: 1 is both ends.
    pub workers: u32,
    /// Of the messages.
    pub bytes_per_second: f64,
    /// Of the floor.
    pub memcpy_bytes_per_second: f64,
    /// On the measuring thread.
    pub allocations_per_message: f64,
    /// Time over that of the floor.
    pub paired: Paired,
}

/// Message rate.
#[derive(Debug, Clone, Serialize)]
pub struct RateRow {
    /// Operation.
    pub kind: Kind,
    /// Bytes of a message.
    pub message_bytes: u32,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Both ends' work.
    pub ns_per_message: f64,
    /// The same, as a rate.
    pub messages_per_second: f64,
    /// On the measuring thread.
    pub allocations_per_message: f64,
    /// Time over that of one queue pair.
    pub paired: Paired,
}

/// Everything measured.
#[derive(Debug)]
pub struct RdmaResult {
    rows: Vec<Row>,
    rates: Vec<RateRow>,
    absent: Vec<&'static str>,
    /// Length of the run.
    pub elapsed_ms: u64,
    quick: bool,
    seed: u64,
    cache_bytes: usize,
    working_set_bytes: usize,
}

impl RdmaResult {
    /// Nothing yet.
    pub fn new(quick: bool, seed: u64, cache_bytes: usize, working_set_bytes: usize) -> Self {
        Self {
            rows: Vec::new(),
            rates: Vec::new(),
            absent: Vec::new(),
            elapsed_ms: 0,
            quick,
            seed,
            cache_bytes,
            working_set_bytes,
        }
    }

    /// A row is there.
    pub fn push(&mut self, row: Row) {
        eprintln!(
            "{:?} {} KiB, {} thread(s): {:.2} of memcpy",
            row.kind,
            row.message_bytes >> 10,
            row.workers,
            1.0 / row.paired.ratio.median
        );
        self.rows.push(row);
    }

    /// A row is there.
    pub fn push_rate(&mut self, row: RateRow) {
        eprintln!(
            "{:?} {} bytes, {} queue pairs: {:.0} ns",
            row.kind, row.message_bytes, row.queue_pairs, row.ns_per_message
        );
        self.rates.push(row);
    }

    /// Something could not be measured.
    pub fn absent(&mut self, reason: &'static str) {
        self.absent.push(reason);
    }

    /// The parts of memcpy's bandwidth that WRITE reaches (the bound that decides), and the growth.
    fn targets(&self) -> Vec<(&'static str, f64, bool)> {
        let write = self
            .rows
            .iter()
            .find(|row| row.kind == Kind::Write && row.workers == 1)
            .map(|row| {
                // The ratio is of times: its lower bound is the upper one of the bandwidth's.
                let best = 1.0 / row.paired.ratio.low;
                ("64 KiB WRITE >= 0.8 of memcpy", best, best >= LEAST_BANDWIDTH)
            });
        let growth = self
            .rates
            .iter()
            .filter(|row| row.queue_pairs == 1000)
            .map(|row| row.paired.ratio.low)
            .max_by(f64::total_cmp)
            .map(|low| {
                (
                    "1,000 queue pairs <= 1.3 times one queue pair",
                    low,
                    low <= MOST_GROWTH,
                )
            });
        write.into_iter().chain(growth).collect()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "working set {} MiB, last-level cache {} MiB\n\n{:<8}{:>9}{:>9}{:>12}{:>12}{:>22}{:>8}\n",
            self.working_set_bytes >> 20,
            self.cache_bytes >> 20,
            "",
            "bytes",
            "threads",
            "MiB/s",
            "memcpy",
            "part of memcpy",
            "allocs"
        );
        for row in &self.rows {
            let ratio = row.paired.ratio;
            let _ = writeln!(
                text,
                "{:<8}{:>9}{:>9}{:>12.0}{:>12.0}{:>22}{:>8.3}",
                format!("{:?}", row.kind),
                row.message_bytes,
                row.workers,
                row.bytes_per_second / 1048576.0,
                row.memcpy_bytes_per_second / 1048576.0,
                format!(
                    "{:.2} ({:.2}-{:.2})",
                    1.0 / ratio.median,
                    1.0 / ratio.high,
                    1.0 / ratio.low
                ),
                row.allocations_per_message
            );
        }
        let _ = writeln!(
            text,
            "\n{:<8}{:>9}{:>9}{:>12}{:>12}{:>22}{:>8}",
            "", "bytes", "QPs", "ns/message", "messages/s", "over one QP", "allocs"
        );
        for row in &self.rates {
            let ratio = row.paired.ratio;
            let _ = writeln!(
                text,
                "{:<8}{:>9}{:>9}{:>12.0}{:>12.0}{:>22}{:>8.3}",
                format!("{:?}", row.kind),
                row.message_bytes,
                row.queue_pairs,
                row.ns_per_message,
                row.messages_per_second,
                format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.low, ratio.high),
                row.allocations_per_message
            );
        }
        text.push('\n');
        for (what, value, met) in self.targets() {
            let _ = writeln!(
                text,
                "{}: {what} ({value:.2})",
                if met { "met" } else { "NOT MET" }
            );
        }
        for reason in &self.absent {
            let _ = writeln!(text, "not measured: {reason}");
        }
        if self.quick {
            text.push_str("few blocks: to see that it works, not to publish\n");
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let targets: Vec<Value> = self
            .targets()
            .into_iter()
            .map(|(target, value, met)| json!({ "target": target, "value": value, "met": met }))
            .collect();
        json!({
            "benchmark": "rdma",
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "cache_bytes": self.cache_bytes,
            "working_set_bytes": self.working_set_bytes,
            "bandwidth": self.rows,
            "rate": self.rates,
            "targets": targets,
            "absent": self.absent,
        })
    }
}
