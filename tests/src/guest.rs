//! Guests for tests: what the lab has, a device process for each, the guest.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lab::Lab;
use lab::acceleration::Acceleration;
use lab::guest::{Failure, Guest, Spec};
use lab::initramfs::Initramfs;
use lab::kernel::{Kernel, Series};

use crate::processes::binary;

/// What there is to run guests with.
#[derive(Debug)]
pub struct Rig {
    /// The lab.
    pub lab: Lab,
    /// Its stock kernel.
    pub kernel: Kernel,
    qemu: PathBuf,
    acceleration: Acceleration,
}

impl Rig {
    /// Looks for everything.
    ///
    /// # Errors
    /// What is missing: the reason of a visible skip.
    pub fn find() -> Result<Self, String> {
        let find = || -> anyhow::Result<Self> {
            let lab = Lab::locate()?;
            Ok(Self {
                qemu: lab.find_qemu()?,
                kernel: lab.find_kernel(Series::Stable)?,
                acceleration: lab.acceleration()?,
                lab,
            })
        };
        find().map_err(|error| format!("{error:#}"))
    }

    /// The modules of the GRU.
    ///
    /// # Errors
    /// They are missing: the reason of a visible skip.
    pub fn gru_modules(&self) -> Result<Vec<PathBuf>, String> {
        self.lab
            .find_gru_modules(Series::Stable)
            .map_err(|error| format!("{error:#}"))
    }

    /// The files that every guest has.
    ///
    /// # Panics
    /// When the lab that was found is broken.
    #[must_use]
    pub fn initramfs(&self) -> Initramfs {
        Initramfs::new(&self.lab).unwrap()
    }

    /// A guest with these files and devices, not yet running. Its log is named after the test.
    ///
    /// # Panics
    /// When the files cannot be packed.
    #[must_use]
    pub fn spec(&self, test: &str, files: &Initramfs, devices: &[&Device]) -> Spec {
        let logs = self.lab.directory().join("logs");
        let mut spec = Spec::new(
            self.qemu.clone(),
            self.kernel.image.clone(),
            files.to_bytes().unwrap(),
            logs.join(format!("{test}.log")),
        );
        spec.accelerator = self.acceleration.accelerator;
        spec.boot = self.acceleration.boot;
        spec.devices = devices.iter().map(|d| d.socket.clone()).collect();
        spec
    }

    /// A guest that is running.
    ///
    /// # Errors
    /// As [`Guest::start`].
    pub fn boot(&self, test: &str, files: &Initramfs, devices: &[&Device]) -> Result<Guest, Failure> {
        Guest::start(&self.spec(test, files, devices), None)
    }
}

/// `tlbridge device` on a socket of its own; killed when dropped.
#[derive(Debug)]
pub struct Device {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Device {
    /// A GRU, with further arguments for `tlbridge device`. Returns when its socket is there.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn gru(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("gru.sock");
        let child = Command::new(binary())
            .args(["device", "--model", "gru", "--socket"])
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut device = Self {
            child,
            socket,
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !device.socket.exists() {
            let ended = device.child.try_wait().unwrap();
            assert!(ended.is_none(), "the device process ended: {ended:?}");
            assert!(Instant::now() < deadline, "the device process does not listen");
            // Either it listens or it ends: looking at both in turns.
            std::thread::sleep(Duration::from_millis(5));
        }
        device
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
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it is still running.
    ///
    /// # Panics
    /// When that cannot be found out.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A [`Rig`], or a visible skip of the test.
#[macro_export]
macro_rules! guest_or_skip {
    () => {
        match $crate::guest::Rig::find() {
            Ok(rig) => rig,
            Err(why) => {
                println!("SKIP: {why}");
                return;
            }
        }
    };
}
