//! The sending half: requests become packets; acknowledgements, responses and timers move them on.
//!
//! Go back N (section 9.7.5.1): what was lost is sent again from the first missing packet, with its payload fetched
//! again. Requests complete in the order of the queue.

use std::time::Duration;

use protos::ib::{
    Aeth, AtomicEth, Deth, Extended, Grh, NakCode, Opcode, Operation, Place, Psn, Reth, ServiceType,
    Syndrome, rnr_delay,
};

use super::core::{Core, Step};
use super::link::Link;
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

fn is_read(request: &Request) -> bool {
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
    let answer = match qp.send.refused.take() {
        Some(status) => Answer::Failed(status),
        None => owner.execute(qp.id, &entry.request),
    };
    match answer {
        Answer::Done(()) => {
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
    let payload = if segment.len == 0 {
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
    if let Err(packet) = link.transmit(packet, now) {
        qp.send.filling = packet.payload.map(|buffer| (buffer, segment.len));
        return Step::Full;
    }
    core.stats.packets_sent += u64::from(segment.packets);
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
fn set_deadline(qp: &mut Qp, core: &mut Core, now: Time) {
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

fn complete_front(qp: &mut Qp, owner: &mut impl Owner) {
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
fn fail(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, status: Status) {
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
fn go_back(qp: &mut Qp, core: &mut Core) {
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
enum Acknowledged {
    Nothing,
    Progress,
    /// A READ or ATOMIC before it has no response: that was lost (section 9.7.5.1.5, implied NAK).
    Missing,
}

fn acknowledge(qp: &mut Qp, owner: &mut impl Owner, psn: Psn) -> Acknowledged {
    let mut result = Acknowledged::Nothing;
    while let Some(front) = qp.send.outstanding.front() {
        if front.packets == 0 {
            if qp.send.cursor == 0 {
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
fn progress(qp: &mut Qp, core: &mut Core, now: Time) {
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
fn ask_again(qp: &mut Qp, core: &mut Core) {
    let missing = qp.send.unacknowledged;
    if qp.send.asked_again != Some(missing) {
        qp.send.asked_again = Some(missing);
        go_back(qp, core);
    }
}

/// A packet that answers. Returns whether the queue pair may have something to send now.
pub(super) fn answered(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    now: Time,
    packet: Packet,
    operation: Operation,
) {
    if !matches!(qp.state, State::Rts | State::Sqd) {
        core.stats.dropped += 1;
        return;
    }
    let last = packet.psn.add(packet.count - 1);
    // Section 9.7.5.1.1: what answers nothing that was sent is a ghost. (One before the oldest may come again.)
    if last.distance(qp.send.high) >= 0 || last.distance(qp.send.unacknowledged.before()) < 0 {
        core.stats.dropped += 1;
        return;
    }
    if !qp.send.held.is_empty() {
        if qp.send.held.packets.len() < core.config.max_held {
            qp.send.held.packets.push_back(packet);
        } else {
            qp.send.held.dropped = true;
        }
        return;
    }
    take(qp, core, owner, now, packet, operation);
}

/// Goes on with what was held, after a page came.
pub(super) fn unhold(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, now: Time) {
    while let Some(packet) = qp.send.held.packets.pop_front() {
        let Some(operation) = packet.opcode.operation() else {
            continue;
        };
        if take(qp, core, owner, now, packet, operation) {
            return;
        }
        qp.send.held.refused = None;
        if qp.state == State::Error {
            return;
        }
    }
    if std::mem::take(&mut qp.send.held.dropped) {
        go_back(qp, core);
    }
    if qp.send.ack_deadline.is_none() && !qp.send.outstanding.is_empty() {
        set_deadline(qp, core, now);
    }
}

/// Whether it must wait for a page (it has been put back).
fn take(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    now: Time,
    packet: Packet,
    operation: Operation,
) -> bool {
    match (operation, packet.extension) {
        (Operation::Acknowledge, Extension::Ack(aeth)) => {
            acknowledged(qp, core, owner, now, packet.psn, aeth.syndrome());
            false
        }
        (Operation::AtomicAcknowledge, Extension::AtomicAck(_, original)) => {
            brought(qp, core, owner, now, packet, Some(original))
        }
        (Operation::ReadResponse(_), _) => brought(qp, core, owner, now, packet, None),
        _ => {
            core.stats.dropped += 1;
            false
        }
    }
}

fn acknowledged(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    now: Time,
    psn: Psn,
    syndrome: Syndrome,
) {
    let through = match syndrome {
        Syndrome::Ack(_) => psn,
        // These name the first packet that was not executed.
        _ => psn.before(),
    };
    let what = acknowledge(qp, owner, through);
    match what {
        Acknowledged::Progress => progress(qp, core, now),
        Acknowledged::Missing => {
            ask_again(qp, core);
            return;
        }
        Acknowledged::Nothing => {
            if matches!(syndrome, Syndrome::Ack(_)) {
                // A second acknowledgement of what is long done: the responder is alive, and has its reasons (a
                // page that it waits for). It is not one that does not answer.
                qp.send.retries = qp.set.retry_count;
            }
        }
    }
    if psn.distance(qp.send.unacknowledged) < 0 {
        return retire(qp, core, owner);
    }
    match syndrome {
        Syndrome::Ack(_) => {}
        Syndrome::RnrNak(code) => match qp.send.rnr_retries {
            0 => return fail(qp, core, owner, Status::RnrRetryExceeded),
            count => {
                // Section 9.7.5.2.8: 7 is without end.
                if count != 7 {
                    qp.send.rnr_retries = count - 1;
                }
                core.stats.rnr_naks_received += 1;
                go_back(qp, core);
                qp.send.ack_deadline = None;
                qp.send.rnr_until = Some(now + rnr_delay(code));
            }
        },
        Syndrome::Nak(NakCode::SEQUENCE_ERROR) => {
            core.stats.sequence_naks_received += 1;
            return again(qp, core, owner, now);
        }
        Syndrome::Nak(code) => {
            let status = match code {
                NakCode::REMOTE_ACCESS => Status::RemoteAccess,
                NakCode::REMOTE_OPERATION => Status::RemoteOperation,
                _ => Status::RemoteInvalidRequest,
            };
            return fail(qp, core, owner, status);
        }
        Syndrome::Reserved(_) => core.stats.dropped += 1,
    }
    retire(qp, core, owner);
}

/// Sends again, if that is still allowed.
fn again(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, now: Time) {
    if qp.send.retries == 0 {
        return fail(qp, core, owner, Status::RetryExceeded);
    }
    qp.send.retries -= 1;
    qp.send.asked_again = None;
    go_back(qp, core);
    set_deadline(qp, core, now);
}

/// Data of a READ, or what an atomic found.
fn brought(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    now: Time,
    packet: Packet,
    atomic: Option<u64>,
) -> bool {
    // A response acknowledges everything before its request (section 9.7.5.1.2).
    let oldest = qp.send.outstanding.front();
    let before = oldest.is_some_and(|front| packet.psn.distance(front.psn) > 0 && !is_read(&front.request))
        || oldest.is_some_and(|front| front.packets == 0);
    if before {
        match acknowledge(qp, owner, packet.psn.before()) {
            Acknowledged::Progress => progress(qp, core, now),
            Acknowledged::Missing => {
                ask_again(qp, core);
                return false;
            }
            Acknowledged::Nothing => {}
        }
    }
    let mtu = qp.set.mtu;
    let Some(front) = qp
        .send
        .outstanding
        .front()
        .filter(|front| is_read(&front.request))
    else {
        core.stats.dropped += 1;
        return false;
    };
    let request = front.request;
    let is_atomic = !matches!(request.action, Action::Read(_));
    let next = front.psn.add(front.received / mtu.bytes());
    match packet.psn.distance(next) {
        0 => {}
        1.. => {
            ask_again(qp, core);
            return false;
        }
        _ => {
            core.stats.duplicates += 1;
            return false;
        }
    }
    let words = atomic.unwrap_or_default().to_le_bytes();
    let (data, ends) = match (atomic, packet.opcode.operation()) {
        (Some(_), _) if is_atomic => (&words[..], true),
        (None, Some(Operation::ReadResponse(place))) if !is_atomic => {
            let ends = place.ends();
            let (data, left) = (packet.data(), request.len - front.received);
            let (len, full) = (
                data.len() as u64,
                u64::from(packet.count) * u64::from(mtu.bytes()),
            );
            let shaped = if ends {
                len == u64::from(left) && packet.count == mtu.packets(left)
            } else {
                len == full && len < u64::from(left)
            };
            if !shaped {
                fail(qp, core, owner, Status::BadResponse);
                return false;
            }
            (data, ends)
        }
        _ => {
            fail(qp, core, owner, Status::BadResponse);
            return false;
        }
    };
    let done = std::mem::take(&mut qp.send.held.done);
    let answer = match qp.send.held.refused.take() {
        Some(status) => Answer::Failed(status),
        None if done as usize >= data.len() => Answer::Done(()),
        None => owner.scatter_response(qp.id, &request, front.received + done, &data[done as usize..]),
    };
    match answer {
        Answer::Done(()) => {}
        Answer::Parked { done: more } => {
            qp.send.held.done = done + more.min(data.len() as u32 - done);
            qp.send.held.packets.push_front(packet);
            // The answer is here: no need to ask for it again.
            qp.send.ack_deadline = None;
            return true;
        }
        Answer::Failed(status) => {
            fail(qp, core, owner, status);
            return false;
        }
    }
    let len = data.len() as u32;
    qp.send.unacknowledged = packet.psn.add(packet.count);
    if let Some(front) = qp.send.outstanding.front_mut() {
        front.received += len;
    }
    if ends {
        complete_front(qp, owner);
    }
    progress(qp, core, now);
    retire(qp, core, owner);
    false
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
