//! Contexts: resources, isolation, ASIDs, closing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use driver::gru::user::WaitError;
use driver::gru::{Context, FaultMode, GruError, Mm};
use protos::gru::cb::{Instruction, Status, XType};
use protos::gru::map::{CBRS, CHIPLETS, CONTEXTS, DSR_BYTES};

use super::memory::FRAME;
use super::page_table::PageTable;
use super::rig::{Rig, User, pattern, patterned, wants};

const VA: u64 = 0x7f60_0000_0000;

/// ASIDs that last for little more than the contexts of a chiplet: generations end quickly.
pub const SHORT_ASIDS: std::ops::Range<u32> = 8..8 + 8 * 20;

/// Contexts until none is left, by each of the three resources; the error names what is in use; what is
/// closed can be had again.
///
/// # Panics
/// When a resource is lost or given out twice.
pub fn exhaustion(rig: &Rig) {
    let (mm, _table) = rig.space();
    let fill = |cbs, ds| {
        let mut contexts: Vec<Context> = Vec::new();
        loop {
            match mm.create_context(wants(cbs, ds, FaultMode::Interrupt)) {
                Ok(context) => contexts.push(context),
                Err(e @ GruError::NoResources { .. }) => return (contexts, e.to_string()),
                Err(e) => panic!("{e}"),
            }
        }
    };
    // Context numbers, control blocks, data segment: each runs out first in one of the cases.
    let cases = [
        (2, 1024, CONTEXTS * CHIPLETS),
        (32, 1024, CBRS / 32 * CHIPLETS),
        (2, 8192, DSR_BYTES / 8192 * CHIPLETS),
    ];
    for (cbs, ds, expected) in cases {
        let (mut contexts, error) = fill(cbs, ds);
        assert_eq!(contexts.len(), expected, "{cbs} control blocks, {ds} bytes");
        assert!(
            error.contains("chiplet 0 uses") && error.contains("close"),
            "{error}"
        );
        let mut numbers: Vec<_> = contexts.iter().map(Context::number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), expected, "a context number was given out twice");
        contexts.swap_remove(expected / 2);
        let again = mm.create_context(wants(cbs, ds, FaultMode::Interrupt)).unwrap();
        assert_eq!((again.cbs(), again.ds_bytes()), (cbs, ds));
        drop(again);
        drop(contexts);
    }
    let in_use = rig.gru.resources_in_use().join(" ");
    assert!(in_use.contains("uses 0 of 16 contexts, 0 of 128"), "{in_use}");
    assert!(matches!(
        mm.create_context(wants(CBRS + 1, 0, FaultMode::Interrupt)),
        Err(GruError::Argument { .. })
    ));
}

/// A new context has zeroed control blocks and data, whatever its predecessor left in the same resources.
///
/// # Panics
/// When something shows.
pub fn new_context_is_clean(rig: &Rig) {
    let (mm, table) = rig.space();
    table.populate(VA, FRAME, true, |va| pattern(1, va));
    for _ in 0..4 {
        let user = User::new(&mm, wants(4, 4096, FaultMode::Interrupt));
        assert!(user.get(0, 4096).iter().all(|b| *b == 0), "the last owner's data");
        for cb in 0..4 {
            assert_eq!(user.gseg.poll(cb).unwrap(), Status::IDLE);
            assert_eq!(user.gseg.avalue(cb).unwrap(), 0);
        }
        user.put(0, &[0xee; 4096]);
        user.ok(3, &Instruction::vload(VA, 0, XType::DWORD, 8, 1));
        assert_eq!(
            user.run(2, &Instruction::vload(0, 0, XType::DWORD, 8, 1)),
            Status::EXCEPTION
        );
    }
}

/// Two address spaces with different pages at the same addresses never see each other's, on the same and on
/// different chiplets; a flush of one leaves the other alone.
///
/// # Panics
/// When they do.
pub fn isolation(rig: &Rig) {
    let spaces: Vec<(Arc<Mm>, Arc<PageTable>)> = (0..3).map(|_| rig.space()).collect();
    let pages = 16;
    let users: Vec<Vec<User>> = spaces
        .iter()
        .enumerate()
        .map(|(seed, (mm, table))| {
            table.populate(VA, pages * FRAME, true, |va| pattern(seed as u64, va));
            (0..CHIPLETS)
                .map(|chiplet| {
                    let mut options = wants(2, 4096, FaultMode::Interrupt);
                    options.chiplet = Some(chiplet);
                    User::new(mm, options)
                })
                .collect()
        })
        .collect();
    for round in 0..6u64 {
        for page in 0..pages {
            let va = VA + page * FRAME;
            for (seed, users) in users.iter().enumerate() {
                for user in users {
                    user.ok(0, &Instruction::vload(va, 0, XType::DWORD, 512, 1));
                    assert_eq!(
                        user.get(0, FRAME as usize),
                        patterned(seed as u64, va, FRAME as usize),
                        "space {seed} page {page} round {round}"
                    );
                }
            }
        }
        let fills = rig.gru.stats().fills;
        spaces[0].0.flush(VA, VA + pages * FRAME);
        users[1][0].ok(0, &Instruction::vload(VA, 0, XType::DWORD, 8, 1));
        assert_eq!(
            rig.gru.stats().fills,
            fills,
            "the flush took another space's entry"
        );
        users[0][0].ok(0, &Instruction::vload(VA, 0, XType::DWORD, 8, 1));
        assert_eq!(rig.gru.stats().fills, fills + 1, "the flush left an entry behind");
    }
    // Stores land in their own pages.
    for (seed, users) in users.iter().enumerate() {
        let value = 0x0101_0101_0101_0101u64 * (seed as u64 + 1);
        users[0].ok(0, &Instruction::vset(VA, value, XType::DWORD, 512, 1));
    }
    for (seed, (_, table)) in spaces.iter().enumerate() {
        assert!(
            table
                .read(VA, FRAME as usize)
                .iter()
                .all(|b| *b == seed as u8 + 1)
        );
    }
}

/// Address spaces come and go until the ASIDs start again from the bottom, several times, while one context
/// stays loaded: nobody ever sees a page of a former owner of its number.
///
/// Needs a driver with [`SHORT_ASIDS`].
///
/// # Panics
/// When somebody does.
pub fn asid_wrap(rig: &Rig) {
    let (stay, stay_table) = rig.space();
    stay_table.populate(VA, FRAME, true, |va| pattern(1000, va));
    let stay_user = User::new(&stay, wants(2, 4096, FaultMode::Interrupt));
    let stay_asid = stay.asid(stay_user.context.chiplet());
    // An address space that is unloaded while generations pass, and loaded again.
    let (back, back_table) = rig.space();
    back_table.populate(VA, FRAME, true, |va| pattern(2000, va));
    for round in 0..100u64 {
        let (mm, table) = rig.space();
        table.populate(VA, FRAME, true, |va| pattern(round, va));
        let users: Vec<User> = (0..CHIPLETS)
            .map(|chiplet| {
                let mut options = wants(2, 4096, FaultMode::Interrupt);
                options.chiplet = Some(chiplet);
                User::new(&mm, options)
            })
            .collect();
        let check = |user: &User, seed: u64| {
            user.ok(0, &Instruction::vload(VA, 0, XType::DWORD, 512, 1));
            assert_eq!(
                user.get(0, FRAME as usize),
                patterned(seed, VA, FRAME as usize),
                "round {round} seed {seed}"
            );
        };
        for user in &users {
            check(user, round);
        }
        check(&stay_user, 1000);
        if round % 7 == 0 {
            let user = User::new(&back, wants(2, 4096, FaultMode::Interrupt));
            check(&user, 2000);
        }
        let frame = table.edit(|e| e.get(VA)).unwrap().frame;
        drop(users);
        rig.memory.put(frame);
    }
    assert_eq!(
        stay.asid(stay_user.context.chiplet()),
        stay_asid,
        "a loaded context lost its ASID"
    );
    let stats = rig.gru.stats();
    assert!(stats.asid_generations >= 4, "{stats:?}");
    assert!(stats.tgh_global >= stats.asid_generations, "{stats:?}");
}

/// An address space without a loaded context is flushed by dropping its ASID: no device operation, and the
/// entries that are left in the TLB are never used again.
///
/// # Panics
/// When they are.
pub fn flush_without_contexts(rig: &Rig) {
    let (mm, table) = rig.space();
    table.populate(VA, FRAME, true, |va| pattern(1, va));
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    user.ok(0, &Instruction::vload(VA, 0, XType::DWORD, 512, 1));
    let chiplet = user.context.chiplet();
    let first = mm.asid(chiplet).0;
    drop(user);
    let before = rig.gru.stats();
    table.change(&mm, VA, VA + FRAME, |e| {
        let frame = rig.memory.take();
        rig.memory.write(frame, 0, &patterned(2, VA, FRAME as usize));
        e.map(
            VA,
            super::page_table::Pte {
                frame,
                writable: true,
            },
        )
    });
    let after = rig.gru.stats();
    assert_eq!(after.tgh_operations, before.tgh_operations, "a device operation");
    assert_eq!(
        after.flushes_by_dropping_asid,
        before.flushes_by_dropping_asid + 1
    );
    assert_eq!(mm.asid(chiplet), (0, 0));
    let mut options = wants(2, 4096, FaultMode::Interrupt);
    options.chiplet = Some(chiplet);
    let user = User::new(&mm, options);
    assert_ne!(mm.asid(chiplet).0, first, "the number of before the flush");
    user.ok(0, &Instruction::vload(VA, 0, XType::DWORD, 512, 1));
    assert_eq!(user.get(0, FRAME as usize), patterned(2, VA, FRAME as usize));
}

/// Contexts are closed while their instructions run and miss, and others go on beside them.
///
/// # Panics
/// When closing hangs or somebody else's data suffer.
pub fn close_under_load(rig: &Rig) {
    let (mm, table) = rig.space();
    let pages = 64;
    let len = pages * FRAME;
    let (src, dst, other) = (VA, VA + len, VA + 2 * len);
    table.populate(src, len, true, |va| pattern(3, va));
    table.populate(dst, len, true, |_| 0);
    table.populate(other, len, true, |_| 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The neighbour: its results are checked all the time.
            let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
            while !stop.load(Ordering::Relaxed) {
                user.ok(0, &Instruction::bcopy(src, other, 0, 4, XType::DWORD, len / 8));
                assert_eq!(table.read(other, len as usize), patterned(3, src, len as usize));
                table.write(other, &vec![0; len as usize]);
            }
        });
        for round in 0..60 {
            let mode = if round % 3 == 2 {
                FaultMode::UserPolling
            } else {
                FaultMode::Interrupt
            };
            let user = User::new(&mm, wants(8, 4096, mode));
            for cb in 0..8 {
                user.gseg
                    .issue(cb, &Instruction::bcopy(src, dst, 0, 4, XType::DWORD, len / 8))
                    .unwrap();
            }
            if round % 2 == 0 {
                mm.flush(src, src + len);
            }
            let User { gseg, context } = user;
            drop(gseg);
            context.close().expect("close under load");
        }
        stop.store(true, Ordering::Relaxed);
    });
    // Nothing of the closed ones is running: the destination does not change any more.
    mm.flush_all();
    table.write(dst, &vec![0; len as usize]);
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    user.ok(0, &Instruction::nop());
    assert!(table.read(dst, len as usize).iter().all(|b| *b == 0));
}

/// New ASIDs under running instructions (update in place): nothing is lost, nothing is wrong.
///
/// # Panics
/// When it is.
pub fn renew_asids(rig: &Rig) {
    let (mm, table) = rig.space();
    let pages = 32;
    let len = pages * FRAME;
    table.populate(VA, len, true, |va| pattern(4, va));
    table.populate(VA + len, len, true, |_| 0);
    let users: Vec<User> = [FaultMode::Interrupt, FaultMode::UserPolling]
        .into_iter()
        .map(|mode| User::new(&mm, wants(2, 4096, mode)))
        .collect();
    let copy = Instruction::bcopy(VA, VA + len, 0, 4, XType::DWORD, len / 8);
    let chiplet = users[0].context.chiplet();
    for round in 0..40 {
        let before = mm.asid(chiplet).0;
        for user in &users {
            user.gseg.issue(0, &copy).unwrap();
        }
        mm.renew_asids().expect("renew");
        assert_ne!(mm.asid(chiplet).0, before);
        for user in &users {
            assert_eq!(user.wait(0), Status::IDLE, "round {round}");
        }
        assert_eq!(
            table.read(VA + len, len as usize),
            patterned(4, VA, len as usize),
            "round {round}"
        );
        table.write(VA + len, &vec![0; len as usize]);
    }
    assert!(rig.gru.stats().contexts_updated >= 80);
}

/// The device is reset behind the driver's back: every call ends, and says so.
///
/// # Panics
/// When one does not.
pub fn reset_behind_the_driver(rig: &Rig) {
    let (mm, table) = rig.space();
    table.populate(VA, FRAME, true, |va| pattern(5, va));
    let user = User::new(&mm, wants(2, 4096, FaultMode::Interrupt));
    user.ok(0, &Instruction::vload(VA, 0, XType::DWORD, 8, 1));
    rig.backing.reset().expect("reset");
    let User { gseg, context } = user;
    if gseg.is_mapped() {
        // Cleared memory reads as a finished instruction; it must not be taken for one.
        let wait = gseg.wait(0, &|| true);
        assert!(
            matches!(&wait, Err(WaitError::Io(e)) if e.kind() == std::io::ErrorKind::NotConnected),
            "{wait:?}"
        );
        assert!(gseg.tag(0).is_err() && gseg.avalue(0).is_err() && gseg.ds_read(0, &mut [0; 8]).is_err());
    }
    drop(gseg);
    // Nothing to stop; without a mapped status page this is what finds out.
    context.close().expect("nothing to stop");
    assert!(rig.gru.is_gone());
    mm.flush(VA, VA + FRAME);
    assert!(matches!(
        mm.create_context(wants(2, 0, FaultMode::Interrupt)),
        Err(GruError::DeviceGone)
    ));
}
