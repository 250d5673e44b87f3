//! What tears tracked pages away.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use protos::gru::cb::{Instruction, XType};
use rustix::mm::{Advice, MprotectFlags};

use super::Kind;
use super::tracked::{Pages, Rules, Seen};
use crate::driver::{Gru, Gseg, Misses, Shape};
use crate::memory::{HUGE, PAGE, Region};
use crate::numbers::Numbers;

/// Pages of 4 KiB that are tracked.
const PAGES: usize = 32;
/// Huge pages.
const HUGE_PAGES: usize = 2;
const PAGE_WORDS: u64 = PAGE as u64 / 8;

/// One storm; how often it struck and what was seen meanwhile.
pub fn run(gru: &Gru, kind: Kind, misses: Misses, rounds: u64, seed: u64) -> Result<String> {
    let small: Vec<_> = (0..PAGES).map(|page| page * PAGE).collect();
    // At the ends, inside, and next to each other.
    let huge: Vec<_> = (0..HUGE_PAGES)
        .flat_map(|page| [0, 1, 2, 100, 101, 300, 510, 511].map(|i| page * HUGE + i * PAGE))
        .collect();
    let plain = Rules {
        vanish: false,
        alike: false,
        run: 4,
    };
    let single = Rules { run: 1, ..plain };
    let (region, offsets, rules) = match kind {
        Kind::Madvise | Kind::Memcg => (Region::anonymous(PAGES * PAGE)?, small, plain),
        Kind::Munmap | Kind::Mremap => (
            Region::anonymous(PAGES * PAGE)?,
            small,
            Rules {
                vanish: true,
                ..plain
            },
        ),
        Kind::Ksm => (
            Region::anonymous(PAGES * PAGE)?,
            small,
            Rules { alike: true, ..plain },
        ),
        Kind::Hugetlb => (
            Region::hugetlb(HUGE_PAGES * HUGE)?,
            huge,
            Rules {
                vanish: true,
                ..single
            },
        ),
        Kind::Thp => (Region::huge(HUGE_PAGES * HUGE)?, huge, single),
        Kind::Mprotect | Kind::Fork => bail!("{kind:?} is a storm of stores"),
    };
    let shape = Shape {
        misses,
        preload: 3,
        ..Shape::default()
    };
    let (reader, writer) = (gru.context(shape)?, gru.context(shape)?);
    if kind == Kind::Thp {
        region.fill(0, HUGE_PAGES * HUGE, 1);
    }
    let pages = Pages::new(&region, &offsets, rules);
    let mut storm = Storm::begin(kind, &pages, &region, &writer)?;

    let stop = AtomicBool::new(false);
    let mut numbers = Numbers::new(seed);
    let seen = std::thread::scope(|scope| -> Result<Seen> {
        let looking = scope.spawn(|| {
            let result = look(&pages, &reader, Numbers::new(seed ^ 0xf00), &stop);
            stop.store(true, Ordering::Release);
            result
        });
        let mut strike = || -> Result<()> {
            for round in 0..rounds {
                // While a copy runs, one after the other.
                let begun = pages.begun();
                while pages.begun() == begun && !stop.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                if stop.load(Ordering::Acquire) {
                    break;
                }
                storm
                    .strike(round, &mut numbers)
                    .with_context(|| format!("round {round}"))?;
            }
            Ok(())
        };
        let struck = strike();
        stop.store(true, Ordering::Release);
        let seen = looking.join().expect("no panic")?;
        struck?;
        Ok(seen)
    })?;
    ensure!(
        seen.copies > 0,
        "not one copy was compared: the test says nothing"
    );
    let what = storm.end()?;
    Ok(format!(
        "{misses:?}: {rounds} rounds, {} copies compared, {} found nothing{what}",
        seen.copies, seen.vanished
    ))
}

fn look(pages: &Pages<'_>, gseg: &Gseg<'_>, mut numbers: Numbers, stop: &AtomicBool) -> Result<Seen> {
    let into = Region::anonymous(4 * PAGE)?;
    let mut seen = Seen::default();
    loop {
        pages.look(gseg, &into, &mut numbers, &mut seen)?;
        if stop.load(Ordering::Acquire) {
            return Ok(seen);
        }
    }
}

struct Storm<'a> {
    kind: Kind,
    pages: &'a Pages<'a>,
    region: &'a Region,
    /// A context of the storm's own, for what it does with the GRU.
    gseg: &'a Gseg<'a>,
    /// Where pages come from (mremap).
    elsewhere: Option<Region>,
    cgroup: Option<PathBuf>,
    counted: u64,
    /// Huge pages were made of small ones.
    collapsed: u64,
}

impl<'a> Storm<'a> {
    fn begin(kind: Kind, pages: &'a Pages<'a>, region: &'a Region, gseg: &'a Gseg<'a>) -> Result<Self> {
        let mut storm = Self {
            kind,
            pages,
            region,
            gseg,
            elsewhere: None,
            cgroup: None,
            counted: 0,
            collapsed: 0,
        };
        match kind {
            Kind::Mremap => storm.elsewhere = Some(Region::anonymous(PAGES * PAGE)?),
            Kind::Ksm => {
                region.advise(0, PAGES * PAGE, Advice::LinuxMergeable)?;
                for (name, value) in [("sleep_millisecs", "0"), ("pages_to_scan", "1000"), ("run", "1")] {
                    let path = format!("/sys/kernel/mm/ksm/{name}");
                    fs::write(&path, value).with_context(|| path)?;
                }
            }
            Kind::Memcg => {
                let group = PathBuf::from("/sys/fs/cgroup/gru-guest");
                fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")
                    .context("the memory controller: is cgroup2 mounted on /sys/fs/cgroup?")?;
                fs::create_dir_all(&group).with_context(|| group.display().to_string())?;
                fs::write(group.join("cgroup.procs"), std::process::id().to_string())
                    .context("moving into the cgroup")?;
                storm.cgroup = Some(group);
                storm.counted = swapped_out()?;
            }
            _ => {}
        }
        Ok(storm)
    }

    fn strike(&mut self, round: u64, numbers: &mut Numbers) -> Result<()> {
        let (pages, region) = (self.pages, self.region);
        let page = numbers.below(pages.len());
        let offset = pages.offset(page);
        match self.kind {
            Kind::Madvise => pages.change(page, || region.advise(offset, PAGE, Advice::LinuxDontNeed)),
            Kind::Munmap => pages.change(page, || {
                region.unmap(offset, PAGE)?;
                region.remap_anonymous(offset, PAGE)
            }),
            Kind::Mremap => self.move_in(page),
            Kind::Hugetlb => {
                let huge = offset / HUGE * HUGE;
                let all: Vec<_> = (0..pages.len())
                    .filter(|&p| pages.offset(p) / HUGE * HUGE == huge)
                    .collect();
                pages.change_all(&all, || match round % 2 {
                    0 => region.advise(huge, HUGE, Advice::LinuxDontNeed),
                    _ => {
                        region.unmap(huge, HUGE)?;
                        region.remap_hugetlb(huge, HUGE)
                    }
                })
            }
            Kind::Thp => self.split(round, page),
            Kind::Ksm => self.part(round, page),
            Kind::Memcg => self.reclaim(round, page),
            Kind::Mprotect | Kind::Fork => unreachable!("refused at the beginning"),
        }
    }

    /// A page that the GRU itself has written moves over a tracked one. Where it was, there is new memory then.
    fn move_in(&self, page: usize) -> Result<()> {
        let from = self.elsewhere.as_ref().expect("made at the beginning");
        let offset = self.pages.offset(page);
        self.pages.change_by(page, |word| {
            self.set(from.va(offset), word)?;
            from.move_to(offset, PAGE, self.region, offset)?;
            from.remap_anonymous(offset, PAGE)
        })?;
        self.gseg
            .run(0, &Instruction::vload(from.va(offset), 0, XType::DWORD, 8, 64))?
            .done()?;
        ensure!(
            self.gseg.read_ds(0, 8) == [0; 8],
            "STALE: the GRU still finds the page that was moved away from {page}"
        );
        Ok(())
    }

    /// Huge pages lose a page, are cut by mprotect, and are made whole again.
    fn split(&mut self, round: u64, page: usize) -> Result<()> {
        let (pages, region) = (self.pages, self.region);
        let offset = pages.offset(page);
        match round % 4 {
            0 => pages.change(page, || region.advise(offset, PAGE, Advice::LinuxDontNeed)),
            1 => pages.change(page, || {
                region.protect(offset, PAGE, MprotectFlags::READ)?;
                region.protect(offset, PAGE, MprotectFlags::READ | MprotectFlags::WRITE)
            }),
            2 => pages.change_by(page, |word| self.set(region.va(offset), word)),
            _ => {
                // Contents stay.
                let huge = offset / HUGE * HUGE;
                if region.collapse(huge, HUGE).is_ok() {
                    self.collapsed += 1;
                }
                Ok(())
            }
        }
    }

    /// Pages that were merged are written: each must get its own copy, and the others keep theirs.
    fn part(&mut self, round: u64, page: usize) -> Result<()> {
        let (pages, region) = (self.pages, self.region);
        let offset = pages.offset(page);
        match round % 2 {
            0 => pages.change(page, || Ok(()))?,
            _ => pages.change_by(page, |word| self.set(region.va(offset), word))?,
        }
        if round % 8 == 7 {
            // All in step again, so that there is something to merge.
            let most = (0..pages.len()).map(|p| pages.next(p)).max().expect("not empty");
            for page in 0..pages.len() {
                while pages.next(page) < most {
                    pages.change(page, || Ok(()))?;
                }
            }
            let before = scans()?;
            while scans()? < before + 2 {
                std::thread::yield_now();
            }
            self.counted = self.counted.max(number("/sys/kernel/mm/ksm/pages_sharing")?);
        }
        Ok(())
    }

    fn reclaim(&self, round: u64, page: usize) -> Result<()> {
        let group = self.cgroup.as_ref().expect("made at the beginning");
        match round % 3 {
            0 => {
                // EAGAIN: less than that could be had.
                match fs::write(group.join("memory.reclaim"), "1M") {
                    Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => {
                        Err(error).context("memory.reclaim")
                    }
                    _ => Ok(()),
                }
            }
            1 => self
                .region
                .advise(self.pages.offset(page), PAGE, Advice::LinuxPageOut),
            _ => self.pages.change(page, || Ok(())),
        }
    }

    /// Writes a page with the GRU.
    fn set(&self, va: u64, word: u64) -> Result<()> {
        self.gseg
            .run(1, &Instruction::vset(va, word, XType::DWORD, PAGE_WORDS, 1))?
            .done()
            .with_context(|| format!("GRU stores to {va:#x}"))?;
        Ok(())
    }

    fn end(self) -> Result<String> {
        Ok(match self.kind {
            Kind::Thp => {
                ensure!(
                    self.collapsed > 0,
                    "no huge page was ever made: the test says nothing"
                );
                format!(", {} times collapsed", self.collapsed)
            }
            Kind::Ksm => {
                fs::write("/sys/kernel/mm/ksm/run", "0").context("stopping KSM")?;
                ensure!(self.counted > 0, "no page was ever merged: the test says nothing");
                format!(", up to {} pages merged", self.counted)
            }
            Kind::Memcg => {
                let pages = swapped_out()? - self.counted;
                ensure!(
                    pages > 0,
                    "nothing was swapped out (is there swap?): the test says nothing"
                );
                format!(", {pages} pages swapped out")
            }
            _ => String::new(),
        })
    }
}

fn number(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    text.trim().parse().with_context(|| format!("{path}: {text}"))
}

fn scans() -> Result<u64> {
    number("/sys/kernel/mm/ksm/full_scans")
}

fn swapped_out() -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("/proc/vmstat")?;
    text.lines()
        .find_map(|line| line.strip_prefix("pswpout ")?.parse().ok())
        .context("no pswpout in /proc/vmstat")
}
