//! The result as a table and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::Mode;
use super::device::Facts;
use super::limits::Limits;
use super::options::RegisterArgs;
use super::samples::{Figures, Operation, Samples};
use crate::bench::report::size;
use crate::latency::human;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// A mode; `None`: a floor, "floor" in JSON.
    #[serde(serialize_with = "mode_or_floor")]
    pub mode: Option<Mode>,
    /// What was timed.
    pub operation: Operation,
    /// Of how much memory.
    pub size_bytes: u64,
    /// Its times.
    #[serde(flatten)]
    pub figures: Figures,
}

impl Row {
    fn label(&self) -> &'static str {
        self.mode.map_or("floor", Mode::label)
    }
}

fn mode_or_floor<S: serde::Serializer>(mode: &Option<Mode>, serializer: S) -> Result<S::Ok, S::Error> {
    match mode {
        Some(mode) => mode.serialize(serializer),
        None => serializer.serialize_str("floor"),
    }
}

/// Something that was not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// `None`: all modes.
    pub mode: Option<Mode>,
    /// `None`: all sizes.
    pub size_bytes: Option<u64>,
    /// This, and what comes after it. `None`: everything.
    pub operation: Option<Operation>,
    /// Why.
    pub reason: String,
}

impl Skipped {
    /// There is no HCA.
    pub fn everything(reason: String) -> Self {
        Self {
            mode: None,
            size_bytes: None,
            operation: None,
            reason,
        }
    }

    /// A mode in all sizes.
    pub fn mode(mode: Mode, reason: String) -> Self {
        Self {
            mode: Some(mode),
            ..Self::everything(reason)
        }
    }

    /// A size in all modes.
    pub fn size(bytes: u64, reason: String) -> Self {
        Self {
            size_bytes: Some(bytes),
            ..Self::everything(reason)
        }
    }

    /// A mode and a size, from an operation on.
    pub fn cell(mode: Mode, bytes: u64, operation: Option<Operation>, reason: String) -> Self {
        Self {
            mode: Some(mode),
            size_bytes: Some(bytes),
            operation,
            reason,
        }
    }

    /// As a line of text.
    pub fn line(&self) -> String {
        let parts = [
            self.mode.map(|m| m.label().to_owned()),
            self.size_bytes.map(size),
            self.operation.map(|o| o.label().to_owned()),
        ];
        let what: Vec<String> = parts.into_iter().flatten().collect();
        let what = match what.as_slice() {
            [] => "all modes".to_owned(),
            parts => parts.join(", "),
        };
        format!("{what}: {}", self.reason)
    }
}

/// Everything measured.
#[derive(Debug)]
pub struct RegisterResult {
    /// The HCA.
    pub device: Option<Facts>,
    /// What there are figures of.
    pub rows: Vec<Row>,
    /// What there are none of.
    pub skipped: Vec<Skipped>,
    /// Bytes that were compared with what they should be.
    pub verified_bytes: u64,
    /// Transfers that moved wrong data.
    pub wrong_data: Vec<String>,
    /// Length of the run.
    pub elapsed_ms: u64,
    limits: Limits,
    pages: &'static str,
    quick: bool,
    seed: u64,
    cpus: usize,
    kernel: String,
    huge_pages: Option<String>,
}

impl RegisterResult {
    /// Nothing measured yet.
    pub fn new(args: &RegisterArgs, limits: Limits) -> Self {
        Self {
            device: None,
            rows: Vec::new(),
            skipped: Vec::new(),
            verified_bytes: 0,
            wrong_data: Vec::new(),
            elapsed_ms: 0,
            limits,
            pages: args.pages.name(),
            quick: args.quick,
            seed: args.seed,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            huge_pages: std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                .ok()
                .and_then(|text| chosen(&text)),
        }
    }

    /// Notes something that is not measured, and says so.
    pub fn skip(&mut self, skipped: Skipped) {
        eprintln!("skipped: {}", skipped.line());
        self.skipped.push(skipped);
    }

    /// The rows of a mode and a size.
    pub fn add(&mut self, mode: Mode, bytes: u64, samples: &Samples) {
        let before = self.rows.len();
        self.push(Some(mode), bytes, samples);
        let count = self.rows.len() - before;
        eprintln!("{:>10}  {:>8}  {count} rows", mode.label(), size(bytes));
    }

    /// The floors of a size.
    pub fn add_floors(&mut self, bytes: u64, samples: &Samples) {
        self.push(None, bytes, samples);
    }

    fn push(&mut self, mode: Option<Mode>, size_bytes: u64, samples: &Samples) {
        for operation in samples.operations().filter(|o| o.is_floor() == mode.is_none()) {
            if let Some(figures) = samples.figures(operation, size_bytes, self.seed) {
                self.rows.push(Row {
                    mode,
                    operation,
                    size_bytes,
                    figures,
                });
            }
        }
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        json!({
            "benchmark": "register",
            "interface": "verbs",
            "kernel": self.kernel,
            "online_cpus": self.cpus,
            "pages": self.pages,
            "transparent_hugepage": self.huge_pages,
            "limits": self.limits,
            "device": self.device,
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "rows": self.rows,
            "skipped": self.skipped,
            "verified_bytes": self.verified_bytes,
            "wrong_data": self.wrong_data,
        })
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| writeln!(text, "{s}").expect("writing to a string cannot fail");
        let device = match &self.device {
            None => "no HCA".to_owned(),
            Some(d) => format!(
                "{} ({:04x}:{}, port {}, {}, MTU {}{})",
                d.name,
                d.vendor_id,
                d.vendor_part_id,
                d.port,
                d.link_layer,
                d.mtu_bytes,
                d.gid_index.map(|i| format!(", GID {i}")).unwrap_or_default()
            ),
        };
        line(format!(
            "registration by libibverbs: {device}; Linux {}, {} CPUs online, pages: {}{}",
            self.kernel,
            self.cpus,
            self.pages,
            if self.quick {
                "; quick: too few samples to quote"
            } else {
                ""
            }
        ));
        line(format!(
            "{:<11}{:<23}{:>9}{:>6}{:>11}{:>11}{:>11}{:>12}   {}",
            "mode", "operation", "size", "n", "p50", "p99", "max", "bytes/s", "times its floors [95%]"
        ));
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| (row.mode, row.operation, row.size_bytes));
        for row in rows {
            let f = &row.figures;
            let floors: Vec<String> = f
                .floors
                .iter()
                .map(|against| {
                    let r = against.ratio;
                    format!(
                        "{:.2} [{:.2}, {:.2}] {}",
                        r.median,
                        r.low,
                        r.high,
                        against.floor.label()
                    )
                })
                .collect();
            line(
                format!(
                    "{:<11}{:<23}{:>9}{:>6}{:>11}{:>11}{:>11}{:>12}   {}",
                    row.label(),
                    row.operation.label(),
                    size(row.size_bytes),
                    f.samples,
                    human(f.p50_ns),
                    human(f.p99_ns),
                    human(f.max_ns),
                    f.bytes_per_second.map(rate).unwrap_or_default(),
                    floors.join("; ")
                )
                .trim_end()
                .to_owned(),
            );
        }
        for skipped in &self.skipped {
            line(format!("skipped: {}", skipped.line()));
        }
        if self.device.is_some() {
            line(format!(
                "data verified: {} MiB, wrong transfers: {}",
                self.verified_bytes >> 20,
                self.wrong_data.len()
            ));
        }
        for wrong in &self.wrong_data {
            line(format!("WRONG DATA: {wrong}"));
        }
        text
    }
}

/// A rate as a person reads it.
fn rate(bytes_per_second: f64) -> String {
    match bytes_per_second {
        r if r < 1e6 => format!("{:.1} KB/s", r / 1e3),
        r if r < 1e9 => format!("{:.1} MB/s", r / 1e6),
        r => format!("{:.1} GB/s", r / 1e9),
    }
}

/// The word in brackets of a file in /sys.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::time::Duration;

    fn result() -> RegisterResult {
        let cli = crate::cli::Cli::parse_from(["tlbridge", "bench", "register", "--verbs", "--quick"]);
        let Some(crate::cli::Command::Bench(crate::cli::BenchCommand::Register(args))) = cli.command else {
            panic!("{cli:?}")
        };
        let limits = Limits {
            memory_available_bytes: None,
            memlock_limit_bytes: None,
        };
        let mut result = RegisterResult::new(&args, limits);
        let mut samples = Samples::default();
        for _ in 0..5 {
            samples.next_iteration();
            samples.record(Operation::Register, Duration::from_micros(30));
            samples.record(Operation::Lock, Duration::from_micros(10));
        }
        result.add(Mode::OnDemand, 1 << 20, &samples);
        result.add_floors(1 << 20, &samples);
        result
            .skipped
            .push(Skipped::mode(Mode::OnDemand, "none here".into()));
        result
    }

    #[test]
    fn test_register_json_when_printed_has_rows_floors_and_reasons() {
        let json = result().json();
        let rows = json["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (&rows[0]["mode"], &rows[1]["mode"]),
            (&json!("on_demand"), &json!("floor"))
        );
        assert_eq!(rows[0]["operation"], "register");
        for key in [
            "size_bytes",
            "samples",
            "p50_ns",
            "p99_ns",
            "max_ns",
            "bytes_per_second",
        ] {
            assert!(rows[0][key].is_number(), "{key}: {}", rows[0]);
        }
        assert_eq!(rows[0]["floors"][0]["floor"], "lock");
        assert_eq!(rows[0]["floors"][0]["ratio"]["median"], 3.0);
        // The same name wherever a mode is named.
        assert_eq!(json["skipped"][0]["mode"], rows[0]["mode"]);
        assert!(json["device"].is_null() && json["verified_bytes"].is_number());
    }

    #[test]
    fn test_register_table_when_printed_shows_ratios_and_what_is_missing() {
        let table = result().table();
        assert!(table.contains("no HCA") && table.contains("quick"), "{table}");
        assert!(table.contains("3.00 [3.00, 3.00] mlock"), "{table}");
        assert!(table.contains("skipped: on-demand: none here"), "{table}");
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(
            [rate(5e3), rate(2.5e8), rate(3e9)],
            ["5.0 KB/s", "250.0 MB/s", "3.0 GB/s"]
        );
    }

    #[test]
    fn test_skipped_when_said_names_what_it_is_about() {
        let all = Skipped::everything("no library".into());
        assert_eq!(all.line(), "all modes: no library");
        let one = Skipped::cell(Mode::Implicit, 4096, Some(Operation::FirstTouchRead), "x".into());
        assert_eq!(one.line(), "implicit, 4 KiB, first touch, READ: x");
    }
}
