//! The demo's result: a table for people, one JSON object for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::application::report::Report;
use super::{Verdict, name, total};
use crate::cli::DemoArgs;
use crate::latency::human;
use crate::sanitizer;

/// Everything that the processes said at the end.
#[derive(Debug)]
pub struct DemoResult {
    /// The options of the run.
    pub configuration: Value,
    /// The application's report.
    pub application: Report,
    /// The daemon's statistics.
    pub host: Value,
    /// The device's state and statistics.
    pub device: Value,
    /// The sleeping subscriber's statistics.
    pub peer: Value,
}

/// The options of a run, for its result.
pub fn configuration(args: &DemoArgs) -> Value {
    json!({
        "seconds": args.seconds,
        "threads": args.threads,
        "seed": args.seed,
        "memory_mib": args.memory_mib,
        "device": args.device,
        "doorbell": args.device.is_none().then(|| name(args.doorbell)),
        "engines": args.device.is_none().then_some(args.engines),
        "uffd_mode": args.uffd_mode.name(),
        "broken_check": args.break_check.map(|f| f.name()),
        "delayed_check": args.delay.map(|f| f.name()),
        "online_cpus": std::thread::available_parallelism().map_or(0, usize::from),
    })
}

impl DemoResult {
    /// Stale accesses that any oracle saw, the attached process' included.
    pub fn stale_accesses(&self) -> u64 {
        self.application.oracles.stale_accesses() + total(&self.peer, "stale_reads")
    }

    /// How the run ended.
    pub fn verdict(&self) -> Verdict {
        if self.stale_accesses() > 0 {
            Verdict::Stale
        } else if self.application.oracles.wrong_results > 0 {
            Verdict::Wrong
        } else if sanitizer::defects(&self.device["sanitizer"]) > 0 {
            Verdict::Defective
        } else {
            Verdict::Right
        }
    }

    fn invalidations(&self) -> u64 {
        self.application.calls.iter().map(|c| c.latency.count).sum()
    }

    /// Voluntary context switches inside the non-sleeping parts of starts, and the number of those starts.
    fn switches(&self) -> (u64, u64) {
        (
            total(&self.host, "voluntary_context_switches"),
            total(&self.host, "started"),
        )
    }

    /// One object, keys in snake_case with units.
    pub fn json(&self) -> Value {
        let app = &self.application;
        let (switches, starts) = self.switches();
        let tlb = &self.device["stats"]["tlb"];
        json!({
            "elapsed_ms": app.elapsed_ms,
            "operations": app.workers.operations,
            "operations_by_instruction": app.workers.by_instruction,
            "operations_judged_strictly": app.workers.strict,
            "verified_bytes": app.workers.verified_bytes,
            "tlb_hits": total(tlb, "hits"),
            "tlb_misses": total(tlb, "misses") + total(tlb, "mod_misses"),
            "faults_served": total(&self.host, "faults_served"),
            "invalidations": self.invalidations(),
            "invalidations_by_call": app.calls,
            "nonsleeping_invalidations": starts,
            "voluntary_context_switches": switches,
            "voluntary_context_switches_per_invalidation": ratio(switches, starts),
            "nonsleeping_allocations": total(&self.host, "allocations"),
            "yields": total(&self.host, "yields") + total(tlb, "drain_yields"),
            "xpmem_zaps": total(&self.host, "zaps"),
            "reclaimer_discarded_bytes": total(&self.host, "discarded_bytes"),
            "reclaimer_skipped": total(&self.host, "skipped_again") + total(&self.host, "skipped_young"),
            "expected_exceptions": app.workers.expected_exceptions,
            "wrong_results": app.oracles.wrong_results,
            "stale_accesses": self.stale_accesses(),
            "oracles": app.oracles,
            "canary_pages_checked": app.canary_pages_checked,
            "forks": app.forks,
            "configuration": self.configuration,
            "application": app,
            "host": self.host,
            "device": self.device["stats"],
            "sanitizer": self.device["sanitizer"],
            "peer": self.peer,
        })
    }

    /// The end table.
    pub fn table(&self) -> String {
        let (app, all) = (&self.application, self.json());
        let mut text = String::new();
        let mut row = |label: &str, value: String| {
            writeln!(text, "{label:<44}{value:>16}").expect("writing to a string cannot fail");
        };
        let figure = |key: &str| all[key].as_u64().unwrap_or(0);
        row("operations", grouped(app.workers.operations));
        row(
            "  judged strictly (nothing changed meanwhile)",
            grouped(app.workers.strict),
        );
        row("verified", format!("{} MiB", app.workers.verified_bytes >> 20));
        row("TLB hits", grouped(figure("tlb_hits")));
        row("TLB misses", grouped(figure("tlb_misses")));
        row("faults served", grouped(figure("faults_served")));
        row(
            "exceptions that had to come",
            grouped(figure("expected_exceptions")),
        );
        row(
            "pages whose canary was checked",
            grouped(app.canary_pages_checked),
        );
        let (switches, starts) = self.switches();
        row(
            "voluntary context switches per invalidation",
            format!("{:.4} ({switches}/{starts})", ratio(switches, starts)),
        );
        row(
            "allocator calls in non-sleeping invalidations",
            grouped(figure("nonsleeping_allocations")),
        );
        row("yields while waiting for the device", grouped(figure("yields")));
        row("xpmem zaps (sleeping subscriber)", grouped(figure("xpmem_zaps")));
        row(
            "reclaimer: discarded, pieces skipped",
            format!(
                "{} KiB, {}",
                figure("reclaimer_discarded_bytes") >> 10,
                figure("reclaimer_skipped")
            ),
        );
        row("forks", grouped(app.forks));
        text.push('\n');
        writeln!(
            text,
            "{:<16}{:<8}{:>10}{:>12}{:>12}{:>12}",
            "invalidation", "path", "calls", "p50", "p99", "max"
        )
        .expect("writing to a string cannot fail");
        for call in &app.calls {
            let l = call.latency;
            writeln!(
                text,
                "{:<16}{:<8}{:>10}{:>12}{:>12}{:>12}",
                call.kind,
                call.path,
                grouped(l.count),
                human(l.p50_ns),
                human(l.p99_ns),
                human(l.max_ns)
            )
            .expect("writing to a string cannot fail");
        }
        text.push('\n');
        self.violations(&mut text);
        text
    }

    fn violations(&self, text: &mut String) {
        let oracles = &self.application.oracles;
        for violation in oracles.samples.iter().take(8) {
            let line = format!(
                "{}: slot {} at {:#x}: {}",
                violation.oracle.name(),
                violation.slot,
                violation.va,
                violation.what
            );
            text.push_str(&line);
            text.push('\n');
        }
        if oracles.wrong_results > 0 {
            text.push_str(&format!("wrong results: {}\n", oracles.wrong_results));
        }
        if let Some(summary) = sanitizer::summary(&self.device["sanitizer"]) {
            text.push_str(&summary);
            text.push('\n');
        }
        text.push_str(&format!(
            "{} stale accesses (canary {}, address {}, generation {}, attached process {})\n",
            self.stale_accesses(),
            oracles.canary,
            oracles.address,
            oracles.generation,
            total(&self.peer, "stale_reads")
        ));
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::application::report::{CallRow, OracleReport};
    use super::*;
    use crate::latency::LatencySummary;

    fn result(canary: u64) -> DemoResult {
        DemoResult {
            configuration: json!({}),
            application: Report {
                calls: vec![CallRow {
                    kind: "munmap".into(),
                    path: "agent".into(),
                    latency: LatencySummary {
                        count: 1234,
                        p50_ns: 1500,
                        p99_ns: 2_000_000,
                        max_ns: 3_000_000_000,
                    },
                }],
                oracles: OracleReport {
                    canary,
                    ..Default::default()
                },
                ..Default::default()
            },
            host: json!({"driver": {"faults_served": 5, "yields": 1},
                "sessions": [{"chain": {"started": 4}, "events": [{"voluntary_context_switches": 1}]}]}),
            device: json!({"stats": {"tlb": [{"hits": 10, "misses": 2, "mod_misses": 1}, {"hits": 5}]}}),
            peer: json!({"stale_reads": 0}),
        }
    }

    #[test]
    fn test_json_when_printed_has_the_promised_keys() {
        let json = result(0).json();
        for key in [
            "operations",
            "verified_bytes",
            "tlb_hits",
            "tlb_misses",
            "invalidations",
            "stale_accesses",
            "voluntary_context_switches",
        ] {
            assert!(json[key].is_u64(), "{key}: {}", json[key]);
        }
        assert_eq!(
            (json["tlb_hits"].as_u64(), json["tlb_misses"].as_u64()),
            (Some(15), Some(3))
        );
        assert_eq!(json["voluntary_context_switches_per_invalidation"], 0.25);
        assert_eq!(json["invalidations_by_call"][0]["p50_ns"], 1500);
    }

    #[test]
    fn test_table_when_printed_shows_latencies_and_the_verdict() {
        let table = result(0).table();
        assert!(
            table.contains("munmap          agent        1,234      1.5 us      2.0 ms      3.00 s"),
            "{table}"
        );
        assert!(
            table.ends_with("0 stale accesses (canary 0, address 0, generation 0, attached process 0)\n")
        );
        assert_eq!(result(0).verdict(), Verdict::Right);
        assert_eq!(result(1).verdict(), Verdict::Stale);
        for (canary, verdict) in [(0, Verdict::Defective), (1, Verdict::Stale)] {
            let mut result = result(canary);
            result.device["sanitizer"] =
                json!({"defects": 2, "reports": [{"class": "dead-space", "count": 2}]});
            assert_eq!(result.verdict(), verdict);
            assert!(result.table().contains("2 defects in 1 reports (dead-space 2)"));
        }
    }

    #[test]
    fn test_grouped_when_long_has_commas() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
