//! What must not grow.

use super::*;

#[test]
fn test_pool_when_messages_flow_hands_out_the_same_buffers() {
    let mut pair = Pair::connected(Options::default());
    let round = |pair: &mut Pair| {
        for _ in 0..20 {
            pair.a.post(QP, Action::Write(at(0)), 0, 100_000);
            pair.a.post(QP, Action::Read(at(0)), 0, 100_000);
        }
        pair.run_all();
    };
    round(&mut pair);
    let made = (pair.a.transport.pool().made(), pair.b.transport.pool().made());
    for _ in 0..20 {
        round(&mut pair);
    }
    assert_eq!(
        (pair.a.transport.pool().made(), pair.b.transport.pool().made()),
        made
    );
    assert!(
        pair.a
            .node
            .sent
            .iter()
            .all(|(_, _, status)| *status == Status::Success)
    );
}

#[test]
fn test_timers_when_acknowledged_leave_at_most_one_entry_each() {
    let mut pair = Pair::connected(Options::default());
    for _ in 0..5000 {
        pair.a.post(QP, Action::Write(at(0)), 0, 10);
        pair.settle();
        pair.now = pair.now + Duration::from_micros(1);
    }
    assert!(pair.a.transport.timers() <= 2, "{}", pair.a.transport.timers());
}

#[test]
fn test_timers_when_queue_pairs_with_long_timeouts_come_and_go_stay_few() {
    let mut pair = Pair::new(Options::default());
    for round in 0..20_000 {
        pair.connect(QP, QP, Options::default());
        // Nobody answers: its deadline stands when it is destroyed.
        pair.a.post(QP, Action::Write(at(0)), 0, 10);
        pair.a
            .transport
            .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
        pair.a.link.inner().out.borrow_mut().clear();
        for side in [&mut pair.a, &mut pair.b] {
            side.transport.destroy(QP).unwrap();
            side.node.requests.remove(&QP);
        }
        let timers = pair.a.transport.timers();
        assert!(timers <= 1100, "{timers} after {round} queue pairs");
    }
    // Those that live are still woken.
    pair.connect(QP, QP, Options::default());
    pair.a.post(QP, Action::Write(at(0)), 0, 10);
    for _ in 0..2000 {
        pair.connect(qpn(0x41), qpn(0x41), Options::default());
        pair.a.post(qpn(0x41), Action::Write(at(0)), 0, 10);
        pair.a
            .transport
            .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
        pair.a.link.inner().out.borrow_mut().clear();
        for side in [&mut pair.a, &mut pair.b] {
            side.transport.destroy(qpn(0x41)).unwrap();
            side.node.requests.remove(&qpn(0x41));
        }
    }
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
}
