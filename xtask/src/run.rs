//! Running one step: its output streamed, its totals counted, its time bounded.

use anyhow::Context;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// What a step's output said.
#[derive(Debug, Default, Clone)]
pub struct Totals {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that libtest ignored (there should be none).
    pub ignored: u64,
    /// Lines in which a test says what it left out and why.
    pub skips: Vec<String>,
    /// Names of failed tests.
    pub failures: Vec<String>,
}

impl Totals {
    /// Adds another step's.
    pub fn add(&mut self, other: &Totals) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.skips.extend(other.skips.iter().cloned());
        self.failures.extend(other.failures.iter().cloned());
    }

    fn read(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            for part in rest.split(['.', ';']) {
                let mut words = part.split_whitespace();
                if let (Some(number), Some(what)) = (words.next(), words.next())
                    && let Ok(n) = number.parse::<u64>()
                {
                    match what {
                        "passed" => self.passed += n,
                        "failed" => self.failed += n,
                        "ignored" => self.ignored += n,
                        _ => {}
                    }
                }
            }
        } else if let Some(reason) = skip_reason(line) {
            self.skips.push(reason.to_owned());
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|l| l.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }
}

/// Outcome of a step.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code 0 within the time limit.
    pub ok: bool,
    /// What the output said.
    pub totals: Totals,
    /// How long it took.
    pub took: Duration,
}

/// Runs a command with its output in `log` and, where it matters, on the terminal. A command that runs
/// longer than `limit` is ended with its whole process group, and says so.
pub fn step(name: &str, command: &mut Command, log: &Path, limit: Duration) -> anyhow::Result<Outcome> {
    use std::os::unix::process::CommandExt;
    let started = Instant::now();
    let file = std::fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {name}: {command:?}"))?;
    let shared = Arc::new(Mutex::new((file, Totals::default())));
    let readers: Vec<_> = [
        child
            .stdout
            .take()
            .map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
        child
            .stderr
            .take()
            .map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
    ]
    .into_iter()
    .flatten()
    .map(|stream| {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                let mut guard = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let _ = writeln!(guard.0, "{line}");
                guard.1.read(&line);
                if worth_showing(&line) {
                    println!("  {line}");
                }
            }
        })
    })
    .collect();

    let (done, finished) = mpsc::channel::<()>();
    let expired = Arc::new(AtomicBool::new(false));
    let watchdog = {
        let (expired, pid) = (Arc::clone(&expired), child.id());
        std::thread::spawn(move || {
            if finished.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                expired.store(true, Ordering::Relaxed);
                // The group is the one made above, so this reaches only what this step started.
                let _ = Command::new("kill")
                    .args(["-KILL", "--", &format!("-{pid}")])
                    .status();
            }
        })
    };
    let status = child.wait().with_context(|| format!("waiting for {name}"))?;
    let _ = done.send(());
    let _ = watchdog.join();
    for reader in readers {
        let _ = reader.join();
    }
    let timed_out = expired.load(Ordering::Relaxed);
    if timed_out {
        println!(
            "  {name}: ended after its limit of {} s; output so far: {}",
            limit.as_secs(),
            log.display()
        );
    }
    let totals = shared
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .1
        .clone();
    Ok(Outcome {
        ok: status.success() && !timed_out,
        totals,
        took: started.elapsed(),
    })
}

/// What a test says that it left out: `SKIP: reason` or `SKIPPED...: reason` at the start of a line.
fn skip_reason(line: &str) -> Option<&str> {
    let line = line.trim_start();
    line.starts_with("SKIP")
        .then(|| line.split_once(": ").map_or(line, |(_, reason)| reason))
}

fn worth_showing(line: &str) -> bool {
    let quiet = [
        "   Compiling",
        "  Downloaded",
        " Downloading",
        "    Finished",
        "    Blocking",
        "    Checking",
    ];
    !quiet.iter().any(|q| line.starts_with(q))
        && !line.trim().is_empty()
        && (line.starts_with("test ")
            || line.contains("error")
            || line.contains("warning")
            || line.contains("panicked")
            || skip_reason(line).is_some()
            || line.starts_with("fuzz ")
            || line.starts_with("stat::")
            || line.starts_with("     Running"))
}
