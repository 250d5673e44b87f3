//! Our own driver on the HCA in one process: extended reliable connections.

use std::sync::Arc;

use device::mlx5::{Mlx5, Mlx5Config};
use driver::mlx5::{
    CompletionQueue, Connection, EventQueue, Hca, MemoryKey, QueuePair, Region, SendRequest, Service,
    XrcReceiveQueue,
};
use protos::mlx5::Layout;
use protos::mlx5::cq::{Cqe, CqeOpcode, Syndrome};
use protos::mlx5::mkey::Mkc;
use protos::mlx5::qp::{Qpc, State};
use tests::in_process::InProcess;

const MEMORY: u64 = 64 << 20;
/// Virtual address of the test's regions: not their IOVA.
const VA: u64 = 0x7f00_0000_0000;
const RIGHTS: [protos::mlx5::Field<Mkc>; 5] = [
    Mkc::LOCAL_READ,
    Mkc::LOCAL_WRITE,
    Mkc::REMOTE_READ,
    Mkc::REMOTE_WRITE,
    Mkc::ATOMIC,
];
/// A word that no access may change.
const GUARD: [u8; 8] = *b"as it is";

/// An initiator connected with a target. Three protection domains: the initiator's, the driver's own, which the target
/// is made with, and that of the shared receive queue.
struct Rig {
    hca: Hca,
    /// Completions of sends, completions of the shared queue.
    cqs: [CompletionQueue; 2],
    initiator: QueuePair,
    target: QueuePair,
    queue: XrcReceiveQueue,
    pds: Pds,
    _eq: EventQueue,
}

#[derive(Clone, Copy)]
struct Pds {
    sender: u32,
    target: u32,
    queue: u32,
}

fn rig() -> Rig {
    let (backing, _model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    let hca = Hca::new(Arc::new(backing), MEMORY).expect("bring-up");
    let pd = || hca.protection_domain().unwrap();
    let pds = Pds {
        sender: pd(),
        target: pd(),
        queue: pd(),
    };
    let eq = hca.event_queue(6, 0, 1).unwrap();
    let cqs = [0, 1].map(|_| hca.completion_queue(6, &eq).unwrap());
    let domain = hca.xrc_domain().unwrap();
    let queue = hca.xrc_receive_queue(domain, pds.queue, 2, &cqs[1]).unwrap();
    let mut initiator = hca
        .queue_pair(Service::XrcInitiator, pds.sender, 5, &cqs[0], &cqs[0])
        .unwrap();
    let mut target = hca.xrc_target(domain, pds.target, &queue).unwrap();
    let lid = hca.lid().unwrap();
    let numbers = [initiator.number(), target.number()];
    for (qp, peer) in [(&mut initiator, numbers[1]), (&mut target, numbers[0])] {
        let to = Connection {
            qpn: peer,
            lid,
            retries: 7,
            timeout: 14,
        };
        hca.connect(qp, to).unwrap();
    }
    Rig {
        hca,
        cqs,
        initiator,
        target,
        queue,
        pds,
        _eq: eq,
    }
}

impl Rig {
    fn memory(&self, pd: u32) -> (Region, MemoryKey) {
        let region = self.hca.memory().take(1 << 16).unwrap();
        (region, self.hca.memory_key(pd, region, VA, &RIGHTS).unwrap())
    }

    fn contents(&self, region: Region, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.hca.memory().read(region.iova, &mut bytes);
        bytes
    }

    fn send(&mut self, srqn: u32, request: SendRequest, key: MemoryKey, len: u32) -> Cqe {
        self.hca
            .post_xrc_send(&mut self.initiator, srqn, request, key, VA, len)
            .unwrap();
        self.hca.wait_completion(&mut self.cqs[0]).unwrap()
    }

    fn state(&self, qp: &QueuePair) -> State {
        State(self.hca.query(qp).unwrap().get(Qpc::STATE) as u8)
    }
}

#[test]
fn test_xrc_send_when_received_goes_to_the_queue_that_it_names() {
    let mut rig = rig();
    let (from, sender) = rig.memory(rig.pds.sender);
    // Its protection domain is the queue's: the target's key would not do.
    let (to, receiver) = rig.memory(rig.pds.queue);
    let srqn = rig.queue.number();
    // More than the queue has places, so that the list is gone round.
    for round in 0..10u32 {
        let len = 1 + 1000 * round;
        let sent: Vec<u8> = (0..len).map(|at| (at + round * 7) as u8).collect();
        rig.hca.memory().write(from.iova, &sent);
        rig.hca.post_shared_receive(&mut rig.queue, receiver, VA, 1 << 16);
        let done = rig.send(srqn, SendRequest::Send(Some(round)), sender, len);
        assert_eq!(done.opcode(), CqeOpcode::REQUESTER, "{round}");
        let cqe = rig.hca.wait_completion(&mut rig.cqs[1]).unwrap();
        assert_eq!(
            (cqe.opcode(), cqe.byte_cnt.get(), cqe.imm_inval_pkey.get()),
            (CqeOpcode::RESPONDER_SEND_IMM, len, round)
        );
        assert_eq!(
            (cqe.srqn_uidx.get(), cqe.sop_drop_qpn.get()),
            (srqn, rig.target.number())
        );
        assert_eq!(cqe.wqe_counter.get(), round as u16 % 4);
        assert_eq!(rig.contents(to, len as usize), sent, "{round}");
    }
    // A queue pair without a send queue is not asked for requests.
    assert_eq!(rig.state(&rig.target), State::RTS);
}

#[test]
fn test_xrc_send_when_nothing_is_posted_waits_for_the_receive_request() {
    let mut rig = rig();
    let (from, sender) = rig.memory(rig.pds.sender);
    let (to, receiver) = rig.memory(rig.pds.queue);
    let srqn = rig.queue.number();
    rig.hca.memory().write(from.iova, &GUARD);
    rig.hca
        .post_xrc_send(&mut rig.initiator, srqn, SendRequest::Send(None), sender, VA, 8)
        .unwrap();
    rig.hca.post_shared_receive(&mut rig.queue, receiver, VA, 8);
    let cqe = rig.hca.wait_completion(&mut rig.cqs[1]).unwrap();
    assert_eq!(cqe.opcode(), CqeOpcode::RESPONDER_SEND);
    assert_eq!(rig.contents(to, 8), GUARD);
}

#[test]
fn test_xrc_access_when_the_key_is_of_the_queues_domain_is_done() {
    let mut rig = rig();
    let (local, sender) = rig.memory(rig.pds.sender);
    let (remote, key) = rig.memory(rig.pds.queue);
    let srqn = rig.queue.number();
    let sent: Vec<u8> = (0..20_000u32).map(|at| (at * 13) as u8).collect();
    rig.hca.memory().write(local.iova, &sent);
    let done = rig.send(srqn, SendRequest::Write(VA, key.key), sender, 20_000);
    assert_eq!(done.opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.contents(remote, 20_000), sent);
    rig.hca.memory().write(remote.iova, &5u64.to_le_bytes());
    let done = rig.send(srqn, SendRequest::Read(VA, key.key), sender, 20_000);
    assert_eq!(done.opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.contents(local, 8), 5u64.to_le_bytes());
    assert_eq!(rig.contents(local, 20_000)[8..], sent[8..]);
    let done = rig.send(srqn, SendRequest::FetchAdd(VA, key.key, 3), sender, 8);
    assert_eq!(done.opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.contents(remote, 8), 8u64.to_le_bytes());
}

#[test]
fn test_xrc_access_when_the_key_is_of_another_domain_is_refused() {
    type Case = (&'static str, fn(u32) -> SendRequest);
    let cases: [Case; 3] = [
        ("write", |key| SendRequest::Write(VA, key)),
        ("read", |key| SendRequest::Read(VA, key)),
        ("atomic", |key| SendRequest::FetchAdd(VA, key, 1)),
    ];
    for (name, request) in cases {
        for whose in [|pds: Pds| pds.target, |pds: Pds| pds.sender] {
            let mut rig = rig();
            let (local, sender) = rig.memory(rig.pds.sender);
            let (remote, key) = rig.memory(whose(rig.pds));
            for region in [local, remote] {
                rig.hca.memory().write(region.iova, &GUARD);
            }
            let srqn = rig.queue.number();
            let cqe = rig.send(srqn, request(key.key), sender, 8);
            assert_eq!(cqe.syndrome(), Some(Syndrome::REMOTE_ACCESS), "{name}");
            for region in [local, remote] {
                assert_eq!(rig.contents(region, 8), GUARD, "{name}");
            }
            assert_eq!(rig.state(&rig.target), State::ERR, "{name}");
        }
    }
}

#[test]
fn test_xrc_request_when_the_queue_is_of_another_xrc_domain_is_refused() {
    for (name, request) in [
        ("send", None),
        ("write", Some(SendRequest::Write as fn(u64, u32) -> SendRequest)),
        ("read", Some(SendRequest::Read as fn(u64, u32) -> SendRequest)),
    ] {
        let mut rig = rig();
        let other = rig.hca.xrc_domain().unwrap();
        let mut stranger = rig
            .hca
            .xrc_receive_queue(other, rig.pds.queue, 2, &rig.cqs[1])
            .unwrap();
        let (local, sender) = rig.memory(rig.pds.sender);
        let (remote, key) = rig.memory(rig.pds.queue);
        rig.hca.memory().write(remote.iova, &GUARD);
        rig.hca.post_shared_receive(&mut stranger, key, VA, 64);
        let request = request.map_or(SendRequest::Send(None), |make| make(VA, key.key));
        let cqe = rig.send(stranger.number(), request, sender, 8);
        assert_eq!(cqe.syndrome(), Some(Syndrome::REMOTE_INVALID_REQUEST), "{name}");
        assert_eq!(rig.contents(remote, 8), GUARD, "{name}");
        assert_eq!(rig.contents(local, 8), [0; 8], "{name}");
    }
}
