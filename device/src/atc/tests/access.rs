//! Look-up, guards, replacement.

use std::sync::atomic::Ordering;

use super::*;

#[test]
fn test_access_when_filled_reaches_the_target_and_stops_at_page_and_chunk() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    assert_eq!(
        engine.access(ASID, 0x5000, 8, Access::Read).expect_err("empty"),
        Miss::NoEntry
    );
    enter(&atc, fill_at(0x5123, 0x3000, 12));
    let guard = engine.access(ASID, 0x5ff8, 100, Access::Write).expect("hit");
    assert_eq!((guard.len(), guard.tag()), (8, 1));
    guard.write_from(&7u64.to_ne_bytes());
    assert_eq!(
        guard.atomic64().expect("aligned").fetch_add(1, Ordering::SeqCst),
        7
    );
    drop(guard);
    let mut word = [0; 8];
    atc.dma()
        .resolve(0x3ff8, 8, false)
        .expect("resolve")
        .read_into(&mut word);
    assert_eq!(u64::from_ne_bytes(word), 8);
    enter(&atc, fill_at(0x20_0000, 0, 21));
    let guard = engine.access(ASID, 0x21_fff0, 100, Access::Read).expect("hit");
    assert_eq!(guard.len(), 16);
}

#[test]
fn test_access_when_another_space_has_the_page_misses() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0x5000, 0x3000, 12));
    assert_eq!(
        engine.access(OTHER, 0x5000, 8, Access::Read).expect_err("other"),
        Miss::NoEntry
    );
    assert!(!hits(&mut engine, 0x6000));
}

#[test]
fn test_access_when_a_store_meets_a_clean_entry_misses_until_it_is_filled_writable() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    let clean = Fill {
        writable: false,
        ..fill_at(0x5000, 0x3000, 12)
    };
    enter(&atc, clean);
    assert!(hits(&mut engine, 0x5000));
    assert_eq!(
        engine.access(ASID, 0x5000, 8, Access::Write).expect_err("clean"),
        Miss::ReadOnly
    );
    enter(
        &atc,
        Fill {
            writable: true,
            tag: 2,
            ..clean
        },
    );
    assert_eq!(
        engine
            .access(ASID, 0x5000, 8, Access::Write)
            .expect("dirty")
            .tag(),
        2
    );
    let stats = atc.stats();
    assert_eq!((stats.hits, stats.mod_misses, stats.live_entries), (2, 1, 1));
    assert_eq!(stats.evictions, 0);
}

#[test]
fn test_guard_when_unaligned_or_for_reading_offers_no_atomics() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 12));
    for (va, len, access, has64, has32) in [
        (0, 8, Access::Write, true, true),
        (4, 8, Access::Write, false, true),
        (2, 8, Access::Write, false, false),
        (0, 4, Access::Write, false, true),
        (0, 3, Access::Write, false, false),
        (0, 8, Access::Read, false, false),
    ] {
        let guard = engine.access(ASID, va, len, access).expect("hit");
        assert_eq!(
            (guard.atomic64().is_some(), guard.atomic32().is_some()),
            (has64, has32),
            "{va} {len} {access:?}"
        );
    }
}

#[test]
fn test_guard_when_copies_have_any_alignment_and_length_moves_the_bytes() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 16));
    for offset in 0..9 {
        for len in 0..40usize {
            let bytes: Vec<u8> = (0..len).map(|i| (i as u8) ^ 0x5a).collect();
            let guard = engine.access(ASID, 100, 4096, Access::Write).expect("hit");
            guard.fill(0xee);
            guard.write_at(offset, &bytes);
            let mut back = vec![0; len + 2];
            guard.read_at(offset, &mut back);
            assert_eq!(back[..len], bytes);
            assert_eq!(back[len..], [0xee, 0xee]);
        }
    }
}

#[test]
#[should_panic(expected = "access to bytes 0+9 of a window of 8 bytes")]
fn test_guard_when_a_copy_is_longer_than_it_is_refused() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 12));
    engine
        .access(ASID, 0, 8, Access::Write)
        .expect("hit")
        .write_from(&[0; 9]);
}

#[test]
fn test_fill_when_it_overlaps_other_sizes_replaces_them() {
    let atc = atc_over(1 << 22, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    for page in 0..4 {
        enter(&atc, fill_at(page << 12, page << 12, 12));
    }
    let large = Fill {
        tag: 2,
        ..fill_at(0, 0x20_0000, 21)
    };
    enter(&atc, large);
    assert_eq!(atc.stats().live_entries, 1);
    assert_eq!(
        engine.access(ASID, 0x1000, 8, Access::Read).expect("hit").tag(),
        2
    );
    let small = Fill {
        tag: 3,
        ..fill_at(0x7000, 0x1000, 12)
    };
    enter(&atc, small);
    assert_eq!(atc.dump(10).len(), 1);
    assert_eq!(
        engine.access(ASID, 0x7000, 8, Access::Read).expect("hit").tag(),
        3
    );
    assert!(!hits(&mut engine, 0x1000));
}

#[test]
fn test_fill_when_the_set_is_full_replaces_an_entry_that_was_not_used() {
    let config = AtcConfig {
        sets: 1,
        ways: 4,
        ..AtcConfig::default()
    };
    let atc = atc_over(1 << 20, config);
    let mut engine = atc.engine().expect("engine");
    for page in 0..4u64 {
        enter(&atc, fill_at(page << 12, 0, 12));
    }
    // The first replacement clears the marks of all; then only pages 1 and 3 are used.
    enter(&atc, fill_at(0x10_0000, 0, 12));
    assert!(!hits(&mut engine, 0));
    assert!(hits(&mut engine, 0x1000) && hits(&mut engine, 0x3000));
    enter(&atc, fill_at(0x11_0000, 0, 12));
    assert!(hits(&mut engine, 0x1000) && hits(&mut engine, 0x3000));
    assert!(!hits(&mut engine, 0x2000));
    let stats = atc.stats();
    assert_eq!((stats.evictions, stats.live_entries), (2, 4));
}

#[test]
fn test_fill_when_the_page_is_the_last_of_the_address_space_is_found_and_purged() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    let top = u64::MAX - 0xfff;
    enter(&atc, fill_at(top, 0, 12));
    assert_eq!(
        engine.access(ASID, u64::MAX, 8, Access::Read).expect("hit").len(),
        1
    );
    assert_eq!(atc.purge(range(top, u64::MAX)).entries, 1);
    enter(&atc, fill_at(top, 0, 12));
    // The end wrapped around: taken for everything.
    assert_eq!(atc.purge(range(top, 0)).entries, 1);
}

#[test]
fn test_engine_when_all_are_taken_is_none_until_one_is_given_back() {
    let config = AtcConfig {
        engines: 2,
        ..AtcConfig::default()
    };
    let atc = atc_over(1 << 16, config);
    let first = atc.engine().expect("first");
    let _second = atc.engine().expect("second");
    assert!(atc.engine().is_none());
    drop(first);
    assert!(atc.engine().is_some());
}

#[test]
fn test_fill_when_the_target_is_bad_enters_nothing() {
    use crate::dma::DmaError;
    let dma = Space::new();
    dma.map(0, 1 << 21, memfd(1 << 21), 0, Prot::READ_ONLY)
        .expect("map");
    let atc = Atc::new(AtcConfig::default(), dma);
    atc.open_miss(0, ASID, 0);
    let refused = |fill: Fill| atc.fill(0, fill).expect_err("bad target");
    assert!(matches!(
        refused(fill_at(0, 0, 12)),
        FillRefused::Target(DmaError::Protection { access: "writes", .. })
    ));
    let clean = Fill {
        writable: false,
        ..fill_at(0, 0, 12)
    };
    let unaligned = Fill {
        size: PageSize::SIZE_2M,
        iova: 0x1000,
        ..clean
    };
    assert!(matches!(
        refused(unaligned),
        FillRefused::Target(DmaError::Unaligned { .. })
    ));
    let outside = Fill {
        iova: 1 << 21,
        ..clean
    };
    assert!(matches!(
        refused(outside),
        FillRefused::Target(DmaError::NotMapped { .. })
    ));
    let larger = Fill {
        size: size(22),
        ..clean
    };
    assert!(matches!(
        refused(larger),
        FillRefused::Target(DmaError::NotMapped { .. })
    ));
    assert_eq!(atc.fill(0, clean), Ok(()));
    assert_eq!(atc.fill(1, clean), Err(FillRefused::NoTicket));
    assert_eq!(atc.fill(usize::MAX, clean), Err(FillRefused::NoTicket));
    let stats = atc.stats();
    assert_eq!((stats.fills, stats.fills_refused), (1, 6));
}

#[test]
fn test_access_when_the_clean_check_is_off_stores_only_where_the_mapping_allows() {
    // The fault that `--break clean` injects has to exist, and must not crash the device.
    let dma = Space::new();
    dma.map(0, 0x1000, memfd(0x1000), 0, Prot::READ_WRITE)
        .expect("map");
    dma.map(0x1000, 0x1000, memfd(0x1000), 0, Prot::READ_ONLY)
        .expect("map");
    let checks = Checks {
        clean: false,
        ..Checks::ALL
    };
    let atc = Atc::new(with_checks(checks), dma);
    let mut engine = atc.engine().expect("engine");
    for iova in [0, 0x1000] {
        let clean = Fill {
            writable: false,
            ..fill_at(iova, iova, 12)
        };
        enter(&atc, clean);
    }
    engine
        .access(ASID, 0, 1, Access::Write)
        .expect("a store through a clean entry")
        .write_from(&[1]);
    assert_eq!(
        engine
            .access(ASID, 0x1000, 1, Access::Write)
            .expect_err("read-only memory"),
        Miss::ReadOnly
    );
}

#[test]
fn test_access_when_a_guard_was_forgotten_is_refused() {
    // A thread of its own: the count of guards that it holds stays wrong.
    let panic = std::thread::spawn(|| {
        let atc = atc_over(1 << 16, AtcConfig::default());
        enter(&atc, fill_at(0, 0, 12));
        // Its slot stays taken, too: giving it back would be refused.
        let mut engine = std::mem::ManuallyDrop::new(atc.engine().expect("engine"));
        std::mem::forget(engine.access(ASID, 0, 1, Access::Read));
        let _ = engine.access(ASID, 0, 1, Access::Read);
    })
    .join()
    .expect_err("refused");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"an access inside an access"));
}
