//! `tlbridge bench register --verbs` in a guest, on Soft-RoCE of its stock kernel: which rows there are, that the data
//! was right, and that what the kernel cannot do is a reason instead of an error.

use std::time::Duration;

use lab::guest::Guest;
use lab::initramfs::Initramfs;
use lab::kernel::{Kernel, Series};
use serde_json::Value;
use tests::guest::Rig;
use tests::guest_or_skip;
use tests::processes::{Tool, binary};

const SOON: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(240);
const MODES: [&str; 3] = ["on_demand", "prefetched", "implicit"];

/// Soft-RoCE on a network device that goes nowhere. With 9000 bytes its packets are 4 KiB, with 1500 they are 1 KiB.
fn add_rxe(guest: &mut Guest, mtu: u32) {
    let command = format!(
        "modprobe dummy && modprobe rdma_rxe && ip link add dummy7 type dummy && ip link set dummy7 mtu {mtu} up && \
         ip addr add 10.77.0.1/24 dev dummy7 && rdma link add rxe0 type rxe netdev dummy7"
    );
    let made = guest.run(&command, SOON).unwrap();
    assert_eq!(made.code, 0, "{made:?}");
}

fn remove_rxe(guest: &mut Guest) {
    let removed = guest
        .run("rdma link delete rxe0 && ip link delete dummy7", SOON)
        .unwrap();
    assert_eq!(removed.code, 0, "{removed:?}");
}

/// A guest with the RDMA programs and this project's; `None` (and a visible skip) without them.
fn boot(rig: &Rig, kernel: &Kernel, name: &str) -> Option<Guest> {
    if let Err(why) = rig.lab.find_rdma() {
        println!("SKIP: {why:#}");
        return None;
    }
    let mut files = Initramfs::new(&rig.lab).unwrap();
    files.add_rdma(&rig.lab, kernel).unwrap();
    files.add_program(&binary()).unwrap();
    let mut spec = rig.spec(name, &files, &[]);
    spec.kernel.clone_from(&kernel.image);
    Some(Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}")))
}

/// Runs the benchmark in the guest: its JSON.
fn measure(guest: &mut Guest, arguments: &str) -> Value {
    let command = format!("tlbridge bench register --verbs --quick {arguments} --json /tmp/register.json");
    let finished = guest.run(&command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    println!("{}", finished.output);
    assert_eq!(finished.code, 0, "{command}");
    let text = guest.read_file("/tmp/register.json", SOON).unwrap();
    serde_json::from_slice(&text).expect("JSON")
}

/// The row of a mode, an operation and a size.
fn row<'a>(result: &'a Value, mode: &str, operation: &str, size: u64) -> &'a Value {
    let rows = result["rows"].as_array().expect("rows");
    rows.iter()
        .find(|r| r["mode"] == mode && r["operation"] == operation && r["size_bytes"] == size)
        .unwrap_or_else(|| panic!("no row {mode}, {operation}, {size}: {}", result["skipped"]))
}

/// Why a mode was left out altogether, or where its kernel refused to go on.
fn reason<'a>(result: &'a Value, mode: &str) -> Option<&'a str> {
    let skipped = result["skipped"].as_array().expect("skipped");
    skipped
        .iter()
        .find(|s| s["mode"] == mode)
        .and_then(|s| s["reason"].as_str())
}

fn check_pinned(result: &Value) {
    assert_eq!(result["device"]["name"], "rxe0");
    assert_eq!(result["device"]["link_layer"], "ethernet");
    for size in [4096, 65_536, 1 << 20] {
        for operation in [
            "register",
            "register_unpopulated",
            "deregister",
            "first_touch_write",
            "first_touch_read",
            "warm_write",
            "warm_read",
            "invalidate",
            "refault_write",
            "refault_read",
        ] {
            let row = row(result, "pinned", operation, size);
            let number = |key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{key}: {row}"));
            assert!(number("samples") >= 1 && number("p50_ns") > 0, "{row}");
            assert!(
                number("p50_ns") <= number("p99_ns") && number("p99_ns") <= number("max_ns"),
                "{row}"
            );
            assert!(!row["floors"].as_array().unwrap().is_empty(), "{row}");
        }
        for operation in ["cache_miss", "cache_hit", "invalidate", "refault_write"] {
            row(result, "cache", operation, size);
        }
        for operation in [
            "populate",
            "lock",
            "unlock",
            "memcpy",
            "discard",
            "memcpy_refault",
            "noop_ioctl",
        ] {
            row(result, "floor", operation, size);
        }
    }
    let time = |mode, operation| row(result, mode, operation, 1 << 20)["p50_ns"].as_u64().unwrap();
    assert!(
        time("cache", "cache_hit") < time("pinned", "register"),
        "a cache that costs more than what it saves"
    );
    // Three sizes, five transfers each at least.
    let verified = result["verified_bytes"].as_u64().unwrap();
    assert!(verified >= 5 << 20, "{verified} bytes verified");
    assert_eq!(result["wrong_data"].as_array().map(Vec::len), Some(0));
}

#[test]
fn test_register_when_on_soft_roce_of_6_12_measures_pinned_and_says_that_there_is_no_on_demand() {
    let rig = guest_or_skip!();
    let Some(mut guest) = boot(&rig, &rig.kernel, "verbs-stable") else {
        return;
    };
    // Before there is a device: the floors, and the reason for the rest.
    let none = measure(&mut guest, "--size 64K");
    assert!(none["device"].is_null(), "{none}");
    row(&none, "floor", "populate", 65_536);
    let why = none["skipped"][0]["reason"].as_str().unwrap();
    assert!(why.contains("no RDMA devices"), "{why}");

    add_rxe(&mut guest, 1500);
    let result = measure(&mut guest, "");
    check_pinned(&result);
    for mode in MODES {
        let why =
            reason(&result, mode).unwrap_or_else(|| panic!("{mode} is not skipped: {}", result["skipped"]));
        assert!(why.contains("rxe0 has no on-demand paging"), "{why}");
    }

    // A device that is not there, a port that is not there.
    let other = measure(&mut guest, "--device rxe7 --size 4K");
    let why = other["skipped"][0]["reason"].as_str().unwrap();
    assert!(why.contains("no device rxe7; there are: rxe0"), "{why}");
    let other = measure(&mut guest, "--port 9 --size 4K");
    assert!(other["device"].is_null(), "{other}");

    remove_rxe(&mut guest);
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_register_when_on_soft_roce_of_the_backports_kernel_measures_on_demand_paging() {
    let rig = guest_or_skip!();
    let kernel = match rig.lab.find_kernel(Series::Backports) {
        Ok(kernel) => kernel,
        Err(why) => {
            println!("SKIP: {why:#}");
            return;
        }
    };
    let Some(mut guest) = boot(&rig, &kernel, "verbs-backports") else {
        return;
    };
    add_rxe(&mut guest, 9000);
    let result = measure(&mut guest, "");
    check_pinned(&result);
    for mode in MODES {
        if let Some(why) = reason(&result, mode) {
            // Which ones there are is the kernel's business, as long as it says so.
            assert_ne!(mode, "on_demand", "{why}");
            println!("SKIP: {mode}: {why}");
            continue;
        }
        for operation in [
            "register",
            "first_touch_write",
            "warm_write",
            "invalidate",
            "refault_write",
            "deregister",
        ] {
            row(&result, mode, operation, 1 << 20);
        }
    }
    remove_rxe(&mut guest);

    // docs/found.md: with packets that are shorter than a page this kernel's on-demand paging moves wrong data, and
    // the benchmark says so. A kernel that is right is right.
    add_rxe(&mut guest, 1500);
    let command =
        "tlbridge bench register --verbs --quick --size 64K --mode on-demand --mode pinned --json -";
    let finished = guest.run(command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let json = finished
        .output
        .lines()
        .find(|line| line.starts_with('{'))
        .expect("JSON");
    let result: Value = serde_json::from_str(json).expect("JSON");
    let wrong = result["wrong_data"].as_array().unwrap();
    println!("packets of 1 KiB: {} transfers moved wrong data", wrong.len());
    assert_eq!(finished.code, i32::from(!wrong.is_empty()), "{}", finished.output);
    // What this is about was measured, not skipped.
    let measured = row(&result, "on_demand", "first_touch_write", 65_536);
    assert!(measured["samples"].as_u64() >= Some(1), "{measured}");
    let of_on_demand = |text: &Value| text.as_str().is_some_and(|text| text.starts_with("on-demand"));
    assert!(wrong.iter().all(of_on_demand), "{wrong:?}");
    remove_rxe(&mut guest);
    guest.power_off().unwrap();
}

/// Not in a guest: what anybody gets who has no HCA.
#[test]
fn test_register_when_there_is_no_hca_measures_the_floors_and_says_why() {
    let arguments = [
        "bench",
        "register",
        "--verbs",
        "--quick",
        "--size",
        "64K",
        "--device",
        "none-such",
        "--json",
        "-",
    ];
    let ended = Tool::start(&arguments).wait(LIMIT).expect("it does not end");
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let result: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert!(result["device"].is_null(), "{result}");
    row(&result, "floor", "memcpy", 65_536);
    let why = result["skipped"][0]["reason"].as_str().unwrap();
    // By what this machine has: no library, no kernel modules, no device, another device.
    assert!(
        ["libibverbs.so.1", "RDMA devices", "no device none-such"]
            .iter()
            .any(|part| why.contains(part)),
        "{why}"
    );
    assert!(ended.stderr.contains("skipped: all modes"), "{}", ended.stderr);
}
