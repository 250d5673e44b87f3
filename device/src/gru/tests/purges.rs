//! TLBINV: what it removes, what it kills, what it waits for.

use super::*;
use protos::gru::cb::XType;
use std::sync::atomic::AtomicBool;

const VA: u64 = 0x7000_0000;
const CBR: usize = 2;

fn vload(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

fn pte(offset: u64) -> Pte {
    Pte {
        offset,
        writable: true,
        shift: 12,
        tag: 0,
    }
}

/// Loads the word behind `va` and says whether that needed a miss.
fn misses(rig: &Rig, va: u64) -> bool {
    let before = rig.gru.stats().misses;
    rig.run_ok(0, vload(va));
    rig.gru.stats().misses > before
}

#[test]
fn test_tlbinv_when_range_is_given_removes_that_range_and_nothing_else() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, 8 * PAGE);
        (0..8).for_each(|page| assert!(misses(&rig, VA + page * PAGE)));
        rig.purge(0, ASID, VA + 2 * PAGE, 3);
        rig.purge(1, ASID + 1, VA, 8);
        for page in 0..8 {
            assert_eq!(
                misses(&rig, VA + page * PAGE),
                (2..5).contains(&page),
                "page {page}"
            );
        }
    });
}

#[test]
fn test_tlbinv_when_n_is_1023_removes_more_than_1024_pages() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let far = VA + 5000 * PAGE;
    rig.map_page(ASID, VA, 0, true);
    rig.map_page(ASID, far, PAGE, true);
    assert!(misses(&rig, VA) && misses(&rig, far));
    rig.purge(0, ASID, VA, 1023);
    assert!(misses(&rig, VA) && !misses(&rig, far));
    // The driver clamps: a range of 6000 pages is asked for as 1024.
    rig.purge(0, ASID, VA, 6000);
    assert!(misses(&rig, VA) && misses(&rig, far));
}

#[test]
fn test_tlbinv_when_global_removes_every_asid() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_page(ASID, VA, 0, true);
    rig.map_page(ASID + 3, 3 << 61 | VA, PAGE, true);
    assert!(misses(&rig, VA) && misses(&rig, 3 << 61 | VA));
    rig.purge(5, 0, 0, 0);
    assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
}

#[test]
fn test_tlbinv_when_entry_is_larger_than_the_range_removes_it() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.issue(0, vload(0x4000_0000));
    rig.wait_fault(0, CBR);
    rig.write_restart(
        CBR,
        ASID,
        0x4000_0000,
        Pte {
            offset: 0,
            writable: true,
            shift: 21,
            tag: 0,
        },
    );
    rig.until("the load", || rig.ended(0));
    rig.purge(0, ASID, 0x4000_0000 + 77 * PAGE, 1);
    rig.issue(0, vload(0x4000_0000));
    rig.wait_fault(0, CBR);
}

#[test]
fn test_tlbinv_when_all_engines_sleep_is_done_as_soon_as_its_store_or_ring_has_returned() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_page(ASID, VA, 0, true);
        rig.run_ok(0, vload(VA));
        let engines = rig.gru.hardware.config.engines as u32;
        rig.until("the engines to sleep", || {
            (rig.gru.stats().engines_asleep == engines).then_some(())
        });
        let before = rig.gru.stats();
        rig.purge_send(0, ASID, VA, 1);
        assert_eq!(rig.tgh(0).status(), HandleStatus::IDLE, "{doorbell:?}");
        let after = rig.gru.stats();
        assert_eq!(
            (after.tgh_purges, after.rings),
            (before.tgh_purges + 1, before.rings)
        );
        assert!(misses(&rig, VA), "{doorbell:?}");
    });
}

#[test]
fn test_tlbinv_when_software_holds_the_lock_bit_leaves_it_set() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        let at = map::TGH;
        let go = tgh::Control::new()
            .with_cmd(true)
            .with_delresp(true)
            .with_opc(tgh::Opc::TLBINV);
        rig.store(at, go.with_status(HandleStatus::ACTIVE).into_bits());
        rig.ring_if_asleep();
        let control = rig.until("a TLBINV", || {
            let control = tgh::Control::from_bits(rig.load(at));
            (control.status() != HandleStatus::ACTIVE).then_some(control)
        });
        let idle = tgh::Control::new().with_delresp(true).with_opc(tgh::Opc::TLBINV);
        assert_eq!(
            control, idle,
            "cmd, status, state, cause are clear; the lock is held"
        );
    });
}

/// The fill was prepared before the purge and stored after it: nothing may be entered.
#[test]
fn test_s1_fill_when_purge_came_after_the_lookup_is_killed_and_misses_again() {
    in_all_modes(|doorbell| {
        for mode in [Mode::FaultMap, Mode::UserPolling] {
            let rig = Rig::new(config(doorbell));
            rig.start(mode);
            rig.set_word(0, 111);
            rig.set_word(PAGE, 222);
            rig.issue(0, vload(VA));
            rig.until("a miss", || {
                (rig.tfh(CBR).status() == HandleStatus::EXCEPTION).then_some(())
            });
            rig.take_faults(0);
            rig.fill_operands(CBR, ASID, VA, pte(0));
            rig.purge(0, ASID, VA, 1);
            let before = rig.gru.stats().misses;
            rig.tfh_command(CBR, tfh::Opc::WRITE_RESTART);
            rig.until("the second miss", || {
                let again = rig.gru.stats().misses > before;
                (again && rig.tfh(CBR).status() == HandleStatus::EXCEPTION).then_some(())
            });
            let stats = rig.gru.stats();
            assert_eq!((stats.fills, stats.fills_killed), (0, 1));
            // The page has moved meanwhile.
            rig.map_page(ASID, VA, PAGE, true);
            assert_eq!(rig.finish(0), Status::IDLE);
            assert_eq!(rig.ds_read(0, 8), 222u64.to_le_bytes());
        }
    });
}

#[test]
fn test_s1_write_only_when_killed_answers_exception_and_enters_nothing() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.issue(0, vload(VA));
        rig.wait_fault(0, CBR);
        rig.fill_operands(CBR, ASID, VA + PAGE, pte(PAGE));
        rig.purge(0, ASID, VA + PAGE, 1);
        rig.tfh_command(CBR, tfh::Opc::WRITE_ONLY);
        assert_eq!(rig.tfh_wait(CBR), HandleStatus::EXCEPTION);
        assert_eq!(rig.gru.stats().fills, 0);
        // The miss itself was not purged.
        rig.write_restart(CBR, ASID, VA, pte(0));
        rig.until("the load", || rig.ended(0));
        assert_eq!(rig.gru.stats().fills, 1);
    });
}

#[test]
fn test_fill_when_purge_met_another_range_or_asid_is_entered() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.issue(0, vload(VA));
    rig.wait_fault(0, CBR);
    rig.purge(0, ASID, VA + PAGE, 100);
    rig.purge(0, ASID + 8, VA, 1023);
    rig.write_restart(CBR, ASID, VA, pte(0));
    rig.until("the load", || rig.ended(0));
    assert_eq!(rig.gru.stats().fills_killed, 0);
}

#[test]
fn test_fill_when_its_span_was_purged_beside_the_miss_is_killed() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.issue(0, vload(0x4000_0000));
    rig.wait_fault(0, CBR);
    rig.purge(0, ASID, 0x4010_0000, 1);
    rig.write_restart(
        CBR,
        ASID,
        0x4000_0000,
        Pte {
            offset: 0,
            writable: true,
            shift: 21,
            tag: 0,
        },
    );
    rig.wait_fault(0, CBR);
    assert_eq!(rig.gru.stats().fills_killed, 1);
}

/// S2: once the completion is seen, nothing is stored through the old translation. A copy runs over one page
/// again and again while the page moves to a new place each time; the old place is poisoned after the
/// completion and must keep the poison.
#[test]
fn test_s2_purge_when_copies_run_waits_for_them() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        let pages = 16;
        let source = VA + 0x1000_0000;
        rig.map_range(ASID, source, 2 << 20, pages * PAGE);
        rig.fill_memory(2 << 20, (pages * PAGE) as usize, 1);
        rig.map_range(ASID, VA, 0, pages * PAGE);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let copier = scope.spawn(|| {
                let copy = Instruction::bcopy(source, VA, 0, 4, XType::DWORD, pages * PAGE / 8);
                let mut copies = 0;
                while !stop.load(Ordering::SeqCst) || copies < 3 {
                    rig.run_ok(0, copy);
                    copies += 1;
                }
                copies
            });
            let poison = vec![0xee; (pages * PAGE) as usize];
            for round in 1..200u64 {
                let (old, new) = (((round - 1) % 2) << 19, (round % 2) << 19);
                // As an invalidation does: first nobody can look it up, then purge, then move.
                (0..pages).for_each(|page| rig.map_page(ASID, VA + page * PAGE, new + page * PAGE, true));
                rig.purge(0, ASID, VA, pages);
                rig.memory.write_all_at(&poison, old).unwrap();
                (0..20).for_each(|_| std::thread::yield_now());
                assert!(
                    rig.bytes(old, poison.len()) == poison,
                    "a store landed after the completion, round {round}"
                );
            }
            stop.store(true, Ordering::SeqCst);
            assert!(copier.join().unwrap() >= 3);
        });
        let stats = rig.gru.stats();
        assert!(
            stats.tlb[0].entries_purged > 0,
            "the purges met live entries: {stats:?}"
        );
    });
}

#[test]
fn test_dma_unmap_when_a_copy_uses_the_memory_ends_it_with_an_exception() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    rig.run_ok(0, vload(VA));
    rig.dma.unmap(IOVA, MEMORY).unwrap();
    assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
    assert_eq!(rig.run(0, vload(VA)), Status::EXCEPTION);
    let cause = rig.cbe_status(0b1010, 0).ecause();
    assert_eq!(cause, protos::gru::cbe::ecause::ADDRESS_SPACE_DECODE_ERROR);
}

#[test]
fn test_purges_when_many_handles_run_at_once_all_complete() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        std::thread::scope(|scope| {
            for handle in 0..4 {
                let rig = &rig;
                scope.spawn(move || (0..200).for_each(|i| rig.purge(handle, ASID, VA + i * PAGE, 1 + i % 9)));
            }
        });
        assert_eq!(rig.gru.stats().tgh_purges, 800);
    });
}
