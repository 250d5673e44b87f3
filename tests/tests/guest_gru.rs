//! The kernel's own sgi-gru driver, compiled without a change, on our device. What runs in the guest is
//! `gru-guest` (tests/guest); here are the device's side and the verdicts.

use std::time::Duration;

use lab::guest::Guest;
use tests::guest::{Device, Rig};
use tests::guest_or_skip;
use tests::processes::binary;

const SOON: Duration = Duration::from_secs(30);

/// A guest in which the driver is loaded; `None` (and a visible skip) without its modules.
fn boot(rig: &Rig, name: &str, device: &Device) -> Option<Guest> {
    let modules = match rig.gru_modules() {
        Ok(modules) => modules,
        Err(why) => {
            println!("SKIP: {why}");
            return None;
        }
    };
    let mut files = rig.initramfs();
    for module in modules {
        files.add_module(&rig.lab, &module).unwrap();
    }
    let program = binary().with_file_name("gru-guest");
    assert!(
        program.exists(),
        "{} is not there: cargo build --workspace",
        program.display()
    );
    files.add_program(&program).unwrap();
    Some(
        rig.boot(name, &files, &[device])
            .unwrap_or_else(|e| panic!("{e}")),
    )
}

/// Runs one of gru-guest's tests to its end.
fn check(guest: &mut Guest, test: &str, limit: Duration) {
    let finished = guest
        .run(&format!("gru-guest {test}"), limit)
        .unwrap_or_else(|e| panic!("{test}: {e}"));
    print!("{}", finished.output);
    assert_eq!(finished.code, 0, "{test}: {}", finished.output);
    assert!(finished.output.contains("PASS"), "{test}: {}", finished.output);
}

#[test]
fn test_driver_when_loaded_twice_passes_its_own_tests() {
    let rig = guest_or_skip!();
    let device = Device::gru(&["--doorbell", "trap"]);
    let Some(mut guest) = boot(&rig, "gru-ktest", &device) else {
        return;
    };
    assert_eq!(guest.run("ls /proc/sgi_uv/gru/statistics", SOON).unwrap().code, 0);
    check(&mut guest, "ktest --rounds 3", Duration::from_secs(120));
    let again = guest
        .run("rmmod gru && rmmod tlbridge_uv && insmod /lab/modules/tlbridge_uv.ko && insmod /lab/modules/gru.ko", SOON)
        .unwrap();
    assert_eq!(again.code, 0, "{}", again.output);
    check(&mut guest, "ktest --rounds 1", Duration::from_secs(120));
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}
