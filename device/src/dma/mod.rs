//! The client's memory by IOVA: which files are mapped where, and who may reach them.
//!
//! A [`Space`] belongs to one client. A mapping is a shared mmap of the client's file; raw pointers
//! into it stay in this module and in [`crate::atc`]. Nothing is ever lent out without a lock (a
//! [`Resolved`] keeps the map from changing) or an entry in a cache that the space can purge (a
//! [`TargetCache`]): the return of [`Space::unmap`] is the invalidate completion.
//!
//! Two kinds of memory: what comes with a file is mapped here, and anything may point to it; what comes
//! without one is reached by asking the client ([`Messenger`]), which waits, and which no guard covers.
//!
//! A client that truncates a mapped file takes the pages away from under the device. The process outlives
//! that (a handler for SIGBUS is installed with the first mapping), and the access that met it fails:
//! [`Resolved::check`] after a copy. [`MappingInfo::sealed`] tells which mappings cannot be truncated.
//!
//! Limits: a client that maps a file whose file system does not answer (FUSE, a dead network server) keeps
//! accesses, and with them drains, unmaps and resets, waiting for it.

mod copy;
pub(crate) mod lost;
#[cfg(all(test, not(loom)))]
mod lost_tests;
mod mapping;
mod message;
mod space;
#[cfg(test)]
mod tests;

pub(crate) use copy::Window;
pub use lost::Lost;
pub use message::{Interest, Messenger};
pub use space::{MappingInfo, Quiet, Resolved, Space, SpaceStats};

use std::ops::Range;

use rustix::io::Errno;

/// Most mappings that one space holds; a server says so in its `max_dma_maps`. (The protocol's default of
/// 65,535 is more than a process may have by the kernel's `vm.max_map_count`, and a process without any
/// left cannot start a thread.)
pub const MAX_MAPPINGS: usize = 32_768;

/// At most this much memory is populated before a fill becomes visible: the (aligned) window around
/// the missed address. The rest of a larger page is faulted in by the accesses themselves, at most
/// one 64 KiB chunk under one guard, which keeps the bound of a drain.
pub const POPULATE_LIMIT: u64 = 2 << 20;

/// What a device may do to a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Prot {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Prot {
    /// Both.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };
    /// Only reads.
    pub const READ_ONLY: Self = Self {
        read: true,
        write: false,
    };
}

/// Something that remembers pointers into client memory by IOVA (a device TLB).
pub trait TargetCache: Send + Sync {
    /// Forget everything whose target meets `iova`. When this returns no access through it is running
    /// or can start.
    fn purge_target(&self, iova: Range<u64>);

    /// An injected fault: it does not forget. The memory behind it has to stay, so that what it shows is old contents
    /// and not an address where nothing is.
    fn keeps_targets(&self) -> bool {
        false
    }
}

/// Why the client's memory cannot be mapped, unmapped or reached.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum DmaError {
    /// A length of zero.
    #[error("DMA range at {iova:#x} is empty; give at least one page")]
    Empty {
        /// Start of the range.
        iova: u64,
    },
    /// Not a multiple of the page (mapping) or of the entry's size (fill).
    #[error("{what} {value:#x} is not a multiple of {align:#x}")]
    Unaligned {
        /// Which argument.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it has to be a multiple of.
        align: u64,
    },
    /// The range, or the part of the file, ends above 2^64.
    #[error("range {start:#x} + {len:#x} wraps around; split or shorten it")]
    Wraps {
        /// Start of the range.
        start: u64,
        /// Length of it.
        len: u64,
    },
    /// Something is mapped there already.
    #[error("IOVA {iova:#x}+{len:#x} overlaps the mapping at {other:#x}+{other_len:#x}; unmap that first")]
    Overlap {
        /// Start of the new range.
        iova: u64,
        /// Length of the new range.
        len: u64,
        /// Start of the old mapping.
        other: u64,
        /// Length of the old mapping.
        other_len: u64,
    },
    /// [`MAX_MAPPINGS`] reached.
    #[error("the space already holds {limit} DMA mappings; unmap some")]
    TooMany {
        /// How many it may hold.
        limit: usize,
    },
    /// Neither read nor write.
    #[error("DMA mapping at {iova:#x} allows neither reads nor writes")]
    NoAccess {
        /// Start of the range.
        iova: u64,
    },
    /// The file is shorter than the mapping.
    #[error(
        "mapping of file bytes {offset:#x}+{len:#x} ends beyond the file's size {size:#x}; enlarge the file first"
    )]
    BeyondFile {
        /// Offset in the file.
        offset: u64,
        /// Length of the mapping.
        len: u64,
        /// What fstat says.
        size: u64,
    },
    /// An unmap that would leave a part of a mapping.
    #[error("unmap of {iova:#x}+{len:#x} would cut the mapping {other:#x}+{other_len:#x}; unmap all of it")]
    Cut {
        /// Start of the range.
        iova: u64,
        /// Length of the range.
        len: u64,
        /// Start of the mapping.
        other: u64,
        /// Length of the mapping.
        other_len: u64,
    },
    /// Nothing (or not all of it) is mapped there.
    #[error("IOVA {iova:#x}+{len:#x} is not inside one DMA mapping; map it first")]
    NotMapped {
        /// Start of the range.
        iova: u64,
        /// Length of the range.
        len: u64,
    },
    /// The mapping does not permit it.
    #[error("the DMA mapping at {iova:#x} does not permit {access}")]
    Protection {
        /// Start of the access.
        iova: u64,
        /// "reads" or "writes".
        access: &'static str,
    },
    /// The function is not a bus master (PCI command register, bit 2).
    #[error("bus mastering is off: the device may not reach memory; set bit 2 of the PCI command register")]
    BusMasterOff,
    /// Mapped without a file: there is nothing to point to.
    #[error(
        "the memory at IOVA {iova:#x} came without a file; reach it by message, or share it (memfd, share=on)"
    )]
    ByMessage {
        /// Start of the access.
        iova: u64,
    },
    /// An access by message ended before the client answered.
    #[error("the access by message to IOVA {iova:#x}+{len:#x} was ended: {why}")]
    Aborted {
        /// Start of the access.
        iova: u64,
        /// Length of it.
        len: u64,
        /// By what.
        why: &'static str,
    },
    /// The client did not answer an access by message.
    #[error("the client did not answer the access to IOVA {iova:#x}+{len:#x} in time")]
    NoAnswer {
        /// Start of the access.
        iova: u64,
        /// Length of it.
        len: u64,
    },
    /// Whoever asked for an access by message does not want it any more.
    #[error("the access by message to IOVA {iova:#x}+{len:#x} is not wanted any more")]
    Unwanted {
        /// Start of the access.
        iova: u64,
        /// Length of it.
        len: u64,
    },
    /// The client refused an access by message, or answered it wrongly.
    #[error("the client refused the access to IOVA {iova:#x}+{len:#x}: {errno}")]
    Refused {
        /// Start of the access.
        iova: u64,
        /// Length of it.
        len: u64,
        /// Its reason; EPROTO for an answer that makes no sense.
        errno: Errno,
    },
    /// This thread must not wait for the client: the client may be waiting for it.
    #[error(
        "the thread that serves the client cannot wait for its memory at IOVA {iova:#x}; use another thread"
    )]
    ServingThread {
        /// Start of the access.
        iova: u64,
    },
    /// The file is shorter than it was when it was mapped.
    #[error("the file behind IOVA {iova:#x}+{len:#x} was truncated; unmap it and map what there is")]
    Lost {
        /// Start of the access.
        iova: u64,
        /// Length of it.
        len: u64,
    },
    /// A system call failed.
    #[error("{call} for IOVA {iova:#x}+{len:#x} failed: {errno}")]
    System {
        /// Which call.
        call: &'static str,
        /// Start of the range.
        iova: u64,
        /// Length of the range.
        len: u64,
        /// What it said.
        errno: Errno,
    },
}

impl DmaError {
    /// The errno that a vfio-user reply carries.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Empty { .. }
            | Self::Unaligned { .. }
            | Self::Wraps { .. }
            | Self::NoAccess { .. }
            | Self::BeyondFile { .. }
            | Self::Cut { .. } => Errno::INVAL,
            Self::Overlap { .. } => Errno::EXIST,
            Self::TooMany { .. } => Errno::NOSPC,
            Self::NotMapped { .. } => Errno::NOENT,
            Self::Protection { .. } | Self::BusMasterOff => Errno::ACCESS,
            Self::ByMessage { .. } => Errno::NOTSUP,
            Self::Aborted { .. } | Self::Unwanted { .. } => Errno::CANCELED,
            Self::NoAnswer { .. } => Errno::TIMEDOUT,
            Self::ServingThread { .. } => Errno::DEADLK,
            Self::Lost { .. } => Errno::FAULT,
            Self::System { errno, .. } | Self::Refused { errno, .. } => *errno,
        }
    }
}
