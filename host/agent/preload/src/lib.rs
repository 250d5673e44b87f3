//! The agent as a C library (`include/tlbridge.h`) and for LD_PRELOAD.
//!
//! Loaded into a program, it interposes libc's mapping calls. With `TLBRIDGE_SOCKET` in the environment it
//! attaches before main; else (and when that fails) every call is the plain system call. `TLBRIDGE_REQUIRED=1`
//! ends the program with status 111 when it cannot attach; `TLBRIDGE_HEAP=1` puts malloc on device-visible
//! memory; `TLBRIDGE_HEAP_BYTES` is the size of that arena (1 GiB).
//!
//! Interposed: mmap, mmap64, munmap, mremap, madvise, posix_madvise, mprotect, pkey_mprotect, brk, sbrk, shmat, shmdt, and
//! malloc and its family (which go to glibc's own unless the heap is on).
//!
//! Not covered: calls that libc makes internally (thread stacks, its own heap: private memory, which no device
//! sees), raw system calls and static programs (the safety net sees them), musl.
#![allow(unsafe_code, reason = "a C interface and libc's symbols")]

mod calls;
mod constructor;
mod gru;
mod heap;
mod interface;
mod malloc;

/// Set errno.
fn set_errno(errno: i32) {
    // SAFETY: always valid in its own thread.
    unsafe { *libc::__errno_location() = errno };
}
