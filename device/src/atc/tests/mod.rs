//! Unit tests over real mappings. Set-up is here, tests by topic below.

mod access;
mod by_message;
mod changes;
mod drain;
mod kill;
mod model;
mod purge;
mod sanitizer;
mod stress;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dma::{Prot, Space};

use super::*;

const ASID: SpaceId = SpaceId(0x12_3456);
const OTHER: SpaceId = SpaceId(0x65_4321);

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("atc-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    fd
}

/// An ATC over `len` bytes of memory at IOVA 0.
fn atc_over(len: u64, config: AtcConfig) -> Arc<Atc> {
    let dma = Space::new();
    dma.map(0, len, memfd(len), 0, Prot::READ_WRITE).expect("map");
    Atc::new(config, dma)
}

fn with_checks(checks: Checks) -> AtcConfig {
    AtcConfig {
        checks,
        ..AtcConfig::default()
    }
}

fn size(shift: u8) -> PageSize {
    PageSize::new(shift).expect("a supported size")
}

fn fill_at(va: u64, iova: u64, shift: u8) -> Fill {
    Fill {
        space: ASID,
        va,
        size: size(shift),
        iova,
        writable: true,
        tag: 1,
    }
}

fn range(start: u64, end: u64) -> Purge {
    Purge::Range {
        space: ASID,
        start,
        end,
    }
}

/// A miss and its answer.
fn enter(atc: &Atc, fill: Fill) {
    atc.open_miss(0, fill.space, fill.va);
    atc.fill(0, fill).expect("fill");
    atc.close_miss(0);
}

/// With a sanitizer.
fn sanitized(checks: Checks) -> AtcConfig {
    AtcConfig {
        sanitize: Some(Names::default()),
        ..with_checks(checks)
    }
}

/// Whether an access finds something.
fn hits(engine: &mut Engine, va: u64) -> bool {
    engine.access(ASID, va, 1, Access::Read).is_ok()
}
