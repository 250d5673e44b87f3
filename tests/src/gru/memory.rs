//! "Physical" memory of a test: frames of one memfd that the device reaches by IOVA.
//!
//! The test reads and writes it through the file, so that nothing here needs a pointer.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes of a frame.
pub const FRAME: u64 = 4096;

/// IOVA of the first frame: not zero, and not the file offset, so that the two cannot be mixed up unnoticed.
pub const IOVA_BASE: u64 = 0x1_4000_0000;

/// Number of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame(pub u32);

impl Frame {
    /// Where the device sees it.
    #[must_use]
    pub fn iova(self) -> u64 {
        IOVA_BASE + u64::from(self.0) * FRAME
    }
}

/// The frames.
#[derive(Debug)]
pub struct Memory {
    file: File,
    frames: u32,
    free: Mutex<Vec<Frame>>,
}

impl Memory {
    /// `frames` frames, all free.
    ///
    /// # Panics
    /// When the memfd cannot be made.
    #[must_use]
    pub fn new(frames: u32) -> Self {
        let fd = memfd_create("gru-test-memory", MemfdFlags::CLOEXEC).expect("memfd");
        let file = File::from(fd);
        file.set_len(u64::from(frames) * FRAME)
            .expect("memory for the test");
        Self {
            file,
            frames,
            free: Mutex::new((0..frames).rev().map(Frame).collect()),
        }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        u64::from(self.frames) * FRAME
    }

    /// Whether there are no frames.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// The memfd.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Takes a frame, lowest first.
    ///
    /// # Panics
    /// When none is left: the test asked for too few.
    #[must_use]
    pub fn take(&self) -> Frame {
        self.free.lock().unwrap().pop().expect("a free frame")
    }

    /// Takes `count` frames in a row, aligned to `count`.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn take_row(&self, count: u32) -> Frame {
        let mut free = self.free.lock().unwrap();
        let first = (0..self.frames / count)
            .map(|row| row * count)
            .find(|first| (*first..first + count).all(|f| free.contains(&Frame(f))))
            .expect("a free row of frames");
        free.retain(|f| !(first..first + count).contains(&f.0));
        Frame(first)
    }

    /// Gives a frame back.
    pub fn put(&self, frame: Frame) {
        let mut free = self.free.lock().unwrap();
        assert!(!free.contains(&frame), "frame given back twice");
        free.insert(0, frame);
    }

    /// Writes.
    ///
    /// # Panics
    /// Outside the memory.
    pub fn write(&self, frame: Frame, offset: u64, data: &[u8]) {
        self.file
            .write_all_at(data, u64::from(frame.0) * FRAME + offset)
            .expect("write to the test's memory");
    }

    /// Reads.
    ///
    /// # Panics
    /// Outside the memory.
    #[must_use]
    pub fn read(&self, frame: Frame, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file
            .read_exact_at(&mut data, u64::from(frame.0) * FRAME + offset)
            .expect("read of the test's memory");
        data
    }
}
