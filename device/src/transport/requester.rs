//! The sending half: requests become packets; acknowledgements, responses and timers move them on.
//!
//! Go back N (section 9.7.5.1): what was lost is sent again from the first missing packet, with its payload fetched
//! again. Requests complete in the order of the queue.

use std::time::Duration;

use protos::ib::{Aeth, AtomicEth, Deth, Extended, Grh, Opcode, Operation, Place, Psn, Reth, ServiceType};

use super::core::{Core, Step};
use super::link::Link;
use super::loan::Loan;
use super::owner::{Action, Answer, Datagram, Event, Fence, Owner, Path, Request, Status};
use super::packet::{Extension, Packet};
use super::qp::{Entry, Qp, State};
use super::time::Time;

/// Longest message (section 9.7.7: 2^31 bytes).
const LONGEST: u32 = 1 << 31;

/// What one packet takes of a request, decided before it is gathered.
struct Segment {
    offset: u32,
    len: u32,
    packets: u32,
    place: Place,
}

pub(super) fn is_read(request: &Request) -> bool {
    matches!(
        request.action,
        Action::Read(_) | Action::CompareSwap { .. } | Action::FetchAdd { .. }
    )
}

/// Sends one segment, or begins one request.
pub(super) fn advance(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    link: &mut impl Link,
    now: Time,
) -> Step {
    if qp.send.parked {
        return Step::Idle;
    }
    match qp.state {
        State::Rts | State::Sqd => {}
        State::Error | State::Sqe => {
            flush(qp, core, owner);
            return Step::Idle;
        }
        State::Reset | State::Init | State::Rtr => return Step::Idle,
    }
    if qp.send.rnr_until.is_some() {
        return Step::Idle;
    }
    if qp.send.cursor == qp.send.outstanding.len() && !begin(qp, core, owner) {
        return Step::Idle;
    }
    let entry = &qp.send.outstanding[qp.send.cursor];
    if entry.failed.is_some() {
        retire(qp, core, owner);
        return Step::Idle;
    }
    match entry.request.action {
        Action::Local => execute(qp, core, owner),
        Action::Read(_) | Action::CompareSwap { .. } | Action::FetchAdd { .. } => ask(qp, core, link, now),
        _ => push(qp, core, owner, link, now),
    }
}

/// Fetches the next request; whether there is one to go on with.
fn begin(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) -> bool {
    if qp.state != State::Rts || qp.send.outstanding.len() >= core.config.max_outstanding {
        return false;
    }
    let refused = qp.send.refused.take();
    let request = match qp.send.waiting {
        Some(request) => request,
        None => match owner.fetch(qp.id, qp.send.next_index) {
            Answer::Done(Some(request)) => request,
            Answer::Done(None) => return false,
            Answer::Parked { .. } if refused.is_none() => {
                qp.send.parked = true;
                return false;
            }
            other => {
                // There is nothing that a completion could name. (Parked again: the flush goes on when it resumes.)
                qp.send.parked = matches!(other, Answer::Parked { .. });
                owner.event(qp.id, Event::Fatal);
                enter_error(qp, core, owner);
                return false;
            }
        },
    };
    let send = &mut qp.send;
    let fenced = match request.fence {
        Fence::None => false,
        Fence::Reads => send.reads > 0,
        Fence::All => !send.outstanding.is_empty(),
    };
    let failed = check(qp.service, &qp.set, &request);
    let read = is_read(&request);
    let limited = read && send.reads >= u32::from(qp.set.max_initiated) && failed.is_none();
    if fenced || limited {
        send.waiting = Some(request);
        return false;
    }
    let packets = match request.action {
        Action::Local => 0,
        Action::CompareSwap { .. } | Action::FetchAdd { .. } => 1,
        _ => qp.set.mtu.packets(request.len),
    };
    send.waiting = None;
    send.next_index = request.next;
    send.sent = 0;
    send.outstanding.push_back(Entry {
        request,
        psn: send.next_psn,
        packets,
        received: 0,
        executed: false,
        failed,
    });
    send.next_psn = send.next_psn.add(packets);
    send.reads += u32::from(read);
    if failed.is_some() {
        retire(qp, core, owner);
        return false;
    }
    true
}

/// What is wrong with a request, before anything of it is sent.
fn check(service: ServiceType, set: &super::qp::Set, request: &Request) -> Option<Status> {
    let fits = match request.action {
        Action::Local => true,
        Action::Send | Action::SendImmediate(_) => true,
        Action::Write(_) | Action::WriteImmediate(..) => service != ServiceType::Ud,
        Action::Read(_)
        | Action::SendInvalidate(_)
        | Action::CompareSwap { .. }
        | Action::FetchAdd { .. } => {
            matches!(service, ServiceType::Rc | ServiceType::Xrc)
        }
    };
    let addressed =
        service != ServiceType::Ud || request.datagram.is_some() || matches!(request.action, Action::Local);
    // (A queue pair that may not initiate any READ would wait for ever.)
    if !fits || !addressed || is_read(request) && set.max_initiated == 0 {
        return Some(Status::LocalOperation);
    }
    let longest = match service {
        ServiceType::Ud => set.mtu.bytes(),
        _ => LONGEST,
    };
    (request.len > longest && !matches!(request.action, Action::Local)).then_some(Status::LocalLength)
}

/// A request that stays here.
fn execute(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) -> Step {
    let entry = &mut qp.send.outstanding[qp.send.cursor];
    let answer = if entry.executed {
        Answer::Done(())
    } else {
        match qp.send.refused.take() {
            Some(status) => Answer::Failed(status),
            None => owner.execute(qp.id, &entry.request),
        }
    };
    match answer {
        Answer::Done(()) => {
            entry.executed = true;
            core.last_payload = 0;
            qp.send.cursor += 1;
            qp.send.sent = 0;
            retire(qp, core, owner);
            Step::More
        }
        Answer::Parked { .. } => {
            qp.send.parked = true;
            Step::Idle
        }
        Answer::Failed(status) => {
            entry.failed = Some(status);
            retire(qp, core, owner);
            Step::Idle
        }
    }
}

/// A READ or an ATOMIC: one packet, whatever comes back.
fn ask(qp: &mut Qp, core: &mut Core, link: &mut impl Link, now: Time) -> Step {
    let entry = &qp.send.outstanding[qp.send.cursor];
    let request = entry.request;
    let (operation, extension, psn) = match request.action {
        Action::CompareSwap { at, compare, swap } => (
            Operation::CompareSwap,
            Extension::Atomic(AtomicEth {
                va: at.va.into(),
                rkey: at.rkey.into(),
                swap_or_add: swap.into(),
                compare: compare.into(),
            }),
            entry.psn,
        ),
        Action::FetchAdd { at, add } => (
            Operation::FetchAdd,
            Extension::Atomic(AtomicEth {
                va: at.va.into(),
                rkey: at.rkey.into(),
                swap_or_add: add.into(),
                compare: 0.into(),
            }),
            entry.psn,
        ),
        Action::Read(at) => (
            Operation::ReadRequest,
            // What has come is not asked for again.
            Extension::Rdma(Reth {
                va: at.va.wrapping_add(u64::from(entry.received)).into(),
                rkey: at.rkey.into(),
                len: (request.len - entry.received).into(),
            }),
            entry.psn.add(entry.received / qp.set.mtu.bytes()),
        ),
        _ => unreachable!("only reads and atomics are asked"),
    };
    let end = entry.psn.add(entry.packets);
    let mut packet = connected(qp, operation, psn, 1);
    packet.extension = extension;
    packet.ack_request = true;
    packet.xrc_srqn = (qp.service == ServiceType::Xrc).then_some(request.xrc_srqn);
    if link.transmit(packet, now).is_err() {
        return Step::Full;
    }
    core.stats.packets_sent += 1;
    core.last_payload = 0;
    sent(qp, core, end, now);
    qp.send.cursor += 1;
    qp.send.sent = 0;
    Step::More
}

/// A piece of a SEND or WRITE.
fn push(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, link: &mut impl Link, now: Time) -> Step {
    let mtu = qp.set.mtu;
    let entry = &qp.send.outstanding[qp.send.cursor];
    let request = entry.request;
    let offset = qp.send.sent * mtu.bytes();
    let len = (request.len - offset).min(core.config.segment.max(mtu.bytes()));
    let segment = Segment {
        offset,
        len,
        packets: mtu.packets(len),
        place: Place::new(offset == 0, offset + len == request.len),
    };
    let psn = entry.psn.add(qp.send.sent);
    if qp.reliable() && qp.send.in_flight > 0 {
        let window = (core.config.window / mtu.bytes()).max(1);
        if qp.send.in_flight + segment.packets > window {
            return Step::Idle;
        }
    }
    let loan = lend(qp, core, owner, link, &request, &segment, psn);
    let payload = if segment.len == 0 || loan.is_some() {
        None
    } else {
        let (mut buffer, filled) = match qp.send.filling.take() {
            Some((buffer, filled)) if buffer.len() == segment.len as usize => (buffer, filled),
            _ => (core.pool.take(segment.len as usize), 0),
        };
        if filled < segment.len {
            let answer = match qp.send.refused.take() {
                Some(status) => Answer::Failed(status),
                None => owner.gather(
                    qp.id,
                    &request,
                    segment.offset + filled,
                    &mut buffer[filled as usize..],
                ),
            };
            match answer {
                Answer::Done(()) => {}
                Answer::Parked { done } => {
                    qp.send.filling = Some((buffer, filled + done.min(segment.len - filled)));
                    qp.send.parked = true;
                    return Step::Idle;
                }
                Answer::Failed(status) => {
                    qp.send.outstanding[qp.send.cursor].failed = Some(status);
                    retire(qp, core, owner);
                    return Step::Idle;
                }
            }
        }
        Some(buffer)
    };
    let ends = segment.place.ends();
    let (operation, remote, immediate) = match request.action {
        Action::Send => (Operation::Send(segment.place, Extended::None), None, None),
        Action::SendImmediate(data) => (
            Operation::Send(segment.place, Extended::Immediate),
            None,
            Some(data),
        ),
        Action::SendInvalidate(rkey) => (
            Operation::Send(segment.place, Extended::Invalidate),
            None,
            Some(rkey),
        ),
        Action::Write(at) => (Operation::Write(segment.place, Extended::None), Some(at), None),
        Action::WriteImmediate(at, data) => (
            Operation::Write(segment.place, Extended::Immediate),
            Some(at),
            Some(data),
        ),
        _ => unreachable!("only messages are pushed"),
    };
    let mut packet = match &request.datagram {
        Some(to) if qp.service == ServiceType::Ud => {
            // Remembered for `block_loopback`; a datagram queue pair has no path of its own.
            qp.set.path.slid = to.path.slid;
            datagram(qp, to, operation, psn)
        }
        _ => connected(qp, operation, psn, segment.packets),
    };
    if let Some(at) = remote.filter(|_| segment.place.begins()) {
        packet.extension = Extension::Rdma(Reth {
            va: at.va.into(),
            rkey: at.rkey.into(),
            len: request.len.into(),
        });
    }
    packet.immediate = immediate.filter(|_| ends);
    packet.solicited = request.solicited && ends;
    packet.ack_request = qp.reliable();
    packet.xrc_srqn = (qp.service == ServiceType::Xrc).then_some(request.xrc_srqn);
    packet.payload = payload;
    let lent = loan.is_some();
    packet.loan = loan;
    if let Err(packet) = link.transmit(packet, now) {
        qp.send.filling = packet.payload.map(|buffer| (buffer, segment.len));
        return Step::Full;
    }
    core.stats.packets_sent += u64::from(segment.packets);
    core.stats.lent += u64::from(lent);
    core.last_payload = segment.len;
    let end = psn.add(segment.packets);
    if ends {
        qp.send.cursor += 1;
        qp.send.sent = 0;
    } else {
        qp.send.sent += segment.packets;
    }
    if qp.reliable() {
        qp.send.in_flight += segment.packets;
        sent(qp, core, end, now);
    } else if ends {
        // Nobody answers (section 9.8.2, 9.8.3): sent is done.
        retire(qp, core, owner);
    }
    Step::More
}

/// After a recall, so many packets more come with bytes: what cannot be lent now is not likely to be soon.
const PAUSE: u32 = 1024;

/// The payload as a loan, where it is worth it and possible.
fn lend(
    qp: &mut Qp,
    core: &Core,
    owner: &mut impl Owner,
    link: &mut impl Link,
    request: &Request,
    segment: &Segment,
    psn: Psn,
) -> Option<Loan> {
    if segment.len < core.config.least_loan.max(1) || !qp.reliable() {
        return None;
    }
    // What has been gathered in part has met an absent page, and what cannot be had is for the completion to say.
    if qp.send.filling.is_some() || qp.send.refused.is_some() {
        return None;
    }
    if let Some(from) = qp.send.lend_from {
        if psn.distance(from) < 0 {
            return None;
        }
        qp.send.lend_from = None;
    }
    if !link.is_near(qp.set.path.port, qp.set.path.dlid) {
        return None;
    }
    let lent = owner.lend(qp.id, request, segment.offset, segment.len)?;
    Some(qp.term.lend(lent, segment.len))
}

/// What was lent from `psn` on is wanted with bytes.
pub(super) fn recalled(qp: &mut Qp, core: &mut Core, now: Time) {
    core.stats.recalls_received += 1;
    qp.send.lend_from = Some(qp.send.high.add(PAUSE));
    go_back(qp, core);
    set_deadline(qp, core, now);
}

/// After a packet that ends before `end`.
fn sent(qp: &mut Qp, core: &mut Core, end: Psn, now: Time) {
    if end.distance(qp.send.high) > 0 {
        qp.send.high = end;
    }
    if qp.send.ack_deadline.is_none() {
        set_deadline(qp, core, now);
    }
}

/// Starts the time for an answer anew.
pub(super) fn set_deadline(qp: &mut Qp, core: &mut Core, now: Time) {
    qp.send.ack_deadline = match qp.set.timeout & 31 {
        0 => None,
        // Section 9.7.6.1.3: 4.096 us * 2^n at least, four times that at most.
        code => Some(now + Duration::from_nanos(4096 << code).max(core.config.min_ack_timeout)),
    };
}

fn connected(qp: &Qp, operation: Operation, psn: Psn, count: u32) -> Packet {
    routed(
        qp,
        &qp.set.path,
        qp.set.dest,
        Opcode::new(qp.service, operation),
        psn,
        count,
    )
}

fn datagram(qp: &Qp, to: &Datagram, operation: Operation, psn: Psn) -> Packet {
    let mut packet = routed(
        qp,
        &to.path,
        to.dest,
        Opcode::new(ServiceType::Ud, operation),
        psn,
        1,
    );
    let qkey = if to.qkey.is_privileged() {
        qp.set.qkey
    } else {
        to.qkey
    };
    packet.extension = Extension::Datagram(Deth::new(qkey, qp.set.deth_source));
    packet
}

fn routed(qp: &Qp, path: &Path, dest: protos::ib::Qpn, opcode: Opcode, psn: Psn, count: u32) -> Packet {
    Packet {
        port: path.port,
        sl: path.sl,
        mtu: qp.set.mtu,
        slid: path.slid,
        dlid: path.dlid,
        pkey: qp.set.pkey,
        opcode,
        ack_request: false,
        solicited: false,
        dest,
        psn,
        count,
        xrc_srqn: None,
        immediate: None,
        extension: Extension::None,
        global: path
            .global
            .map(|g| Grh::new(g.sgid, g.dgid, g.traffic_class, g.flow_label, g.hop_limit)),
        payload: None,
        loan: None,
    }
}

/// A packet that answers, of whatever kind, back to the connected queue pair.
pub(super) fn answer(qp: &Qp, operation: Operation, psn: Psn, count: u32, aeth: Option<Aeth>) -> Packet {
    let mut packet = connected(qp, operation, psn, count);
    if let Some(aeth) = aeth {
        packet.extension = Extension::Ack(aeth);
    }
    packet
}

/// Completes what has ended at the head of the queue.
pub(super) fn retire(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    while qp.send.cursor > 0 {
        // Everything before the cursor has been sent; local and unreliable requests are done with that.
        let front = &qp.send.outstanding[0];
        if front.packets > 0 && qp.reliable() {
            break;
        }
        complete_front(qp, owner);
    }
    if qp.send.cursor == 0
        && let Some(status) = qp.send.outstanding.front().and_then(|front| front.failed)
    {
        fail(qp, core, owner, status);
    }
    drained(qp, owner);
}

pub(super) fn complete_front(qp: &mut Qp, owner: &mut impl Owner) {
    let Some(entry) = qp.send.outstanding.pop_front() else {
        return;
    };
    qp.send.reads -= u32::from(is_read(&entry.request));
    if qp.send.cursor > 0 {
        qp.send.cursor -= 1;
    } else {
        // It was being sent again when the answer to the first time came.
        qp.send.sent = 0;
        qp.send.filling = None;
    }
    owner.complete_send(qp.id, &entry.request, Status::Success);
}

/// Tells once that a draining queue is drained (section 10.3.1, SQD).
pub(super) fn drained(qp: &mut Qp, owner: &mut impl Owner) {
    if qp.state == State::Sqd && qp.send.outstanding.is_empty() && !qp.send.drained {
        qp.send.drained = true;
        owner.event(qp.id, Event::SendQueueDrained);
    }
}

/// Ends the request at the head of the queue badly, and with it the queue.
pub(super) fn fail(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, status: Status) {
    qp.term.end();
    if let Some(entry) = qp.send.outstanding.pop_front() {
        qp.send.reads -= u32::from(is_read(&entry.request));
        owner.complete_send(qp.id, &entry.request, status);
    }
    owner.event(qp.id, Event::SendError);
    if qp.reliable() {
        enter_error(qp, core, owner);
    } else {
        // Section 10.3.1: an error of an unreliable send queue leaves the receive queue at work.
        qp.state = State::Sqe;
        flush(qp, core, owner);
    }
}

/// To the error state, both halves.
pub(super) fn enter_error(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    qp.state = State::Error;
    flush(qp, core, owner);
    super::responder::flush(qp, core, owner);
}

/// Ends every request with "flushed": what is outstanding, and what is posted.
pub(super) fn flush(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    qp.term.end();
    let send = &mut qp.send;
    send.cursor = 0;
    send.sent = 0;
    send.reads = 0;
    send.in_flight = 0;
    send.ack_deadline = None;
    send.rnr_until = None;
    send.filling = None;
    send.refused = None;
    send.held.clear();
    while let Some(entry) = qp.send.outstanding.pop_front() {
        owner.complete_send(qp.id, &entry.request, Status::Flushed);
    }
    if let Some(request) = qp.send.waiting.take() {
        qp.send.next_index = request.next;
        owner.complete_send(qp.id, &request, Status::Flushed);
    }
    // (Asked although a page may be awaited: that was for what has just been ended.)
    qp.send.parked = false;
    for _ in 0..core.config.max_flush {
        match owner.fetch(qp.id, qp.send.next_index) {
            Answer::Done(Some(request)) => {
                qp.send.next_index = request.next;
                owner.complete_send(qp.id, &request, Status::Flushed);
            }
            Answer::Done(None) | Answer::Failed(_) => return,
            Answer::Parked { .. } => {
                qp.send.parked = true;
                return;
            }
        }
    }
    tracing::warn!(
        qpn = qp.id.qpn.get(),
        "a send queue has more requests to flush than a queue can hold; the rest is left"
    );
}

/// Sends again from the oldest packet without an acknowledgement.
pub(super) fn go_back(qp: &mut Qp, core: &mut Core) {
    let send = &mut qp.send;
    send.cursor = 0;
    send.in_flight = 0;
    send.filling = None;
    send.sent = match send.outstanding.front() {
        Some(front) if !is_read(&front.request) && front.packets > 0 => {
            send.unacknowledged.distance(front.psn).max(0) as u32
        }
        _ => 0,
    };
    core.stats.go_backs += 1;
}

/// What an acknowledgement of everything up to `psn` did.
#[derive(PartialEq, Eq)]
pub(super) enum Acknowledged {
    Nothing,
    Progress,
    /// A READ or ATOMIC before it has no response: that was lost (section 9.7.5.1.5, implied NAK).
    Missing,
}

pub(super) fn acknowledge(qp: &mut Qp, owner: &mut impl Owner, psn: Psn) -> Acknowledged {
    let mut result = Acknowledged::Nothing;
    while let Some(front) = qp.send.outstanding.front() {
        if front.packets == 0 {
            if qp.send.cursor == 0 && !front.executed {
                break;
            }
            complete_front(qp, owner);
            continue;
        }
        let past = psn.distance(front.psn);
        if past < 0 {
            break;
        }
        if is_read(&front.request) {
            return Acknowledged::Missing;
        }
        let last = front.packets as i32 - 1;
        let new = psn.add(1);
        let oldest = qp.send.unacknowledged;
        if past < last {
            let progress = new.distance(oldest);
            if progress > 0 {
                qp.send.unacknowledged = new;
                qp.send.in_flight = qp.send.in_flight.saturating_sub(progress as u32);
                if qp.send.cursor == 0 && (qp.send.sent as i32) <= past {
                    qp.send.sent = past as u32 + 1;
                    qp.send.filling = None;
                }
                result = Acknowledged::Progress;
            }
            break;
        }
        let end = front.psn.add(front.packets);
        qp.send.in_flight = qp
            .send
            .in_flight
            .saturating_sub(end.distance(oldest).max(0) as u32);
        qp.send.unacknowledged = end;
        complete_front(qp, owner);
        result = Acknowledged::Progress;
    }
    result
}

/// Something was answered: counters and timers start anew (section 9.7.6.1.3).
pub(super) fn progress(qp: &mut Qp, core: &mut Core, now: Time) {
    qp.send.retries = qp.set.retry_count;
    qp.send.rnr_retries = qp.set.rnr_retry;
    qp.send.rnr_until = None;
    qp.send.asked_again = None;
    if qp.send.unacknowledged == qp.send.high {
        qp.send.ack_deadline = None;
    } else {
        set_deadline(qp, core, now);
    }
}

/// Asks once more for what has no response, until it comes or the timer says otherwise.
pub(super) fn ask_again(qp: &mut Qp, core: &mut Core) {
    let missing = qp.send.unacknowledged;
    if qp.send.asked_again != Some(missing) {
        qp.send.asked_again = Some(missing);
        go_back(qp, core);
    }
}

/// Sends again, if that is still allowed.
pub(super) fn again(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, now: Time) {
    if qp.send.retries == 0 {
        return fail(qp, core, owner, Status::RetryExceeded);
    }
    qp.send.retries -= 1;
    qp.send.asked_again = None;
    go_back(qp, core);
    set_deadline(qp, core, now);
}

/// A deadline has come, or not yet. What remains is armed again by the caller.
pub(super) fn on_time(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, now: Time) {
    if qp.send.rnr_until.is_some_and(|at| at <= now) {
        qp.send.rnr_until = None;
    }
    if qp.send.ack_deadline.is_some_and(|at| at <= now) {
        qp.send.ack_deadline = None;
        if qp.send.outstanding.is_empty() || !qp.reliable() || !qp.send.held.is_empty() {
            return;
        }
        // Nothing of it left this side, because a page is missing here: nobody owes an answer.
        if qp.send.unacknowledged == qp.send.high {
            return;
        }
        core.stats.timeouts += 1;
        again(qp, core, owner, now);
    }
}

/// The next deadline.
pub(super) fn deadline(qp: &Qp) -> Option<Time> {
    match (qp.send.ack_deadline, qp.send.rnr_until) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
