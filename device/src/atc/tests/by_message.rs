//! The sanitizer and accesses to memory that has no file.

use std::sync::mpsc::channel;
use std::thread;

use super::*;

/// Memory that has to be asked for.
const PRIVATE: u64 = 1 << 32;

fn findings(checks: Checks, act: impl FnOnce(&Arc<Atc>)) -> Findings {
    let atc = atc_over(
        4 << 20,
        AtcConfig {
            by_message: true,
            ..sanitized(checks)
        },
    );
    atc.dma()
        .map_by_message(PRIVATE, 1 << 20, Prot::READ_WRITE)
        .expect("map");
    enter(&atc, fill_at(0x5000, PRIVATE, 12));
    act(&atc);
    atc.findings().expect("a sanitizer")
}

fn ask(engine: &mut Engine, access: Access) -> Asking<'_> {
    match engine.translate(ASID, 0x5010, 8, access) {
        Ok(Translation::Asking(asking)) => asking,
        other => panic!("{other:?}"),
    }
}

/// With the check off exactly `class` is found, and with it on nothing is.
fn on_and_off(class: Defect, broken: Checks, act: impl Fn(&Arc<Atc>, bool)) -> Report {
    let control = findings(Checks::ALL, |atc| act(atc, false));
    assert_eq!(control.defects, 0, "{control:#?}");
    let found = findings(broken, |atc| act(atc, true));
    let classes: Vec<_> = found.reports.iter().map(|report| report.class).collect();
    assert_eq!(classes, [class], "{found:#?}");
    found.reports[0].clone()
}

#[test]
fn test_sanitizer_when_a_purge_does_not_wait_for_a_sent_store_reports_it() {
    let broken = Checks {
        drain: false,
        ..Checks::ALL
    };
    let report = on_and_off(Defect::CompletionBeforeDrain, broken, |atc, broken| {
        let mut engine = atc.engine().expect("an engine");
        let asking = ask(&mut engine, Access::Write);
        assert!(asking.commit());
        let (done, waits) = channel();
        let purging = Arc::clone(atc);
        let purger = thread::spawn(move || {
            purging.purge(range(0x5000, 0x6000));
            // Nobody listens in the control.
            let _ = done.send(());
        });
        if broken {
            waits.recv().expect("the purge does not wait");
        } else {
            while !asking.is_purged() {
                thread::yield_now();
            }
        }
        assert!(asking.end(), "met by the purge");
        purger.join().expect("purged");
    });
    assert_eq!((report.va, report.iova), (0x5010, Some(PRIVATE + 0x10)));
    assert!(report.detail.contains("by message"), "{report}");
}

#[test]
fn test_sanitizer_when_memory_by_message_was_unmapped_reports_its_use() {
    let broken = Checks {
        unmap: false,
        ..Checks::ALL
    };
    on_and_off(Defect::UseAfterUnmap, broken, |atc, broken| {
        atc.dma().unmap(PRIVATE, 1 << 20).expect("unmap");
        let mut engine = atc.engine().expect("an engine");
        if broken {
            assert!(!ask(&mut engine, Access::Read).end());
        } else {
            let missed = engine.translate(ASID, 0x5010, 8, Access::Read).err();
            assert_eq!(missed, Some(Miss::NoEntry));
        }
    });
}

#[test]
fn test_sanitizer_when_memory_goes_while_the_client_is_asked_reports_what_is_used() {
    let broken = Checks {
        unmap: false,
        ..Checks::ALL
    };
    for access in [Access::Read, Access::Write] {
        on_and_off(Defect::UseAfterUnmap, broken, |atc, broken| {
            let mut engine = atc.engine().expect("an engine");
            let asking = ask(&mut engine, access);
            atc.dma().unmap(PRIVATE, 1 << 20).expect("unmap");
            match access {
                // Purged: thrown away, not sent. Broken: used, sent.
                Access::Read => assert_eq!(asking.end(), !broken),
                Access::Write => assert_eq!(asking.commit(), broken),
            }
        });
    }
}

#[test]
fn test_sanitizer_when_an_asid_is_dead_reports_who_asks_by_it() {
    for dead in [false, true] {
        let found = findings(Checks::ALL, |atc| {
            atc.holds(3, &[ASID]);
            if dead {
                atc.holds(3, &[]);
            }
            let mut engine = atc.engine().expect("an engine");
            assert!(!ask(&mut engine, Access::Read).end());
        });
        let classes: Vec<_> = found.reports.iter().map(|report| report.class).collect();
        assert_eq!(classes, vec![Defect::DeadSpace; usize::from(dead)], "{found:#?}");
    }
}
