//! A root file system on a disk image: Debian 13 with Python, rdma-core's own tests and what measures disks
//! and networks. For guests whose programs are too many for an initramfs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Lab;
use crate::apt::RELEASE;
use crate::place::{Held, clear, is_root};
use crate::tree::{Recipe, Tree, fnv, need_namespaces};

/// rdma-core's tests in the image, unpacked from where Debian has them.
const TESTS: &str = "usr/share/rdma-core/tests";
const RUNNER: &[u8] = include_bytes!("guest/pyverbs_suite.py");
/// Sparse; what is written in a guest goes elsewhere.
const SIZE: &str = "2G";

impl Lab {
    /// The image that is there.
    ///
    /// # Errors
    /// It is not, and how to get it.
    pub fn find_image(&self) -> Result<PathBuf> {
        let place = self.image_place();
        ensure!(
            place.is_file(),
            "no root image in {}: `cargo xtask lab --all` or `tlbridge vm --guest debian` make one",
            self.directory().display()
        );
        Ok(place)
    }

    /// The same, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made here: no apt, no network, no room.
    pub fn provide_image(&self) -> Result<PathBuf> {
        if let Ok(found) = self.find_image() {
            return Ok(found);
        }
        let held = self.lock()?;
        if let Ok(found) = self.find_image() {
            return Ok(found);
        }
        let tools = self.provide_tools(&held)?;
        let tree = self.provide_tree(&recipe(), &held, |tree, _| finish(tree))?;
        self.pack(&tools, &tree, &held)?;
        // All of it is in the image now.
        clear(tree.root())?;
        self.find_image()
    }

    fn image_place(&self) -> PathBuf {
        self.path(&format!("images/debian-{}.ext4", recipe().key()))
    }

    fn pack(&self, tools: &Tree, tree: &Tree, _held: &Held) -> Result<()> {
        let place = self.image_place();
        let directory = self.path("images");
        std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let new = directory.join("new");
        let _ = std::fs::remove_file(&new);
        let mkfs = tools.program("usr/sbin/mke2fs");
        let mut command = match is_root() || need_namespaces().is_err() {
            // What belongs to this user does so in the guest, where all are root.
            true => mkfs,
            false => {
                let mut command = Command::new("unshare");
                command
                    .arg("--map-root-user")
                    .arg(mkfs.get_program())
                    .args(mkfs.get_args());
                command
            }
        };
        command
            .env_remove("LD_PRELOAD")
            .env("MKE2FS_CONFIG", tools.root().join("etc/mke2fs.conf"))
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "lab"])
            // Nothing is kept that a guest would have to repair; tables are written now, not by each guest.
            .args([
                "-O",
                "^has_journal",
                "-E",
                "root_owner=0:0,lazy_itable_init=0,hash_seed=6c616200-0000-4000-8000-000000000000",
            ])
            .arg("-d")
            .arg(tree.root())
            .arg(&new)
            .arg(SIZE);
        tree.steps().run("the root image", &mut command)?;
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("debian-") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        std::fs::rename(&new, &place).with_context(|| format!("moving the image to {}", place.display()))
    }
}

fn recipe() -> Recipe {
    let mut recipe = Recipe::new(
        "debian",
        "Debian 13 with Python, rdma-core, fio (110 MB)",
        RELEASE,
        &[
            "base-files",
            "base-passwd",
            "bash",
            "busybox-static",
            "coreutils",
            "dash",
            "diffutils",
            "e2fsprogs",
            "ethtool",
            "fio",
            "findutils",
            "gawk",
            "gdb-minimal",
            "grep",
            "gzip",
            "hostname",
            "ibverbs-providers",
            "ibverbs-utils",
            "infiniband-diags",
            "iperf3",
            "iproute2",
            "iputils-ping",
            "kmod",
            "libc-bin",
            "mount",
            "ncurses-base",
            "nfs-common",
            "nvme-cli",
            "pciutils",
            "perftest",
            "procps",
            "python3",
            "python3-pyverbs",
            "rdma-core",
            "rdmacm-utils",
            "sed",
            "strace",
            "tar",
            "util-linux",
        ],
    );
    // What is done with the packages stands in this file.
    recipe.added = fnv(RUNNER) ^ fnv(include_bytes!("image.rs"));
    recipe
}

/// What the packages' scripts would do, as far as it matters.
fn finish(tree: &Tree) -> Result<()> {
    let at = |path: &str| tree.root().join(path);
    for (from, to) in [
        ("usr/share/base-passwd/passwd.master", "etc/passwd"),
        ("usr/share/base-passwd/group.master", "etc/group"),
    ] {
        std::fs::copy(at(from), at(to)).with_context(|| format!("writing {to}"))?;
    }
    for (path, text) in [
        ("etc/hosts", "127.0.0.1 localhost lab\n::1 localhost\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
        ),
        ("etc/hostname", "lab\n"),
        (
            "etc/nvme/hostnqn",
            "nqn.2014-08.org.nvmexpress:uuid:6c616200-0000-4000-8000-000000000001\n",
        ),
        ("etc/nvme/hostid", "6c616200-0000-4000-8000-000000000001\n"),
    ] {
        let path = at(path);
        std::fs::create_dir_all(path.parent().context("a file has a directory")?).context("etc")?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    let link = at("usr/bin/awk");
    if link.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("gawk", &link).context("a link to gawk")?;
    }
    // The modules that come with a guest's kernel have the lists that busybox' reads, not those of kmod.
    let link = at("usr/sbin/modprobe");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink("../bin/busybox", &link).context("a link to busybox")?;
    unpack_tests(&at("usr/share/doc/rdma-core/tests"), &at(TESTS))?;
    std::fs::write(at("usr/bin/pyverbs_suite.py"), RUNNER).context("the runner of rdma-core's tests")?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(
        at("usr/bin/pyverbs_suite.py"),
        std::fs::Permissions::from_mode(0o755),
    )
    .context("the runner of rdma-core's tests")?;
    // Sources compiled here are not compiled in each guest.
    let mut python = tree.program("usr/bin/python3.13");
    python
        .env("PYTHONHOME", at("usr"))
        .env("PYTHONDONTWRITEBYTECODE", "")
        .args(["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"])
        .arg("-s")
        .arg(tree.root())
        .args(["-p", "/"]);
    for directory in ["usr/lib/python3.13", "usr/lib/python3/dist-packages", TESTS] {
        python.arg(at(directory));
    }
    // Without it guests are slower, and nothing else.
    if let Err(error) = tree.steps().run("compiling the image's Python", &mut python) {
        crate::place::say(&format!("  {error:#}"));
    }
    clear(&at("usr/share/doc"))
}

/// Debian compresses the larger ones of documentation.
fn unpack_tests(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    let entries =
        std::fs::read_dir(from).with_context(|| format!("rdma-core's tests, {}", from.display()))?;
    let mut count = 0;
    for entry in entries {
        let path = entry.context("rdma-core's tests")?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (name, contents) = match name.strip_suffix(".gz") {
            None => (
                name.as_str(),
                std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?,
            ),
            Some(plain) => {
                let output = Command::new("gzip")
                    .arg("-dc")
                    .arg(&path)
                    .output()
                    .context("starting gzip for rdma-core's tests")?;
                ensure!(output.status.success(), "gzip cannot read {}", path.display());
                (plain, output.stdout)
            }
        };
        std::fs::write(to.join(name), contents).with_context(|| format!("writing {name}"))?;
        count += usize::from(name.starts_with("test_"));
    }
    ensure!(count > 40, "python3-pyverbs has only {count} files of tests");
    Ok(())
}
