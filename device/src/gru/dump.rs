//! Statistics and state for reports.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use protos::gru::cch;

use super::cch::physical_cbrs;
use super::chiplet::bits;
use super::hardware::Hardware;
use crate::atc::AtcStats;
use crate::faults::FaultStats;

/// TLB entries of a chiplet that a dump lists.
const DUMPED_ENTRIES: usize = 64;

/// Counters since the device was made.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct GruStats {
    /// Instructions completed without an exception.
    pub instructions: u64,
    /// Instructions that ended in an exception.
    pub exceptions: u64,
    /// Messages that ended with a substatus.
    pub messages_refused: u64,
    /// Misses reported to software.
    pub misses: u64,
    /// Of these, those that were reported in a fault map. The others showed CALL_OS to their user.
    pub misses_in_fault_map: u64,
    /// Misses that ended without an answer: with their context's DEALLOCATE, or a reset.
    pub misses_withdrawn: u64,
    /// Fills that entered a translation.
    pub fills: u64,
    /// Fills that the kill bit refused.
    pub fills_killed: u64,
    /// TLBINV commands executed.
    pub tgh_purges: u64,
    /// Engines that wait for a ring now.
    pub engines_asleep: u32,
    /// Times that an engine went to sleep.
    pub parks: u64,
    /// Times that a store had to wake an engine.
    pub rings: u64,
    /// Completed resets.
    pub resets: u32,
    /// The TLBs, by chiplet.
    pub tlb: Vec<AtcStats>,
    /// The fault plan.
    pub faults: FaultStats,
}

pub(super) fn stats(hardware: &Hardware) -> GruStats {
    let counters = &hardware.counters;
    let mut faults = FaultStats::default();
    hardware.held_fills.count_into(&mut faults);
    if let Some(parking) = &hardware.parking {
        parking.count_into(&mut faults);
    }
    faults.injected = hardware.injector.count();
    GruStats {
        instructions: counters.instructions.get(),
        exceptions: counters.exceptions.get(),
        messages_refused: counters.messages_refused.get(),
        misses: counters.misses.get(),
        misses_in_fault_map: counters.misses_in_fault_map.get(),
        misses_withdrawn: counters.misses_withdrawn.get(),
        fills: counters.fills.get(),
        fills_killed: counters.fills_killed.get(),
        tgh_purges: counters.tgh_purges.get(),
        engines_asleep: hardware.wake.asleep(),
        parks: hardware.wake.parks.load(Ordering::Relaxed),
        rings: hardware.wake.rings.load(Ordering::Relaxed),
        resets: hardware.wake.resets(),
        tlb: hardware
            .chiplets
            .iter()
            .map(|chiplet| chiplet.atc.stats())
            .collect(),
        faults,
    }
}

pub(super) fn dump(hardware: &Hardware) -> Value {
    let chiplets: Vec<Value> = hardware
        .chiplets
        .iter()
        .map(|chiplet| dump_chiplet(hardware, chiplet))
        .collect();
    json!({ "model": "gru", "stats": stats(hardware), "chiplets": chiplets })
}

fn dump_chiplet(hardware: &Hardware, chiplet: &super::chiplet::Chiplet) -> Value {
    let contexts: Vec<Value> = bits(u64::from(chiplet.allocated.load(Ordering::Acquire)))
        .map(|number| {
            let context = &chiplet.contexts[number];
            let word = hardware.memory.word(chiplet.cch(number)).load(Ordering::Acquire);
            let control = cch::Control::from_bits(word);
            json!({
                "context": number,
                "state": format!("{:?}", control.state()),
                "status": control.status().0,
                "cause": format!("{:?}", control.cause()),
                "fault_map": context.control().tfm_fault_bit_enable(),
                "tlb_int_select": context.control().tlb_int_select(),
                "cbs": context.cbs(),
                "ds_bytes": context.ds_bytes(),
                "asid": context.asid[0].load(Ordering::Relaxed),
                "unserved_fault_map_misses": context.fault_map_misses.load(Ordering::Relaxed),
                "cbrs": physical_cbrs(context)
                    .map(|cbr| {
                        json!({
                            "cbr": cbr,
                            "phase": format!("{:?}", chiplet.cbrs[cbr].phase()),
                            "cbrstate": format!("{:?}", hardware.cbrstate(chiplet, cbr)),
                        })
                    })
                    .collect::<Vec<_>>(),
            })
        })
        .collect();
    let misses: Vec<Value> = (0..chiplet.cbrs.len())
        .filter(|&cbr| chiplet.cbrs[cbr].phase().is_miss())
        .map(|cbr| {
            let word = |offset| {
                hardware
                    .memory
                    .word(chiplet.tfh(cbr) + offset)
                    .load(Ordering::Acquire)
            };
            json!({
                "cbr": cbr,
                "phase": format!("{:?}", chiplet.cbrs[cbr].phase()),
                "va": word(protos::gru::tfh::MISSVADDR),
                "asid": protos::gru::tfh::Asids::from_bits(word(protos::gru::tfh::ASIDS)).missasid(),
                "killed": chiplet.atc.miss_killed(cbr),
                "fill_held": chiplet.cbrs[cbr].held.load(Ordering::Relaxed),
            })
        })
        .collect();
    json!({
        "chiplet": chiplet.index,
        "contexts": contexts,
        "misses": misses,
        "tlb_entries": chiplet.atc.dump(DUMPED_ENTRIES),
    })
}
