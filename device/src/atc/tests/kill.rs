//! Fills against purges: the kill bit, purges in progress, spans.

use super::*;

#[test]
fn test_s1_fill_when_its_miss_was_purged_is_refused_until_it_misses_again() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let mut engine = atc.engine().expect("engine");
    let fill = fill_at(0x5000, 0x3000, 12);
    atc.open_miss(3, ASID, 0x5123);
    assert!(!atc.miss_killed(3));
    assert_eq!(atc.purge(range(0x5000, 0x6000)).tickets, 1);
    assert!(atc.miss_killed(3));
    assert_eq!(atc.fill(3, fill), Err(FillRefused::Killed));
    assert!(!hits(&mut engine, 0x5000));
    atc.open_miss(3, ASID, 0x5123);
    assert!(!atc.miss_killed(3));
    assert_eq!(atc.fill(3, fill), Ok(()));
    assert!(hits(&mut engine, 0x5000));
    atc.close_miss(3);
    assert_eq!(atc.fill(3, fill), Err(FillRefused::NoTicket));
}

#[test]
fn test_s1_fill_when_killed_and_its_memory_is_gone_is_killed_and_no_error() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let fill = fill_at(0x5000, 0x3000, 12);
    atc.open_miss(3, ASID, 0x5123);
    // The answer is prepared; now its page is invalidated, and then its memory taken away.
    let purge = atc.purge_begin(range(0x5000, 0x6000));
    atc.dma().unmap(0, 1 << 16).expect("unmap");
    assert_eq!(atc.fill(3, fill), Err(FillRefused::Purging));
    atc.purge_finish(purge);
    assert_eq!(atc.fill(3, fill), Err(FillRefused::Killed));
    assert_eq!(atc.stats().fills_refused, 2);
    // Nothing was invalidated since: now it is software's mistake.
    atc.open_miss(3, ASID, 0x5123);
    assert!(matches!(atc.fill(3, fill), Err(FillRefused::Target(_))));
}

#[test]
fn test_s1_fill_when_the_kill_is_off_enters_a_stale_translation() {
    // The fault that `--break kill` injects has to exist, and the test above has to notice it.
    let atc = atc_over(
        1 << 16,
        with_checks(Checks {
            kill: false,
            ..Checks::ALL
        }),
    );
    let mut engine = atc.engine().expect("engine");
    atc.open_miss(3, ASID, 0x5123);
    atc.purge(range(0x5000, 0x6000));
    assert_eq!(atc.fill(3, fill_at(0x5000, 0x3000, 12)), Ok(()));
    assert!(hits(&mut engine, 0x5000));
}

#[test]
fn test_s1_fill_when_other_pages_or_spaces_were_purged_is_accepted() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    atc.open_miss(0, ASID, 0x5000);
    atc.purge(range(0x4000, 0x5000));
    atc.purge(range(0x3000, 0x3001));
    atc.purge(Purge::Space(OTHER));
    atc.purge(Purge::Target {
        start: 0x8000,
        end: 0x9000,
    });
    assert_eq!(atc.fill(0, fill_at(0x5000, 0x3000, 12)), Ok(()));
}

#[test]
fn test_s1_fill_when_larger_than_its_miss_is_refused_if_any_part_was_purged() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    for (start, end) in [
        (0x40_7000, 0x40_8000),
        (0x5f_ffff, 0x60_0000),
        (0x30_0000, 0x40_0001),
    ] {
        atc.open_miss(0, ASID, 0x40_3000);
        atc.purge(range(start, end));
        assert_eq!(
            atc.fill(0, fill_at(0x40_3000, 0, 21)),
            Err(FillRefused::Killed),
            "{start:#x}..{end:#x}"
        );
    }
    // The missed page itself was not purged: the answer may be smaller.
    atc.open_miss(0, ASID, 0x40_3000);
    atc.purge(range(0x40_7000, 0x40_8000));
    assert!(!atc.miss_killed(0));
    assert_eq!(atc.fill(0, fill_at(0x40_3000, 0x3000, 12)), Ok(()));
}

#[test]
fn test_s1_fill_when_two_purges_surround_it_counts_as_purged() {
    // The union is a hull: it may refuse too much (the access misses again), never too little.
    let atc = atc_over(1 << 16, AtcConfig::default());
    atc.open_miss(0, ASID, 0x5000);
    atc.purge(range(0x1000, 0x2000));
    atc.purge(range(0x9000, 0xa000));
    assert_eq!(atc.fill(0, fill_at(0x5000, 0, 12)), Err(FillRefused::Killed));
    assert_eq!(atc.fill(0, fill_at(0xa000, 0, 12)), Ok(()));
}

#[test]
fn test_s1_fill_when_it_answers_for_another_space_minds_purges_of_that_space() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let foreign = Fill {
        space: OTHER,
        ..fill_at(0x5000, 0, 12)
    };
    atc.open_miss(0, ASID, 0x5000);
    assert_eq!(atc.fill(0, foreign), Ok(()));
    atc.purge(Purge::Range {
        space: OTHER,
        start: 0x5000,
        end: 0x6000,
    });
    assert_eq!(atc.fill(0, foreign), Err(FillRefused::Killed));
    assert_eq!(atc.fill(0, fill_at(0x5000, 0, 12)), Ok(()));
}

#[test]
fn test_s1_fill_when_everything_was_purged_is_refused() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    for what in [Purge::All, Purge::Space(ASID), range(0, u64::MAX)] {
        atc.open_miss(0, ASID, 0x5000);
        atc.purge(what);
        assert_eq!(
            atc.fill(0, fill_at(0x5000, 0, 12)),
            Err(FillRefused::Killed),
            "{what:?}"
        );
    }
}

#[test]
fn test_s1_fill_when_a_purge_is_in_progress_is_refused_even_for_a_later_miss() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    let first = atc.purge_begin(range(0x7000, 0x8000));
    let second = atc.purge_begin(range(0x7000, 0x8000));
    let by_target = atc.purge_begin(Purge::Target {
        start: 0x9000,
        end: 0xa000,
    });
    atc.open_miss(0, ASID, 0x7000);
    let page = fill_at(0x7000, 0x3000, 12);
    assert_eq!(atc.purge_progress(0, &page), PurgeProgress::Running);
    assert_eq!(atc.fill(0, page), Err(FillRefused::Purging));
    assert_eq!(atc.fill(0, fill_at(0, 0, 21)), Err(FillRefused::Purging));
    assert_eq!(
        atc.fill(0, fill_at(0x6000, 0x9000, 12)),
        Err(FillRefused::Purging)
    );
    assert_eq!(atc.fill(0, fill_at(0x6000, 0x3000, 12)), Ok(()));
    // One of two is still in progress: a single "in progress" bit would be clear now.
    let _ = atc.purge_finish(second);
    assert_eq!(atc.fill(0, page), Err(FillRefused::Purging));
    let _ = atc.purge_finish(first);
    assert_eq!(atc.fill(0, page), Ok(()));
    let _ = atc.purge_finish(by_target);
    assert_eq!(atc.stats().active_purges, 0);
}

#[test]
fn test_s1_fill_when_more_purges_run_than_are_listed_is_refused() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    let tokens: Vec<_> = (0..200u64)
        .map(|i| atc.purge_begin(range(i << 32, (i << 32) + 1)))
        .collect();
    atc.open_miss(0, ASID, 0x5000);
    assert_eq!(atc.fill(0, fill_at(0x5000, 0, 12)), Err(FillRefused::Purging));
    assert_eq!(atc.stats().active_purges, 200);
    for token in tokens.into_iter().rev() {
        let _ = atc.purge_finish(token);
    }
    assert_eq!(atc.fill(0, fill_at(0x5000, 0, 12)), Ok(()));
}

#[test]
fn test_purge_progress_when_a_purge_of_the_span_returns_is_finished() {
    let atc = atc_over(1 << 21, AtcConfig::default());
    let large = fill_at(0, 0, 21);
    atc.open_miss(0, ASID, 0x1000);
    assert_eq!(atc.purge_progress(0, &large), PurgeProgress::None);
    let token = atc.purge_begin(range(0x7000, 0x8000));
    assert_eq!(atc.purge_progress(0, &large), PurgeProgress::Running);
    let _ = atc.purge_finish(token);
    assert_eq!(atc.purge_progress(0, &large), PurgeProgress::Finished);
    assert_eq!(
        atc.purge_progress(0, &fill_at(0x1000, 0, 12)),
        PurgeProgress::None
    );
}
