//! Absent pages.

use super::*;

#[test]
fn test_everything_when_half_of_the_pages_are_absent_is_done_once() {
    for seed in 0..20 {
        let mut pair = Pair::connected(Options {
            seed,
            park: 500,
            ..Options::default()
        });
        let data = pattern(seed, 100_000);
        pair.a.node.memory[..100_000].copy_from_slice(&data);
        pair.b.receive(QP, 1, 1 << 20, 1 << 20);
        pair.a.post(QP, Action::Send, 0, 100_000);
        pair.a.post(QP, Action::Write(at(3 << 20)), 0, 100_000);
        pair.a
            .post(QP, Action::FetchAdd { at: at(8), add: 1 }, 1 << 20, 8);
        pair.a.post(QP, Action::Read(at(3 << 20)), 2 << 20, 100_000);
        pair.run_all();
        assert_eq!(pair.a.statuses(), [Status::Success; 4], "seed {seed}");
        assert_eq!(pair.b.node.atomics, 1, "seed {seed}");
        assert_eq!(pair.b.node.received.len(), 1);
        assert_eq!(&pair.b.node.memory[1 << 20..][..100_000], data);
        assert_eq!(&pair.a.node.memory[2 << 20..][..100_000], data);
        assert_eq!(pair.a.transport.stats().timeouts, 0, "seed {seed}");
    }
}

#[test]
fn test_receive_side_when_parked_for_long_does_not_use_up_retries() {
    let mut pair = Pair::connected(Options {
        retry_count: 1,
        rnr_retry: 0,
        ..Options::default()
    });
    pair.b.node.park = ParkPlan {
        permille: 1000,
        only: Some(Side::Receive),
    };
    pair.a.post(QP, Action::Write(at(0)), 0, 100);
    // Not through `settle`, which resumes at once.
    for _ in 0..200 {
        for side in [&mut pair.a, &mut pair.b] {
            while side
                .transport
                .poll(pair.now, &mut side.node, &mut side.link)
                .again
            {}
        }
        pair.now = pair.now + Duration::from_millis(20);
    }
    assert!(pair.a.transport.stats().timeouts > 50);
    assert!(pair.a.node.sent.is_empty(), "{:?}", pair.a.node.sent);
    pair.b.node.park.permille = 0;
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
}

#[test]
fn test_other_queue_pairs_when_one_is_parked_go_on() {
    let mut pair = Pair::connected(Options::default());
    pair.connect(qpn(0x41), qpn(0x41), Options::default());
    pair.b.node.park = ParkPlan {
        permille: 1000,
        only: Some(Side::Receive),
    };
    pair.a.post(QP, Action::Write(at(0)), 0, 100);
    let round = |pair: &mut Pair| {
        for side in [&mut pair.a, &mut pair.b] {
            side.transport.poll(pair.now, &mut side.node, &mut side.link);
        }
    };
    round(&mut pair);
    assert_eq!(pair.b.node.parked, [(QP, Side::Receive)]);
    pair.b.node.park.permille = 0;
    pair.a.post(qpn(0x41), Action::Write(at(0)), 0, 100);
    for _ in 0..4 {
        round(&mut pair);
    }
    assert_eq!(pair.a.node.sent, [(qpn(0x41), 0, Status::Success)]);
}

#[test]
fn test_resume_when_the_page_cannot_be_had_fails_what_asked() {
    let cases: [(Side, bool, Status, Action); 4] = [
        (Side::Send, true, Status::LocalProtection, Action::Write(at(0))),
        (Side::Receive, false, Status::RemoteAccess, Action::Write(at(0))),
        (Side::Read, false, Status::RemoteAccess, Action::Read(at(0))),
        (Side::Response, true, Status::LocalProtection, Action::Read(at(0))),
    ];
    for (side, here, status, action) in cases {
        let mut pair = Pair::connected(Options::default());
        let part = if here { &mut pair.a } else { &mut pair.b };
        part.node.park = ParkPlan {
            permille: 1000,
            only: Some(side),
        };
        pair.a.post(QP, action, 0, 100);
        for step in 0.. {
            assert!(step < 100, "{side:?} never parks");
            for part in [&mut pair.a, &mut pair.b] {
                part.transport.poll(pair.now, &mut part.node, &mut part.link);
                for (qpn, which) in std::mem::take(&mut part.node.parked) {
                    assert_eq!(which, side);
                    part.transport.resume(qpn, which, Err(status));
                }
            }
            if !pair.a.node.sent.is_empty() {
                break;
            }
        }
        assert_eq!(pair.a.statuses(), [status], "{side:?}");
        assert_eq!(
            pair.a.transport.status(QP).unwrap().state,
            State::Error,
            "{side:?}"
        );
    }
}

#[test]
fn test_reset_when_parked_forgets_and_a_late_resume_is_harmless() {
    let mut pair = Pair::connected(Options::default());
    pair.b.node.park.permille = 1000;
    pair.a.post(QP, Action::Write(at(0)), 0, 100);
    for side in [&mut pair.a, &mut pair.b] {
        side.transport.poll(pair.now, &mut side.node, &mut side.link);
    }
    let none = Attributes::default();
    pair.b
        .transport
        .modify(QP, State::Reset, &none, &mut pair.b.node)
        .unwrap();
    for side in [Side::Send, Side::Receive, Side::Read, Side::Response] {
        pair.b.transport.resume(QP, side, Ok(()));
        pair.b.transport.resume(QP, side, Err(Status::RemoteAccess));
    }
    pair.b.node.parked.clear();
    pair.b
        .transport
        .poll(pair.now, &mut pair.b.node, &mut pair.b.link);
    pair.b.transport.destroy(QP).unwrap();
    pair.b.transport.resume(QP, Side::Send, Ok(()));
    assert!(pair.b.node.sent.is_empty() && pair.b.node.received.is_empty());
}
