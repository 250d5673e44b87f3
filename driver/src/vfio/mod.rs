//! A device of `/dev/vfio`: bound to the kernel's vfio-pci, behind an IOMMU.
//!
//! Two things are not as they are over a socket:
//!
//! * **Memory is held.** The kernel looks a file's pages up when they are mapped for DMA and holds them until they are
//!   unmapped. What is discarded from the file afterwards (`MADV_REMOVE`, a punched hole, a truncation) leaves the
//!   file's page cache, and stays the device's page. [`Backing::holds_pages`] says so: who maps must unmap what a
//!   discard meets before the discard happens, and map again after it.
//! * **Areas of a BAR are mappable as a whole.** Behind QEMU some pages of them are memory and others are trapped
//!   registers; both are reached by loads and stores. An access to a trapped one is a message that QEMU waits for or
//!   posts.
//!
//! Not implemented: the character device of a single function with iommufd (`/dev/vfio/devices/`), INTx, error and
//! request interrupts, more than one group in a container.
//!
//! Numbers and meanings: `Documentation/driver-api/vfio.rst` and `include/uapi/linux/vfio.h`.

mod error;
mod ioctl;

pub use error::OpenError;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::backing::{Backing, BarInfo, DmaProt};

/// BARs of a type 0 header.
const BARS: usize = 6;
/// Where sysfs has PCI functions.
const SYSFS: &str = "/sys/bus/pci/devices";
/// What a read of a function that is gone gives.
const NO_VENDOR: [u8; 2] = [0xff; 2];

/// A region of the device's file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Region {
    bar: BarInfo,
    /// Offset of its first byte in the file.
    offset: u64,
}

impl Region {
    /// From `struct vfio_region_info` and its capabilities, as words.
    fn parse(words: &[u32]) -> io::Result<Self> {
        let bad = || io::Error::other("a region's description makes no sense");
        let word = |at: usize| words.get(at).copied().ok_or_else(bad);
        let long = |at: usize| Ok::<_, io::Error>(u64::from(word(at)?) | u64::from(word(at + 1)?) << 32);
        let (flags, cap, size, offset) = (word(1)?, word(3)?, long(4)?, long(6)?);
        let mut mappable = Vec::new();
        if flags & vfio::VFIO_REGION_INFO_FLAG_MMAP != 0 && size != 0 {
            mappable.push((0, size));
        }
        let mut next = match flags & vfio::VFIO_REGION_INFO_FLAG_CAPS {
            0 => 0,
            _ => cap,
        };
        // Each has its header's eight bytes for itself: more than fit mean a circle.
        for _ in 0..words.len() {
            if next == 0 {
                return Ok(Self {
                    bar: BarInfo { size, mappable },
                    offset,
                });
            }
            let at = next as usize / 4;
            if !next.is_multiple_of(4) || at < 8 {
                return Err(bad());
            }
            if word(at)? & 0xffff == vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                mappable.clear();
                for area in 0..word(at + 2)? as usize {
                    let (start, len) = (long(at + 4 + area * 4)?, long(at + 6 + area * 4)?);
                    if start.checked_add(len).is_none_or(|end| end > size) {
                        return Err(bad());
                    }
                    mappable.push((start, len));
                }
            }
            next = word(at + 1)?;
        }
        Err(bad())
    }
}

/// A function that is bound to vfio-pci.
#[derive(Debug)]
pub struct VfioDevice {
    address: String,
    device: File,
    container: OwnedFd,
    /// Open as long as the device is: it belongs to its opener.
    _group: OwnedFd,
    regions: [Region; BARS],
    /// Offset of config space in the device's file.
    config: u64,
    msix_vectors: u32,
    /// Whether MSI-X is on. Held while vectors are routed.
    msix_on: Mutex<bool>,
    /// The device has been seen to be gone.
    gone: AtomicBool,
}

/// Whether `text` is a full PCI address: `DDDD:BB:DD.F`.
fn is_address(text: &str) -> bool {
    let parts: Vec<&str> = text.split([':', '.']).collect();
    let [domain, bus, device, function] = parts[..] else {
        return false;
    };
    let hex = |part: &str, digits| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    (4..=8).contains(&domain.len())
        && hex(domain, domain.len())
        && hex(bus, 2)
        && hex(device, 2)
        && hex(function, 1)
        && text.find('.') == Some(text.len() - 2)
}

/// The last part of what a link of sysfs points to.
fn link_name(link: &Path) -> Option<String> {
    let target = std::fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn open(path: PathBuf) -> Result<OwnedFd, OpenError> {
    match File::options().read(true).write(true).open(&path) {
        Ok(file) => Ok(file.into()),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::PermissionDenied => OpenError::Permission(path),
            io::ErrorKind::ResourceBusy => OpenError::Busy(path),
            _ => OpenError::NoVfio {
                what: format!("{}: {error}", path.display()),
            },
        }),
    }
}

impl VfioDevice {
    /// Takes the function at a PCI address (`0000:00:05.0`).
    ///
    /// # Errors
    /// [`OpenError`] says what is missing.
    pub fn open(address: &str) -> Result<Self, OpenError> {
        if !is_address(address) {
            return Err(OpenError::Address(address.into()));
        }
        let address = address.to_ascii_lowercase();
        let sysfs = Path::new(SYSFS).join(&address);
        if !sysfs.exists() {
            return Err(OpenError::NoDevice(address));
        }
        let Some(group_name) = link_name(&sysfs.join("iommu_group")) else {
            return Err(OpenError::NoGroup(address));
        };
        let driver = link_name(&sysfs.join("driver"));
        if driver.as_deref() != Some("vfio-pci") {
            return Err(OpenError::NotBound { address, driver });
        }
        let fail = |what| {
            let address = address.clone();
            move |source| OpenError::Step {
                address,
                what,
                source,
            }
        };
        let container = open("/dev/vfio/vfio".into())?;
        if !ioctl::container_is_usable(container.as_fd()).map_err(fail("asking for the API's version"))? {
            return Err(OpenError::NoVfio {
                what: "the kernel has no type 1 IOMMU for VFIO".into(),
            });
        }
        let group = open(Path::new("/dev/vfio").join(&group_name))?;
        if !ioctl::group_is_viable(group.as_fd()).map_err(fail("asking for the group's status"))? {
            return Err(OpenError::NotViable {
                address,
                group: group_name,
            });
        }
        ioctl::join(group.as_fd(), container.as_fd()).map_err(|source| OpenError::Iommu {
            address: address.clone(),
            source,
        })?;
        let name = CString::new(address.as_str()).map_err(|_| OpenError::Address(address.clone()))?;
        let device = ioctl::device(group.as_fd(), &name).map_err(fail("opening the device"))?;
        let device = File::from(device);
        let info = ioctl::device_info(device.as_fd()).map_err(fail("VFIO_DEVICE_GET_INFO"))?;
        let region = |index: u32| -> Result<Region, OpenError> {
            if index >= info.num_regions {
                return Ok(Region::default());
            }
            ioctl::region_info(device.as_fd(), index)
                .and_then(|words| Region::parse(&words))
                .map_err(fail("VFIO_DEVICE_GET_REGION_INFO"))
        };
        let mut regions: [Region; BARS] = Default::default();
        for (index, slot) in (0u32..).zip(&mut regions) {
            *slot = region(index)?;
        }
        let config = region(vfio::VFIO_PCI_CONFIG_REGION_INDEX)?.offset;
        let msix_vectors = match info.num_irqs > vfio::VFIO_PCI_MSIX_IRQ_INDEX {
            true => ioctl::irq_count(device.as_fd(), vfio::VFIO_PCI_MSIX_IRQ_INDEX)
                .map_err(fail("VFIO_DEVICE_GET_IRQ_INFO"))?,
            false => 0,
        };
        Ok(Self {
            address,
            device,
            container,
            _group: group,
            regions,
            config,
            msix_vectors,
            msix_on: Mutex::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// Its PCI address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where an access is in the device's file.
    fn place(&self, bar: usize, offset: u64, len: usize) -> io::Result<u64> {
        let region = self.regions.get(bar).ok_or(Errno::INVAL)?;
        let end = offset.checked_add(len as u64).ok_or(Errno::INVAL)?;
        if end > region.bar.size {
            return Err(Errno::INVAL.into());
        }
        Ok(region.offset + offset)
    }
}

/// VFIO says EINVAL or ENOSPC where [`Backing::dma_map`] promises what is below; memory that may not be held gets
/// words.
fn explain_map(error: io::Error, len: u64) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOMEM) => io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!(
                "{len} bytes may not be held in memory; raise the limit of locked memory (ulimit -l, LimitMEMLOCK=), \
                 or run as root"
            ),
        ),
        _ => error,
    }
}

impl Backing for VfioDevice {
    fn bar(&self, bar: usize) -> BarInfo {
        self.regions.get(bar).map(|r| r.bar.clone()).unwrap_or_default()
    }

    fn bar_fd(&self, bar: usize) -> Option<(BorrowedFd<'_>, u64)> {
        let region = self.regions.get(bar).filter(|r| !r.bar.mappable.is_empty())?;
        Some((self.device.as_fd(), region.offset))
    }

    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.device
            .read_exact_at(data, self.place(bar, offset, data.len())?)
    }

    fn write(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.place(bar, offset, data.len())?;
        self.device.write_all_at(data, at)?;
        // A write may be posted anywhere on its way; a read of the same function comes after it.
        self.config_read(0, &mut [0; 4])
    }

    fn write_posted(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.device
            .write_all_at(data, self.place(bar, offset, data.len())?)
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.device.read_exact_at(data, self.config + offset)
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.device.write_all_at(data, self.config + offset)
    }

    fn msix_vectors(&self) -> u32 {
        self.msix_vectors
    }

    fn set_msix(&self, vector: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if vector >= self.msix_vectors {
            return Err(Errno::INVAL.into());
        }
        let device = self.device.as_fd();
        let mut on = self.msix_on.lock().unwrap_or_else(PoisonError::into_inner);
        if *on {
            return ioctl::set_eventfds(device, vfio::VFIO_PCI_MSIX_IRQ_INDEX, vector, &[eventfd]);
        }
        if eventfd.is_none() {
            return Ok(());
        }
        // The first call decides how many vectors are allocated, where they cannot be added later.
        let mut all = vec![None; self.msix_vectors as usize];
        all[vector as usize] = eventfd;
        ioctl::set_eventfds(device, vfio::VFIO_PCI_MSIX_IRQ_INDEX, 0, &all)?;
        *on = true;
        Ok(())
    }

    fn dma_map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>, offset: u64, prot: DmaProt) -> io::Result<()> {
        ioctl::map_dma(
            self.container.as_fd(),
            iova,
            len,
            fd,
            offset,
            (prot.read, prot.write),
        )
        .map_err(|error| explain_map(error, len))
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        // 0 bytes: nothing began in the range.
        match ioctl::unmap_dma(self.container.as_fd(), iova, len)? {
            0 => Err(Errno::NOENT.into()),
            _ => Ok(()),
        }
    }

    fn holds_pages(&self) -> bool {
        true
    }

    fn io_eventfd(&self, bar: usize, offset: u64) -> io::Result<Option<OwnedFd>> {
        let at = self.place(bar, offset, 4)?;
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        match ioctl::write_on_event(self.device.as_fd(), at, 1, fd.as_fd()) {
            Ok(()) => Ok(Some(fd)),
            // The kernel does not do it at that place (port I/O, the page of the MSI-X table), or not at all.
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::INVAL | Errno::NOTTY) => Ok(None),
                _ => Err(error),
            },
        }
    }

    fn reset(&self) -> io::Result<()> {
        let mut on = self.msix_on.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *on) {
            ioctl::disable(self.device.as_fd(), vfio::VFIO_PCI_MSIX_IRQ_INDEX)?;
        }
        ioctl::reset(self.device.as_fd())
    }

    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn alive(&self) -> bool {
        if self.gone.load(Ordering::Relaxed) {
            return false;
        }
        let mut vendor = [0; 2];
        let there = self.config_read(0, &mut vendor).is_ok() && vendor != NO_VENDOR;
        if !there {
            self.gone.store(true, Ordering::Relaxed);
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [u32; 8] = [32, 7, 2, 0, 0x1000_0000, 0, 0, 0x200];

    #[test]
    fn test_region_when_mappable_without_areas_is_mappable_as_a_whole() {
        let region = Region::parse(&WHOLE).unwrap();
        assert_eq!(region.offset, 0x200 << 32);
        assert_eq!(region.bar.size, 0x1000_0000);
        assert_eq!(region.bar.mappable, [(0, 0x1000_0000)]);
        let mut unmappable = WHOLE;
        unmappable[1] = 3;
        assert!(Region::parse(&unmappable).unwrap().bar.mappable.is_empty());
    }

    #[test]
    fn test_region_when_it_has_sparse_areas_is_mappable_there() {
        let mut words = WHOLE.to_vec();
        (words[1], words[3]) = (0xf, 32);
        // An unknown capability, then the areas.
        words.extend([
            0x1_0009, 40, 0x1_0001, 0, 2, 0, 0x1000, 0, 0x2000, 0, 0x8000, 0, 0x1000, 0,
        ]);
        let region = Region::parse(&words).unwrap();
        assert_eq!(region.bar.mappable, [(0x1000, 0x2000), (0x8000, 0x1000)]);
    }

    #[test]
    fn test_region_when_its_description_is_wrong_is_refused() {
        let with = |cap: u32, more: &[u32]| {
            let mut words = WHOLE.to_vec();
            (words[1], words[3]) = (0xf, cap);
            words.extend(more);
            Region::parse(&words)
        };
        assert!(Region::parse(&WHOLE[..6]).is_err(), "short");
        assert!(with(4, &[]).is_err(), "inside the structure");
        assert!(with(34, &[0, 0]).is_err(), "not aligned");
        assert!(with(32, &[0x1_0009, 32]).is_err(), "a circle");
        assert!(
            with(32, &[0x1_0001, 0, u32::MAX, 0]).is_err(),
            "areas without end"
        );
        let outside = [0x1_0001, 0, 1, 0, 0, 0, 0x1000, 1];
        assert!(with(32, &outside).is_err(), "longer than the region");
    }

    #[test]
    fn test_address_when_not_one_of_pci_is_refused() {
        assert!(is_address("0000:00:05.0") && is_address("10000:e1:1f.7"));
        for text in [
            "",
            "00:05.0",
            "0000:00:05",
            "0000:00:05:0",
            "../../x:00:05.0",
            "0000:00:5.0",
        ] {
            assert!(!is_address(text), "{text}");
            assert!(
                matches!(VfioDevice::open(text), Err(OpenError::Address(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn test_open_when_no_such_device_says_so() {
        let error = VfioDevice::open("0000:ff:1f.7").unwrap_err();
        assert!(
            error.to_string().contains("no PCI device 0000:ff:1f.7"),
            "{error}"
        );
    }

    #[test]
    fn test_error_when_not_bound_says_the_commands() {
        let error = OpenError::NotBound {
            address: "0000:00:05.0".into(),
            driver: Some("gru".into()),
        };
        let text = error.to_string();
        for part in [
            "modprobe vfio-pci",
            "driver_override",
            "bound to vfio-pci but to gru",
            "driver/unbind",
            "drivers_probe",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
