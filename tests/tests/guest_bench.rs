//! `tlbridge bench invalidate --guest` as a user runs it.

use std::time::Duration;

use serde_json::Value;
use tests::guest_or_skip;
use tests::processes::Tool;

/// Three boots, and the sandbox's part in between.
const LIMIT: Duration = Duration::from_secs(600);

fn figure(value: &Value, pointer: &str) -> f64 {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

#[test]
fn test_bench_invalidate_when_in_a_guest_has_both_worlds_in_every_doorbell_mode() {
    let rig = guest_or_skip!();
    if let Err(why) = rig.gru_modules() {
        println!("SKIP: {why}");
        return;
    }
    let ended = Tool::start(&["bench", "invalidate", "--guest", "--quick", "--json", "-"])
        .wait(LIMIT)
        .expect("the benchmark does not end");
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let json = ended.json();
    let list = |value: &Value, key: &str| {
        value[key]
            .as_array()
            .unwrap_or_else(|| panic!("no {key}"))
            .clone()
    };
    for doorbell in ["trap", "bell", "poll"] {
        let of = |key: &str| -> Vec<Value> {
            let mut rows = list(&json, key);
            rows.retain(|row| row["doorbell"] == doorbell);
            rows
        };
        let sandbox = of("sandbox");
        for case in ["agent_silent", "agent_live_parked"] {
            assert!(
                sandbox.iter().any(|row| row["case"] == case),
                "{doorbell}: {case}"
            );
        }
        let guests = of("guests");
        let [guest] = &guests[..] else {
            panic!("{doorbell}: {} guests", guests.len())
        };
        let rows = list(guest, "rows");
        for case in ["munmap-nothing-cached", "munmap-live", "madvise-live"] {
            let row = rows.iter().find(|row| row["case"] == case);
            let row = row.unwrap_or_else(|| panic!("{doorbell}: no {case}"));
            // The device is told on the way, which a call that nobody watches does not wait for.
            assert!(figure(row, "/ratio/median") > 1.0, "{doorbell}: {row}");
            assert!(figure(row, "/tgh_invalidate/count") >= 20.0, "{doorbell}: {row}");
            assert!(
                figure(row, "/tgh_invalidate/average_ns") > 0.0,
                "{doorbell}: {row}"
            );
            println!(
                "{doorbell}: {case}: {} of the floor, tgh_invalidate {} ns",
                row["ratio"]["median"], row["tgh_invalidate"]["average_ns"]
            );
        }
        // Both sides count every TLBINV since the driver was loaded.
        assert!(figure(guest, "/flushes_by_device") > 0.0, "{doorbell}");
        assert_eq!(
            guest["flushes_by_device"], guest["flushes_by_driver"],
            "{doorbell}"
        );
        let writes = if doorbell == "trap" { "posted" } else { "answered" };
        assert_eq!(
            guest["register_writes"], writes,
            "{doorbell}: {}",
            guest["accesses"]
        );
    }
}
