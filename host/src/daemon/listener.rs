//! A socket for control messages (the daemon's, or that a device is inspected by): made safely, and found again only by
//! those who may.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt::socket_peercred,
};

use super::DaemonError;

/// Connections that may wait for `accept`.
const BACKLOG: i32 = 64;
/// Longest wait for another daemon that is starting in the same directory.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// The listening socket. Its file is removed when this is dropped, if it still is this socket's file.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// (device, inode) of the socket's file.
    file: (u64, u64),
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

impl Listener {
    /// Binds `path`, replacing the file of a daemon that is dead.
    ///
    /// # Errors
    /// [`DaemonError::Listen`]: a live daemon (named by pid), a file that is no socket, or the system's reason.
    pub fn bind(path: &Path) -> Result<Self, DaemonError> {
        let fail = |reason: String| DaemonError::Listen {
            path: path.to_owned(),
            reason,
        };
        let system = |what: &str, e: &dyn std::fmt::Display| fail(format!("{what}: {e}"));
        let address = SocketAddrUnix::new(path)
            .map_err(|e| system("not usable as a socket path (at most 107 bytes)", &e))?;
        let directory = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let directory_fd = rustix::fs::open(
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| system(&format!("directory {}; create it first", directory.display()), &e))?;
        // Two daemons that both find a dead one's file must not remove each other's: one at a time, until it
        // listens. The lock goes with the descriptor.
        lock(&directory_fd).map_err(|e| system(&format!("lock of {}", directory.display()), &e))?;

        remove_stale(path, &address).map_err(&fail)?;
        let socket = seqpacket().map_err(|e| system("socket", &e))?;
        bind(&socket, &address).map_err(|e| system("bind", &e))?;
        // Nobody can connect before listen(), so nobody gets in under the wrong mode.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(|e| system("chmod 0600", &e))?;
        listen(&socket, BACKLOG).map_err(|e| system("listen", &e))?;
        let meta = std::fs::symlink_metadata(path).map_err(|e| system("stat", &e))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            file: (meta.dev(), meta.ino()),
        })
    }

    /// Takes a connection. Does not wait.
    ///
    /// # Errors
    /// `WouldBlock` when nobody waits; else the system's reason (ECONNABORTED, EMFILE ...).
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(
            &self.socket,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        )?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the control socket's file could not be removed");
        }
    }
}

/// Takes the directory's lock. Others hold it for the moment of their own start only; but anybody may hold it for
/// ever, so the wait has an end.
fn lock(directory: &OwnedFd) -> Result<(), String> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                // flock has no time limit of its own.
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(format!(
                    "another process has held it for {} s; end it or choose another directory",
                    LOCK_LIMIT.as_secs()
                ));
            }
            Err(e) => return Err(e.to_string()),
        }
    }
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), String> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("stat: {e}")),
    };
    if !meta.file_type().is_socket() {
        return Err("a file that is no socket is there; move it away or choose another path".into());
    }
    let probe = seqpacket().map_err(|e| format!("socket: {e}"))?;
    match connect(&probe, address) {
        // A full backlog is a live daemon too.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => {
            let who = socket_peercred(&probe).map_or_else(
                |_| String::from("another process"),
                |cred| format!("another process (pid {})", cred.pid.as_raw_pid()),
            );
            Err(format!("{who} listens there; stop it or choose another path"))
        }
        Err(rustix::io::Errno::CONNREFUSED) => {
            tracing::info!(path = %path.display(), "replacing the socket of a daemon that is gone");
            std::fs::remove_file(path)
                .map_err(|e| format!("the file of a dead daemon cannot be removed: {e}"))
        }
        Err(rustix::io::Errno::PROTOTYPE) => {
            Err("a socket of another kind is there; choose another path".into())
        }
        Err(e) => Err(format!(
            "a socket is there and cannot be probed: {e}; choose another path"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_listener_when_daemon_is_dead_replaces_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        {
            let dead = seqpacket().unwrap();
            bind(&dead, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        }
        let listener = Listener::bind(&path).unwrap();
        let mode = std::fs::symlink_metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists(), "removed when dropped");
    }

    #[test]
    fn test_listener_when_directory_stays_locked_ends_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let held = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        let error = Listener::bind(&dir.path().join("s")).unwrap_err().to_string();
        assert!(
            error.contains(&dir.path().display().to_string()) && error.contains("held"),
            "{error}"
        );
        drop(held);
        Listener::bind(&dir.path().join("s")).unwrap();
    }

    #[test]
    fn test_listener_when_daemon_lives_names_its_pid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(path.exists(), "the first daemon's file stays");
    }

    #[test]
    fn test_listener_when_path_is_a_file_leaves_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&path).unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn test_listener_when_file_was_replaced_does_not_remove_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "new").unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
