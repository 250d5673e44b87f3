//! The interval form (read_begin / read_retry): S1, S4 to S6, S10, S12.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use host::notifier::{
    Again, Chain, Ctx, Event, IntervalNotifier, IntervalNotifiers, IntervalOps, MaySleep, NonSleeping,
    NotifierRange, ReadBusy, StartError, Started, UnregisterError,
};

const RANGE: NotifierRange = NotifierRange {
    start: 0x1000,
    end: 0x3000,
    event: Event::Unmap,
    blockable: true,
};

/// A device whose table is the protected data; a callback can be held.
#[derive(Default)]
struct Device {
    hold: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    refuse: AtomicBool,
}

impl IntervalOps for Device {
    type Protected = Vec<u64>;
    fn invalidate(&self, table: &mut Vec<u64>, range: &NotifierRange, ctx: Ctx<'_>) -> Result<(), Again> {
        if self.refuse.load(Ordering::Relaxed) {
            ctx.may_sleep()?;
        }
        if let Some((entered, go)) = self.hold.lock().unwrap().take() {
            entered.send(()).unwrap();
            go.recv().unwrap();
        }
        table.retain(|va| !range.meets(*va, va + 0x1000));
        Ok(())
    }
}

type Interval = Arc<IntervalNotifier<Device>>;

fn set_up() -> (Arc<Chain>, Arc<IntervalNotifiers>, Interval, MaySleep) {
    let token = MaySleep::claim("test");
    let chain = Chain::new();
    let set = IntervalNotifiers::new();
    chain.register(set.clone(), &token).unwrap();
    let interval = set
        .insert(0x1000, 0x5000, Device::default(), Vec::new(), &token)
        .unwrap();
    (chain, set, interval, token)
}

fn start(chain: &Arc<Chain>, range: NotifierRange) -> Started {
    let token = MaySleep::claim("start");
    chain
        .invalidate_range_start(range, Ctx::MaySleep(&token))
        .unwrap()
}

fn end(chain: &Arc<Chain>, started: Started) {
    let token = MaySleep::claim("end");
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
}

#[test]
fn test_s5_read_when_nothing_happens_needs_no_retry() {
    let (_chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    let mut table = interval.lock(&token);
    assert!(!table.read_retry(sequence));
    table.push(0x1000);
}

#[test]
fn test_s4_sequence_when_callback_has_run_is_set_without_the_users_help() {
    let (chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    end(&chain, start(&chain, RANGE));
    assert!(interval.lock(&token).read_retry(sequence));
    let fresh = interval.read_begin(&token).unwrap();
    assert!(!interval.lock(&token).read_retry(fresh));
}

#[test]
fn test_s4_sequence_when_read_retry_holds_the_lock_cannot_change_under_it() {
    let (chain, set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    let mut table = interval.lock(&token);
    std::thread::scope(|s| {
        let invalidate = s.spawn(|| end(&chain, start(&chain, RANGE)));
        while set.active() == 0 {
            std::thread::yield_now();
        }
        // The invalidation is under way and wants the lock. What is installed now, it will find and drop.
        assert!(!table.read_retry(sequence));
        table.push(0x1000);
        drop(table);
        invalidate.join().unwrap();
    });
    let table = interval.lock(&token);
    assert!(table.is_empty(), "S1: dropped by the callback");
    assert!(table.read_retry(sequence));
}

#[test]
fn test_s5_read_when_invalidation_came_during_the_lookup_starts_over() {
    let (chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    let started = start(&chain, RANGE);
    // Looked up between start and end: useless.
    assert!(interval.lock(&token).read_retry(sequence));
    end(&chain, started);
    assert!(
        interval.lock(&token).read_retry(sequence),
        "and stays useless after the end"
    );
}

#[test]
fn test_s1_read_begin_when_invalidation_runs_sleeps_until_it_has_ended() {
    let (chain, set, interval, _token) = set_up();
    let started = start(&chain, RANGE);
    assert_eq!(interval.try_read_begin(), Err(ReadBusy::Invalidating));
    let ended = AtomicBool::new(false);
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let token = MaySleep::claim("reader");
            let sequence = interval.read_begin(&token).unwrap();
            assert!(ended.load(Ordering::SeqCst));
            assert!(!interval.lock(&token).read_retry(sequence));
        });
        while set.waiting_readers() == 0 && !reader.is_finished() {
            std::thread::yield_now();
        }
        assert!(!reader.is_finished());
        ended.store(true, Ordering::SeqCst);
        end(&chain, started);
    });
}

#[test]
fn test_s1_read_begin_when_two_invalidations_overlap_waits_for_the_last() {
    let (chain, _set, interval, token) = set_up();
    let first = start(&chain, RANGE);
    let second = start(&chain, RANGE);
    end(&chain, first);
    assert_eq!(interval.try_read_begin(), Err(ReadBusy::Invalidating));
    end(&chain, second);
    assert!(interval.read_begin(&token).is_ok());
}

#[test]
fn test_read_begin_when_only_another_range_changes_goes_on() {
    let (chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    let elsewhere = NotifierRange {
        start: 0x5000,
        end: 0x6000,
        ..RANGE
    };
    let started = start(&chain, elsewhere);
    assert!(interval.try_read_begin().is_ok());
    assert!(!interval.lock(&token).read_retry(sequence));
    end(&chain, started);
    assert!(!interval.lock(&token).read_retry(sequence));
}

#[test]
fn test_s6_check_retry_when_callback_holds_the_lock_answers_without_it() {
    let (chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    assert!(!interval.check_retry(sequence));
    let (entered, has_entered) = channel();
    let (go, may_go) = channel();
    *interval.ops().hold.lock().unwrap() = Some((entered, may_go));
    std::thread::scope(|s| {
        s.spawn(|| end(&chain, start(&chain, RANGE)));
        has_entered.recv().unwrap();
        assert!(
            interval.check_retry(sequence),
            "stored before the user's callback runs (S4)"
        );
        go.send(()).unwrap();
    });
    assert!(interval.check_retry(sequence));
}

#[test]
fn test_s6_check_retry_when_false_promises_nothing() {
    // The hint is false, the invalidation starts, read_retry is true: only the latter counts.
    let (chain, _set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    let hint = interval.check_retry(sequence);
    let started = start(&chain, RANGE);
    assert!(!hint && interval.lock(&token).read_retry(sequence));
    end(&chain, started);
}

#[test]
fn test_s9_start_when_non_blockable_and_lock_is_held_refuses_and_leaves_nothing_open() {
    let (chain, set, interval, token) = set_up();
    let non_blockable = NotifierRange {
        blockable: false,
        ..RANGE
    };
    let table = interval.lock(&token);
    let refused = std::thread::scope(|s| {
        s.spawn(|| {
            let section = NonSleeping::enter();
            chain
                .invalidate_range_start(non_blockable, Ctx::NonSleeping(&section))
                .unwrap_err()
        })
        .join()
        .unwrap()
    });
    assert!(matches!(
        refused,
        StartError::Again {
            subscriber: "interval notifiers"
        }
    ));
    drop(table);
    assert_eq!(set.active(), 0, "C3: it ends by itself");
    assert!(interval.try_read_begin().is_ok());
    end(&chain, start(&chain, non_blockable));
}

#[test]
fn test_c3_start_when_one_interval_refuses_all_of_them_retry_and_nothing_stays_open() {
    let (chain, set, willing, token) = set_up();
    let refusing = set
        .insert(0x1000, 0x2000, Device::default(), Vec::new(), &token)
        .unwrap();
    refusing.ops().refuse.store(true, Ordering::Relaxed);
    let after = set
        .insert(0x1000, 0x2000, Device::default(), vec![0x1000], &token)
        .unwrap();
    let sequence = willing.read_begin(&token).unwrap();
    let non_blockable = NotifierRange {
        blockable: false,
        ..RANGE
    };
    assert!(
        chain
            .invalidate_range_start(non_blockable, Ctx::MaySleep(&token))
            .is_err()
    );
    assert_eq!(set.active(), 0);
    assert!(willing.lock(&token).read_retry(sequence));
    assert!(
        after.lock(&token).is_empty(),
        "C6: called although one had refused"
    );
}

#[test]
fn test_s10_insert_when_an_invalidation_runs_counts_as_invalidated() {
    let (chain, set, _interval, token) = set_up();
    // Touches no interval: the sequence is still even when the newcomer arrives.
    let range = NotifierRange {
        start: 0x9000,
        end: 0xa000,
        ..RANGE
    };
    let started = start(&chain, range);
    let newcomer = set
        .insert(0x9000, 0xa000, Device::default(), Vec::new(), &token)
        .unwrap();
    assert_eq!(newcomer.try_read_begin(), Err(ReadBusy::Invalidating));
    end(&chain, started);
    let sequence = newcomer.read_begin(&token).unwrap();
    assert!(!newcomer.lock(&token).read_retry(sequence));
    end(&chain, start(&chain, range));
    assert!(newcomer.lock(&token).read_retry(sequence));
}

#[test]
fn test_s7_remove_when_callback_runs_waits_and_none_comes_after() {
    let (chain, set, interval, token) = set_up();
    let (entered, has_entered) = channel();
    let (go, may_go) = channel();
    *interval.ops().hold.lock().unwrap() = Some((entered, may_go));
    interval.lock(&token).push(0x1000);
    std::thread::scope(|s| {
        s.spawn(|| end(&chain, start(&chain, RANGE)));
        has_entered.recv().unwrap();
        let remover = s.spawn(|| {
            let token = MaySleep::claim("remover");
            set.remove(&interval, &token).unwrap();
            interval.lock(&token).len()
        });
        go.send(()).unwrap();
        assert_eq!(remover.join().unwrap(), 0, "the callback was finished");
    });
    interval.lock(&token).push(0x1000);
    end(&chain, start(&chain, RANGE));
    assert_eq!(interval.lock(&token).len(), 1, "no callback any more");
    let sequence = interval.read_begin(&token).unwrap();
    assert!(interval.lock(&token).read_retry(sequence), "and no read succeeds");
    assert_eq!(set.remove(&interval, &token), Err(UnregisterError::NotRegistered));
}

#[test]
fn test_s12_read_when_released_never_succeeds() {
    let (chain, set, interval, token) = set_up();
    let sequence = interval.read_begin(&token).unwrap();
    interval.lock(&token).push(0x4000);
    chain.release(&token);
    let table = interval.lock(&token);
    assert!(table.is_empty(), "no translation is left");
    assert!(table.read_retry(sequence));
    drop(table);
    assert_eq!(interval.read_begin(&token), Err(ReadBusy::Released));
    assert_eq!(interval.try_read_begin(), Err(ReadBusy::Released));
    let late = set.insert(0, 0x1000, Device::default(), Vec::new(), &token);
    assert!(matches!(late, Err(ReadBusy::Released)));
}

/// A filler and an invalidator race over a page whose content is the truth's version. After each end the device's
/// table must not hold an older version.
#[test]
fn test_s1_s5_fill_when_invalidations_race_never_leaves_an_old_version() {
    let token = MaySleep::claim("test");
    let chain = Chain::new();
    let set = IntervalNotifiers::new();
    chain.register(set.clone(), &token).unwrap();
    struct Versions;
    impl IntervalOps for Versions {
        type Protected = Option<u64>;
        fn invalidate(&self, entry: &mut Option<u64>, _: &NotifierRange, _: Ctx<'_>) -> Result<(), Again> {
            *entry = None;
            Ok(())
        }
    }
    let interval = set.insert(0x1000, 0x2000, Versions, None, &token).unwrap();
    let truth = std::sync::atomic::AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let filled = std::thread::scope(|s| {
        let filler = s.spawn(|| {
            let token = MaySleep::claim("filler");
            let mut filled = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let sequence = interval.read_begin(&token).unwrap();
                let version = truth.load(Ordering::SeqCst);
                let mut entry = interval.lock(&token);
                if !entry.read_retry(sequence) {
                    *entry = Some(version);
                    filled += 1;
                }
            }
            filled
        });
        for version in 1..3000 {
            let started = start(&chain, RANGE);
            truth.store(version, Ordering::SeqCst);
            end(&chain, started);
            let entry = *interval.lock(&token);
            assert!(entry.is_none_or(|v| v >= version), "{entry:?} after {version}");
        }
        stop.store(true, Ordering::Relaxed);
        filler.join().unwrap()
    });
    assert!(filled > 0);
}
