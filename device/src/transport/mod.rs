//! InfiniBand transport: RC, UC, UD and XRC queue pairs as state machines over abstract queues.
//!
//! A [`Transport`] holds the queue pairs of one thread. It asks its [`Owner`] for requests and memory, and sends and
//! receives [`Packet`]s through a [`Link`]. It knows no register layout and no clock, and waits for nothing but whoever
//! copies from a loan at the moment when that ends. Time is an argument, so that a test with a seeded link replays every
//! loss, order, duplication and delay.
//!
//! Section numbers are those of the InfiniBand Architecture Specification, volume 1.
//!
//! * *Segments.* A packet may stand for several in a row ([`Packet`]), with up to 64 KiB of payload: inside a process
//!   the cost of a message is that of its bytes. Links that leave the process cut it.
//! * *Loans.* Inside a process the payload of a reliable SEND or WRITE can stay in its sender's memory until it is
//!   delivered, and is then copied once (`loan.rs`). Short messages, READs and everything else carry bytes.
//! * *Absent pages.* Every question about memory can be answered with "parked" ([`Answer`]). The packet or request
//!   keeps its place with the bytes that are done. What cannot be done twice (an atomic, taking a receive request, a
//!   completion, a sequence number) comes after everything that can park.
//! * *Cost.* Queue pairs are found by an array; who has work stands in a list; deadlines are in a heap that an
//!   acknowledgement does not touch. Nothing looks at all queue pairs, nothing is allocated per message.
//!
//! Not implemented: reliable datagrams, automatic path migration, end-to-end credits (the responder does not count
//! its receive requests; a requester meets RNR NAKs instead), dynamically connected transport, atomics of other
//! sizes than 8 bytes.

mod answers;
mod core;
mod datagram;
mod link;
mod loan;
mod owner;
mod packet;
mod pool;
mod qp;
mod requester;
mod responder;
mod response;
mod table;
#[cfg(test)]
mod tests;
mod time;
mod timers;

pub use self::core::{Config, Stats};
pub use link::Link;
#[cfg(test)]
pub(crate) use loan::Term;
pub use loan::{Gone, Lender, Lent, Loan, Place, Shown};
pub use owner::{
    Action, Answer, Asked, Atomic, Datagram, Event, Fence, Global, Owner, Path, Pulled, QpId, Receive,
    Received, Remote, Request, Right, Side, Source, Status, Target,
};
pub use packet::{Extension, Packet};
pub use pool::{Buffer, Pool, SEGMENT, SMALL};
pub use qp::{Attributes, QpStatus, Settings, State};
pub use time::Time;

use std::collections::{HashMap, VecDeque};

use protos::ib::{Gid, Operation, Qpn, ServiceType};

use self::core::{Core, Step};
use qp::Qp;
use table::Table;
use timers::Timers;

/// Why a queue pair was not made, changed or found.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum TransportError {
    /// No such queue pair.
    #[error("there is no queue pair {0:?}")]
    Unknown(Qpn),
    /// The number is taken.
    #[error("queue pair {0:?} exists; destroy it first")]
    Exists(Qpn),
    /// Section 10.3.1 has no such transition.
    #[error("queue pair {qpn:?} cannot go from {from:?} to {to:?}")]
    Transition {
        /// Which.
        qpn: Qpn,
        /// State it is in.
        from: State,
        /// State that was asked for.
        to: State,
    },
    /// Not a datagram queue pair, or no multicast address.
    #[error("queue pair {0:?} cannot be attached to {1:?}: only datagram queue pairs join multicast groups")]
    Group(Qpn, Gid),
    /// Too many groups, or too many members of this one.
    #[error("{1:?} has no room for queue pair {0:?}: detach another, or leave another group")]
    Crowded(Qpn, Gid),
}

/// What a poll did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poll {
    /// There may be more to do at once. Else: at [`Transport::poll_at`], or after a packet, a ring or a resume.
    pub again: bool,
    /// Packets taken in.
    pub received: usize,
    /// Turns of queue pairs that did something.
    pub turns: usize,
}

/// The queue pairs of one thread.
#[derive(Debug)]
pub struct Transport {
    table: Table,
    core: Core,
    resumed: VecDeque<(u32, Side)>,
    /// Turns that met a full link, until the next poll.
    full: Vec<(u32, bool)>,
}

impl Default for Transport {
    fn default() -> Self {
        Self::new(Config::default())
    }
}

impl Transport {
    /// Without queue pairs.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            table: Table::default(),
            core: Core {
                config: Config {
                    segment: config.segment.clamp(256, SEGMENT as u32),
                    ..config
                },
                pool: Pool::default(),
                stats: Stats::default(),
                timers: Timers::default(),
                send: VecDeque::new(),
                respond: VecDeque::new(),
                last_payload: 0,
                groups: HashMap::new(),
            },
            resumed: VecDeque::new(),
            full: Vec::new(),
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.stats
    }

    /// The buffers of its packets.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.core.pool
    }

    #[cfg(test)]
    fn timers(&self) -> usize {
        self.core.timers.len()
    }

    fn find(&mut self, qpn: Qpn) -> Result<(&mut Qp, &mut Core), TransportError> {
        let slot = self.table.slot(qpn).ok_or(TransportError::Unknown(qpn))?;
        let qp = self.table.get(slot).ok_or(TransportError::Unknown(qpn))?;
        Ok((qp, &mut self.core))
    }

    /// Makes a queue pair, in RESET.
    ///
    /// # Errors
    /// The number is taken.
    pub fn create(&mut self, qpn: Qpn, settings: &Settings) -> Result<(), TransportError> {
        if self.table.slot(qpn).is_some() {
            return Err(TransportError::Exists(qpn));
        }
        self.table.insert(Qp::new(qpn, settings));
        Ok(())
    }

    /// Forgets a queue pair, whatever it was doing.
    ///
    /// # Errors
    /// There is none.
    pub fn destroy(&mut self, qpn: Qpn) -> Result<(), TransportError> {
        let qp = self.table.remove(qpn).ok_or(TransportError::Unknown(qpn))?;
        for group in &qp.groups {
            self.core.leave(*group, qp.slot);
        }
        Ok(())
    }

    /// Changes attributes and state. To the error state: everything is flushed before this returns.
    ///
    /// # Errors
    /// No such queue pair or transition.
    pub fn modify(
        &mut self,
        qpn: Qpn,
        to: State,
        attributes: &Attributes,
        owner: &mut impl Owner,
    ) -> Result<(), TransportError> {
        let (qp, core) = self.find(qpn)?;
        use State as S;
        let from = qp.state;
        let legal = matches!(to, S::Reset | S::Error)
            || matches!(
                (from, to),
                (S::Reset | S::Init, S::Init)
                    | (S::Init, S::Rtr)
                    | (S::Rtr | S::Rts | S::Sqd | S::Sqe, S::Rts)
                    | (S::Rts | S::Sqd, S::Sqd)
            );
        if !legal {
            return Err(TransportError::Transition { qpn, from, to });
        }
        match to {
            S::Reset => qp.reset(),
            S::Error => {
                qp.apply(attributes);
                if from != S::Error {
                    requester::enter_error(qp, core, owner);
                }
            }
            _ => {
                qp.apply(attributes);
                qp.state = to;
                if from != S::Sqd {
                    qp.send.drained = false;
                }
                if to == S::Rts && from != S::Rts {
                    qp.send.retries = qp.set.retry_count;
                    qp.send.rnr_retries = qp.set.rnr_retry;
                }
                if to == S::Sqd {
                    requester::drained(qp, owner);
                }
                core.list_send(qp);
            }
        }
        Ok(())
    }

    /// State and numbers of a queue pair.
    #[must_use]
    pub fn status(&self, qpn: Qpn) -> Option<QpStatus> {
        let qp = self.table.by_number(qpn)?;
        Some(QpStatus {
            state: qp.state,
            draining: qp.state == State::Sqd && !qp.send.drained,
            next_send_psn: qp.send.next_psn,
            next_receive_psn: qp.receive.expected,
            outstanding: qp.send.outstanding.len(),
            next_index: qp.send.next_index,
        })
    }

    /// There may be new requests in the send queue.
    pub fn ring(&mut self, qpn: Qpn) {
        if let Ok((qp, core)) = self.find(qpn) {
            core.list_send(qp);
        }
    }

    /// A page that was absent is there, or cannot be had: then what was asked fails with that status. Ignored when
    /// that side waits for nothing (any more).
    pub fn resume(&mut self, qpn: Qpn, side: Side, result: Result<(), Status>) {
        let Ok((qp, _)) = self.find(qpn) else {
            return;
        };
        let refused = result.err();
        let waits = match side {
            Side::Send if qp.send.parked => {
                qp.send.refused = refused;
                true
            }
            Side::Response if !qp.send.held.is_empty() => {
                qp.send.held.refused = refused;
                true
            }
            Side::Receive if !qp.receive.held.is_empty() => {
                qp.receive.held.refused = refused;
                true
            }
            // A page of the receive queue that cannot be had ends the flush.
            Side::Receive if qp.receive.flushing => {
                qp.receive.flushing = refused.is_none();
                refused.is_none()
            }
            Side::Read if qp.receive.read_parked => {
                qp.receive.read_refused = refused;
                true
            }
            _ => false,
        };
        if waits {
            let slot = qp.slot;
            self.resumed.push_back((slot, side));
        }
    }

    /// Flushes receive requests that were posted to a queue pair in the error state.
    pub fn flush(&mut self, qpn: Qpn, owner: &mut impl Owner) {
        if let Ok((qp, core)) = self.find(qpn)
            && qp.state == State::Error
            && !qp.shared_receive
        {
            responder::flush_posted(qp, core, owner);
        }
    }

    /// Joins a multicast group: its packets come to this queue pair.
    ///
    /// # Errors
    /// No such queue pair, or not one that can, or there are as many as [`Config`] allows.
    pub fn attach(&mut self, qpn: Qpn, group: Gid) -> Result<(), TransportError> {
        let (qp, core) = self.find(qpn)?;
        if qp.service != ServiceType::Ud || !group.is_multicast() {
            return Err(TransportError::Group(qpn, group));
        }
        if qp.groups.contains(&group) {
            return Ok(());
        }
        let room = match core.groups.get(&group) {
            Some(members) => members.len() < core.config.max_members,
            None => core.groups.len() < core.config.max_groups,
        };
        if !room {
            return Err(TransportError::Crowded(qpn, group));
        }
        qp.groups.push(group);
        core.groups.entry(group).or_default().push(qp.slot);
        Ok(())
    }

    /// Leaves a multicast group.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn detach(&mut self, qpn: Qpn, group: Gid) -> Result<(), TransportError> {
        let (qp, core) = self.find(qpn)?;
        qp.groups.retain(|other| *other != group);
        core.leave(group, qp.slot);
        Ok(())
    }

    /// When `poll` has something to do although nothing happens. (It may find that it has not.)
    #[must_use]
    pub fn poll_at(&self) -> Option<Time> {
        self.core.timers.next()
    }

    /// Does a bounded amount of work.
    pub fn poll(&mut self, now: Time, owner: &mut impl Owner, link: &mut impl Link) -> Poll {
        self.relist();
        self.prune();
        self.resume_all(now, owner);
        let mut received = 0;
        let mut bytes = 0;
        let (batch, budget) = (
            self.core.config.receive_batch,
            self.core.config.send_budget as usize,
        );
        while received < batch && bytes <= budget {
            let Some(packet) = link.receive(now) else {
                break;
            };
            received += 1;
            bytes += packet.payload_len();
            self.take(packet, now, owner);
        }
        if received < batch && bytes <= budget {
            // Only with nothing left to read: an answer that has come counts, however late this thread looks.
            self.run_timers(now, owner);
        }
        let turns = self.answer(now, owner, link) + self.send(now, owner, link);
        Poll {
            again: received > 0 || turns > 0 || !self.resumed.is_empty(),
            received,
            turns,
        }
    }

    /// Those that met a full link try again.
    fn relist(&mut self) {
        while let Some((slot, send)) = self.full.pop() {
            if let Some(qp) = self.table.get(slot) {
                if send {
                    self.core.list_send(qp);
                } else {
                    self.core.list_respond(qp);
                }
            }
        }
    }

    /// Entries of the heap that count no more come up at their time only, which may be hours away, and a queue pair
    /// can leave one with each request that it is destroyed with, or with each RNR NAK.
    fn prune(&mut self) {
        if self.core.timers.len() > 1024 + 4 * self.table.places() {
            let valid = |qp: &Qp| Some((qp.alarm?, qp.slot));
            self.core.timers.refill(self.table.all().filter_map(valid));
        }
    }

    fn resume_all(&mut self, now: Time, owner: &mut impl Owner) {
        for _ in 0..self.resumed.len() {
            let Some((slot, side)) = self.resumed.pop_front() else {
                break;
            };
            let Some(qp) = self.table.get(slot) else {
                continue;
            };
            let core = &mut self.core;
            match side {
                Side::Send => qp.send.parked = false,
                Side::Response => answers::unhold(qp, core, owner, now),
                Side::Receive if qp.receive.flushing => responder::flush_posted(qp, core, owner),
                Side::Receive if qp.service == ServiceType::Ud => {
                    datagram::unhold_datagrams(qp, core, owner);
                }
                Side::Receive => responder::unhold(qp, core, owner),
                Side::Read => {
                    qp.receive.read_parked = false;
                    core.list_respond(qp);
                }
            }
            core.list_send(qp);
            core.arm(qp);
        }
    }

    fn run_timers(&mut self, now: Time, owner: &mut impl Owner) {
        while let Some((at, slot)) = self.core.timers.due(now) {
            let Some(qp) = self.table.get(slot) else {
                continue;
            };
            if qp.alarm != Some(at) {
                continue;
            }
            qp.alarm = None;
            let waited = qp.send.rnr_until.is_some();
            let before = self.core.stats.go_backs;
            requester::on_time(qp, &mut self.core, owner, now);
            if waited || self.core.stats.go_backs != before {
                self.core.list_send(qp);
            }
            self.core.arm(qp);
        }
    }

    /// Gives a packet to whom it is for.
    fn take(&mut self, packet: Packet, now: Time, owner: &mut impl Owner) {
        let (Some(service), Some(operation)) = (packet.opcode.service(), packet.opcode.operation()) else {
            self.core.stats.dropped += 1;
            return;
        };
        if packet.count == 0 || packet.count > 1 && packet.payload_len() > SEGMENT {
            self.core.stats.dropped += 1;
            return;
        }
        if service == ServiceType::Ud && packet.dest == Qpn::MULTICAST {
            return self.spread(&packet, owner);
        }
        let Some(qp) = self.table.slot(packet.dest).and_then(|slot| self.table.get(slot)) else {
            self.core.stats.dropped += 1;
            return;
        };
        if qp.service != service || !accepts(qp, &packet) {
            self.core.stats.dropped += 1;
            return;
        }
        let core = &mut self.core;
        match operation {
            Operation::Acknowledge | Operation::AtomicAcknowledge | Operation::ReadResponse(_) => {
                answers::answered(qp, core, owner, now, packet, operation);
                core.list_send(qp);
                core.arm(qp);
            }
            _ if !qp.receives() => core.stats.dropped += 1,
            _ if service == ServiceType::Ud => datagram::datagram(qp, core, owner, packet),
            _ => responder::requested(qp, core, owner, packet, operation),
        }
    }

    /// A multicast datagram: one copy for each member.
    fn spread(&mut self, packet: &Packet, owner: &mut impl Owner) {
        let Some(group) = packet.global.map(|grh| grh.dgid) else {
            self.core.stats.dropped += 1;
            return;
        };
        let members = self.core.groups.get(&group).map_or(0, Vec::len);
        for member in 0..members {
            // (Looked up each time: a member may be thrown into the error state by its packet, never out of the
            // group.)
            let Some(slot) = self
                .core
                .groups
                .get(&group)
                .and_then(|list| list.get(member).copied())
            else {
                return;
            };
            let Some(qp) = self.table.get(slot) else {
                continue;
            };
            let own = matches!(packet.extension, Extension::Datagram(deth)
                if deth.source() == qp.set.deth_source && packet.slid == qp.set.path.slid);
            if own && qp.set.block_loopback || !qp.receives() || !accepts(qp, packet) {
                continue;
            }
            datagram::datagram(qp, &mut self.core, owner, packet.copy());
        }
    }

    fn answer(&mut self, now: Time, owner: &mut impl Owner, link: &mut impl Link) -> usize {
        let mut turns = 0;
        let mut budget = i64::from(self.core.config.send_budget);
        while budget > 0 {
            let Some(slot) = self.core.respond.pop_front() else {
                break;
            };
            let Some(qp) = self.table.get(slot) else {
                continue;
            };
            qp.respond_listed = false;
            let large =
                matches!(qp.receive.responses.front(), Some(qp::Response::Read { len, .. }) if *len > 2048);
            match response::respond(qp, &mut self.core, owner, link, now) {
                Step::Idle => {}
                Step::More => self.core.list_respond(qp),
                Step::Full => {
                    self.full.push((slot, false));
                    continue;
                }
            }
            turns += 1;
            budget -= if large {
                i64::from(self.core.config.segment)
            } else {
                1024
            };
        }
        turns
    }

    fn send(&mut self, now: Time, owner: &mut impl Owner, link: &mut impl Link) -> usize {
        let mut turns = 0;
        let mut budget = i64::from(self.core.config.send_budget);
        let small = (self.core.config.send_budget / 32).max(1);
        while budget > 0 {
            let Some(slot) = self.core.send.pop_front() else {
                break;
            };
            let Some(qp) = self.table.get(slot) else {
                continue;
            };
            qp.send_listed = false;
            // A few small messages in one turn: the queue pair's state is in the cache.
            let mut turn = 8;
            loop {
                match requester::advance(qp, &mut self.core, owner, link, now) {
                    Step::Idle => break,
                    Step::More => {
                        turns += 1;
                        let last = self.core.last_payload;
                        budget -= i64::from(last.max(small));
                        turn -= 1;
                        if turn == 0 || budget <= 0 || last > 4096 {
                            self.core.list_send(qp);
                            break;
                        }
                    }
                    Step::Full => {
                        self.full.push((slot, true));
                        break;
                    }
                }
            }
            self.core.arm(qp);
        }
        turns
    }
}

/// Section 9.6.1: whether a packet may come in here at all.
fn accepts(qp: &Qp, packet: &Packet) -> bool {
    let special = qp.id.qpn == Qpn::SMI || qp.id.qpn == Qpn::GSI;
    if !special && !qp.set.pkey.matches(packet.pkey) {
        return false;
    }
    match qp.service {
        ServiceType::Ud => {
            let Extension::Datagram(deth) = packet.extension else {
                return false;
            };
            // (The subnet management interface has no key.)
            packet.count == 1
                && packet.loan.is_none()
                && packet.data().len() <= SMALL
                && (qp.id.qpn == Qpn::SMI || deth.qkey() == qp.set.qkey)
        }
        _ => packet.slid == qp.set.path.dlid,
    }
}

impl Core {
    fn leave(&mut self, group: Gid, slot: u32) {
        if let Some(list) = self.groups.get_mut(&group) {
            list.retain(|other| *other != slot);
            if list.is_empty() {
                self.groups.remove(&group);
            }
        }
    }
}
