//! The receiving half of datagram queue pairs.

use protos::ib::Operation;

use super::core::Core;
use super::owner::{Answer, Event, Owner, Status};
use super::packet::Packet;
use super::qp::{Qp, State};
use super::responder::{Executed, complete, take};

/// A datagram (section 9.8.3). It is dropped where a connected packet would be refused.
pub(super) fn datagram(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, packet: Packet) {
    if !qp.receive.held.is_empty() {
        if qp.receive.held.packets.len() < core.config.max_held {
            qp.receive.held.packets.push_back(packet);
        } else {
            core.stats.dropped += 1;
        }
        return;
    }
    take_datagram(qp, core, owner, packet);
}

/// Goes on with held datagrams, after a page came.
pub(super) fn unhold_datagrams(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner) {
    while let Some(packet) = qp.receive.held.packets.pop_front() {
        if !qp.receives() {
            qp.receive.held.clear();
            return;
        }
        if take_datagram(qp, core, owner, packet) {
            return;
        }
    }
}

/// Whether it waits for a page.
fn take_datagram(qp: &mut Qp, core: &mut Core, owner: &mut impl Owner, packet: Packet) -> bool {
    let result = match qp.receive.held.refused.take() {
        Some(status) => Executed::Refused(status),
        None => store_datagram(qp, owner, &packet),
    };
    let operation = packet.opcode.operation().unwrap_or(Operation::Acknowledge);
    match result {
        Executed::Parked => {
            qp.receive.held.packets.push_front(packet);
            core.stats.parks += 1;
            return true;
        }
        Executed::Done => {
            core.stats.packets_received += 1;
            let len = packet.data().len() as u32 + GRH;
            complete(qp, owner, &packet, operation, Status::Success, len);
            if qp.state == State::Rtr && !qp.receive.established {
                qp.receive.established = true;
                owner.event(qp.id, Event::CommunicationEstablished);
            }
        }
        // (No loan comes here.)
        Executed::NotReady | Executed::Gone => core.stats.dropped += 1,
        Executed::Refused(status) => {
            core.stats.refused += 1;
            if qp.receive.taken.is_some() {
                // The receive request is at fault: it ends with the error, and the queue pair with it (9.9.3).
                complete(qp, owner, &packet, operation, status, 0);
                super::requester::enter_error(qp, core, owner);
            }
        }
    }
    qp.receive.held.done = 0;
    false
}

/// Bytes before a datagram's payload (section 11.4.1.2: kept free whether or not there is a header).
const GRH: u32 = size_of::<protos::ib::Grh>() as u32;

fn store_datagram(qp: &mut Qp, owner: &mut impl Owner, packet: &Packet) -> Executed {
    if let Some(other) = take(qp, owner, packet) {
        return other;
    }
    let Some(receive) = qp.receive.taken else {
        return Executed::NotReady;
    };
    let header;
    let header: &[u8] = match &packet.global {
        Some(grh) => {
            header = *grh;
            zerocopy::IntoBytes::as_bytes(&header)
        }
        None => &[],
    };
    for (part, offset) in [(header, 0), (packet.data(), GRH)] {
        let end = offset + part.len() as u32;
        let done = qp.receive.held.done.max(offset);
        if done >= end {
            continue;
        }
        match owner.scatter_receive(qp.id, &receive, done, &part[(done - offset) as usize..]) {
            Answer::Done(()) => qp.receive.held.done = end,
            Answer::Parked { done: more } => {
                qp.receive.held.done = done.saturating_add(more).min(end);
                return Executed::Parked;
            }
            Answer::Failed(status) => return Executed::Refused(status),
        }
    }
    Executed::Done
}
