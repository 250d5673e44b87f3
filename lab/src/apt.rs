//! Debian's packages, got by this machine's apt with a configuration of the lab's own: its lists and its idea
//! of what is installed (nothing) have nothing to do with the machine's, so that any user may do it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::{Context, Result, bail, ensure};

use crate::archive;
use crate::packages::{self, on_path};
use crate::place::{Held, Lab, clear, is_root, say};
use crate::steps::Steps;

/// The release that everything comes from.
pub(crate) const RELEASE: &str = "trixie";
/// What does not come from [`RELEASE`] itself.
pub(crate) const BACKPORTS: &str = "trixie-backports";
/// The keys that Debian signs with, under either of its names.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];
/// What a machine without apt can do.
const WITHOUT: &str = "the lab takes Debian's packages with apt-get and dpkg-deb, which other distributions have too \
                       (packages apt and dpkg, with debian-archive-keyring); or copy a lab that another machine has \
                       made, it works wherever it lies (TLBRIDGE_LAB names it)";

/// apt, with lists that are up to date.
#[derive(Debug)]
pub(crate) struct Apt {
    directory: PathBuf,
    steps: Steps,
}

impl Apt {
    /// Gets the lists if this process has not done so for this lab.
    ///
    /// # Errors
    /// No apt, no keys, no network.
    pub(crate) fn open(lab: &Lab, _held: &Held) -> Result<Self> {
        /// Labs whose lists this process has loaded.
        static FRESH: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
        ensure!(cfg!(target_arch = "x86_64"), "the lab's packages are for x86_64");
        for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb", "tar"] {
            ensure!(on_path(program), "{program} is missing: {WITHOUT}");
        }
        let new = Self {
            directory: lab.path("apt"),
            steps: lab.steps(),
        };
        let mut fresh = FRESH.lock().unwrap_or_else(PoisonError::into_inner);
        if !fresh.contains(&new.directory) {
            new.configure(keyring()?)?;
            new.steps.run(
                "package lists of Debian 13 (10 MB)",
                &mut new.command("apt-get", &["update", "-q", "--error-on=any"]),
            )?;
            fresh.push(new.directory.clone());
        }
        Ok(new)
    }

    /// The files of these packages and, unless `alone`, of all that they depend on. The directory is the
    /// caller's, and only these are in it.
    pub(crate) fn download(
        &self,
        what: &str,
        suite: &str,
        packages: &[String],
        alone: bool,
        into: &Path,
    ) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(into.join("partial"))
            .with_context(|| format!("creating {}", into.display()))?;
        let mut command = if alone {
            let mut command = self.command("apt-get", &["download", "-q"]);
            command.current_dir(into);
            command
        } else {
            let mut command = self.command(
                "apt-get",
                &["install", "-qy", "--no-install-recommends", "--download-only"],
            );
            let mut archives = OsString::from("Dir::Cache::archives=");
            archives.push(into);
            command.arg("-o").arg(archives);
            command
        };
        command.args(["-t", suite]).args(packages);
        self.steps.run(what, &mut command)?;
        let mut files: Vec<PathBuf> = std::fs::read_dir(into)
            .with_context(|| format!("reading {}", into.display()))?
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "deb"))
            .collect();
        files.sort();
        ensure!(
            files.len() >= packages.len(),
            "apt-get left {} files for {} packages in {}",
            files.len(),
            packages.len(),
            into.display()
        );
        Ok(files)
    }

    /// A package's record.
    pub(crate) fn show(&self, suite: &str, package: &str) -> Result<String> {
        let output = self
            .command("apt-cache", &["show", "--no-all-versions"])
            .arg("-o")
            .arg(format!("APT::Default-Release={suite}"))
            .arg(package)
            .stdin(Stdio::null())
            .output()
            .context("starting apt-cache")?;
        ensure!(
            output.status.success(),
            "apt-cache show {package} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn configure(&self, keyring: &str) -> Result<()> {
        let at = |name: &str| self.directory.join(name);
        for name in [
            "lists/partial",
            "cache/archives/partial",
            "etc/apt.conf.d",
            "etc/preferences.d",
        ] {
            std::fs::create_dir_all(at(name)).with_context(|| format!("creating {}", at(name).display()))?;
        }
        let mirror = archive::mirror();
        let mut sources = String::new();
        for suite in [RELEASE, BACKPORTS] {
            sources.push_str(&format!("deb [signed-by={keyring}] {mirror} {suite} main\n"));
        }
        let directory = self.directory.display().to_string();
        ensure!(
            !directory.contains(['"', ';']),
            "{directory}: apt takes no directory with such a name"
        );
        let configuration = format!(
            "{}Dir \"{directory}\";\nDir::Etc \"{directory}/etc\";\nDir::State \"{directory}\";\n\
             Dir::State::status \"{directory}/status\";\nDir::Cache \"{directory}/cache\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures \"amd64\";\nAPT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n",
            of_this_machine()
        );
        for (name, text) in [
            ("etc/sources.list", sources.as_str()),
            ("status", ""),
            ("apt.conf", configuration.as_str()),
        ] {
            std::fs::write(at(name), text).with_context(|| format!("writing {}", at(name).display()))?;
        }
        Ok(())
    }

    /// Half an hour for each. In the foreground: Ctrl-C reaches what it starts.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "1800", program])
            .args(arguments)
            .env("APT_CONFIG", self.directory.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .env_remove("LD_PRELOAD");
        command
    }
}

/// How this machine's apt reaches the network, in the words of apt's configuration: proxies, what it thinks of
/// clocks. The rest of its configuration is its own business.
fn of_this_machine() -> String {
    let output = Command::new("apt-config")
        .arg("dump")
        .stdin(Stdio::null())
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    text.unwrap_or_default()
        .lines()
        .filter(|line| {
            [
                "Acquire::http",
                "Acquire::https",
                "Acquire::Check-",
                "Acquire::Retries",
                "Acquire::ForceIPv",
            ]
            .iter()
            .any(|kept| line.starts_with(kept))
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// The keys that packages are checked with: installed where this system can.
fn keyring() -> Result<&'static str> {
    let there = || KEYRINGS.into_iter().find(|k| Path::new(k).exists());
    if let Some(keyring) = there() {
        return Ok(keyring);
    }
    let how = "install debian-archive-keyring";
    if !is_root() {
        bail!("{} is missing: {how}", KEYRINGS[0]);
    }
    say("apt-get install debian-archive-keyring");
    packages::install(&["debian-archive-keyring"]).context(how)?;
    there().with_context(|| format!("{} is still missing: {how}", KEYRINGS[0]))
}

/// Unpacks packages over each other. Nothing of theirs is run.
pub(crate) fn unpack(files: &[PathBuf], into: &Path, steps: &Steps) -> Result<()> {
    std::fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    // The one that has the links which others unpack through.
    let (first, rest): (Vec<_>, Vec<_>) = files.iter().partition(|f| {
        f.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("base-files_"))
    });
    for file in first.into_iter().chain(rest) {
        let mut archive = Command::new("dpkg-deb");
        archive.arg("--fsys-tarfile").arg(file);
        let mut tar = Command::new("tar");
        // As this user's, with the modes that it has in the package.
        tar.args([
            "-x",
            "-p",
            "--no-same-owner",
            "--keep-directory-symlink",
            "-f",
            "-",
            "-C",
        ])
        .arg(into);
        steps
            .pipe(archive, tar)
            .with_context(|| format!("unpacking {}", file.display()))?;
    }
    Ok(())
}

/// Packages that are only unpacked, into a directory that is empty before.
pub(crate) fn download_and_unpack(
    apt: &Apt,
    lab: &Lab,
    what: &str,
    suite: &str,
    lists: [(&[String], bool); 2],
    into: &Path,
) -> Result<()> {
    let archives = lab.path("apt/unpacking");
    for (packages, alone) in lists {
        if packages.is_empty() {
            continue;
        }
        clear(&archives)?;
        let files = apt.download(what, suite, packages, alone, &archives)?;
        unpack(&files, into, &apt.steps)?;
    }
    clear(&archives)
}
