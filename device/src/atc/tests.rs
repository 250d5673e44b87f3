//! Unit tests over real mappings.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dma::{Prot, Space};

use super::*;

const ASID: SpaceId = SpaceId(0x12_3456);

pub(super) fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("atc-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    fd
}

/// An ATC over `len` bytes of memory at IOVA 0.
pub(super) fn atc_over(len: u64, config: AtcConfig) -> Arc<Atc> {
    let dma = Space::new();
    dma.map(0, len, memfd(len), 0, Prot::READ_WRITE).expect("map");
    Atc::new(config, dma)
}

fn fill_4k(va: u64, iova: u64) -> Fill {
    Fill {
        space: ASID,
        va,
        size: PageSize::SIZE_4K,
        iova,
        writable: true,
        tag: 1,
    }
}

fn enter(atc: &Atc, fill: Fill) {
    atc.open_miss(0, fill.space, fill.va);
    atc.fill(0, fill).expect("fill");
    atc.close_miss(0);
}

#[test]
fn test_access_when_filled_reaches_the_target_and_stops_at_page_and_chunk() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    assert_eq!(
        engine.access(ASID, 0x5000, 8, Access::Read).expect_err("empty"),
        Miss::NoEntry
    );
    enter(&atc, fill_4k(0x5123, 0x3000));
    let guard = engine.access(ASID, 0x5ff8, 100, Access::Write).expect("hit");
    assert_eq!((guard.len(), guard.tag()), (8, 1));
    guard.write_from(&7u64.to_ne_bytes());
    assert_eq!(
        guard
            .atomic64()
            .expect("aligned")
            .fetch_add(1, std::sync::atomic::Ordering::SeqCst),
        7
    );
    drop(guard);
    let mut word = [0; 8];
    atc.dma()
        .resolve(0x3ff8, 8, false)
        .expect("resolve")
        .read_into(&mut word);
    assert_eq!(u64::from_ne_bytes(word), 8);
    enter(
        &atc,
        Fill {
            size: PageSize::SIZE_2M,
            ..fill_4k(0x20_0000, 0)
        },
    );
    let guard = engine.access(ASID, 0x21_fff0, 100, Access::Read).expect("hit");
    assert_eq!(guard.len(), 16);
}

#[test]
fn test_s2_access_when_purged_misses_and_accepts_a_new_fill() {
    let atc = atc_over(1 << 20, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_4k(0x5000, 0x3000));
    let report = atc.purge(Purge::Range {
        space: ASID,
        start: 0x5fff,
        end: 0x6000,
    });
    assert_eq!(report.entries, 1);
    assert_eq!(
        engine.access(ASID, 0x5000, 8, Access::Read).expect_err("purged"),
        Miss::NoEntry
    );
    enter(&atc, fill_4k(0x5000, 0x4000));
    assert!(engine.access(ASID, 0x5000, 8, Access::Read).is_ok());
}
