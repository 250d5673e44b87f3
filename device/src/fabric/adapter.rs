//! An adapter's ports on the fabric.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use protos::ib::mad::MAD;
use protos::ib::{Gid, Lid, Mtu, Pkey};

use super::agent;
use super::inbox::{Inbox, Wake};
use super::switch::{Counters, Endpoint, PortShared, Shared, Target, WakeHandle};

/// What an adapter is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterConfig {
    /// GUID of the system.
    pub system_guid: u64,
    /// GUID of the node.
    pub node_guid: u64,
    /// GUID of each port.
    pub port_guids: Vec<u64>,
    /// Threads that serve it: queue pair `n` belongs to shard `n % shards`.
    pub shards: usize,
    /// Text of its NodeDescription; 64 bytes count.
    pub description: String,
    /// Vendor id, 24 bits.
    pub vendor: u32,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u32,
    /// P_Key table.
    pub pkeys: Vec<Pkey>,
}

/// What became of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortChange {
    /// It has a LID and carries packets.
    Up,
    /// It carries none.
    Down,
    /// It has another LID.
    LidChanged,
}

/// Told of changes of ports. Called without locks.
pub trait PortEvents: Send + Sync {
    /// Port `port` (from 1) changed.
    fn changed(&self, port: u8, change: PortChange);
}

/// A port as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortStatus {
    /// [`Lid::NONE`]: down.
    pub lid: Lid,
    /// LID mask control.
    pub lmc: u8,
    /// The subnet manager's.
    pub sm_lid: Lid,
    /// Service level towards it.
    pub sm_sl: u8,
    /// Active.
    pub active: bool,
    /// Greatest and current MTU.
    pub mtu: Mtu,
    /// GID 0.
    pub gid: Gid,
}

/// Why an adapter was not attached.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum AttachError {
    /// 1 to 254 ports.
    #[error("an adapter has 1 to 254 ports, not {0}")]
    Ports(usize),
    /// One wake for each shard.
    #[error("{shards} shards need as many wakes, not {wakes}")]
    Shards {
        /// Shards of the configuration.
        shards: usize,
        /// Wakes that were given.
        wakes: usize,
    },
    /// A port GUID twice on the fabric.
    #[error("the port GUID {0:#018x} is on the fabric already")]
    Guid(u64),
    /// No LID is free.
    #[error("all LIDs are taken; detach an adapter")]
    Full,
}

/// An adapter on the fabric. Dropping it detaches it.
pub struct Adapter {
    pub(super) shared: Arc<Shared>,
    pub(super) id: u64,
    pub(super) config: AdapterConfig,
    pub(super) description: Mutex<[u8; 64]>,
    pub(super) ports: Arc<[Arc<PortShared>]>,
    pub(super) inboxes: Arc<[Arc<Inbox>]>,
    pub(super) wakes: Vec<Arc<dyn Wake>>,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter")
            .field("id", &self.id)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    pub(super) fn attach(
        shared: &Arc<Shared>,
        config: AdapterConfig,
        wakes: Vec<Arc<dyn Wake>>,
        events: Option<Arc<dyn PortEvents>>,
    ) -> Result<Self, AttachError> {
        let count = config.port_guids.len();
        if count == 0 || count > 254 {
            return Err(AttachError::Ports(count));
        }
        if config.shards == 0 || config.shards != wakes.len() {
            return Err(AttachError::Shards {
                shards: config.shards,
                wakes: wakes.len(),
            });
        }
        let inboxes: Arc<[Arc<Inbox>]> = wakes
            .iter()
            .map(|wake| Arc::new(Inbox::new(wake.clone())))
            .collect();
        let mut state = shared.lock();
        state.adapters += 1;
        let id = state.adapters;
        let mut ports = Vec::new();
        for (i, guid) in config.port_guids.iter().enumerate() {
            let gid = Gid::new(state.subnet.prefix, *guid);
            let lid = match state.subnet.join(gid, events.clone(), i as u8 + 1) {
                Ok(lid) => lid,
                Err(error) => {
                    for port in &ports {
                        let port: &Arc<PortShared> = port;
                        state.subnet.leave(port.gid);
                    }
                    return Err(error);
                }
            };
            ports.push(Arc::new(PortShared {
                adapter: id,
                number: i as u8 + 1,
                gid,
                lid: lid.0.into(),
                inboxes: inboxes.clone(),
                counters: Counters::default(),
            }));
        }
        shared.change(&mut state, |routes| {
            for port in &ports {
                let lid = Lid(port.lid.load(Ordering::Relaxed));
                if lid != Lid::NONE {
                    routes.set(lid, Some(Target::Port(port.clone())));
                }
                routes.ports.push(port.clone());
            }
        });
        drop(state);
        let mut description = [0; 64];
        for (to, from) in description.iter_mut().zip(config.description.bytes()) {
            *to = from;
        }
        Ok(Self {
            shared: shared.clone(),
            id,
            config,
            description: Mutex::new(description),
            ports: ports.into(),
            inboxes,
            wakes,
        })
    }

    /// The end of one shard, for the thread that serves it. One at a time: packets go to whoever asks first.
    ///
    /// # Panics
    /// When there is no such shard.
    #[must_use]
    pub fn endpoint(&self, shard: usize) -> Endpoint {
        Endpoint {
            shared: self.shared.clone(),
            routes: self.shared.lock().routes.clone(),
            version: 0,
            ports: self.ports.clone(),
            inbox: self.inboxes[shard].clone(),
            wake: WakeHandle(self.wakes[shard].clone()),
            local: VecDeque::with_capacity(super::inbox::CAPACITY),
            taken: VecDeque::with_capacity(super::inbox::CAPACITY),
        }
    }

    /// A port, from 1.
    #[must_use]
    pub fn port(&self, number: u8) -> Option<PortStatus> {
        let (lid, gid) = self.address(number)?;
        let sm_lid = self.shared.lock().subnet.manager;
        Some(PortStatus {
            lid,
            lmc: 0,
            sm_lid,
            sm_sl: 0,
            active: lid != Lid::NONE,
            mtu: Mtu::B4096,
            gid,
        })
    }

    /// LID ([`Lid::NONE`]: down) and GID 0 of a port, from 1, without waiting for anybody.
    #[must_use]
    pub fn address(&self, number: u8) -> Option<(Lid, Gid)> {
        let port = self.ports.get(usize::from(number).checked_sub(1)?)?;
        Some((Lid(port.lid.load(Ordering::Relaxed)), port.gid))
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The NodeDescription.
    #[must_use]
    pub fn description(&self) -> [u8; 64] {
        *self.description.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a management datagram of the subnet management or performance class that came in through a port, or
    /// that the host asks of its own port. `None`: none of these, nothing to answer.
    #[must_use]
    pub fn mad(&self, port: u8, request: &[u8; MAD]) -> Option<[u8; MAD]> {
        agent::answer(self, port, request)
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        for port in self.ports.iter() {
            state.subnet.leave(port.gid);
        }
        let id = self.id;
        let ports = self.ports.clone();
        self.shared.change(&mut state, |routes| {
            for port in ports.iter() {
                let lid = Lid(port.lid.load(Ordering::Relaxed));
                if lid != Lid::NONE {
                    routes.set(lid, None);
                }
            }
            routes.ports.retain(|port| port.adapter != id);
            for members in routes.multicast.values_mut() {
                members.retain(|port| port.adapter != id);
            }
        });
        drop(state);
        for inbox in self.inboxes.iter() {
            inbox.close();
        }
    }
}
