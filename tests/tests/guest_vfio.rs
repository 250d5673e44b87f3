//! The whole bridge inside a guest: daemon, agent, userfaultfd and the demo's oracles, on a device that QEMU has
//! attached and that the guest's own vfio-pci hands to the daemon, behind a virtual IOMMU.

use std::time::Duration;

use lab::guest::Guest;
use serde_json::Value;
use tests::guest::{Device, Rig};
use tests::guest_or_skip;
use tests::processes::binary;

const SOON: Duration = Duration::from_secs(30);
const MINUTE: Duration = Duration::from_secs(60);
/// Finds the function of the GRU.
const FIND: &str = "for d in /sys/bus/pci/devices/*; do \
                    if [ $(cat $d/vendor):$(cat $d/device) = 0x10a9:0x4752 ]; then echo ${d##*/}; fi; done";

/// A guest with vfio-pci and tlbridge, behind an IOMMU; with the function's address. `None` (and a visible skip)
/// without the modules.
fn boot(rig: &Rig, name: &str, device: &Device, iommu: bool) -> Option<(Guest, String)> {
    let mut files = rig.initramfs();
    let modules = match rig.kernel.with_dependencies(&["vfio-pci", "vfio_iommu_type1"]) {
        Ok(modules) => modules,
        Err(why) => {
            println!("SKIP: {why:#}");
            return None;
        }
    };
    for module in modules {
        files.add_module(&rig.lab, &module).unwrap();
    }
    files.add_program(&binary()).unwrap();
    let mut spec = rig.spec(name, &files, &[device]);
    spec.iommu = iommu;
    let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}"));
    let found = guest.run(FIND, SOON).unwrap();
    let address = found.output.trim().to_owned();
    assert!(!address.is_empty(), "no GRU in the guest");
    Some((guest, address))
}

fn bind(guest: &mut Guest, address: &str) {
    let command = format!(
        "echo vfio-pci >/sys/bus/pci/devices/{address}/driver_override && echo {address} >/sys/bus/pci/drivers_probe"
    );
    let bound = guest.run(&command, SOON).unwrap();
    assert_eq!(bound.code, 0, "{}", bound.output);
}

/// Runs the demo in the guest; its exit code and its result.
fn demo(guest: &mut Guest, address: &str, more: &str) -> (i32, Value) {
    let command = format!(
        "tlbridge demo --device vfio:{address} --seconds 8 --memory-mib 16 --json {more} 2>/tmp/said >/tmp/result; \
         code=$?; [ -s /tmp/result ] && cat /tmp/result || cat /tmp/said; exit $code"
    );
    let finished = guest.run(&command, 3 * MINUTE).unwrap_or_else(|e| panic!("{e}"));
    let result =
        serde_json::from_str(&finished.output).unwrap_or_else(|e| panic!("{e}: {}", finished.output));
    (finished.code, result)
}

fn figure(value: &Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

#[test]
fn test_demo_when_in_a_guest_on_vfio_finds_nothing_stale_in_every_doorbell_mode() {
    let rig = guest_or_skip!();
    for doorbell in ["trap", "bell", "poll"] {
        let device = Device::gru(&["--doorbell", doorbell]);
        let Some((mut guest, address)) = boot(&rig, &format!("vfio-{doorbell}"), &device, true) else {
            return;
        };
        bind(&mut guest, &address);
        let (code, result) = demo(&mut guest, &address, "");
        assert_eq!(code, 0, "{doorbell}: {result}");
        let held = |name: &str| figure(&result, &format!("/host/device/held_pages/{name}"));
        println!(
            "{doorbell}: {} operations, {} bytes verified, {} invalidations, {} faults served; pages mapped {}, dropped \
             before a discard {}",
            figure(&result, "/operations"),
            figure(&result, "/verified_bytes"),
            figure(&result, "/invalidations"),
            figure(&result, "/faults_served"),
            held("mapped"),
            held("dropped"),
        );
        assert_eq!(figure(&result, "/stale_accesses"), 0, "{doorbell}");
        assert_eq!(figure(&result, "/wrong_results"), 0, "{doorbell}");
        // Trapped and under emulation an instruction takes a tenth of a second.
        assert!(figure(&result, "/operations") > 20, "{doorbell}: {result}");
        assert!(figure(&result, "/faults_served") > 20, "{doorbell}: {result}");
        assert!(held("mapped") > 0 && held("dropped") > 0, "{doorbell}: {result}");
        let complaints = guest.power_off().unwrap();
        assert!(complaints.is_empty(), "{doorbell}: {complaints:?}");
    }
}

#[test]
fn test_demo_when_discarded_pages_stay_with_the_device_finds_what_it_does_with_them() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "bell"]);
    let Some((mut guest, address)) = boot(&rig, "vfio-held", &device, true) else {
        return;
    };
    bind(&mut guest, &address);
    let (code, result) = demo(&mut guest, &address, "--break held-pages");
    let found = figure(&result, "/stale_accesses") + figure(&result, "/wrong_results");
    println!(
        "--break held-pages: code {code}, {found} stale or wrong: {}",
        result["oracles"]
    );
    assert!(code != 0 && found > 0, "not caught: {result}");
    guest.power_off().unwrap();
}

#[test]
fn test_host_when_the_device_is_not_ready_for_vfio_says_what_to_do() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    for iommu in [false, true] {
        let Some((mut guest, address)) = boot(&rig, &format!("vfio-errors-{iommu}"), &device, iommu) else {
            return;
        };
        let mut refused = |device: &str, reason: &str| {
            let command = format!("tlbridge host --socket /tmp/host.sock --device vfio:{device} 2>&1");
            let finished = guest.run(&command, SOON).unwrap();
            assert_eq!(finished.code, 1, "{}", finished.output);
            assert!(finished.output.contains(reason), "{reason}: {}", finished.output);
        };
        refused("05.0", "is not a PCI address");
        refused("0000:77:00.0", "there is no PCI device 0000:77:00.0");
        if iommu {
            refused(&address, "driver_override");
        } else {
            refused(&address, "has no IOMMU group");
        }
        guest.power_off().unwrap();
    }
}
