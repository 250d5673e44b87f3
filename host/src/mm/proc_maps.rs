// Reason: an ioctl.
#![allow(unsafe_code)]
//! `/proc/PID/maps`, by PROCMAP_QUERY where the kernel has it (6.11) and by reading text where not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use linux_raw_sys::general::{procmap_query, procmap_query_flags as flags};
use rustix::fs::makedev;
use rustix::ioctl::{Updater, opcode};

use super::vma::{Vma, VmaSource};

/// `PROCFS_IOCTL_MAGIC`, `include/uapi/linux/fs.h`.
const PROCFS_IOCTL_MAGIC: u8 = b'f';
/// `PROCMAP_QUERY = _IOWR(PROCFS_IOCTL_MAGIC, 17, struct procmap_query)`, same file.
const PROCMAP_QUERY: rustix::ioctl::Opcode = opcode::read_write::<procmap_query>(PROCFS_IOCTL_MAGIC, 17);
/// Bytes of maps text read at once.
const TEXT_BLOCK: usize = 64 * 1024;
/// A maps file longer than this is refused (65,530 mappings of 256 bytes are 16 MiB).
const TEXT_LIMIT: usize = 64 << 20;

/// An open maps file. It stays with the address space that its opener had.
#[derive(Debug)]
pub struct ProcMaps {
    file: File,
    text_only: AtomicBool,
    queries: AtomicU64,
}

impl ProcMaps {
    /// From a descriptor that the agent opened on its own `/proc/self/maps` and passed.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
            text_only: AtomicBool::new(false),
            queries: AtomicU64::new(0),
        }
    }

    /// Opens the maps of a process by number.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self::new(File::open(format!("/proc/{pid}/maps"))?.into()))
    }

    /// Reads text even where the kernel has the ioctl.
    #[must_use]
    pub fn with_text_only(self) -> Self {
        self.text_only.store(true, Ordering::Relaxed);
        self
    }

    /// Whether the kernel answers PROCMAP_QUERY (known after the first query).
    #[must_use]
    pub fn uses_ioctl(&self) -> bool {
        !self.text_only.load(Ordering::Relaxed)
    }

    /// Queries so far.
    #[must_use]
    pub fn queries(&self) -> u64 {
        self.queries.load(Ordering::Relaxed)
    }

    fn query_ioctl(&self, va: u64) -> io::Result<Option<Vma>> {
        // SAFETY: procmap_query is plain integers; all zero is a valid value.
        let mut query: procmap_query = unsafe { std::mem::zeroed() };
        query.size = size_of::<procmap_query>() as u64;
        // Of any kind.
        query.query_flags = flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64;
        query.query_addr = va;
        // SAFETY: the opcode is PROCMAP_QUERY, whose operand is a procmap_query; its name and build-id buffers
        // have size 0, so the kernel writes nothing else.
        let call = unsafe { Updater::<PROCMAP_QUERY, _>::new(&mut query) };
        // SAFETY: as above.
        match unsafe { rustix::ioctl::ioctl(self.file.as_fd(), call) } {
            Ok(()) => {}
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let has = |flag: flags| query.vma_flags & flag as u64 != 0;
        Ok(Some(Vma {
            start: query.vma_start,
            end: query.vma_end,
            offset: query.vma_offset,
            dev: makedev(query.dev_major, query.dev_minor),
            inode: query.inode,
            read: has(flags::PROCMAP_QUERY_VMA_READABLE),
            write: has(flags::PROCMAP_QUERY_VMA_WRITABLE),
            shared: has(flags::PROCMAP_QUERY_VMA_SHARED),
        }))
    }

    fn query_text(&self, va: u64) -> io::Result<Option<Vma>> {
        let mut text = Vec::new();
        let mut block = vec![0; TEXT_BLOCK];
        loop {
            let got = self.file.read_at(&mut block, text.len() as u64)?;
            if got == 0 {
                break;
            }
            text.extend_from_slice(&block[..got]);
            if text.len() > TEXT_LIMIT {
                return Err(io::Error::other("maps file is longer than 64 MiB"));
            }
        }
        if text.is_empty() {
            // A process without an address space reads as empty; the ioctl says ESRCH.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let text = String::from_utf8_lossy(&text);
        for line in text.lines() {
            let vma = parse_line(line)
                .ok_or_else(|| io::Error::other(format!("maps line not understood: {line:?}")))?;
            // In ascending order.
            if va < vma.end {
                return Ok(Some(vma));
            }
        }
        Ok(None)
    }
}

/// One line of maps, proc_pid_maps(5): `start-end rwxs offset major:minor inode path`.
fn parse_line(line: &str) -> Option<Vma> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let perms = fields.next()?.as_bytes();
    let offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?;
    let hex = |s| u64::from_str_radix(s, 16).ok();
    if perms.len() != 4 {
        return None;
    }
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        offset: hex(offset)?,
        dev: makedev(u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?),
        inode: inode.parse().ok()?,
        read: perms[0] == b'r',
        write: perms[1] == b'w',
        shared: perms[3] == b's',
    })
}

impl VmaSource for ProcMaps {
    fn query_from(&self, va: u64) -> io::Result<Option<Vma>> {
        crate::notifier::might_sleep("ProcMaps::query_from");
        self.queries.fetch_add(1, Ordering::Relaxed);
        if self.uses_ioctl() {
            match self.query_ioctl(va) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    tracing::info!("this kernel has no PROCMAP_QUERY (6.11+); reading maps as text");
                    self.text_only.store(true, Ordering::Relaxed);
                }
                answer => return answer,
            }
        }
        self.query_text(va)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, mprotect, munmap};

    /// A private address range of this process, unmapped at the end.
    struct Window(u64, usize);
    impl Drop for Window {
        fn drop(&mut self) {
            // SAFETY: the window was mapped by the test and nothing points into it.
            unsafe { munmap(self.0 as *mut _, self.1).unwrap() };
        }
    }

    fn source_agrees(source: &ProcMaps) {
        let fd = memfd_create("proc-maps-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 16 * 4096).unwrap();
        let stat = fstat(&fd).unwrap();
        // SAFETY: a new mapping wherever the kernel likes.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                4 * 4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                8 * 4096,
            )
        }
        .unwrap() as u64;
        let _window = Window(base, 4 * 4096);
        let vma = source.query(base + 4096).unwrap().expect("mapped");
        assert_eq!(vma.offset_of(base + 4096), 9 * 4096);
        assert_eq!((vma.dev, vma.inode), (stat.st_dev, stat.st_ino));
        assert!(vma.read && vma.write && vma.shared);
        // SAFETY: the page belongs to the window above.
        unsafe {
            mprotect((base + 4096) as *mut _, 4096, rustix::mm::MprotectFlags::READ).unwrap();
        };
        let vma = source.query(base + 4096 + 17).unwrap().expect("mapped");
        assert_eq!((vma.start, vma.end), (base + 4096, base + 8192));
        assert!(vma.read && !vma.write && vma.shared);
        assert_eq!(source.query(0x1000).unwrap(), None);
        let first = source.query_from(0x1000).unwrap().expect("something is mapped");
        assert!(first.start > 0x1000 && first.start <= base, "{first:?}");
        let stack = 0u8;
        let vma = source
            .query(std::ptr::from_ref(&stack) as u64)
            .unwrap()
            .expect("stack");
        assert!(!vma.shared && vma.write && vma.inode == 0);
    }

    #[test]
    fn test_query_when_kernel_has_ioctl_returns_mapping() {
        let source = ProcMaps::open(std::process::id()).unwrap();
        source_agrees(&source);
        if !source.uses_ioctl() {
            eprintln!("SKIPPED the ioctl half: this kernel has no PROCMAP_QUERY (needs 6.11)");
        }
        assert_eq!(source.queries(), 5);
    }

    #[test]
    fn test_query_when_text_is_read_returns_the_same() {
        source_agrees(&ProcMaps::open(std::process::id()).unwrap().with_text_only());
    }

    #[test]
    fn test_parse_when_line_is_malformed_returns_none() {
        for line in [
            "",
            "1-2",
            "1-2 rw 0 0:0 0",
            "x-2 rw-p 0 0:0 0",
            "1-2 rw-p 0 00 0",
            "1-2 rw-p 0 0:0",
        ] {
            assert_eq!(parse_line(line), None, "{line:?}");
        }
        let vma = parse_line("7f00-8000 r--s 00002000 00:01 1029 /memfd:x y (deleted)").unwrap();
        assert_eq!(
            (vma.start, vma.end, vma.offset, vma.inode),
            (0x7f00, 0x8000, 0x2000, 1029)
        );
        assert_eq!(vma.dev, makedev(0, 1));
        assert!(vma.read && !vma.write && vma.shared);
    }

    #[test]
    fn test_query_when_process_is_gone_says_so() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let ioctl = ProcMaps::open(child.id()).unwrap();
        let text = ProcMaps::open(child.id()).unwrap().with_text_only();
        child.kill().unwrap();
        child.wait().unwrap();
        for source in [ioctl, text] {
            let error = source.query(0x1000).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "{error}");
        }
    }
}
