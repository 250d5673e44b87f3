//! The software's page table, and the frames that no page has.

use std::os::unix::fs::FileExt;

use protos::vfio_user::RegionIndex;

use super::places::address;
use super::{
    Change, GruUnderTest, HUGE, HUGE_FRAMES, HUGE_PAGES, PAGE, PageNumber, Pte, SMALL_FRAMES, SMALL_PAGES,
    Violation, violation,
};

impl GruUnderTest {
    /// Everything as after the device's start; each space has every second page.
    pub(super) fn begin(&mut self) -> Result<(), Violation> {
        // Memory space and bus mastering on.
        self.write(RegionIndex::CONFIG, 4, &6u16.to_le_bytes())?;
        self.pages.clear();
        self.free.clear();
        self.free
            .insert(12, (0..SMALL_FRAMES).map(|n| n * PAGE).collect());
        self.free
            .insert(21, (1..=HUGE_FRAMES).map(|n| n * HUGE).collect());
        self.memory
            .write_all_at(&self.poisoned[..(SMALL_FRAMES * PAGE) as usize], 0)?;
        for frame in 1..=HUGE_FRAMES {
            self.poison(frame * HUGE, HUGE)?;
        }
        for space in 0..2u8 {
            for page in (0..(SMALL_PAGES + HUGE_PAGES) as u8).step_by(2) {
                let (asid, va, shift) = address(PageNumber { space, page });
                self.enter(asid, va, shift, page % 8 != 0)?;
            }
        }
        Ok(())
    }

    pub(super) fn poison(&self, frame: u64, bytes: u64) -> Result<(), Violation> {
        // Of a large frame only the ends: writing all of it each time would be most of the work.
        let edge = bytes.min(PAGE);
        for at in [frame, frame + bytes - edge] {
            self.memory.write_all_at(&self.poisoned[..edge as usize], at)?;
        }
        Ok(())
    }

    pub(super) fn is_poisoned(&self, frame: u64, bytes: u64) -> Result<bool, Violation> {
        let edge = bytes.min(PAGE);
        let mut data = [0; PAGE as usize];
        for at in [frame, frame + bytes - edge] {
            self.memory.read_exact_at(&mut data, at)?;
            if data[..] != self.poisoned[..PAGE as usize] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn enter(&mut self, asid: u32, va: u64, shift: u8, writable: bool) -> Result<(), Violation> {
        let Some(frame) = self.free.get_mut(&shift).and_then(Vec::pop) else {
            return Ok(());
        };
        if !self.is_poisoned(frame, 1 << shift)? {
            return violation(format!("frame {frame:#x} was written after it had been given up"));
        }
        self.memory.write_all_at(&[0; PAGE as usize], frame)?;
        let pte = Pte {
            frame,
            writable,
            shift,
        };
        self.pages.insert((asid, va), pte);
        Ok(())
    }

    pub(super) fn give_up(&mut self, asid: u32, va: u64) -> Result<(), Violation> {
        if let Some(pte) = self.pages.remove(&(asid, va)) {
            self.poison(pte.frame, pte.bytes())?;
            // First in, first out: a late write has time to come.
            self.free.entry(pte.shift).or_default().insert(0, pte.frame);
        }
        Ok(())
    }

    pub(super) fn frames_are_intact(&self) -> Result<(), Violation> {
        for (shift, frames) in &self.free {
            for frame in frames {
                if !self.is_poisoned(*frame, 1 << shift)? {
                    return violation(format!("frame {frame:#x} was written after it had been given up"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn page_of(&self, asid: u32, va: u64) -> Option<(u64, Pte)> {
        let (&(_, base), &pte) = self.pages.range((asid, 0)..=(asid, va)).next_back()?;
        (va < base + pte.bytes()).then_some((base, pte))
    }

    /// The device has forgotten the page.
    pub(super) fn change(&mut self, asid: u32, va: u64, shift: u8, to: Change) -> Result<(), Violation> {
        match to {
            Change::Protect => {
                if let Some(pte) = self.pages.get_mut(&(asid, va)) {
                    pte.writable = !pte.writable;
                }
                Ok(())
            }
            Change::Drop => self.give_up(asid, va),
            Change::Move => {
                let writable = self.pages.get(&(asid, va)).is_none_or(|pte| pte.writable);
                self.give_up(asid, va)?;
                self.enter(asid, va, shift, writable)
            }
        }
    }
}
