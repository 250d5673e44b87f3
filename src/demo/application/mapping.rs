//! The arena's system calls, through the agent and plain, and the alias mapping.
#![allow(unsafe_code, reason = "mmap and its relatives, fork")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU64;

use agent::{Agent, Memory};

use super::calls::{Calls, Path};
use super::slots::Prot;

/// Maps memory for the CPU: never changed, and no instruction is ever given an address in it.
///
/// # Errors
/// The system call's.
pub fn alias(memory: &Memory) -> io::Result<&'static [AtomicU64]> {
    let len = memory.len() as usize;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { agent::raw::mmap(0, len, prot, libc::MAP_SHARED, Some(memory.fd()), 0)? };
    // SAFETY: the mapping is `len` bytes of readable and writable memory, page aligned, whose file is sealed
    // against shrinking; it is never unmapped. The device writes to the same pages, which is what atomics are
    // for; every bit pattern is a valid u64.
    Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU64, len / 8) })
}

/// Finds `len` free bytes of address space far below where the kernel puts anything by itself, so that
/// unmapped slots stay empty.
///
/// # Errors
/// Every candidate is taken.
pub fn arena(len: u64, seed: u64) -> io::Result<u64> {
    const LOWEST: u64 = 0x1000_0000_0000;
    for attempt in 0..64 {
        // 64 GiB steps, aligned to the largest slot and to the largest translation.
        let base = LOWEST + ((seed.wrapping_add(attempt) % 256) << 36);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        let probe = unsafe { agent::raw::mmap(base as usize, len as usize, libc::PROT_NONE, flags, None, 0) };
        match probe {
            Ok(address) => {
                // SAFETY: mapped a moment ago, and nothing refers to it.
                unsafe { agent::raw::munmap(address, len as usize)? };
                if address as u64 == base {
                    return Ok(base);
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other(format!(
        "no free range of {len} bytes above {LOWEST:#x}"
    )))
}

/// Makes the calls.
#[derive(Debug)]
pub struct Mapper<'a> {
    agent: &'static Agent,
    memory: &'a Memory,
}

impl<'a> Mapper<'a> {
    /// On the slots of an arena, over `memory`.
    pub fn new(agent: &'static Agent, memory: &'a Memory) -> Self {
        Self { agent, memory }
    }

    /// What a raw call returns: the safety net raises the generation at least once while the call waits.
    fn raw_generation(&self) -> u64 {
        self.agent.generation() + 1
    }

    fn fd(&self) -> Option<BorrowedFd<'a>> {
        Some(self.memory.fd())
    }

    fn advise(&self, path: Path, va: u64, len: u64, advice: i32) -> io::Result<u64> {
        let (va, len) = (va as usize, len as usize);
        match path {
            // SAFETY: a slot of the arena; no Rust reference points into it.
            Path::Agent => unsafe { self.agent.madvise(va, len, advice) }.map(|c| c.generation),
            Path::Raw => {
                let generation = self.raw_generation();
                // SAFETY: as above.
                unsafe { agent::raw::madvise(va, len, advice) }?;
                Ok(generation)
            }
        }
    }
}

fn bits(prot: Prot) -> i32 {
    match prot {
        Prot::None => libc::PROT_NONE,
        Prot::Read => libc::PROT_READ,
        Prot::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    }
}

impl Calls for Mapper<'_> {
    fn map_over(&self, path: Path, va: u64, len: u64, offset: u64, prot: Prot) -> io::Result<u64> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let (va, len, prot) = (va as usize, len as usize, bits(prot));
        match path {
            Path::Agent => {
                // SAFETY: a slot of the arena, which holds nothing but this program's test memory; no Rust
                // reference points into it.
                unsafe { self.agent.mmap(va, len, prot, flags, self.fd(), offset) }.map(|c| c.generation)
            }
            Path::Raw => {
                let generation = self.raw_generation();
                // SAFETY: as above.
                unsafe { agent::raw::mmap(va, len, prot, flags, self.fd(), offset)? };
                // The new mapping is not registered with userfaultfd: without this the next raw call on it
                // would go unseen.
                self.agent.register(va, len)?;
                Ok(generation)
            }
        }
    }

    fn unmap(&self, path: Path, va: u64, len: u64) -> io::Result<u64> {
        let (va, len) = (va as usize, len as usize);
        match path {
            // SAFETY: a slot of the arena; no Rust reference points into it.
            Path::Agent => unsafe { self.agent.munmap(va, len) }.map(|c| c.generation),
            Path::Raw => {
                let generation = self.raw_generation();
                // SAFETY: as above.
                unsafe { agent::raw::munmap(va, len)? };
                Ok(generation)
            }
        }
    }

    fn relocate(&self, path: Path, from: u64, to: u64, len: u64) -> io::Result<u64> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (from, to, len) = (from as usize, to as usize, len as usize);
        match path {
            // SAFETY: two slots of the arena; no Rust reference points into them.
            Path::Agent => unsafe { self.agent.mremap(from, len, len, flags, to) }.map(|c| c.generation),
            Path::Raw => {
                let generation = self.raw_generation();
                // SAFETY: as above.
                unsafe { agent::raw::mremap(from, len, len, flags, to)? };
                self.agent.register(to, len)?;
                Ok(generation)
            }
        }
    }

    fn discard(&self, path: Path, va: u64, len: u64) -> io::Result<u64> {
        self.advise(path, va, len, libc::MADV_DONTNEED)
    }

    fn remove(&self, path: Path, va: u64, len: u64) -> io::Result<u64> {
        self.advise(path, va, len, libc::MADV_REMOVE)
    }

    fn protect(&self, va: u64, len: u64, prot: Prot) -> io::Result<u64> {
        // SAFETY: a slot of the arena; no Rust reference points into it.
        unsafe { self.agent.mprotect(va as usize, len as usize, bits(prot)) }.map(|c| c.generation)
    }

    fn fork(&self) -> io::Result<()> {
        // SAFETY: the child calls nothing but _exit, which is async-signal-safe.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: no clean-up is wanted in the child.
            0 => unsafe { libc::_exit(0) },
            child => {
                let pid = rustix::process::Pid::from_raw(child);
                rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())?;
                Ok(())
            }
        }
    }
}
