//! Guests for tests: what the lab has, a device process for each, the guest.

pub mod counters;
pub mod findings;

use std::path::PathBuf;

use lab::Lab;
use lab::acceleration::Acceleration;
use lab::guest::{Failure, Guest, Spec};
use lab::initramfs::Initramfs;
use lab::kernel::{Kernel, Series};

pub use crate::processes::Device;

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

    /// The same with the RDMA programs, and the stock modules of mlx5 loaded.
    ///
    /// # Errors
    /// The programs are missing: the reason of a visible skip.
    ///
    /// # Panics
    /// As [`Rig::initramfs`].
    pub fn rdma_initramfs(&self) -> Result<Initramfs, String> {
        self.lab.find_rdma().map_err(|error| format!("{error:#}"))?;
        let mut files = self.initramfs();
        files.add_rdma(&self.lab, &self.kernel).unwrap();
        Ok(files)
    }

    /// The files for a guest whose commands run in the root image, and the image.
    ///
    /// # Errors
    /// There is no image: the reason of a visible skip.
    ///
    /// # Panics
    /// As [`Rig::initramfs`].
    pub fn image_initramfs(&self) -> Result<(Initramfs, PathBuf), String> {
        let image = self.lab.find_image().map_err(|error| format!("{error:#}"))?;
        let mut files = self.initramfs();
        files.enter_image(&self.lab, &self.kernel).unwrap();
        files.add_rdma_modules(&self.lab, &self.kernel).unwrap();
        Ok((files, image))
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
        spec.devices = devices.iter().map(|d| d.socket().to_owned()).collect();
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
