//! The record of what must not happen. Three oracles see stale accesses; the rest of the verification
//! (results that are simply wrong) is kept apart.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Which oracle spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Oracle {
    /// Poison in a page that was left behind was read or written by the device.
    Canary,
    /// An operation on a range that is gone, or a store on a read-only one, did not end in an
    /// exception; or it reached other memory than what is mapped there.
    Address,
    /// An access used a translation that is older than the call that removed it.
    Generation,
    /// Not staleness: an exception where the access was allowed, a wrong cause, a word nobody wrote.
    Result,
}

impl Oracle {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Address => "address",
            Self::Generation => "generation",
            Self::Result => "result",
        }
    }
}

/// One violation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// Who saw it.
    pub oracle: Oracle,
    /// In which slot.
    pub slot: usize,
    /// At which address.
    pub va: u64,
    /// What happened.
    pub what: String,
}

/// Violations with their text: the first ones, all are counted.
const SAMPLES: usize = 32;

/// Collects violations from all threads.
#[derive(Debug, Default)]
pub struct Oracles {
    canary: AtomicU64,
    address: AtomicU64,
    generation: AtomicU64,
    result: AtomicU64,
    samples: Mutex<Vec<Violation>>,
}

impl Oracles {
    /// Records a violation.
    pub fn report(&self, violation: Violation) {
        self.counter(violation.oracle).fetch_add(1, Ordering::Relaxed);
        let mut samples = self.samples.lock().unwrap();
        if samples.len() < SAMPLES {
            tracing::error!(
                oracle = violation.oracle.name(),
                slot = violation.slot,
                va = format_args!("{:#x}", violation.va),
                "{}",
                violation.what
            );
            samples.push(violation);
        }
    }

    fn counter(&self, oracle: Oracle) -> &AtomicU64 {
        match oracle {
            Oracle::Canary => &self.canary,
            Oracle::Address => &self.address,
            Oracle::Generation => &self.generation,
            Oracle::Result => &self.result,
        }
    }

    /// How often an oracle spoke.
    pub fn count(&self, oracle: Oracle) -> u64 {
        self.counter(oracle).load(Ordering::Relaxed)
    }

    /// Accesses through old translations, by whichever oracle.
    pub fn stale_accesses(&self) -> u64 {
        [Oracle::Canary, Oracle::Address, Oracle::Generation]
            .into_iter()
            .map(|o| self.count(o))
            .sum()
    }

    /// The first violations in full.
    pub fn samples(&self) -> Vec<Violation> {
        self.samples.lock().unwrap().clone()
    }
}
