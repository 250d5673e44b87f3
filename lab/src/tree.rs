//! Root trees: packages of Debian 13 with all that they depend on, unpacked into a directory. Their programs
//! run on this system by the tree's own loader; a build runs inside, in a namespace.

use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{self, Apt};
use crate::place::{Held, Lab, clear, is_root};
use crate::steps::Steps;

/// Libraries of a tree.
pub(crate) const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
pub(crate) const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
/// Counts changes of how trees are made.
const REVISION: u32 = 3;

/// What a tree has. Two that differ in anything are different trees.
#[derive(Debug, Clone, Hash)]
pub(crate) struct Recipe {
    /// Its name in the lab.
    pub name: String,
    /// For people, with the size of the download.
    pub what: String,
    /// Which of Debian's suites is preferred.
    pub suite: &'static str,
    /// These with all that they depend on.
    pub packages: Vec<String>,
    /// These without.
    pub alone: Vec<String>,
    /// A hash of what is added to them.
    pub added: u64,
}

/// A complete tree.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    root: PathBuf,
    steps: Steps,
}

impl Recipe {
    /// Names it.
    pub(crate) fn new(name: &str, what: &str, suite: &'static str, packages: &[&str]) -> Self {
        Self {
            name: name.into(),
            what: what.into(),
            suite,
            packages: packages.iter().map(|&p| p.to_owned()).collect(),
            alone: Vec::new(),
            added: 0,
        }
    }

    /// The same for the same recipe, on any machine.
    pub(crate) fn key(&self) -> String {
        let mut hasher = Fnv::default();
        (REVISION, self).hash(&mut hasher);
        format!("{:012x}", hasher.finish() & 0xffff_ffff_ffff)
    }
}

/// A hash that stays what it is from one version of the compiler to the next (FNV-1a, 64 bits).
#[derive(Debug)]
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

/// The hash of some bytes.
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    let mut hasher = Fnv::default();
    hasher.write(bytes);
    hasher.finish()
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Lab {
    fn tree_place(&self, recipe: &Recipe) -> PathBuf {
        self.path(&format!("trees/{}-{}", recipe.name, recipe.key()))
    }

    /// The tree of that recipe, if it is there.
    pub(crate) fn find_tree(&self, recipe: &Recipe) -> Option<Tree> {
        let root = self.tree_place(recipe);
        // It was renamed when it was complete.
        root.is_dir().then(|| Tree {
            root,
            steps: self.steps(),
        })
    }

    /// The same, made if it is not there. `finish` adds what packages do not bring.
    pub(crate) fn provide_tree(
        &self,
        recipe: &Recipe,
        held: &Held,
        finish: impl FnOnce(&Tree, &Apt) -> Result<()>,
    ) -> Result<Tree> {
        if let Some(tree) = self.find_tree(recipe) {
            return Ok(tree);
        }
        let apt = Apt::open(self, held)?;
        let new = Tree {
            root: self.path("trees/new"),
            steps: self.steps(),
        };
        clear(&new.root)?;
        let lists = [
            (recipe.packages.as_slice(), false),
            (recipe.alone.as_slice(), true),
        ];
        apt::download_and_unpack(&apt, self, &recipe.what, recipe.suite, lists, &new.root)?;
        // Their scripts would make these.
        for directory in ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var"] {
            let directory = new.root.join(directory);
            std::fs::create_dir_all(&directory)
                .with_context(|| format!("creating {}", directory.display()))?;
        }
        finish(&new, &apt)?;
        // What nobody reads in a tree is half of its files.
        for unread in [
            "usr/share/doc-base",
            "usr/share/man",
            "usr/share/info",
            "usr/share/locale",
            "var/cache/apt",
        ] {
            clear(&new.root.join(unread))?;
        }
        // Those of older recipes are not used again.
        let prefix = format!("{}-", recipe.name);
        for entry in std::fs::read_dir(self.path("trees"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let of_it = name
                .to_string_lossy()
                .strip_prefix(&prefix)
                .is_some_and(|key| !key.contains('-'));
            if of_it {
                clear(&entry.path())?;
            }
        }
        let place = self.tree_place(recipe);
        std::fs::rename(&new.root, &place)
            .with_context(|| format!("moving the tree to {}", place.display()))?;
        Ok(Tree {
            root: place,
            steps: self.steps(),
        })
    }
}

impl Tree {
    /// Its directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// How steps in it are run.
    pub(crate) fn steps(&self) -> &Steps {
        &self.steps
    }

    /// One of the tree's programs, run on this system by the tree's loader: without privilege, with this
    /// system's files.
    pub(crate) fn program(&self, path: &str) -> Command {
        let mut command = Command::new(self.root.join(LOADER));
        command
            .arg("--library-path")
            .arg(self.root.join(LIBRARIES))
            .arg("--argv0")
            .arg(Path::new(path).file_name().unwrap_or(OsStr::new(path)))
            .arg(self.root.join(path))
            .env_remove("LD_PRELOAD");
        command
    }

    /// A script for `sh` that becomes one of the tree's programs, with these further lines before it. It
    /// stands in the tree's root and goes by its own place, so that a lab can be moved or copied.
    pub(crate) fn wrapper(&self, path: &str, suite: &str, lines: &str, arguments: &str) -> String {
        let name = Path::new(path).file_name().unwrap_or(OsStr::new(path)).display();
        format!(
            "#!/bin/sh\n# {name} of Debian {suite}, run on this system by its own loader.\ntree=\"${{0%/*}}\"\n{lines}\
             exec \"$tree/{LOADER}\" --library-path \"$tree/{LIBRARIES}\" --argv0 {name} \\\n  \
             \"$tree/{path}\" {arguments} \"$@\"\n"
        )
    }

    /// A command inside the tree, as root or in a user namespace, in which `work` is `/mnt`.
    pub(crate) fn inside(&self, work: &Path, script: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--foreground", "1800", "unshare", "--mount"]);
        if !is_root() {
            command.arg("--map-root-user");
        }
        command
            .args([
                "sh",
                "-ec",
                "mount --bind \"$1\" \"$2/mnt\"; mount --rbind /dev \"$2/dev\"; exec chroot \"$2\" sh -ec \"$3\"",
                "inside",
            ])
            .arg(work)
            .arg(&self.root)
            .arg(script)
            .env("LC_ALL", "C")
            .env_remove("LD_PRELOAD")
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            );
        command
    }
}

/// Whether builds can be run inside a tree by this user.
///
/// # Errors
/// Why not, and what helps.
pub(crate) fn need_namespaces() -> Result<()> {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !is_root() {
        command.arg("--map-root-user");
    }
    let output = command
        .arg("true")
        .output()
        .context("starting unshare (util-linux)")?;
    anyhow::ensure!(
        output.status.success(),
        "a build in a root tree takes a mount namespace{}, which this system refuses: {} Run this once as root, with \
         the same TLBRIDGE_LAB, or let users make namespaces (sysctl kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces)",
        if is_root() { "" } else { " of a user's own" },
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
