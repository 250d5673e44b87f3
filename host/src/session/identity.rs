//! Who is at the other end, and whether the descriptors it sent are what it says they are.
// Reason: SO_PEERPIDFD has no wrapper in rustix.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// `PROC_SUPER_MAGIC`, `include/uapi/linux/magic.h`.
const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// A process at the other end of a socket.
#[derive(Debug)]
pub struct Identity {
    /// Its pid, in the daemon's pid namespace.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Readable when the process is gone.
    pub pidfd: OwnedFd,
}

impl Identity {
    /// Asks the kernel who connected.
    ///
    /// # Errors
    /// ESRCH when the process is gone already.
    pub fn of_socket(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let cred = rustix::net::sockopt::socket_peercred(socket)?;
        let pidfd = match peer_pidfd(socket) {
            Ok(fd) => fd,
            // Before Linux 6.5. The pid may have been used again since the connect; the hang-up of the
            // socket still ends such a session.
            Err(_) => pidfd_open(cred.pid, PidfdFlags::empty())?,
        };
        Ok(Self {
            pid: cred.pid.as_raw_pid().unsigned_abs(),
            uid: cred.uid.as_raw(),
            pidfd,
        })
    }

    /// Whether this process may act on things of `uid`.
    #[must_use]
    pub fn may_act_for(&self, uid: u32) -> bool {
        self.uid == 0 || self.uid == uid
    }
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are valid for the call and `len` says how much the first may hold.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if rc != 0 || fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pidfd of this process, to hand to agents.
///
/// # Errors
/// The file limit.
pub fn own_pidfd() -> io::Result<OwnedFd> {
    Ok(pidfd_open(
        Pid::from_raw(std::process::id() as i32).expect("a pid is not 0"),
        PidfdFlags::empty(),
    )?)
}

/// Whether the process behind a pidfd is gone.
#[must_use]
pub fn is_gone(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
}

fn link_of(fd: BorrowedFd<'_>) -> io::Result<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Checks that `fd` is an initialised userfaultfd, and makes it non-blocking: only then does it poll.
///
/// # Errors
/// What it is instead.
pub fn check_userfaultfd(fd: BorrowedFd<'_>) -> Result<(), String> {
    let link = link_of(fd).map_err(|e| format!("the first descriptor cannot be looked at: {e}"))?;
    if link != "anon_inode:[userfaultfd]" {
        return Err(format!(
            "the first descriptor must be a userfaultfd, it is {link}"
        ));
    }
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| format!("userfaultfd flags: {e}"))?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(|e| format!("userfaultfd flags: {e}"))?;
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).map_err(|e| format!("userfaultfd poll: {e}"))?;
    if fds[0].revents().contains(PollFlags::ERR) {
        return Err("the userfaultfd has not been initialised; call UFFDIO_API before attaching".into());
    }
    Ok(())
}

/// Checks that `fd` is a process' maps file.
///
/// # Errors
/// What it is instead.
pub fn check_maps(fd: BorrowedFd<'_>) -> Result<(), String> {
    let link = link_of(fd).map_err(|e| format!("the second descriptor cannot be looked at: {e}"))?;
    let kind = rustix::fs::fstatfs(fd).map_err(|e| format!("fstatfs of the second descriptor: {e}"))?;
    if kind.f_type as i64 != PROC_SUPER_MAGIC || !link.ends_with("/maps") {
        return Err(format!(
            "the second descriptor must be /proc/self/maps, it is {link}"
        ));
    }
    Ok(())
}

/// A file that a device may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device number, as `st_dev`.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// Checks that the device may be given `[0, len)` of the file, and that nobody can take it away by truncation.
///
/// # Errors
/// (errno, what is wrong and the way out).
pub fn check_memory(fd: BorrowedFd<'_>, len: u64) -> Result<FileId, (i32, String)> {
    let stat = rustix::fs::fstat(fd).map_err(|e| (e.raw_os_error(), format!("fstat of the memory: {e}")))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err((
            libc::EINVAL,
            "device memory must be a memfd; this descriptor is not a file".into(),
        ));
    }
    if len == 0 || !len.is_multiple_of(4096) || len > i64::MAX as u64 || (stat.st_size as u64) < len {
        return Err((
            libc::EINVAL,
            format!(
                "len {len} must be a multiple of 4096, not 0, and within the file's {} bytes",
                stat.st_size
            ),
        ));
    }
    let mode =
        rustix::fs::fcntl_getfl(fd).map_err(|e| (e.raw_os_error(), format!("flags of the memory: {e}")))?;
    if mode & OFlags::ACCMODE != OFlags::RDWR {
        return Err((
            libc::EACCES,
            "the memory must be open for reading and writing".into(),
        ));
    }
    // Without the seal a truncation would take pages away under the device's running copy.
    let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|s| s.contains(SealFlags::SHRINK))
        || rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK).is_ok();
    if !sealed {
        return Err((
            libc::EINVAL,
            "the memory can be truncated and cannot be sealed; use a memfd with MFD_ALLOW_SEALING and F_SEAL_SHRINK"
                .into(),
        ));
    }
    Ok(FileId {
        dev: stat.st_dev,
        ino: stat.st_ino,
    })
}

/// A duplicate of a descriptor.
///
/// # Errors
/// The file limit.
pub fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    fn memfd(len: u64, flags: MemfdFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | flags).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn test_memory_when_it_can_be_sealed_is_sealed_and_accepted() {
        let fd = memfd(8192, MemfdFlags::ALLOW_SEALING);
        let id = check_memory(fd.as_fd(), 8192).unwrap();
        assert_eq!(check_memory(fd.as_fd(), 4096).unwrap(), id);
        assert!(
            rustix::fs::ftruncate(&fd, 0).is_err(),
            "truncation is sealed away"
        );
    }

    #[test]
    fn test_memory_when_unfit_is_refused_with_the_way_out() {
        let fd = memfd(8192, MemfdFlags::empty());
        assert!(
            check_memory(fd.as_fd(), 8192)
                .unwrap_err()
                .1
                .contains("F_SEAL_SHRINK")
        );
        let fd = memfd(8192, MemfdFlags::ALLOW_SEALING);
        for len in [0, 1, 4097, 12288, u64::MAX, 1 << 63] {
            assert_eq!(
                check_memory(fd.as_fd(), len).unwrap_err().0,
                libc::EINVAL,
                "{len}"
            );
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(check_memory(null.as_fd(), 4096).is_err());
        let read_only = rustix::fs::open(
            format!("/proc/self/fd/{}", fd.as_raw_fd()),
            OFlags::RDONLY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        assert_eq!(check_memory(read_only.as_fd(), 4096).unwrap_err().0, libc::EACCES);
    }

    #[test]
    fn test_descriptors_when_swapped_are_refused() {
        let maps = std::fs::File::open("/proc/self/maps").unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        check_maps(maps.as_fd()).unwrap();
        assert!(check_maps(null.as_fd()).is_err());
        assert!(
            check_userfaultfd(maps.as_fd())
                .unwrap_err()
                .contains("userfaultfd")
        );
    }

    #[test]
    fn test_identity_when_socket_is_ours_is_this_process() {
        let (a, _b) = crate::session::packet::pair().unwrap();
        let identity = Identity::of_socket(a.as_fd()).unwrap();
        assert_eq!(identity.pid, std::process::id());
        assert!(identity.may_act_for(identity.uid));
        assert!(!is_gone(identity.pidfd.as_fd()));
        assert!(!is_gone(own_pidfd().unwrap().as_fd()));
    }
}
