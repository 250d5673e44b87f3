//! Injected faults that happen at once: each shows, and is only what it says.

use super::*;
use protos::gru::cb::XType;

const VA: u64 = 0x7000_0000;
const CBR: usize = 2;

fn rig(plan: &str) -> Arc<Rig> {
    let rig = Rig::new(GruConfig {
        faults: plan.parse().unwrap(),
        ..config(Doorbell::Poll)
    });
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 4 * PAGE);
    rig
}

fn vload(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

#[test]
fn test_lost_interrupt_when_injected_sets_the_bit_and_raises_nothing() {
    let rig = rig("lost-interrupt=2");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.until("the first interrupt", || (rig.interrupts(0) == 1).then_some(()));
    rig.issue(1, vload(VA + PAGE));
    rig.wait_fault(0, 3);
    rig.purge(0, ASID + 1, 0, 1);
    assert_eq!(rig.interrupts(0), 0);
    assert_eq!(rig.gru.stats().faults.injected, 1);
}

#[test]
fn test_duplicate_fault_when_injected_shows_an_answered_tfh_again() {
    let rig = rig("duplicate-fault=1");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    let pte = rig.pages.lock().unwrap()[&(ASID, VA / PAGE)];
    rig.write_restart(CBR, ASID, VA, pte);
    rig.until("the load", || rig.ended(0));
    rig.wait_fault(0, CBR);
    // What a driver finds there: nothing to do.
    let control = rig.tfh(CBR);
    assert_eq!(
        (control.status(), control.state()),
        (HandleStatus::IDLE, tfh::State::IDLE)
    );
    rig.until("two interrupts", || (rig.interrupts(0) > 0).then_some(()));
    assert!(rig.take_faults(0).is_empty());
}

#[test]
fn test_delayed_restart_when_injected_answers_the_tfh_at_once_and_runs_later() {
    let rig = rig("delayed-restart=1,margin-ms=120");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    let pte = rig.pages.lock().unwrap()[&(ASID, VA / PAGE)];
    let begun = Instant::now();
    rig.write_restart(CBR, ASID, VA, pte);
    assert_eq!(rig.tfh_wait(CBR), HandleStatus::IDLE);
    // Others run meanwhile, and a purge does not wait for it.
    rig.run_ok(1, Instruction::nop());
    rig.purge(0, ASID + 1, 0, 1);
    rig.until("the load", || rig.ended(0));
    assert!(begun.elapsed() >= Duration::from_millis(120));
}

#[test]
fn test_wrong_status_when_injected_says_exception_for_what_was_done() {
    let rig = rig("wrong-status=1");
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    let pte = rig.pages.lock().unwrap()[&(ASID, VA / PAGE)];
    rig.write_restart(CBR, ASID, VA, pte);
    rig.until("the load", || rig.ended(0));
    assert_eq!(rig.tfh(CBR).status(), HandleStatus::EXCEPTION);
    assert_eq!(rig.tfh(CBR).state(), tfh::State::IDLE);
    assert_eq!(rig.gru.stats().fills, 1);
    let at = map::TGH;
    for cause in [1, 2, 3] {
        let go = tgh::Control::new().with_cmd(true).with_opc(tgh::Opc::TLBINV);
        rig.store(at + tgh::SCOPE, tgh::Scope::new().with_global(true).into_bits());
        rig.store(at, go.with_status(HandleStatus::ACTIVE).into_bits());
        rig.ring_if_asleep();
        let control = rig.until("a TLBINV", || {
            let control = tgh::Control::from_bits(rig.load(at));
            (control.status() != HandleStatus::ACTIVE).then_some(control)
        });
        assert_eq!(control.status(), HandleStatus::EXCEPTION);
        assert_eq!((control.cmd(), control.cause()), (false, cause));
    }
    assert_eq!(rig.gru.stats().tlb[0].live_entries, 0, "the purge was done");
}

#[test]
fn test_miss_cause_when_injected_names_hardware_errors_that_are_served_all_the_same() {
    let rig = rig("miss-cause=1");
    let mut causes = Vec::new();
    for page in 0..3 {
        rig.issue(0, vload(VA + page * PAGE));
        rig.wait_fault(0, CBR);
        assert!(tfh::is_write(rig.tfh(CBR).cause()));
        causes.push(rig.tfh(CBR).cause());
        rig.serve_cbr(CBR);
        assert_eq!(rig.finish(0), Status::IDLE);
    }
    let expected = [
        tfh::Cause::HW_ERROR_RR,
        tfh::Cause::HW_ERROR_PAGESIZE,
        tfh::Cause::INSTRUCTION_EXCEPTION,
    ];
    assert_eq!(causes, expected);
}

/// The TGH says idle while an engine is still inside an access; with the drain the purge itself still waits.
#[test]
fn test_early_completion_when_injected_lets_a_late_store_through() {
    let store_lands_late = |plan: &str| {
        let rig = Rig::new(GruConfig {
            // The margin is long: a busy machine must get the poison written within it.
            faults: format!("{plan}drain-delay=1,margin-ms=200,limit-ms=5000")
                .parse()
                .unwrap(),
            ..config(Doorbell::Poll)
        });
        rig.start(Mode::FaultMap);
        rig.map_page(ASID, VA, 0, true);
        rig.issue(0, Instruction::vset(VA, 0x77, XType::DWORD, 512, 1));
        rig.until("an engine inside an access", || {
            rig.serve();
            (rig.gru.stats().faults.engines_parked > 0).then_some(())
        });
        rig.map_page(ASID, VA, PAGE, true);
        rig.purge(0, ASID, VA, 1);
        let poison = vec![0xee; PAGE as usize];
        rig.memory.write_all_at(&poison, 0).unwrap();
        assert_eq!(rig.finish(0), Status::IDLE);
        rig.bytes(0, PAGE as usize) != poison
    };
    assert!(store_lands_late("early-completion=1,"));
    assert!(!store_lands_late(""));
}
