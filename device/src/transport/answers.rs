//! What comes back to a requester: acknowledgements, the data of READs, what atomics found.

use protos::ib::{NakCode, Operation, Psn, Syndrome, rnr_delay};

use super::core::Core;
use super::owner::{Action, Answer, Owner, Status};
use super::packet::{Extension, Packet};
use super::qp::{Qp, State};
use super::requester::{
    Acknowledged, acknowledge, again, ask_again, complete_front, fail, go_back, is_read, progress, recalled,
    retire, set_deadline,
};
use super::time::Time;

/// A packet that answers.
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
        (Operation::Acknowledge, Extension::Recall) => {
            recall(qp, core, owner, now, packet.psn);
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

/// The receiver cannot have what it was lent.
fn recall(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, now: Time, psn: Psn) {
    match acknowledge(qp, owner, psn.before()) {
        Acknowledged::Progress => progress(qp, core, now),
        Acknowledged::Missing => return ask_again(qp, core),
        Acknowledged::Nothing => {}
    }
    if psn.distance(qp.send.unacknowledged) >= 0 {
        recalled(qp, core, now);
    }
    retire(qp, core, owner);
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
