//! TLB misses: TFM, TFH and the service thread (sections 3 and 6).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use protos::gru::map::{self, CBRS, CHIPLETS};
use protos::gru::{HandleStatus, cb, cbe, cch, page_size, tfh};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::chiplet::Loaded;
use super::core::{Core, cbrs_of, gseg, handle, lock};
use super::error::HandleKind;
use super::mm::{Fault, Translation};
use super::window::Device;

/// Largest page that is entered: the device keeps sizes up to 1 GiB.
const LARGEST_SHIFT: u8 = 30;
const SMALL_PAGE: u64 = 4096;

/// A non-blocking eventfd.
pub(crate) fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Who looks at a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// The interrupt: fault-map misses only.
    Interrupt,
    /// The deferred list: whatever was put there.
    Deferred,
    /// The user's call: user-polling misses only.
    User,
    /// The user's call, after the context was given an ASID.
    UserAfterUpdate,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answered,
    Deferred,
    Nothing,
    /// The miss carries no ASID and waits in user-polling state.
    NoAsid,
}

/// A miss under its context's lock: it stays the same miss until it is answered.
struct Miss<'a> {
    core: &'a Core,
    loaded: &'a Loaded,
    chiplet: usize,
    cbr: usize,
    /// Offset of the TFH.
    at: u64,
    control: tfh::Control,
    vaddr: u64,
    asid: u32,
    write: bool,
}

/// Looks at the miss of a CBR, if there is one, and answers it.
pub(crate) fn serve(core: &Core, chiplet: usize, cbr: usize, who: Who) -> io::Result<Outcome> {
    let at = handle(chiplet, map::TFH, cbr);
    let counters = &core.window.counters;
    let control =
        || -> io::Result<tfh::Control> { Ok(tfh::Control::from_bits(core.window.load(at + tfh::CONTROL)?)) };
    let context = usize::from(control()?.ctxnum());
    let guard = lock(&core.chiplets[chiplet].slots[context].loaded);
    // Again, under the lock: the CBR may have changed hands since.
    let control = control()?;
    let owner = guard
        .as_ref()
        .filter(|l| usize::from(control.ctxnum()) == context && map::logical_cb(l.cbr_map, cbr).is_some());
    let (Some(loaded), HandleStatus::EXCEPTION) = (owner, control.status()) else {
        counters.faults_spurious.one();
        return Ok(Outcome::Nothing);
    };
    let mine = match control.state() {
        tfh::State::MISS_FMM => matches!(who, Who::Interrupt | Who::Deferred),
        tfh::State::MISS_UPM => who != Who::Interrupt,
        tfh::State::HW_ERR => true,
        _ => false,
    };
    if !mine {
        counters.faults_spurious.one();
        return Ok(Outcome::Nothing);
    }
    let miss = Miss {
        core,
        loaded,
        chiplet,
        cbr,
        at,
        control,
        vaddr: core.window.load(at + tfh::MISSVADDR)?,
        asid: tfh::Asids::from_bits(core.window.load(at + tfh::ASIDS)?).missasid(),
        write: tfh::is_write(control.cause()),
    };
    miss.answer(who)
}

impl Miss<'_> {
    fn answer(&self, who: Who) -> io::Result<Outcome> {
        let space = &self.loaded.space;
        let counters = &self.core.window.counters;
        let hardware = !matches!(self.control.cause(), tfh::Cause::TLB_MISS | tfh::Cause::TLB_MOD);
        if self.loaded.closing || hardware || self.control.state() == tfh::State::HW_ERR {
            return self.bad();
        }
        if self.asid == 0 {
            return match who {
                Who::User => Ok(Outcome::NoAsid),
                Who::UserAfterUpdate => self.restart(),
                Who::Interrupt | Who::Deferred => {
                    // The context cannot be stopped while a fault-map miss waits (section 17.4), and it has
                    // to be stopped to get an ASID: its user shall call.
                    counters.faults_to_user.one();
                    self.command(tfh::Opc::USER_POLLING_MODE)?;
                    Ok(Outcome::Answered)
                }
            };
        }
        let region = cch::region_of(self.vaddr);
        // Before the look-up, so that a flush that follows it covers the region.
        space.regions.fetch_or(1 << region, Ordering::SeqCst);
        let retries = space.retries.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // After the miss is known to the device: a close that comes later flushes, which kills it.
        if space.closed.load(Ordering::SeqCst) {
            return self.bad();
        }
        let track = space.trackers[self.chiplet].get();
        if self.asid != track.asid + region as u32 {
            // The context was given another ASID since; an entry under the old one would be of no use.
            return self.restart();
        }
        match space.pager.fault(self.vaddr, self.write) {
            Fault::Page(page) if page.writable || !self.write => {
                self.preload()?;
                self.activate()?;
                counters.fills.one();
                counters.faults_served.one();
                self.fill(self.vaddr, page, tfh::Opc::WRITE_RESTART)?;
                Ok(Outcome::Answered)
            }
            Fault::Page(_) | Fault::Bad => self.bad(),
            Fault::Retry => {
                self.defer(retries)?;
                Ok(Outcome::Deferred)
            }
        }
    }

    /// Puts the miss on the deferred list.
    fn defer(&self, retries: u64) -> io::Result<()> {
        let space = &self.loaded.space;
        // A user that polls must not call again and again: to its eyes the instruction runs.
        self.activate()?;
        self.core.window.counters.faults_deferred.one();
        self.core.chiplets[self.chiplet].deferred.insert(self.cbr);
        space.has_deferred.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // A retry that ran between the pager's answer and the list has not seen the list.
        if space.retries.load(Ordering::SeqCst) != retries && space.has_deferred.swap(false, Ordering::SeqCst)
        {
            self.core.kick();
        }
        Ok(())
    }

    /// A user-polling miss shows CALL_OS in the control block; before it is answered the block goes back to
    /// ACTIVE (section 6.1 j). Nobody else changes the block while the miss waits.
    fn activate(&self) -> io::Result<()> {
        if self.control.state() != tfh::State::MISS_UPM {
            return Ok(());
        }
        let logical = map::logical_cb(self.loaded.cbr_map, self.cbr).expect("checked by serve");
        let context = usize::from(self.control.ctxnum());
        let at = gseg(self.chiplet, context) + map::GSEG_CB + logical as u64 * map::HANDLE_STRIDE;
        let window = &self.core.window;
        let old = cb::Control::from_bits(window.load(at)?);
        if old.istatus() != cb::Status::CALL_OS {
            return Ok(());
        }
        let new = old.with_istatus(cb::Status::ACTIVE).with_icmd(false);
        window.replace(at, old.into_bits(), new.into_bits())
    }

    /// Stores a translation and the command. `va`: any address in the page.
    fn fill(&self, va: u64, page: Translation, opc: tfh::Opc) -> io::Result<Device> {
        let (code, iova) = entry(va, page);
        let asids = tfh::Asids::new()
            .with_missasid(self.asid)
            .with_fillasid(self.asid)
            .with_dirty(page.writable)
            .with_gaa(tfh::GAA_RAM);
        let target = tfh::Target::new().with_pfn(iova >> 12).with_pagesize(code);
        let window = &self.core.window;
        window.store(self.at + tfh::ASIDS, asids.into_bits())?;
        window.store(self.at + tfh::TARGET, target.into_bits())?;
        window.store(self.at + tfh::FILLVADDR, va)?;
        window.store(self.at + tfh::FILLTAG, page.generation)?;
        self.command(opc)
    }

    /// DW0, stored absolutely: or-ing ACTIVE into a status of EXCEPTION would give 3 (section 17.1).
    fn command(&self, opc: tfh::Opc) -> io::Result<Device> {
        let word = self
            .control
            .with_opc(opc)
            .with_cmd(true)
            .with_status(HandleStatus::ACTIVE);
        self.core.window.start(self.at + tfh::CONTROL, word.into_bits())
    }

    fn restart(&self) -> io::Result<Outcome> {
        let counters = &self.core.window.counters;
        counters.faults_restarted.one();
        counters.faults_served.one();
        self.activate()?;
        self.command(tfh::Opc::RESTART)?;
        Ok(Outcome::Answered)
    }

    fn bad(&self) -> io::Result<Outcome> {
        let counters = &self.core.window.counters;
        counters.faults_bad.one();
        counters.faults_served.one();
        self.command(tfh::Opc::EXCEPTION)?;
        Ok(Outcome::Answered)
    }

    /// Enters the pages behind the missing one that a BCOPY is going to need, highest address first
    /// (sections 6.1 i and 17.7). The kill bit covers these fills like the miss itself.
    fn preload(&self) -> io::Result<()> {
        let limit = u64::from(self.core.options.preload);
        if limit == 0 {
            return Ok(());
        }
        let cbe = handle(self.chiplet, map::CBE, self.cbr);
        let word = |offset| self.core.window.load(cbe + offset);
        let copied = cbe::Copied::from_bits(word(cbe::COPY)?);
        if copied.opc() != cb::Opc::BCOPY {
            return Ok(());
        }
        let bytes = if word(cbe::IDEF1UPD)? == self.vaddr {
            word(cbe::IDEF6CPY)?.checked_mul(64)
        } else if word(cbe::IDEF3UPD)? == self.vaddr {
            let size = copied.xtype().bytes().unwrap_or(1);
            word(cbe::IDEF5UPD)?.checked_mul(size)
        } else {
            return Ok(());
        };
        let page = |va: u64| va & !(SMALL_PAGE - 1);
        let first = page(self.vaddr);
        // Both values are the device's: a sum that overflows is no transfer to prepare for.
        let Some(last) = bytes
            .filter(|b| *b > 0)
            .and_then(|b| self.vaddr.checked_add(b - 1))
        else {
            return Ok(());
        };
        let Some(reach) = first.checked_add(limit * SMALL_PAGE) else {
            return Ok(());
        };
        let mut va = page(last).min(reach);
        while va > first && cch::region_of(va) == cch::region_of(first) {
            let Fault::Page(found) = self.loaded.space.pager.fault(va, self.write) else {
                return Ok(());
            };
            if self.write && !found.writable {
                return Ok(());
            }
            let device = self.fill(va, found, tfh::Opc::WRITE_ONLY)?;
            let answer = self
                .core
                .wait(HandleKind::Tfh, self.chiplet, self.cbr, device)
                .map_err(io::Error::other)?;
            if tfh::Control::from_bits(answer).status() == HandleStatus::EXCEPTION {
                // Killed by a flush, or not enterable: what is behind it would be of no use either.
                return Ok(());
            }
            self.core.window.counters.preloads.one();
            va -= SMALL_PAGE;
        }
        Ok(())
    }
}

/// Page-size code and IOVA of the entry for `va`: the page itself, or the part of it that is the largest
/// size the GRU knows.
fn entry(va: u64, page: Translation) -> (u8, u64) {
    let wanted = page.page_shift.clamp(12, 63);
    let base = page.iova & !((1u64 << wanted) - 1);
    let inside = va & ((1u64 << wanted) - 1);
    let (shift, code) = (12..=wanted.min(LARGEST_SHIFT))
        .rev()
        .find_map(|s| Some((s, page_size::code_of_shift(s)?)))
        .expect("4 KiB has a code");
    (code, base + (inside & !((1u64 << shift) - 1)))
}

/// Vector `chiplet * 16 + fault map`, and its eventfd.
#[derive(Debug)]
pub(crate) struct Vector {
    pub(crate) chiplet: usize,
    pub(crate) fault_map: usize,
    pub(crate) event: OwnedFd,
}

/// The service thread: waits for vectors and for `Core::kick`, until `Core::stop`.
pub(crate) fn run(core: &Arc<Core>, vectors: &[Vector]) {
    let fds: Vec<BorrowedFd<'_>> = std::iter::once(core.kick.as_fd())
        .chain(vectors.iter().map(|v| v.event.as_fd()))
        .collect();
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => {
                tracing::error!("GRU fault service: poll: {e}; misses are not served any more");
                return;
            }
        }
        if core.stop.load(Ordering::Acquire) {
            return;
        }
        let result = round(core, vectors, &fds, &polled);
        if let Err(e) = result {
            if core.is_gone() || !core.window.backing().alive() {
                tracing::info!("GRU fault service ends: {e}");
                return;
            }
            tracing::warn!("GRU fault service: {e}");
        }
    }
}

/// Serves whatever has been signalled.
fn round(core: &Core, vectors: &[Vector], fds: &[BorrowedFd<'_>], polled: &[PollFd<'_>]) -> io::Result<()> {
    let mut first_error = Ok(());
    // One miss that cannot be served must not keep the others from it.
    let mut keep = |result: io::Result<()>| {
        if let Err(e) = result
            && first_error.is_ok()
        {
            first_error = Err(e);
        }
    };
    for (i, fd) in polled.iter().enumerate() {
        if !fd.revents().contains(PollFlags::IN) {
            continue;
        }
        // Before the work: a signal that comes during it is seen in the next round.
        drain(fds[i]);
        if i == 0 {
            for chiplet in 0..CHIPLETS {
                let deferred = core.chiplets[chiplet].deferred.take();
                keep(serve_all(core, chiplet, deferred, Who::Deferred));
            }
        } else {
            let vector = &vectors[i - 1];
            core.window.counters.interrupts.one();
            let at = handle(vector.chiplet, map::TFM, vector.fault_map) + map::tfm::FAULT_BITS;
            let mut bits = [0; CBRS / 64];
            for (w, word) in bits.iter_mut().enumerate() {
                match core.window.take(at + 8 * w as u64) {
                    Ok(taken) => *word = taken,
                    Err(e) => keep(Err(e)),
                }
            }
            keep(serve_all(core, vector.chiplet, bits, Who::Interrupt));
        }
    }
    first_error
}

fn serve_all(core: &Core, chiplet: usize, bits: [u64; CBRS / 64], who: Who) -> io::Result<()> {
    let mut result = Ok(());
    for cbr in cbrs_of(bits) {
        result = result.and(serve(core, chiplet, cbr, who).map(drop));
    }
    result
}

/// Takes an eventfd's count. Nothing to take is no error: poll may wake without reason.
fn drain(fd: BorrowedFd<'_>) {
    let mut count = [0; 8];
    let _ = rustix::io::read(fd, &mut count);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(iova: u64, page_shift: u8) -> Translation {
        Translation {
            iova,
            page_shift,
            writable: true,
            generation: 0,
        }
    }

    #[test]
    fn test_entry_when_size_is_known_uses_the_whole_page() {
        assert_eq!(entry(0x7000_1234, page(0x1000_0000, 12)), (0, 0x1000_0000));
        assert_eq!(entry(0x7012_3456, page(0x4000_0000, 21)), (5, 0x4000_0000));
        assert_eq!(entry(0x7012_3456, page(0x4012_3456, 21)), (5, 0x4000_0000));
    }

    #[test]
    fn test_entry_when_size_is_unknown_uses_the_part_that_holds_the_address() {
        // 8 KiB: the GRU knows 4 KiB and 16 KiB.
        assert_eq!(entry(0x3000, page(0x1_0000, 13)), (0, 0x1_1000));
        // 4 GiB is larger than what is kept: the right gigabyte of it.
        let two_gib = 2u64 << 30;
        assert_eq!(entry(two_gib + 5, page(1 << 40, 32)), (10, (1 << 40) + two_gib));
    }

    #[test]
    fn test_cbrs_when_bits_are_set_are_listed_in_order() {
        assert_eq!(cbrs_of([1 << 63 | 1, 2]).collect::<Vec<_>>(), [0, 63, 65]);
    }
}
