//! Injected faults: each broken check lets a stale access through, and the same delays with the check on
//! do not. (bug classes 4 and 14)

use super::*;
use crate::faults::{BreakPlan, FaultPlan};
use protos::gru::cb::XType;

const VA: u64 = 0x7000_0000;
const OLD: u64 = 0x01d_01d;
const NEW: u64 = 0x7e3_7e3;

fn plan(text: &str) -> FaultPlan {
    text.parse().unwrap()
}

fn rig(doorbell: Doorbell, broken: BreakPlan, faults: FaultPlan) -> Arc<Rig> {
    let rig = Rig::new(GruConfig {
        broken,
        faults,
        ..config(doorbell)
    });
    rig.start(Mode::FaultMap);
    rig
}

/// A page moves while the answer to its miss is on its way. Returns what a load sees that was issued after
/// the invalidation had completed.
fn load_after_a_late_dropin(rig: &Rig, round: u64) -> u64 {
    let va = VA + round * PAGE;
    let (old, new) = (0, PAGE);
    rig.set_word(old, OLD);
    rig.set_word(new, NEW);
    rig.map_page(ASID, va, old, true);
    rig.issue(0, Instruction::vload(va, 0, XType::DWORD, 1, 1));
    rig.until("the first miss to be answered", || {
        rig.serve();
        (rig.gru.stats().faults.fills_held > round).then_some(())
    });
    // The call: look-ups find the new place, then the purge, then it returns.
    rig.map_page(ASID, va, new, true);
    rig.purge(0, ASID, va, 1);
    assert_eq!(rig.finish(0), Status::IDLE);
    rig.run_ok(0, Instruction::vload(va, 0, XType::DWORD, 1, 1));
    u64::from_le_bytes(rig.ds_read(0, 8).try_into().unwrap())
}

#[test]
fn test_kill_bit_when_broken_and_dropin_is_late_lets_a_stale_translation_in() {
    in_all_modes(|doorbell| {
        let broken = BreakPlan {
            kill_bit: true,
            ..BreakPlan::default()
        };
        let rig = rig(doorbell, broken, plan("dropin-delay=1,margin-ms=1"));
        assert_eq!(load_after_a_late_dropin(&rig, 0), OLD);
        assert_eq!(rig.gru.stats().faults.fills_overtaken, 1);
    });
}

#[test]
fn test_s1_kill_bit_when_on_and_dropin_is_late_lets_nothing_stale_in() {
    in_all_modes(|doorbell| {
        let rig = rig(
            doorbell,
            BreakPlan::default(),
            plan("dropin-delay=2,seed=1,margin-ms=1,limit-ms=50"),
        );
        for round in 0..10 {
            assert_eq!(load_after_a_late_dropin(&rig, round), NEW);
        }
        let stats = rig.gru.stats();
        assert!(
            stats.faults.fills_overtaken >= 10,
            "the window was open: {stats:?}"
        );
        assert_eq!(stats.fills_killed, stats.faults.fills_overtaken);
    });
}

/// A store is inside its access when the page is purged. Returns whether it landed after the completion.
fn store_lands_after_purge(rig: &Rig) -> bool {
    let va = VA;
    rig.map_page(ASID, va, 0, true);
    rig.issue(0, Instruction::vset(va, NEW, XType::DWORD, 512, 1));
    let before = rig.gru.stats().faults.engines_parked;
    rig.until("an engine inside an access", || {
        rig.serve();
        (rig.gru.stats().faults.engines_parked > before).then_some(())
    });
    rig.map_page(ASID, va, PAGE, true);
    rig.purge(0, ASID, va, 1);
    let poison = vec![0xee; PAGE as usize];
    rig.memory.write_all_at(&poison, 0).unwrap();
    assert_eq!(rig.finish(0), Status::IDLE);
    rig.bytes(0, PAGE as usize) != poison
}

#[test]
fn test_drain_when_broken_and_engine_is_slow_lets_a_late_store_through() {
    in_all_modes(|doorbell| {
        let broken = BreakPlan {
            drain: true,
            ..BreakPlan::default()
        };
        // The margin is long: a busy machine must get the poison written within it.
        let rig = rig(
            doorbell,
            broken,
            plan("drain-delay=1,margin-ms=200,limit-ms=5000"),
        );
        assert!(store_lands_after_purge(&rig));
        assert_eq!(rig.gru.stats().faults.engines_overtaken, 1);
    });
}

#[test]
fn test_s2_drain_when_on_and_engine_is_slow_keeps_the_purge_waiting() {
    in_all_modes(|doorbell| {
        for _ in 0..5 {
            let rig = rig(
                doorbell,
                BreakPlan::default(),
                plan("drain-delay=2,seed=1,margin-ms=5,limit-ms=5000"),
            );
            assert!(!store_lands_after_purge(&rig));
            let stats = rig.gru.stats();
            assert_eq!(stats.faults.engines_overtaken, 1);
            assert!(
                stats.tlb[0].drain_spins + stats.tlb[0].drain_yields > 0,
                "the purge waited: {stats:?}"
            );
        }
    });
}

#[test]
fn test_tlbinv_when_an_engine_is_inside_an_access_leaves_its_thread_free_for_others() {
    in_all_modes(|doorbell| {
        let rig = rig(
            doorbell,
            BreakPlan::default(),
            plan("drain-delay=1,margin-ms=200,limit-ms=5000"),
        );
        rig.map_page(ASID, VA, 0, true);
        rig.issue(0, Instruction::vset(VA, NEW, XType::DWORD, 1, 1));
        rig.until("an engine inside an access", || {
            rig.serve();
            (rig.gru.stats().faults.engines_parked == 1).then_some(())
        });
        rig.purge_send(0, ASID, VA, 1);
        // The store, or the ring, has not waited for the drain.
        assert_eq!(rig.tgh(0).status(), HandleStatus::ACTIVE, "{doorbell:?}");
        rig.until("the drain", || {
            (rig.tgh(0).status() == HandleStatus::IDLE).then_some(())
        });
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.word(0), NEW);
    });
}

#[test]
fn test_parked_engine_when_no_purge_comes_goes_on_and_others_work_meanwhile() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell, BreakPlan::default(), plan("drain-delay=1,limit-ms=300"));
        rig.map_page(ASID, VA, 0, true);
        rig.issue(0, Instruction::vset(VA, NEW, XType::DWORD, 1, 1));
        rig.until("an engine inside an access", || {
            rig.serve();
            (rig.gru.stats().faults.engines_parked == 1).then_some(())
        });
        rig.run_ok(1, Instruction::nop());
        assert_eq!(rig.ended(0), None, "the parked one is still at it");
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.word(0), NEW);
        assert_eq!(rig.gru.stats().faults.engines_overtaken, 0);
    });
}

#[test]
fn test_reset_when_engine_is_parked_and_fill_is_held_does_not_wait_for_them() {
    let rig = rig(
        Doorbell::Trap,
        BreakPlan::default(),
        plan("drain-delay=1,dropin-delay=2,limit-ms=60000"),
    );
    rig.map_page(ASID, VA, 0, true);
    rig.map_page(ASID, VA + PAGE, PAGE, true);
    rig.issue(0, Instruction::vset(VA, NEW, XType::DWORD, 1, 1));
    rig.until("an engine inside an access", || {
        rig.serve();
        (rig.gru.stats().faults.engines_parked == 1).then_some(())
    });
    rig.issue(1, Instruction::vload(VA + PAGE, 0, XType::DWORD, 1, 1));
    rig.until("a held fill", || {
        rig.serve();
        (rig.gru.stats().faults.fills_held == 1).then_some(())
    });
    let begun = Instant::now();
    rig.gru.reset();
    assert!(begun.elapsed() < Duration::from_secs(5));
    rig.start(Mode::FaultMap);
    rig.run_ok(0, Instruction::nop());
}
