//! What is measured over which ranges, and how often.

use serde::{Deserialize, Serialize};

/// Lengths: one page, 16 pages, 2 MiB, 64 MiB, 1 GiB.
pub const SIZES: [usize; 5] = [4096, 16 * 4096, 2 << 20, 64 << 20, 1 << 30];

/// A row of the table. The floor of each is a plain munmap of a populated range that nobody watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Case {
    /// munmap with a userfaultfd monitor that reads events and does nothing.
    Monitor,
    /// By the agent, no live translation, range not registered: the agent's own part.
    AgentUnregistered,
    /// By the agent, no live translation.
    AgentSilent,
    /// By the agent, live translations, the device's engines asleep.
    AgentLiveParked,
    /// The same with a busy process on every processor.
    AgentLiveCrowded,
    /// By the agent, live translations, the device at work for somebody else.
    AgentLiveBusy,
    /// A plain munmap of a registered range with live translations.
    SafetyNet,
    /// By the agent, with another process attached to the range.
    AgentSleeping,
}

impl Case {
    /// In the order of measurement: the attached process last, since it makes every call hop.
    pub const ALL: [Self; 8] = [
        Self::Monitor,
        Self::AgentUnregistered,
        Self::AgentSilent,
        Self::AgentLiveParked,
        Self::AgentLiveCrowded,
        Self::AgentLiveBusy,
        Self::SafetyNet,
        Self::AgentSleeping,
    ];

    /// For the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Monitor => "monitor that does nothing",
            Self::AgentUnregistered => "agent, not registered",
            Self::AgentSilent => "agent, nothing cached",
            Self::AgentLiveParked => "agent, live, device asleep",
            Self::AgentLiveCrowded => "agent, live, device asleep, hogs",
            Self::AgentLiveBusy => "agent, live, device busy",
            Self::SafetyNet => "safety net, live",
            Self::AgentSleeping => "agent, attached process",
        }
    }

    /// Whether the range has live translations when the call begins.
    pub fn live(self) -> bool {
        matches!(
            self,
            Self::AgentLiveParked
                | Self::AgentLiveCrowded
                | Self::AgentLiveBusy
                | Self::SafetyNet
                | Self::AgentSleeping
        )
    }

    /// Whether the device's engines have been asleep for a while when the call begins.
    pub fn parked(self) -> bool {
        matches!(self, Self::AgentLiveParked | Self::AgentLiveCrowded)
    }
}

/// Whether a cell of the table is measured: large ranges take most of the time and are measured where they
/// say something (how the cost grows with the range).
pub fn wanted(size: usize, case: Case, quick: bool) -> bool {
    match size {
        // Slices of other programs are what it shows.
        _ if case == Case::AgentLiveCrowded => size == SIZES[0],
        _ if quick => size <= 2 << 20,
        0..=0x20_0000 => true,
        0x20_0001..=0x400_0000 => !matches!(case, Case::AgentUnregistered | Case::AgentSleeping),
        _ => case == Case::AgentSilent,
    }
}

/// What is measured where every process has its processor: one page, and a range that takes one flush, too.
pub const PLACED_SIZES: [usize; 2] = [4096, 2 << 20];

/// ABBA blocks of a cell.
pub fn blocks_of(size: usize, quick: bool) -> usize {
    match (quick, size) {
        (true, _) => 5,
        (false, 0..=0x20_0000) => 120,
        (false, _) => 30,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_cells_when_not_quick_have_at_least_thirty_blocks() {
        for size in SIZES {
            assert!(blocks_of(size, false) >= 30);
            assert!(
                Case::ALL.into_iter().any(|case| wanted(size, case, false)),
                "{size}"
            );
        }
    }
}
