//! The sleeping subscriber: another process that maps a part of the application's memory and really unmaps
//! it when it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent::peer::Peer;
use anyhow::{Result, bail};
use serde_json::json;

use super::application::{Random, is_poison};
use crate::cli::PeerArgs;
use crate::stop::{self, Stop};
use crate::supervise::Leftovers;

/// Pause between two reads: the peer is to be a subscriber, not a load.
const PAUSE: Duration = Duration::from_micros(500);

#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    absent: AtomicU64,
    stale: AtomicU64,
}

/// Attaches and reads until told to end.
///
/// # Errors
/// It cannot attach, or the daemon goes away.
pub fn run(args: &PeerArgs) -> Result<()> {
    let stop = Stop::new()?;
    let _leftovers = Leftovers::new(&args.supervised, &stop);
    stop.on_signals(true)?;
    let peer = Arc::new(Peer::attach(&args.socket, args.pid, args.start, args.end)?);
    let counts = Arc::new(Counts::default());
    {
        let (peer, counts) = (Arc::clone(&peer), Arc::clone(&counts));
        stop::obey(&stop, move |_| {
            let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
            json!({ "stats": {
                "reads": count(&counts.reads), "reads_of_nothing": count(&counts.absent),
                "stale_reads": count(&counts.stale), "peer": peer.stats(),
            }})
        })?;
    }
    stop::say(&json!({ "ready": { "pid": std::process::id() } }));
    let mut random = Random::new(1, u64::from(args.pid));
    let words = ((args.end - args.start) / 8) as usize;
    while !stop.wait_for(PAUSE) {
        if !peer.alive() {
            // The application may have ended first; then the daemon closes the attachment.
            if stop.wait_for(Duration::from_secs(5)) {
                break;
            }
            bail!(
                "the host daemon at {} no longer serves this attachment",
                args.socket.display()
            );
        }
        let va = args.start + random.below(words) as u64 * 8;
        counts.reads.fetch_add(1, Ordering::Relaxed);
        match peer.read(va) {
            None => {
                counts.absent.fetch_add(1, Ordering::Relaxed);
            }
            // Poison is written after the call that took the page away has returned.
            Some(word) if is_poison(word) => {
                counts.stale.fetch_add(1, Ordering::Relaxed);
                tracing::error!(va = format_args!("{va:#x}"), "late read by the attached process");
            }
            Some(_) => {}
        }
    }
    Ok(())
}
