use super::{HandleStatus, cb, cbe, cch, map, page_size, tfh, tgh};
use proptest::prelude::*;

#[test]
fn test_fields_when_set_one_at_a_time_match_the_reference() {
    // Section 4, 5, 6, 7, 8: bit positions that were measured against the driver's structures.
    let tghs = [
        (tgh::Control::new().with_cmd(true).into_bits(), 1),
        (tgh::Control::new().with_delresp(true).into_bits(), 1 << 1),
        (tgh::Control::new().with_opc(tgh::Opc::TLBINV).into_bits(), 1 << 2),
        (
            tgh::Control::new().with_status(HandleStatus::ACTIVE).into_bits(),
            2 << 16,
        ),
        (tgh::Control::new().with_state(tgh::State(7)).into_bits(), 7 << 20),
        (tgh::Control::new().with_cause(7).into_bits(), 7 << 24),
        (tgh::Scope::new().with_asid(0xff_ffff).into_bits(), 0xff_ffff),
        (tgh::Scope::new().with_pagesize(31).into_bits(), 31 << 32),
        (tgh::Scope::new().with_global(true).into_bits(), 1 << 48),
        (
            tgh::Count::new().with_vaddrmask(tgh::VADDRMASK_ALL).into_bits(),
            (1 << 39) - 1,
        ),
        (tgh::Count::new().with_n(tgh::N_ALL).into_bits(), 1023 << 48),
    ];
    let cchs = [
        (cch::Control::new().with_opc(cch::Opc(7)).into_bits(), 7 << 2),
        (cch::Control::new().with_unmap_enable(true).into_bits(), 1 << 5),
        (
            cch::Control::new().with_req_slice_set_enable(true).into_bits(),
            1 << 6,
        ),
        (cch::Control::new().with_req_slice(3).into_bits(), 3 << 7),
        (cch::Control::new().with_cb_int_enable(true).into_bits(), 1 << 9),
        (cch::Control::new().with_tlb_int_enable(true).into_bits(), 1 << 10),
        (
            cch::Control::new().with_tfm_fault_bit_enable(true).into_bits(),
            1 << 11,
        ),
        (cch::Control::new().with_tlb_int_select(15).into_bits(), 15 << 12),
        (
            cch::Control::new().with_status(HandleStatus(3)).into_bits(),
            3 << 16,
        ),
        (cch::Control::new().with_state(cch::State(3)).into_bits(), 3 << 18),
        (
            cch::Control::new().with_cause(cch::Cause(15)).into_bits(),
            15 << 24,
        ),
        (
            cch::Control::new().with_tfm_done_bit_enable(true).into_bits(),
            1 << 28,
        ),
        (
            cch::Control::new().with_dsr_allocation_map(u32::MAX).into_bits(),
            0xffff_ffff << 32,
        ),
    ];
    let tfhs = [
        (tfh::Control::new().with_opc(tfh::Opc(7)).into_bits(), 7 << 4),
        (
            tfh::Control::new().with_status(HandleStatus(3)).into_bits(),
            3 << 16,
        ),
        (tfh::Control::new().with_state(tfh::State(7)).into_bits(), 7 << 20),
        (
            tfh::Control::new().with_cause(tfh::Cause(63)).into_bits(),
            63 << 24,
        ),
        (tfh::Control::new().with_cb_int(true).into_bits(), 1 << 30),
        (tfh::Control::new().with_indexway(0xfff).into_bits(), 0xfff << 32),
        (tfh::Control::new().with_ctxnum(15).into_bits(), 15 << 48),
        (tfh::Asids::new().with_missasid(0xff_ffff).into_bits(), 0xff_ffff),
        (
            tfh::Asids::new().with_fillasid(0xff_ffff).into_bits(),
            0xff_ffff << 32,
        ),
        (tfh::Asids::new().with_dirty(true).into_bits(), 1 << 56),
        (tfh::Asids::new().with_gaa(3).into_bits(), 3 << 57),
        (
            tfh::Target::new().with_pfn((1 << 41) - 1).into_bits(),
            (1 << 41) - 1,
        ),
        (tfh::Target::new().with_pagesize(31).into_bits(), 31 << 48),
    ];
    let cbs = [
        (cb::Control::new().with_icmd(true).into_bits(), 1),
        (cb::Control::new().with_ima(7).into_bits(), 7 << 1),
        (cb::Control::new().with_xtype(cb::XType(7)).into_bits(), 7 << 8),
        (cb::Control::new().with_iaa0(3).into_bits(), 3 << 11),
        (cb::Control::new().with_iaa1(3).into_bits(), 3 << 13),
        (cb::Control::new().with_opc(cb::Opc(0xff)).into_bits(), 0xff << 16),
        (cb::Control::new().with_exopc(0xff).into_bits(), 0xff << 24),
        (
            cb::Control::new().with_tri0((1 << 22) - 1).into_bits(),
            ((1 << 22) - 1) << 32,
        ),
        (
            cb::Control::new().with_istatus(cb::Status(3)).into_bits(),
            3 << 56,
        ),
        (cb::Control::new().with_isubstatus(15).into_bits(), 15 << 58),
        (cb::Control::new().with_tlb_fault_color(true).into_bits(), 1 << 63),
    ];
    let cbes = [
        (cbe::Copied::new().with_ima(7).into_bits(), 7 << 1),
        (cbe::Copied::new().with_xtype(cb::XType(7)).into_bits(), 7 << 8),
        (cbe::Copied::new().with_opc(cb::Opc(0xff)).into_bits(), 0xff << 16),
        (
            cbe::Copied::new().with_tri0((1 << 22) - 1).into_bits(),
            ((1 << 22) - 1) << 32,
        ),
        (
            cbe::Idef4::new().with_updated((1 << 22) - 1).into_bits(),
            ((1 << 22) - 1) << 32,
        ),
        (
            cbe::Status::new().with_ecause(0xf_ffff).into_bits(),
            0xf_ffff << 32,
        ),
        (
            cbe::Status::new().with_cbrstate(cbe::State(15)).into_bits(),
            15 << 52,
        ),
        (
            cbe::Status::new().with_cbrexecstatus(0xff).into_bits(),
            0xff << 56,
        ),
    ];
    for (got, want) in tghs.into_iter().chain(cchs).chain(tfhs).chain(cbs).chain(cbes) {
        assert_eq!(got, want, "{got:#x} != {want:#x}");
    }
    // The driver's start store (section 2) is cmd + ACTIVE.
    assert_eq!(
        tgh::Control::new()
            .with_cmd(true)
            .with_status(HandleStatus::ACTIVE)
            .into_bits(),
        0x2_0001
    );
}

#[test]
fn test_page_size_when_code_is_of_the_reference_round_trips() {
    let shifts = [12, 14, 16, 18, 20, 21, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40];
    for (code, shift) in shifts.into_iter().enumerate() {
        assert_eq!(page_size::shift_of_code(code as u8), Some(shift));
        assert_eq!(page_size::code_of_shift(shift), Some(code as u8), "shift {shift}");
    }
    for shift in [0, 11, 13, 19, 23, 41] {
        assert_eq!(page_size::code_of_shift(shift), None, "shift {shift}");
    }
    assert_eq!(page_size::shift_of_code(16), None);
}

#[test]
fn test_physical_cbr_when_map_is_sparse_follows_the_bits() {
    let map = 0b1010_0001;
    assert_eq!(
        (0..7).map(|n| map::physical_cbr(map, n)).collect::<Vec<_>>(),
        [Some(0), Some(1), Some(10), Some(11), Some(14), Some(15), None]
    );
    for n in 0..map::cbs_of(map) {
        assert_eq!(map::logical_cb(map, map::physical_cbr(map, n).unwrap()), Some(n));
    }
    assert_eq!(map::logical_cb(map, 2), None);
    assert_eq!(map::cbs_of(map), 6);
}

proptest! {
    #[test]
    fn test_words_when_any_bits_round_trip(bits: u64) {
        prop_assert_eq!(cb::Control::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(cbe::Status::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(cch::Control::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(tfh::Control::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(tfh::Asids::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(tfh::Target::from_bits(bits).into_bits(), bits);
        prop_assert_eq!(tgh::Control::from_bits(bits).into_bits(), bits);
        let _ = format!("{:?}", cb::Control::from_bits(bits));
    }
}
