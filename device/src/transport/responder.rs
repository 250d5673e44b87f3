//! The receiving half: requests of the other side are executed in order, once, and answered in order.

use protos::ib::{Extended, NakCode, Operation, Place, Psn, Syndrome};

use super::core::Core;
use super::owner::{Answer, Asked, Atomic, Event, Owner, Received, Remote, Right, Source, Status};
use super::packet::{Extension, Packet};
use super::qp::{Message, Qp, Resource, ResourceKind, Response, State};

/// How the execution of a packet ended.
pub(super) enum Executed {
    Done,
    /// A page is missing: the packet waits.
    Parked,
    /// No receive request.
    NotReady,
    /// The request is wrong, or was refused.
    Refused(Status),
}

/// Where this answer leads but for `Done`.
macro_rules! proceed {
    ($answer:expr) => {
        match $answer {
            Answer::Done(value) => value,
            Answer::Parked { .. } => return Executed::Parked,
            Answer::Failed(status) => return Executed::Refused(status),
        }
    };
}

/// A request came in.
pub(super) fn requested(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    packet: Packet,
    operation: Operation,
) {
    if !qp.receive.held.is_empty() {
        return queue(qp, core, packet);
    }
    sequence(qp, core, owner, packet, operation);
}

/// Behind a packet that waits for a page.
fn queue(qp: &mut Qp, core: &mut Core, packet: Packet) {
    let reliable = qp.reliable();
    let held = &mut qp.receive.held;
    let next = held.packets.back().map(|last| last.psn.add(last.count));
    let ahead = next.map_or(0, |next| packet.psn.distance(next));
    if ahead < 0 && reliable {
        // Sent again, for want of an answer. What is done is done, and this side is alive.
        let psn = qp.receive.expected.before();
        acknowledge(qp, core, psn);
        core.stats.duplicates += 1;
    } else if (ahead == 0 || !reliable) && held.packets.len() < core.config.max_held {
        held.packets.push_back(packet);
    } else {
        held.dropped = true;
        core.stats.dropped += 1;
    }
}

/// Goes on with what was held, after a page came.
pub(super) fn unhold(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    while let Some(packet) = qp.receive.held.packets.pop_front() {
        if !qp.receives() {
            qp.receive.held.clear();
            return;
        }
        let Some(operation) = packet.opcode.operation() else {
            continue;
        };
        if sequence(qp, core, owner, packet, operation) {
            return;
        }
    }
    // What was dropped meanwhile comes again: the next packet shows the gap.
    qp.receive.held.dropped = false;
}

/// Executes the packet if its turn has come. Whether it waits for a page (and was put to the head of those held).
fn sequence(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    mut packet: Packet,
    operation: Operation,
) -> bool {
    let distance = packet.psn.distance(qp.receive.expected);
    let mut operation = operation;
    if qp.reliable() {
        if distance > 0 {
            // Section 9.7.5.1.3: one NAK, then silence until the missing packet comes.
            if !qp.receive.nak_sent {
                qp.receive.nak_sent = true;
                let psn = qp.receive.expected;
                nak(qp, core, psn, Syndrome::Nak(NakCode::SEQUENCE_ERROR));
                core.stats.sequence_naks_sent += 1;
            }
            return false;
        }
        if distance < 0 {
            let old = distance.unsigned_abs();
            if old >= packet.count {
                core.stats.duplicates += 1;
                duplicate(qp, core, &packet, operation);
                return false;
            }
            if !packet.skip(old) {
                core.stats.dropped += 1;
                return false;
            }
            operation = packet.opcode.operation().unwrap_or(operation);
        }
        qp.receive.nak_sent = false;
    } else if distance != 0
        || matches!(operation, Operation::Send(p, _) | Operation::Write(p, _) if p.begins() && qp.receive.message != Message::None && !qp.receive.begun)
    {
        // Section 9.8.2.2: the message is lost; its receive request serves the next one.
        qp.receive.message = Message::None;
        qp.receive.begun = false;
        qp.receive.held.done = 0;
        qp.receive.expected = packet.psn;
        let begins = matches!(operation, Operation::Send(p, _) | Operation::Write(p, _) if p.begins());
        if !begins {
            qp.receive.expected = packet.psn.add(packet.count);
            core.stats.dropped += 1;
            return false;
        }
    }
    let result = execute(qp, owner, &packet, operation);
    if !matches!(result, Executed::Parked) {
        qp.receive.held.done = 0;
        qp.receive.held.refused = None;
        qp.receive.begun = false;
    }
    match result {
        Executed::Done => {
            done(qp, core, owner, &packet, operation);
            false
        }
        Executed::Parked => {
            qp.receive.held.packets.push_front(packet);
            core.stats.parks += 1;
            true
        }
        Executed::NotReady => {
            // Nothing of the packet has happened.
            if matches!(operation, Operation::Send(p, _) | Operation::Write(p, _) if p.begins()) {
                qp.receive.message = Message::None;
            }
            if qp.reliable() {
                // Section 9.7.5.2.8; what follows is dropped until this one comes again.
                qp.receive.nak_sent = true;
                let psn = qp.receive.expected;
                let timer = qp.set.min_rnr_timer;
                nak(qp, core, psn, Syndrome::RnrNak(timer));
                core.stats.rnr_naks_sent += 1;
            } else {
                qp.receive.message = Message::None;
                qp.receive.expected = qp.receive.expected.add(packet.count);
                core.stats.dropped += 1;
            }
            false
        }
        Executed::Refused(status) => {
            refused(qp, core, owner, &packet, operation, status);
            false
        }
    }
}

fn done(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, packet: &Packet, operation: Operation) {
    let (packets, ends) = match operation {
        Operation::Send(place, _) | Operation::Write(place, _) => (packet.count, place.ends()),
        Operation::ReadRequest => match packet.extension {
            Extension::Rdma(reth) => (qp.set.mtu.packets(reth.len.get()), true),
            _ => (1, true),
        },
        _ => (1, true),
    };
    let first = qp.receive.expected;
    qp.receive.expected = first.add(packets);
    core.stats.packets_received += u64::from(packet.count);
    if ends {
        qp.receive.msn = qp.receive.msn.wrapping_add(1) & Psn::MASK;
    }
    if qp.state == State::Rtr && !qp.receive.established {
        qp.receive.established = true;
        owner.event(qp.id, Event::CommunicationEstablished);
    }
    if !qp.reliable() {
        return;
    }
    match operation {
        Operation::ReadRequest | Operation::CompareSwap | Operation::FetchAdd => {
            // (Its response acknowledges; it was made where the data is known.)
            core.list_respond(qp);
        }
        _ if packet.ack_request => {
            let psn = first.add(packets - 1);
            acknowledge(qp, core, psn);
        }
        _ => {}
    }
}

/// Something was refused: tell the other side, end the receive request, go to the error state (section 9.7.5.2.4
/// to 9.7.5.2.7; the responder's classes of faults are in 9.9.3).
fn refused(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    packet: &Packet,
    operation: Operation,
    status: Status,
) {
    core.stats.refused += 1;
    if !qp.reliable() {
        // Unreliable: dropped, as nobody can be told. A receive request that was taken serves the next message,
        // unless it is itself the reason.
        qp.receive.message = Message::None;
        qp.receive.expected = qp.receive.expected.add(packet.count);
        if matches!(
            status,
            Status::LocalProtection | Status::LocalLength | Status::LocalOperation
        ) && qp.receive.taken.is_some()
        {
            complete(qp, owner, packet, operation, status, 0);
            super::requester::enter_error(qp, core, owner);
        }
        return;
    }
    let code = match status {
        Status::RemoteAccess => NakCode::REMOTE_ACCESS,
        Status::RemoteInvalidRequest | Status::LocalLength => NakCode::INVALID_REQUEST,
        _ => NakCode::REMOTE_OPERATION,
    };
    let psn = qp.receive.expected;
    nak(qp, core, psn, Syndrome::Nak(code));
    if qp.receive.taken.is_some() {
        complete(qp, owner, packet, operation, status, 0);
    } else {
        owner.event(
            qp.id,
            match code {
                NakCode::REMOTE_ACCESS => Event::AccessViolation,
                NakCode::INVALID_REQUEST => Event::InvalidRequest,
                _ => Event::Fatal,
            },
        );
    }
    // What is in the list of responses is still sent: reads before, then the NAK.
    let responses = std::mem::take(&mut qp.receive.responses);
    super::requester::enter_error(qp, core, owner);
    qp.receive.responses = responses;
}

fn flushed(qp: &Qp) -> Received {
    Received {
        status: Status::Flushed,
        write: false,
        len: 0,
        immediate: None,
        invalidated: None,
        solicited: false,
        source: Source {
            qpn: qp.set.dest,
            slid: qp.set.path.dlid,
            dlid: qp.set.path.slid,
            sl: 0,
            global: false,
            pkey: qp.set.pkey,
            port: qp.set.path.port,
        },
    }
}

/// Ends what is there of the receive queue with "flushed".
pub(super) fn flush(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    qp.receive.message = Message::None;
    qp.receive.begun = false;
    qp.receive.held.clear();
    qp.receive.responses.clear();
    qp.receive.filling = None;
    let flushed = flushed(qp);
    if let Some(taken) = qp.receive.taken.take() {
        owner.complete_receive(qp.id, &taken, &flushed);
    }
    if qp.shared_receive {
        owner.event(qp.id, Event::LastWqeReached);
        return;
    }
    flush_all(qp, core, owner, &flushed);
}

/// Ends receive requests that were posted after the flush.
pub(super) fn flush_posted(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    let flushed = flushed(qp);
    flush_all(qp, core, owner, &flushed);
}

fn flush_all(qp: &mut Qp, core: &Core, owner: &mut impl Owner, flushed: &Received) {
    qp.receive.flushing = false;
    for _ in 0..core.config.max_flush {
        match owner.take_receive(qp.id, None) {
            Answer::Done(Some(receive)) => owner.complete_receive(qp.id, &receive, flushed),
            Answer::Parked { .. } => {
                // Goes on when that resumes.
                qp.receive.flushing = true;
                return;
            }
            Answer::Done(None) | Answer::Failed(_) => return,
        }
    }
}

/// One packet whose turn has come. Whatever is asked of memory goes on where it stopped when the packet comes here
/// again after a park.
fn execute(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet, operation: Operation) -> Executed {
    if let Some(status) = qp.receive.held.refused.take() {
        return Executed::Refused(status);
    }
    match operation {
        Operation::Send(place, extended) => {
            if let Some(fault) = misshapen(qp, packet, place) {
                return fault;
            }
            send(qp, owner, packet, place, extended)
        }
        Operation::Write(place, extended) => {
            if let Some(fault) = misshapen(qp, packet, place) {
                return fault;
            }
            write(qp, owner, packet, place, extended)
        }
        Operation::ReadRequest => read(qp, owner, packet),
        Operation::CompareSwap | Operation::FetchAdd => atomic(qp, owner, packet, operation),
        _ => Executed::Refused(Status::RemoteInvalidRequest),
    }
}

/// Section 9.7.4.1.4 and 9.7.4.1.6: place in the message and length of the payload.
fn misshapen(qp: &Qp, packet: &Packet, place: Place) -> Option<Executed> {
    let fault = Some(Executed::Refused(Status::RemoteInvalidRequest));
    let open = qp.receive.message != Message::None;
    // (A packet that waited is in its message already.)
    if open == place.begins() && !qp.receive.begun {
        return fault;
    }
    let (len, mtu) = (packet.data().len() as u64, u64::from(qp.set.mtu.bytes()));
    let count = u64::from(packet.count);
    let fits = if place.ends() {
        len <= count * mtu && (len > (count - 1) * mtu || count == 1 && place == Place::Only)
    } else {
        len == count * mtu
    };
    if fits { None } else { fault }
}

/// What a packet asks for of the memory here.
fn asked(packet: &Packet, rkey: u32, va: u64) -> Asked {
    Asked {
        at: Remote { rkey, va },
        xrc_srqn: packet.xrc_srqn,
    }
}

/// Takes a receive request unless there is one.
pub(super) fn take(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet) -> Option<Executed> {
    if qp.receive.taken.is_some() {
        return None;
    }
    match owner.take_receive(qp.id, packet.xrc_srqn) {
        Answer::Done(Some(receive)) => {
            qp.receive.taken = Some(receive);
            None
        }
        Answer::Done(None) => Some(Executed::NotReady),
        Answer::Parked { .. } => Some(Executed::Parked),
        Answer::Failed(status) => Some(Executed::Refused(status)),
    }
}

fn send(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet, place: Place, extended: Extended) -> Executed {
    if place.begins() && !qp.receive.begun {
        if let Some(other) = take(qp, owner, packet) {
            return other;
        }
        qp.receive.message = Message::Send { offset: 0 };
        qp.receive.begun = true;
    }
    let (Message::Send { offset }, Some(receive)) = (qp.receive.message, qp.receive.taken) else {
        return Executed::Refused(Status::RemoteInvalidRequest);
    };
    let data = packet.data();
    let total = u64::from(offset) + data.len() as u64;
    if total > 1 << 31 {
        return Executed::Refused(Status::LocalLength);
    }
    let done = qp.receive.held.done as usize;
    if done < data.len() {
        match owner.scatter_receive(qp.id, &receive, offset + done as u32, &data[done..]) {
            Answer::Done(()) => qp.receive.held.done = data.len() as u32,
            Answer::Parked { done: more } => {
                qp.receive.held.done = (done as u32).saturating_add(more).min(data.len() as u32);
                return Executed::Parked;
            }
            Answer::Failed(status) => return Executed::Refused(status),
        }
    }
    if !place.ends() {
        qp.receive.message = Message::Send { offset: total as u32 };
        return Executed::Done;
    }
    if extended == Extended::Invalidate
        && let Some(rkey) = packet.immediate
    {
        proceed!(owner.invalidate(qp.id, rkey, packet.xrc_srqn));
    }
    qp.receive.message = Message::None;
    complete(
        qp,
        owner,
        packet,
        Operation::Send(place, extended),
        Status::Success,
        total as u32,
    );
    Executed::Done
}

fn write(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet, place: Place, extended: Extended) -> Executed {
    if place.begins() && !qp.receive.begun {
        let Extension::Rdma(reth) = packet.extension else {
            return Executed::Refused(Status::RemoteInvalidRequest);
        };
        let at = asked(packet, reth.rkey.get(), reth.va.get());
        let len = reth.len.get();
        if len > 1 << 31 {
            return Executed::Refused(Status::RemoteInvalidRequest);
        }
        // Section 9.7.4.1.5: the R_Key of an empty message is not looked at.
        if len > 0 {
            proceed!(owner.remote_check(qp.id, Right::Write, at, len));
        }
        qp.receive.message = Message::Write { at, len, offset: 0 };
        qp.receive.begun = true;
    }
    let Message::Write { at, len, offset } = qp.receive.message else {
        return Executed::Refused(Status::RemoteInvalidRequest);
    };
    let data = packet.data();
    let total = u64::from(offset) + data.len() as u64;
    if total > u64::from(len) || place.ends() && total != u64::from(len) {
        return Executed::Refused(Status::RemoteInvalidRequest);
    }
    if extended == Extended::Immediate
        && place.ends()
        && let Some(other) = take(qp, owner, packet)
    {
        return other;
    }
    let done = qp.receive.held.done as usize;
    if done < data.len() {
        let at = at.after(u64::from(offset) + done as u64);
        match owner.remote_write(qp.id, at, &data[done..]) {
            Answer::Done(()) => {}
            Answer::Parked { done: more } => {
                qp.receive.held.done = (done as u32).saturating_add(more).min(data.len() as u32);
                return Executed::Parked;
            }
            Answer::Failed(status) => return Executed::Refused(status),
        }
    }
    if !place.ends() {
        qp.receive.message = Message::Write {
            at,
            len,
            offset: total as u32,
        };
        return Executed::Done;
    }
    qp.receive.message = Message::None;
    if extended == Extended::Immediate {
        complete(
            qp,
            owner,
            packet,
            Operation::Write(place, extended),
            Status::Success,
            len,
        );
    }
    Executed::Done
}

/// Whether another READ or ATOMIC fits; the oldest one that is answered makes room.
fn room(qp: &mut Qp) -> bool {
    let most = usize::from(qp.set.max_responded);
    let pending = qp
        .receive
        .responses
        .iter()
        .filter(|r| matches!(r, Response::Read { .. } | Response::Atomic { .. }))
        .count();
    if pending >= most {
        return false;
    }
    while qp.receive.resources.len() >= most {
        qp.receive.resources.pop_front();
    }
    true
}

fn read(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet) -> Executed {
    let invalid = Executed::Refused(Status::RemoteInvalidRequest);
    let Extension::Rdma(reth) = packet.extension else {
        return invalid;
    };
    let at = asked(packet, reth.rkey.get(), reth.va.get());
    let len = reth.len.get();
    if qp.receive.message != Message::None || len > 1 << 31 || !room(qp) {
        return invalid;
    }
    if len > 0 {
        proceed!(owner.remote_check(qp.id, Right::Read, at, len));
    }
    qp.receive.resources.push_back(Resource {
        psn: packet.psn,
        packets: qp.set.mtu.packets(len),
        kind: ResourceKind::Read { at, len },
    });
    qp.receive.responses.push_back(Response::Read {
        psn: packet.psn,
        at,
        len,
        sent: 0,
        msn: qp.receive.msn.wrapping_add(1),
    });
    Executed::Done
}

fn atomic(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet, operation: Operation) -> Executed {
    let Extension::Atomic(eth) = packet.extension else {
        return Executed::Refused(Status::RemoteInvalidRequest);
    };
    if qp.receive.message != Message::None || !room(qp) {
        return Executed::Refused(Status::RemoteInvalidRequest);
    }
    let at = asked(packet, eth.rkey.get(), eth.va.get());
    let what = if operation == Operation::CompareSwap {
        Atomic::CompareSwap {
            compare: eth.compare.get(),
            swap: eth.swap_or_add.get(),
        }
    } else {
        Atomic::FetchAdd {
            add: eth.swap_or_add.get(),
        }
    };
    let original = proceed!(owner.remote_atomic(qp.id, at, what));
    qp.receive.resources.push_back(Resource {
        psn: packet.psn,
        packets: 1,
        kind: ResourceKind::Atomic { original },
    });
    qp.receive.responses.push_back(Response::Atomic {
        psn: packet.psn,
        original,
        msn: qp.receive.msn.wrapping_add(1),
    });
    Executed::Done
}

/// Section 9.7.5.1.4 ("duplicate request"): a SEND or WRITE is acknowledged again, a READ is read again, an ATOMIC
/// is answered with what it found the first time.
fn duplicate(qp: &mut Qp, core: &mut Core, packet: &Packet, operation: Operation) {
    let mtu = qp.set.mtu;
    let kept = |psn: Psn, resource: &Resource| {
        let offset = psn.distance(resource.psn);
        offset >= 0 && (offset as u32) < resource.packets
    };
    match operation {
        Operation::Send(..) | Operation::Write(..) => {
            let psn = qp.receive.expected.before();
            acknowledge(qp, core, psn);
        }
        Operation::ReadRequest => {
            let Extension::Rdma(reth) = packet.extension else {
                return;
            };
            let Some(resource) = qp.receive.resources.iter().find(|r| kept(packet.psn, r)) else {
                core.stats.dropped += 1;
                return;
            };
            let skipped = packet.psn.distance(resource.psn) as u32 * mtu.bytes();
            let asked = asked(packet, reth.rkey.get(), reth.va.get());
            let ResourceKind::Read { at, len } = resource.kind else {
                return;
            };
            // It must be (the rest of) the same request.
            let rest = at.after(u64::from(skipped));
            if asked != rest || len - skipped != reth.len.get() {
                core.stats.dropped += 1;
                return;
            }
            answer_again(
                qp,
                core,
                Response::Read {
                    psn: packet.psn,
                    at: asked,
                    len: len - skipped,
                    sent: 0,
                    msn: qp.receive.msn,
                },
            );
        }
        Operation::CompareSwap | Operation::FetchAdd => {
            let found = qp.receive.resources.iter().find(|r| r.psn == packet.psn);
            let Some(ResourceKind::Atomic { original }) = found.map(|r| r.kind) else {
                core.stats.dropped += 1;
                return;
            };
            answer_again(
                qp,
                core,
                Response::Atomic {
                    psn: packet.psn,
                    original,
                    msn: qp.receive.msn,
                },
            );
        }
        _ => core.stats.dropped += 1,
    }
}

/// Whether one more answer can wait. (Those of new requests are limited by what the responder remembers; the others
/// come as often as the other side likes.)
fn has_room(qp: &Qp, core: &Core) -> bool {
    qp.receive.responses.len() < core.config.max_held + usize::from(u8::MAX)
}

/// Whoever asks again asks for everything after it again, too: those answers go.
fn answer_again(qp: &mut Qp, core: &mut Core, response: Response) {
    let from = response.psn();
    if !has_room(qp, core) {
        // It is asked for again.
        core.stats.dropped += 1;
        return;
    }
    if qp
        .receive
        .responses
        .front()
        .is_some_and(|front| front.psn().distance(from) >= 0)
        && !qp.receive.read_parked
    {
        qp.receive.filling = None;
    }
    let parked = usize::from(qp.receive.read_parked);
    let mut at = 0;
    qp.receive.responses.retain(|r| {
        at += 1;
        at <= parked || r.psn().distance(from) < 0 || matches!(r, Response::Nak { .. })
    });
    qp.receive.responses.push_back(response);
    core.list_respond(qp);
}

/// An acknowledgement of everything up to `psn`, behind what is to be sent before; several in a row are one.
fn acknowledge(qp: &mut Qp, core: &mut Core, psn: Psn) {
    let msn = qp.receive.msn;
    if let Some(Response::Ack { psn: last, msn: m }) = qp.receive.responses.back_mut() {
        *last = psn;
        *m = msn;
        core.stats.acks_coalesced += 1;
    } else if has_room(qp, core) {
        qp.receive.responses.push_back(Response::Ack { psn, msn });
    }
    core.list_respond(qp);
}

fn nak(qp: &mut Qp, core: &mut Core, psn: Psn, syndrome: Syndrome) {
    if has_room(qp, core) {
        let msn = qp.receive.msn;
        qp.receive
            .responses
            .push_back(Response::Nak { psn, syndrome, msn });
    }
    core.list_respond(qp);
}

/// Tells the owner what became of the receive request at hand.
pub(super) fn complete(
    qp: &mut Qp,
    owner: &mut impl Owner,
    packet: &Packet,
    operation: Operation,
    status: Status,
    len: u32,
) {
    let Some(receive) = qp.receive.taken.take() else {
        return;
    };
    let (write, extended) = match operation {
        Operation::Write(_, extended) => (true, extended),
        Operation::Send(_, extended) => (false, extended),
        _ => (false, Extended::None),
    };
    let qpn = match packet.extension {
        Extension::Datagram(deth) => deth.source(),
        _ => qp.set.dest,
    };
    owner.complete_receive(
        qp.id,
        &receive,
        &Received {
            status,
            write,
            len,
            immediate: packet.immediate.filter(|_| extended == Extended::Immediate),
            invalidated: packet.immediate.filter(|_| extended == Extended::Invalidate),
            solicited: packet.solicited,
            source: Source {
                qpn,
                slid: packet.slid,
                dlid: packet.dlid,
                sl: packet.sl,
                global: packet.global.is_some(),
                pkey: packet.pkey,
                port: packet.port,
            },
        },
    );
}
