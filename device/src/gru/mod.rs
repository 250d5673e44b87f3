//! The GRU: a chiplet pair with contexts, control blocks, a TLB that misses, and handles that flush it.
//!
//! Section numbers are those of the project's GRU hardware reference. Map: [`memory`](self) holds the BARs;
//! `registers` decodes trapped accesses; `cch`, `tgh`, `tfh`, `tfm` are the handles; `cb` and
//! `instructions` execute; `engine` and `wake` are the threads and how they sleep.
//!
//! # How a store becomes a command
//! All words live in one memfd for BAR2. In [`Doorbell::Trap`] mode the connection's thread stores into it
//! and rings; in the other modes software stores into the mapped file and rings by a doorbell page (BAR0's, or the
//! one of its GSEG; or BAR0's ioeventfd): after each start in [`Doorbell::Bell`] mode, when no engine is awake in
//! [`Doorbell::Poll`] mode. [`protos::gru::doorbell`] has the layout. Engines execute what they find: the same code
//! in all modes. CBE and CCH are trapped in all of them, TFH unless [`GruConfig::map_tfh`] says otherwise.
//!
//! # What is not implemented
//! * Address classes other than RAM: IAA_GAA_MISMATCH, or ADDRESS_SPACE_DECODE_ERROR where both sides say the same.
//!   Page sizes above 1 GiB: TLBHW_ERROR.
//! * `indexway`, `tlb_fault_color`, `req_slice`, the error causes of TGH; exact-size matching of purges
//!   (overlap always), response delay (ima bit 0: ignored).

mod cb;
mod cch;
mod chiplet;
mod courier;
mod dump;
mod engine;
mod hardware;
mod instructions;
mod memory;
mod registers;
#[cfg(test)]
mod tests;
mod tfh;
mod tfm;
mod tgh;
mod trapped;
mod wake;
mod watch;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use protos::gru::{cbe, cch as cch_words, map, pci, tfh as tfh_words};

use crate::atc::{self, Atc, AtcConfig, Findings, Names};
use crate::faults::{BreakPlan, FaultPlan, HeldFills, Injector, Parking};
use crate::model::{AccessError, BarMmap, BarSpec, Identity, IoEventFd, Model, ModelContext, MsixSpec};

pub use dump::GruStats;
use engine::Bench;
use hardware::{Count, Hardware};
use memory::BarMemory;
use wake::Wake;

/// How commands are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Doorbell {
    /// Every access is a message; nothing can be mapped.
    #[default]
    Trap,
    /// GSEG, TFM and TGH can be mapped; software rings after each start. Nothing polls: an engine looks when it is
    /// rung, and sleeps when it has found nothing more.
    Bell,
    /// GSEG, TFM and TGH can be mapped; engines look for work for a while before they sleep, and software rings when
    /// no engine is awake.
    Poll,
}

/// Unit of the indexes of IVLOAD, IVSTORE and IVSET (section 16.6). An index is a 64-bit word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IndexUnit {
    /// Bytes.
    #[default]
    Bytes,
    /// Elements.
    Elements,
}

/// What BSTORE stores (section 16.6: the driver's header names a source address and a data segment offset).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BstoreSource {
    /// The data segment at tri0; baddr0 is not looked at.
    #[default]
    Segment,
    /// Memory at baddr0: BCOPY without a buffer.
    Memory,
}

/// What a ranged TLBINV removes (section 16.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PurgeMatch {
    /// Every entry whose span meets the range, whatever its size. The kernel driver needs it: it always flushes with the
    /// 4 KiB code.
    #[default]
    Overlap,
    /// Only entries of the command's page size. Shows that driver's entries of huge pages go stale. Outstanding misses are
    /// killed by overlap all the same.
    Exact,
}

/// Bits of an address that select asid\[\] and sizeavail\[\] (section 16.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Regions {
    /// Three: all of asid\[8\] is used. The same as two for addresses below 2^61.
    #[default]
    Three,
    /// Two: what the kernel driver's arithmetic comes to.
    Two,
}

impl Regions {
    fn of(self, va: u64) -> usize {
        match self {
            Self::Three => cch_words::region_of(va),
            Self::Two => cch_words::region_of(va) & 3,
        }
    }
}

/// How the model is built. Open points of the hardware (section 16) are options here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GruConfig {
    /// How commands are noticed.
    pub doorbell: Doorbell,
    /// TFH can be mapped, too (not in [`Doorbell::Trap`] mode). Only for drivers that store DW0 of a TFH absolutely:
    /// the kernel's ORs into a status of EXCEPTION and would take its own store for an answer (section 17.1).
    pub map_tfh: bool,
    /// Engine threads, 1 to 16.
    pub engines: usize,
    /// Longest time that an engine looks for work before it sleeps. Zero: sleeps at once, as always in
    /// [`Doorbell::Bell`] mode. `None`: 50 or 200 µs, by the number of processors, and none while others want this one.
    pub spin: Option<Duration>,
    /// TLB sets of a chiplet (16.1).
    pub tlb_sets: usize,
    /// TLB ways (16.1).
    pub tlb_ways: usize,
    /// Cause of a store that finds no entry at all (16.2): TLB_MOD saves the second miss, TLB_MISS does not.
    pub store_miss_cause: tfh_words::Cause,
    /// Unit of index vectors (16.6).
    pub index_unit: IndexUnit,
    /// What BSTORE stores (16.6).
    pub bstore_source: BstoreSource,
    /// What a ranged TLBINV removes (16.3).
    pub purge_match: PurgeMatch,
    /// Address regions (16.4).
    pub regions: Regions,
    /// Bit of ecause after a miss that was answered with EXCEPTION (16.5), 0 to 19. Default: 6, OS_FATAL_TLB_FAULT.
    pub fatal_fault_ecause: u8,
    /// Refuse fills whose page-size code the context's sizeavail does not list.
    pub check_sizeavail: bool,
    /// A sanitizer looks on ([`Model::findings`]).
    pub sanitize: bool,
    /// It looks at a host daemon's log of changes as well (level 2), if one is named
    /// ([`protos::gru::pci::CHANGE_LOG_OFFSET`]).
    pub follow_changes: bool,
    /// Checks that are switched off, to show what they are for.
    pub broken: BreakPlan,
    /// Delays; those that `broken` needs are added.
    pub faults: FaultPlan,
}

impl Default for GruConfig {
    fn default() -> Self {
        Self {
            doorbell: Doorbell::Trap,
            map_tfh: false,
            engines: 2,
            spin: None,
            tlb_sets: 1024,
            tlb_ways: 4,
            store_miss_cause: tfh_words::Cause::TLB_MOD,
            index_unit: IndexUnit::Bytes,
            bstore_source: BstoreSource::Segment,
            purge_match: PurgeMatch::Overlap,
            regions: Regions::Three,
            fatal_fault_ecause: cbe::ecause::OS_FATAL_TLB_FAULT.trailing_zeros() as u8,
            check_sizeavail: true,
            sanitize: false,
            follow_changes: false,
            broken: BreakPlan::default(),
            faults: FaultPlan::default(),
        }
    }
}

/// Up to here engines yield where they would otherwise only spin.
const FEW_CPUS: usize = 4;

/// Most engine threads.
pub const MAX_ENGINES: usize = 16;

/// Why the model could not be built.
#[derive(Debug, thiserror::Error)]
pub enum GruError {
    /// Number of engines.
    #[error("{0} engine threads: give 1 to {MAX_ENGINES}")]
    Engines(usize),
    /// Not a bit of ecause.
    #[error("ecause bit {0} after a fatal fault: give 0 to 19")]
    EcauseBit(u8),
    /// Sets or ways of the TLB.
    #[error("a TLB of {sets} sets and {ways} ways: give 1 to 65536 sets (a power of two) and 1 to 255 ways")]
    Tlb {
        /// Sets.
        sets: usize,
        /// Ways.
        ways: usize,
    },
    /// A plan that parks an engine inside an access.
    #[error("drain-delay parks an engine: give at least 2 engine threads")]
    ParkingNeedsTwoEngines,
    /// A system call.
    #[error("cannot create {what}: {source}")]
    System {
        /// What was to be made.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct Counters {
    instructions: Count,
    exceptions: Count,
    messages_refused: Count,
    misses: Count,
    misses_in_fault_map: Count,
    misses_withdrawn: Count,
    fills: Count,
    fills_killed: Count,
    tgh_purges: Count,
    asked: Count,
}

/// The GRU model. Dropping it ends its threads.
#[derive(Debug)]
pub struct Gru {
    hardware: Arc<Hardware>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    couriers: Mutex<Vec<JoinHandle<()>>>,
}

impl Gru {
    /// Builds the device and starts its engines.
    ///
    /// # Errors
    /// [`GruError`]; nothing runs then.
    pub fn new(context: ModelContext, config: GruConfig) -> Result<Arc<Self>, GruError> {
        if config.engines == 0 || config.engines > MAX_ENGINES {
            return Err(GruError::Engines(config.engines));
        }
        if config.fatal_fault_ecause > 19 {
            return Err(GruError::EcauseBit(config.fatal_fault_ecause));
        }
        let (sets, ways) = (config.tlb_sets, config.tlb_ways);
        if !sets.is_power_of_two() || sets > 65536 || ways == 0 || ways > 255 {
            return Err(GruError::Tlb { sets, ways });
        }
        let plan = config.faults.with_windows_of(config.broken);
        if plan.drain_delay.is_some() && config.engines < 2 {
            return Err(GruError::ParkingNeedsTwoEngines);
        }
        let system = |what| move |source| GruError::System { what, source };
        let memory = BarMemory::new("gru-bar2", pci::BAR_CHIPLETS_SIZE).map_err(system("BAR2's memory"))?;
        let memory = Arc::new(memory);
        let status = BarMemory::new("gru-bar0", pci::BAR_DOORBELL_SIZE).map_err(system("BAR0's memory"))?;
        let wake = Wake::new(config.doorbell, status, Arc::clone(&memory)).map_err(system("the doorbell"))?;
        let wake = Arc::new(wake);
        let atc_config = AtcConfig {
            sets: config.tlb_sets,
            ways: config.tlb_ways,
            tickets: map::CBRS,
            engines: config.engines + courier::COURIERS,
            by_message: true,
            checks: config.broken.checks(),
            ..AtcConfig::default()
        };
        let on_park = {
            let wake = Arc::clone(&wake);
            Box::new(move |begins: bool| {
                if courier::is_caller() {
                    // It was not counted as awake: who stores meanwhile rings.
                } else if begins {
                    wake.hand_over(|| true)
                } else {
                    wake.enter()
                }
            })
        };
        let parking = Parking::new(&plan, on_park);
        let chiplets: Vec<_> = (0..map::CHIPLETS)
            .map(|index| {
                let names = Names {
                    unit: "chiplet",
                    number: index,
                    space: "ASID",
                    queue: "CBR",
                };
                let atc_config = AtcConfig {
                    sanitize: config.sanitize.then_some(names),
                    follow: config.follow_changes,
                    ..atc_config
                };
                chiplet::Chiplet::new(index, Atc::new(atc_config, Arc::clone(&context.dma)))
            })
            .collect();
        if let Some(parking) = &parking {
            for chiplet in &chiplets {
                chiplet
                    .atc
                    .set_hooks(parking.hooks())
                    .expect("a new ATC has no hooks");
            }
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let hardware = Arc::new(Hardware {
            config,
            memory,
            wake,
            couriers: courier::Couriers::default(),
            owed: tgh::Owing::default(),
            chiplets,
            interrupts: context.interrupts,
            dma: context.dma,
            exchanging: AtomicBool::new(false),
            injector: Injector::new(plan.inject, plan.seed),
            started: Instant::now(),
            time_kept: AtomicBool::new(false),
            held_fills: HeldFills::new(&plan),
            parking,
            trapped: trapped::Trapped::default(),
            counters: Counters::default(),
            quiesce: RwLock::new(()),
            pausing: AtomicBool::new(false),
            polite: cpus <= FEW_CPUS,
        });
        hardware.follow_changes(pci::CHANGE_LOG_WANTED);
        let gru = Arc::new(Self {
            hardware,
            threads: Mutex::default(),
            couriers: Mutex::default(),
        });
        let bench = |room: u64| Bench {
            engines: gru
                .hardware
                .chiplets
                .iter()
                .map(|chiplet| {
                    chiplet
                        .atc
                        .engine()
                        .expect("an ATC has a handle for each engine and courier")
                })
                .collect(),
            bounce: vec![0; instructions::STEP_BYTES as usize].into(),
            room: vec![0; room as usize].into(),
        };
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name).spawn(body);
            thread.map_err(system("an engine thread"))
        };
        for number in 0..config.engines {
            let (hardware, bench) = (Arc::clone(&gru.hardware), bench(0));
            let body = move || engine::run(&hardware, bench);
            let thread = spawn(format!("gru-engine-{number}"), Box::new(body))?;
            gru.threads().push(thread);
        }
        for number in 0..courier::COURIERS {
            let (hardware, bench) = (Arc::clone(&gru.hardware), bench(instructions::STEP_BYTES));
            let body = move || courier::run(&hardware, bench);
            let thread = spawn(format!("gru-courier-{number}"), Box::new(body))?;
            gru.couriers().push(thread);
        }
        Ok(gru)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> GruStats {
        dump::stats(&self.hardware)
    }

    /// The TLB of a chiplet.
    #[must_use]
    pub fn atc(&self, chiplet: usize) -> Option<&Arc<atc::Atc>> {
        self.hardware.chiplets.get(chiplet).map(|chiplet| &chiplet.atc)
    }

    fn couriers(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.couriers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Gru {
    fn drop(&mut self) {
        self.hardware.interrupt_delays(true);
        self.hardware.pausing.store(true, Ordering::SeqCst);
        self.hardware.dma.recheck_messages();
        self.hardware.couriers.stop();
        self.hardware.wake.stop();
        let couriers = std::mem::take(&mut *self.couriers());
        for thread in self.threads().drain(..).chain(couriers) {
            if thread.join().is_err() {
                tracing::error!("a GRU engine thread had panicked");
            }
        }
    }
}

impl Model for Gru {
    fn identity(&self) -> Identity {
        Identity {
            vendor: pci::VENDOR,
            device: pci::DEVICE,
            subsystem_vendor: pci::VENDOR,
            subsystem: pci::DEVICE,
            class: pci::CLASS,
            revision: 0,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        let mmap = |memory: &BarMemory, areas: Vec<(u64, u64)>| {
            if self.hardware.config.doorbell == Doorbell::Trap {
                return None;
            }
            match memory.fd().try_clone_to_owned() {
                Ok(fd) => Some(BarMmap { fd, areas }),
                Err(error) => {
                    // Trapping always works; it is only slower.
                    tracing::warn!(%error, "a BAR cannot be offered for mapping");
                    None
                }
            }
        };
        vec![
            BarSpec {
                index: pci::BAR_DOORBELL,
                size: pci::BAR_DOORBELL_SIZE,
                is_64bit: true,
                prefetchable: false,
                mmap: mmap(self.hardware.wake.status(), vec![(pci::STATUS_OFFSET, 0x1000)]),
            },
            BarSpec {
                index: pci::BAR_CHIPLETS,
                size: pci::BAR_CHIPLETS_SIZE,
                is_64bit: true,
                prefetchable: true,
                mmap: mmap(
                    &self.hardware.memory,
                    mappable_areas(self.hardware.config.map_tfh),
                ),
            },
        ]
    }

    fn msix(&self) -> Option<MsixSpec> {
        Some(MsixSpec {
            vectors: pci::VECTORS,
            bar: pci::BAR_DOORBELL,
            table_offset: pci::MSIX_TABLE_OFFSET,
            pba_offset: pci::MSIX_PBA_OFFSET,
        })
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let len = data.len();
        match bar {
            pci::BAR_CHIPLETS if registers::inside(offset, len) => {
                self.hardware.read(offset, data);
                Ok(())
            }
            pci::BAR_DOORBELL
                if offset
                    .checked_add(len as u64)
                    .is_some_and(|end| end <= pci::BAR_DOORBELL_SIZE) =>
            {
                self.hardware.wake.status().load_bytes(offset, data);
                Ok(())
            }
            _ => Err(AccessError::Unassigned { bar, offset, len }),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let len = data.len();
        match bar {
            pci::BAR_CHIPLETS if registers::inside(offset, len) => {
                self.hardware.write(offset, data);
                Ok(())
            }
            pci::BAR_DOORBELL
                if offset
                    .checked_add(len as u64)
                    .is_some_and(|end| end <= pci::BAR_DOORBELL_SIZE) =>
            {
                // The doorbell page rings, and one word names a log; everything else is read-only for software.
                if offset < pci::DOORBELL_OFFSET + 0x1000 {
                    self.hardware.ring_by_message();
                } else if offset == pci::CHANGE_LOG_OFFSET
                    && let Ok(log) = data.try_into()
                {
                    self.hardware.follow_changes(u64::from_le_bytes(log));
                }
                Ok(())
            }
            _ => Err(AccessError::Unassigned { bar, offset, len }),
        }
    }

    fn io_eventfds(&self, bar: usize) -> Vec<IoEventFd> {
        if bar != pci::BAR_DOORBELL {
            return Vec::new();
        }
        match self.hardware.wake.doorbell().try_clone_to_owned() {
            Ok(fd) => vec![IoEventFd {
                offset: pci::DOORBELL_OFFSET,
                size: 8,
                fd,
            }],
            Err(error) => {
                tracing::warn!(%error, "no ioeventfd for the doorbell");
                Vec::new()
            }
        }
    }

    fn reset(&self) {
        self.hardware.reset();
    }

    fn findings(&self) -> Option<Findings> {
        dump::findings(&self.hardware)
    }

    fn dump(&self) -> serde_json::Value {
        dump::dump(&self.hardware)
    }
}

/// What a client may map when not everything is trapped: what software reads and writes of the GSEGs, fault maps,
/// flush handles, and fault handles if asked for. The rest of a GSEG has to be trapped for its doorbell page.
fn mappable_areas(tfh: bool) -> Vec<(u64, u64)> {
    let region = |handles: usize| (handles as u64 * map::HANDLE_STRIDE).next_multiple_of(0x1000);
    let mut areas = Vec::new();
    for chiplet in 0..map::CHIPLETS as u64 {
        let base = chiplet * map::CHIPLET_SIZE;
        let gsegs = (0..map::CONTEXTS as u64).map(|context| base + context * map::GSEG_STRIDE);
        areas.extend(gsegs.map(|gseg| (gseg, map::GSEG_MAPPABLE)));
        areas.push((base + map::TFM, region(map::TFMS)));
        areas.push((base + map::TGH, region(map::TGHS)));
        if tfh {
            areas.push((base + map::TFH, region(map::CBRS)));
        }
    }
    areas
}
