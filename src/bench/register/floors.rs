//! What an HCA cannot be faster than, or what the same work costs without one, on memory of the same size and in the
//! same iterations.
#![allow(unsafe_code, reason = "an ioctl without a wrapper")]

use std::os::fd::BorrowedFd;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::ioctl::{self, NoArg, opcode};
use verbs::{Buffer, Pages};

use super::samples::{Operation, Samples};
use super::staging::Cut;

/// No-ops of one sample: one alone is too short for a clock.
const NOOPS: u32 = 16;

/// Memory that nobody registers.
#[derive(Debug)]
pub struct Floors {
    plain: Buffer,
    source: Buffer,
    cut: Cut,
    pages: Pages,
    salt: usize,
    /// Why memory cannot be locked, once that is known.
    pub no_lock: Option<String>,
}

impl Floors {
    /// Of that many bytes.
    ///
    /// # Errors
    /// No memory.
    pub fn new(length: usize, pages: Pages, cut: Cut) -> Result<Self> {
        let plain = Buffer::map(length, pages).context("memory for the floors")?;
        plain.populate().context("memory for the floors")?;
        Ok(Self {
            plain,
            source: cut.source()?,
            cut,
            pages,
            salt: 0,
            no_lock: None,
        })
    }

    /// One sample of each. The file is the device's, or any other one.
    ///
    /// # Errors
    /// No memory.
    pub fn measure(&mut self, samples: &mut Samples, file: BorrowedFd<'_>) -> Result<()> {
        let length = self.plain.length();
        samples.time(Operation::Populate, || {
            let fresh = Buffer::map(length, self.pages)?;
            fresh.populate().map(|()| fresh)
        })?;
        if self.no_lock.is_none() {
            match samples.time(Operation::Lock, || self.plain.lock()) {
                Ok(()) => samples.time(Operation::Unlock, || self.plain.unlock())?,
                Err(error) => {
                    self.no_lock = Some(format!("mlock of {length} bytes: {error} (RLIMIT_MEMLOCK)"))
                }
            }
        }
        self.copy();
        let begin = Instant::now();
        self.copy();
        samples.record(Operation::Memcpy, begin.elapsed());
        samples.time(Operation::Discard, || self.plain.discard())?;
        let begin = Instant::now();
        self.copy();
        samples.record(Operation::MemcpyRefault, begin.elapsed());
        let begin = Instant::now();
        for _ in 0..NOOPS {
            noop(file);
        }
        samples.record(Operation::NoopIoctl, begin.elapsed() / NOOPS);
        Ok(())
    }

    fn copy(&mut self) {
        self.salt += 1;
        for t in self.cut.writes(self.plain.length(), self.salt) {
            self.plain.copy_from(t.remote, &self.source, t.local, t.length);
        }
    }
}

/// An ioctl that no file knows: into the kernel, to the driver, and back.
fn noop(file: BorrowedFd<'_>) {
    // RDMA's ioctls have this letter, and one number, 1.
    const UNKNOWN: ioctl::Opcode = opcode::none(0x1b, 0xff);
    // SAFETY: an operation without an argument reads and writes no memory.
    let request = unsafe { NoArg::<UNKNOWN>::new() };
    // SAFETY: refused by every file that a process of this program has open.
    let refused = unsafe { ioctl::ioctl(file, request) };
    assert!(refused.is_err(), "an ioctl that does not exist did something");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn test_floors_when_measured_have_a_sample_each() {
        let mut samples = Samples::default();
        let mut floors = Floors::new(64 << 10, Pages::Small, Cut::new(8192, 1)).unwrap();
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        for _ in 0..3 {
            samples.next_iteration();
            floors.measure(&mut samples, file.as_fd()).unwrap();
        }
        let mut there: Vec<Operation> = samples.operations().collect();
        if let Some(reason) = &floors.no_lock {
            println!("SKIP: {reason}");
            there.extend([Operation::Lock, Operation::Unlock]);
            there.sort();
        }
        assert_eq!(
            there,
            [
                Operation::Populate,
                Operation::Lock,
                Operation::Unlock,
                Operation::Memcpy,
                Operation::Discard,
                Operation::MemcpyRefault,
                Operation::NoopIoctl
            ]
        );
        let figures = samples.figures(Operation::Memcpy, 64 << 10, 1).unwrap();
        assert_eq!(figures.samples, 3);
        assert!(figures.bytes_per_second.unwrap() > 1e6);
    }
}
