// Reason: a counting allocator, a seccomp filter and the handler of its signal.
#![allow(unsafe_code)]
//! The non-sleeping path is watched from outside: blocking system calls (a seccomp filter that traps them),
//! allocations (a counting allocator), voluntary context switches (getrusage) and yields. A yield never counts as
//! a voluntary switch, so the latter figure alone would prove nothing.
//!
//! Each instrument has a control: the same watch over something that does block, allocate or switch.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::fence::Fence;
use host::mm::{FillTable, MappedTable};
use host::notifier::{
    Again, Chain, Ctx, Event, IntervalNotifiers, IntervalOps, MaySleep, NonSleeping, NotifierRange,
    SpinMutex, spin, thread_switches,
};
use host::subscribers::{DeviceFlush, GruSubscriber, ShadowMmu, Xpmem};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

// ---- instruments ----

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}
/// Allocations made while a spin lock was held (S8).
static UNDER_SPIN_LOCK: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator; the counters are const-initialised and need no
// allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn count() {
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
    if spin::held() != 0 {
        UNDER_SPIN_LOCK.fetch_add(1, Ordering::Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Trapped system calls by number.
static TRAPPED: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];
/// One watch at a time: the counters are the process'.
static WATCH: Mutex<()> = Mutex::new(());

extern "C" fn on_sigsys(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: for SIGSYS the kernel fills in si_syscall, the int behind si_call_addr: byte 24 of siginfo
    // (include/uapi/asm-generic/siginfo.h, _sigsys).
    let number = unsafe { *info.cast::<i32>().add(6) };
    if let Some(counter) = TRAPPED.get(number as usize) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
    // The call returns 0 without having been made: nothing sleeps, and nobody takes it for an error.
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: with SA_SIGINFO the kernel passes a ucontext_t that is this handler's to change.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = 0;
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        (*context).uc_mcontext.regs[0] = 0;
    }
}

/// Everything that can put a thread to sleep and that somebody might use on this path.
fn filter() -> seccompiler::BpfProgram {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = [
        libc::SYS_ppoll,
        libc::SYS_pselect6,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_recvmmsg,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_accept4,
        libc::SYS_wait4,
        libc::SYS_waitid,
        libc::SYS_flock,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_rt_sigsuspend,
        libc::SYS_futex_waitv,
        libc::SYS_fallocate,
        libc::SYS_fsync,
        libc::SYS_sched_yield,
    ]
    .into_iter()
    .map(|number| (number, vec![]))
    .collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend(
        [
            libc::SYS_poll,
            libc::SYS_select,
            libc::SYS_epoll_wait,
            libc::SYS_pause,
        ]
        .map(|number| (number, vec![])),
    );
    // FUTEX_WAIT, _LOCK_PI, _WAIT_BITSET, _WAIT_REQUEUE_PI, _LOCK_PI2 (include/uapi/linux/futex.h); waking is
    // allowed, it does not block.
    let waits = [0, 6, 9, 11, 13].map(|operation| {
        let condition = SeccompCondition::new(
            1,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(0x7f),
            operation,
        );
        SeccompRule::new(vec![condition.unwrap()]).unwrap()
    });
    rules.insert(libc::SYS_futex, waits.into());
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Trap,
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap()
    .try_into()
    .unwrap()
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Seen {
    blocking_calls: u64,
    yields: u64,
    allocations: u64,
    switches: u64,
}

/// Runs `work` on a thread of its own, once to warm up, then under every instrument.
fn watch(mut work: impl FnMut() + Send) -> Seen {
    let _one = WATCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let program = filter();
    // SAFETY: the handler only adds to atomics; the structure is plain data.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigsys as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()), 0);
    }
    std::thread::scope(|s| {
        s.spawn(move || {
            work();
            let trapped = || TRAPPED.iter().map(|c| c.load(Ordering::Relaxed)).sum::<u64>();
            let yields = || TRAPPED[libc::SYS_sched_yield as usize].load(Ordering::Relaxed);
            apply_filter(&program).expect("a thread may filter itself");
            let before = (trapped(), yields(), ALLOCATIONS.get(), thread_switches());
            work();
            let switches = thread_switches() - before.3;
            let allocations = ALLOCATIONS.get() - before.2;
            let yields = yields() - before.1;
            Seen {
                blocking_calls: trapped() - before.0 - yields,
                yields,
                allocations,
                switches,
            }
        })
        .join()
        .unwrap()
    })
}

// ---- what is watched ----

/// A device that clears its entries at once.
struct Inline;
impl DeviceFlush for Inline {
    fn flush(&self, _start: u64, _end: u64) {}
    fn flush_all(&self) {}
}

/// A device whose engine is another thread: the handle is written in shared memory, and its status spun on.
#[derive(Default)]
struct Engine {
    handle: AtomicU32,
    stop: AtomicBool,
}

impl Engine {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            if self
                .handle
                .compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                std::thread::yield_now();
            }
        }
    }
}

impl DeviceFlush for Engine {
    fn flush(&self, _start: u64, _end: u64) {
        self.handle.store(1, Ordering::Release);
        let mut spins = 0u32;
        while self.handle.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins.is_multiple_of(1000) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
    fn flush_all(&self) {
        self.flush(0, u64::MAX);
    }
}

struct Nothing;
impl IntervalOps for Nothing {
    type Protected = ();
    fn invalidate(&self, (): &mut (), _: &NotifierRange, _: Ctx<'_>) -> Result<(), Again> {
        Ok(())
    }
}

struct Bench {
    chain: Arc<Chain>,
    table: Arc<MappedTable>,
    fills: Arc<FillTable>,
    shadow: Arc<ShadowMmu>,
}

const BASE: u64 = 0x4000_0000;
const PAGE: u64 = 4096;

fn set_up<D: DeviceFlush + 'static>(device: Arc<D>) -> Bench {
    let token = MaySleep::claim("set-up");
    let chain = Chain::new();
    let table = MappedTable::create().unwrap();
    let fills = FillTable::new(table.clone());
    let shadow = ShadowMmu::new(256);
    let intervals = IntervalNotifiers::new();
    chain
        .register(GruSubscriber::new(device, fills.clone()), &token)
        .unwrap();
    chain.register(shadow.clone(), &token).unwrap();
    chain
        .register(Xpmem::new(Arc::new(Fence::new(None))), &token)
        .unwrap();
    chain.register(intervals.clone(), &token).unwrap();
    intervals
        .insert(BASE, BASE + 64 * PAGE, Nothing, (), &token)
        .unwrap();
    Bench {
        chain,
        table,
        fills,
        shadow,
    }
}

impl Bench {
    /// Non-blockable invalidations of every shape, as a caller that must not sleep makes them.
    fn rounds(&self, rounds: u64) {
        let section = NonSleeping::enter();
        let ctx = Ctx::NonSleeping(&section);
        for round in 0..rounds {
            let start = BASE + round % 60 * PAGE;
            let range = NotifierRange {
                start,
                end: start + 4 * PAGE,
                event: Event::ALL[(round % 8) as usize],
                blockable: false,
            };
            let change = self.table.begin_change(range.start, range.end);
            if let Ok(started) = self.chain.invalidate_range_start(range, ctx) {
                self.chain.invalidate_range_end(started, ctx);
            }
            let _ = self.chain.invalidate_page(range, ctx);
            let _ = self.chain.clear_flush_young(range.start, range.end);
            drop(change);
            let all = NotifierRange::all(Event::Clear, false);
            if round % 16 == 0
                && let Ok(started) = self.chain.invalidate_range_start(all, ctx)
            {
                self.chain.invalidate_range_end(started, ctx);
            }
        }
    }

    /// The non-sleeping part of *blockable* invalidations has to be as clean: the chain measures it.
    fn recorded_switches(&self) -> u64 {
        let summaries = self.chain.recorder().summaries();
        summaries.iter().map(|s| s.voluntary_context_switches).sum()
    }
}

#[test]
fn test_s9_path_when_device_is_idle_blocks_allocates_and_yields_never() {
    let bench = set_up(Arc::new(Inline));
    let token = MaySleep::claim("test");
    for page in 0..64 {
        let _ = bench.fills.begin_fill(BASE + page * PAGE, 12).unwrap();
        let _ = bench.shadow.fault(BASE + page * PAGE, &token, || Some(page));
    }
    let seen = watch(|| bench.rounds(500));
    println!("idle: {seen:?}");
    assert_eq!(
        seen,
        Seen {
            blocking_calls: 0,
            yields: 0,
            allocations: 0,
            switches: 0
        }
    );
    assert_eq!(bench.recorded_switches(), 0);
    assert_eq!(bench.fills.stats().cached_pages, 0, "it did its work");
    assert_eq!(bench.shadow.live(), 0);
}

#[test]
fn test_s9_path_when_engine_and_fills_run_beside_it_blocks_and_allocates_never() {
    let engine = Arc::new(Engine::default());
    let bench = set_up(engine.clone());
    let stop = AtomicBool::new(false);
    let seen = std::thread::scope(|s| {
        s.spawn(|| engine.run());
        s.spawn(|| {
            let token = MaySleep::claim("filler");
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                page = (page + 1) % 64;
                let waiter = bench.fills.fault_waiter();
                let _ = bench.fills.begin_fill(BASE + page * PAGE, 12);
                drop(waiter);
                let _ = bench.shadow.fault(BASE + page * PAGE, &token, || Some(page));
            }
        });
        let seen = watch(|| bench.rounds(100));
        stop.store(true, Ordering::Relaxed);
        engine.stop.store(true, Ordering::Relaxed);
        seen
    });
    println!("contended: {seen:?} (yields are counted, and allowed: the spinner gives way)");
    assert_eq!((seen.blocking_calls, seen.allocations, seen.switches), (0, 0, 0));
    assert_eq!(bench.recorded_switches(), 0);
}

#[test]
fn test_instruments_when_something_blocks_see_it() {
    let sleeping = watch(|| std::thread::sleep(Duration::from_millis(1)));
    assert!(sleeping.blocking_calls >= 1, "{sleeping:?}");
    let polling = watch(|| {
        rustix::event::poll(&mut [], Some(&rustix::time::Timespec::default())).unwrap();
    });
    assert_eq!(polling.blocking_calls, 1);
    let yielding = watch(std::thread::yield_now);
    assert_eq!((yielding.yields, yielding.blocking_calls), (1, 0));
    let allocating = watch(|| drop(std::hint::black_box(Box::new(7))));
    assert_eq!((allocating.allocations, allocating.blocking_calls), (2, 0));

    // A lock that sleeps: the other side lets go as soon as the wait has been seen.
    let lock = Mutex::new(());
    let armed = AtomicBool::new(false);
    let held = AtomicBool::new(false);
    let seen = std::thread::scope(|s| {
        s.spawn(|| {
            while !armed.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let guard = lock.lock().unwrap();
            held.store(true, Ordering::Release);
            let futex = &TRAPPED[libc::SYS_futex as usize];
            let before = futex.load(Ordering::Relaxed);
            while futex.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            drop(guard);
        });
        let mut warm_up = true;
        watch(|| {
            if !std::mem::take(&mut warm_up) {
                armed.store(true, Ordering::Release);
                while !held.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                drop(lock.lock().unwrap());
            }
        })
    });
    assert!(seen.blocking_calls >= 1, "{seen:?}");
}

#[test]
fn test_instruments_when_thread_switches_see_it() {
    // Without the filter, which would turn the sleep into nothing.
    let before = thread_switches();
    std::thread::sleep(Duration::from_millis(1));
    assert!(thread_switches() > before);
}

#[test]
fn test_s8_locks_of_callbacks_when_held_see_no_allocation() {
    let bench = set_up(Arc::new(Inline));
    let token = MaySleep::claim("test");
    let before = UNDER_SPIN_LOCK.load(Ordering::Relaxed);
    for page in 0..512 {
        let va = BASE + page * PAGE;
        let _ = bench.shadow.fault(va, &token, || Some(page));
        let _ = bench.shadow.translate(va);
        let range = NotifierRange {
            start: va,
            end: va + PAGE,
            event: Event::Unmap,
            blockable: page % 2 == 0,
        };
        let started = bench
            .chain
            .invalidate_range_start(range, Ctx::MaySleep(&token))
            .unwrap();
        bench.chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    }
    bench.chain.release(&token);
    assert_eq!(UNDER_SPIN_LOCK.load(Ordering::Relaxed) - before, 0);
    // The control.
    let lock = SpinMutex::new(Vec::new());
    lock.lock().push(1);
    assert_eq!(UNDER_SPIN_LOCK.load(Ordering::Relaxed) - before, 1);
}
