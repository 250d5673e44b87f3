//! The result as a table and as JSON, with the targets.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::Mode;
use crate::bench::statistics::Paired;
use crate::latency::{LatencySummary, human};

/// A busy VLOAD hit of the adaptive poller, over that of an engine that always spins.
const MOST_BUSY: f64 = 3.0;
/// Of a CPU, while nothing happens.
const MOST_IDLE_PERCENT: f64 = 1.0;

/// One line.
#[derive(Debug, Clone, Serialize)]
pub struct ModeRow {
    /// How stores are noticed.
    pub mode: Mode,
    /// Reading a control block's status.
    pub cb_read_p50_ns: u64,
    /// Storing eight bytes in the data segment.
    pub ds_write_p50_ns: u64,
    /// Storing four bytes in a register that is trapped in every mode: posted in trap mode, answered in the others, as
    /// QEMU does it.
    pub register_write_p50_ns: u64,
    /// VLOAD of a word, from the first operand to the look that sees its end; one after the other.
    pub vload_hit: LatencySummary,
    /// The same, two milliseconds after the last one.
    pub vload_hit_after_idle_p50_ns: u64,
    /// TLBINV of a page, from the claim of a handle to its end.
    pub flush_p50_ns: u64,
    /// Of one CPU.
    pub idle_cpu_percent: f64,
}

/// Everything measured.
#[derive(Debug)]
pub struct DoorbellResult {
    rows: Vec<ModeRow>,
    /// VLOAD hits: the poller over the one that always spins.
    pub busy: Option<Paired>,
    /// Why caller and device may have shared a CPU.
    pub shared_processor: Option<String>,
    /// Length of the run.
    pub elapsed_ms: u64,
    quick: bool,
    seed: u64,
}

impl DoorbellResult {
    /// Nothing yet.
    pub fn new(quick: bool, seed: u64) -> Self {
        Self {
            rows: Vec::new(),
            busy: None,
            shared_processor: None,
            elapsed_ms: 0,
            quick,
            seed,
        }
    }

    /// Adds a line and shows it as progress.
    pub fn push(&mut self, row: ModeRow) {
        let (vload, idle) = (human(row.vload_hit.p50_ns), row.idle_cpu_percent);
        eprintln!("{:?}: VLOAD hit {vload}, idle {idle:.2}% of a CPU", row.mode);
        self.rows.push(row);
    }

    /// Of a register that is trapped in every mode: (posted, answered).
    fn register_writes(&self) -> Option<(u64, u64)> {
        let of = |mode| {
            let row = self.rows.iter().find(|row| row.mode == mode)?;
            Some(row.register_write_p50_ns)
        };
        Some((of(Mode::Trap)?, of(Mode::Poll)?))
    }

    /// (what, wanted, found, met).
    fn targets(&self) -> Vec<(String, String, String, bool)> {
        let mut targets = Vec::new();
        if let Some(busy) = &self.busy {
            let ratio = busy.ratio;
            targets.push((
                "poll: busy VLOAD hit".to_owned(),
                format!("at most {MOST_BUSY} of an engine that always spins"),
                format!(
                    "{:.2} [{:.2}, {:.2}], {} against {}",
                    ratio.median,
                    ratio.low,
                    ratio.high,
                    human(busy.p50_ns),
                    human(busy.floor_p50_ns)
                ),
                ratio.low <= MOST_BUSY,
            ));
        }
        for row in self.rows.iter().filter(|row| row.mode != Mode::Spin) {
            targets.push((
                format!("{}: idle device", name(row.mode)),
                format!("less than {MOST_IDLE_PERCENT}% of a CPU"),
                format!("{:.3}%", row.idle_cpu_percent),
                row.idle_cpu_percent < MOST_IDLE_PERCENT,
            ));
        }
        targets
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        let targets: Vec<Value> = self
            .targets()
            .into_iter()
            .map(|(case, target, found, met)| {
                let status = if met { "met" } else { "not_met" };
                json!({ "case": case, "target": target, "found": found, "status": status })
            })
            .collect();
        json!({
            "benchmark": "doorbell",
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "rows": self.rows,
            "shared_processor": self.shared_processor,
            "poll_over_spin": self.busy,
            "losing_posted_writes": self.register_writes().map(|(posted, answered)| json!({
                "posted_p50_ns": posted,
                "answered_p50_ns": answered,
                "ratio": answered as f64 / posted.max(1) as f64,
            })),
            "targets": targets,
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
            "GRU over vfio-user, no guest, fault handles mapped; medians{quick}"
        ));
        line(format!(
            "{:<8}{:>11}{:>11}{:>15}{:>12}{:>12}{:>14}{:>12}{:>12}",
            "mode",
            "CB read",
            "DS write",
            "register write",
            "VLOAD hit",
            "its p99",
            "after idle",
            "flush",
            "idle CPU"
        ));
        for row in &self.rows {
            line(format!(
                "{:<8}{:>11}{:>11}{:>15}{:>12}{:>12}{:>14}{:>12}{:>11.3}%",
                name(row.mode),
                human(row.cb_read_p50_ns),
                human(row.ds_write_p50_ns),
                human(row.register_write_p50_ns),
                human(row.vload_hit.p50_ns),
                human(row.vload_hit.p99_ns),
                human(row.vload_hit_after_idle_p50_ns),
                human(row.flush_p50_ns),
                row.idle_cpu_percent,
            ));
        }
        if let Some((posted, answered)) = self.register_writes() {
            line(format!(
                "losing posted writes: as soon as anything can be mapped QEMU waits for each register write: {} instead of \
                 {} ({:.1} times)",
                human(answered),
                human(posted),
                answered as f64 / posted.max(1) as f64
            ));
        }
        if let Some(why) = &self.shared_processor {
            line(format!("caller and device may share a processor: {why}"));
        }
        for (case, target, found, met) in self.targets() {
            let met = if met { "met" } else { "not met" };
            line(format!("target: {case}: {target}: {met}: {found}"));
        }
        text
    }
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Trap => "trap",
        Mode::Bell => "bell",
        Mode::Poll => "poll",
        Mode::Spin => "spin",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::statistics::{Block, paired};

    fn row(mode: Mode, idle_cpu_percent: f64) -> ModeRow {
        ModeRow {
            mode,
            cb_read_p50_ns: 1,
            ds_write_p50_ns: 1,
            register_write_p50_ns: 1000,
            vload_hit: LatencySummary::default(),
            vload_hit_after_idle_p50_ns: 1,
            flush_p50_ns: 1,
            idle_cpu_percent,
        }
    }

    #[test]
    fn test_targets_when_a_figure_is_too_large_are_not_met() {
        for (subject, idle, expected) in [
            (250, 0.5, ["met", "met", "met"]),
            (350, 1.5, ["not_met", "met", "not_met"]),
        ] {
            let mut result = DoorbellResult::new(false, 1);
            result.push(ModeRow {
                register_write_p50_ns: 100,
                ..row(Mode::Trap, 0.0)
            });
            result.push(row(Mode::Poll, idle));
            result.push(row(Mode::Spin, 100.0));
            let block = Block {
                floor: [100, 100],
                subject: [subject, subject],
            };
            result.busy = Some(paired(&[block], 1));
            let json = result.json();
            let status: Vec<&str> = json["targets"]
                .as_array()
                .unwrap()
                .iter()
                .map(|target| target["status"].as_str().unwrap())
                .collect();
            assert_eq!(status, expected, "{json}");
            assert_eq!(json["losing_posted_writes"]["ratio"], 10.0, "{json}");
            assert!(result.table().contains("(10.0 times)"), "{}", result.table());
        }
    }
}
