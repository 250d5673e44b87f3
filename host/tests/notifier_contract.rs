//! The caller's and the subscriber's invariants, against mock subscribers. Named by their ids.

mod mock;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use host::notifier::{
    Chain, Ctx, Event, MAX_SUBSCRIBERS, MaySleep, NonSleeping, NotifierRange, RegisterError, Registration,
    StartError, Subscriber, UnregisterError, might_sleep,
};
use mock::{Log, Mock, take};

const RANGE: NotifierRange = NotifierRange {
    start: 0x1000,
    end: 0x3000,
    event: Event::Unmap,
    blockable: true,
};
const NON_BLOCKABLE: NotifierRange = NotifierRange {
    blockable: false,
    ..RANGE
};

fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

fn run(chain: &Arc<Chain>, range: NotifierRange) {
    let token = MaySleep::claim("run");
    let started = chain
        .invalidate_range_start(range, Ctx::MaySleep(&token))
        .unwrap();
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
}

#[test]
fn test_c1_change_when_started_lies_between_every_start_and_every_end() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    for (name, sleeping) in [("sleeper", true), ("spinner", false)] {
        chain
            .register(Arc::new(Mock::new(name, sleeping, &log)), &token)
            .unwrap();
    }
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    assert!(chain.is_changing(0x2fff, 0x3000) && !chain.is_changing(0x3000, 0x4000));
    log.lock().unwrap().push(("caller", "change"));
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert!(!chain.is_changing(0, u64::MAX));
    // Non-sleeping subscribers come first, in both directions.
    assert_eq!(
        take(&log),
        [
            ("spinner", "start"),
            ("sleeper", "start"),
            ("caller", "change"),
            ("spinner", "end"),
            ("sleeper", "end"),
        ]
    );
}

#[test]
fn test_c2_end_when_start_is_dropped_is_given_and_counted() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    chain
        .register(Arc::new(Mock::new("m", true, &log)), &token)
        .unwrap();
    drop(
        chain
            .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
            .unwrap(),
    );
    assert_eq!(take(&log), [("m", "start"), ("m", "end")]);
    let stats = chain.stats();
    assert_eq!(
        (stats.started, stats.ended, stats.dropped, stats.active),
        (1, 0, 1, 0)
    );
    run(&chain, RANGE);
    let stats = chain.stats();
    assert_eq!((stats.started, stats.ended, stats.dropped), (2, 1, 1));
}

#[test]
fn test_c2_end_when_chain_or_context_is_another_panics() {
    let (chain, other, token) = (Chain::new(), Chain::new(), MaySleep::claim("test"));
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    let wrong_chain = catch_unwind(AssertUnwindSafe(|| {
        other.invalidate_range_end(started, Ctx::MaySleep(&token));
    }));
    assert!(wrong_chain.is_err());
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    let wrong_context = catch_unwind(AssertUnwindSafe(|| {
        let section = NonSleeping::enter();
        chain.invalidate_range_end(started, Ctx::NonSleeping(&section));
    }));
    assert!(wrong_context.is_err());
    assert_eq!(chain.stats().active, 0, "nothing stays open after the panics");
}

#[test]
fn test_c2_start_when_subscriber_panics_ends_those_that_had_started() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    chain
        .register(Arc::new(Mock::new("good", false, &log)), &token)
        .unwrap();
    let bad = Mock::new("bad", true, &log).on_start(|_, _| panic!("subscriber bug"));
    chain.register(Arc::new(bad), &token).unwrap();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let _ = chain.invalidate_range_start(RANGE, Ctx::MaySleep(&token));
    }));
    assert!(result.is_err());
    assert_eq!(take(&log), [("good", "start"), ("good", "end")]);
    assert_eq!(chain.stats().active, 0);
    assert_eq!(host::notifier::atomic_depth(), 0);
    assert!(!host::notifier::in_callback());
}

#[test]
fn test_c3_c6_s3_start_when_refused_calls_all_and_ends_only_those_that_started() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    for mock in [
        Mock::new("a", false, &log),
        Mock::new("b", true, &log).refusing(),
        Mock::new("c", true, &log),
        Mock::new("d", true, &log).refusing(),
        Mock::new("e", true, &log),
    ] {
        chain.register(Arc::new(mock), &token).unwrap();
    }
    let refused = chain.invalidate_range_start(NON_BLOCKABLE, Ctx::MaySleep(&token));
    assert_eq!(refused.unwrap_err(), StartError::Again { subscriber: "b" });
    assert_eq!(
        take(&log),
        [
            ("a", "start"),
            ("b", "refused"),
            ("c", "start"),
            ("d", "refused"),
            ("e", "start"),
            ("a", "end"),
            ("c", "end"),
            ("e", "end"),
        ]
    );
    assert!(!chain.is_changing(0, u64::MAX));
    let stats = chain.stats();
    assert_eq!((stats.refused, stats.started, stats.ended), (1, 0, 0));
    // The same range, blockable: nobody may refuse, and nobody does.
    run(&chain, RANGE);
    assert_eq!(take(&log).len(), 10);
}

#[test]
fn test_c4_start_when_blockable_is_refused_names_the_bug() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let broken = Mock::new("broken", true, &log);
    broken.broken.store(true, Ordering::Relaxed);
    chain
        .register(Arc::new(Mock::new("good", true, &log)), &token)
        .unwrap();
    chain.register(Arc::new(broken), &token).unwrap();
    let refused = chain.invalidate_range_start(RANGE, Ctx::MaySleep(&token));
    let error = refused.unwrap_err();
    assert_eq!(error, StartError::Broken { subscriber: "broken" });
    assert!(error.to_string().contains("C4: broken"), "{error}");
    assert_eq!(
        take(&log),
        [("good", "start"), ("broken", "refused"), ("good", "end")]
    );
    assert_eq!(chain.stats().broken, 1);
}

#[test]
#[should_panic(expected = "S9: a blockable invalidation")]
fn test_c4_start_when_blockable_in_atomic_section_panics() {
    let (chain, token) = (Chain::new(), MaySleep::claim("test"));
    let _section = NonSleeping::enter();
    let _ = chain.invalidate_range_start(RANGE, Ctx::MaySleep(&token));
}

#[test]
fn test_c7_release_when_called_reaches_each_subscriber_once() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let a = chain
        .register(Arc::new(Mock::new("a", true, &log)), &token)
        .unwrap();
    let b = chain
        .register(Arc::new(Mock::new("b", false, &log)), &token)
        .unwrap();
    chain.unregister(b, &token).unwrap();
    assert_eq!(take(&log), [("b", "release")]);
    chain.release(&token);
    chain.release(&token);
    assert_eq!(take(&log), [("a", "release")]);
    assert_eq!(chain.unregister(a, &token), Err(UnregisterError::NotRegistered));
    assert_eq!(chain.unregister(b, &token), Err(UnregisterError::NotRegistered));
    let late = chain.register(Arc::new(Mock::new("late", true, &log)), &token);
    assert_eq!(late, Err(RegisterError::Released));
    run(&chain, RANGE);
    assert_eq!(take(&log), []);
}

#[test]
fn test_c7_release_when_another_thread_unregisters_waits_for_its_release_call() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let (entered, has_entered) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let mock = Mock::new("m", true, &log).on_release(move || {
        entered.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
    });
    let registration = chain.register(Arc::new(mock), &token).unwrap();
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("unregister");
            chain.unregister(registration, &token).unwrap();
        });
        has_entered.recv().unwrap();
        let releaser = s.spawn(|| {
            let token = MaySleep::claim("release");
            chain.release(&token);
            take(&log)
        });
        // It waits, as the subscriber's release is still running elsewhere: pages must not be freed yet.
        until(|| chain.waiting_removals() == 1 || releaser.is_finished());
        assert!(!releaser.is_finished());
        go.send(()).unwrap();
        assert_eq!(
            releaser.join().unwrap(),
            [("m", "release")],
            "once, and before it returned"
        );
    });
}

#[test]
fn test_s2_start_when_a_subscriber_is_not_drained_yet_does_not_return() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let (entered, has_entered) = mpsc::channel();
    let (drained, is_drained) = mpsc::channel::<()>();
    let is_drained = Mutex::new(is_drained);
    let mock = Mock::new("m", true, &log).on_start(move |_, ctx| {
        ctx.may_sleep().unwrap();
        entered.send(()).unwrap();
        is_drained.lock().unwrap().recv().unwrap();
    });
    chain.register(Arc::new(mock), &token).unwrap();
    let returned = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
                .unwrap();
            returned.store(true, Ordering::SeqCst);
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        has_entered.recv().unwrap();
        assert!(!returned.load(Ordering::SeqCst));
        assert!(
            chain.is_changing(RANGE.start, RANGE.end),
            "S1 holds from before the callbacks on"
        );
        drained.send(()).unwrap();
    });
    assert!(returned.load(Ordering::SeqCst));
}

#[test]
fn test_s7_unregister_when_called_from_a_callback_is_an_error() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let registration: Arc<Mutex<Option<Registration>>> = Arc::default();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let hook = {
        let (chain, registration, answers) = (Arc::downgrade(&chain), registration.clone(), answers.clone());
        move || {
            // A callback that sleeps has a token of its own; that does not make this any better.
            let registration = registration.lock().unwrap();
            if let (Some(chain), Some(registration)) = (chain.upgrade(), *registration)
                && host::notifier::atomic_depth() == 0
            {
                let token = MaySleep::claim("callback");
                answers
                    .lock()
                    .unwrap()
                    .push(chain.unregister(registration, &token));
            }
        }
    };
    let (on_start, on_end) = (hook.clone(), hook.clone());
    let mock = Mock::new("m", true, &log)
        .on_start(move |_, _| on_start())
        .on_end(move |_, _| on_end())
        .on_release(hook);
    *registration.lock().unwrap() = Some(chain.register(Arc::new(mock), &token).unwrap());
    run(&chain, RANGE);
    let from_here = registration.lock().unwrap().unwrap();
    chain.unregister(from_here, &token).unwrap();
    assert_eq!(
        *answers.lock().unwrap(),
        [Err(UnregisterError::FromCallback); 3],
        "start, end, release"
    );
}

#[test]
fn test_s7_unregister_when_a_callback_runs_returns_after_it() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let (entered, has_entered) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let mock = Mock::new("m", true, &log).on_start(move |_, _| {
        entered.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
    });
    let registration = chain.register(Arc::new(mock), &token).unwrap();
    std::thread::scope(|s| {
        let starter = s.spawn(|| run(&chain, RANGE));
        has_entered.recv().unwrap();
        let unregister = s.spawn(|| {
            let token = MaySleep::claim("unregister");
            chain.unregister(registration, &token).unwrap();
            take(&log)
        });
        until(|| chain.waiting_removals() == 1 || unregister.is_finished());
        assert!(!unregister.is_finished());
        go.send(()).unwrap();
        let seen = unregister.join().unwrap();
        assert!(
            seen.contains(&("m", "start")),
            "the callback was over when unregister returned: {seen:?}"
        );
        starter.join().unwrap();
        // Gone: the end of the running invalidation may have found it or not, nothing comes after.
        run(&chain, RANGE);
        assert!(!take(&log).contains(&("m", "start")));
    });
}

#[test]
fn test_c2_end_when_place_was_taken_over_does_not_reach_the_newcomer() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let old = chain
        .register(Arc::new(Mock::new("old", true, &log)), &token)
        .unwrap();
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    chain.unregister(old, &token).unwrap();
    std::thread::scope(|s| {
        let newcomer = s.spawn(|| {
            let token = MaySleep::claim("newcomer");
            chain
                .register(Arc::new(Mock::new("new", true, &log)), &token)
                .unwrap();
        });
        until(|| chain.waiting_registrations() == 1 || newcomer.is_finished());
        assert!(!newcomer.is_finished());
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    });
    assert_eq!(take(&log), [("old", "start"), ("old", "release")]);
}

#[test]
fn test_s9_callback_when_not_blockable_has_no_token_and_cannot_sleep() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let tokens = Arc::new(AtomicU32::new(0));
    let counter = tokens.clone();
    let mock = Mock::new("m", true, &log).on_start(move |range, ctx| {
        assert_eq!(ctx.may_sleep().is_ok(), range.blockable);
        if ctx.may_sleep().is_ok() {
            counter.fetch_add(1, Ordering::Relaxed);
            might_sleep("allowed here");
        } else {
            assert!(catch_unwind(|| might_sleep("not here")).is_err());
            assert!(catch_unwind(|| MaySleep::claim("not here")).is_err());
        }
    });
    chain.register(Arc::new(mock), &token).unwrap();
    run(&chain, RANGE);
    run(&chain, NON_BLOCKABLE);
    assert_eq!(tokens.load(Ordering::Relaxed), 1);
}

#[test]
fn test_s9_callback_when_subscriber_never_sleeps_gets_no_token_even_if_blockable() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let check = |_: &NotifierRange, ctx: Ctx<'_>| {
        assert!(ctx.may_sleep().is_err());
        assert!(catch_unwind(|| might_sleep("a non-sleeping subscriber")).is_err());
    };
    let mock = Mock::new("m", false, &log).on_start(check).on_end(check);
    chain.register(Arc::new(mock), &token).unwrap();
    run(&chain, RANGE);
    assert_eq!(take(&log), [("m", "start"), ("m", "end")]);
}

#[test]
fn test_s10_register_when_an_invalidation_runs_returns_after_its_end() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    std::thread::scope(|s| {
        let register = s.spawn(|| {
            let token = MaySleep::claim("register");
            chain
                .register(Arc::new(Mock::new("m", true, &log)), &token)
                .unwrap();
            log.lock().unwrap().push(("m", "registered"));
        });
        until(|| chain.waiting_registrations() == 1 || register.is_finished());
        assert!(!register.is_finished());
        // One that starts now is told to it already, and does not make it wait any longer.
        let second = chain
            .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
            .unwrap();
        assert_eq!(take(&log), [("m", "start")]);
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        register.join().unwrap();
        assert_eq!(take(&log), [("m", "registered")], "no end without a start");
        chain.invalidate_range_end(second, Ctx::MaySleep(&token));
        assert_eq!(take(&log), [("m", "end")]);
    });
}

/// Threads invalidate without pause while subscribers come and go. A subscriber that has registered must hear of
/// everything that starts afterwards, and the ends it hears must match its starts.
#[test]
fn test_s10_register_when_invalidations_storm_misses_none() {
    let chain = Chain::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    run(&chain, RANGE);
                }
            });
        }
        let token = MaySleep::claim("test");
        for round in 0..200 {
            let open = Arc::new(AtomicU32::new(0));
            let starts = Arc::new(AtomicU32::new(0));
            let (up, down, count) = (open.clone(), open.clone(), starts.clone());
            let mock = Mock::new("m", round % 2 == 0, &Log::default())
                .on_start(move |_, _| {
                    up.fetch_add(1, Ordering::SeqCst);
                    count.fetch_add(1, Ordering::SeqCst);
                })
                .on_end(move |_, _| {
                    let before = down.fetch_sub(1, Ordering::SeqCst);
                    assert!(before > 0, "an end without a start");
                });
            let registration = chain.register(Arc::new(mock), &token).unwrap();
            let before = starts.load(Ordering::SeqCst);
            run(&chain, RANGE);
            assert!(starts.load(Ordering::SeqCst) > before, "missed its own");
            chain.unregister(registration, &token).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = chain.stats();
    assert_eq!((stats.active, stats.subscribers, stats.dropped), (0, 0, 0));
    assert_eq!(stats.started, stats.ended);
}

#[test]
fn test_s11_start_when_device_holds_dirty_data_returns_after_it_reached_the_page() {
    // A write-back device: what it wrote is in its own buffer until it is flushed.
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let page = Arc::new(AtomicU8::new(0));
    let cpu = page.clone();
    let mock = Mock::new("write-back", false, &log).on_start(move |_, _| page.store(0x5a, Ordering::Relaxed));
    chain.register(Arc::new(mock), &token).unwrap();
    let started = chain
        .invalidate_range_start(RANGE, Ctx::MaySleep(&token))
        .unwrap();
    assert_eq!(cpu.load(Ordering::Relaxed), 0x5a, "before the page is unmapped");
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
}

#[test]
fn test_s12_release_when_a_start_runs_comes_back_after_its_callbacks() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    let (entered, has_entered) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let mock = Mock::new("m", true, &log).on_start(move |_, _| {
        entered.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
    });
    chain.register(Arc::new(mock), &token).unwrap();
    std::thread::scope(|s| {
        s.spawn(|| run(&chain, RANGE));
        has_entered.recv().unwrap();
        let releaser = s.spawn(|| {
            let token = MaySleep::claim("release");
            chain.release(&token);
            take(&log)
        });
        until(|| chain.waiting_removals() == 1 || releaser.is_finished());
        assert!(!releaser.is_finished());
        go.send(()).unwrap();
        let seen = releaser.join().unwrap();
        assert!(
            seen.contains(&("m", "start")) && seen.contains(&("m", "release")),
            "{seen:?}"
        );
    });
    assert!(chain.is_released());
}

#[test]
fn test_register_when_chain_is_full_or_in_a_callback_is_an_error() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    for _ in 0..MAX_SUBSCRIBERS {
        chain
            .register(Arc::new(Mock::new("m", true, &log)), &token)
            .unwrap();
    }
    let full = chain.register(Arc::new(Mock::new("extra", true, &log)), &token);
    assert_eq!(full, Err(RegisterError::Full { name: "extra" }));
    assert_eq!(chain.stats().subscribers, MAX_SUBSCRIBERS as u64);
    run(&chain, RANGE);
    assert_eq!(take(&log).len(), 2 * MAX_SUBSCRIBERS);

    let chain = Chain::new();
    let weak = Arc::downgrade(&chain);
    let inner = log.clone();
    let answer = Arc::new(Mutex::new(None));
    let keep = answer.clone();
    let mock = Mock::new("m", true, &log).on_start(move |_, ctx| {
        let chain = weak.upgrade().unwrap();
        let another: Arc<dyn Subscriber> = Arc::new(Mock::new("inner", true, &inner));
        *keep.lock().unwrap() = Some(chain.register(another, ctx.may_sleep().unwrap()));
    });
    chain.register(Arc::new(mock), &token).unwrap();
    run(&chain, RANGE);
    assert_eq!(*answer.lock().unwrap(), Some(Err(RegisterError::FromCallback)));
}

#[test]
fn test_start_when_table_of_active_ranges_is_full_refuses_or_waits() {
    let (chain, token) = (Chain::new(), MaySleep::claim("test"));
    let mut open = Vec::new();
    let refused = loop {
        match chain.invalidate_range_start(NON_BLOCKABLE, Ctx::MaySleep(&token)) {
            Ok(started) => open.push(started),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, StartError::Again { .. }));
    assert_eq!(chain.stats().active, open.len() as u64);
    std::thread::scope(|s| {
        let starter = s.spawn(|| run(&chain, RANGE));
        until(|| chain.waiting_registrations() == 1 || starter.is_finished());
        assert!(!starter.is_finished());
        chain.invalidate_range_end(open.pop().unwrap(), Ctx::MaySleep(&token));
        starter.join().unwrap();
    });
    for started in open {
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    }
    assert_eq!(chain.stats().active, 0);
}

#[test]
fn test_start_when_range_is_empty_is_an_error() {
    let (chain, token) = (Chain::new(), MaySleep::claim("test"));
    for (start, end) in [(0x1000, 0x1000), (0x2000, 0x1000)] {
        let range = NotifierRange { start, end, ..RANGE };
        let error = chain
            .invalidate_range_start(range, Ctx::MaySleep(&token))
            .unwrap_err();
        assert_eq!(error, StartError::Empty { start, end });
    }
}

#[test]
fn test_invalidate_page_when_one_refuses_calls_the_rest() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    chain
        .register(Arc::new(Mock::new("a", true, &log).refusing()), &token)
        .unwrap();
    chain
        .register(Arc::new(Mock::new("b", true, &log)), &token)
        .unwrap();
    let refused = chain.invalidate_page(NON_BLOCKABLE, Ctx::MaySleep(&token));
    assert_eq!(refused, Err(StartError::Again { subscriber: "a" }));
    assert_eq!(take(&log), [("a", "refused"), ("b", "start"), ("b", "end")]);
    chain.invalidate_page(RANGE, Ctx::MaySleep(&token)).unwrap();
    assert_eq!(take(&log).len(), 4);
}

#[test]
fn test_recorder_when_events_differ_keeps_them_apart() {
    let (log, chain, token) = (Log::default(), Chain::new(), MaySleep::claim("test"));
    chain
        .register(Arc::new(Mock::new("m", true, &log).refusing()), &token)
        .unwrap();
    run(&chain, RANGE);
    let clear = NotifierRange {
        event: Event::Clear,
        ..NON_BLOCKABLE
    };
    assert!(
        chain
            .invalidate_range_start(clear, Ctx::MaySleep(&token))
            .is_err()
    );
    let summaries = chain.recorder().summaries();
    let of = |event| summaries.iter().find(|s| s.event == Some(event)).unwrap();
    assert_eq!(
        (
            of(Event::Unmap).whole.count,
            of(Event::Unmap).refused,
            of(Event::Unmap).ends
        ),
        (1, 0, 1)
    );
    assert_eq!(
        (
            of(Event::Clear).whole.count,
            of(Event::Clear).refused,
            of(Event::Clear).ends
        ),
        (1, 1, 0)
    );
    assert_eq!(summaries.len(), 2);
    assert!(of(Event::Unmap).nonsleeping.max_ns <= of(Event::Unmap).whole.max_ns);
}
