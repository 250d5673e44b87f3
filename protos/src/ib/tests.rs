use super::*;
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn test_psn_when_it_wraps_keeps_its_distance() {
    let end = Psn::new(0xff_ffff);
    assert_eq!(end.add(1), Psn::new(0));
    assert_eq!(Psn::new(0).distance(end), 1);
    assert_eq!(end.distance(Psn::new(0)), -1);
    assert_eq!(Psn::new(0).before(), end);
    assert_eq!(Psn::new(0x80_0000).distance(Psn::new(0)), -0x80_0000);
    assert_eq!(Psn::new(0x7f_ffff).distance(Psn::new(0)), 0x7f_ffff);
}

#[test]
fn test_pkey_when_both_are_limited_does_not_match() {
    assert!(Pkey(0x8001).matches(Pkey(0x0001)));
    assert!(Pkey(0xffff).matches(Pkey(0xffff)));
    assert!(!Pkey(0x0001).matches(Pkey(0x0001)));
    assert!(!Pkey(0x8001).matches(Pkey(0x8002)));
    assert!(!Pkey(0x8000).matches(Pkey(0x8000)), "0 is no partition");
}

#[test]
fn test_opcode_when_understood_is_written_the_same() {
    for code in 0..=255 {
        let opcode = Opcode(code);
        if let (Some(service), Some(operation)) = (opcode.service(), opcode.operation()) {
            assert_eq!(Opcode::new(service, operation), opcode, "{opcode:?}");
        }
    }
    let named = |service, operation| Opcode::new(service, operation).0;
    assert_eq!(
        named(ServiceType::Ud, Operation::Send(Place::Only, Extended::None)),
        0x64
    );
    assert_eq!(named(ServiceType::Rc, Operation::Acknowledge), 0x11);
    assert_eq!(named(ServiceType::Xrc, Operation::FetchAdd), 0xb4);
    assert_eq!(Opcode(0x78).operation(), None);
    assert_eq!(Opcode(0x2c).operation(), None, "UC does not read");
}

#[test]
fn test_headers_when_fields_are_set_have_the_bytes_of_the_specification() {
    let lrh = Lrh::new(Lid(0x1234), Lid(0x5678), 3, LinkNextHeader::LOCAL, 0x123);
    assert_eq!(lrh.as_bytes(), [0x00, 0x32, 0x56, 0x78, 0x01, 0x23, 0x12, 0x34]);
    assert_eq!(
        (lrh.slid(), lrh.dlid(), lrh.sl(), lrh.words()),
        (Lid(0x1234), Lid(0x5678), 3, 0x123)
    );
    assert_eq!(Lrh::new(Lid(1), Lid(2), 15, LinkNextHeader::LOCAL, 1).vl(), 15);
    let bth = Bth::new(
        Opcode(0x0a),
        Pkey(0xffff),
        Qpn::new(0x12_3456),
        Psn::new(0xab_cdef),
    )
    .with_ack_request(true)
    .with_solicited(true)
    .with_pad(2);
    assert_eq!(
        bth.as_bytes(),
        [
            0x0a, 0xe0, 0xff, 0xff, 0, 0x12, 0x34, 0x56, 0x80, 0xab, 0xcd, 0xef
        ]
    );
    assert!(bth.ack_request() && bth.solicited());
    assert_eq!((bth.pad(), bth.version()), (2, 0));
    let grh = Grh::new(Gid::new(1, 2), Gid::new(3, 4), 0xab, 0x12345, 64);
    assert_eq!(grh.as_bytes()[..8], [0x6a, 0xb1, 0x23, 0x45, 0, 0, 0x1b, 64]);
    assert_eq!(
        (grh.version(), grh.traffic_class(), grh.flow_label()),
        (6, 0xab, 0x12345)
    );
    assert_eq!(
        Deth::new(Qkey(0x8001_0000), Qpn::GSI).as_bytes(),
        [0x80, 1, 0, 0, 0, 0, 0, 1]
    );
    assert_eq!(Xrceth::new(0x1_2345).as_bytes(), [0, 1, 0x23, 0x45]);
}

#[test]
fn test_syndrome_when_encoded_comes_back() {
    for code in 0..=255 {
        assert_eq!(Syndrome::from_code(code).code(), code);
    }
    let code = |syndrome: Syndrome| Aeth::new(syndrome, 7).as_bytes()[0];
    assert_eq!(code(Syndrome::ACK), 0x1f);
    assert_eq!(code(Syndrome::RnrNak(12)), 0x2c);
    assert_eq!(code(Syndrome::Nak(NakCode::REMOTE_ACCESS)), 0x62);
    assert_eq!(Aeth::new(Syndrome::ACK, 7).msn(), 7);
}

#[test]
fn test_rnr_delay_when_zero_is_the_longest() {
    assert_eq!(rnr_delay(0).as_micros(), 655_360);
    assert_eq!(rnr_delay(1).as_micros(), 10);
    assert_eq!(rnr_delay(12).as_micros(), 640);
    assert_eq!(rnr_delay(31).as_micros(), 491_520);
}

#[test]
fn test_any_bytes_when_read_as_headers_are_written_the_same() {
    let bytes: Vec<u8> = (0..64u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    macro_rules! same {
        ($($ty:ty),*) => { $({
            let (value, _) = <$ty>::read_from_prefix(&bytes).unwrap();
            assert_eq!(value.as_bytes(), &bytes[..size_of::<$ty>()]);
        })* };
    }
    same!(
        Lrh,
        Grh,
        Bth,
        Deth,
        Reth,
        AtomicEth,
        Aeth,
        AtomicAckEth,
        ImmDt,
        Ieth,
        Xrceth
    );
}

#[test]
fn test_icrc_when_a_variant_field_changes_stays() {
    let mut packet = vec![0; 8 + 12 + 4];
    packet[..8].copy_from_slice(Lrh::new(Lid(1), Lid(2), 0, LinkNextHeader::LOCAL, 7).as_bytes());
    let bth = Bth::new(Opcode(4), Pkey::DEFAULT, Qpn::new(3), Psn::new(4));
    packet[8..20].copy_from_slice(bth.as_bytes());
    let crc = icrc(&packet);
    packet[0] |= 0xf0;
    packet[12] = 0xc0;
    assert_eq!(icrc(&packet), crc);
    packet[23] = 1;
    assert_ne!(icrc(&packet), crc);
    assert_eq!(icrc(&packet[..19]), None);
    assert_eq!(icrc(&[]), None);
}

#[test]
fn test_icrc_when_of_the_sample_packet_is_that_of_the_specification() {
    // Section 7.8.4, table "Example of CRC calculation": a local packet and its ICRC.
    let packet = [
        0x70, 0x12, 0x37, 0x5c, 0x00, 0x0e, 0x17, 0xd2, 0x0a, 0x20, 0x24, 0x87, 0x00, 0x87, 0xb1, 0xb3, 0x00,
        0x0d, 0xec, 0x2a, 0x01, 0x71, 0x0a, 0x1c, 0x01, 0x5d, 0x40, 0x02, 0x38, 0xf2, 0x7a, 0x05, 0x00, 0x00,
        0x00, 0x0e, 0xbb, 0x88, 0x4d, 0x85, 0xfd, 0x5c, 0xfb, 0xa4, 0x72, 0x8b, 0xc0, 0x69, 0x0e, 0xd4, 0x00,
        0x00,
    ];
    assert_eq!(icrc(&packet), Some([0x96, 0x25, 0xb7, 0x5a]));
}
