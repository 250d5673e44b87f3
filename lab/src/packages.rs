//! Debian packages on this machine.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

/// Installs packages with apt-get. What is done has been said by the caller.
///
/// # Errors
/// apt-get is missing or fails, mostly for want of root.
pub fn install(packages: &[&str]) -> Result<()> {
    for arguments in [
        &["update", "-q"][..],
        &[&["install", "-qy", "--no-install-recommends"], packages].concat(),
    ] {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        ensure!(
            status.is_ok_and(|s| s.success()),
            "apt-get {} failed (root needed?)",
            arguments[0]
        );
    }
    Ok(())
}

/// Whether an executable of that name is on PATH.
#[must_use]
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| Path::new(&dir).join(program).is_file()))
}
