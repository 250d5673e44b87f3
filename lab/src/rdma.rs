//! What guests with RDMA have: the kernel's own InfiniBand modules, and the programs of rdma-core and perftest
//! with the providers that they load.

use anyhow::{Context, Result};

use crate::Lab;
use crate::apt::RELEASE;
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::tree::{LIBRARIES, Recipe, Tree};

/// Loaded at boot, in this order: the verbs' device files, connection management, mlx5. A guest without a
/// mlx5 function has its driver all the same.
pub const MODULES: [&str; 6] = [
    "mlx5_core",
    "mlx5_ib",
    "ib_uverbs",
    "ib_umad",
    "rdma_cm",
    "rdma_ucm",
];

/// There for `modprobe`, where the kernel has them.
const MORE_MODULES: &[&str] = &[
    "mlx5_core",
    "mlx5_ib",
    "rdma_ucm",
    "ib_umad",
    "ib_ipoib",
    "rdma_rxe",
    "siw",
    // rxe's checksums, which it asks for by name.
    "crc32_generic",
    "crc32_pclmul",
    "dummy",
    "nvme_rdma",
    "nvmet_rdma",
    "null_blk",
    "brd",
    "loop",
    "rpcrdma",
    "nfs",
    "nfsv4",
    "nfsd",
    "ib_iser",
    "ib_isert",
    "ib_srp",
    "ib_srpt",
    "smc",
    "smc_diag",
    "ext4",
    "virtio_blk",
    "virtio_net",
    "zram",
    "pcspkr",
];

/// Packages whose programs are taken.
const PACKAGES: [&str; 7] = [
    "ibverbs-utils",
    "perftest",
    "rdmacm-utils",
    "iproute2",
    "nvme-cli",
    "iperf3",
    "infiniband-diags",
];

/// The programs, as far as the packages have them: by their beginnings, which go through all of a kind.
const PROGRAMS: &[&str] = &[
    "ibv_",
    "ib_",
    "raw_ethernet_",
    "ibstat",
    "ibaddr",
    "ibping",
    "sminfo",
    "perfquery",
    "saquery",
    "smpquery",
    "rping",
    "ucmatose",
    "udaddy",
    "mckey",
    "rdma_client",
    "rdma_server",
    "rdma_xclient",
    "rdma_xserver",
    "cmtime",
    "riostream",
    "rcopy",
    "rstream",
    "udpong",
    "nvme",
    "iperf3",
];

impl Lab {
    /// Whether the programs of guests with RDMA are there.
    ///
    /// # Errors
    /// They are not, and how to get them.
    pub fn find_rdma(&self) -> Result<()> {
        self.rdma_tree().map(|_| ())
    }

    fn rdma_tree(&self) -> Result<Tree> {
        self.find_tree(&recipe()).with_context(|| {
            format!(
                "no RDMA programs in {}: `cargo xtask lab` or `tlbridge vm --guest rdma` get them",
                self.directory().display()
            )
        })
    }

    /// The same, downloaded if they are not there.
    ///
    /// # Errors
    /// They cannot be had here: no apt, no network, no room.
    pub fn provide_rdma(&self) -> Result<()> {
        if self.find_rdma().is_ok() {
            return Ok(());
        }
        let held = self.lock()?;
        self.provide_tree(&recipe(), &held, |_, _| Ok(()))?;
        self.find_rdma()
    }
}

impl Initramfs {
    /// The RDMA programs, their providers, and the modules of that kernel.
    ///
    /// # Errors
    /// The programs are not in the lab ([`Lab::provide_rdma`]), or the kernel has no such modules.
    pub fn add_rdma(&mut self, lab: &Lab, kernel: &Kernel) -> Result<()> {
        let tree = lab.rdma_tree()?;
        let mut programs = Vec::new();
        for directory in ["usr/bin", "usr/sbin"] {
            for name in names(&tree, directory)? {
                if ["ip", "rdma"].contains(&name.as_str()) || PROGRAMS.iter().any(|p| name.starts_with(p)) {
                    programs.push(format!("{directory}/{name}"));
                }
            }
        }
        for program in &programs {
            self.add_program_of(&tree, program)?;
        }
        // The C library loads it when a thread is cancelled or ends itself: rping's do.
        self.add_library_of(&tree, &format!("{LIBRARIES}/libgcc_s.so.1"))?;
        // busybox's own shell runs its other programs whatever PATH says: `ip` would be its.
        self.add_program_of(&tree, "usr/bin/dash")?;
        self.add_link("bin/sh", "dash");
        let providers = format!("{LIBRARIES}/libibverbs");
        for name in names(&tree, &providers)? {
            // The one of mlx5, and those of the software devices.
            if ["libmlx5-", "librxe-", "libsiw-"]
                .iter()
                .any(|p| name.starts_with(p))
            {
                self.add_library_of(&tree, &format!("{providers}/{name}"))?;
                let driver = name
                    .trim_start_matches("lib")
                    .split("-rdmav")
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                let configuration = format!("etc/libibverbs.d/{driver}.driver");
                self.add_copy(&configuration, &tree.root().join(&configuration))?;
            }
        }
        self.add_rdma_modules(lab, kernel)?;
        // Names of hosts and services: in files only.
        self.add_file("etc/hosts", 0o644, b"127.0.0.1 localhost lab\n::1 localhost\n");
        self.add_file("etc/nsswitch.conf", 0o644, b"hosts: files\n");
        Ok(())
    }

    /// The modules only, for a guest whose programs are in a root image.
    ///
    /// # Errors
    /// The kernel has no such modules.
    pub fn add_rdma_modules(&mut self, lab: &Lab, kernel: &Kernel) -> Result<()> {
        for module in kernel.with_dependencies(&MODULES)? {
            self.add_module(lab, &module)?;
        }
        let there: Vec<&str> = MORE_MODULES
            .iter()
            .copied()
            .filter(|name| kernel.with_dependencies(&[name]).is_ok())
            .collect();
        self.add_modules_for_modprobe(lab, kernel, &there)?;
        Ok(())
    }
}

fn recipe() -> Recipe {
    let packages = [
        &["base-files", "dash", "ibverbs-providers", "libc6"][..],
        &PACKAGES[..],
    ]
    .concat();
    Recipe::new(
        "rdma",
        "rdma-core's and perftest's programs (30 MB)",
        RELEASE,
        &packages,
    )
}

/// The names of the files in a directory of a tree, in order.
fn names(tree: &Tree, directory: &str) -> Result<Vec<String>> {
    let path = tree.root().join(directory);
    let mut names: Vec<String> = std::fs::read_dir(&path)
        .with_context(|| format!("reading {}", path.display()))?
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}
