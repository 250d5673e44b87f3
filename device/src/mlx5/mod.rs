//! An mlx5 HCA with an InfiniBand port, for the unmodified mlx5_core and mlx5_ib drivers.
//!
//! Section numbers are those of the project's mlx5 hardware reference. Map: `iseg` and `uar` decode stores, `cmdq` takes
//! commands, which `commands/` executes; `eq`, `cq`, `srq`, `qp`, `mkey` are the objects; `shard` is a worker thread
//! with its queue pairs; `memory` and `buffer` reach the driver's memory through the ATC.
//!
//! Threads: the one that serves the client updates registers and EQ doorbells and leaves letters; one executes
//! commands; each shard has one.
//!
//! # What is not implemented
//! BlueFlame, DC, DevX, device memory, signature, Ethernet ports, more than
//! one port. None of that is advertised.

mod access;
mod buffer;
mod cmdq;
mod commands;
mod cq;
mod eq;
mod faults;
mod hardware;
mod iseg;
mod memory;
mod mkey;
mod numbers;
mod owner;
mod port;
mod qp;
mod shard;
mod srq;
mod uar;
mod umr;
mod wqe;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use protos::ib::Pkey;
use protos::mlx5::{iseg as iseg_words, pci};

use crate::atc::{Atc, AtcConfig};
use crate::fabric::{AdapterConfig, AttachError, Fabric, PortChange, PortEvents, Wake};
use crate::model::{AccessError, BarSpec, Identity, Model, ModelContext, MsixSpec};
use hardware::Hca;
use memory::Port;
use shard::{Inbox, Shard};

/// Which PCI function the HCA is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FunctionKind {
    /// Physical.
    #[default]
    Pf,
    /// Virtual.
    Vf,
}

/// How the model is built.
#[derive(Debug, Clone)]
pub struct Mlx5Config {
    /// Identity.
    pub function: FunctionKind,
    /// Worker threads, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Node GUID; the port's is one more. Different on each HCA of a fabric.
    pub node_guid: u64,
    /// What the port is connected to.
    pub fabric: Fabric,
}

impl Default for Mlx5Config {
    fn default() -> Self {
        Self {
            function: FunctionKind::Pf,
            workers: 2,
            node_guid: 0x0002_c903_00fe_0000,
            fabric: Fabric::new(),
        }
    }
}

/// The vendor's OUI, which is not its PCI number.
const OUI: u32 = 0x0002c9;

/// Most worker threads.
pub const MAX_WORKERS: usize = 16;

/// Why the model could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Mlx5Error {
    /// Number of workers.
    #[error("{0} worker threads: give 1 to {MAX_WORKERS}")]
    Workers(usize),
    /// The port.
    #[error("the port cannot be attached to its fabric: {0}")]
    Attach(#[from] AttachError),
    /// A thread.
    #[error("cannot start a thread of the HCA: {0}")]
    Thread(#[from] io::Error),
}

/// Tells the first worker, which tells the driver.
struct PortNews(Arc<Inbox>);

impl PortEvents for PortNews {
    fn changed(&self, port: u8, change: PortChange) {
        self.0.port_changed(port, change);
    }
}

/// The HCA model. Dropping it ends its threads.
#[derive(Debug)]
pub struct Mlx5 {
    hca: Arc<Hca>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Mlx5 {
    /// Builds the device and starts its threads.
    ///
    /// # Errors
    /// [`Mlx5Error`]; nothing runs then.
    pub fn new(context: ModelContext, config: Mlx5Config) -> Result<Arc<Self>, Mlx5Error> {
        if config.workers == 0 || config.workers > MAX_WORKERS {
            return Err(Mlx5Error::Workers(config.workers));
        }
        // A slot and a ticket for each worker and for the commands.
        let atc_config = AtcConfig {
            sets: 4096,
            ways: 4,
            tickets: config.workers + 1,
            engines: config.workers + 1,
            ..AtcConfig::default()
        };
        let atc = Atc::new(atc_config, Arc::clone(&context.dma));
        let port = |ticket| Port {
            engine: atc.engine().expect("the ATC has a slot for each thread"),
            ticket,
            dma: Arc::clone(&context.dma),
        };
        let inboxes: Vec<_> = (0..config.workers).map(|_| Arc::new(Inbox::default())).collect();
        let adapter = config.fabric.attach(
            AdapterConfig {
                system_guid: config.node_guid,
                node_guid: config.node_guid,
                port_guids: vec![config.node_guid + 1],
                shards: config.workers,
                description: "tlbridge mlx5".into(),
                // Programs know the vendor's cards by this and the device's number.
                vendor: OUI,
                device: pci::DEVICE_PF,
                revision: 0,
                pkeys: vec![Pkey::DEFAULT],
            },
            inboxes
                .iter()
                .map(|inbox| Arc::clone(inbox) as Arc<dyn Wake>)
                .collect(),
            Some(Arc::new(PortNews(Arc::clone(&inboxes[0])))),
        )?;
        let shards = inboxes
            .into_iter()
            .enumerate()
            .map(|(index, inbox)| Shard::new(inbox, port(index), adapter.endpoint(index)))
            .collect();
        let commands = port(config.workers);
        let hca = Arc::new(Hca::new(config, context, atc, adapter, shards));
        let mlx5 = Arc::new(Self {
            hca,
            threads: Mutex::new(Vec::new()),
        });
        for index in 0..mlx5.hca.shards.len() {
            let hca = Arc::clone(&mlx5.hca);
            mlx5.start(format!("mlx5-worker-{index}"), move || {
                hca.shards[index].run(&hca)
            })?;
        }
        let hca = Arc::clone(&mlx5.hca);
        mlx5.start("mlx5-commands".into(), move || cmdq::run(&hca, commands))?;
        Ok(mlx5)
    }

    fn start(&self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        self.threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(thread);
        Ok(())
    }

    /// Its TLB.
    #[must_use]
    pub fn atc(&self) -> &Arc<Atc> {
        &self.hca.atc
    }
}

impl Drop for Mlx5 {
    fn drop(&mut self) {
        self.hca.commands.stop();
        for shard in &self.hca.shards {
            shard.stop();
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the HCA had panicked");
            }
        }
    }
}

impl Model for Mlx5 {
    fn identity(&self) -> Identity {
        let device = match self.hca.config.function {
            FunctionKind::Pf => pci::DEVICE_PF,
            FunctionKind::Vf => pci::DEVICE_VF,
        };
        Identity {
            vendor: pci::VENDOR,
            device,
            subsystem_vendor: pci::VENDOR,
            subsystem: device,
            class: pci::CLASS,
            revision: 0,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec {
            index: pci::BAR,
            size: pci::BAR_SIZE,
            is_64bit: true,
            prefetchable: true,
            // Nothing can be mapped: each doorbell is a message.
            mmap: None,
        }]
    }

    fn msix(&self) -> Option<MsixSpec> {
        Some(MsixSpec {
            vectors: pci::VECTORS,
            bar: pci::BAR,
            table_offset: pci::MSIX_TABLE_OFFSET,
            pba_offset: pci::MSIX_PBA_OFFSET,
        })
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        in_bar(bar, offset, data.len())?;
        if offset < iseg_words::END {
            self.hca.iseg.read(offset, data);
        } else {
            // UAR pages are for stores.
            data.fill(0);
        }
        Ok(())
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        in_bar(bar, offset, data.len())?;
        if offset < iseg_words::END {
            let commands = self.hca.iseg.write(offset, data);
            self.hca.commands.ring(commands);
        } else if let Some(doorbell) = uar::decode(offset, data) {
            self.hca.doorbell((offset / pci::UAR_SIZE) as u32, doorbell);
        }
        Ok(())
    }

    fn reset(&self) {
        self.hca.reset();
    }

    fn dump(&self) -> serde_json::Value {
        self.hca.dump()
    }
}

fn in_bar(bar: usize, offset: u64, len: usize) -> Result<(), AccessError> {
    let inside = bar == pci::BAR
        && offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= pci::BAR_SIZE);
    if inside {
        Ok(())
    } else {
        Err(AccessError::Unassigned { bar, offset, len })
    }
}
