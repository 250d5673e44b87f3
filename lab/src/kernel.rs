//! Stock kernels of Debian, unpacked; and what builds modules for them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::Lab;
use crate::apt::{self, Apt, BACKPORTS, RELEASE};
use crate::place::{Held, clear, write_whole};
use crate::tree::{Recipe, Tree};

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
            Self::Stable => RELEASE,
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
    /// It cannot be had here: no apt, no network, no room.
    pub fn provide_kernel(&self, series: Series) -> Result<Kernel> {
        // A guest with it takes the tools, too.
        if let (Ok(kernel), Ok(_)) = (self.find_kernel(series), self.find_tools()) {
            return Ok(kernel);
        }
        let held = self.lock()?;
        self.provide_tools(&held)?;
        if let Ok(kernel) = self.find_kernel(series) {
            return Ok(kernel);
        }
        unpack_kernel(self, series, &held)?;
        self.find_kernel(series)
    }

    /// The static busybox for guests, if it is there.
    ///
    /// # Errors
    /// It is not, and how to get it.
    pub(crate) fn find_busybox(&self) -> Result<PathBuf> {
        Ok(self.find_tools()?.root().join("usr/bin/busybox"))
    }

    /// What guests, kernels and images want, if it is there.
    ///
    /// # Errors
    /// It is not, and how to get it.
    pub(crate) fn find_tools(&self) -> Result<Tree> {
        self.find_tree(&tools()).with_context(|| {
            format!(
                "no busybox in {}: `cargo xtask lab` or `tlbridge vm` get it",
                self.directory().display()
            )
        })
    }

    /// The same, made if it is not there.
    pub(crate) fn provide_tools(&self, held: &Held) -> Result<Tree> {
        self.provide_tree(&tools(), held, |_, _| Ok(()))
    }

    /// What builds modules for that kernel, if it is there.
    pub(crate) fn find_headers(&self, series: Series) -> Option<(Tree, Headers)> {
        let version = version_of(&self.path(&format!("kernel-{}", series.name()))).ok()?;
        let tree = self.find_tree(&build_recipe(series, &version).ok()?)?;
        Some((tree, Headers::of(version)))
    }

    /// The same, unpacked if it is not there. The versions are those of the kernel, which must be there.
    pub(crate) fn provide_headers(&self, series: Series, held: &Held) -> Result<(Tree, Headers)> {
        if let Some(found) = self.find_headers(series) {
            return Ok(found);
        }
        let directory = self.path(&format!("kernel-{}", series.name()));
        let version = version_of(&directory).context("the kernel has been provided before its headers")?;
        let recipe = build_recipe(series, &version)?;
        let tools = self.provide_tools(held)?;
        let tree = self.provide_tree(&recipe, held, |tree, apt| {
            // What the scripts of these packages would do.
            std::os::unix::fs::symlink("mawk", tree.root().join("usr/bin/awk")).context("a link to mawk")?;
            extract_gru(self, tree, &tools, apt, &version)
        })?;
        Ok((tree, Headers::of(version)))
    }
}

impl Headers {
    fn of(version: String) -> Self {
        Self {
            headers: format!("/usr/src/linux-headers-{version}"),
            gru_source: "/usr/src/sgi-gru".into(),
            version,
        }
    }
}

fn tools() -> Recipe {
    Recipe::new(
        "tools",
        "busybox, kmod, xz, mkfs (10 MB)",
        RELEASE,
        &["base-files", "busybox-static", "kmod", "xz-utils", "e2fsprogs"],
    )
}

fn build_recipe(series: Series, version: &str) -> Result<Recipe> {
    let short = version
        .strip_suffix("-amd64")
        .with_context(|| format!("{version} is no kernel for amd64"))?;
    let mut recipe = Recipe::new(
        &format!("build_{}", series.name()),
        &format!("gcc, make, headers of Linux {short} (80 MB)"),
        series.suite(),
        // What a build runs, and what every Debian system has.
        &[
            "base-files",
            "bash",
            "coreutils",
            "dash",
            "diffutils",
            "findutils",
            "gcc",
            "grep",
            "gzip",
            "libc-bin",
            "libc6-dev",
            "make",
            "mawk",
            "perl-base",
            "sed",
            "tar",
        ],
    );
    recipe.packages.push(format!("linux-kbuild-{short}"));
    // With what they depend on they would bring a whole system.
    recipe.alone = vec![
        format!("linux-headers-{version}"),
        format!("linux-headers-{short}-common"),
    ];
    Ok(recipe)
}

fn version_of(directory: &Path) -> Result<String> {
    let path = directory.join("facts.json");
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let facts: Facts = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    Ok(facts.version)
}

fn unpack_kernel(lab: &Lab, series: Series, held: &Held) -> Result<()> {
    let tools = lab.provide_tools(held)?;
    let apt = Apt::open(lab, held)?;
    let (version, packages) = image_packages(&apt, series)?;
    let directory = lab.path("kernel.new");
    clear(&directory)?;
    // One directory whichever of the two names a package uses, and for depmod both.
    std::fs::create_dir_all(directory.join("lib")).context("a directory for the kernel")?;
    std::fs::create_dir(directory.join("usr")).context("a directory for the kernel")?;
    std::os::unix::fs::symlink("../lib", directory.join("usr/lib")).context("a directory for the kernel")?;
    let what = format!("Linux {version} (110 MB)");
    apt::download_and_unpack(
        &apt,
        lab,
        &what,
        series.suite(),
        [(&packages, true), (&[], false)],
        &directory,
    )?;
    let modules = directory.join("lib/modules").join(&version);
    let image = [
        directory.join(format!("boot/vmlinuz-{version}")),
        modules.join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .with_context(|| format!("the packages {} have no vmlinuz", packages.join(", ")))?;
    std::fs::rename(&image, directory.join("vmlinuz"))
        .with_context(|| format!("moving {}", image.display()))?;
    tools.steps().run(
        "dependencies of the kernel's modules",
        tools
            .program("usr/sbin/depmod")
            .arg("-b")
            .arg(&directory)
            .arg(&version),
    )?;
    ensure!(
        modules.join("modules.dep").is_file(),
        "depmod has left no modules.dep in {}",
        modules.display()
    );
    for unread in ["boot", "usr/share"] {
        clear(&directory.join(unread))?;
    }
    let facts = serde_json::to_vec(&Facts { version }).context("facts about the kernel")?;
    write_whole(&directory.join("facts.json"), &facts)?;
    let place = lab.path(&format!("kernel-{}", series.name()));
    clear(&place)?;
    std::fs::rename(&directory, &place).with_context(|| format!("moving the kernel to {}", place.display()))
}

/// The kernel's version, and the packages that hold its image and modules.
fn image_packages(apt: &Apt, series: Series) -> Result<(String, Vec<String>)> {
    let depends =
        |package: &str| -> Result<Vec<String>> { Ok(dependencies(&apt.show(series.suite(), package)?)) };
    let meta = depends("linux-image-amd64")?;
    let version = meta
        .iter()
        .find_map(|name| name.strip_prefix("linux-image-"))
        .with_context(|| format!("linux-image-amd64 of {} depends on no image", series.suite()))?
        .to_owned();
    let mut found = BTreeSet::new();
    let mut todo = vec![format!("linux-image-{version}")];
    while let Some(package) = todo.pop() {
        if found.contains(&package) {
            continue;
        }
        todo.extend(
            depends(&package)?
                .into_iter()
                .filter(|name| name.starts_with("linux-") && name.ends_with(&version)),
        );
        found.insert(package);
    }
    Ok((version, found.into_iter().collect()))
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

/// drivers/misc/sgi-gru out of the package with the kernel's sources, of which nothing else stays. Into the tree's
/// `usr/src/sgi-gru`.
fn extract_gru(lab: &Lab, tree: &Tree, tools: &Tree, apt: &Apt, version: &str) -> Result<()> {
    let mut numbers = version.split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        bail!("{version} is no version of a kernel");
    };
    let source = format!("linux-source-{major}.{minor}");
    let what = format!("sources of Linux {major}.{minor} (150 MB)");
    let work = lab.path("apt/source");
    clear(&work)?;
    let lists = [(&[source.clone()][..], true), (&[][..], false)];
    apt::download_and_unpack(apt, lab, &what, RELEASE, lists, &work)?;
    let archive = work.join(format!("usr/src/{source}.tar.xz"));
    let place = tree.root().join("usr/src/sgi-gru");
    std::fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
    let mut xz = tools.program("usr/bin/xz");
    xz.arg("-dc").arg(&archive);
    let mut tar = Command::new("tar");
    // The archive has the directory at a fixed depth; tar goes on reading to its end.
    tar.args(["-x", "--no-same-owner", "--strip-components=4", "-f", "-", "-C"])
        .arg(&place)
        .arg(format!("{source}/drivers/misc/sgi-gru"));
    tree.steps()
        .pipe(xz, tar)
        .context("the sgi-gru driver's sources")?;
    clear(&work)
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
