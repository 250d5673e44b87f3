//! Two transports on one thread, with an owner that keeps a log, and a link that tests can impair.

mod clauses;
mod dissected;
mod hostile;
mod over_fabric;
mod parks;
mod properties;
mod steady;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use protos::ib::{Lid, Mtu, Pkey, Psn, Qkey, Qpn, ServiceType};

use super::*;
use crate::fabric::{Dice, Impaired, Impairments};

/// One end of a cable. Packets can be cut as on a real one.
struct End {
    out: Rc<RefCell<VecDeque<Packet>>>,
    inn: Rc<RefCell<VecDeque<Packet>>>,
    pool: Pool,
    cut: bool,
    capacity: usize,
}

impl Link for End {
    fn transmit(&mut self, packet: Packet, _: Time) -> Result<(), Packet> {
        let mut out = self.out.borrow_mut();
        if out.len() >= self.capacity {
            return Err(packet);
        }
        if self.cut {
            packet.cut(&self.pool, |one| out.push_back(one));
        } else {
            out.push_back(packet);
        }
        Ok(())
    }
    fn receive(&mut self, _: Time) -> Option<Packet> {
        self.inn.borrow_mut().pop_front()
    }
}

fn cable(cut: bool) -> (End, End) {
    let (a, b) = (Rc::default(), Rc::default());
    let end = |out: &Rc<RefCell<VecDeque<Packet>>>, inn: &Rc<RefCell<VecDeque<Packet>>>| End {
        out: out.clone(),
        inn: inn.clone(),
        pool: Pool::default(),
        cut,
        capacity: 256,
    };
    (end(&a, &b), end(&b, &a))
}

/// A region that others may reach.
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    rights: &'static [Right],
}

const ALL: &[Right] = &[Right::Read, Right::Write, Right::Atomic];

/// A posted receive request.
#[derive(Clone, Copy)]
struct Posted {
    token: u64,
    start: u64,
    len: u64,
}

#[derive(Clone, Copy, Default)]
struct ParkPlan {
    /// Of 1000 calls, how many park.
    permille: u16,
    /// Only of this side, and not the fetch of a request.
    only: Option<Side>,
}

/// Memory, queues, and a log of everything.
struct Node {
    memory: Vec<u8>,
    requests: HashMap<Qpn, Vec<(Request, u64)>>,
    receives: HashMap<Qpn, VecDeque<Posted>>,
    shared: HashMap<u32, VecDeque<Posted>>,
    regions: HashMap<u32, Region>,
    taken: HashMap<u64, Posted>,
    sent: Vec<(Qpn, u32, Status)>,
    received: Vec<(Qpn, u64, Received)>,
    events: Vec<(Qpn, Event)>,
    executed: Vec<u32>,
    invalidated: Vec<u32>,
    /// The shared queues that questions about memory named.
    asked: Vec<Option<u32>>,
    atomics: u64,
    gathered: u64,
    dice: Dice,
    park: ParkPlan,
    parked: Vec<(Qpn, Side)>,
    fail_gather: Option<Status>,
}

impl Node {
    fn new(seed: u64) -> Self {
        Self {
            memory: vec![0; 4 << 20],
            requests: HashMap::new(),
            receives: HashMap::new(),
            shared: HashMap::new(),
            regions: HashMap::from([(
                7,
                Region {
                    start: 0,
                    len: 4 << 20,
                    rights: ALL,
                },
            )]),
            taken: HashMap::new(),
            sent: Vec::new(),
            received: Vec::new(),
            events: Vec::new(),
            executed: Vec::new(),
            invalidated: Vec::new(),
            asked: Vec::new(),
            atomics: 0,
            gathered: 0,
            dice: Dice::new(seed),
            park: ParkPlan::default(),
            parked: Vec::new(),
            fail_gather: None,
        }
    }

    /// Whether this call parks.
    fn parks(&mut self, qp: QpId, side: Side) -> bool {
        self.parks_again(qp, side, false)
    }

    /// As `parks`; a flush may ask `again` while an earlier question waits.
    fn parks_again(&mut self, qp: QpId, side: Side, again: bool) -> bool {
        assert!(
            again || !self.parked.contains(&(qp.qpn, side)),
            "{:?} {side:?} is asked while it is parked",
            qp.qpn
        );
        let meant = self.park.only.is_none_or(|only| only == side);
        let parks = meant && self.dice.permille(self.park.permille);
        if parks {
            self.parked.push((qp.qpn, side));
        }
        parks
    }

    fn copy_in(&mut self, qp: QpId, side: Side, at: u64, data: &[u8]) -> Answer {
        if self.parks(qp, side) {
            let done = self.dice.below(data.len() as u64) as usize;
            self.memory[at as usize..][..done].copy_from_slice(&data[..done]);
            return Answer::Parked { done: done as u32 };
        }
        self.memory[at as usize..][..data.len()].copy_from_slice(data);
        Answer::Done(())
    }

    fn copy_out(&mut self, qp: QpId, side: Side, at: u64, into: &mut [u8]) -> Answer {
        if self.parks(qp, side) {
            let done = self.dice.below(into.len() as u64) as usize;
            into[..done].copy_from_slice(&self.memory[at as usize..][..done]);
            return Answer::Parked { done: done as u32 };
        }
        into.copy_from_slice(&self.memory[at as usize..][..into.len()]);
        Answer::Done(())
    }

    fn allowed(&self, right: Right, at: Remote, len: u64) -> Option<Status> {
        let region = self.regions.get(&at.rkey);
        let inside = region.is_some_and(|r| {
            r.rights.contains(&right)
                && at.va >= r.start
                && at.va.checked_add(len).is_some_and(|end| end <= r.start + r.len)
        });
        (!inside).then_some(Status::RemoteAccess)
    }

    fn local(&self, qp: QpId, request: &Request) -> u64 {
        self.requests[&qp.qpn][request.index as usize].1
    }
}

impl Owner for Node {
    fn fetch(&mut self, qp: QpId, index: u32) -> Answer<Option<Request>> {
        if self.park.only.is_none() && self.parks_again(qp, Side::Send, true) {
            return Answer::Parked { done: 0 };
        }
        let request = self
            .requests
            .get(&qp.qpn)
            .and_then(|list| list.get(index as usize));
        Answer::Done(request.map(|(request, _)| *request))
    }
    fn gather(&mut self, qp: QpId, request: &Request, offset: u32, into: &mut [u8]) -> Answer {
        assert!(
            offset as usize + into.len() <= request.len as usize,
            "gather past the end"
        );
        if let Some(status) = self.fail_gather {
            return Answer::Failed(status);
        }
        self.gathered += into.len() as u64;
        let at = self.local(qp, request) + u64::from(offset);
        self.copy_out(qp, Side::Send, at, into)
    }
    fn scatter_response(&mut self, qp: QpId, request: &Request, offset: u32, data: &[u8]) -> Answer {
        let at = self.local(qp, request) + u64::from(offset);
        self.copy_in(qp, Side::Response, at, data)
    }
    fn execute(&mut self, qp: QpId, request: &Request) -> Answer {
        if self.parks(qp, Side::Send) {
            return Answer::Parked { done: 0 };
        }
        self.executed.push(request.index);
        Answer::Done(())
    }
    fn complete_send(&mut self, qp: QpId, request: &Request, status: Status) {
        self.sent.push((qp.qpn, request.index, status));
    }
    fn take_receive(&mut self, qp: QpId, xrc_srqn: Option<u32>) -> Answer<Option<Receive>> {
        if self.parks_again(qp, Side::Receive, true) {
            return Answer::Parked { done: 0 };
        }
        let queue = match xrc_srqn {
            Some(number) => self.shared.get_mut(&number),
            None => self.receives.get_mut(&qp.qpn),
        };
        let Some(posted) = queue.and_then(VecDeque::pop_front) else {
            return Answer::Done(None);
        };
        self.taken.insert(posted.token, posted);
        Answer::Done(Some(Receive { token: posted.token }))
    }
    fn scatter_receive(&mut self, qp: QpId, receive: &Receive, offset: u32, data: &[u8]) -> Answer {
        let posted = self.taken[&receive.token];
        if u64::from(offset) + data.len() as u64 > posted.len {
            return Answer::Failed(Status::LocalLength);
        }
        self.copy_in(qp, Side::Receive, posted.start + u64::from(offset), data)
    }
    fn complete_receive(&mut self, qp: QpId, receive: &Receive, received: &Received) {
        assert!(
            self.taken.remove(&receive.token).is_some(),
            "completed but not taken"
        );
        self.received.push((qp.qpn, receive.token, *received));
    }
    fn remote_check(&mut self, qp: QpId, right: Right, asked: Asked, len: u32) -> Answer {
        if self.parks(qp, Side::Receive) {
            return Answer::Parked { done: 0 };
        }
        self.asked.push(asked.xrc_srqn);
        self.allowed(right, asked.at, u64::from(len))
            .map_or(Answer::Done(()), Answer::Failed)
    }
    fn remote_write(&mut self, qp: QpId, Asked { at, xrc_srqn }: Asked, data: &[u8]) -> Answer {
        self.asked.push(xrc_srqn);
        match self.allowed(Right::Write, at, data.len() as u64) {
            Some(status) => Answer::Failed(status),
            None => self.copy_in(qp, Side::Receive, at.va, data),
        }
    }
    fn remote_read(&mut self, qp: QpId, Asked { at, xrc_srqn }: Asked, into: &mut [u8]) -> Answer {
        self.asked.push(xrc_srqn);
        match self.allowed(Right::Read, at, into.len() as u64) {
            Some(status) => Answer::Failed(status),
            None => self.copy_out(qp, Side::Read, at.va, into),
        }
    }
    fn remote_atomic(&mut self, qp: QpId, Asked { at, xrc_srqn }: Asked, atomic: Atomic) -> Answer<u64> {
        if self.parks(qp, Side::Receive) {
            return Answer::Parked { done: 0 };
        }
        self.asked.push(xrc_srqn);
        if !at.va.is_multiple_of(8) {
            return Answer::Failed(Status::RemoteInvalidRequest);
        }
        if let Some(status) = self.allowed(Right::Atomic, at, 8) {
            return Answer::Failed(status);
        }
        self.atomics += 1;
        let word = &mut self.memory[at.va as usize..][..8];
        let old = u64::from_le_bytes(word.try_into().unwrap());
        let new = match atomic {
            Atomic::FetchAdd { add } => old.wrapping_add(add),
            Atomic::CompareSwap { compare, swap } if old == compare => swap,
            Atomic::CompareSwap { .. } => old,
        };
        word.copy_from_slice(&new.to_le_bytes());
        Answer::Done(old)
    }
    fn invalidate(&mut self, qp: QpId, rkey: u32, xrc_srqn: Option<u32>) -> Answer {
        if self.parks(qp, Side::Receive) {
            return Answer::Parked { done: 0 };
        }
        self.asked.push(xrc_srqn);
        self.invalidated.push(rkey);
        Answer::Done(())
    }
    fn event(&mut self, qp: QpId, event: Event) {
        self.events.push((qp.qpn, event));
    }
}

/// A transport with its node and its end of the cable.
struct Side2 {
    transport: Transport,
    node: Node,
    link: Impaired<End>,
    lid: Lid,
}

/// Two sides.
struct Pair {
    a: Side2,
    b: Side2,
    now: Time,
}

#[derive(Clone, Copy)]
struct Options {
    service: ServiceType,
    impairments: Impairments,
    seed: u64,
    cut: bool,
    mtu: Mtu,
    park: u16,
    psn: u32,
    retry_count: u8,
    rnr_retry: u8,
    config: Config,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service: ServiceType::Rc,
            impairments: Impairments::default(),
            seed: 1,
            cut: false,
            mtu: Mtu::B1024,
            park: 0,
            // Numbers wrap around soon.
            psn: 0xff_fff0,
            retry_count: 7,
            rnr_retry: 7,
            config: Config::default(),
        }
    }
}

const QP: Qpn = Qpn::new(0x40);

fn qpn(number: u32) -> Qpn {
    Qpn::new(number)
}

impl Pair {
    fn new(options: Options) -> Self {
        let (a, b) = cable(options.cut);
        let side = |end, lid, seed: u64| {
            let mut node = Node::new(options.seed ^ seed);
            node.park.permille = options.park;
            Side2 {
                transport: Transport::new(options.config),
                node,
                link: Impaired::new(end, options.impairments, options.seed.wrapping_mul(31) + seed),
                lid: Lid(lid),
            }
        };
        Self {
            a: side(a, 5, 1),
            b: side(b, 6, 2),
            now: Time(1_000_000),
        }
    }

    /// With one pair of queue pairs, ready to send.
    fn connected(options: Options) -> Self {
        let mut pair = Self::new(options);
        pair.connect(QP, QP, options);
        pair
    }

    fn connect(&mut self, a: Qpn, b: Qpn, options: Options) {
        let (lid_a, lid_b) = (self.a.lid, self.b.lid);
        for (side, own, other, dlid, first, expected) in [
            (&mut self.a, a, b, lid_b, options.psn, options.psn + 77),
            (&mut self.b, b, a, lid_a, options.psn + 77, options.psn),
        ] {
            let settings = Settings {
                service: options.service,
                key: own.get(),
                shared_receive: options.service == ServiceType::Xrc,
            };
            side.transport.create(own, &settings).unwrap();
            let attributes = Attributes {
                path: Some(Path {
                    port: 1,
                    slid: side.lid,
                    dlid,
                    sl: 0,
                    global: None,
                }),
                mtu: Some(options.mtu),
                dest: Some(other),
                send_psn: Some(Psn::new(first)),
                receive_psn: Some(Psn::new(expected)),
                timeout: Some(12),
                retry_count: Some(options.retry_count),
                rnr_retry: Some(options.rnr_retry),
                min_rnr_timer: Some(1),
                max_initiated: Some(4),
                max_responded: Some(4),
                qkey: Some(Qkey(0x11)),
                pkey: Some(Pkey::DEFAULT),
                deth_source: None,
                block_loopback: None,
            };
            for state in [State::Init, State::Rtr, State::Rts] {
                side.transport
                    .modify(own, state, &attributes, &mut side.node)
                    .unwrap();
            }
        }
    }

    /// Polls both sides until nothing is to be done at this moment.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 1_000_000, "no end of work at {:?}", self.now);
            let mut again = false;
            for side in [&mut self.a, &mut self.b] {
                for (qpn, which) in std::mem::take(&mut side.node.parked) {
                    side.transport.resume(qpn, which, Ok(()));
                }
                again |= side
                    .transport
                    .poll(self.now, &mut side.node, &mut side.link)
                    .again;
                again |= !side.node.parked.is_empty();
            }
            if !again {
                return;
            }
        }
    }

    /// The next moment at which anything is due.
    fn next(&self) -> Option<Time> {
        [
            self.a.transport.poll_at(),
            self.b.transport.poll_at(),
            self.a.link.poll_at(),
            self.b.link.poll_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Lets time pass until nothing is due within `limit`.
    fn run(&mut self, limit: Duration) {
        let end = self.now + limit;
        loop {
            self.settle();
            match self.next() {
                Some(next) if next <= end => self.now = Time(next.0.max(self.now.0 + 1)),
                _ => return,
            }
        }
    }

    fn run_all(&mut self) {
        self.run(Duration::from_secs(3600));
    }
}

impl Side2 {
    /// Posts a request; its index.
    fn post(&mut self, qpn: Qpn, action: Action, local: u64, len: u32) -> u32 {
        self.post_with(qpn, action, local, len, |_| {})
    }

    fn post_with(
        &mut self,
        qpn: Qpn,
        action: Action,
        local: u64,
        len: u32,
        change: impl FnOnce(&mut Request),
    ) -> u32 {
        let list = self.node.requests.entry(qpn).or_default();
        let index = list.len() as u32;
        let mut request = Request::new(index, action, len);
        change(&mut request);
        list.push((request, local));
        self.transport.ring(qpn);
        index
    }

    fn receive(&mut self, qpn: Qpn, token: u64, start: u64, len: u64) {
        self.node
            .receives
            .entry(qpn)
            .or_default()
            .push_back(Posted { token, start, len });
    }

    fn statuses(&self) -> Vec<Status> {
        self.node.sent.iter().map(|(_, _, status)| *status).collect()
    }
}

fn at(va: u64) -> Remote {
    Remote { rkey: 7, va }
}

/// Bytes that say where they come from.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    (0..len.div_ceil(8))
        .flat_map(|_| dice.roll().to_le_bytes())
        .take(len)
        .collect()
}
