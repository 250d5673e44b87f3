//! Instructions on memory that is torn away while they run.
//!
//! `tracked`: each page's words tell when they were written, and two counters tell what may be there: what was
//! complete before a load began must not be older than that. `stores`: what must not change does not.

mod stores;
mod tearing;
mod tracked;

use anyhow::ensure;

use crate::Outcome;
use crate::driver::{Gru, Misses};
use crate::statistics::counter;

/// What tears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// MADV_DONTNEED of single pages.
    Madvise,
    /// munmap and mmap.
    Munmap,
    /// Pages move in from elsewhere.
    Mremap,
    /// mprotect to read-only and back, under stores.
    Mprotect,
    /// fork, under stores.
    Fork,
    /// Huge pages of hugetlbfs are given back and made anew.
    Hugetlb,
    /// Huge pages are split, and made of small ones again.
    Thp,
    /// Equal pages are merged, and parted by writes.
    Ksm,
    /// A memory cgroup's memory is reclaimed (wants swap).
    Memcg,
}

/// Runs one, with misses served in both ways.
///
/// # Errors
/// A stale access, or a test that has tested nothing.
pub fn run(gru: &Gru, kind: Kind, rounds: u64, seed: u64) -> Outcome {
    let before = counter("flush_tlb_gru_tgh")?;
    let mut said = Vec::new();
    for misses in Misses::BOTH {
        let outcome = match kind {
            Kind::Mprotect => stores::protected(gru, misses, rounds),
            Kind::Fork => stores::forked(gru, misses, rounds),
            tracked => tearing::run(gru, tracked, misses, rounds, seed),
        };
        said.push(outcome.map_err(|e| e.context(format!("{misses:?}")))?);
    }
    let flushes = counter("flush_tlb_gru_tgh")? - before;
    ensure!(
        flushes > 0,
        "the driver has flushed nothing: the test says nothing"
    );
    Ok(format!("{}; {flushes} flushes by TGH", said.join("; ")))
}
