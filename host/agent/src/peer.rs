//! The sleeping subscriber's side (XPMEM's part): another process maps the application's pages at its own
//! addresses and really unmaps them when told.

use crate::{AgentError, Result};
use std::path::Path;

/// Counters of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct PeerStats {
    /// Zaps served.
    pub zaps: u64,
    /// Bytes really unmapped by them.
    pub unmapped_bytes: u64,
    /// Pages mapped on demand.
    pub mapped_pages: u64,
    /// Look-ups answered "being changed, again".
    pub resolve_retries: u64,
}

/// An attachment to `[start, end)` of another process.
#[derive(Debug)]
pub struct Peer {
    _private: (),
}

impl Peer {
    /// Attach to `[start, end)` of application `pid`.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn attach(_socket: &Path, _pid: u32, _start: u64, _end: u64) -> Result<Self> {
        Err(AgentError::NotAttached)
    }
    /// The 8 bytes at `va` (the application's address; aligned), mapped on demand. `None`: nothing is
    /// mapped there, or outside the range.
    #[must_use]
    pub fn read(&self, _va: u64) -> Option<u64> {
        None
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        PeerStats::default()
    }
    /// Whether the daemon still serves this peer.
    #[must_use]
    pub fn alive(&self) -> bool {
        false
    }
}
