//! Two fabrics in one process, over real sockets.

use std::sync::mpsc;

use super::*;
use crate::fabric::tests::{Count, config, packet};
use crate::fabric::{Adapter, Endpoint, Fabric};
use crate::transport::{Link, Time};
use protos::ib::Qpn;

struct Tell(mpsc::Sender<PortChange>);

impl PortEvents for Tell {
    fn changed(&self, _: u8, change: PortChange) {
        // (The test may be over.)
        let _ = self.0.send(change);
    }
}

struct Ring(mpsc::Sender<()>);

impl Wake for Ring {
    fn wake(&self) {
        let _ = self.0.send(());
    }
}

const LIMIT: Duration = Duration::from_secs(20);

struct Station {
    adapter: Adapter,
    end: Endpoint,
    woken: mpsc::Receiver<()>,
    changes: mpsc::Receiver<PortChange>,
}

impl Station {
    fn new(fabric: &Fabric, guid: u64) -> Self {
        let (wake, woken) = mpsc::channel();
        let (tell, changes) = mpsc::channel();
        let adapter = fabric
            .attach(
                config(guid, 1, 1),
                vec![Arc::new(Ring(wake))],
                Some(Arc::new(Tell(tell))),
            )
            .unwrap();
        Self {
            end: adapter.endpoint(0),
            adapter,
            woken,
            changes,
        }
    }

    fn lid(&self) -> Lid {
        self.adapter.port(1).unwrap().lid
    }

    fn next(&mut self) -> Packet {
        loop {
            if let Some(packet) = self.end.receive(Time::ZERO) {
                return packet;
            }
            self.woken.recv_timeout(LIMIT).expect("a packet");
        }
    }

    fn send(&mut self, to: Lid, text: &[u8]) {
        self.end
            .transmit(packet(to, Qpn::new(0x50), text), Time::ZERO)
            .unwrap();
    }

    /// Sends until the other one has it: a trunk that comes up again loses what is sent before.
    fn send_until(&mut self, to: &mut Station, text: &[u8]) {
        for _ in 0..200 {
            self.send(to.lid(), text);
            if to.woken.recv_timeout(Duration::from_millis(100)).is_ok()
                && let Some(packet) = to.end.receive(Time::ZERO)
            {
                assert_eq!(packet.data(), text);
                return;
            }
        }
        panic!("{text:?} never arrives");
    }
}

fn exchange(listen: &FabricUrl, connect: impl FnOnce(&Fabric) -> FabricUrl) {
    let main = Fabric::open(listen).unwrap();
    let joined = Fabric::open(&connect(&main)).unwrap();
    let (mut a, mut b) = (Station::new(&main, 0x10), Station::new(&joined, 0x20));
    if b.lid() == Lid::NONE {
        assert_eq!(b.changes.recv_timeout(LIMIT), Ok(PortChange::Up));
    }
    assert!(b.lid().0 >= 256, "{}", b.lid());
    assert_eq!(b.adapter.port(1).unwrap().sm_lid, Lid(1));
    a.send(b.lid(), b"there");
    let got = b.next();
    assert_eq!((got.data(), got.slid, got.port), (&b"there"[..], a.lid(), 1));
    b.send(a.lid(), b"and back");
    assert_eq!(a.next().data(), b"and back");
    // The manager is in the other process; it learns who is here.
    let gid = b.adapter.port(1).unwrap().gid;
    let join = crate::fabric::subnet::tests::join(gid);
    let mlid = loop {
        let mut request = packet(Lid(1), Qpn::GSI, &join);
        request.slid = b.lid();
        b.end.transmit(request, Time::ZERO).unwrap();
        let reply = b.next();
        let data = &reply.data()[56..];
        if reply.data()[4..6] == [0, 0] {
            break Lid(u16::from_be_bytes([data[36], data[37]]));
        }
        // Its list of ports is still under way.
        std::thread::yield_now();
    };
    let mut all = packet(mlid, Qpn::MULTICAST, b"all");
    all.global = Some(protos::ib::Grh::default());
    a.end.transmit(all, Time::ZERO).unwrap();
    assert_eq!(b.next().data(), b"all");
    // A pulled cable: what is sent is lost until it is back; the LID stays.
    let lid = b.lid();
    joined.pull();
    a.send_until(&mut b, b"again");
    b.send_until(&mut a, b"again, back");
    assert_eq!(b.lid(), lid);
    // The other process ends.
    drop(main);
    b.send(a.lid(), b"into the void");
}

#[test]
fn test_trunk_when_over_a_unix_socket_carries_packets_both_ways_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fabric.sock");
    exchange(&FabricUrl::Listen(Address::Unix(path.clone())), |_| {
        FabricUrl::Connect(Address::Unix(path))
    });
}

#[test]
fn test_trunk_when_over_tcp_carries_packets_both_ways_and_comes_back() {
    exchange(&"listen:tcp:127.0.0.1:0".parse().unwrap(), |main| {
        FabricUrl::Connect(main.address().unwrap().clone())
    });
}

#[test]
fn test_listener_when_strangers_connect_goes_on() {
    let main = Fabric::open(&"listen:tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Some(Address::Tcp(host)) = main.address().cloned() else {
        panic!("no address");
    };
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64], &[0; 64]] {
        let mut stranger = TcpStream::connect(&host).unwrap();
        // (It may be thrown out before it has said everything.)
        let _ = stranger.write_all(bytes);
    }
    let mut silent = TcpStream::connect(&host).unwrap();
    write_frame(&mut silent, kind::HELLO, &[0; 16]).unwrap();
    let mut rest = Vec::new();
    // Thrown out: the end, or a reset.
    let _ = silent.read_to_end(&mut rest);
    assert!(rest.is_empty());
    let joined = Fabric::open(&FabricUrl::Connect(Address::Tcp(host))).unwrap();
    let (tell, changes) = mpsc::channel();
    let adapter = joined
        .attach(
            config(0x20, 1, 1),
            vec![Arc::new(Count::default())],
            Some(Arc::new(Tell(tell))),
        )
        .unwrap();
    if !adapter.port(1).unwrap().active {
        assert_eq!(changes.recv_timeout(LIMIT), Ok(PortChange::Up));
    }
}

/// What a process that asks for a block is told; `None` when it is thrown out.
fn welcome(host: &str, block: u16) -> Option<(TcpStream, Welcome)> {
    let mut stream = TcpStream::connect(host).unwrap();
    let hello = Hello {
        magic: MAGIC.into(),
        version: VERSION.into(),
        block: block.into(),
        ..Hello::default()
    };
    write_frame(&mut stream, kind::HELLO, hello.as_bytes()).ok()?;
    let welcome = expect(&mut stream, kind::WELCOME).ok()?;
    Some((stream, welcome))
}

#[test]
fn test_blocks_when_many_want_the_same_are_different_and_come_back() {
    let main = Fabric::open(&"listen:tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Some(Address::Tcp(host)) = main.address().cloned() else {
        panic!("no address");
    };
    let start = std::sync::Barrier::new(8);
    for round in 0..60 {
        let blocks: Vec<u16> = std::thread::scope(|scope| {
            let ask = || {
                start.wait();
                let begin = std::time::Instant::now();
                // (Those of the round before may be on their way out.)
                let found = loop {
                    let found = welcome(&host, 0x500);
                    if found.is_some() || begin.elapsed() > 6 * LIMIT {
                        break found;
                    }
                };
                // Everybody is there before the first goes.
                start.wait();
                found.expect("LIDs").1.first.get()
            };
            let all: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let different: std::collections::BTreeSet<_> = blocks.iter().collect();
        assert_eq!(different.len(), blocks.len(), "round {round}: {blocks:x?}");
    }
}

#[test]
fn test_url_when_parsed_names_what_it_says() {
    assert_eq!("inside".parse(), Ok(FabricUrl::Inside));
    assert_eq!(
        "listen:unix:/tmp/x".parse(),
        Ok(FabricUrl::Listen(Address::Unix("/tmp/x".into())))
    );
    assert_eq!(
        "tcp:host:77".parse(),
        Ok(FabricUrl::Connect(Address::Tcp("host:77".into())))
    );
    for bad in ["", "unix:", "tcp:host", "listen:inside", "udp:x:1"] {
        assert_eq!(bad.parse::<FabricUrl>(), Err(UrlError(bad.into())));
    }
}
