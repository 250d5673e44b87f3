//! A process that has attached memory of an application (XPMEM's part), as the daemon serves it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use protos::bridge::control::Reply;

use super::identity::{FileId, Identity, duplicate};
use super::packet;
use super::refusal::Refusal;
use super::session::Session;
use super::space::AddressSpace;
use crate::fence::Peer;
use crate::mm::Access;
use crate::notifier::MaySleep;
use crate::subscribers::{PeerBusy, PeerLink};

const PAGE: u64 = 4096;

/// An attachment to `[start, end)` of an application.
#[derive(Debug)]
pub struct AttachedPeer {
    space: Arc<AddressSpace>,
    link: Arc<PeerLink>,
    start: u64,
    end: u64,
}

impl AttachedPeer {
    /// Attaches a process. Returns the attachment and the peer's end of its notice socket.
    ///
    /// # Errors
    /// EINVAL for a bad range, EBUSY when the application's silent calls do not end, EMFILE, ESHUTDOWN.
    pub fn attach(
        session: &Arc<Session>,
        identity: &Identity,
        start: u64,
        end: u64,
    ) -> Result<(Arc<Self>, OwnedFd), Refusal> {
        if start >= end || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
            return Err(Refusal::new(
                libc::EINVAL,
                format!("range {start:#x}..{end:#x} must be whole pages, and at least one"),
            ));
        }
        let descriptors =
            |e: std::io::Error| Refusal::new(libc::EMFILE, format!("descriptors for the peer: {e}"));
        let (ours, theirs) = packet::pair().map_err(descriptors)?;
        let pidfd = duplicate(&identity.pidfd).map_err(descriptors)?;
        let peer = Peer {
            pid: identity.pid,
            name: format!("peer of session {}", session.id),
            pidfd,
        };
        let token = MaySleep::claim("AttachPeer");
        let space = session.space.clone();
        if space.has_ended() {
            return Err(Refusal::new(
                libc::ESHUTDOWN,
                "the application's session is ending",
            ));
        }
        space.join(&token)?;
        let link = PeerLink::new(peer, ours, start, end);
        space.xpmem().attach(link.clone(), &token);
        tracing::info!(
            session = session.id,
            pid = identity.pid,
            start,
            end,
            "peer attached"
        );
        let attached = Self {
            space,
            link,
            start,
            end,
        };
        Ok((Arc::new(attached), theirs))
    }

    /// Where a page is now: the reply and the memory's descriptor.
    ///
    /// # Errors
    /// EAGAIN while the page is being changed, EFAULT when there is no page for a peer, ESHUTDOWN at the end.
    pub fn resolve(&self, va: u64) -> Result<(Reply, OwnedFd), Refusal> {
        if !va.is_multiple_of(PAGE) || !(self.start..self.end).contains(&va) {
            return Err(Refusal::new(
                libc::EFAULT,
                format!(
                    "{va:#x} is not a page of the attached {:#x}..{:#x}",
                    self.start, self.end
                ),
            ));
        }
        let again = || Refusal::new(libc::EAGAIN, format!("{va:#x} is being changed; ask again"));
        let sequence = self
            .space
            .xpmem()
            .resolve_begin(va, va + PAGE)
            .map_err(|busy| match busy {
                PeerBusy::Changing => again(),
                PeerBusy::Released => Refusal::new(libc::ESHUTDOWN, "the application is gone"),
            })?;
        let (vma, generation) = self.space.mapping_at(va, Access::Read)?;
        let offset = vma.offset_of(va);
        let file = self
            .space
            .file(FileId {
                dev: vma.dev,
                ino: vma.inode,
            })
            .filter(|file| vma.shared && offset < file.len)
            .ok_or_else(|| {
                Refusal::new(
                    libc::EFAULT,
                    format!("{va:#x} is not memory that the session has added"),
                )
            })?;
        let fd = duplicate(file.fd.as_fd())
            .map_err(|e| Refusal::new(libc::EMFILE, format!("descriptor of the memory: {e}")))?;
        // One page: that is what the sequence was asked about.
        if self.space.xpmem().resolve_retry(sequence, va, va + PAGE) {
            return Err(again());
        }
        let reply = Reply::PeerPage {
            offset,
            len: PAGE,
            writable: vma.write,
            generation,
        };
        Ok((reply, fd))
    }

    /// The peer has closed its connection, which says that it has unmapped everything, or is gone.
    pub fn detach(&self) {
        let token = MaySleep::claim("detach of a peer");
        self.space.xpmem().detach(&self.link, &token);
        self.space.lower_must_hop();
        tracing::info!(
            session = self.space.id(),
            pid = self.link.peer().pid,
            "peer detached"
        );
    }
}
