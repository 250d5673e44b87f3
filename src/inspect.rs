//! `tlbridge inspect`: the statistics of a running daemon.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use protos::bridge::control::{MAX_PACKET, Reply, Request};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};
use serde_json::Value;

use crate::cli::InspectArgs;

/// Prints a daemon's statistics.
///
/// # Errors
/// No daemon there, or not one.
pub fn run(args: &InspectArgs, out: &mut impl Write) -> Result<()> {
    let stats = daemon_stats(&args.path)?;
    if args.json {
        writeln!(out, "{stats}")?;
    } else {
        print_text(&stats, 0, out)?;
    }
    Ok(())
}

/// Asks the daemon at `path` for its statistics.
///
/// # Errors
/// No daemon there, or not one.
pub fn daemon_stats(path: &Path) -> Result<Value> {
    match ask(path, &Request::Stats)? {
        Reply::Stats { stats } => serde_json::from_str(&stats).with_context(|| {
            format!(
                "the daemon at {} sent statistics that are not JSON",
                path.display()
            )
        }),
        Reply::Error { errno, message } => {
            bail!(
                "the daemon at {} refused: {message} (errno {errno})",
                path.display()
            )
        }
        other => bail!(
            "the daemon at {} answered {other:?} to a request for statistics",
            path.display()
        ),
    }
}

fn ask(path: &Path, request: &Request) -> Result<Reply> {
    let socket: OwnedFd = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context("cannot create a socket")?;
    let address = SocketAddrUnix::new(path).map_err(|_| {
        anyhow!(
            "{} is too long for a socket's path (108 bytes): use a shorter one",
            path.display()
        )
    })?;
    connect(&socket, &address).with_context(|| {
        format!(
            "cannot connect to a host daemon at {}; is `tlbridge host --socket {0}` running, and is this its control socket?",
            path.display()
        )
    })?;
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(std::time::Duration::from_secs(10)),
    )
    .context("SO_RCVTIMEO")?;
    send(&socket, &serde_json::to_vec(request)?, SendFlags::NOSIGNAL)
        .with_context(|| format!("cannot send to the daemon at {}", path.display()))?;
    let mut packet = vec![0u8; MAX_PACKET];
    let (len, _) = recv(&socket, &mut packet[..], RecvFlags::empty())
        .with_context(|| format!("no answer from the daemon at {} within 10 s", path.display()))?;
    if len == 0 {
        bail!(
            "the daemon at {} closed the connection without an answer",
            path.display()
        );
    }
    serde_json::from_slice(&packet[..len])
        .with_context(|| format!("the answer from {} is not a daemon's", path.display()))
}

/// Indented text; numbers aligned by nothing but their names, so that grep finds them.
pub fn print_text(value: &Value, indent: usize, out: &mut impl Write) -> Result<()> {
    let Value::Object(object) = value else {
        writeln!(out, "{:indent$}{value}", "")?;
        return Ok(());
    };
    for (key, value) in object {
        match value {
            Value::Object(_) => {
                writeln!(out, "{:indent$}{key}:", "")?;
                print_text(value, indent + 2, out)?;
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                for (i, item) in items.iter().enumerate() {
                    writeln!(out, "{:indent$}{key}[{i}]:", "")?;
                    print_text(item, indent + 2, out)?;
                }
            }
            Value::String(text) => writeln!(out, "{:indent$}{key}: {text}", "")?,
            other => writeln!(out, "{:indent$}{key}: {other}", "")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{acceptfrom, bind, listen};

    /// A daemon that gives one answer.
    fn daemon(
        answer: &[u8],
    ) -> (
        tempfile::TempDir,
        std::path::PathBuf,
        std::thread::JoinHandle<Vec<u8>>,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.sock");
        let listener = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let answer = answer.to_vec();
        let thread = std::thread::spawn(move || {
            let (peer, _) = acceptfrom(&listener).unwrap();
            let mut question = vec![0; 4096];
            let (len, _) = recv(&peer, &mut question[..], RecvFlags::empty()).unwrap();
            send(&peer, &answer, SendFlags::NOSIGNAL).unwrap();
            question.truncate(len);
            question
        });
        (dir, path, thread)
    }

    #[test]
    fn test_inspect_when_daemon_answers_prints_text_and_json() {
        let stats = r#"{"driver":{"faults":3},"name":"x","sessions":[{"pid":7}]}"#;
        let reply = serde_json::to_vec(&Reply::Stats { stats: stats.into() }).unwrap();
        for json in [false, true] {
            let (_dir, path, thread) = daemon(&reply);
            let mut out = Vec::new();
            run(&InspectArgs { path, json }, &mut out).unwrap();
            assert_eq!(
                thread.join().unwrap(),
                serde_json::to_vec(&Request::Stats).unwrap()
            );
            let text = String::from_utf8(out).unwrap();
            if json {
                assert_eq!(
                    serde_json::from_str::<Value>(&text).unwrap()["driver"]["faults"],
                    3
                );
            } else {
                assert_eq!(text, "driver:\n  faults: 3\nname: x\nsessions[0]:\n  pid: 7\n");
            }
        }
    }

    #[test]
    fn test_inspect_when_answer_is_refusal_or_noise_says_so() {
        let refusal = serde_json::to_vec(&Reply::Error {
            errno: 1,
            message: "not you".into(),
        })
        .unwrap();
        for (answer, expected) in [(&refusal[..], "not you"), (b"noise", "not a daemon's")] {
            let (_dir, path, thread) = daemon(answer);
            let error = format!("{:#}", daemon_stats(&path).unwrap_err());
            assert!(error.contains(expected), "{error}");
            thread.join().unwrap();
        }
    }

    #[test]
    fn test_inspect_when_nobody_listens_names_the_path_and_the_way_out() {
        let error = format!("{:#}", daemon_stats(Path::new("/nowhere/host.sock")).unwrap_err());
        assert!(
            error.contains("/nowhere/host.sock") && error.contains("tlbridge host"),
            "{error}"
        );
    }
}
