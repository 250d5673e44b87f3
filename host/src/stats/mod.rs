//! Statistics as JSON: what `Request::Stats` is answered with.
//!
//! Keys are snake_case and carry their unit. Histograms are `{count, mean_ns, p50_ns, p90_ns, p99_ns, p999_ns,
//! max_ns}`, percentiles rounded up by at most 1/16; those without a value are left out.
//!
//! | key | what |
//! |---|---|
//! | `daemon` | `pid`, `uptime_ms`, `sessions_opened`, `sessions_closed`, `fence_timeout_ms` (0 = never), `uffd_mode` |
//! | `device` | `pid` (null = unknown), `alive`, `mapped_files`, `mapped_ranges`, `flush_is_nonsleeping`, `driver`: the GRU driver's counters (`yields`: sched_yield calls of waits for handles, `stalls`, `flushes`, `fills` ...) |
//! | `fence` | `kills`, `gone`, `reports` |
//! | `sessions` | one object each, the asking connection's own first |
//! | `sessions_left_out` | those for which a packet had no room |
//!
//! A session:
//!
//! | key | what |
//! |---|---|
//! | `session`, `pid`, `name`, `generation`, `contexts`, `files`, `must_hop`, `table_closed` | what it is |
//! | `invalidations.covered_silent.count` | covered calls that needed nobody |
//! | `invalidations.covered_hopped` | by event (`unmap`, `clear`, `protection_vma` ...): the whole start, as the mailbox saw it |
//! | `invalidations.safety_net` | by userfaultfd message (`unmap`, `remap`, `remove`, `fork`, `page_fault`, `other`): from readiness to the event having been read, with `purges_skipped` |
//! | `invalidations.nonsleeping` | by event, all paths: the part that must not sleep, with `voluntary_context_switches` and `allocations` (null: not counted by this program) |
//! | `invalidations.reclaimer` | the reclaimer's counters, null without one |
//! | `safety_net` | `zero_pages`, `zero_page_retries`, `empty_reads` |
//! | `faults` | `served`, `served_large`, `deferred`, `refused_unmapped`, `refused_protection`, `refused_private`, `refused_ended` |
//! | `mailbox` | `starts`, `ends`, `malformed`, `worker_sleeps` |
//! | `chain`, `fill_table`, `mm_cache`, `xpmem` | the counters of those parts |

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use crate::notifier::{Event, Histogram};
use crate::session::Session;
use crate::uffd::KINDS;

/// A histogram for each event.
#[derive(Debug, Default)]
pub struct ByEvent([Histogram; Event::ALL.len()]);

impl ByEvent {
    /// The histogram of an event.
    #[must_use]
    pub fn of(&self, event: Event) -> &Histogram {
        &self.0[event as usize]
    }

    fn to_json(&self) -> Value {
        let filled = Event::ALL.into_iter().filter_map(|event| {
            let summary = self.of(event).summary();
            (summary.count != 0).then(|| (name_of(event), json!(summary)))
        });
        Value::Object(filled.collect())
    }
}

/// The event's name as serde writes it.
fn name_of(event: Event) -> String {
    match json!(event) {
        Value::String(name) => name,
        other => other.to_string(),
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A session's figures.
#[must_use]
pub fn of_session(session: &Session) -> Value {
    let space = &session.space;
    let header = &space.table().header;
    let faults = &space.stats.faults;
    let net = &space.stats.safety_net;
    let mailbox = &session.mailbox.stats;
    let safety_net: Map<String, Value> = KINDS
        .iter()
        .zip(&net.kinds)
        .filter_map(|(kind, stats)| {
            let summary = stats.ready_to_read.summary();
            let mut value = json!(summary);
            value["purges_skipped"] = read(&stats.purges_skipped).into();
            (summary.count != 0).then(|| ((*kind).to_owned(), value))
        })
        .collect();
    let nonsleeping: Map<String, Value> = space
        .chain()
        .recorder()
        .summaries()
        .into_iter()
        .map(|s| {
            let mut value = json!(s.nonsleeping);
            value["voluntary_context_switches"] = s.voluntary_context_switches.into();
            value["allocations"] = s.allocations.into();
            (
                s.event.map_or_else(|| "invalidate_page".to_owned(), name_of),
                value,
            )
        })
        .collect();
    json!({
        "session": session.id,
        "pid": space.pid(),
        "name": session.name,
        "generation": read(&header.generation),
        "contexts": session.context_count(),
        "files": space.file_count(),
        "must_hop": header.must_hop.load(Ordering::Relaxed),
        "table_closed": header.closed.load(Ordering::Relaxed) != 0,
        "invalidations": {
            "covered_silent": { "count": read(&header.calls_silent) },
            "covered_hopped": mailbox.by_event.to_json(),
            "safety_net": safety_net,
            "nonsleeping": nonsleeping,
            "reclaimer": space.reclaimer().map(|r| r.stats()),
        },
        "safety_net": {
            "zero_pages": read(&net.zero_pages),
            "zero_page_retries": read(&net.zero_page_retries),
            "empty_reads": read(&net.empty_reads),
        },
        "faults": {
            "served": read(&faults.served),
            "served_large": read(&faults.served_large),
            "deferred": read(&faults.deferred),
            "refused_unmapped": read(&faults.refused_unmapped),
            "refused_protection": read(&faults.refused_protection),
            "refused_private": read(&faults.refused_private),
            "refused_ended": read(&faults.refused_ended),
        },
        "mailbox": {
            "starts": read(&mailbox.starts),
            "ends": read(&mailbox.ends),
            "malformed": read(&mailbox.malformed),
            "worker_sleeps": read(&mailbox.sleeps),
        },
        "chain": space.chain().stats(),
        "fill_table": space.fills().stats(),
        "mm_cache": space.cache().stats(),
        "xpmem": space.xpmem().stats(),
    })
}
