//! The covered calls. Each takes the system call's arguments as they are and answers with its result or
//! errno; without an attachment each is the plain system call (generation 0).
//!
//! Not covered: `process_madvise`, `remap_file_pages`, calls by other processes on shared files (harmless:
//! memory is named by file and offset). The safety net sees the first two on registered memory.
#![allow(
    unsafe_code,
    reason = "mapping calls by number; their effect on memory is the caller's promise"
)]

use crate::Covered;
use crate::call::{Call, NOTHING, Suspended, bump, pages, untagged};
use crate::files;
use crate::intervals::Interval;
use crate::state;
use crate::sys::{self, PAGE, syscall};
use protos::bridge::shared::slot_event;
use std::os::fd::{AsRawFd, RawFd};

/// What a covered call answers: its result and generation, or an errno.
pub type Outcome<T> = Result<Covered<T>, i32>;

fn plain<T>(value: T) -> Covered<T> {
    Covered { value, generation: 0 }
}

/// madvise values that take pages away (include/uapi/asm-generic/mman-common.h): DONTNEED, FREE, REMOVE,
/// DONTNEED_LOCKED, GUARD_INSTALL. PAGEOUT, COLD and COLLAPSE move pages, which is harmless for memory that
/// is named by file and offset.
pub fn takes_pages_away(advice: i32) -> bool {
    matches!(advice, 4 | 8 | 9 | 24 | 102)
}

/// Purge what a call has just mapped, before it returns: the address may have had another owner whose raw
/// unmap is still waiting for its event to be read. Then register it if a device may see it.
fn announce(range: Option<Interval>, visible: bool) -> u64 {
    let Some(range) = range else { return 0 };
    let Some(call) = Call::begin([range, NOTHING], slot_event::UNMAP) else {
        return 0;
    };
    call.forget(range);
    if visible {
        call.register(range);
    }
    call.end()
}

/// mmap.
///
/// # Safety
/// As mmap: with `MAP_FIXED` the range is replaced.
///
/// # Errors
/// The system call's errno.
pub unsafe fn mmap(addr: usize, len: usize, prot: i32, flags: i32, fd: RawFd, offset: u64) -> Outcome<usize> {
    let call_it = |flags: i32, fd: RawFd, offset: u64| {
        // SAFETY: the caller's promise.
        unsafe {
            syscall(
                libc::SYS_mmap,
                [
                    addr,
                    len,
                    prot as usize,
                    flags as usize,
                    fd as isize as usize,
                    offset as usize,
                ],
            )
        }
    };
    let Some(state) = state::covering() else {
        return call_it(flags, fd, offset).map(plain);
    };
    let shared = matches!(
        flags & libc::MAP_TYPE,
        libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
    );
    let mut visible = false;
    let mut backing = None;
    if shared && flags & libc::MAP_HUGETLB == 0 && len != 0 {
        if flags & libc::MAP_ANONYMOUS != 0 {
            backing = files::back_anonymous(state, len as u64);
            visible = backing.is_some();
        } else {
            visible = files::is_visible(state, fd);
        }
    }
    let (flags, fd, offset) = match &backing {
        Some(file) => (flags & !libc::MAP_ANONYMOUS, file.as_raw_fd(), 0),
        None => (flags, fd, offset),
    };
    const FIXED_NOREPLACE: i32 = libc::MAP_FIXED_NOREPLACE & !libc::MAP_FIXED;
    let replaces = flags & libc::MAP_FIXED != 0 && flags & FIXED_NOREPLACE == 0;
    if replaces
        && let Some(range) = pages(addr as u64, len as u64)
        && let Some(call) = Call::begin([range, NOTHING], slot_event::UNMAP)
    {
        let suspended = call.suspend(range);
        let result = call_it(flags, fd, offset);
        if result.is_ok() {
            call.forget(range);
            if visible {
                call.register(range);
            }
        } else {
            call.resume(range, suspended);
        }
        let generation = call.end();
        return result.map(|value| Covered { value, generation });
    }
    let value = call_it(flags, fd, offset)?;
    let generation = announce(pages(value as u64, len as u64), visible);
    Ok(Covered { value, generation })
}

/// munmap.
///
/// # Safety
/// As munmap: nothing may refer to the range.
///
/// # Errors
/// The system call's errno.
pub unsafe fn munmap(addr: usize, len: usize) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let call_it = || unsafe { syscall(libc::SYS_munmap, [addr, len, 0, 0, 0, 0]) };
    let range = pages(addr as u64, len as u64);
    let Some((range, call)) =
        range.and_then(|range| Some((range, Call::begin([range, NOTHING], slot_event::UNMAP)?)))
    else {
        return call_it().map(|_| plain(()));
    };
    let suspended = call.suspend(range);
    let result = call_it();
    match result {
        Ok(_) => call.forget(range),
        Err(_) => call.resume(range, suspended),
    }
    let generation = call.end();
    result.map(|_| Covered {
        value: (),
        generation,
    })
}

/// madvise.
///
/// # Safety
/// As madvise: content may be discarded.
///
/// # Errors
/// The system call's errno.
pub unsafe fn madvise(addr: usize, len: usize, advice: i32) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let call_it = || unsafe { syscall(libc::SYS_madvise, [addr, len, advice as usize, 0, 0, 0]) };
    let range = takes_pages_away(advice)
        .then(|| pages(untagged(addr as u64), len as u64))
        .flatten();
    let Some((range, call)) =
        range.and_then(|range| Some((range, Call::begin([range, NOTHING], slot_event::CLEAR)?)))
    else {
        return call_it().map(|_| plain(()));
    };
    let suspended = call.suspend(range);
    let result = call_it();
    call.resume(range, suspended);
    let generation = call.end();
    result.map(|_| Covered {
        value: (),
        generation,
    })
}

/// mprotect. Raises no userfaultfd event, so nothing is unregistered.
///
/// # Safety
/// As mprotect.
///
/// # Errors
/// The system call's errno.
pub unsafe fn mprotect(addr: usize, len: usize, prot: i32) -> Outcome<()> {
    // SAFETY: the caller's promise.
    protect(addr, len, || unsafe {
        syscall(libc::SYS_mprotect, [addr, len, prot as usize, 0, 0, 0])
    })
}

/// pkey_mprotect.
///
/// # Safety
/// As pkey_mprotect.
///
/// # Errors
/// The system call's errno.
pub unsafe fn pkey_mprotect(addr: usize, len: usize, prot: i32, pkey: i32) -> Outcome<()> {
    // SAFETY: the caller's promise.
    protect(addr, len, || unsafe {
        syscall(
            libc::SYS_pkey_mprotect,
            [addr, len, prot as usize, pkey as isize as usize, 0, 0],
        )
    })
}

fn protect(addr: usize, len: usize, call_it: impl Fn() -> Result<usize, i32>) -> Outcome<()> {
    let Some(call) = pages(untagged(addr as u64), len as u64)
        .and_then(|range| Call::begin([range, NOTHING], slot_event::PROTECTION_VMA))
    else {
        return call_it().map(|_| plain(()));
    };
    let result = call_it();
    let generation = call.end();
    result.map(|_| Covered {
        value: (),
        generation,
    })
}

/// mremap. `new_addr` is used with `MREMAP_FIXED` only (and as a hint with `MREMAP_DONTUNMAP`).
///
/// # Safety
/// As mremap: nothing may refer to the old range.
///
/// # Errors
/// The system call's errno.
pub unsafe fn mremap(
    old: usize,
    old_len: usize,
    new_len: usize,
    flags: i32,
    new_addr: usize,
) -> Outcome<usize> {
    let call_it = || {
        // SAFETY: the caller's promise.
        unsafe {
            syscall(
                libc::SYS_mremap,
                [old, old_len, new_len, flags as usize, new_addr, 0],
            )
        }
    };
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let dontunmap = flags & libc::MREMAP_DONTUNMAP != 0;
    let old_range = pages(old as u64, old_len as u64);
    let Some(new_pages) = pages(0, new_len as u64).map(Interval::len) else {
        return call_it().map(plain);
    };
    // What the call takes away. A shrink never moves (without MREMAP_FIXED): its tail goes.
    let source = match old_range {
        Some(r) if !fixed && !dontunmap && new_pages < r.len() => Interval::new(r.start + new_pages, r.end),
        Some(r) => r,
        // A length of 0 makes a second mapping of shared pages; bad arguments change nothing.
        None => NOTHING,
    };
    let target = if fixed {
        pages(new_addr as u64, new_len as u64).unwrap_or(NOTHING)
    } else {
        NOTHING
    };
    let Some(call) = Call::begin([source, target], slot_event::UNMAP) else {
        return call_it().map(plain);
    };
    let first_page = Interval::new(old as u64, (old as u64).saturating_add(1));
    let visible = call.knows(first_page) || call.knows(source);
    let suspended = [call.suspend(source), call.suspend(target)];
    let result = call_it();
    let Ok(at) = result else {
        call.resume(source, suspended[0]);
        call.resume(target, suspended[1]);
        call.end();
        return result.map(plain);
    };
    let moved = at != old;
    let shrunk = source.start != old as u64 && !source.is_empty();
    if moved && dontunmap {
        // The old range stays mapped, without its page-table entries.
        call.resume(source, Suspended::Yes);
    } else if moved || shrunk {
        call.forget(source);
    } else {
        call.resume(source, suspended[0]);
    }
    if fixed {
        call.forget(target);
        if visible {
            call.register(target);
        }
        let generation = call.end();
        return Ok(Covered {
            value: at,
            generation,
        });
    }
    let mut generation = call.end();
    // The result range is only known now. Its lock is taken after the first one was given back: two moves
    // into each other's old range would wait for each other.
    let result_range = pages(at as u64, new_len as u64);
    let grown = match (result_range, old_range) {
        (Some(r), Some(o)) if !moved => (r.end > o.end).then(|| Interval::new(o.end, r.end)),
        (r, _) => r,
    };
    if !shrunk && let Some(grown) = grown {
        generation = announce(Some(grown), visible).max(generation);
    }
    Ok(Covered {
        value: at,
        generation,
    })
}

/// shmat. System V segments have no file, so a device never sees them; but the address may have had another
/// owner, and `SHM_REMAP` replaces mappings.
///
/// # Safety
/// As shmat.
///
/// # Errors
/// The system call's errno.
pub unsafe fn shmat(id: i32, addr: usize, flags: i32) -> Outcome<usize> {
    // SAFETY: the caller's promise.
    let call_it = || unsafe { syscall(libc::SYS_shmat, [id as usize, addr, flags as usize, 0, 0, 0]) };
    let Some(state) = state::covering() else {
        return call_it().map(plain);
    };
    let len = segment_len(id);
    let at = if flags & libc::SHM_RND != 0 {
        addr as u64 & !(PAGE - 1)
    } else {
        addr as u64
    };
    let covered = (flags & libc::SHM_REMAP != 0 && at != 0)
        .then(|| pages(at, len))
        .flatten()
        .and_then(|range| Some((range, Call::begin([range, NOTHING], slot_event::UNMAP)?)));
    let (value, generation) = if let Some((range, call)) = covered {
        let suspended = call.suspend(range);
        let result = call_it();
        match result {
            Ok(_) => call.forget(range),
            Err(_) => call.resume(range, suspended),
        }
        let generation = call.end();
        (result?, generation)
    } else {
        let value = call_it()?;
        (value, announce(pages(value as u64, len), false))
    };
    with_segments(state, |entries| {
        if let Some(free) = entries.iter_mut().find(|e| e.1 == 0) {
            *free = (value as u64, len);
        }
    });
    Ok(Covered { value, generation })
}

/// shmdt. A segment that this library did not see attached (or could not remember) is not told to anybody:
/// no translation of it can exist, because it has no file.
///
/// # Safety
/// As shmdt: nothing may refer to the segment.
///
/// # Errors
/// The system call's errno.
pub unsafe fn shmdt(addr: usize) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let call_it = || unsafe { syscall(libc::SYS_shmdt, [addr, 0, 0, 0, 0, 0]) };
    let mut len = 0;
    if let Some(state) = state::covering() {
        with_segments(state, |entries| {
            if let Some(e) = entries.iter_mut().find(|e| e.0 == addr as u64 && e.1 != 0) {
                len = std::mem::take(&mut e.1);
            }
        });
    }
    let covered = pages(addr as u64, len)
        .and_then(|range| Some((range, Call::begin([range, NOTHING], slot_event::UNMAP)?)));
    let Some((range, call)) = covered else {
        return call_it().map(|_| plain(()));
    };
    let suspended = call.suspend(range);
    let result = call_it();
    match result {
        Ok(_) => call.forget(range),
        Err(_) => call.resume(range, suspended),
    }
    let generation = call.end();
    result.map(|_| Covered {
        value: (),
        generation,
    })
}

fn with_segments(state: &state::State, f: impl FnOnce(&mut [(u64, u64)])) {
    let mask = sys::block_signals();
    f(&mut state.segments.lock().entries);
    sys::restore_signals(mask);
}

/// Bytes of a System V segment; 0 if it cannot be asked for.
fn segment_len(id: i32) -> u64 {
    // SAFETY: shmid_ds is plain data.
    let mut info: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives on this stack; IPC_STAT fills it.
    let r = unsafe {
        syscall(
            libc::SYS_shmctl,
            [
                id as usize,
                libc::IPC_STAT as usize,
                (&raw mut info) as usize,
                0,
                0,
                0,
            ],
        )
    };
    if r.is_ok() { info.shm_segsz as u64 } else { 0 }
}

/// brk, as the system call: the value is the break after it (which is the old one when it was refused).
///
/// # Safety
/// As brk: nothing may refer to what is cut off.
///
/// # Errors
/// None; the type is that of the other calls.
pub unsafe fn brk(addr: usize) -> Outcome<usize> {
    // SAFETY: the caller's promise; a break of 0 only asks.
    let set = |addr: usize| unsafe { syscall(libc::SYS_brk, [addr, 0, 0, 0, 0, 0]) };
    if state::covering().is_none() || addr == 0 {
        return set(addr).map(plain);
    }
    let page_up = |a: usize| (a as u64).next_multiple_of(PAGE);
    let before = set(0)?;
    let cut = (addr < before).then(|| Interval::new(page_up(addr), page_up(before)));
    if let Some(range) = cut.filter(|r| !r.is_empty())
        && let Some(call) = Call::begin([range, NOTHING], slot_event::UNMAP)
    {
        let suspended = call.suspend(range);
        let result = set(addr);
        match result {
            Ok(now) if now == addr => call.forget(range),
            _ => call.resume(range, suspended),
        }
        let generation = call.end();
        return result.map(|value| Covered { value, generation });
    }
    let value = set(addr)?;
    let grown = Interval::new(page_up(before), page_up(value));
    let generation = announce((!grown.is_empty()).then_some(grown), false);
    Ok(Covered { value, generation })
}

/// Register a range that was mapped by plain calls.
///
/// # Errors
/// The kernel's errno; ENOTCONN without an attachment.
pub(crate) fn register(addr: u64, len: u64) -> Result<(), i32> {
    let range = pages(addr, len).ok_or(libc::EINVAL)?;
    let call = Call::begin([range, NOTHING], slot_event::UNMAP).ok_or(libc::ENOTCONN)?;
    let result = state::state()
        .ok_or(libc::ENOTCONN)
        .and_then(|s| crate::call::register(s, range));
    call.end();
    result
}

/// Take a range out of the safety net.
///
/// # Errors
/// The kernel's errno; ENOTCONN without an attachment.
pub(crate) fn unregister(addr: u64, len: u64) -> Result<(), i32> {
    let range = pages(addr, len).ok_or(libc::EINVAL)?;
    let call = Call::begin([range, NOTHING], slot_event::UNMAP).ok_or(libc::ENOTCONN)?;
    let state = state::state();
    let uffd = state.map_or(-1, |s| s.uffd.load(std::sync::atomic::Ordering::Relaxed));
    let result = sys::uffd_unregister(uffd, range.start, range.end);
    if result.is_ok() {
        call.forget(range);
    } else if let Some(state) = state {
        bump(&state.counters.unregister_failed);
    }
    call.end();
    result
}
