//! C programs with the library, against a daemon in this process.

#[path = "../../tests/mock/mod.rs"]
mod mock;

use mock::{Mock, Options, Seen};
use protos::bridge::control::UffdMode;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::Ordering;

fn library() -> PathBuf {
    // Next to this test, in target/PROFILE/deps: cargo has built it for this test.
    let exe = std::env::current_exe().unwrap();
    let library = exe.with_file_name("libtlbridge_agent.so");
    assert!(library.exists(), "{} has not been built", library.display());
    library
}

/// Compile a program, or say why the test is skipped.
fn compile(dir: &Path, source: &str, more: &[&str]) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = dir.join("program");
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu99", "-Wall", "-Werror", "-O1", "-o"])
        .arg(&program)
        .arg(here.join("tests").join(source))
        .arg("-I")
        .arg(here.join("../include"))
        .arg("-pthread")
        .args(more);
    match cc.output() {
        Ok(out) => {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            Some(program)
        }
        Err(e) => {
            eprintln!("SKIPPED: no C compiler (cc): {e}");
            None
        }
    }
}

fn assert_done(out: &Output) {
    assert!(
        out.status.success() && String::from_utf8_lossy(&out.stdout).contains("done"),
        "{:?}\n{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn test_program_when_preloaded_is_covered() {
    if !mock::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(program) = compile(dir.path(), "program.c", &[]) else {
        return;
    };
    for uffd_mode in [UffdMode::Missing, UffdMode::Wp] {
        let mock = Mock::start(Options {
            uffd_mode,
            ..Options::default()
        });
        let out = Command::new(&program)
            .env("LD_PRELOAD", library())
            .env("TLBRIDGE_SOCKET", mock.socket())
            .env("TLBRIDGE_REQUIRED", "1")
            .output()
            .unwrap();
        assert_done(&out);
        let seen = mock.seen();
        for (len, new) in [(4 * 4096, true), (2 * 4096, true), (4 * 4096, false)] {
            assert!(seen.contains(&Seen::Memory { len, new }), "{len} {new}: {seen:?}");
        }
        assert!(!seen.iter().any(|s| matches!(s, Seen::Event { .. })), "{seen:?}");
        let header = &mock.inner().table.header;
        assert!(header.calls_silent.load(Ordering::SeqCst) > 10);
        assert_eq!(header.calls_hopped.load(Ordering::SeqCst), 0);
        mock.assert_idle();
    }
}

#[test]
fn test_program_when_its_heap_is_on_the_arena_works() {
    if !mock::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(program) = compile(dir.path(), "program.c", &[]) else {
        return;
    };
    for uffd_mode in [UffdMode::Missing, UffdMode::Wp] {
        let mock = Mock::start(Options {
            uffd_mode,
            ..Options::default()
        });
        let out = Command::new(&program)
            .arg("arena")
            .env("LD_PRELOAD", library())
            .env("TLBRIDGE_SOCKET", mock.socket())
            .env("TLBRIDGE_REQUIRED", "1")
            .env("TLBRIDGE_HEAP", "1")
            .env("TLBRIDGE_HEAP_BYTES", (256u64 << 20).to_string())
            .output()
            .unwrap();
        assert_done(&out);
        mock.assert_idle();
    }
}

#[test]
fn test_program_when_there_is_no_daemon_runs_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(program) = compile(dir.path(), "program.c", &[]) else {
        return;
    };
    let run = |required: &str| {
        Command::new(&program)
            .env("LD_PRELOAD", library())
            .env("TLBRIDGE_SOCKET", dir.path().join("nobody"))
            .env("TLBRIDGE_REQUIRED", required)
            .output()
            .unwrap()
    };
    let out = run("0");
    assert_done(&out);
    assert!(String::from_utf8_lossy(&out.stderr).contains("cannot connect to the host daemon"));
    let out = run("1");
    assert_eq!(out.status.code(), Some(111));
    // Not asked to attach: silent.
    let out = Command::new(&program)
        .env("LD_PRELOAD", library())
        .output()
        .unwrap();
    assert_done(&out);
    assert!(out.stderr.is_empty());
}

#[test]
fn test_c_interface_when_used_from_c_works() {
    if !mock::available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let library = library();
    let folder = library.parent().unwrap().to_str().unwrap();
    let rpath = format!("-Wl,-rpath,{folder}");
    let Some(program) = compile(
        dir.path(),
        "interface.c",
        &["-L", folder, "-ltlbridge_agent", &rpath],
    ) else {
        return;
    };
    let mock = Mock::start(Options::default());
    let out = Command::new(&program)
        .arg(mock.socket())
        // Cargo's own setting names target/PROFILE first, where an older build may lie.
        .env("LD_LIBRARY_PATH", folder)
        .output()
        .unwrap();
    assert_done(&out);
    let seen = mock.seen();
    assert!(
        seen.contains(&Seen::Request("create_context")) && seen.contains(&Seen::Request("destroy_context"))
    );
    mock.assert_idle();
}
