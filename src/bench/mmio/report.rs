//! The result as a table and as JSON, with the targets.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::bench::statistics::Interval;
use crate::latency::human;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Case {
    /// REGION_READ of 4 bytes.
    Read,
    /// REGION_WRITE of 4 bytes with an answer.
    Write,
    /// [`Case::Read`] against an echo that cannot take file descriptors.
    ReadBytesOnly,
    /// [`Case::Write`] against such an echo.
    WriteBytesOnly,
    /// REGION_WRITE of 4 bytes without an answer.
    Posted,
    /// REGION_READ, both ends polling, each on its processor.
    ReadPolling,
    /// REGION_READ by this project's client.
    ReadByClient,
}

impl Case {
    fn label(self) -> &'static str {
        match self {
            Self::Read => "read, 4 bytes",
            Self::Write => "answered write, 4 bytes",
            Self::ReadBytesOnly => "read, against plain recv",
            Self::WriteBytesOnly => "write, against plain recv",
            Self::Posted => "posted write, 4 bytes",
            Self::ReadPolling => "read, both ends polling",
            Self::ReadByClient => "read, by tlbridge's client",
        }
    }

    /// What is wanted of this project's server.
    fn limit(self) -> Option<Limit> {
        match self {
            Self::Read | Self::Write => Some(Limit::AtMost(1.05)),
            Self::Posted => Some(Limit::AtLeast(0.8)),
            Self::ReadPolling => Some(Limit::AtMost(1.3)),
            // A server that receives like that would lose the descriptors of DMA_MAP and SET_IRQS.
            Self::ReadBytesOnly | Self::WriteBytesOnly | Self::ReadByClient => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    /// Whether the interval's better bound meets it.
    fn met(self, ratio: Interval) -> bool {
        match self {
            Self::AtMost(limit) => ratio.low <= limit,
            Self::AtLeast(limit) => ratio.high >= limit,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("at most {limit} of the floor's time"),
            Self::AtLeast(limit) => format!("at least {limit} of the floor's rate"),
        }
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What is done.
    pub case: Case,
    /// Whose server.
    pub subject: &'static str,
    /// ABBA blocks.
    pub blocks: usize,
    /// The floor's median, of a round trip or (posted) a message of a median burst.
    pub floor_p50_ns: u64,
    /// Its 99th percentile.
    pub floor_p99_ns: u64,
    /// The server's median.
    pub p50_ns: u64,
    /// Its 99th percentile.
    pub p99_ns: u64,
    /// Posted: the floor's rate.
    pub floor_messages_per_second: Option<f64>,
    /// Posted: the server's rate.
    pub messages_per_second: Option<f64>,
    /// Of times, paired; posted: of rates.
    pub ratio: Interval,
}

/// Something that cannot be measured here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Absent {
    /// What.
    pub subject: &'static str,
    /// Why.
    pub reason: String,
}

/// Everything measured.
#[derive(Debug)]
pub struct MmioResult {
    rows: Vec<Row>,
    /// What is missing.
    pub absent: Vec<Absent>,
    /// Length of the run.
    pub elapsed_ms: u64,
    quick: bool,
    seed: u64,
}

struct Judged<'a> {
    row: &'a Row,
    limit: Limit,
    met: bool,
}

impl MmioResult {
    /// Nothing yet.
    pub fn new(quick: bool, seed: u64) -> Self {
        Self {
            rows: Vec::new(),
            absent: Vec::new(),
            elapsed_ms: 0,
            quick,
            seed,
        }
    }

    /// Adds a line and shows it as progress.
    pub fn push(&mut self, row: Row) {
        let (label, ratio) = (row.case.label(), row.ratio);
        eprintln!(
            "{:<14}{label:<28}{:.2} [{:.2}, {:.2}]",
            row.subject, ratio.median, ratio.low, ratio.high
        );
        self.rows.push(row);
    }

    fn judged(&self) -> impl Iterator<Item = Judged<'_>> {
        self.rows.iter().filter_map(|row| {
            let limit = row.case.limit().filter(|_| row.subject == "tlbridge")?;
            let met = limit.met(row.ratio);
            Some(Judged { row, limit, met })
        })
    }

    /// What a write costs the one who writes: (posted, answered).
    fn writes(&self) -> Option<(u64, u64)> {
        let time = |case| {
            let mut rows = self.rows.iter().filter(|row| row.subject == "tlbridge");
            rows.find(|row| row.case == case).map(|row| row.p50_ns)
        };
        Some((time(Case::Posted)?, time(Case::Write)?))
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        let targets: Vec<Value> = self
            .judged()
            .map(|judged| {
                json!({
                    "case": judged.row.case,
                    "target": judged.limit.text(),
                    "status": if judged.met { "met" } else { "not_met" },
                    "ratio": judged.row.ratio,
                })
            })
            .collect();
        json!({
            "benchmark": "mmio",
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "rows": self.rows,
            "targets": targets,
            "losing_posted_writes": self.writes().map(|(posted, answered)| json!({
                "posted_p50_ns": posted,
                "answered_p50_ns": answered,
                "ratio": answered as f64 / posted.max(1) as f64,
            })),
            "absent": self.absent,
        })
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| writeln!(text, "{s}").expect("writing to a string cannot fail");
        let quick = if self.quick {
            "; quick: too few blocks to quote"
        } else {
            ""
        };
        line(format!(
            "4-byte accesses over vfio-user; floor: a raw socket with the same message sizes, same processor{quick}"
        ));
        line(
            "(round trips: an echo that receives with room for file descriptors, as whoever serves vfio-user must: the kernel \
             throws away what recv has no room for; polling, posted, \"against plain recv\" and the row \"recvmsg echo\": \
             against one that has none)"
                .into(),
        );
        line(format!(
            "{:<14}{:<28}{:>11}{:>11}{:>11}{:>11}   {:<20}",
            "server", "case", "floor p50", "floor p99", "p50", "p99", "ratio [95%]"
        ));
        for row in &self.rows {
            let ratio = row.ratio;
            let rate = match (row.messages_per_second, row.floor_messages_per_second) {
                (Some(rate), Some(floor)) => format!("  {rate:.0}/s of {floor:.0}/s"),
                _ => String::new(),
            };
            line(format!(
                "{:<14}{:<28}{:>11}{:>11}{:>11}{:>11}   {:.2} [{:.2}, {:.2}]{rate}",
                row.subject,
                row.case.label(),
                human(row.floor_p50_ns),
                human(row.floor_p99_ns),
                human(row.p50_ns),
                human(row.p99_ns),
                ratio.median,
                ratio.low,
                ratio.high,
            ));
        }
        if let Some((posted, answered)) = self.writes() {
            line(format!(
                "QEMU does not post writes to a device with a mappable region: {} instead of {} for a trapped write \
                 ({:.1} times), without the guest's own exit",
                human(answered),
                human(posted),
                answered as f64 / posted.max(1) as f64
            ));
        }
        for absent in &self.absent {
            line(format!("{}: not measured: {}", absent.subject, absent.reason));
        }
        for judged in self.judged() {
            let ratio = judged.row.ratio;
            line(format!(
                "target: {}: {}: {}: {:.3} [{:.3}, {:.3}]",
                judged.row.case.label(),
                judged.limit.text(),
                if judged.met { "met" } else { "not met" },
                ratio.median,
                ratio.low,
                ratio.high
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(case: Case, subject: &'static str, median: f64) -> Row {
        Row {
            case,
            subject,
            blocks: 60,
            floor_p50_ns: 10_000,
            floor_p99_ns: 15_000,
            p50_ns: 11_000,
            p99_ns: 16_000,
            floor_messages_per_second: None,
            messages_per_second: None,
            ratio: Interval {
                median,
                low: median - 0.02,
                high: median + 0.02,
            },
        }
    }

    #[test]
    fn test_targets_when_the_better_bound_is_inside_are_met() {
        let mut result = MmioResult::new(false, 1);
        result.push(row(Case::Read, "tlbridge", 1.06));
        result.push(row(Case::Write, "tlbridge", 1.08));
        result.push(row(Case::Posted, "tlbridge", 0.79));
        result.push(row(Case::ReadByClient, "tlbridge", 9.0));
        result.push(row(Case::Read, "libvfio-user", 9.0));
        let json = result.json();
        let status: Vec<&str> = json["targets"]
            .as_array()
            .unwrap()
            .iter()
            .map(|target| target["status"].as_str().unwrap())
            .collect();
        assert_eq!(status, ["met", "not_met", "met"]);
        assert_eq!(json["losing_posted_writes"]["ratio"], 1.0);
        assert!(result.table().contains("not met"));
    }
}
