//! Every instruction, with its data.

use super::*;
use protos::gru::cb::{ExplicitOp, ImplicitOp, Opc, XType};
use protos::gru::cbe::ecause;

/// Pages are scattered: neighbours in the address space are not neighbours in memory.
fn scatter(rig: &Rig, va: u64, pages: u64) {
    for page in 0..pages {
        rig.map_page(ASID, va + page * PAGE, (pages - 1 - page) * 2 * PAGE + PAGE, true);
    }
}

fn read_va(rig: &Rig, va: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| {
            let at = va + i;
            let offset = rig.pages.lock().unwrap()[&(ASID, at / PAGE)].offset;
            rig.bytes(offset + at % PAGE, 1)[0]
        })
        .collect()
}

fn write_va(rig: &Rig, va: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let at = va + i as u64;
        let offset = rig.pages.lock().unwrap()[&(ASID, at / PAGE)].offset;
        rig.memory.write_all_at(&[*byte], offset + at % PAGE).unwrap();
    }
}

fn noise(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
        .collect()
}

const VA: u64 = 0x7f00_0000_0000;

#[test]
fn test_vload_when_range_crosses_pages_fills_the_data_segment() {
    in_all_modes(|doorbell| {
        for mode in [Mode::FaultMap, Mode::UserPolling] {
            let rig = Rig::new(config(doorbell));
            rig.start(mode);
            scatter(&rig, VA, 3);
            for (xtype, start) in [
                (XType::BYTE, VA + 13),
                (XType::SHORT, VA + 5),
                (XType::WORD, VA + 4090),
                (XType::DWORD, VA + 8),
                (XType::CACHE_LINE, VA + 64),
            ] {
                let len = 6144;
                let bytes = noise(len, xtype.0 + 1);
                write_va(&rig, start, &bytes);
                let nelem = len as u64 / xtype.bytes().unwrap();
                rig.run_ok(0, Instruction::vload(start, 1024, xtype, nelem, 1));
                assert_eq!(rig.ds_read(1024, len), bytes, "{xtype:?} {mode:?}");
                rig.purge(0, ASID, 0, 0);
            }
        }
    });
}

#[test]
fn test_vstore_when_range_crosses_pages_stores_exactly_the_range() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        scatter(&rig, VA, 3);
        write_va(&rig, VA, &noise(3 * PAGE as usize, 9));
        let bytes = noise(8000, 77);
        rig.ds_write(0, &bytes);
        rig.run_ok(1, Instruction::vstore(VA + 3, 0, XType::BYTE, 8000, 1));
        assert_eq!(read_va(&rig, VA + 3, 8000), bytes);
        assert_eq!(read_va(&rig, VA, 3), noise(3, 9));
        assert_eq!(
            read_va(&rig, VA + 8003, 64),
            noise(3 * PAGE as usize, 9)[8003..8067]
        );
    });
}

#[test]
fn test_strided_when_elements_are_apart_moves_single_elements() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    scatter(&rig, VA, 4);
    let all = noise(4 * PAGE as usize, 3);
    write_va(&rig, VA, &all);
    // 100 words, 37 words apart: 14.6 KB, unaligned to the pages.
    rig.run_ok(0, Instruction::vload(VA + 2, 0, XType::WORD, 100, 37));
    let expected: Vec<u8> = (0..100).flat_map(|i| all[2 + i * 148..][..4].to_vec()).collect();
    assert_eq!(rig.ds_read(0, 400), expected);
    rig.ds_write(0, &noise(400, 200));
    rig.run_ok(0, Instruction::vstore(VA + 2, 0, XType::WORD, 100, 37));
    let mut wanted = all.clone();
    for i in 0..100 {
        wanted[2 + i * 148..][..4].copy_from_slice(&noise(400, 200)[4 * i..4 * i + 4]);
    }
    assert_eq!(read_va(&rig, VA, wanted.len()), wanted);
    // Stride 0: the last element stays.
    rig.run_ok(0, Instruction::vstore(VA, 0, XType::DWORD, 3, 0));
    assert_eq!(read_va(&rig, VA, 8), noise(400, 200)[16..24]);
}

#[test]
fn test_indexed_when_offsets_are_bytes_gathers_scatters_and_sets() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        scatter(&rig, VA, 4);
        let all = noise(4 * PAGE as usize, 50);
        write_va(&rig, VA, &all);
        let offsets: Vec<u64> = (0..64).map(|i| (i * 5003) % (4 * PAGE - 8)).collect();
        let vector: Vec<u8> = offsets.iter().flat_map(|o| o.to_le_bytes()).collect();
        rig.ds_write(4096, &vector);
        rig.run_ok(2, Instruction::ivload(VA, 0, 4096, XType::DWORD, 64));
        let expected: Vec<u8> = offsets
            .iter()
            .flat_map(|&o| all[o as usize..][..8].to_vec())
            .collect();
        assert_eq!(rig.ds_read(0, 512), expected);
        let data = noise(512, 120);
        rig.ds_write(0, &data);
        rig.run_ok(2, Instruction::ivstore(VA, 0, 4096, XType::DWORD, 64));
        let mut wanted = all.clone();
        for (i, &o) in offsets.iter().enumerate() {
            wanted[o as usize..][..8].copy_from_slice(&data[8 * i..8 * i + 8]);
        }
        assert_eq!(read_va(&rig, VA, wanted.len()), wanted);
        let mut set = Instruction::ivload(VA, 0, 4096, XType::SHORT, 64);
        set.control = set.control.with_opc(Opc::IVSET);
        set.baddr1_value_op2 = 0xbeef;
        rig.run_ok(2, set);
        for &o in &offsets {
            wanted[o as usize..][..2].copy_from_slice(&[0xef, 0xbe]);
        }
        assert_eq!(read_va(&rig, VA, wanted.len()), wanted);
    });
}

#[test]
fn test_indexed_when_unit_is_elements_scales() {
    let rig = Rig::new(GruConfig {
        index_unit: super::super::IndexUnit::Elements,
        ..config(Doorbell::Trap)
    });
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    let all = rig.fill_memory(0, PAGE as usize, 5);
    rig.ds_write(0, &[7u64.to_le_bytes(), 3u64.to_le_bytes()].concat());
    rig.run_ok(0, Instruction::ivload(VA, 64, 0, XType::WORD, 2));
    assert_eq!(rig.ds_read(64, 8), [&all[28..32], &all[12..16]].concat());
}

#[test]
fn test_vset_when_strided_or_not_sets_exactly_the_elements() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::UserPolling);
    scatter(&rig, VA, 40);
    // More than one step: 150 KB.
    rig.run_ok(
        0,
        Instruction::vset(VA + 8, 0x1122_3344_5566_7788, XType::DWORD, 19200, 1),
    );
    let bytes = read_va(&rig, VA, 153_700);
    assert_eq!(bytes[..8], [0; 8]);
    assert!(
        bytes[8..153_608]
            .chunks(8)
            .all(|c| c == 0x1122_3344_5566_7788u64.to_le_bytes())
    );
    assert_eq!(bytes[153_608..], [0; 92]);
    rig.run_ok(0, Instruction::vset(VA, 0xabcd, XType::BYTE, 100, 3));
    let bytes = read_va(&rig, VA, 300);
    assert!((0..100).all(|i| bytes[3 * i] == 0xcd));
    assert!((3..100).all(|i| bytes[3 * i + 1] != 0xcd));
    rig.run_ok(
        0,
        Instruction::vset(VA, 0x0101_0101_0101_0101, XType::CACHE_LINE, 2, 1),
    );
    assert_eq!(read_va(&rig, VA, 128), [1; 128]);
}

#[test]
fn test_bcopy_when_both_sides_miss_often_copies_everything() {
    in_all_modes(|doorbell| {
        for mode in [Mode::FaultMap, Mode::UserPolling] {
            let rig = Rig::new(config(doorbell));
            rig.start(mode);
            let len = 200_000u64;
            rig.map_range(ASID, VA, 0, len);
            let to = VA + 0x100_0000;
            rig.map_range(ASID, to, 1 << 20, len + PAGE);
            let source = rig.fill_memory(0, len as usize, 42);
            rig.run_ok(0, Instruction::bcopy(VA, to + 24, 0, 16, XType::DWORD, len / 8));
            assert!(rig.bytes((1 << 20) + 24, len as usize) == source);
            assert_eq!(rig.bytes(1 << 20, 24), [0; 24]);
            let misses = len.div_ceil(PAGE) + (len + 24).div_ceil(PAGE);
            assert_eq!(
                rig.served.load(Ordering::Relaxed),
                misses,
                "one miss for each page"
            );
            let cbe = |offset| rig.cbe_word(Rig::cbr(0b1010, 0), offset);
            assert_eq!(cbe(cbe::IDEF1UPD), VA + len);
            assert_eq!(cbe(cbe::IDEF3UPD), to + 24 + len);
            assert_eq!((cbe(cbe::IDEF5UPD), cbe(cbe::IDEF5CPY)), (0, len / 8));
        }
    });
}

#[test]
fn test_bcopy_when_it_misses_shows_what_a_preloading_driver_needs() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, 4 * PAGE);
    rig.map_range(ASID, VA + 0x10_0000, 8 * PAGE, 4 * PAGE);
    let cbr = Rig::cbr(0b1010, 0);
    rig.issue(
        0,
        Instruction::bcopy(VA, VA + 0x10_0000, 0, 2, XType::CACHE_LINE, 4 * PAGE / 64),
    );
    let mut seen = Vec::new();
    rig.until("the copy", || {
        for cbr in rig.take_faults(0) {
            let (_, va, write) = rig.miss(cbr);
            let exact = if write { cbe::IDEF3UPD } else { cbe::IDEF1UPD };
            assert_eq!(rig.cbe_word(cbr, exact), va);
            seen.push((
                rig.cbe_word(cbr, cbe::IDEF6CPY),
                rig.cbe_word(cbr, cbe::IDEF5UPD),
                write,
            ));
            rig.serve_cbr(cbr);
        }
        rig.ended(0)
    });
    assert_eq!(rig.cbe_status(0b1010, 0).cbrstate(), cbe::State::IDLE);
    let lines = PAGE / 64;
    assert_eq!(
        seen[..3],
        [
            (4 * lines, 4 * lines, false),
            (4 * lines, 4 * lines, true),
            (3 * lines, 3 * lines, false)
        ]
    );
    assert_eq!(cbr, 2);
}

#[test]
fn test_atomics_when_64_bit_return_the_old_value_and_store_the_new() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, PAGE);
        let old = 0xffff_0000_1234_00ffu64;
        let implicit = [
            (ImplicitOp::FETCH, old),
            (ImplicitOp::CLEAR, 0),
            (ImplicitOp::INC, old.wrapping_add(1)),
            (ImplicitOp::DEC, old - 1),
        ];
        for (op, new) in implicit {
            rig.set_word(16, old);
            rig.run_ok(0, Instruction::gamir(VA + 16, op, XType::DWORD));
            assert_eq!((rig.avalue(0), rig.word(16)), (old, new), "{op:?}");
        }
        let x = 0x0f0f_0f0f_0f0f_0f0fu64;
        let explicit = [
            (ExplicitOp::SWAP, x, 0, x),
            (ExplicitOp::OR, x, 0, old | x),
            (ExplicitOp::AND, x, 0, old & x),
            (ExplicitOp::XOR, x, 0, old ^ x),
            (ExplicitOp::ADD, x, 0, old.wrapping_add(x)),
            (ExplicitOp::CSWAP, x, old, x),
            (ExplicitOp::CSWAP, x, old + 1, old),
        ];
        for (op, op1, op2, new) in explicit {
            rig.set_word(16, old);
            rig.run_ok(1, Instruction::gamer(VA + 16, op, op1, op2, XType::DWORD));
            assert_eq!((rig.avalue(1), rig.word(16)), (old, new), "{op:?}");
        }
    });
}

#[test]
fn test_atomics_when_32_bit_leave_the_neighbour_alone() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    rig.set_word(16, 0xffff_ffff_0000_0007);
    rig.run_ok(0, Instruction::gamir(VA + 20, ImplicitOp::INC, XType::WORD));
    assert_eq!((rig.avalue(0), rig.word(16)), (0xffff_ffff, 7));
    rig.run_ok(
        0,
        Instruction::gamer(VA + 16, ExplicitOp::ADD, 0x5_0000_0001, 0, XType::WORD),
    );
    assert_eq!((rig.avalue(0), rig.word(16)), (7, 8));
}

#[test]
fn test_atomics_when_several_cbs_and_the_client_add_lose_nothing() {
    let rig = Rig::new(config(Doorbell::Poll));
    rig.start(Mode::FaultMap);
    rig.map_range(ASID, VA, 0, PAGE);
    let each = 500;
    std::thread::scope(|scope| {
        for cb in 0..3 {
            let rig = &rig;
            scope.spawn(move || {
                for _ in 0..each {
                    rig.issue(cb, Instruction::gamir(VA, ImplicitOp::INC, XType::DWORD));
                    rig.until("an atomic", || rig.ended(cb));
                    assert_eq!(rig.istatus(cb), Status::IDLE);
                }
            });
        }
        rig.until("all atomics", || {
            rig.serve();
            (rig.word(0) == 3 * each).then_some(())
        });
    });
    // Misses were served and purges repeated nothing: exactly once each.
    assert_eq!(rig.word(0), 3 * each);
}

#[test]
fn test_nop_when_issued_completes_with_the_tag_of_no_translation() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.run_ok(3, Instruction::nop());
        assert_eq!(rig.load(Rig::cb_at(3) + map::CB_EXT_TAG), u64::MAX);
        assert_eq!(rig.gru.stats().instructions, 1);
    });
}

#[test]
fn test_tag_when_several_translations_are_used_is_the_smallest() {
    let rig = Rig::new(config(Doorbell::Trap));
    rig.start(Mode::FaultMap);
    for (page, tag) in [(0u64, 9), (1, 4), (2, 7)] {
        let pte = Pte {
            offset: page * PAGE,
            writable: true,
            shift: 12,
            tag,
        };
        rig.pages.lock().unwrap().insert((ASID, VA / PAGE + page), pte);
    }
    rig.run_ok(0, Instruction::vload(VA, 0, XType::DWORD, 1024, 1));
    assert_eq!(rig.load(map::CB_EXT_TAG), 4);
    rig.run_ok(0, Instruction::vload(VA + 2 * PAGE, 0, XType::DWORD, 8, 1));
    assert_eq!(rig.load(map::CB_EXT_TAG), 7);
}

#[test]
fn test_exceptions_when_instruction_is_wrong_name_the_cause() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, 4 * PAGE);
        let vload = Instruction::vload(VA, 0, XType::DWORD, 8, 1);
        let with = |change: &dyn Fn(&mut Instruction)| {
            let mut instruction = vload;
            change(&mut instruction);
            instruction
        };
        let bytes = 8192;
        let cases = [
            (
                with(&|i| i.control = i.control.with_opc(Opc(0x10))),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                with(&|i| i.control = i.control.with_opc(Opc(0x77))),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                with(&|i| i.control = i.control.with_xtype(XType(4))),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                Instruction::gamir(VA + 4, ImplicitOp::INC, XType::DWORD),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                Instruction::gamir(VA, ImplicitOp(0x33), XType::DWORD),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                Instruction::gamer(VA, ExplicitOp::ADD, 1, 0, XType::SHORT),
                ecause::INVALID_INSTRUCTION,
            ),
            (
                with(&|i| i.control = i.control.with_ima(cb::ima::UNMAPPED)),
                ecause::UNMAPPED_MODE_FORBIDDEN,
            ),
            (
                with(&|i| i.control = i.control.with_iaa0(1)),
                ecause::IAA_GAA_MISMATCH,
            ),
            (
                with(&|i| i.nelem = bytes / 8 + 1),
                ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
            ),
            (with(&|i| i.nelem = u64::MAX), ecause::DATA_SEGMENT_LIMIT_EXCEEDED),
            (
                with(&|i| i.control = i.control.with_tri0(8192)),
                ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
            ),
            (
                Instruction::ivload(VA, 0, 8192 - 8, XType::BYTE, 2),
                ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
            ),
            (
                Instruction::bcopy(VA, VA, 8192, 1, XType::BYTE, 1),
                ecause::DATA_SEGMENT_LIMIT_EXCEEDED,
            ),
            (with(&|i| i.baddr0 = 0xdead_0000), ecause::OS_FATAL_TLB_FAULT),
        ];
        for (number, (instruction, cause)) in cases.into_iter().enumerate() {
            assert_eq!(rig.run(1, instruction), Status::EXCEPTION, "case {number}");
            let status = rig.cbe_status(0b1010, 1);
            assert_eq!(status.ecause(), cause, "case {number}");
            assert_eq!(status.cbrexecstatus(), cbe::execstatus::EXCEPTION);
        }
        // The CB is usable again.
        rig.run_ok(1, vload);
    });
}

#[test]
fn test_instruction_when_its_memory_was_truncated_after_the_fill_ends_in_an_exception() {
    in_all_modes(|doorbell| {
        let rig = Rig::new(config(doorbell));
        rig.start(Mode::FaultMap);
        rig.map_range(ASID, VA, 0, 4 * PAGE);
        let vload = Instruction::vload(VA, 0, XType::DWORD, 8, 1);
        let fetch = Instruction::gamir(VA, ImplicitOp::INC, XType::DWORD);
        rig.run_ok(1, vload);
        rig.run_ok(1, fetch);
        rig.memory.set_len(0).unwrap();
        for instruction in [vload, fetch, vload] {
            assert_eq!(rig.run(1, instruction), Status::EXCEPTION);
            assert_eq!(rig.cbe_status(0b1010, 1).ecause(), ecause::PE_CHECK_DATA_ERROR);
        }
        // The device lives.
        rig.run_ok(1, Instruction::nop());
    });
}
