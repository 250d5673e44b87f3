//! What all threads of an HCA share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use protos::mlx5::eq::{Eqe, Event};
use protos::mlx5::pci;

use super::commands::{self, Execution};
use super::cq::Cq;
use super::eq::Eq;
use super::faults::Faults;
use super::iseg::InitSegment;
use super::memory::Port;
use super::mkey::Mkeys;
use super::port::{Capabilities, PortView};
use super::shard::Shard;
use super::srq::Srq;
use super::uar::Doorbell;
use super::{Mlx5Config, cmdq};
use crate::atc::Atc;
use crate::fabric::Adapter;
use crate::model::ModelContext;
use crate::pci::Interrupts;
use crate::transport::Time;

/// An HCA.
///
/// Lock order: `execution`, a shard, the page faults, a shard's inbox. A shard, an SRQ, a CQ, an EQ's producer, an EQ's
/// door. A shard, the term of a queue pair's loans (of any HCA), the desk of its shard. The tables of `objects` and the
/// mkeys are taken for a look-up only, with nothing taken meanwhile. The thread that serves the client takes the table of
/// EQs, an EQ's door and a shard's inbox, and a reset all of them.
#[derive(Debug)]
pub(super) struct Hca {
    pub(super) config: Mlx5Config,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) atc: Arc<Atc>,
    pub(super) iseg: InitSegment,
    pub(super) commands: cmdq::Doorbell,
    pub(super) execution: Mutex<Execution>,
    pub(super) objects: Objects,
    pub(super) mkeys: Arc<Mkeys>,
    pub(super) shards: Vec<Shard>,
    /// UAR page of each queue pair's doorbells, by number; 0: none.
    doors: Box<[AtomicU32]>,
    /// First half of a CQ arm that came in two stores, by UAR page.
    arm_halves: Box<[AtomicU32]>,
    /// What the driver says that it can do on the port (PortInfo's capability mask).
    pub(super) port_capabilities: Capabilities,
    pub(super) adapter: Adapter,
    pub(super) faults: Faults,
    pub(super) counters: Counters,
}

/// What is counted.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) commands: AtomicU64,
    pub(super) commands_failed: AtomicU64,
    pub(super) completions: AtomicU64,
    pub(super) page_faults: AtomicU64,
}

/// Queues by number.
#[derive(Debug, Default)]
pub(super) struct Objects {
    eqs: RwLock<HashMap<u8, Arc<Eq>>>,
    cqs: RwLock<HashMap<u32, Arc<Cq>>>,
    srqs: RwLock<HashMap<u32, Arc<Srq>>>,
}

/// Adds look-ups, insertion, removal for one kind.
macro_rules! table {
    ($field:ident: $number:ty => $kind:ident, $get:ident, $insert:ident, $remove:ident, $all:ident) => {
        pub(super) fn $get(&self, number: $number) -> Option<Arc<$kind>> {
            let table = self.$field.read().unwrap_or_else(PoisonError::into_inner);
            table.get(&number).cloned()
        }
        pub(super) fn $insert(&self, number: $number, object: Arc<$kind>) {
            let mut table = self.$field.write().unwrap_or_else(PoisonError::into_inner);
            table.insert(number, object);
        }
        pub(super) fn $remove(&self, number: $number) -> Option<Arc<$kind>> {
            let mut table = self.$field.write().unwrap_or_else(PoisonError::into_inner);
            table.remove(&number)
        }
        pub(super) fn $all(&self) -> Vec<Arc<$kind>> {
            let table = self.$field.read().unwrap_or_else(PoisonError::into_inner);
            table.values().cloned().collect()
        }
    };
}

impl Objects {
    table!(eqs: u8 => Eq, eq, insert_eq, remove_eq, all_eqs);
    table!(cqs: u32 => Cq, cq, insert_cq, remove_cq, all_cqs);
    table!(srqs: u32 => Srq, srq, insert_srq, remove_srq, all_srqs);

    pub(super) fn has_eq(&self, eqn: u8) -> bool {
        self.eq(eqn).is_some()
    }

    /// The event queue that takes events of that type.
    pub(super) fn eq_for(&self, event: Event) -> Option<Arc<Eq>> {
        let eqs = self.eqs.read().unwrap_or_else(PoisonError::into_inner);
        eqs.values().find(|eq| eq.takes(event)).cloned()
    }

    fn clear(&self) {
        self.eqs.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.cqs.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.srqs.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Hca {
    pub(super) fn new(
        config: Mlx5Config,
        context: ModelContext,
        atc: Arc<Atc>,
        adapter: Adapter,
        shards: Vec<Shard>,
        mkeys: Arc<Mkeys>,
    ) -> Self {
        let words = |count: u32| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self {
            execution: Mutex::new(Execution::new()),
            config,
            interrupts: context.interrupts,
            atc,
            iseg: InitSegment::new(),
            commands: cmdq::Doorbell::default(),
            objects: Objects::default(),
            mkeys,
            shards,
            doors: words(1 << commands::LOG_MAX_QP),
            arm_halves: words(pci::END_UAR),
            port_capabilities: Capabilities::default(),
            adapter,
            faults: Faults::default(),
            counters: Counters::default(),
        }
    }

    /// The transport's clock.
    pub(super) fn now(&self) -> Time {
        Time(self.iseg.ticks())
    }

    /// Where a queue pair's doorbells come; 0: nowhere.
    pub(super) fn set_door(&self, qpn: u32, page: u32) {
        if let Some(door) = self.doors.get(qpn as usize) {
            door.store(page, Ordering::SeqCst);
        }
    }

    fn arm(&self, page: u32, cqn: u32, word: u32) {
        if self.objects.cq(cqn).is_some_and(|cq| cq.uar_page == page) {
            self.shard(cqn).arm(cqn, word);
        }
    }

    /// The port as it stands.
    pub(super) fn port_view(&self) -> PortView {
        PortView::of(&self.adapter)
    }

    /// For `tlbridge inspect`; `stats` is also what `tlbridge vm --device-stats` shows.
    pub(super) fn dump(&self) -> serde_json::Value {
        const MOST: usize = 64;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let qps: Vec<_> = self
            .shards
            .iter()
            .flat_map(|shard| shard.describe(MOST))
            .collect();
        let mut objects = self.execution().describe();
        objects["mkeys"] = self.mkeys.count().into();
        serde_json::json!({
            "model": "mlx5",
            "stats": {
                "registers": self.iseg.describe(),
                "port": { "capabilities": format!("{:#x}", self.port_capabilities.get()), "lid": self.port_view().lid.0, "active": self.port_view().is_active() },
                "commands": count(&self.counters.commands),
                "commands_failed": count(&self.counters.commands_failed),
                "completions": count(&self.counters.completions),
                "page_faults": count(&self.counters.page_faults),
                "page_faults_open": self.faults.len(),
                "objects": objects,
                "transport": self.shards.iter().map(|shard| shard.stats()).collect::<Vec<_>>(),
                "tlb": self.atc.stats(),
            },
            "eqs": self.objects.all_eqs().iter().map(|eq| eq.describe()).collect::<Vec<_>>(),
            "cqs": self.objects.all_cqs().iter().map(|cq| cq.describe()).collect::<Vec<_>>(),
            "srqs": self.objects.all_srqs().iter().map(|srq| srq.describe()).collect::<Vec<_>>(),
            "qps": qps,
            "mkeys": self.mkeys.describe(MOST),
        })
    }

    /// An asynchronous event, to the queue that takes its type; else nobody wants it. Whether it was written.
    pub(super) fn event(&self, port: &mut Port, event: Event, eqe: &Eqe) -> bool {
        self.objects
            .eq_for(event)
            .is_some_and(|eq| eq.post(port, &self.interrupts, eqe))
    }

    /// The shard that a queue pair belongs to.
    pub(super) fn shard(&self, qpn: u32) -> &Shard {
        &self.shards[qpn as usize % self.shards.len()]
    }

    pub(super) fn execution(&self) -> MutexGuard<'_, Execution> {
        self.execution.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A store to a UAR page, on the thread that serves the client.
    pub(super) fn doorbell(&self, page: u32, doorbell: Doorbell) {
        let half = self.arm_halves.get(page as usize);
        match doorbell {
            Doorbell::Eq { eqn, consumed, arm } => {
                if let Some(eq) = self.objects.eq(eqn).filter(|eq| eq.uar_page() == page) {
                    eq.doorbell(&self.interrupts, consumed, arm);
                }
            }
            Doorbell::ArmCqFirst { word } => {
                if let Some(half) = half {
                    half.store(word, Ordering::SeqCst);
                }
            }
            Doorbell::ArmCqSecond { cqn } => {
                if let Some(half) = half {
                    let word = half.load(Ordering::SeqCst);
                    self.arm(page, cqn, word);
                }
            }
            Doorbell::ArmCq { cqn, word } => self.arm(page, cqn, word),
            Doorbell::Send { qpn } => {
                let door = self.doors.get(qpn as usize);
                if page != 0 && door.is_some_and(|door| door.load(Ordering::SeqCst) == page) {
                    self.shard(qpn).ring(qpn);
                }
            }
        }
    }

    /// Everything as when it was made. No thread of the HCA touches memory when it returns.
    pub(super) fn reset(&self) {
        self.iseg.reset();
        self.commands.clear();
        let mut execution = self.execution();
        // A command that was taken before has ended, and one of before that is still to be taken finds no queue.
        self.commands.clear();
        // Before the workers are met: what one has in its hands then finds no queue that it could arm or tell.
        self.objects.clear();
        for word in self.doors.iter().chain(&self.arm_halves) {
            word.store(0, Ordering::SeqCst);
        }
        for shard in &self.shards {
            shard.reset();
        }
        self.faults.clear();
        self.port_capabilities.set(0);
        self.mkeys.clear();
        *execution = Execution::new();
        self.atc.purge(crate::atc::Purge::All);
    }
}
