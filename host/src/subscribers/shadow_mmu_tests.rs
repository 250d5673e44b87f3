use super::*;
use crate::notifier::{Chain, Event};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

fn page(va: u64) -> NotifierRange {
    NotifierRange {
        start: va,
        end: va + 4096,
        event: Event::Unmap,
        blockable: false,
    }
}

fn set_up() -> (Arc<Chain>, Arc<ShadowMmu>, MaySleep) {
    let chain = Chain::new();
    let shadow = ShadowMmu::new(64);
    let token = MaySleep::claim("test");
    chain.register(shadow.clone(), &token).unwrap();
    (chain, shadow, token)
}

#[test]
fn test_s1_fault_when_invalidation_is_running_installs_after_its_end() {
    let (chain, shadow, token) = set_up();
    let truth = AtomicU64::new(1);
    let started = chain
        .invalidate_range_start(page(0x5000), Ctx::MaySleep(&token))
        .unwrap();
    let (looked, has_looked) = mpsc::channel();
    std::thread::scope(|s| {
        let (shadow, truth) = (&shadow, &truth);
        let fault = s.spawn(move || {
            let token = MaySleep::claim("fault");
            shadow.fault(0x5008, &token, || {
                let _ = looked.send(());
                Some(truth.load(Ordering::Relaxed))
            })
        });
        // It has looked the old page up three times: it has been turned away twice.
        for _ in 0..3 {
            has_looked.recv().unwrap();
        }
        assert_eq!(shadow.translate(0x5000), None);
        truth.store(2, Ordering::Relaxed);
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        assert_eq!(fault.join().unwrap(), FaultResult::Installed(2));
    });
    assert!(shadow.stats().retries >= 2);
}

#[test]
fn test_s1_fault_when_only_another_range_changes_is_served() {
    let (chain, shadow, token) = set_up();
    let started = chain
        .invalidate_range_start(page(0x5000), Ctx::MaySleep(&token))
        .unwrap();
    assert_eq!(
        shadow.fault(0x6000, &token, || Some(9)),
        FaultResult::Installed(9)
    );
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert_eq!(shadow.translate(0x6000), Some(9));
}

#[test]
fn test_s5_fault_when_a_whole_invalidation_runs_during_the_lookup_starts_over() {
    // Read after the look-up, the sequence would already be the new one and the old page be installed.
    let (chain, shadow, token) = set_up();
    let truth = AtomicU64::new(1);
    let mut looks = 0;
    let result = shadow.fault(0x5000, &token, || {
        looks += 1;
        let old = truth.load(Ordering::Relaxed);
        if looks == 1 {
            let started = chain
                .invalidate_range_start(page(0x5000), Ctx::MaySleep(&token))
                .unwrap();
            truth.store(2, Ordering::Relaxed);
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        }
        Some(old)
    });
    assert_eq!((result, looks), (FaultResult::Installed(2), 2));
    assert_eq!(shadow.translate(0x5000), Some(2));
}

#[test]
fn test_s1_fault_when_two_invalidations_overlap_waits_for_both() {
    let (chain, shadow, token) = set_up();
    let first = chain
        .invalidate_range_start(page(0x5000), Ctx::MaySleep(&token))
        .unwrap();
    let second = chain
        .invalidate_range_start(page(0x9000), Ctx::MaySleep(&token))
        .unwrap();
    chain.invalidate_range_end(second, Ctx::MaySleep(&token));
    let mut first = Some(first);
    let mut looks = 0;
    // The union of both ranges stays closed until the last has ended.
    let result = shadow.fault(0x5000, &token, || {
        looks += 1;
        if looks == 3 {
            chain.invalidate_range_end(first.take().unwrap(), Ctx::MaySleep(&token));
        }
        Some(looks)
    });
    assert_eq!(result, FaultResult::Installed(4));
}

#[test]
fn test_s2_start_when_range_is_mapped_leaves_no_entry() {
    let (chain, shadow, token) = set_up();
    for va in [0x4000, 0x5000, 0x6000] {
        let _ = shadow.fault(va, &token, || Some(va));
    }
    let started = chain
        .invalidate_range_start(page(0x5000), Ctx::MaySleep(&token))
        .unwrap();
    assert_eq!(
        [0x4000, 0x5000, 0x6000].map(|va| shadow.translate(va)),
        [Some(0x4000), None, Some(0x6000)]
    );
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert_eq!(shadow.stats().zapped, 1);
}

#[test]
fn test_s12_fault_when_released_installs_nothing() {
    let (chain, shadow, token) = set_up();
    let _ = shadow.fault(0x4000, &token, || Some(1));
    chain.release(&token);
    assert_eq!(shadow.live(), 0);
    assert_eq!(shadow.fault(0x4000, &token, || Some(1)), FaultResult::Released);
    // Also when the release comes during the look-up.
    let (chain, shadow, token) = set_up();
    let result = shadow.fault(0x4000, &token, || {
        let token = MaySleep::claim("release");
        chain.release(&token);
        Some(1)
    });
    assert_eq!((result, shadow.live()), (FaultResult::Released, 0));
}

#[test]
fn test_young_when_page_was_used_is_told_once() {
    let (chain, shadow, token) = set_up();
    let _ = shadow.fault(0x4000, &token, || Some(1));
    assert!(chain.test_young(0x4000, 0x5000));
    assert!(chain.clear_flush_young(0x4000, 0x5000));
    assert!(!chain.clear_flush_young(0x4000, 0x5000));
    assert_eq!(shadow.translate(0x4000), Some(1));
    assert!(!chain.test_young(0x5000, 0x6000));
    assert!(chain.clear_young(0x4fff, 0x5000));
}

#[test]
fn test_invalidate_page_when_lookup_is_running_makes_it_start_over() {
    // v13: the page's entry is gone already when the operation comes; default = start + end.
    let (chain, shadow, token) = set_up();
    let mut looks = 0;
    let result = shadow.fault(0x5000, &token, || {
        looks += 1;
        if looks == 1 {
            chain
                .invalidate_page(page(0x5000), Ctx::MaySleep(&token))
                .unwrap();
            return Some(1);
        }
        None
    });
    assert_eq!((result, looks), (FaultResult::NoPage, 2));
}
