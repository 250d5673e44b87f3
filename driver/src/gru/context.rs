//! CCH: loading, changing and unloading contexts (section 5.1).

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use protos::gru::map::{self, CBRS, CHIPLETS, CONTEXTS, DSR_BYTES, HANDLE_BYTES, HANDLE_STRIDE};
use protos::gru::{HandleStatus, cbe, cch};

use super::asid::Track;
use super::chiplet::{Grant, Loaded, control_of};
use super::core::{Core, gseg, handle, lock};
use super::error::{GruError, HandleKind};
use super::mm::{Mm, Space};
use super::user::{Gseg, GsegAccess};
use super::{fault, flush};

/// How misses of a context are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FaultMode {
    /// Fault map and interrupt: the driver's service answers them.
    #[default]
    Interrupt,
    /// The control block goes to CALL_OS and its user calls [`Context::call_os`].
    UserPolling,
}

/// What a context shall have.
#[derive(Debug, Clone, Copy)]
pub struct ContextOptions {
    /// Control blocks: 1 to 128, rounded up to a multiple of 2.
    pub cbs: usize,
    /// Data segment bytes: 0 to 32768, rounded up to a multiple of 1024.
    pub ds_bytes: usize,
    /// How misses are reported.
    pub fault_mode: FaultMode,
    /// Which chiplet; `None` = the one with the fewest contexts that has room.
    pub chiplet: Option<usize>,
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            cbs: 2,
            ds_bytes: 4096,
            fault_mode: FaultMode::Interrupt,
            chiplet: None,
        }
    }
}

/// Why an instruction failed (section 8: the driver's exception detail).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExceptionDetail {
    /// Operation code.
    pub opc: u8,
    /// Extended operation code.
    pub exopc: u8,
    /// Bits of [`cbe::ecause`].
    pub ecause: u32,
    /// Address that the first operand had reached (idef1upd).
    pub exceptdet0: u64,
    /// Low half of the address that the second operand had reached (idef3upd).
    pub exceptdet1: u32,
    /// State of the extended control block.
    pub cbrstate: cbe::State,
    /// Bits of [`cbe::execstatus`].
    pub cbrexecstatus: u8,
}

/// What [`Context::call_os`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOs {
    /// The miss was answered; the control block runs, or is in EXCEPTION.
    Served,
    /// An invalidation of the address is in progress: the fault service answers the miss when it has ended.
    /// The control block says ACTIVE meanwhile; poll on.
    Deferred,
    /// There is no miss (any more).
    Nothing,
}

/// A loaded context. Dropping it stops its instructions and gives its resources back.
#[derive(Debug)]
pub struct Context {
    // Keeps the driver, and with it the fault service, alive: INTERRUPT_SYNC needs it.
    _mm: Arc<Mm>,
    inner: Arc<Inner>,
}

/// What a context's [`Gseg`] shares with it.
struct Inner {
    core: Arc<Core>,
    space: Arc<Space>,
    grant: Grant,
    closed: AtomicBool,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("grant", &self.grant)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Context {
    pub(crate) fn create(mm: &Arc<Mm>, options: ContextOptions) -> Result<Self, GruError> {
        check(&options)?;
        let core = &mm.gru.core;
        if core.is_gone() {
            return Err(GruError::DeviceGone);
        }
        if mm.is_closed() {
            return Err(GruError::Closed);
        }
        let grant = allocate(core, &mm.space, &options)?;
        let context = Self {
            _mm: Arc::clone(mm),
            inner: Arc::new(Inner {
                core: Arc::clone(core),
                space: Arc::clone(&mm.space),
                grant,
                closed: AtomicBool::new(false),
            }),
        };
        // On an error, dropping `context` gives everything back.
        context.inner.load(options.fault_mode)?;
        Ok(context)
    }

    /// Chiplet it lives on.
    #[must_use]
    pub fn chiplet(&self) -> usize {
        self.inner.grant.chiplet
    }
    /// Its number on the chiplet.
    #[must_use]
    pub fn ctxnum(&self) -> usize {
        self.inner.grant.context
    }
    /// A number that is unique among the loaded contexts of the device: chiplet * 16 + ctxnum.
    #[must_use]
    pub fn number(&self) -> usize {
        self.chiplet() * CONTEXTS + self.ctxnum()
    }
    /// Offset of its GSEG in the chiplets' BAR.
    #[must_use]
    pub fn gseg_offset(&self) -> u64 {
        gseg(self.chiplet(), self.ctxnum())
    }
    /// Control blocks granted.
    #[must_use]
    pub fn cbs(&self) -> usize {
        self.inner.grant.cbs()
    }
    /// Data segment bytes granted.
    #[must_use]
    pub fn ds_bytes(&self) -> usize {
        self.inner.grant.ds_bytes()
    }

    /// A user's report that control block `cb` says CALL_OS.
    ///
    /// # Errors
    /// `Argument` when there is no such control block, `Closed`, `DeviceGone`, the transport's error.
    pub fn call_os(&self, cb: usize) -> Result<CallOs, GruError> {
        self.inner.call_os(cb)
    }

    /// Why control block `cb` is in EXCEPTION.
    ///
    /// # Errors
    /// As [`Context::call_os`].
    pub fn exception_detail(&self, cb: usize) -> Result<ExceptionDetail, GruError> {
        let inner = &self.inner;
        let at = handle(self.chiplet(), map::CBE, inner.physical(cb)?);
        let word = |offset| {
            inner.core.io(
                "reading an extended control block",
                inner.core.window.load(at + offset),
            )
        };
        let copied = cbe::Copied::from_bits(word(cbe::COPY)?);
        let status = cbe::Status::from_bits(word(cbe::STATE)?);
        Ok(ExceptionDetail {
            opc: copied.opc().0,
            exopc: copied.exopc(),
            ecause: status.ecause(),
            exceptdet0: word(cbe::IDEF1UPD)?,
            exceptdet1: word(cbe::IDEF3UPD)? as u32,
            cbrstate: status.cbrstate(),
            cbrexecstatus: status.cbrexecstatus(),
        })
    }

    /// Reads from the GSEG for somebody who cannot map it.
    ///
    /// # Errors
    /// `Argument` outside the GSEG's user part, `Closed`, `DeviceGone`, the transport's error.
    pub fn gseg_read(&self, offset: u64, data: &mut [u8]) -> Result<(), GruError> {
        let at = self.inner.gseg_at(offset, data.len())?;
        let core = &self.inner.core;
        core.io("reading a GSEG", core.window.read_bytes(at, data))
    }

    /// Writes to the GSEG for somebody who cannot map it. An aligned 8-byte write of a control block's first
    /// word starts the instruction if it says so.
    ///
    /// # Errors
    /// As [`Context::gseg_read`].
    pub fn gseg_write(&self, offset: u64, data: &[u8]) -> Result<(), GruError> {
        let at = self.inner.gseg_at(offset, data.len())?;
        let core = &self.inner.core;
        let written = match <[u8; 8]>::try_from(data) {
            // A word: in mapped memory it may start something, so the device is told.
            Ok(word) if offset.is_multiple_of(8) => core.window.start(at, u64::from_le_bytes(word)).map(drop),
            _ => core.window.write_bytes(at, data),
        };
        core.io("writing a GSEG", written)
    }

    /// The user's side of this context: in mapped memory where the device allows it, else by message. It may
    /// outlive the context; calls by message then fail, and stores to mapped memory have no effect on
    /// anything but the next owner of the context number, so drop it first.
    ///
    /// # Errors
    /// The error of mapping the GSEG.
    pub fn gseg(&self) -> Result<Gseg, GruError> {
        let core = &self.inner.core;
        let (cbs, ds_bytes) = (self.cbs(), self.ds_bytes());
        let mapped = core.window.is_mapped(self.gseg_offset(), map::GSEG_MAPPABLE);
        let mut user = if mapped {
            let opened = Gseg::of_backing(core.window.backing(), self.gseg_offset(), cbs, ds_bytes);
            core.io("mapping a GSEG", opened)?
        } else {
            Gseg::by_message(Box::new(ByMessage(Arc::clone(&self.inner))), cbs, ds_bytes)
        };
        let inner = Arc::downgrade(&self.inner);
        user.set_call_os(Box::new(move |cb| {
            let inner = inner.upgrade().ok_or_else(closed_pipe)?;
            inner.call_os(cb).map(drop).map_err(std::io::Error::other)
        }));
        Ok(user)
    }

    /// Stops the context and gives its resources back: INTERRUPT_SYNC, removal of the address space's
    /// translations if this was its last context on the chiplet, DEALLOCATE. Dropping does the same and logs
    /// an error.
    ///
    /// # Errors
    /// `Refused`, or the transport's. The resources are then not used again.
    pub fn close(self) -> Result<(), GruError> {
        self.inner.unload()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Err(e) = self.inner.unload() {
            tracing::error!(context = ?self.inner, "closing a GRU context: {e}");
        }
    }
}

fn closed_pipe() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the GRU context is closed")
}

/// GSEG accesses through the driver.
#[derive(Debug)]
struct ByMessage(Arc<Inner>);

impl GsegAccess for ByMessage {
    fn read64(&self, offset: u64) -> std::io::Result<u64> {
        let at = self.0.gseg_at(offset, 8).map_err(std::io::Error::other)?;
        self.0.core.window.load(at)
    }
    fn write64(&self, offset: u64, value: u64) -> std::io::Result<()> {
        let at = self.0.gseg_at(offset, 8).map_err(std::io::Error::other)?;
        self.0.core.window.start(at, value).map(drop)
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let at = self
            .0
            .gseg_at(offset, data.len())
            .map_err(std::io::Error::other)?;
        self.0.core.window.read_bytes(at, data)
    }
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let at = self
            .0
            .gseg_at(offset, data.len())
            .map_err(std::io::Error::other)?;
        self.0.core.window.write_bytes(at, data)
    }
}

fn check(options: &ContextOptions) -> Result<(), GruError> {
    let argument = |what, value: usize, allowed| GruError::Argument {
        what,
        value: value as u64,
        allowed,
    };
    if !(1..=CBRS).contains(&options.cbs) {
        return Err(argument("number of control blocks", options.cbs, "1 to 128"));
    }
    if options.ds_bytes > DSR_BYTES {
        return Err(argument(
            "size of the data segment",
            options.ds_bytes,
            "0 to 32768",
        ));
    }
    if let Some(chiplet) = options.chiplet
        && chiplet >= CHIPLETS
    {
        return Err(argument("chiplet", chiplet, "0 to 1"));
    }
    Ok(())
}

/// Takes resources and enters the context in the address space's tracker: from here on a flush sees it.
fn allocate(core: &Core, space: &Arc<Space>, options: &ContextOptions) -> Result<Grant, GruError> {
    let mut order: Vec<usize> = match options.chiplet {
        Some(chiplet) => vec![chiplet],
        None => (0..CHIPLETS).collect(),
    };
    order.sort_by_key(|&c| lock(&core.chiplets[c].resources).contexts());
    for chiplet in order {
        let mut resources = lock(&core.chiplets[chiplet].resources);
        let Some(grant) = resources.take(chiplet, options.cbs, options.ds_bytes, space) else {
            continue;
        };
        let tracker = &space.trackers[chiplet];
        loop {
            let old = tracker.get();
            let mut new = old;
            // The number of another generation may have been given to somebody else (section 11).
            let stale = old.asid == 0 || old.generation != resources.asids.generation();
            if old.contexts == 0 && stale {
                match assign(core, &mut resources, chiplet) {
                    Ok(assigned) => new = assigned,
                    Err(e) => {
                        resources.put(&grant);
                        return Err(e);
                    }
                }
            }
            new.contexts = old.contexts | 1 << grant.context;
            if tracker.replace(old, new) {
                return Ok(grant);
            }
        }
    }
    let in_use: Vec<_> = match options.chiplet {
        Some(c) => vec![core.chiplets[c].in_use(c)],
        None => (0..CHIPLETS).map(|c| core.chiplets[c].in_use(c)).collect(),
    };
    Err(GruError::NoResources {
        cbs: options.cbs,
        ds_bytes: options.ds_bytes,
        in_use: in_use.join("; "),
    })
}

/// Hands out an ASID of a chiplet.
fn assign(core: &Core, resources: &mut super::chiplet::Resources, chiplet: usize) -> Result<Track, GruError> {
    let in_use: Vec<u32> = resources
        .holders
        .iter()
        .flatten()
        .map(|s| s.trackers[chiplet].get())
        .filter(|t| t.contexts != 0)
        .map(|t| t.asid)
        .collect();
    let before = resources.asids.generation();
    let assigned = resources
        .asids
        .assign(&in_use, || flush::everything(core, chiplet))?;
    let counters = &core.window.counters;
    counters.asids_assigned.one();
    if assigned.generation != before {
        counters.asid_generations.one();
    }
    Ok(Track {
        asid: assigned.asid,
        generation: assigned.generation,
        contexts: 0,
    })
}

/// asid[8]: base + region, two to a word.
fn write_asids(core: &Core, at: u64, asid: u32) -> std::io::Result<()> {
    for pair in 0..cch::REGIONS as u32 / 2 {
        let low = u64::from(asid + 2 * pair);
        let word = low | (low + 1) << 32;
        core.window.store(at + cch::ASID + u64::from(pair) * 8, word)?;
    }
    Ok(())
}

/// Gives the command and waits for the answer.
fn command(
    core: &Core,
    chiplet: usize,
    context: usize,
    control: cch::Control,
    operation: cch::Opc,
) -> Result<(), GruError> {
    let at = handle(chiplet, map::CCH, context);
    let word = control
        .with_opc(operation)
        .with_cmd(true)
        .with_status(HandleStatus::ACTIVE);
    let device = core.io(
        "writing a context configuration handle",
        core.window.start(at + cch::CONTROL, word.into_bits()),
    )?;
    let answer = cch::Control::from_bits(core.wait(HandleKind::Cch, chiplet, context, device)?);
    if answer.status() == HandleStatus::IDLE {
        return Ok(());
    }
    if core.ask_gone() {
        // A reset has taken the context away: that is why the order was not legal.
        return Err(GruError::DeviceGone);
    }
    Err(GruError::Refused {
        chiplet,
        context,
        operation,
        cause: answer.cause(),
    })
}

/// INTERRUPT, new asid[], START, for every context of an address space; see [`Mm::renew_asids`].
pub(crate) fn renew_asids(core: &Core, space: &Arc<Space>) -> Result<(), GruError> {
    for (number, chiplet) in core.chiplets.iter().enumerate() {
        let mut resources = lock(&chiplet.resources);
        if space.trackers[number].get().contexts == 0 {
            continue;
        }
        let mine = |i: &usize| {
            resources.holders[*i]
                .as_ref()
                .is_some_and(|s| Arc::ptr_eq(s, space))
        };
        let slots: Vec<usize> = (0..CONTEXTS).filter(mine).collect();
        // Also of a context that is in the tracker but not loaded yet: it would be started with the old number, and
        // what is entered under that no flush would ever see again.
        let mut held: Vec<MutexGuard<'_, ()>> = Vec::new();
        let mut stopped: Vec<(usize, cch::Control)> = Vec::new();
        for context in slots {
            held.push(lock(&chiplet.slots[context].commands));
            let control = lock(&chiplet.slots[context].loaded).as_ref().map(|l| l.control);
            if let Some(control) = control {
                command(core, number, context, control, cch::Opc::INTERRUPT)?;
                stopped.push((context, control));
            }
        }
        // Nothing of the address space runs on this chiplet now, so nothing can be entered between the
        // removal of the old number and the change of the word that flushes read.
        flush::asid(core, space, number);
        let new = assign(core, &mut resources, number)?;
        let track = space.trackers[number].update(|old| Track {
            contexts: old.contexts,
            ..new
        });
        for (context, control) in &stopped {
            let at = handle(number, map::CCH, *context);
            core.io("writing asid[]", write_asids(core, at, track.asid))?;
            command(core, number, *context, *control, cch::Opc::START)?;
            core.window.counters.contexts_updated.one();
        }
    }
    Ok(())
}

impl Inner {
    fn slot(&self) -> &super::chiplet::Slot {
        &self.core.chiplets[self.grant.chiplet].slots[self.grant.context]
    }

    fn physical(&self, cb: usize) -> Result<usize, GruError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(GruError::Closed);
        }
        map::physical_cbr(self.grant.cbr_map, cb).ok_or(GruError::Argument {
            what: "control block",
            value: cb as u64,
            allowed: "those of the context",
        })
    }

    fn gseg_at(&self, offset: u64, len: usize) -> Result<u64, GruError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(GruError::Closed);
        }
        match offset.checked_add(len as u64) {
            Some(end) if end <= map::GSEG_PAGE => Ok(gseg(self.grant.chiplet, self.grant.context) + offset),
            _ => Err(GruError::Argument {
                what: "offset in a GSEG",
                value: offset,
                allowed: "up to 0x40000 with the length",
            }),
        }
    }

    /// Load, section 5.1.
    fn load(&self, mode: FaultMode) -> Result<(), GruError> {
        let (core, grant) = (&*self.core, &self.grant);
        let fault_map = (grant.context % usize::from(core.options.fault_maps)) as u8;
        let control = control_of(grant, mode, fault_map);
        let _commands = lock(&self.slot().commands);
        // Before START: the first miss may come at once.
        *lock(&self.slot().loaded) = Some(Loaded {
            space: Arc::clone(&self.space),
            cbr_map: grant.cbr_map,
            control,
            closing: false,
            started: false,
        });
        let at = handle(grant.chiplet, map::CCH, grant.context);
        let operands = || {
            core.window.store(at + cch::CBR_MAP, grant.cbr_map)?;
            write_asids(core, at, self.space.trackers[grant.chiplet].get().asid)?;
            for half in 0..2 {
                core.window.store(at + cch::SIZEAVAIL + half * 8, u64::MAX)?;
            }
            Ok(())
        };
        core.io("writing a context configuration handle", operands())?;
        let allocated = command(core, grant.chiplet, grant.context, control, cch::Opc::ALLOCATE);
        if let Err(e) = allocated {
            // Not allocated: `unload` has no command to give.
            *lock(&self.slot().loaded) = None;
            return Err(e);
        }
        core.io("clearing a new context", self.clear())?;
        if let Some(loaded) = lock(&self.slot().loaded).as_mut() {
            loaded.started = true;
        }
        command(core, grant.chiplet, grant.context, control, cch::Opc::START)?;
        core.window.counters.contexts_loaded.one();
        Ok(())
    }

    /// Control blocks, extended control blocks and data segment start as zeros: nothing of the last owner
    /// is left, and a zero cbrstate means that nothing is to be resumed (section 17.3).
    fn clear(&self) -> std::io::Result<()> {
        let window = &self.core.window;
        let base = gseg(self.grant.chiplet, self.grant.context);
        for cb in 0..self.grant.cbs() {
            window.write_bytes(
                base + map::GSEG_CB + cb as u64 * HANDLE_STRIDE,
                &[0; HANDLE_BYTES],
            )?;
            let cbr = map::physical_cbr(self.grant.cbr_map, cb).expect("granted");
            window.write_bytes(handle(self.grant.chiplet, map::CBE, cbr), &[0; HANDLE_BYTES])?;
        }
        for unit in 0..self.grant.ds_bytes() / map::DSR_AU {
            let at = base + map::GSEG_DS + (unit * map::DSR_AU) as u64;
            window.write_bytes(at, &[0; map::DSR_AU])?;
        }
        Ok(())
    }

    fn call_os(&self, cb: usize) -> Result<CallOs, GruError> {
        let cbr = self.physical(cb)?;
        let served = |who| {
            self.core.io(
                "serving a miss",
                fault::serve(&self.core, self.grant.chiplet, cbr, who),
            )
        };
        match served(fault::Who::User)? {
            fault::Outcome::Answered => Ok(CallOs::Served),
            fault::Outcome::Deferred => Ok(CallOs::Deferred),
            fault::Outcome::Nothing => Ok(CallOs::Nothing),
            fault::Outcome::NoAsid => {
                // The context runs with a forgotten ASID (section 6.1 d): give it the present one, then let
                // the instruction miss again.
                self.update()?;
                served(fault::Who::UserAfterUpdate)?;
                Ok(CallOs::Served)
            }
        }
    }

    /// Update in place, section 5.1.
    fn update(&self) -> Result<(), GruError> {
        let (core, grant) = (&*self.core, &self.grant);
        let _commands = lock(&self.slot().commands);
        let Some(control) = lock(&self.slot().loaded)
            .as_ref()
            .filter(|l| !l.closing)
            .map(|l| l.control)
        else {
            return Err(GruError::Closed);
        };
        command(core, grant.chiplet, grant.context, control, cch::Opc::INTERRUPT)?;
        let at = handle(grant.chiplet, map::CCH, grant.context);
        let asid = self.space.trackers[grant.chiplet].get().asid;
        core.io("writing asid[]", write_asids(core, at, asid))?;
        command(core, grant.chiplet, grant.context, control, cch::Opc::START)?;
        core.window.counters.contexts_updated.one();
        Ok(())
    }

    /// Unload, section 5.1, without saving: nothing reloads a context yet.
    fn unload(&self) -> Result<(), GruError> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let stopped = self.stop();
        match &stopped {
            // Nothing runs there any more: the resources are free.
            Ok(ran) => self.release(*ran),
            Err(GruError::DeviceGone) => self.release(false),
            // The device may still use them: they stay taken. Flushes go on covering the context, because
            // its bit stays in the tracker.
            Err(_) => {}
        }
        match stopped {
            Err(GruError::DeviceGone) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether it ran is the answer.
    fn stop(&self) -> Result<bool, GruError> {
        let (core, grant) = (&*self.core, &self.grant);
        if core.is_gone() {
            return Err(GruError::DeviceGone);
        }
        let (control, started) = {
            let mut loaded = lock(&self.slot().loaded);
            let Some(loaded) = loaded.as_mut() else {
                return Ok(false);
            };
            loaded.closing = true;
            (loaded.control, loaded.started)
        };
        // INTERRUPT_SYNC waits for unserved misses (section 17.4): have the deferred ones answered now.
        core.kick();
        let _commands = lock(&self.slot().commands);
        if started {
            command(
                core,
                grant.chiplet,
                grant.context,
                control,
                cch::Opc::INTERRUPT_SYNC,
            )?;
        }
        let mut loaded = lock(&self.slot().loaded);
        command(core, grant.chiplet, grant.context, control, cch::Opc::DEALLOCATE)?;
        *loaded = None;
        core.window.counters.contexts_unloaded.one();
        Ok(started)
    }

    /// `ran`: the context has been started, and the device answers.
    fn release(&self, ran: bool) {
        let (core, grant) = (&*self.core, &self.grant);
        *lock(&self.slot().loaded) = None;
        let mut resources = lock(&core.chiplets[grant.chiplet].resources);
        let left = self.space.trackers[grant.chiplet].update(|t| {
            let contexts = t.contexts & !(1 << grant.context);
            // Without an operation the number is forgotten, as by a flush that finds no context.
            let asid = if contexts == 0 && !ran { 0 } else { t.asid };
            Track { asid, contexts, ..t }
        });
        if left.contexts == 0 {
            // The last one here (the tracker decides, as two may be closing at once): leave no translation
            // behind, so that the pager's owner may forget the address space without another flush. The number
            // stays ours meanwhile: nobody is given one without the lock that is held here.
            flush::asid(core, &self.space, grant.chiplet);
        }
        resources.put(grant);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use protos::gru::tgh;

    use super::super::GruOptions;
    use super::super::tests::{OnePage, Scripted, open, user_polling};
    use super::*;

    fn until(what: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(20), "no {what}");
            std::thread::yield_now();
        }
    }

    /// A context between its two halves: in the tracker, not loaded.
    fn half_created(mm: &Arc<Mm>) -> Inner {
        Inner {
            core: Arc::clone(&mm.gru.core),
            space: Arc::clone(&mm.space),
            grant: allocate(&mm.gru.core, &mm.space, &user_polling()).unwrap(),
            closed: AtomicBool::new(false),
        }
    }

    #[test]
    fn test_s2_renew_when_a_context_is_being_created_starts_it_with_the_new_number() {
        let device = Scripted::new();
        let gru = open(&device, GruOptions::default());
        let mm = gru.address_space(Arc::new(OnePage));
        let inner = half_created(&mm);
        let old = mm.asid(0).0;
        device.tgh_hangs.store(true, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let renewing = scope.spawn(|| mm.renew_asids());
            until("TLBINV of the old number", || {
                !device.commands(map::TGH, 24).is_empty()
            });
            let loading = scope.spawn(|| inner.load(super::FaultMode::UserPolling));
            // Either it waits for the new number (then this wait ends by its limit), or it is loaded now.
            let begun = Instant::now();
            while !loading.is_finished() && begun.elapsed() < Duration::from_millis(300) {
                std::thread::yield_now();
            }
            device.tgh_hangs.store(false, Ordering::SeqCst);
            for (index, word) in device.commands(map::TGH, 24) {
                let idle = tgh::Control::from_bits(word)
                    .with_cmd(false)
                    .with_status(HandleStatus::IDLE);
                device.set(handle(0, map::TGH, index as usize), idle.into_bits());
            }
            renewing.join().unwrap().unwrap();
            loading.join().unwrap().unwrap();
        });
        let new = mm.asid(0).0;
        assert_ne!(new, old);
        let loaded = lock(&device.words)[&(handle(0, map::CCH, 0) + cch::ASID)];
        assert_eq!(
            loaded as u32, new,
            "flushes go to {new}, the context uses another one"
        );
        inner.unload().unwrap();
    }

    #[test]
    fn test_s12_close_when_two_contexts_end_at_once_leaves_no_entry() {
        let device = Scripted::new();
        let gru = open(&device, GruOptions::default());
        let mm = gru.address_space(Arc::new(OnePage));
        let contexts = [half_created(&mm), half_created(&mm)];
        for context in &contexts {
            context.load(super::FaultMode::UserPolling).unwrap();
        }
        // Both have stopped before either has given its bit back.
        let ran = contexts.each_ref().map(|context| context.stop().unwrap());
        for (context, ran) in contexts.iter().zip(ran) {
            context.release(ran);
        }
        assert_eq!(
            device.commands(map::TGH, 24).len(),
            1,
            "the last one removes the entries"
        );
        assert_eq!(mm.asid(0).1, 0);
    }
}
