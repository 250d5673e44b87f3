//! A driver on a device, with memory and users.

use std::sync::Arc;
use std::time::{Duration, Instant};

use driver::backing::{Backing, DmaProt};
use driver::gru::user::Gseg;
use driver::gru::{Context, ContextOptions, FaultMode, Gru, GruOptions, Mm};
use protos::gru::cb::{Instruction, Status};

use super::memory::{IOVA_BASE, Memory};
use super::page_table::PageTable;

/// How long one instruction may take before the test fails. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An open device with memory.
#[derive(Debug)]
pub struct Rig {
    /// The driver.
    pub gru: Arc<Gru>,
    /// The device's seam.
    pub backing: Arc<dyn Backing>,
    /// The memory; all of it is mapped for the device.
    pub memory: Arc<Memory>,
}

impl Rig {
    /// Opens the device and maps `frames` frames.
    ///
    /// # Panics
    /// When either fails.
    #[must_use]
    pub fn new(backing: Arc<dyn Backing>, options: GruOptions, frames: u32) -> Self {
        let gru = Gru::open(Arc::clone(&backing), options).expect("open the GRU");
        let memory = Arc::new(Memory::new(frames));
        backing
            .dma_map(IOVA_BASE, memory.len(), memory.fd(), 0, DmaProt::READ_WRITE)
            .expect("map the test's memory");
        Self { gru, backing, memory }
    }

    /// A new address space with an empty page table.
    #[must_use]
    pub fn space(&self) -> (Arc<Mm>, Arc<PageTable>) {
        let table = PageTable::new(&self.memory);
        let pager: Arc<PageTable> = Arc::clone(&table);
        (self.gru.address_space(pager), table)
    }
}

/// A context and its user's side.
#[derive(Debug)]
pub struct User {
    /// Control blocks and data. Dropped before the context.
    pub gseg: Gseg,
    /// The context.
    pub context: Context,
}

/// Options for `cbs` control blocks and `ds_bytes` bytes.
#[must_use]
pub fn wants(cbs: usize, ds_bytes: usize, fault_mode: FaultMode) -> ContextOptions {
    ContextOptions {
        cbs,
        ds_bytes,
        fault_mode,
        chiplet: None,
    }
}

impl User {
    /// Creates the context.
    ///
    /// # Panics
    /// When it cannot be created.
    #[must_use]
    pub fn new(mm: &Arc<Mm>, options: ContextOptions) -> Self {
        let context = mm.create_context(options).expect("a context");
        let gseg = context.gseg().expect("its GSEG");
        Self { gseg, context }
    }

    /// Runs an instruction to its end.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`], or an access fails.
    #[must_use]
    pub fn run(&self, cb: usize, instruction: &Instruction) -> Status {
        self.gseg.issue(cb, instruction).expect("issue");
        self.wait(cb)
    }

    /// Waits for an instruction's end.
    ///
    /// # Panics
    /// As [`User::run`].
    #[must_use]
    pub fn wait(&self, cb: usize) -> Status {
        let since = Instant::now();
        let alive = || since.elapsed() < PATIENCE;
        match self.gseg.wait(cb, &alive) {
            Ok(status) => status,
            Err(e) => panic!(
                "cb {cb} of {:?}: {e}; control {:?}",
                self.context,
                self.gseg.control(cb)
            ),
        }
    }

    /// Runs an instruction that has to succeed.
    ///
    /// # Panics
    /// When it does not; with the exception's detail.
    pub fn ok(&self, cb: usize, instruction: &Instruction) {
        let status = self.run(cb, instruction);
        assert_eq!(
            status,
            Status::IDLE,
            "{instruction:?}: {:?}",
            self.context.exception_detail(cb)
        );
    }

    /// Runs an atomic and returns the old value.
    ///
    /// # Panics
    /// As [`User::ok`].
    #[must_use]
    pub fn atomic(&self, cb: usize, instruction: &Instruction) -> u64 {
        self.ok(cb, instruction);
        self.gseg.avalue(cb).expect("avalue")
    }

    /// Writes to the data segment.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn put(&self, offset: usize, data: &[u8]) {
        self.gseg.ds_write(offset, data).expect("data segment");
    }

    /// Reads from the data segment.
    ///
    /// # Panics
    /// When it does not fit.
    #[must_use]
    pub fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.gseg.ds_read(offset, &mut data).expect("data segment");
        data
    }
}

/// A byte for an address: neighbours, pages and seeds differ.
#[must_use]
pub fn pattern(seed: u64, va: u64) -> u8 {
    let mut x = va ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 29;
    (x & 0x7f) as u8
}

/// What is left in frames that the device must not reach: no [`pattern`] has this byte.
pub const POISON: u8 = 0xdb;

/// `len` bytes of the pattern from `va`.
#[must_use]
pub fn patterned(seed: u64, va: u64, len: usize) -> Vec<u8> {
    (va..va + len as u64).map(|a| pattern(seed, a)).collect()
}
