//! Faults of the kernel's driver, as docs/found.md describes them. `PASS` means: it is there.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use protos::gru::cb::{Instruction, XType};
use rustix::mm::MprotectFlags;

use crate::Outcome;
use crate::driver::{Gru, Misses, Set, Shape};
use crate::memory::{HUGE, PAGE, Region};

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// GRU_DUMP_CHIPLET_STATE stores to user memory without asking (SMAP: the guest dies).
    Dump,
    /// Memory under PROT_NONE can be read.
    ProtNone,
    /// A context without control blocks (the guest dies).
    EmptyContext,
    /// Half of a mapping is unmapped (use after free).
    HalfUnmapped,
    /// A huge page that is just being migrated (wants two NUMA nodes; the guest dies).
    Migration,
    /// Everything is unloaded while the kernel's context is loaded (writes behind a heap object).
    UnloadKernel,
}

pub fn run(gru: &Gru, fault: Fault, rounds: u64) -> Outcome {
    match fault {
        Fault::Dump => dump(gru),
        Fault::ProtNone => prot_none(gru),
        Fault::EmptyContext => empty_context(gru),
        Fault::HalfUnmapped => half_unmapped(gru),
        Fault::Migration => migration(gru, rounds),
        Fault::UnloadKernel => unload_kernel(gru),
    }
}

fn dump(gru: &Gru) -> Outcome {
    let gseg = gru.context(Shape::default())?;
    gseg.run(0, &Instruction::nop())?.done()?;
    let mut buffer = vec![0; 64 << 10];
    let contexts = gru.dump(0, -1, &mut buffer).context("GRU_DUMP_CHIPLET_STATE")?;
    Ok(format!(
        "{contexts} contexts dumped: this processor has no SMAP, or it is off"
    ))
}

fn prot_none(gru: &Gru) -> Outcome {
    for misses in Misses::BOTH {
        let gseg = gru.context(Shape {
            misses,
            ..Shape::default()
        })?;
        let region = Region::anonymous(PAGE)?;
        region.fill(0, PAGE, 0x5ec);
        region.protect(0, PAGE, MprotectFlags::empty())?;
        let end = gseg.run(0, &Instruction::vload(region.va(0), 0, XType::DWORD, 1, 1))?;
        if end.no_memory()? {
            bail!("{misses:?}: the load was refused: the driver is in order");
        }
        ensure!(
            gseg.read_ds(0, 1)[0] == 0x5ec,
            "{misses:?}: something else was loaded"
        );
    }
    Ok("memory that nobody may access was loaded".into())
}

fn empty_context(gru: &Gru) -> Outcome {
    let at = gru.map(1)?;
    let va = at.as_ptr() as u64;
    gru.create(
        va,
        Shape {
            cbs: 0,
            ds: 0,
            ..Shape::default()
        },
    )
    .context("GRU_CREATE_CONTEXT takes no context without control blocks: the driver is in order")?;
    gru.set(va, Set::Owner).context("GRU_SET_CONTEXT_OPTION")?;
    touch(va);
    bail!("the context was loaded: the device allows it, or the driver is in order")
}

fn half_unmapped(gru: &Gru) -> Outcome {
    let shape = Shape::default();
    let both = gru.map(2)?.as_ptr() as u64;
    let second = both + protos::gru::map::GSEG_PAGE;
    gru.create(both, shape).context("GRU_CREATE_CONTEXT")?;
    gru.set(both, Set::Owner).context("the first")?;
    gru.set(second, Set::Owner).context("the second")?;
    touch(both);
    touch(second);
    unmap(both, protos::gru::map::GSEG_PAGE)?;
    // What belongs to both was freed with the first. Other objects take its place.
    for _ in 0..1000 {
        gru.map(1)?;
    }
    match gru.set(second, Set::Owner) {
        Ok(()) => touch(second),
        Err(error) => println!("GRU_SET_CONTEXT_OPTION of the half that is left: {error}"),
    }
    unmap(second, protos::gru::map::GSEG_PAGE)?;
    Ok("the driver has used what it had freed (slub_debug=FZPU tells)".into())
}

fn migration(gru: &Gru, rounds: u64) -> Outcome {
    let region = Region::huge(HUGE)?;
    region.fill(0, HUGE, 1);
    ensure!(
        region.collapse(0, HUGE).is_ok(),
        "no huge page to be had: nothing can be said"
    );
    let gseg = gru.context(Shape::default())?;
    let stop = AtomicBool::new(false);
    let loads = std::thread::scope(|scope| -> Result<u64> {
        let loading = scope.spawn(|| -> Result<u64> {
            let mut loads = 0;
            while !stop.load(Ordering::Acquire) {
                let at = region.va((loads as usize * 37 % 512) * PAGE);
                gseg.run(0, &Instruction::vload(at, 0, XType::DWORD, 1, 1))?
                    .done()?;
                loads += 1;
            }
            Ok(loads)
        });
        let mut moved = Ok(());
        for round in 0..rounds {
            moved = crate::memory::move_to_node(region.va(0), (round % 2) as i32);
            if moved.is_err() {
                break;
            }
        }
        stop.store(true, Ordering::Release);
        let loads = loading.join().expect("no panic")?;
        moved?;
        Ok(loads)
    })?;
    bail!("{rounds} migrations and {loads} loads did no harm")
}

fn unload_kernel(gru: &Gru) -> Outcome {
    for _ in 0..10 {
        ensure!(gru.ktest(0)? == 0, "the driver's test fails");
        gru.unload_all()
            .context("GRU_USER_UNLOAD_CONTEXT of everything")?;
        gru.ktest(99)?;
    }
    Ok("the driver has saved a context where it has no room for one (slub_debug=FZPU tells)".into())
}

fn touch(va: u64) {
    crate::memory::touch(va);
}

fn unmap(va: u64, len: u64) -> Result<()> {
    crate::memory::unmap_at(va, len as usize)
}
