//! Both worlds in one table, and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::transcript::{Access, Cell, Flushes, Transcript};
use crate::bench::report::size;
use crate::bench::statistics::{Paired, paired};
use crate::bench::subject::Row;
use crate::cli::{BenchArgs, Doorbell};
use crate::demo::name;
use crate::latency::human;

/// A row of the sandbox.
#[derive(Debug)]
pub struct SandboxRow {
    /// How the device learns of stores.
    pub doorbell: Doorbell,
    /// The figures.
    pub row: Row,
}

/// One call in a guest.
#[derive(Debug, Serialize)]
pub struct GuestCell {
    /// What was called.
    #[serde(flatten)]
    pub cell: Cell,
    /// The figures.
    #[serde(flatten)]
    pub paired: Paired,
    /// What the driver itself says.
    pub tgh_invalidate: Option<Flushes>,
}

/// One guest.
#[derive(Debug)]
pub struct GuestRow {
    doorbell: Doorbell,
    cells: Vec<GuestCell>,
    accesses: Vec<(String, Access)>,
    /// All TLBINV, as the driver and as the device has counted them.
    flushes: (u64, u64),
    device: Value,
}

impl GuestRow {
    /// What a guest has said, and what its device has counted.
    pub fn new(doorbell: Doorbell, transcript: &Transcript, device: Value, seed: u64) -> Self {
        let cells = transcript
            .cells
            .iter()
            .filter(|(_, blocks, _)| !blocks.is_empty())
            .map(|(cell, blocks, flushes)| GuestCell {
                cell: cell.clone(),
                paired: paired(blocks, seed),
                tgh_invalidate: *flushes,
            });
        Self {
            doorbell,
            cells: cells.collect(),
            accesses: transcript.accesses.clone(),
            flushes: (transcript.tgh_flushes, device["tgh_purges"].as_u64().unwrap_or(0)),
            device,
        }
    }

    fn access(&self, what: &str) -> u64 {
        self.accesses
            .iter()
            .find(|(name, _)| name == what)
            .map_or(0, |(_, access)| access.p50_ns)
    }

    /// A trapped register write over a trapped register read: below 1 it is posted.
    fn write_over_read(&self) -> f64 {
        self.access("trapped-write") as f64 / self.access("trapped-read").max(1) as f64
    }

    /// For progress.
    pub fn summary(&self) -> Vec<String> {
        self.cells
            .iter()
            .map(|cell| {
                format!(
                    "{:<24}{:>8}  {:>10}  {:.2} times",
                    cell.cell.case,
                    size(cell.cell.size_bytes),
                    human(cell.paired.p50_ns),
                    cell.paired.ratio.median
                )
            })
            .collect()
    }

    fn json(&self) -> Value {
        let accesses: serde_json::Map<_, _> = self
            .accesses
            .iter()
            .map(|(name, access)| (name.replace('-', "_"), json!(access)))
            .collect();
        json!({
            "doorbell": name(self.doorbell),
            "rows": self.cells,
            "accesses": accesses,
            "register_writes": if self.write_over_read() < 0.5 { "posted" } else { "answered" },
            "flushes_by_driver": self.flushes.0,
            "flushes_by_device": self.flushes.1,
            "device": self.device,
        })
    }
}

/// Everything measured.
#[derive(Debug)]
pub struct GuestResult {
    /// The bridge between processes.
    pub sandbox: Vec<SandboxRow>,
    /// The kernel's driver.
    pub guests: Vec<GuestRow>,
    /// Length of the run.
    pub elapsed_ms: u64,
    emulated: bool,
    quick: bool,
    seed: u64,
}

impl GuestResult {
    /// Nothing yet.
    pub fn new(args: &BenchArgs, emulated: bool) -> Self {
        Self {
            sandbox: Vec::new(),
            guests: Vec::new(),
            elapsed_ms: 0,
            emulated,
            quick: args.quick,
            seed: args.seed,
        }
    }

    fn accelerator(&self) -> &'static str {
        if self.emulated { "tcg" } else { "kvm" }
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        let sandbox: Vec<Value> = self
            .sandbox
            .iter()
            .map(|row| {
                let mut json = json!(row.row);
                json["doorbell"] = name(row.doorbell).into();
                json
            })
            .collect();
        json!({
            "benchmark": "invalidate-guest",
            "accelerator": self.accelerator(),
            "quick": self.quick,
            "seed": self.seed,
            "elapsed_ms": self.elapsed_ms,
            "sandbox": sandbox,
            "guests": self.guests.iter().map(GuestRow::json).collect::<Vec<_>>(),
        })
    }

    /// The tables.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| writeln!(text, "{s}").expect("writing to a string cannot fail");
        line(format!(
            "invalidations by their caller's clock; floor: the same call, in turn, in a process that no device watches{}",
            if self.quick {
                "; quick: too few blocks to quote"
            } else {
                ""
            }
        ));
        line(format!(
            "{:<9}{:<9}{:<28}{:>8}{:>12}{:>12}{:>12}   ratio [95%]",
            "world", "doorbell", "call", "size", "floor p50", "p50", "p99"
        ));
        let mut row = |world: &str, doorbell, call: &str, bytes, paired: &Paired| {
            let ratio = paired.ratio;
            line(format!(
                "{world:<9}{:<9}{call:<28}{:>8}{:>12}{:>12}{:>12}   {:.2} [{:.2}, {:.2}]",
                name(doorbell),
                size(bytes),
                human(paired.floor_p50_ns),
                human(paired.p50_ns),
                human(paired.p99_ns),
                ratio.median,
                ratio.low,
                ratio.high
            ));
        };
        for sandbox in &self.sandbox {
            let inner = &sandbox.row;
            row(
                "sandbox",
                sandbox.doorbell,
                inner.case.label(),
                inner.size_bytes,
                &inner.paired,
            );
        }
        for guest in &self.guests {
            for cell in &guest.cells {
                row(
                    "guest",
                    guest.doorbell,
                    &cell.cell.case,
                    cell.cell.size_bytes,
                    &cell.paired,
                );
            }
        }
        line(String::new());
        line(
            "tgh_invalidate by the driver's own statistics (from its start to the look that sees its end)"
                .to_owned(),
        );
        line(format!(
            "{:<9}{:<28}{:>8}{:>8}{:>12}{:>12}   mean, in trapped reads",
            "doorbell", "call", "size", "count", "mean", "longest"
        ));
        for guest in &self.guests {
            for cell in &guest.cells {
                let Some(flushes) = cell.tgh_invalidate else {
                    continue;
                };
                line(format!(
                    "{:<9}{:<28}{:>8}{:>8}{:>12}{:>12}   {:.2}",
                    name(guest.doorbell),
                    cell.cell.case,
                    size(cell.cell.size_bytes),
                    flushes.count,
                    human(flushes.average_ns),
                    human(flushes.max_ns),
                    flushes.average_ns as f64 / guest.access("trapped-read").max(1) as f64
                ));
            }
        }
        line(String::new());
        line("accesses of the guest's processor, medians; with anything mappable QEMU waits for each register write".to_owned());
        line(format!(
            "{:<9}{:>14}{:>15}{:>12}{:>12}{:>12}   {:<24}{:>10}",
            "doorbell",
            "register read",
            "register write",
            "CB read",
            "DS write",
            "VLOAD hit",
            "register writes",
            "TLBINV"
        ));
        for guest in &self.guests {
            let access = |what| human(guest.access(what));
            let over = guest.write_over_read();
            let posted = if over < 0.5 { "posted" } else { "answered" };
            let (driver, device) = guest.flushes;
            line(format!(
                "{:<9}{:>14}{:>15}{:>12}{:>12}{:>12}   {:<24}{:>10}",
                name(guest.doorbell),
                access("trapped-read"),
                access("trapped-write"),
                access("control-block-read"),
                access("data-segment-write"),
                access("vload-hit"),
                format!("{posted}: {over:.2} of a read"),
                if driver == device {
                    device.to_string()
                } else {
                    format!("{device} ({driver})")
                }
            ));
        }
        if self.emulated {
            line(
                "The guests were emulated (TCG): their times are not a machine's, and only ratios to a floor of the same \
                 guest can be compared."
                    .to_owned(),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(doorbell: Doorbell, write: u64) -> GuestRow {
        let said = format!(
            "access trapped-read 40000 90000\naccess trapped-write {write} {write}\n\
             block munmap-live 4096 10000 30000 30000 10000\nflushes munmap-live 4096 24 20000 90000\n\
             statistic flush_tlb_gru_tgh 24\n"
        );
        let transcript = Transcript::read(&said).unwrap();
        GuestRow::new(doorbell, &transcript, json!({ "tgh_purges": 24 }), 1)
    }

    #[test]
    fn test_guest_report_when_printed_has_ratios_flushes_and_whether_writes_are_posted() {
        let result = GuestResult {
            sandbox: Vec::new(),
            guests: vec![guest(Doorbell::Trap, 2000), guest(Doorbell::Bell, 41000)],
            elapsed_ms: 1,
            emulated: true,
            quick: false,
            seed: 1,
        };
        let json = result.json();
        let first = &json["guests"][0];
        assert_eq!(first["rows"][0]["ratio"]["median"], 3.0, "{json}");
        assert_eq!(first["rows"][0]["tgh_invalidate"]["average_ns"], 20000, "{json}");
        assert_eq!(first["register_writes"], "posted", "{json}");
        assert_eq!(json["guests"][1]["register_writes"], "answered", "{json}");
        assert_eq!(
            (&first["flushes_by_driver"], &first["flushes_by_device"]),
            (&json!(24), &json!(24))
        );
        let table = result.table();
        for expected in [
            "3.00 [3.00, 3.00]",
            "0.50\n",
            "posted: 0.05 of a read",
            "answered: 1.02",
            "emulated",
        ] {
            assert!(table.contains(expected), "{expected}: {table}");
        }
    }
}
