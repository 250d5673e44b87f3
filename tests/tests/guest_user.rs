//! The lab in the hands of a user who is not root.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use tests::guest_or_skip;
use tests::processes::binary;

/// Nobody, on every system.
const USER: u32 = 65534;

/// A command as an ordinary user: this one, or nobody if this is root.
fn as_user(program: &Path, home: &Path) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid",
                &USER.to_string(),
                "--regid",
                &USER.to_string(),
                "--clear-groups",
            ])
            .arg(program);
        command
    } else {
        Command::new(program)
    };
    command.env("HOME", home).env("TMPDIR", home).current_dir("/");
    command
}

fn text(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn test_modules_when_built_by_an_ordinary_user_are_loaded_in_a_guest() {
    let rig = guest_or_skip!();
    if let Err(why) = rig.gru_modules() {
        println!("SKIP: {why}");
        return;
    }
    // Beside the lab, so that its parts can be linked: all that it has but the modules.
    let place = tempfile::tempdir_in(rig.lab.directory()).unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let lab = place.path().join("lab");
    std::fs::create_dir(&lab).unwrap();
    for part in ["trees", "kernel-stable", "acceleration.json"] {
        let copied = Command::new("cp")
            .arg("-al")
            .args([rig.lab.directory().join(part), lab.join(part)])
            .status()
            .unwrap();
        assert!(copied.success(), "{part}");
    }
    let tool = place.path().join("tlbridge");
    std::fs::copy(binary(), &tool).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&lab, Some(USER), Some(USER)).unwrap();
        std::os::unix::fs::chown(place.path(), Some(USER), Some(USER)).unwrap();
    }
    // Whether this machine lets users do what a build takes, and lets them come here at all.
    let mut trial = as_user(Path::new("unshare"), place.path());
    match trial
        .args(["--mount", "--map-root-user", "test", "-r"])
        .arg(&tool)
        .output()
    {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            println!(
                "SKIP: users have no namespaces here, or cannot read {}: {}",
                tool.display(),
                text(&output)
            );
            return;
        }
        Err(error) => {
            println!("SKIP: setpriv, unshare: {error}");
            return;
        }
    }
    let output = as_user(&tool, place.path())
        .env("TLBRIDGE_LAB", &lab)
        .args(["vm", "--model", "gru", "--timeout", "60", "--", "sh", "-c"])
        .arg("lsmod | grep -c ^gru")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1\n",
        "{}",
        text(&output)
    );
    // They were built, not found.
    assert!(text(&output).contains("modules for the GRU"), "{}", text(&output));
    let modules = std::fs::metadata(lab.join("modules")).unwrap();
    assert_ne!(modules.uid(), 0);
}
