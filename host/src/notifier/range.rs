//! What is invalidated and why.

use protos::bridge::shared::slot_event;

/// Why a range is invalidated: the names of `enum mmu_notifier_event`, Linux 6.12
/// `include/linux/mmu_notifier.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Event {
    /// munmap, mremap's source, a replaced mapping, the reclaimer.
    Unmap = 0,
    /// Discards, hole punch, truncate, migration of the content.
    Clear = 1,
    /// mprotect.
    ProtectionVma = 2,
    /// Write-protection of single pages (fork, page_mkclean).
    ProtectionPage = 3,
    /// Soft-dirty tracking is reset.
    SoftDirty = 4,
    /// The address space ends.
    Release = 5,
    /// Migration to device memory.
    Migrate = 6,
    /// A device asks for exclusive access.
    Exclusive = 7,
}

impl Event {
    /// Every event, in the kernel's order.
    pub const ALL: [Event; 8] = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::SoftDirty,
        Event::Release,
        Event::Migrate,
        Event::Exclusive,
    ];

    /// From a mailbox slot's word; `None` when no event has that number.
    #[must_use]
    pub fn from_slot(word: u32) -> Option<Event> {
        Self::ALL.get(word as usize).copied()
    }
}

const _: () = assert!(
    slot_event::UNMAP == Event::Unmap as u32
        && slot_event::CLEAR == Event::Clear as u32
        && slot_event::PROTECTION_VMA == Event::ProtectionVma as u32
);

/// The range of one invalidation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotifierRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte. `u64::MAX` stands for the end of the address space.
    pub end: u64,
    /// Why.
    pub event: Event,
    /// Whether subscribers may sleep, and therefore must not refuse (C4).
    pub blockable: bool,
}

impl NotifierRange {
    /// The whole address space.
    #[must_use]
    pub fn all(event: Event, blockable: bool) -> Self {
        Self {
            start: 0,
            end: u64::MAX,
            event,
            blockable,
        }
    }

    /// Whether `[start, end)` and this range have a byte in common.
    #[must_use]
    pub fn meets(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_event_when_read_from_slot_round_trips() {
        for event in Event::ALL {
            assert_eq!(Event::from_slot(event as u32), Some(event));
        }
        assert_eq!(Event::from_slot(8), None);
        assert_eq!(Event::from_slot(u32::MAX), None);
    }

    #[test]
    fn test_meets_when_ranges_only_touch_is_false() {
        let range = NotifierRange {
            start: 0x1000,
            end: 0x3000,
            event: Event::Unmap,
            blockable: true,
        };
        assert!(!range.meets(0, 0x1000));
        assert!(!range.meets(0x3000, 0x4000));
        assert!(range.meets(0x2fff, 0x3000));
        assert!(range.meets(0, u64::MAX));
    }
}
