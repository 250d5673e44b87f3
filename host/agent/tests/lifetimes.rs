//! Attachments that begin, end, fork and lose their peers; contexts and peers of the sleeping kind.
#![allow(unsafe_code, reason = "forks, maps and unmaps memory")]

mod mock;

use agent::peer::Peer;
use agent::{Agent, AgentError, AttachOptions, ContextOptions, ExecuteError, FaultMode, Instruction, Memory};
use mock::{GSEG_OFFSET, Mock, Options, Seen};
use protos::bridge::control::{Notice, NoticeReply};
use protos::bridge::shared::slot_state;
use protos::gru::cb::{self, Control, Status};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

fn unmap(agent: &Agent, at: usize, len: usize) -> u64 {
    // SAFETY: the tests keep no references into their mappings.
    unsafe { agent.munmap(at, len) }.unwrap().generation
}

fn hops(seen: &[Seen]) -> usize {
    seen.iter().filter(|s| matches!(s, Seen::Start { .. })).count()
}

/// A process that stands for a daemon or a device: it ends when its standard input does.
fn stand_in() -> Child {
    Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn test_attach_when_nobody_listens_says_where_and_what_to_do() {
    let Some(_one) = one_at_a_time() else { return };
    let error = Agent::attach(&AttachOptions {
        socket: "/nonexistent/tlbridge".into(),
        name: "x".into(),
    })
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("/nonexistent/tlbridge") && text.contains("tlbridge host"),
        "{text}"
    );
    assert!(agent::current().is_none());
}

#[test]
fn test_attach_when_attached_already_is_refused_and_again_after_detach_works() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let again = Agent::attach(&AttachOptions {
        socket: mock.socket(),
        name: "x".into(),
    });
    assert!(matches!(again, Err(AgentError::AlreadyAttached)));
    agent.alive().unwrap();
    assert_eq!(agent.daemon_stats().unwrap(), "{}");
    agent.detach().unwrap();
    assert!(agent::current().is_none());
    assert!(matches!(agent.detach(), Err(AgentError::NotAttached)));
    assert!(matches!(agent.memory(4096, "x"), Err(AgentError::NotAttached)));
    drop(mock);
    for _ in 0..3 {
        let mock = Mock::start(Options::default());
        let agent = mock.attach();
        let memory = agent.memory(PAGE as u64, "again").unwrap();
        let at = map(agent, &memory, PAGE);
        assert!(unmap(agent, at, PAGE) > 0);
        agent.detach().unwrap();
    }
}

#[test]
fn test_detach_when_a_call_is_inside_waits_for_it() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "detach").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    mock.set_gate(false);
    std::thread::scope(|s| {
        let call = s.spawn(|| unmap(agent, at, PAGE));
        mock.wait_until("START", |seen| hops(seen) == 1);
        let detach = s.spawn(|| agent.detach().unwrap());
        // The mock ends the session when the control socket closes; that releases the call too.
        call.join().unwrap();
        detach.join().unwrap();
    });
    assert!(agent::current().is_none());
    mock.set_gate(true);
}

/// Where this process has mapped the memory file `name`.
fn mapped(name: &str) -> Vec<usize> {
    let file = format!("/memfd:{name} ");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains(&file))
        .map(|line| usize::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap())
        .collect()
}

/// Without malloc, for a child.
fn is_mapped(at: usize) -> bool {
    let mut vec = 0u8;
    // SAFETY: mincore of one page into one byte.
    unsafe { libc::mincore(at as *mut libc::c_void, PAGE, &raw mut vec) == 0 }
}

#[test]
fn test_child_when_forked_is_detached_and_its_calls_are_plain() {
    let Some(_one) = one_at_a_time() else { return };
    // Tables of mocks of before, which stay.
    let earlier = mapped("table");
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(2 * PAGE as u64, "fork").unwrap();
    let at = map(agent, &memory, 2 * PAGE);
    // Would hop, for ever, if the child took part.
    mock.count(at);
    mock.set_gate(false);
    let before = agent.generation();
    let descriptors = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|e| std::fs::read_link(e.unwrap().path()).ok())
            .filter(|l| l.to_string_lossy().contains("userfaultfd"))
            .count()
    };
    // One of the agent, one of the mock.
    assert_eq!(descriptors(), 2);
    // Maps the context's pages.
    let context = agent
        .create_context(&ContextOptions {
            cbs: 2,
            ds_bytes: 1024,
            fault_mode: FaultMode::Interrupt,
        })
        .unwrap();
    let of_mock = std::ptr::from_ref(mock.inner().table).addr();
    let ours = |at: &usize| *at != of_mock && !earlier.contains(at);
    let mailbox: Vec<_> = mapped("table").into_iter().filter(ours).collect();
    assert_eq!(mailbox.len(), 1);
    let (gseg, status) = (mapped("bar2"), mapped("bar0"));
    assert!(!gseg.is_empty() && !status.is_empty());
    let device = [mailbox, gseg, status].concat();
    assert!(is_mapped(of_mock));
    assert!(device.iter().all(|at| is_mapped(*at)));
    // SAFETY: the child uses malloc, which glibc keeps usable in a child, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // First of all, before anything else can be mapped there. The mock's own table is inherited.
        let ok = device.iter().all(|at| !is_mapped(*at))
            && is_mapped(of_mock)
            && agent::current().is_none()
            && agent.generation() == 0
            && descriptors() == 1
            && matches!(agent.memory(4096, "child"), Err(AgentError::NotAttached))
            // SAFETY: the child's own mapping.
            && unsafe { agent::covered::munmap(at, 2 * PAGE) }.is_ok_and(|c| c.generation == 0);
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert_eq!(agent.generation(), before);
    assert_eq!(hops(&mock.seen()), 0);
    mock.set_gate(true);
    assert!(unmap(agent, at, 2 * PAGE) > before);
    drop(context);
    agent.detach().unwrap();
}

/// Whether descriptor `fd` is a userfaultfd, without malloc.
fn is_userfaultfd(fd: i32) -> bool {
    let mut path = *b"/proc/self/fd/000\0";
    for (i, digit) in [fd / 100, fd / 10 % 10, fd % 10].into_iter().enumerate() {
        path[14 + i] = b'0' + digit as u8;
    }
    // "/proc/self/fd/007" is not a name of descriptor 7.
    let skip = if fd >= 100 {
        0
    } else if fd >= 10 {
        1
    } else {
        2
    };
    path.copy_within(14 + skip.., 14);
    let mut link = [0u8; 64];
    // SAFETY: the path is terminated, the buffer lives on this stack.
    let n = unsafe { libc::readlink(path.as_ptr().cast(), link.as_mut_ptr().cast(), link.len()) };
    n > 0 && link[..n as usize].windows(11).any(|w| w == b"userfaultfd")
}

#[test]
fn test_child_when_made_by_a_raw_clone_is_detached_by_its_first_call() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options {
        monitor: false,
        ..Options::default()
    });
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "clone").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    mock.set_gate(false);
    let count = || (0..1000).filter(|&fd| is_userfaultfd(fd)).count();
    assert_eq!(count(), 1);
    // SAFETY: a child with a copy of everything; it makes system calls only and ends by _exit.
    let child = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::SIGCHLD as usize,
            0usize,
            0usize,
            0usize,
            0usize,
        )
    };
    if child == 0 {
        let ok = count() == 1
            // SAFETY: the child's own mapping.
            && unsafe { agent::covered::munmap(at, PAGE) }.is_ok_and(|c| c.generation == 0)
            && count() == 0;
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    let waited = unsafe { libc::waitpid(child as i32, &raw mut status, 0) };
    assert_eq!(i64::from(waited), child);
    assert_eq!(status, 0);
    assert_eq!(count(), 1);
    mock.set_gate(true);
    agent.detach().unwrap();
}

#[test]
fn test_child_when_forked_can_attach_anew() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let (socket, other) = {
        let other = Mock::start(Options {
            // The child must not take this process for its daemon's death.
            daemon: None,
            ..Options::default()
        });
        (other.socket(), other)
    };
    // SAFETY: the child uses malloc and threads, which glibc keeps usable in a child, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let attached = Agent::attach(&AttachOptions {
            socket,
            name: "child".into(),
        });
        let ok = attached.is_ok_and(|agent| {
            let Ok(memory) = agent.memory(PAGE as u64, "child") else {
                return false;
            };
            let at = map(agent, &memory, PAGE);
            unmap(agent, at, PAGE) > 0 && agent.detach().is_ok()
        });
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert!(
        other
            .seen()
            .iter()
            .any(|s| matches!(s, Seen::Memory { new: true, .. }))
    );
    agent.alive().unwrap();
    agent.detach().unwrap();
}

#[test]
fn test_calls_when_the_daemon_dies_go_on_and_the_error_names_it() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let memory = agent.memory(4 * PAGE as u64, "death").unwrap();
    let at = map(agent, &memory, 4 * PAGE);
    mock.count(at);
    mock.set_gate(false);
    std::thread::scope(|s| {
        let t = s.spawn(|| unmap(agent, at, PAGE));
        mock.wait_until("START", |seen| hops(seen) == 1);
        mock.die();
        t.join().unwrap();
    });
    let gone = agent.alive().unwrap_err();
    assert!(
        gone.who
            .contains(&format!("host daemon (pid {})", std::process::id())),
        "{gone}"
    );
    // Plain from now on, on registered memory too.
    assert_eq!(unmap(agent, at + PAGE, 3 * PAGE), 0);
    assert!(matches!(agent.memory(4096, "dead"), Err(AgentError::Gone(_))));
    agent.detach().unwrap();
}

#[test]
fn test_raw_munmap_when_it_waits_for_an_event_of_a_dead_daemon_goes_on() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options {
        monitor: false,
        ..Options::default()
    });
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "stuck").unwrap();
    let at = map(agent, &memory, PAGE);
    let returned = AtomicBool::new(false);
    std::thread::scope(|s| {
        let t = s.spawn(|| {
            // SAFETY: the test's own page.
            unsafe { agent::raw::munmap(at, PAGE) }.unwrap();
            returned.store(true, Ordering::SeqCst);
        });
        // The page is gone while the caller waits for its event to be read.
        let mut vec = 0u8;
        // SAFETY: mincore of one page into one byte.
        while unsafe { libc::mincore(at as *mut libc::c_void, PAGE, &raw mut vec) } == 0 {
            std::thread::yield_now();
        }
        assert!(!returned.load(Ordering::SeqCst));
        mock.die();
        t.join().unwrap();
    });
    agent.detach().unwrap();
}

#[test]
fn test_hop_when_the_daemon_is_silent_fences_it_then_the_device() {
    let Some(_one) = one_at_a_time() else { return };
    let (mut daemon, mut device) = (stand_in(), stand_in());
    let mock = Mock::start(Options {
        fence_timeout_ms: 300,
        daemon: Some(daemon.id()),
        device: Some(device.id()),
        ..Options::default()
    });
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "silent daemon").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    mock.set_gate(false);
    let begin = Instant::now();
    unmap(agent, at, PAGE);
    assert!(
        begin.elapsed() >= Duration::from_millis(600),
        "{:?}",
        begin.elapsed()
    );
    // Both are gone, by SIGKILL.
    for child in [&mut daemon, &mut device] {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
    let gone = agent.alive().unwrap_err();
    assert!(
        gone.to_string().contains(&format!("pid {}", daemon.id())),
        "{gone}"
    );
    assert!(gone.why.contains("fence timeout"), "{gone}");
    mock.set_gate(true);
    agent.detach().unwrap();
}

#[test]
fn test_hop_when_the_daemon_has_died_waits_for_the_devices_reset() {
    let Some(_one) = one_at_a_time() else { return };
    let mut daemon = stand_in();
    let mock = Mock::start(Options {
        fence_timeout_ms: 60_000,
        daemon: Some(daemon.id()),
        device: Some(0),
        ..Options::default()
    });
    let agent = mock.attach();
    // Maps the status page.
    let context = agent
        .create_context(&ContextOptions {
            cbs: 2,
            ds_bytes: 1024,
            fault_mode: FaultMode::Interrupt,
        })
        .unwrap();
    let memory = agent.memory(PAGE as u64, "reset").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    mock.set_gate(false);
    let returned = AtomicBool::new(false);
    std::thread::scope(|s| {
        let t = s.spawn(|| {
            unmap(agent, at, PAGE);
            returned.store(true, Ordering::SeqCst);
        });
        mock.wait_until("START", |seen| hops(seen) == 1);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        // The daemon's death alone proves nothing about the device.
        while agent.alive().is_ok() {
            std::thread::yield_now();
        }
        assert!(!returned.load(Ordering::SeqCst));
        mock.inner()
            .device
            .bar0
            .write_all_at(&1u32.to_le_bytes(), 0x1004)
            .unwrap();
        t.join().unwrap();
    });
    assert!(matches!(
        context.execute(0, &Instruction::nop()),
        Err(ExecuteError::Agent(AgentError::Gone(_)))
    ));
    drop(context);
    mock.set_gate(true);
    agent.detach().unwrap();
}

#[test]
fn test_alive_when_the_daemon_closes_the_session_gives_its_reason() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    mock.inner().table.header.closed.store(1, Ordering::SeqCst);
    mock.notify(&Notice::Closing {
        reason: "maintenance".into(),
    });
    let gone = loop {
        match agent.alive() {
            Err(gone) if gone.why.contains("maintenance") => break gone,
            _ => std::thread::yield_now(),
        }
    };
    assert!(gone.who.starts_with("host daemon"), "{gone}");
    agent.detach().unwrap();
}

#[test]
fn test_alive_when_the_device_is_lost_names_it_and_calls_stay_covered() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    mock.notify(&Notice::DeviceLost {
        reason: "socket closed".into(),
    });
    let gone = loop {
        match agent.alive() {
            Err(gone) => break gone,
            Ok(()) => std::thread::yield_now(),
        }
    };
    assert!(
        gone.who.starts_with("device process") && gone.why.contains("socket closed"),
        "{gone}"
    );
    let memory = agent.memory(PAGE as u64, "lost").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    assert!(unmap(agent, at, PAGE) > 0);
    mock.wait_until("START", |seen| hops(seen) == 1);
    agent.detach().unwrap();
}

#[test]
fn test_context_when_an_instruction_runs_answers_with_value_and_tag() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let agent = mock.attach();
    let context = agent
        .create_context(&ContextOptions {
            cbs: 4,
            ds_bytes: 2048,
            fault_mode: FaultMode::Interrupt,
        })
        .unwrap();
    assert_eq!(
        (context.cbs(), context.ds_bytes(), context.gseg_offset()),
        (4, 2048, GSEG_OFFSET)
    );
    context.ds_write(100, b"data").unwrap();
    let mut back = [0; 4];
    context.ds_read(100, &mut back).unwrap();
    assert_eq!(&back, b"data");
    assert!(context.ds_write(2046, b"data").is_err());
    let outside = context.execute(4, &Instruction::nop());
    assert!(matches!(
        outside,
        Err(ExecuteError::Agent(AgentError::Invalid { .. }))
    ));
    // The device: wait for the doorbell, look at control block 1, answer.
    let completion = std::thread::scope(|s| {
        s.spawn(|| {
            let mut count = [0; 8];
            rustix::io::read(&mock.inner().device.doorbell, &mut count).unwrap();
            let bar2 = &mock.inner().device.bar2;
            let at = GSEG_OFFSET + 256;
            let mut word = [0; 8];
            bar2.read_exact_at(&mut word, at).unwrap();
            let control = Control::from_bits(u64::from_le_bytes(word));
            assert!(control.icmd() && control.istatus() == Status::ACTIVE);
            bar2.write_all_at(&77u64.to_le_bytes(), at + cb::AVALUE).unwrap();
            bar2.write_all_at(&9u64.to_le_bytes(), at + protos::gru::map::CB_EXT_TAG)
                .unwrap();
            let done = control.with_icmd(false).with_istatus(Status::IDLE);
            bar2.write_all_at(&done.into_bits().to_le_bytes(), at).unwrap();
        });
        context.execute(1, &Instruction::nop()).unwrap()
    });
    assert_eq!((completion.avalue, completion.tag), (77, 9));
    drop(context);
    mock.wait_until("destroy", |seen| seen.contains(&Seen::Request("destroy_context")));
    agent.detach().unwrap();
}

#[test]
fn test_peer_when_zapped_really_unmaps_before_it_answers() {
    let Some(_one) = one_at_a_time() else { return };
    let mock = Mock::start(Options::default());
    let file =
        std::fs::File::from(rustix::fs::memfd_create("peer", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(2 * PAGE as u64).unwrap();
    file.write_all_at(&11u64.to_le_bytes(), 8).unwrap();
    file.write_all_at(&22u64.to_le_bytes(), PAGE as u64 + 8).unwrap();
    let set_page = |offset: Option<u64>| {
        *mock.inner().peer_page.lock().unwrap() =
            offset.map(|o| (file.as_fd().try_clone_to_owned().unwrap(), o));
    };
    set_page(Some(0));
    let start = 0x7000_0000u64;
    let peer = Peer::attach(&mock.socket(), std::process::id(), start, start + 4 * PAGE as u64).unwrap();
    assert_eq!(peer.read(start + 8), Some(11));
    assert_eq!(peer.read(start + 8), Some(11));
    assert_eq!((peer.stats().mapped_pages, peer.mapped_pages()), (1, 1));
    assert_eq!(peer.read(start - 8), None);
    assert_eq!(peer.read(start + 4), None);
    // The page moves: zap, change, end.
    let end = start + PAGE as u64;
    mock.notify(&Notice::Zap { seq: 5, start, end });
    mock.wait_until("answer", |seen| seen.contains(&Seen::Request("zapped")));
    assert_eq!(
        *mock.inner().zapped.lock().unwrap(),
        [NoticeReply::Zapped {
            seq: 5,
            unmapped_bytes: PAGE as u64
        }]
    );
    assert_eq!(peer.mapped_pages(), 0);
    set_page(Some(PAGE as u64));
    std::thread::scope(|s| {
        let reader = s.spawn(|| peer.read(start + 8));
        mock.notify(&Notice::ZapEnd { seq: 5 });
        assert_eq!(reader.join().unwrap(), Some(22));
    });
    // Being changed without a zap: asked again.
    set_page(None);
    std::thread::scope(|s| {
        let reader = s.spawn(|| peer.read(end + 8));
        while peer.stats().resolve_retries == 0 {
            std::thread::yield_now();
        }
        set_page(Some(0));
        assert_eq!(reader.join().unwrap(), Some(11));
    });
    assert_eq!(peer.stats().unmapped_bytes, PAGE as u64);
    mock.die();
    while peer.alive() {
        std::thread::yield_now();
    }
    assert_eq!((peer.mapped_pages(), peer.read(start + 8)), (0, None));
}

#[test]
fn test_detach_when_the_daemon_is_stopped_fences_it_and_returns() {
    let Some(_one) = one_at_a_time() else { return };
    let mut daemon = stand_in();
    let mock = Mock::start(Options {
        fence_timeout_ms: 300,
        daemon: Some(daemon.id()),
        ignore_hang_up: true,
        ..Options::default()
    });
    let agent = mock.attach();
    let (said, detached) = std::sync::mpsc::channel();
    std::thread::spawn(move || said.send(agent.detach()).unwrap());
    detached
        .recv_timeout(Duration::from_secs(20))
        .expect("detach returns")
        .unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(daemon.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(agent::current().is_none());
}

#[test]
fn test_hop_when_the_daemon_serves_others_meanwhile_does_not_fence_it() {
    let Some(_one) = one_at_a_time() else { return };
    let limit = Duration::from_millis(400);
    let mut daemon = stand_in();
    let mock = Mock::start(Options {
        fence_timeout_ms: limit.as_millis() as u64,
        daemon: Some(daemon.id()),
        ..Options::default()
    });
    let agent = mock.attach();
    let memory = agent.memory(PAGE as u64, "busy daemon").unwrap();
    let at = map(agent, &memory, PAGE);
    mock.count(at);
    let slots = &mock.inner().table.slots;
    // Other callers have every slot.
    for slot in slots {
        slot.state.store(slot_state::CLAIMED, Ordering::SeqCst);
    }
    std::thread::scope(|s| {
        let call = s.spawn(|| unmap(agent, at, PAGE));
        let begun = Instant::now();
        // They are served one after the other.
        while begun.elapsed() < 3 * limit {
            mock.inner().table.header.served.fetch_add(1, Ordering::SeqCst);
            std::thread::yield_now();
        }
        assert!(!call.is_finished());
        for slot in slots {
            slot.state.store(slot_state::FREE, Ordering::SeqCst);
        }
        assert!(call.join().unwrap() > 0);
    });
    assert_eq!(hops(&mock.seen()), 1);
    agent.alive().unwrap();
    mock.assert_idle();
    agent.detach().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
