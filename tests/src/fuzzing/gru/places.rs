//! Where things are in the BARs and in the address spaces.

use protos::gru::{map, pci};
use protos::vfio_user::RegionIndex;

use super::{
    ASIDS, CBRS, CONTEXTS, ContextNumber, HUGE, HUGE_PAGES, HUGE_VA, PAGE, PageNumber, Place, SMALL_PAGES,
    SMALL_VA,
};

pub(super) fn address(page: PageNumber) -> (u32, u64, u8) {
    let asid = ASIDS[usize::from(page.space) % ASIDS.len()];
    match u64::from(page.page) % (SMALL_PAGES + HUGE_PAGES) {
        small if small < SMALL_PAGES => (asid, SMALL_VA + small * PAGE, 12),
        huge => (asid, HUGE_VA + (huge - SMALL_PAGES) * HUGE, 21),
    }
}

pub(super) fn place_of(context: ContextNumber) -> (usize, usize) {
    let number = usize::from(context.0);
    // Mostly chiplet 0.
    (usize::from(number >= 192), number % CONTEXTS)
}

pub(super) fn cb_at(chiplet: usize, context: usize, cb: u64) -> u64 {
    chiplet as u64 * map::CHIPLET_SIZE + context as u64 * map::GSEG_STRIDE + cb * map::HANDLE_STRIDE
}

pub(super) fn ds_at(chiplet: usize, context: usize) -> u64 {
    chiplet as u64 * map::CHIPLET_SIZE + context as u64 * map::GSEG_STRIDE + map::GSEG_DS
}

pub(super) fn cch_at(chiplet: usize, context: usize) -> u64 {
    chiplet as u64 * map::CHIPLET_SIZE + map::CCH + context as u64 * map::HANDLE_STRIDE
}

pub(super) fn tfh_at(chiplet: usize, cbr: usize) -> u64 {
    chiplet as u64 * map::CHIPLET_SIZE + map::TFH + cbr as u64 * map::HANDLE_STRIDE
}

pub(super) fn offset_of(place: Place) -> (RegionIndex, u64) {
    let handle =
        |base: u64, number: u64, word: u8| base + number * map::HANDLE_STRIDE + 8 * u64::from(word % 8);
    let operand = |word: u8| 1 + word % 7;
    let offset = match place {
        Place::Cb(context, cb, word) => {
            let (chiplet, number) = place_of(context);
            cb_at(chiplet, number, u64::from(cb) % 16) + u64::from(word % 128)
        }
        Place::Segment(context, at) => {
            let (chiplet, number) = place_of(context);
            ds_at(chiplet, number) + u64::from(at)
        }
        Place::Cbe(cbr, word) => handle(map::CBE, u64::from(cbr) % CBRS as u64, word),
        Place::TfhOperand(cbr, word) => handle(map::TFH, u64::from(cbr) % CBRS as u64, operand(word)),
        Place::TghOperand(number, word) => {
            handle(map::TGH, u64::from(number) % map::TGHS as u64, operand(word))
        }
        Place::Tfm(number, word) => handle(map::TFM, u64::from(number) % map::TFMS as u64, word),
        Place::Cch(context, word) => {
            let (chiplet, number) = place_of(context);
            cch_at(chiplet, number) + 8 * u64::from(word % 8)
        }
        Place::Hole(at) => map::MCS_END - 64 + u64::from(at) % (map::CHIPLET_SIZE - map::MCS_END),
        Place::Doorbell(at) => return (RegionIndex(pci::BAR_DOORBELL as u32), u64::from(at)),
    };
    (RegionIndex(pci::BAR_CHIPLETS as u32), offset)
}
