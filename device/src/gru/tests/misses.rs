//! Misses: how they are reported, and every answer.

use super::*;
use protos::gru::cb::{ImplicitOp, XType};
use protos::gru::cbe::ecause;

const VA: u64 = 0x7000_0000;
const CBR: usize = 2;

fn pte(offset: u64, writable: bool) -> Pte {
    Pte {
        offset,
        writable,
        shift: 12,
        tag: 0,
    }
}

fn vload(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

fn vset(va: u64, value: u64) -> Instruction {
    Instruction::vset(va, value, XType::DWORD, 1, 1)
}

#[test]
fn test_fault_map_miss_when_reported_has_every_field_bit_and_vector() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.configure(3, 1 << 40, 1, Mode::FaultMap);
        rig.cch_do(3, cch::Opc::ALLOCATE).unwrap();
        rig.cch_do(3, cch::Opc::START).unwrap();
        let mut instruction = vload(VA + 24);
        instruction.control = instruction.control.with_ima(cb::ima::INTERRUPT);
        rig.issue_in(3, 1, instruction);
        rig.wait_fault(3, 81);
        let control = rig.tfh(81);
        assert_eq!(control.state(), tfh::State::MISS_FMM);
        assert_eq!(control.cause(), tfh::Cause::TLB_MISS);
        assert_eq!(
            (control.ctxnum(), control.cb_int(), control.cmd()),
            (3, true, false)
        );
        assert_eq!(rig.miss(81), (ASID + 24, VA + 24, false));
        rig.until("the vector", || (rig.interrupts(3) > 0).then_some(()));
        assert_eq!(
            (0..32).map(|vector| rig.interrupts(vector)).sum::<u64>(),
            0,
            "no other vector"
        );
        let at = 3 * map::GSEG_STRIDE + Rig::cb_at(1);
        assert_eq!(cb::Control::from_bits(rig.load(at)).istatus(), Status::ACTIVE);
        assert_eq!(rig.cbe_status(1 << 40, 1).cbrstate(), cbe::State::WAIT_RESPONSE);
    });
}

#[test]
fn test_user_polling_miss_when_reported_sets_call_os_and_no_bit() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::UserPolling);
        rig.map_range(ASID, VA, 0, PAGE);
        rig.set_word(0, 77);
        rig.issue(0, vload(VA));
        rig.until("CALL_OS", || (rig.istatus(0) == Status::CALL_OS).then_some(()));
        assert_eq!(rig.tfh(CBR).state(), tfh::State::MISS_UPM);
        assert!((0..16).all(|tfm| rig.take_faults(tfm).is_empty()));
        assert_eq!(rig.interrupts(0), 0);
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.ds_read(0, 8), 77u64.to_le_bytes());
    });
}

#[test]
fn test_misses_when_reported_and_ended_in_each_way_are_counted_by_it() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        let counted = || {
            let stats = rig.gru.stats();
            (stats.misses, stats.misses_in_fault_map, stats.misses_withdrawn)
        };
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, 2 * PAGE);
        rig.run_ok(0, vload(VA));
        assert_eq!(counted(), (1, 1, 0));
        rig.cch_do(0, cch::Opc::INTERRUPT_SYNC).unwrap();
        rig.cch_do(0, cch::Opc::DEALLOCATE).unwrap();
        assert_eq!(counted(), (1, 1, 0));

        for (round, reset) in [false, true].into_iter().enumerate() {
            rig.start(Mode::UserPolling);
            rig.issue(0, vload(VA + PAGE));
            rig.until("CALL_OS", || (rig.istatus(0) == Status::CALL_OS).then_some(()));
            assert_eq!(counted(), (2 + round as u64, 1, round as u64));
            if reset {
                rig.gru.reset();
            } else {
                rig.cch_do(0, cch::Opc::INTERRUPT_SYNC).unwrap();
                rig.cch_do(0, cch::Opc::DEALLOCATE).unwrap();
            }
            assert_eq!(counted(), (2 + round as u64, 1, 1 + round as u64));
        }
    });
}

#[test]
fn test_tfh_when_fault_map_miss_is_converted_goes_to_user_polling() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        rig.issue(0, vload(VA));
        rig.wait_fault(0, CBR);
        rig.tfh_command(CBR, tfh::Opc::USER_POLLING_MODE);
        rig.until("CALL_OS", || (rig.istatus(0) == Status::CALL_OS).then_some(()));
        let control = rig.tfh(CBR);
        assert_eq!(
            (control.state(), control.status()),
            (tfh::State::MISS_UPM, HandleStatus::EXCEPTION)
        );
        assert_eq!(control.cause(), tfh::Cause::TLB_MISS);
        assert_eq!(rig.finish(0), Status::IDLE);
    });
}

#[test]
fn test_s11_store_when_entry_is_clean_reports_tlb_mod_once() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_page(ASID, VA, 0, false);
        rig.set_word(0, 5);
        rig.run_ok(0, vload(VA));
        // The entry is there, and clean.
        rig.issue(0, vset(VA, 6));
        rig.wait_fault(0, CBR);
        assert_eq!(rig.tfh(CBR).cause(), tfh::Cause::TLB_MOD);
        assert_eq!(rig.word(0), 5, "nothing was stored through the clean entry");
        rig.write_restart(CBR, ASID, VA, pte(0, true));
        rig.until("the store", || rig.ended(0));
        assert_eq!(rig.word(0), 6);
        rig.run_ok(0, vload(VA));
        assert_eq!(rig.gru.stats().misses, 2);
    });
}

#[test]
fn test_store_when_no_entry_exists_reports_the_configured_cause() {
    for cause in [tfh::Cause::TLB_MOD, tfh::Cause::TLB_MISS] {
        let rig = Rig::new(GruConfig {
            store_miss_cause: cause,
            ..config(Doorbell::Trap)
        });
        rig.start(Mode::FaultMap);
        rig.issue(0, vset(VA, 1));
        rig.wait_fault(0, CBR);
        assert_eq!(rig.tfh(CBR).cause(), cause);
        // A read-only fill costs a second miss, whatever the first was called.
        rig.write_restart(CBR, ASID, VA, pte(0, false));
        rig.wait_fault(0, CBR);
        assert_eq!(rig.tfh(CBR).cause(), tfh::Cause::TLB_MOD);
        rig.write_restart(CBR, ASID, VA, pte(0, true));
        rig.until("the store", || rig.ended(0));
        assert_eq!(rig.word(0), 1);
    }
}

#[test]
fn test_atomic_fetch_when_entry_is_clean_does_not_ask_for_a_writable_one() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_page(ASID, VA, 0, false);
    rig.set_word(8, 41);
    rig.run_ok(0, Instruction::gamir(VA + 8, ImplicitOp::FETCH, XType::DWORD));
    assert_eq!(rig.avalue(0), 41);
    // The store wants more, and there is no more.
    assert_eq!(
        rig.run(0, Instruction::gamir(VA + 8, ImplicitOp::INC, XType::DWORD)),
        Status::EXCEPTION
    );
    assert_eq!(
        (rig.word(8), rig.cbe_status(0b1010, 0).ecause()),
        (41, ecause::OS_FATAL_TLB_FAULT)
    );
}

#[test]
fn test_write_only_when_pages_are_preloaded_saves_their_misses() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        let bytes = rig.fill_memory(0, 4096 * 2, 8);
        rig.issue(0, Instruction::vload(VA, 0, XType::DWORD, 1024, 1));
        rig.wait_fault(0, CBR);
        rig.fill_operands(CBR, ASID, VA + PAGE, pte(PAGE, true));
        rig.tfh_command(CBR, tfh::Opc::WRITE_ONLY);
        assert_eq!(rig.tfh_wait(CBR), HandleStatus::IDLE);
        // The CBR still waits.
        assert_eq!(rig.ended(0), None);
        assert_eq!(rig.tfh(CBR).state(), tfh::State::MISS_FMM);
        rig.write_restart(CBR, ASID, VA, pte(0, true));
        rig.until("the load", || rig.ended(0));
        assert_eq!(rig.ds_read(0, 8192), bytes);
        assert_eq!(rig.gru.stats().misses, 1);
    });
}

#[test]
fn test_restart_when_nothing_was_filled_misses_again() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.issue(0, vload(VA));
        for _ in 0..3 {
            rig.wait_fault(0, CBR);
            rig.tfh_command(CBR, tfh::Opc::RESTART);
        }
        rig.wait_fault(0, CBR);
        assert_eq!((rig.gru.stats().misses, rig.gru.stats().fills), (4, 0));
    });
}

#[test]
fn test_exception_when_miss_is_answered_with_it_aborts_in_both_reporting_modes() {
    for mode in [Mode::FaultMap, Mode::UserPolling] {
        let rig = Rig::new(config(Doorbell::Trap));
        rig.start(mode);
        rig.map_range(ASID, VA, 0, PAGE);
        // The second page is not there: the first part is done.
        assert_eq!(
            rig.run(0, Instruction::vset(VA, 9, XType::DWORD, 1024, 1)),
            Status::EXCEPTION
        );
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), ecause::OS_FATAL_TLB_FAULT);
        assert_eq!(rig.cbe_word(CBR, cbe::IDEF1UPD), VA + PAGE, "exceptdet0");
        assert_eq!(rig.word(4088), 9);
        // Retry of the failed instruction by icmd alone, after the page has appeared.
        rig.map_page(ASID, VA + PAGE, PAGE, true);
        let control = cb::Control::from_bits(rig.load(0)).with_icmd(true);
        rig.store(0, control.into_bits());
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.word(2 * PAGE - 8), 9);
    }
}

#[test]
fn test_fill_when_operands_are_wrong_ends_the_instruction_not_the_device() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let fail = |change: &dyn Fn(), cause: u32| {
        rig.issue(0, vload(VA));
        rig.wait_fault(0, CBR);
        rig.fill_operands(CBR, ASID, VA, pte(0, true));
        change();
        rig.tfh_command(CBR, tfh::Opc::WRITE_RESTART);
        assert_eq!(rig.finish(0), Status::EXCEPTION);
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), cause);
    };
    let at = Rig::tfh_at(CBR);
    let target = |pfn, code| tfh::Target::new().with_pfn(pfn).with_pagesize(code).into_bits();
    fail(
        &|| rig.store(at + tfh::TARGET, target(0x5, 0)),
        ecause::ADDRESS_SPACE_DECODE_ERROR,
    );
    fail(
        &|| rig.store(at + tfh::TARGET, target(IOVA >> 12, 11)),
        ecause::TLBHW_ERROR,
    );
    fail(
        &|| rig.store(at + tfh::TARGET, target(IOVA >> 12, 31)),
        ecause::TLBHW_ERROR,
    );
    assert_eq!(rig.tfh(CBR).state(), tfh::State::HW_ERR);
    let gaa = || {
        let asids = tfh::Asids::from_bits(rig.load(at + tfh::ASIDS)).with_gaa(1);
        rig.store(at + tfh::ASIDS, asids.into_bits());
    };
    fail(&gaa, ecause::IAA_GAA_MISMATCH);
    // sizeavail without the code of 4 KiB.
    rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
    rig.trap_store(Rig::cch_at(0) + cch::SIZEAVAIL, 0xfffe_fffe_fffe_fffe);
    rig.cch_do(0, cch::Opc::START).unwrap();
    fail(&|| {}, ecause::TLBHW_ERROR);
    assert_eq!(rig.gru.stats().fills, 0);
}

#[test]
fn test_tfh_command_when_no_miss_waits_enters_nothing_and_is_answered() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        for opc in [
            tfh::Opc::WRITE_RESTART,
            tfh::Opc::WRITE_ONLY,
            tfh::Opc::EXCEPTION,
            tfh::Opc::USER_POLLING_MODE,
        ] {
            rig.fill_operands(CBR, ASID, VA, pte(0, true));
            rig.tfh_command(CBR, opc);
            assert_eq!(rig.tfh_wait(CBR), HandleStatus::IDLE, "{opc:?}");
        }
        assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
        rig.run_ok(0, Instruction::nop());
    });
}

#[test]
fn test_large_page_when_filled_translates_all_of_it() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let bytes = rig.fill_memory(3 << 20, 4096, 99);
    // 2 MiB of address space onto memory 2..4 MiB; the miss is in its second half.
    rig.issue(0, Instruction::vload(0x4010_0000, 0, XType::DWORD, 512, 1));
    rig.wait_fault(0, CBR);
    rig.write_restart(
        CBR,
        ASID,
        0x4010_0000,
        Pte {
            offset: 2 << 20,
            writable: true,
            shift: 21,
            tag: 1,
        },
    );
    rig.until("the load", || rig.ended(0));
    assert_eq!(rig.ds_read(0, 4096), bytes);
    rig.issue(0, vset(0x401f_fff8, 3));
    rig.until("the store", || rig.ended(0));
    assert_eq!(rig.word((4 << 20) - 8), 3);
    assert_eq!(rig.gru.stats().misses, 1);
}

#[test]
fn test_region_when_address_is_high_uses_its_own_asid() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let va = 5 << 61 | VA;
    rig.issue(0, vload(va));
    rig.wait_fault(0, CBR);
    assert_eq!(rig.miss(CBR), (ASID + 5, va, false));
    rig.write_restart(CBR, ASID + 5, va, pte(0, true));
    rig.until("the load", || rig.ended(0));
}

#[test]
fn test_tfh_when_opc_is_not_defined_leaves_the_miss_waiting() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        rig.issue(0, vload(VA));
        rig.wait_fault(0, CBR);
        for opc in [tfh::Opc::NOOP, tfh::Opc(5), tfh::Opc(6)] {
            rig.fill_operands(CBR, ASID, VA, pte(0, true));
            rig.tfh_command(CBR, opc);
            assert_eq!(rig.tfh_wait(CBR), HandleStatus::EXCEPTION, "{opc:?}");
            let control = rig.tfh(CBR);
            assert_eq!(
                (control.cmd(), control.state()),
                (false, tfh::State::MISS_FMM),
                "{opc:?}"
            );
            assert_eq!(rig.gru.stats().fills, 0);
        }
        rig.serve_cbr(CBR);
        assert_eq!(rig.finish(0), Status::IDLE);
    });
}

/// A CBR that belongs to nobody has no misses: what is stored into its TFH stays there, unanswered.
#[test]
fn test_tfh_when_cbr_is_not_allocated_is_left_alone() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.tfh_command(100, tfh::Opc::WRITE_RESTART);
    rig.purge(0, 0, 0, 0);
    rig.run_ok(0, Instruction::nop());
    assert_eq!(rig.tfh(100).status(), HandleStatus::ACTIVE);
    assert_eq!(rig.gru.stats().tlb[0].live_entries, 0);
}
