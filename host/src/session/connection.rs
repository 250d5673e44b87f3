//! One connection to the control socket, and what its requests do.
//!
//! Everything here blocks (messages to the device, locks) and runs on threads where that is allowed. One
//! request at a time: a reply has been made before the next packet is taken.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use driver::gru::{Context, ContextOptions, FaultMode as GruFaultMode};
use protos::bridge::control::{FaultMode, Reply, Request, VERSION};

use super::identity::{Identity, check_memory, duplicate};
use super::memory::UsedFile;
use super::packet::{Packet, decode};
use super::peer::AttachedPeer;
use super::purgeable;
use super::refusal::Refusal;
use super::session::{Admission, MAX_FILES, Session, SessionOptions};
use crate::daemon::Core;

/// Most bytes of one `GsegRead`, from the protocol.
const MOST_GSEG_BYTES: u32 = 16 * 1024;
/// Most bytes of a name.
const MOST_NAME_BYTES: usize = 256;
/// A reply and its descriptors.
#[derive(Debug)]
pub struct Answer {
    /// The reply.
    pub reply: Reply,
    /// In the order the protocol names.
    pub fds: Vec<OwnedFd>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self {
            reply,
            fds: Vec::new(),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    session: Option<Arc<Session>>,
    /// Contexts that this connection has made, on whatever address space.
    contexts: Vec<(u32, Weak<Session>)>,
    peer: Option<Arc<AttachedPeer>>,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    core: Arc<Core>,
    number: u64,
    identity: Identity,
    state: Mutex<State>,
}

impl Connection {
    /// A connection of a process.
    #[must_use]
    pub fn new(core: Arc<Core>, number: u64, identity: Identity) -> Self {
        Self {
            core,
            number,
            identity,
            state: Mutex::default(),
        }
    }

    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The session that it has opened.
    #[must_use]
    pub fn session(&self) -> Option<Arc<Session>> {
        self.state().session.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Answers a packet, whatever is in it.
    #[must_use]
    pub fn handle(&self, packet: Packet) -> Answer {
        let Packet { bytes, fds } = packet;
        let answer = decode::<Request>(&bytes)
            .map_err(|error| Refusal::new(libc::EPROTO, format!("not a request of this protocol: {error}")))
            .and_then(|request| self.answer(request, fds));
        answer.unwrap_or_else(|refusal| {
            tracing::debug!(connection = self.number, pid = self.identity.pid, %refusal, "refused");
            Reply::from(refusal).into()
        })
    }

    fn answer(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        match request {
            Request::Attach { version, pid, name } => self.attach(version, pid, name, fds),
            Request::AddMemory { len } => self.add_memory(len, fds),
            Request::CreateContext {
                pid,
                cbs,
                ds_bytes,
                fault_mode,
            } => self.create_context(pid, cbs, ds_bytes, fault_mode),
            Request::DestroyContext { context } => self.destroy_context(context),
            Request::CallOs { context, cb } => {
                // Served, put off, or nothing there: in each case the control block says the rest.
                self.context(context)?.call_os(cb as usize)?;
                Ok(Reply::Done.into())
            }
            Request::ExceptionDetail { context, cb } => {
                let detail = self.context(context)?.exception_detail(cb as usize)?;
                Ok(Reply::Exception {
                    opc: detail.opc.into(),
                    exopc: detail.exopc.into(),
                    ecause: detail.ecause,
                    exceptdet0: detail.exceptdet0,
                    exceptdet1: detail.exceptdet1,
                    cbrstate: u32::from(detail.cbrstate.0),
                    cbrexecstatus: detail.cbrexecstatus.into(),
                }
                .into())
            }
            Request::GsegRead { context, offset, len } => self.gseg_read(context, offset, len),
            Request::GsegWrite { context, offset, hex } => self.gseg_write(context, offset, &hex),
            Request::SetPurgeable { start, end } => self.set_purgeable(start, end),
            Request::AttachPeer {
                version,
                pid,
                start,
                end,
            } => self.attach_peer(version, pid, start, end),
            Request::PeerResolve { va } => self.peer_resolve(va),
            Request::Stats => Ok(Reply::Stats {
                stats: self.core.statistics(self.session().as_ref()).to_string(),
            }
            .into()),
            other => Err(Refusal::new(
                libc::ENOSYS,
                format!("{other:?} is not known to this daemon; use a daemon of the agent's version"),
            )),
        }
    }

    fn own_session(&self) -> Result<Arc<Session>, Refusal> {
        self.session()
            .ok_or_else(|| Refusal::new(libc::ENOTCONN, "this connection has no session; attach first"))
    }

    fn unused(&self) -> Result<(), Refusal> {
        let state = self.state();
        if state.session.is_some() || state.peer.is_some() {
            return Err(Refusal::new(
                libc::EALREADY,
                "this connection has attached already; use another connection",
            ));
        }
        Ok(())
    }

    fn version(version: u32) -> Result<(), Refusal> {
        if version != VERSION {
            return Err(Refusal::new(
                libc::EPROTONOSUPPORT,
                format!(
                    "the daemon speaks version {VERSION}, the agent {version}; use the same build of both"
                ),
            ));
        }
        Ok(())
    }

    fn attach(&self, version: u32, pid: u32, name: String, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        self.unused()?;
        Self::version(version)?;
        if pid != self.identity.pid {
            return Err(Refusal::new(
                libc::EPERM,
                format!(
                    "the agent calls itself pid {pid}, the kernel says {}; attach from the process itself and in \
                     the daemon's pid namespace",
                    self.identity.pid
                ),
            ));
        }
        if !self.core.accepts(&self.identity) {
            return Err(Refusal::new(
                libc::EPERM,
                format!(
                    "user {} may not use this daemon; run one of your own",
                    self.identity.uid
                ),
            ));
        }
        if name.len() > MOST_NAME_BYTES {
            return Err(Refusal::new(
                libc::ENAMETOOLONG,
                format!("a name has at most {MOST_NAME_BYTES} bytes"),
            ));
        }
        let [uffd, maps] = <[OwnedFd; 2]>::try_from(fds).map_err(|fds| {
            Refusal::new(
                libc::EINVAL,
                format!(
                    "attach needs 2 descriptors [userfaultfd, /proc/self/maps], got {}",
                    fds.len()
                ),
            )
        })?;
        let admission = Admission {
            id: self.core.next_session(),
            pid,
            uid: self.identity.uid,
            name,
            uffd,
            maps,
        };
        let options = SessionOptions {
            large_pages: self.core.options.large_pages,
            injection: self.core.options.injection,
        };
        let (session, notices) = Session::open(
            &self.core.gru,
            &self.core.fence,
            &self.core.memory,
            admission,
            options,
        )?;
        let fds = (|| {
            let mut fds = vec![duplicate(session.space.mapped_table().fd())?, notices];
            fds.push(duplicate(&self.core.own_pidfd)?);
            if let Some(device) = self.core.backing.pidfd() {
                fds.push(duplicate(device)?);
            }
            std::io::Result::Ok(fds)
        })();
        let fds = match fds {
            Ok(fds) => fds,
            Err(error) => {
                session.close("out of descriptors", &self.core.memory);
                return Err(Refusal::new(
                    libc::EMFILE,
                    format!("descriptors for the agent: {error}"),
                ));
            }
        };
        self.state().session = Some(session.clone());
        self.core.admit(&session);
        tracing::info!(session = session.id, pid, name = %session.name, "session opened");
        Ok(Answer {
            reply: Reply::Attached {
                version: VERSION,
                daemon_pid: std::process::id(),
                device_pid: self.core.backing.pid().unwrap_or(0),
                session: session.id,
                uffd_mode: self.core.options.uffd_mode,
                fence_timeout_ms: self.core.patience_of_agents_ms(),
            },
            fds,
        })
    }

    fn add_memory(&self, len: u64, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let session = self.own_session()?;
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            Refusal::new(
                libc::EINVAL,
                format!("the memory is 1 descriptor, got {}", fds.len()),
            )
        })?;
        let id = check_memory(fd.as_fd(), len).map_err(|(errno, message)| Refusal::new(errno, message))?;
        let known = session.space.file(id);
        let number = match &known {
            Some(file) => file.number,
            None if session.space.file_count() >= MAX_FILES => {
                return Err(Refusal::new(
                    libc::ENOSPC,
                    format!("a session knows at most {MAX_FILES} files; use larger ones"),
                ));
            }
            None => session.space.next_file_number(),
        };
        let pieces = self
            .core
            .memory
            .acquire(id, &fd, len, known.is_some())
            .map_err(|error| Refusal::new(libc::ENOMEM, error.to_string()))?;
        let iova = pieces.first().map_or(0, |p| p.iova);
        session.space.put_file(UsedFile {
            id,
            number,
            len: known.map_or(len, |file| file.len.max(len)),
            pieces,
            fd,
        });
        Ok(Reply::Memory { memory: number, iova }.into())
    }

    fn create_context(
        &self,
        pid: Option<u32>,
        cbs: u32,
        ds_bytes: u32,
        fault_mode: FaultMode,
    ) -> Result<Answer, Refusal> {
        let session = match pid {
            None => self.own_session()?,
            Some(pid) => self.core.session_of(pid, &self.identity)?,
        };
        let context = session.gru.create_context(ContextOptions {
            cbs: cbs as usize,
            ds_bytes: ds_bytes as usize,
            fault_mode: match fault_mode {
                FaultMode::Interrupt => GruFaultMode::Interrupt,
                FaultMode::UserPolling => GruFaultMode::UserPolling,
            },
            chiplet: None,
        })?;
        let context = Arc::new(context);
        let (fds, chiplets_offset, status_offset) = self.mappings()?;
        let number = self.core.next_context();
        session.add_context(number, self.number, context.clone())?;
        self.state().contexts.push((number, Arc::downgrade(&session)));
        Ok(Answer {
            reply: Reply::Context {
                context: number,
                chiplet: context.chiplet() as u32,
                ctxnum: context.ctxnum() as u32,
                gseg_offset: chiplets_offset + context.gseg_offset(),
                cbs: context.cbs() as u32,
                ds_bytes: context.ds_bytes() as u32,
                mappable: !fds.is_empty(),
                status_offset,
            },
            fds,
        })
    }

    /// [BAR2, BAR0, doorbell eventfd] with the offsets of the chiplets and of the status page in their files, or
    /// nothing when the device does not let all of them be used.
    fn mappings(&self) -> Result<(Vec<OwnedFd>, u64, u64), Refusal> {
        let gru = &self.core.gru;
        let (Some((chiplets, chiplets_offset)), Some((status, status_offset)), Some(doorbell)) =
            (gru.gseg_file(), gru.status_page(), gru.doorbell())
        else {
            return Ok((Vec::new(), 0, 0));
        };
        let fds = [chiplets, status, doorbell]
            .map(duplicate)
            .into_iter()
            .collect::<std::io::Result<_>>();
        let fds = fds.map_err(|e| Refusal::new(libc::EMFILE, format!("descriptors for the agent: {e}")))?;
        Ok((fds, chiplets_offset, status_offset))
    }

    fn context(&self, number: u32) -> Result<Arc<Context>, Refusal> {
        let session = self
            .state()
            .contexts
            .iter()
            .find(|(n, _)| *n == number)
            .and_then(|(_, s)| s.upgrade());
        session
            .and_then(|s| s.context(number, self.number))
            .ok_or_else(|| {
                Refusal::new(
                    libc::ENOENT,
                    format!("context {number} is not one of this connection (any more)"),
                )
            })
    }

    fn destroy_context(&self, number: u32) -> Result<Answer, Refusal> {
        drop(self.context(number)?);
        let session = {
            let mut state = self.state();
            let at = state.contexts.iter().position(|(n, _)| *n == number);
            at.and_then(|at| state.contexts.swap_remove(at).1.upgrade())
        };
        if let Some(session) = session {
            drop(session.take_context(number, self.number));
        }
        Ok(Reply::Done.into())
    }

    fn gseg_read(&self, context: u32, offset: u32, len: u32) -> Result<Answer, Refusal> {
        let context = self.context(context)?;
        if len > MOST_GSEG_BYTES {
            return Err(Refusal::new(
                libc::E2BIG,
                format!("at most {MOST_GSEG_BYTES} bytes at once, not {len}"),
            ));
        }
        let mut data = vec![0; len as usize];
        context.gseg_read(offset.into(), &mut data)?;
        Ok(Reply::Data { hex: to_hex(&data) }.into())
    }

    fn gseg_write(&self, context: u32, offset: u32, hex: &str) -> Result<Answer, Refusal> {
        let context = self.context(context)?;
        let data = from_hex(hex)
            .ok_or_else(|| Refusal::new(libc::EINVAL, "hex must be an even number of hexadecimal digits"))?;
        // Aligned words one by one: a store of a control block's first word starts its instruction.
        let mut at = u64::from(offset);
        let lead = data.len().min(at.next_multiple_of(8) as usize - at as usize);
        let (lead, words) = data.split_at(lead);
        if !lead.is_empty() {
            context.gseg_write(at, lead)?;
            at += lead.len() as u64;
        }
        for word in words.chunks(8) {
            context.gseg_write(at, word)?;
            at += word.len() as u64;
        }
        Ok(Reply::Done.into())
    }

    fn set_purgeable(&self, start: u64, end: u64) -> Result<Answer, Refusal> {
        let session = self.own_session()?;
        if let Some(reclaim) = self.core.options.reclaim {
            purgeable::offer(&session.space, start, end, reclaim.seed)?;
        }
        // Without a reclaimer nothing is ever discarded, which is what the application allowed.
        Ok(Reply::Done.into())
    }

    fn attach_peer(&self, version: u32, pid: u32, start: u64, end: u64) -> Result<Answer, Refusal> {
        self.unused()?;
        Self::version(version)?;
        let session = self.core.session_of(pid, &self.identity)?;
        let (peer, notices) = AttachedPeer::attach(&session, &self.identity, start, end)?;
        self.state().peer = Some(peer);
        Ok(Answer {
            reply: Reply::PeerAttached { session: session.id },
            fds: vec![notices],
        })
    }

    fn peer_resolve(&self, va: u64) -> Result<Answer, Refusal> {
        // Not under the lock: the look-up sleeps.
        let peer = self.state().peer.clone();
        let peer = peer.ok_or_else(|| {
            Refusal::new(
                libc::ENOTCONN,
                "this connection is no peer's; attach as a peer first",
            )
        })?;
        let (page, fd) = peer.resolve(va)?;
        Ok(Answer {
            reply: page,
            fds: vec![fd],
        })
    }

    /// Takes back everything that the connection has: its contexts, its session. Blocks.
    pub fn close(&self, reason: &str) {
        let state = std::mem::take(&mut *self.state());
        if let Some(peer) = state.peer {
            peer.detach();
        }
        for (number, session) in state.contexts {
            if let Some(session) = session.upgrade() {
                drop(session.take_context(number, self.number));
            }
        }
        if let Some(session) = state.session {
            self.core.dismiss(&session);
            session.close(reason, &self.core.memory);
        }
    }
}

fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a String takes everything");
            hex
        })
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let value = |d: u8| (d as char).to_digit(16);
    digits
        .chunks_exact(2)
        .map(|pair| Some((value(pair[0])? * 16 + value(pair[1])?) as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hex_when_bytes_are_any_round_trips() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)).unwrap(), all);
        assert!(from_hex("").unwrap().is_empty());
    }

    #[test]
    fn test_hex_when_malformed_is_refused() {
        for bad in ["0", "0g", "é0", "  ", "-1"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
