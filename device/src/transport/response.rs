//! What a responder sends back: acknowledgements, what atomics found, the data of READs.

use protos::ib::{Aeth, NakCode, Operation, Place, Psn, Syndrome};

use super::core::{Core, Step};
use super::link::Link;
use super::owner::{Answer, Asked, Event, Owner, Status};
use super::packet::Extension;
use super::pool::SEGMENT;
use super::qp::{Qp, Response};
use super::requester::answer;

/// Sends what is to be sent back: one packet.
pub(super) fn respond(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    link: &mut impl Link,
    now: super::Time,
) -> Step {
    if qp.receive.read_parked {
        return Step::Idle;
    }
    let Some(&response) = qp.receive.responses.front() else {
        return Step::Idle;
    };
    let packet = match response {
        Response::Read {
            psn,
            at,
            len,
            sent,
            msn,
        } => return stream(qp, core, owner, link, now, (psn, at, len, sent, msn)),
        Response::Ack { psn, msn } => answer(
            qp,
            Operation::Acknowledge,
            psn,
            1,
            Some(Aeth::new(Syndrome::ACK, msn)),
        ),
        Response::Recall { psn } => {
            let mut packet = answer(qp, Operation::Acknowledge, psn, 1, None);
            packet.extension = Extension::Recall;
            packet
        }
        Response::Nak { psn, syndrome, msn } => {
            answer(qp, Operation::Acknowledge, psn, 1, Some(Aeth::new(syndrome, msn)))
        }
        Response::Atomic { psn, original, msn } => {
            let mut packet = answer(qp, Operation::AtomicAcknowledge, psn, 1, None);
            packet.extension = Extension::AtomicAck(Aeth::new(Syndrome::ACK, msn), original);
            packet
        }
    };
    if link.transmit(packet, now).is_err() {
        return Step::Full;
    }
    core.stats.packets_sent += 1;
    qp.receive.responses.pop_front();
    more(qp)
}

fn more(qp: &Qp) -> Step {
    if qp.receive.responses.is_empty() {
        Step::Idle
    } else {
        Step::More
    }
}

/// A piece of the data of a READ.
fn stream(
    qp: &mut Qp,
    core: &mut Core,
    owner: &mut impl Owner,
    link: &mut impl Link,
    now: super::Time,
    (psn, at, len, sent, msn): (Psn, Asked, u32, u32, u32),
) -> Step {
    let mtu = qp.set.mtu;
    let size = (len - sent)
        .min(core.config.segment.max(mtu.bytes()))
        .min(SEGMENT as u32);
    let payload = if size == 0 {
        None
    } else {
        let (mut buffer, filled) = match qp.receive.filling.take() {
            Some((buffer, filled)) if buffer.len() == size as usize => (buffer, filled),
            _ => (core.pool.take(size as usize), 0),
        };
        if filled < size {
            let from = at.after(u64::from(sent + filled));
            let answer = match qp.receive.read_refused.take() {
                Some(status) => Answer::Failed(status),
                None => owner.remote_read(qp.id, from, &mut buffer[filled as usize..]),
            };
            match answer {
                Answer::Done(()) => {}
                Answer::Parked { done } => {
                    qp.receive.filling = Some((buffer, filled.saturating_add(done).min(size)));
                    qp.receive.read_parked = true;
                    core.stats.parks += 1;
                    return Step::Idle;
                }
                Answer::Failed(status) => {
                    // The right is gone since the request was accepted, or a page cannot be had.
                    core.stats.refused += 1;
                    let code = match status {
                        Status::RemoteAccess => NakCode::REMOTE_ACCESS,
                        _ => NakCode::REMOTE_OPERATION,
                    };
                    let psn = psn.add(sent / mtu.bytes());
                    owner.event(qp.id, Event::AccessViolation);
                    super::requester::enter_error(qp, core, owner);
                    qp.receive.responses.push_back(Response::Nak {
                        psn,
                        syndrome: Syndrome::Nak(code),
                        msn,
                    });
                    return Step::More;
                }
            }
        }
        Some(buffer)
    };
    let place = Place::new(sent == 0, sent + size == len);
    let aeth = (place != Place::Middle).then(|| Aeth::new(Syndrome::ACK, msn));
    let count = mtu.packets(size);
    let mut packet = answer(
        qp,
        Operation::ReadResponse(place),
        psn.add(sent / mtu.bytes()),
        count,
        aeth,
    );
    packet.payload = payload;
    if let Err(packet) = link.transmit(packet, now) {
        qp.receive.filling = packet.payload.map(|buffer| (buffer, size));
        return Step::Full;
    }
    core.stats.packets_sent += u64::from(count);
    if place.ends() {
        qp.receive.responses.pop_front();
    } else if let Some(Response::Read { sent, .. }) = qp.receive.responses.front_mut() {
        *sent += size;
    }
    more(qp)
}
