//! What the transport asks of this HCA: WQEs, memory through keys, completions.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use protos::ib::Qpn;
use protos::mlx5::cq::{Cqe, CqeOpcode, FLAGS_GRH, FLAGS_SL_SHIFT, Syndrome};
use protos::mlx5::eq::{DATA_NUMBER, DATA_QUEUE_TYPE, Eqe, Event as EventType};
use protos::mlx5::mkey::Mkc;
use protos::mlx5::qp::{Qpc, ServiceType};
use protos::mlx5::wqe::{BLOCK, Control, Opcode, SEGMENT};
use protos::mlx5::{Layout, uar};
use zerocopy::FromBytes;

use super::access::{self, Bytes, Trouble};
use super::cq::{Cq, Posted};
use super::faults::Waiter;
use super::hardware::Hca;
use super::lending::{self, Borrowed, Desk};
use super::memory::Port;
use super::mkey::{Asker, Mkey, Right as KeyRight};
use super::port::PortView;
use super::qp::Qp;
use super::shard::Failed;
use super::srq::Srq;
use super::umr::{self, Source, Umr};
use super::wqe::{self, Piece, Pieces};
use crate::transport::{
    Answer, Asked, Atomic, Event, Lender, Lent, Loan, Owner, Pulled, QpId, Receive, Received, Request, Right,
    Side, Status, Target,
};

/// Types of queues in events (`DATA_QUEUE_TYPE`), in the upper byte.
const QUEUE_TYPE_QP: u32 = 0;
const QUEUE_TYPE_SRQ: u32 = 3 << 24;
/// Bit of a receive's token: it came from a shared queue, which the queue pair remembers.
const SHARED: u64 = 1 << 63;

/// The queue pairs of a shard, by the key that the transport has of them.
pub(super) type Qps = Vec<Option<Box<Qp>>>;

/// A shard's side of its transport.
pub(super) struct ShardOwner<'a> {
    pub(super) hca: &'a Hca,
    pub(super) port: &'a mut Port,
    pub(super) qps: &'a mut Qps,
    /// What others see of the memory that is lent to them.
    pub(super) desk: &'a Arc<Desk>,
    /// Queue pairs that have ended a request with an error: their receive queues may have to be flushed later.
    pub(super) failed: &'a mut Failed,
}

/// A queue pair that the transport knows.
fn find(qps: &mut Qps, qp: QpId) -> &mut Qp {
    qps[qp.key as usize]
        .as_deref_mut()
        .expect("the transport knows only queue pairs that exist")
}

/// The syndrome of a status.
fn syndrome(status: Status) -> Syndrome {
    match status {
        Status::Success => Syndrome(0),
        Status::LocalLength => Syndrome::LOCAL_LENGTH,
        Status::LocalOperation => Syndrome::LOCAL_QP_OPERATION,
        Status::LocalProtection => Syndrome::LOCAL_PROTECTION,
        Status::Flushed => Syndrome::FLUSHED,
        Status::WindowBind => Syndrome::MW_BIND,
        Status::BadResponse => Syndrome::BAD_RESPONSE,
        Status::RemoteInvalidRequest => Syndrome::REMOTE_INVALID_REQUEST,
        Status::RemoteAccess => Syndrome::REMOTE_ACCESS,
        Status::RemoteOperation => Syndrome::REMOTE_OPERATION,
        Status::RetryExceeded => Syndrome::TRANSPORT_RETRY,
        Status::RnrRetryExceeded => Syndrome::RNR_RETRY,
    }
}

impl ShardOwner<'_> {
    /// Reads the WQE at block `index` into the queue pair's copy, if it is not the one that is there.
    fn load(&mut self, qp: QpId, index: u32) -> Result<(), Status> {
        let qp = find(self.qps, qp);
        if qp.wqe.index == Some(index) {
            return Ok(());
        }
        qp.wqe.index = None;
        let queues = qp.queues.as_ref().ok_or(Status::LocalOperation)?;
        let log = queues.log_blocks.ok_or(Status::LocalOperation)?;
        let (mask, begin) = ((1u32 << log) - 1, queues.sends());
        let mut block = |block: u32, to: &mut [u8]| {
            let offset = begin + u64::from(block & mask) * BLOCK as u64;
            queues
                .buffer
                .read(self.port, offset, to)
                .map_err(|_| Status::LocalOperation)
        };
        let bytes = &mut qp.wqe.bytes;
        bytes.resize(BLOCK, 0);
        block(index, &mut bytes[..])?;
        let control = Control::read_from_prefix(bytes).expect("a block has a head").0;
        let len = control.ds() * SEGMENT;
        // The list may wrap, block by block.
        let blocks = len.div_ceil(BLOCK).max(1);
        bytes.resize(blocks * BLOCK, 0);
        for number in 1..blocks {
            block(
                index.wrapping_add(number as u32),
                &mut bytes[number * BLOCK..(number + 1) * BLOCK],
            )?;
        }
        bytes.truncate(len.max(SEGMENT));
        // Only datagrams say themselves where they go.
        let view = if wqe::is_datagram(qp.service) {
            self.hca.port_view()
        } else {
            PortView::NOWHERE
        };
        qp.wqe.parsed = wqe::parse(bytes, index, qp.service, &view);
        qp.wqe.index = Some(index);
        Ok(())
    }

    /// Copies bytes `offset..` of a message from or to the pieces of a WQE.
    fn pieces(
        &mut self,
        side: Side,
        asker: Asker,
        wqe: &[u8],
        pieces: Pieces<'_>,
        mut offset: u64,
        mut bytes: Bytes<'_>,
    ) -> Answer {
        let right = match bytes {
            Bytes::Into(_) => KeyRight::LocalRead,
            Bytes::From(_) | Bytes::Lent(_) => KeyRight::LocalWrite,
        };
        let total = bytes.len();
        let mut done = 0;
        for piece in pieces {
            if done == total {
                break;
            }
            let len = piece.len();
            if offset >= len {
                offset -= len;
                continue;
            }
            let step = usize::try_from(len - offset).map_or(total - done, |left| left.min(total - done));
            match piece {
                Piece::Inline { at, .. } => {
                    let at = at + offset as usize;
                    let Bytes::Into(to) = &mut bytes else {
                        return Answer::Failed(Status::LocalProtection);
                    };
                    to[done..done + step].copy_from_slice(&wqe[at..at + step]);
                }
                Piece::Memory { lkey, va, .. } => {
                    let at = va.wrapping_add(offset);
                    let mkey = self.hca.mkeys.find(lkey);
                    // A receive request may name more than its key covers, as long as no message reaches that.
                    let Some(mkey) = mkey.filter(|mkey| mkey.allows(asker, at, step as u64, right)) else {
                        return Answer::Failed(Status::LocalProtection);
                    };
                    let mut part = bytes.part(done, step);
                    if let Err(trouble) = access::copy(self.port, &self.hca.mkeys, &mkey, at, &mut part) {
                        return self.absent(asker.qpn, side, trouble.after(done), Status::LocalProtection);
                    }
                }
            }
            done += step;
            offset = 0;
        }
        if done == total {
            Answer::Done(())
        } else {
            Answer::Failed(Status::LocalLength)
        }
    }

    fn note(&mut self, qpn: u32, status: Status) {
        if status != Status::Success {
            self.failed.add(qpn);
        }
    }

    fn post(&mut self, cq: Option<Arc<Cq>>, cqe: &Cqe, solicited: bool) {
        let Some(cq) = cq else {
            return;
        };
        self.hca.counters.completions.fetch_add(1, Ordering::Relaxed);
        let mut cqe = *cqe;
        if cqe.syndrome().is_none() {
            cqe.timestamp = self.hca.iseg.ticks().into();
        }
        // (A clock is read for a completion only where moderation begins to wait.)
        let now = || self.hca.now();
        match cq.post(self.port, &self.hca.interrupts, &cqe, solicited, now) {
            Posted::Yes => {}
            Posted::Moderated => self.hca.shard(cq.cqn).moderate(cq.cqn),
            Posted::Overflow => {
                let eqe = Eqe::new(EventType::CQ_ERROR, 0)
                    .with(0, cq.cqn)
                    .with(2, u32::from(CQ_OVERRUN));
                self.hca.event(self.port, EventType::CQ_ERROR, &eqe);
            }
        }
    }

    /// The shared queue that an XRC packet names, if it is of the queue pair's XRC domain (annex A14).
    fn xrc_target(&mut self, qp: QpId, srqn: u32) -> Result<Arc<Srq>, Status> {
        let domain = find(self.qps, qp).context.get(Qpc::XRCD);
        let srq = self.hca.objects.srq(srqn);
        srq.filter(|srq| srq.xrc.is_some_and(|(own, _)| own == domain))
            .ok_or(Status::RemoteInvalidRequest)
    }

    /// In whose name the other side asks for memory: an XRC queue pair's own protection domain is nobody's; that of
    /// the shared queue which the packet names counts.
    fn remote_asker(&mut self, qp: QpId, xrc_srqn: Option<u32>) -> Result<Asker, Status> {
        let target = xrc_srqn.map(|srqn| self.xrc_target(qp, srqn)).transpose()?;
        let qp = find(self.qps, qp);
        Ok(Asker {
            pd: target.map_or(qp.pd, |srq| srq.pd),
            qpn: qp.qpn,
        })
    }

    /// The key for an access from outside.
    fn remote_key(&mut self, qp: QpId, right: Right, asked: Asked, len: u64) -> Result<Arc<Mkey>, Status> {
        let asker = self.remote_asker(qp, asked.xrc_srqn)?;
        let (qp, at) = (find(self.qps, qp), asked.at);
        let (flag, wanted) = match right {
            Right::Read => (Qpc::RRE, KeyRight::RemoteRead),
            Right::Write => (Qpc::RWE, KeyRight::RemoteWrite),
            Right::Atomic => (Qpc::RAE, KeyRight::Atomic),
        };
        if !qp.context.is_set(flag) {
            return Err(Status::RemoteAccess);
        }
        let mkey = self.hca.mkeys.find(at.rkey).ok_or(Status::RemoteAccess)?;
        if mkey.allows(asker, at.va, len, wanted) {
            Ok(mkey)
        } else {
            Err(Status::RemoteAccess)
        }
    }

    /// Memory could not be had: the side waits for the page if there is one to wait for, else the request ends so.
    fn absent<T>(&mut self, qpn: u32, side: Side, trouble: Trouble, refused: Status) -> Answer<T> {
        let waiter = Waiter { qpn, side, refused };
        match trouble {
            Trouble::Absent { done, missing } if self.hca.page_fault(self.port, missing, waiter) => {
                Answer::Parked { done: done as u32 }
            }
            Trouble::Absent { .. } | Trouble::Violation => Answer::Failed(refused),
        }
    }

    fn remote_copy(&mut self, qp: QpId, right: Right, asked: Asked, mut bytes: Bytes<'_>) -> Answer {
        let mkey = match self.remote_key(qp, right, asked, bytes.len() as u64) {
            Ok(mkey) => mkey,
            Err(status) => return Answer::Failed(status),
        };
        match access::copy(self.port, &self.hca.mkeys, &mkey, asked.at.va, &mut bytes) {
            Ok(()) => Answer::Done(()),
            Err(trouble) => {
                let side = if right == Right::Read {
                    Side::Read
                } else {
                    Side::Receive
                };
                self.absent(qp.qpn.get(), side, trouble, Status::RemoteAccess)
            }
        }
    }

    fn srq_event(&mut self, event: EventType, srqn: u32) {
        let eqe = Eqe::new(event, 0)
            .with(DATA_QUEUE_TYPE, QUEUE_TYPE_SRQ)
            .with(DATA_NUMBER, srqn);
        self.hca.event(self.port, event, &eqe);
    }
}

/// Syndrome of a CQ error event: overrun.
const CQ_OVERRUN: u8 = 1;

impl Owner for ShardOwner<'_> {
    fn fetch(&mut self, id: QpId, index: u32) -> Answer<Option<Request>> {
        let qp = find(self.qps, id);
        if qp
            .queues
            .as_ref()
            .is_none_or(|queues| queues.log_blocks.is_none())
        {
            // An XRC target sends nothing, and the driver gives it no doorbell record.
            return Answer::Done(None);
        }
        if qp.posted == index as u16 {
            // Read only when it matters: the record is a line that the driver writes.
            let Ok(word) = self.port.read_be32(qp.dbr.wrapping_add(uar::DBR_SEND)) else {
                return Answer::Failed(Status::LocalOperation);
            };
            qp.posted = word as u16;
            if qp.posted == index as u16 {
                return Answer::Done(None);
            }
        }
        if let Err(status) = self.load(id, index) {
            return Answer::Failed(status);
        }
        match &find(self.qps, id).wqe.parsed {
            Some(parsed) => Answer::Done(Some(parsed.request)),
            None => Answer::Failed(Status::LocalOperation),
        }
    }

    fn gather(&mut self, id: QpId, request: &Request, offset: u32, into: &mut [u8]) -> Answer {
        self.message(id, Side::Send, request, offset, Bytes::Into(into))
    }

    fn lend(&mut self, id: QpId, request: &Request, offset: u32, len: u32) -> Option<Lent> {
        self.load(id, request.index).ok()?;
        let qp = find(self.qps, id);
        let asker = Asker {
            pd: qp.pd,
            qpn: qp.qpn,
        };
        let data = qp.wqe.parsed.as_ref()?.data;
        let mut offset = u64::from(offset);
        for piece in Pieces::of_send(&qp.wqe.bytes, data) {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let Piece::Memory { lkey, va, .. } = piece else {
                return None;
            };
            if piece.len() - offset < u64::from(len) {
                return None;
            }
            let va = va.wrapping_add(offset);
            let mkey = self.hca.mkeys.find(lkey)?;
            if !mkey.allows(asker, va, u64::from(len), KeyRight::LocalRead) {
                return None;
            }
            return Some(Lent {
                lender: Arc::clone(self.desk) as Arc<dyn Lender>,
                place: lending::place(&mkey, va)?,
            });
        }
        None
    }

    fn scatter_response(&mut self, id: QpId, request: &Request, offset: u32, data: &[u8]) -> Answer {
        self.message(id, Side::Response, request, offset, Bytes::From(data))
    }

    fn execute(&mut self, id: QpId, request: &Request) -> Answer {
        if let Err(status) = self.load(id, request.index) {
            return Answer::Failed(status);
        }
        let qp = find(self.qps, id);
        let opcode = Opcode((request.cookie >> wqe::OPCODE_SHIFT) as u8);
        let malformed = qp.wqe.parsed.as_ref().is_none_or(|parsed| parsed.malformed);
        match opcode {
            _ if malformed => Answer::Failed(Status::LocalOperation),
            Opcode::NOP => Answer::Done(()),
            Opcode::UMR => self.register(id),
            _ => Answer::Failed(Status::LocalOperation),
        }
    }

    fn complete_send(&mut self, id: QpId, request: &Request, status: Status) {
        let qp = find(self.qps, id);
        qp.sent = request.next as u16;
        if status == Status::Success && request.cookie & wqe::WANTS_CQE == 0 {
            return;
        }
        let opcode = request.cookie >> wqe::OPCODE_SHIFT & 0xff;
        let counter = request.index as u16;
        let mut cqe = if status == Status::Success {
            Cqe::new(CqeOpcode::REQUESTER, qp.qpn, counter)
        } else {
            Cqe::error(CqeOpcode::REQUESTER_ERROR, qp.qpn, counter, syndrome(status), 0)
        };
        cqe.sop_drop_qpn = (opcode << 24 | qp.qpn).into();
        cqe.byte_cnt = request.len.into();
        let (cq, qpn) = (qp.send_cq.clone(), qp.qpn);
        self.note(qpn, status);
        self.post(cq, &cqe, false);
    }

    fn take_receive(&mut self, id: QpId, xrc_srqn: Option<u32>) -> Answer<Option<Receive>> {
        let srq = match xrc_srqn {
            Some(srqn) => match self.xrc_target(id, srqn) {
                Ok(srq) => Some(srq),
                Err(status) => return Answer::Failed(status),
            },
            None => find(self.qps, id).srq.clone(),
        };
        if let Some(srq) = srq {
            return match srq.take(self.port) {
                Ok(None) => Answer::Done(None),
                Ok(Some(taken)) => {
                    if taken.limit_reached {
                        self.srq_event(EventType::SRQ_LIMIT, srq.srqn);
                    }
                    // (Kept by itself: its number may be another queue's before the message ends.)
                    find(self.qps, id).taken_from = Some(srq);
                    Answer::Done(Some(Receive {
                        token: SHARED | u64::from(taken.index),
                    }))
                }
                Err(_) => {
                    self.srq_event(EventType::SRQ_CATASTROPHIC, srq.srqn);
                    Answer::Failed(Status::RemoteOperation)
                }
            };
        }
        let qp = find(self.qps, id);
        if qp
            .queues
            .as_ref()
            .is_none_or(|queues| queues.log_receives.is_none())
        {
            return Answer::Done(None);
        }
        let Ok(posted) = self.port.read_be32(qp.dbr.wrapping_add(uar::DBR_RECEIVE)) else {
            return Answer::Failed(Status::RemoteOperation);
        };
        if posted as u16 == qp.received {
            return Answer::Done(None);
        }
        let token = u64::from(qp.received);
        qp.received = qp.received.wrapping_add(1);
        Answer::Done(Some(Receive { token }))
    }

    fn scatter_receive(&mut self, id: QpId, receive: &Receive, offset: u32, data: &[u8]) -> Answer {
        self.receive(id, receive, offset, Bytes::From(data))
    }

    fn complete_receive(&mut self, id: QpId, receive: &Receive, received: &Received) {
        self.note(id.qpn.get(), received.status);
        let qp = find(self.qps, id);
        let shared = qp.taken_from.take().filter(|_| receive.token & SHARED != 0);
        if shared.as_ref().is_some_and(|srq| srq.is_destroyed()) {
            // The driver does not know the request any more.
            return;
        }
        let counter = receive.token as u16;
        let opcode = match (received.write, received.immediate, received.invalidated) {
            (true, ..) => CqeOpcode::RESPONDER_WRITE_IMM,
            (_, Some(_), _) => CqeOpcode::RESPONDER_SEND_IMM,
            (_, _, Some(_)) => CqeOpcode::RESPONDER_SEND_INVALIDATE,
            _ => CqeOpcode::RESPONDER_SEND,
        };
        let mut cqe = if received.status == Status::Success {
            Cqe::new(opcode, qp.qpn, counter)
        } else {
            Cqe::error(
                CqeOpcode::RESPONDER_ERROR,
                qp.qpn,
                counter,
                syndrome(received.status),
                0,
            )
        };
        if let Some(srq) = &shared {
            cqe.srqn_uidx = srq.srqn.into();
        }
        if received.status == Status::Success {
            let source = received.source;
            cqe.byte_cnt = received.len.into();
            cqe.slid = source.slid.0.into();
            let mut flags = source.qpn.get() | u32::from(source.sl) << FLAGS_SL_SHIFT;
            if source.global {
                flags |= FLAGS_GRH;
            }
            cqe.flags_rqpn = flags.into();
            cqe.ml_path = (source.dlid.0 & 0x7f) as u8;
            let word = received
                .immediate
                .or(received.invalidated)
                .unwrap_or(u32::from(source.pkey.0));
            cqe.imm_inval_pkey = word.into();
        }
        let cq = match shared.and_then(|srq| srq.xrc) {
            Some((_, cqn)) => self.hca.objects.cq(cqn),
            None => qp.receive_cq.clone(),
        };
        self.post(cq, &cqe, received.solicited);
    }

    fn remote_check(&mut self, id: QpId, right: Right, asked: Asked, len: u32) -> Answer {
        match self.remote_key(id, right, asked, u64::from(len)) {
            Ok(_) => Answer::Done(()),
            Err(status) => Answer::Failed(status),
        }
    }

    fn remote_write(&mut self, id: QpId, asked: Asked, data: &[u8]) -> Answer {
        self.remote_copy(id, Right::Write, asked, Bytes::From(data))
    }

    fn pull(&mut self, id: QpId, to: Target<'_>, loan: &Loan, from: u32) -> Pulled {
        let gone = Cell::new(false);
        let from = from as usize;
        let bytes = Bytes::Lent(Borrowed {
            loan,
            from,
            len: loan.len() - from,
            gone: &gone,
        });
        let answer = match to {
            Target::Write(asked) => self.remote_copy(id, Right::Write, asked, bytes),
            Target::Receive(receive, offset) => self.receive(id, receive, offset, bytes),
        };
        if gone.get() {
            Pulled::Gone
        } else {
            Pulled::Answer(answer)
        }
    }

    fn remote_read(&mut self, id: QpId, asked: Asked, into: &mut [u8]) -> Answer {
        self.remote_copy(id, Right::Read, asked, Bytes::Into(into))
    }

    fn remote_atomic(&mut self, id: QpId, asked: Asked, atomic: Atomic) -> Answer<u64> {
        if !asked.at.va.is_multiple_of(8) {
            return Answer::Failed(Status::RemoteInvalidRequest);
        }
        let mkey = match self.remote_key(id, Right::Atomic, asked, 8) {
            Ok(mkey) => mkey,
            Err(status) => return Answer::Failed(status),
        };
        let operate = |word: &std::sync::atomic::AtomicU64| match atomic {
            Atomic::CompareSwap { compare, swap } => word
                .compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst)
                .unwrap_or_else(|found| found),
            Atomic::FetchAdd { add } => word.fetch_add(add, Ordering::SeqCst),
        };
        match access::atomic(self.port, &self.hca.mkeys, &mkey, asked.at.va, operate) {
            Ok(before) => Answer::Done(before),
            // Nothing has been done to the word: the operation is made once, when its page is there.
            Err(trouble) => self.absent(id.qpn.get(), Side::Receive, trouble, Status::RemoteAccess),
        }
    }

    fn invalidate(&mut self, id: QpId, rkey: u32, xrc_srqn: Option<u32>) -> Answer {
        let asker = match self.remote_asker(id, xrc_srqn) {
            Ok(asker) => asker,
            Err(status) => return Answer::Failed(status),
        };
        let mkey = self.hca.mkeys.find(rkey);
        let allowed = mkey.filter(|mkey| {
            mkey.context.is_set(Mkc::REMOTE_INVALIDATE) && mkey.context.get(Mkc::PD) == asker.pd
        });
        let Some(mkey) = allowed else {
            return Answer::Failed(Status::RemoteAccess);
        };
        let context = umr::invalidated(&mkey);
        match self.hca.mkeys.change(&self.hca.atc, &mkey, Some(context), 0, &[]) {
            Ok(()) => Answer::Done(()),
            Err(_) => Answer::Failed(Status::RemoteAccess),
        }
    }

    fn event(&mut self, id: QpId, event: Event) {
        let kind = match event {
            Event::CommunicationEstablished => EventType::COMM_EST,
            Event::SendQueueDrained => EventType::SQ_DRAINED,
            Event::LastWqeReached => EventType::SRQ_LAST_WQE,
            Event::InvalidRequest => EventType::WQ_INVALID_REQUEST,
            Event::AccessViolation => EventType::WQ_ACCESS_ERROR,
            Event::Fatal => EventType::WQ_CATASTROPHIC,
            // Its completions say why.
            Event::SendError => return,
        };
        let qpn = Qpn::get(id.qpn);
        let eqe = Eqe::new(kind, 0)
            .with(DATA_QUEUE_TYPE, QUEUE_TYPE_QP)
            .with(DATA_NUMBER, qpn);
        self.hca.event(self.port, kind, &eqe);
    }
}

impl ShardOwner<'_> {
    /// A UMR, whose WQE is loaded.
    fn register(&mut self, id: QpId) -> Answer {
        let qp = find(self.qps, id);
        let (pd, qpn) = (qp.pd, qp.qpn);
        let registers = qp.service == ServiceType::REG_UMR;
        let wqe = std::mem::take(&mut qp.wqe.bytes);
        let result = self.register_as(&wqe, Asker { pd, qpn }, registers);
        find(self.qps, id).wqe.bytes = wqe;
        result
    }

    fn register_as(&mut self, wqe: &[u8], asker: Asker, registers: bool) -> Answer {
        let Some(umr) = Umr::parse(wqe) else {
            return Answer::Failed(Status::LocalOperation);
        };
        let mkey = self.hca.mkeys.at(umr.index);
        let Some(mkey) = mkey.filter(|mkey| umr.is_allowed(mkey, asker.pd, registers)) else {
            return Answer::Failed(Status::WindowBind);
        };
        let mut list = vec![0; umr.bytes];
        match umr.source {
            Source::None => {}
            Source::Inline(at) => list.copy_from_slice(&wqe[at..at + umr.bytes]),
            Source::Memory { lkey, va } => {
                let table = self.hca.mkeys.find(lkey);
                let table = table.filter(|key| key.allows(asker, va, umr.bytes as u64, KeyRight::LocalRead));
                let Some(table) = table else {
                    return Answer::Failed(Status::LocalProtection);
                };
                let mut bytes = Bytes::Into(&mut list);
                if let Err(trouble) = access::copy(self.port, &self.hca.mkeys, &table, va, &mut bytes) {
                    // The whole list is read again then; the key has not been touched.
                    return self.absent(asker.qpn, Side::Send, trouble, Status::LocalProtection);
                }
            }
        }
        let context = umr.changed(&mkey.context);
        // The completion comes after this: whoever used what was there before has ended.
        match self
            .hca
            .mkeys
            .change(&self.hca.atc, &mkey, context, umr.offset, &list)
        {
            Ok(()) => Answer::Done(()),
            Err(_) => Answer::Failed(Status::WindowBind),
        }
    }

    /// Bytes `offset..` of a request's local message.
    fn message(&mut self, id: QpId, side: Side, request: &Request, offset: u32, bytes: Bytes<'_>) -> Answer {
        if let Err(status) = self.load(id, request.index) {
            return Answer::Failed(status);
        }
        let qp = find(self.qps, id);
        let asker = Asker {
            pd: qp.pd,
            qpn: qp.qpn,
        };
        // Taken out, so that the queue pair can be looked at meanwhile.
        let wqe = std::mem::take(&mut qp.wqe.bytes);
        // A WQE that the driver has overwritten since may be anything.
        let data = qp.wqe.parsed.as_ref().map_or(wqe.len(), |parsed| parsed.data);
        let pieces = Pieces::of_send(&wqe, data);
        let answer = self.pieces(side, asker, &wqe, pieces, u64::from(offset), bytes);
        find(self.qps, id).wqe.bytes = wqe;
        answer
    }

    /// Bytes `offset..` of a message, to the pieces of a receive request.
    fn receive(&mut self, id: QpId, receive: &Receive, offset: u32, bytes: Bytes<'_>) -> Answer {
        let qp = find(self.qps, id);
        let index = receive.token as u16;
        let mut asker = Asker {
            pd: qp.pd,
            qpn: qp.qpn,
        };
        let mut wqe = [0; 1 << 11];
        let (stride, begin) = match &qp.taken_from {
            Some(srq) if receive.token & SHARED != 0 => {
                asker.pd = srq.pd;
                let stride = srq.stride.min(11);
                match srq.read(self.port, index, &mut wqe[..1 << stride]) {
                    Ok(true) => {}
                    // The queue has been destroyed, or its memory taken away.
                    Ok(false) | Err(_) => return Answer::Failed(Status::LocalProtection),
                }
                (stride, size_of::<protos::mlx5::srq::NextSegment>())
            }
            None if receive.token & SHARED != 0 => return Answer::Failed(Status::LocalProtection),
            _ => {
                let Some(queues) = &qp.queues else {
                    return Answer::Failed(Status::LocalProtection);
                };
                let Some(log) = queues.log_receives else {
                    return Answer::Failed(Status::LocalProtection);
                };
                let stride = queues.receive_stride;
                let place = (u64::from(index) & ((1 << log) - 1)) << stride;
                if queues
                    .buffer
                    .read(self.port, place, &mut wqe[..1 << stride])
                    .is_err()
                {
                    return Answer::Failed(Status::LocalProtection);
                }
                (stride, 0)
            }
        };
        let wqe = &wqe[..1 << stride];
        let pieces = Pieces::of_receive(wqe, begin);
        self.pieces(Side::Receive, asker, wqe, pieces, u64::from(offset), bytes)
    }
}
