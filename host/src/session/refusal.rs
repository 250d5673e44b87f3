//! "No", with the reason and the way out.

use driver::gru::GruError;
use protos::bridge::control::Reply;

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (errno {errno})")]
pub struct Refusal {
    /// errno of the nearest system call.
    pub errno: i32,
    /// What, why, and the way out.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Self {
            errno,
            message: message.into(),
        }
    }
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        Reply::Error {
            errno: refusal.errno,
            message: refusal.message,
        }
    }
}

impl From<GruError> for Refusal {
    fn from(error: GruError) -> Self {
        let errno = match &error {
            GruError::NoResources { .. } => libc::EBUSY,
            GruError::Argument { .. } => libc::EINVAL,
            GruError::Closed => libc::ESHUTDOWN,
            GruError::DeviceGone => libc::ENODEV,
            _ => libc::EIO,
        };
        Self::new(errno, error.to_string())
    }
}
