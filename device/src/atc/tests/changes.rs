//! The sanitizer's level 2: what a host daemon says of the mappings.

use std::fs::File;
use std::os::unix::fs::FileExt;

use protos::bridge::changes::{CHANGE_BYTES, CHANGES, LOG_BYTES, generation_in};

use super::*;

/// Where the log is.
const LOG: u64 = 1 << 32;
/// The address space that the tests' generations belong to.
const SPACE: u32 = 9;

/// The daemon, with its file.
struct Teller {
    file: File,
    next: u64,
}

impl Teller {
    fn tell(&mut self, (start, end): (u64, u64), generation: u64) {
        let record = [self.next + 1, start, end, generation].map(u64::to_ne_bytes);
        let at = (self.next % CHANGES as u64) * CHANGE_BYTES as u64;
        self.file.write_all_at(record.as_flattened(), at).expect("write");
        self.next += 1;
    }
}

/// An ATC with a sanitizer of level 2, and who tells it.
fn followed() -> (Arc<Atc>, Teller) {
    let atc = atc_over(
        4 << 20,
        AtcConfig {
            follow: true,
            ..sanitized(Checks::ALL)
        },
    );
    let fd = memfd(LOG_BYTES as u64);
    let file = File::from(fd.try_clone().expect("a descriptor"));
    atc.dma()
        .map(LOG, LOG_BYTES as u64, fd, 0, Prot::READ_ONLY)
        .expect("map");
    atc.follow_changes(Some(LOG));
    (atc, Teller { file, next: 0 })
}

fn page(va: u64, tag: u64) -> Fill {
    Fill {
        tag,
        ..fill_at(va, va, 12)
    }
}

fn generation(number: u64) -> u64 {
    generation_in(SPACE, number)
}

/// Exactly these, by class; what was found.
fn found(atc: &Atc, classes: &[Defect]) -> Findings {
    let findings = atc.findings().expect("a sanitizer");
    let all: Vec<_> = findings.reports.iter().map(|report| report.class).collect();
    assert_eq!(all, classes, "{findings:#?}");
    findings
}

#[test]
fn test_level_2_when_a_change_is_not_purged_reports_the_access() {
    let (atc, mut daemon) = followed();
    let mut engine = atc.engine().expect("an engine");
    enter(&atc, page(0x5000, generation(7)));
    enter(&atc, page(0x6000, generation(7)));
    assert!(hits(&mut engine, 0x5000));
    daemon.tell((0x5000, 0x6000), generation(8));
    // What lies beside it is as it was.
    assert!(hits(&mut engine, 0x6000));
    found(&atc, &[]);
    assert!(hits(&mut engine, 0x5080));
    let findings = found(&atc, &[Defect::StaleTranslation]);
    let report = &findings.reports[0];
    assert_eq!((report.va, report.iova), (0x5080, Some(0x5080)));
    assert_eq!(report.entry.expect("an entry").tag, generation(7));
    assert!(report.detail.contains("0x5000 to 0x6000"), "{report}");
    assert_eq!(findings.changes, Some(1));
}

#[test]
fn test_level_2_when_changes_are_purged_or_none_of_its_business_says_nothing() {
    let (atc, mut daemon) = followed();
    let mut engine = atc.engine().expect("an engine");
    enter(&atc, page(0x5000, generation(7)));
    // As it should be: purged, then told; and looked up anew.
    atc.purge(range(0x5000, 0x6000));
    daemon.tell((0x5000, 0x6000), generation(8));
    assert!(!hits(&mut engine, 0x5000));
    enter(&atc, page(0x5000, generation(8)));
    assert!(hits(&mut engine, 0x5000));
    // Somebody else's, and a driver that knows no generations.
    daemon.tell((0, u64::MAX), generation_in(SPACE + 1, 1000));
    assert!(hits(&mut engine, 0x5000));
    enter(&atc, page(0x7000, 0));
    daemon.tell((0x7000, 0x8000), generation(9));
    assert!(hits(&mut engine, 0x7000));
    assert_eq!(found(&atc, &[]).changes, Some(3));
}

#[test]
fn test_level_2_when_an_access_is_running_at_the_end_of_a_change_reports_it() {
    for still_running in [true, false] {
        let (atc, mut daemon) = followed();
        let mut engine = atc.engine().expect("an engine");
        enter(&atc, page(0x5000, generation(7)));
        let guard = engine.access(ASID, 0x5000, 8, Access::Write).expect("a hit");
        if still_running {
            daemon.tell((0x5000, 0x6000), generation(8));
            drop(guard);
            let findings = found(&atc, &[Defect::StaleTranslation]);
            assert!(findings.reports[0].detail.contains("still running"));
            continue;
        }
        drop(guard);
        atc.purge(range(0x5000, 0x6000));
        daemon.tell((0x5000, 0x6000), generation(8));
        assert!(!hits(&mut engine, 0x5000));
        found(&atc, &[]);
    }
}

#[test]
fn test_level_2_when_an_old_answer_is_entered_reports_the_fill() {
    let (atc, mut daemon) = followed();
    let mut engine = atc.engine().expect("an engine");
    enter(&atc, page(0x9000, generation(8)));
    daemon.tell((0x5000, 0x6000), generation(8));
    // Heard by anybody's access.
    assert!(hits(&mut engine, 0x9000));
    enter(&atc, page(0x5000, generation(7)));
    let findings = found(&atc, &[Defect::StaleTranslation]);
    assert!(findings.reports[0].detail.contains("entered later"));
    assert_eq!(findings.reports[0].engine, None);
}

#[test]
fn test_level_2_when_the_log_runs_over_or_is_garbage_goes_on() {
    let (atc, mut daemon) = followed();
    let mut engine = atc.engine().expect("an engine");
    enter(&atc, page(0x5000, generation(7)));
    for _ in 0..2 * CHANGES + 17 {
        daemon.tell((0x1000, 0x2000), generation(1));
    }
    assert!(hits(&mut engine, 0x5000));
    let heard = found(&atc, &[]).changes.expect("level 2");
    assert!((1..CHANGES as u64).contains(&heard), "{heard}");
    daemon.tell((0x5000, 0x6000), generation(8));
    assert!(hits(&mut engine, 0x5000));
    found(&atc, &[Defect::StaleTranslation]);
    // Whatever a client writes there.
    for byte in [0xff, 0x80, 0] {
        daemon
            .file
            .write_all_at(&vec![byte; LOG_BYTES], 0)
            .expect("write");
        assert!(hits(&mut engine, 0x5000));
    }
    daemon.file.set_len(0).expect("truncate");
    assert!(hits(&mut engine, 0x5000));
    atc.dma().unmap(LOG, LOG_BYTES as u64).expect("unmap");
    assert!(hits(&mut engine, 0x5000));
    // A new one is read from its beginning.
    let (_, mut again) = followed();
    let fd = again.file.try_clone().expect("a descriptor").into();
    atc.dma()
        .map(LOG, LOG_BYTES as u64, fd, 0, Prot::READ_ONLY)
        .expect("map");
    atc.follow_changes(Some(LOG));
    let before = atc.findings().expect("a sanitizer").defects;
    again.tell((0x5000, 0x6000), generation(100));
    assert!(hits(&mut engine, 0x5000));
    assert!(atc.findings().expect("a sanitizer").defects > before);
}
