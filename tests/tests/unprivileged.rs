//! The whole chain as a user without privileges, whom the kernel gives a userfaultfd for faults of user mode only
//! (`UFFD_USER_MODE_ONLY`); and as one whom it gives none.
//!
//! Dropping privileges takes privileges: without root these tests are skipped, and say so.
#![allow(unsafe_code, reason = "a seccomp filter for a child process")]

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use tests::processes::{Ended, Tool, binary, descendants, missing_capability};

/// Nobody: the kernel's overflow user, who owns nothing anywhere.
const NOBODY: u32 = 65534;

/// Why a test cannot run here.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root: cannot become another user".into());
    }
    missing_capability()
}

/// Whether an unprivileged process has other ways to a userfaultfd than `UFFD_USER_MODE_ONLY`.
fn allowed_more() -> bool {
    let mode = fs::metadata("/dev/userfaultfd").map_or(0, |m| m.permissions().mode());
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    mode & 0o006 == 0o006 || sysctl.trim() == "1"
}

/// A directory that nobody can use, with a copy of the tool: the one that was built may be where only root goes.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
        fs::copy(binary(), dir.path().join("tlbridge")).expect("a copy of the tool");
        fs::set_permissions(dir.path().join("tlbridge"), Permissions::from_mode(0o755)).expect("chmod");
        let tmp = dir.path().join("tmp");
        fs::create_dir(&tmp).expect("mkdir");
        chown(&tmp, Some(NOBODY), Some(NOBODY)).expect("chown");
        Self { dir }
    }

    fn tmp(&self) -> std::path::PathBuf {
        self.dir.path().join("tmp")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.dir.path().join("tlbridge"));
        // (The standard library gives up root's groups, too.)
        command
            .args(arguments)
            .uid(NOBODY)
            .gid(NOBODY)
            .env("TMPDIR", self.tmp())
            .current_dir("/");
        command
    }
}

fn wait(tool: Tool) -> Ended {
    tool.wait(Duration::from_secs(90)).expect("it ends")
}

/// Real, effective, saved and file-system user of a process.
fn users(pid: u32) -> Option<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    Some(line.split_whitespace().filter_map(|n| n.parse().ok()).collect())
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).expect("the directory").next().is_none()
}

#[test]
fn test_demo_when_user_has_no_privileges_finds_no_stale_access() {
    if let Some(reason) = missing() {
        println!("SKIP: the demo without privileges: {reason}");
        return;
    }
    if allowed_more() {
        println!(
            "SKIP in part: this machine lets everybody have a full userfaultfd, UFFD_USER_MODE_ONLY is not needed"
        );
    }
    let home = Home::new();
    let command = home.command(&[
        "demo",
        "--seconds",
        "3",
        "--threads",
        "2",
        "--seed",
        "7",
        "--json",
    ]);
    let mut tool = Tool::start_command(command);
    // Not before its processes are there: what is looked at is that all of them run as nobody.
    tool.child_of_role("device").expect("a device process");
    for pid in descendants(tool.pid()).into_iter().chain([tool.pid()]) {
        if let Some(users) = users(pid) {
            assert_eq!(users, [NOBODY; 4], "process {pid}");
        }
    }
    let ended = wait(tool);
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    let json = ended.json();
    assert_eq!(json["stale_accesses"].as_u64(), Some(0), "{json}");
    for figure in ["operations", "verified_bytes", "tlb_misses"] {
        assert!(json[figure].as_u64().is_some_and(|n| n > 0), "{figure}: {json}");
    }
    assert!(
        is_empty(&home.tmp()),
        "something is left in the directory for sockets"
    );
}

/// Has the kernel refuse every userfaultfd to this process and its children, as a container's filter does.
fn refuse_userfaultfd() -> io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, libc::SYS_userfaultfd as u32, 0, 1),
        op(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no pointers.
    let kept = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `filter` and what it points to live until the call returns.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if kept != 0 || set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[test]
fn test_demo_when_kernel_refuses_a_userfaultfd_says_what_to_set() {
    if let Some(reason) = missing() {
        println!("SKIP: the demo without a userfaultfd: {reason}");
        return;
    }
    if fs::metadata("/dev/userfaultfd").is_ok_and(|m| m.permissions().mode() & 0o006 == 0o006) {
        println!("SKIP: the demo without a userfaultfd: everybody may open /dev/userfaultfd here");
        return;
    }
    let home = Home::new();
    let mut command = home.command(&["demo", "--seconds", "3", "--json"]);
    // SAFETY: between fork and exec this makes system calls only; nothing is allocated.
    unsafe { command.pre_exec(refuse_userfaultfd) };
    let ended = wait(Tool::start_command(command));
    assert_ne!(ended.status.code(), Some(0), "{}", ended.stdout);
    for way_out in [
        "userfaultfd",
        "/dev/userfaultfd",
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd=1",
    ] {
        assert!(ended.stderr.contains(way_out), "{way_out}: {}", ended.stderr);
    }
    assert!(
        is_empty(&home.tmp()),
        "something is left in the directory for sockets"
    );
}
