//! Resources of a chiplet: context slots, control blocks, data segment, ASIDs.

use std::sync::{Arc, Mutex};

use protos::gru::map::{CBR_AU, CBRS, CONTEXTS, DSR_AU, DSR_BYTES};
use protos::gru::{cch, map};

use super::FaultMode;
use super::GruOptions;
use super::asid::Asids;
use super::core::{CbrSet, TghClaims, lock};
use super::mm::Space;

/// One chiplet as the driver sees it. Lock order: `resources`, then a slot's `commands`, then its `loaded`.
/// None of them is taken on the flush path.
#[derive(Debug)]
pub(crate) struct Chiplet {
    pub(crate) resources: Mutex<Resources>,
    pub(crate) slots: [Slot; CONTEXTS],
    pub(crate) claims: TghClaims,
    pub(crate) deferred: CbrSet,
}

/// One context number.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// Held over a sequence of CCH commands.
    pub(crate) commands: Mutex<()>,
    /// What is loaded. Held while a miss of the context is looked up and answered, so that an answer never
    /// goes to another miss than the one that was looked at.
    pub(crate) loaded: Mutex<Option<Loaded>>,
}

/// A loaded context.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) space: Arc<Space>,
    pub(crate) cbr_map: u64,
    /// DW0 of the CCH without command, status and state.
    pub(crate) control: cch::Control,
    /// Its misses are answered with an exception: INTERRUPT_SYNC waits for them.
    pub(crate) closing: bool,
    /// START was given: INTERRUPT_SYNC is legal.
    pub(crate) started: bool,
}

/// What is taken and what is free.
#[derive(Debug)]
pub(crate) struct Resources {
    cbrs: u64,
    dsrs: u32,
    pub(crate) holders: [Option<Arc<Space>>; CONTEXTS],
    pub(crate) asids: Asids,
}

/// What a context was granted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grant {
    pub(crate) chiplet: usize,
    pub(crate) context: usize,
    pub(crate) cbr_map: u64,
    pub(crate) dsr_map: u32,
}

impl Grant {
    pub(crate) fn cbs(&self) -> usize {
        map::cbs_of(self.cbr_map)
    }
    pub(crate) fn ds_bytes(&self) -> usize {
        self.dsr_map.count_ones() as usize * DSR_AU
    }
}

impl Chiplet {
    pub(crate) fn new(options: &GruOptions) -> Self {
        Self {
            resources: Mutex::new(Resources {
                cbrs: 0,
                dsrs: 0,
                holders: Default::default(),
                asids: Asids::new(options.asid_first, options.asid_end),
            }),
            slots: Default::default(),
            claims: TghClaims::default(),
            deferred: CbrSet::default(),
        }
    }

    /// For error messages.
    pub(crate) fn in_use(&self, number: usize) -> String {
        let r = lock(&self.resources);
        format!(
            "chiplet {number} uses {} of {CONTEXTS} contexts, {} of {CBRS} control blocks, {} of {DSR_BYTES} bytes",
            r.contexts(),
            map::cbs_of(r.cbrs),
            r.dsrs.count_ones() as usize * DSR_AU,
        )
    }
}

impl Resources {
    pub(crate) fn contexts(&self) -> usize {
        self.holders.iter().flatten().count()
    }

    /// Takes a context number and the lowest free units, or nothing.
    pub(crate) fn take(
        &mut self,
        chiplet: usize,
        cbs: usize,
        ds_bytes: usize,
        space: &Arc<Space>,
    ) -> Option<Grant> {
        let context = self.holders.iter().position(Option::is_none)?;
        let cbr_map = lowest_zeros(self.cbrs, 64, cbs.div_ceil(CBR_AU))?;
        let dsr_map = lowest_zeros(u64::from(self.dsrs), 32, ds_bytes.div_ceil(DSR_AU))?;
        let dsr_map = u32::try_from(dsr_map).expect("32 units");
        self.cbrs |= cbr_map;
        self.dsrs |= dsr_map;
        self.holders[context] = Some(Arc::clone(space));
        Some(Grant {
            chiplet,
            context,
            cbr_map,
            dsr_map,
        })
    }

    pub(crate) fn put(&mut self, grant: &Grant) {
        assert!(
            self.cbrs & grant.cbr_map == grant.cbr_map && self.dsrs & grant.dsr_map == grant.dsr_map,
            "units given back twice"
        );
        self.cbrs &= !grant.cbr_map;
        self.dsrs &= !grant.dsr_map;
        self.holders[grant.context] = None;
    }
}

/// The `n` lowest clear bits of `used` below `bits`.
fn lowest_zeros(used: u64, bits: u32, n: usize) -> Option<u64> {
    let mut found = 0u64;
    for _ in 0..n {
        let bit = (used | found).trailing_ones();
        if bit >= bits {
            return None;
        }
        found |= 1 << bit;
    }
    Some(found)
}

/// DW0 of a context's CCH, before a command is put in.
pub(crate) fn control_of(grant: &Grant, mode: FaultMode, fault_map: u8) -> cch::Control {
    let interrupt = mode == FaultMode::Interrupt;
    cch::Control::new()
        .with_tlb_int_enable(interrupt)
        .with_tfm_fault_bit_enable(interrupt)
        .with_tlb_int_select(fault_map)
        .with_dsr_allocation_map(grant.dsr_map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_units_when_holes_exist_are_taken_from_the_bottom() {
        assert_eq!(lowest_zeros(0b1011, 64, 2), Some(0b1_0100));
        assert_eq!(lowest_zeros(u64::MAX, 64, 1), None);
        assert_eq!(lowest_zeros(0, 32, 33), None);
        assert_eq!(lowest_zeros(0, 64, 64), Some(u64::MAX));
        assert_eq!(lowest_zeros(5, 64, 0), Some(0));
    }
}
