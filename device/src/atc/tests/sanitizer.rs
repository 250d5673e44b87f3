//! The sanitizer: each class is reported where its check is off, and nothing is where it is on.

use std::sync::mpsc::channel;
use std::thread;

use super::*;

/// What a sanitizer found after `act`.
fn findings(checks: Checks, act: impl FnOnce(&Arc<Atc>)) -> Findings {
    let atc = atc_over(4 << 20, sanitized(checks));
    act(&atc);
    atc.findings().expect("a sanitizer")
}

/// Exactly one report, of this class.
fn only(findings: &Findings, class: Defect) -> &Report {
    let classes: Vec<_> = findings.reports.iter().map(|report| report.class).collect();
    assert_eq!(classes, [class], "{findings:#?}");
    &findings.reports[0]
}

/// With the check off exactly `class` is found, and with it on nothing is. What was found without it.
fn on_and_off(class: Defect, broken: Checks, act: impl Fn(&Arc<Atc>)) -> Report {
    let control = findings(Checks::ALL, &act);
    assert_eq!(control.defects, 0, "control: {control:#?}");
    assert_eq!(control.reports, []);
    let found = findings(broken, &act);
    only(&found, class).clone()
}

fn by() -> Initiator {
    Initiator::new(3, 7)
}

#[test]
fn test_sanitizer_when_a_killed_fill_is_entered_reports_fill_after_kill() {
    let broken = Checks {
        kill: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::FillAfterKill, broken, |atc| {
        atc.open_miss_by(3, ASID, 0x5123, by());
        atc.purge(range(0x5000, 0x6000));
        let _ = atc.fill(3, fill_at(0x5000, 0x3000, 12));
        // What comes of it is the same defect.
        hits(&mut atc.engine().expect("engine"), 0x5000);
    });
    assert_eq!(
        (report.space, report.va, report.iova),
        (ASID, 0x5000, Some(0x3000))
    );
    assert_eq!((report.count, report.by), (1, by()));
    let entry = report.entry.expect("an entry");
    assert_eq!((entry.fill, entry.va, entry.iova), (1, 0x5000, 0x3000));
    let [purge] = report.purges[..] else {
        panic!("{:?}", report.purges)
    };
    assert_eq!(purge.what, range(0x5000, 0x6000));
    let finished = purge.finished.expect("finished");
    assert!(entry.missed.event < purge.begun.event && purge.begun.event < finished.event);
    assert!(finished.event < entry.filled.event);
    let text = Report {
        names: Names {
            queue: "CBR",
            ..Names::default()
        },
        ..report
    }
    .to_string();
    for part in [
        "fill-after-kill",
        "S1",
        "0x5000",
        "context 3, CBR 7",
        "fill 1",
        "purge   1",
        "IOVA 0x3000",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn test_sanitizer_when_a_fill_is_entered_during_a_purge_reports_fill_after_kill() {
    let broken = Checks {
        active: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::FillAfterKill, broken, |atc| {
        let purge = atc.purge_begin(range(0x5000, 0x6000));
        atc.open_miss(3, ASID, 0x5123);
        let _ = atc.fill(3, fill_at(0x5000, 0x3000, 12));
        let _ = atc.purge_finish(purge);
    });
    assert_eq!(report.purges.len(), 1);
    assert_eq!(report.purges[0].finished, None);
}

#[test]
fn test_sanitizer_when_only_the_missed_page_is_looked_at_reports_fill_after_kill() {
    let broken = Checks {
        span: false,
        ..Checks::ALL
    };
    on_and_off(Defect::FillAfterKill, broken, |atc| {
        atc.open_miss(0, ASID, 0x40_3000);
        atc.purge(range(0x40_7000, 0x40_8000));
        let _ = atc.fill(0, fill_at(0x40_3000, 0, 21));
    });
}

#[test]
fn test_sanitizer_when_fills_are_entered_beside_purges_says_nothing() {
    // The ATC may refuse more than it must (the union is a hull); what it accepts is judged by each purge itself.
    let broken = Checks {
        kill: false,
        ..Checks::ALL
    };
    let found = findings(broken, |atc| {
        atc.open_miss(0, ASID, 0x5000);
        atc.purge(range(0x1000, 0x2000));
        atc.purge(range(0x9000, 0xa000));
        atc.purge(Purge::Space(OTHER));
        atc.purge(range(0x5000, 0x5000));
        atc.fill(0, fill_at(0x5000, 0, 12)).expect("the check is off");
        // Before the miss.
        atc.purge(range(0x5000, 0x6000));
        atc.open_miss(0, ASID, 0x5000);
        atc.fill(0, fill_at(0x5000, 0, 12)).expect("fill");
    });
    assert_eq!((found.defects, found.unjudged), (0, 0), "{found:#?}");
}

/// A purge while another thread is inside an access of it, or of `va` if that is another page.
fn purge_under_an_access(atc: &Arc<Atc>, va: u64, purge: impl FnOnce(&Atc, Box<dyn FnOnce()>)) {
    enter(atc, fill_at(0x5000, 0, 12));
    enter(atc, fill_at(0x6000, 0x1000, 12));
    let (inside, is_inside) = channel();
    let (go, resume) = channel::<()>();
    let worker = {
        let atc = Arc::clone(atc);
        thread::spawn(move || {
            let mut engine = atc.engine().expect("engine");
            engine.works_for(by());
            let _guard = engine.access(ASID, va, 64, Access::Write).expect("hit");
            inside.send(()).expect("the test listens");
            resume.recv().expect("the test resumes");
        })
    };
    is_inside.recv().expect("inside");
    purge(atc, Box::new(move || go.send(()).expect("the worker waits")));
    worker.join().expect("worker");
}

#[test]
fn test_sanitizer_when_a_purge_does_not_drain_reports_completion_before_drain() {
    let broken = Checks {
        drain: false,
        ..Checks::ALL
    };
    let found = findings(broken, |atc| {
        purge_under_an_access(atc, 0x5800, |atc, leave| {
            atc.purge(range(0x5000, 0x6000));
            leave();
        });
    });
    let report = only(&found, Defect::CompletionBeforeDrain);
    assert_eq!((report.va, report.iova, report.by), (0x5800, Some(0x800), by()));
    assert_eq!(report.access, Some(Access::Write));
    assert!(
        report.engine.is_some() && report.detail.contains("has returned"),
        "{report}"
    );
}

#[test]
fn test_sanitizer_when_a_purge_is_answered_early_reports_completion_before_drain() {
    // The purge itself drains; who asked for it was told too early.
    let found = findings(Checks::ALL, |atc| {
        purge_under_an_access(atc, 0x5800, |atc, leave| {
            let token = atc.purge_begin(range(0x5000, 0x6000));
            atc.answered(token.mark(), || "is complete, says handle 9".into());
            leave();
            let _ = atc.purge_finish(token);
        });
    });
    let report = only(&found, Defect::CompletionBeforeDrain);
    assert!(report.detail.contains("handle 9"), "{report}");
    // At the right time nothing is wrong.
    let found = findings(Checks::ALL, |atc| {
        purge_under_an_access(atc, 0x5800, |atc, leave| {
            let token = atc.purge_begin(range(0x5000, 0x6000));
            let mark = token.mark();
            leave();
            let _ = atc.purge_finish(token);
            atc.answered(mark, || unreachable!("nobody is inside"));
        });
    });
    assert_eq!(found.defects, 0, "{found:#?}");
}

#[test]
fn test_sanitizer_when_an_access_is_elsewhere_lets_an_undrained_purge_pass() {
    let broken = Checks {
        drain: false,
        ..Checks::ALL
    };
    let found = findings(broken, |atc| {
        purge_under_an_access(atc, 0x6000, |atc, leave| {
            atc.purge(range(0x5000, 0x6000));
            leave();
        });
    });
    assert_eq!(found.defects, 0, "{found:#?}");
}

#[test]
fn test_sanitizer_when_a_purge_clears_nothing_reports_use_after_purge() {
    let broken = Checks {
        clear: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::UseAfterPurge, broken, |atc| {
        enter(atc, fill_at(0x5000, 0, 12));
        atc.purge(range(0x5000, 0x6000));
        hits(&mut atc.engine().expect("engine"), 0x5010);
    });
    assert_eq!(
        (report.va, report.iova, report.purges.len()),
        (0x5010, Some(0x10), 1)
    );
}

#[test]
fn test_sanitizer_when_a_purge_leaves_a_larger_entry_reports_use_after_purge() {
    let broken = Checks {
        overlap: false,
        ..Checks::ALL
    };
    let act = |atc: &Arc<Atc>| {
        enter(atc, fill_at(0x40_0000, 0, 21));
        atc.purge(range(0x40_7000, 0x40_8000));
        hits(&mut atc.engine().expect("engine"), 0x40_7000);
    };
    on_and_off(Defect::UseAfterPurge, broken, act);
    // As does a device that purges entries of one size only.
    let found = findings(Checks::ALL, |atc| {
        enter(atc, fill_at(0x40_0000, 0, 21));
        let purge = atc.purge_begin_of_size(range(0x40_7000, 0x40_8000), Some(PageSize::SIZE_4K));
        let _ = atc.purge_finish(purge);
        hits(&mut atc.engine().expect("engine"), 0x40_7000);
    });
    only(&found, Defect::UseAfterPurge);
}

#[test]
fn test_sanitizer_when_unmapped_memory_is_used_reports_use_after_unmap() {
    let broken = Checks {
        unmap: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::UseAfterUnmap, broken, |atc| {
        enter(atc, fill_at(0x5000, 0x3000, 12));
        atc.dma().unmap(0, 4 << 20).expect("unmap");
        hits(&mut atc.engine().expect("engine"), 0x5000);
    });
    assert_eq!(report.iova, Some(0x3000));
    assert!(
        report.to_string().contains("DMA_UNMAP of IOVA 0x0 to 0x400000"),
        "{report}"
    );
}

#[test]
fn test_sanitizer_when_memory_comes_back_lets_fills_point_there() {
    let found = findings(Checks::ALL, |atc| {
        enter(atc, fill_at(0x5000, 0x3000, 12));
        atc.open_miss(3, ASID, 0x5000);
        atc.dma().unmap(0, 4 << 20).expect("unmap");
        atc.dma()
            .map(0, 1 << 16, memfd(1 << 16), 0, Prot::READ_WRITE)
            .expect("map");
        atc.fill(3, fill_at(0x5000, 0x3000, 12))
            .expect("the memory is there");
        assert!(hits(&mut atc.engine().expect("engine"), 0x5000));
    });
    assert_eq!(found.defects, 0, "{found:#?}");
}

#[test]
fn test_sanitizer_when_a_space_is_not_in_use_reports_dead_space() {
    let found = findings(Checks::ALL, |atc| {
        let mut engine = atc.engine().expect("engine");
        enter(atc, fill_at(0x5000, 0, 12));
        // Nobody has said who uses what: nothing is wrong.
        assert!(hits(&mut engine, 0x5000));
        atc.holds(1, &[OTHER]);
        atc.holds(2, &[OTHER, ASID]);
        assert!(hits(&mut engine, 0x5000));
        assert_eq!(atc.findings().expect("a sanitizer").defects, 0);
        atc.holds(2, &[]);
        assert!(hits(&mut engine, 0x5000));
        atc.holds(0, &[ASID]);
        assert!(hits(&mut engine, 0x5000));
    });
    let report = only(&found, Defect::DeadSpace);
    assert_eq!((report.count, report.space), (1, ASID));
    assert!(report.detail.contains("0x654321 of context 1"), "{report}");
}

#[test]
fn test_sanitizer_when_a_store_goes_through_a_clean_entry_reports_it() {
    let broken = Checks {
        clean: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::WriteThroughClean, broken, |atc| {
        let clean = Fill {
            writable: false,
            ..fill_at(0x5000, 0, 12)
        };
        enter(atc, clean);
        let mut engine = atc.engine().expect("engine");
        assert!(hits(&mut engine, 0x5000), "loads are allowed");
        drop(engine.access(ASID, 0x5000, 8, Access::Write));
    });
    assert_eq!(report.access, Some(Access::Write));
    assert!(report.to_string().contains("clean, generation"), "{report}");
}

#[test]
fn test_sanitizer_when_a_defect_comes_again_counts_it_and_keeps_few() {
    let broken = Checks {
        kill: false,
        ..Checks::ALL
    };
    let found = findings(broken, |atc| {
        for round in 0..3 {
            for page in 0..100 {
                let va = page << 12;
                atc.open_miss(0, ASID, va);
                atc.purge(range(va, va + 1));
                atc.fill(0, fill_at(va, 0, 12)).expect("the check is off");
                // Enough to be forgotten, and no defect.
                assert!(round > 0 || atc.fill(0, fill_at(1 << 40, 0, 12)).is_ok());
            }
        }
    });
    assert_eq!((found.defects, found.reports.len()), (300, Findings::MAX_REPORTS));
    assert!(found.reports.iter().all(|report| report.count == 3));
    assert_eq!(
        found.defects_without_report,
        3 * (100 - Findings::MAX_REPORTS as u64)
    );
}

#[test]
fn test_sanitizer_when_history_is_lost_judges_nothing() {
    let found = findings(Checks::ALL, |atc| {
        atc.open_miss(0, ASID, 0x5000);
        for _ in 0..10_000 {
            atc.purge(range(0x9000, 0xa000));
        }
        atc.fill(0, fill_at(0x5000, 0, 12)).expect("fill");
    });
    assert_eq!((found.defects, found.unjudged), (0, 1), "{found:#?}");
}

#[test]
fn test_sanitizer_when_off_has_no_findings() {
    let atc = atc_over(1 << 16, AtcConfig::default());
    assert!(atc.findings().is_none() && !atc.is_sanitized());
}
