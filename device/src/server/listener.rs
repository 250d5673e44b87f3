//! The listening socket and its file, and the stop signal.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, fchmod, flock, linkat, lstat, open, rename, unlink,
};
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
        let fd = stream_socket(SocketFlags::CLOEXEC).map_err(system("socket"))?;
        // Linux gives the file the mode of the socket's inode, so it is never open to others.
        fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(system("fchmod"))?;
        // Under a name of its own first: what appears under the right name listens already, so nobody takes
        // it for stale.
        let temporary = Temporary::bind(&fd, path).map_err(|(call, errno)| system(call)(errno))?;
        listen(&fd, 8).map_err(system("listen"))?;
        let file = lstat(&temporary.0).map_err(system("stat"))?;
        let listener = Self {
            fd,
            path: path.into(),
            file: (file.st_dev, file.st_ino),
        };
        match linkat(CWD, &temporary.0, CWD, path, AtFlags::empty()) {
            Ok(()) => return Ok(listener),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(system("link")(errno)),
        }
        // Looking and replacing are one step for everybody who does it: the directory is locked. Whoever
        // finds it locked is too late.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(directory_of(path), flags, Mode::empty()).map_err(system("open"))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(BindError::InUse { path: path.into() }),
            result => result.map_err(system("flock"))?,
        }
        match lstat(path) {
            Ok(file) if FileType::from_raw_mode(file.st_mode) == FileType::Socket => {}
            Ok(_) => return Err(BindError::NotASocket { path: path.into() }),
            // Its owner has just removed it.
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(system("stat")(errno)),
        }
        // Refused = a file without a listener. A full listen queue is a listener, hence non-blocking.
        let probe = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map_err(system("socket"))?;
        match connect(&probe, &address) {
            Err(Errno::CONNREFUSED | Errno::NOENT) => {}
            _ => return Err(BindError::InUse { path: path.into() }),
        }
        tracing::info!(socket = %path.display(), "replacing a stale socket");
        rename(&temporary.0, path).map_err(system("rename"))?;
        Ok(listener)
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The socket's first name, beside the right one. Removed when dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn bind(fd: &OwnedFd, path: &Path) -> Result<Self, (&'static str, Errno)> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let directory = directory_of(path);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!(".{:x}-{number:x}.tlb", std::process::id());
            let long = directory.join(&name);
            let address = match SocketAddrUnix::new(&long) {
                Ok(address) => Ok(address),
                // The right name is short enough, this one is not: reach the directory by a shorter way.
                Err(Errno::NAMETOOLONG) => {
                    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    let directory = open(directory, flags, Mode::empty()).map_err(|errno| ("open", errno))?;
                    let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
                    let result = SocketAddrUnix::new(short).and_then(|address| bind(fd, &address));
                    match result {
                        Err(Errno::ADDRINUSE) => continue,
                        result => return result.map(|()| Self(long)).map_err(|errno| ("bind", errno)),
                    }
                }
                Err(errno) => Err(errno),
            };
            match address.and_then(|address| bind(fd, &address)) {
                // Left by a process that was killed here, and had the same id.
                Err(Errno::ADDRINUSE) => {}
                result => return result.map(|()| Self(long)).map_err(|errno| ("bind", errno)),
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = unlink(&self.0);
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
    fn test_bind_when_several_start_at_once_on_a_stale_socket_exactly_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..50 {
            drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(3);
            let results: Vec<_> = std::thread::scope(|scope| {
                let one = || {
                    start.wait();
                    Listener::bind(&path)
                };
                let threads: Vec<_> = (0..3).map(|_| scope.spawn(one)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let mut won = results.iter().filter_map(|result| result.as_ref().ok());
            let winner = won.next().expect("somebody gets it");
            assert!(won.next().is_none(), "two listen on one path");
            let others = results.iter().filter_map(|result| result.as_ref().err());
            others.for_each(|error| assert!(matches!(error, BindError::InUse { .. }), "{error}"));
            // The path leads to the one that has it.
            let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
            assert!(rustix::net::accept(winner.fd()).is_ok());
            drop(results);
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn test_bind_when_the_path_just_fits_works() {
        let directory = tempfile::tempdir().unwrap();
        let room = 107 - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("d".repeat(room - 2)).join("s");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        assert_eq!(path.as_os_str().len(), 107);
        let listener = Listener::bind(&path).unwrap();
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
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
