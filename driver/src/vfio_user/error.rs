//! Errors of the client.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no such file.
    #[error("{}: there is no such socket; start the device first, or check the path", path.display())]
    NotFound {
        /// The socket.
        path: PathBuf,
    },
    /// The file is there, but no process accepts on it.
    #[error("{}: nobody listens on this socket (its device process has ended); start the device again", path.display())]
    NotListening {
        /// The socket.
        path: PathBuf,
    },
    /// Another client is connected.
    #[error("{}: another client is connected to this device; stop it, or start a device of your own", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// The server speaks another version.
    #[error("{}: the server speaks vfio-user {major}.{minor}, this client 0.1; use a server that speaks 0.1", path.display())]
    Version {
        /// The socket.
        path: PathBuf,
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// Not a PCI device.
    #[error("{}: the device is not a PCI device; connect to a PCI function", path.display())]
    NotPci {
        /// The socket.
        path: PathBuf,
    },
    /// No answer.
    #[error("{}: no answer to {request} within {timeout:?}; is the device process stopped, or is this no vfio-user socket?", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: &'static str,
        /// How long was waited.
        timeout: Duration,
    },
    /// An answer that makes no sense.
    #[error("{}: {request} was answered wrongly: {reason}; is this a vfio-user socket?", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The server refused, or a system call failed.
    #[error("{}: {request} failed: {source}", path.display())]
    Failed {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    /// The device refused: everything is well with the connection.
    Device(Errno),
    /// No reply in time.
    Timeout(Duration),
    /// The server has closed the connection.
    Closed,
    /// An answer that makes no sense.
    Protocol(String),
    /// The connection had failed before.
    Dead(String),
    /// A system call failed.
    System(Errno),
}

impl CallError {
    pub(super) fn protocol(reason: String) -> Self {
        Self::Protocol(reason)
    }

    /// What to say from now on.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Device(errno) | Self::System(errno) => errno.to_string(),
            Self::Timeout(timeout) => format!("no reply within {timeout:?}"),
            Self::Closed => "the device process closed the connection".into(),
            Self::Protocol(reason) => format!("a reply made no sense: {reason}"),
            Self::Dead(reason) => reason.clone(),
        }
    }

    /// As the errors of [`crate::backing::Backing`]: the device's errno as such, the transport's with the
    /// name of the socket.
    pub(super) fn into_io(self, path: &Path) -> io::Error {
        let kind = match &self {
            Self::Device(errno) => return (*errno).into(),
            Self::Timeout(_) => io::ErrorKind::TimedOut,
            Self::Closed => io::ErrorKind::ConnectionReset,
            Self::Protocol(_) => io::ErrorKind::InvalidData,
            Self::Dead(_) => io::ErrorKind::NotConnected,
            Self::System(errno) => io::Error::from(*errno).kind(),
        };
        let reason = self.reason();
        let way_out = "the connection cannot be used any more; connect again";
        io::Error::new(kind, format!("device at {}: {reason}; {way_out}", path.display()))
    }
}

impl ConnectError {
    pub(super) fn from_call(path: &Path, request: &'static str, error: CallError) -> Self {
        let path = path.to_path_buf();
        match error {
            CallError::Device(Errno::BUSY) => Self::Busy { path },
            CallError::Timeout(timeout) => Self::Timeout {
                path,
                request,
                timeout,
            },
            CallError::Protocol(reason) | CallError::Dead(reason) => Self::Protocol {
                path,
                request,
                reason,
            },
            CallError::Closed => Self::Failed {
                path,
                request,
                source: io::Error::new(io::ErrorKind::ConnectionReset, "the server closed the connection"),
            },
            CallError::Device(errno) | CallError::System(errno) => Self::Failed {
                path,
                request,
                source: errno.into(),
            },
        }
    }
}
