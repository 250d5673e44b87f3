//! The model with a small driver in the same process: no sockets, no guest.
//!
//! `TLBRIDGE_SANITIZE=1` runs everything under the sanitizer, which may find nothing on a device without faults.
//!
//! [`Rig`] stores and loads words the way a client does (by trap, or directly in the mapped memory) and
//! serves misses from a page table that the test sets up.

mod by_message;
mod completions;
mod contexts;
mod doorbells;
mod engines;
mod exchanges;
mod injected;
mod instructions;
mod interruptions;
mod messages;
mod misses;
mod options;
mod purges;
mod registered;
mod sanitizer;
mod scribble;
mod trapped;
mod windows;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use protos::gru::cb::{Instruction, Status};
use protos::gru::{HandleStatus, cb, cbe, cch, map, page_size, pci, tfh, tgh};
use rustix::event::{EventfdFlags, eventfd};

use super::{BstoreSource, Doorbell, Gru, GruConfig, PurgeMatch};
use crate::dma::{Prot, Space};
use crate::model::{Model, ModelContext};
use crate::pci::Interrupts;

/// Where the client's memory is mapped.
const IOVA: u64 = 0x10_0000_0000;
/// Its size.
const MEMORY: u64 = 8 << 20;
/// ASID of context 0; context n uses 8 more each.
const ASID: u32 = 0x100;
const PAGE: u64 = 4096;

/// What a page table entry of the test says.
#[derive(Debug, Clone, Copy)]
struct Pte {
    /// Offset in the client's memory.
    offset: u64,
    writable: bool,
    shift: u8,
    tag: u64,
}

/// How misses reach the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    FaultMap,
    UserPolling,
}

#[derive(Debug)]
struct Rig {
    gru: Arc<Gru>,
    dma: Arc<Space>,
    interrupts: Arc<Interrupts>,
    vectors: Vec<OwnedFd>,
    memory: File,
    doorbell: Doorbell,
    /// Parts of BAR2 that a client can map, and that this one therefore has.
    mapped: Vec<(u64, u64)>,
    /// By (asid, page number).
    pages: Mutex<HashMap<(u32, u64), Pte>>,
    /// The sanitizer may find nothing.
    faultless: bool,
    served: AtomicU64,
}

fn config(doorbell: Doorbell) -> GruConfig {
    GruConfig {
        doorbell,
        map_tfh: doorbell == Doorbell::Poll,
        spin: Some(Duration::ZERO),
        ..GruConfig::default()
    }
}

impl Rig {
    fn new(mut config: GruConfig) -> Arc<Self> {
        config.sanitize |=
            std::env::var_os("TLBRIDGE_SANITIZE").is_some_and(|value| value == "1" || value == "2");
        let faultless = config.broken == Default::default()
            && config.faults.inject == Default::default()
            && config.purge_match == PurgeMatch::Overlap;
        let dma = Space::new();
        let interrupts = Interrupts::new(pci::VECTORS);
        let vectors: Vec<_> = (0..u32::from(pci::VECTORS))
            .map(|vector| {
                let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
                assert!(interrupts.set_eventfd(vector, Some(fd.try_clone().unwrap())));
                fd
            })
            .collect();
        let context = ModelContext {
            dma: Arc::clone(&dma),
            interrupts: Arc::clone(&interrupts),
        };
        let gru = Gru::new(context, config).unwrap();
        let memory = File::from(rustix::fs::memfd_create("client", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let fd = memory.as_fd().try_clone_to_owned().unwrap();
        dma.map(IOVA, MEMORY, fd, 0, Prot::READ_WRITE).unwrap();
        let doorbell = config.doorbell;
        let chiplets = gru.bars().remove(1);
        assert_eq!(chiplets.index, pci::BAR_CHIPLETS);
        let mapped = chiplets.mmap.map_or_else(Vec::new, |mmap| mmap.areas);
        let pages = Mutex::default();
        Arc::new(Self {
            gru,
            dma,
            interrupts,
            vectors,
            memory,
            doorbell,
            mapped,
            pages,
            faultless,
            served: AtomicU64::new(0),
        })
    }

    // ---- words ----

    fn is_mapped(&self, offset: u64) -> bool {
        self.mapped
            .iter()
            .any(|&(start, len)| (start..start + len).contains(&offset))
    }

    fn load(&self, offset: u64) -> u64 {
        if self.is_mapped(offset) {
            return self.gru.hardware.memory.word(offset).load(Ordering::Acquire);
        }
        let mut bytes = [0; 8];
        self.gru.bar_read(pci::BAR_CHIPLETS, offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn store(&self, offset: u64, value: u64) {
        if !self.is_mapped(offset) {
            return self.trap_store(offset, value);
        }
        let word = self.gru.hardware.memory.word(offset);
        word.store(value, Ordering::Release);
    }

    fn trap_store(&self, offset: u64, value: u64) {
        self.gru
            .bar_write(pci::BAR_CHIPLETS, offset, &value.to_le_bytes())
            .unwrap();
    }

    /// What a mapped client does after a store that starts something.
    fn ring_if_asleep(&self) {
        if self.doorbell == Doorbell::Trap {
            return;
        }
        fence(Ordering::SeqCst);
        let mut awake = [0; 4];
        let at = pci::STATUS_OFFSET + pci::STATUS_AWAKE;
        self.gru.bar_read(pci::BAR_DOORBELL, at, &mut awake).unwrap();
        if u32::from_le_bytes(awake) == 0 {
            self.gru
                .bar_write(pci::BAR_DOORBELL, pci::DOORBELL_OFFSET, &[1])
                .unwrap();
        }
    }

    fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "waiting for {what}; state: {:#}",
                self.gru.dump()
            );
            std::thread::yield_now();
        }
    }

    // ---- client memory and page table ----

    fn fill_memory(&self, offset: u64, len: usize, seed: u64) -> Vec<u8> {
        let mut x = seed | 1;
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        self.memory.write_all_at(&bytes, offset).unwrap();
        bytes
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn word(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.bytes(offset, 8).try_into().unwrap())
    }

    fn set_word(&self, offset: u64, value: u64) {
        self.memory.write_all_at(&value.to_le_bytes(), offset).unwrap();
    }

    fn map_page(&self, asid: u32, va: u64, offset: u64, writable: bool) {
        let pte = Pte {
            offset,
            writable,
            shift: 12,
            tag: 0,
        };
        self.pages.lock().unwrap().insert((asid, va / PAGE), pte);
    }

    fn map_range(&self, asid: u32, va: u64, offset: u64, len: u64) {
        for page in 0..len.div_ceil(PAGE) {
            self.map_page(asid, va + page * PAGE, offset + page * PAGE, true);
        }
    }

    // ---- contexts (chiplet 0 unless said otherwise) ----

    fn cch_at(context: usize) -> u64 {
        map::CCH + context as u64 * map::HANDLE_STRIDE
    }

    /// A CCH command; CCHs are trapped in both modes. The answer.
    fn cch_send(&self, context: usize, control: cch::Control) {
        let control = control.with_cmd(true).with_status(HandleStatus::ACTIVE);
        self.trap_store(Self::cch_at(context), control.into_bits());
    }

    fn cch(&self, context: usize) -> cch::Control {
        let mut bytes = [0; 8];
        self.gru
            .bar_read(pci::BAR_CHIPLETS, Self::cch_at(context), &mut bytes)
            .unwrap();
        cch::Control::from_bits(u64::from_le_bytes(bytes))
    }

    fn cch_wait(&self, context: usize) -> Result<(), cch::Cause> {
        let control = self.until("a CCH answer", || {
            let control = self.cch(context);
            (control.status() != HandleStatus::ACTIVE).then_some(control)
        });
        assert!(!control.cmd());
        if control.status() == HandleStatus::IDLE {
            Ok(())
        } else {
            Err(control.cause())
        }
    }

    fn cch_do(&self, context: usize, opc: cch::Opc) -> Result<(), cch::Cause> {
        self.cch_send(context, self.cch(context).with_opc(opc));
        self.cch_wait(context)
    }

    /// The operands of a context: maps, ASIDs, sizes.
    fn configure(&self, context: usize, cbr_map: u64, dsr_map: u32, mode: Mode) {
        let at = Self::cch_at(context);
        let asid = u64::from(ASID + 8 * context as u32);
        self.trap_store(at + cch::CBR_MAP, cbr_map);
        for pair in 0..4 {
            let two = (asid + 2 * pair) | ((asid + 2 * pair + 1) << 32);
            self.trap_store(at + cch::ASID + 8 * pair, two);
        }
        for four in 0..2 {
            self.trap_store(at + cch::SIZEAVAIL + 8 * four, u64::MAX);
        }
        let control = cch::Control::new()
            .with_dsr_allocation_map(dsr_map)
            .with_tfm_fault_bit_enable(mode == Mode::FaultMap)
            .with_tlb_int_enable(mode == Mode::FaultMap)
            .with_tlb_int_select(context as u8)
            .with_tfm_done_bit_enable(true)
            .with_cb_int_enable(true);
        self.trap_store(at, control.into_bits());
    }

    /// Context 0 with 4 CBs (physical 2, 3, 6, 7) and 8 KiB of data segment, running.
    fn start(&self, mode: Mode) {
        self.configure(0, 0b1010, 0xff, mode);
        self.cch_do(0, cch::Opc::ALLOCATE).unwrap();
        self.cch_do(0, cch::Opc::START).unwrap();
    }

    fn cbr(context_map: u64, cb: usize) -> usize {
        map::physical_cbr(context_map, cb).unwrap()
    }

    // ---- data segment ----

    fn ds_write(&self, offset: u64, bytes: &[u8]) {
        for (index, word) in bytes.chunks(8).enumerate() {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.store(
                map::GSEG_DS + offset + 8 * index as u64,
                u64::from_le_bytes(padded),
            );
        }
    }

    fn ds_read(&self, offset: u64, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8) as u64).map(|index| self.load(map::GSEG_DS + offset + 8 * index));
        words.flat_map(u64::to_le_bytes).take(len).collect()
    }

    // ---- control blocks of context 0 ----

    fn cb_at(cb: usize) -> u64 {
        cb as u64 * map::HANDLE_STRIDE
    }

    fn issue(&self, cb: usize, instruction: Instruction) {
        self.issue_in(0, cb, instruction);
    }

    fn issue_in(&self, context: usize, cb: usize, instruction: Instruction) {
        let at = context as u64 * map::GSEG_STRIDE + Self::cb_at(cb);
        self.store(at + cb::IDEF4, instruction.idef4);
        self.store(at + cb::BADDR0, instruction.baddr0);
        self.store(at + cb::NELEM, instruction.nelem);
        self.store(at + cb::STRIDE_OP1, instruction.stride_op1);
        self.store(at + cb::BADDR1_VALUE_OP2, instruction.baddr1_value_op2);
        self.store(at, instruction.control.into_bits());
        self.ring_if_asleep();
    }

    fn istatus(&self, cb: usize) -> Status {
        cb::Control::from_bits(self.load(Self::cb_at(cb))).istatus()
    }

    /// Waits until the instruction ends, serving misses of all contexts meanwhile.
    fn finish(&self, cb: usize) -> Status {
        self.until("an instruction", || {
            self.serve();
            self.ended(cb)
        })
    }

    /// Its status if the instruction has ended.
    fn ended(&self, cb: usize) -> Option<Status> {
        let status = self.istatus(cb);
        matches!(status, Status::IDLE | Status::EXCEPTION).then_some(status)
    }

    fn run(&self, cb: usize, instruction: Instruction) -> Status {
        self.issue(cb, instruction);
        self.finish(cb)
    }

    fn run_ok(&self, cb: usize, instruction: Instruction) {
        assert_eq!(
            self.run(cb, instruction),
            Status::IDLE,
            "ecause {:#x}",
            self.cbe_status(0b1010, cb).ecause()
        );
    }

    fn avalue(&self, cb: usize) -> u64 {
        self.load(Self::cb_at(cb) + cb::AVALUE)
    }

    /// DW7 of a CBE: trapped in both modes.
    fn cbe_status(&self, context_map: u64, cb: usize) -> cbe::Status {
        cbe::Status::from_bits(self.cbe_word(Self::cbr(context_map, cb), cbe::STATE))
    }

    fn cbe_word(&self, cbr: usize, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        let at = map::CBE + cbr as u64 * map::HANDLE_STRIDE + offset;
        self.gru.bar_read(pci::BAR_CHIPLETS, at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    // ---- misses ----

    fn tfh_at(cbr: usize) -> u64 {
        map::TFH + cbr as u64 * map::HANDLE_STRIDE
    }

    fn tfh(&self, cbr: usize) -> tfh::Control {
        tfh::Control::from_bits(self.load(Self::tfh_at(cbr)))
    }

    /// Takes the fault bits of a fault map: an exchange with zero.
    fn take_faults(&self, tfm: usize) -> Vec<usize> {
        self.take_bits(tfm, map::tfm::FAULT_BITS)
    }

    fn take_bits(&self, tfm: usize, which: u64) -> Vec<usize> {
        let mut cbrs = Vec::new();
        for half in 0..2 {
            let at = map::TFM + tfm as u64 * map::HANDLE_STRIDE + which + 8 * half;
            let taken = if self.is_mapped(at) {
                self.gru.hardware.memory.word(at).swap(0, Ordering::AcqRel)
            } else {
                let taken = self.load(at);
                self.store(at, 0);
                taken
            };
            cbrs.extend(super::chiplet::bits(taken).map(|bit| half as usize * 64 + bit));
        }
        cbrs
    }

    /// Serves what fault maps show, and every user-polling miss.
    fn serve(&self) {
        for tfm in 0..map::TFMS {
            for cbr in self.take_faults(tfm) {
                self.serve_cbr(cbr);
            }
        }
        for cbr in 0..map::CBRS {
            let control = self.tfh(cbr);
            if control.state() == tfh::State::MISS_UPM && control.status() == HandleStatus::EXCEPTION {
                self.serve_cbr(cbr);
            }
        }
    }

    /// Answers one miss from the page table, as a driver does: EXCEPTION when there is no page.
    fn serve_cbr(&self, cbr: usize) {
        self.served.fetch_add(1, Ordering::Relaxed);
        let (asid, va, write) = self.miss(cbr);
        let pte = self.pages.lock().unwrap().get(&(asid, va / PAGE)).copied();
        match pte {
            Some(pte) if pte.writable || !write => self.write_restart(cbr, asid, va, pte),
            _ => self.tfh_command(cbr, tfh::Opc::EXCEPTION),
        }
    }

    fn miss(&self, cbr: usize) -> (u32, u64, bool) {
        let control = self.tfh(cbr);
        assert_eq!(
            control.status(),
            HandleStatus::EXCEPTION,
            "CBR {cbr} has a miss: {control:?}"
        );
        let va = self.load(Self::tfh_at(cbr) + tfh::MISSVADDR);
        let asids = tfh::Asids::from_bits(self.load(Self::tfh_at(cbr) + tfh::ASIDS));
        (asids.missasid(), va, tfh::is_write(control.cause()))
    }

    fn fill_operands(&self, cbr: usize, asid: u32, va: u64, pte: Pte) {
        let at = Self::tfh_at(cbr);
        let asids = tfh::Asids::from_bits(self.load(at + tfh::ASIDS));
        let asids = asids
            .with_fillasid(asid)
            .with_dirty(pte.writable)
            .with_gaa(tfh::GAA_RAM);
        self.store(at + tfh::ASIDS, asids.into_bits());
        let target = tfh::Target::new().with_pfn((IOVA + pte.offset) >> 12);
        let target = target.with_pagesize(page_size::code_of_shift(pte.shift).unwrap());
        self.store(at + tfh::TARGET, target.into_bits());
        self.store(at + tfh::FILLVADDR, va);
        self.store(at + tfh::FILLTAG, pte.tag);
    }

    fn write_restart(&self, cbr: usize, asid: u32, va: u64, pte: Pte) {
        self.fill_operands(cbr, asid, va, pte);
        self.tfh_command(cbr, tfh::Opc::WRITE_RESTART);
    }

    /// Stores DW0 absolutely.
    fn tfh_command(&self, cbr: usize, opc: tfh::Opc) {
        let control = self
            .tfh(cbr)
            .with_opc(opc)
            .with_cmd(true)
            .with_status(HandleStatus::ACTIVE);
        self.store(Self::tfh_at(cbr), control.into_bits());
        self.ring_if_asleep();
    }

    fn tfh_wait(&self, cbr: usize) -> HandleStatus {
        self.until("a TFH answer", || {
            let status = self.tfh(cbr).status();
            (status != HandleStatus::ACTIVE).then_some(status)
        })
    }

    /// Waits until the CBR reports a fault-map miss, and takes its bit.
    fn wait_fault(&self, tfm: usize, cbr: usize) {
        self.until("a fault-map miss", || {
            self.take_faults(tfm).contains(&cbr).then_some(())
        });
    }

    // ---- purges ----

    /// TLBINV, and wait for its completion. `pages` 0 = everything of every ASID.
    fn purge(&self, handle: usize, asid: u32, va: u64, pages: u64) {
        self.purge_send(handle, asid, va, pages);
        self.until("a TLBINV", || {
            let control = self.tgh(handle);
            (control.status() != HandleStatus::ACTIVE)
                .then(|| assert_eq!(control.status(), HandleStatus::IDLE))
        });
    }

    fn tgh(&self, handle: usize) -> tgh::Control {
        tgh::Control::from_bits(self.load(map::TGH + handle as u64 * map::HANDLE_STRIDE))
    }

    /// TLBINV, without waiting.
    fn purge_send(&self, handle: usize, asid: u32, va: u64, pages: u64) {
        let at = map::TGH + handle as u64 * map::HANDLE_STRIDE;
        let n = pages.clamp(1, 1024) as u16 - 1;
        self.store(at + tgh::VADDR, va);
        let scope = tgh::Scope::new().with_asid(asid).with_global(pages == 0);
        self.store(at + tgh::SCOPE, scope.into_bits());
        let count = tgh::Count::new().with_vaddrmask(tgh::VADDRMASK_ALL).with_n(n);
        self.store(at + tgh::COUNT, count.into_bits());
        self.store(at + tgh::CTXBITMAP, 0xffff);
        let go = tgh::Control::new()
            .with_cmd(true)
            .with_opc(tgh::Opc::TLBINV)
            .with_status(HandleStatus::ACTIVE);
        self.store(at, go.into_bits());
        self.ring_if_asleep();
    }

    /// Serves what fault maps show where the page table has a page; the other misses stay unanswered.
    fn serve_those_with_pages(&self) {
        for tfm in 0..map::TFMS {
            for cbr in self.take_faults(tfm) {
                let (asid, va, _) = self.miss(cbr);
                if self.pages.lock().unwrap().contains_key(&(asid, va / PAGE)) {
                    self.serve_cbr(cbr);
                }
            }
        }
    }

    /// CPU time of this device's engine threads.
    fn engine_cpu(&self) -> Duration {
        let threads = self.gru.threads();
        threads.iter().map(thread_cpu).sum()
    }

    /// Interrupts of a vector since the last look.
    fn interrupts(&self, vector: usize) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(&self.vectors[vector], &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.faultless
            && !std::thread::panicking()
            && let Some(findings) = self.gru.findings()
        {
            assert_eq!(findings.reports, [], "{:#?}", findings.reports);
        }
    }
}

/// Runs a test in all modes.
fn in_all_modes(test: impl Fn(Doorbell)) {
    for doorbell in [Doorbell::Trap, Doorbell::Bell, Doorbell::Poll] {
        println!("{doorbell:?}");
        test(doorbell);
    }
}

/// CPU time of a thread of this process.
#[allow(unsafe_code)] // There is no safe way to another thread's CPU clock.
fn thread_cpu(thread: &std::thread::JoinHandle<()>) -> Duration {
    use std::os::unix::thread::JoinHandleExt;
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the handle is not joined, so the thread's id is valid; the result goes to a local.
    let found = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) };
    assert_eq!(found, 0);
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the local.
    let read = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(read, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
