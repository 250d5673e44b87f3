//! A device process that answers `tlbridge inspect`: the daemon's question for statistics, on a socket of its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use host::daemon::Listener;
use protos::bridge::control::{MAX_PACKET, Reply, Request};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::Value;

use crate::stop::Stop;

/// How long one who asks may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers until it is stopped. Dropping it waits for that, and takes the socket's file away.
#[derive(Debug)]
pub struct Inspectable {
    thread: Option<JoinHandle<()>>,
    stop: Stop,
}

impl Inspectable {
    /// Answers at `path` (mode 0600) with what `state` returns, until `stop`.
    ///
    /// # Errors
    /// Somebody else answers there, it is not a socket, or the system's reason.
    pub fn start(path: &Path, stop: &Stop, state: impl Fn() -> Value + Send + 'static) -> Result<Self> {
        let listener = Listener::bind(path)?;
        let until = stop.clone();
        let thread = std::thread::Builder::new()
            .name("inspectable".into())
            .spawn(move || serve(&listener, &until, &state))
            .context("a thread for inspection")?;
        Ok(Self {
            thread: Some(thread),
            stop: stop.clone(),
        })
    }
}

impl Drop for Inspectable {
    fn drop(&mut self) {
        self.stop.request();
        if let Some(thread) = self.thread.take() {
            // (A panic of it has been reported.)
            let _ = thread.join();
        }
    }
}

fn serve(listener: &Listener, until: &Stop, state: &impl Fn() -> Value) {
    while !until.requested() {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(until.as_fd(), PollFlags::IN),
        ];
        // An interrupted poll is just another look.
        let _ = poll(&mut fds, None);
        match listener.accept() {
            Ok(peer) => {
                if let Err(error) = answer(&peer, state) {
                    tracing::debug!(%error, "somebody who inspects");
                }
            }
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "no more inspection");
                return;
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

fn answer(peer: &OwnedFd, state: &impl Fn() -> Value) -> Result<()> {
    rustix::io::ioctl_fionbio(peer, false).context("FIONBIO")?;
    // One at a time: who does not ask must not keep the others waiting.
    set_socket_timeout(peer, Timeout::Recv, Some(PATIENCE)).context("SO_RCVTIMEO")?;
    set_socket_timeout(peer, Timeout::Send, Some(PATIENCE)).context("SO_SNDTIMEO")?;
    let mut packet = vec![0u8; MAX_PACKET];
    let (len, _) = recv(peer, &mut packet[..], RecvFlags::empty()).context("no question")?;
    let reply = match serde_json::from_slice(&packet[..len]) {
        Ok(Request::Stats) => stats(state()),
        Ok(other) => refusal(&format!(
            "a device answers questions for statistics only, not {other:?}"
        )),
        Err(error) => refusal(&format!("not a request: {error}")),
    }?;
    send(peer, &reply, SendFlags::NOSIGNAL).context("the answer")?;
    Ok(())
}

fn refusal(message: &str) -> Result<Vec<u8>> {
    let reply = Reply::Error {
        errno: Errno::INVAL.raw_os_error(),
        message: message.into(),
    };
    Ok(serde_json::to_vec(&reply)?)
}

/// In one packet: the last of the sanitizer's reports are left out if there is no room for them.
fn stats(mut state: Value) -> Result<Vec<u8>> {
    let mut left_out = 0;
    loop {
        let stats = state.to_string();
        let packet = serde_json::to_vec(&Reply::Stats { stats })?;
        if packet.len() <= MAX_PACKET {
            return Ok(packet);
        }
        let sanitizer = &mut state["sanitizer"];
        if sanitizer["reports"].as_array_mut().and_then(Vec::pop).is_none() {
            return refusal("the device's state is too large for a packet");
        }
        left_out += 1;
        sanitizer["reports_left_out_here"] = left_out.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::daemon_stats;
    use serde_json::json;

    #[test]
    fn test_inspect_when_a_device_is_asked_shows_its_state_and_ends_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("inspect.sock");
        let stop = Stop::new().unwrap();
        let device = Inspectable::start(&path, &stop, || json!({"model": "gru"})).unwrap();
        assert_eq!(daemon_stats(&path).unwrap()["model"], "gru");
        let twice = Inspectable::start(&path, &stop, || Value::Null).unwrap_err();
        assert!(format!("{twice:#}").contains("listens there"), "{twice:#}");
        stop.request();
        drop(device);
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        let file = Inspectable::start(&path, &stop, || Value::Null).unwrap_err();
        assert!(format!("{file:#}").contains("no socket"), "{file:#}");
    }

    #[test]
    fn test_stats_when_there_are_too_many_reports_leaves_the_last_out() {
        let report = json!({"class": "x", "detail": "y".repeat(1000)});
        let state = json!({"sanitizer": {"reports": vec![report; 128]}});
        let packet = stats(state).unwrap();
        assert!(packet.len() <= MAX_PACKET);
        let Reply::Stats { stats } = serde_json::from_slice(&packet).unwrap() else {
            panic!("statistics")
        };
        let stats: Value = serde_json::from_str(&stats).unwrap();
        let shown = stats["sanitizer"]["reports"].as_array().unwrap().len() as u64;
        assert!(shown > 20);
        assert_eq!(stats["sanitizer"]["reports_left_out_here"], 128 - shown);
    }
}
