//! Every implemented instruction with data that is compared byte by byte; every operand in pages that the
//! TLB has not seen, so each instruction also faults where its operands cross pages.

use driver::gru::FaultMode;
use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, Status, XType};
use protos::gru::map::DSR_AU;

use super::memory::FRAME;
use super::rig::{Rig, User, pattern, patterned, wants};

const SRC: u64 = 0x7f10_0000_0000;
const DST: u64 = 0x7f20_0000_0000;
const DS: usize = 16 * DSR_AU;

/// Element types and their sizes.
const TYPES: [(XType, u64); 5] = [
    (XType::BYTE, 1),
    (XType::SHORT, 2),
    (XType::WORD, 4),
    (XType::DWORD, 8),
    (XType::CACHE_LINE, 64),
];

/// All instructions in one fault mode.
///
/// # Panics
/// When data differ.
pub fn every_instruction(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(4, DS, fault_mode));
    table.populate(SRC, 32 * FRAME, true, |va| pattern(1, va));
    table.populate(DST, 32 * FRAME, true, |_| 0);
    user.ok(0, &Instruction::nop());
    assert_eq!(user.gseg.tag(0).unwrap(), u64::MAX, "NOP used a translation");

    vload_vstore(&user, &table);
    // Forget everything between the groups: each of them has to fault by itself.
    mm.flush_all();
    indexed(&user, &table);
    mm.flush_all();
    vset(&user, &table);
    mm.flush_all();
    bcopy(&user, &table);
    mm.flush_all();
    atomics(&user, &table);
    mm.flush_all();
    registered(&user, &table);
    mm.flush_all();
    blocks(&user, &table);
    mm.flush_all();
    exchange(&user, &table);
    mm.flush_all();
    polls(&user, &table);

    let stats = rig.gru.stats();
    assert!(stats.fills > 50, "the operands were not faulted in: {stats:?}");
    assert_eq!(stats.faults_bad, 0, "{stats:?}");
}

fn vload_vstore(user: &User, table: &super::page_table::PageTable) {
    for (xtype, size) in TYPES {
        for stride in [1u64, 3] {
            // Across page borders: 96 elements from just below one.
            let nelem = 96;
            let src = SRC + FRAME - 7 * size;
            let dst = DST + 3 * FRAME - 5 * size;
            user.put(0, &vec![0; DS]);
            user.ok(0, &Instruction::vload(src, 128, xtype, nelem, stride));
            let loaded = user.get(128, (nelem * size) as usize);
            let mut expected = Vec::new();
            for i in 0..nelem {
                expected.extend(patterned(1, src + i * stride * size, size as usize));
            }
            assert_eq!(loaded, expected, "VLOAD {xtype:?} stride {stride}");
            assert!(
                user.get(0, 128).iter().all(|b| *b == 0),
                "VLOAD wrote before tri0"
            );

            user.ok(1, &Instruction::vstore(dst, 128, xtype, nelem, stride));
            for i in 0..nelem {
                let at = dst + i * stride * size;
                assert_eq!(
                    table.read(at, size as usize),
                    &expected[(i * size) as usize..][..size as usize],
                    "VSTORE {xtype:?} stride {stride} element {i}"
                );
                if stride > 1 {
                    let gap = table.read(at + size, size as usize);
                    assert!(gap.iter().all(|b| *b == 0), "VSTORE wrote between elements");
                }
            }
            let clean = vec![0; (nelem * stride * size) as usize];
            table.write(dst, &clean);
        }
    }
}

fn indexed(user: &User, table: &super::page_table::PageTable) {
    // Byte offsets over many pages, in no order, one of them across a page border.
    let offsets: Vec<u64> = (0..64u64)
        .map(|i| (i * 7919) % (30 * FRAME))
        .chain([5 * FRAME - 4])
        .collect();
    let indexes: Vec<u8> = offsets.iter().flat_map(|o| o.to_le_bytes()).collect();
    let (tri0, tri1) = (0u32, 8192u32);
    user.put(tri1 as usize, &indexes);
    let n = offsets.len() as u64;
    user.ok(2, &Instruction::ivload(SRC, tri0, tri1, XType::DWORD, n));
    for (i, offset) in offsets.iter().enumerate() {
        assert_eq!(
            user.get(8 * i, 8),
            patterned(1, SRC + offset, 8),
            "IVLOAD element {i}"
        );
    }
    // Distinct targets for the scatter: 8 bytes each, 24 apart.
    let targets: Vec<u64> = (0..n).map(|i| ((i * 37) % n) * 24 + 4090).collect();
    let indexes: Vec<u8> = targets.iter().flat_map(|o| o.to_le_bytes()).collect();
    user.put(tri1 as usize, &indexes);
    user.ok(3, &Instruction::ivstore(DST, tri0, tri1, XType::DWORD, n));
    for (i, target) in targets.iter().enumerate() {
        assert_eq!(
            table.read(DST + target, 8),
            patterned(1, SRC + offsets[i], 8),
            "IVSTORE element {i}"
        );
    }
    user.ok(0, &Instruction::ivset(DST, tri1, 0xbeef, XType::SHORT, n));
    for (i, target) in targets.iter().enumerate() {
        let rest = &patterned(1, SRC + offsets[i], 8)[2..];
        let expected = [&[0xef, 0xbe], rest].concat();
        assert_eq!(table.read(DST + target, 8), expected, "IVSET element {i}");
    }
}

fn vset(user: &User, table: &super::page_table::PageTable) {
    let base = DST + 10 * FRAME;
    for (xtype, size) in TYPES.into_iter().filter(|(_, size)| *size <= 8) {
        let (n, at) = (700u64, base - 3 * size);
        let value = 0x1122_3344_5566_7788u64;
        table.write(at, &vec![0; (2 * n * size) as usize]);
        user.ok(0, &Instruction::vset(at, value, xtype, n, 2));
        for i in 0..n {
            let element = table.read(at + 2 * i * size, size as usize);
            assert_eq!(
                element,
                &value.to_le_bytes()[..size as usize],
                "VSET {xtype:?} element {i}"
            );
        }
        let gap = table.read(at + size, size as usize);
        assert!(
            gap.iter().all(|b| *b == 0),
            "VSET {xtype:?} wrote between elements"
        );
    }
}

fn bcopy(user: &User, table: &super::page_table::PageTable) {
    let cases = [
        (XType::BYTE, 1u64, 1u64, 0u64, 0u64),
        (XType::BYTE, 1, 10_007, 4093, 17),
        (XType::SHORT, 2, 3001, 4094, 4090),
        (XType::WORD, 4, 2048, 0, 8),
        (XType::DWORD, 8, 8192, 8, 4000),
        (XType::CACHE_LINE, 64, 1024, 64, 192),
    ];
    for (xtype, size, nelem, from, to) in cases {
        let (src, dst, len) = (SRC + from, DST + to, (nelem * size) as usize);
        table.write(DST, &vec![0; 24 * FRAME as usize]);
        user.ok(1, &Instruction::bcopy(src, dst, 0, 4, xtype, nelem));
        assert_eq!(
            table.read(dst, len),
            patterned(1, src, len),
            "BCOPY {xtype:?} {nelem}"
        );
        assert_eq!(
            table.read(dst + len as u64, 64),
            [0; 64],
            "BCOPY {xtype:?} wrote too much"
        );
        assert!(
            user.gseg.tag(1).unwrap() >= 1,
            "BCOPY reports the tag of its fills"
        );
    }
}

fn registered(user: &User, table: &super::page_table::PageTable) {
    let at = DST + 21 * FRAME;
    for (before, after) in [(2u64, 1u64), (1, 0), (0, 0)] {
        table.write(at, &before.to_le_bytes());
        let old = user.atomic(0, &Instruction::gamirr(at, ImplicitOp::DECZ, XType::DWORD));
        assert_eq!((old, table.read64(at)), (before, after), "DECZ");
    }
    table.write(at, &7u64.to_le_bytes());
    let swap = Instruction::gamerr(at, ExplicitOp::CSWAP, 9, 7, XType::DWORD);
    assert_eq!((user.atomic(1, &swap), table.read64(at)), (7, 9));
    let fetch = Instruction::gamirr(at, ImplicitOp::FETCH, XType::DWORD);
    assert_eq!(user.atomic(1, &fetch), 9);
}

fn blocks(user: &User, table: &super::page_table::PageTable) {
    let (to, len) = (DST + 23 * FRAME - 100, 5000);
    let data = patterned(9, 0, len);
    user.put(512, &data);
    table.write(to, &vec![0; len + 64]);
    user.ok(2, &Instruction::bstore(0, to, 512, XType::DWORD, len as u64 / 8));
    assert_eq!(table.read(to, len), data, "BSTORE");
    assert_eq!(table.read(to + len as u64, 64), [0; 64], "BSTORE wrote too much");
    user.ok(2, &Instruction::vflush(to, XType::CACHE_LINE, 200, 2));
    assert_eq!(table.read(to, len), data, "VFLUSH");
}

fn exchange(user: &User, table: &super::page_table::PageTable) {
    let at = DST + 26 * FRAME + 64;
    let bytes = |words: [u64; 4]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let (old, new) = ([1, 2, 3, 4], [0x51, 0x52, 0x53, 0x54]);
    let mask = [u64::MAX, 0, 0xf0, u64::MAX];
    table.write(at, &bytes(old));
    user.put(0, &[bytes(new), bytes(old), bytes(mask)].concat());
    assert_eq!(user.atomic(3, &Instruction::gamxr(at, 0, 4)), 1);
    assert_eq!(table.read(at, 32), bytes([0x51, 2, 0x53, 0x54]), "GAMXR");
    assert_eq!(user.get(96, 32), bytes(old), "GAMXR returns what was there");
    assert_eq!(user.atomic(3, &Instruction::gamxr(at, 0, 4)), 0x51);
    assert_eq!(
        table.read(at, 32),
        bytes([0x51, 2, 0x53, 0x54]),
        "GAMXR without a match"
    );
}

fn polls(user: &User, table: &super::page_table::PageTable) {
    let at = DST + 28 * FRAME;
    table.write(at, &0u64.to_le_bytes());
    let wait_for = |value| Instruction::gamerr(at, ExplicitOp::EPOLL, value, 0, XType::DWORD);
    user.gseg.issue(0, &wait_for(2)).unwrap();
    let changed = Instruction::gamerr(at, ExplicitOp::NPOLL, 0, 0, XType::DWORD);
    user.gseg.issue(1, &changed).unwrap();
    // The GRU itself changes what two of its control blocks wait for.
    let inc = Instruction::gamir(at, ImplicitOp::INC, XType::DWORD);
    assert_eq!(user.atomic(2, &inc), 0);
    assert_eq!(user.wait(1), Status::IDLE);
    // It waits: for the memory, or for its miss to be reported.
    let status = user.gseg.poll(0).unwrap();
    assert!(matches!(status, Status::ACTIVE | Status::CALL_OS), "{status:?}");
    assert_eq!(user.atomic(2, &inc), 1);
    assert_eq!(user.wait(0), Status::IDLE);
    assert_eq!(user.gseg.avalue(0).unwrap(), 2);
}

fn atomics(user: &User, table: &super::page_table::PageTable) {
    let at = DST + 20 * FRAME + 8;
    let set = |value: u64| table.write(at, &value.to_le_bytes());
    let now = || table.read64(at);
    let implicit = [
        (ImplicitOp::FETCH, 41u64, 41u64),
        (ImplicitOp::CLEAR, 41, 0),
        (ImplicitOp::INC, u64::MAX, 0),
        (ImplicitOp::DEC, 0, u64::MAX),
    ];
    for (op, before, after) in implicit {
        set(before);
        assert_eq!(
            user.atomic(0, &Instruction::gamir(at, op, XType::DWORD)),
            before,
            "{op:?}"
        );
        assert_eq!(now(), after, "{op:?}");
    }
    let (a, b) = (0xff00_ff00_1234_5678u64, 0x0ff0_0ff0_0000_ffffu64);
    let explicit = [
        (ExplicitOp::SWAP, b, 0, b),
        (ExplicitOp::OR, b, 0, a | b),
        (ExplicitOp::AND, b, 0, a & b),
        (ExplicitOp::XOR, b, 0, a ^ b),
        (ExplicitOp::ADD, b, 0, a.wrapping_add(b)),
        (ExplicitOp::CSWAP, b, a, b),
        (ExplicitOp::CSWAP, b, a + 1, a),
    ];
    for (op, op1, op2, after) in explicit {
        set(a);
        let old = user.atomic(1, &Instruction::gamer(at, op, op1, op2, XType::DWORD));
        assert_eq!((old, now()), (a, after), "{op:?}");
    }
    // Four bytes: the neighbour stays.
    set(a);
    let old = user.atomic(
        0,
        &Instruction::gamer(at, ExplicitOp::ADD, 0xffff_ffff, 0, XType::WORD),
    );
    assert_eq!((old, now()), (0x1234_5678, (a & !0xffff_ffff) | 0x1234_5677));
    // An atomic happens once, whatever faults come in its way: two blocks count the same word.
    set(0);
    let inc = Instruction::gamir(at, ImplicitOp::INC, XType::DWORD);
    for _ in 0..200 {
        for cb in 0..4 {
            user.gseg.issue(cb, &inc).unwrap();
        }
        for cb in 0..4 {
            assert_eq!(user.wait(cb), Status::IDLE);
        }
    }
    assert_eq!(now(), 800);
}
