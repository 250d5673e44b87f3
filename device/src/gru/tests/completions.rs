//! Completion interrupts (section 13).

use super::*;
use protos::gru::cb::{SubStatus, XType, ima};
use protos::gru::message_queue::Head;

const VA: u64 = 0x7000_0000;
const MAP: u64 = 0b1010;

/// A context with these enables, reporting to TFM `select`.
fn rig(doorbell: Doorbell, bit: bool, interrupt: bool, select: u8) -> Arc<Rig> {
    let rig = Rig::new(config(doorbell));
    rig.configure(0, MAP, 0xff, Mode::FaultMap);
    let control = rig.cch(0);
    let control = control
        .with_tfm_done_bit_enable(bit)
        .with_cb_int_enable(interrupt);
    let control = control.with_tlb_int_select(select);
    rig.trap_store(Rig::cch_at(0), control.into_bits());
    rig.cch_do(0, cch::Opc::ALLOCATE).unwrap();
    rig.cch_do(0, cch::Opc::START).unwrap();
    rig.map_range(ASID, VA, 0, 4 * PAGE);
    rig
}

fn done(rig: &Rig, tfm: usize) -> Vec<usize> {
    rig.take_bits(tfm, map::tfm::DONE_BITS)
}

#[test]
fn test_completion_interrupt_when_asked_for_sets_done_bit_and_raises_the_vector() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell, true, true, 5);
        rig.run_ok(2, Instruction::nop().with_ima(ima::INTERRUPT));
        rig.until("the interrupt", || (rig.interrupts(5) > 0).then_some(()));
        assert_eq!(done(&rig, 5), [Rig::cbr(MAP, 2)]);
        rig.run_ok(2, Instruction::nop());
        assert!(done(&rig, 5).is_empty());
        assert_eq!((0..32).map(|vector| rig.interrupts(vector)).sum::<u64>(), 0);
    });
}

#[test]
fn test_completion_interrupt_when_enables_are_off_is_not_given() {
    for (bit, interrupt) in [(false, false), (false, true), (true, false)] {
        let rig = rig(Doorbell::Trap, bit, interrupt, 0);
        rig.run_ok(0, Instruction::nop().with_ima(ima::INTERRUPT));
        // A purge passes through the same engines afterwards.
        rig.purge(0, ASID + 1, 0, 1);
        assert_eq!(done(&rig, 0).len(), usize::from(bit));
        assert_eq!(rig.interrupts(0), 0);
    }
}

/// Every way to end: after misses, with an exception, with a refused message.
#[test]
fn test_completion_interrupt_when_instruction_ends_anyhow_comes_once() {
    in_all_modes(|doorbell| {
        let rig = rig(doorbell, true, true, 0);
        rig.set_word(0, Head::new().with_head(4).with_limit(4).into_bits());
        let load = |va| Instruction::vload(va, 0, XType::DWORD, 1024, 1);
        let cases = [
            (load(VA), Status::IDLE, SubStatus::NONE),
            (load(VA + 3 * PAGE), Status::EXCEPTION, SubStatus::NONE),
            (
                Instruction::mesq(VA, 0, 1),
                Status::EXCEPTION,
                SubStatus::QLIMIT_REACHED,
            ),
        ];
        for (instruction, status, substatus) in cases {
            let ended = rig.run(1, instruction.with_ima(ima::INTERRUPT));
            let control = cb::Control::from_bits(rig.load(Rig::cb_at(1)));
            assert_eq!((ended, control.substatus()), (status, substatus));
            let cbr = rig.until("the done bit", || done(&rig, 0).pop());
            assert_eq!(cbr, Rig::cbr(MAP, 1));
            rig.purge(0, ASID + 1, 0, 1);
            assert!(done(&rig, 0).is_empty());
        }
    });
}

/// While it waits for its page the TFH and the CBE say what is to come.
#[test]
fn test_miss_when_instruction_wants_an_interrupt_says_so() {
    let rig = rig(Doorbell::Trap, true, true, 0);
    for (bits, wanted) in [(ima::INTERRUPT, true), (0, false)] {
        rig.purge(0, 0, 0, 0);
        rig.issue(0, Instruction::vload(VA, 0, XType::DWORD, 1, 1).with_ima(bits));
        rig.wait_fault(0, Rig::cbr(MAP, 0));
        assert_eq!(rig.tfh(Rig::cbr(MAP, 0)).cb_int(), wanted);
        let pending = rig.cbe_status(MAP, 0).cbrexecstatus() & cbe::execstatus::CB_INT_PENDING;
        assert_eq!(pending != 0, wanted);
        rig.serve_cbr(Rig::cbr(MAP, 0));
        assert_eq!(rig.finish(0), Status::IDLE);
        assert_eq!(rig.cbe_status(MAP, 0).cbrexecstatus(), 0);
    }
}
