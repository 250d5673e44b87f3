//! The invalidate path must not sleep (S8, S9) and the hit path must do nothing but look up: shown by a
//! thread whose system calls are filtered (any but sched_yield and those of its own end kill the process)
//! and whose allocations are counted.
//!
//! A test program of its own, because of its allocator.
#![allow(unsafe_code)] // A global allocator that counts, and prctl(PR_SET_SECCOMP).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;

use device::atc::{Access, Atc, AtcConfig, Engine, Fill, Hooks, Miss, PageSize, Purge, SpaceId};
use device::dma::{Prot, Space};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is passed on to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// From now on this thread may yield, read the clock and end; any other system call kills the process.
fn forbid_system_calls() -> std::io::Result<()> {
    const ALLOWED: [libc::c_long; 10] = [
        libc::SYS_sched_yield,
        // Only where the clock is not in the vDSO: the drain's warning looks at it.
        libc::SYS_clock_gettime,
        // The end of a thread, and the message of a failed assertion.
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_munmap,
        libc::SYS_madvise,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_write,
    ];
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // Offset 0 of seccomp_data is the number of the call.
    let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (i, number) in ALLOWED.iter().enumerate() {
        let to_allow = (ALLOWED.len() - i) as u8;
        program.push(op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            to_allow,
            0,
            *number as u32,
        ));
    }
    program.push(op(
        libc::BPF_RET | libc::BPF_K,
        0,
        0,
        libc::SECCOMP_RET_KILL_PROCESS,
    ));
    program.push(op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel copies the program, which lives until the end of this function.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

const ASID: SpaceId = SpaceId(9);
const PAGES: u64 = 64;

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("atc-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    fd
}

fn fill_all(atc: &Atc, ticket: usize) {
    for page in 0..PAGES {
        let fill = Fill {
            space: ASID,
            va: page << 12,
            size: PageSize::SIZE_4K,
            iova: page << 12,
            writable: true,
            tag: page,
        };
        atc.open_miss(ticket, ASID, fill.va);
        // Refused while the other thread purges; then there is one hit less.
        let _ = atc.fill(ticket, fill);
        atc.close_miss(ticket);
    }
}

/// One access of each page, 64 bytes in and out; how many hit.
fn touch(engine: &mut Engine) -> u64 {
    let mut hits = 0;
    let mut line = [0u8; 64];
    for page in 0..PAGES {
        match engine.access(ASID, page << 12, 64, Access::Write) {
            Ok(guard) => {
                guard.read_into(&mut line);
                line[0] = line[0].wrapping_add(1);
                guard.write_from(&line);
                hits += 1;
            }
            Err(miss) => assert_eq!(miss, Miss::NoEntry),
        }
    }
    hits
}

/// Run on a thread that may neither sleep nor allocate; what it returns.
fn without_system_calls<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (result, allocations) = thread::spawn(move || {
        if let Err(error) = forbid_system_calls() {
            eprintln!("SKIPPED: no seccomp filter: {error}");
            return None;
        }
        let before = ALLOCATIONS.get();
        let result = work();
        Some((result, ALLOCATIONS.get() - before))
    })
    .join()
    .expect("the thread ends")?;
    assert_eq!(allocations, 0, "allocations on a path that has none");
    Some(result)
}

fn world() -> Arc<Atc> {
    let dma = Space::new();
    dma.map(0, PAGES << 12, memfd(PAGES << 12), 0, Prot::READ_WRITE)
        .expect("map");
    Atc::new(AtcConfig::default(), dma)
}

#[test]
fn test_access_when_it_hits_makes_no_system_call_and_allocates_nothing() {
    let atc = world();
    fill_all(&atc, 0);
    let mut engine = atc.engine().expect("engine");
    let hits = without_system_calls(move || (0..1000).map(|_| touch(&mut engine)).sum::<u64>());
    assert!(hits.is_none_or(|hits| hits == 1000 * PAGES));
}

/// Holds the first access until a purge waits for it.
#[derive(Debug, Default)]
struct HoldUntilDrained {
    atc: OnceLock<Weak<Atc>>,
    parked: AtomicBool,
}

impl Hooks for HoldUntilDrained {
    fn translated(&self, _: SpaceId, _: u64, _: Access, _: u64) {
        let atc = self
            .atc
            .get()
            .and_then(Weak::upgrade)
            .expect("set before the engines start");
        if !self.parked.swap(true, Ordering::Relaxed) {
            while atc.stats().drain_waits == 0 {
                thread::yield_now();
            }
        }
    }
}

#[test]
fn test_s9_purge_when_engines_access_memory_makes_no_system_call_but_yield() {
    const PURGES: usize = 2_000;
    let atc = world();
    let hold = Arc::new(HoldUntilDrained::default());
    hold.atc.set(Arc::downgrade(&atc)).expect("once");
    atc.set_hooks(Arc::<HoldUntilDrained>::clone(&hold))
        .expect("once");
    let stop = Arc::new(AtomicBool::new(false));
    let worker = {
        let (atc, stop) = (Arc::clone(&atc), Arc::clone(&stop));
        thread::spawn(move || {
            let mut engine = atc.engine().expect("engine");
            let mut hits = 0;
            while !stop.load(Ordering::Relaxed) {
                fill_all(&atc, 1);
                hits += touch(&mut engine);
            }
            hits
        })
    };
    while !hold.parked.load(Ordering::Relaxed) {
        thread::yield_now();
    }
    let reports = {
        let atc = Arc::clone(&atc);
        without_system_calls(move || {
            let (mut entries, mut waited_for) = (0, 0);
            let mut first = true;
            for round in 0..PURGES as u64 {
                // Something to purge; and the first purge meets the engine that is parked.
                while !first && atc.stats().live_entries == 0 {
                    thread::yield_now();
                }
                first = false;
                let page = round % PAGES;
                let what = if page == 0 {
                    Purge::All
                } else {
                    Purge::Range {
                        space: ASID,
                        start: page << 12,
                        end: (page + 4) << 12,
                    }
                };
                let report = atc.purge(what);
                entries += report.entries;
                waited_for += report.waited_for;
            }
            (entries, waited_for)
        })
    };
    // Without a filter nothing was purged, and the worker is still parked.
    if reports.is_none() {
        atc.purge(Purge::All);
    }
    stop.store(true, Ordering::Relaxed);
    let hits = worker.join().expect("worker");
    eprintln!("{hits} hits, {reports:?}, {:?}", atc.stats());
    assert!(reports.is_none_or(|(entries, waited_for)| entries > 0 && waited_for > 0));
}

#[test]
fn test_filter_when_a_forbidden_call_is_made_kills() {
    // The proof is only as good as the filter. A child, because the whole process dies.
    if std::env::var_os("ATC_TEST_FORBIDDEN_CALL").is_some() {
        let _ = without_system_calls(|| thread::sleep(std::time::Duration::from_nanos(1)));
        return;
    }
    let me = std::env::current_exe().expect("this program");
    let output = std::process::Command::new(me)
        .args([
            "--exact",
            "test_filter_when_a_forbidden_call_is_made_kills",
            "--nocapture",
        ])
        .env("ATC_TEST_FORBIDDEN_CALL", "1")
        .output()
        .expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("SKIPPED") {
        eprintln!("{said}");
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{said}");
}
