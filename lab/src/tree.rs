//! The root tree of Debian 13 with its backports: QEMU and the tools that build modules are installed in it.
//! Its programs run on this system by the tree's own loader, without privilege; only installing packages and
//! entering the tree need root.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::archive;
use crate::packages::{self, on_path};
use crate::place::{Held, Lab, clear, is_root, say, write_whole};

const SUITE: &str = "trixie";
/// What does not come from [`SUITE`] itself.
pub(crate) const BACKPORTS: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Libraries of the tree.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// The tree, with its basis installed.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    root: PathBuf,
    log: PathBuf,
}

impl Tree {
    /// The tree that is there.
    pub(crate) fn find(lab: &Lab) -> Option<Self> {
        let tree = Self {
            root: lab.path("root"),
            log: lab.path("build.log"),
        };
        (tree.stamp("base").exists() && !tree.stamp("unfinished").exists()).then_some(tree)
    }

    /// The tree, made if it is not there. One in which an installation was interrupted is made anew.
    pub(crate) fn provide(lab: &Lab, _held: &Held) -> Result<Self> {
        if let Some(tree) = Self::find(lab) {
            return Ok(tree);
        }
        ensure!(cfg!(target_arch = "x86_64"), "the lab's packages are for x86_64");
        if !is_root() {
            bail!(
                "making a root tree of Debian 13 needs root, once: run this as root with TLBRIDGE_LAB={}",
                lab.directory().display()
            );
        }
        need_debootstrap()?;
        let tree = Self {
            root: lab.path("root"),
            log: lab.path("build.log"),
        };
        let new = Self {
            root: lab.path("root.new"),
            log: tree.log.clone(),
        };
        if tree.root.exists() || new.root.exists() {
            say("removing what an interrupted run left");
        }
        clear(&tree.root)?;
        clear(&new.root)?;
        std::fs::write(&tree.log, "").with_context(|| format!("writing {}", tree.log.display()))?;
        let mirror = archive::mirror();
        tree.step(
            "root tree of Debian 13 (debootstrap, about 100 MB)",
            limited()
                .args(["debootstrap", "--variant=minbase"])
                .arg(format!("--keyring={KEYRING}"))
                .arg(SUITE)
                .arg(&new.root)
                .arg(&mirror),
        )?;
        // Scripts of packages want to start services: there are none in this tree.
        let policy = new.root.join("usr/sbin/policy-rc.d");
        std::fs::write(&policy, "#!/bin/sh\nexit 101\n").context("policy-rc.d")?;
        std::fs::set_permissions(&policy, std::fs::Permissions::from_mode(0o755)).context("policy-rc.d")?;
        // debootstrap has copied resolv.conf and hosts.
        std::fs::write(
            new.root.join("etc/apt/sources.list"),
            format!("deb {mirror} {SUITE} main\ndeb {mirror} {BACKPORTS} main\n"),
        )
        .context("the tree's sources.list")?;
        std::fs::write(new.stamp("base"), "").context("the tree's stamp")?;
        std::fs::rename(&new.root, &tree.root)
            .with_context(|| format!("moving the tree to {}", tree.root.display()))?;
        Ok(tree)
    }

    /// Its directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A file that says that something is complete in this tree.
    pub(crate) fn stamp(&self, name: &str) -> PathBuf {
        self.root.join(format!(".lab-{name}"))
    }

    /// Installs packages, once. `-t` of the backports throughout: libraries of both releases do not go
    /// together.
    pub(crate) fn install(&self, name: &str, what: &str, packages: &[&str], _held: &Held) -> Result<()> {
        if self.stamp(name).exists() {
            return Ok(());
        }
        self.need_root(what)?;
        let unfinished = self.stamp("unfinished");
        std::fs::write(&unfinished, name).with_context(|| format!("writing {}", unfinished.display()))?;
        self.step("package lists", &mut self.apt(&["update", "-q"]))?;
        let mut arguments = vec!["install", "-qy", "--no-install-recommends", "-t", BACKPORTS];
        arguments.extend(packages);
        self.step(what, &mut self.apt(&arguments))?;
        let archives = self.root.join("var/cache/apt/archives");
        for entry in std::fs::read_dir(&archives).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "deb") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        write_whole(&self.stamp(name), b"")?;
        std::fs::remove_file(&unfinished).with_context(|| format!("removing {}", unfinished.display()))
    }

    /// Downloads packages without installing them; the files, in a directory of the tree that is empty
    /// before.
    pub(crate) fn download(&self, what: &str, packages: &[String], _held: &Held) -> Result<Vec<PathBuf>> {
        self.need_root(what)?;
        let directory = self.root.join("var/tmp/lab-packages");
        clear(&directory)?;
        std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let mut command = limited();
        command
            .arg("chroot")
            .arg(&self.root)
            .args([
                "sh",
                "-c",
                "cd /var/tmp/lab-packages && exec apt-get -q -o APT::Sandbox::User=root download \"$@\"",
                "download",
            ])
            .args(packages);
        environment(&mut command);
        self.step(what, &mut command)?;
        let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
            .with_context(|| format!("reading {}", directory.display()))?
            .flatten()
            .map(|e| e.path())
            .collect();
        files.sort();
        ensure!(
            files.len() == packages.len(),
            "apt-get download left {} files for {} packages in {}",
            files.len(),
            packages.len(),
            directory.display()
        );
        Ok(files)
    }

    /// What `apt-cache` says. Lists must have been loaded.
    pub(crate) fn apt_cache(&self, arguments: &[&str]) -> Result<String> {
        let mut command = limited();
        command
            .arg("chroot")
            .arg(&self.root)
            .arg("apt-cache")
            .args(arguments);
        environment(&mut command);
        let output = command
            .stdin(Stdio::null())
            .output()
            .context("starting apt-cache in the root tree")?;
        ensure!(
            output.status.success(),
            "apt-cache {} failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// One of the tree's programs, run on this system by the tree's loader: without privilege, with this
    /// system's files.
    pub(crate) fn program(&self, path: &str) -> Command {
        let mut command = Command::new(self.root.join(LOADER));
        command
            .arg("--library-path")
            .arg(self.root.join(LIBRARIES))
            .arg("--argv0")
            .arg(Path::new(path).file_name().unwrap_or(OsStr::new(path)))
            .arg(self.root.join(path));
        command
    }

    /// A script for `sh` that becomes one of the tree's programs, with these further lines before it. It
    /// stands beside the tree and goes by its own place, so that a lab can be moved or copied.
    pub(crate) fn wrapper(&self, path: &str, lines: &str, arguments: &str) -> String {
        let root = self.root.file_name().unwrap_or(OsStr::new("root")).display();
        let name = Path::new(path).file_name().unwrap_or(OsStr::new(path)).display();
        format!(
            "#!/bin/sh\n# {name} of Debian {BACKPORTS}, run on this system by its own loader.\ntree=\"${{0%/*}}/{root}\"\n{lines}\
             exec \"$tree/{LOADER}\" --library-path \"$tree/{LIBRARIES}\" --argv0 {name} \\\n  \
             \"$tree/{path}\" {arguments} \"$@\"\n"
        )
    }

    /// A command inside the tree, as root or in a user namespace, in which `work` is `/mnt`.
    pub(crate) fn inside(&self, work: &Path, script: &str) -> Command {
        let mut command = limited();
        command.arg("unshare").arg("--mount");
        if !is_root() {
            command.arg("--map-root-user");
        }
        command
            .args([
                "sh",
                "-ec",
                "mount --bind \"$1\" \"$2/mnt\"; exec chroot \"$2\" sh -ec \"$3\"",
                "inside",
            ])
            .arg(work)
            .arg(&self.root)
            .arg(script);
        environment(&mut command);
        command
    }

    /// A script inside the tree, as root.
    pub(crate) fn root_shell(&self, script: &str) -> Command {
        let mut command = limited();
        command.arg("chroot").arg(&self.root).args(["sh", "-ec", script]);
        environment(&mut command);
        command
    }

    /// Runs one step of making something: its name and its time are shown, its output goes to the log.
    pub(crate) fn step(&self, what: &str, command: &mut Command) -> Result<()> {
        say(what);
        let begin = Instant::now();
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        let status = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("the log")?)
            .stderr(file)
            .status()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        if !status.success() {
            let text = std::fs::read(&self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            let mut end = String::new();
            for line in &lines[lines.len().saturating_sub(8)..] {
                let _ = write!(end, "\n  | {line}");
            }
            bail!("\"{what}\" failed ({status}); {}:{end}\n", self.log.display());
        }
        say(&format!("  done in {:.0} s", begin.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Says what to do if this user cannot change the tree.
    pub(crate) fn need_root(&self, what: &str) -> Result<()> {
        if is_root() {
            return Ok(());
        }
        bail!(
            "\"{what}\" in {} needs root, once: run this as root with TLBRIDGE_LAB={}",
            self.root.display(),
            self.root.parent().unwrap_or(&self.root).display()
        )
    }

    fn apt(&self, arguments: &[&str]) -> Command {
        let mut command = limited();
        command
            .arg("chroot")
            .arg(&self.root)
            .arg("apt-get")
            .args(arguments);
        environment(&mut command);
        command
    }
}

/// Half an hour for each step. In the foreground: Ctrl-C reaches what it starts.
fn limited() -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", "1800"]);
    command
}

fn environment(command: &mut Command) {
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .env_remove("LD_PRELOAD")
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
}

/// debootstrap and the keys that it checks packages with: installed where this system can.
fn need_debootstrap() -> Result<()> {
    let there = || on_path("debootstrap") && Path::new(KEYRING).exists();
    if there() {
        return Ok(());
    }
    let packages = ["debootstrap", "debian-archive-keyring"];
    let how = format!("install {}", packages.join(" and "));
    ensure!(on_path("apt-get"), "debootstrap or {KEYRING} is missing: {how}");
    say(&format!("apt-get install {}", packages.join(" ")));
    packages::install(&packages).with_context(|| how.clone())?;
    ensure!(there(), "debootstrap or {KEYRING} is still missing: {how}");
    Ok(())
}
