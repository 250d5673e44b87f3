//! Descriptors that the control plane waits on.
// Reason: tokio asks its caller to vouch for the descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor for reading and writing. It belongs to the result and closes with it.
///
/// # Errors
/// epoll's reason.
pub(super) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor from here until the AsyncFd, its only owner, closes it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) }
        .map_err(io::Error::from)
}

/// As [`watch`], for descriptors that only become readable (pidfds, eventfds, listeners).
///
/// # Errors
/// epoll's reason.
pub(super) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: as in `watch`.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
