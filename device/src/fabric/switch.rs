//! The switch inside a process: which LID is where.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protos::ib::{Gid, Lid, Qpn};

use super::inbox::{CAPACITY, Inbox, Wake};
use super::subnet::{Subnet, sa};
use crate::transport::{Link, Packet, Pool, Time};

/// Where packets for a LID go.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A port of an adapter of this process.
    Port(Arc<PortShared>),
    /// The subnet manager of this process.
    Manager,
    /// Another process.
    Trunk(Arc<Inbox>),
}

/// A port, as the switch and its adapter see it.
#[derive(Debug)]
pub(super) struct PortShared {
    pub(super) adapter: u64,
    pub(super) number: u8,
    pub(super) gid: Gid,
    /// 0: none yet, the port is down.
    pub(super) lid: AtomicU16,
    pub(super) inboxes: Arc<[Arc<Inbox>]>,
    pub(super) counters: Counters,
}

/// Traffic of a port. Several threads add; nobody waits for them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) sent_packets: AtomicU64,
    pub(super) sent_words: AtomicU64,
    pub(super) received_packets: AtomicU64,
    pub(super) received_words: AtomicU64,
    pub(super) multicast_sent: AtomicU64,
    pub(super) multicast_received: AtomicU64,
    pub(super) discarded: AtomicU64,
}

/// Who is where; replaced as a whole.
#[derive(Debug, Default, Clone)]
pub(super) struct Routes {
    /// By LID.
    pub(super) unicast: Vec<Option<Target>>,
    /// By LID: local members.
    pub(super) multicast: HashMap<Lid, Vec<Arc<PortShared>>>,
    /// Every port here.
    pub(super) ports: Vec<Arc<PortShared>>,
    /// What is in none of these (a process without a subnet manager of its own).
    pub(super) default: Option<Target>,
    /// Every way to another process.
    pub(super) trunks: Vec<Arc<Inbox>>,
}

/// What the lock protects.
#[derive(Debug)]
pub(super) struct State {
    pub(super) routes: Arc<Routes>,
    pub(super) subnet: Subnet,
    pub(super) adapters: u64,
}

/// Shared by everything that is attached.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) version: AtomicU64,
    pub(super) state: Mutex<State>,
    pub(super) pool: Pool,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the routes; everybody sees it with its next packet.
    pub(super) fn change(&self, state: &mut State, change: impl FnOnce(&mut Routes)) {
        let mut routes = Routes::clone(&state.routes);
        change(&mut routes);
        state.routes = Arc::new(routes);
        self.version.fetch_add(1, Ordering::Release);
        // They tell the other processes who is here.
        for trunk in &state.routes.trunks {
            trunk.nudge();
        }
    }

    /// Delivers a packet that came from another process, or from the manager. A full inbox loses it.
    pub(super) fn inject(&self, routes: &Routes, packet: Packet, from: Option<&Arc<Inbox>>) {
        if packet.dlid.is_multicast() {
            spread(routes, &packet, None, from);
            return;
        }
        match routes.target(packet.dlid) {
            Some(Target::Port(port)) => {
                let _ = deliver(port, packet, None);
            }
            Some(Target::Manager) => self.manage(packet),
            Some(Target::Trunk(trunk)) if from.is_none_or(|from| !Arc::ptr_eq(from, trunk)) => {
                let _ = trunk.push(packet, None);
            }
            _ => {}
        }
    }

    /// A packet for the subnet manager: its answers are delivered at once.
    pub(super) fn manage(&self, packet: Packet) {
        let (answer, routes) = {
            let mut state = self.lock();
            let (answer, moved) = sa::answer(&mut state.subnet, &packet, &self.pool);
            if let Some(mlid) = moved {
                let members = state.subnet.members(mlid);
                self.change(&mut state, |routes| {
                    let ports: Vec<_> = routes
                        .ports
                        .iter()
                        .filter(|port| members.contains(&port.gid))
                        .cloned()
                        .collect();
                    if ports.is_empty() {
                        routes.multicast.remove(&mlid);
                    } else {
                        routes.multicast.insert(mlid, ports);
                    }
                });
            }
            (answer, state.routes.clone())
        };
        if let Some(answer) = answer {
            self.inject(&routes, answer, None);
        }
    }
}

impl Routes {
    pub(super) fn target(&self, lid: Lid) -> Option<&Target> {
        self.unicast
            .get(usize::from(lid.0))
            .and_then(Option::as_ref)
            .or(self.default.as_ref())
    }

    pub(super) fn set(&mut self, lid: Lid, target: Option<Target>) {
        let at = usize::from(lid.0);
        if self.unicast.len() <= at {
            self.unicast.resize(at + 1, None);
        }
        self.unicast[at] = target;
    }
}

/// Bytes of a packet's headers, roughly: what the counters count besides payload.
const HEADERS: u64 = 24;

fn words(packet: &Packet) -> u64 {
    (packet.data().len() as u64 + HEADERS * u64::from(packet.count)) / 4
}

/// Which shard a queue pair belongs to.
#[must_use]
pub fn shard_of(qpn: Qpn, shards: usize) -> usize {
    qpn.get() as usize % shards.max(1)
}

#[expect(
    clippy::result_large_err,
    reason = "the packet goes back by value, without an allocation"
)]
pub(super) fn deliver(
    port: &PortShared,
    mut packet: Packet,
    sender: Option<&Arc<dyn Wake>>,
) -> Result<(), Packet> {
    packet.port = port.number;
    let inbox = &port.inboxes[shard_of(packet.dest, port.inboxes.len())];
    let (count, words) = (u64::from(packet.count), words(&packet));
    inbox.push(packet, sender)?;
    port.counters.received_packets.fetch_add(count, Ordering::Relaxed);
    port.counters.received_words.fetch_add(words, Ordering::Relaxed);
    Ok(())
}

/// A multicast packet to every member, and to other processes. Whoever has no room misses it.
fn spread(
    routes: &Routes,
    packet: &Packet,
    own: Option<(&Arc<Inbox>, &mut VecDeque<Packet>)>,
    from: Option<&Arc<Inbox>>,
) {
    // Without a manager here nobody knows who joined: the transports do.
    let members: &[Arc<PortShared>] = if routes.default.is_some() {
        &routes.ports
    } else {
        routes.multicast.get(&packet.dlid).map_or(&[], Vec::as_slice)
    };
    let mut own = own;
    for port in members {
        port.counters.multicast_received.fetch_add(1, Ordering::Relaxed);
        for inbox in port.inboxes.iter() {
            let mut copy = packet.copy();
            copy.port = port.number;
            match &mut own {
                Some((mine, local)) if Arc::ptr_eq(mine, inbox) && local.len() < CAPACITY => {
                    local.push_back(copy);
                }
                _ => {
                    let _ = inbox.push(copy, None);
                }
            }
        }
    }
    for trunk in &routes.trunks {
        if from.is_none_or(|from| !Arc::ptr_eq(from, trunk)) {
            let _ = trunk.push(packet.copy(), None);
        }
    }
}

/// One thread's end of an adapter: all its ports.
#[derive(Debug)]
pub struct Endpoint {
    pub(super) shared: Arc<Shared>,
    pub(super) routes: Arc<Routes>,
    pub(super) version: u64,
    pub(super) ports: Arc<[Arc<PortShared>]>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) wake: WakeHandle,
    /// What this thread sent to itself, and what it has taken from its inbox.
    pub(super) local: VecDeque<Packet>,
    pub(super) taken: VecDeque<Packet>,
}

impl Endpoint {
    /// Throws away what has come, and comes to an end whoever goes on sending.
    pub fn clear(&mut self) {
        self.taken.clear();
        self.local.clear();
        self.inbox.take(&mut self.taken);
        self.taken.clear();
    }
}

/// A wake that can be shown.
#[derive(Clone)]
pub(super) struct WakeHandle(pub(super) Arc<dyn Wake>);

impl std::fmt::Debug for WakeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WakeHandle")
    }
}

impl Link for Endpoint {
    fn transmit(&mut self, mut packet: Packet, _: Time) -> Result<(), Packet> {
        let version = self.shared.version.load(Ordering::Acquire);
        if version != self.version {
            self.routes = self.shared.lock().routes.clone();
            self.version = version;
        }
        let Some(own) = self.ports.get(usize::from(packet.port).wrapping_sub(1)) else {
            return Ok(());
        };
        let lid = own.lid.load(Ordering::Relaxed);
        if lid == 0 {
            own.counters.discarded.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        packet.slid = Lid(lid);
        let (count, words, number) = (u64::from(packet.count), words(&packet), packet.port);
        if packet.dlid.is_multicast() {
            own.counters.multicast_sent.fetch_add(1, Ordering::Relaxed);
            spread(&self.routes, &packet, Some((&self.inbox, &mut self.local)), None);
        } else {
            match self.routes.target(packet.dlid) {
                Some(Target::Port(port)) => {
                    let inbox = &port.inboxes[shard_of(packet.dest, port.inboxes.len())];
                    if Arc::ptr_eq(inbox, &self.inbox) {
                        if self.local.len() >= CAPACITY {
                            return Err(packet);
                        }
                        packet.port = port.number;
                        self.local.push_back(packet);
                        port.counters.received_packets.fetch_add(count, Ordering::Relaxed);
                        port.counters.received_words.fetch_add(words, Ordering::Relaxed);
                    } else {
                        deliver(port, packet, Some(&self.wake.0)).map_err(|mut packet| {
                            packet.port = number;
                            packet
                        })?;
                    }
                }
                Some(Target::Manager) => self.shared.manage(packet),
                Some(Target::Trunk(trunk)) => trunk.push(packet, Some(&self.wake.0))?,
                None => {
                    own.counters.discarded.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
            }
        }
        own.counters.sent_packets.fetch_add(count, Ordering::Relaxed);
        own.counters.sent_words.fetch_add(words, Ordering::Relaxed);
        Ok(())
    }

    fn receive(&mut self, _: Time) -> Option<Packet> {
        // What others sent first: this thread's own packets cannot starve them.
        if self.taken.is_empty() {
            self.inbox.take(&mut self.taken);
        }
        self.taken.pop_front().or_else(|| self.local.pop_front())
    }
}
