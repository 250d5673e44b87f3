//! What every part of the driver shares: the window, the options, the state of the chiplets, and the one
//! loop that waits for a handle.

use std::hint::spin_loop;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protos::gru::HandleStatus;
use protos::gru::map::{self, CBRS, CHIPLET_SIZE, CHIPLETS, HANDLE_STRIDE, TGHS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::chiplet::Chiplet;
use super::error::{GruError, HandleKind, Stall, StallAction};
use super::window::{Device, Window};
use super::{GruOptions, window};

/// Iterations that only spin before the processor is given up: less than a microsecond. A device that is awake on
/// another processor has answered by then, or soon after (a yield to nobody takes about as long as ten turns). One that
/// has just been woken has not, and may wait for this processor: there it is given up at once.
const SPINS_BEFORE_YIELD: u32 = 20;
/// How often a wait looks whether the device still exists.
const LIVENESS_PERIOD: Duration = Duration::from_millis(10);

/// Shared by the public objects and the fault service.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) window: Window,
    pub(crate) options: GruOptions,
    pub(crate) chiplets: [Chiplet; CHIPLETS],
    /// Wakes the fault service: deferred misses, a context being closed, stop.
    pub(crate) kick: OwnedFd,
    pub(crate) stop: AtomicBool,
    dead: AtomicBool,
    resets_at_open: u32,
}

/// Misses that wait for an invalidation to end, one bit for each CBR of a chiplet.
#[derive(Debug, Default)]
pub(crate) struct CbrSet([AtomicU64; CBRS / 64]);

impl CbrSet {
    pub(crate) fn insert(&self, cbr: usize) {
        self.0[cbr / 64].fetch_or(1 << (cbr % 64), Ordering::SeqCst);
    }
    /// Takes every member.
    pub(crate) fn take(&self) -> [u64; CBRS / 64] {
        std::array::from_fn(|w| self.0[w].swap(0, Ordering::SeqCst))
    }
}

/// CBR numbers of bit words as in a TFM.
pub(crate) fn cbrs_of(words: [u64; CBRS / 64]) -> impl Iterator<Item = usize> {
    words.into_iter().enumerate().flat_map(|(w, mut bits)| {
        std::iter::from_fn(move || {
            (bits != 0).then(|| {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                w * 64 + bit
            })
        })
    })
}

/// A lock whose holder panicked is still consistent: every critical section here stores whole values.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Offset in the chiplets' BAR of handle `index` of a region (one of `map::{TFM, TGH, CBE, TFH, CCH}`).
pub(crate) fn handle(chiplet: usize, region: u64, index: usize) -> u64 {
    chiplet as u64 * CHIPLET_SIZE + region + index as u64 * HANDLE_STRIDE
}

/// Offset in the chiplets' BAR of a context's GSEG.
pub(crate) fn gseg(chiplet: usize, context: usize) -> u64 {
    chiplet as u64 * CHIPLET_SIZE + context as u64 * map::GSEG_STRIDE
}

/// Offset in the chiplets' BAR of a handle of a kind.
fn offset_of(kind: HandleKind, chiplet: usize, index: usize) -> u64 {
    let region = match kind {
        HandleKind::Tgh => map::TGH,
        HandleKind::Cch => map::CCH,
        HandleKind::Tfh => map::TFH,
    };
    handle(chiplet, region, index)
}

impl Core {
    pub(crate) fn new(window: Window, options: GruOptions) -> Result<Self, GruError> {
        let kick = super::fault::event().map_err(|source| GruError::Io {
            what: "eventfd",
            source,
        })?;
        let resets_at_open = window.ask_resets().map_err(|source| GruError::Io {
            what: "reading the status page",
            source,
        })?;
        Ok(Self {
            resets_at_open,
            chiplets: std::array::from_fn(|_| Chiplet::new(&options)),
            window,
            options,
            kick,
            stop: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        })
    }

    /// Wakes the fault service. Neither sleeps nor allocates.
    pub(crate) fn kick(&self) {
        // The only possible failures are those of a closed descriptor, which this value owns.
        let rung = window::ring_eventfd(self.kick.as_fd());
        assert!(rung.is_ok(), "eventfd of this process: {rung:?}");
    }

    /// Whether somebody has already found out that the device has ended. One load.
    pub(crate) fn is_known_gone(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Whether the device of `open` has ended: its process is gone, or it was reset since. Sticky.
    pub(crate) fn is_gone(&self) -> bool {
        if self.is_known_gone() {
            return true;
        }
        let reset = self.window.resets().is_some_and(|r| r != self.resets_at_open);
        let backing = self.window.backing();
        let ended = || match backing.pidfd() {
            Some(pidfd) => {
                let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
                poll(
                    &mut fds,
                    Some(&Timespec {
                        tv_sec: 0,
                        tv_nsec: 0,
                    }),
                )
                .is_ok_and(|n| n > 0)
            }
            None => !backing.alive(),
        };
        if reset || ended() {
            self.set_gone();
            return true;
        }
        false
    }

    /// [`Core::is_gone`], also asking a device whose status page is not mapped. Sleeps.
    pub(crate) fn ask_gone(&self) -> bool {
        let reset = || self.window.ask_resets().is_ok_and(|r| r != self.resets_at_open);
        if !self.is_gone() && reset() {
            self.set_gone();
        }
        self.is_gone()
    }

    pub(crate) fn set_gone(&self) {
        if !self.dead.swap(true, Ordering::AcqRel) {
            tracing::warn!("GRU: the device is gone");
        }
    }

    /// An access of a path that may fail. A transport that has failed because the device ended is told
    /// apart from other errors.
    pub(crate) fn io<T>(&self, what: &'static str, result: io::Result<T>) -> Result<T, GruError> {
        result.map_err(|source| {
            if self.is_gone() {
                GruError::DeviceGone
            } else {
                GruError::Io { what, source }
            }
        })
    }

    /// Waits until a handle's status leaves ACTIVE and returns its DW0.
    ///
    /// Does not sleep when the handle is mapped: it spins, then yields (both are counted). It never gives
    /// up: the only ways out are the device's answer and the proof that the device has ended. A transport
    /// that has failed is such a wait too, because the device may still be running.
    pub(crate) fn wait(
        &self,
        kind: HandleKind,
        chiplet: usize,
        index: usize,
        device: Device,
    ) -> Result<u64, GruError> {
        let offset = offset_of(kind, chiplet, index);
        let mut patience = Patience::new(kind, chiplet, index);
        if device == Device::Rung {
            patience.spinning = 0;
        }
        loop {
            let transport = match self.window.load(offset) {
                Ok(word) if HandleStatus((word >> 16 & 3) as u8) != HandleStatus::ACTIVE => {
                    patience.account(self);
                    return Ok(word);
                }
                Ok(_) => None,
                Err(e) => Some(e.kind()),
            };
            if patience.pause(self, transport) {
                return Err(GruError::DeviceGone);
            }
        }
    }
}

/// State of one wait: spin, yield, look at the clock, ask.
#[derive(Debug)]
pub(crate) struct Patience {
    kind: HandleKind,
    chiplet: usize,
    index: usize,
    since: Option<Instant>,
    /// Turns that it may still spin.
    spinning: u32,
    spins: u32,
    yields: u32,
    next_look: Duration,
    next_stall: Duration,
}

impl Patience {
    pub(crate) fn new(kind: HandleKind, chiplet: usize, index: usize) -> Self {
        Self {
            kind,
            chiplet,
            index,
            since: None,
            spinning: SPINS_BEFORE_YIELD,
            spins: 0,
            yields: 0,
            next_look: LIVENESS_PERIOD,
            next_stall: Duration::ZERO,
        }
    }

    /// One turn of waiting; true when the device is gone.
    pub(crate) fn pause(&mut self, core: &Core, transport: Option<io::ErrorKind>) -> bool {
        if self.spinning != 0 {
            self.spinning -= 1;
            self.spins += 1;
            spin_loop();
            return transport.is_some() && core.is_gone();
        }
        if core.is_known_gone() {
            self.account(core);
            return true;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        rustix::thread::sched_yield();
        self.yields += 1;
        let waited = since.elapsed();
        if waited >= self.next_look {
            self.next_look = waited + LIVENESS_PERIOD;
            if core.is_gone() {
                self.account(core);
                return true;
            }
        }
        if self.next_stall.is_zero() {
            self.next_stall = core.options.stall_after;
        }
        if waited >= self.next_stall {
            self.next_stall = waited + core.options.stall_after;
            core.window.counters.stalls.one();
            let stall = Stall {
                kind: self.kind,
                chiplet: self.chiplet,
                index: self.index,
                waited,
                transport,
            };
            if core.options.ask(stall) == StallAction::DeviceGone {
                core.set_gone();
                self.account(core);
                return true;
            }
        }
        false
    }

    /// Adds the turns to the counters, once.
    pub(crate) fn account(&mut self, core: &Core) {
        core.window.counters.spins.add(u64::from(self.spins));
        core.window.counters.yields.add(u64::from(self.yields));
        (self.spins, self.yields) = (0, 0);
    }
}

/// Software's claims of a chiplet's TGHs. Inside one process this replaces the `delresp` bit.
#[derive(Debug, Default)]
pub(crate) struct TghClaims([AtomicBool; TGHS]);

impl TghClaims {
    /// Takes a free handle, beginning at the caller's own.
    pub(crate) fn try_take(&self, first: usize) -> Option<usize> {
        (0..TGHS).map(|i| (first + i) % TGHS).find(|&i| {
            !self.0[i].load(Ordering::Relaxed)
                && self.0[i]
                    .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
        })
    }
    /// Gives a handle back.
    pub(crate) fn put(&self, index: usize) {
        self.0[index].store(false, Ordering::Release);
    }
}
