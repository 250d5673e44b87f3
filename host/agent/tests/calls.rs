//! Covered calls against a daemon in this process.
#![allow(unsafe_code, reason = "maps and unmaps memory")]

mod mock;

use agent::{Agent, Memory};
use mock::{Mock, Options, Seen};
use protos::bridge::control::UffdMode;
use protos::bridge::shared::{bucket_of, slot_event};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// One attachment per process, so one test at a time. `None`: skip the test.
fn one_at_a_time() -> Option<MutexGuard<'static, ()>> {
    static LOCK: Mutex<()> = Mutex::new(());
    mock::available().then(|| LOCK.lock().unwrap_or_else(PoisonError::into_inner))
}

fn map(agent: &Agent, memory: &Memory, len: usize) -> usize {
    // SAFETY: a new mapping.
    unsafe { agent.mmap(0, len, RW, libc::MAP_SHARED, Some(memory.fd()), 0) }
        .unwrap()
        .value
}

fn unmap(agent: &Agent, at: usize, len: usize) -> std::io::Result<u64> {
    // SAFETY: the tests keep no references into their mappings.
    unsafe { agent.munmap(at, len) }.map(|c| c.generation)
}

fn is_mapped(at: usize) -> bool {
    let mut vec = 0u8;
    // SAFETY: mincore of one page into one byte.
    unsafe { libc::mincore(at as *mut libc::c_void, PAGE, &raw mut vec) == 0 }
}

fn hops(seen: &[Seen]) -> usize {
    seen.iter().filter(|s| matches!(s, Seen::Start { .. })).count()
}

fn events(seen: &[Seen]) -> usize {
    seen.iter().filter(|s| matches!(s, Seen::Event { .. })).count()
}

#[test]
fn test_munmap_when_nothing_is_cached_talks_to_nobody() {
    let Some(_one) = one_at_a_time() else { return };
    for uffd_mode in [UffdMode::Missing, UffdMode::Wp] {
        let mock = Mock::start(Options {
            uffd_mode,
            ..Options::default()
        });
        let agent = mock.attach();
        let before = agent.stats();
        let memory = agent.memory(1 << 20, "silent").unwrap();
        let mut last = 0;
        for _ in 0..100 {
            let at = map(agent, &memory, 1 << 20);
            let generation = unmap(agent, at, 1 << 20).unwrap();
            assert!(generation > last);
            assert!(!is_mapped(at));
            last = generation;
        }
        assert_eq!(agent.generation(), last);
        let after = agent.stats();
        assert_eq!(after.calls - before.calls, 200);
        assert_eq!(after.hops, before.hops);
        assert_eq!(after.register_failed, before.register_failed);
        assert_eq!(after.unregister_failed, before.unregister_failed);
        let seen = mock.seen();
        assert_eq!((hops(&seen), events(&seen)), (0, 0), "{seen:?}");
        mock.assert_idle();
        agent.detach().unwrap();
    }
}

#[test]
fn test_c1_munmap_when_a_page_is_cached_waits_for_the_daemon_before_it_unmaps() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(4 * PAGE as u64, "counted").unwrap();
    let at = map(agent, &memory, 4 * PAGE);
    mock.count(at);
    mock.set_gate(false);
    let generation = std::thread::scope(|s| {
        let t = s.spawn(|| unmap(agent, at, 4 * PAGE).unwrap());
        mock.wait_until("START", |seen| hops(seen) == 1);
        assert!(is_mapped(at));
        let in_progress = &mock.inner().table.in_progress[bucket_of(at as u64)];
        assert_eq!(in_progress.load(Ordering::SeqCst), 1);
        mock.set_gate(true);
        t.join().unwrap()
    });
    assert!(!is_mapped(at));
    let range = (at as u64, (at + 4 * PAGE) as u64);
    let seen = mock.wait_until("END", |seen| seen.contains(&Seen::End { range, generation }));
    assert!(seen.contains(&Seen::Start {
        range,
        generation,
        event: slot_event::UNMAP
    }));
    assert_eq!(events(&seen), 0);
    mock.wait_slots_free();
    mock.assert_idle();
    agent.detach().unwrap();
}

#[test]
fn test_call_when_it_fails_ends_what_it_started() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(2 * PAGE as u64, "fails").unwrap();
    let at = map(agent, &memory, 2 * PAGE);
    mock.count(at);
    // Only the first page is there: the calls change it, and fail at the second.
    unmap(agent, at + PAGE, PAGE).unwrap();
    let count = |seen: &[Seen], end: bool| {
        seen.iter()
            .filter(|s| matches!(s, Seen::End { .. }) == end && !matches!(s, Seen::Memory { .. }))
            .count()
    };
    for step in 0..2 {
        // SAFETY: only shared pages of this test.
        let error = unsafe {
            if step == 0 {
                agent.madvise(at, 2 * PAGE, libc::MADV_DONTNEED).map(drop)
            } else {
                agent.mprotect(at, 2 * PAGE, libc::PROT_READ).map(drop)
            }
        }
        .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        mock.wait_until("END of the failed call", |seen| {
            hops(seen) == step + 2 && count(seen, true) == step + 2
        });
        mock.assert_idle();
    }
    // Registered as before: an uncovered call raises an event.
    // SAFETY: the test's own page.
    unsafe { agent::raw::munmap(at, PAGE) }.unwrap();
    mock.wait_until("event", |seen| events(seen) == 1);
    // Refused before anything starts.
    assert_eq!(
        unmap(agent, at + 1, PAGE).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
    assert_eq!(hops(&mock.seen()), 3);
    mock.assert_idle();
    agent.detach().unwrap();
}

#[test]
fn test_calls_when_ranges_overlap_are_serialised_and_others_are_not() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(8 * PAGE as u64, "overlap").unwrap();
    let at = map(agent, &memory, 8 * PAGE);
    mock.count(at);
    mock.count(at + 8 * PAGE - 1);
    let discard = |page: usize, pages: usize| {
        // SAFETY: shared pages of this test.
        unsafe { agent.madvise(at + page * PAGE, pages * PAGE, libc::MADV_DONTNEED) }.unwrap()
    };
    mock.set_gate(false);
    std::thread::scope(|s| {
        let first = s.spawn(|| discard(0, 4));
        mock.wait_until("first START", |seen| hops(seen) == 1);
        let waits = agent.stats().lock_waits;
        let overlapping = s.spawn(|| discard(3, 2));
        let apart = s.spawn(|| discard(6, 2));
        // The one that does not overlap gets to the daemon while the first is still inside.
        mock.wait_until("second START", |seen| hops(seen) == 2);
        while agent.stats().lock_waits == waits {
            std::thread::yield_now();
        }
        assert_eq!(hops(&mock.seen()), 2);
        mock.set_gate(true);
        let generations: BTreeSet<u64> = [first, overlapping, apart]
            .map(|t| t.join().unwrap().generation)
            .into();
        assert_eq!(generations.len(), 3);
    });
    let seen = mock.wait_until("all ENDs", |seen| {
        seen.iter().filter(|s| matches!(s, Seen::End { .. })).count() == 3
    });
    let range = |page: usize, pages: usize| ((at + page * PAGE) as u64, (at + (page + pages) * PAGE) as u64);
    let position = |wanted: (u64, u64), start: bool| {
        seen.iter()
            .position(|s| match s {
                Seen::Start { range, .. } => start && *range == wanted,
                _ => false,
            })
            .unwrap()
    };
    assert!(position(range(6, 2), true) < position(range(3, 2), true));
    mock.assert_idle();
    agent.detach().unwrap();
}

#[test]
fn test_generation_when_threads_call_at_once_never_repeats() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(64 * PAGE as u64, "generation").unwrap();
    let at = map(agent, &memory, 64 * PAGE);
    mock.count(at);
    let all = Mutex::new(BTreeSet::new());
    std::thread::scope(|s| {
        for t in 0..4 {
            let all = &all;
            s.spawn(move || {
                let mut last = 0;
                for i in 0..200 {
                    // SAFETY: shared pages of this test.
                    let g = unsafe { agent.mprotect(at + (t * 16 + i % 16) * PAGE, PAGE, RW) }
                        .unwrap()
                        .generation;
                    assert!(g > last);
                    last = g;
                    assert!(all.lock().unwrap().insert(g));
                }
            });
        }
    });
    assert_eq!(all.lock().unwrap().len(), 800);
    mock.wait_slots_free();
    mock.assert_idle();
    unmap(agent, at, 64 * PAGE).unwrap();
    agent.detach().unwrap();
}

/// Page that the signal handler discards.
static HANDLER_PAGE: AtomicUsize = AtomicUsize::new(0);
static HANDLER_RUNS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_alarm(_: libc::c_int) {
    let at = HANDLER_PAGE.load(Ordering::SeqCst);
    if at != 0 {
        // SAFETY: shared pages of the test; a covered call in a signal handler.
        unsafe {
            let _ = agent::covered::madvise(at, PAGE, libc::MADV_DONTNEED);
            if let Ok(c) = agent::covered::mmap(0, PAGE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) {
                let _ = agent::covered::munmap(c.value, PAGE);
            }
        }
        HANDLER_RUNS.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn test_calls_when_signal_handlers_make_them_too_do_not_deadlock() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(8 * PAGE as u64, "storm").unwrap();
    let at = map(agent, &memory, 8 * PAGE);
    mock.count(at);
    HANDLER_PAGE.store(at, Ordering::SeqCst);
    let timer = |usec| libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: usec,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: usec,
        },
    };
    // SAFETY: a handler that only makes async-signal-safe calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_alarm as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()),
            0
        );
        libc::setitimer(libc::ITIMER_REAL, &timer(500), std::ptr::null_mut());
    }
    // The same pages as the handler's.
    let mut calls = 0;
    while HANDLER_RUNS.load(Ordering::SeqCst) < 300 {
        // SAFETY: shared pages of this test.
        unsafe { agent.madvise(at, 2 * PAGE, libc::MADV_DONTNEED) }.unwrap();
        calls += 1;
    }
    // SAFETY: stops the timer.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer(0), std::ptr::null_mut()) };
    HANDLER_PAGE.store(0, Ordering::SeqCst);
    assert!(calls > 0);
    unmap(agent, at, 8 * PAGE).unwrap();
    agent.detach().unwrap();
    mock.assert_idle();
}

#[test]
fn test_raw_munmap_when_memory_is_registered_raises_an_event() {
    let Some(_one) = one_at_a_time() else { return };
    for uffd_mode in [UffdMode::Missing, UffdMode::Wp] {
        let mock = Mock::start(Options {
            uffd_mode,
            ..Options::default()
        });
        let agent = mock.attach();
        let memory = agent.memory(4 * PAGE as u64, "event").unwrap();
        let at = map(agent, &memory, 4 * PAGE);
        // SAFETY: the test's own pages.
        unsafe { agent::raw::munmap(at, PAGE) }.unwrap();
        let range = (at as u64, (at + PAGE) as u64);
        mock.wait_until("event", |seen| seen.contains(&Seen::Event { event: 22, range }));
        // The library's table still knows the page: unregistering fails over the hole, and the event path
        // takes over.
        unmap(agent, at, 4 * PAGE).unwrap();
        assert!(!is_mapped(at + PAGE));
        mock.assert_idle();
        agent.detach().unwrap();
    }
}

#[test]
fn test_munmap_when_above_the_threshold_takes_the_event_path() {
    let Some(_one) = one_at_a_time() else { return };
    // SAFETY: no other thread of this test binary reads the environment by C functions.
    unsafe { std::env::set_var("TLBRIDGE_UNREGISTER_MAX", "8192") };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    // SAFETY: as above.
    unsafe { std::env::remove_var("TLBRIDGE_UNREGISTER_MAX") };
    let memory = agent.memory(4 * PAGE as u64, "threshold").unwrap();
    let at = map(agent, &memory, 4 * PAGE);
    // SAFETY: shared pages of this test.
    unsafe { agent.madvise(at, 4 * PAGE, libc::MADV_DONTNEED) }.unwrap();
    mock.wait_until("REMOVE", |seen| events(seen) == 1);
    unmap(agent, at + 3 * PAGE, PAGE).unwrap();
    assert_eq!(events(&mock.seen()), 1, "one page is below the threshold");
    unmap(agent, at, 3 * PAGE).unwrap();
    mock.wait_until("UNMAP", |seen| events(seen) == 2);
    assert!(!is_mapped(at));
    agent.detach().unwrap();
}

#[test]
fn test_mremap_when_it_moves_purges_both_ranges_and_registers_the_new_one() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(4 * PAGE as u64, "move").unwrap();
    let at = map(agent, &memory, 4 * PAGE);
    let target = map(agent, &memory, 4 * PAGE);
    mock.count(at);
    mock.count(target);
    // SAFETY: the test's own pages.
    let moved = unsafe {
        agent.mremap(
            at,
            4 * PAGE,
            4 * PAGE,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            target,
        )
    }
    .unwrap();
    assert_eq!(moved.value, target);
    let seen = mock.wait_until("two ENDs", |seen| {
        seen.iter().filter(|s| matches!(s, Seen::End { .. })).count() == 2
    });
    assert_eq!((hops(&seen), events(&seen)), (2, 0), "{seen:?}");
    // Shrink, then grow in place or elsewhere.
    // SAFETY: the test's own pages.
    unsafe { agent.mremap(target, 4 * PAGE, 2 * PAGE, 0, 0) }.unwrap();
    assert!(!is_mapped(target + 2 * PAGE) && is_mapped(target + PAGE));
    // SAFETY: the test's own pages.
    let grown = unsafe { agent.mremap(target, 2 * PAGE, 4 * PAGE, libc::MREMAP_MAYMOVE, 0) }
        .unwrap()
        .value;
    assert_eq!(events(&mock.seen()), 0);
    // All of it is registered: each page raises its event when it is unmapped by a raw call.
    for page in 0..4 {
        // SAFETY: the test's own pages.
        unsafe { agent::raw::munmap(grown + page * PAGE, PAGE) }.unwrap();
        mock.wait_until("event", |seen| events(seen) == page + 1);
    }
    mock.assert_idle();
    agent.detach().unwrap();
}

#[test]
fn test_mmap_when_it_is_given_a_cached_address_purges_it_before_it_returns() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "reuse").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    // A raw call whose event the daemon has read; its translation count is still there.
    // SAFETY: the test's own page.
    unsafe { agent::raw::munmap(at, PAGE) }.unwrap();
    let before = hops(&mock.seen());
    // SAFETY: a new private mapping at an address that was just given up.
    let reused = unsafe {
        agent.mmap(
            at,
            PAGE,
            RW,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            None,
            0,
        )
    }
    .unwrap();
    assert_eq!(reused.value, at);
    assert!(reused.generation > 0);
    assert_eq!(hops(&mock.seen()), before + 1);
    unmap(agent, at, PAGE).unwrap();
    agent.detach().unwrap();
}

#[test]
fn test_shared_anonymous_memory_when_mapped_has_a_file_that_the_daemon_knows() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    // SAFETY: a new mapping.
    let at = unsafe { agent.mmap(0, 3 * PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0) }
        .unwrap()
        .value;
    assert!(mock.seen().contains(&Seen::Memory {
        len: 3 * PAGE as u64,
        new: true
    }));
    // SAFETY: mapped above, aligned.
    unsafe { (at as *mut u64).write_volatile(7) };
    // SAFETY: the test's own pages.
    unsafe { agent::raw::munmap(at, 3 * PAGE) }.unwrap();
    mock.wait_until("event", |seen| events(seen) == 1);
    agent.detach().unwrap();
}

#[test]
fn test_mmap_when_the_daemon_refuses_the_file_still_maps() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options {
        refuse_memory: true,
        ..Options::default()
    });
    let agent = mock.attach();
    assert!(matches!(
        agent.memory(PAGE as u64, "refused"),
        Err(agent::AgentError::Refused {
            errno: libc::ENOSPC,
            ..
        })
    ));
    // SAFETY: a new mapping.
    let at = unsafe { agent.mmap(0, PAGE, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, 0) }
        .unwrap()
        .value;
    unmap(agent, at, PAGE).unwrap();
    agent.detach().unwrap();
}

#[test]
fn test_segments_when_attached_and_detached_are_covered() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    // SAFETY: a System V segment of this test.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 3 * PAGE, 0o600) };
    assert!(id >= 0);
    // SAFETY: attaches and detaches that segment.
    unsafe {
        let at = agent.shmat(id, 0, 0).unwrap();
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        assert!(at.generation > 0);
        mock.count(at.value);
        assert!(agent.shmdt(at.value).unwrap().generation > at.generation);
        assert!(!is_mapped(at.value));
        let range = (at.value as u64, (at.value + 3 * PAGE) as u64);
        mock.wait_until("END", |seen| {
            seen.iter()
                .any(|s| matches!(s, Seen::End { range: r, .. } if *r == range))
        });
    }
    mock.assert_idle();
    agent.detach().unwrap();
}

#[test]
fn test_brk_when_it_cuts_off_a_cached_page_purges_what_it_cuts() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    // Threads other than the first allocate elsewhere, and the first one waits for this test.
    // SAFETY: asks.
    let before = unsafe { agent.brk(0) }.unwrap().value;
    let start = before.next_multiple_of(PAGE);
    let (kept, end) = (start + PAGE, start + 4 * PAGE);
    // SAFETY: grows.
    let grown = unsafe { agent.brk(end) }.unwrap();
    assert_eq!(grown.value, end);
    // SAFETY: the page below the new break, which is nobody else's.
    unsafe { ((end - PAGE) as *mut u64).write_volatile(7) };
    mock.count(end - PAGE);
    let earlier = hops(&mock.seen());
    // SAFETY: cuts off what was added above.
    let shrunk = unsafe { agent.brk(kept) }.unwrap();
    assert_eq!(shrunk.value, kept);
    assert!(shrunk.generation > grown.generation);
    assert!(is_mapped(start) && !is_mapped(end - PAGE));
    let (range, generation) = ((kept as u64, end as u64), shrunk.generation);
    // Taken and answered before the call returned.
    let seen = mock.seen();
    assert_eq!(hops(&seen), earlier + 1, "{seen:?}");
    assert!(
        seen.contains(&Seen::Start {
            range,
            generation,
            event: slot_event::UNMAP
        }),
        "{seen:?}"
    );
    mock.wait_until("END", |seen| seen.contains(&Seen::End { range, generation }));
    mock.wait_slots_free();
    mock.assert_idle();
    // SAFETY: cuts off the last page that was added, of which nothing is cached.
    assert_eq!(unsafe { agent.brk(before) }.unwrap().value, before);
    agent.detach().unwrap();
}

#[test]
fn test_munmap_when_no_address_space_reaches_that_far_tells_nobody() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    mock.inner().table.header.must_hop.store(1, Ordering::SeqCst);
    let limit = protos::bridge::shared::USER_END as usize;
    for at in [limit - PAGE, limit, 1 << 60] {
        // SAFETY: nothing is mapped there, nor can be.
        let error = unsafe { agent.munmap(at, 2 * PAGE) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
    // A daemon refuses such ranges, and who goes on asking a daemon that refuses ends up killing it.
    let limit = limit as u64;
    let beyond = |s: &Seen| matches!(s, Seen::Start { range, .. } if range.1 > limit);
    assert!(!mock.seen().iter().any(beyond), "{:?}", mock.seen());
    mock.inner().table.header.must_hop.store(0, Ordering::SeqCst);
    mock.assert_idle();
    agent.detach().unwrap();
}
