//! Files that get shorter under their mappings.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const PAGE: u64 = 4096;

fn mapped(len: u64) -> (std::sync::Arc<Space>, OwnedFd) {
    let fd = rustix::fs::memfd_create("lost-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    let space = Space::new();
    space
        .map(0, len, fd.try_clone().expect("dup"), 0, Prot::READ_WRITE)
        .expect("map");
    (space, fd)
}

#[test]
fn test_access_when_the_file_was_truncated_fails_and_stays_failed() {
    let (space, fd) = mapped(4 * PAGE);
    let (intact, _other) = mapped(PAGE);
    space.store(3 * PAGE, b"there").expect("a page");
    rustix::fs::ftruncate(&fd, PAGE).expect("ftruncate");
    // Below the new end nothing has happened yet.
    space.store(0, b"still").expect("a page");
    let memory = space.resolve(3 * PAGE, 5, false).expect("not found out yet");
    let mut bytes = [1; 5];
    memory.read_into(&mut bytes);
    assert!(matches!(memory.check(), Err(DmaError::Lost { .. })));
    assert_eq!(bytes, [0; 5], "never memory of somebody else's");
    drop(memory);
    for iova in [0, PAGE, 3 * PAGE] {
        assert!(matches!(
            space.fetch(iova, &mut bytes),
            Err(DmaError::Lost { .. })
        ));
    }
    assert!(space.mappings()[0].lost && !intact.mappings()[0].lost);
    assert_eq!(intact.store(0, b"fine"), Ok(()));
    // A larger file does not bring it back; a new mapping does.
    rustix::fs::ftruncate(&fd, 4 * PAGE).expect("ftruncate");
    assert!(space.fetch(0, &mut bytes).is_err());
    space.unmap(0, 4 * PAGE).expect("unmap");
    space.map(0, 4 * PAGE, fd, 0, Prot::READ_WRITE).expect("map");
    space.fetch(0, &mut bytes).expect("a page");
    assert_eq!(
        &bytes, b"still",
        "what was written below the end has reached the file"
    );
}

#[test]
fn test_copies_when_the_file_is_truncated_under_them_fail_and_never_tear_the_process() {
    for _ in 0..20 {
        let (space, fd) = mapped(64 * PAGE);
        let truncated = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut buffer = vec![7; 64 * PAGE as usize];
                    loop {
                        let before = truncated.load(Ordering::SeqCst);
                        let written = space.store(0, &buffer);
                        let read = space.fetch(0, &mut buffer);
                        if let Err(error) = written.and(read) {
                            assert!(matches!(error, DmaError::Lost { .. }), "{error}");
                            break;
                        }
                        // What was reported as done was done to the file: it had been whole when it began.
                        assert!(!before, "an access to a page that is gone has succeeded");
                        assert!(buffer.iter().all(|byte| *byte == 7));
                    }
                });
            }
            std::thread::yield_now();
            rustix::fs::ftruncate(&fd, 3 * PAGE).expect("ftruncate");
            truncated.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn test_guard_when_the_file_was_truncated_after_the_fill_says_so() {
    use crate::atc::{Access, Atc, AtcConfig, Fill, FillRefused, PageSize, SpaceId};
    let (space, fd) = mapped(4 * PAGE);
    let atc = Atc::new(AtcConfig::default(), std::sync::Arc::clone(&space));
    let mut engine = atc.engine().expect("an engine");
    let fill = |va| Fill {
        space: SpaceId(1),
        va,
        size: PageSize::new(12).expect("a size"),
        iova: va,
        writable: true,
        tag: 0,
    };
    for va in [0, 3 * PAGE] {
        atc.open_miss(0, SpaceId(1), va);
        atc.fill(0, fill(va)).expect("fill");
        atc.close_miss(0);
    }
    rustix::fs::ftruncate(&fd, PAGE).expect("ftruncate");
    // Before the fill: refused.
    atc.open_miss(0, SpaceId(1), PAGE);
    assert!(matches!(atc.fill(0, fill(PAGE)), Err(FillRefused::Target(_))));
    // After it: the access fails, an atomic as well as a copy.
    let mut touch = |va, access| {
        let guard = engine.access(SpaceId(1), va, 8, access).expect("a hit");
        match access {
            Access::Write => drop(guard.atomic64().expect("aligned").fetch_add(1, Ordering::SeqCst)),
            Access::Read => guard.read_into(&mut [0; 8]),
        }
        guard.check()
    };
    assert!(touch(0, Access::Read).is_ok(), "below the new end");
    assert_eq!(touch(3 * PAGE, Access::Write), Err(Lost));
    assert_eq!(
        touch(0, Access::Read),
        Err(Lost),
        "the mapping is lost as a whole"
    );
    atc.close_miss(0);
    atc.open_miss(0, SpaceId(1), 0);
    let refused = atc.fill(0, fill(0));
    assert!(
        matches!(refused, Err(FillRefused::Target(DmaError::Lost { .. }))),
        "{refused:?}"
    );
}

#[test]
#[should_panic(expected = "ATC guard")]
fn test_message_when_asked_for_under_a_guard_panics() {
    use crate::atc::{Access, Atc, AtcConfig, Fill, PageSize, SpaceId};
    let (space, _fd) = mapped(PAGE);
    let atc = Atc::new(AtcConfig::default(), std::sync::Arc::clone(&space));
    let mut engine = atc.engine().expect("an engine");
    atc.open_miss(0, SpaceId(1), 0);
    let size = PageSize::new(12).expect("a size");
    let (va, iova, writable, tag) = (0, 0, true, 0);
    let fill = Fill {
        space: SpaceId(1),
        va,
        size,
        iova,
        writable,
        tag,
    };
    atc.fill(0, fill).expect("fill");
    let _guard = engine.access(SpaceId(1), 0, 8, Access::Read).expect("a hit");
    let _ = space.read_by_message(PAGE, &mut [0]);
}
