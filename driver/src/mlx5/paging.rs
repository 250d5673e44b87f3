//! On-demand paging: page faults and their end.

use protos::mlx5::Layout;
use protos::mlx5::caps::{self, OdpCap};
use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::{CONTEXT, PageFaultResume};
use protos::mlx5::eq::{Eqe, Event, PAGE_FAULT_MEMORY};

use super::{Hca, Mlx5Error};

/// Pages that the HCA has met absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFault {
    /// What ends it.
    pub token: u64,
    /// The key.
    pub key: u32,
    /// First address.
    pub va: u64,
    /// How many pages of 4 KiB.
    pub pages: u32,
}

impl PageFault {
    /// What an event says, if it is a page fault of the memory scheme.
    #[must_use]
    pub fn of(eqe: &Eqe) -> Option<Self> {
        let word = |index: usize| eqe.data[index].get();
        let wide = |index: usize| u64::from(word(index)) << 32 | u64::from(word(index + 1));
        let is_one = Event(eqe.kind) == Event::PAGE_FAULT && eqe.sub_type == PAGE_FAULT_MEMORY;
        is_one.then(|| Self {
            token: wide(1) & 0xffff_ffff_ffff,
            key: word(4),
            va: wide(5),
            pages: word(3) >> 12,
        })
    }
}

impl Hca {
    /// Chooses page faults by key and address, if the HCA has them.
    pub(super) fn choose_paging(&self) -> Result<(), Mlx5Error> {
        let output = self.command(
            Opcode::QUERY_HCA_CAP,
            caps::Kind::ODP.0 << 1,
            &[0; 8],
            CONTEXT + caps::SIZE,
        )?;
        let most = OdpCap::from_prefix(&output[CONTEXT..]);
        let mut wanted = vec![0; 8];
        wanted.extend(most.0);
        self.command(Opcode::SET_HCA_CAP, caps::SET_ODP, &wanted, 16)
            .map(drop)
    }

    /// Ends a page fault: the pages are there, or (`failed`) cannot be had.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn resume_fault(&self, fault: &PageFault, failed: bool) -> Result<(), Mlx5Error> {
        let input = PageFaultResume::zeroed()
            .with(PageFaultResume::ERROR, u32::from(failed))
            .with(PageFaultResume::TOKEN_47_32, (fault.token >> 32) as u32)
            .with(PageFaultResume::TOKEN_31_0, fault.token as u32);
        self.command(Opcode::PAGE_FAULT_RESUME, 0, &input.0[8..], 16)
            .map(drop)
    }
}
