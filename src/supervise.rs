//! Child processes of the demo and the benchmark: started from this very binary, told to end by the end of
//! their stdin, reaped always.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cli::Supervised;
use crate::stop::{DISMISSAL, Stop};

/// Time that a child has to come up.
pub const START_LIMIT: Duration = Duration::from_secs(20);
/// Time that a child has to end by itself.
pub const END_LIMIT: Duration = Duration::from_secs(8);

/// A running child.
#[derive(Debug)]
pub struct Service {
    name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Service {
    /// Starts `tlbridge ARGS --supervised`.
    ///
    /// # Errors
    /// The binary cannot be started.
    pub fn start(name: &'static str, args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let exe = std::env::current_exe().context("cannot find the tlbridge binary that is running")?;
        let mut child = Command::new(&exe)
            .args(args)
            .arg("--supervised")
            // An agent in the environment is meant for the user's program, not for these.
            .env_remove("LD_PRELOAD")
            .env_remove("TLBRIDGE_HEAP")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C goes to the supervisor only, which ends its children in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start the {name} process from {}", exe.display()))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        tracing::debug!(name, pid = child.id(), "started");
        Ok(Self {
            name,
            child,
            stdin,
            lines,
        })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line, as JSON. `None`: nothing within `limit`.
    ///
    /// # Errors
    /// The child has ended.
    pub fn next(&mut self, limit: Duration) -> Result<Option<serde_json::Value>> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => {
                let value = serde_json::from_str(&line)
                    .with_context(|| format!("the {} process said {line:?}, which is not JSON", self.name))?;
                Ok(Some(value))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().context("wait")?;
                bail!(
                    "the {} process (pid {}) ended early: {status}; see its message above",
                    self.name,
                    self.pid()
                )
            }
        }
    }

    /// Waits until it says something with the key `key`, and returns that. Ends early with `stop`.
    ///
    /// # Errors
    /// The child has ended, or took too long.
    pub fn expect(&mut self, key: &str, limit: Duration, stop: &Stop) -> Result<serde_json::Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(mut value) = self.next(Duration::from_millis(100))?
                && let Some(found) = value.get_mut(key)
            {
                return Ok(found.take());
            }
            if stop.requested() {
                bail!("interrupted while waiting for the {} process", self.name);
            }
            if Instant::now() >= deadline {
                bail!(
                    "the {} process (pid {}) did not say {key:?} within {} s; RUST_LOG=debug shows what it does",
                    self.name,
                    self.pid(),
                    limit.as_secs()
                );
            }
        }
    }

    /// Asks a question; the answer comes as a line.
    ///
    /// # Errors
    /// The child has ended.
    pub fn ask(&mut self, question: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the process has been told to end")?;
        writeln!(stdin, "{question}").with_context(|| format!("the {} process is gone", self.name))
    }

    /// Says so if it has ended.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(format!(
            "the {} process (pid {}) ended: {status}",
            self.name,
            self.child.id()
        ))
    }

    /// Tells it to end, and waits. A child that does not end is killed.
    ///
    /// # Errors
    /// It did not end with exit code 0.
    pub fn end_cleanly(mut self) -> Result<()> {
        let status = self.finish()?;
        if !status.success() {
            bail!(
                "the {} process did not end cleanly: {status}; see its message above",
                self.name
            );
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<ExitStatus> {
        if let Some(mut stdin) = self.stdin.take() {
            // A child that is gone does not read it, and is found out below.
            let _ = writeln!(stdin, "{DISMISSAL}");
        }
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd")?;
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = rustix::time::Timespec {
                tv_sec: left.as_secs() as _,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    tracing::warn!(name = self.name, pid = self.pid(), "does not end, killed");
                    self.child.kill().context("kill")?;
                    break;
                }
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).context("poll"),
            }
        }
        self.child.wait().context("wait")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(name = self.name, "{error:#}");
        }
    }
}

/// The clean-up of a supervised process. Its supervisor removes the private directory; when that was killed,
/// the process that ends last does it.
#[derive(Debug)]
pub struct Leftovers {
    directory: Option<PathBuf>,
    stop: Stop,
}

impl Leftovers {
    /// Of a process with these options.
    pub fn new(options: &Supervised, stop: &Stop) -> Self {
        Self {
            directory: options.private_dir.clone(),
            stop: stop.clone(),
        }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        let Some(directory) = &self.directory else { return };
        if self.stop.dismissed() {
            return;
        }
        // Nobody connects any more. Another process may be removing the same things, or have been killed
        // before it could.
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "sock") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let result = std::fs::remove_dir(directory);
        tracing::info!(directory = %directory.display(), ?result, "cleaned up after a supervisor that is gone");
    }
}
