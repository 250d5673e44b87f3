//! Packets that nobody would send.

use super::*;
use protos::ib::{Aeth, AtomicEth, Deth, Grh, Opcode, Reth, Syndrome};

fn garbage(dice: &mut Dice, pool: &Pool, near: Psn) -> Packet {
    let len = [0, 1, 7, 1024, 2048, 4096, 65536][dice.below(7) as usize];
    let mtu = Mtu::from_code(1 + dice.below(5) as u8).unwrap();
    let count = match dice.below(4) {
        0 => mtu.packets(len as u32),
        1 => dice.below(70) as u32,
        _ => 1,
    };
    let rkey = [7, 8][dice.below(2) as usize];
    let extension = match dice.below(6) {
        0 => Extension::None,
        1 => Extension::Datagram(Deth::new(Qkey([0x11, 0x12][dice.below(2) as usize]), QP)),
        2 => Extension::Rdma(Reth {
            va: dice.below(5 << 20).into(),
            rkey: u32::into(rkey),
            len: ([len as u32, dice.roll() as u32][dice.below(2) as usize]).into(),
        }),
        3 => Extension::Atomic(AtomicEth {
            va: dice.below(5 << 20).into(),
            rkey: u32::into(rkey),
            ..AtomicEth::default()
        }),
        4 => Extension::Ack(Aeth::new(
            Syndrome::from_code(dice.roll() as u8),
            dice.roll() as u32,
        )),
        _ => Extension::AtomicAck(Aeth::new(Syndrome::ACK, 0), dice.roll()),
    };
    let psn = match dice.below(8) {
        0 => Psn::new(dice.roll() as u32),
        n => near.add(n as u32).add(Psn::MASK - 2),
    };
    Packet {
        port: dice.roll() as u8,
        sl: dice.roll() as u8,
        mtu,
        slid: Lid(5),
        dlid: Lid(6),
        pkey: [Pkey::DEFAULT, Pkey(3)][usize::from(dice.below(20) == 0)],
        opcode: Opcode(dice.roll() as u8),
        ack_request: dice.permille(500),
        solicited: dice.permille(500),
        dest: [QP, qpn(0x41), qpn(0x42), qpn(0x43), Qpn::MULTICAST, qpn(9)][dice.below(6) as usize],
        psn,
        count,
        xrc_srqn: dice.permille(500).then_some(1),
        immediate: dice.permille(500).then_some(dice.roll() as u32),
        extension,
        global: dice.permille(300).then(Grh::default),
        payload: (len > 0).then(|| pool.take(len)),
    }
}

#[test]
fn test_garbage_when_it_comes_to_live_queue_pairs_never_panics() {
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut pair = Pair::new(Options {
            seed,
            park: if seed % 2 == 0 { 0 } else { 100 },
            ..Options::default()
        });
        let services = [
            ServiceType::Rc,
            ServiceType::Uc,
            ServiceType::Ud,
            ServiceType::Xrc,
        ];
        let pool = Pool::default();
        for step in 0..3000 {
            for (i, service) in services.into_iter().enumerate() {
                let number = qpn(0x40 + i as u32);
                let dead = pair
                    .b
                    .transport
                    .status(number)
                    .is_none_or(|s| s.state == State::Error);
                if dead {
                    for side in [&mut pair.a, &mut pair.b] {
                        let _ = side.transport.destroy(number);
                        side.node.parked.retain(|(qpn, _)| *qpn != number);
                        side.node.requests.remove(&number);
                    }
                    let options = Options {
                        service,
                        psn: 100,
                        ..Options::default()
                    };
                    pair.connect(number, number, options);
                }
                let address = dice.below(1 << 20);
                pair.b
                    .receive(number, (step << 8 | i) as u64, address, dice.below(70_000));
                let action =
                    [Action::Send, Action::Write(at(0)), Action::Read(at(0))][dice.below(3) as usize];
                if dice.permille(200) {
                    pair.b.post_with(number, action, 0, dice.below(3000) as u32, |r| {
                        r.datagram = None;
                    });
                }
            }
            let number = qpn(0x40 + dice.below(4) as u32);
            let near = pair.b.transport.status(number).map_or(Psn::new(100), |s| {
                [s.next_receive_psn, s.next_send_psn][dice.below(2) as usize]
            });
            let packet = garbage(&mut dice, &pool, near);
            pair.a.link.inner().out.borrow_mut().push_back(packet);
            for (qpn, which) in std::mem::take(&mut pair.b.node.parked) {
                let result = [Ok(()), Err(Status::RemoteAccess)][usize::from(dice.permille(100))];
                pair.b.transport.resume(qpn, which, result);
            }
            pair.b
                .transport
                .poll(pair.now, &mut pair.b.node, &mut pair.b.link);
            pair.b.link.inner().out.borrow_mut().clear();
            pair.now = pair.now + Duration::from_micros(dice.below(5000));
        }
        assert!(pair.b.transport.stats().dropped > 100);
    }
}

#[test]
fn test_answers_when_a_long_read_is_asked_for_again_and_again_stay_few() {
    let options = Options {
        mtu: Mtu::B256,
        psn: 100,
        ..Options::default()
    };
    let mut pair = Pair::connected(options);
    let len = 1 << 20;
    let pool = Pool::default();
    let packets = options.mtu.packets(len);
    for again in 0..packets {
        let skipped = again * options.mtu.bytes();
        let packet = Packet {
            opcode: Opcode(0x0c),
            psn: Psn::new(100 + again),
            dest: QP,
            count: 1,
            slid: Lid(5),
            dlid: Lid(6),
            pkey: Pkey::DEFAULT,
            extension: Extension::Rdma(Reth {
                va: u64::from(skipped).into(),
                rkey: 7.into(),
                len: (len - skipped).into(),
            }),
            immediate: None,
            global: None,
            payload: None,
            ..garbage(&mut Dice::new(1), &pool, Psn::new(100))
        };
        pair.a.link.inner().out.borrow_mut().push_back(packet);
    }
    let mut most = 0;
    for _ in 0..packets {
        pair.b
            .transport
            .poll(pair.now, &mut pair.b.node, &mut pair.b.link);
        let (qp, _) = pair.b.transport.find(QP).unwrap();
        most = most.max(qp.receive.responses.len());
        pair.b.link.inner().out.borrow_mut().clear();
    }
    assert!((100..400).contains(&most), "{most} answers waited");
    assert_eq!(pair.b.transport.status(QP).unwrap().state, State::Rts);
    assert_eq!(pair.b.transport.poll_at(), None);
}
