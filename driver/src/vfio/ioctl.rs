//! VFIO's ioctls. Numbers and structures: `include/uapi/linux/vfio.h`, section "VFIO API".
//!
//! Every structure begins with its own size (`argsz`), which is what the kernel reads and writes at most.
#![allow(unsafe_code)] // ioctls have no safe wrapper in rustix; confined to this file

use std::ffi::{CStr, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio;

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const fn number(n: u8) -> Opcode {
    opcode::none(vfio::VFIO_TYPE, vfio::VFIO_BASE as u8 + n)
}

const GET_API_VERSION: Opcode = number(0);
const CHECK_EXTENSION: Opcode = number(1);
const SET_IOMMU: Opcode = number(2);
const GROUP_GET_STATUS: Opcode = number(3);
const GROUP_SET_CONTAINER: Opcode = number(4);
const GROUP_GET_DEVICE_FD: Opcode = number(6);
const DEVICE_GET_INFO: Opcode = number(7);
const DEVICE_GET_REGION_INFO: Opcode = number(8);
const DEVICE_GET_IRQ_INFO: Opcode = number(9);
const DEVICE_SET_IRQS: Opcode = number(10);
const DEVICE_RESET: Opcode = number(11);
const IOMMU_MAP_DMA: Opcode = number(13);
const IOMMU_UNMAP_DMA: Opcode = number(14);
const DEVICE_IOEVENTFD: Opcode = number(16);

/// An ioctl whose result is a number.
struct Call {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the opcodes of this file take what `argument` is made from below: a number, or a pointer to memory
// that is valid for the call and for all that the kernel writes.
unsafe impl Ioctl for Call {
    type Output = IoctlOutput;
    // Some change the structure.
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        self.opcode
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<IoctlOutput> {
        Ok(output)
    }
}

/// One whose argument is a number (or none).
fn by_value(fd: impl AsFd, opcode: Opcode, argument: usize) -> io::Result<IoctlOutput> {
    let argument = std::ptr::without_provenance_mut(argument);
    // SAFETY: only for opcodes whose argument is no pointer.
    Ok(unsafe { ioctl(fd, Call { opcode, argument }) }?)
}

/// One whose argument is a structure of plain numbers that begins with `argsz`.
fn by_reference<T>(fd: impl AsFd, opcode: Opcode, argument: &mut T) -> io::Result<IoctlOutput> {
    let argument = std::ptr::from_mut(argument).cast();
    // SAFETY: callers pair the opcode with its structure, whose `argsz` is its size, and any bits are valid in it.
    Ok(unsafe { ioctl(fd, Call { opcode, argument }) }?)
}

/// The same with more behind the structure: `argsz` is the length in bytes.
fn by_words(fd: impl AsFd, opcode: Opcode, argument: &mut [u32]) -> io::Result<IoctlOutput> {
    let size = size_of_val(argument);
    assert!(
        argument.first().is_some_and(|argsz| *argsz as usize <= size),
        "argsz within the buffer"
    );
    let argument = argument.as_mut_ptr().cast();
    // SAFETY: the kernel reads and writes at most `argsz` bytes, which the buffer has by the assertion.
    Ok(unsafe { ioctl(fd, Call { opcode, argument }) }?)
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a small structure")
}

/// Whether the kernel's API is the one of this file and has type 1 IOMMUs, version 2.
pub(super) fn container_is_usable(container: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(
        by_value(container, GET_API_VERSION, 0)? == vfio::VFIO_API_VERSION as IoctlOutput
            && by_value(container, CHECK_EXTENSION, vfio::VFIO_TYPE1v2_IOMMU as usize)? == 1,
    )
}

/// Whether every device of the group is with a VFIO driver, or with none.
pub(super) fn group_is_viable(group: BorrowedFd<'_>) -> io::Result<bool> {
    let mut status = vfio::vfio_group_status {
        argsz: size_of_u32::<vfio::vfio_group_status>(),
        flags: 0,
    };
    by_reference(group, GROUP_GET_STATUS, &mut status)?;
    Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Puts a group into a container and gives that an IOMMU.
pub(super) fn join(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd = container.as_raw_fd();
    by_reference(group, GROUP_SET_CONTAINER, &mut fd)?;
    by_value(container, SET_IOMMU, vfio::VFIO_TYPE1v2_IOMMU as usize)?;
    Ok(())
}

/// Opens a device of a group.
pub(super) fn device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let call = Call {
        opcode: GROUP_GET_DEVICE_FD,
        argument: name.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the argument is a string with its end, which the kernel only reads.
    let fd = unsafe { ioctl(group, call) }?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the device is.
pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio::vfio_device_info> {
    let mut info = vfio::vfio_device_info {
        argsz: size_of_u32::<vfio::vfio_device_info>(),
        ..Default::default()
    };
    by_reference(device, DEVICE_GET_INFO, &mut info)?;
    Ok(info)
}

/// A region, as the words of `struct vfio_region_info` and its capabilities.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u32>> {
    /// Far more than a device has capabilities.
    const MOST: u32 = 1 << 16;
    let mut size = size_of_u32::<vfio::vfio_region_info>();
    loop {
        let mut words = vec![0u32; size as usize / 4];
        (words[0], words[2]) = (size, index);
        by_words(device, DEVICE_GET_REGION_INFO, &mut words)?;
        if words[0] <= size {
            return Ok(words);
        }
        if words[0] > MOST {
            return Err(io::Error::other(format!(
                "region {index} is described by {} bytes",
                words[0]
            )));
        }
        size = words[0].next_multiple_of(4);
    }
}

/// Number of interrupts of an index.
pub(super) fn irq_count(device: BorrowedFd<'_>, index: u32) -> io::Result<u32> {
    let mut info = vfio::vfio_irq_info {
        argsz: size_of_u32::<vfio::vfio_irq_info>(),
        index,
        ..Default::default()
    };
    by_reference(device, DEVICE_GET_IRQ_INFO, &mut info)?;
    Ok(info.count)
}

/// Routes interrupts from `start` on to eventfds; `None` = to nothing.
pub(super) fn set_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    eventfds: &[Option<BorrowedFd<'_>>],
) -> io::Result<()> {
    let count = u32::try_from(eventfds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = vec![0, flags, index, start, count];
    // A descriptor is an i32 of the same bits.
    words.extend(
        eventfds
            .iter()
            .map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()) as u32),
    );
    words[0] = u32::try_from(words.len() * 4).map_err(|_| io::ErrorKind::InvalidInput)?;
    by_words(device, DEVICE_SET_IRQS, &mut words)?;
    Ok(())
}

/// Switches an interrupt index off.
pub(super) fn disable(device: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let flags = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
    by_words(device, DEVICE_SET_IRQS, &mut [20, flags, index, 0, 0])?;
    Ok(())
}

/// Resets the device.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    by_value(device, DEVICE_RESET, 0)?;
    Ok(())
}

/// Makes a signal of `eventfd` a 4-byte write of `data` at an offset of the device's file.
pub(super) fn write_on_event(
    device: BorrowedFd<'_>,
    offset: u64,
    data: u32,
    eventfd: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut argument = vfio::vfio_device_ioeventfd {
        argsz: size_of_u32::<vfio::vfio_device_ioeventfd>(),
        flags: vfio::VFIO_DEVICE_IOEVENTFD_32,
        offset,
        data: data.into(),
        fd: eventfd.as_raw_fd(),
        reserved: 0,
    };
    by_reference(device, DEVICE_IOEVENTFD, &mut argument)?;
    Ok(())
}

/// Maps the pages that `[offset, offset + len)` of a file has *now* at `iova`; the kernel holds them until they
/// are unmapped, whatever becomes of the file.
pub(super) fn map_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    len: u64,
    file: BorrowedFd<'_>,
    offset: u64,
    (read, write): (bool, bool),
) -> io::Result<()> {
    let size = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut prot = ProtFlags::empty();
    prot.set(ProtFlags::READ, read);
    prot.set(ProtFlags::WRITE, write);
    // SAFETY: no address is asked for, so no existing mapping is replaced.
    let at = unsafe { mmap(std::ptr::null_mut(), size, prot, MapFlags::SHARED, file, offset) }?;
    let mut flags = 0;
    for (right, flag) in [
        (read, vfio::VFIO_DMA_MAP_FLAG_READ),
        (write, vfio::VFIO_DMA_MAP_FLAG_WRITE),
    ] {
        if right {
            flags |= flag;
        }
    }
    let mut argument = vfio::vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio::vfio_iommu_type1_dma_map>(),
        flags,
        vaddr: at.addr() as u64,
        iova,
        size: len,
    };
    let mapped = by_reference(container, IOMMU_MAP_DMA, &mut argument);
    // The pages are held now; the address was only a name for them.
    // SAFETY: mapped above, and nobody knows the address.
    unsafe { munmap(at, size) }?;
    mapped?;
    Ok(())
}

/// Takes `[iova, iova + len)` away; says how many bytes were mapped there.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, len: u64) -> io::Result<u64> {
    let mut argument = vfio::vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio::vfio_iommu_type1_dma_unmap>(),
        iova,
        size: len,
        ..Default::default()
    };
    by_reference(container, IOMMU_UNMAP_DMA, &mut argument)?;
    Ok(argument.size)
}
