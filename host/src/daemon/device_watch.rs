//! Whether the device is still there.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use driver::backing::Backing;
use tokio::io::unix::AsyncFd;
use tokio::time::MissedTickBehavior;

use super::readiness::watch_readable;

/// How often the transport is asked: a closed socket with a living process has no descriptor to wait on.
const TRANSPORT_CHECK: Duration = Duration::from_millis(200);

/// Returns when the device is gone, with what was seen. Never returns while it is there.
pub(super) async fn device_gone(backing: Arc<dyn Backing>) -> String {
    let pidfd: Option<AsyncFd<OwnedFd>> = backing
        .pidfd()
        .and_then(|fd| fd.try_clone_to_owned().ok())
        .and_then(|fd| watch_readable(fd).ok());
    let process_ended = async {
        match &pidfd {
            Some(fd) => drop(fd.readable().await),
            None => std::future::pending().await,
        }
    };
    let transport_failed = async {
        let mut ticks = tokio::time::interval(TRANSPORT_CHECK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while backing.alive() {
            ticks.tick().await;
        }
    };
    tokio::select! {
        () = process_ended => "its process has ended".into(),
        () = transport_failed => "its connection has failed".into(),
    }
}
