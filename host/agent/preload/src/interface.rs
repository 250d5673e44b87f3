//! The C interface: attachment and covered calls (`include/tlbridge.h`).

use crate::set_errno;
use agent::{Agent, AgentError, AttachOptions, covered};
use libc::{c_char, c_int, c_void, off_t, size_t};
use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Keep an error for `tlb_last_error` and answer in the C way.
pub(crate) fn failed(error: &dyn std::fmt::Display, errno: c_int) -> c_int {
    let text = error.to_string().replace('\0', " ");
    LAST_ERROR.with(|e| *e.borrow_mut() = CString::new(text).unwrap_or_default());
    set_errno(errno);
    -1
}

/// The errno that goes with an error.
pub(crate) fn errno_of(error: &AgentError) -> c_int {
    match error {
        AgentError::NotAttached => libc::ENOTCONN,
        AgentError::AlreadyAttached => libc::EISCONN,
        AgentError::Connect { source, .. }
        | AgentError::Userfaultfd { source }
        | AgentError::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        AgentError::Features { .. } => libc::ENOSYS,
        AgentError::Refused { errno, .. } => *errno,
        AgentError::Protocol { .. } => libc::EPROTO,
        AgentError::Gone(_) => libc::ECONNRESET,
        AgentError::Invalid { .. } => libc::EINVAL,
        _ => libc::EIO,
    }
}

/// Text of the calling thread's last error.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_last_error() -> *const c_char {
    LAST_ERROR.with(|e| e.borrow().as_ptr())
}

/// Attach this process.
///
/// # Safety
/// Both are null or terminated strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_attach(socket: *const c_char, name: *const c_char) -> c_int {
    if agent::current().is_some() {
        return 0;
    }
    // SAFETY: the caller's promise.
    let text = |p: *const c_char| (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_bytes().to_vec());
    let socket = match text(socket) {
        Some(bytes) => PathBuf::from(OsStr::from_bytes(&bytes)),
        None => match std::env::var_os("TLBRIDGE_SOCKET") {
            Some(s) => PathBuf::from(s),
            None => return failed(&"no socket is named and TLBRIDGE_SOCKET is not set", libc::EINVAL),
        },
    };
    let name = text(name).map_or_else(|| "program".into(), |b| String::from_utf8_lossy(&b).into_owned());
    match Agent::attach(&AttachOptions { socket, name }) {
        Ok(_) => 0,
        Err(e) => failed(&e, errno_of(&e)),
    }
}

/// End the attachment.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_detach() -> c_int {
    match agent::current()
        .ok_or(AgentError::NotAttached)
        .and_then(Agent::detach)
    {
        Ok(()) => 0,
        Err(e) => failed(&e, errno_of(&e)),
    }
}

/// 0 while attached, daemon and device alive.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_alive() -> c_int {
    match agent::current() {
        None => failed(&AgentError::NotAttached, libc::ENOTCONN),
        Some(agent) => match agent.alive() {
            Ok(()) => 0,
            Err(gone) => failed(&gone, libc::ECONNRESET),
        },
    }
}

/// The address space's generation.
#[unsafe(no_mangle)]
pub extern "C" fn tlb_generation() -> u64 {
    agent::current().map_or(0, Agent::generation)
}

/// New device-visible memory; answers its memfd.
///
/// # Safety
/// `name` is null or a terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_memory_create(len: u64, name: *const c_char) -> c_int {
    let name = if name.is_null() {
        "tlbridge".into()
    } else {
        // SAFETY: the caller's promise.
        unsafe { CStr::from_ptr(name) }.to_string_lossy()
    };
    match agent::current()
        .ok_or(AgentError::NotAttached)
        .and_then(|a| a.memory(len, &name))
    {
        Ok(memory) => std::os::fd::IntoRawFd::into_raw_fd(memory.into_fd()),
        Err(e) => failed(&e, errno_of(&e)),
    }
}

/// A pointer result, and its generation.
///
/// # Safety
/// `generation` is null or can be written to.
unsafe fn pointer(result: covered::Outcome<usize>, generation: *mut u64) -> *mut c_void {
    match result {
        Ok(c) => {
            if !generation.is_null() {
                // SAFETY: the caller's promise.
                unsafe { *generation = c.generation };
            }
            c.value as *mut c_void
        }
        Err(errno) => {
            set_errno(errno);
            libc::MAP_FAILED
        }
    }
}

/// A result without a value, and its generation.
///
/// # Safety
/// `generation` is null or can be written to.
unsafe fn status(result: covered::Outcome<()>, generation: *mut u64) -> c_int {
    match result {
        Ok(c) => {
            if !generation.is_null() {
                // SAFETY: the caller's promise.
                unsafe { *generation = c.generation };
            }
            0
        }
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// Covered mmap.
///
/// # Safety
/// As mmap; `generation` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
    generation: *mut u64,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe {
        let r = covered::mmap(addr as usize, len, prot, flags, fd, offset as u64);
        pointer(r, generation)
    }
}

/// Covered munmap.
///
/// # Safety
/// As munmap; `generation` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_munmap(addr: *mut c_void, len: size_t, generation: *mut u64) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { status(covered::munmap(addr as usize, len), generation) }
}

/// Covered mremap.
///
/// # Safety
/// As mremap; `generation` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_mremap(
    old: *mut c_void,
    old_len: size_t,
    new_len: size_t,
    flags: c_int,
    new_addr: *mut c_void,
    generation: *mut u64,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe {
        let r = covered::mremap(old as usize, old_len, new_len, flags, new_addr as usize);
        pointer(r, generation)
    }
}

/// Covered madvise.
///
/// # Safety
/// As madvise; `generation` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_madvise(
    addr: *mut c_void,
    len: size_t,
    advice: c_int,
    generation: *mut u64,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { status(covered::madvise(addr as usize, len, advice), generation) }
}

/// Covered mprotect.
///
/// # Safety
/// As mprotect; `generation` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tlb_mprotect(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    generation: *mut u64,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { status(covered::mprotect(addr as usize, len, prot), generation) }
}
