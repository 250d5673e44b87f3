//! A QEMU with `vfio-user-pci` (10.1 or later): the one that the machine has, else the one of Debian 13's
//! backports.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::apt::BACKPORTS;
use crate::packages::on_path;
use crate::place::write_whole;
use crate::tree::Recipe;

/// The device that a usable QEMU lists in `-device help`.
const DEVICE: &str = "vfio-user-pci";
const PROGRAM: &str = "qemu-system-x86_64";

/// The tree that QEMU runs from.
fn recipe() -> Recipe {
    Recipe::new(
        "qemu",
        "QEMU of Debian's backports (60 MB)",
        BACKPORTS,
        &["base-files", "qemu-system-x86"],
    )
}

impl Lab {
    /// The QEMU that is there: `TLBRIDGE_QEMU`, the lab's, or one on PATH that has the device.
    ///
    /// # Errors
    /// Why there is none, and how to get one.
    pub fn find_qemu(&self) -> Result<PathBuf> {
        if let Some(named) = std::env::var_os("TLBRIDGE_QEMU").filter(|v| !v.is_empty()) {
            let named = PathBuf::from(named);
            return match usable(&named) {
                Ok(()) => Ok(named),
                Err(why) => bail!("TLBRIDGE_QEMU={}: {why}", named.display()),
            };
        }
        if let Some(tree) = self.find_tree(&recipe()) {
            return Ok(tree.root().join(PROGRAM));
        }
        let why = match on_path(PROGRAM) {
            false => String::new(),
            true => match usable(Path::new(PROGRAM)) {
                Ok(()) => return Ok(PROGRAM.into()),
                Err(why) => format!(", and {PROGRAM} on PATH will not do: {why}"),
            },
        };
        bail!(
            "no QEMU with {DEVICE} (10.1 or later) in {}{why}: `cargo xtask lab` or `tlbridge vm` get one, \
             TLBRIDGE_QEMU names one",
            self.directory().display()
        )
    }

    /// The same, installed from Debian's packages if there is none.
    ///
    /// # Errors
    /// It cannot be had here: no apt, no network, no room.
    pub fn provide_qemu(&self) -> Result<PathBuf> {
        let named = std::env::var_os("TLBRIDGE_QEMU").is_some_and(|v| !v.is_empty());
        match self.find_qemu() {
            Ok(found) => return Ok(found),
            Err(error) if named => return Err(error),
            Err(_) => {}
        }
        let held = self.lock()?;
        // Another process may have been quicker.
        if let Ok(found) = self.find_qemu() {
            return Ok(found);
        }
        let make = || -> Result<PathBuf> {
            let tree = self.provide_tree(&recipe(), &held, |tree, _| {
                let script = tree.wrapper(
                    &format!("usr/bin/{PROGRAM}"),
                    BACKPORTS,
                    "export QEMU_MODULE_DIR=\"$tree/usr/lib/x86_64-linux-gnu/qemu\"\n",
                    "-L \"$tree/usr/share/qemu\" -L \"$tree/usr/share/seabios\"",
                );
                let wrapper = tree.root().join(PROGRAM);
                write_script(&wrapper, &script)?;
                match usable(&wrapper) {
                    Ok(()) => Ok(()),
                    Err(why) => bail!("the QEMU of {BACKPORTS} will not do: {why}"),
                }
            })?;
            Ok(tree.root().join(PROGRAM))
        };
        make().with_context(|| {
            format!("no QEMU with {DEVICE} (10.1 or later); install one, or name it with TLBRIDGE_QEMU")
        })
    }
}

/// The first line of `--version`.
#[must_use]
pub fn version(qemu: &Path) -> Option<String> {
    let output = Command::new(qemu).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

fn write_script(path: &Path, script: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    write_whole(path, script.as_bytes())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} executable", path.display()))
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
