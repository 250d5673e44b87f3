//! What can go wrong.

use std::io;

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library is not there, or is not one.
    #[error("{name} cannot be loaded: {reason} (package libibverbs1, or rdma-core's libibverbs)")]
    Library {
        /// What was looked for.
        name: String,
        /// What the loader said.
        reason: String,
    },
    /// No such device.
    #[error("no device {name}; there are: {}", list(.there))]
    NoDevice {
        /// What was asked for.
        name: String,
        /// What there is.
        there: Vec<String>,
    },
    /// The device or the library cannot do it.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// The call or the mode.
        what: &'static str,
        /// By whom, and how that is known.
        why: String,
    },
    /// A call failed.
    #[error("{call}: {error}")]
    Call {
        /// Which, and on what.
        call: String,
        /// Its errno (in the text, and therefore no source of this error).
        error: io::Error,
    },
    /// A work request completed with an error, and the queue pairs are gone.
    #[error("{what} of {length} bytes completed with \"{status}\" (vendor error {vendor_error:#x})")]
    Completion {
        /// WRITE or READ.
        what: &'static str,
        /// How much it was to move.
        length: usize,
        /// As the library names it.
        status: String,
        /// The device's own code.
        vendor_error: u32,
    },
    /// Nothing completed for a long time, and the queue pairs are gone.
    #[error("{what}: no completion within {seconds} s, {outstanding} outstanding")]
    Silent {
        /// WRITE or READ.
        what: &'static str,
        /// How long.
        seconds: u64,
        /// How many.
        outstanding: usize,
    },
    /// The queue pairs were given up after an earlier error.
    #[error("the queue pairs are gone since an earlier error: connect new ones")]
    Disconnected,
}

impl Error {
    /// The errno that a call returned.
    pub(crate) fn code(call: impl Into<String>, code: i32) -> Self {
        Self::Call {
            call: call.into(),
            // Some providers return it negated.
            error: io::Error::from_raw_os_error(code.saturating_abs()),
        }
    }

    /// The errno that a call left.
    pub(crate) fn last(call: impl Into<String>) -> Self {
        Self::Call {
            call: call.into(),
            error: io::Error::last_os_error(),
        }
    }

    /// The errno, if it was a call's.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { error, .. } => error.raw_os_error(),
            _ => None,
        }
    }
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".into(),
        names => names.join(", "),
    }
}
