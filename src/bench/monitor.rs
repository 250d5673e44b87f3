//! A userfaultfd monitor that reads events and does nothing with them: what the kernel's own part of the
//! safety net costs.
#![allow(unsafe_code, reason = "userfaultfd has no wrapper in rustix")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use protos::bridge::control::UffdMode;
use rustix::event::{PollFd, PollFlags};

use crate::stop::Stop;

// include/uapi/linux/userfaultfd.h
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// The monitor and its thread.
#[derive(Debug)]
pub struct Monitor {
    uffd: Arc<OwnedFd>,
    mode: UffdMode,
    stop: Stop,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Monitor {
    /// Starts one.
    ///
    /// # Errors
    /// The kernel's: without privilege userfaultfd needs `vm.unprivileged_userfaultfd` or
    /// UFFD_USER_MODE_ONLY, which is tried.
    pub fn start(mode: UffdMode) -> anyhow::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: userfaultfd takes flags only.
        let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd == -1 {
            // SAFETY: as above.
            fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY) };
        }
        if fd == -1 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        let uffd = Arc::new(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = Api {
            api: UFFD_API,
            features: FEATURE_EVENT_REMAP
                | FEATURE_EVENT_REMOVE
                | FEATURE_EVENT_UNMAP
                | FEATURE_WP_HUGETLBFS_SHMEM,
            ioctls: 0,
        };
        ioctl(&uffd, UFFDIO_API, &mut api)?;
        let stop = Stop::new()?;
        let thread = {
            let (uffd, stop) = (Arc::clone(&uffd), stop.clone());
            std::thread::Builder::new()
                .name("monitor".into())
                .spawn(move || watch(&uffd, &stop))?
        };
        Ok(Self {
            uffd,
            mode,
            stop,
            thread: Some(thread),
        })
    }

    /// Registers a range.
    ///
    /// # Errors
    /// The kernel's.
    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let mut register = Register {
            start: start as u64,
            len: len as u64,
            mode: match self.mode {
                UffdMode::Missing => REGISTER_MODE_MISSING,
                UffdMode::Wp => REGISTER_MODE_WP,
            },
            ioctls: 0,
        };
        ioctl(&self.uffd, UFFDIO_REGISTER, &mut register)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.request();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed already.
            let _ = thread.join();
        }
    }
}

fn ioctl<T>(fd: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request of this module is given its structure, valid for reading and writing.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn watch(uffd: &OwnedFd, stop: &Stop) {
    let mut event = [0u8; 32];
    while !stop.requested() {
        let mut fds = [PollFd::new(uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, None);
        while rustix::io::read(uffd, &mut event).is_ok_and(|n| n > 0) {}
    }
}
