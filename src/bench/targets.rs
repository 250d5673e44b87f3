//! What the figures are held against. A target is met, not met, or not applicable on this machine; a time
//! alone never fails anything.

use protos::bridge::control::UffdMode;
use serde::{Deserialize, Serialize};

use super::cases::Case;
use super::subject::{Row, WakeFloor};

/// Verdict on a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The interval's better bound is inside.
    Met,
    /// It is not.
    NotMet,
    /// The machine cannot show it.
    NotApplicable,
}

/// A target with its verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// What is wanted.
    pub target: String,
    /// Registration mode that it was judged in.
    pub uffd_mode: UffdMode,
    /// Verdict.
    pub status: Status,
    /// What was measured, or why it cannot be.
    pub reason: String,
}

/// A page without live translations, by the agent, over the plain call.
const SILENT_NS: f64 = 5_000.0;
/// A range without live translations, against the plain call; else the slope is what there is to say.
const RANGE_RATIO: f64 = 1.1;
/// A non-sleeping invalidation with a device that is awake.
const AWAKE_NS: f64 = 10_000.0;
/// Processors that a spinning device, the daemon and the caller need.
const CPUS: usize = 3;
/// Against a socket echo (to the daemon and back) and one wake (of the device).
const PARKED_RATIO: f64 = 1.5;

/// Judges the rows. A quick run has too few blocks for a verdict.
pub fn judge(rows: &[Row], wake: Option<&WakeFloor>, cpus: usize, quick: bool) -> Vec<Target> {
    let mut targets = Vec::new();
    for mode in [UffdMode::Wp, UffdMode::Missing] {
        let cell = |case: Case, size: u64| {
            rows.iter()
                .find(|r| r.uffd_mode == mode && r.case == case && r.size_bytes == size)
        };
        if !rows.iter().any(|r| r.uffd_mode == mode) {
            continue;
        }
        let mut add = |target: &str, (status, reason): (Status, String)| {
            let (status, reason) = match quick {
                true => (Status::NotApplicable, format!("quick run; {reason}")),
                false => (status, reason),
            };
            targets.push(Target {
                target: target.into(),
                uffd_mode: mode,
                status,
                reason,
            });
        };
        add(
            "nothing cached, 4 KiB: at most 5 us more than a plain munmap",
            difference(cell(Case::AgentSilent, 4096), SILENT_NS),
        );
        for (size, name) in [(2 << 20, "2 MiB"), (64 << 20, "64 MiB"), (1 << 30, "1 GiB")] {
            add(
                &format!("nothing cached, {name}: at most 1.1 times a plain munmap, or the slope stated"),
                ratio(cell(Case::AgentSilent, size), RANGE_RATIO),
            );
        }
        add(
            "live translations, 4 KiB, device at work: below 10 us more than a plain munmap",
            {
                let (status, reason) = difference(cell(Case::AgentLiveBusy, 4096), AWAKE_NS);
                if cpus < CPUS {
                    let why = format!(
                        "needs {CPUS} CPUs (caller, daemon, spinning device), {cpus} online; {reason}"
                    );
                    (Status::NotApplicable, why)
                } else {
                    (status, reason)
                }
            },
        );
        add(
            "live translations, 4 KiB, device asleep: at most 1.5 times (a socket echo + a wake) more",
            {
                match wake {
                    None => (Status::NotApplicable, "the wake floor was not measured".into()),
                    Some(wake) => {
                        let floor = (wake.socket_echo_p50_ns + wake.wake_p50_ns) as f64;
                        difference(cell(Case::AgentLiveParked, 4096), PARKED_RATIO * floor)
                    }
                }
            },
        );
    }
    targets
}

fn difference(row: Option<&Row>, limit: f64) -> (Status, String) {
    let Some(row) = row else {
        return (Status::NotApplicable, "not measured in this run".into());
    };
    let d = row.paired.difference_ns;
    let status = if d.low <= limit {
        Status::Met
    } else {
        Status::NotMet
    };
    let reason = format!(
        "{:.0} ns more [{:.0}, {:.0}], limit {limit:.0} ns",
        d.median, d.low, d.high
    );
    (status, reason)
}

fn ratio(row: Option<&Row>, limit: f64) -> (Status, String) {
    let Some(row) = row else {
        return (Status::NotApplicable, "not measured in this run".into());
    };
    let r = row.paired.ratio;
    let status = if r.low <= limit {
        Status::Met
    } else {
        Status::NotMet
    };
    (
        status,
        format!("{:.2} times [{:.2}, {:.2}]", r.median, r.low, r.high),
    )
}

#[cfg(test)]
mod tests {
    use super::super::statistics::{Block, paired};
    use super::*;

    fn row(case: Case, size_bytes: u64, floor: u64, subject: u64) -> Row {
        let block = Block {
            floor: [floor; 2],
            subject: [subject; 2],
        };
        Row {
            uffd_mode: UffdMode::Wp,
            case,
            size_bytes,
            paired: paired(&[block; 30], 1),
            voluntary_context_switches_per_call: 0.0,
        }
    }

    #[test]
    fn test_targets_when_few_cpus_are_not_applicable_with_the_reason() {
        let rows = [
            row(Case::AgentSilent, 4096, 2000, 6500),
            row(Case::AgentSilent, 64 << 20, 1000, 1400),
            row(Case::AgentLiveBusy, 4096, 2000, 5000),
        ];
        let on = |cpus| judge(&rows, None, cpus, false);
        let status: Vec<Status> = on(2).iter().map(|t| t.status).collect();
        let na = Status::NotApplicable;
        assert_eq!(status, [Status::Met, na, Status::NotMet, na, na, na]);
        assert!(on(2)[4].reason.contains("2 online"), "{:?}", on(2)[4]);
        assert_eq!(on(4)[4].status, Status::Met);
        assert!(
            judge(&rows, None, 4, true).iter().all(|t| t.status == na),
            "too few blocks"
        );
    }
}
