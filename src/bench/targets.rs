//! What the figures are held against. A target is met, not met, or not applicable on this machine; a time
//! alone never fails anything.

use protos::bridge::control::UffdMode;
use serde::{Deserialize, Serialize};

use super::cases::{Case, PLACED_SIZES};
use super::placement::Placement;
use super::report::{Absent, BenchResult, Slope, size};
use super::subject::{Row, Wakes};

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
pub fn judge(result: &BenchResult) -> Vec<Target> {
    let (rows, cpus, quick) = (&result.rows, result.cpus, result.quick);
    let slopes = result.slopes();
    let mut targets = Vec::new();
    for mode in [UffdMode::Wp, UffdMode::Missing] {
        let cell = |case: Case, size: u64| {
            rows.iter().find(|r| {
                r.uffd_mode == mode
                    && r.case == case
                    && r.size_bytes == size
                    && r.placement == Placement::Free
            })
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
                ratio_or_slope(
                    cell(Case::AgentSilent, size),
                    RANGE_RATIO,
                    slopes.iter().find(|slope| slope.uffd_mode == mode),
                ),
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
        let places = [Placement::OneProcessor, Placement::DeviceApart];
        for (length, placement) in PLACED_SIZES
            .into_iter()
            .flat_map(|s| places.map(|p| (s as u64, p)))
        {
            let row = rows
                .iter()
                .find(|r| r.uffd_mode == mode && r.placement == placement && r.size_bytes == length);
            let absent = || {
                let is = |a: &&Absent| a.placement == placement && a.uffd_mode == mode;
                let why = result.absent.iter().find(is).map(|a| a.reason.clone());
                (
                    Status::NotApplicable,
                    why.unwrap_or_else(|| "not measured in this run".into()),
                )
            };
            add(
                &format!(
                    "live translations, {}, device asleep, {}: at most 1.5 times (a socket echo + a wake) more",
                    size(length),
                    placement.label()
                ),
                row.and_then(|row| row.wakes).map_or_else(absent, against_wakes),
            );
        }
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

fn against_wakes(wakes: Wakes) -> (Status, String) {
    let r = wakes.ratio;
    let status = if r.low <= PARKED_RATIO {
        Status::Met
    } else {
        Status::NotMet
    };
    (
        status,
        format!("{:.2} times [{:.2}, {:.2}]", r.median, r.low, r.high),
    )
}

/// A slope speaks for the lengths between which it was measured, no others.
fn ratio_or_slope(row: Option<&Row>, limit: f64, slope: Option<&Slope>) -> (Status, String) {
    let Some(row) = row else {
        return (Status::NotApplicable, "not measured in this run".into());
    };
    let r = row.paired.ratio;
    let reason = format!("{:.2} times [{:.2}, {:.2}]", r.median, r.low, r.high);
    match slope {
        _ if r.low <= limit => (Status::Met, reason),
        Some(slope) => {
            let measured = (slope.from_bytes..=slope.to_bytes).contains(&row.size_bytes);
            let reason = format!(
                "{reason}; the registration mode's slope: {:.1} us for each MiB, measured from {} to {}",
                slope.slope_ns_per_mib / 1000.0,
                size(slope.from_bytes),
                size(slope.to_bytes)
            );
            (if measured { Status::Met } else { Status::NotMet }, reason)
        }
        None => (Status::NotMet, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::super::statistics::{Block, Interval, paired};
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
            placement: Placement::Free,
            paired: paired(&[block; 30], 1),
            wakes: None,
            voluntary_context_switches_per_call: 0.0,
        }
    }

    fn result(rows: Vec<Row>, cpus: usize) -> BenchResult {
        BenchResult {
            rows,
            absent: Vec::new(),
            host: Vec::new(),
            elapsed_ms: 0,
            quick: false,
            seed: 1,
            cpus,
        }
    }

    fn statuses(result: &BenchResult) -> Vec<Status> {
        judge(result).iter().map(|t| t.status).collect()
    }

    #[test]
    fn test_targets_when_few_cpus_are_not_applicable_with_the_reason() {
        let rows = || {
            vec![
                row(Case::AgentSilent, 4096, 2000, 6500),
                row(Case::AgentLiveBusy, 4096, 2000, 5000),
            ]
        };
        let na = Status::NotApplicable;
        let two = result(rows(), 2);
        assert_eq!(statuses(&two), [Status::Met, na, na, na, na, na, na, na, na]);
        assert!(judge(&two)[4].reason.contains("2 online"), "{:?}", judge(&two)[4]);
        assert_eq!(statuses(&result(rows(), 4))[4], Status::Met);
        let mut quick = result(rows(), 4);
        quick.quick = true;
        assert!(statuses(&quick).iter().all(|s| *s == na), "too few blocks");
    }

    #[test]
    fn test_targets_when_a_range_costs_more_state_the_slope() {
        let large = || row(Case::AgentSilent, 64 << 20, 1_000_000, 1_400_000);
        let alone = result(vec![large()], 2);
        assert_eq!(statuses(&alone)[2], Status::NotMet, "there is no slope to state");
        let both = result(vec![row(Case::AgentSilent, 4096, 2000, 4000), large()], 2);
        let target = &judge(&both)[2];
        assert_eq!(target.status, Status::Met);
        assert!(target.reason.contains("6.2 us for each MiB"), "{target:?}");
    }

    #[test]
    fn test_targets_when_the_slope_was_measured_to_less_are_not_met_by_it() {
        let with = |subject| {
            let rows = vec![
                row(Case::AgentSilent, 4096, 2000, 4000),
                row(Case::AgentSilent, 64 << 20, 1_000_000, 1_400_000),
                row(Case::AgentSilent, 1 << 30, 10_000_000, subject),
            ];
            judge(&result(rows, 2))
        };
        let dear = with(14_000_000);
        assert_eq!((dear[2].status, dear[3].status), (Status::Met, Status::NotMet));
        assert!(dear[3].reason.contains("from 4 KiB to 64 MiB"), "{:?}", dear[3]);
        assert_eq!(with(10_500_000)[3].status, Status::Met, "by its own ratio");
    }

    #[test]
    fn test_targets_when_the_device_sleeps_are_judged_by_placement() {
        let placed = |placement, ratio: f64| Row {
            placement,
            wakes: Some(Wakes {
                socket_echo_p50_ns: 20_000,
                wake_p50_ns: 8_000,
                floor_p99_ns: 50_000,
                floor_max_ns: 60_000,
                ratio: Interval {
                    median: ratio,
                    low: ratio - 0.05,
                    high: ratio + 0.05,
                },
            }),
            ..row(Case::AgentLiveParked, 4096, 2000, 40_000)
        };
        let mut result = result(vec![placed(Placement::OneProcessor, 1.54)], 1);
        assert_eq!(statuses(&result)[5], Status::Met, "the better bound counts");
        result.rows = vec![placed(Placement::OneProcessor, 1.56)];
        assert_eq!(statuses(&result)[5], Status::NotMet);
        result.absent.push(Absent {
            placement: Placement::DeviceApart,
            uffd_mode: UffdMode::Wp,
            reason: "one processor only".into(),
        });
        let apart = &judge(&result)[6];
        assert_eq!(
            (apart.status, apart.reason.as_str()),
            (Status::NotApplicable, "one processor only")
        );
    }
}
