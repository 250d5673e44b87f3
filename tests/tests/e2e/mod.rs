//! A device, a host daemon and applications for the end-to-end tests.
//!
//! The daemon runs in the test's process, so that a test can look into it from both sides. Applications (and
//! devices that are to be killed) are this test binary once more, in a role named by the environment.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use device::gru::{Doorbell, Gru as GruModel, GruConfig};
use driver::backing::Backing;
use host::daemon::{DaemonError, HostConfig, Stop, StopHandle};
use protos::bridge::control::{MAX_PACKET, Reply, Request};
use serde_json::Value;
use tests::in_process::InProcess;

/// How long anything may take before a test fails. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Environment: the role of a child process.
const ROLE: &str = "TLBRIDGE_E2E_ROLE";
/// Environment: the socket that the role needs.
const SOCKET: &str = "TLBRIDGE_E2E_SOCKET";

/// Shows log lines of the test's process when `RUST_LOG` asks for them.
pub fn log_if_asked() {
    if std::env::var_os("RUST_LOG").is_some() {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
    }
}

/// Whether the test cannot run here; says so, and why.
pub fn skipped() -> bool {
    match tests::processes::missing_capability() {
        Some(reason) => {
            eprintln!("SKIPPED: {reason}");
            true
        }
        None => false,
    }
}

/// A GRU in this process.
pub fn in_process_device() -> (Arc<dyn Backing>, Arc<GruModel>) {
    let config = GruConfig {
        doorbell: Doorbell::Poll,
        map_tfh: true,
        ..GruConfig::default()
    };
    let (backing, model) = InProcess::build(|context| GruModel::new(context, config)).expect("a GRU");
    (Arc::new(backing), model)
}

/// A daemon in this process.
pub struct Daemon {
    pub socket: PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<Result<(), DaemonError>>>,
    _dir: tempfile::TempDir,
}

impl Daemon {
    /// Over a device; `change` may change the configuration.
    pub fn start(backing: Arc<dyn Backing>, change: impl FnOnce(&mut HostConfig)) -> Self {
        Self::start_with(change, move |config, stop| {
            host::daemon::run_with_backing(config, backing, stop)
        })
    }

    /// Over a device's socket.
    pub fn start_on(device: &Path, change: impl FnOnce(&mut HostConfig)) -> Self {
        let device = device.to_owned();
        Self::start_with(
            move |config| {
                config.device = device;
                change(config);
            },
            host::daemon::run,
        )
    }

    fn start_with(
        change: impl FnOnce(&mut HostConfig),
        run: impl FnOnce(HostConfig, Stop) -> Result<(), DaemonError> + Send + 'static,
    ) -> Self {
        log_if_asked();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("host");
        let (ready, is_ready) = mpsc::channel();
        let mut config =
            HostConfig::new(&socket, dir.path().join("device")).on_ready(move |_| ready.send(()).unwrap());
        change(&mut config);
        let (stop, handle) = Stop::new().unwrap();
        let thread = std::thread::spawn(move || run(config, stop));
        if is_ready.recv_timeout(PATIENCE).is_err() {
            panic!("the daemon did not start: {:?}", thread.join());
        }
        Self {
            socket,
            stop: handle,
            thread: Some(thread),
            _dir: dir,
        }
    }

    /// Stops it; what `run` returned.
    pub fn stop(mut self) -> Result<(), DaemonError> {
        self.stop.stop();
        self.thread.take().unwrap().join().expect("the daemon's thread")
    }

    /// Waits until it ends by itself; what `run` returned.
    pub fn wait(mut self) -> Result<(), DaemonError> {
        let thread = self.thread.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            assert!(Instant::now() < deadline, "the daemon did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        thread.join().expect("the daemon's thread")
    }

    /// Its statistics, over a connection of their own.
    pub fn stats(&self) -> Value {
        stats(&self.socket)
    }

    /// Asks for statistics until `done` says so.
    pub fn stats_until(&self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stats = self.stats();
            if done(&stats) {
                return stats;
            }
            assert!(Instant::now() < deadline, "{what}: {stats:#}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until no session is left, and checks that nothing of one is.
    pub fn wait_clean(&self) -> Value {
        self.stats_until("sessions are left", |s| {
            s["sessions"].as_array().unwrap().is_empty()
        });
        // A session leaves the list when its closing begins.
        let stats = self.stats_until("something is left", |s| {
            s["device"]["mapped_ranges"] == 0
                && s["device"]["driver"]["contexts_loaded"] == s["device"]["driver"]["contexts_unloaded"]
        });
        assert_eq!(stats["device"]["mapped_files"], 0, "{stats:#}");
        stats
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the daemon's thread").expect("the daemon");
            }
        }
    }
}

/// A raw client of the control socket.
pub struct Client(pub rustix::fd::OwnedFd);

impl Client {
    pub fn connect(socket: &Path) -> Self {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let fd = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        connect(&fd, &SocketAddrUnix::new(socket).unwrap()).unwrap();
        Self(fd)
    }

    /// Sends raw bytes with descriptors.
    pub fn send(&self, bytes: &[u8], fds: &[rustix::fd::BorrowedFd<'_>]) -> rustix::io::Result<()> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(
            &self.0,
            &[std::io::IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
    }

    /// The next reply; `None` when the daemon has hung up.
    pub fn receive(&self) -> Option<(Reply, Vec<rustix::fd::OwnedFd>)> {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.0,
            &mut [std::io::IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = match got {
            Ok(got) => got,
            Err(rustix::io::Errno::CONNRESET) => return None,
            Err(error) => panic!("{error}"),
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        (got.bytes != 0).then(|| (serde_json::from_slice(&bytes[..got.bytes]).unwrap(), fds))
    }

    pub fn request(
        &self,
        request: &Request,
        fds: &[rustix::fd::BorrowedFd<'_>],
    ) -> (Reply, Vec<rustix::fd::OwnedFd>) {
        self.send(&serde_json::to_vec(request).unwrap(), fds).unwrap();
        self.receive().expect("a reply")
    }

    /// A request that is refused; its errno.
    pub fn refused(&self, request: &Request, fds: &[rustix::fd::BorrowedFd<'_>]) -> i32 {
        match self.request(request, fds).0 {
            Reply::Error { errno, message } => {
                assert!(message.len() > 10, "says nothing: {message}");
                errno
            }
            other => panic!("{request:?} was answered with {other:?}"),
        }
    }
}

/// Statistics over a connection of their own.
pub fn stats(socket: &Path) -> Value {
    match Client::connect(socket).request(&Request::Stats, &[]).0 {
        Reply::Stats { stats } => serde_json::from_str(&stats).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// The role that this process was started in, and its socket.
pub fn role() -> Option<(String, PathBuf)> {
    let role = std::env::var(ROLE).ok()?;
    let socket = std::env::var_os(SOCKET).expect("a role has a socket");
    Some((role, socket.into()))
}

/// A child process in a role. Killed when dropped.
pub struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    name: String,
}

impl Role {
    /// Starts this test binary again; `entry` is the name of the test that looks at [`role`].
    pub fn start(entry: &str, role: &str, socket: &Path) -> Self {
        Self::start_with(entry, role, socket, |_| {})
    }

    /// As [`Role::start`]; `change` may add to the command.
    pub fn start_with(entry: &str, role: &str, socket: &Path, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", entry, "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                if let Some(said) = line.strip_prefix("@ ")
                    && send.send(said.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self {
            stdin: child.stdin.take(),
            child,
            lines,
            name: role.to_owned(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the child to say something with [`say`].
    pub fn expect(&mut self, what: &str) {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(said) => assert_eq!(said, what, "role {}", self.name),
            Err(error) => panic!(
                "role {} did not say {what:?}: {error}; it is {:?}",
                self.name,
                self.child.try_wait()
            ),
        }
    }

    /// The next thing that it says.
    pub fn next(&mut self) -> String {
        self.lines
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|e| panic!("role {} says nothing: {e}", self.name))
    }

    /// Lets the child go on from [`pause`].
    pub fn go_on(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Stops the process and waits until every thread of it stands still: a signal is only a request.
    pub fn freeze(&self) {
        self.signal(rustix::process::Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        let still = |stat: String| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T'))
        };
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_dir(&tasks)
            .unwrap()
            .all(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).is_ok_and(still))
        {
            assert!(Instant::now() < deadline, "role {} does not stop", self.name);
            std::thread::yield_now();
        }
    }

    /// Waits for a good end.
    pub fn wait_ok(mut self) {
        self.stdin = None;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "role {} does not end", self.name);
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "role {} ended with {status}", self.name);
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a role: says something to the test.
pub fn say(what: &str) {
    // The test harness has begun a line of its own.
    println!("\n@ {what}");
}

/// In a role: says something and waits for [`Role::go_on`]. A test that is gone ends the wait.
pub fn pause(what: &str) {
    say(what);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// In the role of a device: a GRU behind a vfio-user socket, until it is killed.
pub fn be_device(socket: &Path) {
    let config = GruConfig {
        doorbell: Doorbell::Poll,
        map_tfh: true,
        ..GruConfig::default()
    };
    let function = device::pci::Function::new(|context| {
        GruModel::new(context, config).map(|m| m as Arc<dyn device::model::Model>)
    })
    .expect("a GRU");
    let server = device::server::Server::bind(socket, function, device::server::ServerOptions::default())
        .expect("bind");
    let stop = device::server::StopFd::new().unwrap();
    say("listening");
    server.run(&stop).unwrap();
}
