//! The two userfaultfd ioctls that the daemon uses. Numbers: `include/uapi/linux/userfaultfd.h`.
// Reason: ioctls have no safe wrapper in rustix.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Setter, Updater, ioctl, opcode};

/// UFFDIO of `_IO*(UFFDIO, ...)`.
const GROUP: u8 = 0xaa;

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeropage: i64,
}
const _: () = assert!(size_of::<Range>() == 16 && size_of::<ZeroPage>() == 32);

/// Puts a zero page at the 4 KiB page of `address` and wakes who waits for it.
///
/// # Errors
/// EAGAIN while the mapping is being changed (its event has not been read yet), EEXIST when a page is there
/// already, ENOENT when the range is not registered any more, ESRCH when the process is gone.
pub fn zero_page(uffd: impl AsFd, address: u64) -> io::Result<()> {
    let mut argument = ZeroPage {
        range: Range {
            start: address & !0xfff,
            len: 4096,
        },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: the opcode and the structure belong together (UFFDIO_ZEROPAGE), the structure outlives the call,
    // and the kernel changes only it and memory of the process behind the descriptor.
    unsafe {
        ioctl(
            uffd,
            Updater::<{ opcode::read_write::<ZeroPage>(GROUP, 4) }, _>::new(&mut argument),
        )?;
    }
    Ok(())
}

/// Wakes the threads that wait for the 4 KiB page of `address`; they fault again.
///
/// # Errors
/// EINVAL when the descriptor is not a userfaultfd's.
pub fn wake(uffd: impl AsFd, address: u64) -> io::Result<()> {
    let argument = Range {
        start: address & !0xfff,
        len: 4096,
    };
    // SAFETY: the opcode and the structure belong together (UFFDIO_WAKE is _IOR although the kernel only
    // reads the structure, which outlives the call).
    unsafe {
        ioctl(
            uffd,
            Setter::<{ opcode::read::<Range>(GROUP, 2) }, Range>::new(argument),
        )?;
    }
    Ok(())
}
