//! What the tests need beyond a Rust toolchain, and how it gets here.

use std::path::Path;
use std::process::{Command, Stdio};

/// Makes `program` available from Debian packages if it is not: says what it does; false (and why) when it
/// can't be had. The tests that need it then skip visibly.
pub fn need(program: &str, packages: &[&str]) -> bool {
    if on_path(program) {
        return true;
    }
    if !on_path("apt-get") {
        println!(
            "provision: {program} is missing and this is not a Debian system: its tests will be skipped"
        );
        return false;
    }
    println!(
        "provision: {program} is missing: apt-get install {}",
        packages.join(" ")
    );
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
        if !status.is_ok_and(|s| s.success()) {
            println!(
                "provision: apt-get {} failed (root needed?): tests with {program} will be skipped",
                arguments[0]
            );
            return false;
        }
    }
    on_path(program)
}

/// Whether an executable of that name is on PATH.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| Path::new(&dir).join(program).is_file()))
}
