use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use driver::backing::BarInfo;

use super::*;
use crate::mm::{Vma, VmaSource};
use crate::notifier::{Chain, Ctx, Event, MaySleep, NotifierRange};
use crate::subscribers::HeldMemory;

/// Notes what is mapped; takes `room` mappings.
#[derive(Debug, Default)]
struct Kernel {
    mapped: Mutex<BTreeMap<u64, (u64, u64)>>,
    room: usize,
}

impl Backing for Kernel {
    fn bar(&self, _: usize) -> BarInfo {
        BarInfo::default()
    }
    fn bar_fd(&self, _: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
    fn read(&self, _: usize, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("no BAR")
    }
    fn write(&self, _: usize, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!("no BAR")
    }
    fn config_read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("no config space")
    }
    fn config_write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        unreachable!("no config space")
    }
    fn msix_vectors(&self) -> u32 {
        0
    }
    fn set_msix(&self, _: u32, _: Option<BorrowedFd<'_>>) -> io::Result<()> {
        unreachable!("no vectors")
    }
    fn dma_map(&self, iova: u64, len: u64, _: BorrowedFd<'_>, offset: u64, _: DmaProt) -> io::Result<()> {
        let mut mapped = locked(&self.mapped);
        if mapped.len() >= self.room {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        assert!(mapped.insert(iova, (len, offset)).is_none(), "{iova:#x} twice");
        Ok(())
    }
    fn dma_unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut mapped = locked(&self.mapped);
        let before = mapped.len();
        mapped.retain(|start, _| !(iova..iova + len).contains(start));
        assert_eq!(
            (before - mapped.len()) as u64,
            len / PAGE,
            "whole mappings, all there"
        );
        Ok(())
    }
    fn holds_pages(&self) -> bool {
        true
    }
    fn io_eventfd(&self, _: usize, _: u64) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn alive(&self) -> bool {
        true
    }
}

const A: FileId = FileId { dev: 1, ino: 7 };
const IOVA: u64 = 1 << 32;

fn set_up(room: usize, keep: bool) -> (Arc<Kernel>, Arc<HeldPages>, File) {
    let kernel = Arc::new(Kernel {
        room,
        ..Kernel::default()
    });
    let held = Arc::new(HeldPages::new(kernel.clone(), keep));
    (kernel, held, tempfile::tempfile().unwrap())
}

fn hold(held: &HeldPages, file: &File, page: u64) -> Hold {
    held.hold(A, file.as_fd(), page * PAGE, IOVA + page * PAGE)
        .unwrap()
}

fn pages_of(kernel: &Kernel) -> Vec<u64> {
    let mapped = locked(&kernel.mapped);
    mapped
        .iter()
        .map(|(iova, (len, offset))| {
            assert_eq!((iova - IOVA, *len), (*offset, PAGE));
            offset / PAGE
        })
        .collect()
}

#[test]
fn test_discard_when_pages_are_held_takes_them_and_gives_none_until_its_end() {
    let (kernel, held, file) = set_up(100, false);
    for page in [0, 1, 2, 3, 5, 8] {
        assert_eq!(hold(&held, &file, page), Hold::Held);
        assert_eq!(hold(&held, &file, page), Hold::Held, "once is enough");
    }
    // Half a page counts as one.
    let discard = held.begin_discard(A, PAGE + 1, 6 * PAGE - 1);
    assert_eq!(pages_of(&kernel), [0, 8]);
    let inner = held.begin_discard(A, 5 * PAGE, 9 * PAGE);
    assert_eq!(pages_of(&kernel), [0]);
    assert_eq!(hold(&held, &file, 2), Hold::Busy);
    assert_eq!(hold(&held, &file, 9), Hold::Held);
    held.end_discard(vec![discard]);
    assert_eq!(hold(&held, &file, 2), Hold::Held);
    assert_eq!(hold(&held, &file, 5), Hold::Busy, "the other one still runs");
    held.unannounced(vec![inner]);
    assert_eq!(held.stats.unannounced.load(Ordering::Relaxed), 1, "page 8");
    assert_eq!(hold(&held, &file, 5), Hold::Held);
    assert_eq!(pages_of(&kernel), [0, 2, 5, 9]);
    held.release(A);
    assert_eq!((pages_of(&kernel), held.pages()), (vec![], 0));
}

#[test]
fn test_discard_when_broken_leaves_the_pages() {
    let (kernel, held, file) = set_up(100, true);
    assert_eq!(hold(&held, &file, 1), Hold::Held);
    let discard = held.begin_discard(A, 0, 4 * PAGE);
    assert_eq!(pages_of(&kernel), [1]);
    held.end_discard(vec![discard]);
}

#[test]
fn test_hold_when_the_kernel_takes_no_more_starts_anew() {
    let (kernel, held, file) = set_up(3, false);
    for page in 0..4 {
        assert_eq!(hold(&held, &file, page), Hold::Held);
    }
    assert_eq!(pages_of(&kernel), [3]);
    assert_eq!(
        (held.pages(), held.stats.evictions.load(Ordering::Relaxed)),
        (1, 1)
    );
}

/// Two mappings of one file, and a hole between them.
struct Two;

impl VmaSource for Two {
    fn query_from(&self, va: u64) -> io::Result<Option<Vma>> {
        let vma = |start: u64, offset: u64| Vma {
            start,
            end: start + 4 * PAGE,
            offset,
            dev: A.dev,
            inode: A.ino,
            read: true,
            write: true,
            shared: true,
        };
        Ok([vma(0x10_0000, 0), vma(0x10_6000, 8 * PAGE)]
            .into_iter()
            .find(|vma| va < vma.end))
    }
}

#[test]
fn test_subscriber_when_a_discard_is_announced_asks_what_is_mapped() {
    let (kernel, held, file) = set_up(100, false);
    let (chain, token) = (Chain::new(), MaySleep::claim("test"));
    let subscriber = HeldMemory::new(held.clone(), Arc::new(Two));
    chain.register(subscriber, &token).unwrap();
    for page in [0, 3, 8, 9, 11] {
        assert_eq!(hold(&held, &file, page), Hold::Held);
    }
    let range = |event, blockable| NotifierRange {
        start: 0x10_3000,
        end: 0x10_8000,
        event,
        blockable,
    };
    let start = |range| chain.invalidate_range_start(range, Ctx::MaySleep(&token));
    // The file keeps its pages.
    let unmap = start(range(Event::Unmap, true)).unwrap();
    assert_eq!(pages_of(&kernel).len(), 5);
    chain.invalidate_range_end(unmap, Ctx::MaySleep(&token));
    let discard = start(range(Event::Clear, true)).unwrap();
    assert_eq!(pages_of(&kernel), [0, 11]);
    assert_eq!(hold(&held, &file, 3), Hold::Busy);
    chain.invalidate_range_end(discard, Ctx::MaySleep(&token));
    assert_eq!(hold(&held, &file, 3), Hold::Held);
    // S9.
    assert!(start(range(Event::Clear, false)).is_err());
    assert_eq!(pages_of(&kernel), [0, 3, 11]);
    // Holes of any size are stepped over.
    let wide = NotifierRange {
        end: 1 << 46,
        ..range(Event::Clear, true)
    };
    let discard = start(wide).unwrap();
    assert_eq!(pages_of(&kernel), [0]);
    chain.invalidate_range_end(discard, Ctx::MaySleep(&token));
}
