//! The listening socket and its file, and the stop signal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, Mode, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Asks [`super::Server::run`] to return. Clones stand for the same request, which is never taken back.
#[derive(Debug, Clone)]
pub struct StopFd(Arc<OwnedFd>);

impl StopFd {
    /// Not asked yet.
    ///
    /// # Errors
    /// When no file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?)))
    }

    /// Ask. May be called from a signal handler's thread, and more than once.
    pub fn stop(&self) {
        // Cannot fail: the counter never comes near its limit, and a full one is as readable.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// It has been asked for.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
    }
}

impl AsFd for StopFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody accepts connections there.
    #[error("{} is in use: another process listens on it; stop it or choose another path", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else.
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A path that fits no socket address.
    #[error("{} is too long for a socket (at most 107 bytes); choose a shorter path", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{}: {call} failed: {source}; is the directory there and writable?", path.display())]
    System {
        /// The socket.
        path: PathBuf,
        /// Which call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A bound, listening socket. Dropping it removes the file, if it is still this socket's.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let system = |call| {
            move |errno: Errno| BindError::System {
                path: path.into(),
                call,
                source: errno.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => BindError::PathTooLong { path: path.into() },
            other => system("socket address")(other),
        })?;
        let new_socket = || {
            socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )
        };
        let fd = new_socket().map_err(system("socket"))?;
        // Linux gives the file the mode of the socket's inode, so it is never open to others.
        fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(system("fchmod"))?;
        match bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                let file = lstat(path).map_err(system("stat"))?;
                if FileType::from_raw_mode(file.st_mode) != FileType::Socket {
                    return Err(BindError::NotASocket { path: path.into() });
                }
                // Refused = a file without a listener. A full listen queue is a listener, hence non-blocking.
                let probe = socket_with(
                    AddressFamily::UNIX,
                    SocketType::STREAM,
                    SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                    None,
                )
                .map_err(system("socket"))?;
                match connect(&probe, &address) {
                    Err(Errno::CONNREFUSED) => {
                        tracing::info!(socket = %path.display(), "replacing a stale socket")
                    }
                    _ => return Err(BindError::InUse { path: path.into() }),
                }
                unlink(path).map_err(system("unlink"))?;
                bind(&fd, &address).map_err(system("bind"))?;
            }
            result => result.map_err(system("bind"))?,
        }
        let file = lstat(path).map_err(system("stat"))?;
        let listener = Self {
            fd,
            path: path.into(),
            file: (file.st_dev, file.st_ino),
        };
        listen(&listener.fd, 8).map_err(system("listen"))?;
        Ok(listener)
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if lstat(&self.path).is_ok_and(|file| (file.st_dev, file.st_ino) == self.file) {
            let _ = unlink(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_bind_when_the_path_is_free_makes_a_private_socket_and_removes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(lstat(&path).unwrap().st_mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn test_bind_when_the_socket_is_stale_replaces_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Listener::bind(&path).unwrap();
    }

    #[test]
    fn test_bind_when_somebody_listens_is_refused_and_leaves_them_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _first = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
        std::os::unix::net::UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn test_bind_when_a_file_is_there_is_refused_and_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn test_bind_when_the_path_is_impossible_says_why() {
        let long = format!("/tmp/{}", "x".repeat(200));
        assert!(matches!(
            Listener::bind(Path::new(&long)),
            Err(BindError::PathTooLong { .. })
        ));
        let missing = tempfile::tempdir().unwrap().path().join("gone/s");
        assert!(matches!(
            Listener::bind(&missing),
            Err(BindError::System { call: "bind", .. })
        ));
    }

    #[test]
    fn test_drop_when_the_file_is_somebody_elses_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = Listener::bind(&path).unwrap();
        unlink(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn test_stop_when_asked_is_seen_by_every_clone() {
        let stop = StopFd::new().unwrap();
        let other = stop.clone();
        assert!(!other.is_stopped());
        stop.stop();
        stop.stop();
        assert!(other.is_stopped() && stop.is_stopped());
    }
}
