//! System calls that the covered path needs: by number, so that an interposed libc never sees them, without
//! malloc and without touching errno, so that they work in a signal handler.
#![allow(unsafe_code, reason = "system calls by number")]

use crate::AgentError;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;

/// Bytes of a page. x86-64 only has this size; aarch64 kernels with larger pages are refused at attach.
pub(crate) const PAGE: u64 = 4096;

/// Negated errno of a failed system call, or its result. errno itself is preserved: a covered call that
/// runs in a signal handler must not change what the interrupted code is about to read.
///
/// # Safety
/// The arguments must be what the system call takes; its effect on memory is the caller's promise.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn syscall(number: libc::c_long, args: [usize; 6]) -> Result<usize, i32> {
    // Inlined down to the instruction: a function that returns after a system call costs 50 to 170 ns on
    // processors whose return predictions the kernel takes away, and a covered call makes up to ten.
    let ret: isize;
    // SAFETY: the kernel's convention: number in rax, arguments in these registers, rcx and r11 are lost, no stack
    // is used; what the call does to memory is the caller's promise.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => ret,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // The kernel's errors are -4095 to -1.
    if (-4095..0).contains(&ret) {
        Err(-ret as i32)
    } else {
        Ok(ret as usize)
    }
}

/// As above, by libc.
///
/// # Safety
/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn syscall(number: libc::c_long, args: [usize; 6]) -> Result<usize, i32> {
    // SAFETY: __errno_location is always valid in its own thread; the call itself is the caller's promise.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let ret = libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]);
        if ret == -1 {
            let error = *errno;
            *errno = saved;
            Err(error)
        } else {
            Ok(ret as usize)
        }
    }
}

/// The thread's signal mask before [`block_signals`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct SignalMask(u64);

/// Block every signal of the calling thread, libc's internal ones too: a handler that ran between start and
/// end could make a covered call on the same range and wait for itself.
#[inline(always)]
pub(crate) fn block_signals() -> SignalMask {
    let all = u64::MAX;
    let mut old = 0u64;
    // SAFETY: both words live on this stack; 8 is the size of the kernel's signal set.
    let r = unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_SETMASK as usize,
                (&raw const all) as usize,
                (&raw mut old) as usize,
                8,
                0,
                0,
            ],
        )
    };
    assert!(r.is_ok(), "rt_sigprocmask cannot fail with valid pointers");
    SignalMask(old)
}

/// Undo [`block_signals`].
#[inline(always)]
pub(crate) fn restore_signals(mask: SignalMask) {
    let old = mask.0;
    // SAFETY: the word lives on this stack.
    let r = unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as usize, (&raw const old) as usize, 0, 8, 0, 0],
        )
    };
    assert!(r.is_ok(), "rt_sigprocmask cannot fail with valid pointers");
}

/// Sleep while `word` is `expected`, at most `timeout_ms`. Shared (not private) futex: some words are in
/// memory that the daemon maps too. Wakes, timeouts and interruptions look alike: the caller looks again.
#[inline(always)]
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, timeout_ms: u64) {
    let timeout = libc::timespec {
        tv_sec: (timeout_ms / 1000) as libc::time_t,
        tv_nsec: (timeout_ms % 1000 * 1_000_000) as libc::c_long,
    };
    // SAFETY: the word outlives the call; FUTEX_WAIT only reads it.
    let _ = unsafe {
        syscall(
            libc::SYS_futex,
            [
                word.as_ptr() as usize,
                libc::FUTEX_WAIT as usize,
                expected as usize,
                (&raw const timeout) as usize,
                0,
                0,
            ],
        )
    };
}

/// Wake up to `count` sleepers of `word`.
#[inline(always)]
pub(crate) fn futex_wake(word: &AtomicU32, count: i32) {
    // SAFETY: FUTEX_WAKE does not access the word.
    let _ = unsafe {
        syscall(
            libc::SYS_futex,
            [
                word.as_ptr() as usize,
                libc::FUTEX_WAKE as usize,
                count as usize,
                0,
                0,
                0,
            ],
        )
    };
}

/// Milliseconds of the monotonic clock (never 0).
pub(crate) fn now_ms() -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure lives on this stack. clock_gettime is async-signal-safe.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    (t.tv_sec as u64 * 1000 + t.tv_nsec as u64 / 1_000_000).max(1)
}

/// Kernel's number of the calling thread.
#[inline(always)]
pub(crate) fn gettid() -> u32 {
    // SAFETY: no arguments.
    unsafe { syscall(libc::SYS_gettid, [0; 6]) }.unwrap_or(0) as u32
}

/// Number of the calling process, by system call (libc could cache it over a raw clone).
pub(crate) fn getpid() -> u32 {
    // SAFETY: no arguments.
    unsafe { syscall(libc::SYS_getpid, [0; 6]) }.unwrap_or(0) as u32
}

/// What [`poll`] saw of one file descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    /// Something can be read (a pidfd: the process is gone).
    pub readable: bool,
    /// The other side is closed, or the descriptor is bad.
    pub hung_up: bool,
}

/// Wait until one of the descriptors (negative ones are ignored) has news, at most `timeout_ms`.
pub(crate) fn poll<const N: usize>(fds: [RawFd; N], timeout_ms: u64) -> [Ready; N] {
    let mut set = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let timeout = libc::timespec {
        tv_sec: (timeout_ms / 1000) as libc::time_t,
        tv_nsec: (timeout_ms % 1000 * 1_000_000) as libc::c_long,
    };
    // SAFETY: set and timeout live on this stack.
    let r = unsafe {
        syscall(
            libc::SYS_ppoll,
            [
                set.as_mut_ptr() as usize,
                N,
                (&raw const timeout) as usize,
                0,
                8,
                0,
            ],
        )
    };
    if r.is_err() {
        return [Ready::default(); N];
    }
    set.map(|p| Ready {
        readable: p.revents & libc::POLLIN != 0,
        hung_up: p.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0,
    })
}

/// SIGKILL by pidfd.
pub(crate) fn kill_by_pidfd(pidfd: RawFd) -> Result<(), i32> {
    // SAFETY: no memory is passed.
    unsafe {
        syscall(
            libc::SYS_pidfd_send_signal,
            [pidfd as usize, libc::SIGKILL as usize, 0, 0, 0, 0],
        )
    }
    .map(drop)
}

/// Whether a debugger is attached to a process. A process that cannot be looked at is taken as not traced.
pub(crate) fn traced(pid: u32) -> bool {
    let mut path = Text::<64>::new();
    let _ = std::fmt::Write::write_fmt(&mut path, format_args!("/proc/{pid}/status\0"));
    let mut buffer = [0u8; 1024];
    // SAFETY: the path is terminated, the buffer lives on this stack.
    let read = unsafe {
        let Ok(fd) = syscall(
            libc::SYS_openat,
            [
                libc::AT_FDCWD as usize,
                path.bytes().as_ptr() as usize,
                (libc::O_RDONLY | libc::O_CLOEXEC) as usize,
                0,
                0,
                0,
            ],
        ) else {
            return false;
        };
        let read = syscall(
            libc::SYS_read,
            [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0],
        );
        let _ = syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        read.unwrap_or(0)
    };
    tracer_in(&buffer[..read])
}

/// Whether the text of /proc/PID/status names a tracer.
fn tracer_in(status: &[u8]) -> bool {
    const KEY: &[u8] = b"TracerPid:\t";
    status
        .windows(KEY.len())
        .position(|w| w == KEY)
        .and_then(|at| status.get(at + KEY.len()))
        .is_some_and(|&digit| digit != b'0')
}

/// Text on the stack, cut when it is full: messages without malloc.
#[derive(Debug)]
pub(crate) struct Text<const N: usize> {
    buffer: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Self {
            buffer: [0; N],
            len: 0,
        }
    }
    /// What was written.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl<const N: usize> std::fmt::Write for Text<N> {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        let take = s.len().min(N - self.len);
        self.buffer[self.len..self.len + take].copy_from_slice(&s.as_bytes()[..take]);
        self.len += take;
        Ok(())
    }
}

/// A line on standard error, by write(2): from signal handlers too.
pub(crate) fn say(message: std::fmt::Arguments<'_>) {
    let mut text = Text::<384>::new();
    let _ = std::fmt::Write::write_fmt(&mut text, format_args!("tlbridge agent: {message}\n"));
    // SAFETY: the buffer lives on this stack.
    let _ = unsafe {
        syscall(
            libc::SYS_write,
            [2, text.bytes().as_ptr() as usize, text.bytes().len(), 0, 0, 0],
        )
    };
}

/// Put a placeholder (/dev/null) in the place of `fd`, atomically. The number stays taken, so a thread that
/// is about to use it meets the placeholder and never somebody else's new file.
pub(crate) fn replace_by_placeholder(fd: RawFd) {
    let path = c"/dev/null";
    // SAFETY: the path is terminated; dup3 onto a number that this library owns.
    unsafe {
        if let Ok(null) = syscall(
            libc::SYS_openat,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                (libc::O_RDONLY | libc::O_CLOEXEC) as usize,
                0,
                0,
                0,
            ],
        ) {
            let _ = syscall(
                libc::SYS_dup3,
                [null, fd as usize, libc::O_CLOEXEC as usize, 0, 0, 0],
            );
            let _ = syscall(libc::SYS_close, [null, 0, 0, 0, 0, 0]);
        } else {
            // No number left for a placeholder: giving the file up matters more (callers wait in the kernel).
            let _ = syscall(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]);
        }
    }
}

/// Close a descriptor that this library owns by number.
pub(crate) fn close(fd: RawFd) {
    if fd >= 0 {
        // SAFETY: the caller owns the number.
        let _ = unsafe { syscall(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]) };
    }
}

/// Zeroed private memory that a forked child finds zeroed again.
pub(crate) fn map_wiped_on_fork(len: usize) -> io::Result<*mut u8> {
    // SAFETY: a new anonymous mapping.
    let at = unsafe {
        syscall(
            libc::SYS_mmap,
            [
                0,
                len,
                (libc::PROT_READ | libc::PROT_WRITE) as usize,
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize,
                usize::MAX,
                0,
            ],
        )
    }
    .map_err(io::Error::from_raw_os_error)?;
    // SAFETY: the mapping made above.
    unsafe {
        syscall(
            libc::SYS_madvise,
            [at, len, libc::MADV_WIPEONFORK as usize, 0, 0, 0],
        )
    }
    .map_err(io::Error::from_raw_os_error)?;
    Ok(at as *mut u8)
}

/// Map a file shared, not inherited by children.
pub(crate) fn map_dontfork(fd: RawFd, offset: u64, len: usize, writable: bool) -> io::Result<*mut u8> {
    let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: a new mapping at an address the kernel chooses.
    let at = unsafe {
        syscall(
            libc::SYS_mmap,
            [
                0,
                len,
                prot as usize,
                libc::MAP_SHARED as usize,
                fd as usize,
                offset as usize,
            ],
        )
    }
    .map_err(io::Error::from_raw_os_error)?;
    // SAFETY: the mapping made above.
    unsafe {
        syscall(
            libc::SYS_madvise,
            [at, len, libc::MADV_DONTFORK as usize, 0, 0, 0],
        )
    }
    .map_err(io::Error::from_raw_os_error)?;
    Ok(at as *mut u8)
}

/// Take back what [`map_dontfork`] gave.
///
/// # Safety
/// Nothing may refer to the mapping.
pub(crate) unsafe fn unmap(at: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    let _ = unsafe { syscall(libc::SYS_munmap, [at as usize, len, 0, 0, 0, 0]) };
}

/// `struct uffdio_api`, include/uapi/linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}
/// `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: usize = 0xaa00;
/// `_IOWR(0xAA, 0x3f, struct uffdio_api)`.
const UFFDIO_API: usize = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: usize = 0xc020_aa00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: usize = 0x8010_aa01;

/// Feature bits of the events (include/uapi/linux/userfaultfd.h).
const FEATURE_EVENTS: u64 = 1 << 2 | 1 << 3 | 1 << 6;
/// MISSING on shmem.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Write-protection, on shmem too.
const FEATURE_WP_SHMEM: u64 = 1 | 1 << 12;

/// How a range is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RegisterMode {
    /// UFFDIO_REGISTER_MODE_WP.
    Wp,
    /// UFFDIO_REGISTER_MODE_MISSING.
    Missing,
}

/// A new userfaultfd.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    /// The descriptor.
    pub fd: OwnedFd,
    /// Whether write-protection of shmem is offered.
    pub wp: bool,
}

/// Create a userfaultfd with the features that either registration mode needs (which mode it will be is only
/// known when the daemon has answered).
///
/// # Errors
/// No permission by any of the three ways, or a kernel without the events.
pub(crate) fn userfaultfd() -> Result<Userfaultfd, AgentError> {
    for wp in [true, false] {
        let fd = open_userfaultfd().map_err(|source| AgentError::Userfaultfd { source })?;
        let features = FEATURE_EVENTS | FEATURE_MISSING_SHMEM | if wp { FEATURE_WP_SHMEM } else { 0 };
        let mut api = UffdioApi {
            api: 0xaa,
            features,
            ioctls: 0,
        };
        // SAFETY: the structure lives on this stack and is what the ioctl takes.
        let r = unsafe {
            syscall(
                libc::SYS_ioctl,
                [
                    fd.as_raw_fd() as usize,
                    UFFDIO_API,
                    (&raw mut api) as usize,
                    0,
                    0,
                    0,
                ],
            )
        };
        match r {
            Ok(_) => return Ok(Userfaultfd { fd, wp }),
            Err(libc::EINVAL) => continue,
            Err(e) => {
                return Err(AgentError::System {
                    what: "UFFDIO_API",
                    source: io::Error::from_raw_os_error(e),
                });
            }
        }
    }
    Err(AgentError::Features {
        missing: "EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, MISSING_SHMEM".into(),
    })
}

/// /dev/userfaultfd by file mode, else the system call by privilege or sysctl, else user mode only. The
/// descriptor is non-blocking: poll on a blocking userfaultfd reports an error.
fn open_userfaultfd() -> io::Result<OwnedFd> {
    const FLAGS: usize = (libc::O_CLOEXEC | libc::O_NONBLOCK) as usize;
    let path: &CStr = c"/dev/userfaultfd";
    // SAFETY: the path is terminated; a descriptor that a call returned is owned by nobody else.
    unsafe {
        if let Ok(dev) = syscall(
            libc::SYS_openat,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                (libc::O_RDWR | libc::O_CLOEXEC) as usize,
                0,
                0,
                0,
            ],
        ) {
            let fd = syscall(libc::SYS_ioctl, [dev, USERFAULTFD_IOC_NEW, FLAGS, 0, 0, 0]);
            let _ = syscall(libc::SYS_close, [dev, 0, 0, 0, 0, 0]);
            if let Ok(fd) = fd {
                return Ok(OwnedFd::from_raw_fd(fd as RawFd));
            }
        }
        const USER_MODE_ONLY: usize = 1;
        let mut last = 0;
        for flags in [FLAGS, FLAGS | USER_MODE_ONLY] {
            match syscall(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]) {
                Ok(fd) => return Ok(OwnedFd::from_raw_fd(fd as RawFd)),
                Err(e) => last = e,
            }
        }
        Err(io::Error::from_raw_os_error(last))
    }
}

/// UFFDIO_REGISTER.
pub(crate) fn uffd_register(fd: RawFd, start: u64, end: u64, mode: RegisterMode) -> Result<(), i32> {
    let mut arg = UffdioRegister {
        start,
        len: end - start,
        mode: match mode {
            RegisterMode::Missing => 1,
            RegisterMode::Wp => 2,
        },
        ioctls: 0,
    };
    // SAFETY: the structure lives on this stack and is what the ioctl takes.
    unsafe {
        syscall(
            libc::SYS_ioctl,
            [fd as usize, UFFDIO_REGISTER, (&raw mut arg) as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

/// UFFDIO_UNREGISTER.
#[inline(always)]
pub(crate) fn uffd_unregister(fd: RawFd, start: u64, end: u64) -> Result<(), i32> {
    let mut arg = UffdioRange {
        start,
        len: end - start,
    };
    // SAFETY: the structure lives on this stack and is what the ioctl takes.
    unsafe {
        syscall(
            libc::SYS_ioctl,
            [fd as usize, UFFDIO_UNREGISTER, (&raw mut arg) as usize, 0, 0, 0],
        )
    }
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_tracer_when_status_names_one_is_seen() {
        assert!(tracer_in(b"Name:\tx\nTracerPid:\t12\nUid:\t0\n"));
        assert!(!tracer_in(b"Name:\tx\nTracerPid:\t0\nUid:\t0\n"));
        assert!(!tracer_in(b""));
        assert!(!traced(std::process::id()));
    }

    #[test]
    fn test_text_when_full_is_cut() {
        let mut t = Text::<4>::new();
        let _ = std::fmt::Write::write_str(&mut t, "abcdef");
        assert_eq!(t.bytes(), b"abcd");
    }

    #[test]
    fn test_syscall_when_it_fails_leaves_errno_alone() {
        // SAFETY: errno of this thread; close of a bad descriptor.
        unsafe {
            *libc::__errno_location() = 77;
            assert_eq!(
                syscall(libc::SYS_close, [usize::MAX, 0, 0, 0, 0, 0]),
                Err(libc::EBADF)
            );
            assert_eq!(*libc::__errno_location(), 77);
        }
    }

    #[test]
    fn test_futex_wait_when_the_value_differs_returns_at_once() {
        let word = AtomicU32::new(1);
        futex_wait(&word, 2, 60_000);
    }
}
