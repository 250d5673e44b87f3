//! Address map of a chiplet and allocation units (section 1).

/// Chiplets of a function.
pub const CHIPLETS: usize = 2;
/// Bytes of a chiplet's address space.
pub const CHIPLET_SIZE: u64 = 0x800_0000;
/// Contexts (GSEG, CCH) of a chiplet.
pub const CONTEXTS: usize = 16;
/// Control-block resources of a chiplet (CBR, with CBE and TFH each).
pub const CBRS: usize = 128;
/// Data-segment bytes of a chiplet.
pub const DSR_BYTES: usize = 32 * 1024;
/// Fault maps of a chiplet.
pub const TFMS: usize = 16;
/// TLB flush handles of a chiplet.
pub const TGHS: usize = 24;
/// Bytes of a handle, a CB image, a cache line.
pub const HANDLE_BYTES: usize = 64;
/// Distance of handles (and of CBs in a GSEG).
pub const HANDLE_STRIDE: u64 = 256;

/// Distance of the GSEGs, from chiplet offset 0.
pub const GSEG_STRIDE: u64 = 0x40_0000;
/// CB array inside a GSEG.
pub const GSEG_CB: u64 = 0x0;
/// DS array inside a GSEG.
pub const GSEG_DS: u64 = 0x2_0000;
/// Our extension: a page of a GSEG for its user to read (section 1 leaves everything behind the DS array free).
pub const GSEG_STATUS: u64 = 0x2_8000;
/// u32 in it: the same as [`super::pci::STATUS_AWAKE`], except that it tells only 0 from not 0.
pub const GSEG_STATUS_AWAKE: u64 = 0x0;
/// u32 in it: a [`super::doorbell::Mode`].
pub const GSEG_STATUS_MODE: u64 = 0x4;
/// Where the part of a GSEG ends that can be mapped: CB array, DS array and [`GSEG_STATUS`].
pub const GSEG_MAPPABLE: u64 = 0x2_9000;
/// Our extension: the last page of a GSEG's user part. It is trapped in all modes; any write rings, like one to
/// [`super::pci::DOORBELL_OFFSET`]. Reads as zero.
pub const GSEG_BELL: u64 = 0x3_f000;
/// The part of a GSEG that a user maps, in bytes.
pub const GSEG_PAGE: u64 = 0x4_0000;

/// Fault maps.
pub const TFM: u64 = 0x400_0000;
/// TLB flush handles.
pub const TGH: u64 = 0x400_8000;
/// Extended control blocks, by physical CBR.
pub const CBE: u64 = 0x401_0000;
/// TLB fault handles, by physical CBR.
pub const TFH: u64 = 0x401_8000;
/// Context configuration handles.
pub const CCH: u64 = 0x402_0000;
/// One past the last handle region.
pub const MCS_END: u64 = 0x402_1000;

/// CBRs of one bit in `cbr_allocation_map`.
pub const CBR_AU: usize = 2;
/// DSR bytes of one bit in `dsr_allocation_map`.
pub const DSR_AU: usize = 1024;

/// Word offsets inside a TFM (section 3).
pub mod tfm {
    /// `fault_bits[2]`: bit b of word w = physical CBR 64w + b has a miss to serve.
    pub const FAULT_BITS: u64 = 0x00;
    /// `done_bits[2]`: CBR finished an instruction with interrupt requested.
    pub const DONE_BITS: u64 = 0x20;
}

/// Our extension (outside the 64-byte image of a CB): the smallest fill tag that the last instruction
/// used, `u64::MAX` when it used no translation. Stored before istatus leaves ACTIVE.
pub const CB_EXT_TAG: u64 = 0x40;

/// Physical CBR of logical CB `n` (section 1.1), or `None` when the map has too few bits.
#[must_use]
pub fn physical_cbr(cbr_map: u64, n: usize) -> Option<usize> {
    nth_set_bit(cbr_map, n / CBR_AU).map(|bit| bit * CBR_AU + n % CBR_AU)
}

/// Logical CB of physical CBR `p`, or `None` when the map does not hold it.
#[must_use]
pub fn logical_cb(cbr_map: u64, p: usize) -> Option<usize> {
    let bit = p / CBR_AU;
    if bit >= 64 || cbr_map >> bit & 1 == 0 {
        return None;
    }
    let below = cbr_map & ((1u64 << bit) - 1);
    Some(below.count_ones() as usize * CBR_AU + p % CBR_AU)
}

/// Number of control blocks that an allocation map grants.
#[must_use]
pub fn cbs_of(cbr_map: u64) -> usize {
    cbr_map.count_ones() as usize * CBR_AU
}

fn nth_set_bit(mut map: u64, n: usize) -> Option<usize> {
    for _ in 0..n {
        map &= map.wrapping_sub(1);
    }
    (map != 0).then(|| map.trailing_zeros() as usize)
}
