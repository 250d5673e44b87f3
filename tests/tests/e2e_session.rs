//! Applications with the agent, a host daemon and a GRU: what the device sees when memory changes, and what is
//! left when somebody dies.
#![allow(unsafe_code, reason = "mapping calls, and memory that a device writes")]

mod e2e;

use std::path::Path;
use std::time::{Duration, Instant};

use agent::{Agent, AttachOptions, ContextOptions, ExecuteError, FaultMode, GruContext, Instruction, Memory};
use e2e::{Daemon, PATIENCE, Role, in_process_device, pause, say};
use host::daemon::{DaemonError, ReclaimConfig};
use protos::bridge::control::UffdMode;
use protos::gru::cb::XType;
use rustix::process::Signal;

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

// ---- in the application ----

/// Memory that the session knows, mapped, with a number in each page.
struct Area {
    memory: Memory,
    at: usize,
    pages: usize,
}

fn number_of(page: usize) -> u64 {
    0x1111_0000 + page as u64
}

fn attach(socket: &Path) -> &'static Agent {
    let options = AttachOptions {
        socket: socket.to_owned(),
        name: "e2e".into(),
    };
    Agent::attach(&options).expect("attach")
}

impl Area {
    fn new(agent: &'static Agent, pages: usize) -> Self {
        let memory = agent.memory((pages * PAGE) as u64, "area").expect("memory");
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { agent.mmap(0, pages * PAGE, RW, libc::MAP_SHARED, Some(memory.fd()), 0) };
        let area = Self {
            memory,
            at: at.expect("mmap").value,
            pages,
        };
        (0..pages).for_each(|page| area.set(page, number_of(page)));
        area
    }

    fn va(&self, page: usize) -> usize {
        self.at + page * PAGE
    }

    fn set(&self, page: usize, value: u64) {
        assert!(page < self.pages);
        // SAFETY: mapped for writing (the test's scenario), aligned; the device writes there too, hence volatile.
        unsafe { (self.va(page) as *mut u64).write_volatile(value) }
    }

    fn get(&self, page: usize) -> u64 {
        assert!(page < self.pages);
        // SAFETY: as in `set`.
        unsafe { (self.va(page) as *const u64).read_volatile() }
    }
}

fn context(agent: &Agent) -> GruContext {
    let options = ContextOptions {
        cbs: 4,
        ds_bytes: 4096,
        fault_mode: FaultMode::Interrupt,
    };
    agent.create_context(&options).expect("a context")
}

/// What the device reads, and the generation of the translation that it used.
fn load(context: &GruContext, va: usize) -> Result<(u64, u64), ExecuteError> {
    let done = context.execute(0, &Instruction::vload(va as u64, 0, XType::DWORD, 1, 1))?;
    let mut bytes = [0; 8];
    context.ds_read(0, &mut bytes)?;
    Ok((u64::from_le_bytes(bytes), done.tag))
}

fn store(context: &GruContext, va: usize, value: u64) -> Result<u64, ExecuteError> {
    context.ds_write(64, &value.to_le_bytes())?;
    let done = context.execute(1, &Instruction::vstore(va as u64, 64, XType::DWORD, 1, 1))?;
    Ok(done.tag)
}

fn loaded(context: &GruContext, va: usize) -> u64 {
    load(context, va).expect("a load").0
}

#[track_caller]
fn assert_exception<T: std::fmt::Debug>(result: Result<T, ExecuteError>) {
    assert!(matches!(result, Err(ExecuteError::Exception(_))), "{result:?}");
}

fn app_exact(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 16);
    let gru = context(agent);
    for page in 0..16 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    store(&gru, area.va(3) + 8, 77).unwrap();
    // SAFETY: mapped and aligned.
    assert_eq!(unsafe { ((area.va(3) + 8) as *const u64).read_volatile() }, 77);

    // munmap: an exception, and only there.
    // SAFETY: nothing refers to the page.
    let gone = unsafe { agent.munmap(area.va(4), PAGE) }.unwrap();
    assert_exception(load(&gru, area.va(4)));
    assert_exception(store(&gru, area.va(4), 1));
    assert_eq!(loaded(&gru, area.va(5)), number_of(5));

    // The address gets another owner: what the device reads is the new one's, with a new translation.
    // SAFETY: the page is free, nothing refers to it.
    let again = unsafe {
        agent.mmap(
            area.va(4),
            PAGE,
            RW,
            libc::MAP_SHARED | libc::MAP_FIXED,
            Some(area.memory.fd()),
            (9 * PAGE) as u64,
        )
    };
    let again = again.unwrap();
    assert!(again.generation > gone.generation);
    let (value, tag) = load(&gru, area.va(4)).unwrap();
    assert_eq!(value, number_of(9));
    assert!(
        tag >= again.generation,
        "tag {tag}, mapped in generation {}",
        again.generation
    );

    // mprotect: loads go on, stores do not.
    store(&gru, area.va(6), 5).unwrap();
    // SAFETY: nothing writes to the page.
    unsafe { agent.mprotect(area.va(6), PAGE, libc::PROT_READ) }.unwrap();
    assert_exception(store(&gru, area.va(6), 6));
    assert_eq!(loaded(&gru, area.va(6)), 5);

    // mremap: the old address is gone, the content is at the new one.
    // SAFETY: nothing refers to the page.
    let moved = unsafe { agent.mremap(area.va(7), PAGE, 2 * PAGE, libc::MREMAP_MAYMOVE, 0) }.unwrap();
    assert_ne!(moved.value, area.va(7));
    assert_exception(load(&gru, area.va(7)));
    assert_eq!(loaded(&gru, moved.value), number_of(7));

    // Discard: the translation is not used any more, and what is read is zero.
    assert_eq!(loaded(&gru, area.va(10)), number_of(10));
    // SAFETY: the content is given up.
    let discarded = unsafe { agent.madvise(area.va(10), PAGE, libc::MADV_REMOVE) }.unwrap();
    let (value, tag) = load(&gru, area.va(10)).unwrap();
    assert_eq!(value, 0);
    assert!(
        tag >= discarded.generation,
        "tag {tag}, discarded in generation {}",
        discarded.generation
    );

    // Private memory is refused.
    let private = vec![7u64; 1024];
    assert_exception(load(&gru, private.as_ptr() as usize));
    assert_exception(load(&gru, 0x1000));

    // Several at once.
    let others: Vec<_> = (0..3).map(|_| context(agent)).collect();
    for (n, other) in others.iter().enumerate() {
        assert_eq!(loaded(other, area.va(n)), number_of(n));
    }
    // SAFETY: nothing refers to the range.
    unsafe { agent.munmap(area.va(0), 3 * PAGE) }.unwrap();
    for (n, other) in others.iter().enumerate() {
        assert_exception(load(other, area.va(n)));
    }
    drop((gru, others));
    agent.detach().unwrap();
}

fn app_raw(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 16);
    let gru = context(agent);
    for page in 0..16 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    // SAFETY: nothing refers to the page.
    unsafe { agent::raw::munmap(area.va(4), PAGE) }.unwrap();
    assert_exception(load(&gru, area.va(4)));
    assert_eq!(loaded(&gru, area.va(5)), number_of(5));

    // SAFETY: nothing refers to the page.
    let moved = unsafe { agent::raw::mremap(area.va(7), PAGE, 2 * PAGE, libc::MREMAP_MAYMOVE, 0) }.unwrap();
    assert_ne!(moved, area.va(7));
    assert_exception(load(&gru, area.va(7)));
    assert_eq!(loaded(&gru, moved), number_of(7));

    // Another owner of the address.
    // SAFETY: nothing refers to the page.
    unsafe {
        agent::raw::mmap(
            area.va(8),
            PAGE,
            RW,
            libc::MAP_SHARED | libc::MAP_FIXED,
            Some(area.memory.fd()),
            (2 * PAGE) as u64,
        )
    }
    .unwrap();
    assert_eq!(loaded(&gru, area.va(8)), number_of(2));

    let before = agent.generation();
    // SAFETY: the content is given up.
    unsafe { agent::raw::madvise(area.va(10), PAGE, libc::MADV_REMOVE) }.unwrap();
    let (value, tag) = load(&gru, area.va(10)).unwrap();
    assert_eq!(value, 0);
    assert!(tag > before, "tag {tag} is of before the discard ({before})");

    let stats: serde_json::Value = serde_json::from_str(&agent.daemon_stats().unwrap()).unwrap();
    let net = &stats["sessions"][0]["invalidations"]["safety_net"];
    for kind in ["unmap", "remap", "remove"] {
        assert!(net[kind]["count"].as_u64().unwrap_or(0) >= 1, "{kind}: {net:#}");
    }
    drop(gru);
    agent.detach().unwrap();
}

/// How many of `rounds` raw unmappings left a translation that the device could still use.
fn app_stale(socket: &Path) {
    let agent = attach(socket);
    let gru = context(agent);
    let mut stale = 0;
    for _ in 0..5 {
        let area = Area::new(agent, 1);
        assert_eq!(loaded(&gru, area.va(0)), number_of(0));
        // SAFETY: nothing refers to the page.
        unsafe { agent::raw::munmap(area.va(0), PAGE) }.unwrap();
        stale += usize::from(load(&gru, area.va(0)).is_ok());
    }
    say(&format!("stale {stale}"));
}

fn app_waits(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 64);
    let gru = context(agent);
    for page in 0..64 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    say(&format!("{:#x} {:#x}", area.va(0), area.va(64)));
    pause("ready");
    // Whatever has happened to the daemon or the device: calls end, and say nothing wrong.
    // SAFETY: nothing refers to the range.
    unsafe { agent.munmap(area.va(0), 32 * PAGE) }.unwrap();
    // SAFETY: as above.
    unsafe { agent::raw::munmap(area.va(32), 32 * PAGE) }.unwrap();
    if let Ok((value, tag)) = load(&gru, area.va(1)) {
        panic!("the device read {value:#x} (generation {tag}) from unmapped memory");
    }
    match agent.alive() {
        Ok(()) => say("alive"),
        Err(gone) => say(&format!("gone: {gone}")),
    }
}

/// Unmaps half of an area and says so as soon as the call has returned.
fn app_unmaps(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 64);
    say(&format!("{:#x} {:#x}", area.va(0), area.va(64)));
    pause("ready");
    // SAFETY: nothing refers to the range.
    unsafe { agent.munmap(area.va(0), 32 * PAGE) }.unwrap();
    pause("returned");
    agent.detach().unwrap();
}

fn app_fork(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 8);
    let gru = context(agent);
    assert_eq!(loaded(&gru, area.va(1)), number_of(1));
    // SAFETY: the child makes system calls only, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: nothing refers to the page in the child.
        let unmapped = unsafe { libc::munmap(area.va(1) as *mut _, PAGE) };
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if unmapped == 0 { 7 } else { 8 }) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7,
        "{status:#x}"
    );
    assert_eq!(
        loaded(&gru, area.va(1)),
        number_of(1),
        "the child's unmapping is the child's"
    );
    // SAFETY: nothing refers to the page.
    unsafe { agent.munmap(area.va(1), PAGE) }.unwrap();
    assert_exception(load(&gru, area.va(1)));
    drop(gru);
    agent.detach().unwrap();
}

/// One thread changes mappings, two compute: no access may use what a call that had returned took away.
fn app_storm(socket: &Path) {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let agent = attach(socket);
    let area = Area::new(agent, 8);
    let gru = context(agent);
    let stop = AtomicBool::new(false);
    // Per page: the generation of the last change that is over, 0 while it is not mapped.
    let current: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(1)).collect();
    let (mut changes, loads) = (0u64, AtomicU64::new(0));
    std::thread::scope(|scope| {
        for user in 0..2u32 {
            let (gru, area, stop, current, loads) = (&gru, &area, &stop, &current, &loads);
            scope.spawn(move || {
                let mut page = user as usize;
                while !stop.load(Ordering::Relaxed) {
                    page = (page + 3) % 8;
                    let at_least = current[page].load(Ordering::SeqCst);
                    let instruction = Instruction::vload(area.va(page) as u64, 8 * user, XType::DWORD, 1, 1);
                    match gru.execute(user, &instruction) {
                        Ok(done) => {
                            assert!(
                                done.tag >= at_least,
                                "page {page}: used generation {}, {at_least} had returned",
                                done.tag
                            );
                            loads.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(ExecuteError::Exception(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
        let since = Instant::now();
        let enough = |changes| changes > 50 && loads.load(Ordering::Relaxed) > 50;
        while since.elapsed() < Duration::from_millis(1500)
            || !enough(changes) && since.elapsed() < Duration::from_secs(60)
        {
            if since.elapsed() > Duration::from_millis(1500) {
                // On a busy machine no load gets through the storm: what comes after it is slower.
                std::thread::sleep(Duration::from_millis(1));
            }
            let page = (changes % 8) as usize;
            changes += 1;
            // SAFETY: only the device looks at the page.
            let gone = unsafe { agent.munmap(area.va(page), PAGE) }.unwrap();
            current[page].store(gone.generation, Ordering::SeqCst);
            // SAFETY: the page is free: nothing else in this process maps at fixed addresses.
            let back = unsafe {
                agent.mmap(
                    area.va(page),
                    PAGE,
                    RW,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    Some(area.memory.fd()),
                    (page * PAGE) as u64,
                )
            };
            current[page].store(back.unwrap().generation, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        changes > 50 && loads.load(Ordering::Relaxed) > 50,
        "{changes} changes, {loads:?} loads"
    );
    for page in 0..8 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    drop(gru);
    agent.detach().unwrap();
}

fn app_polling(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 8);
    let options = ContextOptions {
        cbs: 2,
        ds_bytes: 1024,
        fault_mode: FaultMode::UserPolling,
    };
    let gru = agent.create_context(&options).unwrap();
    for page in 0..8 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    // SAFETY: nothing refers to the page.
    unsafe { agent.munmap(area.va(3), PAGE) }.unwrap();
    assert_exception(load(&gru, area.va(3)));
    drop(gru);
    agent.detach().unwrap();
}

fn app_purgeable(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 64);
    let gru = context(agent);
    for page in 0..64 {
        assert_eq!(loaded(&gru, area.va(page)), number_of(page));
    }
    agent.set_purgeable(area.va(0)..area.va(32)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while (0..32).any(|page| area.get(page) != 0) {
        assert!(Instant::now() < deadline, "the reclaimer does not discard");
        std::thread::sleep(Duration::from_millis(1));
    }
    for page in 0..64 {
        let expected = if page < 32 { 0 } else { number_of(page) };
        assert_eq!(loaded(&gru, area.va(page)), expected, "page {page}");
    }
    // What is mapped there next was not offered.
    // SAFETY: nothing refers to the range.
    unsafe { agent.munmap(area.va(0), 32 * PAGE) }.unwrap();
    let other = agent.memory((32 * PAGE) as u64, "other").unwrap();
    // SAFETY: the range is free.
    unsafe {
        agent.mmap(
            area.va(0),
            32 * PAGE,
            RW,
            libc::MAP_SHARED | libc::MAP_FIXED,
            Some(other.fd()),
            0,
        )
    }
    .unwrap();
    (0..32).for_each(|page| area.set(page, 5));
    let stats = || -> serde_json::Value { serde_json::from_str(&agent.daemon_stats().unwrap()).unwrap() };
    assert_eq!(stats()["sessions"][0]["invalidations"]["reclaimer"]["failed"], 0);
    assert!((0..32).all(|page| area.get(page) == 5));
    drop(gru);
    agent.detach().unwrap();
}

fn peer_arguments() -> (u32, u64, u64) {
    let argument = |name| {
        let text = std::env::var(name).unwrap();
        u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
    };
    let pid = u32::try_from(argument("E2E_PID")).unwrap();
    (pid, argument("E2E_START"), argument("E2E_END"))
}

/// How much of an application's area this process has mapped, as the kernel says.
fn mapped_area_bytes() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let bytes_of = |line: &str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        number(end) - number(start)
    };
    maps.lines()
        .filter(|line| line.contains("/memfd:") && line.contains("area"))
        .map(bytes_of)
        .sum()
}

fn peer(socket: &Path) {
    let (pid, start, end) = peer_arguments();
    let peer = agent::peer::Peer::attach(socket, pid, start, end).expect("attach as a peer");
    for page in 0..8 {
        assert_eq!(peer.read(start + (page * PAGE) as u64), Some(number_of(page)));
    }
    assert_eq!(mapped_area_bytes(), 8 * PAGE as u64);
    pause("attached");
    // The call has returned. Once, and before anything is asked: what is unmapped later is unmapped too late.
    assert_eq!(mapped_area_bytes(), 0, "the peer still maps unmapped memory");
    assert_eq!(peer.read(start), None);
    assert!(peer.stats().zaps >= 1, "{:?}", peer.stats());
    say(&format!("zapped {}", peer.stats().unmapped_bytes));
}

/// Pages come and go under peers that do too, until told to stop.
fn app_churn(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 64);
    say(&format!("{:#x} {:#x}", area.va(0), area.va(64)));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            pause("ready");
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: replaces the area by itself.
            unsafe { agent.mmap(area.va(0), 64 * PAGE, RW, flags, Some(area.memory.fd()), 0) }.unwrap();
        }
    });
    agent.detach().unwrap();
}

fn peer_churn(socket: &Path) {
    let (pid, start, end) = peer_arguments();
    let mut zaps = 0;
    // Nothing is read: a page that is changed without a pause can hardly be caught. Zaps come all the same.
    for _ in 0..100 {
        let peer = agent::peer::Peer::attach(socket, pid, start, end).expect("attach as a peer");
        while peer.stats().zaps == 0 {
            std::thread::yield_now();
        }
        zaps += peer.stats().zaps;
    }
    say(&format!("zapped {zaps}"));
}

/// The device works while threads send events without a pause.
fn app_flood(socket: &Path) {
    let agent = attach(socket);
    let area = Area::new(agent, 64);
    let gru = context(agent);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        for thread in 0..4 {
            let (area, stop) = (&area, &stop);
            s.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // Of shared memory: the content stays.
                    // SAFETY: nothing refers to the page.
                    unsafe { agent::raw::madvise(area.va(thread), PAGE, libc::MADV_DONTNEED) }.unwrap();
                }
            });
        }
        let deadline = Instant::now() + PATIENCE;
        for page in (8..64).cycle().take(300) {
            assert_eq!(loaded(&gru, area.va(page)), number_of(page));
            assert!(Instant::now() < deadline, "the device hardly gets its turn");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    drop(gru);
    agent.detach().unwrap();
}

/// Reads until the application has ended.
fn peer_outlives(socket: &Path) {
    let (pid, start, end) = peer_arguments();
    let peer = agent::peer::Peer::attach(socket, pid, start, end).expect("attach as a peer");
    assert_eq!(peer.read(start), Some(number_of(0)));
    say("attached");
    let deadline = Instant::now() + PATIENCE;
    while peer.read(start).is_some() {
        assert!(
            Instant::now() < deadline,
            "the peer still sees the memory of a dead process"
        );
    }
    say("over");
}

/// Not a test by itself: what a child process of this binary does.
#[test]
fn role_entry() {
    let Some((role, socket)) = e2e::role() else { return };
    match role.as_str() {
        "exact" => app_exact(&socket),
        "raw" => app_raw(&socket),
        "stale" => app_stale(&socket),
        "waits" => app_waits(&socket),
        "unmaps" => app_unmaps(&socket),
        "fork" => app_fork(&socket),
        "storm" => app_storm(&socket),
        "polling" => app_polling(&socket),
        "purgeable" => app_purgeable(&socket),
        "peer" => peer(&socket),
        "churn" => app_churn(&socket),
        "flood" => app_flood(&socket),
        "peer_churn" => peer_churn(&socket),
        "peer_outlives" => peer_outlives(&socket),
        "device" => e2e::be_device(&socket),
        other => panic!("no role {other}"),
    }
}

// ---- the tests ----

fn app(daemon: &Daemon, role: &str) -> Role {
    Role::start("role_entry", role, &daemon.socket)
}

#[test]
fn test_s2_covered_calls_when_they_have_returned_leave_no_translation() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    app(&daemon, "exact").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_s2_covered_calls_when_mode_is_missing_and_pages_are_large_leave_no_translation() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |config| {
        config.uffd_mode = UffdMode::Missing;
        config.large_pages = true;
    });
    app(&daemon, "exact").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_safety_net_when_calls_are_raw_leaves_no_translation() {
    if e2e::skipped() {
        return;
    }
    for mode in [UffdMode::Wp, UffdMode::Missing] {
        let daemon = Daemon::start(in_process_device().0, |config| config.uffd_mode = mode);
        app(&daemon, "raw").wait_ok();
        daemon.wait_clean();
    }
}

#[test]
fn test_safety_net_when_broken_lets_the_device_use_unmapped_memory() {
    if e2e::skipped() {
        return;
    }
    let delay = Duration::from_millis(300);
    let stale = |broken| {
        let daemon = Daemon::start(in_process_device().0, |config| {
            config.break_safety_net = broken;
            config.safety_net_delay = delay;
        });
        let mut app = app(&daemon, "stale");
        let said = app.next();
        app.wait_ok();
        said
    };
    assert_eq!(
        stale(true),
        "stale 5",
        "read() before the purge is what the check is for"
    );
    assert_eq!(stale(false), "stale 0", "the same delay, in the right order");
}

#[test]
fn test_s1_storm_when_mappings_change_under_the_device_uses_no_old_generation() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    app(&daemon, "storm").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_fork_when_child_unmaps_leaves_the_parent_alone() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    app(&daemon, "fork").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_misses_when_user_polls_are_served() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    app(&daemon, "polling").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_reclaimer_when_memory_is_purgeable_discards_it_and_only_it() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |config| {
        config.reclaim = Some(ReclaimConfig {
            period: Duration::from_millis(1),
            seed: 7,
        });
    });
    app(&daemon, "purgeable").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_session_when_application_is_killed_leaves_nothing() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let mut apps: Vec<_> = (0..3).map(|_| app(&daemon, "waits")).collect();
    for app in &mut apps {
        app.next();
        app.expect("ready");
    }
    let stats = daemon.stats();
    assert_eq!(stats["device"]["mapped_files"], 3, "{stats:#}");
    apps.iter().for_each(|app| app.signal(Signal::KILL));
    daemon.wait_clean();
    // And the next one finds everything as the first did.
    app(&daemon, "exact").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_application_when_daemon_stops_goes_on_without_it() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let mut app = app(&daemon, "waits");
    app.next();
    app.expect("ready");
    daemon.stop().unwrap();
    app.go_on();
    let said = app.next();
    assert!(said.starts_with("gone"), "{said}");
    app.wait_ok();
}

#[test]
fn test_daemon_when_device_dies_ends_with_an_error_that_names_it() {
    if e2e::skipped() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let mut device = Role::start("role_entry", "device", &path);
    device.expect("listening");
    let daemon = Daemon::start_on(&path, |_| {});
    let mut app = app(&daemon, "waits");
    app.next();
    app.expect("ready");
    device.signal(Signal::KILL);
    let error = daemon.wait().unwrap_err();
    assert!(
        matches!(&error, DaemonError::DeviceLost { pid, .. } if *pid == Some(device.pid())),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains(&path.display().to_string()) && text.contains(&device.pid().to_string()),
        "{text}"
    );
    app.go_on();
    let said = app.next();
    assert!(said.starts_with("gone"), "{said}");
    app.wait_ok();
}

#[test]
fn test_device_when_stopped_in_a_flush_is_fenced() {
    if e2e::skipped() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let mut device = Role::start("role_entry", "device", &path);
    device.expect("listening");
    let daemon = Daemon::start_on(&path, |config| config.fence_timeout = Duration::from_millis(500));
    let mut app = app(&daemon, "waits");
    app.next();
    app.expect("ready");
    device.freeze();
    // Its munmap needs a flush, which the stopped device does not answer.
    app.go_on();
    let error = daemon.wait().unwrap_err();
    assert!(matches!(error, DaemonError::DeviceLost { .. }), "{error}");
    let said = app.next();
    assert!(said.starts_with("gone"), "{said}");
    app.wait_ok();
}

fn start_peer(daemon: &Daemon, pid: u32, range: &str) -> Role {
    start_peer_as("peer", daemon, pid, range)
}

fn start_peer_as(role: &str, daemon: &Daemon, pid: u32, range: &str) -> Role {
    let (start, end) = range.split_once(' ').unwrap();
    Role::start_with("role_entry", role, &daemon.socket, |command| {
        command
            .env("E2E_PID", format!("{pid:x}"))
            .env("E2E_START", start)
            .env("E2E_END", end);
    })
}

#[test]
fn test_peer_when_range_is_unmapped_has_unmapped_it_before_the_call_returns() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let mut app = app(&daemon, "unmaps");
    let range = app.next();
    app.expect("ready");
    let mut peer = start_peer(&daemon, app.pid(), &range);
    peer.expect("attached");
    let stats = daemon.stats();
    assert_eq!(stats["sessions"][0]["xpmem"]["peers"], 1, "{stats:#}");
    app.go_on();
    app.expect("returned");
    peer.go_on();
    let said = peer.next();
    assert!(said.starts_with("zapped"), "{said}");
    peer.wait_ok();
    app.go_on();
    app.wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_peer_when_stopped_is_fenced_and_the_call_returns() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |config| {
        config.fence_timeout = Duration::from_millis(500);
    });
    let mut app = app(&daemon, "waits");
    let range = app.next();
    app.expect("ready");
    let mut peer = start_peer(&daemon, app.pid(), &range);
    peer.expect("attached");
    peer.freeze();
    app.go_on();
    app.expect("alive");
    app.wait_ok();
    let stats = daemon.stats();
    assert_eq!(stats["fence"]["kills"], 1, "{stats:#}");
    daemon.wait_clean();
}

#[test]
fn test_device_when_events_never_cease_gets_its_turn() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    app(&daemon, "flood").wait_ok();
    daemon.wait_clean();
}

#[test]
fn test_peers_when_they_come_and_go_during_invalidations_are_not_fenced() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let mut app = app(&daemon, "churn");
    let range = app.next();
    app.expect("ready");
    let mut peer = start_peer_as("peer_churn", &daemon, app.pid(), &range);
    let said = peer.next();
    assert!(said.starts_with("zapped"), "{said}");
    peer.wait_ok();
    app.go_on();
    app.wait_ok();
    assert_eq!(daemon.wait_clean()["fence"]["kills"], 0);
}

#[test]
fn test_peer_when_application_is_killed_waits_for_nothing() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let mut app = app(&daemon, "waits");
    let range = app.next();
    app.expect("ready");
    let mut peer = start_peer_as("peer_outlives", &daemon, app.pid(), &range);
    peer.expect("attached");
    app.signal(Signal::KILL);
    peer.expect("over");
    peer.wait_ok();
    assert_eq!(daemon.wait_clean()["fence"]["kills"], 0);
}
