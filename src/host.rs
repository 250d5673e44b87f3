//! `tlbridge host`: the host daemon.

use std::time::Duration;

use ::host::daemon::{self, HostConfig, ReclaimConfig};
use anyhow::{Context, Result};
use serde_json::json;

use crate::cli::{HostArgs, HostFault};
use crate::stop::{self, Stop};
use crate::supervise::Leftovers;

/// How long the broken safety net leaves stale translations alive after the call has returned; with the
/// check on, how long the call waits.
const SAFETY_NET_DELAY: Duration = Duration::from_millis(10);
/// Time between two picks of the reclaimer.
const RECLAIM_PERIOD: Duration = Duration::from_millis(20);

/// Serves until told to end.
///
/// # Errors
/// No device, no socket, or the device has gone away.
pub fn run(args: &HostArgs) -> Result<()> {
    let stop = Stop::new()?;
    ::host::notifier::count_allocations_by(crate::allocations::of_this_thread);
    stop.on_signals(args.supervised.supervised)?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    let mut config = HostConfig::new(&args.socket, &args.device);
    config.uffd_mode = args.uffd_mode.into();
    config.fence_timeout = Duration::from_secs(args.fence_timeout);
    config.reclaim = args.reclaim.then_some(ReclaimConfig {
        period: RECLAIM_PERIOD,
        seed: 1,
    });
    config.break_safety_net = args.break_check == Some(HostFault::SafetyNet);
    config.break_held_pages = args.break_check == Some(HostFault::HeldPages);
    if args.break_check.or(args.delay) == Some(HostFault::SafetyNet) {
        config.safety_net_delay = SAFETY_NET_DELAY;
    }
    if args.supervised.supervised {
        stop::obey(&stop, |_| json!({}))?;
    }
    let supervised = args.supervised.supervised;
    let config = config.on_ready(move |ready| {
        if supervised {
            stop::say(&json!({ "ready": { "pid": std::process::id() } }));
        } else {
            eprintln!(
                "accepting applications at {} (Ctrl-C ends)",
                ready.socket.display()
            );
        }
    });
    let until = stop
        .readable()
        .context("no file descriptor is left (ulimit -n)")?;
    daemon::run(config, daemon::Stop::when_readable(until))?;
    Ok(())
}
