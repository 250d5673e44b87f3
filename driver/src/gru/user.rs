//! The user's side of a context: control blocks and data segment (section 7).
//!
//! A [`Gseg`] works in mapped memory or by message. In mapped memory nothing here makes a system call except
//! to wake a sleeping device and to wait for long; nothing allocates between construction and drop.

use std::fmt;
use std::hint::spin_loop;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use protos::gru::cb::{self, Instruction, Status};
use protos::gru::{map, pci};

use super::mapped::Mapping;
use super::window::ring_eventfd;
use crate::backing::Backing;

/// GSEG accesses for somebody who has not mapped it. Offsets are the GSEG's.
pub trait GsegAccess: Send + Sync {
    /// Reads an aligned word.
    ///
    /// # Errors
    /// The transport's.
    fn read64(&self, offset: u64) -> io::Result<u64>;
    /// Writes an aligned word; one to a control block's first word may start the instruction.
    ///
    /// # Errors
    /// The transport's.
    fn write64(&self, offset: u64, value: u64) -> io::Result<()>;
    /// Reads bytes of the data segment.
    ///
    /// # Errors
    /// The transport's.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let word = self.read64(at & !7)?.to_le_bytes();
            let skip = (at & 7) as usize;
            let n = rest.len().min(8 - skip);
            let (now, tail) = rest.split_at_mut(n);
            now.copy_from_slice(&word[skip..skip + n]);
            (at, rest) = (at + n as u64, tail);
        }
        Ok(())
    }
    /// Writes bytes of the data segment.
    ///
    /// # Errors
    /// The transport's.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let skip = (at & 7) as usize;
            let n = rest.len().min(8 - skip);
            let (now, tail) = rest.split_at(n);
            let mut word = if n == 8 {
                [0; 8]
            } else {
                self.read64(at & !7)?.to_le_bytes()
            };
            word[skip..skip + n].copy_from_slice(now);
            self.write64(at & !7, u64::from_le_bytes(word))?;
            (at, rest) = (at + n as u64, tail);
        }
        Ok(())
    }
}

/// What is called for a control block that says CALL_OS.
pub type CallOsFn = Box<dyn Fn(usize) -> io::Result<()> + Send + Sync>;

/// Why a wait ended without the instruction having ended.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The `alive` callback said no.
    #[error("the device or the daemon behind the GRU context is gone")]
    Gone,
    /// An access failed.
    #[error("accessing the GRU context: {0}")]
    Io(#[from] io::Error),
}

/// One context as its user sees it. Methods take `&self`: different threads may use different control blocks
/// and different parts of the data segment at the same time.
pub struct Gseg {
    access: Access,
    cbs: usize,
    ds_bytes: usize,
    call_os: Option<CallOsFn>,
}

enum Access {
    Mapped {
        gseg: Mapping,
        status: Option<Mapping>,
        doorbell: Doorbell,
        /// The device's count of resets begun when this was mapped.
        resets: u32,
    },
    Message(Box<dyn GsegAccess>),
}

/// How a user wakes the device.
#[derive(Debug)]
pub enum Doorbell {
    /// The eventfd that stands for the device's doorbell page: a ring is a system call that does not wait.
    EventFd(OwnedFd),
    /// The GSEG's doorbell page at this offset of the chiplets' BAR, written by message.
    Page(Arc<dyn Backing>, u64),
}

impl Doorbell {
    fn ring(&self) -> io::Result<()> {
        match self {
            Self::EventFd(fd) => ring_eventfd(fd.as_fd()),
            Self::Page(backing, at) => backing.write_posted(pci::BAR_CHIPLETS, *at, &[0; 4]),
        }
    }
}

impl From<OwnedFd> for Doorbell {
    fn from(eventfd: OwnedFd) -> Self {
        Self::EventFd(eventfd)
    }
}

impl fmt::Debug for Gseg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gseg")
            .field("mapped", &self.is_mapped())
            .field("cbs", &self.cbs)
            .field("ds_bytes", &self.ds_bytes)
            .finish_non_exhaustive()
    }
}

impl Gseg {
    /// Maps a GSEG.
    ///
    /// * `bar`, `offset`: the file of the chiplets' BAR, and the place of the GSEG in that file.
    /// * `status`: the file of the doorbell BAR and the place of the status page in it; without it every
    ///   start rings.
    /// * `doorbell`: what wakes the device; an eventfd will do.
    ///
    /// # Errors
    /// The error of mmap.
    pub fn map(
        bar: BorrowedFd<'_>,
        offset: u64,
        status: Option<(BorrowedFd<'_>, u64)>,
        doorbell: impl Into<Doorbell>,
        cbs: usize,
        ds_bytes: usize,
    ) -> io::Result<Self> {
        let gseg = Mapping::new(bar, offset, map::GSEG_MAPPABLE, true)?;
        let status = match status {
            Some((fd, at)) => Some(Mapping::new(fd, at, 4096, false)?),
            None => None,
        };
        let resets = status
            .as_ref()
            .map_or(0, |page| page.load32(pci::STATUS_RESETS_BEGUN));
        Ok(Self {
            access: Access::Mapped {
                gseg,
                status,
                doorbell: doorbell.into(),
                resets,
            },
            cbs,
            ds_bytes,
            call_os: None,
        })
    }

    /// Maps the GSEG at `offset` of a backing's chiplet BAR. Where the device has no eventfd for its doorbell the
    /// GSEG's own doorbell page is written.
    ///
    /// # Errors
    /// `Unsupported` when the device does not allow it; the error of mmap.
    pub fn of_backing(
        backing: &Arc<dyn Backing>,
        offset: u64,
        cbs: usize,
        ds_bytes: usize,
    ) -> io::Result<Self> {
        let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
        let (bar, base) = backing.bar_fd(pci::BAR_CHIPLETS).ok_or_else(unsupported)?;
        let doorbell = match backing.io_eventfd(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET)? {
            Some(eventfd) => Doorbell::EventFd(eventfd),
            None => Doorbell::Page(Arc::clone(backing), offset + map::GSEG_BELL),
        };
        let status = backing
            .bar_fd(pci::BAR_DOORBELL)
            .filter(|_| !backing.bar(pci::BAR_DOORBELL).mappable.is_empty())
            .map(|(fd, at)| (fd, at + pci::STATUS_OFFSET));
        Self::map(bar, base + offset, status, doorbell, cbs, ds_bytes)
    }

    /// A GSEG that is reached through `access`.
    #[must_use]
    pub fn by_message(access: Box<dyn GsegAccess>, cbs: usize, ds_bytes: usize) -> Self {
        Self {
            access: Access::Message(access),
            cbs,
            ds_bytes,
            call_os: None,
        }
    }

    /// What [`Gseg::wait`] calls when a control block says CALL_OS (user-polling misses).
    pub fn set_call_os(&mut self, call: CallOsFn) {
        self.call_os = Some(call);
    }

    /// Whether accesses are plain loads and stores.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.access, Access::Mapped { .. })
    }
    /// Control blocks.
    #[must_use]
    pub fn cbs(&self) -> usize {
        self.cbs
    }
    /// Data segment bytes.
    #[must_use]
    pub fn ds_bytes(&self) -> usize {
        self.ds_bytes
    }

    fn cb_at(&self, cb: usize) -> io::Result<u64> {
        if cb >= self.cbs {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(map::GSEG_CB + cb as u64 * map::HANDLE_STRIDE)
    }

    fn ds_at(&self, offset: usize, len: usize) -> io::Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.ds_bytes => Ok(map::GSEG_DS + offset as u64),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn load(&self, offset: u64) -> io::Result<u64> {
        match &self.access {
            Access::Mapped { gseg, .. } => Ok(gseg.load(offset)),
            Access::Message(access) => access.read64(offset),
        }
    }

    /// After a read: fails when the device has begun a reset since this was mapped, so that what a reset
    /// clears is never taken for a result.
    fn before_reset(&self) -> io::Result<()> {
        let Access::Mapped {
            status: Some(page),
            resets,
            ..
        } = &self.access
        else {
            return Ok(());
        };
        fence(Ordering::SeqCst);
        if page.load32(pci::STATUS_RESETS_BEGUN) == *resets {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::NotConnected,
            "the device has been reset: its contexts are gone",
        ))
    }

    fn store(&self, offset: u64, value: u64) -> io::Result<()> {
        match &self.access {
            Access::Mapped { gseg, .. } => {
                gseg.store(offset, value);
                Ok(())
            }
            Access::Message(access) => access.write64(offset, value),
        }
    }

    /// Starts an instruction on a control block that is not busy.
    ///
    /// # Errors
    /// `InvalidInput` when there is no such control block; the transport's error.
    pub fn issue(&self, cb: usize, instruction: &Instruction) -> io::Result<()> {
        let at = self.cb_at(cb)?;
        let i = instruction;
        let operands = [
            (cb::IDEF4, i.idef4),
            (cb::BADDR0, i.baddr0),
            (cb::NELEM, i.nelem),
            (cb::STRIDE_OP1, i.stride_op1),
            (cb::BADDR1_VALUE_OP2, i.baddr1_value_op2),
        ];
        for (offset, value) in operands {
            self.store(at + offset, value)?;
        }
        // Last (Release): the device acts on this word.
        self.store(at + cb::CONTROL, i.control.into_bits())?;
        self.ring()
    }

    /// Runs the instruction of a control block that is in EXCEPTION once more: nothing but icmd is set, the operands
    /// stand (section 7; see [`protos::gru::cbe::ecause::RETRYABLE`]).
    ///
    /// # Errors
    /// As [`Gseg::issue`].
    pub fn retry(&self, cb: usize) -> io::Result<()> {
        let at = self.cb_at(cb)? + cb::CONTROL;
        let control = cb::Control::from_bits(self.load(at)?);
        // A trapped store makes the status ACTIVE by itself, mapped memory does not.
        let control = control.with_icmd(true).with_istatus(Status::ACTIVE);
        self.store(at, control.into_bits())?;
        self.ring()
    }

    /// Store, fence, then the look at `awake`: see `Window::ring`.
    fn ring(&self) -> io::Result<()> {
        let Access::Mapped { status, doorbell, .. } = &self.access else {
            return Ok(());
        };
        fence(Ordering::SeqCst);
        match status {
            Some(page) if page.load32(pci::STATUS_AWAKE) != 0 => Ok(()),
            _ => doorbell.ring(),
        }
    }

    /// The control word: istatus, isubstatus.
    ///
    /// # Errors
    /// As [`Gseg::issue`].
    pub fn control(&self, cb: usize) -> io::Result<cb::Control> {
        Ok(cb::Control::from_bits(self.load(self.cb_at(cb)? + cb::CONTROL)?))
    }

    /// istatus of a control block. What the instruction did is visible once this is not ACTIVE.
    ///
    /// # Errors
    /// As [`Gseg::issue`].
    pub fn poll(&self, cb: usize) -> io::Result<Status> {
        Ok(self.control(cb)?.istatus())
    }

    /// Waits until the instruction has ended: IDLE or EXCEPTION. Misses that the user has to report are
    /// reported (see [`Gseg::set_call_os`]). Spins, then yields, then naps up to a millisecond at a time:
    /// a control block has no wake-up for user contexts.
    ///
    /// `alive` is asked from time to time; when it says no the wait ends.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait(&self, cb: usize, alive: &dyn Fn() -> bool) -> Result<Status, WaitError> {
        const SPINS: u32 = 300;
        const YIELDS: u32 = 300;
        const FIRST_NAP: Duration = Duration::from_micros(20);
        const LAST_NAP: Duration = Duration::from_millis(1);
        let mut turns = 0u32;
        let mut nap = FIRST_NAP;
        loop {
            match self.poll(cb)? {
                status @ (Status::IDLE | Status::EXCEPTION) => {
                    self.before_reset()?;
                    return Ok(status);
                }
                Status::CALL_OS => match &self.call_os {
                    Some(call) => call(cb)?,
                    None => return Err(io::Error::from(io::ErrorKind::Unsupported).into()),
                },
                _ => {}
            }
            turns = turns.saturating_add(1);
            if turns <= SPINS {
                spin_loop();
                continue;
            }
            // Every turn from here on costs a system call anyway.
            if turns.is_multiple_of(16) && !alive() {
                return Err(WaitError::Gone);
            }
            if turns <= SPINS + YIELDS {
                rustix::thread::sched_yield();
            } else {
                std::thread::sleep(nap);
                nap = (nap * 2).min(LAST_NAP);
            }
        }
    }

    /// [`Gseg::issue`] and [`Gseg::wait`].
    ///
    /// # Errors
    /// As both.
    pub fn execute(
        &self,
        cb: usize,
        instruction: &Instruction,
        alive: &dyn Fn() -> bool,
    ) -> Result<Status, WaitError> {
        self.issue(cb, instruction)?;
        self.wait(cb, alive)
    }

    /// Old value that the last atomic of a control block returned.
    ///
    /// # Errors
    /// As [`Gseg::issue`]; `NotConnected` after a reset of the device.
    pub fn avalue(&self, cb: usize) -> io::Result<u64> {
        let value = self.load(self.cb_at(cb)? + cb::AVALUE)?;
        self.before_reset().map(|()| value)
    }

    /// Smallest fill tag that the last instruction of a control block used; `u64::MAX` when it used none.
    ///
    /// # Errors
    /// As [`Gseg::avalue`].
    pub fn tag(&self, cb: usize) -> io::Result<u64> {
        let tag = self.load(self.cb_at(cb)? + map::CB_EXT_TAG)?;
        self.before_reset().map(|()| tag)
    }

    /// Copies into the data segment at byte `offset`.
    ///
    /// # Errors
    /// `InvalidInput` when it does not fit; the transport's error.
    pub fn ds_write(&self, offset: usize, data: &[u8]) -> io::Result<()> {
        let at = self.ds_at(offset, data.len())?;
        match &self.access {
            Access::Mapped { gseg, .. } => {
                gseg.write_bytes(at, data);
                Ok(())
            }
            Access::Message(access) => access.write(at, data),
        }
    }

    /// Copies out of the data segment from byte `offset`.
    ///
    /// # Errors
    /// As [`Gseg::ds_write`]; `NotConnected` after a reset of the device.
    pub fn ds_read(&self, offset: usize, data: &mut [u8]) -> io::Result<()> {
        let at = self.ds_at(offset, data.len())?;
        match &self.access {
            Access::Mapped { gseg, .. } => {
                gseg.read_bytes(at, data);
                self.before_reset()
            }
            Access::Message(access) => access.read(at, data),
        }
    }
}
