//! The GRU's driver as a subscriber: never sleeps, never refuses. (Over a device whose flush handles are not
//! mapped each access is a message: then it sleeps, says so, and refuses what must not block.)

use std::sync::Arc;

use crate::mm::FillTable;
use crate::notifier::{Again, Ctx, NotifierRange, Subscriber};

/// A device's TLB for one address space, as the chain reaches it. On the non-sleeping path: no lock that can
/// sleep, no allocation, no blocking system call.
pub trait DeviceFlush: Send + Sync {
    /// Whether a flush sleeps: the device can be reached by messages only.
    fn sleeps(&self) -> bool {
        false
    }
    /// Drops every translation that meets `[start, end)`. When this returns, no access through an old one is
    /// running or can start (S2), and fills whose miss is older are refused (the kill bit).
    fn flush(&self, start: u64, end: u64);
    /// The same for the whole address space.
    fn flush_all(&self);
}

/// Non-sleeping subscriber: flushes the device, then forgets the pages it had.
///
/// S1 between start and end is the fill protocol's part: the range is declared to be changing in the shared
/// table for as long, so [`FillTable::begin_fill`] refuses; a fill that began before meets the kill bit.
pub struct GruSubscriber<D: DeviceFlush + ?Sized> {
    fills: Arc<FillTable>,
    device: Arc<D>,
}

impl<D: DeviceFlush + ?Sized> std::fmt::Debug for GruSubscriber<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GruSubscriber")
            .field("fills", &self.fills.stats())
            .finish_non_exhaustive()
    }
}

impl<D: DeviceFlush + ?Sized> GruSubscriber<D> {
    /// For one address space.
    #[must_use]
    pub fn new(device: Arc<D>, fills: Arc<FillTable>) -> Arc<Self> {
        Arc::new(Self { fills, device })
    }

    fn drop_range(&self, start: u64, end: u64) {
        if start == 0 && end == u64::MAX {
            self.device.flush_all();
            self.fills.clear_all();
        } else {
            self.device.flush(start, end);
            self.fills.clear(start, end);
        }
    }
}

impl<D: DeviceFlush + ?Sized> Subscriber for GruSubscriber<D> {
    fn name(&self) -> &'static str {
        "gru"
    }

    fn sleeping(&self) -> bool {
        self.device.sleeps()
    }

    fn invalidate_range_start(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        // S9: without sleeping, or not at all.
        if self.device.sleeps() && matches!(ctx, Ctx::NonSleeping(_)) {
            return Err(Again);
        }
        self.drop_range(range.start, range.end);
        Ok(())
    }

    fn invalidate_range_end(&self, _range: &NotifierRange, _ctx: Ctx<'_>) {
        self.fills.table().ring_if_faults_wait();
    }

    fn invalidate_page(&self, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        // The same, and nothing to undo: there is no end.
        self.invalidate_range_start(range, ctx)
    }

    fn release(&self) {
        // In this order: what begins a fill after `close` is refused, what began before is killed by the flush.
        self.fills.close();
        self.device.flush_all();
        self.fills.clear_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::{Busy, MappedTable};
    use crate::notifier::{Chain, Event, MaySleep};
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;

    /// A device that knows the fill table, to see in which order things happen.
    struct Device {
        fills: Arc<FillTable>,
        log: Mutex<Vec<(u64, u64, u64)>>,
    }

    impl DeviceFlush for Device {
        fn flush(&self, start: u64, end: u64) {
            let cached = self.fills.stats().cached_pages;
            self.log.lock().unwrap().push((start, end, cached));
        }
        fn flush_all(&self) {
            self.flush(0, u64::MAX);
        }
    }

    fn set_up() -> (
        Arc<MappedTable>,
        Arc<FillTable>,
        Arc<Device>,
        Arc<Chain>,
        MaySleep,
    ) {
        let table = MappedTable::create().unwrap();
        let fills = FillTable::new(table.clone());
        let device = Arc::new(Device {
            fills: fills.clone(),
            log: Mutex::default(),
        });
        let chain = Chain::new();
        let token = MaySleep::claim("test");
        chain
            .register(GruSubscriber::new(device.clone(), fills.clone()), &token)
            .unwrap();
        (table, fills, device, chain, token)
    }

    #[test]
    fn test_s2_gru_start_when_pages_are_cached_flushes_before_it_forgets() {
        let (table, fills, device, chain, token) = set_up();
        let _ = fills.begin_fill(0x5000, 12).unwrap();
        let _ = fills.begin_fill(0x9000, 12).unwrap();
        let range = NotifierRange {
            start: 0x4000,
            end: 0x6000,
            event: Event::Unmap,
            blockable: false,
        };
        let change = table.begin_change(range.start, range.end);
        let started = chain
            .invalidate_range_start(range, Ctx::MaySleep(&token))
            .unwrap();
        assert_eq!(*device.log.lock().unwrap(), [(0x4000, 0x6000, 2)]);
        assert!(!fills.contains(0x5000) && fills.contains(0x9000));
        assert_eq!(table.header.cached_total.load(Ordering::Relaxed), 1);
        assert_eq!(fills.begin_fill(0x5000, 12), Err(Busy::InProgress), "S1");
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        drop(change);
        assert!(fills.begin_fill(0x5000, 12).is_ok());
    }

    #[test]
    fn test_s9_gru_when_flush_sleeps_refuses_what_must_not_block() {
        /// Reached by messages.
        struct Remote(Mutex<u32>);
        impl DeviceFlush for Remote {
            fn sleeps(&self) -> bool {
                true
            }
            fn flush(&self, _start: u64, _end: u64) {
                crate::notifier::might_sleep("a message to the device");
                *self.0.lock().unwrap() += 1;
            }
            fn flush_all(&self) {
                self.flush(0, u64::MAX);
            }
        }
        let fills = FillTable::new(MappedTable::create().unwrap());
        let device = Arc::new(Remote(Mutex::new(0)));
        let (chain, token) = (Chain::new(), MaySleep::claim("test"));
        chain
            .register(GruSubscriber::new(device.clone(), fills), &token)
            .unwrap();
        let mut range = NotifierRange {
            start: 0x4000,
            end: 0x6000,
            event: Event::Unmap,
            blockable: false,
        };
        let refused = chain.invalidate_range_start(range, Ctx::MaySleep(&token));
        assert!(refused.is_err(), "{refused:?}");
        assert_eq!(*device.0.lock().unwrap(), 0);
        range.blockable = true;
        let started = chain
            .invalidate_range_start(range, Ctx::MaySleep(&token))
            .unwrap();
        assert_eq!(*device.0.lock().unwrap(), 1);
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    }

    #[test]
    fn test_s12_gru_when_released_has_no_page_and_takes_none() {
        let (table, fills, device, chain, token) = set_up();
        let _ = fills.begin_fill(0x5000, 12).unwrap();
        chain.release(&token);
        assert_eq!(device.log.lock().unwrap().len(), 1);
        assert_eq!(table.header.cached_total.load(Ordering::Relaxed), 0);
        assert_eq!(fills.begin_fill(0x5000, 12), Err(Busy::Closed));
    }

    #[test]
    fn test_gru_end_when_faults_wait_rings() {
        let (table, fills, _device, chain, token) = set_up();
        let waiter = fills.fault_waiter();
        let range = NotifierRange::all(Event::Clear, true);
        let started = chain
            .invalidate_range_start(range, Ctx::MaySleep(&token))
            .unwrap();
        assert_eq!(table.header.bell.load(Ordering::Relaxed), 0);
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        assert_eq!(table.header.bell.load(Ordering::Relaxed), 1);
        drop(waiter);
        assert_eq!(table.header.fault_waiters.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn test_invalidate_page_when_v13_flushes_once() {
        let (table, fills, device, chain, token) = set_up();
        let _ = fills.begin_fill(0x5000, 12).unwrap();
        let _change = table.begin_change(0x5000, 0x6000);
        let range = NotifierRange {
            start: 0x5000,
            end: 0x6000,
            event: Event::ProtectionPage,
            blockable: false,
        };
        chain.invalidate_page(range, Ctx::MaySleep(&token)).unwrap();
        assert_eq!(device.log.lock().unwrap().len(), 1);
        assert!(!fills.contains(0x5000));
    }
}
