//! Transports on a real fabric: inside a process, and over a socket. Time is the clock's here.

use std::sync::Arc;
use std::time::Instant;

use super::*;
use crate::fabric::{Adapter, Endpoint, Fabric, FabricUrl, Wake};

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

pub(super) struct Host {
    adapter: Adapter,
    pub(super) end: Endpoint,
    pub(super) transport: Transport,
    pub(super) node: Node,
}

impl Host {
    pub(super) fn new(fabric: &Fabric, guid: u64) -> Self {
        let config = crate::fabric::tests::config(guid, 1, 1);
        let adapter = fabric.attach(config, vec![Arc::new(NoWake)], None).unwrap();
        Self {
            end: adapter.endpoint(0),
            adapter,
            transport: Transport::default(),
            node: Node::new(guid),
        }
    }

    pub(super) fn lid(&self) -> Lid {
        self.adapter.port(1).unwrap().lid
    }

    pub(super) fn connect(&mut self, to: Lid, timeout: u8) {
        let settings = Settings {
            service: ServiceType::Rc,
            key: 0,
            shared_receive: false,
        };
        self.transport.create(QP, &settings).unwrap();
        let attributes = Attributes {
            path: Some(Path {
                port: 1,
                slid: self.lid(),
                dlid: to,
                sl: 0,
                global: None,
            }),
            mtu: Some(Mtu::B4096),
            dest: Some(QP),
            send_psn: Some(Psn::new(0xff_ff00)),
            receive_psn: Some(Psn::new(0xff_ff00)),
            timeout: Some(timeout),
            retry_count: Some(2),
            rnr_retry: Some(7),
            max_initiated: Some(4),
            max_responded: Some(4),
            ..Attributes::default()
        };
        for state in [State::Init, State::Rtr, State::Rts] {
            self.transport
                .modify(QP, state, &attributes, &mut self.node)
                .unwrap();
        }
    }

    pub(super) fn post(&mut self, action: Action, local: u64, len: u32) {
        let list = self.node.requests.entry(QP).or_default();
        let index = list.len() as u32;
        let request = Request::new(index, action, len);
        list.push((request, local));
        self.transport.ring(QP);
    }

    fn poll(&mut self, start: Instant) -> bool {
        self.transport
            .poll(Time::since(start), &mut self.node, &mut self.end)
            .again
    }
}

const LIMIT: Duration = Duration::from_secs(60);

fn until(a: &mut Host, b: &mut Host, done: impl Fn(&Host, &Host) -> bool) {
    let start = Instant::now();
    while !done(a, b) {
        let again = a.poll(start) | b.poll(start);
        if !again {
            std::thread::yield_now();
        }
        assert!(
            start.elapsed() < LIMIT,
            "{:?} {:?}",
            a.node.sent,
            a.transport.stats()
        );
    }
}

fn exchange(a: &mut Host, b: &mut Host) {
    until(a, b, |a, b| a.lid() != Lid::NONE && b.lid() != Lid::NONE);
    let (lid_a, lid_b) = (a.lid(), b.lid());
    a.connect(lid_b, 18);
    b.connect(lid_a, 18);
    let data = pattern(1, 1 << 20);
    a.node.memory[..1 << 20].copy_from_slice(&data);
    a.post(Action::Write(at(0)), 0, 1 << 20);
    a.post(Action::Read(at(0)), 1 << 20, 1 << 20);
    a.post(
        Action::FetchAdd {
            at: at(2 << 20),
            add: 3,
        },
        2 << 20,
        8,
    );
    a.post(Action::SendImmediate(9), 0, 100_000);
    b.node.receives.entry(QP).or_default().push_back(Posted {
        token: 1,
        start: 3 << 20,
        len: 1 << 20,
    });
    until(a, b, |a, _| a.node.sent.len() == 4);
    assert!(
        a.node
            .sent
            .iter()
            .all(|(_, _, status)| *status == Status::Success)
    );
    assert_eq!(&b.node.memory[..1 << 20], data);
    assert_eq!(&a.node.memory[1 << 20..2 << 20], data);
    assert_eq!(&b.node.memory[3 << 20..][..100_000], &data[..100_000]);
    assert_eq!(b.node.memory[2 << 20], 3);
    assert_eq!(
        (b.node.received.len(), b.node.received[0].2.immediate),
        (1, Some(9))
    );
}

#[test]
fn test_connection_when_inside_a_process_moves_all_data_without_repeating_any() {
    let fabric = Fabric::new();
    let (mut a, mut b) = (Host::new(&fabric, 0x10), Host::new(&fabric, 0x20));
    exchange(&mut a, &mut b);
    assert_eq!(a.node.gathered, (1 << 20) + 100_000);
    assert_eq!(a.transport.stats().go_backs, 0);
}

#[test]
fn test_connection_when_over_a_socket_moves_all_data_and_ends_with_the_other_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fabric.sock").display().to_string();
    let main = Fabric::open(&format!("listen:unix:{path}").parse::<FabricUrl>().unwrap()).unwrap();
    let joined = Fabric::open(&format!("unix:{path}").parse::<FabricUrl>().unwrap()).unwrap();
    let (mut a, mut b) = (Host::new(&main, 0x10), Host::new(&joined, 0x20));
    exchange(&mut a, &mut b);
    // The other process is killed; (the clock's time for two retries is 4.3 s with that timeout.)
    let Host { adapter, .. } = b;
    drop((adapter, joined));
    let mut c = Host::new(&main, 0x30);
    a.post(Action::Write(at(0)), 0, 100);
    until(&mut a, &mut c, |a, _| a.node.sent.len() == 5);
    assert_eq!(a.node.sent[4].2, Status::RetryExceeded);
}
