//! The switch: who gets what.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::transport::{Extension, Link, Packet, Time};
use protos::ib::mad::{MAD, MadHeader, NodeInfo, PortInfo, class, method, smp, status};
use protos::ib::{Deth, Grh, Lid, Mtu, Opcode, Pkey, Psn, Qkey, Qpn};
use zerocopy::{FromBytes, IntoBytes};

#[derive(Debug, Default)]
pub(super) struct Count(pub(super) AtomicUsize);

impl Wake for Count {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

pub(crate) fn config(guid: u64, ports: u64, shards: usize) -> AdapterConfig {
    AdapterConfig {
        system_guid: guid,
        node_guid: guid,
        port_guids: (1..=ports).map(|port| guid + port).collect(),
        shards,
        description: "test".into(),
        vendor: 0x02_c903,
        device: 0x1017,
        revision: 0,
        pkeys: vec![Pkey::DEFAULT],
    }
}

pub(super) fn attach(fabric: &Fabric, guid: u64, shards: usize) -> (Adapter, Vec<Arc<Count>>) {
    let counts: Vec<Arc<Count>> = (0..shards).map(|_| Arc::default()).collect();
    let wakes = counts.iter().map(|c| c.clone() as Arc<dyn Wake>).collect();
    (
        fabric.attach(config(guid, 1, shards), wakes, None).unwrap(),
        counts,
    )
}

pub(super) fn packet(to: Lid, dest: Qpn, payload: &[u8]) -> Packet {
    let pool = Pool::default();
    let mut buffer = pool.take(payload.len());
    buffer.copy_from_slice(payload);
    Packet {
        port: 1,
        sl: 0,
        mtu: Mtu::B4096,
        slid: Lid::NONE,
        dlid: to,
        pkey: Pkey::DEFAULT,
        opcode: Opcode(0x64),
        ack_request: false,
        solicited: false,
        dest,
        psn: Psn::new(0),
        count: 1,
        xrc_srqn: None,
        immediate: None,
        extension: Extension::Datagram(Deth::new(Qkey::GSI, Qpn::new(0x99))),
        global: None,
        payload: Some(buffer),
    }
}

const NOW: Time = Time::ZERO;

#[test]
fn test_packet_when_sent_to_a_lid_comes_to_the_shard_of_its_queue_pair() {
    let fabric = Fabric::new();
    let (a, _) = attach(&fabric, 0x10, 1);
    let (b, counts) = attach(&fabric, 0x20, 2);
    let lid = b.port(1).unwrap().lid;
    assert_ne!(lid, a.port(1).unwrap().lid);
    let (mut from, mut even, mut odd) = (a.endpoint(0), b.endpoint(0), b.endpoint(1));
    from.transmit(packet(lid, Qpn::new(0x41), b"odd"), NOW).unwrap();
    assert_eq!(counts[1].0.load(Ordering::Relaxed), 1);
    assert!(even.receive(NOW).is_none());
    let got = odd.receive(NOW).unwrap();
    assert_eq!(
        (got.data(), got.slid, got.port),
        (&b"odd"[..], a.port(1).unwrap().lid, 1)
    );
    assert!(odd.receive(NOW).is_none());
}

#[test]
fn test_inbox_when_full_gives_back_and_wakes_the_sender_when_there_is_room() {
    let fabric = Fabric::new();
    let (a, counts) = attach(&fabric, 0x10, 1);
    let (b, _) = attach(&fabric, 0x20, 1);
    let lid = b.port(1).unwrap().lid;
    let (mut from, mut to) = (a.endpoint(0), b.endpoint(0));
    let mut sent = 0;
    let back = loop {
        match from.transmit(packet(lid, Qpn::new(2), b"x"), NOW) {
            Ok(()) => sent += 1,
            Err(back) => break back,
        }
        assert!(sent < 100_000);
    };
    assert_eq!((back.data(), back.port), (&b"x"[..], 1));
    assert_eq!(counts[0].0.load(Ordering::Relaxed), 0);
    let mut got = 0;
    while to.receive(NOW).is_some() {
        got += 1;
    }
    assert_eq!(got, sent);
    assert_eq!(counts[0].0.load(Ordering::Relaxed), 1);
    from.transmit(back, NOW).unwrap();
}

#[test]
fn test_adapter_when_dropped_is_no_longer_reached_and_its_lid_is_free() {
    let fabric = Fabric::new();
    let (a, _) = attach(&fabric, 0x10, 1);
    let (b, _) = attach(&fabric, 0x20, 1);
    let lid = b.port(1).unwrap().lid;
    assert_eq!(
        fabric
            .attach(config(0x20, 1, 1), vec![Arc::new(Count::default())], None)
            .unwrap_err(),
        AttachError::Guid(0x21)
    );
    let mut from = a.endpoint(0);
    drop(b);
    from.transmit(packet(lid, Qpn::new(2), b"x"), NOW).unwrap();
    let (c, _) = attach(&fabric, 0x20, 1);
    assert_eq!(c.port(1).unwrap().lid, lid);
    assert!(c.endpoint(0).receive(NOW).is_none());
}

#[test]
fn test_unknown_lid_and_port_when_sent_to_lose_the_packet() {
    let fabric = Fabric::new();
    let (a, _) = attach(&fabric, 0x10, 1);
    let mut from = a.endpoint(0);
    for lid in [Lid::NONE, Lid(77), Lid(0xbfff), Lid(0xc123), Lid::PERMISSIVE] {
        from.transmit(packet(lid, Qpn::new(2), b"x"), NOW).unwrap();
    }
    let mut other = packet(Lid(2), Qpn::new(2), b"x");
    other.port = 0;
    from.transmit(other, NOW).unwrap();
    assert!(from.receive(NOW).is_none());
}

fn ask(adapter: &Adapter, class: u8, attribute: u16, modifier: u32) -> [u8; MAD] {
    let mut mad = [0; MAD];
    let header = MadHeader {
        base_version: 1,
        class,
        class_version: 1,
        method: method::GET,
        attribute: attribute.into(),
        modifier: modifier.into(),
        transaction: 77.into(),
        ..MadHeader::default()
    };
    mad[..24].copy_from_slice(header.as_bytes());
    adapter.mad(1, &mad).unwrap()
}

fn head(mad: &[u8; MAD]) -> MadHeader {
    MadHeader::read_from_prefix(mad).unwrap().0
}

#[test]
fn test_management_agent_when_asked_describes_the_port() {
    let fabric = Fabric::new();
    let (a, _) = attach(&fabric, 0x10, 1);
    let reply = ask(&a, class::SUBN_LID, smp::NODE_INFO, 0);
    assert_eq!(
        (head(&reply).method, head(&reply).status.get()),
        (method::GET_RESP, 0)
    );
    assert_eq!(head(&reply).transaction.get(), 77);
    let info = NodeInfo::read_from_prefix(&reply[smp::DATA..]).unwrap().0;
    assert_eq!(
        (info.node_type, info.num_ports, info.port_guid.get()),
        (1, 1, 0x11)
    );
    let reply = ask(&a, class::SUBN_LID, smp::PORT_INFO, 1);
    let info = PortInfo::read_from_prefix(&reply[smp::DATA..]).unwrap().0;
    assert_eq!(info.lid.get(), a.port(1).unwrap().lid.0);
    assert_eq!((info.sm_lid.get(), info.speed_supported_state & 15), (1, 4));
    let reply = ask(&a, class::SUBN_LID, smp::PORT_INFO, 2);
    assert_eq!(head(&reply).status.get(), status::BAD_FIELD);
    let reply = ask(&a, class::SUBN_LID, smp::PKEY_TABLE, 0);
    assert_eq!(reply[smp::DATA..smp::DATA + 4], [0xff, 0xff, 0, 0]);
    let reply = ask(&a, class::SUBN_LID, smp::NODE_DESCRIPTION, 0);
    assert_eq!(&reply[smp::DATA..smp::DATA + 5], b"test\0");
    let reply = ask(&a, class::SUBN_LID, 0x7777, 0);
    assert_eq!(head(&reply).status.get(), status::BAD_ATTRIBUTE);
    let reply = ask(&a, class::SUBN_DIRECTED, smp::NODE_INFO, 0);
    assert_eq!(head(&reply).status.get(), status::DIRECTION);
    let mut answer = [0; MAD];
    answer[..4].copy_from_slice(&[1, class::SUBN_LID, 1, method::GET_RESP]);
    assert!(a.mad(1, &answer).is_none(), "answers get no answer");
}

#[test]
fn test_counters_when_packets_flow_count_them() {
    use protos::ib::mad::{PortCounters, perf};
    let fabric = Fabric::new();
    let (a, _) = attach(&fabric, 0x10, 1);
    let mut end = a.endpoint(0);
    for _ in 0..3 {
        end.transmit(packet(a.port(1).unwrap().lid, Qpn::new(2), b"four"), NOW)
            .unwrap();
    }
    let reply = ask(&a, class::PERFORMANCE, perf::PORT_COUNTERS, 0);
    let counters = PortCounters::read_from_prefix(&reply[perf::DATA..]).unwrap().0;
    assert_eq!(
        (counters.transmit_packets.get(), counters.receive_packets.get()),
        (3, 3)
    );
    assert_eq!(counters.transmit_words.get(), 3 * 7);
}

#[test]
fn test_multicast_when_joined_through_the_manager_reaches_members_only() {
    use crate::fabric::subnet::tests::{broadcast, join};
    let fabric = Fabric::new();
    let adapters: Vec<_> = (1..=3).map(|i| attach(&fabric, i * 0x10, 1).0).collect();
    let mut ends: Vec<_> = adapters.iter().map(|a| a.endpoint(0)).collect();
    let mut mlid = Lid::NONE;
    for i in [0, 1] {
        let gid = adapters[i].port(1).unwrap().gid;
        ends[i]
            .transmit(packet(Lid(1), Qpn::GSI, &join(gid)), NOW)
            .unwrap();
        let reply = ends[i].receive(NOW).unwrap();
        assert_eq!(reply.dest, Qpn::new(0x99));
        let data = &reply.data()[56..];
        mlid = Lid(u16::from_be_bytes([data[36], data[37]]));
    }
    assert!(mlid.is_multicast());
    let mut all = packet(mlid, Qpn::MULTICAST, b"all");
    all.global = Some(Grh::new(Gid::NONE, broadcast(), 0, 0, 1));
    ends[2].transmit(all, NOW).unwrap();
    let got: Vec<bool> = ends.iter_mut().map(|end| end.receive(NOW).is_some()).collect();
    assert_eq!(got, [true, true, false]);
}

#[test]
fn test_endpoint_when_cleared_has_nothing_of_before_and_room_again() {
    let fabric = Fabric::new();
    let ((a, counts), (b, _)) = (attach(&fabric, 0x10, 1), attach(&fabric, 0x20, 1));
    let lid = b.port(1).unwrap().lid;
    let (mut from, mut to) = (a.endpoint(0), b.endpoint(0));
    let one = || packet(lid, Qpn::new(0x40), b"one");
    from.transmit(one(), NOW).unwrap();
    from.transmit(one(), NOW).unwrap();
    // One is in the hands of the reader, others are in the inbox, others come from itself.
    assert!(to.receive(NOW).is_some());
    while from.transmit(one(), NOW).is_ok() {}
    to.transmit(one(), NOW).unwrap();
    let woken = counts[0].0.load(Ordering::Relaxed);
    to.clear();
    assert!(to.receive(NOW).is_none());
    assert_eq!(
        counts[0].0.load(Ordering::Relaxed),
        woken + 1,
        "whoever found it full"
    );
    from.transmit(packet(lid, Qpn::new(0x40), b"new"), NOW).unwrap();
    assert_eq!(to.receive(NOW).unwrap().data(), b"new");
}
