//! rdma-core's own tests on our HCA, the kernel of the backports with it, and two guests that reach each other through
//! it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lab::guest::Guest;
use lab::kernel::Series;
use tests::guest::{Device, Rig};
use tests::guest_or_skip;

const SOON: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(240);

/// IP over InfiniBand with this address. The port may have got its LID a moment ago.
const IPOIB: &str = "modprobe ib_ipoib && ip addr add 10.9.8.$HOST/24 dev ib0 && ip link set ib0 up";

/// A command that must succeed; its output.
fn run(guest: &mut Guest, command: &str, limit: Duration) -> String {
    let finished = guest
        .run(command, limit)
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    assert_eq!(finished.code, 0, "{command}: {}", finished.output);
    finished.output
}

/// Everything in the soak, which sets this for guests.
fn whole() -> bool {
    std::env::var_os("TLBRIDGE_GUEST_ROUNDS").is_some()
}

/// The lines that the suite's runner prints, by word.
fn results(output: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut by_word: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in output.lines() {
        if let Some((word, rest)) = line.strip_prefix("result ").and_then(|l| l.split_once(' ')) {
            by_word.entry(word).or_default().push(rest);
        }
    }
    by_word
}

/// What the suite's run came to, which has to be good: how many have passed.
fn passed(output: &str) -> usize {
    let by_word = results(output);
    let bad: Vec<_> = output
        .lines()
        .filter(|line| {
            let result = line.starts_with("result ");
            line.starts_with("  |")
                || (result && !["result ok ", "result skip "].iter().any(|w| line.starts_with(w)))
        })
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
    // "SECONDS NAME: REASON"
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for line in by_word.get("skip").into_iter().flatten() {
        *reasons
            .entry(line.split_once(": ").map_or(*line, |(_, why)| why))
            .or_default() += 1;
    }
    for (why, count) in reasons {
        println!("{count:4} skipped: {why}");
    }
    println!("{}", output.lines().last().unwrap_or_default());
    by_word.get("ok").map_or(0, Vec::len)
}

#[test]
fn test_own_tests_of_rdma_core_when_run_on_the_hca_pass() {
    let rig = guest_or_skip!();
    let (files, image) = match rig.image_initramfs() {
        Ok(found) => found,
        Err(why) => {
            println!("SKIP: {why}");
            return;
        }
    };
    let device = Device::mlx5(&[]);
    let mut spec = rig.spec("mlx5-suite", &files, &[&device]);
    spec.disks.push(image);
    let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}"));
    // Those of rdma_cm want an address on the port, some others large pages.
    run(
        &mut guest,
        &format!("HOST=1; {IPOIB} && echo 24 >/proc/sys/vm/nr_hugepages"),
        SOON,
    );
    let suite = "pyverbs_suite.py --dev mlx5_0 --gid 0 --limit 120";
    let of = |guest: &mut Guest, what: &str| {
        let finished = guest
            .run(&format!("{suite} {what}"), LONG * 6)
            .unwrap_or_else(|e| panic!("{e}"));
        passed(&finished.output)
    };
    if whole() {
        let ok = of(&mut guest, "");
        assert!(ok >= 143, "{ok} have passed");
        // Keys that come and go with their pages.
        of(&mut guest, "--rounds 50 test_odp_implicit");
    } else {
        let ok = of(
            &mut guest,
            "test_mr. test_qp.QPTest test_cq test_srq test_atomic tests.test_rdmacm. test_odp_implicit_rc test_odp_xrc test_mlx5_cq",
        );
        assert!(ok >= SHORT, "{ok} have passed");
    }
    guest.power_off().unwrap_or_else(|e| panic!("{e}"));
}

/// How many of the short form pass.
const SHORT: usize = 60;

fn boot(rig: &Rig, test: &str, device: &Device) -> Option<Guest> {
    match rig.rdma_initramfs() {
        Ok(files) => Some(
            rig.boot(test, &files, &[device])
                .unwrap_or_else(|error| panic!("{error}")),
        ),
        Err(why) => {
            println!("SKIP: {why}");
            None
        }
    }
}

#[test]
fn test_driver_of_the_backports_when_it_binds_passes_data() {
    let mut rig = guest_or_skip!();
    match rig.lab.find_kernel(Series::Backports) {
        Ok(kernel) => rig.kernel = kernel,
        Err(why) => {
            println!("SKIP: {why:#}");
            return;
        }
    }
    let device = Device::mlx5(&[]);
    let Some(mut guest) = boot(&rig, "mlx5-backports", &device) else {
        return;
    };
    let info = run(&mut guest, "ibv_devinfo -v", SOON);
    assert!(
        info.contains("PORT_ACTIVE") && info.contains("ODP_SUPPORT"),
        "{info}"
    );
    for more in ["-c", "-c -e -o"] {
        serve(&mut guest, &format!("ibv_rc_pingpong {more}"));
        let said = run(&mut guest, &format!("ibv_rc_pingpong {more} localhost"), LONG);
        assert!(said.contains("1000 iters in"), "{said}");
        served(&mut guest);
    }
    guest.power_off().unwrap_or_else(|e| panic!("{e}"));
}

/// Starts a program that listens on TCP port 18515, and waits until it does.
fn serve(guest: &mut Guest, program: &str) {
    start(guest, program);
    run(
        guest,
        "i=0; until grep -q ':4853 .* 0A ' /proc/net/tcp /proc/net/tcp6; do i=$((i+1)); [ $i -lt 600 ] || exit 1; \
         usleep 100000; done",
        LONG,
    );
}

/// Starts a program, whose end [`served`] waits for.
fn start(guest: &mut Guest, program: &str) {
    run(
        guest,
        &format!(
            "rm -f /tmp/code; ({program}; echo $? >/tmp/code.new; mv /tmp/code.new /tmp/code) </dev/null >/tmp/said 2>&1 &"
        ),
        SOON,
    );
}

/// What the program said that was started; it has to succeed.
fn served(guest: &mut Guest) -> String {
    run(
        guest,
        "i=0; until [ -e /tmp/code ]; do i=$((i+1)); [ $i -lt 1200 ] || { cat /tmp/said; exit 99; }; usleep 100000; \
         done; cat /tmp/said; exit $(cat /tmp/code)",
        LONG,
    )
}

#[test]
fn test_two_guests_when_on_one_fabric_reach_each_other_until_one_is_killed() {
    let rig = guest_or_skip!();
    let place = tempfile::tempdir().unwrap();
    let url = format!("unix:{}", place.path().join("fabric.sock").display());
    let mut devices = [
        Device::mlx5(&["--fabric", &format!("listen:{url}")]),
        Device::mlx5(&["--fabric", &url]),
    ];
    let mut guests = Vec::new();
    for (number, device) in devices.iter().enumerate() {
        let Some(mut guest) = boot(&rig, &format!("mlx5-two-{number}"), device) else {
            return;
        };
        run(&mut guest, &format!("HOST={}; {IPOIB}", number + 1), SOON);
        guests.push(guest);
    }
    let [server, client] = &mut guests[..] else {
        unreachable!("two devices");
    };
    // IP: the first ones may be lost while the ports join their groups.
    let pings = run(
        client,
        "i=0; until ping -c 1 -W 1 10.9.8.1; do i=$((i+1)); [ $i -lt 60 ] || exit 1; done; ping -c 5 -s 4000 10.9.8.1",
        LONG,
    );
    assert!(pings.contains("5 packets received"), "{pings}");
    // The programs find each other by IP over InfiniBand. -c: contents are checked.
    for program in [
        "ibv_rc_pingpong -c",
        "ibv_uc_pingpong -c -n 100",
        "ibv_ud_pingpong -c -n 100",
    ] {
        serve(server, program);
        let said = run(client, &format!("{program} 10.9.8.1"), LONG);
        assert!(said.contains("iters in"), "{program}: {said}");
        served(server);
    }
    // Connections by rdma_cm, with data that the client compares, and writes; TCP.
    for (listens, connects) in [
        ("rping -s -a 10.9.8.1 -C 20", "rping -c -a 10.9.8.1 -C 20 -V"),
        (
            "ib_write_bw -R -s 65536 -n 200",
            "ib_write_bw -R -s 65536 -n 200 10.9.8.1",
        ),
        ("iperf3 -s -1", "iperf3 -c 10.9.8.1 -n 4M"),
    ] {
        start(server, listens);
        // (It says nothing that the kernel could be asked for when it listens.)
        let script =
            format!("i=0; until {connects}; do i=$((i+1)); [ $i -lt 60 ] || exit 1; usleep 500000; done");
        run(client, &script, LONG);
        served(server);
    }
    // One of them ends in the middle: the other one is told, and goes on.
    // (Always with writes under way: a ping-pong may be waiting for the other side only.)
    let endless = "ib_write_bw -N -s 65536 -n 1000000";
    serve(server, endless);
    let before = completions(&mut devices[1]);
    start(client, &format!("{endless} 10.9.8.1"));
    let begin = Instant::now();
    while completions(&mut devices[1]) < before + 1000 {
        assert!(begin.elapsed() < LONG, "nothing passes");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(guests.remove(0));
    let client = &mut guests[0];
    let said = run(
        client,
        "i=0; until [ -e /tmp/code ]; do i=$((i+1)); [ $i -lt 1200 ] || break; usleep 100000; done; \
         cat /tmp/said; ! grep -qx 0 /tmp/code",
        LONG,
    );
    // IBV_WC_RETRY_EXC_ERR.
    assert!(said.contains("Failed status 12"), "{said}");
    serve(client, "ibv_rc_pingpong -c");
    run(client, "ibv_rc_pingpong -c localhost", LONG);
    served(client);
    for guest in guests {
        guest.power_off().unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Completions that a device has written.
fn completions(device: &mut Device) -> u64 {
    let stats = device.stats();
    stats["completions"]
        .as_u64()
        .unwrap_or_else(|| panic!("no number of completions: {stats}"))
}
