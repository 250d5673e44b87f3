//! What a guest starts with: busybox, an init that takes commands on the second serial port, programs with
//! the libraries that they need, modules.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cpio::newc;

use crate::Lab;
use crate::kernel::Kernel;
use crate::programs;
use crate::tree::Tree;

const INIT: &[u8] = include_bytes!("guest/init.sh");
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Where systems have their libraries, the longest first, and the links from there to `/lib`.
const LIBRARY_DIRECTORIES: &[(&str, &str)] = &[
    ("usr/lib/x86_64-linux-gnu", "../../lib"),
    ("lib/x86_64-linux-gnu", "."),
    ("usr/lib64", "../lib"),
    ("lib64", "lib"),
];

/// The files of an initramfs, by their path without the leading `/`.
#[derive(Debug, Clone, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
    /// Of which C library's time each library is, by its place.
    generations: BTreeMap<String, (u32, u32)>,
    modules: Vec<String>,
    before: Vec<u8>,
    /// Whether commands run in a root image: all that is added from then on is for it.
    image: bool,
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
        self.entries.contains_key(&self.place(path))
    }

    /// Lets commands run in a root image, which init finds on the first disk, with these files and those that
    /// are added from now on. `kernel`'s modules for disks are loaded.
    ///
    /// # Errors
    /// The kernel has no such modules.
    pub fn enter_image(&mut self, lab: &Lab, kernel: &Kernel) -> Result<()> {
        for module in kernel.with_dependencies(&["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"])? {
            self.add_module(lab, &module)?;
        }
        self.entries.insert("image".into(), Entry::Directory);
        self.add_file("lab/image", 0o644, b"/dev/vda\n");
        self.image = true;
        Ok(())
    }

    /// Where a path of the guest is among the entries.
    fn place(&self, path: &str) -> String {
        let path = path.trim_start_matches('/');
        let own = ["lab/", "lib/modules/"].iter().any(|p| path.starts_with(p));
        if !self.image || own {
            return path.to_owned();
        }
        // In the image these are links, which nothing may be copied over.
        let merged = ["bin/", "sbin/", "lib/", "lib64/"]
            .iter()
            .any(|p| path.starts_with(p));
        format!("lab/over/{}{path}", if merged { "usr/" } else { "" })
    }

    /// A file at a path of the guest.
    pub fn add_file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let path = self.place(path);
        self.directories_of(&path);
        self.entries.insert(
            path,
            Entry::File {
                mode: mode & 0o7777,
                contents: contents.into(),
            },
        );
    }

    /// A symbolic link at a path of the guest.
    pub fn add_link(&mut self, path: &str, target: &str) {
        let path = self.place(path);
        self.directories_of(&path);
        self.entries.insert(path, Entry::Link(target.into()));
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
        let libraries = programs::libraries(program)?;
        self.add_libraries(&libraries, Path::new("/"))
    }

    /// A program of a root tree in the guest's `/bin`.
    pub(crate) fn add_program_of(&mut self, tree: &Tree, program: &str) -> Result<()> {
        let name = program.rsplit('/').next().unwrap_or(program);
        let from = tree.root().join(program);
        self.add_copy(&format!("bin/{name}"), &from)?;
        self.add_libraries(&programs::libraries_in(tree, &from)?, tree.root())
    }

    /// A library of a root tree that programs load by name, where it is there.
    pub(crate) fn add_library_of(&mut self, tree: &Tree, library: &str) -> Result<()> {
        let from = tree.root().join(library);
        let mut files = programs::libraries_in(tree, &from)?;
        files.push(from);
        self.add_libraries(&files, tree.root())
    }

    /// Libraries at their places below `root`. Where programs of different systems bring the same one, the
    /// one that belongs to the newer C library is taken: what was built with an older one runs with it.
    fn add_libraries(&mut self, files: &[PathBuf], root: &Path) -> Result<()> {
        let mut read = Vec::new();
        let mut generation = (0, 0);
        for file in files {
            let contents = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            if file.file_name().is_some_and(|n| n == "libc.so.6") {
                generation = programs::glibc_version(&contents).unwrap_or_default();
            }
            let place = file
                .strip_prefix(root)
                .ok()
                .and_then(Path::to_str)
                .with_context(|| format!("{} has no name that a guest could use", file.display()))?;
            read.push((self.library_place(place), contents));
        }
        for (place, contents) in read {
            if self
                .generations
                .get(&place)
                .is_some_and(|there| *there >= generation)
            {
                continue;
            }
            self.add_file(&place, 0o755, &contents);
            self.generations.insert(place, generation);
        }
        Ok(())
    }

    /// Where a library goes: all systems' directories of libraries are one here, so that there is one of each
    /// and every loader finds it. In somebody else's initramfs they are what they are.
    fn library_place(&mut self, place: &str) -> String {
        if self.image {
            // The image's own libraries are taken where it has them.
            let name = place.rsplit('/').next().unwrap_or(place);
            return format!("lab/libraries/{name}");
        }
        if self.before.is_empty() {
            let found = LIBRARY_DIRECTORIES
                .iter()
                .find_map(|(directory, _)| place.strip_prefix(directory)?.strip_prefix('/'));
            if let Some(rest) = found {
                self.entries.insert("lib".into(), Entry::Directory);
                for (directory, target) in LIBRARY_DIRECTORIES {
                    self.directories_of(directory);
                    self.entries
                        .insert((*directory).into(), Entry::Link((*target).into()));
                }
                return format!("lib/{rest}");
            }
        }
        place.to_owned()
    }

    /// Modules that a guest's `modprobe` finds, with all that they depend on. Init does not load them.
    ///
    /// # Errors
    /// They are not there, or cannot be read.
    pub fn add_modules_for_modprobe(&mut self, lab: &Lab, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let files = kernel.with_dependencies(names)?;
        let directory = kernel
            .modules
            .as_deref()
            .context("this kernel came without modules")?;
        let version = directory
            .file_name()
            .and_then(|n| n.to_str())
            .with_context(|| format!("{} is not called after a kernel", directory.display()))?;
        for file in &files {
            let place = file.strip_prefix(directory).unwrap_or(file).display().to_string();
            let plain = format!("lib/modules/{version}/{}", uncompressed(&place));
            if !self.contains(&plain) {
                let contents = lab.read_module(file)?;
                self.add_file(&plain, 0o644, &contents);
            }
        }
        // The kernel asks for more by this name.
        self.directories_of("sbin/modprobe");
        self.entries
            .insert("sbin/modprobe".into(), Entry::Link("../bin/modprobe".into()));
        // modprobe goes by these: their compressed files are not here.
        for list in [
            "modules.dep",
            "modules.builtin",
            "modules.alias",
            "modules.symbols",
            "modules.softdep",
        ] {
            if let Ok(text) = std::fs::read_to_string(directory.join(list)) {
                let text: String = text
                    .lines()
                    .flat_map(|line| [plain_names(line), "\n".into()])
                    .collect();
                self.add_file(&format!("lib/modules/{version}/{list}"), 0o644, text.as_bytes());
            }
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

    /// The parents of a path.
    fn directories_of(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            // What is a link stays one.
            self.entries.entry(path[..at].into()).or_insert(Entry::Directory);
        }
    }
}

/// A module's file without the ending of its compression.
fn uncompressed(path: &str) -> &str {
    path.find(".ko.").map_or(path, |at| &path[..at + 3])
}

/// A line of a list of modules with the files as they are without compression.
fn plain_names(line: &str) -> String {
    let words: Vec<String> = line
        .split(' ')
        .map(|word| match word.strip_suffix(':') {
            Some(path) => format!("{}:", uncompressed(path)),
            None => uncompressed(word).to_owned(),
        })
        .collect();
    words.join(" ")
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
    fn test_lists_of_modules_when_compressed_name_plain_files() {
        let line = "kernel/a/b.ko.xz: kernel/c.ko.zst kernel/d.ko";
        assert_eq!(plain_names(line), "kernel/a/b.ko: kernel/c.ko kernel/d.ko");
        assert_eq!(
            plain_names("alias pci:v000015B3 mlx5_core"),
            "alias pci:v000015B3 mlx5_core"
        );
    }

    #[test]
    fn test_library_when_of_two_systems_is_the_newer_one() {
        let place = tempfile::tempdir().unwrap();
        let system = |name: &str, version: &str| {
            let root = place.path().join(name);
            let libraries = root.join("usr/lib64");
            std::fs::create_dir_all(&libraries).unwrap();
            let mark = format!("GNU C Library stable release version {version}.\n");
            std::fs::write(libraries.join("libc.so.6"), mark).unwrap();
            std::fs::write(libraries.join("libm.so.6"), name).unwrap();
            let files = ["libm.so.6", "libc.so.6"].map(|n| libraries.join(n));
            (root, files)
        };
        let (old, new) = (system("old", "2.36"), system("new", "2.41"));
        for order in [[&old, &new], [&new, &old]] {
            let mut files = Initramfs::default();
            for (root, list) in order {
                files.add_libraries(list, root).unwrap();
            }
            let Some(Entry::File { contents, .. }) = files.entries.get("lib/libm.so.6") else {
                panic!("{:?}", files.entries.keys());
            };
            assert_eq!(contents, b"new");
            assert!(matches!(files.entries.get("usr/lib64"), Some(Entry::Link(to)) if to == "../lib"));
        }
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
