//! What a covered munmap costs when no device has cached anything of the range, against the plain one; and
//! where unregistering becomes dearer than the event path.
//!
//!     cargo run --release -p tlbridge-agent --example covered_munmap [missing|wp] [--sizes]
//!
//! Blocks of both kinds are interleaved (ABBA). The daemon is a minimal one in this process: its event path
//! does not purge anything, so the figure of the event path is a lower bound.
#![allow(unsafe_code, reason = "maps and unmaps memory")]

#[path = "../tests/mock/mod.rs"]
mod mock;

use agent::{Agent, Memory};
use mock::{Mock, Options};
use protos::bridge::control::UffdMode;
use std::time::Instant;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const BLOCKS: usize = 40;

/// Nanoseconds of each munmap of `len` freshly mapped and touched bytes.
fn block(agent: &Agent, memory: &Memory, len: usize, covered: bool, calls: usize) -> Vec<u64> {
    (0..calls)
        .map(|_| {
            let fd = Some(memory.fd());
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            // SAFETY: a new mapping, unmapped below, to which nothing refers.
            unsafe {
                let at = if covered {
                    agent.mmap(0, len, RW, flags, fd, 0).expect("mmap").value
                } else {
                    agent::raw::mmap(0, len, RW, flags, fd, 0).expect("mmap")
                };
                let begin = Instant::now();
                if covered {
                    agent.munmap(at, len).expect("munmap");
                } else {
                    agent::raw::munmap(at, len).expect("munmap");
                }
                begin.elapsed().as_nanos() as u64
            }
        })
        .collect()
}

fn quantile(sorted: &[u64], q: f64) -> u64 {
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

/// Median and 99th percentile of the plain and the covered call, and the median over the ABBA groups of the
/// difference of medians.
fn compare(agent: &Agent, memory: &Memory, len: usize, calls: usize, groups: usize) -> ([u64; 4], i64) {
    let mut all = [Vec::new(), Vec::new()];
    let mut differences = Vec::new();
    for _ in 0..groups {
        let mut group = [Vec::new(), Vec::new()];
        for covered in [false, true, true, false] {
            group[usize::from(covered)].extend(block(agent, memory, len, covered, calls));
        }
        for g in &mut group {
            g.sort_unstable();
        }
        differences.push(quantile(&group[1], 0.5) as i64 - quantile(&group[0], 0.5) as i64);
        for (a, g) in all.iter_mut().zip(group) {
            a.extend(g);
        }
    }
    for a in &mut all {
        a.sort_unstable();
    }
    differences.sort_unstable();
    let [plain, covered] = &all;
    (
        [
            quantile(plain, 0.5),
            quantile(plain, 0.99),
            quantile(covered, 0.5),
            quantile(covered, 0.99),
        ],
        differences[differences.len() / 2],
    )
}

fn attach(uffd_mode: UffdMode) -> (Mock, &'static Agent) {
    let mock = Mock::start(Options {
        uffd_mode,
        ..Options::default()
    });
    let agent = mock.attach();
    (mock, agent)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let modes = match arguments.first().map(String::as_str) {
        Some("missing") => vec![UffdMode::Missing],
        Some("wp") => vec![UffdMode::Wp],
        _ => vec![UffdMode::Missing, UffdMode::Wp],
    };
    for mode in modes {
        let (mock, agent) = attach(mode);
        let memory = agent.memory(4096, "one page").expect("memory");
        let ([p50, p99, c50, c99], difference) = compare(agent, &memory, 4096, 250, BLOCKS / 4 * 2);
        println!(
            "{mode:?}: one page, nothing cached: plain p50 {p50} ns p99 {p99} ns; covered p50 {c50} ns p99 {c99} ns; \
             covered - plain (median of ABBA groups) {difference} ns"
        );
        assert_eq!(agent.stats().hops, 0);
        agent.detach().expect("detach");
        drop(mock);
        if !arguments.iter().any(|a| a == "--sizes") {
            continue;
        }
        for shift in [12, 21, 24, 26, 28] {
            let len = 1usize << shift;
            let mut medians = Vec::new();
            for unregister_max in ["18446744073709551615", "0"] {
                // SAFETY: no other thread runs.
                unsafe { std::env::set_var("TLBRIDGE_UNREGISTER_MAX", unregister_max) };
                let (mock, agent) = attach(mode);
                let memory = agent.memory(len as u64, "sizes").expect("memory");
                let calls = (1 << 27 >> shift).clamp(2, 200);
                medians.push(compare(agent, &memory, len, calls, 3));
                agent.detach().expect("detach");
                drop(mock);
            }
            println!(
                "{mode:?}: {:>8} KiB: plain {} ns; added by unregistering {} ns; added by the event path {} ns",
                len / 1024,
                medians[0].0[0],
                medians[0].1,
                medians[1].1
            );
        }
    }
}
