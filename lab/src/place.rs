//! Where the lab is, and who may change it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};

/// The lab's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lab {
    directory: PathBuf,
}

impl Lab {
    /// The lab of this program: `TLBRIDGE_LAB`, else `target/lab` of the source tree that the program was
    /// built in, else `tlbridge/lab` in the user's cache directory.
    ///
    /// # Errors
    /// None of these can be named.
    pub fn locate() -> Result<Self> {
        let named = |variable: &str| {
            std::env::var_os(variable)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        if let Some(directory) = named("TLBRIDGE_LAB") {
            return Self::at(&directory);
        }
        let program = std::env::current_exe().context("finding the program that is running")?;
        if let Some(target) = program.ancestors().find(|a| is_target_of_source_tree(a)) {
            return Self::at(&target.join("lab"));
        }
        let cache = match (named("XDG_CACHE_HOME"), named("HOME")) {
            (Some(cache), _) if cache.is_absolute() => cache,
            (_, Some(home)) => home.join(".cache"),
            _ => bail!("no place for the lab: set TLBRIDGE_LAB to a directory"),
        };
        Self::at(&cache.join("tlbridge/lab"))
    }

    /// The lab in that directory, which need not exist.
    ///
    /// # Errors
    /// A relative path without a current directory.
    pub fn at(directory: &Path) -> Result<Self> {
        let directory = std::path::absolute(directory)
            .with_context(|| format!("the lab's directory {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The right to change the lab: one holder at a time, among processes and threads. Says so when it has
    /// to wait.
    pub(crate) fn lock(&self) -> Result<Held> {
        // A file lock belongs to the open file, so threads would share nothing; this keeps them in order and
        // lets the message below be about other processes.
        static THREADS: Mutex<()> = Mutex::new(());
        let thread = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
        self.create()?;
        let path = self.path("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}{}", path.display(), self.whose()))?;
        if file.try_lock().is_err() {
            say(&format!(
                "another process is making something in {}: waiting for it",
                self.directory.display()
            ));
            file.lock()
                .with_context(|| format!("locking {}", path.display()))?;
        }
        Ok(Held {
            _file: file,
            _thread: thread,
        })
    }

    /// Makes the directory. Made by root in somebody's place it is theirs, so that they can use it
    /// afterwards without being root.
    fn create(&self) -> Result<()> {
        if self.directory.is_dir() {
            return Ok(());
        }
        let owner = self
            .directory
            .ancestors()
            .skip(1)
            .find_map(|a| std::fs::metadata(a).ok())
            .map(|m| (m.uid(), m.gid()));
        std::fs::create_dir_all(&self.directory)
            .with_context(|| format!("creating {}", self.directory.display()))?;
        if is_root()
            && let Some((uid, gid)) = owner
            && uid != 0
        {
            std::os::unix::fs::chown(&self.directory, Some(uid), Some(gid))
                .with_context(|| format!("giving {} to its user", self.directory.display()))?;
        }
        Ok(())
    }

    fn whose(&self) -> String {
        match std::fs::metadata(&self.directory) {
            Ok(m) if !is_root() && m.uid() != rustix::process::getuid().as_raw() => format!(
                " (the lab belongs to user {}; TLBRIDGE_LAB names another one)",
                m.uid()
            ),
            _ => String::new(),
        }
    }
}

/// The right to change the lab, until it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _file: File,
    _thread: MutexGuard<'static, ()>,
}

/// Whether a directory is cargo's target directory in the source tree of this project.
fn is_target_of_source_tree(directory: &Path) -> bool {
    directory.file_name().is_some_and(|n| n == "target")
        && directory
            .parent()
            .is_some_and(|tree| tree.join("lab/Cargo.toml").is_file() && tree.join("xtask").is_dir())
}

/// Progress goes to stderr: stdout may be a guest's.
pub(crate) fn say(what: &str) {
    eprintln!("lab: {what}");
}

/// Whether this process may make root trees.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Writes a file that is either not there or complete.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file in the lab has a directory")?;
    let mut new = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(directory)
        .with_context(|| format!("writing in {}", directory.display()))?;
    new.write_all(contents)
        .with_context(|| format!("writing {}", path.display()))?;
    new.persist(path)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

/// Removes what an interrupted run may have left.
pub(crate) fn clear(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_lock_when_held_by_another_thread_waits_for_it() {
        let place = tempfile::tempdir().unwrap();
        let lab = Lab::at(&place.path().join("deep/lab")).unwrap();
        let held = lab.lock().unwrap();
        let other = lab.clone();
        let given_back = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&given_back);
        let thread = std::thread::spawn(move || {
            let _held = other.lock().unwrap();
            seen.load(std::sync::atomic::Ordering::SeqCst)
        });
        given_back.store(true, std::sync::atomic::Ordering::SeqCst);
        drop(held);
        assert!(thread.join().unwrap());
    }

    #[test]
    fn test_file_when_written_whole_replaces_the_old_one() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    }
}
