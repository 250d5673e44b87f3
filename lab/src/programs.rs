//! Which libraries a program needs: asked of the loader that the program itself names.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, elf};

use crate::tree::{LIBRARIES, LOADER, Tree};

/// The files that must be where they are here for that program to start: its loader and its libraries.
/// None for a static program, a script or anything else that is no dynamic ELF program.
///
/// # Errors
/// The program cannot be read, or a library of it is missing here.
pub(crate) fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let bytes = std::fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let Some(loader) = interpreter(&bytes) else {
        return Ok(Vec::new());
    };
    let mut files = vec![loader.clone()];
    add_listed(&mut Command::new(loader), program, &mut files)?;
    Ok(files)
}

/// The same of a program or a library that lies in a root tree: files of the tree.
///
/// # Errors
/// As [`libraries`].
pub(crate) fn libraries_in(tree: &Tree, file: &Path) -> Result<Vec<PathBuf>> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    // A library names no loader, but needs libraries all the same.
    if elf::FileHeader64::<LittleEndian>::parse(&*bytes).is_err() {
        return Ok(Vec::new());
    }
    let loader = tree.root().join(LOADER);
    let mut files = vec![loader.clone()];
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(tree.root().join(LIBRARIES));
    add_listed(&mut command, file, &mut files)?;
    Ok(files)
}

/// Adds what a loader lists, as ldd does. Nothing of the program's own runs.
fn add_listed(loader: &mut Command, program: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let name = loader.get_program().to_owned();
    let output = loader
        .arg("--list")
        .arg(std::path::absolute(program).context("the program's path")?)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}, the loader of {}", name.display(), program.display()))?;
    ensure!(
        output.status.success(),
        "{} does not load: {}{}",
        program.display(),
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    for file in listed(&String::from_utf8_lossy(&output.stdout)) {
        if !files.contains(&file) {
            files.push(file);
        }
    }
    Ok(())
}

/// The version of the GNU C library in this file (`2.41`), if it is one.
pub(crate) fn glibc_version(bytes: &[u8]) -> Option<(u32, u32)> {
    const MARK: &[u8] = b" stable release version ";
    let at = bytes.windows(MARK.len()).position(|w| w == MARK)? + MARK.len();
    let text: String = bytes[at..]
        .iter()
        .take_while(|b| b.is_ascii_digit() || **b == b'.')
        .map(|b| char::from(*b))
        .collect();
    let mut numbers = text.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

/// The loader that an ELF program for this architecture names.
fn interpreter(bytes: &[u8]) -> Option<PathBuf> {
    let header = elf::FileHeader64::<LittleEndian>::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    for segment in header.program_headers(endian, bytes).ok()? {
        if let Ok(Some(name)) = segment.interpreter(endian, bytes) {
            return Some(PathBuf::from(std::str::from_utf8(name).ok()?));
        }
    }
    None
}

/// The paths in the loader's list.
fn listed(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let line = line.split_once("=>").map_or(line, |(_, path)| path);
            let path = line.rsplit_once(" (").map_or(line, |(path, _)| path).trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_list_when_of_a_loader_gives_the_paths() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            listed(text),
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
    }

    #[test]
    fn test_libraries_when_of_a_program_of_this_machine_are_there() {
        let own = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(
            own.iter().any(|l| l.to_string_lossy().contains("libc.so")),
            "{own:?}"
        );
        assert!(own.iter().all(|l| l.is_file()), "{own:?}");
    }

    #[test]
    fn test_glibc_when_of_this_machine_has_a_version() {
        let own = libraries(&std::env::current_exe().unwrap()).unwrap();
        let libc = own.iter().find(|l| l.ends_with("libc.so.6")).unwrap();
        let version = glibc_version(&std::fs::read(libc).unwrap());
        assert!(version.is_some_and(|v| v >= (2, 17)), "{version:?}");
        assert_eq!(glibc_version(b"GNU C Library stable release version x"), None);
        assert_eq!(glibc_version(b""), None);
    }

    #[test]
    fn test_libraries_when_it_is_no_program_are_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "#!/bin/sh\n").unwrap();
        assert!(libraries(file.path()).unwrap().is_empty());
        assert!(libraries(Path::new("/nonexistent/program")).is_err());
    }
}
