//! Guests with RDMA programs: that everything is there and works is shown with the kernel's own software
//! device, rdma_rxe, on both of Debian's kernels; rdma-core's own tests run from the root image.

use std::collections::BTreeMap;
use std::time::Duration;

use lab::guest::Guest;
use lab::kernel::Series;
use tests::guest::Rig;
use tests::guest_or_skip;

const SOON: Duration = Duration::from_secs(20);
/// The stock modules are a hundred, and the suite imports a lot of Python.
const LONG: Duration = Duration::from_secs(120);

/// What a guest takes to have rdma_rxe on a network device without a wire.
const RXE: &str = "modprobe rdma_rxe && modprobe dummy numdummies=0 && ip link add d0 type dummy \
                   && ip addr add 10.9.9.1/24 dev d0 && ip link set d0 up && rdma link add rxe0 type rxe netdev d0";

/// A command that must succeed; its output.
fn run(guest: &mut Guest, command: &str, limit: Duration) -> String {
    let finished = guest.run(command, limit).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(finished.code, 0, "{command}: {}", finished.output);
    finished.output
}

/// Both ends of a pingpong; what the client says.
fn pingpong(guest: &mut Guest, arguments: &str) -> String {
    // The client tries until the server listens.
    let command = format!(
        "ibv_rc_pingpong -d rxe0 -g 1 -n 50 {arguments} >/tmp/server 2>&1 & server=$!; \
         until ibv_rc_pingpong -d rxe0 -g 1 -n 50 {arguments} 127.0.0.1 >/tmp/client 2>&1; do \
         grep -q \"Couldn't connect\" /tmp/client || break; sleep 0.1; done; \
         cat /tmp/client; wait $server && cat /tmp/server"
    );
    run(guest, &command, LONG)
}

fn rxe_works(rig: &Rig, name: &str) -> String {
    let files = match rig.rdma_initramfs() {
        Ok(files) => files,
        Err(why) => {
            println!("SKIP: {why}");
            return String::new();
        }
    };
    let mut guest = rig.boot(name, &files, &[]).unwrap_or_else(|e| panic!("{e}"));
    let version = run(&mut guest, "uname -r", SOON);
    let modules = run(&mut guest, "lsmod", SOON);
    for module in lab::rdma::MODULES {
        assert!(modules.contains(module), "{module} is not loaded:\n{modules}");
    }
    // Nothing is there to drive yet.
    assert!(run(&mut guest, "ibv_devices", SOON).lines().count() <= 2);
    run(&mut guest, RXE, LONG);
    let devices = run(&mut guest, "ibv_devinfo -d rxe0", SOON);
    assert!(devices.contains("PORT_ACTIVE"), "{devices}");
    // Fifty messages of 4 KiB in each direction.
    let output = pingpong(&mut guest, "-c");
    assert_eq!(output.matches("409600 bytes in").count(), 2, "{output}");
    let odp = run(&mut guest, "ibv_devinfo -v -d rxe0", SOON).contains("ODP_SUPPORT");
    if odp {
        let output = pingpong(&mut guest, "-c -o");
        assert_eq!(output.matches("409600 bytes in").count(), 2, "{output}");
    }
    println!(
        "Linux {}: rxe {} on-demand paging",
        version.trim(),
        if odp { "has" } else { "has no" }
    );
    let complaints = guest.power_off().unwrap_or_else(|e| panic!("{e}"));
    assert!(complaints.is_empty(), "{complaints:?}");
    version
}

#[test]
fn test_rdma_programs_when_in_a_guest_run_on_rxe() {
    let rig = guest_or_skip!();
    rxe_works(&rig, "rdma-rxe");
}

#[test]
fn test_rdma_programs_when_on_the_kernel_of_the_backports_run_on_rxe() {
    let mut rig = guest_or_skip!();
    match rig.lab.find_kernel(Series::Backports) {
        Ok(kernel) => rig.kernel = kernel,
        Err(why) => {
            println!("SKIP: {why:#}");
            return;
        }
    }
    let version = rxe_works(&rig, "rdma-rxe-backports");
    assert!(version.is_empty() || !version.starts_with("6.12."), "{version}");
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

#[test]
fn test_own_tests_of_rdma_core_when_run_in_the_image_pass_on_rxe() {
    let rig = guest_or_skip!();
    let (files, image) = match rig.image_initramfs() {
        Ok(found) => found,
        Err(why) => {
            println!("SKIP: {why}");
            return;
        }
    };
    let mut spec = rig.spec("rdma-image", &files, &[]);
    spec.disks.push(image);
    let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}"));
    run(&mut guest, RXE, LONG);
    // All of them in the soak, which sets this for guests.
    let whole = std::env::var_os("TLBRIDGE_GUEST_ROUNDS").is_some();
    let some = if whole {
        ""
    } else {
        "test_atomic test_qpex test_qp.QPTest test_odp"
    };
    let finished = guest
        .run(
            &format!("pyverbs_suite.py --dev rxe0 --gid 1 --limit 60 {some}"),
            LONG * 6,
        )
        .unwrap_or_else(|e| panic!("{e}"));
    let by_word = results(&finished.output);
    let count = |word: &str| by_word.get(word).map_or(0, Vec::len);
    println!("{}", finished.output.lines().last().unwrap_or_default());
    if whole {
        // rxe of 6.12 cannot resize a CQ that is in use.
        let bad: Vec<_> = ["fail", "error", "crash", "timeout", "hung"]
            .iter()
            .flat_map(|word| by_word.get(word).into_iter().flatten())
            .filter(|line| !line.contains("test_resize_cq"))
            .collect();
        assert!(bad.is_empty(), "{bad:#?}");
        assert!(count("ok") >= 100, "{}", finished.output);
    } else {
        assert_eq!(finished.code, 0, "{}", finished.output);
        assert!(count("ok") >= 15 && count("skip") > 0, "{}", finished.output);
    }
    guest.power_off().unwrap_or_else(|e| panic!("{e}"));
}

/// The runner itself: each way in which a test can end, with tests that do it.
#[test]
fn test_runner_of_the_suite_when_tests_end_badly_tells_the_ways_apart() {
    let rig = guest_or_skip!();
    let (mut files, image) = match rig.image_initramfs() {
        Ok(found) => found,
        Err(why) => {
            println!("SKIP: {why}");
            return;
        }
    };
    let tests = "import os, time, unittest\n\
                 class Ends(unittest.TestCase):\n\
                 \x20   def test_ok(self): pass\n\
                 \x20   def test_fail(self): self.assertEqual(1, 2)\n\
                 \x20   def test_error(self): raise OSError('no')\n\
                 \x20   def test_skip(self): self.skipTest('not here')\n\
                 \x20   def test_crash(self): os.abort()\n\
                 \x20   def test_timeout(self): time.sleep(1000)\n";
    files.add_file("usr/share/rdma-core/tests/test_ends.py", 0o644, tests.as_bytes());
    let mut spec = rig.spec("rdma-runner", &files, &[]);
    spec.disks.push(image);
    let mut guest = Guest::start(&spec, None).unwrap_or_else(|e| panic!("{e}"));
    let finished = guest
        .run("pyverbs_suite.py --dev none --limit 3 test_ends.Ends", LONG)
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(finished.code, 1, "{}", finished.output);
    let by_word = results(&finished.output);
    for word in ["ok", "fail", "error", "skip", "crash", "timeout"] {
        let lines = by_word.get(word).map(Vec::as_slice).unwrap_or_default();
        assert_eq!(lines.len(), 1, "{word}: {}", finished.output);
        assert!(lines[0].contains(&format!("test_{word}")), "{}", finished.output);
    }
    guest.power_off().unwrap_or_else(|e| panic!("{e}"));
}
