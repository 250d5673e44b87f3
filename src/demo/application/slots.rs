//! The address ranges that disturbers change and workers compute in: what is mapped where, published
//! so that a worker can tell whether anything changed under an instruction.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::frames::{Frame, PAGE};

/// Rights of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prot {
    /// No access.
    None,
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

impl Prot {
    /// Whether a device access of that kind is allowed.
    pub fn allows(self, write: bool) -> bool {
        match self {
            Self::None => false,
            Self::Read => !write,
            Self::ReadWrite => true,
        }
    }
}

/// What is mapped in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The pages.
    pub frame: Frame,
    /// Their rights.
    pub prot: Prot,
}

/// A slot as it was read at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    version: u64,
    /// What is mapped; `None` = nothing. Only meaningful while the slot is [`View::settled`].
    pub mapping: Option<Mapping>,
    /// Generation that the last call on it returned (or the least it can have been).
    pub generation: u64,
}

impl View {
    /// No call was in progress.
    pub fn settled(&self) -> bool {
        self.version.is_multiple_of(2)
    }
    /// No call began or ended between two views of the same slot.
    pub fn unchanged(&self, later: &Self) -> bool {
        self.settled() && self.version == later.version
    }
    /// Exactly one call lies between two settled views.
    pub fn one_call_before(&self, later: &Self) -> bool {
        self.settled() && later.version == self.version + 2
    }
}

/// One address range.
#[derive(Debug)]
pub struct Slot {
    /// Its number.
    pub index: usize,
    /// First address.
    pub va: u64,
    /// Pages.
    pub pages: usize,
    version: AtomicU64,
    frame: AtomicU64,
    prot: AtomicU64,
    generation: AtomicU64,
}

/// "Nothing mapped" in `Slot::frame`, which else holds the first page.
const NOTHING: u64 = u64::MAX;

impl Slot {
    /// An empty slot.
    pub fn new(index: usize, va: u64, pages: usize) -> Self {
        Self {
            index,
            va,
            pages,
            version: AtomicU64::new(0),
            frame: AtomicU64::new(NOTHING),
            prot: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.pages as u64 * PAGE
    }

    /// Reads the slot. The loads after this call see at least what the view describes; call
    /// [`Slot::view_again`] after them to learn whether it still holds.
    pub fn view(&self) -> View {
        let version = self.version.load(Ordering::Acquire);
        let frame = self.frame.load(Ordering::Relaxed);
        let prot = match self.prot.load(Ordering::Relaxed) {
            0 => Prot::None,
            1 => Prot::Read,
            _ => Prot::ReadWrite,
        };
        let generation = self.generation.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        // A torn view is made unsettled, so nobody trusts its fields.
        let version = if self.version.load(Ordering::Relaxed) == version {
            version
        } else {
            version | 1
        };
        let mapping = (frame != NOTHING).then_some(Mapping {
            frame: Frame {
                first_page: frame as usize,
                pages: self.pages,
            },
            prot,
        });
        View {
            version,
            mapping,
            generation,
        }
    }

    /// As [`Slot::view`], after everything that was read before it.
    pub fn view_again(&self) -> View {
        fence(Ordering::SeqCst);
        self.view()
    }

    /// Begins a change. Only the disturber that owns the slot calls this.
    pub fn begin(&self) {
        let before = self.version.fetch_add(1, Ordering::SeqCst);
        assert!(
            before.is_multiple_of(2),
            "slot {} is already being changed",
            self.index
        );
        fence(Ordering::SeqCst);
    }

    /// Ends a change: this is what is there now.
    pub fn end(&self, mapping: Option<Mapping>, generation: u64) {
        let (frame, prot) = match mapping {
            None => (NOTHING, 0),
            Some(m) => {
                assert_eq!(m.frame.pages, self.pages, "a frame fills its slot");
                (
                    m.frame.first_page as u64,
                    match m.prot {
                        Prot::None => 0,
                        Prot::Read => 1,
                        Prot::ReadWrite => 2,
                    },
                )
            }
        };
        self.frame.store(frame, Ordering::Relaxed);
        self.prot.store(prot, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        let before = self.version.fetch_add(1, Ordering::SeqCst);
        assert!(
            !before.is_multiple_of(2),
            "slot {} was not being changed",
            self.index
        );
    }
}

/// How workers and disturbers find each other: races happen where both are.
#[derive(Debug)]
pub struct Hot {
    /// By worker: the slot that was changed last.
    changed: Vec<AtomicU64>,
    /// By worker: the slot it is computing in.
    used: Vec<AtomicU64>,
}

impl Hot {
    /// For that many workers, who divide the slots by their number.
    pub fn new(workers: usize) -> Self {
        let nothing = || (0..workers).map(|_| AtomicU64::new(NOTHING)).collect();
        Self {
            changed: nothing(),
            used: nothing(),
        }
    }
    /// A slot has been changed.
    pub fn set_changed(&self, slot: usize) {
        self.changed[slot % self.changed.len()].store(slot as u64, Ordering::Relaxed);
    }
    /// The slot that was changed last among those of a worker: a stale translation would show there.
    pub fn changed(&self, worker: usize) -> Option<usize> {
        Self::get(&self.changed[worker])
    }
    /// A worker computes in a slot.
    pub fn set_used(&self, worker: usize, slot: usize) {
        self.used[worker].store(slot as u64, Ordering::Relaxed);
    }
    /// The slot that some worker computes in: an instruction is running there, or waits for a translation.
    pub fn used(&self, worker: usize) -> Option<usize> {
        Self::get(&self.used[worker % self.used.len()])
    }

    fn get(slot: &AtomicU64) -> Option<usize> {
        let slot = slot.load(Ordering::Relaxed);
        (slot != NOTHING).then_some(slot as usize)
    }
}

/// Sizes of the slots, in pages, repeated over the arena: mostly 256 KiB, some single pages whose
/// neighbours stay mapped, some that a 2 MiB translation covers.
const PATTERN: [usize; 12] = [64, 64, 1, 64, 4, 64, 512, 64, 1, 64, 16, 64];

/// Lays out slots from `base` on until `pages` pages are used. A slot of n pages is aligned to its size.
pub fn layout(base: u64, pages: usize) -> Vec<Slot> {
    let mut slots = Vec::new();
    let (mut va, mut used) = (base, 0);
    for size in PATTERN.into_iter().cycle() {
        if used + 1 > pages {
            break;
        }
        let size = if used + size > pages { 1 } else { size };
        va = va.next_multiple_of(size as u64 * PAGE);
        slots.push(Slot::new(slots.len(), va, size));
        va += size as u64 * PAGE;
        used += size;
        if slots.len() == (1 << 12) - 1 {
            break; // a word holds 12 bits of slot number, and the last one is the purgeable area's
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_view_when_a_change_is_in_progress_is_not_settled() {
        let slot = Slot::new(0, 0x1000, 4);
        let first = slot.view();
        assert!(first.settled() && first.mapping.is_none());
        slot.begin();
        assert!(!slot.view().settled());
        assert!(!first.unchanged(&slot.view()));
        let mapping = Mapping {
            frame: Frame {
                first_page: 8,
                pages: 4,
            },
            prot: Prot::Read,
        };
        slot.end(Some(mapping), 17);
        let second = slot.view();
        assert!(second.settled() && first.one_call_before(&second));
        assert_eq!((second.mapping, second.generation), (Some(mapping), 17));
        assert!(second.unchanged(&slot.view_again()));
    }

    #[test]
    fn test_layout_when_memory_is_given_uses_it_without_overlap() {
        let slots = layout(0x1000_0000_0000, 10_000);
        let mut end = 0x1000_0000_0000;
        for slot in &slots {
            assert!(slot.va >= end && slot.va.is_multiple_of(slot.len()));
            end = slot.va + slot.len();
        }
        assert_eq!(slots.iter().map(|s| s.pages).sum::<usize>(), 10_000);
        assert!(slots.iter().any(|s| s.pages == 512) && slots.iter().any(|s| s.pages == 1));
    }
}
