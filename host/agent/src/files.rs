//! Which files a device may see: memfds and tmpfs files that the daemon has been told of.
//!
//! Runs on the way into mmap, so in signal handlers too: no malloc (requests are formatted by hand), and the
//! control socket's lock is held with signals blocked.
#![allow(unsafe_code, reason = "fstat, fstatfs and fcntl by number")]

use crate::MemoryId;
use crate::call::bump;
use crate::control::{self, ExchangeError};
use crate::state::{KnownFile, State};
use crate::sys::{self, PAGE, Text, syscall};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// TMPFS_MAGIC, include/uapi/linux/magic.h: memfds and /dev/shm.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Shared anonymous mappings up to this size have their pages allocated at once in missing mode; programs map
/// larger ones to use little of them.
const ALLOCATE_MAX: u64 = 64 << 20;

/// Whether mappings of `fd` are device-visible. A tmpfs file or memfd that has not been seen yet (or that has
/// grown) is announced to the daemon first. Files opened without write access are not: the safety net cannot
/// watch their mappings, and the daemon cannot map them for a device.
pub(crate) fn is_visible(state: &State, fd: RawFd) -> bool {
    let Some(stat) = fstat(fd) else { return false };
    let len = (stat.st_size as u64).next_multiple_of(PAGE);
    if len == 0 {
        return false;
    }
    let (dev, ino) = (stat.st_dev, stat.st_ino);
    let mask = sys::block_signals();
    let (known, room) = {
        let files = state.files.lock();
        (files.find(dev, ino), files.has_room())
    };
    sys::restore_signals(mask);
    match known {
        Some(file) if file.len == 0 => return false,
        Some(file) if file.len >= len => return true,
        None if !room || !is_tmpfs(fd) || !is_writable(fd) => return false,
        _ => {}
    }
    add(state, fd, dev, ino, len).is_ok()
}

/// A sealed memfd of `len` bytes for a shared anonymous mapping: without a file the daemon could not hand
/// its pages to a device. `None`: make the anonymous mapping as it is, not device-visible.
pub(crate) fn back_anonymous(state: &State, len: u64) -> Option<OwnedFd> {
    let mask = sys::block_signals();
    let room = state.files.lock().has_room();
    sys::restore_signals(mask);
    if !room {
        return None;
    }
    let len = len.checked_next_multiple_of(PAGE)?;
    let fd = sealed_memfd(c"tlbridge-shared", len).ok()?;
    if state.register_mode() == sys::RegisterMode::Missing && len <= ALLOCATE_MAX {
        // A page that is not allocated when it is touched would be a fault for the daemon. If this fails, the
        // daemon serves those.
        // SAFETY: no memory is passed.
        let _ = unsafe {
            syscall(
                libc::SYS_fallocate,
                [fd.as_raw_fd() as usize, 0, 0, len as usize, 0, 0],
            )
        };
    }
    let stat = fstat(fd.as_raw_fd())?;
    add(state, fd.as_raw_fd(), stat.st_dev, stat.st_ino, len)
        .is_ok()
        .then_some(fd)
}

/// A memfd of `len` bytes that nobody can shrink or grow: a truncated file would take pages away without any
/// call in this process.
pub(crate) fn sealed_memfd(name: &std::ffi::CStr, len: u64) -> Result<OwnedFd, i32> {
    const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: the name is terminated; the descriptor that comes back is owned by nobody else.
    unsafe {
        let fd = syscall(
            libc::SYS_memfd_create,
            [
                name.as_ptr() as usize,
                (libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as usize,
                0,
                0,
                0,
                0,
            ],
        )?;
        let fd = OwnedFd::from_raw_fd(fd as RawFd);
        let raw = fd.as_raw_fd() as usize;
        syscall(libc::SYS_ftruncate, [raw, len as usize, 0, 0, 0, 0])?;
        syscall(
            libc::SYS_fcntl,
            [raw, libc::F_ADD_SEALS as usize, SEALS as usize, 0, 0, 0],
        )?;
        Ok(fd)
    }
}

/// Announce a file and remember the answer.
pub(crate) fn announce(state: &State, fd: RawFd, len: u64) -> Result<MemoryId, ExchangeError> {
    let Some(stat) = fstat(fd) else {
        return Err(ExchangeError::System(libc::EBADF));
    };
    add(state, fd, stat.st_dev, stat.st_ino, len)
}

fn add(state: &State, fd: RawFd, dev: u64, ino: u64, len: u64) -> Result<MemoryId, ExchangeError> {
    let mut request = Text::<96>::new();
    let _ = std::fmt::Write::write_fmt(
        &mut request,
        format_args!("{{\"request\":\"add_memory\",\"len\":{len}}}"),
    );
    let mask = sys::block_signals();
    let answer = {
        let mut packet = state.packet.lock();
        control::exchange(state, &mut packet, request.bytes(), &[fd])
            .and_then(|received| parse_memory(received.bytes(&packet)))
    };
    match answer {
        Ok(_) => {
            state.files.lock().set(KnownFile { dev, ino, len });
        }
        Err(ExchangeError::Refused(_)) => {
            bump(&state.counters.files_refused);
            let mut files = state.files.lock();
            // A refused growth keeps what was granted.
            if files.find(dev, ino).is_none() {
                files.set(KnownFile { dev, ino, len: 0 });
            }
        }
        Err(_) => {}
    }
    sys::restore_signals(mask);
    answer
}

/// The session is over: another one will have to be told again.
pub(crate) fn forget_all(state: &State) {
    state.files.lock().clear();
}

/// `Reply::Memory` or `Reply::Error` without malloc.
fn parse_memory(reply: &[u8]) -> Result<MemoryId, ExchangeError> {
    if contains(reply, b"\"reply\":\"memory\"") {
        let memory = number_after(reply, b"\"memory\":").and_then(|n| u32::try_from(n).ok());
        if let (Some(memory), Some(iova)) = (memory, number_after(reply, b"\"iova\":")) {
            return Ok(MemoryId { memory, iova });
        }
    } else if contains(reply, b"\"reply\":\"error\"") {
        let errno = number_after(reply, b"\"errno\":").and_then(|n| i32::try_from(n).ok());
        return Err(ExchangeError::Refused(errno.unwrap_or(libc::EPROTO)));
    }
    Err(ExchangeError::Protocol)
}

fn contains(text: &[u8], what: &[u8]) -> bool {
    text.windows(what.len()).any(|w| w == what)
}

/// The decimal number behind the first `key`.
fn number_after(text: &[u8], key: &[u8]) -> Option<u64> {
    let at = text.windows(key.len()).position(|w| w == key)? + key.len();
    let digits = text[at..].iter().take_while(|b| b.is_ascii_digit());
    let mut value = None;
    for d in digits {
        value = Some(
            value
                .unwrap_or(0u64)
                .checked_mul(10)?
                .checked_add(u64::from(d - b'0'))?,
        );
    }
    value
}

fn fstat(fd: RawFd) -> Option<libc::stat> {
    // SAFETY: stat is plain data, filled by the call; it lives on this stack.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        syscall(
            libc::SYS_fstat,
            [fd as usize, (&raw mut stat) as usize, 0, 0, 0, 0],
        )
        .ok()?;
        Some(stat)
    }
}

fn is_tmpfs(fd: RawFd) -> bool {
    // SAFETY: statfs is plain data, filled by the call; it lives on this stack.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        syscall(
            libc::SYS_fstatfs,
            [fd as usize, (&raw mut stat) as usize, 0, 0, 0, 0],
        )
        .is_ok()
            && stat.f_type as i64 == TMPFS_MAGIC
    }
}

fn is_writable(fd: RawFd) -> bool {
    // SAFETY: no memory is passed.
    let flags = unsafe { syscall(libc::SYS_fcntl, [fd as usize, libc::F_GETFL as usize, 0, 0, 0, 0]) };
    flags.is_ok_and(|f| f as i32 & libc::O_ACCMODE == libc::O_RDWR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protos::bridge::control::{Reply, Request};

    #[test]
    fn test_add_memory_text_when_parsed_is_the_request() {
        let text = r#"{"request":"add_memory","len":8192}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::AddMemory { len: 8192 });
    }

    #[test]
    fn test_memory_reply_when_serialised_by_the_daemon_is_understood() {
        let reply = serde_json::to_vec(&Reply::Memory {
            memory: 7,
            iova: 1 << 40,
        })
        .unwrap();
        let id = parse_memory(&reply).unwrap();
        assert_eq!((id.memory, id.iova), (7, 1 << 40));
        let reply = serde_json::to_vec(&Reply::Error {
            errno: 28,
            message: "no room".into(),
        })
        .unwrap();
        assert!(matches!(parse_memory(&reply), Err(ExchangeError::Refused(28))));
        assert!(matches!(parse_memory(b"{}"), Err(ExchangeError::Protocol)));
        assert!(matches!(
            parse_memory(br#"{"reply":"memory","memory":99999999999,"iova":1}"#),
            Err(ExchangeError::Protocol)
        ));
    }

    #[test]
    fn test_sealed_memfd_when_truncated_refuses() {
        let fd = sealed_memfd(c"test", 8192).unwrap();
        let file = std::fs::File::from(fd);
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(16384).is_err());
        assert!(is_tmpfs(file.as_raw_fd()) && is_writable(file.as_raw_fd()));
    }
}
