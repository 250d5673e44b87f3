//! What a hit costs: an access through the device TLB against a plain look-up in an array, in the same
//! run, interleaved in blocks.
//!
//! `cargo run --release -p tlbridge-device --example atc_hit`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use device::atc::{Access, Atc, AtcConfig, Engine, Fill, PageSize, SpaceId};
use device::dma::{Prot, Space};

const ASID: SpaceId = SpaceId(7);
const PAGES: u64 = 64;
const BLOCKS: usize = 60;
const LOOPS: u64 = 200_000;

fn main() {
    let len = PAGES << 12;
    let fd = rustix::fs::memfd_create("atc-hit", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    let dma = Space::new();
    dma.map(0, len, fd, 0, Prot::READ_WRITE).expect("map");
    let atc = Atc::new(AtcConfig::default(), Arc::clone(&dma));
    for page in 0..PAGES {
        atc.open_miss(0, ASID, page << 12);
        let fill = Fill {
            space: ASID,
            va: page << 12,
            size: PageSize::SIZE_4K,
            iova: page << 12,
            writable: true,
            tag: 0,
        };
        atc.fill(0, fill).expect("fill");
    }
    atc.close_miss(0);
    let mut engine = atc.engine().expect("engine");
    let table: Vec<u64> = (0..PAGES).collect();

    let (mut floors, mut hits, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for block in 0..BLOCKS {
        // ABBA: drift hits both alike.
        let (floor, hit) = if block % 2 == 0 {
            let floor = array(&table);
            (floor, access(&mut engine))
        } else {
            let hit = access(&mut engine);
            (array(&table), hit)
        };
        floors.push(floor);
        hits.push(hit);
        ratios.push(hit / floor);
    }
    println!(
        "array {:.2} ns, hit {:.2} ns, ratio {:.1} (medians of {BLOCKS} blocks of {LOOPS}; {} hits)",
        median(&mut floors),
        median(&mut hits),
        median(&mut ratios),
        atc.stats().hits
    );
}

/// ns per access of 8 bytes through the ATC.
fn access(engine: &mut Engine) -> f64 {
    let start = Instant::now();
    let mut sum = 0u64;
    for i in 0..LOOPS {
        let va = (black_box(i) % PAGES) << 12;
        let mut word = [0; 8];
        engine
            .access(ASID, va, 8, Access::Read)
            .expect("hit")
            .read_into(&mut word);
        sum = sum.wrapping_add(u64::from_ne_bytes(word));
    }
    black_box(sum);
    start.elapsed().as_nanos() as f64 / LOOPS as f64
}

/// ns per look-up in an array.
fn array(table: &[u64]) -> f64 {
    let start = Instant::now();
    let mut sum = 0u64;
    for i in 0..LOOPS {
        sum = sum.wrapping_add(table[(black_box(i) % PAGES) as usize]);
    }
    black_box(sum);
    start.elapsed().as_nanos() as f64 / LOOPS as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
