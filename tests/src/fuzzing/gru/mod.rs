//! A GRU under any sequence of BAR accesses. The software's page table is the oracle: whatever is done, each
//! entry of the device's TLB equals it, and no frame that it has given up is written any more.

mod pages;
mod places;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device::dma::Prot;
use device::faults::{BreakPlan, FaultPlan};
use device::gru::{Gru, GruConfig, GruStats};
use device::model::Model;
use device::pci::Function;
use protos::gru::cb::{self, Opc, Status, XType};
use protos::gru::{HandleStatus, cbe, cch, map, page_size, pci, tfh, tgh};
use protos::vfio_user::RegionIndex;
use rustix::fs::{MemfdFlags, memfd_create};

use super::gru_actions::{
    Action, Answer, Change, ContextNumber, Instruction, PageNumber, Place, PurgeKind, Sequence,
};
use super::live::Violation;
use places::{address, cb_at, cch_at, ds_at, offset_of, place_of, tfh_at};

/// (opcode, status, cause) of an instruction that ended: what stands for coverage.
type Seen = (u16, u32, u32);

const IOVA: u64 = 0x10_0000_0000;
const MEMORY: u64 = 8 << 20;
const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const SMALL_FRAMES: u64 = 64;
const HUGE_FRAMES: u64 = MEMORY / HUGE - 1;
const SMALL_PAGES: u64 = 16;
const HUGE_PAGES: u64 = 2;
const SMALL_VA: u64 = 0x1_0000_0000;
const HUGE_VA: u64 = 0x2_0000_0000;
/// Context n of a chiplet may use any of them.
const ASIDS: [u32; 4] = [0x100, 0x108, 0x110, 0xff_fff0];
const CONTEXTS: usize = 4;
/// CBRs that contexts get: 8 allocation units.
const CBRS: usize = 8 * map::CBR_AU;
const POISON: u8 = 0xd5;
/// Far longer than anything takes on a busy machine; only a device that hangs gets there.
const PATIENCE: Duration = Duration::from_secs(30);
/// What an engine may take before the next action comes anyhow.
const SETTLE: Duration = Duration::from_millis(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pte {
    /// Offset in the memory.
    frame: u64,
    writable: bool,
    shift: u8,
}

impl Pte {
    fn bytes(&self) -> u64 {
        1 << self.shift
    }
}

/// An answer that was prepared.
#[derive(Debug, Clone, Copy)]
struct Prepared {
    chiplet: usize,
    cbr: usize,
    /// The miss that it is for is the same as long as this is.
    epoch: u64,
    asid: u32,
    va: u64,
    pte: Pte,
}

/// A miss that waits for the driver.
#[derive(Debug, Clone, Copy)]
struct Miss {
    chiplet: usize,
    cbr: usize,
    asid: u32,
    va: u64,
    write: bool,
}

/// A device that is being fuzzed, and its software's view.
#[derive(Debug)]
pub struct GruUnderTest {
    function: Arc<Function>,
    gru: Arc<Gru>,
    memory: File,
    pages: BTreeMap<(u32, u64), Pte>,
    /// Frames that no page has, by size; all their bytes are [`POISON`].
    free: BTreeMap<u8, Vec<u64>>,
    prepared: Vec<Prepared>,
    epochs: [[u64; CBRS]; map::CHIPLETS],
    /// Control blocks that were started: chiplet, context, number.
    running: BTreeSet<(usize, usize, u64)>,
    poisoned: Vec<u8>,
}

fn violation<T>(text: String) -> Result<T, Violation> {
    Err(Violation(text))
}

impl GruUnderTest {
    /// A new device; `broken` to see that the oracle finds something.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn start(broken: BreakPlan) -> Result<Self, Violation> {
        let config = GruConfig {
            // Few, so that they are evicted, and quick to look at.
            tlb_sets: 8,
            tlb_ways: 4,
            spin: Some(Duration::ZERO),
            broken,
            faults: FaultPlan {
                limit: SETTLE,
                ..FaultPlan::default()
            },
            ..GruConfig::default()
        };
        let mut model = None;
        let function = Function::new(|context| {
            let gru = Gru::new(context, config)?;
            model = Some(Arc::clone(&gru));
            Ok::<_, device::gru::GruError>(gru as Arc<dyn Model>)
        })
        .map_err(|error| Violation(error.to_string()))?;
        let memory = File::from(memfd_create("fuzz-gru", MemfdFlags::CLOEXEC)?);
        memory.set_len(MEMORY)?;
        let under_test = Self {
            function,
            gru: model.expect("the function was made"),
            memory,
            pages: BTreeMap::new(),
            free: BTreeMap::new(),
            prepared: Vec::new(),
            epochs: Default::default(),
            running: BTreeSet::new(),
            poisoned: vec![POISON; HUGE as usize],
        };
        under_test.map_memory()?;
        Ok(under_test)
    }

    /// Runs a sequence from a device that was just reset, and resets it.
    ///
    /// # Errors
    /// [`Violation`]: what the device did wrong. It should not be used any more then.
    pub fn run(&mut self, sequence: &Sequence) -> Result<BTreeSet<Seen>, Violation> {
        self.begin()?;
        let mut seen = BTreeSet::new();
        for action in &sequence.actions {
            self.act(action)?;
            self.settle(&mut seen);
            self.compare()?;
        }
        self.frames_are_intact()?;
        self.function.reset();
        self.forget_software();
        let entries: usize = self.tlbs().map(|tlb| tlb.len()).sum();
        if entries != 0 {
            return violation(format!("{entries} entries after a reset"));
        }
        self.a_good_program_runs()?;
        Ok(seen)
    }

    /// The device's counters.
    #[must_use]
    pub fn stats(&self) -> GruStats {
        self.gru.stats()
    }

    // ---- page table and frames ----

    fn map_memory(&self) -> Result<(), Violation> {
        let fd: OwnedFd = self.memory.as_fd().try_clone_to_owned()?;
        let mapped = self.function.dma().map(IOVA, MEMORY, fd, 0, Prot::READ_WRITE);
        mapped.map_err(|error| Violation(error.to_string()))
    }

    fn tlbs(&self) -> impl Iterator<Item = Vec<device::atc::EntryDump>> + '_ {
        (0..map::CHIPLETS).map(|chiplet| self.gru.atc(chiplet).expect("two chiplets").dump(usize::MAX))
    }

    /// Every entry is what the page table says.
    fn compare(&self) -> Result<(), Violation> {
        for (chiplet, entry) in self
            .tlbs()
            .enumerate()
            .flat_map(|(n, tlb)| tlb.into_iter().map(move |e| (n, e)))
        {
            let page = u32::try_from(entry.space.0)
                .ok()
                .and_then(|asid| self.page_of(asid, entry.va));
            let good = page.is_some_and(|(base, pte)| {
                entry.size.shift() <= pte.shift
                    && entry.iova == IOVA + pte.frame + (entry.va - base)
                    && (pte.writable || !entry.writable)
            });
            if !good {
                return violation(format!("TLB {chiplet} has {entry:x?}, the page table {page:x?}"));
            }
        }
        Ok(())
    }

    // ---- accesses ----

    fn write(&self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), Violation> {
        let written = self.function.region_write(region, offset, data);
        written.map_err(|error| Violation(error.to_string()))
    }

    fn store(&self, offset: u64, value: u64) {
        self.function
            .region_write(
                RegionIndex(pci::BAR_CHIPLETS as u32),
                offset,
                &value.to_le_bytes(),
            )
            .expect("a word inside the BAR");
    }

    fn load(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.function
            .region_read(RegionIndex(pci::BAR_CHIPLETS as u32), offset, &mut bytes)
            .expect("a word inside the BAR");
        u64::from_le_bytes(bytes)
    }

    fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> Result<T, Violation> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                return violation(format!("no {what} within {PATIENCE:?}: {:#}", self.gru.dump()));
            }
            std::thread::yield_now();
        }
    }

    /// Gives the engines time, up to [`SETTLE`], until each instruction has ended or waits for the driver.
    fn settle(&mut self, seen: &mut BTreeSet<Seen>) {
        let deadline = Instant::now() + SETTLE;
        while !self.running.is_empty() && Instant::now() < deadline {
            let missing = self.misses().len();
            let ended: Vec<_> = self
                .running
                .iter()
                .copied()
                .filter(|cb| self.ended(*cb, seen))
                .collect();
            for cb in ended {
                self.running.remove(&cb);
            }
            if self.running.len() <= missing {
                return;
            }
            std::thread::yield_now();
        }
        // Not started at all, or overwritten: not waited for again.
        if self.running.len() > self.misses().len() {
            self.running.clear();
        }
    }

    fn ended(&self, (chiplet, context, cb): (usize, usize, u64), seen: &mut BTreeSet<Seen>) -> bool {
        let control = cb::Control::from_bits(self.load(cb_at(chiplet, context, cb)));
        let done = control.istatus() != Status::ACTIVE;
        if done {
            seen.insert((
                u16::from(control.opc().0) << 8 | u16::from(control.exopc()),
                u32::from(control.istatus().0),
                u32::from(control.isubstatus()),
            ));
        }
        done
    }

    // ---- misses ----

    fn misses(&self) -> Vec<Miss> {
        let mut found = Vec::new();
        for chiplet in 0..map::CHIPLETS {
            for cbr in 0..CBRS {
                let at = tfh_at(chiplet, cbr);
                let control = tfh::Control::from_bits(self.load(at));
                let waits = matches!(control.state(), tfh::State::MISS_FMM | tfh::State::MISS_UPM);
                if waits && control.status() == HandleStatus::EXCEPTION && !control.cmd() {
                    found.push(Miss {
                        chiplet,
                        cbr,
                        asid: tfh::Asids::from_bits(self.load(at + tfh::ASIDS)).missasid(),
                        va: self.load(at + tfh::MISSVADDR),
                        write: tfh::is_write(control.cause()),
                    });
                }
            }
        }
        found
    }

    fn pick(&self, which: u8) -> Option<Miss> {
        let misses = self.misses();
        misses.get(usize::from(which) % misses.len().max(1)).copied()
    }

    fn command(&mut self, chiplet: usize, cbr: usize, opc: tfh::Opc) {
        let at = tfh_at(chiplet, cbr);
        let control = tfh::Control::from_bits(self.load(at))
            .with_opc(opc)
            .with_cmd(true);
        self.store(at, control.with_status(HandleStatus::ACTIVE).into_bits());
    }

    fn operands(&self, miss: Miss, va: u64, pte: Pte, size: u8, writable: bool, class: u8) {
        let at = tfh_at(miss.chiplet, miss.cbr);
        let asids = tfh::Asids::new()
            .with_missasid(miss.asid)
            .with_fillasid(miss.asid);
        self.store(
            at + tfh::ASIDS,
            asids.with_dirty(writable).with_gaa(class).into_bits(),
        );
        let target = tfh::Target::new()
            .with_pfn((IOVA + pte.frame) >> 12)
            .with_pagesize(size);
        self.store(at + tfh::TARGET, target.into_bits());
        self.store(at + tfh::FILLVADDR, va);
        self.store(at + tfh::FILLTAG, 1);
    }

    fn serve(&mut self, miss: Miss, answer: Answer) {
        let page = self.page_of(miss.asid, miss.va);
        let (mut opc, mut writable, mut class) = (tfh::Opc::WRITE_RESTART, true, tfh::GAA_RAM);
        let mut fill = page.filter(|(_, pte)| pte.writable || !miss.write);
        let mut size = fill
            .and_then(|(_, pte)| page_size::code_of_shift(pte.shift))
            .unwrap_or(0);
        match answer {
            Answer::Right => {}
            Answer::ReadOnly => writable = false,
            Answer::WriteOnly => opc = tfh::Opc::WRITE_ONLY,
            Answer::Neighbour(page) => {
                let (_, va, _) = address(PageNumber { space: 0, page });
                fill = self.page_of(miss.asid, va);
                size = fill
                    .and_then(|(_, pte)| page_size::code_of_shift(pte.shift))
                    .unwrap_or(0);
            }
            Answer::BadTarget => {
                if let Some((_, pte)) = &mut fill {
                    pte.frame = MEMORY;
                }
            }
            Answer::BadSize(code) => {
                // 1 TiB, no size at all, or one that the frame is not aligned to.
                size = [15, 16 + code % 16, 1, 8][usize::from(code % 4)];
                let aligned = page_size::shift_of_code(size)
                    .is_some_and(|shift| fill.is_some_and(|(_, pte)| pte.frame % (1 << shift) == 0));
                if aligned && size < 9 {
                    size = 15;
                }
            }
            Answer::BadClass => class = 1 + u8::from(miss.write),
            Answer::Other(code) => {
                opc = tfh::Opc([0, 1, 4, 7, 5, 6][usize::from(code % 6)]);
                fill = None;
            }
        }
        match fill {
            Some((base, pte)) => {
                // Any address in the page names it; the frame's pages do, too.
                let va = if miss.va.wrapping_sub(base) < pte.bytes() {
                    miss.va
                } else {
                    base
                };
                let within = (va - base) & !(PAGE - 1);
                let frame = pte.frame + within;
                let writable = writable && pte.writable;
                self.operands(miss, va, Pte { frame, ..pte }, size, writable, class);
            }
            None if !matches!(answer, Answer::Other(_)) => opc = tfh::Opc::EXCEPTION,
            None => {}
        }
        if opc != tfh::Opc::WRITE_ONLY {
            self.epochs[miss.chiplet][miss.cbr] += 1;
        }
        self.command(miss.chiplet, miss.cbr, opc);
    }

    fn prepare(&self, miss: Miss, pte: Pte) -> Prepared {
        Prepared {
            chiplet: miss.chiplet,
            cbr: miss.cbr,
            epoch: self.epochs[miss.chiplet][miss.cbr],
            asid: miss.asid,
            va: miss.va,
            pte,
        }
    }

    fn give(&mut self, prepared: Prepared, only_write: bool) {
        let Prepared {
            chiplet,
            cbr,
            epoch,
            asid,
            va,
            pte,
        } = prepared;
        let Some(miss) = self
            .misses()
            .into_iter()
            .find(|miss| (miss.chiplet, miss.cbr) == (chiplet, cbr))
        else {
            return;
        };
        // Answered since, or the context was touched: no driver gives an old answer to a new miss.
        if self.epochs[chiplet][cbr] != epoch || (miss.asid, miss.va) != (asid, va) {
            return;
        }
        let base = va & !(pte.bytes() - 1);
        let frame = pte.frame + ((va - base) & !(PAGE - 1));
        let size = page_size::code_of_shift(pte.shift).expect("a page of the table");
        self.operands(miss, va, Pte { frame, ..pte }, size, pte.writable, tfh::GAA_RAM);
        if only_write {
            self.command(chiplet, cbr, tfh::Opc::WRITE_ONLY);
        } else {
            self.epochs[chiplet][cbr] += 1;
            self.command(chiplet, cbr, tfh::Opc::WRITE_RESTART);
        }
    }

    // ---- purges ----

    fn purge(&self, asid: u32, va: u64, shift: u8, kind: PurgeKind, handle: u8) -> Result<(), Violation> {
        let mut start = va;
        let mut n = 0u16;
        let mut code = page_size::code_of_shift(shift).expect("a page of the table");
        let mut mask = tgh::VADDRMASK_ALL;
        let mut global = false;
        match kind {
            PurgeKind::Page => {}
            PurgeKind::Range { before, after } => {
                let before = u64::from(before % 4) << shift;
                start = va - before;
                n = (before >> shift) as u16 + u16::from(after % 8);
            }
            PurgeKind::Large => code = page_size::code_of_shift(21).expect("2 MiB"),
            PurgeKind::Space => n = tgh::N_ALL,
            PurgeKind::Mask => mask = 7,
            PurgeKind::Global => global = true,
        }
        for chiplet in 0..map::CHIPLETS {
            let handle = u64::from(handle) % map::TGHS as u64;
            let at = chiplet as u64 * map::CHIPLET_SIZE + map::TGH + handle * map::HANDLE_STRIDE;
            self.store(at + tgh::VADDR, start);
            let scope = tgh::Scope::new()
                .with_asid(asid)
                .with_pagesize(code)
                .with_global(global);
            self.store(at + tgh::SCOPE, scope.into_bits());
            self.store(
                at + tgh::COUNT,
                tgh::Count::new().with_vaddrmask(mask).with_n(n).into_bits(),
            );
            let go = tgh::Control::new().with_cmd(true).with_opc(tgh::Opc::TLBINV);
            self.store(at, go.with_status(HandleStatus::ACTIVE).into_bits());
            self.until("completion of a TLBINV", |this| {
                let control = tgh::Control::from_bits(this.load(at));
                (!control.cmd() && control.status() == HandleStatus::IDLE).then_some(())
            })?;
        }
        Ok(())
    }

    // ---- actions ----

    fn context_touched(&mut self, chiplet: usize) {
        self.epochs[chiplet].iter_mut().for_each(|epoch| *epoch += 1);
    }

    /// What the device has forgotten is forgotten here.
    fn forget_software(&mut self) {
        self.prepared.clear();
        self.running.clear();
        (0..map::CHIPLETS).for_each(|chiplet| self.context_touched(chiplet));
    }

    fn act(&mut self, action: &Action) -> Result<(), Violation> {
        match *action {
            Action::Start {
                context,
                cbrs,
                segment,
                space,
                polling,
            } => {
                let (chiplet, number) = place_of(context);
                self.context_touched(chiplet);
                self.start_context(
                    chiplet,
                    number,
                    u64::from(cbrs),
                    u32::from(segment),
                    space,
                    polling,
                );
            }
            Action::Configure { context, opc, flags } => {
                let (chiplet, number) = place_of(context);
                self.context_touched(chiplet);
                let at = cch_at(chiplet, number);
                let control = cch::Control::from_bits(self.load(at) ^ u64::from(flags) << 5 & 0xffe0);
                let control = control.with_opc(cch::Opc(opc % 8)).with_cmd(true);
                self.store(at, control.with_status(HandleStatus::ACTIVE).into_bits());
            }
            Action::Issue {
                context,
                cb,
                instruction,
            } => self.issue(context, u64::from(cb) % 16, instruction),
            Action::IssueWords {
                context,
                cb,
                words,
                control,
            } => {
                let (chiplet, number) = place_of(context);
                let at = cb_at(chiplet, number, u64::from(cb) % 16);
                for (index, word) in words.into_iter().enumerate() {
                    self.store(at + 8 + 8 * index as u64, word);
                }
                self.store(at, control | 1);
                self.running.insert((chiplet, number, u64::from(cb) % 16));
            }
            Action::Data { context, at, value } => {
                let (chiplet, number) = place_of(context);
                self.store(ds_at(chiplet, number) + u64::from(at) % 4096 / 8 * 8, value);
            }
            Action::Serve { which, answer } => {
                if let Some(miss) = self.pick(which) {
                    self.serve(miss, answer);
                }
            }
            Action::Stale {
                which,
                purge,
                handle,
                to,
                only_write,
            } => {
                if let Some(miss) = self.pick(which)
                    && let Some((base, pte)) = self.page_of(miss.asid, miss.va)
                {
                    let prepared = self.prepare(miss, pte);
                    self.purge(miss.asid, base, pte.shift, purge, handle)?;
                    self.change(miss.asid, base, pte.shift, to)?;
                    self.give(prepared, only_write);
                }
            }
            Action::Prepare { which } => {
                if let Some(miss) = self.pick(which)
                    && let Some((_, pte)) = self.page_of(miss.asid, miss.va)
                    && self.prepared.len() < 16
                {
                    let prepared = self.prepare(miss, pte);
                    self.prepared.push(prepared);
                }
            }
            Action::Give { which, only_write } => {
                if !self.prepared.is_empty() {
                    let prepared = self.prepared.remove(usize::from(which) % self.prepared.len());
                    self.give(prepared, only_write);
                }
            }
            Action::Change {
                page,
                purge,
                handle,
                to,
            } => {
                let (asid, va, shift) = address(page);
                self.purge(asid, va, shift, purge, handle)?;
                self.change(asid, va, shift, to)?;
            }
            Action::Purge { page, purge, handle } => {
                let (asid, va, shift) = address(page);
                self.purge(asid, va, shift, purge, handle)?;
            }
            Action::Word { place, value, bytes } => self.word(place, value, bytes),
            Action::Look { place, bytes } => {
                let (region, offset) = offset_of(place);
                let mut data = [0; 16];
                let data = &mut data[..=usize::from(bytes % 16)];
                // A refusal is an answer, too.
                let _ = self.function.region_read(region, offset, data);
            }
            Action::Remap => {
                self.function.dma().unmap_all();
                let entries: usize = self.tlbs().map(|tlb| tlb.len()).sum();
                if entries != 0 {
                    return violation(format!("{entries} entries though nothing is mapped"));
                }
                self.map_memory()?;
            }
            Action::BusMaster => {
                self.write(RegionIndex::CONFIG, 4, &2u16.to_le_bytes())?;
                let entries: usize = self.tlbs().map(|tlb| tlb.len()).sum();
                if entries != 0 {
                    return violation(format!("{entries} entries without bus mastering"));
                }
                self.write(RegionIndex::CONFIG, 4, &6u16.to_le_bytes())?;
            }
            Action::Reset => {
                self.function.reset();
                self.forget_software();
            }
            Action::Settle => {}
        }
        Ok(())
    }

    fn word(&mut self, place: Place, value: u64, bytes: u8) {
        let (region, offset) = offset_of(place);
        if let Place::Cch(context, _) = place {
            self.context_touched(place_of(context).0);
        }
        if matches!(place, Place::Cbe(..) | Place::TfhOperand(..)) {
            // The driver's own words are overwritten: what it prepared for that miss may name another one.
            (0..map::CHIPLETS).for_each(|chiplet| self.context_touched(chiplet));
        }
        let data = value.to_le_bytes();
        let len = match place {
            // Not into the next handle, whose first word is a command.
            Place::TfhOperand(_, word) | Place::TghOperand(_, word) => {
                8 * (1 + usize::from(bytes) % 2).min(usize::from(7 - word % 7))
            }
            _ => 1 + usize::from(bytes) % 8,
        };
        let _ = self.function.region_write(region, offset, &data[..len.min(8)]);
    }

    fn start_context(
        &self,
        chiplet: usize,
        number: usize,
        cbrs: u64,
        segment: u32,
        space: u8,
        polling: bool,
    ) {
        let at = cch_at(chiplet, number);
        self.store(at + cch::CBR_MAP, cbrs);
        let asid = u64::from(ASIDS[usize::from(space) % ASIDS.len()]);
        for pair in 0..4 {
            self.store(
                at + cch::ASID + 8 * pair,
                (asid + 2 * pair) | (asid + 2 * pair + 1) << 32,
            );
        }
        for four in 0..2 {
            self.store(at + cch::SIZEAVAIL + 8 * four, u64::MAX);
        }
        let control = cch::Control::new()
            .with_dsr_allocation_map(segment)
            .with_tfm_fault_bit_enable(!polling)
            .with_tlb_int_enable(!polling)
            .with_tlb_int_select(number as u8)
            .with_cb_int_enable(true);
        for opc in [cch::Opc::ALLOCATE, cch::Opc::START] {
            let control = control.with_opc(opc).with_cmd(true);
            self.store(at, control.with_status(HandleStatus::ACTIVE).into_bits());
            // It may be refused; and it may wait for something that only the driver can give.
            let deadline = Instant::now() + SETTLE;
            while cch::Control::from_bits(self.load(at)).cmd() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
    }

    fn issue(&mut self, context: ContextNumber, cb: u64, i: Instruction) {
        let (chiplet, number) = place_of(context);
        let at = cb_at(chiplet, number, cb);
        let va = |page: u8| address(PageNumber { space: 0, page }).1;
        let xtype = XType([0, 1, 2, 3, 6, 3, 3, 5][usize::from(i.xtype % 8)]);
        let control = cb::Control::new()
            .with_icmd(true)
            .with_istatus(Status::ACTIVE)
            .with_opc(Opc(i.opc % 18))
            .with_exopc(i.exopc % 16)
            .with_xtype(xtype)
            .with_ima(if i.interrupt { cb::ima::INTERRUPT } else { 0 })
            .with_tri0(u32::from(i.segment % 4096));
        self.store(at + cb::IDEF4, u64::from(i.segment / 2 % 4096));
        self.store(at + cb::BADDR0, va(i.page) + u64::from(i.offset % 8192));
        self.store(at + cb::NELEM, u64::from(i.nelem % 2048));
        self.store(at + cb::STRIDE_OP1, u64::from(i.stride % 5));
        self.store(
            at + cb::BADDR1_VALUE_OP2,
            va(i.other) + u64::from(i.offset / 16 % 4096),
        );
        self.store(at, control.into_bits());
        self.running.insert((chiplet, number, cb));
    }

    /// After everything: a context as a driver sets it up loads what is in memory.
    fn a_good_program_runs(&mut self) -> Result<(), Violation> {
        let (asid, va, _) = address(PageNumber { space: 0, page: 0 });
        self.give_up(asid, va)?;
        self.enter(asid, va, 12, true)?;
        let Some((_, pte)) = self.page_of(asid, va) else {
            return violation("no frame is left".into());
        };
        let value = 0x0123_4567_89ab_cdef_u64;
        self.memory.write_all_at(&value.to_le_bytes(), pte.frame + 8)?;
        self.start_context(0, 0, 1, 1, 0, false);
        let load = cb::Instruction::vload(va + 8, 0, XType::DWORD, 1, 1);
        let at = cb_at(0, 0, 0);
        self.store(at + cb::IDEF4, load.idef4);
        self.store(at + cb::BADDR0, load.baddr0);
        self.store(at + cb::NELEM, load.nelem);
        self.store(at + cb::STRIDE_OP1, load.stride_op1);
        self.store(at, load.control.into_bits());
        let miss = self.until("miss of a good program", |this| this.misses().pop())?;
        if (miss.asid, miss.va) != (asid, va + 8) {
            return violation(format!("a good program misses at {miss:x?}"));
        }
        self.serve(miss, Answer::Right);
        let status = self.until("end of a good program", |this| {
            let control = cb::Control::from_bits(this.load(at));
            (control.istatus() != Status::ACTIVE).then_some(control.istatus())
        })?;
        let loaded = self.load(ds_at(0, 0));
        if status != Status::IDLE || loaded != value {
            let cbe = cbe::Status::from_bits(self.load(map::CBE + cbe::STATE));
            return violation(format!(
                "a good program ends with {status:?}, {loaded:#x}, {cbe:x?}"
            ));
        }
        self.compare()?;
        self.function.reset();
        self.forget_software();
        Ok(())
    }
}
