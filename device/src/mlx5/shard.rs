//! Queue pairs, and the worker thread that runs them. A queue pair belongs to the shard that its number names.

use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protos::mlx5::Layout;
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::qp::{Qpc, State as QpState};

use super::hardware::Hca;
use super::memory::Port;
use super::qp::{Changes, Qp, merge, transition};

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
    /// A packet has come, or something else that only a look tells.
    woken: bool,
    stop: bool,
}

/// What a worker found.
#[derive(Debug, Default)]
struct Mail {
    rings: HashSet<u32>,
    arms: HashMap<u32, u32>,
}

impl Inbox {
    fn letters(&self) -> MutexGuard<'_, Letters> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, put: impl FnOnce(&mut Letters)) {
        put(&mut self.letters());
        self.rung.notify_one();
    }

    /// Somebody looks at everything again.
    pub(super) fn wake(&self) {
        self.put(|letters| letters.woken = true);
    }

    /// Waits until there is something, or `limit` has passed. `None` at the end.
    fn take(&self, limit: Option<Duration>) -> Option<Mail> {
        let mut letters = self.letters();
        if limit != Some(Duration::ZERO)
            && !letters.stop
            && !letters.woken
            && letters.rings.is_empty()
            && letters.arms.is_empty()
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
        })
    }
}

/// A share of the queue pairs.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) inbox: std::sync::Arc<Inbox>,
    state: Mutex<State>,
}

/// What a worker and the commands change.
#[derive(Debug)]
struct State {
    port: Port,
    qps: HashMap<u32, Qp>,
}

impl Shard {
    pub(super) fn new(port: Port) -> Self {
        Self {
            inbox: std::sync::Arc::default(),
            state: Mutex::new(State {
                port,
                qps: HashMap::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
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

    /// The worker ends.
    pub(super) fn stop(&self) {
        self.inbox.put(|letters| letters.stop = true);
    }

    /// No queue pairs; the worker touches nothing of before.
    pub(super) fn reset(&self) {
        let mut state = self.state();
        state.qps.clear();
        let mut letters = self.inbox.letters();
        letters.rings.clear();
        letters.arms.clear();
    }

    /// The worker's life.
    pub(super) fn run(&self, hca: &Hca) {
        let mut limit = None;
        while let Some(mail) = self.inbox.take(limit) {
            let mut state = self.state();
            for (cqn, word) in mail.arms {
                if let Some(cq) = hca.objects.cq(cqn) {
                    cq.arm(&mut state.port, &hca.interrupts, word);
                }
            }
            limit = None;
            let _ = mail.rings;
        }
    }

    pub(super) fn has(&self, qpn: u32) -> bool {
        self.state().qps.contains_key(&qpn)
    }

    /// CREATE_QP.
    pub(super) fn create(&self, hca: &Hca, qp: Qp) -> Result<(), Status> {
        hca.set_door(qp.qpn, qp.uar_page);
        self.state().qps.insert(qp.qpn, qp);
        Ok(())
    }

    /// DESTROY_QP.
    pub(super) fn destroy(&self, hca: &Hca, qpn: u32) -> Result<(), Status> {
        hca.set_door(qpn, 0);
        self.state().qps.remove(&qpn).ok_or(Status::BAD_RESOURCE)?;
        Ok(())
    }

    /// QUERY_QP.
    pub(super) fn query(&self, qpn: u32) -> Result<Qpc, Status> {
        let state = self.state();
        let qp = state.qps.get(&qpn).ok_or(Status::BAD_RESOURCE)?;
        Ok(qp.context.clone())
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
        let _ = hca;
        let (from, to) = transition(opcode).ok_or(Status::BAD_OP)?;
        let mut state = self.state();
        let qp = state.qps.get_mut(&qpn).ok_or(Status::BAD_RESOURCE)?;
        if !from.contains(&qp.state()) {
            return Err(Status::BAD_QP_STATE);
        }
        merge(&mut qp.context, given, changes);
        qp.context.set(Qpc::STATE, u32::from(to.0));
        if to == QpState::RST {
            qp.received = 0;
            qp.sent = 0;
        }
        Ok(())
    }

    /// Attaches to a multicast group, or detaches.
    pub(super) fn multicast(&self, qpn: u32, gid: [u8; 16], attach: bool) -> Result<(), Status> {
        let state = self.state();
        state.qps.get(&qpn).ok_or(Status::BAD_RESOURCE)?;
        let _ = (gid, attach);
        Ok(())
    }

    pub(super) fn describe(&self, max: usize) -> Vec<serde_json::Value> {
        self.state().qps.values().take(max).map(Qp::describe).collect()
    }
}
