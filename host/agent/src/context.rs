//! GRU contexts.

use crate::state::{self, State, phase};
use crate::sys;
use crate::{
    AgentError, Completion, ContextOptions, ExecuteError, FaultMode, GruException, Instruction, Result,
    control, fence,
};
use driver::gru::user::{Gseg, GsegAccess, WaitError};
use protos::bridge::control::{Reply, Request};
use protos::gru::cb::Status;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};

/// A GRU context. Every method answers with an error once its attachment is over (and in a forked child).
#[derive(Debug)]
pub struct GruContext {
    gseg: ManuallyDrop<Gseg>,
    number: u32,
    chiplet: u32,
    ctxnum: u32,
    gseg_offset: u64,
    attach_id: u64,
    /// Process that maps the GSEG: it is not inherited by children.
    pid: u32,
}

/// The state of attachment `id`, if that is still this process' attachment and there is a daemon.
fn live(id: u64) -> Result<&'static State> {
    let state = state::state().ok_or(AgentError::NotAttached)?;
    if state.attach_id.load(std::sync::atomic::Ordering::Acquire) != id {
        return Err(AgentError::NotAttached);
    }
    match state.phase() {
        phase::ATTACHED => Ok(state),
        phase::FENCING | phase::GONE => Err(AgentError::Gone(control::gone(state))),
        _ => Err(AgentError::NotAttached),
    }
}

fn alive(id: u64) -> bool {
    live(id).is_ok_and(|s| {
        s.device_lost.load(std::sync::atomic::Ordering::Acquire) == 0 && !fence::daemon_dead(s)
    })
}

/// GSEG access for a device whose memory cannot be mapped.
struct ByMessage {
    context: u32,
    attach_id: u64,
}

impl ByMessage {
    fn ask(&self, what: &'static str, request: &Request) -> io::Result<Reply> {
        live(self.attach_id)
            .and_then(|s| control::request(s, what, request, &[]))
            .map(|(reply, _)| reply)
            .map_err(io::Error::other)
    }
}

impl GsegAccess for ByMessage {
    fn read64(&self, offset: u64) -> io::Result<u64> {
        let mut word = [0; 8];
        self.read(offset, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
    fn write64(&self, offset: u64, value: u64) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for part in data.chunks_mut(MESSAGE_BYTES) {
            let request = Request::GsegRead {
                context: self.context,
                offset: offset_in_gseg(at)?,
                len: part.len() as u32,
            };
            let Reply::Data { hex } = self.ask("reading a GSEG", &request)? else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            from_hex(&hex, part).ok_or(io::ErrorKind::InvalidData)?;
            at += part.len() as u64;
        }
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in data.chunks(MESSAGE_BYTES) {
            let request = Request::GsegWrite {
                context: self.context,
                offset: offset_in_gseg(at)?,
                hex: to_hex(part),
            };
            let Reply::Done = self.ask("writing a GSEG", &request)? else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            at += part.len() as u64;
        }
        Ok(())
    }
}

/// Limit of `Request::GsegRead`.
const MESSAGE_BYTES: usize = 16 * 1024;

fn offset_in_gseg(offset: u64) -> io::Result<u32> {
    u32::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}

fn from_hex(hex: &str, out: &mut [u8]) -> Option<()> {
    let text = hex.as_bytes();
    if text.len() != out.len() * 2 {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(())
}

pub(crate) fn create(pid: Option<u32>, options: &ContextOptions) -> Result<GruContext> {
    let what = "creating a GRU context";
    let state = state::covering().ok_or(AgentError::NotAttached)?;
    let attach_id = state.attach_id.load(std::sync::atomic::Ordering::Acquire);
    let request = Request::CreateContext {
        pid,
        cbs: options.cbs,
        ds_bytes: options.ds_bytes,
        fault_mode: options.fault_mode,
    };
    let (reply, fds) = control::request(state, what, &request, &[])?;
    let Reply::Context {
        context: number,
        chiplet,
        ctxnum,
        gseg_offset,
        cbs,
        ds_bytes,
        mappable,
        status_offset,
    } = reply
    else {
        return Err(AgentError::Protocol {
            what,
            why: "an answer of another kind".into(),
        });
    };
    let (cbs, ds_bytes) = (cbs as usize, ds_bytes as usize);
    let made = if mappable {
        let [Some(bar2), Some(bar0), Some(doorbell), ..] = fds else {
            destroy(attach_id, number);
            return Err(AgentError::Protocol {
                what,
                why: "the descriptors of BAR2, BAR0 and the doorbell are missing".into(),
            });
        };
        state
            .map_status_page(bar0.as_raw_fd(), status_offset)
            .and_then(|()| {
                Gseg::map(
                    bar2.as_fd(),
                    gseg_offset,
                    Some((bar0.as_fd(), status_offset)),
                    doorbell,
                    cbs,
                    ds_bytes,
                )
            })
    } else {
        let access = ByMessage {
            context: number,
            attach_id,
        };
        Ok(Gseg::by_message(Box::new(access), cbs, ds_bytes))
    };
    let mut gseg = made.map_err(|source| {
        destroy(attach_id, number);
        AgentError::System {
            what: "mapping a GSEG",
            source,
        }
    })?;
    if options.fault_mode == FaultMode::UserPolling {
        gseg.set_call_os(Box::new(move |cb| {
            let request = Request::CallOs {
                context: number,
                cb: cb as u32,
            };
            live(attach_id)
                .and_then(|s| control::request(s, "serving a GRU miss", &request, &[]))
                .map(drop)
                .map_err(io::Error::other)
        }));
    }
    Ok(GruContext {
        gseg: ManuallyDrop::new(gseg),
        number,
        chiplet,
        ctxnum,
        gseg_offset,
        attach_id,
        pid: sys::getpid(),
    })
}

fn destroy(attach_id: u64, number: u32) {
    // A daemon that is gone has no contexts; one that refuses has none of this number.
    let _ = live(attach_id).and_then(|s| {
        control::request(
            s,
            "destroying a GRU context",
            &Request::DestroyContext { context: number },
            &[],
        )
    });
}

impl GruContext {
    /// Number of the context at the daemon.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
    /// Chiplet it lives on.
    #[must_use]
    pub fn chiplet(&self) -> u32 {
        self.chiplet
    }
    /// Context number on the chiplet.
    #[must_use]
    pub fn ctxnum(&self) -> u32 {
        self.ctxnum
    }
    /// Offset of its GSEG inside BAR2.
    #[must_use]
    pub fn gseg_offset(&self) -> u64 {
        self.gseg_offset
    }
    /// Control blocks granted.
    #[must_use]
    pub fn cbs(&self) -> u32 {
        self.gseg.cbs() as u32
    }
    /// Data segment bytes granted.
    #[must_use]
    pub fn ds_bytes(&self) -> u32 {
        self.gseg.ds_bytes() as u32
    }
    /// The user's side, for issuing without waiting. Not to be used in a forked child.
    #[must_use]
    pub fn gseg(&self) -> &Gseg {
        &self.gseg
    }

    /// Issue an instruction on a control block and wait for its end. `&self`: several threads may use
    /// different control blocks of one context.
    ///
    /// # Errors
    /// The device's exception, or a peer that died.
    pub fn execute(
        &self,
        cb: u32,
        instruction: &Instruction,
    ) -> std::result::Result<Completion, ExecuteError> {
        live(self.attach_id)?;
        self.check_cb(cb)?;
        self.gseg
            .issue(cb as usize, instruction)
            .map_err(|source| self.failed("issuing a GRU instruction", source))?;
        self.wait(cb)
    }

    /// Wait for the end of an instruction that was issued through [`GruContext::gseg`].
    ///
    /// # Errors
    /// As [`GruContext::execute`].
    pub fn wait(&self, cb: u32) -> std::result::Result<Completion, ExecuteError> {
        live(self.attach_id)?;
        self.check_cb(cb)?;
        let id = self.attach_id;
        let index = cb as usize;
        let what = "waiting for a GRU instruction";
        match self.gseg.wait(index, &|| alive(id)) {
            Ok(Status::IDLE) => {}
            Ok(_) => return Err(self.exception(cb)),
            Err(WaitError::Gone) => return Err(self.gone().into()),
            Err(WaitError::Io(source)) => return Err(self.failed(what, source).into()),
        }
        let read = || io::Result::Ok((self.gseg.avalue(index)?, self.gseg.tag(index)?));
        let (avalue, tag) = read().map_err(|source| self.failed(what, source))?;
        Ok(Completion { avalue, tag })
    }

    fn check_cb(&self, cb: u32) -> Result<()> {
        if cb < self.cbs() {
            return Ok(());
        }
        Err(AgentError::Invalid {
            what: "control block number",
            why: "the context has fewer control blocks",
        })
    }

    fn gone(&self) -> AgentError {
        match live(self.attach_id) {
            Ok(state) => AgentError::Gone(control::gone(state)),
            Err(e) => e,
        }
    }

    /// An access that failed because the peer died is reported as that.
    fn failed(&self, what: &'static str, source: io::Error) -> AgentError {
        if alive(self.attach_id) {
            AgentError::System { what, source }
        } else {
            self.gone()
        }
    }

    fn exception(&self, cb: u32) -> ExecuteError {
        let request = Request::ExceptionDetail {
            context: self.number,
            cb,
        };
        let what = "reading a GRU exception";
        match live(self.attach_id).and_then(|s| control::request(s, what, &request, &[])) {
            Ok((
                Reply::Exception {
                    opc,
                    exopc,
                    ecause,
                    exceptdet0,
                    exceptdet1,
                    cbrstate,
                    cbrexecstatus,
                },
                _,
            )) => ExecuteError::Exception(GruException {
                opc,
                exopc,
                ecause,
                exceptdet0,
                exceptdet1,
                cbrstate,
                cbrexecstatus,
            }),
            Ok(_) => ExecuteError::Agent(AgentError::Protocol {
                what,
                why: "an answer of another kind".into(),
            }),
            Err(e) => e.into(),
        }
    }

    /// Write to the data segment at byte `offset`.
    ///
    /// # Errors
    /// Out of range, or a peer that died.
    pub fn ds_write(&self, offset: u32, data: &[u8]) -> Result<()> {
        live(self.attach_id)?;
        self.gseg
            .ds_write(offset as usize, data)
            .map_err(|source| self.failed("writing to a data segment", source))
    }

    /// Read from the data segment at byte `offset`.
    ///
    /// # Errors
    /// Out of range, or a peer that died.
    pub fn ds_read(&self, offset: u32, data: &mut [u8]) -> Result<()> {
        live(self.attach_id)?;
        self.gseg
            .ds_read(offset as usize, data)
            .map_err(|source| self.failed("reading from a data segment", source))
    }
}

impl Drop for GruContext {
    #[allow(unsafe_code, reason = "a child must not unmap what it has not inherited")]
    fn drop(&mut self) {
        if sys::getpid() != self.pid {
            return;
        }
        // The device may still store to the GSEG: its pages are the device's own, so the order does not matter.
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.gseg) };
        destroy(self.attach_id, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hex_when_converted_back_is_the_same() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut back = [0; 256];
        from_hex(&to_hex(&bytes), &mut back).unwrap();
        assert_eq!(bytes, back);
        assert!(from_hex("0", &mut [0]).is_none());
        assert!(from_hex("zz", &mut [0]).is_none());
    }
}
