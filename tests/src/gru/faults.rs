//! Misses: answered badly, put off, prepared ahead, in large pages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use driver::gru::FaultMode;
use protos::gru::cb::{Instruction, Opc, Status, XType};
use protos::gru::cbe::ecause;

use super::memory::FRAME;
use super::page_table::{PageTable, Pte};
use super::rig::{PATIENCE, Rig, User, pattern, patterned, wants};

const SRC: u64 = 0x7f30_0000_0000;
const DST: u64 = 0x7f40_0000_0000;

/// An address without memory ends the instruction, tells where, and leaves what came before it done.
///
/// # Panics
/// When it does not.
pub fn bad_address(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, fault_mode));
    table.populate(SRC, 4 * FRAME, true, |va| pattern(2, va));
    table.populate(DST, 2 * FRAME, true, |_| 0);
    // The destination ends after two pages.
    let copy = Instruction::bcopy(SRC, DST, 0, 4, XType::DWORD, 4 * FRAME / 8);
    assert_eq!(user.run(0, &copy), Status::EXCEPTION);
    let detail = user.context.exception_detail(0).unwrap();
    assert_eq!(detail.ecause, ecause::OS_FATAL_TLB_FAULT, "{detail:?}");
    assert_eq!(detail.opc, Opc::BCOPY.0);
    assert_eq!(detail.exceptdet1, (DST + 2 * FRAME) as u32, "{detail:?}");
    assert_eq!(detail.exceptdet0, SRC + 2 * FRAME, "{detail:?}");
    assert_eq!(
        table.read(DST, 2 * FRAME as usize),
        patterned(2, SRC, 2 * FRAME as usize)
    );
    // The control block is usable again, and so is the address once there is memory.
    table.populate(DST + 2 * FRAME, 2 * FRAME, true, |_| 0);
    user.ok(0, &copy);
    assert_eq!(
        table.read(DST, 4 * FRAME as usize),
        patterned(2, SRC, 4 * FRAME as usize)
    );
    assert!(rig.gru.stats().faults_bad >= 1);
}

/// A store to a page that may only be read ends in an exception, with and without an entry in the TLB.
///
/// # Panics
/// When the page changes.
pub fn read_only_page(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, fault_mode));
    table.populate(SRC, FRAME, false, |va| pattern(3, va));
    let store = Instruction::vset(SRC, 0, XType::DWORD, 8, 1);
    assert_eq!(user.run(0, &store), Status::EXCEPTION, "store without an entry");
    user.ok(0, &Instruction::vload(SRC, 0, XType::DWORD, 8, 1));
    assert_eq!(
        user.run(0, &store),
        Status::EXCEPTION,
        "store through a clean entry"
    );
    assert_eq!(
        user.context.exception_detail(0).unwrap().ecause,
        ecause::OS_FATAL_TLB_FAULT
    );
    assert_eq!(table.read(SRC, FRAME as usize), patterned(3, SRC, FRAME as usize));
    // Writable now: the clean entry does not stand in the way.
    table.change(&mm, SRC, SRC + FRAME, |e| {
        let pte = e.get(SRC).unwrap();
        e.map(
            SRC,
            Pte {
                writable: true,
                ..pte
            },
        )
    });
    user.ok(0, &store);
    assert_eq!(table.read(SRC, 64), [0; 64]);
    // And read-only again, after which the entry that allowed stores is gone.
    table.change(&mm, SRC, SRC + FRAME, |e| {
        let pte = e.get(SRC).unwrap();
        e.map(
            SRC,
            Pte {
                writable: false,
                ..pte
            },
        )
    });
    let again = Instruction::vset(SRC, 7, XType::DWORD, 8, 1);
    assert_eq!(user.run(0, &again), Status::EXCEPTION, "store after protection");
    assert_eq!(table.read(SRC, 64), [0; 64]);
}

/// Waits until the page table has answered Retry more often than `before`.
fn wait_for_retry(table: &PageTable, user: &User, before: u64) {
    let since = Instant::now();
    while table.lookups().1 <= before {
        // A user-polling miss is reported by its user.
        if user.gseg.poll(0).unwrap() == Status::CALL_OS {
            user.context.call_os(0).unwrap();
        }
        assert!(since.elapsed() < PATIENCE, "no look-up was answered with Retry");
        std::thread::yield_now();
    }
}

/// Invariant S1: a miss inside an invalidation waits, is served when it ends, and sees the new page.
///
/// # Panics
/// When it does not.
pub fn s1_miss_in_progress_waits(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, fault_mode));
    table.populate(SRC, FRAME, true, |va| pattern(4, va));
    for round in 0..20 {
        let before = table.lookups().1;
        let generation = table.start(&mm, SRC, SRC + FRAME);
        user.gseg
            .issue(0, &Instruction::vload(SRC, 0, XType::DWORD, 512, 1))
            .unwrap();
        wait_for_retry(&table, &user, before);
        // It cannot have completed: there is nothing to complete it with.
        assert_eq!(
            user.gseg.poll(0).unwrap(),
            Status::ACTIVE,
            "round {round}: a miss was served inside an invalidation"
        );
        let data = patterned(100 + round, SRC, FRAME as usize);
        table.write(SRC, &data);
        table.end(&mm, SRC, SRC + FRAME);
        assert_eq!(user.wait(0), Status::IDLE);
        assert_eq!(user.get(0, FRAME as usize), data, "round {round}");
        assert!(
            user.gseg.tag(0).unwrap() >= generation,
            "round {round}: a stale entry"
        );
    }
    assert!(rig.gru.stats().faults_deferred >= 20);
}

/// A context is closed while one of its misses waits for an invalidation: closing does not wait for that.
///
/// # Panics
/// When it does.
pub fn close_while_a_miss_is_deferred(rig: &Rig) {
    for fault_mode in [FaultMode::Interrupt, FaultMode::UserPolling] {
        let (mm, table) = rig.space();
        let user = User::new(&mm, wants(2, 4096, fault_mode));
        table.populate(SRC, FRAME, true, |va| pattern(5, va));
        table.start(&mm, SRC, SRC + FRAME);
        user.gseg
            .issue(0, &Instruction::vload(SRC, 0, XType::DWORD, 8, 1))
            .unwrap();
        wait_for_retry(&table, &user, 0);
        let User { gseg, context } = user;
        drop(gseg);
        context.close().expect("close");
        table.end(&mm, SRC, SRC + FRAME);
    }
}

/// BCOPY with preload: data right, and fewer misses than pages.
///
/// # Panics
/// When nothing was preloaded.
pub fn preload(rig: &Rig) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    let pages = 48;
    let len = (pages * FRAME) as usize;
    table.populate(SRC, pages * FRAME, true, |va| pattern(6, va));
    table.populate(DST, pages * FRAME, true, |_| 0);
    // Not page aligned, so that the transfer ends inside a page.
    let copy = Instruction::bcopy(SRC + 40, DST + 40, 0, 4, XType::DWORD, (pages * FRAME - 80) / 8);
    let before = rig.gru.stats();
    user.ok(0, &copy);
    assert_eq!(table.read(DST + 40, len - 80), patterned(6, SRC + 40, len - 80));
    assert_eq!(
        table.read(DST + (pages * FRAME) - 40, 40),
        [0; 40],
        "copied too much"
    );
    let after = rig.gru.stats();
    let (preloads, fills) = (after.preloads - before.preloads, after.fills - before.fills);
    assert!(preloads > 0, "nothing was preloaded");
    assert!(
        fills + preloads >= 2 * pages,
        "{fills} fills and {preloads} preloads"
    );
    assert!(
        fills <= pages,
        "{fills} misses although {preloads} pages were preloaded"
    );
}

/// A 2 MiB page is entered once, and a flush of any 4 KiB of it removes it.
///
/// # Panics
/// When the old page is used after that.
pub fn huge_page(rig: &Rig) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    let base = 0x7f50_0020_0000u64;
    let (old, new) = (rig.memory.take_row(512), rig.memory.take_row(512));
    for (frame, seed) in [(old, 7), (new, 8)] {
        rig.memory
            .write(frame, 0, &patterned(seed, base, 512 * FRAME as usize));
    }
    table.edit(|e| {
        e.map_huge(
            base,
            Pte {
                frame: old,
                writable: true,
            },
        );
    });
    let before = rig.gru.stats().fills;
    for page in [0u64, 17, 511] {
        let va = base + page * FRAME;
        user.ok(0, &Instruction::vload(va, 0, XType::DWORD, 512, 1));
        assert_eq!(user.get(0, FRAME as usize), patterned(7, va, FRAME as usize));
    }
    assert_eq!(
        rig.gru.stats().fills - before,
        1,
        "one entry serves the whole page"
    );
    let middle = base + 300 * FRAME;
    table.change(&mm, middle, middle + FRAME, |e| {
        e.unmap_huge(base);
        e.map_huge(
            base,
            Pte {
                frame: new,
                writable: true,
            },
        );
    });
    for page in [0u64, 300, 511] {
        let va = base + page * FRAME;
        user.ok(0, &Instruction::vload(va, 0, XType::DWORD, 512, 1));
        assert_eq!(
            user.get(0, FRAME as usize),
            patterned(8, va, FRAME as usize),
            "page {page} through the entry of before the flush"
        );
    }
}

/// Many control blocks miss at once, in both fault modes side by side; all of them are served.
///
/// # Panics
/// When data differ.
pub fn many_misses_at_once(rig: &Rig) {
    let (mm, table) = rig.space();
    let pages = 64;
    table.populate(SRC, pages * FRAME, true, |va| pattern(9, va));
    let users: Vec<User> = [FaultMode::Interrupt, FaultMode::UserPolling]
        .into_iter()
        .map(|mode| User::new(&mm, wants(32, 16 * 1024, mode)))
        .collect();
    let since = Instant::now();
    for round in 0..20u64 {
        for user in &users {
            for cb in 0..user.gseg.cbs() {
                let va = SRC + ((cb as u64 * 7 + round) % pages) * FRAME + 8 * cb as u64;
                let load = Instruction::vload(va, 256 * cb as u32, XType::DWORD, 32, 1);
                user.gseg.issue(cb, &load).unwrap();
            }
        }
        for user in &users {
            for cb in 0..user.gseg.cbs() {
                assert_eq!(user.wait(cb), Status::IDLE);
                let va = SRC + ((cb as u64 * 7 + round) % pages) * FRAME + 8 * cb as u64;
                assert_eq!(
                    user.get(256 * cb, 256),
                    patterned(9, va, 256),
                    "round {round} cb {cb}"
                );
            }
        }
        mm.flush_all();
        assert!(since.elapsed() < PATIENCE + Duration::from_secs(60));
    }
}

/// Invariant S12: after the address space was closed nothing is entered any more.
///
/// # Panics
/// When an instruction still gets through.
pub fn s12_closed_space(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, fault_mode));
    table.populate(SRC, 2 * FRAME, true, |va| pattern(10, va));
    user.ok(0, &Instruction::vload(SRC, 0, XType::DWORD, 8, 1));
    mm.close();
    let lookups = table.lookups();
    for va in [SRC, SRC + FRAME] {
        let load = Instruction::vload(va, 0, XType::DWORD, 8, 1);
        assert_eq!(user.run(0, &load), Status::EXCEPTION, "{va:#x} after close");
    }
    assert_eq!(table.lookups(), lookups, "the pager was asked after close");
    assert!(matches!(
        mm.create_context(wants(2, 0, fault_mode)),
        Err(driver::gru::GruError::Closed)
    ));
    drop(user);
    drop(Arc::clone(&mm));
}
