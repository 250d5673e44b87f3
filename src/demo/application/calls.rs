//! The calls that change mappings, in the two ways an application can make them.

use std::io;

use super::slots::Prot;

/// Which way a call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Path {
    /// Through the agent: the exact path.
    Agent,
    /// The plain system call: only the safety net sees it.
    Raw,
}

impl Path {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Raw => "raw",
        }
    }
}

/// Kinds of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// munmap.
    Unmap,
    /// mmap with MAP_FIXED over whatever is there.
    MapOver,
    /// mremap to another slot.
    Move,
    /// MADV_DONTNEED.
    Discard,
    /// MADV_REMOVE.
    Remove,
    /// mprotect.
    Protect,
}

impl Kind {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unmap => "munmap",
            Self::MapOver => "mmap_fixed",
            Self::Move => "mremap",
            Self::Discard => "madv_dontneed",
            Self::Remove => "madv_remove",
            Self::Protect => "mprotect",
        }
    }
}

/// Makes the calls. Addresses and lengths are slots of the arena, so nothing else lives there.
///
/// Each returns the generation that later accesses have to show at least.
pub trait Calls {
    /// Maps `[offset, offset + len)` of the memory at `va`, over whatever is there.
    ///
    /// # Errors
    /// The system call's.
    fn map_over(&self, path: Path, va: u64, len: u64, offset: u64, prot: Prot) -> io::Result<u64>;
    /// Unmaps.
    ///
    /// # Errors
    /// The system call's.
    fn unmap(&self, path: Path, va: u64, len: u64) -> io::Result<u64>;
    /// Moves a mapping, over whatever is at `to`.
    ///
    /// # Errors
    /// The system call's.
    fn relocate(&self, path: Path, from: u64, to: u64, len: u64) -> io::Result<u64>;
    /// MADV_DONTNEED.
    ///
    /// # Errors
    /// The system call's.
    fn discard(&self, path: Path, va: u64, len: u64) -> io::Result<u64>;
    /// MADV_REMOVE: the content is zero afterwards.
    ///
    /// # Errors
    /// The system call's.
    fn remove(&self, path: Path, va: u64, len: u64) -> io::Result<u64>;
    /// mprotect (always by the agent: userfaultfd does not report it).
    ///
    /// # Errors
    /// The system call's.
    fn protect(&self, va: u64, len: u64, prot: Prot) -> io::Result<u64>;
    /// Forks a child that exits at once, and reaps it.
    ///
    /// # Errors
    /// The system call's.
    fn fork(&self) -> io::Result<()>;
}
