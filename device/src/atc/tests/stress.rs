//! Threads: software that changes a page table and purges, engines that read through the ATC, each miss
//! answered by whoever had it. Bounded by time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

const PAGE: u64 = 4096;
/// A unit is what software changes at once: 16 KiB, entered whole or page by page.
const UNIT_SHIFT: u8 = 14;
const UNIT: u64 = 1 << UNIT_SHIFT;
const UNITS: usize = 6;
const ENGINES: usize = 2;
const POISON: u64 = u64::MAX;
const TIME: Duration = Duration::from_secs(2);

/// A unit's translation is its generation: odd ones live in its first frame, even ones in its second.
struct World {
    atc: Arc<Atc>,
    /// The page table.
    generation: [AtomicU64; UNITS],
    /// What no access may fall behind of: the generation whose purge has returned.
    floor: [AtomicU64; UNITS],
    stop: AtomicBool,
}

fn frame(unit: usize, generation: u64) -> u64 {
    (unit as u64 * 2 + (generation & 1)) * UNIT
}

impl World {
    /// Every page of a frame begins with the same word.
    fn stamp(&self, frame: u64, value: u64) {
        for page in 0..UNIT / PAGE {
            let target = self
                .atc
                .dma()
                .resolve(frame + page * PAGE, 8, true)
                .expect("mapped");
            target.write_from(&value.to_ne_bytes());
        }
    }

    fn software(&self, mine: &[usize], seed: u64) {
        let mut random = Random(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let unit = mine[random.below(mine.len() as u64) as usize];
            let old = self.generation[unit].load(Ordering::Relaxed);
            let new = old + 1;
            self.stamp(frame(unit, new), new);
            self.generation[unit].store(new, Ordering::Release);
            // In one piece or two, or more than needed.
            let va = unit as u64 * UNIT;
            match random.below(3) {
                0 => drop(self.atc.purge(range(va, va + UNIT))),
                1 => {
                    self.atc.purge(range(va, va + PAGE));
                    self.atc.purge(range(va + PAGE, va + UNIT));
                }
                _ => drop(self.atc.purge(Purge::Space(ASID))),
            }
            self.floor[unit].store(new, Ordering::Release);
            // The old frame belongs to software again.
            self.stamp(frame(unit, old), POISON);
        }
    }

    fn engine(&self, ticket: usize) -> (u64, u64) {
        let mut engine = self.atc.engine().expect("engine");
        let mut random = Random(ticket as u64 + 77);
        let (mut found, mut refused) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let unit = random.below(UNITS as u64) as usize;
            let va = unit as u64 * UNIT + random.below(UNIT / PAGE) * PAGE;
            let floor = self.floor[unit].load(Ordering::Acquire);
            if let Ok(guard) = engine.access(ASID, va, 8, Access::Read) {
                let mut word = [0; 8];
                guard.read_into(&mut word);
                assert!(guard.tag() >= floor, "unit {unit}: {} after {floor}", guard.tag());
                assert_eq!(
                    u64::from_ne_bytes(word),
                    guard.tag(),
                    "unit {unit}, floor {floor}"
                );
                found += 1;
                continue;
            }
            self.atc.open_miss(ticket, ASID, va);
            let generation = self.generation[unit].load(Ordering::Acquire);
            let shift = if random.below(2) == 0 { 12 } else { UNIT_SHIFT };
            let filled = self.atc.fill(
                ticket,
                Fill {
                    tag: generation,
                    ..fill_at(va, frame(unit, generation) + size(shift).base(va % UNIT), shift)
                },
            );
            match filled {
                Ok(()) => {}
                Err(FillRefused::Killed | FillRefused::Purging) => refused += 1,
                Err(other) => panic!("{other}"),
            }
            self.atc.close_miss(ticket);
        }
        (found, refused)
    }
}

/// xorshift64*: reproducible per thread, no dependency.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

#[test]
fn test_s2_access_when_software_purges_all_the_time_never_finds_the_past() {
    storm(AtcConfig::default());
}

#[test]
fn test_sanitizer_when_software_purges_all_the_time_has_nothing_to_say() {
    let findings = storm(sanitized(Checks::ALL)).findings().expect("a sanitizer");
    assert_eq!(findings.reports, []);
    assert_eq!(findings.defects, 0);
    eprintln!("{} checked, {} unjudged", findings.checked, findings.unjudged);
    assert!(findings.checked > 0 && findings.unjudged < findings.checked / 100);
}

fn storm(config: AtcConfig) -> Arc<Atc> {
    let memory = UNITS as u64 * 2 * UNIT;
    let world = World {
        atc: atc_over(memory, config),
        generation: Default::default(),
        floor: Default::default(),
        stop: AtomicBool::new(false),
    };
    for unit in 0..UNITS {
        world.stamp(frame(unit, 0), 0);
    }
    let halves: Vec<usize> = (0..UNITS).collect();
    let (left, right) = halves.split_at(UNITS / 2);
    let world = &world;
    let (found, refused) = thread::scope(|scope| {
        let software = [
            scope.spawn(move || world.software(left, 1)),
            scope.spawn(move || world.software(right, 2)),
        ];
        let engines: Vec<_> = (0..ENGINES)
            .map(|ticket| scope.spawn(move || world.engine(ticket)))
            .collect();
        let end = Instant::now() + TIME;
        // A thread that has failed ends the run.
        while Instant::now() < end
            && !engines.iter().any(|e| e.is_finished())
            && !software.iter().any(|s| s.is_finished())
        {
            thread::park_timeout(Duration::from_millis(50));
        }
        world.stop.store(true, Ordering::Relaxed);
        for thread in software {
            thread.join().expect("software");
        }
        engines
            .into_iter()
            .map(|e| e.join().expect("engine"))
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    });
    let stats = world.atc.stats();
    eprintln!("{found} accesses, {refused} fills refused, {stats:?}");
    assert!(found > 0 && stats.purges > 0 && stats.entries_purged > 0);
    Arc::clone(&world.atc)
}
