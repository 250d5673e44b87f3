//! Running guests: QEMU with the devices that are on sockets, commands in it, and what became of them.
//!
//! A [`Guest`] is running from [`Guest::start`] (which returns when its init takes commands) until it is
//! dropped or powered off. Nothing of it outlives this process: QEMU is killed when it dies.

mod console;
mod port;
mod process;
mod terminal;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use port::Unframer;
use process::{Process, left_until};
use rustix::event::{PollFd, PollFlags};

use crate::qmp::{Qmp, QmpError};

/// How long QEMU may take to come up, and to answer its monitor.
const QEMU_PATIENCE: Duration = Duration::from_secs(60);
/// A boot takes this long where time limits are meant as they are written.
const REFERENCE_BOOT: Duration = Duration::from_secs(4);

/// What runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The hardware.
    Kvm,
    /// Software.
    Tcg,
}

/// A guest, described.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The program.
    pub qemu: PathBuf,
    /// What runs the processors.
    pub accelerator: Accelerator,
    /// How long a boot takes on this machine: time limits are scaled with it.
    pub boot: Duration,
    /// How long it may take to boot, instead of a limit made from `boot`.
    pub boot_limit: Option<Duration>,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs, as [`crate::initramfs::Initramfs::to_bytes`] makes it.
    pub initramfs: Vec<u8>,
    /// Sockets of vfio-user devices.
    pub devices: Vec<PathBuf>,
    /// Images of disks, of which a guest changes only what it sees of them itself.
    pub disks: Vec<PathBuf>,
    /// Whether the devices are behind an IOMMU, so that the guest's VFIO can give them to programs.
    pub iommu: bool,
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB: on a memfd, shared with the devices.
    pub memory_mib: u64,
    /// QEMU's `-cpu`.
    pub cpu: String,
    /// More kernel parameters.
    pub append: String,
    /// More arguments for QEMU.
    pub qemu_arguments: Vec<OsString>,
    /// Whether an oops ends the guest.
    pub panic_on_oops: bool,
    /// Where the console goes, and what QEMU says.
    pub log: PathBuf,
}

impl Spec {
    /// A guest of 2 processors and 1 GiB without devices.
    #[must_use]
    pub fn new(qemu: PathBuf, kernel: PathBuf, initramfs: Vec<u8>, log: PathBuf) -> Self {
        Self {
            qemu,
            accelerator: Accelerator::Tcg,
            boot: REFERENCE_BOOT,
            boot_limit: None,
            kernel,
            initramfs,
            devices: Vec::new(),
            disks: Vec::new(),
            iommu: false,
            cpus: 2,
            memory_mib: 1024,
            // String instructions on trapped registers go by bytes: without these flags by words.
            cpu: "max,-erms,-fsrm,-fsrs".into(),
            append: String::new(),
            qemu_arguments: Vec::new(),
            panic_on_oops: true,
            log,
        }
    }
}

/// Why a guest did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// QEMU did not come up.
    #[error("QEMU does not start: {said}")]
    NotStarted {
        /// What it said.
        said: String,
    },
    /// The guest's kernel stopped.
    #[error("the guest's kernel stopped while {doing}: {line}; {log}:{tail}", log = .log.display())]
    Panic {
        /// What the guest was doing.
        doing: String,
        /// What the kernel said.
        line: String,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// The guest did not finish in time. It was asked for its processors' state and ended.
    #[error("no end of {doing} within {limit:.0?}; {log}:{tail}", log = .log.display())]
    Hang {
        /// What the guest was doing.
        doing: String,
        /// How long it had.
        limit: Duration,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// QEMU ended, and the guest had not asked for it.
    #[error("QEMU ended ({status}) while {doing}; {log}:{tail}", log = .log.display())]
    QemuEnded {
        /// What the guest was doing.
        doing: String,
        /// QEMU's end.
        status: String,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// The guest powered itself off or restarted.
    #[error("the guest powered off while {doing}; {log}:{tail}", log = .log.display())]
    PoweredOff {
        /// What the guest was doing.
        doing: String,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// A module did not load.
    #[error("a module does not load: {said}; {log}:{tail}", log = .log.display())]
    Module {
        /// What insmod said.
        said: String,
        /// The whole log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// This process was asked to end.
    #[error("interrupted while {doing}")]
    Interrupted {
        /// What the guest was doing.
        doing: String,
    },
    /// Something on this side.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        error: io::Error,
    },
    /// QEMU's monitor.
    #[error(transparent)]
    Monitor(#[from] QmpError),
}

/// Turns an I/O error into a [`Failure`] that says what was tried.
fn failed(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::Io {
        what: what.to_string(),
        error,
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Its exit code.
    pub code: i32,
    /// What it wrote, to both outputs.
    pub output: String,
}

/// What a command's output brings next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// A line, without its end.
    Line(String),
    /// The command's end, with its exit code.
    End(i32),
}

/// A running guest. Dropping it ends it at once.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    port: UnixStream,
    qmp: Qmp,
    log: PathBuf,
    /// Commands so far: makes each one's mark its own.
    commands: u32,
    running: Option<Running>,
    /// How long the boot took.
    booted_in: Duration,
    /// What time limits are multiplied with.
    scale: f64,
}

/// A command that has been started.
#[derive(Debug)]
struct Running {
    what: String,
    unframer: Unframer,
    /// Output that is not yet a line.
    partial: Vec<u8>,
    end: Option<String>,
}

impl Guest {
    /// Boots it. Returns when it takes commands. `interrupt` ends the wait when it becomes readable.
    ///
    /// # Errors
    /// Whatever kept it from coming up.
    pub fn start(spec: &Spec, interrupt: Option<BorrowedFd<'_>>) -> Result<Self, Failure> {
        let directory = tempfile::Builder::new()
            .prefix("tlbridge-guest-")
            .tempdir()
            .map_err(failed("making a directory for the guest"))?;
        let at = |name: &str| directory.path().join(name);
        let listen = |name: &str| UnixListener::bind(at(name)).map_err(failed(format!("the socket {name}")));
        let (port, monitor) = (listen("port")?, listen("qmp")?);
        let initramfs = at("initramfs");
        std::fs::write(&initramfs, &spec.initramfs).map_err(failed("writing the initramfs"))?;
        if let Some(parent) = spec.log.parent() {
            std::fs::create_dir_all(parent).map_err(failed(format!("creating {}", parent.display())))?;
        }
        std::fs::write(&spec.log, "").map_err(failed(format!("writing {}", spec.log.display())))?;
        // Both write at the end: QEMU and, through it, the guest.
        let output = std::fs::File::options()
            .append(true)
            .open(&spec.log)
            .map_err(failed(format!("opening {}", spec.log.display())))?;
        let mut command = spec.command(&initramfs, &at("port"), &at("qmp"));
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed("the log"))?)
            .stderr(output);
        let begin = Instant::now();
        let process = Process::start(command).map_err(failed(format!("starting {}", spec.qemu.display())))?;
        let deadline = begin + QEMU_PATIENCE;
        let accept = |listener: &UnixListener| accept(listener, &process, deadline, &spec.log, interrupt);
        // In the order of QEMU's command line.
        let (port, monitor) = (accept(&port)?, accept(&monitor)?);
        monitor
            .set_read_timeout(Some(QEMU_PATIENCE))
            .map_err(failed("the monitor's socket"))?;
        let qmp = Qmp::new(monitor).map_err(|_| Failure::NotStarted {
            said: console::tail(&console::read(&spec.log)),
        })?;
        let mut guest = Self {
            process,
            port,
            qmp,
            log: spec.log.clone(),
            commands: 0,
            running: Some(Running::new("booting", "boot")),
            booted_in: Duration::ZERO,
            scale: 1.0,
        };
        // QEMU greets when it has read everything. Even if this process is killed nothing stays.
        directory
            .close()
            .map_err(failed("removing the guest's directory"))?;
        // Longer than the longest boot that was seen on a busy machine.
        let limit = spec
            .boot_limit
            .unwrap_or(Duration::from_secs(30) + spec.boot * 10);
        let report = guest.report(Instant::now() + limit, limit, &mut io::sink(), interrupt)?;
        guest.running = None;
        if let Some(said) = report.strip_prefix("failed") {
            return Err(Failure::Module {
                said: said.trim().to_owned(),
                log: guest.log.clone(),
                tail: guest.tail(),
            });
        }
        guest.booted_in = begin.elapsed();
        guest.scale = scale(spec.boot.max(guest.booted_in));
        Ok(guest)
    }

    /// How long it took until it was ready.
    #[must_use]
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// QEMU's pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// QEMU's monitor.
    pub fn monitor(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// What the kernel has complained of so far: warnings, oopses, hung tasks, interrupts that nobody took.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        console::complaints(&console::read(&self.log))
    }

    /// The console so far, with what QEMU said.
    #[must_use]
    pub fn console(&self) -> String {
        console::read(&self.log)
    }

    /// Runs a command of the shell to its end. `limit` is for a machine on which a boot takes 4 s; on a
    /// slower one it is longer.
    ///
    /// # Errors
    /// It did not come to an end. A command that fails is no error.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Finished, Failure> {
        let mut output = Vec::new();
        let code = self.run_to(command, Some(limit), &mut output, None)?;
        Ok(Finished {
            code,
            output: String::from_utf8_lossy(&output).into_owned(),
        })
    }

    /// The same with the output as it comes, and without a limit if there is none.
    ///
    /// # Errors
    /// As [`Guest::run`]; also `interrupt` became readable, or the output cannot be written.
    pub fn run_to(
        &mut self,
        command: &str,
        limit: Option<Duration>,
        output: &mut dyn Write,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<i32, Failure> {
        self.begin_as("run", command)?;
        let limit = self.scaled(limit);
        let report = self.report(Instant::now() + limit, limit, output, interrupt)?;
        self.running = None;
        Ok(code(&report))
    }

    /// Starts a command; [`Guest::next`] follows it.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn begin(&mut self, command: &str) -> Result<(), Failure> {
        self.begin_as("run", command)
    }

    /// Waits for the next line of the command that was begun, or its end.
    ///
    /// # Errors
    /// As [`Guest::run`].
    ///
    /// # Panics
    /// When no command is running.
    pub fn next(&mut self, limit: Duration) -> Result<Next, Failure> {
        let limit = self.scaled(Some(limit));
        let deadline = Instant::now() + limit;
        loop {
            let running = self.running.as_mut().expect("a command is running");
            if let Some(at) = running.partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = running.partial.drain(..=at).collect();
                let line = String::from_utf8_lossy(&line[..at]).into_owned();
                return Ok(Next::Line(line));
            }
            if let Some(report) = running.end.take() {
                if !running.partial.is_empty() {
                    running.end = Some(report);
                    let line = std::mem::take(&mut running.partial);
                    return Ok(Next::Line(String::from_utf8_lossy(&line).into_owned()));
                }
                self.running = None;
                return Ok(Next::End(code(&report)));
            }
            self.read_some(deadline, limit, None)?;
        }
    }

    /// Waits for a line of the command that was begun for which `wanted` holds, and returns it.
    ///
    /// # Errors
    /// As [`Guest::run`]; the command's end without such a line is [`Failure::Io`].
    pub fn wait_for(&mut self, wanted: impl Fn(&str) -> bool, limit: Duration) -> Result<String, Failure> {
        let mut seen = String::new();
        loop {
            match self.next(limit)? {
                Next::Line(line) if wanted(&line) => return Ok(line),
                Next::Line(line) => {
                    seen.push_str(&line);
                    seen.push('\n');
                }
                Next::End(code) => {
                    return Err(failed("waiting for a line of a command")(io::Error::other(
                        format!("it ended with {code} after:\n{seen}"),
                    )));
                }
            }
        }
    }

    /// Waits for the end of the command that was begun.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn finish(&mut self, limit: Duration) -> Result<Finished, Failure> {
        let mut output = String::new();
        loop {
            match self.next(limit)? {
                Next::Line(line) => {
                    output.push_str(&line);
                    output.push('\n');
                }
                Next::End(code) => return Ok(Finished { code, output }),
            }
        }
    }

    /// Runs a command with this process' terminal. Ctrl-A x ends the guest, Ctrl-A Ctrl-A is a Ctrl-A.
    ///
    /// # Errors
    /// As [`Guest::run_to`]; the terminal cannot be used.
    pub fn run_on_terminal(
        &mut self,
        command: &str,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<i32, Failure> {
        let terminal = terminal::Raw::new().map_err(failed("the terminal"))?;
        let command = format!("{}\n{command}", terminal.size_command());
        self.begin_as("terminal", &command)?;
        let report = self.relay(&terminal, interrupt)?;
        self.running = None;
        Ok(code(&report))
    }

    /// The contents of a file of the guest.
    ///
    /// # Errors
    /// As [`Guest::run`]; no such file is [`Failure::Io`].
    pub fn read_file(&mut self, path: &str, limit: Duration) -> Result<Vec<u8>, Failure> {
        let mut contents = Vec::new();
        let code = self.run_to(&format!("cat '{path}'"), Some(limit), &mut contents, None)?;
        match code {
            0 => Ok(contents),
            _ => Err(failed(format!("reading {path} of the guest"))(io::Error::other(
                String::from_utf8_lossy(&contents).trim().to_owned(),
            ))),
        }
    }

    /// Powers the guest off and waits for the end of QEMU; what the kernel has complained of.
    ///
    /// # Errors
    /// It does not end, or not well.
    pub fn power_off(mut self) -> Result<Vec<String>, Failure> {
        self.running = Some(Running::new("powering off", "never"));
        self.port.write_all(b"off off off\n").map_err(|_| self.gone())?;
        let limit = self.scaled(Some(Duration::from_secs(30)));
        if !self.process.ended_by(Instant::now() + limit) {
            return Err(self.hang(limit));
        }
        match self.gone() {
            Failure::PoweredOff { .. } => Ok(self.complaints()),
            failure => Err(failure),
        }
    }

    fn scaled(&self, limit: Option<Duration>) -> Duration {
        match limit {
            Some(limit) => limit.mul_f64(self.scale),
            // A year: poll takes no endless deadline.
            None => Duration::from_secs(365 * 24 * 3600),
        }
    }

    fn begin_as(&mut self, kind: &str, command: &str) -> Result<(), Failure> {
        assert!(self.running.is_none(), "one command at a time");
        self.commands += 1;
        let mark = format!("m{:x}-{:x}", self.process.pid(), self.commands);
        self.running = Some(Running::new(&format!("running {:?}", short(command)), &mark));
        self.port
            .write_all(port::line(&mark, kind, command).as_bytes())
            .map_err(|_| self.gone())
    }

    /// Reads until the report of the running command, with the output going to `output`.
    fn report(
        &mut self,
        deadline: Instant,
        limit: Duration,
        output: &mut dyn Write,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<String, Failure> {
        loop {
            let running = self.running.as_mut().expect("a command is running");
            if !running.partial.is_empty() {
                let bytes = std::mem::take(&mut running.partial);
                output
                    .write_all(&bytes)
                    .and_then(|()| output.flush())
                    .map_err(failed("writing the guest's output"))?;
            }
            if let Some(report) = running.end.take() {
                return Ok(report);
            }
            self.read_some(deadline, limit, interrupt)?;
        }
    }

    /// Waits for something on the port and takes it.
    fn read_some(
        &mut self,
        deadline: Instant,
        limit: Duration,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<(), Failure> {
        let mut fds = vec![PollFd::new(&self.port, PollFlags::IN)];
        if let Some(interrupt) = &interrupt {
            fds.push(PollFd::new(interrupt, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&left_until(deadline))) {
            Ok(0) => return Err(self.hang(limit)),
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(failed("waiting for the guest")(error.into())),
            Ok(_) => {}
        }
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            return Err(Failure::Interrupted { doing: self.doing() });
        }
        self.take_output()
    }

    /// Reads what there is on the port.
    fn take_output(&mut self) -> Result<(), Failure> {
        let mut bytes = [0; 16384];
        match self.port.read(&mut bytes) {
            Ok(count @ 1..) => {
                let running = self.running.as_mut().expect("a command is running");
                let piece = running.unframer.push(&bytes[..count]);
                running.partial.extend(piece.output);
                running.end = piece.report;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            // An end shows as one of the file, or as a reset.
            _ => Err(self.gone()),
        }
    }

    /// Forwards between the terminal and the guest until the report comes.
    fn relay(
        &mut self,
        terminal: &terminal::Raw,
        interrupt: Option<BorrowedFd<'_>>,
    ) -> Result<String, Failure> {
        let mut escape = terminal::Escape::default();
        let mut open = true;
        loop {
            let running = self.running.as_mut().expect("a command is running");
            let bytes = std::mem::take(&mut running.partial);
            terminal
                .write(&bytes)
                .map_err(failed("writing to the terminal"))?;
            if let Some(report) = running.end.take() {
                return Ok(report);
            }
            let mut fds = vec![PollFd::new(&self.port, PollFlags::IN)];
            if open {
                fds.push(PollFd::new(terminal, PollFlags::IN));
            }
            if let Some(interrupt) = &interrupt {
                fds.push(PollFd::new(interrupt, PollFlags::IN));
            }
            match rustix::event::poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(failed("waiting for the guest")(error.into())),
                Ok(_) => {}
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if interrupt.is_some() && ready.last() == Some(&true) {
                return Err(Failure::Interrupted { doing: self.doing() });
            }
            if ready[0] {
                self.take_output()?;
            }
            if open && ready[1] {
                let typed = terminal.read().map_err(failed("reading the terminal"))?;
                open = !typed.is_empty();
                let typed = if open { typed } else { vec![terminal::END] };
                let (forward, leave) = escape.filter(&typed);
                if leave {
                    return Err(Failure::Interrupted { doing: self.doing() });
                }
                self.port.write_all(&forward).map_err(|_| self.gone())?;
            }
        }
    }

    fn doing(&self) -> String {
        self.running
            .as_ref()
            .map_or_else(|| "doing nothing".into(), |r| r.what.clone())
    }

    fn tail(&self) -> String {
        console::tail(&console::read(&self.log))
    }

    /// The time is over: asks the processors where they are, and ends it.
    fn hang(&mut self, limit: Duration) -> Failure {
        let doing = self.doing();
        // A non-maskable interrupt that nobody expects: the kernel panics and shows where it was.
        if self.qmp.execute("inject-nmi", &serde_json::json!({})).is_ok() {
            self.process
                .ended_by(Instant::now() + Duration::from_secs(5).mul_f64(self.scale));
        }
        self.process.kill();
        let _ = self.process.wait();
        Failure::Hang {
            doing,
            limit,
            log: self.log.clone(),
            tail: self.tail(),
        }
    }

    /// QEMU has closed the port: why.
    fn gone(&mut self) -> Failure {
        let doing = self.doing();
        // It closes its sockets a little before it ends.
        if !self.process.ended_by(Instant::now() + QEMU_PATIENCE) {
            self.process.kill();
        }
        let status = self.process.wait();
        let text = console::read(&self.log);
        let (log, tail) = (self.log.clone(), console::tail(&text));
        if let Some(line) = console::panic_line(&text) {
            return Failure::Panic {
                doing,
                line,
                log,
                tail,
            };
        }
        match status {
            Some(status) if status.success() => Failure::PoweredOff { doing, log, tail },
            status => Failure::QemuEnded {
                doing,
                status: status.map_or_else(|| "unknown".into(), |s| s.to_string()),
                log,
                tail,
            },
        }
    }
}

impl Running {
    fn new(what: &str, mark: &str) -> Self {
        Self {
            what: what.into(),
            unframer: Unframer::new(mark),
            partial: Vec::new(),
            end: None,
        }
    }
}

impl Spec {
    /// QEMU's command line.
    fn command(&self, initramfs: &Path, port: &Path, qmp: &Path) -> Command {
        let memory = format!("{}M", self.memory_mib);
        let mut append = String::from(
            // 8250: four serial ports; no5lvl and mitigations: quicker under emulation; the console shows
            // warnings and worse until init asks for everything; an NMI that nobody expects is for hangs.
            "console=ttyS0 loglevel=5 panic=-1 no5lvl mitigations=off audit=0 8250.nr_uarts=4 \
             random.trust_cpu=on unknown_nmi_panic rdinit=/init",
        );
        if self.panic_on_oops {
            append.push_str(" oops=panic");
        }
        if self.iommu {
            append.push_str(" intel_iommu=on");
        }
        if !self.append.is_empty() {
            append.push(' ');
            append.push_str(&self.append);
        }
        let mut command = Command::new(&self.qemu);
        command
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-net", "none"])
            .args(["-M", "q35,memory-backend=mem0", "-object"])
            .arg(format!("memory-backend-memfd,id=mem0,size={memory},share=on"))
            .args(["-m", &memory, "-smp", &self.cpus.to_string(), "-cpu", &self.cpu])
            .args([
                "-accel",
                match self.accelerator {
                    Accelerator::Kvm => "kvm",
                    Accelerator::Tcg => "tcg,thread=multi",
                },
            ])
            .arg("-chardev")
            .arg(format!("file,id=console,append=on,path={}", option(&self.log)))
            .arg("-chardev")
            .arg(format!("socket,id=port,path={}", option(port)))
            .args(["-serial", "chardev:console", "-serial", "chardev:port"])
            .arg("-qmp")
            .arg(format!("unix:{}", option(qmp)))
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &append]);
        if self.iommu {
            // Before the devices that are to be behind it. Without intremap VFIO refuses them.
            let iommu = "intel-iommu,caching-mode=on,intremap=on,aw-bits=48";
            command.args(["-machine", "kernel-irqchip=split", "-device", iommu]);
        }
        for (index, socket) in self.devices.iter().enumerate() {
            let device = serde_json::json!({
                "driver": "vfio-user-pci",
                "id": format!("device{index}"),
                "socket": { "type": "unix", "path": socket },
            });
            command.args(["-device", &device.to_string()]);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let drive = format!(
                "if=none,id=disk{index},format=raw,snapshot=on,file={}",
                option(disk)
            );
            let device = format!("virtio-blk-pci,drive=disk{index}");
            command.args(["-drive", &drive, "-device", &device]);
        }
        command.args(&self.qemu_arguments);
        command.env_remove("LD_PRELOAD");
        command
    }
}

/// A path inside one of QEMU's option lists, in which a comma is doubled.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Waits for QEMU to connect, or to end.
fn accept(
    listener: &UnixListener,
    process: &Process,
    deadline: Instant,
    log: &Path,
    interrupt: Option<BorrowedFd<'_>>,
) -> Result<UnixStream, Failure> {
    loop {
        let mut fds = vec![
            PollFd::new(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN),
        ];
        if let Some(interrupt) = interrupt {
            fds.push(PollFd::from_borrowed_fd(interrupt, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&left_until(deadline))) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(failed("waiting for QEMU")(error.into())),
            Ok(_) => {}
        }
        if fds.get(2).is_some_and(|fd| !fd.revents().is_empty()) {
            return Err(Failure::Interrupted {
                doing: "starting QEMU".into(),
            });
        }
        if !fds[0].revents().is_empty() {
            let (stream, _) = listener.accept().map_err(failed("QEMU's connection"))?;
            return Ok(stream);
        }
        // It has ended, or the time is over.
        return Err(Failure::NotStarted {
            said: console::tail(&console::read(log)),
        });
    }
}

fn code(report: &str) -> i32 {
    // The guest's shell wrote it.
    report.parse().unwrap_or(-1)
}

fn scale(boot: Duration) -> f64 {
    (boot.as_secs_f64() / REFERENCE_BOOT.as_secs_f64()).max(1.0)
}

/// The beginning of a command, for messages.
fn short(command: &str) -> String {
    let line = command.trim().lines().last().unwrap_or_default();
    match line.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line.to_owned(),
    }
}
