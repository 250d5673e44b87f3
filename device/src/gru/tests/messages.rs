//! Message queues: MESQ with every substatus, and the queue checks.

use super::*;
use crate::faults::FaultPlan;
use protos::gru::cb::{ExplicitOp, ImplicitOp, SubStatus, XType};
use protos::gru::cbe::ecause;
use protos::gru::message_queue::{Head, LINE, start_of_half};

const VA: u64 = 0x7100_0000_0000;

fn head(head: u32, limit: u32) -> u64 {
    Head::new().with_head(head).with_limit(limit).into_bits()
}

/// A queue at offset 0 of the client's memory, and at `VA`.
fn rig_with(faults: &str, doorbell: Doorbell, word: u64) -> Arc<Rig> {
    let faults: FaultPlan = faults.parse().unwrap();
    let rig = Rig::new(GruConfig {
        faults,
        ..config(doorbell)
    });
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 4 * PAGE);
    rig.set_word(0, word);
    rig
}

fn message(rig: &Rig, seed: u8, lines: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..64 * lines)
        .map(|i| (i as u8).wrapping_mul(7) ^ seed)
        .collect();
    rig.ds_write(256, &bytes);
    bytes
}

fn outcome(rig: &Rig, cb: usize) -> (Status, SubStatus) {
    let control = cb::Control::from_bits(rig.load(Rig::cb_at(cb)));
    (control.istatus(), control.substatus())
}

fn refused(substatus: SubStatus) -> (Status, SubStatus) {
    (Status::EXCEPTION, substatus)
}

#[test]
fn test_mesq_when_lines_fit_moves_the_head_and_stores_them() {
    in_all_modes(|doorbell| {
        let rig = rig_with("", doorbell, start_of_half(30, 0).into_bits());
        let mut expected = Vec::new();
        for (seed, lines) in [(1, 1), (2, 2), (3, 1), (4, 5)] {
            let old = rig.word(0);
            expected.extend(message(&rig, seed, lines));
            rig.run_ok(0, Instruction::mesq(VA, 256, lines as u64));
            assert_eq!(rig.avalue(0), old);
            assert_eq!(outcome(&rig, 0), (Status::IDLE, SubStatus::NONE));
        }
        assert_eq!(rig.word(0), head(11, 16));
        assert_eq!(rig.bytes(128, expected.len()), expected);
        assert_eq!(rig.bytes(128 + expected.len() as u64, 64), [0; 64]);
    });
}

#[test]
fn test_mesq_when_half_is_full_says_qlimit_with_head_and_limit() {
    in_all_modes(|doorbell| {
        let rig = rig_with("", doorbell, start_of_half(6, 0).into_bits());
        let first = message(&rig, 9, 1);
        rig.run_ok(0, Instruction::mesq(VA, 256, 1));
        // Two lines do not fit although one would: nothing is stored, the head stays.
        message(&rig, 5, 2);
        assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 2)), Status::EXCEPTION);
        assert_eq!(outcome(&rig, 0), refused(SubStatus::QLIMIT_REACHED));
        assert_eq!((rig.avalue(0), rig.word(0)), (head(3, 4), head(3, 4)));
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), 0);
        assert_eq!(rig.bytes(128, 192), [first.clone(), vec![0; 128]].concat());
        rig.run_ok(0, Instruction::mesq(VA, 256, 1));
        assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 1)), Status::EXCEPTION);
        assert_eq!(outcome(&rig, 0), refused(SubStatus::QLIMIT_REACHED));
        assert_eq!((rig.avalue(0), rig.word(0)), (head(4, 4), head(4, 4)));
        // A spoilt head is no way out of the queue.
        rig.set_word(0, head(u32::MAX, 4));
        assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 1)), Status::EXCEPTION);
        assert_eq!(outcome(&rig, 0), refused(SubStatus::QLIMIT_REACHED));
        // The next instruction clears the substatus.
        rig.run_ok(0, Instruction::nop());
        assert_eq!(outcome(&rig, 0), (Status::IDLE, SubStatus::NONE));
        assert_eq!(rig.gru.stats().messages_refused, 3);
    });
}

#[test]
fn test_mesq_when_message_would_cross_a_page_reserves_nothing() {
    let rig = rig_with("", Doorbell::Trap, head(63, 100));
    message(&rig, 1, 2);
    assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 2)), Status::EXCEPTION);
    assert_eq!(outcome(&rig, 0), refused(SubStatus::PAGE_OVERFLOW));
    assert_eq!((rig.avalue(0), rig.word(0)), (head(63, 100), head(63, 100)));
    // One line fits, and the next message lies in the second page.
    rig.run_ok(0, Instruction::mesq(VA, 256, 1));
    let bytes = message(&rig, 2, 2);
    rig.run_ok(0, Instruction::mesq(VA, 256, 2));
    assert_eq!(rig.bytes(PAGE, 128), bytes);
    // In a large page there is no border at 4 KiB, nor at 64 KiB.
    let va = 0x7200_0000_0000u64;
    let large = Pte {
        offset: 2 << 20,
        writable: true,
        shift: 21,
        tag: 0,
    };
    rig.pages.lock().unwrap().insert((ASID, va / PAGE), large);
    for line in [63u32, 1023] {
        rig.set_word(2 << 20, head(line, 2000));
        rig.run_ok(0, Instruction::mesq(va, 256, 2));
        assert_eq!(rig.bytes((2 << 20) + 64 * u64::from(line), 128), bytes);
    }
}

#[test]
fn test_mesq_when_put_misses_after_the_reservation_reserves_once() {
    in_all_modes(|doorbell| {
        // Head word in the first page, messages in the second; that page is purged again and again.
        let rig = rig_with("", doorbell, head(64, 128));
        let mut expected = Vec::new();
        for seed in 0..60 {
            expected.extend(message(&rig, seed, 1));
            rig.issue(0, Instruction::mesq(VA, 256, 1));
            for _ in 0..3 {
                rig.purge(1, ASID, VA + PAGE, 1);
                rig.serve();
            }
            assert_eq!(rig.finish(0), Status::IDLE);
        }
        assert_eq!(rig.word(0), head(124, 128));
        assert_eq!(rig.bytes(PAGE, expected.len()), expected);
    });
}

#[test]
fn test_mesq_when_congestion_is_injected_reports_it_and_changes_nothing() {
    for (plan, substatus) in [
        ("lb-overflow=2", SubStatus::LB_OVERFLOWED),
        ("amo-nack=2", SubStatus::AMO_NACKED),
    ] {
        let rig = rig_with(plan, Doorbell::Trap, head(2, 8));
        message(&rig, 1, 1);
        rig.run_ok(0, Instruction::mesq(VA, 256, 1));
        assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 1)), Status::EXCEPTION);
        assert_eq!(outcome(&rig, 0), refused(substatus));
        assert_eq!(rig.word(0), head(3, 8));
        assert_eq!(rig.bytes(192, 64), [0; 64]);
        rig.run_ok(0, Instruction::mesq(VA, 256, 1));
        assert_eq!(rig.word(0), head(4, 8));
        assert_eq!(rig.gru.stats().faults.injected, 1);
    }
}

#[test]
fn test_mesq_when_put_nack_is_injected_has_reserved_the_slot() {
    let rig = rig_with("put-nack=1", Doorbell::Trap, head(2, 8));
    let bytes = message(&rig, 1, 1);
    assert_eq!(rig.run(0, Instruction::mesq(VA, 256, 1)), Status::EXCEPTION);
    assert_eq!(outcome(&rig, 0), refused(SubStatus::PUT_NACKED));
    assert_eq!((rig.avalue(0), rig.word(0)), (head(2, 8), head(3, 8)));
    assert_eq!(rig.bytes(128, 64), [0; 64]);
    // What software does then.
    let at = VA + LINE * u64::from(Head::from_bits(rig.avalue(0)).head());
    rig.run_ok(0, Instruction::vstore(at, 256, XType::CACHE_LINE, 1, 1));
    assert_eq!(rig.bytes(128, 64), bytes);
}

#[test]
fn test_mesq_when_many_send_at_once_loses_and_mixes_nothing() {
    in_all_modes(|doorbell| {
        let each = 40u64;
        let rig = rig_with("", doorbell, head(2, 2 + 4 * each as u32));
        rig.map_range(ASID, VA, 0, 16 * PAGE);
        std::thread::scope(|scope| {
            for cb in 0..4 {
                let rig = &rig;
                scope.spawn(move || {
                    for number in 0..each {
                        let stamp = (cb as u64 + 1) << 32 | number;
                        let at = map::GSEG_DS + 1024 * cb as u64;
                        (0..8).for_each(|word| rig.store(at + 8 * word, stamp));
                        let send = Instruction::mesq(VA, 1024 * cb as u32, 1);
                        rig.issue(cb, send);
                        assert_eq!(rig.until("a message", || rig.ended(cb)), Status::IDLE);
                    }
                });
            }
            rig.until("all messages", || {
                rig.serve();
                (rig.gru.stats().instructions == 4 * each).then_some(())
            });
        });
        let mut seen: Vec<u64> = (0..4 * each)
            .map(|line| {
                let words = rig.bytes(128 + 64 * line, 64);
                let stamp = words[..8].to_vec();
                assert!(words.chunks(8).all(|word| word == stamp), "line {line} is mixed");
                u64::from_le_bytes(stamp.try_into().unwrap())
            })
            .collect();
        seen.sort_unstable();
        let all: Vec<u64> = (1..=4)
            .flat_map(|cb| (0..each).map(move |n| cb << 32 | n))
            .collect();
        assert_eq!(seen, all);
    });
}

#[test]
fn test_queue_checks_when_lines_fit_reserve_them_and_else_say_qlimit() {
    let rig = rig_with("", Doorbell::Trap, head(2, 7));
    let steps = [
        (Instruction::gamir(VA, ImplicitOp::QCHK1, XType::DWORD), 1),
        (Instruction::gamir(VA, ImplicitOp::QCHK2, XType::DWORD), 2),
        (Instruction::gamer(VA, ExplicitOp::CADD, 2, 0, XType::DWORD), 2),
    ];
    let mut at = 2;
    for (instruction, lines) in steps {
        rig.run_ok(0, instruction);
        assert_eq!(rig.avalue(0), head(at, 7));
        at += lines;
        assert_eq!(rig.word(0), head(at, 7));
    }
    for (instruction, _) in steps {
        assert_eq!(rig.run(0, instruction), Status::EXCEPTION);
        assert_eq!(outcome(&rig, 0), refused(SubStatus::QLIMIT_REACHED));
        assert_eq!((rig.avalue(0), rig.word(0)), (head(7, 7), head(7, 7)));
    }
    // The huge step of a confused program.
    let all = Instruction::gamer(VA, ExplicitOp::CADD, u64::MAX, 0, XType::DWORD);
    assert_eq!(rig.run(0, all), Status::EXCEPTION);
    assert_eq!(outcome(&rig, 0), refused(SubStatus::QLIMIT_REACHED));
}

#[test]
fn test_mesq_when_operands_are_wrong_names_the_cause() {
    let rig = rig_with("", Doorbell::Trap, head(2, 7));
    let mut dword = Instruction::mesq(VA, 0, 1);
    dword.control = dword.control.with_xtype(XType::DWORD);
    let cases = [
        (Instruction::mesq(VA + 8, 0, 1), ecause::INVALID_INSTRUCTION),
        (Instruction::mesq(VA, 0, 0), ecause::INVALID_INSTRUCTION),
        (dword, ecause::INVALID_INSTRUCTION),
        (
            Instruction::mesq(VA, 8192 - 64, 2),
            ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
        ),
        (
            Instruction::mesq(VA, 0, u64::MAX),
            ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
        ),
        (Instruction::mesq(0xdead_0000, 0, 1), ecause::OS_FATAL_TLB_FAULT),
        (
            Instruction::gamir(VA, ImplicitOp::QCHK1, XType::WORD),
            ecause::INVALID_INSTRUCTION,
        ),
    ];
    for (number, (instruction, cause)) in cases.into_iter().enumerate() {
        assert_eq!(rig.run(1, instruction), Status::EXCEPTION, "case {number}");
        assert_eq!(rig.cbe_status(0b1010, 1).ecause(), cause, "case {number}");
        assert_eq!(outcome(&rig, 1), refused(SubStatus::NONE), "case {number}");
    }
    assert_eq!(rig.word(0), head(2, 7));
}
