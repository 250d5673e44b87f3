//! The driver against a scripted device: the order of its commands, and what it does when a device does not
//! answer, which the real model never shows.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protos::gru::map::{self, HANDLE_STRIDE};
use protos::gru::{HandleStatus, cb, cch, pci, tfh, tgh};

use super::core::{gseg, handle, lock};
use super::*;
use crate::backing::{BarInfo, DmaProt};

/// What a word of the chiplets' BAR was given.
type Write = (u64, u64);

/// A device of words; commands are answered at once unless the script says otherwise.
#[derive(Debug)]
pub(super) struct Scripted {
    pub(super) words: Mutex<HashMap<u64, u64>>,
    writes: Mutex<Vec<Write>>,
    /// TGH commands stay ACTIVE.
    pub(super) tgh_hangs: AtomicBool,
    /// Every access fails.
    broken: AtomicBool,
    /// Readable when the "process" has ended.
    process: OwnedFd,
    refuse: Mutex<Option<(cch::Opc, cch::Cause)>>,
    vendor: u16,
}

impl Scripted {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            words: Mutex::default(),
            writes: Mutex::default(),
            tgh_hangs: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            process: fault::event().unwrap(),
            refuse: Mutex::new(None),
            vendor: pci::VENDOR,
        })
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }

    pub(super) fn set(&self, offset: u64, value: u64) {
        lock(&self.words).insert(offset, value);
    }

    /// Commands that were given to handles of a region, in order: (index, DW0).
    pub(super) fn commands(&self, region: u64, count: u64) -> Vec<(u64, u64)> {
        let writes = lock(&self.writes);
        writes
            .iter()
            .filter(|(at, value)| {
                *at >= region
                    && *at < region + count * HANDLE_STRIDE
                    && at % HANDLE_STRIDE == 0
                    && value & 1 != 0
            })
            .map(|(at, value)| ((at - region) / HANDLE_STRIDE, *value))
            .collect()
    }

    fn cch_operations(&self) -> Vec<cch::Opc> {
        let commands = self.commands(map::CCH, 16);
        commands
            .iter()
            .map(|(_, w)| cch::Control::from_bits(*w).opc())
            .collect()
    }

    fn tfh_operations(&self) -> Vec<tfh::Opc> {
        let commands = self.commands(map::TFH, 128);
        commands
            .iter()
            .map(|(_, w)| tfh::Control::from_bits(*w).opc())
            .collect()
    }

    fn store(&self, at: u64, value: u64) {
        lock(&self.writes).push((at, value));
        let region = at % map::CHIPLET_SIZE;
        let mut stored = value;
        if region >= map::TFM && at.is_multiple_of(HANDLE_STRIDE) && value & 1 != 0 {
            // Every handle has cmd in bit 0 and status in bits 16 and 17.
            let hangs = (map::TGH..map::CBE).contains(&region) && self.tgh_hangs.load(Ordering::SeqCst);
            if !hangs {
                stored = value & !(1 | 3 << 16);
            }
            let refused = *lock(&self.refuse);
            if let Some((opc, cause)) = refused
                && region >= map::CCH
                && cch::Control::from_bits(value).opc() == opc
            {
                stored = cch::Control::from_bits(stored)
                    .with_status(HandleStatus::EXCEPTION)
                    .with_cause(cause)
                    .into_bits();
            }
        }
        self.set(at, stored);
    }

    /// Puts a miss into the TFH of a CBR of chiplet 0, context 0.
    fn miss(&self, cbr: usize, state: tfh::State, cause: tfh::Cause, asid: u32, va: u64) {
        let at = handle(0, map::TFH, cbr);
        self.set(at + tfh::MISSVADDR, va);
        self.set(at + tfh::ASIDS, tfh::Asids::new().with_missasid(asid).into_bits());
        let control = tfh::Control::new()
            .with_status(HandleStatus::EXCEPTION)
            .with_state(state)
            .with_cause(cause);
        self.set(at, control.into_bits());
    }
}

impl Backing for Scripted {
    fn bar(&self, bar: usize) -> BarInfo {
        let size = match bar {
            pci::BAR_DOORBELL => pci::BAR_DOORBELL_SIZE,
            pci::BAR_CHIPLETS => pci::BAR_CHIPLETS_SIZE,
            _ => 0,
        };
        BarInfo {
            size,
            mappable: Vec::new(),
        }
    }
    fn bar_fd(&self, _bar: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.check()?;
        data.fill(0);
        if bar == pci::BAR_CHIPLETS {
            let words = lock(&self.words);
            for (i, chunk) in data.chunks_mut(8).enumerate() {
                let word = words.get(&(offset + 8 * i as u64)).copied().unwrap_or(0);
                chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
            }
        }
        Ok(())
    }
    fn write(&self, bar: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        if bar == pci::BAR_CHIPLETS {
            for (i, chunk) in data.chunks(8).enumerate() {
                let word = u64::from_le_bytes(chunk.try_into().expect("whole words"));
                self.store(offset + 8 * i as u64, word);
            }
        }
        Ok(())
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut config = [0; 64];
        config[..2].copy_from_slice(&self.vendor.to_le_bytes());
        config[2..4].copy_from_slice(&pci::DEVICE.to_le_bytes());
        data.copy_from_slice(&config[offset as usize..][..data.len()]);
        Ok(())
    }
    fn config_write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn msix_vectors(&self) -> u32 {
        pci::VECTORS.into()
    }
    fn set_msix(&self, _vector: u32, _eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        Ok(())
    }
    fn dma_map(
        &self,
        _iova: u64,
        _len: u64,
        _fd: BorrowedFd<'_>,
        _offset: u64,
        _prot: DmaProt,
    ) -> io::Result<()> {
        Ok(())
    }
    fn dma_unmap(&self, _iova: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    fn io_eventfd(&self, _bar: usize, _offset: u64) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
    fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.process.as_fd())
    }
    fn alive(&self) -> bool {
        !self.broken.load(Ordering::SeqCst)
    }
}

/// Answers every miss with the same page.
pub(super) struct OnePage;

const PAGE: Translation = Translation {
    iova: 0x5_0000_0000,
    page_shift: 12,
    writable: true,
    generation: 77,
};

impl Pager for OnePage {
    fn fault(&self, _va: u64, _write: bool) -> Fault {
        Fault::Page(PAGE)
    }
}

pub(super) fn open(device: &Arc<Scripted>, options: GruOptions) -> Arc<Gru> {
    let backing: Arc<Scripted> = Arc::clone(device);
    Gru::open(backing, options).unwrap()
}

pub(super) fn user_polling() -> ContextOptions {
    ContextOptions {
        fault_mode: FaultMode::UserPolling,
        chiplet: Some(0),
        ..ContextOptions::default()
    }
}

#[test]
fn test_open_when_the_device_is_another_names_what_it_found() {
    let device = Arc::new(Scripted {
        vendor: 0x15b3,
        ..Arc::into_inner(Scripted::new()).unwrap()
    });
    let error = Gru::open(device, GruOptions::default()).unwrap_err();
    assert!(matches!(error, GruError::NotAGru { vendor: 0x15b3, .. }));
    assert!(error.to_string().contains("0x15b3"), "{error}");
}

#[test]
fn test_open_when_asids_are_too_few_is_refused() {
    for (asid_first, asid_end) in [(8, 8 + 8 * 16), (0, 4096), (12, 4096), (8, 0xff_fff8)] {
        let options = GruOptions {
            asid_first,
            asid_end,
            ..GruOptions::default()
        };
        let error = Gru::open(Scripted::new(), options).unwrap_err();
        assert!(
            matches!(error, GruError::Argument { .. }),
            "{asid_first}..{asid_end}: {error}"
        );
    }
}

#[test]
fn test_context_when_loaded_and_closed_gives_the_commands_of_the_reference() {
    let device = Scripted::new();
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let context = mm.create_context(user_polling()).unwrap();
    assert_eq!(device.cch_operations(), [cch::Opc::ALLOCATE, cch::Opc::START]);
    // asid[8] counts up from the block's base, two to a word; every page size is available.
    let cch = handle(0, map::CCH, 0);
    let word = |offset| lock(&device.words)[&(cch + offset)];
    assert_eq!(word(cch::CBR_MAP), 1);
    assert_eq!(word(cch::ASID), 8 | 9 << 32);
    assert_eq!(word(cch::ASID + 24), 14 | 15 << 32);
    assert_eq!(word(cch::SIZEAVAIL + 8), u64::MAX);
    lock(&device.writes).clear();
    context.close().unwrap();
    assert_eq!(
        device.cch_operations(),
        [cch::Opc::INTERRUPT_SYNC, cch::Opc::DEALLOCATE]
    );
    // The address space's entries went, too: it was the last context.
    let flushes = device.commands(map::TGH, 24);
    assert_eq!(flushes.len(), 1);
    let at = handle(0, map::TGH, flushes[0].0 as usize);
    let scope = tgh::Scope::from_bits(lock(&device.words)[&(at + tgh::SCOPE)]);
    assert_eq!((scope.asid(), scope.global()), (8, false));
}

#[test]
fn test_context_when_allocate_is_refused_names_the_cause_and_frees_everything() {
    let device = Scripted::new();
    *lock(&device.refuse) = Some((cch::Opc::ALLOCATE, cch::Cause::CBR_OVERSUBSCRIBED));
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let error = mm.create_context(user_polling()).unwrap_err();
    assert!(error.to_string().contains("CBR_OVERSUBSCRIBED"), "{error}");
    assert!(gru.resources_in_use()[0].contains("uses 0 of 16 contexts, 0 of 128"));
    assert_eq!(mm.asid(0).1, 0, "a flush would still go to the device");
    *lock(&device.refuse) = None;
    mm.create_context(user_polling()).unwrap();
}

#[test]
fn test_call_os_when_a_miss_waits_fills_with_tag_and_shows_active() {
    let device = Scripted::new();
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let context = mm.create_context(user_polling()).unwrap();
    let va = 0x7000_0123u64;
    device.miss(1, tfh::State::MISS_UPM, tfh::Cause::TLB_MOD, 8, va);
    let cb = gseg(0, 0) + HANDLE_STRIDE;
    device.set(
        cb,
        cb::Control::new().with_istatus(cb::Status::CALL_OS).into_bits(),
    );
    assert_eq!(context.call_os(1).unwrap(), CallOs::Served);
    assert_eq!(device.tfh_operations(), [tfh::Opc::WRITE_RESTART]);
    let tfh = handle(0, map::TFH, 1);
    let writes = lock(&device.writes).clone();
    let position = |at| writes.iter().rposition(|w| w.0 == at).unwrap();
    let command = position(tfh);
    for (offset, value) in [
        (
            tfh::ASIDS,
            tfh::Asids::new()
                .with_missasid(8)
                .with_fillasid(8)
                .with_dirty(true)
                .into_bits(),
        ),
        (tfh::TARGET, PAGE.iova >> 12),
        (tfh::FILLVADDR, va),
        (tfh::FILLTAG, 77),
    ] {
        let at = position(tfh + offset);
        assert_eq!(writes[at].1, value, "TFH + {offset:#x}");
        assert!(at < command, "an operand after the command");
    }
    // The status is ACTIVE absolutely: EXCEPTION (1) or ACTIVE (2) would be 3.
    let control = tfh::Control::from_bits(writes[command].1);
    assert_eq!(control.status(), HandleStatus::ACTIVE);
    let shown = cb::Control::from_bits(writes[position(cb)].1);
    assert_eq!((shown.istatus(), shown.icmd()), (cb::Status::ACTIVE, false));
    assert_eq!(context.call_os(1).unwrap(), CallOs::Nothing);
    assert!(context.call_os(2).is_err(), "not a control block of this context");
}

#[test]
fn test_call_os_when_the_miss_has_no_asid_updates_the_context_in_place() {
    let device = Scripted::new();
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let context = mm.create_context(user_polling()).unwrap();
    lock(&device.writes).clear();
    device.miss(0, tfh::State::MISS_UPM, tfh::Cause::TLB_MISS, 0, 0x1000);
    assert_eq!(context.call_os(0).unwrap(), CallOs::Served);
    assert_eq!(device.cch_operations(), [cch::Opc::INTERRUPT, cch::Opc::START]);
    // No fill: the instruction misses again, with an ASID.
    assert_eq!(device.tfh_operations(), [tfh::Opc::RESTART]);
    assert_eq!(gru.stats().contexts_updated, 1);
}

#[test]
fn test_service_when_a_fault_map_miss_has_no_asid_hands_it_to_the_user() {
    let device = Scripted::new();
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let _context = mm
        .create_context(ContextOptions {
            chiplet: Some(0),
            ..ContextOptions::default()
        })
        .unwrap();
    let serve = |who| fault::serve(&gru.core, 0, 0, who).unwrap();
    device.miss(0, tfh::State::MISS_FMM, tfh::Cause::TLB_MISS, 0, 0x1000);
    assert_eq!(
        serve(fault::Who::User),
        fault::Outcome::Nothing,
        "the user may not serve it"
    );
    serve(fault::Who::Interrupt);
    device.miss(0, tfh::State::MISS_FMM, tfh::Cause::HW_ERROR_VALID, 8, 0x1000);
    serve(fault::Who::Interrupt);
    // Under another number than the address space's present one: no entry would be of use.
    device.miss(0, tfh::State::MISS_FMM, tfh::Cause::TLB_MISS, 16, 0x1000);
    serve(fault::Who::Interrupt);
    assert_eq!(
        device.tfh_operations(),
        [
            tfh::Opc::USER_POLLING_MODE,
            tfh::Opc::EXCEPTION,
            tfh::Opc::RESTART
        ]
    );
    let stats = gru.stats();
    assert_eq!(
        (stats.faults_to_user, stats.faults_bad, stats.faults_restarted),
        (1, 1, 1)
    );
}

/// A context is loaded, then the device stops answering its TGHs.
fn stalled(action: impl Fn(u32, Stall) -> StallAction + Send + Sync + 'static) -> (Arc<Scripted>, Arc<Gru>) {
    let asked = AtomicU32::new(0);
    let options = GruOptions {
        on_stall: Some(Box::new(move |stall| {
            action(asked.fetch_add(1, Ordering::SeqCst) + 1, stall)
        })),
        stall_after: Duration::from_millis(5),
        ..GruOptions::default()
    };
    let device = Scripted::new();
    let gru = open(&device, options);
    (device, gru)
}

#[test]
fn test_flush_when_device_stalls_returns_only_when_told_that_it_is_gone() {
    let (device, gru) = stalled(|n, stall| {
        assert_eq!((stall.kind, stall.chiplet), (HandleKind::Tgh, 0));
        assert_eq!(stall.transport, None);
        if n < 4 {
            StallAction::KeepWaiting
        } else {
            StallAction::DeviceGone
        }
    });
    let mm = gru.address_space(Arc::new(OnePage));
    let context = mm.create_context(user_polling()).unwrap();
    device.tgh_hangs.store(true, Ordering::SeqCst);
    mm.flush(0x1000, 0x2000);
    assert_eq!(gru.stats().stalls, 4);
    assert!(gru.is_gone());
    // From here on nothing waits.
    mm.flush(0x1000, 0x2000);
    context.close().unwrap();
    assert_eq!(gru.stats().stalls, 4);
}

#[test]
fn test_flush_when_transport_fails_waits_for_the_end_of_the_process() {
    let device_slot: Arc<Mutex<Option<Arc<Scripted>>>> = Arc::default();
    let slot = Arc::clone(&device_slot);
    let (device, gru) = stalled(move |n, stall| {
        assert_eq!(stall.transport, Some(io::ErrorKind::ConnectionReset));
        if n == 3 {
            // The process ends now; nobody has to tell the driver.
            let device = lock(&slot).take().unwrap();
            window::ring_eventfd(device.process.as_fd()).unwrap();
        }
        StallAction::KeepWaiting
    });
    *lock(&device_slot) = Some(Arc::clone(&device));
    let mm = gru.address_space(Arc::new(OnePage));
    let context = mm.create_context(user_polling()).unwrap();
    device.broken.store(true, Ordering::SeqCst);
    mm.flush(0x1000, 0x2000);
    assert!(
        gru.stats().stalls >= 3,
        "the flush returned before the process had ended"
    );
    assert!(gru.is_gone());
    context.close().unwrap();
    assert!(matches!(
        mm.create_context(user_polling()),
        Err(GruError::DeviceGone)
    ));
}

#[test]
fn test_flush_when_all_handles_are_taken_waits_for_one() {
    let device = Scripted::new();
    let gru = open(&device, GruOptions::default());
    let mm = gru.address_space(Arc::new(OnePage));
    let _context = mm.create_context(user_polling()).unwrap();
    let claims = &gru.core.chiplets[0].claims;
    let taken: Vec<usize> = (0..TGHS).map(|i| claims.try_take(i).unwrap()).collect();
    assert_eq!(claims.try_take(5), None);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            mm.flush(0x1000, 0x2000);
            assert!(done.load(Ordering::SeqCst), "two users of one handle");
        });
        while gru.stats().flushes == 0 && device.commands(map::TGH, 24).is_empty() {
            if !done.swap(true, Ordering::SeqCst) {
                claims.put(taken[17]);
            }
            std::thread::yield_now();
        }
    });
    assert_eq!(device.commands(map::TGH, 24)[0].0, 17);
}
