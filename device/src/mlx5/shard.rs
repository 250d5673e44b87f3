//! Queue pairs, and the worker thread that runs them. A queue pair belongs to the shard that its number names.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protos::ib::{Gid, Qpn, ServiceType as Service};
use protos::mlx5::Layout;
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::eq::{Eqe, Event, port_change};
use protos::mlx5::qp::{Qpc, ServiceType, State as QpState};

use super::commands::{LOG_MAX_MCG, MAX_QP_MCG};
use super::hardware::Hca;
use super::memory::Port;
use super::owner::{Qps, ShardOwner};
use super::qp::{Changes, Qp, merge, transition};
use crate::fabric::{Endpoint, PortChange, Wake};
use crate::transport::{
    Config, Settings, Side, State as TransportState, Status as TransportStatus, Time, Transport,
    TransportError,
};

/// Changes of the port that wait to be told.
const MOST_CHANGES: usize = 16;

/// What the thread that serves the client, and the fabric, tell a worker.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    inner: Mutex<Letters>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct Letters {
    /// Send queues with new requests.
    rings: HashSet<u32>,
    /// CQs and the last word of their arm doorbell.
    arms: HashMap<u32, u32>,
    /// CQs with an event that is due later.
    moderated: HashSet<u32>,
    /// A packet has come, or something else that only a look tells.
    woken: bool,
    /// What became of the port.
    ports: Vec<(u8, PortChange)>,
    /// Page faults that are over.
    resumes: Vec<Resume>,
    stop: bool,
}

/// Half of a queue pair, and whether its page has come.
type Resume = (u32, Side, Result<(), TransportStatus>);

/// What a worker found.
#[derive(Debug, Default)]
struct Mail {
    rings: HashSet<u32>,
    arms: HashMap<u32, u32>,
    moderated: HashSet<u32>,
    ports: Vec<(u8, PortChange)>,
    resumes: Vec<Resume>,
}

impl Wake for Inbox {
    fn wake(&self) {
        self.put(|letters| letters.woken = true);
    }
}

impl Inbox {
    fn letters(&self) -> MutexGuard<'_, Letters> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, put: impl FnOnce(&mut Letters)) {
        put(&mut self.letters());
        self.rung.notify_one();
    }

    /// The port changed.
    pub(super) fn port_changed(&self, port: u8, change: PortChange) {
        self.put(|letters| {
            // Only the last state counts, but a driver that was told of an end is told of a beginning, too.
            if letters.ports.len() >= MOST_CHANGES {
                letters.ports.remove(0);
            }
            letters.ports.push((port, change));
        });
    }

    /// Waits until there is something, or `limit` has passed. `None` at the end.
    fn take(&self, limit: Option<Duration>) -> Option<Mail> {
        let mut letters = self.letters();
        if limit != Some(Duration::ZERO)
            && !letters.stop
            && !letters.woken
            && letters.rings.is_empty()
            && letters.arms.is_empty()
            && letters.moderated.is_empty()
            && letters.ports.is_empty()
            && letters.resumes.is_empty()
        {
            letters = match limit {
                None => self.rung.wait(letters).unwrap_or_else(PoisonError::into_inner),
                Some(limit) => {
                    self.rung
                        .wait_timeout(letters, limit)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        if letters.stop {
            return None;
        }
        letters.woken = false;
        Some(Mail {
            rings: std::mem::take(&mut letters.rings),
            arms: std::mem::take(&mut letters.arms),
            moderated: std::mem::take(&mut letters.moderated),
            ports: std::mem::take(&mut letters.ports),
            resumes: std::mem::take(&mut letters.resumes),
        })
    }
}

/// A share of the queue pairs.
#[derive(Debug)]
pub(super) struct Shard {
    inbox: Arc<Inbox>,
    /// Commands that wait for `state`: the worker lets them in.
    visitors: AtomicU32,
    state: Mutex<State>,
}

/// What a worker and the commands change.
#[derive(Debug)]
struct State {
    port: Port,
    endpoint: Endpoint,
    transport: Transport,
    /// By number; what is found is a place in `qps`.
    keys: HashMap<u32, u32>,
    qps: Qps,
    failed: Failed,
    /// CQs with an event that is due later.
    moderated: HashSet<u32>,
}

/// How often a queue pair in the error state is looked at for receive requests, which no doorbell tells of: at first,
/// and when nothing has come for long.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(128);

/// Queue pairs that may be in the error state.
#[derive(Debug)]
pub(super) struct Failed {
    qpns: Vec<u32>,
    /// When their receive queues are looked at, and how long after the last look that is.
    look_at: Time,
    pause: Duration,
}

impl Failed {
    fn new() -> Self {
        Self {
            qpns: Vec::new(),
            look_at: Time::ZERO,
            pause: SHORTEST_PAUSE,
        }
    }

    /// One more, which is looked at at once.
    pub(super) fn add(&mut self, qpn: u32) {
        if !self.qpns.contains(&qpn) {
            self.qpns.push(qpn);
            self.look_at = Time::ZERO;
            self.pause = SHORTEST_PAUSE;
        }
    }
}

impl State {
    fn key(&self, qpn: u32) -> Result<usize, Status> {
        let key = self.keys.get(&qpn).ok_or(Status::BAD_RESOURCE)?;
        Ok(*key as usize)
    }

    fn qp(&mut self, qpn: u32) -> Result<&mut Qp, Status> {
        let key = self.key(qpn)?;
        Ok(self.qps[key].as_deref_mut().expect("a number that is known"))
    }

    /// The transport, and what it asks.
    fn parts<'a>(&'a mut self, hca: &'a Hca) -> (&'a mut Transport, ShardOwner<'a>, &'a mut Endpoint) {
        let owner = ShardOwner {
            hca,
            port: &mut self.port,
            qps: &mut self.qps,
            failed: &mut self.failed,
        };
        (&mut self.transport, owner, &mut self.endpoint)
    }

    /// Tells the events of moderated CQs whose time has come. When the next one is due.
    fn expire(&mut self, hca: &Hca) -> Option<Duration> {
        if self.moderated.is_empty() {
            return None;
        }
        let (now, port) = (hca.now(), &mut self.port);
        let mut next = None;
        self.moderated.retain(|cqn| {
            let cq = hca.objects.cq(*cqn);
            let due = cq.and_then(|cq| cq.expire(port, &hca.interrupts, now));
            next = next.into_iter().chain(due).min();
            due.is_some()
        });
        next.map(|due| now.until(due))
    }

    /// Flushes what was posted to queue pairs in the error state, when it is time. How long until the next time.
    fn flush(&mut self, hca: &Hca) -> Option<Duration> {
        if self.failed.qpns.is_empty() {
            return None;
        }
        let now = hca.now();
        if now < self.failed.look_at {
            return Some(now.until(self.failed.look_at));
        }
        let transport = &self.transport;
        let in_error = |qpn: u32| {
            let status = transport.status(Qpn::new(qpn));
            status.is_some_and(|status| status.state == TransportState::Error)
        };
        self.failed.qpns.retain(|qpn| in_error(*qpn));
        let before = hca.counters.completions.load(Ordering::Relaxed);
        for at in 0..self.failed.qpns.len() {
            let qpn = Qpn::new(self.failed.qpns[at]);
            let (transport, mut owner, _) = self.parts(hca);
            transport.flush(qpn, &mut owner);
        }
        let busy = hca.counters.completions.load(Ordering::Relaxed) != before;
        self.failed.pause = if busy {
            SHORTEST_PAUSE
        } else {
            (self.failed.pause * 2).min(LONGEST_PAUSE)
        };
        self.failed.look_at = now + self.failed.pause;
        (!self.failed.qpns.is_empty()).then_some(self.failed.pause)
    }
}

/// A transport without queue pairs, which keeps what the capabilities promise.
fn transport() -> Transport {
    Transport::new(Config {
        max_groups: 1 << LOG_MAX_MCG,
        max_members: MAX_QP_MCG as usize,
        ..Config::default()
    })
}

impl Shard {
    pub(super) fn new(inbox: Arc<Inbox>, port: Port, endpoint: Endpoint) -> Self {
        Self {
            inbox,
            visitors: AtomicU32::new(0),
            state: Mutex::new(State {
                port,
                endpoint,
                transport: transport(),
                keys: HashMap::new(),
                qps: Vec::new(),
                failed: Failed::new(),
                moderated: HashSet::new(),
            }),
        }
    }

    /// For commands.
    fn visit(&self) -> MutexGuard<'_, State> {
        self.visitors.fetch_add(1, Ordering::SeqCst);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.visitors.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// For the worker.
    fn enter(&self) -> MutexGuard<'_, State> {
        // A mutex goes to whoever comes by, and the worker comes by all the time.
        while self.visitors.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A send doorbell. Its page has been checked.
    pub(super) fn ring(&self, qpn: u32) {
        self.inbox.put(|letters| {
            letters.rings.insert(qpn);
        });
    }

    /// A CQ's arm doorbell. Its page has been checked.
    pub(super) fn arm(&self, cqn: u32, word: u32) {
        self.inbox.put(|letters| {
            letters.arms.insert(cqn, word);
        });
    }

    /// A CQ of this shard's keeps an event back.
    pub(super) fn moderate(&self, cqn: u32) {
        self.inbox.put(|letters| {
            letters.moderated.insert(cqn);
        });
    }

    /// A page fault is over.
    pub(super) fn resume(&self, qpn: u32, side: Side, result: Result<(), TransportStatus>) {
        self.inbox
            .put(|letters| letters.resumes.push((qpn, side, result)));
    }

    /// What the queue pair was to be told of page faults is void.
    pub(super) fn forget(&self, qpn: u32) {
        self.inbox
            .put(|letters| letters.resumes.retain(|(number, ..)| *number != qpn));
    }

    /// The worker ends.
    pub(super) fn stop(&self) {
        self.inbox.put(|letters| letters.stop = true);
    }

    /// No queue pairs; the worker touches nothing of before.
    pub(super) fn reset(&self) {
        let mut state = self.visit();
        state.transport = transport();
        state.keys.clear();
        state.qps.clear();
        state.failed = Failed::new();
        // Packets for queue pairs of before.
        state.endpoint.clear();
        let mut letters = self.inbox.letters();
        letters.rings.clear();
        letters.arms.clear();
        letters.moderated.clear();
        state.moderated.clear();
        letters.resumes.clear();
    }

    /// The worker's life.
    pub(super) fn run(&self, hca: &Hca) {
        let mut limit = None;
        while let Some(mail) = self.inbox.take(limit) {
            let mut state = self.enter();
            for (cqn, word) in mail.arms {
                if let Some(cq) = hca.objects.cq(cqn) {
                    cq.arm(&mut state.port, &hca.interrupts, word);
                }
            }
            for (port, change) in mail.ports {
                tell(hca, &mut state.port, port, change);
            }
            let (transport, mut owner, link) = state.parts(hca);
            for qpn in mail.rings {
                transport.ring(Qpn::new(qpn));
            }
            for (qpn, side, result) in mail.resumes {
                transport.resume(Qpn::new(qpn), side, result);
            }
            let poll = transport.poll(hca.now(), &mut owner, link);
            let next = transport.poll_at().map(|at| hca.now().until(at));
            let flush = state.flush(hca);
            state.moderated.extend(mail.moderated);
            let event = state.expire(hca);
            limit = if poll.again {
                Some(Duration::ZERO)
            } else {
                // The earlier of the two.
                next.into_iter().chain(flush).chain(event).min()
            };
        }
    }

    pub(super) fn has(&self, qpn: u32) -> bool {
        self.visit().keys.contains_key(&qpn)
    }

    /// CREATE_QP.
    pub(super) fn create(&self, hca: &Hca, qp: Box<Qp>) -> Result<(), Status> {
        let mut state = self.visit();
        let key = match state.qps.iter().position(Option::is_none) {
            Some(key) => key,
            None => {
                state.qps.push(None);
                state.qps.len() - 1
            }
        };
        let qpn = qp.qpn;
        let settings = Settings {
            service: match qp.service {
                ServiceType::UC => Service::Uc,
                ServiceType::UD | ServiceType::QP0 | ServiceType::QP1 => Service::Ud,
                ServiceType::XRC => Service::Xrc,
                // Of a REG_UMR queue pair nothing ever reaches the wire.
                _ => Service::Rc,
            },
            key: key as u32,
            shared_receive: qp.srq.is_some() || qp.service == ServiceType::XRC,
        };
        state
            .transport
            .create(Qpn::new(qpn), &settings)
            .map_err(|_| Status::NO_RESOURCE)?;
        hca.set_door(qpn, qp.uar_page);
        state.keys.insert(qpn, key as u32);
        state.qps[key] = Some(qp);
        Ok(())
    }

    /// DESTROY_QP: nothing of it is touched any more when this returns.
    pub(super) fn destroy(&self, hca: &Hca, qpn: u32) -> Result<(), Status> {
        hca.set_door(qpn, 0);
        let mut state = self.visit();
        let key = state.key(qpn)?;
        state
            .transport
            .destroy(Qpn::new(qpn))
            .map_err(|_| Status::BAD_RESOURCE)?;
        hca.forget_faults(qpn);
        state.keys.remove(&qpn);
        state.qps[key] = None;
        Ok(())
    }

    /// QUERY_QP.
    pub(super) fn query(&self, qpn: u32) -> Result<Qpc, Status> {
        let mut state = self.visit();
        let status = state.transport.status(Qpn::new(qpn));
        let status = status.ok_or(Status::BAD_RESOURCE)?;
        let qp = state.qp(qpn)?;
        Ok(qp
            .context
            .clone()
            .with(Qpc::STATE, u32::from(state_code(status.state).0))
            .with(Qpc::NEXT_SEND_PSN, status.next_send_psn.get())
            .with(Qpc::NEXT_RCV_PSN, status.next_receive_psn.get())
            .with(Qpc::HW_SQ_COUNTER, u32::from(qp.sent))
            .with(Qpc::HW_RQ_COUNTER, u32::from(qp.received)))
    }

    /// A transition.
    pub(super) fn modify(
        &self,
        hca: &Hca,
        qpn: u32,
        opcode: Opcode,
        given: &Qpc,
        changes: Changes,
    ) -> Result<(), Status> {
        let (from, to) = transition(opcode).ok_or(Status::BAD_OP)?;
        let mut state = self.visit();
        let now = state
            .transport
            .status(Qpn::new(qpn))
            .ok_or(Status::BAD_RESOURCE)?;
        if !from.contains(&state_code(now.state)) {
            return Err(Status::BAD_QP_STATE);
        }
        let qp = state.qp(qpn)?;
        merge(&mut qp.context, given, changes);
        if changes.initial {
            qp.pd = qp.context.get(Qpc::PD);
            let cq = |number| hca.objects.cq(number);
            qp.send_cq = cq(qp.context.get(Qpc::CQN_SEND));
            qp.receive_cq = cq(qp.context.get(Qpc::CQN_RECEIVE));
        }
        let attributes = qp.attributes(changes, &hca.port_view());
        qp.context.set(Qpc::STATE, u32::from(to.0));
        if to == QpState::RST {
            qp.rewind();
            hca.forget_faults(qpn);
        }
        let target = match to {
            QpState::RST => TransportState::Reset,
            QpState::INIT => TransportState::Init,
            QpState::RTR => TransportState::Rtr,
            QpState::RTS => TransportState::Rts,
            _ => TransportState::Error,
        };
        let (transport, mut owner, _) = state.parts(hca);
        transport
            .modify(Qpn::new(qpn), target, &attributes, &mut owner)
            .map_err(|error| {
                tracing::debug!(qpn, %error, "a transition was refused");
                Status::BAD_QP_STATE
            })?;
        // What became possible is the worker's to do.
        self.inbox.wake();
        Ok(())
    }

    /// Attaches to a multicast group, or detaches.
    pub(super) fn multicast(&self, qpn: u32, gid: [u8; 16], attach: bool) -> Result<(), Status> {
        let mut state = self.visit();
        let (qpn, gid) = (Qpn::new(qpn), Gid(gid));
        let result = if attach {
            state.transport.attach(qpn, gid)
        } else {
            state.transport.detach(qpn, gid)
        };
        result.map_err(|error| match error {
            TransportError::Crowded(..) => Status::LIMIT,
            _ => Status::BAD_RESOURCE,
        })
    }

    pub(super) fn describe(&self, max: usize) -> Vec<serde_json::Value> {
        let state = self.visit();
        state
            .qps
            .iter()
            .flatten()
            .take(max)
            .map(|qp| {
                let mut json = qp.describe();
                json["transport"] = serde_json::json!(state.transport.status(Qpn::new(qp.qpn)));
                json
            })
            .collect()
    }

    /// The transport's counters.
    pub(super) fn stats(&self) -> serde_json::Value {
        serde_json::json!(self.visit().transport.stats())
    }
}

/// An event of the port.
fn tell(hca: &Hca, memory: &mut Port, port: u8, change: PortChange) {
    let sub_type = match change {
        PortChange::Up => port_change::ACTIVE,
        PortChange::Down => port_change::DOWN,
        PortChange::LidChanged => port_change::LID,
    };
    // The port's number is in the upper half of the ninth byte.
    let eqe = Eqe::new(Event::PORT_CHANGE, sub_type).with(2, u32::from(port) << 28);
    hca.event(memory, Event::PORT_CHANGE, &eqe);
}

/// The driver's code of a state.
fn state_code(state: TransportState) -> QpState {
    match state {
        TransportState::Reset => QpState::RST,
        TransportState::Init => QpState::INIT,
        TransportState::Rtr => QpState::RTR,
        TransportState::Rts => QpState::RTS,
        TransportState::Sqd => QpState::SQD,
        TransportState::Sqe => QpState::SQER,
        TransportState::Error => QpState::ERR,
    }
}
