//! What the tests need beyond a Rust toolchain, and how it gets here.

use lab::packages::{self, on_path};

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
    if let Err(why) = packages::install(packages) {
        println!("provision: {why}: tests with {program} will be skipped");
        return false;
    }
    on_path(program)
}
