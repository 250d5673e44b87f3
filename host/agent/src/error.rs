//! What can go wrong, who is to blame and the way out.

use std::io;

/// A peer of the agent that is not there any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{who} is gone: {why}")]
pub struct Gone {
    /// Who: "host daemon (pid 12)", "device process (pid 13)".
    pub who: String,
    /// What was seen.
    pub why: String,
}

/// Errors of the agent's own operations. Covered calls return plain [`io::Error`]s: those of the
/// system call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// No attachment in this process.
    #[error(
        "this process is not attached to a host daemon: call Agent::attach (a forked child has to attach anew)"
    )]
    NotAttached,
    /// A second attach in one process.
    #[error("this process is already attached to a host daemon: detach first")]
    AlreadyAttached,
    /// The daemon's socket cannot be reached.
    #[error("cannot connect to the host daemon at {socket}: {source}; is `tlbridge host` running?")]
    Connect {
        /// Path of the socket.
        socket: String,
        /// Why.
        source: io::Error,
    },
    /// No userfaultfd.
    #[error(
        "cannot create a userfaultfd: {source}; grant access to /dev/userfaultfd, give the process \
         CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd {
        /// Why the last of the ways failed.
        source: io::Error,
    },
    /// The kernel's userfaultfd lacks what the bridge needs.
    #[error(
        "the kernel's userfaultfd does not offer {missing}: Linux 5.19 or later with CONFIG_PTE_MARKER_UFFD_WP is needed"
    )]
    Features {
        /// Names of the features.
        missing: String,
    },
    /// The daemon refused.
    #[error("the host daemon refused {what}: {message} (errno {errno})")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The daemon's errno.
        errno: i32,
        /// The daemon's text.
        message: String,
    },
    /// The daemon broke the protocol.
    #[error("the host daemon broke the control protocol on {what}: {why}; are both of one version?")]
    Protocol {
        /// What was asked.
        what: &'static str,
        /// What was wrong with the answer.
        why: String,
    },
    /// A peer died.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The caller's arguments.
    #[error("{what}: {why}")]
    Invalid {
        /// Which argument.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}
