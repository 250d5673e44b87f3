//! The kernel driver's counters (/proc/sgi_uv/gru) beside the device's own. Both count the same events on their
//! side of the registers, so between two moments at which nothing is under way they must agree exactly.
//!
//! What the driver counts differently:
//! * `tlb_preload_page` has the preloads that were accepted; the commands, refused ones among them, are
//!   `tfh_write_only` of `mcs_statistics`.
//! * `tgh_invalidate` of `mcs_statistics` has all TLBINV; of these `flush_tlb_gru_tgh` are invalidations, and each
//!   `asid_next` is one of a whole TLB.
//! * `call_os` counts calls. A user may call for a miss that is answered already, or be told to call again, and a
//!   miss that came by interrupt may be passed on to its user: nothing of the device's has to be the same.
//! * A miss whose context is unloaded meanwhile is never answered; the instruction misses again when it is loaded.

use std::collections::BTreeMap;
use std::time::Duration;

use lab::guest::Guest;
use serde_json::Value;

use super::Device;

/// Both sides at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Of the driver: `statistics`, and the counts of `mcs_statistics`.
    pub driver: BTreeMap<String, u64>,
    /// Of the device: the plain numbers of its statistics.
    pub device: BTreeMap<String, u64>,
}

/// One rule: sums of the device's counters and of the driver's that must be the same.
struct Rule {
    what: &'static str,
    device: &'static [&'static str],
    driver: &'static [&'static str],
    /// Device's counters to be added on the driver's side.
    but: &'static [&'static str],
}

const RULES: [Rule; 5] = [
    Rule {
        what: "TLBINV executed",
        device: &["tgh_purges"],
        driver: &["tgh_invalidate"],
        but: &[],
    },
    Rule {
        what: "TLBINV by reason",
        device: &["tgh_purges"],
        driver: &["flush_tlb_gru_tgh", "asid_next"],
        but: &[],
    },
    Rule {
        what: "dropins: entered, or refused by the kill bit",
        device: &["fills", "fills_killed"],
        driver: &["tlb_dropin", "tfh_write_only"],
        but: &[],
    },
    Rule {
        what: "misses that came by interrupt",
        device: &["misses_in_fault_map"],
        driver: &["intr_tfh"],
        but: &[],
    },
    Rule {
        what: "misses: answered by a dropin, answered by an exception, or withdrawn with their context",
        device: &["misses"],
        driver: &["tlb_dropin", "tlb_dropin_fail_invalid"],
        but: &["misses_withdrawn"],
    },
];

impl Counters {
    /// Reads both. Nothing may be under way.
    ///
    /// # Panics
    /// When one side does not answer.
    #[must_use]
    pub fn read(guest: &mut Guest, device: &mut Device) -> Self {
        let said = guest
            .run("gru-guest statistics", Duration::from_secs(30))
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(said.code, 0, "{}", said.output);
        Self {
            driver: driver(&said.output),
            device: plain_numbers(&device.stats()),
        }
    }

    /// What has been counted since then.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let less = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| {
            now.iter()
                .map(|(name, n)| (name.clone(), n.wrapping_sub(then.get(name).copied().unwrap_or(0))))
                .collect()
        };
        Self {
            driver: less(&self.driver, &before.driver),
            device: less(&self.device, &before.device),
        }
    }

    /// Where the sides contradict each other. Empty: nowhere.
    ///
    /// # Panics
    /// When a counter that a rule needs is missing.
    #[must_use]
    pub fn contradictions(&self) -> Vec<String> {
        let of = |side: &BTreeMap<String, u64>, names: &[&str]| -> u64 {
            names
                .iter()
                .map(|name| *side.get(*name).unwrap_or_else(|| panic!("nobody counts {name}")))
                .sum()
        };
        let mut found: Vec<_> = RULES
            .iter()
            .filter_map(|rule| {
                let device = of(&self.device, rule.device);
                let driver = of(&self.driver, rule.driver) + of(&self.device, rule.but);
                (device != driver).then(|| {
                    format!(
                        "{}: {device} by the device ({}), {driver} by the driver ({})",
                        rule.what,
                        rule.device.join(" + "),
                        [rule.driver, rule.but].concat().join(" + "),
                    )
                })
            })
            .collect();
        let accepted = self.driver["tlb_preload_page"];
        if accepted > of(&self.device, &["fills"]) {
            found.push(format!(
                "{accepted} preloads accepted for the driver, fewer fills by the device"
            ));
        }
        let refused = self.driver["tfh_write_only"].wrapping_sub(accepted);
        if refused > of(&self.device, &["fills_killed"]) {
            found.push(format!(
                "{refused} preloads refused for the driver, fewer fills killed by the device"
            ));
        }
        found
    }
}

/// Lines `statistic NAME VALUE` and `operation NAME COUNT ...` of `gru-guest statistics`.
fn driver(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            matches!(words.next()?, "statistic" | "operation").then_some(())?;
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        })
        .collect()
}

fn plain_numbers(stats: &Value) -> BTreeMap<String, u64> {
    stats
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters() -> Counters {
        let side = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        Counters {
            driver: side(&[
                ("tgh_invalidate", 9),
                ("flush_tlb_gru_tgh", 8),
                ("asid_next", 1),
                ("tlb_dropin", 20),
                ("tfh_write_only", 5),
                ("tlb_preload_page", 4),
                ("intr_tfh", 15),
                ("tlb_dropin_fail_invalid", 2),
            ]),
            device: side(&[
                ("tgh_purges", 9),
                ("fills", 22),
                ("fills_killed", 3),
                ("misses", 25),
                ("misses_in_fault_map", 15),
                ("misses_withdrawn", 3),
            ]),
        }
    }

    #[test]
    fn test_counters_when_they_agree_have_no_contradiction() {
        assert_eq!(counters().contradictions(), Vec::<String>::new());
    }

    #[test]
    fn test_counters_when_one_is_off_by_one_name_the_rule() {
        for (name, says) in [
            ("tgh_purges", "TLBINV executed"),
            ("fills", "dropins"),
            ("fills_killed", "dropins"),
            ("misses", "answered by a dropin"),
            ("misses_in_fault_map", "by interrupt"),
            ("misses_withdrawn", "withdrawn"),
        ] {
            let mut wrong = counters();
            *wrong.device.get_mut(name).unwrap() += 1;
            let found = wrong.contradictions().join("; ");
            assert!(found.contains(says), "{name}: {found}");
        }
        for name in [
            "tgh_invalidate",
            "asid_next",
            "tlb_dropin",
            "tfh_write_only",
            "intr_tfh",
        ] {
            let mut wrong = counters();
            *wrong.driver.get_mut(name).unwrap() += 1;
            assert!(!wrong.contradictions().is_empty(), "{name}");
        }
    }

    #[test]
    fn test_counters_when_printed_by_the_guest_are_read() {
        let read =
            driver("statistic tlb_dropin 7\noperation tgh_invalidate 3 27000 90000\nverdict: x PASS\n");
        assert_eq!(
            read,
            BTreeMap::from([("tlb_dropin".into(), 7), ("tgh_invalidate".into(), 3)])
        );
    }
}
