//! The stock mlx5 driver and rdma-core on our HCA, in a guest.

use std::time::Duration;

use lab::guest::Guest;
use tests::guest::Device;
use tests::guest_or_skip;

const SOON: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(120);

/// A guest with an HCA, or the reason why there is none.
macro_rules! hca_guest {
    ($test:literal, $device:expr) => {{
        let rig = guest_or_skip!();
        let files = match rig.rdma_initramfs() {
            Ok(files) => files,
            Err(why) => {
                println!("SKIP: {why}");
                return;
            }
        };
        rig.boot($test, &files, &[$device])
            .unwrap_or_else(|error| panic!("{error}"))
    }};
}

/// Runs a command that has to succeed; its output.
fn run(guest: &mut Guest, command: &str, limit: Duration) -> String {
    let ended = guest
        .run(command, limit)
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    assert_eq!(ended.code, 0, "{command}: {ended:?}");
    ended.output
}

/// What the kernel says of the driver, but for what it says of every card in this kind of slot.
fn complaints(guest: &mut Guest) -> Vec<String> {
    let ended = guest.run("dmesg | grep -iE 'mlx5|infiniband'", SOON).unwrap();
    ended
        .output
        .lines()
        .filter(|line| {
            ![
                "firmware version",
                "PCIe bandwidth",
                "PTM is not supported",
                // The vendor's debug window in config space: cards that are virtual functions have none, either.
                "vendor specific ID",
            ]
            .iter()
            .any(|harmless| line.contains(harmless))
        })
        .map(str::to_owned)
        .collect()
}

/// Both sides of a program in the guest: the second starts when the first listens on its port, 18515. Its output.
fn both_sides(guest: &mut Guest, program: &str) -> String {
    let script = format!(
        "{program} >/tmp/server 2>&1 & server=$!; i=0; \
         while ! grep -q ':4853 .* 0A ' /proc/net/tcp /proc/net/tcp6; do \
         i=$((i+1)); [ $i -lt 200 ] || break; usleep 100000; done; \
         {program} localhost || {{ cat /tmp/server; exit 1; }}; wait $server"
    );
    run(guest, &script, LONG)
}

fn pingpong(guest: &mut Guest, program: &str, success: &str) {
    let output = both_sides(guest, program);
    assert!(output.contains(success), "{program}: {output}");
}

#[test]
fn test_stock_driver_when_it_binds_shows_an_active_port_and_complains_of_nothing() {
    for function in ["pf", "vf"] {
        let device = Device::mlx5(&["--function", function]);
        let mut guest = hca_guest!("mlx5-bind", &device);
        let info = run(&mut guest, "ibv_devinfo -v", SOON);
        for expected in ["PORT_ACTIVE", "link_layer:\t\tInfiniBand", "LINK_UP"] {
            assert!(
                info.contains(expected),
                "{function}: {expected} is missing in {info}"
            );
        }
        let said = complaints(&mut guest);
        assert!(said.is_empty(), "{function}: {said:#?}");
        let complaints = guest.power_off().unwrap();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
}

#[test]
fn test_pingpongs_when_run_in_the_guest_verify_their_data() {
    let device = Device::mlx5(&[]);
    let mut guest = hca_guest!("mlx5-pingpong", &device);
    // -c: contents are checked.
    for program in [
        "ibv_rc_pingpong -c",
        "ibv_rc_pingpong -c -e",
        "ibv_rc_pingpong -c -s 1048576 -n 50",
        "ibv_rc_pingpong -c -g 0",
        "ibv_uc_pingpong -c",
        "ibv_ud_pingpong -c",
        "ibv_srq_pingpong -c",
    ] {
        pingpong(&mut guest, program, "iters in");
    }
    // (Of this one -c is the number of clients.)
    for program in ["ibv_xsrq_pingpong", "ibv_xsrq_pingpong -e -n 200 -s 65536 -g 0"] {
        pingpong(&mut guest, program, "success");
    }
    let said = complaints(&mut guest);
    assert!(said.is_empty(), "{said:#?}");
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_bandwidth_of_writes_when_measured_by_perftest_is_a_number() {
    let device = Device::mlx5(&[]);
    let mut guest = hca_guest!("mlx5-perftest", &device);
    let output = both_sides(&mut guest, "ib_write_bw -d mlx5_0 -F -s 65536 -n 200");
    // Bytes, iterations, peak, average, messages per microsecond; it does not look at the data, as the ping-pongs do.
    let row = output
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|row| row.starts_with(&["65536", "200"]))
        .unwrap_or_else(|| panic!("no row of 200 messages: {output}"));
    let average: f64 = row[3].parse().unwrap_or_else(|e| panic!("{row:?}: {e}"));
    assert!(average > 0.0, "{output}");
    println!("ib_write_bw: {average} MB/s");
    let said = complaints(&mut guest);
    assert!(said.is_empty(), "{said:#?}");
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_driver_when_reloaded_binds_again() {
    let device = Device::mlx5(&[]);
    let mut guest = hca_guest!("mlx5-reload", &device);
    for _ in 0..3 {
        run(
            &mut guest,
            "rmmod mlx5_ib && rmmod mlx5_core && modprobe mlx5_core && modprobe mlx5_ib && ibv_devinfo | grep PORT_ACTIVE",
            LONG,
        );
    }
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[test]
fn test_on_demand_paging_when_used_in_the_guest_verifies_its_data() {
    let device = Device::mlx5(&[]);
    let mut guest = hca_guest!("mlx5-odp", &device);
    let info = run(&mut guest, "ibv_devinfo -v", SOON);
    assert!(info.contains("ODP_SUPPORT"), "{info}");
    for program in [
        "ibv_rc_pingpong -c -o",
        "ibv_rc_pingpong -c -o -s 1048576 -n 20",
        "ibv_srq_pingpong -c -o",
        // All of the address space under one key.
        "ibv_rc_pingpong -c -O",
    ] {
        pingpong(&mut guest, program, "iters in");
    }
    let said = complaints(&mut guest);
    assert!(said.is_empty(), "{said:#?}");
    let complaints = guest.power_off().unwrap();
    assert!(complaints.is_empty(), "{complaints:?}");
}
