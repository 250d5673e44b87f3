//! Driver of the GRU: contexts, translation misses, flushes.
//!
//! * [`Gru::open`] takes a device behind a [`Backing`] and starts the fault service.
//! * [`Gru::address_space`] names who resolves addresses (a [`Pager`]); [`Mm::create_context`] allocates
//!   control blocks and data segment in it; [`Mm::flush`] removes translations.
//! * [`user`] is what an application does with a context: instructions and data; [`message_queue`] sends and
//!   receives messages.
//!
//! Section numbers in this module are those of the project's GRU hardware reference.
//!
//! Not implemented: stealing of contexts when a chiplet is full (creation fails and says what is in use),
//! save and restore of unloaded contexts, kernel contexts (completion interrupts, unmapped mode).

mod asid;
mod chiplet;
mod context;
mod core;
mod error;
mod fault;
mod flush;
mod mapped;
pub mod message_queue;
mod mm;
mod stats;
#[cfg(test)]
mod tests;
pub mod user;
mod window;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use protos::gru::map::{self, CHIPLETS, CONTEXTS, TFMS, TGHS};
use protos::gru::pci;

use self::core::{Core, handle, lock};
use self::window::Window;
use crate::backing::Backing;

pub use context::{CallOs, Context, ContextOptions, ExceptionDetail, FaultMode};
pub use error::{GruError, HandleKind, Stall, StallAction};
pub use mm::{Fault, Mm, Pager, Translation};
pub use stats::GruStats;

/// Config space: command register, memory decoding and bus mastering.
const COMMAND: u64 = 4;
const COMMAND_MEMORY_AND_BUS_MASTER: u16 = 1 << 1 | 1 << 2;

/// Asked about a stall; see [`GruOptions::on_stall`].
pub type OnStall = Box<dyn Fn(Stall) -> StallAction + Send + Sync>;

/// How a device is driven.
pub struct GruOptions {
    /// Asked when a handle stays ACTIVE longer than `stall_after`, and again each time that much has passed.
    /// Called on the thread that waits, which may be in the middle of a flush. Without it the driver logs and
    /// waits on; it notices by itself when the device process ends or the device is reset.
    pub on_stall: Option<OnStall>,
    /// See `on_stall`. Must not be zero.
    pub stall_after: Duration,
    /// Pages that a BCOPY's miss brings in ahead (0 = none).
    pub preload: u32,
    /// Fault maps (and vectors) used on each chiplet, 1 to 16; context n reports to map n modulo this.
    pub fault_maps: u8,
    /// First ASID: a multiple of 8, at least 8.
    pub asid_first: u32,
    /// One past the last ASID: leaves room for at least 17 blocks of 8, at most 0xfffff0. A small value makes
    /// generations end quickly.
    pub asid_end: u32,
    /// Reset the device first, so that nothing of an earlier driver is left.
    pub reset: bool,
}

impl Default for GruOptions {
    fn default() -> Self {
        Self {
            on_stall: None,
            stall_after: Duration::from_secs(5),
            preload: 0,
            fault_maps: 4,
            asid_first: asid::FIRST,
            asid_end: asid::END,
            reset: true,
        }
    }
}

impl fmt::Debug for GruOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GruOptions")
            .field("on_stall", &self.on_stall.is_some())
            .field("stall_after", &self.stall_after)
            .field("preload", &self.preload)
            .field("fault_maps", &self.fault_maps)
            .field("asids", &(self.asid_first..self.asid_end))
            .field("reset", &self.reset)
            .finish()
    }
}

impl GruOptions {
    fn check(&self) -> Result<(), GruError> {
        let argument = |what, value: u64, allowed| Err(GruError::Argument { what, value, allowed });
        if self.stall_after.is_zero() {
            return argument("stall_after", 0, "more than zero");
        }
        if !(1..=TFMS as u8).contains(&self.fault_maps) {
            return argument("fault_maps", self.fault_maps.into(), "1 to 16");
        }
        if self.asid_first < asid::FIRST || !self.asid_first.is_multiple_of(asid::STEP) {
            return argument("asid_first", self.asid_first.into(), "multiples of 8 from 8");
        }
        // Every context of a chiplet may hold one, and one more has to be free.
        let least = self.asid_first.saturating_add(asid::STEP * (CONTEXTS as u32 + 1));
        if self.asid_end < least || self.asid_end > asid::END {
            return argument(
                "asid_end",
                self.asid_end.into(),
                "from asid_first + 136 to 0xfffff0",
            );
        }
        Ok(())
    }

    fn ask(&self, stall: Stall) -> StallAction {
        match &self.on_stall {
            Some(ask) => ask(stall),
            None => {
                tracing::warn!(?stall, "the GRU does not answer; waiting");
                StallAction::KeepWaiting
            }
        }
    }
}

/// An open device. Dropping the last reference stops the fault service.
#[derive(Debug)]
pub struct Gru {
    core: Arc<Core>,
    service: Mutex<Option<JoinHandle<()>>>,
}

impl Gru {
    /// Takes the device: checks that it is a GRU, resets it, enables memory and bus mastering, maps what can
    /// be mapped, routes the fault maps' vectors, starts the thread `gru-faults`.
    ///
    /// # Errors
    /// `NotAGru`, `Bar`, `Argument`, or the transport's error.
    pub fn open(backing: Arc<dyn Backing>, options: GruOptions) -> Result<Arc<Self>, GruError> {
        options.check()?;
        let io = |what| move |source| GruError::Io { what, source };
        identify(&*backing)?;
        if options.reset {
            backing.reset().map_err(io("reset"))?;
        }
        let mut command = [0; 2];
        backing
            .config_read(COMMAND, &mut command)
            .map_err(io("reading the command register"))?;
        let command = u16::from_le_bytes(command) | COMMAND_MEMORY_AND_BUS_MASTER;
        backing
            .config_write(COMMAND, &command.to_le_bytes())
            .map_err(io("writing the command register"))?;
        let window = Window::new(Arc::clone(&backing)).map_err(io("mapping the BARs"))?;
        let core = Arc::new(Core::new(window, options)?);
        let vectors = route(&*backing, core.options.fault_maps)?;
        let service = {
            let core = Arc::clone(&core);
            std::thread::Builder::new()
                .name("gru-faults".into())
                .spawn(move || fault::run(&core, &vectors))
                .map_err(io("starting the fault service"))?
        };
        Ok(Arc::new(Self {
            core,
            service: Mutex::new(Some(service)),
        }))
    }

    /// A new address space, whose addresses `pager` resolves.
    #[must_use]
    pub fn address_space(self: &Arc<Self>, pager: Arc<dyn Pager>) -> Arc<Mm> {
        Mm::new(Arc::clone(self), pager)
    }

    /// The device behind this driver.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        self.core.window.backing()
    }

    /// Counters since [`Gru::open`].
    #[must_use]
    pub fn stats(&self) -> GruStats {
        self.core.window.counters.snapshot()
    }

    /// Whether the flush handles are in mapped memory and the device can be woken without an answered
    /// message.
    #[must_use]
    pub fn flush_is_nonsleeping(&self) -> bool {
        let window = &self.core.window;
        let last = TGHS as u64 * map::HANDLE_STRIDE;
        window.rings_without_message()
            && (0..CHIPLETS).all(|c| window.is_mapped(handle(c, map::TGH, 0), last))
    }

    /// Whether users can map GSEGs.
    #[must_use]
    pub fn gseg_is_mappable(&self) -> bool {
        self.doorbell().is_some() && self.core.window.is_mapped(core::gseg(0, 0), map::GSEG_MAPPABLE)
    }

    /// File of the chiplets' BAR and the file offset of BAR offset 0, when users can map GSEGs.
    #[must_use]
    pub fn gseg_file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        if !self.gseg_is_mappable() {
            return None;
        }
        self.backing().bar_fd(pci::BAR_CHIPLETS)
    }

    /// File and file offset of the status page (awake and reset words), when it can be mapped.
    #[must_use]
    pub fn status_page(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.core.window.resets()?;
        let (fd, base) = self.backing().bar_fd(pci::BAR_DOORBELL)?;
        Some((fd, base + pci::STATUS_OFFSET))
    }

    /// The eventfd that wakes the device, when it has one.
    #[must_use]
    pub fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        self.core.window.doorbell()
    }

    /// Whether the device of [`Gru::open`] has ended: its process is gone, or it was reset.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.core.is_gone()
    }

    /// Whether the device would compare what it does with a log of changes ([`protos::bridge::changes`]), and has none.
    ///
    /// # Errors
    /// The transport's.
    pub fn wants_changes(&self) -> std::io::Result<bool> {
        let mut word = [0; 8];
        self.backing()
            .read(pci::BAR_DOORBELL, pci::CHANGE_LOG_OFFSET, &mut word)?;
        Ok(u64::from_le_bytes(word) == pci::CHANGE_LOG_WANTED)
    }

    /// Names it: the log is mapped for the device at `iova`, and nothing has been translated yet.
    ///
    /// # Errors
    /// The transport's.
    pub fn name_changes(&self, iova: u64) -> std::io::Result<()> {
        let word = iova.to_le_bytes();
        self.backing()
            .write(pci::BAR_DOORBELL, pci::CHANGE_LOG_OFFSET, &word)
    }

    /// What is in use, in words, one line a chiplet.
    #[must_use]
    pub fn resources_in_use(&self) -> Vec<String> {
        (0..CHIPLETS).map(|c| self.core.chiplets[c].in_use(c)).collect()
    }
}

impl Drop for Gru {
    fn drop(&mut self) {
        self.core.stop.store(true, Ordering::Release);
        self.core.kick();
        if let Some(service) = lock(&self.service).take()
            // The last reference may have been a pager's, dropped by the service itself.
            && service.thread().id() != std::thread::current().id()
            && service.join().is_err()
        {
            tracing::error!("the GRU fault service had panicked");
        }
        if self.core.is_gone() {
            return;
        }
        for (chiplet, fault_map) in vector_numbers(self.core.options.fault_maps) {
            if let Err(e) = self.backing().set_msix(vector(chiplet, fault_map), None) {
                tracing::debug!("releasing a vector of the GRU: {e}");
            }
        }
    }
}

fn identify(backing: &dyn Backing) -> Result<(), GruError> {
    let mut id = [0; 4];
    backing.config_read(0, &mut id).map_err(|source| GruError::Io {
        what: "reading the PCI identity",
        source,
    })?;
    let [v0, v1, d0, d1] = id;
    let (vendor, device) = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1]));
    if (vendor, device) != (pci::VENDOR, pci::DEVICE) {
        return Err(GruError::NotAGru { vendor, device });
    }
    for (bar, wanted) in [
        (pci::BAR_DOORBELL, pci::BAR_DOORBELL_SIZE),
        (pci::BAR_CHIPLETS, pci::BAR_CHIPLETS_SIZE),
    ] {
        let size = backing.bar(bar).size;
        if size < wanted {
            return Err(GruError::Bar { bar, size, wanted });
        }
    }
    Ok(())
}

/// Vector of a fault map: chiplet * 16 + map.
fn vector(chiplet: usize, fault_map: usize) -> u32 {
    (chiplet * TFMS + fault_map) as u32
}

fn vector_numbers(fault_maps: u8) -> impl Iterator<Item = (usize, usize)> {
    (0..CHIPLETS).flat_map(move |c| (0..usize::from(fault_maps)).map(move |m| (c, m)))
}

fn route(backing: &dyn Backing, fault_maps: u8) -> Result<Vec<fault::Vector>, GruError> {
    vector_numbers(fault_maps)
        .map(|(chiplet, fault_map)| {
            let event = fault::event()?;
            backing.set_msix(vector(chiplet, fault_map), Some(event.as_fd()))?;
            Ok(fault::Vector {
                chiplet,
                fault_map,
                event,
            })
        })
        .collect::<std::io::Result<_>>()
        .map_err(|source| GruError::Io {
            what: "routing the fault vectors",
            source,
        })
}
