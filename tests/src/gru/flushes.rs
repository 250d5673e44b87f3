//! Flushes while the device works: no access through an old translation once the flush has returned.
//!
//! Oracles: a frame that a page has left is poisoned at once. A late store changes the poison, a late load
//! brings poison into the destination. And each instruction's tag: one that was issued after an invalidation
//! returned has used no entry of before it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use driver::gru::{FaultMode, Mm};
use protos::gru::cb::{Instruction, Status, XType};

use super::memory::{FRAME, Frame};
use super::page_table::{PageTable, Pte};
use super::rig::{POISON, Rig, User, pattern, patterned, wants};

const SRC: u64 = 0x7f70_0000_0000;
const DST: u64 = 0x7f78_0000_0000;
const PAGES: u64 = 16;

/// Frames that pages have left, full of poison, the oldest first.
struct Graveyard<'a> {
    rig: &'a Rig,
    frames: Vec<(Frame, u64)>,
}

impl Graveyard<'_> {
    /// How many stay poisoned before the oldest is used again.
    const DEPTH: usize = 32;

    fn bury(&mut self, frame: Frame, va: u64) {
        self.rig.memory.write(frame, 0, &[POISON; FRAME as usize]);
        self.frames.push((frame, va));
        if self.frames.len() > Self::DEPTH {
            let (oldest, _) = self.frames[0];
            self.check();
            self.frames.remove(0);
            self.rig.memory.put(oldest);
        }
    }

    fn check(&self) {
        for (frame, va) in &self.frames {
            let data = self.rig.memory.read(*frame, 0, FRAME as usize);
            assert!(
                data.iter().all(|b| *b == POISON),
                "a store reached {frame:?}, which {va:#x} had left, after the flush had returned"
            );
        }
    }
}

/// One user: copies its part of the source to its part of the destination, again and again, and compares.
fn storm(user: &User, table: &PageTable, part: u64, stop: &AtomicBool, copies: &AtomicU64) {
    let (src, dst) = (SRC + part * PAGES * FRAME, DST + part * PAGES * FRAME);
    let len = PAGES * FRAME;
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        // Off by some bytes, so that chunks and pages do not line up.
        let skip = (round % 5) * 8;
        let n = (len - skip) / 8;
        user.ok(0, &Instruction::bcopy(src, dst + skip, 0, 4, XType::DWORD, n));
        // The processor's view; a page that moves meanwhile takes its data along.
        let copied = table.read(dst + skip, (n * 8) as usize);
        let expected = patterned(part, src, (n * 8) as usize);
        if copied != expected {
            let at = copied.iter().zip(&expected).position(|(a, b)| a != b).unwrap();
            panic!(
                "part {part} round {round}: byte {at:#x} is {:#x}, not {:#x}{}",
                copied[at],
                expected[at],
                if copied[at] == POISON {
                    " (poison: a stale load)"
                } else {
                    ""
                }
            );
        }
        copies.fetch_add(1, Ordering::Relaxed);
    }
}

/// BCOPY storms in several contexts while pages of source and destination move, and moving never leaves an
/// access behind (invariant S2).
///
/// # Panics
/// When it does.
pub fn s2_bcopy_storm(rig: &Rig, moves: u64, least_copies: u64) {
    let (mm, table) = rig.space();
    let modes = [FaultMode::Interrupt, FaultMode::Interrupt, FaultMode::UserPolling];
    let users: Vec<User> = modes
        .into_iter()
        .map(|mode| User::new(&mm, wants(2, 4096, mode)))
        .collect();
    for part in 0..users.len() as u64 {
        let (src, dst) = (SRC + part * PAGES * FRAME, DST + part * PAGES * FRAME);
        table.populate(src, PAGES * FRAME, true, |va| pattern(part, va));
        table.populate(dst, PAGES * FRAME, true, |_| 0);
    }
    let stop = AtomicBool::new(false);
    let copies = AtomicU64::new(0);
    let mut graveyard = Graveyard {
        rig,
        frames: Vec::new(),
    };
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for (part, user) in users.iter().enumerate() {
            let (table, stop, copies) = (&table, &stop, &copies);
            scope.spawn(move || {
                let _stop = StopOnDrop(stop);
                storm(user, table, part as u64, stop, copies);
            });
        }
        let total = PAGES * users.len() as u64;
        let mut step = 0;
        // Pages move faster than contexts copy: go on until both have done enough. On few processors no engine gets to
        // use a page before it moves again, so what comes after the storm is slower: a page moves each 100 ms.
        while !stop.load(Ordering::Relaxed) && (step < moves || copies.load(Ordering::Relaxed) < least_copies)
        {
            step += 1;
            if step > moves {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Each page of both in turn: a page number from the step itself would have the step's parity.
            let page = (step / 2 * 31) % total;
            let base = if step % 2 == 0 { SRC } else { DST };
            let va = base + page * FRAME;
            let old = table.migrate(&mm, va);
            graveyard.bury(old, va);
        }
    });
    // Every instruction has ended.
    graveyard.check();
    let stats = rig.gru.stats();
    assert!(stats.flushes >= moves, "{stats:?}");
}

/// Ends the other threads of a scope when one panics, so that the test fails instead of hanging.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An instruction that is issued after an invalidation has returned uses no entry of before it, and one on a
/// page that is gone ends in an exception.
///
/// # Panics
/// When it does not.
pub fn s2_generation(rig: &Rig) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    table.populate(SRC, 4 * FRAME, true, |va| pattern(1, va));
    let load = Instruction::vload(SRC, 0, XType::DWORD, 512, 1);
    for round in 0..100u64 {
        user.ok(0, &load);
        // Shared memory whose pages stay: only the tag can show it.
        let ((), generation) = table.change(&mm, SRC, SRC + FRAME, |_| ());
        user.ok(0, &load);
        assert!(user.gseg.tag(0).unwrap() >= generation, "round {round}");
        let (pte, _) = table.change(&mm, SRC, SRC + FRAME, |e| e.unmap(SRC));
        assert_eq!(user.run(0, &load), Status::EXCEPTION, "round {round}");
        table.edit(|e| e.map(SRC, pte.unwrap()));
    }
}

/// An invalidation that begins and ends while a miss is being looked up: the answer that was found before it is
/// dropped (the kill bit), the instruction misses again and gets the new page. With 4 KiB pages, with a 2 MiB
/// page of which another part is invalidated, and with pages that are prepared ahead.
///
/// # Panics
/// When the old page is used.
pub fn s1_invalidation_during_the_look_up(rig: &Rig, fault_mode: FaultMode) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, fault_mode));
    table.populate(SRC, FRAME, true, |va| pattern(1, va));
    let load = Instruction::vload(SRC, 0, XType::DWORD, 512, 1);
    for round in 0..30u64 {
        mm.flush(SRC, SRC + FRAME);
        let (inner_mm, inner) = (mm.clone(), table.clone());
        let memory = rig.memory.clone();
        table.after_next_lookup(Box::new(move || {
            let old = inner.migrate(&inner_mm, SRC);
            memory.write(old, 0, &[POISON; FRAME as usize]);
            memory.put(old);
        }));
        let lookups = table.lookups().0;
        user.ok(0, &load);
        assert_eq!(
            user.get(0, FRAME as usize),
            patterned(1, SRC, FRAME as usize),
            "round {round}: stale"
        );
        assert_eq!(table.lookups().0, lookups + 2, "round {round}: not missed again");
        assert_eq!(user.gseg.tag(0).unwrap(), table.generation(), "round {round}");
    }

    // The whole span of a fill counts, not only the address that missed.
    let base = 0x7f50_0040_0000u64;
    let rows = [rig.memory.take_row(512), rig.memory.take_row(512)];
    rig.memory
        .write(rows[1], 0, &patterned(2, base, 512 * FRAME as usize));
    let pte = |frame| Pte {
        frame,
        writable: true,
    };
    rig.memory.write(rows[0], 0, &vec![POISON; 512 * FRAME as usize]);
    table.edit(|e| e.map_huge(base, pte(rows[0])));
    let (inner_mm, inner) = (mm.clone(), table.clone());
    table.after_next_lookup(Box::new(move || {
        let far = base + 511 * FRAME;
        inner.change(&inner_mm, far, far + FRAME, |e| e.map_huge(base, pte(rows[1])));
    }));
    user.ok(0, &Instruction::vload(base, 0, XType::DWORD, 512, 1));
    assert_eq!(
        user.get(0, FRAME as usize),
        patterned(2, base, FRAME as usize),
        "huge: stale"
    );
}

/// As [`s1_invalidation_during_the_look_up`], for pages that a BCOPY's miss brings in ahead: the first look-up of a
/// miss with preload is the missing page's own, so what follows is preloaded before the answer to the first.
///
/// Needs a driver with preload.
///
/// # Panics
/// When an old page is used.
pub fn s1_invalidation_during_preload(rig: &Rig) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    let len = PAGES * FRAME;
    table.populate(SRC, len, true, |va| pattern(1, va));
    table.populate(DST, len, true, |_| 0);
    for round in 0..20u64 {
        mm.flush_all();
        table.write(DST, &vec![0; len as usize]);
        let (inner_mm, inner) = (mm.clone(), table.clone());
        let memory = rig.memory.clone();
        // Moves the page that missed and all those behind it, after the first has been looked up.
        table.after_next_lookup(Box::new(move || {
            for page in 0..PAGES {
                let old = inner.migrate(&inner_mm, SRC + page * FRAME);
                memory.write(old, 0, &[POISON; FRAME as usize]);
                memory.put(old);
            }
        }));
        user.ok(0, &Instruction::bcopy(SRC, DST, 0, 4, XType::DWORD, len / 8));
        assert_eq!(
            table.read(DST, len as usize),
            patterned(1, SRC, len as usize),
            "round {round}: stale"
        );
    }
    assert!(rig.gru.stats().preloads > 0);
}

/// Flushes from many threads at once, of disjoint and of equal ranges, beside instructions; none is lost.
///
/// # Panics
/// When one is.
pub fn many_flushers(rig: &Rig) {
    let (mm, table) = rig.space();
    let threads = 30u64;
    table.populate(SRC, threads * FRAME, true, |va| pattern(1, va));
    let user = User::new(&mm, wants(2, 32 * 1024 / 2, FaultMode::Interrupt));
    let stop = AtomicBool::new(false);
    let before = rig.gru.stats();
    let each = 40u64;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (mm, table): (&Mm, &PageTable) = (&mm, &table);
            scope.spawn(move || {
                for step in 0..each {
                    let page = if step % 4 == 0 { 0 } else { thread };
                    let va = SRC + page * FRAME;
                    table.start(mm, va, va + FRAME);
                    table.end(mm, va, va + FRAME);
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        for step in 0..60u64 {
            let va = SRC + (step % threads) * FRAME;
            user.ok(0, &Instruction::vload(va, 0, XType::DWORD, 512, 1));
            assert_eq!(user.get(0, FRAME as usize), patterned(1, va, FRAME as usize));
        }
    });
    let after = rig.gru.stats();
    assert_eq!(after.flushes - before.flushes, threads * each);
    assert!(after.flush_max_ns > 0 && after.flush_total_ns >= after.flush_max_ns);
}

/// Ranges of every length around the clamp: exactly the pages of the range are forgotten (or everything,
/// from 1024 pages on), never fewer.
///
/// # Panics
/// When one is kept.
pub fn range_lengths(rig: &Rig) {
    let (mm, table) = rig.space();
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    let pages = [0u64, 1, 2, 1022, 1023, 1024, 1025, 3000];
    for page in pages {
        table.populate(SRC + page * FRAME, FRAME, true, |va| pattern(1, va));
    }
    let touch = |page: u64| {
        let before = rig.gru.stats().fills;
        user.ok(0, &Instruction::vload(SRC + page * FRAME, 0, XType::DWORD, 8, 1));
        rig.gru.stats().fills - before
    };
    for len in [1u64, 2, 3, 1023, 1024, 1025, 1026, 4096] {
        for page in pages {
            touch(page);
        }
        // From the middle of the first page to the middle of the last one.
        mm.flush(SRC + 100, SRC + (len - 1) * FRAME + 200);
        for page in pages {
            let filled = touch(page);
            if page < len {
                assert_eq!(filled, 1, "page {page} survived a flush of {len} pages");
            } else if len < 1024 {
                assert_eq!(filled, 0, "page {page} fell to a flush of {len} pages");
            }
        }
    }
    // Nothing at all.
    touch(0);
    mm.flush(SRC + FRAME, SRC + FRAME);
    mm.flush(SRC + FRAME, SRC);
    assert_eq!(touch(0), 0);
}

/// Whether the flush says that it does not sleep, and does what it says: in mapped memory no message is sent.
///
/// # Panics
/// When the two disagree.
pub fn nonsleeping(rig: &Rig, mapped: bool) {
    let (mm, _table) = rig.space();
    assert_eq!(mm.flush_is_nonsleeping(), mapped);
    assert_eq!(rig.gru.gseg_is_mappable(), mapped);
    assert_eq!(rig.gru.status_page().is_some(), mapped);
}
