//! What the application tells the demo at the end.

use serde::{Deserialize, Serialize};

use super::disturber::DisturberCounts;
use super::oracles::{Oracle, Oracles, Violation};
use super::purgeable::PurgeableCounts;
use super::worker::WorkerCounts;
use crate::latency::LatencySummary;

/// Figures of one run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Length of the run.
    pub elapsed_ms: u64,
    /// The workers together.
    pub workers: WorkerCounts,
    /// The calls that changed mappings.
    pub calls: Vec<CallRow>,
    /// Calls that were preceded and followed by a probe.
    pub probes: u64,
    /// Forks.
    pub forks: u64,
    /// Voluntary context switches of the callers inside calls by the agent.
    pub agent_call_voluntary_switches: u64,
    /// The purgeable area.
    pub purgeable: PurgeableCounts,
    /// Pages whose poison was checked.
    pub canary_pages_checked: u64,
    /// What the oracles saw.
    pub oracles: OracleReport,
    /// The agent's counters.
    pub agent: serde_json::Value,
}

/// Calls of one kind by one path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CallRow {
    /// Name of the call.
    pub kind: String,
    /// "agent" or "raw".
    pub path: String,
    /// Time of the call, as its caller sees it.
    #[serde(flatten)]
    pub latency: LatencySummary,
}

/// What the oracles saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct OracleReport {
    /// Late reads and writes of pages that were left behind.
    pub canary: u64,
    /// Accesses that had to end in an exception, or reached the wrong memory.
    pub address: u64,
    /// Accesses through translations older than the call.
    pub generation: u64,
    /// Results that are wrong without being stale.
    pub wrong_results: u64,
    /// The first violations.
    pub samples: Vec<Violation>,
}

impl OracleReport {
    /// Stale accesses, by whichever oracle.
    pub fn stale_accesses(&self) -> u64 {
        self.canary + self.address + self.generation
    }
}

impl From<&Oracles> for OracleReport {
    fn from(oracles: &Oracles) -> Self {
        Self {
            canary: oracles.count(Oracle::Canary),
            address: oracles.count(Oracle::Address),
            generation: oracles.count(Oracle::Generation),
            wrong_results: oracles.count(Oracle::Result),
            samples: oracles.samples(),
        }
    }
}

/// Rows of the disturbers' calls.
pub fn calls_of(counts: &DisturberCounts) -> Vec<CallRow> {
    counts
        .calls
        .iter()
        .map(|((kind, path), latency)| CallRow {
            kind: kind.name().into(),
            path: path.name().into(),
            latency: latency.summary(),
        })
        .collect()
}
