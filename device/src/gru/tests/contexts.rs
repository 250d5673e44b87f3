//! Contexts: the state machine, allocation, save and restore.

use super::*;
use protos::gru::cb::XType;
use protos::gru::cch::{Cause, Opc, State};

const VA: u64 = 0x7000_0000;

fn bring_to(rig: &Rig, state: State) {
    rig.configure(0, 0b1, 0b1, Mode::FaultMap);
    let steps: &[Opc] = match state {
        State::INACTIVE => &[],
        State::MAPPED => &[Opc::ALLOCATE],
        State::ACTIVE => &[Opc::ALLOCATE, Opc::START],
        _ => &[Opc::ALLOCATE, Opc::START, Opc::INTERRUPT],
    };
    for &step in steps {
        rig.cch_do(0, step).unwrap();
    }
    assert_eq!(rig.cch(0).state(), state);
}

#[test]
fn test_cch_when_any_command_meets_any_state_follows_the_table() {
    let states = [State::INACTIVE, State::MAPPED, State::ACTIVE, State::INTERRUPTED];
    let table: [(Opc, [Result<State, Cause>; 4]); 7] = [
        (Opc::ALLOCATE, {
            let no = Err(Cause::INVALID_ALLOCATION);
            [Ok(State::MAPPED), no, no, no]
        }),
        (Opc::START, {
            let no = Err(Cause::INVALID_START);
            [no, Ok(State::ACTIVE), no, Ok(State::ACTIVE)]
        }),
        (Opc::INTERRUPT, {
            let no = Err(Cause::INVALID_INTERRUPT);
            [no, no, Ok(State::INTERRUPTED), no]
        }),
        (Opc::INTERRUPT_SYNC, {
            let no = Err(Cause::INVALID_INTERRUPT);
            [no, no, Ok(State::INTERRUPTED), no]
        }),
        (Opc::DEALLOCATE, {
            let no = Err(Cause::INVALID_DEALLOCATION);
            [no, Ok(State::INACTIVE), no, Ok(State::INACTIVE)]
        }),
        (Opc(0), [Err(Cause::ILLEGAL_OPCODE); 4]),
        (Opc(7), [Err(Cause::ILLEGAL_OPCODE); 4]),
    ];
    let rig = Rig::new(config(Doorbell::Trap));
    for (opc, outcomes) in table {
        for (state, outcome) in states.into_iter().zip(outcomes) {
            rig.gru.reset();
            bring_to(&rig, state);
            let got = rig.cch_do(0, opc);
            assert_eq!(got, outcome.map(|_| ()), "{opc:?} in {state:?}");
            assert_eq!(
                rig.cch(0).state(),
                outcome.unwrap_or(state),
                "{opc:?} in {state:?}"
            );
        }
    }
}

#[test]
fn test_allocate_when_resources_are_taken_or_missing_is_refused() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.configure(0, 0b0110, 0b0011, Mode::FaultMap);
    rig.cch_do(0, Opc::ALLOCATE).unwrap();
    rig.configure(1, 0b1100, 0b0100, Mode::FaultMap);
    assert_eq!(rig.cch_do(1, Opc::ALLOCATE), Err(Cause::CBR_OVERSUBSCRIBED));
    rig.configure(1, 0b1000, 0b0110, Mode::FaultMap);
    assert_eq!(rig.cch_do(1, Opc::ALLOCATE), Err(Cause::DSR_OVERSUBSCRIBED));
    rig.configure(1, 0, 0b1000, Mode::FaultMap);
    assert_eq!(rig.cch_do(1, Opc::ALLOCATE), Err(Cause::NO_CBRS_TO_ALLOCATE));
    rig.configure(1, 0b1000, 0b0100, Mode::UserPolling);
    let control = rig.cch(1).with_tlb_int_enable(true);
    rig.cch_send(1, control.with_opc(Opc::ALLOCATE));
    assert_eq!(rig.cch_wait(1), Err(Cause::BAD_TFM_CONFIG));
    // What was refused has taken nothing; what is given back can be taken.
    rig.configure(1, 0b1000, 0b0100, Mode::FaultMap);
    rig.cch_do(1, Opc::ALLOCATE).unwrap();
    rig.cch_do(0, Opc::DEALLOCATE).unwrap();
    rig.configure(2, 0b0111, 0b0011, Mode::FaultMap);
    rig.cch_do(2, Opc::ALLOCATE).unwrap();
}

#[test]
fn test_start_when_an_asid_has_more_than_24_bits_is_refused() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.configure(0, 0b1, 0b1, Mode::FaultMap);
    rig.cch_do(0, Opc::ALLOCATE).unwrap();
    for region in 0..8u64 {
        let at = Rig::cch_at(0) + cch::ASID + region / 2 * 8;
        let word = rig.load(at);
        rig.trap_store(at, word | 1 << (24 + region % 2 * 32));
        assert_eq!(rig.cch_do(0, Opc::START), Err(Cause::REGION_REGISTER_WRITE_ERROR));
        assert_eq!(rig.cch(0).state(), State::MAPPED);
        rig.trap_store(at, word);
    }
    rig.cch_do(0, Opc::START).unwrap();
}

#[test]
fn test_deallocate_when_the_map_is_another_one_is_refused() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.configure(0, 0b0110, 0b1, Mode::FaultMap);
    rig.cch_do(0, Opc::ALLOCATE).unwrap();
    for wrong in [0b0010, 0b1110, 0] {
        rig.trap_store(Rig::cch_at(0) + cch::CBR_MAP, wrong);
        assert_eq!(rig.cch_do(0, Opc::DEALLOCATE), Err(Cause::CBR_DEALLOCATION_ERROR));
        assert_eq!(rig.cch(0).state(), State::MAPPED);
    }
    rig.trap_store(Rig::cch_at(0) + cch::CBR_MAP, 0b0110);
    rig.cch_do(0, Opc::DEALLOCATE).unwrap();
}

#[test]
fn test_allocate_when_context_had_another_owner_shows_zeros() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.ds_write(0, &[9; 512]);
        rig.run_ok(0, Instruction::nop());
        rig.cch_do(0, Opc::INTERRUPT_SYNC).unwrap();
        rig.cch_do(0, Opc::DEALLOCATE).unwrap();
        rig.start(Mode::FaultMap);
        assert_eq!(rig.ds_read(0, 512), [0; 512]);
        assert_eq!(rig.load(0), 0);
        assert_eq!(rig.cbe_word(2, cbe::STATE), 0);
    });
}

#[test]
fn test_interrupt_when_fault_map_miss_is_unserved_stays_active_until_it_is_answered() {
    in_all_modes(|doorbell| {
        for answer in [
            tfh::Opc::WRITE_RESTART,
            tfh::Opc::USER_POLLING_MODE,
            tfh::Opc::EXCEPTION,
        ] {
            let rig = Rig::new(config(doorbell));
            rig.start(Mode::FaultMap);
            rig.map_range(ASID, VA, 0, PAGE);
            rig.set_word(0, 0x55);
            rig.issue(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
            rig.wait_fault(0, 2);
            rig.cch_send(0, rig.cch(0).with_opc(Opc::INTERRUPT));
            // Engines have looked often (they executed commands of another address space): still ACTIVE.
            (0..20).for_each(|_| rig.purge(3, 0x777, 0, 1));
            assert_eq!(rig.cch(0).status(), HandleStatus::ACTIVE, "{answer:?}");
            let (asid, va, _) = rig.miss(2);
            rig.fill_operands(
                2,
                asid,
                va,
                Pte {
                    offset: 0,
                    writable: true,
                    shift: 12,
                    tag: 0,
                },
            );
            rig.tfh_command(2, answer);
            assert_eq!(rig.cch_wait(0), Ok(()));
            assert_eq!(rig.cch(0).state(), State::INTERRUPTED);
            match answer {
                tfh::Opc::WRITE_RESTART => {
                    assert_eq!(rig.gru.stats().fills, 1, "the translation was entered");
                    assert_eq!(rig.ended(0), None, "and the instruction was not run");
                    assert_eq!(rig.cbe_status(0b1010, 0).cbrstate(), cbe::State::INTERRUPTED);
                    rig.cch_do(0, Opc::START).unwrap();
                    assert_eq!(rig.finish(0), Status::IDLE);
                    assert_eq!(rig.ds_read(0, 8), 0x55u64.to_le_bytes());
                }
                tfh::Opc::USER_POLLING_MODE => {
                    assert_eq!(rig.istatus(0), Status::CALL_OS);
                    assert_eq!(
                        rig.cbe_status(0b1010, 0).cbrstate(),
                        cbe::State::INTERRUPTED_MISS_UPM
                    );
                    // Miss and TFH survive INTERRUPT and START (17.2).
                    rig.cch_do(0, Opc::START).unwrap();
                    assert_eq!(rig.tfh(2).state(), tfh::State::MISS_UPM);
                    assert_eq!(rig.finish(0), Status::IDLE);
                    assert_eq!(rig.gru.stats().misses, 1);
                }
                _ => assert_eq!(rig.istatus(0), Status::EXCEPTION),
            }
        }
    });
}

#[test]
fn test_cch_when_interrupt_is_pending_refuses_others_as_busy() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    rig.issue(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1));
    rig.wait_fault(0, 2);
    rig.cch_send(0, rig.cch(0).with_opc(Opc::INTERRUPT));
    rig.cch_send(0, cch::Control::new().with_opc(Opc::DEALLOCATE));
    let control = rig.cch(0);
    assert_eq!(
        (control.status(), control.cause()),
        (HandleStatus::EXCEPTION, Cause::CCH_BUSY)
    );
    rig.serve_cbr(2);
    rig.until("the interrupt", || {
        (rig.cch(0).state() == State::INTERRUPTED).then_some(())
    });
}

#[test]
fn test_interrupt_when_a_long_copy_runs_stops_it_and_start_resumes_it() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::UserPolling);
        let len = 2u64 << 20;
        rig.map_range(ASID, VA, 0, len);
        rig.map_range(ASID, VA + 0x1000_0000, 4 << 20, len);
        let source = rig.fill_memory(0, len as usize, 3);
        rig.issue(
            0,
            Instruction::bcopy(VA, VA + 0x1000_0000, 0, 4, XType::DWORD, len / 8),
        );
        let mut interrupts = 0;
        rig.until("the copy", || {
            rig.serve();
            if interrupts < 50 {
                interrupts += 1;
                rig.cch_do(0, Opc::INTERRUPT).unwrap();
                assert_eq!(rig.gru.hardware.chiplets[0].contexts[0].enter().map(|_| ()), None);
                rig.cch_do(0, Opc::START).unwrap();
            }
            rig.ended(0)
        });
        assert!(rig.bytes(4 << 20, len as usize) == source);
    });
}

/// Save as the kernel driver does (CB and CBE of each CBR, then the data segment), give the context back,
/// load it on other resources.
#[test]
fn test_context_when_saved_in_a_miss_and_loaded_elsewhere_finishes_its_instruction() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::UserPolling);
        rig.map_range(ASID, VA, 0, 2 * PAGE);
        let bytes = rig.fill_memory(0, 8192, 21);
        rig.ds_write(0, &[0; 8192]);
        rig.issue(1, Instruction::vload(VA, 0, XType::DWORD, 1024, 1));
        // The first page is served; the instruction waits in the middle.
        rig.until("the first miss", || {
            (rig.istatus(1) == Status::CALL_OS).then_some(())
        });
        rig.serve_cbr(3);
        rig.until("the second miss", || {
            let second = rig.load(Rig::tfh_at(3) + tfh::MISSVADDR) == VA + PAGE;
            (second && rig.istatus(1) == Status::CALL_OS).then_some(())
        });
        rig.cch_do(0, Opc::INTERRUPT_SYNC).unwrap();
        assert_eq!(
            rig.cbe_status(0b1010, 1).cbrstate(),
            cbe::State::INTERRUPTED_MISS_UPM
        );
        let cbs = [2, 3, 6, 7];
        let image = |at: u64| (0..8).map(|word| rig.load(at + 8 * word)).collect::<Vec<_>>();
        let saved: Vec<_> = cbs
            .iter()
            .enumerate()
            .map(|(cb, &cbr)| {
                let words: Vec<_> = (0..8).map(|word| rig.cbe_word(cbr, 8 * word)).collect();
                (image(Rig::cb_at(cb)), words)
            })
            .collect();
        let segment = rig.ds_read(0, 8192);
        rig.cch_do(0, Opc::DEALLOCATE).unwrap();
        // Other CBRs, the same context number (the rig's data segment is that of context 0).
        rig.configure(0, 0b11 << 20, 0xff00, Mode::FaultMap);
        rig.cch_do(0, Opc::ALLOCATE).unwrap();
        for (cb, (cb_words, cbe_words)) in saved.iter().enumerate() {
            let cbe_at = map::CBE + (40 + cb as u64) * map::HANDLE_STRIDE;
            for word in 0..8 {
                rig.store(Rig::cb_at(cb) + 8 * word as u64, cb_words[word]);
                rig.trap_store(cbe_at + 8 * word as u64, cbe_words[word]);
            }
        }
        rig.ds_write(0, &segment);
        rig.cch_do(0, Opc::START).unwrap();
        assert_eq!(rig.finish(1), Status::IDLE);
        assert_eq!(rig.ds_read(0, 8192), bytes);
        assert_eq!(rig.ended(0), Some(Status::IDLE));
    });
}

#[test]
fn test_start_when_cb_says_call_os_but_cbe_is_idle_leaves_the_cb_alone() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.configure(0, 0b1010, 0xff, Mode::FaultMap);
    rig.cch_do(0, Opc::ALLOCATE).unwrap();
    // What a self-test of the kernel driver does (17.3).
    rig.store(0, cb::Control::new().with_istatus(Status::CALL_OS).into_bits());
    rig.cch_do(0, Opc::START).unwrap();
    rig.run_ok(1, Instruction::nop());
    assert_eq!(rig.istatus(0), Status::CALL_OS);
}

#[test]
fn test_cb_when_stored_before_start_runs_at_start() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.configure(0, 0b1010, 0xff, Mode::FaultMap);
        rig.cch_do(0, Opc::ALLOCATE).unwrap();
        rig.issue(0, Instruction::nop());
        rig.purge(0, 0, 0, 0);
        assert_eq!(rig.istatus(0), Status::ACTIVE);
        rig.cch_do(0, Opc::START).unwrap();
        assert_eq!(rig.finish(0), Status::IDLE);
    });
}

#[test]
fn test_contexts_when_asids_differ_do_not_see_each_other() {
    let rig = Rig::new(config(Doorbell::Trap));
    for context in 0..2 {
        rig.configure(context, 1 << context, 1 << context, Mode::FaultMap);
        rig.cch_do(context, Opc::ALLOCATE).unwrap();
        rig.cch_do(context, Opc::START).unwrap();
    }
    rig.map_page(ASID, VA, 0, true);
    rig.map_page(ASID + 8, VA, PAGE, true);
    for (context, value) in [(0, 11), (1, 22)] {
        rig.issue_in(context, 0, Instruction::vset(VA, value, XType::DWORD, 1, 1));
    }
    rig.until("both", || {
        rig.serve();
        (rig.word(0) == 11 && rig.word(PAGE) == 22).then_some(())
    });
    assert_eq!(rig.gru.stats().tlb[0].live_entries, 2);
}

#[test]
fn test_update_when_asid_changes_is_used_after_start_only() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_page(ASID, VA, 0, true);
    rig.map_page(0x900, VA, PAGE, true);
    rig.run_ok(0, Instruction::vset(VA, 1, XType::DWORD, 1, 1));
    rig.cch_do(0, Opc::INTERRUPT).unwrap();
    rig.trap_store(Rig::cch_at(0) + cch::ASID, 0x901_0000_0900);
    rig.cch_do(0, Opc::START).unwrap();
    rig.run_ok(0, Instruction::vset(VA, 2, XType::DWORD, 1, 1));
    assert_eq!((rig.word(0), rig.word(PAGE)), (1, 2));
}
