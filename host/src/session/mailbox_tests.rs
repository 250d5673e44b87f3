use super::*;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::fence::Fence;
use crate::mm::{FillTable, MappedTable, MmCache, ProcMaps};
use crate::notifier::{Again, Subscriber};
use crate::subscribers::Xpmem;

/// Counts, and checks that starts and ends pair up.
#[derive(Default)]
struct Counting {
    starts: AtomicUsize,
    open: AtomicUsize,
}

impl Subscriber for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }
    fn sleeping(&self) -> bool {
        true
    }
    fn invalidate_range_start(&self, _range: &NotifierRange, _ctx: Ctx<'_>) -> Result<(), Again> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn invalidate_range_end(&self, _range: &NotifierRange, _ctx: Ctx<'_>) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
    fn release(&self) {}
}

struct Rig {
    mailbox: Arc<Mailbox>,
    counting: Arc<Counting>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Rig {
    fn new(workers: usize) -> Self {
        let fills = FillTable::new(MappedTable::create().unwrap());
        let maps = ProcMaps::open(std::process::id()).unwrap();
        let cache = MmCache::new(Arc::new(maps), fills.clone());
        let space = AddressSpace::new(1, 1, fills, cache, Xpmem::new(Arc::new(Fence::new(None))));
        let counting = Arc::new(Counting::default());
        let token = MaySleep::claim("test");
        space.chain().register(counting.clone(), &token).unwrap();
        let mailbox = Arc::new(Mailbox::new(space));
        let workers = (0..workers)
            .map(|_| {
                let mailbox = mailbox.clone();
                std::thread::spawn(move || mailbox.work())
            })
            .collect();
        Self {
            mailbox,
            counting,
            workers,
        }
    }

    fn slot(&self, index: usize) -> &Slot {
        &self.mailbox.space.table().slots[index]
    }

    fn post(&self, index: usize, state: u32, op: u32, start: u64, end: u64) {
        let slot = self.slot(index);
        slot.op.store(op, Ordering::Relaxed);
        slot.start.store(start, Ordering::Relaxed);
        slot.end.store(end, Ordering::Relaxed);
        slot.state.store(state, Ordering::Release);
        self.mailbox.space.mapped_table().ring();
    }

    /// As an agent waits: it sleeps until the state is no longer a request's.
    fn answer(&self, index: usize) -> i32 {
        let slot = self.slot(index);
        loop {
            slot.sleeping.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let state = slot.state.load(Ordering::Acquire);
            if state == slot_state::DONE || state == slot_state::FREE {
                slot.sleeping.store(0, Ordering::SeqCst);
                return slot.result.load(Ordering::Acquire);
            }
            let _ = futex::wait(&slot.state, futex::Flags::empty(), state, None);
        }
    }

    fn finish(self) -> Arc<Counting> {
        self.mailbox.stop();
        for worker in self.workers {
            worker.join().unwrap();
        }
        self.mailbox.finish(&MaySleep::claim("test"));
        self.counting
    }
}

#[test]
fn test_c2_mailbox_when_calls_come_from_many_threads_pairs_every_start() {
    let rig = Rig::new(WORKERS);
    std::thread::scope(|scope| {
        for index in 0..4 {
            let rig = &rig;
            scope.spawn(move || {
                for round in 0..500u64 {
                    let start = 0x10_0000 * (index as u64 + 1);
                    rig.post(index, slot_state::REQUEST, slot_op::START, start, start + 4096);
                    assert_eq!(rig.answer(index), 0, "round {round}");
                    rig.post(index, slot_state::REQUEST_DETACHED, slot_op::END, 0, 0);
                    assert_eq!(rig.answer(index), 0);
                    // Now and then long enough for the workers to fall asleep: a lost ring would hang here.
                    if round % 100 == 0 {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
            });
        }
    });
    assert_eq!(rig.mailbox.stats.starts.load(Ordering::Relaxed), 2000);
    assert_eq!(rig.mailbox.stats.ends.load(Ordering::Relaxed), 2000);
    assert!(rig.mailbox.stats.sleeps.load(Ordering::Relaxed) > 0);
    let counting = rig.finish();
    assert_eq!(counting.starts.load(Ordering::SeqCst), 2000);
    assert_eq!(counting.open.load(Ordering::SeqCst), 0);
}

#[test]
fn test_mailbox_when_slot_is_malformed_answers_einval_and_tells_nobody() {
    let rig = Rig::new(1);
    for (op, start, end, event) in [
        (slot_op::START, 0x2000, 0x2000, 0),
        (slot_op::START, 0x3000, 0x2000, 0),
        (slot_op::START, 0, u64::MAX, 0),
        (slot_op::START, 0x1000, USER_END + 1, 0),
        (slot_op::START, 0x1000, 0x2000, 99),
        (slot_op::END, 0x1000, 0x2000, 0),
        (0, 0x1000, 0x2000, 0),
        (u32::MAX, 0x1000, 0x2000, 0),
    ] {
        rig.slot(7).event.store(event, Ordering::Relaxed);
        rig.post(7, slot_state::REQUEST, op, start, end);
        assert_eq!(rig.answer(7), -libc::EINVAL, "{op} {start:#x} {end:#x} {event}");
    }
    // Nobody waits for this one; the slot is free again.
    rig.post(7, slot_state::REQUEST_DETACHED, 42, 0, 0);
    rig.answer(7);
    assert_eq!(rig.slot(7).state.load(Ordering::Acquire), slot_state::FREE);
    assert_eq!(rig.mailbox.stats.malformed.load(Ordering::Relaxed), 9);
    // States that are no request are left alone.
    for state in [slot_state::CLAIMED, slot_state::DONE, 77, u32::MAX] {
        rig.post(9, state, slot_op::START, 0x1000, 0x2000);
    }
    rig.slot(7).event.store(0, Ordering::Relaxed);
    rig.post(7, slot_state::REQUEST, slot_op::START, 0x1000, 0x2000);
    assert_eq!(rig.answer(7), 0);
    assert_eq!(rig.slot(9).state.load(Ordering::Acquire), u32::MAX);
    assert_eq!(rig.finish().starts.load(Ordering::SeqCst), 1);
}

#[test]
fn test_c2_mailbox_when_ends_are_lost_ends_them_itself() {
    let rig = Rig::new(WORKERS);
    for index in [3, 3, 5] {
        rig.post(index, slot_state::REQUEST, slot_op::START, 0x1000, 0x2000);
        assert_eq!(rig.answer(index), 0);
    }
    assert_eq!(
        rig.counting.open.load(Ordering::SeqCst),
        2,
        "the second start in slot 3 has ended the first"
    );
    let counting = rig.finish();
    assert_eq!(counting.starts.load(Ordering::SeqCst), 3);
    assert_eq!(counting.open.load(Ordering::SeqCst), 0);
}

#[test]
fn test_mailbox_when_application_spoils_the_bell_still_stops() {
    let rig = Rig::new(WORKERS);
    let header = &rig.mailbox.space.table().header;
    for word in [u32::MAX, 0, 12345] {
        header.bell_sleepers.store(word, Ordering::SeqCst);
        header.fault_waiters.store(word, Ordering::SeqCst);
        header.bell.fetch_add(1, Ordering::SeqCst);
    }
    rig.finish();
}
