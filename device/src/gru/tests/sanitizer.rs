//! The device under its sanitizer: each fault that can be injected is reported by name, and the same delays with
//! every check on are not.

use super::*;
use crate::atc::{Defect, Findings, Report};
use crate::faults::BreakPlan;
use crate::gru::chiplet::Phase;
use protos::gru::cb::{ExplicitOp, XType};

const VA: u64 = 0x7000_0000;
const CBR: usize = 2;

fn rig(broken: BreakPlan, plan: &str) -> Arc<Rig> {
    let rig = Rig::new(GruConfig {
        sanitize: true,
        broken,
        faults: plan.parse().unwrap(),
        ..config(Doorbell::Poll)
    });
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 4 * PAGE);
    rig
}

fn intact(plan: &str) -> Arc<Rig> {
    rig(BreakPlan::default(), plan)
}

fn findings(rig: &Rig) -> Findings {
    rig.gru.findings().expect("a sanitizer")
}

/// Exactly one report, of this class.
fn only(rig: &Rig, class: Defect) -> Report {
    rig.until("a report", || (findings(rig).defects > 0).then_some(()));
    let findings = findings(rig);
    let classes: Vec<_> = findings.reports.iter().map(|report| report.class).collect();
    assert_eq!(classes, [class], "{findings:#?}");
    findings.reports[0].clone()
}

fn nothing(rig: &Rig) {
    let findings = findings(rig);
    assert_eq!(findings.reports, [], "{findings:#?}");
    assert!(findings.checked > 0, "it looked at something");
}

fn vload(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

fn vset(va: u64) -> Instruction {
    Instruction::vset(va, 0x77, XType::DWORD, 512, 1)
}

/// A dropin that is held until its page has been purged.
fn late_dropin(rig: &Rig) {
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.serve_cbr(CBR);
    rig.map_page(ASID, VA, PAGE, true);
    rig.purge(0, ASID, VA, 1);
    assert_eq!(rig.finish(0), Status::IDLE);
}

/// The first dropin, but not the one after it.
const HELD: &str = "dropin-delay=2,seed=1,margin-ms=1,limit-ms=20000";

#[test]
fn test_sanitizer_when_kill_bit_is_broken_reports_the_dropin() {
    let broken = rig(
        BreakPlan {
            kill_bit: true,
            ..BreakPlan::default()
        },
        HELD,
    );
    late_dropin(&broken);
    let report = only(&broken, Defect::FillAfterKill);
    assert_eq!(
        (report.space.0, report.va, report.iova),
        (ASID.into(), VA, Some(IOVA))
    );
    assert_eq!((report.by.context, report.by.queue), (Some(0), Some(2)));
    assert_eq!(report.unit, "chiplet 0");
    assert!(report.to_string().contains("context 0, CBR 2"), "{report}");
    // The same delay.
    let control = intact(HELD);
    late_dropin(&control);
    nothing(&control);
    assert_eq!(control.gru.stats().fills_killed, 1);
}

/// A store that is parked inside its access while its page is purged.
fn late_store(rig: &Rig) {
    rig.map_page(ASID, VA, 0, true);
    rig.issue(0, vset(VA));
    rig.until("an engine inside an access", || {
        rig.serve();
        (rig.gru.stats().faults.engines_parked > 0).then_some(())
    });
    rig.map_page(ASID, VA, PAGE, true);
    rig.purge(0, ASID, VA, 1);
    assert_eq!(rig.finish(0), Status::IDLE);
    assert_eq!(rig.gru.stats().faults.engines_overtaken, 1);
}

const PARKED: &str = "drain-delay=1,margin-ms=20,limit-ms=20000";

#[test]
fn test_sanitizer_when_drain_is_broken_or_tgh_is_early_reports_who_was_inside() {
    let broken = BreakPlan {
        drain: true,
        ..BreakPlan::default()
    };
    for (rig, says) in [
        (rig(broken, PARKED), "has returned"),
        (
            intact(&format!("early-completion=1,{PARKED}")),
            "TGH 0 is about to leave ACTIVE",
        ),
    ] {
        late_store(&rig);
        let report = only(&rig, Defect::CompletionBeforeDrain);
        assert_eq!((report.va, report.iova), (VA, Some(IOVA)));
        assert_eq!((report.by.context, report.by.queue), (Some(0), Some(2)));
        assert!(
            report.engine.is_some() && report.detail.contains(says),
            "{report}"
        );
    }
    let control = intact(PARKED);
    late_store(&control);
    nothing(&control);
}

#[test]
fn test_sanitizer_when_a_store_goes_through_a_clean_entry_reports_it() {
    let store = |rig: &Rig| {
        rig.map_page(ASID, VA, 0, false);
        assert_eq!(rig.run(0, vload(VA)), Status::IDLE);
        rig.run(0, vset(VA))
    };
    let broken = rig(
        BreakPlan {
            clean: true,
            ..BreakPlan::default()
        },
        "",
    );
    assert_eq!(store(&broken), Status::IDLE);
    only(&broken, Defect::WriteThroughClean);
    let control = intact("");
    assert_eq!(store(&control), Status::EXCEPTION);
    nothing(&control);
}

#[test]
fn test_sanitizer_when_unmapped_memory_is_used_reports_it() {
    let load_again = |rig: &Rig| {
        rig.run_ok(0, vload(VA));
        rig.dma.unmap(IOVA, MEMORY).unwrap();
        rig.pages.lock().unwrap().clear();
        rig.run(0, vload(VA))
    };
    let broken = rig(
        BreakPlan {
            unmap: true,
            ..BreakPlan::default()
        },
        "",
    );
    assert_eq!(load_again(&broken), Status::IDLE);
    only(&broken, Defect::UseAfterUnmap);
    let control = intact("");
    assert_eq!(load_again(&control), Status::EXCEPTION);
    nothing(&control);
}

/// New ASIDs for context 0, by INTERRUPT and START.
fn renew(rig: &Rig, asid: u64) {
    rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
    for pair in 0..4 {
        let two = (asid + 2 * pair) | ((asid + 2 * pair + 1) << 32);
        rig.trap_store(Rig::cch_at(0) + cch::ASID + 8 * pair, two);
    }
    rig.cch_do(0, cch::Opc::START).unwrap();
}

#[test]
fn test_sanitizer_when_an_old_asid_goes_on_being_used_reports_dead_space() {
    let load_again = |rig: &Rig| {
        rig.run_ok(0, vload(VA));
        let new = ASID + 0x800;
        rig.map_range(new, VA, 2 * PAGE, PAGE);
        renew(rig, new.into());
        rig.run_ok(0, vload(VA));
    };
    // The first START is right.
    let broken = intact("stale-asid=2");
    load_again(&broken);
    let report = only(&broken, Defect::DeadSpace);
    assert_eq!(report.space.0, u64::from(ASID));
    assert!(report.detail.contains("0x900 of context 0"), "{report}");
    let control = intact("");
    load_again(&control);
    nothing(&control);
}

#[test]
fn test_sanitizer_when_huge_entries_outlive_a_purge_reports_their_use() {
    let load_again = |rig: &Rig| {
        let huge = Pte {
            offset: 0,
            writable: true,
            shift: 21,
            tag: 0,
        };
        let va = VA + (1 << 21) - VA % (1 << 21);
        let page = |n: u64| (ASID, va / PAGE + n);
        rig.pages
            .lock()
            .unwrap()
            .extend([(page(0), huge), (page(5), huge)]);
        rig.run_ok(0, vload(va));
        rig.purge(0, ASID, va + 5 * PAGE, 1);
        rig.run_ok(0, vload(va + 5 * PAGE));
    };
    let exact = Rig::new(GruConfig {
        sanitize: true,
        purge_match: PurgeMatch::Exact,
        ..config(Doorbell::Poll)
    });
    exact.start(Mode::FaultMap);
    load_again(&exact);
    only(&exact, Defect::UseAfterPurge);
    let control = intact("");
    load_again(&control);
    nothing(&control);
}

#[test]
fn test_sanitizer_when_an_interrupt_is_lost_reports_it() {
    let rig = intact("lost-interrupt=2");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.until("the first interrupt", || (rig.interrupts(0) == 1).then_some(()));
    rig.issue(1, vload(VA + PAGE));
    rig.wait_fault(0, 3);
    let report = only(&rig, Defect::LostInterrupt);
    assert_eq!((report.va, report.by.queue), (VA + PAGE, Some(3)));
    rig.serve_cbr(CBR);
    rig.serve_cbr(3);
    rig.until("both loads", || rig.ended(0).and(rig.ended(1)));
}

#[test]
fn test_sanitizer_when_a_fault_is_shown_twice_reports_it() {
    let rig = intact("duplicate-fault=1");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.serve_cbr(CBR);
    rig.until("the load", || rig.ended(0));
    let report = only(&rig, Defect::SpuriousFault);
    assert_eq!((report.va, report.by.queue), (VA, Some(2)));
}

#[test]
fn test_sanitizer_when_a_restart_is_late_reports_it() {
    let rig = intact("delayed-restart=1,margin-ms=50");
    rig.run_ok(0, vload(VA));
    let report = only(&rig, Defect::LateRestart);
    assert_eq!((report.va, report.by.queue), (VA, Some(2)));
    // A poll rests between its looks: that is what it is for.
    let control = intact("");
    let poll = Instruction::gamerr(VA, ExplicitOp::EPOLL, 5, 0, XType::DWORD);
    control.issue(0, poll);
    control.until("a poll that rests", || {
        control.serve();
        let phase = control.gru.hardware.chiplets[0].cbrs[CBR].phase();
        (phase == Phase::Polling).then_some(())
    });
    control.set_word(0, 5);
    assert_eq!(control.finish(0), Status::IDLE);
    nothing(&control);
}

#[test]
fn test_sanitizer_when_a_status_is_wrong_reports_it() {
    let rig = intact("wrong-status=1");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    let pte = rig.pages.lock().unwrap()[&(ASID, VA / PAGE)];
    rig.write_restart(CBR, ASID, VA, pte);
    rig.until("the load", || rig.ended(0));
    let report = only(&rig, Defect::WrongStatus);
    assert!(report.detail.contains("TFH 2"), "{report}");
}

#[test]
fn test_sanitizer_when_an_operation_is_refused_by_right_says_nothing() {
    let rig = intact("");
    // Nothing is there; then a WRITE_ONLY that is killed: both end with EXCEPTION in a handle.
    assert_eq!(rig.run(0, vload(1 << 40)), Status::EXCEPTION);
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.purge(0, ASID, VA, 1);
    let pte = rig.pages.lock().unwrap()[&(ASID, VA / PAGE)];
    rig.fill_operands(CBR, ASID, VA, pte);
    rig.tfh_command(CBR, tfh::Opc::WRITE_ONLY);
    assert_eq!(rig.tfh_wait(CBR), HandleStatus::EXCEPTION);
    rig.serve_cbr(CBR);
    assert_eq!(rig.finish(0), Status::IDLE);
    nothing(&rig);
}
