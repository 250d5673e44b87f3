//! The driver's memory by IOVA, as queues and mailboxes need it: through the ATC where it is mapped, by message
//! where it is not.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use zerocopy::{FromBytes, IntoBytes};

use crate::atc::{Access, Engine, Fill, FillRefused, Guard, PageSize, SpaceId};
use crate::dma::{self, DmaError};

/// IOVAs themselves: an address space of the ATC. (The others are mkeys, whose numbers start at 1.)
pub(super) const IOVA: SpaceId = SpaceId(0);

/// Entries of queues are written at once up to here; the word that hands them over follows.
const HANDOVER: usize = 4;

/// One thread's way to memory. Each has a slot and a ticket of the ATC of its own.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) engine: Engine,
    pub(super) ticket: usize,
    pub(super) dma: Arc<dma::Space>,
}

impl Port {
    /// Copy out.
    pub(super) fn read(&mut self, iova: u64, to: &mut [u8]) -> Result<(), DmaError> {
        let len = to.len();
        let mut done = 0;
        while done < len {
            let at = advance(iova, done)?;
            match self.step(at, len - done, Access::Read, |guard| {
                let piece = &mut to[done..done + guard.len()];
                guard.read_into(piece);
            }) {
                Ok(step) => done += step,
                Err(DmaError::ByMessage { .. }) => return self.dma.read_by_message(at, &mut to[done..]),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Copy in.
    pub(super) fn write(&mut self, iova: u64, from: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < from.len() {
            let at = advance(iova, done)?;
            match self.step(at, from.len() - done, Access::Write, |guard| {
                guard.write_from(&from[done..done + guard.len()]);
            }) {
                Ok(step) => done += step,
                Err(DmaError::ByMessage { .. }) => return self.dma.write_by_message(at, &from[done..]),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A structure.
    pub(super) fn read_value<T: FromBytes + IntoBytes>(&mut self, iova: u64) -> Result<T, DmaError> {
        let mut value = T::new_zeroed();
        self.read(iova, value.as_mut_bytes())?;
        Ok(value)
    }

    /// A big-endian word, in one access.
    pub(super) fn read_be32(&mut self, iova: u64) -> Result<u32, DmaError> {
        let mut bytes = [0; 4];
        self.read(iova, &mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// An entry of a queue: everything but its last word, then that, which hands it over.
    pub(super) fn hand_over(&mut self, iova: u64, entry: &[u8]) -> Result<(), DmaError> {
        let (payload, last) = entry.split_at(entry.len() - HANDOVER);
        self.write(iova, payload)?;
        // The driver looks at the owner bit first and at the rest afterwards.
        fence(Ordering::Release);
        self.write(advance(iova, payload.len())?, last)
    }

    /// One guard's worth.
    fn step(
        &mut self,
        at: u64,
        len: usize,
        access: Access,
        mut copy: impl FnMut(&Guard<'_>),
    ) -> Result<usize, DmaError> {
        loop {
            if let Ok(guard) = self.engine.access(IOVA, at, len as u64, access) {
                copy(&guard);
                guard.check().map_err(|_| DmaError::Lost {
                    iova: at,
                    len: len as u64,
                })?;
                return Ok(guard.len());
            }
            self.fill(at, access)?;
        }
    }

    /// Enters the translation that is its own target: as large as one guard, or a page where that does not fit.
    fn fill(&mut self, at: u64, access: Access) -> Result<(), DmaError> {
        let atc = Arc::clone(self.engine.atc());
        let mut last = None;
        for size in [CHUNK, PageSize::SIZE_4K] {
            // A driver may map read-only what the device only reads.
            for writable in [true, false] {
                if !writable && access == Access::Write {
                    continue;
                }
                atc.open_miss(self.ticket, IOVA, at);
                let fill = Fill {
                    space: IOVA,
                    va: at,
                    size,
                    iova: size.base(at),
                    writable,
                    tag: 0,
                };
                let result = atc.fill(self.ticket, fill);
                atc.close_miss(self.ticket);
                match result {
                    Ok(()) => return Ok(()),
                    // Memory is being taken away: the next look says whether it was this.
                    Err(FillRefused::Killed | FillRefused::Purging | FillRefused::NoTicket) => {
                        std::thread::yield_now();
                        return Ok(());
                    }
                    Err(FillRefused::Target(error)) => last = Some(error),
                }
            }
        }
        Err(last.expect("some size was tried"))
    }
}

/// What a guard covers at most.
const CHUNK: PageSize = match PageSize::new(16) {
    Some(size) => size,
    None => panic!("64 KiB is a page size"),
};

fn advance(iova: u64, by: usize) -> Result<u64, DmaError> {
    iova.checked_add(by as u64).ok_or(DmaError::Wraps {
        start: iova,
        len: by as u64,
    })
}
