//! BAR accesses: words in mapped memory where the device offers that, messages elsewhere.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use protos::gru::pci;

use super::mapped::Mapping;
use super::stats::Counters;
use crate::backing::Backing;

const PAGE: u64 = 4096;

/// The chiplets' BAR, the status page and the doorbell.
///
/// Which areas are mapped is the device's choice (see [`protos::gru::doorbell`]): with `--doorbell trap` none, else
/// the used part of each GSEG, TFM and TGH, and TFH with `--map-tfh`; CCH and CBE never are. Nothing here depends on
/// the mode beyond that: `awake` says when to ring.
#[derive(Debug)]
pub(crate) struct Window {
    backing: Arc<dyn Backing>,
    /// By start.
    areas: Vec<Area>,
    status: Option<Mapping>,
    doorbell: Option<OwnedFd>,
    pub(crate) counters: Counters,
}

/// How a start found the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// It sees the start by itself, or has been told by an answered message.
    Awake,
    /// It slept, and has been rung for: nothing is to be expected before it has run.
    Rung,
}

#[derive(Debug)]
struct Area {
    start: u64,
    map: Mapping,
}

impl Window {
    pub(crate) fn new(backing: Arc<dyn Backing>) -> io::Result<Self> {
        let mut areas = Vec::new();
        if let Some((fd, base)) = backing.bar_fd(pci::BAR_CHIPLETS) {
            for (start, len) in backing.bar(pci::BAR_CHIPLETS).mappable {
                areas.push(Area {
                    start,
                    map: Mapping::new(fd, base + start, len, true)?,
                });
            }
            areas.sort_by_key(|area| area.start);
        }
        let mut status = None;
        if let Some((fd, base)) = backing.bar_fd(pci::BAR_DOORBELL) {
            let covers = |&(start, len): &(u64, u64)| {
                start <= pci::STATUS_OFFSET && pci::STATUS_OFFSET + PAGE <= start + len
            };
            if backing.bar(pci::BAR_DOORBELL).mappable.iter().any(covers) {
                let page = Mapping::new(fd, base + pci::STATUS_OFFSET, PAGE, false)?;
                if page.load(pci::STATUS_MAGIC) == pci::STATUS_MAGIC_VALUE {
                    status = Some(page);
                }
            }
        }
        let doorbell = backing.io_eventfd(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET)?;
        Ok(Self {
            backing,
            areas,
            status,
            doorbell,
            counters: Counters::default(),
        })
    }

    pub(crate) fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    pub(crate) fn doorbell(&self) -> Option<BorrowedFd<'_>> {
        self.doorbell.as_ref().map(AsFd::as_fd)
    }

    fn find(&self, offset: u64, bytes: u64) -> Option<(&Mapping, u64)> {
        let above = self.areas.partition_point(|a| a.start <= offset);
        let area = self.areas[..above].last()?;
        let at = offset - area.start;
        (at + bytes <= area.map.len()).then_some((&area.map, at))
    }

    /// Whether `[offset, offset + bytes)` is reached without a message.
    pub(crate) fn is_mapped(&self, offset: u64, bytes: u64) -> bool {
        self.find(offset, bytes).is_some()
    }

    /// Whether a start in mapped memory can be announced without an answered message.
    pub(crate) fn rings_without_message(&self) -> bool {
        self.doorbell.is_some()
    }

    pub(crate) fn load(&self, offset: u64) -> io::Result<u64> {
        if let Some((map, at)) = self.find(offset, 8) {
            return Ok(map.load(at));
        }
        let mut word = [0; 8];
        self.backing.read(pci::BAR_CHIPLETS, offset, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Stores an operand. Nothing starts by it.
    pub(crate) fn store(&self, offset: u64, value: u64) -> io::Result<()> {
        if let Some((map, at)) = self.find(offset, 8) {
            map.store(at, value);
            return Ok(());
        }
        self.backing
            .write_posted(pci::BAR_CHIPLETS, offset, &value.to_le_bytes())
    }

    /// Stores DW0 of a handle or control block: what it starts has been seen by the device, or will be
    /// before it sleeps again.
    pub(crate) fn start(&self, offset: u64, value: u64) -> io::Result<Device> {
        if let Some((map, at)) = self.find(offset, 8) {
            map.store(at, value);
            return self.ring();
        }
        self.backing
            .write(pci::BAR_CHIPLETS, offset, &value.to_le_bytes())?;
        Ok(Device::Awake)
    }

    /// Takes a word and leaves zero. By message this is a read and a write of zero: the device then clears
    /// only the bits that the read had returned (section 17), so nothing is lost in between.
    pub(crate) fn take(&self, offset: u64) -> io::Result<u64> {
        if let Some((map, at)) = self.find(offset, 8) {
            // The plain load first: most words are empty, and a load leaves the device's cache line alone.
            return Ok(if map.load(at) == 0 { 0 } else { map.swap(at, 0) });
        }
        let word = self.load(offset)?;
        if word != 0 {
            self.backing.write(pci::BAR_CHIPLETS, offset, &[0; 8])?;
        }
        Ok(word)
    }

    /// Replaces `old` by `new` unless the word has changed. By message the word is simply written: only
    /// for words that nobody else changes at that moment.
    pub(crate) fn replace(&self, offset: u64, old: u64, new: u64) -> io::Result<()> {
        if let Some((map, at)) = self.find(offset, 8) {
            map.replace(at, old, new);
            return Ok(());
        }
        self.backing.write(pci::BAR_CHIPLETS, offset, &new.to_le_bytes())
    }

    pub(crate) fn read_bytes(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if let Some((map, at)) = self.find(offset, data.len() as u64) {
            map.read_bytes(at, data);
            return Ok(());
        }
        self.backing.read(pci::BAR_CHIPLETS, offset, data)
    }

    pub(crate) fn write_bytes(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if let Some((map, at)) = self.find(offset, data.len() as u64) {
            map.write_bytes(at, data);
            return Ok(());
        }
        self.backing.write(pci::BAR_CHIPLETS, offset, data)
    }

    /// After a store that starts something in mapped memory: wake the device if it sleeps.
    ///
    /// The device lowers `awake`, fences and looks at everything once more before it sleeps; here the
    /// store, the fence, then the look at `awake`. One of the two sees the other.
    pub(crate) fn ring(&self) -> io::Result<Device> {
        fence(Ordering::SeqCst);
        if let Some(status) = &self.status
            && status.load32(pci::STATUS_AWAKE) != 0
        {
            return Ok(Device::Awake);
        }
        self.counters.rings.one();
        match &self.doorbell {
            Some(fd) => ring_eventfd(fd.as_fd())?,
            None => {
                let word = [1, 0, 0, 0];
                self.backing
                    .write_posted(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET, &word)?;
            }
        }
        Ok(Device::Rung)
    }

    /// Completed resets of the device, where the status page says.
    pub(crate) fn resets(&self) -> Option<u32> {
        self.status.as_ref().map(|s| s.load32(pci::STATUS_RESETS))
    }

    /// The same, by a message where the page is not mapped.
    pub(crate) fn ask_resets(&self) -> io::Result<u32> {
        if let Some(resets) = self.resets() {
            return Ok(resets);
        }
        let mut word = [0; 4];
        let at = pci::STATUS_OFFSET + pci::STATUS_RESETS;
        self.backing.read(pci::BAR_DOORBELL, at, &mut word)?;
        Ok(u32::from_le_bytes(word))
    }
}

/// Adds one to an eventfd. Cannot block: the counter would have to reach 2^64 - 2.
pub(crate) fn ring_eventfd(fd: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
