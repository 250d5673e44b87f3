//! A shadow MMU with KVM's retry protocol: the reference for what a subscriber owes the chain.
//!
//! `start`: lock; in_progress += 1, range = union; zap. `end`: lock; sequence += 1; in_progress -= 1.
//! `fault`: sequence first (S5), then the page is looked up (that may sleep), then lock: if an invalidation in
//! progress meets the address, or the sequence has moved, drop and start over; else install. Source:
//! `virt/kvm/kvm_main.c`, Linux 6.12.
//!
//! The lock spins and nothing is allocated under it (S8): entries live in a preallocated, direct-mapped table.

use std::sync::Arc;

use crate::notifier::{Again, Ctx, MaySleep, NotifierRange, SpinMutex, Subscriber, might_sleep};

/// Shift of a page here.
const PAGE_SHIFT: u32 = 12;

/// A shadow translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowEntry {
    /// Page number in the address space.
    pub page: u64,
    /// What it translates to.
    pub target: u64,
    /// Used since the last young query.
    pub young: bool,
}

/// How a fault was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultResult {
    /// The translation is installed.
    Installed(u64),
    /// Nothing is mapped there.
    NoPage,
    /// The address space has ended.
    Released,
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct ShadowMmuStats {
    /// Faults answered.
    pub faults: u64,
    /// Look-ups thrown away.
    pub retries: u64,
    /// Entries dropped by invalidations.
    pub zapped: u64,
}

#[derive(Debug)]
struct State {
    in_progress: u64,
    /// Union of the ranges in progress.
    range: (u64, u64),
    sequence: u64,
    released: bool,
    entries: Box<[Option<ShadowEntry>]>,
    stats: ShadowMmuStats,
}

/// See the module's text.
#[derive(Debug)]
pub struct ShadowMmu {
    state: SpinMutex<State>,
}

impl ShadowMmu {
    /// With room for `entries` translations (rounded up to a power of two).
    #[must_use]
    pub fn new(entries: usize) -> Arc<Self> {
        let entries = entries.next_power_of_two();
        Arc::new(Self {
            state: SpinMutex::new(State {
                in_progress: 0,
                range: (u64::MAX, 0),
                sequence: 0,
                released: false,
                entries: vec![None; entries].into_boxed_slice(),
                stats: ShadowMmuStats::default(),
            }),
        })
    }

    /// The translation of `va`, if there is one. Marks it young.
    #[must_use]
    pub fn translate(&self, va: u64) -> Option<u64> {
        let page = va >> PAGE_SHIFT;
        let mut state = self.state.lock();
        let index = page as usize & (state.entries.len() - 1);
        let entry = state.entries[index].as_mut().filter(|e| e.page == page)?;
        entry.young = true;
        Some(entry.target)
    }

    /// Serves a fault. `look_up` finds the page in the VM's truth; it may sleep and is called again when an
    /// invalidation has come in between.
    pub fn fault(&self, va: u64, _token: &MaySleep, mut look_up: impl FnMut() -> Option<u64>) -> FaultResult {
        might_sleep("ShadowMmu::fault");
        let page = va >> PAGE_SHIFT;
        loop {
            // S5: before the look-up. (After it, an invalidation that ran in between would go unnoticed.)
            let sequence = self.state.lock().sequence;
            let found = look_up();
            let mut state = self.state.lock();
            if state.released {
                return FaultResult::Released;
            }
            let base = page << PAGE_SHIFT;
            let meets = state.in_progress != 0
                && base < state.range.1
                && state.range.0 <= base | ((1 << PAGE_SHIFT) - 1);
            if meets || state.sequence != sequence {
                state.stats.retries += 1;
                drop(state);
                std::thread::yield_now();
                continue;
            }
            state.stats.faults += 1;
            let Some(target) = found else {
                return FaultResult::NoPage;
            };
            let index = page as usize & (state.entries.len() - 1);
            state.entries[index] = Some(ShadowEntry {
                page,
                target,
                young: true,
            });
            return FaultResult::Installed(target);
        }
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> ShadowMmuStats {
        self.state.lock().stats
    }

    /// Translations installed now.
    #[must_use]
    pub fn live(&self) -> usize {
        self.state.lock().entries.iter().flatten().count()
    }

    fn for_range(&self, start: u64, end: u64, mut visit: impl FnMut(&mut Option<ShadowEntry>)) {
        let mut state = self.state.lock();
        for slot in &mut state.entries {
            if slot.is_some_and(|e| {
                let base = e.page << PAGE_SHIFT;
                base < end && start <= base | ((1 << PAGE_SHIFT) - 1)
            }) {
                visit(slot);
            }
        }
    }

    fn zap(state: &mut State, start: u64, end: u64) {
        for slot in &mut state.entries {
            if slot.is_some_and(|e| {
                let base = e.page << PAGE_SHIFT;
                base < end && start <= base | ((1 << PAGE_SHIFT) - 1)
            }) {
                *slot = None;
                state.stats.zapped += 1;
            }
        }
    }
}

impl Subscriber for ShadowMmu {
    fn name(&self) -> &'static str {
        "shadow mmu"
    }

    fn sleeping(&self) -> bool {
        false
    }

    fn invalidate_range_start(&self, range: &NotifierRange, _ctx: Ctx<'_>) -> Result<(), Again> {
        let mut state = self.state.lock();
        if state.in_progress == 0 {
            state.range = (range.start, range.end);
        } else {
            state.range = (state.range.0.min(range.start), state.range.1.max(range.end));
        }
        state.in_progress += 1;
        Self::zap(&mut state, range.start, range.end);
        Ok(())
    }

    fn invalidate_range_end(&self, _range: &NotifierRange, _ctx: Ctx<'_>) {
        let mut state = self.state.lock();
        state.sequence += 1;
        assert!(state.in_progress > 0, "C2: an end without a start");
        state.in_progress -= 1;
    }

    fn clear_flush_young(&self, start: u64, end: u64) -> bool {
        // Clearing the mark is the flush here: there is no cache in front of the table.
        self.clear_young(start, end)
    }

    fn clear_young(&self, start: u64, end: u64) -> bool {
        let mut young = false;
        self.for_range(start, end, |slot| {
            if let Some(entry) = slot {
                young |= std::mem::take(&mut entry.young);
            }
        });
        young
    }

    fn test_young(&self, start: u64, end: u64) -> bool {
        let mut young = false;
        self.for_range(start, end, |slot| young |= slot.is_some_and(|e| e.young));
        young
    }

    fn release(&self) {
        let mut state = self.state.lock();
        state.released = true;
        Self::zap(&mut state, 0, u64::MAX);
    }
}

#[cfg(test)]
#[path = "shadow_mmu_tests.rs"]
mod tests;
