//! What a hit costs: an access through the device TLB against a plain look-up in an array, in the same
//! run, interleaved in blocks; and what both cost under the sanitizer.
//!
//! `cargo run --release -p tlbridge-device --example atc_hit`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use device::atc::{Access, Atc, AtcConfig, Engine, Fill, Names, PageSize, Purge, SpaceId};
use device::dma::{Prot, Space};

const ASID: SpaceId = SpaceId(7);
const PAGES: u64 = 64;
const BLOCKS: usize = 60;
const LOOPS: u64 = 200_000;

fn main() {
    let (off, on) = (filled(None), filled(Some(Names::default())));
    let (mut plain, mut watched) = (off.engine().expect("engine"), on.engine().expect("engine"));
    let table: Vec<u64> = (0..PAGES).collect();

    let (mut floors, mut hits, mut sanitized) = (Vec::new(), Vec::new(), Vec::new());
    let mut ratios = Vec::new();
    for block in 0..BLOCKS {
        // ABBA: drift hits all alike.
        let (floor, hit, watch);
        if block % 2 == 0 {
            floor = array(&table);
            hit = access(&mut plain);
            watch = access(&mut watched);
        } else {
            watch = access(&mut watched);
            hit = access(&mut plain);
            floor = array(&table);
        }
        floors.push(floor);
        hits.push(hit);
        sanitized.push(watch);
        ratios.push(hit / floor);
    }
    println!(
        "array {:.2} ns, hit {:.2} ns, ratio {:.1}, hit under the sanitizer {:.0} ns (medians of {BLOCKS} blocks of \
         {LOOPS}; {} hits)",
        median(&mut floors),
        median(&mut hits),
        median(&mut ratios),
        median(&mut sanitized),
        off.stats().hits
    );
    assert_eq!(on.findings().expect("a sanitizer").defects, 0);
    println!(
        "purge of one page with {PAGES} entries: {:.0} ns, under the sanitizer {:.0} ns",
        purge(&off),
        purge(&on)
    );
}

/// An ATC with an entry for each page.
fn filled(sanitize: Option<Names>) -> Arc<Atc> {
    let len = PAGES << 12;
    let fd = rustix::fs::memfd_create("atc-hit", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    let dma = Space::new();
    dma.map(0, len, fd, 0, Prot::READ_WRITE).expect("map");
    let config = AtcConfig {
        sanitize,
        ..AtcConfig::default()
    };
    let atc = Atc::new(config, dma);
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
    atc
}

/// Median ns of a purge that meets nothing.
fn purge(atc: &Atc) -> f64 {
    let start = PAGES << 12;
    let what = Purge::Range {
        space: ASID,
        start,
        end: start + 4096,
    };
    let mut all: Vec<f64> = (0..BLOCKS)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..1000 {
                black_box(atc.purge(black_box(what)));
            }
            begin.elapsed().as_nanos() as f64 / 1000.0
        })
        .collect();
    median(&mut all)
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
