//! The plain system calls: not covered, never interposed. For comparisons, for tests of the safety net,
//! and for memory that no device may see.
#![allow(unsafe_code, reason = "mapping calls by number")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Result of a system call by number. Arguments are passed as whole words: an int that travels on the stack of
/// a variadic call leaves the upper half of its word undefined.
fn check(ret: libc::c_long) -> io::Result<usize> {
    if ret == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret as usize)
    }
}

/// mmap.
///
/// # Safety
/// As mmap: with `MAP_FIXED` the range is replaced.
///
/// # Errors
/// Those of the system call.
pub unsafe fn mmap(
    addr: usize,
    len: usize,
    prot: i32,
    flags: i32,
    fd: Option<BorrowedFd<'_>>,
    offset: u64,
) -> io::Result<usize> {
    let fd = fd.map_or(-1, |f| f.as_raw_fd());
    // SAFETY: the caller's promise.
    check(unsafe {
        libc::syscall(
            libc::SYS_mmap,
            addr,
            len,
            prot as usize,
            flags as usize,
            fd as isize,
            offset,
        )
    })
}

/// munmap.
///
/// # Safety
/// As munmap: nothing may refer to the range.
///
/// # Errors
/// Those of the system call.
pub unsafe fn munmap(addr: usize, len: usize) -> io::Result<()> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_munmap, addr, len) }).map(drop)
}

/// mremap.
///
/// # Safety
/// As mremap: nothing may refer to the old range.
///
/// # Errors
/// Those of the system call.
pub unsafe fn mremap(
    old: usize,
    old_len: usize,
    new_len: usize,
    flags: i32,
    new_addr: usize,
) -> io::Result<usize> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_mremap, old, old_len, new_len, flags as usize, new_addr) })
}

/// madvise.
///
/// # Safety
/// As madvise: content may be discarded.
///
/// # Errors
/// Those of the system call.
pub unsafe fn madvise(addr: usize, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice as usize) }).map(drop)
}

/// mprotect.
///
/// # Safety
/// As mprotect.
///
/// # Errors
/// Those of the system call.
pub unsafe fn mprotect(addr: usize, len: usize, prot: i32) -> io::Result<()> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot as usize) }).map(drop)
}
