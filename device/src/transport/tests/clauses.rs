//! One clause of the specification each.

use super::*;

#[test]
fn test_send_when_a_receive_is_posted_delivers_and_completes_both() {
    for service in [ServiceType::Rc, ServiceType::Uc] {
        for len in [0, 1, 1024, 1025, 70_000, 200_000] {
            for cut in [false, true] {
                let mut pair = Pair::connected(Options {
                    service,
                    cut,
                    ..Options::default()
                });
                let data = pattern(u64::from(len), len as usize);
                pair.a.node.memory[..data.len()].copy_from_slice(&data);
                pair.b.receive(QP, 9, 1 << 20, 1 << 20);
                pair.a
                    .post_with(QP, Action::SendImmediate(0xabcd), 0, len, |r| r.solicited = true);
                pair.run_all();
                assert_eq!(pair.a.statuses(), [Status::Success], "{service:?} {len} {cut}");
                let [(_, 9, received)] = pair.b.node.received[..] else {
                    panic!("{service:?} {len}: {:?}", pair.b.node.received);
                };
                assert_eq!(received.len, len);
                assert_eq!(received.immediate, Some(0xabcd));
                assert!(received.solicited && !received.write);
                assert_eq!(received.source.slid, Lid(5));
                assert_eq!(&pair.b.node.memory[1 << 20..][..data.len()], data);
            }
        }
    }
}

#[test]
fn test_write_when_allowed_stores_and_takes_no_receive() {
    let mut pair = Pair::connected(Options::default());
    let data = pattern(3, 150_000);
    pair.a.node.memory[..data.len()].copy_from_slice(&data);
    pair.a.post(QP, Action::Write(at(4096)), 0, 150_000);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
    assert_eq!(&pair.b.node.memory[4096..][..150_000], data);
    assert!(pair.b.node.received.is_empty());
}

#[test]
fn test_write_with_immediate_when_done_takes_a_receive_without_touching_it() {
    for len in [0, 100, 100_000] {
        let mut pair = Pair::connected(Options::default());
        pair.b.receive(QP, 1, 2 << 20, 0);
        pair.a.post(QP, Action::WriteImmediate(at(0), 77), 0, len);
        pair.run_all();
        assert_eq!(pair.a.statuses(), [Status::Success]);
        let received = pair.b.node.received[0].2;
        assert_eq!(
            (received.write, received.immediate, received.len),
            (true, Some(77), len)
        );
    }
}

#[test]
fn test_read_when_allowed_brings_the_data() {
    for len in [0, 5, 1024, 3000, 300_000] {
        for cut in [false, true] {
            let mut pair = Pair::connected(Options {
                cut,
                ..Options::default()
            });
            let data = pattern(4, len as usize);
            pair.b.node.memory[64..][..data.len()].copy_from_slice(&data);
            pair.a.post(QP, Action::Read(at(64)), 1 << 20, len);
            pair.run_all();
            assert_eq!(pair.a.statuses(), [Status::Success], "{len} {cut}");
            assert_eq!(&pair.a.node.memory[1 << 20..][..data.len()], data);
        }
    }
}

#[test]
fn test_reads_when_more_than_allowed_are_posted_wait_for_each_other() {
    let mut pair = Pair::connected(Options::default());
    for i in 0..40 {
        pair.a.post(QP, Action::Read(at(i * 4096)), 1 << 20, 4096);
    }
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 40]);
    assert!(pair.b.node.events.is_empty(), "{:?}", pair.b.node.events);
}

#[test]
fn test_atomics_when_executed_return_what_was_there() {
    let mut pair = Pair::connected(Options::default());
    pair.b.node.memory[8..16].copy_from_slice(&5u64.to_le_bytes());
    pair.a.post(QP, Action::FetchAdd { at: at(8), add: 10 }, 0, 8);
    let swap = |compare, swap| Action::CompareSwap {
        at: at(8),
        compare,
        swap,
    };
    pair.a.post(QP, swap(15, 100), 8, 8);
    pair.a.post(QP, swap(15, 200), 16, 8);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 3]);
    let word = |memory: &[u8], at: usize| u64::from_le_bytes(memory[at..at + 8].try_into().unwrap());
    assert_eq!([0, 8, 16].map(|i| word(&pair.a.node.memory, i)), [5, 15, 100]);
    assert_eq!(word(&pair.b.node.memory, 8), 100);
}

#[test]
fn test_send_with_invalidate_when_received_names_the_key() {
    let mut pair = Pair::connected(Options::default());
    pair.b.receive(QP, 1, 0, 100);
    pair.a.post(QP, Action::SendInvalidate(0x55), 0, 4);
    pair.run_all();
    assert_eq!(pair.b.node.received[0].2.invalidated, Some(0x55));
    assert_eq!(pair.b.node.invalidated, [0x55]);
}

#[test]
fn test_remote_access_when_refused_ends_both_queue_pairs() {
    let bad = Remote { rkey: 8, va: 0 };
    let actions = [
        (Action::Write(bad), 64),
        (Action::Read(bad), 64),
        (Action::FetchAdd { at: bad, add: 1 }, 8),
        (Action::Write(at(4 << 20)), 1),
    ];
    for (action, len) in actions {
        let mut pair = Pair::connected(Options::default());
        pair.a.post(QP, action, 0, len);
        pair.a.post(QP, Action::Send, 0, 4);
        pair.b.receive(QP, 1, 0, 100);
        pair.run_all();
        assert_eq!(
            pair.a.statuses(),
            [Status::RemoteAccess, Status::Flushed],
            "{action:?}"
        );
        assert_eq!(pair.b.node.received[0].2.status, Status::Flushed);
        assert_eq!(pair.b.node.events, [(QP, Event::AccessViolation)]);
        for side in [&pair.a, &pair.b] {
            assert_eq!(side.transport.status(QP).unwrap().state, State::Error);
        }
    }
}

#[test]
fn test_refusal_when_reads_are_answered_before_comes_after_their_data() {
    let mut pair = Pair::connected(Options::default());
    pair.b.node.memory[..200_000].copy_from_slice(&pattern(1, 200_000));
    pair.a.post(QP, Action::Read(at(0)), 1 << 20, 200_000);
    pair.a.post(QP, Action::Write(Remote { rkey: 8, va: 0 }), 0, 1);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success, Status::RemoteAccess]);
}

#[test]
fn test_send_when_longer_than_the_receive_is_an_invalid_request() {
    let mut pair = Pair::connected(Options::default());
    pair.b.receive(QP, 1, 0, 10);
    pair.a.post(QP, Action::Send, 0, 11);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::RemoteInvalidRequest]);
    assert_eq!(pair.b.node.received[0].2.status, Status::LocalLength);
}

#[test]
fn test_rnr_when_the_receive_comes_late_is_waited_for() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::Send, 0, 3000);
    pair.a.post(QP, Action::Send, 0, 3000);
    // 9.7.5.2.8: timer code 1 is 10 us; one millisecond is many of these.
    pair.run(Duration::from_millis(1));
    assert!(pair.a.node.sent.is_empty());
    assert!(pair.a.transport.stats().rnr_naks_received > 3);
    pair.b.receive(QP, 1, 0, 4096);
    pair.b.receive(QP, 2, 0, 4096);
    pair.run(Duration::from_secs(1));
    assert_eq!(pair.a.statuses(), [Status::Success; 2]);
}

#[test]
fn test_rnr_when_retries_are_used_up_is_an_error() {
    let mut pair = Pair::connected(Options {
        rnr_retry: 3,
        ..Options::default()
    });
    pair.a.post(QP, Action::Send, 0, 4);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::RnrRetryExceeded]);
    assert_eq!(pair.b.transport.stats().rnr_naks_sent, 4);
}

#[test]
fn test_timeout_when_nobody_answers_is_retried_and_then_an_error() {
    let mut pair = Pair::connected(Options {
        retry_count: 3,
        ..Options::default()
    });
    pair.b.transport.destroy(QP).unwrap();
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a.post(QP, Action::Send, 0, 4);
    let start = pair.now;
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::RetryExceeded, Status::Flushed]);
    assert_eq!(pair.a.transport.stats().timeouts, 4);
    // 9.7.6.1.3: 4.096 us * 2^12 each.
    let elapsed = start.until(pair.now);
    assert!(elapsed >= Duration::from_micros(4 * 16_777), "{elapsed:?}");
    assert!(elapsed <= Duration::from_micros(4 * 4 * 16_777), "{elapsed:?}");
}

#[test]
fn test_sequence_error_when_a_packet_is_lost_is_repaired_without_a_timeout() {
    let mut pair = Pair::connected(Options::default());
    let data = pattern(5, 64);
    pair.a.node.memory[..64].copy_from_slice(&data);
    for i in 0..3 {
        pair.a.post(QP, Action::Write(at(4096 * (i + 1))), 0, 64);
    }
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    pair.a.link.inner().out.borrow_mut().remove(1);
    pair.settle();
    assert_eq!(pair.a.statuses(), [Status::Success; 3]);
    assert_eq!(pair.b.transport.stats().sequence_naks_sent, 1);
    assert_eq!(pair.a.transport.stats().timeouts, 0);
    for i in 0..3 {
        assert_eq!(&pair.b.node.memory[4096 * (i + 1)..][..64], data);
    }
}

#[test]
fn test_atomic_when_its_answer_is_lost_is_executed_once() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::FetchAdd { at: at(8), add: 1 }, 0, 8);
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    pair.b
        .transport
        .poll(pair.now, &mut pair.b.node, &mut pair.b.link);
    assert_eq!(pair.b.link.inner().out.borrow_mut().drain(..).count(), 1);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
    assert_eq!(pair.a.transport.stats().timeouts, 1);
    assert_eq!(pair.b.node.atomics, 1);
    assert_eq!(pair.b.node.memory[8], 1);
    assert_eq!(pair.a.node.memory[0], 0);
}

#[test]
fn test_read_when_a_response_is_lost_goes_on_where_it_stopped() {
    let mut pair = Pair::connected(Options::default());
    let data = pattern(6, 200_000);
    pair.b.node.memory[..200_000].copy_from_slice(&data);
    pair.a.post(QP, Action::Read(at(0)), 1 << 20, 200_000);
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    while pair
        .b
        .transport
        .poll(pair.now, &mut pair.b.node, &mut pair.b.link)
        .again
    {}
    pair.b.link.inner().out.borrow_mut().remove(1);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success]);
    assert_eq!(&pair.a.node.memory[1 << 20..][..200_000], data);
    assert_eq!(pair.a.transport.stats().timeouts, 0, "the gap was seen");
}

#[test]
fn test_fence_when_a_read_is_outstanding_waits_for_it() {
    let mut pair = Pair::connected(Options::default());
    pair.b.node.memory[..4].copy_from_slice(b"new!");
    pair.a.post(QP, Action::Read(at(0)), 100, 4);
    pair.a
        .post_with(QP, Action::Write(at(4096)), 100, 4, |r| r.fence = Fence::Reads);
    pair.run_all();
    assert_eq!(&pair.b.node.memory[4096..4100], b"new!");
}

#[test]
fn test_local_request_when_between_others_completes_in_order() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a.post(QP, Action::Local, 0, 0);
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a.post(QP, Action::Local, 0, 0);
    pair.run_all();
    let order: Vec<u32> = pair.a.node.sent.iter().map(|(_, index, _)| *index).collect();
    assert_eq!(order, [0, 1, 2, 3]);
    assert_eq!(pair.a.node.executed, [1, 3]);
}

#[test]
fn test_local_request_when_what_is_before_it_is_sent_again_is_executed_once() {
    for tell in [true, false] {
        let mut pair = Pair::connected(Options::default());
        pair.a.post(QP, Action::Write(at(0)), 0, 4);
        pair.a.post(QP, Action::Local, 0, 0);
        pair.a.post(QP, Action::Write(at(0)), 0, 4);
        pair.a.post(QP, Action::Local, 0, 0);
        let polled = pair
            .a
            .transport
            .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
        assert!(polled.turns >= 4);
        {
            let mut out = pair.a.link.inner().out.borrow_mut();
            assert_eq!(out.len(), 2);
            out.pop_front();
            if !tell {
                // Without the second one there is no NAK, and the timer speaks.
                out.pop_front();
            }
        }
        pair.run_all();
        let stats = pair.a.transport.stats();
        assert!(stats.go_backs > 0);
        assert_eq!(stats.timeouts == 0, tell);
        let order: Vec<u32> = pair.a.node.sent.iter().map(|(_, index, _)| *index).collect();
        assert_eq!(order, [0, 1, 2, 3]);
        assert_eq!(pair.a.statuses(), [Status::Success; 4]);
        assert_eq!(pair.a.node.executed, [1, 3]);
    }
}

#[test]
fn test_local_error_when_earlier_requests_are_under_way_comes_after_them() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    pair.a.node.fail_gather = Some(Status::LocalProtection);
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.run_all();
    assert_eq!(
        pair.a.statuses(),
        [Status::Success, Status::LocalProtection, Status::Flushed]
    );
}

#[test]
fn test_drain_when_requests_are_outstanding_tells_after_they_end() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    let none = Attributes::default();
    let modify = |pair: &mut Pair, state| {
        pair.a
            .transport
            .modify(QP, state, &none, &mut pair.a.node)
            .unwrap();
    };
    modify(&mut pair, State::Sqd);
    pair.a.post(QP, Action::Write(at(0)), 0, 4);
    assert!(pair.a.transport.status(QP).unwrap().draining);
    pair.run_all();
    assert_eq!(pair.a.node.events, [(QP, Event::SendQueueDrained)]);
    assert_eq!(pair.a.statuses(), [Status::Success]);
    modify(&mut pair, State::Rts);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 2]);
}

#[test]
fn test_error_state_when_set_flushes_both_queues_and_what_is_posted_later() {
    let mut pair = Pair::connected(Options::default());
    pair.a.post(QP, Action::Send, 0, 4);
    pair.a.receive(QP, 1, 0, 4);
    let none = Attributes::default();
    pair.a
        .transport
        .modify(QP, State::Error, &none, &mut pair.a.node)
        .unwrap();
    assert_eq!(pair.a.statuses(), [Status::Flushed]);
    pair.a.post(QP, Action::Send, 0, 4);
    pair.a.receive(QP, 2, 0, 4);
    pair.a.transport.flush(QP, &mut pair.a.node);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Flushed; 2]);
    let received: Vec<_> = pair
        .a
        .node
        .received
        .iter()
        .map(|(_, token, r)| (*token, r.status))
        .collect();
    assert_eq!(received, [(1, Status::Flushed), (2, Status::Flushed)]);
}

#[test]
fn test_transition_when_not_in_the_table_is_refused() {
    let mut pair = Pair::connected(Options::default());
    let none = Attributes::default();
    let error = pair
        .a
        .transport
        .modify(QP, State::Rtr, &none, &mut pair.a.node)
        .unwrap_err();
    assert_eq!(
        error,
        TransportError::Transition {
            qpn: QP,
            from: State::Rts,
            to: State::Rtr
        }
    );
}

#[test]
fn test_xrc_when_sent_takes_from_the_queue_that_the_packet_names() {
    let mut pair = Pair::connected(Options {
        service: ServiceType::Xrc,
        ..Options::default()
    });
    for (number, token) in [(3, 30), (4, 40)] {
        pair.b.node.shared.entry(number).or_default().push_back(Posted {
            token,
            start: 0,
            len: 4096,
        });
    }
    for number in [4, 3] {
        pair.a
            .post_with(QP, Action::Send, 0, 2000, |r| r.xrc_srqn = number);
    }
    pair.run_all();
    let tokens: Vec<u64> = pair.b.node.received.iter().map(|(_, token, _)| *token).collect();
    assert_eq!(tokens, [40, 30]);
    assert_eq!(pair.a.statuses(), [Status::Success; 2]);
}

#[test]
fn test_xrc_when_memory_is_asked_for_names_the_queue_with_each_question() {
    let mut pair = Pair::connected(Options {
        service: ServiceType::Xrc,
        ..Options::default()
    });
    pair.b.node.shared.entry(6).or_default().push_back(Posted {
        token: 60,
        start: 0,
        len: 4096,
    });
    let fetch_add = Action::FetchAdd { at: at(64), add: 1 };
    for (action, len) in [
        (Action::Write(at(0)), 3000),
        (Action::Read(at(0)), 3000),
        (fetch_add, 8),
        (Action::SendInvalidate(0x55), 8),
    ] {
        pair.b.node.asked.clear();
        pair.a.post_with(QP, action, 0, len, |r| r.xrc_srqn = 6);
        pair.run_all();
        let asked = &pair.b.node.asked;
        assert!(
            !asked.is_empty() && asked.iter().all(|srqn| *srqn == Some(6)),
            "{action:?}: {asked:?}"
        );
    }
    assert_eq!(pair.a.statuses(), [Status::Success; 4]);
}

fn to(lid: u16, dest: Qpn, global: Option<Gid>, qkey: u32) -> Datagram {
    Datagram {
        path: Path {
            port: 1,
            slid: Lid(5),
            dlid: Lid(lid),
            sl: 2,
            global: global.map(|dgid| Global {
                sgid: Gid::new(Gid::DEFAULT_PREFIX, 5),
                dgid,
                flow_label: 0,
                traffic_class: 0,
                hop_limit: 1,
            }),
        },
        dest,
        qkey: Qkey(qkey),
    }
}

fn datagrams() -> Pair {
    Pair::connected(Options {
        service: ServiceType::Ud,
        ..Options::default()
    })
}

#[test]
fn test_datagram_when_received_leaves_forty_bytes_for_the_header() {
    for global in [None, Some(Gid::new(Gid::DEFAULT_PREFIX, 6))] {
        let mut pair = datagrams();
        pair.a.node.memory[..5].copy_from_slice(b"hello");
        pair.b.receive(QP, 1, 0, 1000);
        pair.a.post_with(QP, Action::Send, 0, 5, |r| {
            r.datagram = Some(to(6, QP, global, 0x11))
        });
        pair.run_all();
        let received = pair.b.node.received[0].2;
        assert_eq!(received.len, 45);
        assert_eq!(received.source.qpn, QP);
        assert_eq!(received.source.sl, 2);
        assert_eq!(received.source.global, global.is_some());
        assert_eq!(&pair.b.node.memory[40..45], b"hello");
        if let Some(gid) = global {
            assert_eq!(pair.b.node.memory[24..40], gid.0);
        }
    }
}

#[test]
fn test_datagram_when_key_length_or_receive_is_wrong_is_dropped() {
    let mut pair = datagrams();
    pair.a.post_with(QP, Action::Send, 0, 5, |r| {
        r.datagram = Some(to(6, QP, None, 0x11))
    });
    pair.run_all();
    assert_eq!(
        pair.a.statuses(),
        [Status::Success],
        "nobody listens, nobody tells"
    );
    pair.b.receive(QP, 1, 0, 1000);
    pair.a.post_with(QP, Action::Send, 0, 5, |r| {
        r.datagram = Some(to(6, QP, None, 0x12))
    });
    pair.run_all();
    assert!(pair.b.node.received.is_empty(), "wrong key");
    // The privileged bit: the sender's own key.
    pair.a.post_with(QP, Action::Send, 0, 5, |r| {
        r.datagram = Some(to(6, QP, None, 0x8000_0000));
    });
    pair.run_all();
    assert_eq!(pair.b.node.received.len(), 1);
    pair.a.post_with(QP, Action::Send, 0, 1025, |r| {
        r.datagram = Some(to(6, QP, None, 0x11))
    });
    pair.run_all();
    assert_eq!(pair.a.statuses()[3..], [Status::LocalLength]);
    assert_eq!(pair.a.transport.status(QP).unwrap().state, State::Sqe);
    assert_eq!(pair.b.transport.status(QP).unwrap().state, State::Rts);
}

#[test]
fn test_multicast_when_attached_comes_to_every_member() {
    let mut pair = datagrams();
    pair.connect(
        qpn(0x41),
        qpn(0x41),
        Options {
            service: ServiceType::Ud,
            ..Options::default()
        },
    );
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&[0xff, 0x12]);
    let group = Gid(bytes);
    for number in [QP, qpn(0x41)] {
        pair.b.transport.attach(number, group).unwrap();
        pair.b.receive(
            number,
            u64::from(number.get()),
            4096 * u64::from(number.get()),
            100,
        );
    }
    pair.a.node.memory[..3].copy_from_slice(b"all");
    pair.a.post_with(QP, Action::Send, 0, 3, |r| {
        r.datagram = Some(to(0xc001, Qpn::MULTICAST, Some(group), 0x11));
    });
    pair.run_all();
    assert_eq!(pair.b.node.received.len(), 2);
    for number in [0x40, 0x41] {
        assert_eq!(&pair.b.node.memory[4096 * number + 40..][..3], b"all");
    }
    pair.b.transport.detach(QP, group).unwrap();
    assert_eq!(
        pair.b.transport.attach(QP, Gid::NONE),
        Err(TransportError::Group(QP, Gid::NONE))
    );
}

#[test]
fn test_group_when_it_is_full_takes_nobody_until_one_leaves() {
    let config = Config {
        max_groups: 2,
        max_members: 1,
        ..Config::default()
    };
    let options = Options {
        service: ServiceType::Ud,
        config,
        ..Options::default()
    };
    let mut pair = Pair::connected(options);
    let other = qpn(0x41);
    pair.connect(other, other, options);
    let [first, second, third] = [1, 2, 3].map(|number| {
        let mut bytes = [0; 16];
        (bytes[0], bytes[15]) = (0xff, number);
        Gid(bytes)
    });
    let b = &mut pair.b.transport;
    b.attach(QP, first).unwrap();
    b.attach(QP, first).unwrap();
    b.attach(QP, second).unwrap();
    assert_eq!(b.attach(QP, third), Err(TransportError::Crowded(QP, third)));
    assert_eq!(b.attach(other, first), Err(TransportError::Crowded(other, first)));
    b.detach(QP, first).unwrap();
    b.attach(other, first).unwrap();
    assert_eq!(b.attach(QP, third), Err(TransportError::Crowded(QP, third)));
    b.destroy(other).unwrap();
    b.attach(QP, third).unwrap();
}

#[test]
fn test_unreliable_message_when_a_packet_is_lost_is_not_delivered_and_the_next_is() {
    let mut pair = Pair::connected(Options {
        service: ServiceType::Uc,
        cut: true,
        ..Options::default()
    });
    pair.b.receive(QP, 1, 0, 8192);
    let data = pattern(9, 3000);
    pair.a.node.memory[..3000].copy_from_slice(&data);
    pair.a.post(QP, Action::Send, 0, 3000);
    pair.a
        .transport
        .poll(pair.now, &mut pair.a.node, &mut pair.a.link);
    pair.a.link.inner().out.borrow_mut().remove(1);
    pair.a.post(QP, Action::Send, 0, 3000);
    pair.run_all();
    assert_eq!(pair.a.statuses(), [Status::Success; 2]);
    assert_eq!(pair.b.node.received.len(), 1);
    assert_eq!(pair.b.node.received[0].2.len, 3000);
    assert_eq!(&pair.b.node.memory[..3000], data);
}
