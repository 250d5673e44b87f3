//! What the sanitizer looks at beside the TLB: handles, fault maps, control blocks.
//!
//! Each check compares what is about to be shown to software with what the model's own state says, at the place where it
//! is shown. Nothing here changes anything.

use std::sync::atomic::Ordering;

use protos::gru::tfh::{self, Asids};
use protos::gru::tgh::{self, Scope};
use protos::gru::{HandleStatus, cch};

use super::chiplet::{Chiplet, Phase};
use super::hardware::Hardware;
use crate::atc::{Defect, Initiator, PurgeMark, SpaceId};
use crate::pci::Trigger;

impl Hardware {
    /// A START has loaded a context's registers: which ASIDs it uses stands in its CCH.
    pub(super) fn watch_start(&self, chiplet: &Chiplet, number: usize) {
        if !chiplet.atc.is_sanitized() {
            return;
        }
        let spaces: Vec<SpaceId> = (0..cch::REGIONS)
            .map(|region| SpaceId(self.asid_in_cch(chiplet, number, region).into()))
            .collect();
        chiplet.atc.holds(number, &spaces);
    }

    /// A TGH is about to be answered with `status`.
    pub(super) fn watch_tgh(
        &self,
        chiplet: &Chiplet,
        handle: usize,
        purge: Option<PurgeMark>,
        status: HandleStatus,
    ) {
        let Some(purge) = purge.filter(|_| chiplet.atc.is_sanitized()) else {
            return;
        };
        let who = || format!("is complete: TGH {handle} is about to leave ACTIVE");
        chiplet.atc.answered(purge, who);
        if status != HandleStatus::IDLE {
            let word = |offset| {
                let word = self.memory.word(chiplet.tgh(handle) + offset);
                word.load(Ordering::Relaxed)
            };
            let space = SpaceId(Scope::from_bits(word(tgh::SCOPE)).asid().into());
            let at = (space, word(tgh::VADDR));
            let detail = || format!("TGH {handle}: TLBINV was executed");
            chiplet
                .atc
                .told(Defect::WrongStatus, at, Initiator::default(), detail);
        }
    }

    /// A TFH command has become `status`, and is answered with `written`.
    pub(super) fn watch_tfh(
        &self,
        chiplet: &Chiplet,
        cbr: usize,
        status: HandleStatus,
        written: HandleStatus,
    ) {
        if status == HandleStatus::IDLE && written != status {
            let detail = || format!("TFH {cbr}: the command was executed");
            self.tell(chiplet, Defect::WrongStatus, cbr, detail);
        }
    }

    /// A fault bit is about to be set.
    pub(super) fn watch_fault_bit(&self, chiplet: &Chiplet, tfm: usize, cbr: usize) {
        let phase = chiplet.cbrs[cbr].phase();
        if phase != Phase::MissFmm {
            let detail = || format!("TFM {tfm}, bit {cbr}: the control block is {phase:?}");
            self.tell(chiplet, Defect::SpuriousFault, cbr, detail);
        }
    }

    /// A bit of a fault map whose interrupt is enabled has been set, and the vector was raised or not.
    pub(super) fn watch_vector(&self, chiplet: &Chiplet, tfm: usize, cbr: usize, raised: Option<Trigger>) {
        if raised.is_none() {
            let detail = || format!("TFM {tfm}, bit {cbr}");
            self.tell(chiplet, Defect::LostInterrupt, cbr, detail);
        }
    }

    /// An engine that looks for work has not taken a control block that is ready.
    pub(super) fn watch_passed_by(&self, chiplet: &Chiplet, cbr: usize) {
        if !chiplet.atc.is_sanitized() {
            return;
        }
        // Another engine may just have run it, and found that it has to poll.
        let Some(_held) = chiplet.cbrs[cbr].try_lock() else {
            return;
        };
        if chiplet.cbrs[cbr].phase() == Phase::Ready && self.rests(chiplet, cbr) {
            let detail = || "its miss has been answered".to_owned();
            self.tell(chiplet, Defect::LateRestart, cbr, detail);
        }
    }

    /// Of a control block; address and ASID are those of its last miss.
    fn tell(&self, chiplet: &Chiplet, class: Defect, cbr: usize, detail: impl FnOnce() -> String) {
        if !chiplet.atc.is_sanitized() {
            return;
        }
        let word = |offset| {
            let word = self.memory.word(chiplet.tfh(cbr) + offset);
            word.load(Ordering::Relaxed)
        };
        let space = SpaceId(Asids::from_bits(word(tfh::ASIDS)).missasid().into());
        let by = Initiator {
            context: self
                .owner(chiplet, cbr)
                .and_then(|(context, _)| context.try_into().ok()),
            queue: cbr.try_into().ok(),
        };
        chiplet.atc.told(class, (space, word(tfh::MISSVADDR)), by, detail);
    }
}
