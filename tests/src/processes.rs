//! Starting the command-line tool as a user does, finding its processes by role, and making sure that
//! nothing is left behind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::gru;

/// A device that says nothing for so long, or does not end in this time, hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The `tlbridge` binary: `TLBRIDGE_BIN`, else the one beside the test's own target directory.
///
/// # Panics
/// When there is none: says how to build it. (A missing binary is a broken test set-up, not a missing
/// capability.)
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TLBRIDGE_BIN") {
        return path.into();
    }
    let exe = std::env::current_exe().expect("current_exe");
    // target/<profile>/deps/<test> -> target/<profile>/tlbridge
    let candidate = exe
        .parent()
        .and_then(|d| d.parent())
        .map(|d| d.join("tlbridge"))
        .expect("target directory");
    assert!(
        candidate.exists(),
        "{} is not there: run `cargo build --release`, or set TLBRIDGE_BIN",
        candidate.display()
    );
    candidate
}

/// Whether this machine lets an ordinary run use userfaultfd; the reason if not.
#[must_use]
pub fn missing_capability() -> Option<String> {
    if std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .is_ok()
    {
        return None;
    }
    // The kernel without CONFIG_USERFAULTFD has neither file.
    if std::path::Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists() {
        return None;
    }
    Some("no /dev/userfaultfd and no vm.unprivileged_userfaultfd: this kernel has no userfaultfd".into())
}

/// A running `tlbridge` with piped output. Killed when dropped, with its children.
#[derive(Debug)]
pub struct Tool {
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// What a stream has said up to now, and the thread that reads it.
#[derive(Debug)]
struct Output {
    said: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Output {
    fn of(mut stream: impl Read + Send + 'static) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let said = Arc::clone(&said);
            move || {
                let mut part = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut part) {
                    said.lock()
                        .expect("nobody panics with it")
                        .extend_from_slice(&part[..length]);
                }
            }
        });
        Self {
            said,
            reader: Some(reader),
        }
    }

    fn now(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().expect("nobody panics with it")).into_owned()
    }

    /// All of it: waits until nobody holds the other end.
    fn whole(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reader");
        }
        self.now()
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// The JSON object on standard output.
    ///
    /// # Panics
    /// When there is none; shows both streams.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(self.stdout.trim()).unwrap_or_else(|e| {
            panic!(
                "no JSON object on stdout ({e})\nstdout: {}\nstderr: {}",
                self.stdout, self.stderr
            )
        })
    }
}

impl Tool {
    /// Starts the binary with these arguments.
    ///
    /// # Panics
    /// When it can't be started.
    #[must_use]
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(arguments);
        Self::start_command(command)
    }

    /// Starts the tool as this command says; its streams are piped.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start_command(mut command: Command) -> Self {
        let mut child = command
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("starting {:?}: {e}", command.get_program()));
        Self {
            stdout: Output::of(child.stdout.take().expect("piped")),
            stderr: Output::of(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends; `None` when it does not within `limit` (then it and its children are killed).
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Option<Ended> {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait().expect("waitpid") {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                // Polling a child's end: nothing is synchronised by this wait.
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        if status.is_none() {
            for pid in descendants(self.child.id()) {
                kill(pid, 9);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let (stdout, stderr) = (self.stdout.whole(), self.stderr.whole());
        match status {
            Some(status) => Some(Ended {
                status,
                stdout,
                stderr,
            }),
            None => {
                println!("did not end within {limit:?}\nstdout: {stdout}\nstderr: {stderr}");
                None
            }
        }
    }

    /// Waits until this stands on standard error.
    ///
    /// # Panics
    /// When it does not within `limit`, or the tool ends before.
    pub fn expect_on_stderr(&mut self, text: &str, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            // Before the look at what it has said: an end after that is seen the next time.
            let ended = self.child.try_wait().expect("waitpid");
            let said = self.stderr.now();
            if said.contains(text) {
                return;
            }
            assert!(ended.is_none(), "ended ({ended:?}) without {text:?}: {said}");
            assert!(Instant::now() < deadline, "no {text:?} within {limit:?}: {said}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a child of this role is there; its pid. `None` when the tool ended before, or after
    /// 60 s.
    #[must_use]
    pub fn child_of_role(&mut self, role: &str) -> Option<u32> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(&pid) = roles(self.child.id()).get(role) {
                return Some(pid);
            }
            if self.child.try_wait().ok().flatten().is_some() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // Its pid is its own until it has been waited for.
        if let Ok(None) = self.child.try_wait() {
            for pid in descendants(self.child.id()) {
                kill(pid, 9);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A running `tlbridge device`. Killed when dropped.
#[derive(Debug)]
pub struct Device {
    child: Child,
    questions: ChildStdin,
    /// Lines. A receiver alone would keep other threads from looking at the socket.
    answers: Mutex<Receiver<String>>,
    socket: PathBuf,
    /// `TLBRIDGE_SANITIZE=1`, and nothing is broken: the sanitizer may find nothing.
    faultless: bool,
    _directory: Option<TempDir>,
}

impl Device {
    /// Starts one on a socket of its own and waits until it serves.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn gru(arguments: &[&str]) -> Self {
        Self::of("gru", arguments)
    }

    /// The same with an mlx5 HCA.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn mlx5(arguments: &[&str]) -> Self {
        Self::of("mlx5", arguments)
    }

    fn of(model: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut device = Self::start_model(model, &directory.path().join("device.sock"), arguments);
        device._directory = Some(directory);
        device
    }

    /// Starts one and waits until it serves.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start(socket: &Path, arguments: &[&str]) -> Self {
        Self::start_model("gru", socket, arguments)
    }

    fn start_model(model: &str, socket: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary())
            .args(["device", "--model", model, "--socket"])
            .arg(socket)
            .args(arguments)
            // It says when it serves, and answers questions.
            .arg("--supervised")
            .env("RUST_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("starting {}: {e}", binary().display()));
        let questions = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (sender, answers) = channel();
        // Ends with the device.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut device = Self {
            child,
            questions,
            answers: Mutex::new(answers),
            socket: socket.to_owned(),
            // The HCA has no sanitizer.
            faultless: model == "gru"
                && gru::sanitizing()
                && !arguments.iter().any(|argument| breaks(argument)),
            _directory: None,
        };
        let ready = device.said("ready");
        assert!(ready.is_object(), "{ready}");
        device
    }

    /// What the model has counted, as `tlbridge vm --device-stats` shows it.
    ///
    /// # Panics
    /// When the device is gone or does not answer.
    pub fn stats(&mut self) -> serde_json::Value {
        self.ask()["stats"].take()
    }

    /// What its sanitizer has found; null without one.
    ///
    /// # Panics
    /// When the device is gone or does not answer.
    pub fn findings(&mut self) -> serde_json::Value {
        self.ask()["sanitizer"].take()
    }

    fn ask(&mut self) -> serde_json::Value {
        writeln!(self.questions, "stats").expect("the device is gone");
        self.said("stats")
    }

    fn said(&mut self, key: &str) -> serde_json::Value {
        let answers = self.answers.get_mut().expect("nobody locks it");
        let line = match answers.recv_timeout(LIMIT) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("no {key} from the device within {LIMIT:?}"),
            Err(RecvTimeoutError::Disconnected) => {
                panic!("the device is gone: {:?}", self.child.try_wait())
            }
        };
        let mut object: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("the device said {line:?} ({e})"));
        object[key].take()
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Kills it and waits for its end.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("waitpid");
    }

    /// Whether it is still running.
    ///
    /// # Panics
    /// When that cannot be found out.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("waitpid").is_none()
    }

    /// Asks it to end.
    ///
    /// # Panics
    /// When it does not end in good order, or not at all.
    pub fn end(mut self) {
        kill(self.child.id(), 15);
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waitpid") {
                break status;
            }
            assert!(Instant::now() < deadline, "the device does not end");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(status.success(), "the device ended with {status}");
    }
}

/// Whether an argument of a device makes it do what it must not.
fn breaks(argument: &str) -> bool {
    ["--break", "--faults", "--purge-match"]
        .iter()
        .any(|option| argument.starts_with(option))
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.faultless && !std::thread::panicking() && self.is_running() {
            let findings = self.findings();
            assert_eq!(findings["defects"].as_u64(), Some(0), "{findings:#}");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Children of `parent` by role: the first argument of their command line.
#[must_use]
pub fn roles(parent: u32) -> BTreeMap<String, u32> {
    descendants(parent)
        .into_iter()
        .filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let role = line.split(|b| *b == 0).nth(1)?;
            Some((String::from_utf8_lossy(role).into_owned(), pid))
        })
        .collect()
}

/// All processes below `parent`.
#[must_use]
pub fn descendants(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut todo = vec![parent];
    while let Some(pid) = todo.pop() {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
                found.push(child);
                todo.push(child);
            }
        }
    }
    found
}

/// Sends a signal to a process that this test started.
pub fn kill(pid: u32, signal: i32) {
    let (Some(pid), Some(signal)) = (
        rustix::process::Pid::from_raw(pid.cast_signed()),
        rustix::process::Signal::from_named_raw(signal),
    ) else {
        return;
    };
    let _ = rustix::process::kill_process(pid, signal);
}

/// Whether a process is still there (a zombie is not).
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| {
        s.rsplit(')')
            .next()
            .is_some_and(|r| !r.trim_start().starts_with(['Z', 'X']))
    })
}

/// Waits until none of these processes is left; the ones that are after `limit`.
#[must_use]
pub fn survivors(pids: &[u32], limit: Duration) -> Vec<u32> {
    let deadline = Instant::now() + limit;
    loop {
        let left: Vec<u32> = pids.iter().copied().filter(|p| is_alive(*p)).collect();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
