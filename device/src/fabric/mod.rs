//! Links between adapters, and the management of their subnet.
//!
//! A [`Fabric`] is the switch of a process. Adapters attach to it with their ports and get LIDs; each of an
//! adapter's threads has an [`Endpoint`], which is a [`crate::transport::Link`]. Packets go from thread to thread
//! as they are, payload and all. Subnet administration answers at the manager's LID.
//!
//! Not implemented: several subnets and routers, virtual lanes and their arbitration, LID masks, partitions other
//! than the default one.

mod adapter;
mod agent;
mod impair;
mod inbox;
mod pcap;
mod subnet;
mod switch;
#[cfg(test)]
pub(crate) mod tests;
mod trunk;
mod wire;

pub use adapter::{Adapter, AdapterConfig, AttachError, PortChange, PortEvents, PortStatus};
pub use impair::{Dice, Impaired, Impairments};
pub use inbox::Wake;
pub use pcap::{Capture, Captured};
pub use switch::{Endpoint, shard_of};
pub use trunk::{Address, FabricUrl, TrunkError, UrlError};
pub use wire::WireError;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use protos::ib::Gid;

use crate::transport::Pool;
use subnet::Subnet;
use switch::{Routes, Shared, State, Target};
use trunk::Trunks;

/// The switch of a process, with a subnet manager. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Fabric {
    shared: Arc<Shared>,
    trunks: Option<Arc<Trunks>>,
}

impl Default for Fabric {
    fn default() -> Self {
        Self::new()
    }
}

impl Fabric {
    /// A fabric of its own.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Subnet::managing(Gid::DEFAULT_PREFIX), |routes| {
            routes.set(subnet::MANAGER, Some(Target::Manager));
        })
    }

    fn with(subnet: Subnet, change: impl FnOnce(&mut Routes)) -> Self {
        let mut routes = Routes::default();
        change(&mut routes);
        Self {
            shared: Arc::new(Shared {
                version: AtomicU64::new(1),
                state: Mutex::new(State {
                    routes: Arc::new(routes),
                    subnet,
                    adapters: 0,
                }),
                pool: Pool::default(),
            }),
            trunks: None,
        }
    }

    /// The fabric that a URL names. Joining one does not wait for it: ports are down until it is there.
    ///
    /// # Errors
    /// [`TrunkError`]: nobody can listen there.
    pub fn open(url: &FabricUrl) -> Result<Self, TrunkError> {
        Ok(match url {
            FabricUrl::Inside => Self::new(),
            FabricUrl::Listen(address) => {
                let fabric = Self::new();
                let trunks = Trunks::listen(&fabric.shared, address)?;
                Self {
                    trunks: Some(Arc::new(trunks)),
                    ..fabric
                }
            }
            FabricUrl::Connect(address) => {
                let fabric = Self::with(Subnet::managed(Gid::DEFAULT_PREFIX), |_| {});
                let trunks = Trunks::connect(&fabric.shared, address)?;
                Self {
                    trunks: Some(Arc::new(trunks)),
                    ..fabric
                }
            }
        })
    }

    /// Where others reach a fabric that listens (with the port that the system chose).
    #[must_use]
    pub fn address(&self) -> Option<&Address> {
        self.trunks.as_ref()?.address.as_ref()
    }

    /// Breaks every connection to other processes, as a pulled cable does. They are made again.
    pub fn pull(&self) {
        if let Some(trunks) = &self.trunks {
            trunks.pull();
        }
    }

    /// Attaches an adapter. `wakes`: one for each of its shards, called when a packet comes for it; `events`: told
    /// of changes of its ports (from other threads, after this returned).
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        &self,
        config: AdapterConfig,
        wakes: Vec<Arc<dyn Wake>>,
        events: Option<Arc<dyn PortEvents>>,
    ) -> Result<Adapter, AttachError> {
        Adapter::attach(&self.shared, config, wakes, events)
    }
}
