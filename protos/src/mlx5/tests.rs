use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::cmd::{Delivery, Entry, Mailbox, Opcode, Status};
use super::commands::*;
use super::cq::{Cqc, Cqe, CqeOpcode, FLAGS_GRH, Syndrome};
use super::eq::{DATA_NUMBER, Eqc, Eqe, Event};
use super::mkey::{AccessMode, Klm, Mkc};
use super::qp::{Ads, PRIMARY_PATH, Qpc, SECONDARY_PATH, State};
use super::srq::{NextSegment, Rmpc, XrcSrqc};
use super::wqe::{self, AddressVector, Control, UmrControl};
use super::{Layout, caps, uar};

/// Fields lie inside, no two share a bit (but for the names of whole words), and writing one changes no other.
fn check_layout<T: Layout + Clone + PartialEq + std::fmt::Debug>(bytes: &[u8], overlapping: &[&str]) {
    let value = T::read_from_prefix(bytes).expect("enough bytes").0;
    let mut taken = vec![0u8; size_of::<T>()];
    for field in T::FIELDS {
        let mask: Vec<u8> = if field.width == 64 {
            vec![0xff; 8]
        } else {
            let mask = u32::MAX >> (32 - field.width) << field.bit;
            mask.to_be_bytes().to_vec()
        };
        for (at, mask) in mask.iter().enumerate() {
            let taken = &mut taken[field.byte + at];
            assert!(
                *taken & mask == 0 || overlapping.contains(&field.name),
                "{} overlaps",
                field.name
            );
            *taken |= mask;
        }
    }
    // Every byte survives.
    assert_eq!(value.as_bytes(), &bytes[..size_of::<T>()]);
    // `Debug` takes any bytes.
    let _ = format!("{value:?}");
}

/// Copies every named field into a zeroed value: the others stay 0, and the fields read the same.
macro_rules! check_fields {
    ($value:expr, $($type:ident: $($field:ident)*);*) => {$({
        let from = $type::read_from_prefix(&$value).unwrap().0;
        $(
            let mut to = $type::zeroed();
            to.set($type::$field, from.get($type::$field));
            assert_eq!(to.get($type::$field), from.get($type::$field));
            to.set($type::$field, 0);
            assert_eq!(to, $type::zeroed());
        )*
    })*};
}

proptest! {
    #[test]
    fn test_layouts_when_of_any_bytes_round_trip(bytes in proptest::collection::vec(any::<u8>(), 528)) {
        check_layout::<Eqc>(&bytes, &[]);
        check_layout::<Cqc>(&bytes, &[]);
        check_layout::<Qpc>(&bytes, &[]);
        check_layout::<Ads>(&bytes, &[]);
        check_layout::<Mkc>(&bytes, &[]);
        check_layout::<XrcSrqc>(&bytes, &[]);
        check_layout::<Rmpc>(&bytes, &[]);
        check_layout::<caps::HcaCap>(&bytes, &[]);
        check_layout::<caps::AtomicCap>(&bytes, &[]);
        check_layout::<caps::OdpCap>(&bytes, &[]);
        check_layout::<Input>(&bytes, &["ARGUMENT"]);
        check_layout::<Output>(&bytes, &[]);
        check_layout::<CreateEq>(&bytes, &[]);
        check_layout::<CreateMkey>(&bytes, &[]);
        check_layout::<ModifyQp>(&bytes, &[]);
        check_layout::<ModifyCq>(&bytes, &[]);
        check_layout::<ModifyRmp>(&bytes, &[]);
        check_layout::<QueryIssiOut>(&bytes, &[]);
        check_layout::<QueryAdapterOut>(&bytes, &[]);
        check_layout::<QuerySpecialContextsOut>(&bytes, &[]);
        check_layout::<MadIfc>(&bytes, &[]);
        check_layout::<QueryHcaVportContextOut>(&bytes, &[]);
        check_layout::<AccessRegister>(&bytes, &[]);
        check_layout::<Multicast>(&bytes, &[]);
        check_layout::<PageFaultResume>(&bytes, &[]);
    }

    #[test]
    fn test_fields_when_copied_change_nothing_else(bytes in proptest::collection::vec(any::<u8>(), 256)) {
        check_fields!(bytes, Qpc: STATE SERVICE PD MTU LOG_RQ_SIZE LOG_SQ_SIZE REMOTE_QPN NEXT_SEND_PSN CQN_RECEIVE SRQN;
            Mkc: FREE KEY PD LOG_PAGE_SIZE; Cqc: LOG_SIZE EQN; Eqc: LOG_SIZE INTR; Ads: RLID GRH FLOW_LABEL;
            Rmpc: LOG_SIZE LOG_STRIDE LWM; XrcSrqc: XRCD CQN LWM);
    }

    #[test]
    fn test_structures_when_of_any_bytes_round_trip(bytes in proptest::array::uniform32(any::<[u8; 18]>())) {
        let bytes = bytes.as_flattened();
        macro_rules! check { ($($type:ty),*) => {$(
            let (value, _) = <$type>::read_from_prefix(bytes).unwrap();
            prop_assert_eq!(value.as_bytes(), &bytes[..size_of::<$type>()]);
        )*} }
        check!(Entry, Mailbox, Eqe, Cqe, Control, AddressVector, UmrControl, Klm, NextSegment,
            wqe::RemoteAddress, wqe::Atomic, wqe::Data, wqe::Xrc);
    }
}

#[test]
fn test_contexts_when_fields_are_set_have_the_bytes_of_the_reference() {
    let eqc = Eqc::zeroed()
        .with(Eqc::LOG_SIZE, 8)
        .with(Eqc::UAR_PAGE, 0x21)
        .with(Eqc::INTR, 3);
    assert_eq!(eqc.0[0x0c..0x10], [8, 0, 0, 0x21]);
    assert_eq!(eqc.0[0x14..0x18], [0, 0, 0, 3]);
    let cqc = Cqc::zeroed()
        .with(Cqc::STATUS, 9)
        .with(Cqc::LOG_SIZE, 5)
        .with_wide(Cqc::DBR_ADDR, 0x1122_3344_5566_7788);
    assert_eq!(
        (cqc.0[0], cqc.0[0x0c], &cqc.0[0x38..]),
        (0x90, 5, &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88][..])
    );
    let qpc = Qpc::zeroed()
        .with(Qpc::STATE, u32::from(State::RTS.0))
        .with(Qpc::SERVICE, 2)
        .with(Qpc::LOG_RQ_SIZE, 4)
        .with(Qpc::LOG_RQ_STRIDE, 2)
        .with(Qpc::LOG_SQ_SIZE, 6)
        .with(Qpc::RRE, 1)
        .with(Qpc::RQ_TYPE, 1)
        .with(Qpc::SRQN, 0xabcdef);
    assert_eq!(qpc.0[..4], [0x30, 2, 0, 0]);
    assert_eq!(qpc.0[8..12], [0, 4 << 3 | 2, 6 << 3, 0]);
    assert_eq!(qpc.0[0x90..0x94], [0, 0, 0x80, 0]);
    assert_eq!(qpc.0[0xac..0xb0], [1, 0xab, 0xcd, 0xef]);
    assert_eq!(PRIMARY_PATH + size_of::<Ads>(), SECONDARY_PATH);
    let mkc = Mkc::zeroed()
        .with(Mkc::FREE, 1)
        .with(Mkc::MODE_LOW, 3)
        .with(Mkc::KEY, 0x5a)
        .with(Mkc::LENGTH64, 1);
    assert_eq!((mkc.0[0], mkc.0[2], mkc.0[7], mkc.0[0x0c]), (0x40, 3, 0x5a, 0x80));
    assert_eq!(mkc.mode(), AccessMode::KSM);
}

#[test]
fn test_capabilities_when_set_have_the_bits_of_the_reference() {
    use caps::HcaCap as C;
    let cap = C::zeroed()
        .with(C::PAGE_REQUEST_DISABLE, 1)
        .with(C::LOG_MAX_QP_SZ, 14)
        .with(C::XRC, 1)
        .with(C::RC, 1)
        .with(C::NUM_PORTS, 1)
        .with(C::MAX_NUM_EQS, 32);
    assert_eq!((cap.0[0], cap.0[0x11], cap.0[0x47]), (2, 14, 9));
    assert_eq!((cap.0[0x37], cap.0[0x8f]), (1, 32));
    assert_eq!(caps::SET_ATOMIC, 6);
}

#[test]
fn test_queue_entries_when_built_have_the_bytes_of_the_reference() {
    let eqe = Eqe::new(Event::COMPLETION, 0).with(DATA_NUMBER, 0x1234);
    assert_eq!(eqe.as_bytes()[0x38..0x3c], [0, 0, 0x12, 0x34]);
    assert_eq!(Eqe::new(Event::COMMAND, 0).as_bytes()[1], 0x0a);
    let mut cqe = Cqe::new(CqeOpcode::RESPONDER_SEND, 0x42, 7);
    cqe.flags_rqpn = (FLAGS_GRH | 9).into();
    assert_eq!(cqe.as_bytes()[24..28], [0x10, 0, 0, 9]);
    assert_eq!(cqe.as_bytes()[56..64], [0, 0, 0, 0x42, 0, 7, 0, 0x20]);
    assert_eq!(cqe.syndrome(), None);
    let error = Cqe::error(CqeOpcode::REQUESTER_ERROR, 1, 2, Syndrome::REMOTE_ACCESS, 0x88);
    assert_eq!(
        (error.as_bytes()[54], error.as_bytes()[55], error.as_bytes()[63]),
        (0x88, 0x13, 0xd0)
    );
    assert_eq!(error.syndrome(), Some(Syndrome::REMOTE_ACCESS));
    let control = Control::new(wqe::Opcode::RDMA_WRITE, 0x1234, 0x42, 3);
    assert_eq!(control.as_bytes()[..8], [0, 0x12, 0x34, 8, 0, 0, 0x42, 3]);
    assert_eq!((control.opcode(), control.ds()), (wqe::Opcode::RDMA_WRITE, 3));
}

#[test]
fn test_numbers_when_unknown_survive() {
    assert_eq!(Opcode(0x7777).name(), None);
    assert_eq!(format!("{:?}", Opcode(0x7777)), "Opcode(0x7777)");
    assert_eq!(format!("{:?}", Opcode::CREATE_QP), "CREATE_QP");
    assert_eq!(Status::BAD_OP.0, 2);
    assert_eq!(Delivery::TOKEN.0, 2);
    assert_eq!(uar::eq_doorbell(3, 0x100_0005), 0x0300_0005);
}
