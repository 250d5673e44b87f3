//! The driver goes and comes back while programs use it: unloading is refused as long as one of them has the device,
//! and works at once when they are killed in the middle of their instructions.

#![allow(unsafe_code)] // loading and unloading a module: no crate has these calls

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::Outcome;

/// Programs that use the device at any time.
const PROGRAMS: usize = 3;
/// What a program says that came when there was no driver.
const NO_DRIVER: &str = "is gru.ko loaded";
const PATIENCE: Duration = Duration::from_secs(60);

/// What the programs have done so far.
#[derive(Debug, Default)]
struct Load {
    stop: AtomicBool,
    /// Ran to their end, and passed.
    passed: AtomicU64,
    /// Found no driver.
    too_early: AtomicU64,
    killed: AtomicU64,
    running: Mutex<Vec<u32>>,
}

pub fn run(modules: &Path, rounds: u64) -> Outcome {
    let load = Load::default();
    let refused = std::thread::scope(|scope| -> Result<u64> {
        let programs: Vec<_> = (0..PROGRAMS)
            .map(|_| {
                scope.spawn(|| {
                    let result = programs(&load);
                    load.stop.store(true, Ordering::SeqCst);
                    result
                })
            })
            .collect();
        let refused = (0..rounds)
            .map(|round| {
                until_one_has_passed(&load, Instant::now())
                    .and_then(|()| reload(&load, modules, round % 4 == 3))
                    .with_context(|| format!("round {round}"))
            })
            .sum();
        load.stop.store(true, Ordering::SeqCst);
        for program in programs {
            program.join().expect("no panic")?;
        }
        refused
    })?;
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    ensure!(
        count(&load.killed) > 0,
        "no program was killed while it used the driver: the test says nothing"
    );
    Ok(format!(
        "loaded {rounds} times, refused {refused} times; {} programs passed, {} killed, {} without a driver",
        count(&load.passed),
        count(&load.killed),
        count(&load.too_early)
    ))
}

/// One program after the other.
fn programs(load: &Load) -> Result<()> {
    let program = std::env::current_exe().context("this program")?;
    while !load.stop.load(Ordering::SeqCst) {
        let child = Command::new(&program)
            .args(["faults", "--rounds", "8"])
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a program")?;
        let pid = child.id();
        load.running.lock().expect("no panic").push(pid);
        let ended = wait(child, load, pid)?;
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        let counter = if ended.status.success() {
            &load.passed
        } else if ended.status.code().is_none() {
            &load.killed
        } else if said.contains(NO_DRIVER) {
            &load.too_early
        } else {
            bail!("a program has failed: {said}");
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// Waits for the end of a program, and forgets its pid before somebody else can have it.
fn wait(child: Child, load: &Load, pid: u32) -> Result<std::process::Output> {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let id = Pid::from_raw(pid.cast_signed()).context("a pid")?;
    waitid(WaitId::Pid(id), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        .context("waiting for a program")?;
    load.running.lock().expect("no panic").retain(|&p| p != pid);
    child.wait_with_output().context("a program's end")
}

/// Unloads a driver that is in use, and loads it (and the shim below it) again. Returns how often it was refused.
fn reload(load: &Load, modules: &Path, both: bool) -> Result<u64> {
    let begin = Instant::now();
    let mut refused = 0;
    loop {
        ensure!(!load.stop.load(Ordering::SeqCst), "a program has failed");
        ensure!(
            begin.elapsed() < PATIENCE,
            "not unloaded while in use within {PATIENCE:?}: refused {refused} times, {load:?}"
        );
        match unload(c"gru") {
            Ok(()) => {
                if both {
                    unload(c"tlbridge_uv").context("unloading tlbridge_uv")?;
                    insert(&modules.join("tlbridge_uv.ko"))?;
                }
                insert(&modules.join("gru.ko"))?;
                if refused > 0 {
                    return Ok(refused);
                }
                // Nobody had it just then.
                until_one_has_passed(load, begin)?;
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                refused += 1;
                // In the middle of whatever they do.
                for &pid in load.running.lock().expect("no panic").iter() {
                    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("a pid")?;
                    // Not reaped yet: it is the one that was started.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            Err(error) => return Err(error).context("unloading gru"),
        }
    }
}

/// The driver that was just loaded works.
fn until_one_has_passed(load: &Load, begin: Instant) -> Result<()> {
    let passed = load.passed.load(Ordering::SeqCst);
    while load.passed.load(Ordering::SeqCst) == passed {
        ensure!(!load.stop.load(Ordering::SeqCst), "a program has failed");
        ensure!(begin.elapsed() < PATIENCE, "no program has passed: {load:?}");
        std::thread::yield_now();
    }
    Ok(())
}

fn unload(name: &CStr) -> io::Result<()> {
    // SAFETY: a name and flags, as the call has it.
    match unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn insert(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    // SAFETY: an open file, no parameters, no flags, as the call has it.
    match unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).with_context(|| format!("loading {}", path.display())),
    }
}
