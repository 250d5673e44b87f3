//! Kernel modules: which ones of a stock kernel belong together, and building our own.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::kernel::{Kernel, Series};
use crate::place::{clear, say};
use crate::tree::{Fnv, need_namespaces};

/// The shim's sources (driver/kmod/gru), by their path there.
const SHIM: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/shim_sources.rs"));

/// The modules that bind the unmodified sgi-gru driver to our PCI function, in the order of loading.
pub const GRU_MODULES: [&str; 2] = ["tlbridge_uv.ko", "gru.ko"];

impl Lab {
    /// The GRU's modules that are there and fit the shim's present sources.
    ///
    /// # Errors
    /// They are not, and how to get them.
    pub fn find_gru_modules(&self, series: Series) -> Result<Vec<PathBuf>> {
        self.kept_gru_modules(series).with_context(|| {
            format!(
                "no modules for the GRU, or older ones than their sources, in {}: `cargo xtask lab` or \
                 `tlbridge vm --model gru` build them",
                self.directory().display()
            )
        })
    }

    fn kept_gru_modules(&self, series: Series) -> Option<Vec<PathBuf>> {
        let (_, headers) = self.find_headers(series)?;
        let directory = self.gru_directory(&headers.version);
        let files: Vec<_> = GRU_MODULES.iter().map(|m| directory.join(m)).collect();
        files.iter().all(|f| f.is_file()).then_some(files)
    }

    /// A directory for each state of the sources, so that one is either complete or not there.
    fn gru_directory(&self, version: &str) -> PathBuf {
        let mut hasher = Fnv::default();
        SHIM.hash(&mut hasher);
        self.path(&format!("modules/gru-{version}-{:016x}", hasher.finish()))
    }

    /// The GRU's modules for a stock kernel, built if they are not there: the shim of this project, and the
    /// driver from the distribution's sources, unpatched.
    ///
    /// # Errors
    /// Something that it takes cannot be had here, or the compiler complains.
    pub fn provide_gru_modules(&self, series: Series) -> Result<Vec<PathBuf>> {
        if let Ok(found) = self.find_gru_modules(series) {
            return Ok(found);
        }
        ensure!(
            series == Series::Stable,
            "Linux has no sgi-gru driver any more (it is gone in 7.3): the GRU's modules are for the {} kernel, and \
             `--model none` boots this one",
            Series::Stable.name()
        );
        ensure!(
            SHIM.iter().any(|(name, _)| *name == "build.sh"),
            "this tlbridge was built without the sources of driver/kmod/gru"
        );
        need_namespaces()?;
        self.provide_kernel(series)?;
        let held = self.lock()?;
        if let Ok(found) = self.find_gru_modules(series) {
            return Ok(found);
        }
        let (tree, headers) = self.provide_headers(series, &held)?;
        let place = self.gru_directory(&headers.version);
        let parent = self.path("modules");
        std::fs::create_dir_all(&parent).with_context(|| format!("creating {}", parent.display()))?;
        let work = self.path("modules/work");
        clear(&work)?;
        for (name, contents) in SHIM {
            let path = work.join("gru").join(name);
            let directory = path.parent().context("a source has a directory")?;
            std::fs::create_dir_all(directory)
                .with_context(|| format!("creating {}", directory.display()))?;
            std::fs::write(&path, contents).with_context(|| format!("writing {}", path.display()))?;
            if name.ends_with(".sh") {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
                    .context("a script's mode")?;
            }
        }
        std::fs::create_dir(work.join("out")).context("the build's output directory")?;
        let script = format!(
            "cd /mnt/gru && ./build.sh --headers {} --gru-source {} --out /mnt/out",
            headers.headers, headers.gru_source
        );
        tree.steps().run(
            &format!("modules for the GRU, Linux {}", headers.version),
            &mut tree.inside(&work, &script),
        )?;
        for module in GRU_MODULES {
            ensure!(
                work.join("out").join(module).is_file(),
                "driver/kmod/gru/build.sh left no {module}"
            );
        }
        // Objects and copies of sources.
        clear(&work.join("out/build"))?;
        // What other states of the sources left is not used again.
        for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name
                .to_string_lossy()
                .starts_with(&format!("gru-{}-", headers.version))
            {
                clear(&entry.path())?;
            }
        }
        std::fs::rename(work.join("out"), &place)
            .with_context(|| format!("moving modules to {}", place.display()))?;
        clear(&work)?;
        say(&format!("  in {}", place.display()));
        self.find_gru_modules(series)
    }

    /// A module of a kernel as plain bytes, whatever it is compressed with.
    pub(crate) fn read_module(&self, path: &Path) -> Result<Vec<u8>> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let program = match extension {
            "ko" => return std::fs::read(path).with_context(|| format!("reading {}", path.display())),
            "xz" | "gz" | "zst" => extension,
            _ => bail!(
                "{} is no kernel module (.ko, .ko.xz, .ko.gz, .ko.zst)",
                path.display()
            ),
        };
        let mut command = match (program, self.find_tools()) {
            // The lab's, so that nothing of this system is needed.
            ("xz", Ok(tools)) => tools.program("usr/bin/xz"),
            ("xz", _) => Command::new("xz"),
            ("gz", _) => Command::new("gzip"),
            _ => Command::new("zstd"),
        };
        let output = command
            .arg("-dc")
            .arg(path)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting a program that reads .{program} for {}", path.display()))?;
        ensure!(
            output.status.success(),
            "{}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output.stdout)
    }
}

impl Kernel {
    /// The files of these modules and of all that they depend on, in the order of loading. Modules that are
    /// built in are left out.
    ///
    /// # Errors
    /// The kernel has no such module, or no list of dependencies (`depmod`).
    pub fn with_dependencies(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let directory = self
            .modules
            .as_ref()
            .context("this kernel came without modules (--modules names their directory)")?;
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path)
                .with_context(|| format!("reading {} (made by depmod)", path.display()))
        };
        let dependencies = Dependencies::parse(&read("modules.dep")?);
        let built_in = read("modules.builtin").unwrap_or_default();
        let built_in: Vec<String> = built_in.lines().map(module_name).collect();
        let mut order = Vec::new();
        for name in names {
            let name = normal(name);
            if built_in.contains(&name) {
                continue;
            }
            dependencies
                .collect(&name, &mut order)
                .with_context(|| format!("modules of {}", directory.display()))?;
        }
        Ok(order.into_iter().map(|path| directory.join(path)).collect())
    }
}

/// modules.dep: what each file needs, directly and indirectly, the nearest first.
struct Dependencies {
    by_name: HashMap<String, (String, Vec<String>)>,
}

impl Dependencies {
    fn parse(text: &str) -> Self {
        let by_name = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (module_name(path), (path.to_owned(), needs))
            })
            .collect();
        Self { by_name }
    }

    /// Adds a module's file after the files of what it needs.
    fn collect(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let (path, needs) = self
            .by_name
            .get(name)
            .with_context(|| format!("no module is called {name}"))?;
        // The list is complete, and its last entry depends on nothing that comes before it.
        for file in needs.iter().rev().chain([path]) {
            if !order.contains(file) {
                order.push(file.clone());
            }
        }
        Ok(())
    }
}

/// The kernel's own name of a module's file.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_modules_when_dependent_come_after_what_they_need() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(
            place.path().join("modules.dep"),
            "k/mlx5_ib.ko.xz: k/ib_uverbs.ko.xz k/mlx5-core.ko.xz k/ib_core.ko.xz\nk/ib_uverbs.ko.xz: k/ib_core.ko.xz\n\
             k/ib_core.ko.xz:\nk/mlx5-core.ko.xz:\n",
        )
        .unwrap();
        std::fs::write(place.path().join("modules.builtin"), "kernel/virtio_ring.ko\n").unwrap();
        let kernel = Kernel {
            image: "x".into(),
            modules: Some(place.path().into()),
        };
        let names = |wanted: &[&str]| -> Vec<String> {
            kernel
                .with_dependencies(wanted)
                .unwrap()
                .iter()
                .map(|p| module_name(p.to_str().unwrap()))
                .collect()
        };
        assert_eq!(
            names(&["mlx5_core", "virtio-ring", "mlx5-ib"]),
            ["mlx5_core", "ib_core", "ib_uverbs", "mlx5_ib"]
        );
        let missing = kernel.with_dependencies(&["nothing"]).unwrap_err();
        assert!(format!("{missing:#}").contains("nothing"), "{missing:#}");
    }

    #[test]
    fn test_module_when_of_an_unknown_kind_is_refused() {
        let lab = Lab::at(Path::new("/nonexistent")).unwrap();
        assert!(lab.read_module(Path::new("/x/y.txt")).is_err());
    }
}
