//! Agent <-> host daemon: control messages and the shared table.
//!
//! Two channels connect an application's agent with the host daemon:
//! * a `SOCK_SEQPACKET` socket for [control] messages (one JSON object a packet, file descriptors by
//!   `SCM_RIGHTS`): attaching, memory, contexts. Low frequency;
//! * one memfd, the [shared] table: the mailbox for invalidations and the counts that let most of
//!   them skip the mailbox altogether.
//!
//! The log of [changes] is a third thing, between the daemon and a device that checks itself.

pub mod changes;
pub mod control;
pub mod shared;
