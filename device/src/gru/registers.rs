//! Trapped accesses to BAR2: decode, store into the memory that mapped clients see as well, ring.
//!
//! The same words are executed by the same code in all doorbell modes; what is added here is what only a
//! trap can give: a GSEG exists only while its context is allocated, and a command's status is made ACTIVE
//! *by the store* (the kernel driver ORs 2 into a TFH whose status is 1, section 17.1).

use std::sync::atomic::Ordering;

use protos::gru::{HandleStatus, cb, cch, map, pci, tfh, tgh};

use super::hardware::Hardware;

/// What an 8-byte word of BAR2 belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Region {
    /// Word 0 of a CB.
    CbControl,
    /// Memory without side effects: CB operands, data segment, CBE, handle operands.
    Memory,
    /// A word of a fault map that software takes.
    Tfm,
    /// Word 0 of a TGH.
    TghControl,
    /// Word 0 of a TFH.
    TfhControl,
    /// Word 0 of a CCH.
    CchControl { chiplet: usize, context: usize },
    /// A GSEG's status page: written by the device only.
    GsegStatus,
    /// A GSEG's doorbell page: any write rings.
    GsegBell,
    /// Nothing, or a part of a GSEG that is not allocated: reads all ones, ignores writes.
    Hole,
}

/// Splits an access into words: (word offset, byte range inside the access, mask, shift).
fn words(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, u64, u32)> {
    let mut at = 0usize;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let address = offset + at as u64;
        let first = (address % 8) as usize;
        let count = (8 - first).min(len - at);
        let mask = if count == 8 {
            u64::MAX
        } else {
            ((1u64 << (8 * count)) - 1) << (8 * first)
        };
        let range = at..at + count;
        at += count;
        Some((address - first as u64, range, mask, 8 * first as u32))
    })
}

impl Hardware {
    /// A trapped read; the range is inside the BAR.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (word, range, mask, shift) in words(offset, data.len()) {
            let value = match self.decode(word) {
                Region::Hole => u64::MAX,
                Region::Tfm => self.tfm_read(word, mask),
                Region::GsegBell => 0,
                Region::TghControl | Region::CchControl { .. } => self
                    .trapped
                    .read(word, mask, || self.memory.word(word).load(Ordering::Acquire)),
                _ => self.memory.word(word).load(Ordering::Acquire),
            };
            let bytes = (value >> shift).to_le_bytes();
            let count = range.len();
            data[range].copy_from_slice(&bytes[..count]);
        }
    }

    /// A trapped write; the range is inside the BAR.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        for (word, range, mask, shift) in words(offset, data.len()) {
            let mut bytes = [0u8; 8];
            bytes[..range.len()].copy_from_slice(&data[range]);
            self.store(word, mask, u64::from_le_bytes(bytes) << shift);
        }
    }

    fn store(&self, offset: u64, mask: u64, value: u64) {
        let go = mask & value & 1 != 0;
        match self.decode(offset) {
            Region::Hole | Region::GsegStatus => {}
            Region::GsegBell => self.ring_by_message(),
            Region::Memory => self.memory.merge(offset, mask, value),
            Region::Tfm => self.tfm_write(offset, mask, value),
            Region::CbControl => {
                // A 32-bit start (2008) leaves the half with istatus alone: it is made ACTIVE here.
                let active = cb::Control::new().with_istatus(cb::Status(3)).into_bits();
                let wanted = cb::Control::new().with_istatus(cb::Status::ACTIVE).into_bits();
                self.store_command(offset, mask, value, go.then_some((active, wanted)));
            }
            Region::TfhControl => {
                let status = tfh::Control::new().with_status(HandleStatus(3)).into_bits();
                let wanted = tfh::Control::new().with_status(HandleStatus::ACTIVE).into_bits();
                self.store_command(offset, mask, value, go.then_some((status, wanted)));
            }
            Region::TghControl => {
                if !self.lock_bit_only(
                    offset,
                    mask,
                    value,
                    tgh::Control::new().with_delresp(true).into_bits(),
                ) {
                    let status = tgh::Control::new().with_status(HandleStatus(3)).into_bits();
                    let wanted = tgh::Control::new().with_status(HandleStatus::ACTIVE).into_bits();
                    self.store_control(offset, mask, value, go.then_some((status, wanted)));
                    let chiplet = &self.chiplets[(offset / map::CHIPLET_SIZE) as usize];
                    // What has met a write that is answered by now is for an engine: none may have looked since.
                    if go && (!self.tgh_at_once(chiplet) || self.tgh_waiting(chiplet) || self.tgh_settles()) {
                        self.ring();
                    }
                }
            }
            Region::CchControl { chiplet, context } => {
                if !self.lock_bit_only(
                    offset,
                    mask,
                    value,
                    cch::Control::new().with_delresp(true).into_bits(),
                ) {
                    let status = cch::Control::new().with_status(HandleStatus(3)).into_bits();
                    let wanted = cch::Control::new().with_status(HandleStatus::ACTIVE).into_bits();
                    self.store_command(offset, mask, value, go.then_some((status, wanted)));
                    if go {
                        let control =
                            cch::Control::from_bits(self.memory.word(offset).load(Ordering::Acquire));
                        self.cch_command(&self.chiplets[chiplet], context, control);
                    }
                }
            }
        }
    }

    /// Stores a control word and has an engine look at its command.
    fn store_command(&self, offset: u64, mask: u64, value: u64, active: Option<(u64, u64)>) {
        self.store_control(offset, mask, value, active);
        if active.is_some() {
            self.ring();
        }
    }

    /// Stores a control word. With a command the field `active.0` becomes `active.1`, whatever was stored.
    fn store_control(&self, offset: u64, mask: u64, value: u64, active: Option<(u64, u64)>) {
        let (mask, value) = match active {
            Some((field, wanted)) => (mask | field, value & !field | wanted),
            None => (mask, value),
        };
        self.memory.merge(offset, mask, value);
    }

    /// A doorbell was written by a message: whoever has sent it waits for the answer.
    pub(super) fn ring_by_message(&self) {
        let flushed = self
            .chiplets
            .iter()
            .fold(false, |flushed, chiplet| flushed | self.tgh_at_once(chiplet));
        // A ring stands for any number of starts.
        if !flushed || self.work_waits() {
            self.ring();
        }
    }

    /// A write that changes nothing but the software lock against what the last read returned is the second
    /// half of a locked operation: only that bit is taken, so that what the device did meanwhile stays.
    fn lock_bit_only(&self, offset: u64, mask: u64, value: u64, lock: u64) -> bool {
        self.trapped.change(offset, |seen| {
            if (*seen ^ value) & mask & !lock != 0 || mask & lock == 0 {
                return false;
            }
            if value & lock != 0 {
                self.memory.word(offset).fetch_or(lock, Ordering::AcqRel);
            } else {
                self.memory.word(offset).fetch_and(!lock, Ordering::AcqRel);
            }
            *seen = *seen & !lock | value & lock;
            true
        })
    }

    fn decode(&self, offset: u64) -> Region {
        let number = (offset / map::CHIPLET_SIZE) as usize;
        let within = offset % map::CHIPLET_SIZE;
        if within < map::TFM {
            return self.decode_gseg(
                number,
                (within / map::GSEG_STRIDE) as usize,
                within % map::GSEG_STRIDE,
            );
        }
        let index = |region: u64| ((within - region) / map::HANDLE_STRIDE) as usize;
        let word = within % map::HANDLE_STRIDE;
        let handle = |region, count, control| match (index(region), word) {
            (index, _) if index >= count => Region::Hole,
            (_, 0) => control,
            _ => Region::Memory,
        };
        match within {
            map::CCH.. => {
                let control = Region::CchControl {
                    chiplet: number,
                    context: index(map::CCH),
                };
                handle(map::CCH, map::CONTEXTS, control)
            }
            map::TFH.. => handle(map::TFH, map::CBRS, Region::TfhControl),
            map::CBE.. => handle(map::CBE, map::CBRS, Region::Memory),
            map::TGH.. => handle(map::TGH, map::TGHS, Region::TghControl),
            _ if index(map::TFM) >= map::TFMS => Region::Hole,
            _ => match word & !8 {
                map::tfm::FAULT_BITS | map::tfm::DONE_BITS => Region::Tfm,
                _ => Region::Memory,
            },
        }
    }

    fn decode_gseg(&self, chiplet: usize, number: usize, within: u64) -> Region {
        let chiplet = &self.chiplets[chiplet];
        if chiplet.allocated.load(Ordering::Acquire) >> number & 1 == 0 {
            return Region::Hole;
        }
        let context = &chiplet.contexts[number];
        let cbs = context.cbs() as u64 * map::HANDLE_STRIDE;
        match within {
            within if within < map::GSEG_CB + cbs => {
                if within % map::HANDLE_STRIDE == 0 {
                    Region::CbControl
                } else {
                    Region::Memory
                }
            }
            map::GSEG_BELL..map::GSEG_PAGE => Region::GsegBell,
            map::GSEG_STATUS..map::GSEG_MAPPABLE => Region::GsegStatus,
            map::GSEG_DS..map::GSEG_STATUS if within - map::GSEG_DS < context.ds_bytes() => Region::Memory,
            _ => Region::Hole,
        }
    }
}

/// Whether an access lies inside BAR2.
pub(super) fn inside(offset: u64, len: usize) -> bool {
    offset
        .checked_add(len as u64)
        .is_some_and(|end| end <= pci::BAR_CHIPLETS_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_words_when_access_is_unaligned_splits_at_words() {
        let split: Vec<_> = words(6, 11).collect();
        assert_eq!(split[0], (0, 0..2, 0xffff_0000_0000_0000, 48));
        assert_eq!(split[1], (8, 2..10, u64::MAX, 0));
        assert_eq!(split[2], (16, 10..11, 0xff, 0));
        assert_eq!(words(0, 0).count(), 0);
    }

    #[test]
    fn test_inside_when_access_wraps_is_refused() {
        assert!(inside(pci::BAR_CHIPLETS_SIZE - 8, 8));
        assert!(!inside(pci::BAR_CHIPLETS_SIZE - 8, 9));
        assert!(!inside(u64::MAX, 1));
    }
}
