//! Registered atomics, polls, GAMXR, BSTORE, VFLUSH, and unmapped mode.

use super::*;
use protos::gru::cb::{ExplicitOp, ImplicitOp, Opc, SubStatus, XType, ima};
use protos::gru::cbe::ecause;
use protos::gru::message_queue::start_of_half;

const VA: u64 = 0x7300_0000_0000;

fn rig(doorbell: Doorbell) -> Arc<Rig> {
    let rig = Rig::new(config(doorbell));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 16 * PAGE);
    rig
}

/// A kernel's context: no faults reported by map, unmapped mode allowed.
fn unmapped_rig(doorbell: Doorbell) -> Arc<Rig> {
    let rig = Rig::new(config(doorbell));
    rig.configure(0, 0b1010, 0xff, Mode::UserPolling);
    let control = rig.cch(0).with_unmap_enable(true);
    rig.trap_store(Rig::cch_at(0), control.into_bits());
    rig.cch_do(0, cch::Opc::ALLOCATE).unwrap();
    rig.cch_do(0, cch::Opc::START).unwrap();
    rig
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn test_registered_atomics_when_issued_do_what_the_plain_ones_do() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell);
        let old = 41u64;
        let cases = [
            (Instruction::gamirr(VA, ImplicitOp::FETCH, XType::DWORD), 41, old),
            (Instruction::gamirr(VA, ImplicitOp::CLEAR, XType::DWORD), 41, 0),
            (Instruction::gamirr(VA, ImplicitOp::INC, XType::DWORD), 41, 42),
            (Instruction::gamirr(VA, ImplicitOp::DEC, XType::DWORD), 41, 40),
            (Instruction::gamirr(VA, ImplicitOp::DECZ, XType::DWORD), 41, 40),
            (Instruction::gamirr(VA, ImplicitOp::DECZ, XType::DWORD), 0, 0),
            (Instruction::gamirr(VA, ImplicitOp::DECZ, XType::WORD), 0, 0),
            (Instruction::gamirr(VA, ImplicitOp::DECZ, XType::WORD), 7, 6),
            (
                Instruction::gamerr(VA, ExplicitOp::SWAP, 5, 0, XType::DWORD),
                41,
                5,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::OR, 6, 0, XType::DWORD),
                41,
                47,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::AND, 9, 0, XType::DWORD),
                41,
                9,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::XOR, 1, 0, XType::DWORD),
                41,
                40,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::ADD, 9, 0, XType::DWORD),
                41,
                50,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::CSWAP, 9, 41, XType::DWORD),
                41,
                9,
            ),
            (
                Instruction::gamerr(VA, ExplicitOp::CSWAP, 9, 40, XType::DWORD),
                41,
                41,
            ),
        ];
        for (instruction, before, after) in cases {
            rig.set_word(0, before);
            rig.run_ok(0, instruction);
            assert_eq!((rig.avalue(0), rig.word(0)), (before, after), "{instruction:?}");
        }
        // What belongs to the other family only.
        for wrong in [
            Instruction::gamirr(VA, ImplicitOp::QCHK1, XType::DWORD),
            Instruction::gamir(VA, ImplicitOp::DECZ, XType::DWORD),
            Instruction::gamerr(VA, ExplicitOp::CADD, 1, 0, XType::DWORD),
            Instruction::gamer(VA, ExplicitOp::EPOLL, 1, 0, XType::DWORD),
            Instruction::gamerr(VA, ExplicitOp(0x0b), 1, 0, XType::DWORD),
            Instruction::gamerr(VA + 2, ExplicitOp::NPOLL, 1, 0, XType::WORD),
        ] {
            assert_eq!(rig.run(0, wrong), Status::EXCEPTION, "{wrong:?}");
            assert_eq!(
                rig.cbe_status(0b1010, 0).ecause(),
                ecause::INVALID_INSTRUCTION,
                "{wrong:?}"
            );
        }
    });
}

#[test]
fn test_poll_when_memory_changes_ends_with_what_it_saw() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell);
        rig.set_word(8, 0xaaaa_0000_0005);
        let polls = [
            (0, Instruction::gamerr(VA, ExplicitOp::EPOLL, 7, 0, XType::DWORD)),
            (1, Instruction::gamerr(VA, ExplicitOp::NPOLL, 0, 0, XType::DWORD)),
            // The low half counts.
            (
                2,
                Instruction::gamerr(VA + 8, ExplicitOp::NPOLL, 0x1_0000_0005, 0, XType::WORD),
            ),
        ];
        for (cb, poll) in polls {
            rig.issue(cb, poll);
        }
        rig.until("the page", || {
            rig.serve();
            (rig.gru.stats().tlb[0].hits > 10).then_some(())
        });
        assert!((0..3).all(|cb| rig.ended(cb).is_none()));
        assert_eq!(rig.cbe_status(0b1010, 0).cbrstate(), cbe::State::WAIT_RESPONSE);
        rig.set_word(0, 3);
        assert_eq!(rig.finish(1), Status::IDLE);
        assert_eq!(rig.avalue(1), 3);
        assert_eq!(rig.ended(0), None);
        rig.set_word(0, 7);
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.avalue(0), 7);
        rig.set_word(8, 0xaaaa_0000_0006);
        assert_eq!(rig.finish(2), Status::IDLE);
        assert_eq!(rig.avalue(2), 6);
    });
}

#[test]
fn test_poll_when_it_waits_long_costs_little_and_holds_nobody_up() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell);
        rig.issue(0, Instruction::gamerr(VA, ExplicitOp::EPOLL, 7, 0, XType::DWORD));
        rig.until("the page", || {
            rig.serve();
            (rig.gru.stats().tlb[0].hits > 20).then_some(())
        });
        let (begun, before) = (Instant::now(), rig.engine_cpu());
        // Waits for the wall clock only: what is measured is what nobody asked for.
        std::thread::sleep(Duration::from_millis(400));
        let used = rig.engine_cpu() - before;
        let share = used.as_secs_f64() / begun.elapsed().as_secs_f64();
        assert!(share < 0.2, "a poll uses {:.1}% of a core", 100.0 * share);
        // Other instructions, purges and INTERRUPT come through; the purged page is asked for again.
        rig.run_ok(1, Instruction::nop());
        let misses = rig.gru.stats().misses;
        rig.purge(0, ASID, VA, 1);
        rig.until("the page again", || {
            (rig.gru.stats().misses > misses).then_some(())
        });
        rig.until("its answer", || {
            rig.serve();
            (rig.tfh(2).status() == HandleStatus::IDLE).then_some(())
        });
        rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
        rig.set_word(0, 7);
        assert_eq!(rig.cbe_status(0b1010, 0).cbrstate(), cbe::State::INTERRUPTED);
        rig.purge(0, ASID + 1, 0, 1);
        assert_eq!(rig.ended(0), None);
        rig.cch_do(0, cch::Opc::START).unwrap();
        assert_eq!(rig.finish(0), Status::IDLE);
        // A context may be given back in the middle of a poll.
        rig.issue(0, Instruction::gamerr(VA, ExplicitOp::EPOLL, 8, 0, XType::DWORD));
        rig.run_ok(1, Instruction::nop());
        rig.cch_do(0, cch::Opc::INTERRUPT_SYNC).unwrap();
        rig.cch_do(0, cch::Opc::DEALLOCATE).unwrap();
    });
}

#[test]
fn test_gamxr_when_fragment_matches_under_the_mask_is_replaced_under_it() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell);
        let old = [0x1111_2222u64, 0x3333_4444, 0x5555_6666, 0x7777_8888];
        let new = [0xaaaa_bbbbu64, 0xcccc_dddd, 0xeeee_ffff, 0x1234_5678];
        let low = 0xffff;
        let cases: [(&[u64], [u64; 4], bool); 5] = [
            (&[u64::MAX; 4], old, true),
            (&[low; 4], old.map(|word| word | 0xf0f0_0000_0000), true),
            (&[low; 4], [old[0], old[1], old[2] ^ 1, old[3]], false),
            // One double word: another way through the code.
            (&[0, low, 0, 0], [0, old[1], 0, 0], true),
            (&[0, low, 0, 0], [0, old[1] ^ 1, 0, 0], false),
        ];
        for (mask, compare, matches) in cases {
            rig.memory.write_all_at(&words(&old), 96).unwrap();
            rig.ds_write(512, &[words(&new), words(&compare), words(mask)].concat());
            rig.run_ok(0, Instruction::gamxr(VA + 96, 512, 4));
            assert_eq!(rig.avalue(0), old[0]);
            assert_eq!(rig.ds_read(512 + 96, 32), words(&old));
            let expected: Vec<u64> = (0..4)
                .map(|i| {
                    if matches {
                        old[i] & !mask[i] | new[i] & mask[i]
                    } else {
                        old[i]
                    }
                })
                .collect();
            assert_eq!(rig.bytes(96, 32), words(&expected), "{mask:x?} {compare:x?}");
        }
        for (wrong, cause) in [
            (Instruction::gamxr(VA + 8, 0, 4), ecause::INVALID_INSTRUCTION),
            (Instruction::gamxr(VA, 0, 3), ecause::INVALID_INSTRUCTION),
            (Instruction::gamxr(VA, 0, u64::MAX), ecause::INVALID_INSTRUCTION),
            (
                Instruction::gamxr(VA, 8192 - 120, 4),
                ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
            ),
        ] {
            assert_eq!(rig.run(0, wrong), Status::EXCEPTION);
            assert_eq!(rig.cbe_status(0b1010, 0).ecause(), cause);
        }
    });
}

/// A counter over four double words that all have to agree: every increment is one decision.
#[test]
fn test_gamxr_when_several_compete_counts_every_success_once() {
    let rig = rig(Doorbell::Poll);
    let each = 60u64;
    std::thread::scope(|scope| {
        for cb in 0..3usize {
            let rig = &rig;
            scope.spawn(move || {
                let (at, mut seen) = (1024 * cb as u64, 0u64);
                for _ in 0..each {
                    loop {
                        let operands = [[seen + 1; 4], [seen; 4], [u64::MAX; 4]].concat();
                        rig.ds_write(at, &words(&operands));
                        rig.issue(cb, Instruction::gamxr(VA, at as u32, 4));
                        assert_eq!(rig.until("an exchange", || rig.ended(cb)), Status::IDLE);
                        let found = rig.avalue(cb);
                        if found == seen {
                            break;
                        }
                        seen = found;
                    }
                    seen += 1;
                }
            });
        }
        rig.until("all exchanges", || {
            rig.serve();
            (rig.word(0) == 3 * each).then_some(())
        });
    });
    assert_eq!(rig.bytes(0, 32), words(&[3 * each; 4]));
}

#[test]
fn test_bstore_when_source_is_either_stores_it() {
    for source in [BstoreSource::Segment, BstoreSource::Memory] {
        let rig = Rig::new(GruConfig {
            bstore_source: source,
            ..config(Doorbell::Trap)
        });
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, 16 * PAGE);
        let memory = rig.fill_memory(0, 8 * PAGE as usize, 77);
        let segment: Vec<u8> = memory.iter().map(|byte| byte ^ 0xff).take(6000).collect();
        rig.ds_write(0, &segment);
        let to = VA + 9 * PAGE + 20;
        rig.run_ok(0, Instruction::bstore(VA + 5, to, 8, XType::WORD, 1400));
        let expected = match source {
            BstoreSource::Segment => &segment[8..5608],
            BstoreSource::Memory => &memory[5..5605],
        };
        assert!(rig.bytes(9 * PAGE + 20, 5600) == expected, "{source:?}");
        assert_eq!(rig.bytes(9 * PAGE + 5620, 64), [0; 64]);
        if source == BstoreSource::Segment {
            let long = Instruction::bstore(VA, to, 8192 - 4, XType::WORD, 2);
            assert_eq!(rig.run(0, long), Status::EXCEPTION);
            let cause = rig.cbe_status(0b1010, 0).ecause();
            assert_eq!(cause, ecause::DATA_SEGMENT_LIMIT_EXCEEDED);
        }
    }
}

#[test]
fn test_vflush_when_lines_are_mapped_changes_nothing_and_else_faults() {
    let rig = rig(Doorbell::Trap);
    let bytes = rig.fill_memory(0, 16 * PAGE as usize, 3);
    rig.run_ok(0, Instruction::vflush(VA, XType::CACHE_LINE, 512, 2));
    assert!(rig.bytes(0, bytes.len()) == bytes);
    assert_eq!(rig.served.load(Ordering::Relaxed), 16, "each page was translated");
    let beyond = Instruction::vflush(VA + 15 * PAGE, XType::CACHE_LINE, 65, 1);
    assert_eq!(rig.run(0, beyond), Status::EXCEPTION);
    assert_eq!(rig.cbe_status(0b1010, 0).ecause(), ecause::OS_FATAL_TLB_FAULT);
    assert_eq!(rig.cbe_word(Rig::cbr(0b1010, 0), cbe::IDEF1UPD), VA + 16 * PAGE);
}

#[test]
fn test_unmapped_mode_when_allowed_reaches_memory_by_its_iova() {
    in_all_modes(|doorbell| {
        let rig = unmapped_rig(doorbell);
        let run =
            |instruction: Instruction| rig.run_ok(0, instruction.with_ima(ima::UNMAPPED | ima::CB_DELAY));
        let bytes = rig.fill_memory(0, 1 << 20, 13);
        run(Instruction::vload(IOVA + 4093, 8, XType::BYTE, 5000, 1));
        assert_eq!(rig.ds_read(8, 5000), bytes[4093..9093]);
        run(Instruction::vstore(IOVA + (2 << 20) + 1, 8, XType::BYTE, 5000, 1));
        assert_eq!(rig.bytes((2 << 20) + 1, 5000), bytes[4093..9093]);
        run(Instruction::bcopy(
            IOVA + 3,
            IOVA + (4 << 20) + 4090,
            0,
            4,
            XType::BYTE,
            300_000,
        ));
        assert!(rig.bytes((4 << 20) + 4090, 300_000) == bytes[3..300_003]);
        run(Instruction::vset(IOVA, 0, XType::DWORD, 4, 1));
        assert_eq!(rig.bytes(0, 40), [vec![0; 32], bytes[32..40].to_vec()].concat());
        run(Instruction::gamir(IOVA + 8, ImplicitOp::INC, XType::DWORD));
        assert_eq!((rig.avalue(0), rig.word(8)), (0, 1));
        // A queue across pages: there are none.
        rig.set_word(0, start_of_half(200, 0).with_head(63).into_bits());
        run(Instruction::mesq(IOVA, 8, 2));
        assert_eq!(rig.bytes(PAGE - 64, 128), bytes[4093..4221]);
        let stats = rig.gru.stats();
        assert_eq!((stats.misses, stats.tlb[0].hits, stats.tlb[0].misses), (0, 0, 0));
        assert_eq!(rig.load(map::CB_EXT_TAG), u64::MAX, "no translation");
    });
}

#[test]
fn test_unmapped_mode_when_address_or_class_is_wrong_names_the_cause() {
    let rig = unmapped_rig(Doorbell::Trap);
    let load = |va: u64| Instruction::vload(va, 0, XType::DWORD, 1, 1).with_ima(ima::UNMAPPED);
    let mut mmio = load(IOVA | 1 << 62);
    mmio.control = mmio.control.with_iaa0(1);
    let cases = [
        (load(IOVA + MEMORY), ecause::ADDRESS_SPACE_DECODE_ERROR),
        (load(0), ecause::ADDRESS_SPACE_DECODE_ERROR),
        (load((1 << 62) - 4), ecause::ADDRESS_SPACE_DECODE_ERROR),
        (load(IOVA + MEMORY - 4), ecause::ADDRESS_SPACE_DECODE_ERROR),
        (load(IOVA | 1 << 62), ecause::IAA_GAA_MISMATCH),
        (mmio, ecause::ADDRESS_SPACE_DECODE_ERROR),
    ];
    for (number, (instruction, cause)) in cases.into_iter().enumerate() {
        assert_eq!(rig.run(0, instruction), Status::EXCEPTION, "case {number}");
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), cause, "case {number}");
    }
    // Memory that is taken away is not there any more; read-only memory is not stored to.
    rig.dma.unmap(IOVA, MEMORY).unwrap();
    let fd = rig.memory.as_fd().try_clone_to_owned().unwrap();
    rig.dma.map(IOVA, PAGE, fd, 0, Prot::READ_ONLY).unwrap();
    rig.run_ok(0, load(IOVA));
    for instruction in [
        load(IOVA + PAGE),
        Instruction::vset(IOVA, 1, XType::DWORD, 1, 1).with_ima(ima::UNMAPPED),
        Instruction::gamir(IOVA, ImplicitOp::INC, XType::DWORD).with_ima(ima::UNMAPPED),
    ] {
        assert_eq!(rig.run(0, instruction), Status::EXCEPTION);
        let cause = rig.cbe_status(0b1010, 0).ecause();
        assert_eq!(cause, ecause::ADDRESS_SPACE_DECODE_ERROR, "{instruction:?}");
    }
    rig.dma.set_bus_master(false);
    assert_eq!(rig.run(0, load(IOVA)), Status::EXCEPTION);
}

/// As a kernel retries a failed instruction: nothing but icmd is stored (section 7).
#[test]
fn test_exception_when_only_icmd_is_set_runs_the_instruction_again() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(GruConfig {
            faults: "execution-error=2,seed=1".parse().unwrap(),
            ..config(doorbell)
        });
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        let inc = Instruction::gamir(VA, ImplicitOp::INC, XType::DWORD);
        for count in 1..=3 {
            assert_eq!(rig.run(0, inc), Status::EXCEPTION);
            let status = rig.cbe_status(0b1010, 0);
            assert_eq!(status.ecause() & !ecause::RETRYABLE, 0);
            assert_ne!(status.ecause(), 0);
            assert_eq!(status.cbrexecstatus() & cbe::execstatus::ABORT_OCC, 0);
            assert_eq!(rig.word(0), count - 1, "nothing was done");
            rig.store(0, rig.load(0) | 1);
            rig.ring_if_asleep();
            rig.until("the second run", || {
                rig.serve();
                (rig.word(0) == count && rig.istatus(0) == Status::IDLE).then_some(())
            });
        }
        assert_eq!(rig.gru.stats().faults.injected, 3);
    });
}

#[test]
fn test_ivset_when_built_by_the_protocol_sets_the_elements() {
    let rig = rig(Doorbell::Trap);
    rig.ds_write(0, &words(&[8, 24, 4096]));
    rig.run_ok(0, Instruction::ivset(VA, 0, 0x55, XType::DWORD, 3));
    assert_eq!(
        (rig.word(8), rig.word(16), rig.word(24), rig.word(4096)),
        (0x55, 0, 0x55, 0x55)
    );
    let control = Instruction::ivset(VA, 0, 0, XType::DWORD, 1).control;
    assert_eq!(
        (control.opc(), control.substatus()),
        (Opc::IVSET, SubStatus::NONE)
    );
}
