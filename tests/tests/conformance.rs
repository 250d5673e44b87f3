//! `tlbridge conformance` against this project's device, and against servers that are wrong on purpose.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tests::processes::{Device, Ended, Tool};

const LIMIT: Duration = Duration::from_secs(120);
const FACTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conformance-gru.json");

fn suite(socket: &Path, more: &[&str]) -> Ended {
    let mut arguments = vec!["conformance", "--json", "--socket", socket.to_str().unwrap()];
    arguments.extend(more);
    Tool::start(&arguments).wait(LIMIT).expect("the suite ends")
}

fn reasons(json: &Value, verdict: &str) -> Vec<String> {
    let cases = json["cases"].as_array().expect("cases");
    cases
        .iter()
        .filter(|case| case["verdict"] == verdict)
        .map(|case| format!("{}: {}", case["name"].as_str().unwrap(), case["reason"]))
        .collect()
}

#[test]
fn test_gru_when_checked_passes_every_case_in_every_doorbell_mode() {
    for doorbell in ["poll", "bell", "trap"] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("gru.sock");
        let device = Device::start(&socket, &["--doorbell", doorbell]);
        let ended = suite(&socket, &["--facts", FACTS]);
        device.end();
        let json = ended.json();
        assert_eq!(
            reasons(&json, "fail"),
            Vec::<String>::new(),
            "doorbell {doorbell}"
        );
        assert!(ended.status.success());
        let skipped = reasons(&json, "not_applicable");
        // Without mappable areas there are no capabilities to look at; and no register makes a GRU access memory.
        assert!(skipped.len() <= 2 + 5, "{skipped:?}");
        assert!(json["passed"].as_u64().unwrap() >= 50, "{json}");
    }
}

/// How a server is wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    /// Everything is fine, and nothing is done.
    AlwaysGood,
    /// Errors without an errno.
    NoErrno,
    /// The message id of the reply is another.
    OtherId,
    /// No_reply is ignored.
    RepliesAlways,
    /// A refused message's body is taken for the next message.
    RunsBodies,
}

/// Serves one connection, barely.
fn wrong_server(mut socket: UnixStream, wrong: Wrong) -> std::io::Result<()> {
    socket.set_read_timeout(Some(LIMIT))?;
    loop {
        let mut head = [0; 16];
        socket.read_exact(&mut head)?;
        let command = u16::from_ne_bytes([head[2], head[3]]);
        let size = u32::from_ne_bytes(head[4..8].try_into().unwrap());
        if !(16..1 << 20).contains(&size) {
            return Ok(());
        }
        let known = matches!(command, 1 | 4);
        let mut body = vec![0; size as usize - 16];
        if known || wrong != Wrong::RunsBodies {
            socket.read_exact(&mut body)?;
        }
        if head[8] & 16 != 0 && wrong != Wrong::RepliesAlways {
            continue;
        }
        let (mut flags, mut error, mut reply) = (1u32, 0u32, Vec::new());
        match command {
            1 => reply = b"\0\0\x01\0{}\0".to_vec(),
            4 => {
                reply = [16u32, 3, 9, 5]
                    .iter()
                    .flat_map(|word| word.to_ne_bytes())
                    .collect()
            }
            _ if wrong == Wrong::AlwaysGood => {}
            _ => (flags, error) = (1 | 32, if wrong == Wrong::NoErrno { 0 } else { 95 }),
        }
        if wrong == Wrong::OtherId && command != 1 {
            head[0] ^= 0x40;
        }
        head[4..8].copy_from_slice(&(16 + reply.len() as u32).to_ne_bytes());
        head[8..12].copy_from_slice(&flags.to_ne_bytes());
        head[12..].copy_from_slice(&error.to_ne_bytes());
        socket.write_all(&head)?;
        socket.write_all(&reply)?;
    }
}

#[test]
fn test_wrong_servers_when_checked_fail_the_case_that_is_about_their_fault() {
    let faults = [
        (Wrong::AlwaysGood, "unknown_command_is_answered_with_an_error"),
        (Wrong::NoErrno, "error_reply_has_an_errno"),
        (Wrong::OtherId, "message_id_is_echoed_even_when_used_twice"),
        (Wrong::RepliesAlways, "no_reply_gets_no_reply"),
        (Wrong::RunsBodies, "unknown_command_body_is_not_executed"),
    ];
    for (wrong, case) in faults {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("wrong.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let done = AtomicBool::new(false);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                for client in listener.incoming() {
                    if done.load(Ordering::SeqCst) {
                        return;
                    }
                    let client = client.unwrap();
                    // A client that leaves ends its connection: no failure of this test.
                    scope.spawn(move || wrong_server(client, wrong));
                }
            });
            let ended = suite(&socket, &["--only", case]);
            done.store(true, Ordering::SeqCst);
            // Lets the listening thread look.
            let _ = UnixStream::connect(&socket);
            ended
        });
        let failed = reasons(&ended.json(), "fail");
        assert!(
            failed.len() == 1 && failed[0].starts_with(case),
            "{wrong:?}: {failed:?}\n{}",
            ended.stderr
        );
        assert_eq!(ended.status.code(), Some(1), "{wrong:?}");
    }
}

#[test]
fn test_suite_when_nobody_listens_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nobody");
    let ended = suite(&socket, &[]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended.stderr.contains("is the server running?"),
        "{}",
        ended.stderr
    );
}
