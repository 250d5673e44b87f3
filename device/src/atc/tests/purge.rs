//! What a purge clears.

use super::*;

#[test]
fn test_s2_access_when_purged_misses_and_accepts_a_new_fill() {
    let atc = atc_over(1 << 20, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0x5000, 0x3000, 12));
    assert_eq!(atc.purge(range(0x5fff, 0x6000)).entries, 1);
    assert!(!hits(&mut engine, 0x5000));
    enter(&atc, fill_at(0x5000, 0x4000, 12));
    assert!(hits(&mut engine, 0x5000));
}

#[test]
fn test_s2_purge_when_sizes_are_mixed_clears_what_it_overlaps_and_nothing_else() {
    const GIB: u64 = 1 << 30;
    let atc = atc_over(GIB, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    let all = |atc: &Atc| {
        atc.purge(Purge::All);
        // (va, shift): neighbours that touch each other.
        for (va, shift) in [
            (GIB, 30),
            (2 * GIB, 21),
            (2 * GIB + 0x20_0000, 16),
            (2 * GIB + 0x21_0000, 12),
            (2 * GIB + 0x21_1000, 12),
        ] {
            enter(atc, fill_at(va, 0, shift));
        }
    };
    // Start, end, entries that go.
    for (start, end, gone) in [
        (GIB + 0x1234_5000, GIB + 0x1234_6000, 1),
        (2 * GIB - 1, 2 * GIB, 1),
        (2 * GIB - 1, 2 * GIB + 1, 2),
        (2 * GIB + 0x1f_f000, 2 * GIB + 0x20_0000, 1),
        (2 * GIB + 0x1f_f000, 2 * GIB + 0x20_0001, 2),
        (2 * GIB + 0x21_0fff, 2 * GIB + 0x21_1000, 1),
        (2 * GIB + 0x21_0fff, 2 * GIB + 0x21_1001, 2),
        (2 * GIB + 0x21_2000, 3 * GIB, 0),
        (0, GIB, 0),
        (0, u64::MAX, 5),
        (GIB + 7, 3 * GIB, 5),
        (GIB, GIB, 0),
    ] {
        all(&atc);
        assert_eq!(atc.purge(range(start, end)).entries, gone, "{start:#x}..{end:#x}");
        assert_eq!(atc.dump(10).len(), 5 - gone);
        for entry in atc.dump(10) {
            assert!(hits(&mut engine, entry.va), "{entry:?}");
        }
    }
}

#[test]
fn test_s2_purge_when_it_meets_a_part_of_a_large_entry_takes_all_of_it() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0x40_0000, 0, 21));
    assert_eq!(atc.purge(range(0x40_7000, 0x40_8000)).entries, 1);
    assert!(!hits(&mut engine, 0x40_0000));
    assert!(!hits(&mut engine, 0x5f_f000));
}

#[test]
fn test_purge_when_of_one_space_leaves_the_others() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    for space in [ASID, OTHER] {
        for page in 0..8 {
            enter(
                &atc,
                Fill {
                    space,
                    ..fill_at(page << 12, 0, 12)
                },
            );
        }
    }
    assert_eq!(atc.purge(range(0, 0x2000)).entries, 2);
    assert_eq!(atc.purge(Purge::Space(OTHER)).entries, 8);
    assert_eq!(atc.dump(100).len(), 6);
    assert!(atc.dump(100).iter().all(|entry| entry.space == ASID));
    assert_eq!(atc.purge(Purge::All).entries, 6);
    let stats = atc.stats();
    assert_eq!(
        (stats.live_entries, stats.purges, stats.entries_purged),
        (0, 3, 16)
    );
}

#[test]
fn test_purge_when_by_target_clears_what_points_there() {
    let atc = atc_over(1 << 22, AtcConfig::default());
    enter(&atc, fill_at(0x1000, 0x3000, 12));
    enter(&atc, fill_at(0x2000, 0x4000, 12));
    enter(&atc, fill_at(0x40_0000, 0x20_0000, 21));
    let target = |start, end| atc.purge(Purge::Target { start, end }).entries;
    assert_eq!(target(0x2000, 0x3000), 0);
    assert_eq!(target(0x3fff, 0x4000), 1);
    assert_eq!(target(0x3f_f000, 0x3f_f001), 1);
    assert_eq!(atc.dump(10).len(), 1);
}

#[test]
fn test_unmap_when_entries_point_into_the_mapping_purges_them() {
    let dma = Space::new();
    for iova in [0, 0x10_0000] {
        dma.map(iova, 0x1_0000, memfd(0x1_0000), 0, Prot::READ_WRITE)
            .expect("map");
    }
    let atc = Atc::new(AtcConfig::default(), Arc::clone(&dma));
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0x1000, 0x1000, 12));
    enter(&atc, fill_at(0x2000, 0x10_0000, 12));
    dma.unmap(0, 0x10_0000).expect("unmap");
    assert!(!hits(&mut engine, 0x1000));
    assert!(hits(&mut engine, 0x2000));
    atc.open_miss(0, ASID, 0x1000);
    assert!(matches!(
        atc.fill(0, fill_at(0x1000, 0x1000, 12)),
        Err(FillRefused::Target(crate::dma::DmaError::NotMapped { .. }))
    ));
    dma.unmap_all();
    assert_eq!(atc.stats().live_entries, 0);
}

#[test]
fn test_bus_master_when_switched_off_purges_everything_and_refuses_fills() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 12));
    atc.dma().set_bus_master(false);
    assert!(!hits(&mut engine, 0));
    atc.open_miss(0, ASID, 0);
    assert_eq!(
        atc.fill(0, fill_at(0, 0, 12)),
        Err(FillRefused::Target(crate::dma::DmaError::BusMasterOff))
    );
    atc.dma().set_bus_master(true);
    assert_eq!(atc.fill(0, fill_at(0, 0, 12)), Ok(()));
    assert!(hits(&mut engine, 0));
}

#[test]
fn test_purge_when_overlap_matching_is_off_misses_large_entries() {
    // The fault that `--break overlap` injects has to exist.
    let atc = atc_over(
        1 << 21,
        with_checks(Checks {
            overlap: false,
            ..Checks::ALL
        }),
    );
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 21));
    assert_eq!(atc.purge(range(0x7000, 0x8000)).entries, 0);
    assert!(hits(&mut engine, 0x7000));
    assert_eq!(atc.purge(range(0, 0x1000)).entries, 1);
}

#[test]
fn test_unmap_when_clearing_and_draining_are_off_still_purges() {
    let checks = Checks {
        clear: false,
        drain: false,
        ..Checks::ALL
    };
    let atc = atc_over(1 << 16, with_checks(checks));
    let mut engine = atc.engine().expect("engine");
    enter(&atc, fill_at(0, 0, 12));
    assert_eq!(atc.purge(Purge::All).entries, 0);
    assert!(hits(&mut engine, 0));
    atc.dma().unmap_all();
    assert!(!hits(&mut engine, 0));
}
