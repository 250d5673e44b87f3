//! libc's mapping calls.

use crate::set_errno;
use agent::covered;
use libc::{c_int, c_void, off_t, size_t};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A pointer result in the C way.
fn pointer(result: covered::Outcome<usize>) -> *mut c_void {
    match result {
        Ok(c) => c.value as *mut c_void,
        Err(errno) => {
            set_errno(errno);
            libc::MAP_FAILED
        }
    }
}

/// A result without a value in the C way.
fn status(result: covered::Outcome<()>) -> c_int {
    match result {
        Ok(_) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// mmap(2).
///
/// # Safety
/// As mmap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    pointer(unsafe { covered::mmap(addr as usize, len, prot, flags, fd, offset as u64) })
}

/// mmap(2), with another name.
///
/// # Safety
/// As mmap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    pointer(unsafe { covered::mmap(addr as usize, len, prot, flags, fd, offset as u64) })
}

/// munmap(2).
///
/// # Safety
/// As munmap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { covered::munmap(addr as usize, len) })
}

/// mremap(2). C declares it variadic; the fifth argument is in the same register either way, and is only used
/// with the flags that require it.
///
/// # Safety
/// As mremap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: size_t,
    new_len: size_t,
    flags: c_int,
    new_addr: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    pointer(unsafe { covered::mremap(old as usize, old_len, new_len, flags, new_addr as usize) })
}

/// madvise(2).
///
/// # Safety
/// As madvise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { covered::madvise(addr as usize, len, advice) })
}

/// posix_madvise(3): as in glibc, POSIX_MADV_DONTNEED does nothing (the kernel's would discard data).
///
/// # Safety
/// As posix_madvise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    if advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    // SAFETY: the caller's promise.
    match unsafe { covered::madvise(addr as usize, len, advice) } {
        Ok(_) => 0,
        Err(errno) => errno,
    }
}

/// mprotect(2).
///
/// # Safety
/// As mprotect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(addr: *mut c_void, len: size_t, prot: c_int) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { covered::mprotect(addr as usize, len, prot) })
}

/// pkey_mprotect(2).
///
/// # Safety
/// As pkey_mprotect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pkey_mprotect(addr: *mut c_void, len: size_t, prot: c_int, pkey: c_int) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { covered::pkey_mprotect(addr as usize, len, prot, pkey) })
}

/// shmat(2).
///
/// # Safety
/// As shmat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmat(id: c_int, addr: *const c_void, flags: c_int) -> *mut c_void {
    // SAFETY: the caller's promise.
    pointer(unsafe { covered::shmat(id, addr as usize, flags) })
}

/// shmdt(2).
///
/// # Safety
/// As shmdt.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmdt(addr: *const c_void) -> c_int {
    // SAFETY: the caller's promise.
    status(unsafe { covered::shmdt(addr as usize) })
}

unsafe extern "C" {
    /// glibc's idea of the break. Its own malloc moves the break by internal calls and relies on this.
    #[link_name = "__curbrk"]
    static CURRENT_BREAK: AtomicPtr<c_void>;
}

/// Set the break; keeps glibc's record right.
unsafe fn set_break(addr: *mut c_void) -> c_int {
    // SAFETY: the caller's promise; the record is a pointer-sized global of libc.
    unsafe {
        let now = covered::brk(addr as usize).map_or(0, |c| c.value);
        CURRENT_BREAK.store(now as *mut c_void, Ordering::Relaxed);
        if now < addr as usize {
            set_errno(libc::ENOMEM);
            return -1;
        }
    }
    0
}

/// brk(2).
///
/// # Safety
/// As brk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn brk(addr: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { set_break(addr) }
}

/// sbrk(2).
///
/// # Safety
/// As sbrk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sbrk(increment: libc::intptr_t) -> *mut c_void {
    // SAFETY: the caller's promise; a break of 0 only asks.
    unsafe {
        if CURRENT_BREAK.load(Ordering::Relaxed).is_null() {
            let now = covered::brk(0).map_or(0, |c| c.value);
            CURRENT_BREAK.store(now as *mut c_void, Ordering::Relaxed);
        }
        let old = CURRENT_BREAK.load(Ordering::Relaxed);
        if increment == 0 {
            return old;
        }
        let Some(new) = (old as usize).checked_add_signed(increment) else {
            set_errno(libc::ENOMEM);
            return libc::MAP_FAILED;
        };
        if set_break(new as *mut c_void) == 0 {
            old
        } else {
            libc::MAP_FAILED
        }
    }
}
