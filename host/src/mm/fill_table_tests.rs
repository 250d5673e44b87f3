use super::*;

const MIB2: u64 = 1 << BUCKET_SHIFT;

fn set_up(entries: usize) -> (Arc<MappedTable>, Arc<FillTable>) {
    let table = MappedTable::create().unwrap();
    let fills = FillTable::with_entries(table.clone(), entries);
    (table, fills)
}

fn cached(table: &MappedTable, va: u64) -> u32 {
    table.cached[bucket_of(va)].load(Ordering::Relaxed)
}

fn total(table: &MappedTable) -> u32 {
    table.header.cached_total.load(Ordering::Relaxed)
}

#[test]
fn test_bits_when_range_is_any_equals_the_naive_set() {
    for first in (0..512).step_by(7) {
        for last in (first..512).step_by(5) {
            let words = bits(first, last);
            for bit in 0..512u64 {
                let set = words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                assert_eq!(set, (first..=last).contains(&bit), "{first}..={last} bit {bit}");
            }
        }
    }
}

#[test]
fn test_raise_when_page_is_raised_twice_counts_it_once() {
    let (table, fills) = set_up(64);
    fills.raise(0x1000, 12);
    fills.raise(0x1fff, 12);
    fills.raise(0x2000, 12);
    assert_eq!((cached(&table, 0), total(&table)), (2, 2));
    fills.clear(0x1000, 0x1001);
    assert_eq!((cached(&table, 0), total(&table)), (1, 1));
    fills.clear(0x1000, 0x2000);
    assert_eq!(total(&table), 1, "a page that is not there is not counted down");
    fills.clear(0, u64::MAX);
    assert_eq!((cached(&table, 0), total(&table)), (0, 0));
    assert_eq!(fills.stats().cleared_pages, 2);
}

#[test]
fn test_raise_when_page_is_larger_marks_all_that_it_covers() {
    let (table, fills) = set_up(2048);
    // 64 KiB: sixteen pages.
    fills.raise(0x1_2345, 16);
    assert_eq!(cached(&table, 0), 16);
    assert!(fills.contains(0x1_0000) && fills.contains(0x1_ffff) && !fills.contains(0x2_0000));
    // 2 MiB: one mark. 1 GiB: one mark in each of 512 buckets.
    fills.raise(MIB2 + 5, 21);
    assert_eq!(cached(&table, MIB2), 1);
    fills.raise(1 << 30, 30);
    assert_eq!(total(&table), 16 + 1 + 512);
    assert!(fills.contains((1 << 30) + 77 * MIB2));
    // Part of a huge page: the device drops all of it, the touched bucket's mark goes.
    fills.clear(MIB2 + 0x5000, MIB2 + 0x6000);
    assert_eq!(cached(&table, MIB2), 0);
    fills.clear((1 << 30) + 3 * MIB2, (1 << 30) + 3 * MIB2 + 1);
    assert_eq!(total(&table), 16 + 511);
}

#[test]
fn test_clear_when_buckets_alias_keeps_the_other_address() {
    let (table, fills) = set_up(64);
    let far = MIB2 * protos::bridge::shared::BUCKETS as u64;
    fills.raise(0x1000, 12);
    fills.raise(far + 0x1000, 12);
    assert_eq!(cached(&table, 0x1000), 2, "both count in one shared bucket");
    fills.clear(far, far + MIB2);
    assert_eq!(cached(&table, 0x1000), 1);
    assert!(fills.contains(0x1000) && !fills.contains(far + 0x1000));
}

#[test]
fn test_overflow_when_table_is_full_makes_every_call_hop_until_all_is_cleared() {
    let (table, fills) = set_up(PROBE);
    let must_hop = || table.header.must_hop.load(Ordering::Relaxed);
    for bucket in 0..PROBE as u64 {
        fills.raise(bucket * MIB2, 12);
    }
    assert_eq!(must_hop(), 0);
    for _ in 0..3 {
        fills.raise(1000 * MIB2, 12);
    }
    assert_eq!(must_hop(), 1, "raised once, not once a fill");
    assert!(fills.stats().overflowed);
    assert!(fills.contains(1000 * MIB2), "anything may be cached");
    fills.clear(0, 4096);
    assert_eq!(must_hop(), 1, "a part does not end it");
    fills.clear_all();
    assert_eq!((must_hop(), total(&table)), (0, 0));
    fills.raise(1000 * MIB2, 12);
    assert_eq!(
        (must_hop(), cached(&table, 1000 * MIB2)),
        (0, 1),
        "entries are used again"
    );
}

#[test]
fn test_entries_when_their_pages_are_cleared_are_used_again() {
    let (table, fills) = set_up(PROBE);
    for bucket in 0..10_000u64 {
        fills.raise(bucket * MIB2 + 0x3000, 12);
        fills.clear(bucket * MIB2, (bucket + 1) * MIB2);
    }
    assert_eq!((total(&table), fills.stats().overflows), (0, 0));
}

#[test]
fn test_s1_fill_when_range_is_changing_is_busy_until_the_end() {
    let (table, fills) = set_up(64);
    let before = fills.begin_fill(0x1000, 12).unwrap();
    assert_eq!(before.generation(), 0);
    let change = table.begin_change(0x1000, 0x2000);
    assert_eq!(fills.begin_fill(0x1000, 12), Err(Busy::InProgress));
    assert!(!fills.is_quiet(&before));
    assert!(
        fills.begin_fill(MIB2, 12).is_ok(),
        "another bucket is not affected"
    );
    assert_eq!(
        fills.begin_fill(0, 30),
        Err(Busy::InProgress),
        "a page that covers the bucket is"
    );
    drop(change);
    assert_eq!(fills.begin_fill(0x1000, 12).unwrap().generation(), 1);
    let all = table.begin_change(0, u64::MAX);
    assert_eq!(fills.begin_fill(MIB2, 12), Err(Busy::InProgress));
    drop(all);
    assert_eq!(fills.stats().put_off, 3);
}

#[test]
fn test_fill_when_put_off_stays_counted() {
    // Undoing the count could take it from another fill of the same page that got through.
    let (table, fills) = set_up(64);
    let change = table.begin_change(0x1000, 0x2000);
    assert!(fills.begin_fill(0x1000, 12).is_err());
    drop(change);
    assert_eq!(cached(&table, 0x1000), 1);
    let _ = fills.begin_fill(0x1000, 12).unwrap();
    assert_eq!(cached(&table, 0x1000), 1);
}

#[test]
#[should_panic(expected = "page shift 11")]
fn test_fill_when_page_shift_is_wrong_panics() {
    let (_table, fills) = set_up(64);
    let _ = fills.begin_fill(0x1000, 11);
}

#[test]
fn test_fill_when_address_is_the_last_one_is_counted() {
    let (table, fills) = set_up(64);
    let _ = fills.begin_fill(u64::MAX, 12).unwrap();
    assert_eq!(total(&table), 1);
    fills.clear(u64::MAX - 5, u64::MAX);
    assert_eq!(total(&table), 0);
}

/// Threads raise and clear in a table that is far too small for them, so entries change hands all the time. Each
/// thread owns its own buckets, so it knows what must be there.
#[test]
fn test_counts_when_threads_race_for_entries_are_exact() {
    let (table, fills) = set_up(PROBE);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let fills = &fills;
            scope.spawn(move || {
                for round in 0..3000u64 {
                    let bucket = (round * 4 + thread) % 40;
                    if bucket % 4 != thread {
                        continue;
                    }
                    let va = bucket * MIB2 + (round % 512) * 4096;
                    fills.raise(va, 12);
                    assert!(fills.contains(va));
                    fills.raise(va ^ 0x1000, 12);
                    fills.clear(bucket * MIB2, (bucket + 1) * MIB2);
                }
            });
        }
    });
    fills.clear_all();
    assert_eq!(total(&table), 0);
    assert!(table.cached.iter().all(|c| c.load(Ordering::Relaxed) == 0));
    assert_eq!(table.header.must_hop.load(Ordering::Relaxed), 0);
    assert_eq!(fills.stats().cached_pages, 0);
}
