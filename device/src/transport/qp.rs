//! A queue pair: what is set from outside, and the state of both halves.

use std::collections::VecDeque;

use protos::ib::{Gid, Mtu, Pkey, Psn, Qkey, Qpn, ServiceType};

use super::loan::Term;
use super::owner::{Asked, Path, QpId, Receive, Request, Status};
use super::packet::Packet;
use super::pool::Buffer;
use super::time::Time;

/// States of a queue pair (section 10.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub enum State {
    /// As created.
    Reset,
    /// Receive requests may be posted.
    Init,
    /// Ready to receive.
    Rtr,
    /// Ready to send.
    Rts,
    /// Send queue drains or is drained.
    Sqd,
    /// The send queue met an error (UC, UD).
    Sqe,
    /// Everything is flushed.
    Error,
}

/// What a queue pair is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Transport service. Both ends of XRC are `Xrc`.
    pub service: ServiceType,
    /// Owner's key.
    pub key: u32,
    /// Receive requests come from a queue that others use, too: it is not flushed with this queue pair.
    pub shared_receive: bool,
}

/// What `modify` sets; `None` leaves what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// The way to the connected queue pair. (Datagrams: only the port counts.)
    pub path: Option<Path>,
    /// Path MTU. (Datagrams: the port's.)
    pub mtu: Option<Mtu>,
    /// Connected queue pair.
    pub dest: Option<Qpn>,
    /// Sequence number of the next packet to send.
    pub send_psn: Option<Psn>,
    /// Sequence number that is expected first.
    pub receive_psn: Option<Psn>,
    /// Local ACK timeout, 4.096 us * 2^n; 0: never.
    pub timeout: Option<u8>,
    /// Retries without an answer, 0 to 7.
    pub retry_count: Option<u8>,
    /// Retries after RNR NAKs; 7: without end.
    pub rnr_retry: Option<u8>,
    /// Code of the RNR NAKs that are sent.
    pub min_rnr_timer: Option<u8>,
    /// Reads and atomics that may be outstanding.
    pub max_initiated: Option<u8>,
    /// Reads and atomics that are remembered for the other side.
    pub max_responded: Option<u8>,
    /// Queue key.
    pub qkey: Option<Qkey>,
    /// Partition.
    pub pkey: Option<Pkey>,
    /// Source queue pair number in datagrams, if it is not the queue pair's own (GSI's senders).
    pub deth_source: Option<Qpn>,
    /// Multicast packets of this adapter do not come back to it.
    pub block_loopback: Option<bool>,
}

/// What QUERY_QP asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct QpStatus {
    /// State.
    pub state: State,
    /// Draining: SQD, and something is outstanding.
    pub draining: bool,
    /// Sequence number of the next new packet.
    pub next_send_psn: Psn,
    /// Sequence number of the next packet expected.
    pub next_receive_psn: Psn,
    /// Requests begun and not completed.
    pub outstanding: usize,
    /// Index of the next request to fetch.
    pub next_index: u32,
}

/// A queue pair's inside.
#[derive(Debug)]
pub(super) struct Qp {
    pub(super) id: QpId,
    /// Its place in the table.
    pub(super) slot: u32,
    pub(super) service: ServiceType,
    pub(super) shared_receive: bool,
    pub(super) state: State,
    pub(super) set: Set,
    pub(super) send: Requester,
    pub(super) receive: Responder,
    /// In the list of those that have something to send.
    pub(super) send_listed: bool,
    /// In the list of those that have something to answer.
    pub(super) respond_listed: bool,
    /// The earliest entry of the timer heap that stands for this queue pair.
    pub(super) alarm: Option<Time>,
    /// Groups it is attached to.
    pub(super) groups: Vec<Gid>,
    /// Of what its requests lend.
    pub(super) term: Term,
}

/// Attributes as they stand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Set {
    pub(super) path: Path,
    pub(super) mtu: Mtu,
    pub(super) dest: Qpn,
    pub(super) timeout: u8,
    pub(super) retry_count: u8,
    pub(super) rnr_retry: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) max_initiated: u8,
    pub(super) max_responded: u8,
    pub(super) qkey: Qkey,
    pub(super) pkey: Pkey,
    pub(super) deth_source: Qpn,
    pub(super) block_loopback: bool,
}

/// A request that has been begun.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) request: Request,
    /// Its first packet.
    pub(super) psn: Psn,
    /// How many; 0: local.
    pub(super) packets: u32,
    /// Bytes of a READ that have come.
    pub(super) received: u32,
    /// Local, and done: not a second time when what is before it is sent again.
    pub(super) executed: bool,
    /// It has ended badly; told when everything before it has ended.
    pub(super) failed: Option<Status>,
}

/// Sending half.
#[derive(Debug)]
pub(super) struct Requester {
    /// Next request to fetch.
    pub(super) next_index: u32,
    /// Fetched, but something earlier must end first.
    pub(super) waiting: Option<Request>,
    /// Begun, oldest first.
    pub(super) outstanding: VecDeque<Entry>,
    /// The one in `outstanding` that is being sent; its length: none.
    pub(super) cursor: usize,
    /// Packets of that one which have been sent.
    pub(super) sent: u32,
    /// Next new packet.
    pub(super) next_psn: Psn,
    /// Oldest packet without acknowledgement.
    pub(super) unacknowledged: Psn,
    /// One after the highest packet ever sent.
    pub(super) high: Psn,
    /// Packets sent (of SENDs and WRITEs) and not acknowledged.
    pub(super) in_flight: u32,
    /// READs and ATOMICs in `outstanding`.
    pub(super) reads: u32,
    pub(super) retries: u8,
    pub(super) rnr_retries: u8,
    /// No answer by then: send again.
    pub(super) ack_deadline: Option<Time>,
    /// Not before then, after an RNR NAK.
    pub(super) rnr_until: Option<Time>,
    /// A response that was missed has been asked for again.
    pub(super) asked_again: Option<Psn>,
    /// Waits for a page ([`super::Side::Send`]).
    pub(super) parked: bool,
    /// What the resume said.
    pub(super) refused: Option<Status>,
    /// Payload that is gathered in part, or could not be sent.
    pub(super) filling: Option<(Buffer, u32)>,
    /// Responses behind one that waits for a page ([`super::Side::Response`]).
    pub(super) held: Held,
    /// SQD has been told that it is drained.
    pub(super) drained: bool,
    /// Packets before that carry bytes, as loans were called back.
    pub(super) lend_from: Option<Psn>,
}

/// Packets that wait for a page, in order. The first one has met it.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) packets: VecDeque<Packet>,
    /// Bytes of the first that are copied.
    pub(super) done: u32,
    /// More came than are held.
    pub(super) dropped: bool,
    /// What the resume said.
    pub(super) refused: Option<Status>,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.packets.clear();
        self.done = 0;
        self.dropped = false;
        self.refused = None;
    }
}

/// A message that is coming in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// None.
    None,
    /// A SEND.
    Send { offset: u32 },
    /// An RDMA WRITE.
    Write { at: Asked, len: u32, offset: u32 },
}

/// Something to send back, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Data of an RDMA READ.
    Read {
        psn: Psn,
        at: Asked,
        len: u32,
        sent: u32,
        msn: u32,
    },
    /// What an atomic found.
    Atomic { psn: Psn, original: u64, msn: u32 },
    /// Everything up to `psn` is done.
    Ack { psn: Psn, msn: u32 },
    /// Not done: it was lent, and is wanted with bytes.
    Recall { psn: Psn },
    /// Not done.
    Nak {
        psn: Psn,
        syndrome: protos::ib::Syndrome,
        msn: u32,
    },
}

impl Response {
    pub(super) fn psn(&self) -> Psn {
        match *self {
            Self::Read { psn, .. }
            | Self::Atomic { psn, .. }
            | Self::Ack { psn, .. }
            | Self::Recall { psn }
            | Self::Nak { psn, .. } => psn,
        }
    }
}

/// What was done for a READ or an ATOMIC, for its duplicates (section 9.4.4 and 9.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resource {
    pub(super) psn: Psn,
    pub(super) packets: u32,
    pub(super) kind: ResourceKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResourceKind {
    Read { at: Asked, len: u32 },
    Atomic { original: u64 },
}

/// Receiving half.
#[derive(Debug)]
pub(super) struct Responder {
    /// Next packet.
    pub(super) expected: Psn,
    /// Messages done.
    pub(super) msn: u32,
    pub(super) message: Message,
    /// Taken for the message (or kept from one that was lost, UC).
    pub(super) taken: Option<Receive>,
    /// The beginning of the packet at hand has been dealt with.
    pub(super) begun: bool,
    /// The missing packet has been asked for.
    pub(super) nak_sent: bool,
    pub(super) established: bool,
    /// A flush waits for a page of the receive queue.
    pub(super) flushing: bool,
    /// Requests behind one that waits for a page ([`super::Side::Receive`]).
    pub(super) held: Held,
    pub(super) responses: VecDeque<Response>,
    pub(super) resources: VecDeque<Resource>,
    /// Waits for a page ([`super::Side::Read`]).
    pub(super) read_parked: bool,
    pub(super) read_refused: Option<Status>,
    /// Data of a READ that is gathered in part, or could not be sent.
    pub(super) filling: Option<(Buffer, u32)>,
}

impl Set {
    fn new(qpn: Qpn) -> Self {
        Self {
            path: Path {
                port: 1,
                slid: protos::ib::Lid::NONE,
                dlid: protos::ib::Lid::NONE,
                sl: 0,
                global: None,
            },
            mtu: Mtu::B4096,
            dest: Qpn::default(),
            timeout: 0,
            retry_count: 7,
            rnr_retry: 7,
            min_rnr_timer: 0,
            max_initiated: 0,
            max_responded: 0,
            qkey: Qkey::default(),
            pkey: Pkey::DEFAULT,
            deth_source: qpn,
            block_loopback: false,
        }
    }
}

impl Requester {
    fn new() -> Self {
        Self {
            next_index: 0,
            waiting: None,
            outstanding: VecDeque::new(),
            cursor: 0,
            sent: 0,
            next_psn: Psn::default(),
            unacknowledged: Psn::default(),
            high: Psn::default(),
            in_flight: 0,
            reads: 0,
            retries: 0,
            rnr_retries: 0,
            ack_deadline: None,
            rnr_until: None,
            asked_again: None,
            parked: false,
            refused: None,
            filling: None,
            held: Held::default(),
            drained: false,
            lend_from: None,
        }
    }
}

impl Responder {
    fn new() -> Self {
        Self {
            expected: Psn::default(),
            msn: 0,
            message: Message::None,
            taken: None,
            begun: false,
            nak_sent: false,
            established: false,
            flushing: false,
            held: Held::default(),
            responses: VecDeque::new(),
            resources: VecDeque::new(),
            read_parked: false,
            read_refused: None,
            filling: None,
        }
    }
}

impl Qp {
    pub(super) fn new(qpn: Qpn, settings: &Settings) -> Self {
        Self {
            id: QpId {
                qpn,
                key: settings.key,
            },
            slot: 0,
            service: settings.service,
            shared_receive: settings.shared_receive,
            state: State::Reset,
            set: Set::new(qpn),
            send: Requester::new(),
            receive: Responder::new(),
            send_listed: false,
            respond_listed: false,
            alarm: None,
            groups: Vec::new(),
            term: Term::default(),
        }
    }

    /// As created; memory is kept.
    pub(super) fn reset(&mut self) {
        self.term.end();
        let outstanding = std::mem::take(&mut self.send.outstanding);
        let responses = std::mem::take(&mut self.receive.responses);
        let resources = std::mem::take(&mut self.receive.resources);
        self.set = Set::new(self.id.qpn);
        self.send = Requester {
            outstanding,
            ..Requester::new()
        };
        self.send.outstanding.clear();
        self.receive = Responder {
            responses,
            resources,
            ..Responder::new()
        };
        self.receive.responses.clear();
        self.receive.resources.clear();
        self.state = State::Reset;
    }

    pub(super) fn reliable(&self) -> bool {
        matches!(self.service, ServiceType::Rc | ServiceType::Xrc)
    }

    /// Packets from others are taken (section 10.3.1: RTR, RTS, SQD, SQE).
    pub(super) fn receives(&self) -> bool {
        matches!(self.state, State::Rtr | State::Rts | State::Sqd | State::Sqe)
    }

    pub(super) fn apply(&mut self, a: &Attributes) {
        let set = &mut self.set;
        macro_rules! take {
            ($($field:ident),*) => { $(if let Some(value) = a.$field { set.$field = value; })* };
        }
        take!(
            path,
            mtu,
            dest,
            timeout,
            retry_count,
            rnr_retry,
            min_rnr_timer,
            max_initiated,
            max_responded,
            qkey,
            pkey,
            deth_source,
            block_loopback
        );
        if let Some(psn) = a.send_psn {
            self.send.next_psn = psn;
            self.send.unacknowledged = psn;
            self.send.high = psn;
        }
        if let Some(psn) = a.receive_psn {
            self.receive.expected = psn;
        }
    }
}
