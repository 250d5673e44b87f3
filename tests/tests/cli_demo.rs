//! The command line as a user meets it: help, wrong arguments, output shapes, exit codes. The binary is found
//! by `tests::processes::binary`: `TLBRIDGE_BIN`, else `target/<profile>/tlbridge` (build the root package
//! first).

use std::time::Duration;

use tests::processes::{self, Ended, Tool};

fn run(arguments: &[&str], limit: u64) -> Ended {
    Tool::start(arguments)
        .wait(Duration::from_secs(limit))
        .unwrap_or_else(|| panic!("{arguments:?} does not end"))
}

#[test]
fn test_help_when_asked_shows_commands_examples_and_exit_codes() {
    let ended = run(&["--help"], 10);
    assert_eq!(ended.status.code(), Some(0));
    for word in [
        "demo",
        "device",
        "host",
        "bench",
        "inspect",
        "Examples:",
        "Exit codes:",
        "RUST_LOG",
    ] {
        assert!(ended.stdout.contains(word), "{word} is missing: {}", ended.stdout);
    }
    for hidden in ["bench-subject", "--supervised"] {
        assert!(!ended.stdout.contains(hidden), "{hidden} is nobody's business");
    }
    for command in [
        &["demo"][..],
        &["device"],
        &["host"],
        &["bench", "invalidate"],
        &["bench", "mmio"],
        &["bench", "doorbell"],
        &["inspect"],
    ] {
        let mut arguments = command.to_vec();
        arguments.push("--help");
        let ended = run(&arguments, 10);
        assert_eq!(ended.status.code(), Some(0));
        assert!(
            ended.stdout.contains("Example"),
            "{command:?} has no example: {}",
            ended.stdout
        );
    }
}

#[test]
fn test_arguments_when_wrong_end_with_2_and_name_the_argument() {
    for (arguments, named) in [
        (&["demo", "--seconds", "x"][..], "--seconds"),
        (&["demo", "--break", "everything"], "kill-bit"),
        (&["demo", "--break", "drain", "--delay", "drain"], "--delay"),
        (&["device", "--model", "mlx9", "--socket", "/tmp/x"], "gru"),
        (&["host", "--socket", "/tmp/x"], "--device"),
        (&["frobnicate"], "frobnicate"),
        (&["bench"], "invalidate"),
        (&["inspect"], "PATH"),
    ] {
        let ended = run(arguments, 10);
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(
            ended.stderr.contains(named),
            "{arguments:?} does not name {named}: {}",
            ended.stderr
        );
        assert!(ended.stdout.is_empty(), "{arguments:?}: {}", ended.stdout);
    }
}

#[test]
fn test_errors_when_peers_are_missing_name_path_and_way_out() {
    let ended = run(&["inspect", "/nowhere/host.sock"], 10);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("/nowhere/host.sock"), "{}", ended.stderr);
    assert!(ended.stderr.contains("tlbridge host"), "{}", ended.stderr);

    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("host.sock");
    let arguments = [
        "host",
        "--socket",
        socket.to_str().unwrap(),
        "--device",
        "/nowhere/gru.sock",
    ];
    let ended = run(&arguments, 10);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("/nowhere/gru.sock"), "{}", ended.stderr);
    assert!(ended.stderr.contains("tlbridge device"), "{}", ended.stderr);
    assert!(!socket.exists(), "a daemon that could not start leaves no socket");
}

#[test]
fn test_demo_when_it_ends_prints_a_table_and_leaves_nothing() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: the demo's table: {reason}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Private directories are made in TMPDIR: here, so that what is left can be seen.
    let output = std::process::Command::new(processes::binary())
        .args(["demo", "--seconds", "2", "--memory-mib", "32"])
        .env("TMPDIR", dir.path())
        .env("LD_PRELOAD", "")
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    for word in [
        "operations",
        "TLB hits",
        "mremap",
        "madv_remove",
        "p99",
        "0 stale accesses",
    ] {
        assert!(out.contains(word), "{word} is missing: {out}");
    }
    assert!(err.contains("operations"), "progress goes to stderr: {err}");
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn test_demo_when_killed_leaves_neither_processes_nor_sockets() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: kill -9 of the demo: {reason}");
        return;
    }
    for round in 0..4u64 {
        let dir = tempfile::tempdir().unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut demo = std::process::Command::new(processes::binary())
            .args(["demo", "--seconds", "30"])
            .env("TMPDIR", dir.path())
            .stdout(std::process::Stdio::null())
            .env("RUST_LOG", "info")
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        // Where in its life death strikes, not synchronisation.
        std::thread::sleep(Duration::from_millis(300 + 271 * round));
        let family = processes::descendants(demo.id());
        demo.kill().unwrap();
        demo.wait().unwrap();
        assert_eq!(
            processes::survivors(&family, Duration::from_secs(20)),
            [0u32; 0],
            "round {round}"
        );
        // A child that was being started when `family` was read is not in it: the directory says when the
        // last one has ended.
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let left = || -> Vec<_> {
            std::fs::read_dir(dir.path())
                .unwrap()
                .flatten()
                .map(|e| e.path())
                .collect()
        };
        while !left().is_empty() {
            assert!(
                std::time::Instant::now() < deadline,
                "round {round}: left behind: {:?}
{}",
                left(),
                std::fs::read_to_string(log.path()).unwrap()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn test_inspect_when_a_daemon_runs_prints_its_statistics() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: inspect of a live daemon: {reason}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (device_socket, host_socket) = (path("gru.sock"), path("host.sock"));
    let device = Tool::start(&["device", "--model", "gru", "--socket", &device_socket]);
    wait_for(&device_socket);
    let host = Tool::start(&["host", "--socket", &host_socket, "--device", &device_socket]);
    wait_for(&host_socket);
    let ended = run(&["inspect", &host_socket, "--json"], 10);
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert_eq!(
        ended.json()["daemon"]["pid"].as_u64(),
        Some(u64::from(host.pid()))
    );
    let text = run(&["inspect", &host_socket], 10);
    assert!(text.stdout.contains("uffd_mode: wp"), "{}", text.stdout);
    for tool in [host, device] {
        processes::kill(tool.pid(), 15);
        let ended = tool.wait(Duration::from_secs(15)).expect("ends after SIGTERM");
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    }
    for socket in [&device_socket, &host_socket] {
        assert!(!std::path::Path::new(socket).exists(), "{socket} is left");
    }
}

/// Both bind and listen at once; the path's appearance is what a user would wait for too.
fn wait_for(socket: &str) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(socket)
        .is_err_and(|e| !matches!(e.raw_os_error(), Some(libc::EPROTOTYPE)))
    {
        assert!(std::time::Instant::now() < deadline, "{socket} does not appear");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn test_bench_when_quick_prints_rows_for_both_registration_modes() {
    if let Some(reason) = processes::missing_capability() {
        println!("SKIP: the benchmark: {reason}");
        return;
    }
    let ended = run(&["bench", "invalidate", "--quick", "--json", "-"], 120);
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let json = ended.json();
    let rows = json["rows"].as_array().expect("rows");
    for mode in ["wp", "missing"] {
        for case in [
            "monitor",
            "agent_silent",
            "agent_live_parked",
            "agent_live_busy",
            "safety_net",
            "agent_sleeping",
        ] {
            let row = rows.iter().find(|r| r["uffd_mode"] == mode && r["case"] == case);
            let row = row.unwrap_or_else(|| panic!("no row {mode} {case}"));
            assert!(row["p50_ns"].as_u64().is_some_and(|ns| ns > 0), "{row}");
        }
    }
    assert!(json["online_cpus"].as_u64().is_some_and(|n| n > 0));
    // Of each part by itself: a sum over figures that are not there is 0, too.
    let parts = json["nonsleeping"].as_array().expect("parts");
    for mode in ["wp", "missing"] {
        let mut of_mode = parts.iter().filter(|part| part["uffd_mode"] == mode).peekable();
        assert!(
            of_mode.peek().is_some(),
            "no non-sleeping part in {mode}: {parts:?}"
        );
        for part in of_mode {
            assert!(part["count"].as_u64().is_some_and(|n| n > 0), "{part}");
            assert_eq!(part["voluntary_context_switches"].as_u64(), Some(0), "{part}");
            assert_eq!(part["allocations"].as_u64(), Some(0), "{part}");
        }
    }
    assert!(
        json["targets"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["status"] == "not_applicable")
    );
}

/// Idle cost is CPU time, and the busy poller is compared in turn with one that always spins: both are judged here.
/// Latencies are printed.
#[test]
fn test_bench_doorbell_when_quick_prints_every_mode_and_an_idle_device_costs_nothing() {
    let ended = run(&["bench", "doorbell", "--quick", "--json", "-"], 120);
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let json = ended.json();
    for mode in ["trap", "bell", "poll", "spin"] {
        let rows = json["rows"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["mode"] == mode);
        let row = row.unwrap_or_else(|| panic!("no row for {mode}: {json}"));
        assert!(
            row["vload_hit"]["p50_ns"].as_u64().is_some_and(|ns| ns > 0),
            "{row}"
        );
        assert!(row["flush_p50_ns"].as_u64().is_some_and(|ns| ns > 0), "{row}");
        let idle = row["idle_cpu_percent"].as_f64().expect("a figure");
        // The floor does spin: the measurement measures.
        assert!(if mode == "spin" { idle > 10.0 } else { idle < 1.0 }, "{row}");
        println!(
            "{mode}: VLOAD hit {} ns, idle {idle:.3}% of a CPU",
            row["vload_hit"]["p50_ns"]
        );
    }
    let ratio = &json["poll_over_spin"]["ratio"];
    println!("poll over spin: {ratio}");
    // (The target, 3, is for a machine that does nothing else: the adaptive poller gives way to others, the floor does not.)
    let (low, high) = (ratio["low"].as_f64(), ratio["high"].as_f64());
    assert!(low > Some(0.0) && low <= high, "{ratio}");
    let hit = |mode: &str| {
        let rows = json["rows"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["mode"] == mode).expect("its row");
        row["vload_hit"]["p50_ns"].as_u64().expect("a figure")
    };
    assert!(hit("poll") < hit("trap"), "{json}");
    let writes = &json["losing_posted_writes"];
    println!("answered over posted register writes: {writes}");
    assert!(
        writes["ratio"].as_f64().is_some_and(|ratio| ratio > 1.0),
        "{writes}"
    );
}
