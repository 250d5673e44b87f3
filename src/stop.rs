//! When a process has to end: a signal, or (under supervision) the end of the supervisor.

use std::io::{self, BufRead, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::process::Signal;

/// Time that a process has for its clean-up after its supervisor is gone.
const LAST_RESORT: Duration = Duration::from_secs(10);

/// What a supervisor says before it closes stdin. The end of stdin without it: the supervisor is gone.
pub const DISMISSAL: &str = "bye";

/// Asked to end, or not yet. Clones share the state.
#[derive(Debug, Clone)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    dismissed: Arc<AtomicBool>,
    event: Arc<OwnedFd>,
}

impl Stop {
    /// Nobody has asked, and no signal is watched.
    ///
    /// # Errors
    /// No eventfd to be had (file limit).
    pub fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("eventfd")?;
        Ok(Self {
            requested: Arc::default(),
            dismissed: Arc::default(),
            event: Arc::new(event),
        })
    }

    /// Asks.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        // Full means that it has been asked before.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }

    /// Whether somebody has asked.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Whether the supervisor itself has said that this process is to end: then it is there and cleans up
    /// after all of them.
    pub fn dismissed(&self) -> bool {
        self.dismissed.load(Ordering::SeqCst)
    }

    /// Waits until somebody asks, at most for `time`. Returns [`Stop::requested`].
    pub fn wait_for(&self, time: Duration) -> bool {
        let deadline = std::time::Instant::now() + time;
        while !self.requested() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = rustix::time::Timespec {
                tv_sec: left.as_secs() as _,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&*self.event, PollFlags::IN)];
            // An interrupted poll is just another look.
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
        true
    }

    /// A file that becomes readable when somebody asks.
    ///
    /// # Errors
    /// File limit.
    pub fn readable(&self) -> io::Result<OwnedFd> {
        self.event.try_clone()
    }

    /// Also ends on SIGINT and SIGTERM. A second one ends the process at once, with exit code 1, unless it is
    /// supervised: a supervisor that dies sends one for each of its threads, and the clean-up that the first
    /// has begun must not be cut short.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub fn on_signals(&self, supervised: bool) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime for signals")?;
        let (mut interrupt, mut terminate) = {
            use tokio::signal::unix::{SignalKind, signal};
            let _inside = runtime.enter();
            (
                signal(SignalKind::interrupt()).context("SIGINT handler")?,
                signal(SignalKind::terminate()).context("SIGTERM handler")?,
            )
        };
        let stop = self.clone();
        let watch = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    if stop.requested() && !supervised {
                        std::process::exit(1);
                    }
                    stop.request();
                }
            });
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(watch)
            .context("thread for signals")?;
        Ok(())
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The process' own side of supervision. Lines on stdin are questions; the end of stdin is the order to
/// end. Lines on stdout are JSON objects.
///
/// `answer` is given each line and returns the line to print.
///
/// # Errors
/// The supervisor is gone already.
pub fn obey(stop: &Stop, answer: impl Fn(&str) -> serde_json::Value + Send + 'static) -> Result<()> {
    // Ends this process' polite way should the supervisor be killed; stdin's end says the same.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context("cannot ask for a signal at the supervisor's death")?;
    ensure!(
        rustix::process::getppid().is_some_and(|p| !p.is_init()),
        "the supervisor is gone: --supervised is for processes that tlbridge starts by itself"
    );
    let stop = stop.clone();
    let listen = move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if line == DISMISSAL {
                stop.dismissed.store(true, Ordering::SeqCst);
                break;
            }
            say(&answer(&line));
        }
        stop.request();
        // Whatever hangs in its clean-up must not outlive the supervisor.
        std::thread::sleep(LAST_RESORT);
        eprintln!("tlbridge: clean-up took longer than {LAST_RESORT:?}, giving up");
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .name("supervised".into())
        .spawn(listen)
        .context("thread for the supervisor's orders")?;
    Ok(())
}

/// Says something to the supervisor: one line.
pub fn say(value: &serde_json::Value) {
    let mut out = io::stdout().lock();
    // A supervisor that is gone is noticed by stdin's end.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_stop_when_requested_wakes_waiters_and_stays() {
        let stop = Stop::new().unwrap();
        assert!(!stop.wait_for(Duration::from_millis(1)));
        let other = stop.clone();
        let thread = std::thread::spawn(move || other.wait_for(Duration::from_secs(60)));
        stop.request();
        assert!(thread.join().unwrap());
        assert!(stop.requested() && stop.wait_for(Duration::ZERO));
    }
}
