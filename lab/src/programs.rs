//! Which libraries a program needs: asked of the loader that the program itself names.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, elf};

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
    // As ldd does. Nothing of the program's own runs.
    let output = Command::new(&loader)
        .arg("--list")
        .arg(std::path::absolute(program).context("the program's path")?)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output()
        .with_context(|| {
            format!(
                "starting {}, the loader of {}",
                loader.display(),
                program.display()
            )
        })?;
    ensure!(
        output.status.success(),
        "{} does not load: {}{}",
        program.display(),
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim()
    );
    let mut files = vec![loader];
    for file in listed(&String::from_utf8_lossy(&output.stdout)) {
        if !files.contains(&file) {
            files.push(file);
        }
    }
    Ok(files)
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
    fn test_libraries_when_it_is_no_program_are_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "#!/bin/sh\n").unwrap();
        assert!(libraries(file.path()).unwrap().is_empty());
        assert!(libraries(Path::new("/nonexistent/program")).is_err());
    }
}
