//! The IOVA map by itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::*;

const PAGE: u64 = 4096;

fn memfd(len: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("dma-test", flags).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    fd
}

fn mapped(iova: u64, len: u64) -> Arc<Space> {
    let space = Space::new();
    space
        .map(iova, len, memfd(len), 0, Prot::READ_WRITE)
        .expect("map");
    space
}

#[test]
fn test_resolve_when_mapped_reads_what_the_file_holds() {
    let fd = memfd(4 * PAGE);
    rustix::io::pwrite(&fd, b"tlbridge", 2 * PAGE + 8).expect("pwrite");
    let space = Space::new();
    let client = fd.try_clone().expect("dup");
    space
        .map(0x10_0000, 2 * PAGE, fd, PAGE, Prot::READ_WRITE)
        .expect("map");
    let mut text = [0; 8];
    space
        .resolve(0x10_0000 + PAGE + 8, 8, false)
        .expect("resolve")
        .read_into(&mut text);
    assert_eq!(&text, b"tlbridge");
    space
        .resolve(0x10_0000 + PAGE + 8, 3, true)
        .expect("resolve")
        .write_from(b"TLB");
    rustix::io::pread(&client, &mut text, 2 * PAGE + 8).expect("pread");
    assert_eq!(&text, b"TLBridge");
}

#[test]
fn test_map_when_arguments_are_bad_changes_nothing() {
    let space = mapped(16 * PAGE, 4 * PAGE);
    let rw = Prot::READ_WRITE;
    let none = Prot {
        read: false,
        write: false,
    };
    let cases: [(u64, u64, u64, u64, Prot, Errno); 12] = [
        // iova, length, file offset, file length, rights
        (0, 0, 0, PAGE, rw, Errno::INVAL),
        (1, PAGE, 0, PAGE, rw, Errno::INVAL),
        (0, PAGE + 1, 0, 2 * PAGE, rw, Errno::INVAL),
        (0, PAGE, 8, 2 * PAGE, rw, Errno::INVAL),
        (0u64.wrapping_sub(PAGE), 2 * PAGE, 0, 2 * PAGE, rw, Errno::INVAL),
        (0, PAGE, 0u64.wrapping_sub(PAGE), PAGE, rw, Errno::INVAL),
        (0, PAGE, 0, PAGE, none, Errno::INVAL),
        (0, 2 * PAGE, 0, PAGE, rw, Errno::INVAL),
        (0, PAGE, PAGE, PAGE, rw, Errno::INVAL),
        (16 * PAGE, PAGE, 0, PAGE, rw, Errno::EXIST),
        (15 * PAGE, 2 * PAGE, 0, 2 * PAGE, rw, Errno::EXIST),
        (12 * PAGE, 16 * PAGE, 0, 16 * PAGE, rw, Errno::EXIST),
    ];
    for (iova, len, offset, file, prot, errno) in cases {
        let error = space
            .map(iova, len, memfd(file), offset, prot)
            .expect_err("bad arguments");
        assert_eq!(error.errno(), errno, "{error}");
    }
    assert_eq!(space.mappings().len(), 1);
    // Neighbours are no overlap.
    space.map(15 * PAGE, PAGE, memfd(PAGE), 0, rw).expect("below");
    space.map(20 * PAGE, PAGE, memfd(PAGE), 0, rw).expect("above");
    assert_eq!(space.stats().mapped_bytes, 6 * PAGE);
}

#[test]
fn test_map_when_the_file_is_sealed_says_so() {
    let space = Space::new();
    let fd = memfd(PAGE);
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).expect("seal");
    space.map(0, PAGE, fd, 0, Prot::READ_ONLY).expect("map");
    space
        .map(PAGE, PAGE, memfd(PAGE), 0, Prot::READ_ONLY)
        .expect("map");
    let sealed: Vec<bool> = space.mappings().iter().map(|m| m.sealed).collect();
    assert_eq!(sealed, [true, false]);
}

#[test]
fn test_resolve_when_outside_or_forbidden_says_why() {
    let space = Space::new();
    space.map(0, PAGE, memfd(PAGE), 0, Prot::READ_ONLY).expect("map");
    let write_only = Prot {
        read: false,
        write: true,
    };
    space.map(PAGE, PAGE, memfd(PAGE), 0, write_only).expect("map");
    let error = |iova, len, write| space.resolve(iova, len, write).expect_err("refused");
    assert_eq!(
        error(0, 8, true),
        DmaError::Protection {
            iova: 0,
            access: "writes"
        }
    );
    assert_eq!(
        error(PAGE, 8, false),
        DmaError::Protection {
            iova: PAGE,
            access: "reads"
        }
    );
    // Two mappings that touch are not one.
    assert!(matches!(error(PAGE - 4, 8, false), DmaError::NotMapped { .. }));
    assert!(matches!(error(2 * PAGE, 1, false), DmaError::NotMapped { .. }));
    assert!(matches!(error(u64::MAX, 2, false), DmaError::Wraps { .. }));
    space.set_bus_master(false);
    assert_eq!(error(0, 8, false), DmaError::BusMasterOff);
    space.set_bus_master(true);
    assert!(space.resolve(0, 8, false).is_ok());
    assert_eq!(space.stats().resolve_failures, 6);
}

#[test]
#[should_panic(expected = "opened for reading")]
fn test_resolved_when_read_only_is_not_written() {
    mapped(0, PAGE)
        .resolve(0, 8, false)
        .expect("resolve")
        .write_from(&[1]);
}

#[test]
fn test_unmap_when_it_would_cut_a_mapping_is_refused() {
    let space = mapped(16 * PAGE, 4 * PAGE);
    for (iova, len) in [
        (16 * PAGE, PAGE),
        (17 * PAGE, PAGE),
        (18 * PAGE, 8 * PAGE),
        (0, 17 * PAGE),
    ] {
        let error = space.unmap(iova, len).expect_err("cut");
        assert!(matches!(error, DmaError::Cut { .. }), "{error}");
    }
    assert_eq!(space.mappings().len(), 1);
    space.unmap(0, 16 * PAGE).expect("nothing there");
    space.unmap(20 * PAGE, PAGE).expect("nothing there");
    assert_eq!(space.mappings().len(), 1);
    assert_eq!(space.unmap(0, 0).expect_err("empty").errno(), Errno::INVAL);
    assert_eq!(
        space.unmap(PAGE, u64::MAX).expect_err("wraps").errno(),
        Errno::INVAL
    );
}

/// Remembers what it was told.
#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, u64)>>);

impl Recorder {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.0.lock().expect("recorder"))
    }
}

impl TargetCache for Recorder {
    fn purge_target(&self, iova: Range<u64>) {
        self.0.lock().expect("recorder").push((iova.start, iova.end));
    }
}

#[test]
fn test_s2_unmap_when_several_mappings_are_covered_purges_each_cache_once() {
    let space = mapped(0, PAGE);
    space
        .map(2 * PAGE, PAGE, memfd(PAGE), 0, Prot::READ_WRITE)
        .expect("map");
    let (kept, gone) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
    for cache in [&kept, &gone] {
        let weak: std::sync::Weak<dyn TargetCache> = Arc::<Recorder>::downgrade(cache);
        space.attach_cache(weak);
    }
    drop(gone);
    space.unmap(0, 8 * PAGE).expect("covers both");
    assert_eq!(kept.take(), [(0, 8 * PAGE)]);
    assert!(space.mappings().is_empty());
    // Nothing mapped, nothing to purge.
    space.unmap(0, 8 * PAGE).expect("nothing there");
    space.unmap_all();
    assert_eq!(kept.take(), []);
    space.set_bus_master(false);
    space.set_bus_master(false);
    assert_eq!(kept.take(), [(0, u64::MAX)]);
}

#[test]
fn test_map_when_the_limit_is_reached_is_refused() {
    let space = Space::with_limit(3);
    let fd = memfd(PAGE);
    let map = |i: u64| space.map(i * PAGE, PAGE, fd.try_clone().expect("dup"), 0, Prot::READ_ONLY);
    for i in 0..3 {
        map(i).expect("room");
    }
    let error = map(3).expect_err("full");
    assert_eq!(
        (error, error.errno()),
        (DmaError::TooMany { limit: 3 }, Errno::NOSPC)
    );
    space.unmap(PAGE, PAGE).expect("unmap");
    map(3).expect("room again");
}

#[test]
fn test_populate_when_the_range_is_large_touches_a_window_around_the_focus() {
    let len = 8 * POPULATE_LIMIT;
    let fd = memfd(len);
    let client = fd.try_clone().expect("dup");
    let space = Space::new();
    space.map(0, len, fd, 0, Prot::READ_WRITE).expect("map");
    let target = space.resolve(0, len, true).expect("resolve");
    target.populate(3 * POPULATE_LIMIT + 5, true).expect("populate");
    let blocks = rustix::fs::fstat(&client).expect("fstat").st_blocks as u64 * 512;
    assert_eq!(blocks, POPULATE_LIMIT);
    assert_eq!(space.stats().populates, 1);
}

#[test]
fn test_populate_when_the_file_was_truncated_fails_instead_of_the_access() {
    let fd = memfd(2 * PAGE);
    let client = fd.try_clone().expect("dup");
    let space = Space::new();
    space.map(0, 2 * PAGE, fd, 0, Prot::READ_WRITE).expect("map");
    rustix::fs::ftruncate(&client, PAGE).expect("ftruncate");
    let error = space
        .resolve(PAGE, PAGE, true)
        .expect("resolve")
        .populate(0, true)
        .expect_err("no page behind it");
    assert!(matches!(error, DmaError::System { .. }), "{error}");
}
