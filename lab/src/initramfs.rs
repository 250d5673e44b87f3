//! What a guest starts with: busybox, an init that takes commands on the second serial port, programs with
//! the libraries that they need, modules.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cpio::newc;

use crate::Lab;
use crate::programs;

const INIT: &[u8] = include_bytes!("guest/init.sh");
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// The files of an initramfs, by their path without the leading `/`.
#[derive(Debug, Clone, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
    modules: Vec<String>,
    before: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Entry {
    Directory,
    File { mode: u32, contents: Vec<u8> },
    Link(String),
}

impl Initramfs {
    /// busybox with all its names, and the init of this crate.
    ///
    /// # Errors
    /// The lab has no busybox yet ([`Lab::provide_kernel`] gets it).
    pub fn new(lab: &Lab) -> Result<Self> {
        let mut new = Self::default();
        for directory in ["dev", "proc", "sys", "tmp", "root", "lab"] {
            new.directories_of(&format!("{directory}/x"));
            new.entries.insert(directory.into(), Entry::Directory);
        }
        let busybox = lab.find_busybox()?;
        let list = Command::new(&busybox)
            .arg("--list")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {}", busybox.display()))?;
        ensure!(list.status.success(), "{} --list failed", busybox.display());
        let names = String::from_utf8_lossy(&list.stdout).into_owned();
        for name in names.lines().filter(|n| *n != "busybox") {
            new.entries
                .insert(format!("bin/{name}"), Entry::Link("busybox".into()));
        }
        new.add_copy("bin/busybox", &busybox)?;
        new.add_file("init", 0o755, INIT);
        new.add_file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
        new.add_file("etc/group", 0o644, b"root:x:0:\n");
        Ok(new)
    }

    /// An archive that is unpacked before these files, which win where both have one. Compressed as the
    /// kernel reads it, or not.
    pub fn add_archive_before(&mut self, archive: &[u8]) {
        self.before.extend_from_slice(archive);
        // Archives begin at multiples of four bytes.
        self.before.resize(self.before.len().next_multiple_of(4), 0);
    }

    /// Whether these files have that path.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_start_matches('/'))
    }

    /// A file at a path of the guest.
    pub fn add_file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let path = path.trim_start_matches('/');
        self.directories_of(path);
        self.entries.insert(
            path.into(),
            Entry::File {
                mode: mode & 0o7777,
                contents: contents.into(),
            },
        );
    }

    /// A copy of a file of this machine at a path of the guest, with its mode.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn add_copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let contents = std::fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        let mode = std::fs::metadata(from)
            .with_context(|| format!("reading {}", from.display()))?
            .permissions()
            .mode();
        self.add_file(path, mode, &contents);
        Ok(())
    }

    /// A program of this machine in the guest's `/bin`, with its loader and libraries where they are here.
    ///
    /// # Errors
    /// It cannot be read, or a library is missing.
    pub fn add_program(&mut self, program: &Path) -> Result<()> {
        let name = program
            .file_name()
            .and_then(|n| n.to_str())
            .with_context(|| format!("{} has no name that a guest could use", program.display()))?;
        self.add_program_as(&format!("bin/{name}"), program)
    }

    /// The same at a path of the guest.
    ///
    /// # Errors
    /// As [`Initramfs::add_program`].
    pub fn add_program_as(&mut self, path: &str, program: &Path) -> Result<()> {
        self.add_copy(path, program)?;
        for library in programs::libraries(program)? {
            let place = library
                .to_str()
                .with_context(|| format!("{} is not UTF-8", library.display()))?;
            self.add_copy(place, &library)?;
        }
        Ok(())
    }

    /// A module that init loads, after those that were added before.
    ///
    /// # Errors
    /// It cannot be read, or is no module.
    pub fn add_module(&mut self, lab: &Lab, module: &Path) -> Result<()> {
        let contents = lab.read_module(module)?;
        let name = module
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let name = name.split(".ko").next().unwrap_or(&name);
        let path = format!("lab/modules/{name}.ko");
        self.add_file(&path, 0o644, &contents);
        let path = format!("/{path}");
        if !self.modules.contains(&path) {
            self.modules.push(path);
        }
        Ok(())
    }

    /// The archive.
    ///
    /// # Errors
    /// A file is too large for the format (4 GiB).
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut out = self.before.clone();
        let mut list = self.modules.join("\n");
        list.push('\n');
        let list = Entry::File {
            mode: 0o644,
            contents: list.into_bytes(),
        };
        // Directories sort before what is in them.
        for (ino, (path, entry)) in (1u32..).zip(
            self.entries
                .iter()
                .map(|(path, entry)| (path.as_str(), entry))
                .chain([("lab/load", &list)]),
        ) {
            let (mode, contents): (u32, &[u8]) = match entry {
                Entry::Directory => (S_IFDIR | 0o755, &[]),
                Entry::File { mode, contents } => (S_IFREG | mode, contents),
                Entry::Link(target) => (S_IFLNK | 0o777, target.as_bytes()),
            };
            let size = u32::try_from(contents.len())
                .ok()
                .with_context(|| format!("{path} is too large for an initramfs"))?;
            let mut writer = newc::Builder::new(path)
                .ino(ino)
                .mode(mode)
                .nlink(1)
                .write(&mut out, size);
            writer
                .write_all(contents)
                .with_context(|| format!("packing {path}"))?;
            writer.finish().with_context(|| format!("packing {path}"))?;
        }
        newc::trailer(&mut out).context("packing the end")?;
        Ok(out)
    }

    fn directories_of(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.entries.insert(path[..at].into(), Entry::Directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_archive_when_packed_has_directories_before_files_and_an_end() {
        let mut files = Initramfs::default();
        files.add_file("/a/b/c", 0o640, b"text");
        files.add_archive_before(b"12345");
        let bytes = files.to_bytes().unwrap();
        assert_eq!(&bytes[..8], b"12345\0\0\0");
        let mut rest = &bytes[8..];
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut contents = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut contents).unwrap();
            seen.push((reader.entry().name().to_owned(), reader.entry().mode(), contents));
            rest = reader.finish().unwrap();
        }
        let expected: Vec<(String, u32, Vec<u8>)> = vec![
            ("a".into(), 0o040_755, vec![]),
            ("a/b".into(), 0o040_755, vec![]),
            ("a/b/c".into(), 0o100_640, b"text".to_vec()),
            ("lab/load".into(), 0o100_644, b"\n".to_vec()),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn test_program_when_dynamic_brings_its_loader() {
        let mut files = Initramfs::default();
        files.add_program(&std::env::current_exe().unwrap()).unwrap();
        let names: Vec<_> = files.entries.keys().cloned().collect();
        assert!(names.iter().any(|n| n.contains("ld-linux")), "{names:?}");
        assert!(names.iter().any(|n| n.contains("libc.so")), "{names:?}");
    }
}
