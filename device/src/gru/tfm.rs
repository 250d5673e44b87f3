//! TLB fault maps (reference section 3): bits that the device sets and software takes.
//!
//! Mapped software takes a word with an atomic exchange, and the device sets bits with an atomic OR: nothing is
//! lost. A trapped exchange is a read and a later write; the write clears only what the last read returned,
//! so a bit that was set in between stays. There is no mask: each set bit raises the vector again.

use std::sync::atomic::Ordering;

use protos::gru::map;

use super::chiplet::Chiplet;
use super::hardware::Hardware;
use crate::faults::Injection;

/// Vector of a chiplet's fault map.
pub(super) fn vector(chiplet: usize, tfm: usize) -> u32 {
    (chiplet * map::TFMS + tfm) as u32
}

impl Hardware {
    /// A fault-map miss of `cbr`; the TFH is already valid.
    pub(super) fn tfm_fault(&self, chiplet: &Chiplet, tfm: usize, cbr: usize, interrupt: bool) {
        self.watch_fault_bit(chiplet, tfm, cbr);
        self.tfm_set(chiplet, tfm, map::tfm::FAULT_BITS, cbr);
        if interrupt {
            self.tfm_raise(chiplet, tfm, cbr);
        }
    }

    fn tfm_raise(&self, chiplet: &Chiplet, tfm: usize, cbr: usize) {
        let lost = self.injector.strikes(Injection::LostInterrupt).is_some();
        let raised = (!lost).then(|| self.interrupts.trigger(vector(chiplet.index, tfm)));
        self.watch_vector(chiplet, tfm, cbr, raised);
    }

    /// `cbr` has finished an instruction that asked for an interrupt (section 13). As for misses, the bit and the
    /// vector have an enable each.
    pub(super) fn tfm_done(&self, chiplet: &Chiplet, tfm: usize, cbr: usize, interrupt: bool) {
        self.tfm_set(chiplet, tfm, map::tfm::DONE_BITS, cbr);
        if interrupt {
            self.tfm_raise(chiplet, tfm, cbr);
        }
    }

    pub(super) fn tfm_set(&self, chiplet: &Chiplet, tfm: usize, bits: u64, cbr: usize) {
        let at = chiplet.tfm(tfm) + bits + cbr as u64 / 64 * 8;
        self.memory.word(at).fetch_or(1 << (cbr % 64), Ordering::Release);
    }

    /// A trapped read: what it returns may be cleared by the next write.
    pub(super) fn tfm_read(&self, offset: u64, mask: u64) -> u64 {
        let load = || self.memory.word(offset).load(Ordering::Acquire);
        self.trapped.read(offset, mask, load)
    }

    /// A trapped write.
    pub(super) fn tfm_write(&self, offset: u64, mask: u64, value: u64) {
        self.trapped.change(offset, |seen| {
            let clear = *seen & !value & mask;
            self.memory.word(offset).fetch_and(!clear, Ordering::AcqRel);
            *seen &= !clear;
        });
    }
}
