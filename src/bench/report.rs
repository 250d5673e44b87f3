//! The benchmark's result as a table and as JSON.

use std::fmt::Write;

use protos::bridge::control::UffdMode;
use serde::Serialize;
use serde_json::{Value, json};

use super::cases::Case;
use super::placement::Placement;
use super::subject::Row;
use super::targets::{Status, judge};
use crate::cli::BenchArgs;
use crate::demo::total;
use crate::latency::human;

/// Everything measured.
#[derive(Debug)]
pub struct BenchResult {
    /// The rows of all modes.
    pub rows: Vec<Row>,
    /// Placements that this machine does not have.
    pub absent: Vec<Absent>,
    /// The daemons' statistics at the end, by mode.
    pub host: Vec<Value>,
    /// Length of the run.
    pub elapsed_ms: u64,
    /// Few blocks: nothing to quote.
    pub quick: bool,
    /// Of the bootstrap.
    pub seed: u64,
    /// Processors online.
    pub cpus: usize,
}

/// What each further MiB costs, and between which lengths that was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Slope {
    /// Registration mode.
    pub uffd_mode: UffdMode,
    /// Beyond munmap itself.
    pub slope_ns_per_mib: f64,
    /// The smallest range.
    pub from_bytes: u64,
    /// The largest one.
    pub to_bytes: u64,
}

/// A placement without rows.
#[derive(Debug, Clone, Serialize)]
pub struct Absent {
    /// Which.
    pub placement: Placement,
    /// Of the daemon.
    pub uffd_mode: UffdMode,
    /// Why.
    pub reason: String,
}

/// A row's name: what was measured, and where if that was fixed.
pub fn title(row: &Row) -> String {
    match row.placement {
        Placement::Free => row.case.label().to_owned(),
        placed => format!("{}, {}", row.case.label(), placed.label()),
    }
}

/// A length as a person reads it.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

fn mode_name(mode: UffdMode) -> &'static str {
    match mode {
        UffdMode::Wp => "wp",
        UffdMode::Missing => "missing",
    }
}

impl BenchResult {
    /// Nothing measured yet.
    pub fn new(args: &BenchArgs) -> Self {
        Self {
            rows: Vec::new(),
            absent: Vec::new(),
            host: Vec::new(),
            elapsed_ms: 0,
            quick: args.quick,
            seed: args.seed,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// What each further MiB of the range costs beyond munmap itself, by mode: between the smallest range and
    /// the largest one up to 64 MiB of the case without live translations. (Beyond that the agent may leave
    /// a range to the event path instead of unregistering it.)
    pub fn slopes(&self) -> Vec<Slope> {
        [UffdMode::Wp, UffdMode::Missing]
            .into_iter()
            .filter_map(|mode| {
                let rows: Vec<&Row> = self
                    .rows
                    .iter()
                    .filter(|r| r.uffd_mode == mode && r.case == Case::AgentSilent)
                    .filter(|r| r.size_bytes <= 64 << 20)
                    .collect();
                let small = rows.iter().min_by_key(|r| r.size_bytes)?;
                let large = rows.iter().max_by_key(|r| r.size_bytes)?;
                let mib = (large.size_bytes - small.size_bytes) as f64 / f64::from(1 << 20);
                let more = large.paired.difference_ns.median - small.paired.difference_ns.median;
                (mib > 0.0).then_some(Slope {
                    uffd_mode: mode,
                    slope_ns_per_mib: more / mib,
                    from_bytes: small.size_bytes,
                    to_bytes: large.size_bytes,
                })
            })
            .collect()
    }

    /// The daemons' own figures of the part that must not sleep, by mode and event.
    fn nonsleeping(&self) -> Vec<Value> {
        let mut parts = Vec::new();
        for host in &self.host {
            let mode = &host["daemon"]["uffd_mode"];
            for session in host["sessions"].as_array().into_iter().flatten() {
                let events = session["invalidations"]["nonsleeping"].as_object();
                for (event, figures) in events.into_iter().flatten() {
                    let mut part = figures.clone();
                    part["uffd_mode"] = mode.clone();
                    part["event"] = event.as_str().into();
                    parts.push(part);
                }
            }
        }
        parts
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        let hosts = Value::Array(self.host.clone());
        json!({
            "benchmark": "invalidate",
            "online_cpus": self.cpus,
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "rows": self.rows,
            "absent": self.absent,
            "slopes": self.slopes(),
            "targets": judge(self),
            "nonsleeping_voluntary_context_switches": total(&hosts, "voluntary_context_switches"),
            "nonsleeping_allocations": total(&hosts, "allocations"),
            "nonsleeping": self.nonsleeping(),
            "yields": total(&hosts, "yields"),
        })
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| writeln!(text, "{s}").expect("writing to a string cannot fail");
        line(format!(
            "munmap of a populated shared range; floor: plain munmap; {} CPUs online{}",
            self.cpus,
            if self.quick {
                "; quick: too few blocks to quote"
            } else {
                ""
            }
        ));
        line(format!(
            "{:<9}{:<42}{:>8}{:>12}{:>12}{:>12}   {:<22}{:>9}",
            "uffd", "case", "size", "floor p50", "p50", "p99", "ratio [95%]", "switches"
        ));
        for row in &self.rows {
            let p = &row.paired;
            line(format!(
                "{:<9}{:<42}{:>8}{:>12}{:>12}{:>12}   {:<22}{:>9.2}",
                mode_name(row.uffd_mode),
                title(row),
                size(row.size_bytes),
                human(p.floor_p50_ns),
                human(p.p50_ns),
                human(p.p99_ns),
                format!("{:.2} [{:.2}, {:.2}]", p.ratio.median, p.ratio.low, p.ratio.high),
                row.voluntary_context_switches_per_call
            ));
        }
        for row in &self.rows {
            if let Some(w) = row.wakes {
                line(format!(
                    "floor ({}) of {}, {}: socket echo {} + one wake {} (p99 {}, max {}); more than plain munmap: {:.2} [{:.2}, {:.2}] of that; max {}",
                    mode_name(row.uffd_mode),
                    title(row),
                    size(row.size_bytes),
                    human(w.socket_echo_p50_ns),
                    human(w.wake_p50_ns),
                    human(w.floor_p99_ns),
                    human(w.floor_max_ns),
                    w.ratio.median,
                    w.ratio.low,
                    w.ratio.high,
                    human(row.paired.max_ns)
                ));
            }
        }
        for absent in &self.absent {
            line(format!(
                "not measured ({}): {}: {}",
                mode_name(absent.uffd_mode),
                absent.placement.label(),
                absent.reason
            ));
        }
        let hosts = Value::Array(self.host.clone());
        line(format!(
            "non-sleeping part, all calls that reached the daemon: {} voluntary context switches, {} allocations, {} yields",
            total(&hosts, "voluntary_context_switches"),
            total(&hosts, "allocations"),
            total(&hosts, "yields")
        ));
        for part in self.nonsleeping() {
            line(format!(
                "  {}, {}: {} calls, p50 {}, p99 {}, max {}",
                part["uffd_mode"].as_str().unwrap_or("?"),
                part["event"].as_str().unwrap_or("?"),
                part["count"],
                human(part["p50_ns"].as_u64().unwrap_or(0)),
                human(part["p99_ns"].as_u64().unwrap_or(0)),
                human(part["max_ns"].as_u64().unwrap_or(0))
            ));
        }
        for slope in self.slopes() {
            line(format!(
                "registration mode {}: {:.0} ns for each MiB more of the range, {} to {} (nothing cached)",
                mode_name(slope.uffd_mode),
                slope.slope_ns_per_mib,
                size(slope.from_bytes),
                size(slope.to_bytes)
            ));
        }
        for target in judge(self) {
            let status = match target.status {
                Status::Met => "met",
                Status::NotMet => "not met",
                Status::NotApplicable => "not applicable",
            };
            let mode = mode_name(target.uffd_mode);
            line(format!(
                "target ({mode}): {}: {status}: {}",
                target.target, target.reason
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::statistics::{Block, paired};
    use super::*;

    fn result() -> BenchResult {
        let row = |size_bytes, extra: u64| Row {
            uffd_mode: UffdMode::Missing,
            case: Case::AgentSilent,
            size_bytes,
            paired: paired(
                &[Block {
                    floor: [1000; 2],
                    subject: [1000 + extra; 2],
                }; 30],
                1,
            ),
            placement: Placement::Free,
            wakes: None,
            voluntary_context_switches_per_call: 0.0,
        };
        BenchResult {
            rows: vec![row(4096, 100), row(64 << 20, 740)],
            absent: Vec::new(),
            host: vec![json!({"sessions": [{"yields": 3}]})],
            elapsed_ms: 5,
            quick: true,
            seed: 1,
            cpus: 2,
        }
    }

    #[test]
    fn test_bench_json_when_printed_has_rows_slopes_and_targets() {
        let json = result().json();
        assert_eq!(json["rows"].as_array().unwrap().len(), 2);
        for key in [
            "uffd_mode",
            "case",
            "size_bytes",
            "p50_ns",
            "p99_ns",
            "floor_p50_ns",
            "ratio",
        ] {
            assert!(!json["rows"][0][key].is_null(), "{key}");
        }
        let slope = json["slopes"][0]["slope_ns_per_mib"].as_f64().unwrap();
        assert!((slope - 10.0).abs() < 0.1, "{slope}");
        assert!(
            json["targets"]
                .as_array()
                .unwrap()
                .iter()
                .any(|t| t["status"] == "not_applicable")
        );
        assert_eq!(
            (json["online_cpus"].as_u64(), json["yields"].as_u64()),
            (Some(2), Some(3))
        );
    }

    #[test]
    fn test_bench_table_when_quick_says_so() {
        let table = result().table();
        assert!(table.contains("2 CPUs online; quick"), "{table}");
        assert!(table.contains("agent, nothing cached"), "{table}");
        assert!(
            table.contains("64 MiB") && table.contains("not applicable"),
            "{table}"
        );
    }
}
