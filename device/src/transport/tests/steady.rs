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
