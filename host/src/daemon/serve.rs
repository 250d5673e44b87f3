//! The control plane: one task for each connection on one thread. What blocks runs on threads of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use protos::bridge::control::{Notice, Reply};
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::config::{Stop, StopSource};
use super::core::Core;
use super::device_watch::device_gone;
use super::listener::Listener;
use super::readiness::{watch, watch_readable};
use crate::session::identity::{Identity, duplicate};
use crate::session::packet::{Packet, PacketError, receive, send};
use crate::session::{Answer, Connection, Refusal};

/// Connections at once: each costs descriptors and, with a session, three threads.
const MOST_CONNECTIONS: usize = 256;
/// A client that does not take its reply for this long is given up.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Time that open sessions have to close after a stop, beyond the fence's timeout.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
/// Pause after `accept` has failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How serving ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// As asked.
    Stopped,
    /// The device is gone: what was seen.
    DeviceGone(String),
}

/// Why connections end.
#[derive(Debug, Clone)]
enum Shutdown {
    No,
    Stopping,
    DeviceGone(String),
}

async fn stop_asked(stop: &Stop) -> io::Result<()> {
    match &stop.0 {
        StopSource::Fd(fd) => {
            let fd = watch_readable(duplicate(fd)?)?;
            drop(fd.readable().await?);
        }
        StopSource::Signals => {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
    }
    Ok(())
}

/// Accepts and serves until a stop, or until the device is gone; then closes every session.
pub(super) async fn serve(core: Arc<Core>, listener: Listener, stop: Stop) -> io::Result<Ending> {
    let (shutdown, _) = watch::channel(Shutdown::No);
    let mut connections = JoinSet::new();
    let mut numbers = 0u64;
    let waiting = watch_readable(duplicate(&listener)?)?;
    let ending = {
        let stopped = stop_asked(&stop);
        let gone = device_gone(core.backing.clone());
        tokio::pin!(stopped, gone);
        loop {
            tokio::select! {
                biased;
                reason = &mut gone => break Ending::DeviceGone(reason),
                asked = &mut stopped => {
                    asked?;
                    break Ending::Stopped;
                }
                Some(ended) = connections.join_next() => report_panic(ended),
                ready = waiting.readable() => match ready?.try_io(|_| listener.accept()) {
                    Err(_not_now) => {}
                    Ok(Ok(socket)) if connections.len() < MOST_CONNECTIONS => {
                        numbers += 1;
                        connections.spawn(connection(core.clone(), numbers, socket, shutdown.subscribe()));
                    }
                    Ok(Ok(_refused)) => {
                        tracing::warn!("{MOST_CONNECTIONS} connections are open; another one was refused");
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "accept");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    };
    // Nobody gets in any more, and the next daemon may take the path.
    drop((waiting, listener));
    shutdown.send_replace(match &ending {
        Ending::Stopped => Shutdown::Stopping,
        Ending::DeviceGone(reason) => Shutdown::DeviceGone(reason.clone()),
    });
    let all_closed = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(ended);
        }
    };
    let patience = core.options.fence_timeout + SHUTDOWN_GRACE;
    if tokio::time::timeout(patience, all_closed).await.is_err() {
        for session in core.sessions() {
            tracing::error!(
                session = session.id,
                pid = session.space.pid(),
                "the session does not close; leaving it"
            );
        }
    }
    Ok(ending)
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}

async fn next_packet(socket: &AsyncFd<OwnedFd>) -> Result<Packet, PacketError> {
    loop {
        let mut ready = socket.readable().await?;
        match receive(socket.get_ref()) {
            Err(PacketError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            other => return other,
        }
    }
}

async fn reply(socket: &AsyncFd<OwnedFd>, answer: &Answer) -> io::Result<()> {
    use std::os::fd::AsFd;
    let fds: Vec<_> = answer.fds.iter().map(AsFd::as_fd).collect();
    loop {
        let mut ready = socket.writable().await?;
        match send(socket.get_ref(), &answer.reply, &fds) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            other => return other,
        }
    }
}

/// A connection's life.
async fn connection(core: Arc<Core>, number: u64, socket: OwnedFd, mut shutdown: watch::Receiver<Shutdown>) {
    use std::os::fd::AsFd;
    let opened = Identity::of_socket(socket.as_fd()).and_then(|identity| {
        let pidfd = watch_readable(duplicate(&identity.pidfd)?)?;
        Ok((identity, pidfd, watch(socket)?))
    });
    let (identity, pidfd, socket) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::debug!(connection = number, %error, "a connection ended before it began");
            return;
        }
    };
    let connection = Arc::new(Connection::new(core, number, identity));
    let reason = serve_connection(&connection, &socket, &pidfd, &mut shutdown).await;
    tracing::debug!(
        connection = number,
        pid = connection.identity().pid,
        reason,
        "connection ends"
    );
    if let Some(session) = connection.session()
        && let Shutdown::DeviceGone(reason) = &*shutdown.borrow()
    {
        session.notify(&Notice::DeviceLost {
            reason: reason.clone(),
        });
    }
    let closing = tokio::task::spawn_blocking(move || connection.close(&reason));
    report_panic(closing.await);
}

/// Serves requests; returns why no more are.
async fn serve_connection(
    connection: &Arc<Connection>,
    socket: &AsyncFd<OwnedFd>,
    pidfd: &AsyncFd<OwnedFd>,
    shutdown: &mut watch::Receiver<Shutdown>,
) -> String {
    loop {
        let session = connection.session();
        let ended = async {
            match &session {
                Some(session) => {
                    let mut ended = session.space.ended();
                    let reason = ended.wait_for(Option::is_some).await;
                    reason.map_or_else(|_| None, |r| r.clone()).unwrap_or_default()
                }
                None => std::future::pending().await,
            }
        };
        let packet = tokio::select! {
            biased;
            now = shutdown.wait_for(|s| !matches!(s, Shutdown::No)) => {
                return match now.as_deref() {
                    Ok(Shutdown::DeviceGone(reason)) => format!("the device is gone: {reason}"),
                    _ => "the daemon stops".into(),
                };
            }
            reason = ended => return reason,
            _ = pidfd.readable() => return "the process has ended".into(),
            packet = next_packet(socket) => packet,
        };
        let answer = match packet {
            Ok(packet) => {
                let worker = connection.clone();
                match tokio::task::spawn_blocking(move || worker.handle(packet)).await {
                    Ok(answer) => answer,
                    Err(error) => return format!("a request failed inside the daemon: {error}"),
                }
            }
            Err(error @ (PacketError::TooLong | PacketError::TooManyFds)) => {
                Reply::from(Refusal::new(libc::EMSGSIZE, error.to_string())).into()
            }
            Err(PacketError::HungUp) => return "the connection was closed".into(),
            Err(PacketError::Io(error)) => return format!("the connection failed: {error}"),
        };
        match tokio::time::timeout(REPLY_TIMEOUT, reply(socket, &answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return format!("the reply could not be sent: {error}"),
            Err(_) => return format!("it has not taken its reply for {REPLY_TIMEOUT:?}"),
        }
    }
}
