//! Writing an eventfd that belongs to somebody else, without ever waiting.
#![allow(unsafe_code)] // io_setup, io_submit, io_getevents: rustix has none of them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Operations of the context; completions that are not fetched yet take places, too.
const PLACES: libc::c_long = 128;
/// `IOCB_CMD_POLL` (`<linux/aio_abi.h>`).
const CMD_POLL: u16 = 5;
/// `IOCB_FLAG_RESFD`: signal an eventfd when the operation is complete.
const FLAG_RESFD: u32 = 1;

/// `struct iocb` of `<linux/aio_abi.h>`, for CMD_POLL.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    /// `aio_key` and `aio_rw_flags`, in an order that depends on the byte order; both 0.
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fildes: u32,
    /// Poll events.
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

/// An operation that completes at once, and whose completion signals an eventfd.
///
/// A write to an eventfd waits while the counter is full, unless the descriptor is non-blocking, and that
/// flag is the client's: shared with it, and its to change at any moment. Looking first whether there is
/// room leaves a gap in which the client can fill it. The kernel's own way of signalling (`eventfd_signal`)
/// never waits; the completion of an asynchronous operation goes that way.
#[derive(Debug)]
struct Completions {
    context: libc::c_ulong,
    /// Always readable: polling it is the operation.
    readable: OwnedFd,
}

impl Completions {
    /// One for the process, never destroyed. `None` when the kernel has no asynchronous I/O (or no more).
    fn get() -> Option<&'static Self> {
        static ONE: OnceLock<Option<Completions>> = OnceLock::new();
        ONE.get_or_init(|| {
            let readable = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
            let mut context: libc::c_ulong = 0;
            // SAFETY: `context` is valid for writes and 0, as the call asks for.
            let result = unsafe { libc::syscall(libc::SYS_io_setup, PLACES, &raw mut context) };
            if result != 0 {
                tracing::warn!("no asynchronous I/O: a client that fills its eventfds may delay interrupts");
                return None;
            }
            Some(Self { context, readable })
        })
        .as_ref()
    }

    /// False: not done; not an eventfd, or no place.
    fn signal(&self, fd: &OwnedFd) -> bool {
        for _ in 0..2 {
            let mut operation = Iocb {
                opcode: CMD_POLL,
                fildes: self.readable.as_raw_fd() as u32,
                buf: u64::from(PollFlags::IN.bits()),
                flags: FLAG_RESFD,
                resfd: fd.as_raw_fd() as u32,
                ..Iocb::default()
            };
            let mut list = [&raw mut operation];
            // SAFETY: one pointer to one valid operation, which the kernel copies before the call returns.
            let submitted = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    1 as libc::c_long,
                    list.as_mut_ptr(),
                )
            };
            if submitted == 1 {
                return true;
            }
            // No place: fetch completions that nobody has looked at. (`struct io_event` is four 64-bit words.)
            let mut events = [[0u64; 4]; PLACES as usize];
            let at_once = [0i64; 2];
            // SAFETY: room for PLACES events, and a timespec of zeros (at most 16 bytes).
            unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0 as libc::c_long,
                    PLACES,
                    events.as_mut_ptr(),
                    at_once.as_ptr(),
                )
            };
        }
        false
    }
}

/// Add 1 to an eventfd. Nothing is added when the counter is full: the reader will wake up anyhow.
pub(super) fn signal(fd: &OwnedFd) {
    let mut fds = [PollFd::new(fd, PollFlags::OUT)];
    let room =
        poll(&mut fds, Some(&Timespec::default())) == Ok(1) && fds[0].revents().contains(PollFlags::OUT);
    if !room || Completions::get().is_some_and(|completions| completions.signal(fd)) {
        return;
    }
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_signal_when_repeated_counts_each_time() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for _ in 0..1000 {
            signal(&fd);
        }
        let mut bytes = [0; 8];
        rustix::io::read(&fd, &mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 1000);
    }

    #[test]
    fn test_completion_when_the_counter_fills_after_the_look_does_not_wait() {
        // The gap between looking and adding, made as wide as can be.
        let Some(completions) = Completions::get() else {
            eprintln!("skipped: this kernel offers no asynchronous I/O");
            return;
        };
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..300 {
            assert!(completions.signal(&fd));
        }
    }
}
