//! A page table that the test owns: the driver's pager, and the processor's view of the same addresses.
//!
//! [`PageTable::change`] is an invalidation as the notifier contract has it (start: in progress, flush; the
//! change; end), so the device must never use the old page once it has returned.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use driver::gru::{Fault, Mm, Pager, Translation};

use super::memory::{FRAME, Frame, Memory};

const HUGE_SHIFT: u32 = 21;

/// An entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pte {
    /// The page's (first) frame.
    pub frame: Frame,
    /// Stores allowed.
    pub writable: bool,
}

/// The entries, by page number.
#[derive(Debug, Default)]
pub struct Entries {
    small: BTreeMap<u64, Pte>,
    huge: BTreeMap<u64, Pte>,
    in_progress: Vec<(u64, u64)>,
}

impl Entries {
    /// Enters a 4 KiB page; returns the one that was there.
    pub fn map(&mut self, va: u64, pte: Pte) -> Option<Pte> {
        self.small.insert(va / FRAME, pte)
    }
    /// Removes a 4 KiB page.
    pub fn unmap(&mut self, va: u64) -> Option<Pte> {
        self.small.remove(&(va / FRAME))
    }
    /// Enters a 2 MiB page.
    pub fn map_huge(&mut self, va: u64, pte: Pte) {
        self.huge.insert(va >> HUGE_SHIFT, pte);
    }
    /// Removes a 2 MiB page.
    pub fn unmap_huge(&mut self, va: u64) {
        self.huge.remove(&(va >> HUGE_SHIFT));
    }
    /// The 4 KiB page of an address.
    #[must_use]
    pub fn get(&self, va: u64) -> Option<Pte> {
        self.small.get(&(va / FRAME)).copied()
    }
}

/// Pager and processor.
pub struct PageTable {
    memory: Arc<Memory>,
    entries: Mutex<Entries>,
    generation: AtomicU64,
    faults: AtomicU64,
    retries: AtomicU64,
    /// Called after a look-up has found a page and before the driver gets it.
    after_lookup: Mutex<Option<AfterLookup>>,
}

/// See [`PageTable::after_next_lookup`].
pub type AfterLookup = Box<dyn FnOnce() + Send>;

impl std::fmt::Debug for PageTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageTable")
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

impl PageTable {
    /// Empty.
    #[must_use]
    pub fn new(memory: &Arc<Memory>) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::clone(memory),
            entries: Mutex::new(Entries::default()),
            generation: AtomicU64::new(1),
            faults: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            after_lookup: Mutex::new(None),
        })
    }

    /// Enters fresh pages for `[va, va + len)`, filled by `fill(address)`.
    pub fn populate(&self, va: u64, len: u64, writable: bool, fill: impl Fn(u64) -> u8) {
        for page in (va..va + len).step_by(FRAME as usize) {
            let frame = self.memory.take();
            let data: Vec<u8> = (page..page + FRAME).map(&fill).collect();
            self.memory.write(frame, 0, &data);
            self.entries.lock().unwrap().map(page, Pte { frame, writable });
        }
    }

    /// Present generation: raised when an invalidation starts.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Look-ups so far, and those answered with Retry.
    #[must_use]
    pub fn lookups(&self) -> (u64, u64) {
        (
            self.faults.load(Ordering::SeqCst),
            self.retries.load(Ordering::SeqCst),
        )
    }

    /// Has `then` run once, on the thread that serves the next miss, when its page has been looked up and the
    /// driver does not have the answer yet: an invalidation there meets a fill that is being prepared.
    pub fn after_next_lookup(&self, then: AfterLookup) {
        *self.after_lookup.lock().unwrap() = Some(then);
    }

    /// Changes entries without telling anybody: for pages that no device can know.
    pub fn edit<T>(&self, change: impl FnOnce(&mut Entries) -> T) -> T {
        change(&mut self.entries.lock().unwrap())
    }

    /// Begins an invalidation: `invalidate_range_start`. No page of the range is handed out until
    /// [`PageTable::end`], and the device has forgotten them when this returns. Returns the generation: every
    /// smaller tag is stale for the range.
    pub fn start(&self, mm: &Mm, start: u64, end: u64) -> u64 {
        self.entries.lock().unwrap().in_progress.push((start, end));
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        mm.flush(start, end);
        generation
    }

    /// Ends it: `invalidate_range_end`.
    ///
    /// # Panics
    /// Without its start (invariant C2).
    pub fn end(&self, mm: &Mm, start: u64, end: u64) {
        {
            let mut entries = self.entries.lock().unwrap();
            let at = entries.in_progress.iter().position(|r| *r == (start, end));
            entries.in_progress.swap_remove(at.expect("end without start"));
        }
        mm.retry_deferred();
    }

    /// A whole invalidation around `change`; returns its result and the generation.
    pub fn change<T>(
        &self,
        mm: &Mm,
        start: u64,
        end: u64,
        change: impl FnOnce(&mut Entries) -> T,
    ) -> (T, u64) {
        let generation = self.start(mm, start, end);
        let result = self.edit(change);
        self.end(mm, start, end);
        (result, generation)
    }

    /// Moves a page to another frame, contents and all, under the device's feet; returns the old frame.
    ///
    /// # Panics
    /// When there is no page.
    pub fn migrate(&self, mm: &Mm, va: u64) -> Frame {
        let page = va & !(FRAME - 1);
        self.start(mm, page, page + FRAME);
        let frame = self.memory.take();
        let old = self.edit(|e| {
            let old = e.get(page).expect("a page to move");
            // Nobody can store through the old page any more: the device has forgotten it, and the
            // processor's accesses take the lock that is held here.
            let data = self.memory.read(old.frame, 0, FRAME as usize);
            self.memory.write(frame, 0, &data);
            e.map(page, Pte { frame, ..old });
            old
        });
        self.end(mm, page, page + FRAME);
        old.frame
    }

    fn each_page(va: u64, len: usize, mut f: impl FnMut(u64, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = va + done as u64;
            let n = (len - done).min((FRAME - at % FRAME) as usize);
            f(at, done..done + n);
            done += n;
        }
    }

    /// Where an address is, in entries that stay locked: the processor's access and its translation are one
    /// step, as they are for a processor whose TLB takes part in the invalidation.
    fn frame_of(entries: &Entries, va: u64) -> (Frame, u64) {
        if let Some(pte) = entries.get(va) {
            return (pte.frame, va % FRAME);
        }
        let pte = entries
            .huge
            .get(&(va >> HUGE_SHIFT))
            .unwrap_or_else(|| panic!("no page at {va:#x}"));
        (pte.frame, va & ((1 << HUGE_SHIFT) - 1))
    }

    /// The processor writes.
    ///
    /// # Panics
    /// Where there is no page.
    pub fn write(&self, va: u64, data: &[u8]) {
        Self::each_page(va, data.len(), |at, range| {
            let entries = self.entries.lock().unwrap();
            let (frame, offset) = Self::frame_of(&entries, at);
            self.memory.write(frame, offset, &data[range]);
        });
    }

    /// The processor reads.
    ///
    /// # Panics
    /// Where there is no page.
    #[must_use]
    pub fn read(&self, va: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        Self::each_page(va, len, |at, range| {
            let entries = self.entries.lock().unwrap();
            let (frame, offset) = Self::frame_of(&entries, at);
            let piece = self.memory.read(frame, offset, range.len());
            data[range].copy_from_slice(&piece);
        });
        data
    }

    /// The processor reads a word.
    #[must_use]
    pub fn read64(&self, va: u64) -> u64 {
        let bytes = self.read(va, 8);
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

impl Pager for PageTable {
    fn fault(&self, va: u64, _write: bool) -> Fault {
        let answer = self.look_up(va);
        let then = match answer {
            Fault::Page(_) => self.after_lookup.lock().unwrap().take(),
            _ => None,
        };
        if let Some(then) = then {
            then();
        }
        answer
    }
}

impl PageTable {
    fn look_up(&self, va: u64) -> Fault {
        self.faults.fetch_add(1, Ordering::SeqCst);
        let entries = self.entries.lock().unwrap();
        let meets = |(start, end): &(u64, u64), first: u64, last: u64| first < *end && *start <= last;
        let page = |pte: &Pte, shift: u8| {
            let size = 1u64 << shift;
            let first = va & !(size - 1);
            if entries
                .in_progress
                .iter()
                .any(|r| meets(r, first, first + (size - 1)))
            {
                self.retries.fetch_add(1, Ordering::SeqCst);
                return Fault::Retry;
            }
            Fault::Page(Translation {
                iova: pte.frame.iova(),
                page_shift: shift,
                writable: pte.writable,
                generation: self.generation(),
            })
        };
        if let Some(pte) = entries.small.get(&(va / FRAME)) {
            return page(pte, 12);
        }
        if let Some(pte) = entries.huge.get(&(va >> HUGE_SHIFT)) {
            return page(pte, HUGE_SHIFT as u8);
        }
        let missing = Pte {
            frame: Frame(0),
            writable: false,
        };
        match page(&missing, 12) {
            Fault::Retry => Fault::Retry,
            _ => Fault::Bad,
        }
    }
}
