//! What the hardware's documentation leaves open: each option does what it says.

use super::*;
use crate::gru::{GruError, PurgeMatch, Regions};
use protos::gru::cb::XType;
use protos::gru::cbe::ecause;

const VA: u64 = 0x4000_0000;
const CBR: usize = 2;

fn vload(va: u64) -> Instruction {
    Instruction::vload(va, 0, XType::DWORD, 1, 1)
}

/// A context with a 4 KiB entry at `VA` and a 2 MiB entry behind it.
fn two_sizes(purge_match: PurgeMatch) -> Arc<Rig> {
    let rig = Rig::new(GruConfig {
        purge_match,
        ..config(Doorbell::Trap)
    });
    rig.start(Mode::FaultMap);
    rig.map_page(ASID, VA, 0, true);
    let huge = Pte {
        offset: 2 << 20,
        writable: true,
        shift: 21,
        tag: 0,
    };
    rig.pages
        .lock()
        .unwrap()
        .insert((ASID, (VA + (2 << 20)) / PAGE), huge);
    rig.run_ok(0, vload(VA));
    rig.run_ok(0, vload(VA + (2 << 20)));
    rig
}

fn purge_of_size(rig: &Rig, va: u64, shift: u8, n: u16) {
    let at = map::TGH;
    let code = page_size::code_of_shift(shift).unwrap();
    rig.store(at + tgh::VADDR, va);
    let scope = tgh::Scope::new().with_asid(ASID).with_pagesize(code);
    rig.store(at + tgh::SCOPE, scope.into_bits());
    let count = tgh::Count::new().with_vaddrmask(tgh::VADDRMASK_ALL).with_n(n);
    rig.store(at + tgh::COUNT, count.into_bits());
    let go = tgh::Control::new().with_cmd(true).with_opc(tgh::Opc::TLBINV);
    rig.store(at, go.with_status(HandleStatus::ACTIVE).into_bits());
    rig.until("a TLBINV", || {
        let control = tgh::Control::from_bits(rig.load(at));
        (control.status() == HandleStatus::IDLE).then_some(())
    });
}

fn entries(rig: &Rig) -> Vec<u64> {
    let mut spans: Vec<u64> = rig
        .gru
        .atc(0)
        .unwrap()
        .dump(16)
        .iter()
        .map(|entry| entry.size.bytes())
        .collect();
    spans.sort_unstable();
    spans
}

#[test]
fn test_tlbinv_when_match_is_exact_leaves_other_sizes_alone() {
    let (small, huge) = (PAGE, 2 << 20);
    // As the kernel driver flushes: 4 KiB steps over everything.
    let exact = two_sizes(PurgeMatch::Exact);
    purge_of_size(&exact, VA, 12, 1022);
    assert_eq!(entries(&exact), [huge]);
    purge_of_size(&exact, VA + huge, 21, 0);
    assert_eq!(entries(&exact), [0u64; 0]);
    let overlap = two_sizes(PurgeMatch::Overlap);
    purge_of_size(&overlap, VA, 12, 1022);
    assert_eq!(entries(&overlap), [0u64; 0]);
    // n = 1023: everything of the ASID, of that size.
    let exact = two_sizes(PurgeMatch::Exact);
    purge_of_size(&exact, 0, 21, 1023);
    assert_eq!(entries(&exact), [small]);
    // Flush all, and memory that goes away, know no sizes.
    let exact = two_sizes(PurgeMatch::Exact);
    exact.purge(0, 0, 0, 0);
    assert_eq!(entries(&exact), [0u64; 0]);
    let exact = two_sizes(PurgeMatch::Exact);
    exact.dma.unmap(IOVA, MEMORY).unwrap();
    assert_eq!(entries(&exact), [0u64; 0]);
}

#[test]
fn test_region_when_it_has_two_bits_uses_four_asids() {
    for (regions, region) in [(Regions::Three, 5), (Regions::Two, 1)] {
        let rig = Rig::new(GruConfig {
            regions,
            ..config(Doorbell::Trap)
        });
        rig.start(Mode::FaultMap);
        rig.map_page(ASID + region, 5 << 61 | VA, 0, true);
        rig.set_word(0, 9);
        rig.run_ok(0, vload(5 << 61 | VA));
        assert_eq!(rig.ds_read(0, 8), 9u64.to_le_bytes());
        // sizeavail is by region, too: only that of the region in use lacks the code of 4 KiB.
        rig.cch_do(0, cch::Opc::INTERRUPT).unwrap();
        let four = |first: u32| {
            let lanes = (0..4).filter(|lane| first + lane != region);
            lanes.fold(0u64, |word, lane| word | 0xffff << (16 * lane))
        };
        rig.trap_store(Rig::cch_at(0) + cch::SIZEAVAIL, four(0));
        rig.trap_store(Rig::cch_at(0) + cch::SIZEAVAIL + 8, four(4));
        rig.cch_do(0, cch::Opc::START).unwrap();
        rig.purge(0, 0, 0, 0);
        assert_eq!(rig.run(0, vload(5 << 61 | VA)), Status::EXCEPTION);
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), ecause::TLBHW_ERROR);
    }
}

#[test]
fn test_exception_when_its_ecause_bit_is_configured_shows_that_one() {
    for bit in [6u8, 8, 15] {
        let rig = Rig::new(GruConfig {
            fatal_fault_ecause: bit,
            ..config(Doorbell::Trap)
        });
        rig.start(Mode::FaultMap);
        assert_eq!(rig.run(0, vload(VA)), Status::EXCEPTION);
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), 1 << bit);
    }
}

#[test]
fn test_tlb_when_it_is_small_evicts_and_misses_again() {
    let rig = Rig::new(GruConfig {
        tlb_sets: 1,
        tlb_ways: 2,
        ..config(Doorbell::Trap)
    });
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 3 * PAGE);
    for page in [0, 1, 2, 0, 1, 2] {
        rig.run_ok(0, vload(VA + page * PAGE));
    }
    let stats = rig.gru.stats();
    assert!(stats.misses > 3 && stats.tlb[0].evictions > 0, "{stats:?}");
    assert_eq!(stats.tlb[0].live_entries, 2);
}

#[test]
fn test_config_when_it_makes_no_device_is_refused_with_the_way_out() {
    let build = |config: GruConfig| {
        let context = ModelContext {
            dma: Space::new(),
            interrupts: Interrupts::new(pci::VECTORS),
        };
        Gru::new(context, config).map(|_| ()).unwrap_err()
    };
    let base = config(Doorbell::Trap);
    let wrong = [
        GruConfig { tlb_sets: 0, ..base },
        GruConfig {
            tlb_sets: 1000,
            ..base
        },
        GruConfig {
            tlb_ways: 256,
            ..base
        },
    ];
    for config in wrong {
        assert!(matches!(build(config), GruError::Tlb { .. }));
    }
    let ecause = GruConfig {
        fatal_fault_ecause: 20,
        ..base
    };
    assert!(matches!(build(ecause), GruError::EcauseBit(20)));
}

#[test]
fn test_fill_when_its_class_is_not_ram_names_who_disagrees() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    let mut mmio = vload(VA);
    mmio.control = mmio.control.with_iaa0(1);
    for (instruction, gaa, cause) in [
        (vload(VA), 1, ecause::IAA_GAA_MISMATCH),
        (mmio, 0, ecause::IAA_GAA_MISMATCH),
        (mmio, 2, ecause::IAA_GAA_MISMATCH),
        (mmio, 1, ecause::ADDRESS_SPACE_DECODE_ERROR),
    ] {
        rig.purge(0, 0, 0, 0);
        rig.issue(0, instruction);
        rig.wait_fault(0, CBR);
        let pte = Pte {
            offset: 0,
            writable: true,
            shift: 12,
            tag: 0,
        };
        rig.fill_operands(CBR, ASID, VA, pte);
        let at = Rig::tfh_at(CBR) + tfh::ASIDS;
        let asids = tfh::Asids::from_bits(rig.load(at)).with_gaa(gaa);
        rig.store(at, asids.into_bits());
        rig.tfh_command(CBR, tfh::Opc::WRITE_RESTART);
        assert_eq!(rig.finish(0), Status::EXCEPTION);
        assert_eq!(rig.cbe_status(0b1010, 0).ecause(), cause, "gaa {gaa}");
    }
}
