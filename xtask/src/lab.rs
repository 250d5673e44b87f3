//! A QEMU with `vfio-user-pci` for the tests: the one that the machine has, else one from Debian's packages
//! in a root tree below `target/lab`. Nothing outside that directory changes (but for `debootstrap`, which
//! is installed where it is missing), and after the first time no network is used.
//!
//! `vfio-user-pci` came with QEMU 10.1; Debian 13 has it in its backports. The program runs on this
//! machine's kernel by the root tree's own loader, so that it shares files and sockets with the tests and
//! needs no privilege.

use crate::provision;
use anyhow::{Context, bail};
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// The device that a usable QEMU lists in `-device help`.
const DEVICE: &str = "vfio-user-pci";
const PROGRAM: &str = "qemu-system-x86_64";
const SUITE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What there is to test with.
#[derive(Debug)]
pub enum Lab {
    /// This program lists `vfio-user-pci`.
    Qemu(PathBuf),
    /// There is none, and why.
    Unavailable(String),
}

/// Finds or builds the QEMU. `root` is the project's directory.
///
/// # Errors
/// Only what is wrong with this directory (no room, no permission); whatever the machine or the network
/// lacks is [`Lab::Unavailable`].
pub fn provide(root: &Path) -> anyhow::Result<Lab> {
    if let Some(named) = std::env::var_os("TLBRIDGE_QEMU") {
        let named = PathBuf::from(named);
        return Ok(match usable(&named) {
            Ok(()) => Lab::Qemu(named),
            Err(why) => Lab::Unavailable(format!("TLBRIDGE_QEMU={}: {why}", named.display())),
        });
    }
    let lab = root.join("target/lab");
    let wrapper = lab.join(PROGRAM);
    // Written last, so its presence says that everything before it succeeded.
    if wrapper.exists() {
        return Ok(Lab::Qemu(wrapper));
    }
    if provision::on_path(PROGRAM) {
        match usable(Path::new(PROGRAM)) {
            Ok(()) => return Ok(Lab::Qemu(PROGRAM.into())),
            Err(why) => println!("lab: {PROGRAM} on PATH will not do: {why}"),
        }
    }
    match build(&lab) {
        Ok(()) => {
            write_wrapper(&lab, &wrapper)?;
            match usable(&wrapper) {
                Ok(()) => Ok(Lab::Qemu(wrapper)),
                Err(why) => {
                    std::fs::remove_file(&wrapper).context("removing an unusable wrapper")?;
                    Ok(Lab::Unavailable(format!(
                        "the QEMU of {BACKPORTS} does not do: {why}"
                    )))
                }
            }
        }
        Err(error) => Ok(Lab::Unavailable(format!(
            "no QEMU with {DEVICE} (10.1 or later): {error:#}. Install one, or name it with TLBRIDGE_QEMU"
        ))),
    }
}

/// `cargo xtask lab`: provides it and says what there is.
///
/// # Errors
/// As [`provide`].
pub fn run(root: &Path) -> anyhow::Result<bool> {
    let begin = Instant::now();
    match provide(root)? {
        Lab::Qemu(path) => {
            println!(
                "lab: {}: {} ({:.1} s)",
                path.display(),
                version(&path).unwrap_or_default(),
                begin.elapsed().as_secs_f64()
            );
            Ok(true)
        }
        Lab::Unavailable(why) => {
            println!("lab: unavailable: {why}");
            Ok(false)
        }
    }
}

fn version(qemu: &Path) -> Option<String> {
    let output = Command::new(qemu).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// Whether that program starts and has the device; the reason if not.
fn usable(qemu: &Path) -> Result<(), String> {
    let output = Command::new(qemu)
        .args(["-device", "help"])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("it does not start: {e}"))?;
    if String::from_utf8_lossy(&output.stdout).contains(DEVICE) {
        Ok(())
    } else if output.status.success() {
        Err(format!("its -device help does not list {DEVICE}"))
    } else {
        let why = String::from_utf8_lossy(&output.stderr);
        Err(format!("-device help failed: {}", why.trim()))
    }
}

/// The root tree with QEMU in it. A tree that an interrupted run left is built anew.
fn build(lab: &Path) -> anyhow::Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("the lab's packages are for x86_64");
    }
    if !is_root() {
        bail!("building a root tree of Debian 13 needs root (once)");
    }
    let mirror = mirror()?;
    if !provision::need("debootstrap", &["debootstrap", "debian-archive-keyring"]) {
        bail!("debootstrap is missing and cannot be installed");
    }
    if !Path::new(KEYRING).exists() {
        bail!("{KEYRING} is missing (package debian-archive-keyring)");
    }
    let tree = lab.join("root");
    if tree.exists() {
        println!("lab: removing what an interrupted run left");
        std::fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))?;
    }
    std::fs::create_dir_all(lab).with_context(|| format!("creating {}", lab.display()))?;
    let log = lab.join("build.log");
    std::fs::write(&log, "").with_context(|| format!("writing {}", log.display()))?;

    step(
        "1/3 root tree of Debian 13 (debootstrap, about 100 MB)",
        Command::new("timeout")
            .args([
                "1800",
                "debootstrap",
                "--variant=minbase",
                &format!("--keyring={KEYRING}"),
                SUITE,
            ])
            .arg(&tree)
            .arg(&mirror),
        &log,
    )?;
    // Scripts of packages want to start services: there are none in this tree.
    let policy = tree.join("usr/sbin/policy-rc.d");
    std::fs::write(&policy, "#!/bin/sh\nexit 101\n").context("policy-rc.d")?;
    std::fs::set_permissions(&policy, std::fs::Permissions::from_mode(0o755)).context("policy-rc.d")?;
    std::fs::write(
        tree.join("etc/apt/sources.list"),
        format!("deb {mirror} {SUITE} main\ndeb {mirror} {BACKPORTS} main\n"),
    )
    .context("the tree's sources.list")?;
    // debootstrap has copied resolv.conf and hosts.
    step(
        "2/3 package lists of the backports",
        &mut inside(&tree, &["update", "-q"]),
        &log,
    )?;
    step(
        "3/3 qemu-system-x86 of the backports (about 60 MB)",
        &mut inside(
            &tree,
            &[
                "install",
                "-qy",
                "--no-install-recommends",
                "-t",
                BACKPORTS,
                "qemu-system-x86",
            ],
        ),
        &log,
    )?;
    let archives = tree.join("var/cache/apt/archives");
    for entry in std::fs::read_dir(&archives).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "deb") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

fn inside(tree: &Path, apt_get: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["1800", "chroot"])
        .arg(tree)
        .arg("apt-get")
        .args(apt_get)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
    command
}

fn step(what: &str, command: &mut Command, log: &Path) -> anyhow::Result<()> {
    println!("lab: {what}");
    let begin = Instant::now();
    let file = std::fs::OpenOptions::new()
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("the log")?)
        .stderr(file)
        .status()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    if !status.success() {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let mut end = String::new();
        for line in &lines[lines.len().saturating_sub(5)..] {
            let _ = write!(end, "\n  | {line}");
        }
        bail!("\"{what}\" failed ({status}); {}:{end}\n", log.display());
    }
    println!("lab:   done in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// Starts QEMU by its tree's loader, with its tree's libraries, firmware and modules.
fn write_wrapper(lab: &Path, wrapper: &Path) -> anyhow::Result<()> {
    let tree = lab.join("root");
    let tree = tree.display();
    let script = format!(
        "#!/bin/sh\n\
         # QEMU of Debian {BACKPORTS}, run on this system by its own loader.\n\
         export QEMU_MODULE_DIR='{tree}/usr/lib/x86_64-linux-gnu/qemu'\n\
         exec '{tree}/usr/lib64/ld-linux-x86-64.so.2' \\\n  \
         --library-path '{tree}/usr/lib/x86_64-linux-gnu' --argv0 {PROGRAM} \\\n  \
         '{tree}/usr/bin/{PROGRAM}' -L '{tree}/usr/share/qemu' -L '{tree}/usr/share/seabios' \"$@\"\n"
    );
    let new = wrapper.with_extension("new");
    std::fs::write(&new, script).with_context(|| format!("writing {}", new.display()))?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).context("the wrapper's mode")?;
    std::fs::rename(&new, wrapper).with_context(|| format!("writing {}", wrapper.display()))
}

/// The Debian archive that this system's own package sources name.
fn mirror() -> anyhow::Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    for entry in std::fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
    {
        files.push(entry.path());
    }
    files.sort();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        release
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
    };
    if field("ID").as_deref() != Some("debian") {
        bail!("this is not a Debian system: it names no Debian archive to take the packages from");
    }
    let codename = field("VERSION_CODENAME").context("/etc/os-release names no VERSION_CODENAME")?;
    files
        .iter()
        .filter_map(|f| std::fs::read_to_string(f).ok())
        .find_map(|text| archive_of(&text, &codename))
        .with_context(|| format!("no apt source of this system has {codename} main"))
}

/// The URI that has `codename` with the component `main`, in either format of apt's sources.
fn archive_of(text: &str, codename: &str) -> Option<String> {
    for line in text.lines() {
        let mut words = line
            .split_whitespace()
            .filter(|w| !w.starts_with('[') && !w.ends_with(']'));
        if words.next() == Some("deb") {
            let (uri, suite) = (words.next()?, words.next()?);
            if suite == codename && words.any(|w| w == "main") {
                return Some(uri.to_owned());
            }
        }
    }
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .filter(|l| !l.starts_with('#'))
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        };
        let has =
            |name: &str, word: &str| field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word));
        if has("Types", "deb") && has("Suites", codename) && has("Components", "main") {
            return field("URIs")?.split_whitespace().next().map(str::to_owned);
        }
    }
    None
}

/// Root by the owner of this process's own entry in /proc.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::archive_of;

    #[test]
    fn test_archive_when_in_deb822_format_is_the_one_with_main() {
        let text = "Types: deb\n# http://old.example/x\nURIs: http://one.example/security\nSuites: bookworm-security\n\
                    Components: main\n\nTypes: deb\nURIs: http://two.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main contrib\n";
        assert_eq!(
            archive_of(text, "bookworm").as_deref(),
            Some("http://two.example/debian")
        );
        assert_eq!(archive_of(text, "trixie"), None);
    }

    #[test]
    fn test_archive_when_in_one_line_format_is_the_one_with_main() {
        let text = "# deb http://no.example/debian bookworm main\ndeb-src http://src.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://three.example/debian bookworm main non-free\n";
        assert_eq!(
            archive_of(text, "bookworm").as_deref(),
            Some("http://three.example/debian")
        );
    }
}
