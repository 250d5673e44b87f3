//! Stock kernels of Debian, unpacked; and what builds modules for them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::Lab;
use crate::place::{Held, clear, write_whole};
use crate::tree::{BACKPORTS, Tree};

/// Which of Debian 13's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Series {
    /// The release's own (6.12).
    Stable,
    /// The newest of the backports (7.3 or later).
    Backports,
}

impl Series {
    /// As in names of files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Backports => "backports",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::Stable => "trixie",
            Self::Backports => BACKPORTS,
        }
    }
}

/// A kernel that boots, with its modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// Its modules: what `/lib/modules/VERSION` is on its own system. `None`: all that it needs is built in.
    pub modules: Option<PathBuf>,
}

/// What of a stock kernel is written down beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Facts {
    /// As `uname -r` says.
    version: String,
}

/// What builds modules for a stock kernel, by paths inside the root tree.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    /// As `uname -r` says.
    pub version: String,
    /// For `make -C`.
    pub headers: String,
    /// drivers/misc/sgi-gru of the same kernel's sources.
    pub gru_source: String,
}

impl Lab {
    /// A stock kernel that is there.
    ///
    /// # Errors
    /// It is not, and how to get it.
    pub fn find_kernel(&self, series: Series) -> Result<Kernel> {
        let directory = self.path(&format!("kernel-{}", series.name()));
        let version = version_of(&directory).with_context(|| {
            format!(
                "no {} kernel of Debian 13 in {}: `cargo xtask lab` or `tlbridge vm` get one",
                series.name(),
                self.directory().display()
            )
        })?;
        Ok(Kernel {
            image: directory.join("vmlinuz"),
            modules: Some(directory.join("lib/modules").join(version)),
        })
    }

    /// A stock kernel, downloaded if it is not there.
    ///
    /// # Errors
    /// It cannot be had here: no root, no network, no room.
    pub fn provide_kernel(&self, series: Series) -> Result<Kernel> {
        if let Ok(kernel) = self.find_kernel(series) {
            return Ok(kernel);
        }
        let held = self.lock()?;
        if let Ok(kernel) = self.find_kernel(series) {
            return Ok(kernel);
        }
        let tree = self.tools(&held)?;
        unpack_kernel(self, &tree, series, &held)?;
        self.find_kernel(series)
    }

    /// The static busybox for guests, if it is there.
    ///
    /// # Errors
    /// It is not, and how to get it.
    pub(crate) fn find_busybox(&self) -> Result<PathBuf> {
        let tree = Tree::find(self).filter(|t| t.stamp("tools").exists());
        let tree = tree.with_context(|| {
            format!(
                "no busybox in {}: `cargo xtask lab` or `tlbridge vm` get it",
                self.directory().display()
            )
        })?;
        Ok(tree.root().join("usr/bin/busybox"))
    }

    /// The tree with what guests and kernels want.
    pub(crate) fn tools(&self, held: &Held) -> Result<Tree> {
        let tree = Tree::provide(self, held)?;
        tree.install(
            "tools",
            "busybox, kmod, xz",
            &["busybox-static", "kmod", "xz-utils"],
            held,
        )?;
        Ok(tree)
    }

    /// What builds modules for that kernel, if it is there.
    pub(crate) fn find_headers(&self, series: Series) -> Option<(Tree, Headers)> {
        let tree = Tree::find(self).filter(|t| t.stamp("build").exists())?;
        let text = std::fs::read(tree.stamp(&format!("headers-{}", series.name()))).ok()?;
        let version = serde_json::from_slice::<Facts>(&text).ok()?.version;
        let headers = Headers {
            headers: format!("/usr/src/linux-headers-{version}"),
            gru_source: format!("/usr/src/sgi-gru-{version}"),
            version,
        };
        Some((tree, headers))
    }

    /// The same, installed if it is not there. The versions are those of the kernel, which must be there.
    pub(crate) fn provide_headers(&self, series: Series, held: &Held) -> Result<(Tree, Headers)> {
        if let Some(found) = self.find_headers(series) {
            return Ok(found);
        }
        let directory = self.path(&format!("kernel-{}", series.name()));
        let version = version_of(&directory).context("the kernel has been provided before its headers")?;
        let tree = self.tools(held)?;
        let short = version
            .strip_suffix("-amd64")
            .with_context(|| format!("{version} is no kernel for amd64"))?;
        tree.install(
            "build",
            "gcc, make (about 60 MB)",
            &["gcc", "make", "libc6-dev"],
            held,
        )?;
        let kbuild = format!("linux-kbuild-{short}");
        tree.install(&format!("kbuild-{}", series.name()), &kbuild, &[&kbuild], held)?;
        let packages = [
            format!("linux-headers-{version}"),
            format!("linux-headers-{short}-common"),
        ];
        let files = tree.download(
            &format!("headers of Linux {short} (about 15 MB)"),
            &packages,
            held,
        )?;
        for file in &files {
            let inside = path_inside(&tree, file)?;
            tree.step(
                &format!("unpacking {}", file_name(file)),
                &mut tree.root_shell(&format!("dpkg-deb -x '{inside}' / && rm '{inside}'")),
            )?;
        }
        extract_gru(&tree, short, &version, held)?;
        let facts = serde_json::to_vec(&Facts { version }).context("facts about the headers")?;
        write_whole(&tree.stamp(&format!("headers-{}", series.name())), &facts)?;
        self.find_headers(series)
            .context("headers that were just installed are not there")
    }
}

fn version_of(directory: &Path) -> Result<String> {
    let path = directory.join("facts.json");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let facts: Facts = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    Ok(facts.version)
}

fn unpack_kernel(lab: &Lab, tree: &Tree, series: Series, held: &Held) -> Result<()> {
    tree.need_root("a kernel of Debian")?;
    tree.step("package lists", &mut tree.root_shell("apt-get update -q"))?;
    let (version, packages) = image_packages(tree, series)?;
    let files = tree.download(&format!("Linux {version} (about 110 MB)"), &packages, held)?;
    let directory = tree.root().join("var/tmp/lab-kernel");
    clear(&directory)?;
    let mut script = String::from("mkdir -p /var/tmp/lab-kernel/lib && cd /var/tmp/lab-kernel\n");
    // One directory whichever of the two names a package uses, and for depmod both.
    script.push_str("mkdir usr && ln -s ../lib usr/lib\n");
    for file in &files {
        let inside = path_inside(tree, file)?;
        script.push_str(&format!(
            "dpkg-deb --fsys-tarfile '{inside}' | tar -x --keep-directory-symlink\n"
        ));
        script.push_str(&format!("rm '{inside}'\n"));
    }
    script.push_str(&format!(
        "if [ -e boot/vmlinuz-{version} ]; then mv boot/vmlinuz-{version} vmlinuz; \
         else mv lib/modules/{version}/vmlinuz vmlinuz; fi\n\
         depmod -b /var/tmp/lab-kernel {version}\n\
         rm -rf boot usr/share\n"
    ));
    tree.step(
        &format!("unpacking Linux {version}"),
        &mut tree.root_shell(&script),
    )?;
    for needed in ["vmlinuz".to_owned(), format!("lib/modules/{version}/modules.dep")] {
        ensure!(
            directory.join(&needed).is_file(),
            "the packages {} have no {needed}",
            packages.join(", ")
        );
    }
    let facts = serde_json::to_vec(&Facts {
        version: version.clone(),
    })
    .context("facts about the kernel")?;
    write_whole(&directory.join("facts.json"), &facts)?;
    let place = lab.path(&format!("kernel-{}", series.name()));
    clear(&place)?;
    std::fs::rename(&directory, &place).with_context(|| format!("moving the kernel to {}", place.display()))
}

/// The kernel's version, and the packages that hold its image and modules.
fn image_packages(tree: &Tree, series: Series) -> Result<(String, Vec<String>)> {
    let release = format!("APT::Default-Release={}", series.suite());
    let depends = |package: &str| -> Result<Vec<String>> {
        let text = tree.apt_cache(&["-o", &release, "show", "--no-all-versions", package])?;
        Ok(dependencies(&text))
    };
    let meta = depends("linux-image-amd64")?;
    let version = meta
        .iter()
        .find_map(|name| name.strip_prefix("linux-image-"))
        .with_context(|| format!("linux-image-amd64 of {} depends on no image", series.suite()))?
        .to_owned();
    let mut found = BTreeMap::new();
    let mut todo = vec![format!("linux-image-{version}")];
    while let Some(package) = todo.pop() {
        if found.contains_key(&package) {
            continue;
        }
        todo.extend(
            depends(&package)?
                .into_iter()
                .filter(|name| name.starts_with("linux-") && name.ends_with(&version)),
        );
        found.insert(package, ());
    }
    Ok((version, found.into_keys().collect()))
}

/// The names in `Depends:` of a package's record, the first of each alternative.
fn dependencies(record: &str) -> Vec<String> {
    record
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))
        .into_iter()
        .flat_map(|line| line.split(','))
        .filter_map(|one| one.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// drivers/misc/sgi-gru out of the package with the kernel's sources, of which nothing else stays.
fn extract_gru(tree: &Tree, short: &str, version: &str, held: &Held) -> Result<()> {
    let mut numbers = short.split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        bail!("{short} is no version of a kernel");
    };
    let source = format!("linux-source-{major}.{minor}");
    let mut files = tree.download(
        &format!("sources of Linux {major}.{minor} (about 150 MB)"),
        std::slice::from_ref(&source),
        held,
    )?;
    let file = files.pop().context("a downloaded package")?;
    let inside = path_inside(tree, &file)?;
    // The archive has the directory at a fixed depth; tar goes on reading to its end.
    let script = format!(
        "rm -rf /usr/src/sgi-gru.new && mkdir /usr/src/sgi-gru.new\n\
         dpkg-deb --fsys-tarfile '{inside}' | tar -xO ./usr/src/{source}.tar.xz \
         | tar -xJ -C /usr/src/sgi-gru.new --strip-components=4 '{source}/drivers/misc/sgi-gru'\n\
         rm '{inside}'\n\
         rm -rf /usr/src/sgi-gru-{version} && mv /usr/src/sgi-gru.new /usr/src/sgi-gru-{version}\n"
    );
    tree.step("sources of the sgi-gru driver", &mut tree.root_shell(&script))
}

fn path_inside(tree: &Tree, path: &Path) -> Result<String> {
    let inside = path
        .strip_prefix(tree.root())
        .with_context(|| format!("{} is not in the root tree", path.display()))?;
    let inside = inside.to_str().context("packages have ASCII names")?;
    ensure!(
        !inside.contains('\''),
        "{inside}: quotation mark in a package's name"
    );
    Ok(format!("/{inside}"))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::dependencies;

    #[test]
    fn test_dependencies_when_with_versions_and_alternatives_are_the_first_names() {
        let record = "Package: x\nPre-Depends: linux-base (>= 4)\nDepends: dracut | other (>= 1), linux-base-7 (= 7.3), kmod\nSize: 1\n";
        assert_eq!(dependencies(record), ["dracut", "linux-base-7", "kmod"]);
        assert!(dependencies("Package: x\n").is_empty());
    }
}
