//! One mode and one size: the life of a buffer that an HCA reaches, step by step, over and over.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use verbs::cache::{Cache, Registrar};
use verbs::{Buffer, Direction, Paging, Pattern, ProtectionDomain, Region, Remote, page_size};

use super::device::Hca;
use super::floors::Floors;
use super::options::RegisterArgs;
use super::report::Skipped;
use super::samples::{Operation, Samples};
use super::staging::Cut;
use super::{Effort, Mode};
use crate::stop::Stop;

/// Other regions in the cache, where a hit is looked for.
const OTHERS: usize = 255;
/// Look-ups of one sample: one alone is too short for a clock.
const LOOKUPS: u32 = 64;
/// Samples that there are in any case.
const LEAST: u32 = 3;

/// A cell of the table.
#[derive(Debug)]
pub struct Cell {
    mode: Option<Mode>,
    size: usize,
    pages: verbs::Pages,
    seed: u64,
    /// What has been measured.
    pub samples: Samples,
    /// What could not be.
    pub skipped: Vec<Skipped>,
    /// Transfers that moved wrong data.
    pub wrong: Vec<String>,
    /// Bytes that were compared with what they should be.
    pub verified_bytes: u64,
    doing: Option<Operation>,
    salt: usize,
}

/// What belongs to the measured buffer.
struct Subject {
    buffer: Rc<Buffer>,
    /// In the mode `Cache`.
    cache: Option<Cache<Registry>>,
}

/// Registers parts of two buffers for a cache.
struct Registry {
    domain: ProtectionDomain,
    buffers: [Rc<Buffer>; 2],
}

impl Registrar for Registry {
    type Region = Region;
    type Error = verbs::Error;
    fn register(&mut self, range: Range<usize>) -> Result<Region, verbs::Error> {
        let buffer = self
            .buffers
            .iter()
            .find(|b| (b.address()..b.address() + b.length()).contains(&range.start))
            .expect("the cache is only asked for these buffers");
        self.domain.register(
            buffer,
            range.start - buffer.address(),
            range.len(),
            Paging::Pinned,
        )
    }
}

impl Cell {
    /// Nothing measured yet. Without a mode: the floors.
    pub fn new(args: &RegisterArgs, mode: Option<Mode>, size: u64) -> Self {
        Self {
            mode,
            // Sizes are at most 1 TiB.
            size: size as usize,
            pages: args.pages.into(),
            seed: args.seed,
            samples: Samples::default(),
            skipped: Vec::new(),
            wrong: Vec::new(),
            verified_bytes: 0,
            doing: None,
            salt: 0,
        }
    }

    /// What was being done when an error came.
    pub fn doing(&self) -> Option<Operation> {
        self.doing
    }

    /// Iterations until there are enough samples or the budget is spent.
    ///
    /// # Errors
    /// What the device or the kernel refused, while [`doing`](Self::doing) that. What was measured before stays.
    pub fn measure(&mut self, mut hca: Option<&mut Hca>, effort: Effort, stop: &Stop) -> Result<()> {
        let cut = match &hca {
            Some(hca) => hca.staging.cut,
            None => Cut::new(u32::MAX, self.seed),
        };
        let mut floors = Floors::new(self.size, self.pages, cut)?;
        let file: OwnedFd = match &hca {
            Some(hca) => hca.domain.context().as_fd().try_clone_to_owned()?,
            None => rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?,
        };
        let mut subject = match (&hca, self.mode) {
            (Some(hca), Some(mode)) => Some(self.subject(hca, mode)?),
            _ => None,
        };
        let begin = Instant::now();
        let (mut done, mut warm) = (0, false);
        while !stop.requested() && !enough(done, begin.elapsed(), effort) {
            self.samples.next_iteration();
            // Neither side always follows the other one.
            for floor in [done % 2 == 0, done % 2 != 0] {
                match (floor, hca.as_deref_mut(), &mut subject, self.mode) {
                    (true, ..) => {
                        self.doing = None;
                        floors.measure(&mut self.samples, file.as_fd())?;
                    }
                    (false, Some(hca), Some(subject), Some(mode)) => self.iteration(hca, subject, mode)?,
                    (false, ..) => {}
                }
            }
            done += 1;
            if !warm && begin.elapsed() < effort.budget / 4 {
                // Page tables, the libraries' own memory, the device's caches: not what a second time costs.
                self.samples.clear();
                done = 0;
            }
            warm = true;
        }
        if let Some(reason) = floors.no_lock {
            self.skip(Some(Operation::Lock), reason);
        }
        Ok(())
    }

    fn subject(&mut self, hca: &Hca, mode: Mode) -> Result<Subject> {
        let buffer = Rc::new(Buffer::map(self.size, self.pages).context("the measured memory")?);
        buffer.populate().context("the measured memory")?;
        let cache = match mode {
            Mode::Cache => {
                self.doing = Some(Operation::CacheMiss);
                Some(self.cache(hca, &buffer)?)
            }
            _ => None,
        };
        Ok(Subject { buffer, cache })
    }

    /// A cache with other regions in it.
    fn cache(&mut self, hca: &Hca, buffer: &Rc<Buffer>) -> Result<Cache<Registry>> {
        let page = page_size();
        // Every other page, so that they stay apart.
        let others = Rc::new(Buffer::map(2 * OTHERS * page, verbs::Pages::Small).context("other regions")?);
        let registry = Registry {
            domain: hca.domain.clone(),
            buffers: [Rc::clone(buffer), Rc::clone(&others)],
        };
        let mut cache = Cache::new(registry, page, usize::MAX);
        for index in 0..OTHERS {
            cache.get(others.address() + 2 * index * page, page)?;
        }
        Ok(cache)
    }

    fn iteration(&mut self, hca: &mut Hca, subject: &mut Subject, mode: Mode) -> Result<()> {
        let Subject { buffer, cache } = subject;
        if let Some(cache) = cache {
            return self.cached(hca, buffer, cache);
        }
        self.written(hca, buffer, mode)?;
        if hca.can_read(mode) {
            self.read(hca, buffer, mode)?;
        } else {
            self.skip(
                Some(Operation::FirstTouchRead),
                format!(
                    "{} has no on-demand paging for RDMA READ by RC (rc_odp_caps)",
                    hca.facts.name
                ),
            );
        }
        if mode == Mode::Pinned {
            buffer.discard().context("MADV_DONTNEED")?;
            let region = self.timed(Operation::RegisterUnpopulated, || register(hca, buffer, mode))?;
            region.deregister()?;
        }
        self.doing = None;
        Ok(())
    }

    /// WRITEs to it.
    fn written(&mut self, hca: &mut Hca, buffer: &Rc<Buffer>, mode: Mode) -> Result<()> {
        buffer.populate().context("the measured memory")?;
        let region = self.timed(Operation::Register, || register(hca, buffer, mode))?;
        if mode == Mode::Prefetched {
            self.timed(Operation::Prefetch, || prefetch(&region, buffer))?;
        }
        for operation in [Operation::FirstTouchWrite, Operation::WarmWrite] {
            let salt = self.next_salt();
            self.timed(operation, || write(hca, &region, buffer, salt))?;
            self.verify_write(operation, hca, buffer, salt);
        }
        let kept = self.timed(Operation::Invalidate, || discard(region, buffer, mode))?;
        let salt = self.next_salt();
        let region = self.timed(Operation::RefaultWrite, || {
            let region = renew(kept, hca, buffer, mode)?;
            write(hca, &region, buffer, salt)?;
            Ok(region)
        })?;
        self.verify_write(Operation::RefaultWrite, hca, buffer, salt);
        self.timed(Operation::Deregister, || Ok(region.deregister()?))
    }

    /// READs from it.
    fn read(&mut self, hca: &mut Hca, buffer: &Rc<Buffer>, mode: Mode) -> Result<()> {
        let pattern = Pattern::new(self.seed.wrapping_add(self.next_salt() as u64));
        buffer.fill(pattern);
        self.doing = Some(Operation::FirstTouchRead);
        let region = register(hca, buffer, mode)?;
        if mode == Mode::Prefetched {
            prefetch(&region, buffer)?;
        }
        for operation in [Operation::FirstTouchRead, Operation::WarmRead] {
            self.timed(operation, || read(hca, &region, buffer))?;
            self.verify_read(operation, hca, |word| pattern.word(word));
        }
        self.doing = Some(Operation::RefaultRead);
        let kept = discard(region, buffer, mode)?;
        let region = self.timed(Operation::RefaultRead, || {
            let region = renew(kept, hca, buffer, mode)?;
            read(hca, &region, buffer)?;
            Ok(region)
        })?;
        self.verify_read(Operation::RefaultRead, hca, |_| 0);
        Ok(region.deregister()?)
    }

    /// What a program with a registration cache does.
    fn cached(&mut self, hca: &mut Hca, buffer: &Rc<Buffer>, cache: &mut Cache<Registry>) -> Result<()> {
        let (address, length) = (buffer.address(), buffer.length());
        buffer.populate().context("the measured memory")?;
        let region = self.timed(Operation::CacheMiss, || Ok(cache.get(address, length)?))?;
        self.doing = Some(Operation::CacheHit);
        let begin = Instant::now();
        for _ in 0..LOOKUPS {
            // Used, or it would not have to be done.
            std::hint::black_box(cache.get(address, length)?);
        }
        self.samples
            .record(Operation::CacheHit, begin.elapsed() / LOOKUPS);
        let salt = self.next_salt();
        self.doing = Some(Operation::RefaultWrite);
        write(hca, &region, buffer, salt)?;
        drop(region);
        self.timed(Operation::Invalidate, || {
            let used = cache.invalidate(address, length);
            assert_eq!(used, 0, "a region of the cache is in use");
            buffer.discard().context("MADV_DONTNEED")
        })?;
        let salt = self.next_salt();
        self.timed(Operation::RefaultWrite, || {
            let region = cache.get(address, length)?;
            write(hca, &region, buffer, salt)
        })?;
        self.verify_write(Operation::RefaultWrite, hca, buffer, salt);
        cache.invalidate(address, length);
        let counters = cache.counters();
        assert_eq!(
            (counters.hits % u64::from(LOOKUPS), counters.evictions),
            (0, 0),
            "the cache did something else than was measured: {counters:?}"
        );
        Ok(())
    }

    fn timed<T>(&mut self, operation: Operation, step: impl FnOnce() -> Result<T>) -> Result<T> {
        self.doing = Some(operation);
        self.samples.time(operation, step)
    }

    /// Contents that the memory does not have yet.
    fn next_salt(&mut self) -> usize {
        self.salt += 1;
        self.salt
    }

    fn verify_write(&mut self, operation: Operation, hca: &Hca, buffer: &Buffer, salt: usize) {
        let wrong = hca.staging.cut.first_wrong(buffer, buffer.length(), salt);
        self.verified(operation, buffer.length(), wrong);
    }

    fn verify_read(&mut self, operation: Operation, hca: &Hca, expected: impl Fn(usize) -> u64) {
        let (compared, wrong) = hca.staging.first_wrong_read(self.size, expected);
        self.verified(operation, compared, wrong);
    }

    fn verified(&mut self, operation: Operation, compared: usize, wrong: Option<usize>) {
        self.verified_bytes += compared as u64;
        if let Some(offset) = wrong {
            self.wrong.push(format!(
                "{}, {} bytes, {}: offset {offset:#x} is not what it should be",
                self.mode.map_or("floor", Mode::label),
                self.size,
                operation.label()
            ));
        }
    }

    /// Says once that something is missing.
    fn skip(&mut self, operation: Option<Operation>, reason: String) {
        let new = Skipped {
            mode: self.mode,
            size_bytes: Some(self.size as u64),
            operation,
            reason,
        };
        if !self.skipped.contains(&new) {
            self.skipped.push(new);
        }
    }
}

/// Whether there are enough samples, or no time for more.
fn enough(done: u32, spent: Duration, effort: Effort) -> bool {
    let least = match spent > effort.budget * 4 {
        true => 1,
        false => LEAST.min(effort.samples),
    };
    done >= effort.samples || (done >= least && spent >= effort.budget)
}

fn register(hca: &Hca, buffer: &Rc<Buffer>, mode: Mode) -> Result<Region> {
    let whole = |paging| hca.domain.register(buffer, 0, buffer.length(), paging);
    Ok(match mode {
        Mode::Pinned | Mode::Cache => whole(Paging::Pinned)?,
        Mode::OnDemand | Mode::Prefetched => whole(Paging::OnDemand)?,
        Mode::Implicit => hca.domain.register_everything()?,
    })
}

fn prefetch(region: &Region, buffer: &Buffer) -> Result<()> {
    Ok(region.prefetch(buffer.address(), buffer.length())?)
}

/// The program gives the pages back. A pinned region has to end before that: it would keep the old pages, and the
/// program would never see what the HCA writes to them.
fn discard(region: Region, buffer: &Buffer, mode: Mode) -> Result<Option<Region>> {
    let kept = match mode {
        Mode::Pinned | Mode::Cache => {
            region.deregister()?;
            None
        }
        Mode::OnDemand | Mode::Prefetched | Mode::Implicit => Some(region),
    };
    buffer.discard().context("MADV_DONTNEED")?;
    Ok(kept)
}

/// What a program does before the HCA may reach that memory again.
fn renew(kept: Option<Region>, hca: &Hca, buffer: &Rc<Buffer>, mode: Mode) -> Result<Region> {
    let Some(region) = kept else {
        return register(hca, buffer, mode);
    };
    if mode == Mode::Prefetched {
        prefetch(&region, buffer)?;
    }
    Ok(region)
}

fn write(hca: &mut Hca, region: &Region, buffer: &Buffer, salt: usize) -> Result<()> {
    let transfers = hca.staging.cut.writes(buffer.length(), salt);
    let remote = Remote { region, buffer };
    Ok(hca
        .pair
        .transfer(Direction::Write, &hca.staging.source, remote, transfers)?)
}

fn read(hca: &mut Hca, region: &Region, buffer: &Buffer) -> Result<()> {
    let transfers = hca.staging.reads(buffer.length());
    let remote = Remote { region, buffer };
    Ok(hca
        .pair
        .transfer(Direction::Read, &hca.staging.sink, remote, transfers)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_enough_when_the_budget_is_spent_needs_few_samples() {
        let effort = Effort {
            samples: 100,
            budget: Duration::from_secs(2),
        };
        let after = |done, seconds| enough(done, Duration::from_secs(seconds), effort);
        assert!(!after(0, 100), "one there is always");
        assert!(!after(99, 1) && after(100, 1));
        assert!(!after(2, 3) && after(3, 3));
        assert!(after(1, 9), "an iteration of that length is not repeated");
        let one = Effort { samples: 1, ..effort };
        assert!(enough(1, Duration::ZERO, one));
    }
}
