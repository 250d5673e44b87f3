//! The daemon against clients that do not keep to the protocol.
#![allow(unsafe_code, reason = "making a userfaultfd")]

mod e2e;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use e2e::{Client, Daemon, in_process_device};
use protos::bridge::control::{FaultMode, MAX_PACKET, Reply, Request, VERSION};

/// A userfaultfd that has gone through UFFDIO_API.
fn userfaultfd() -> OwnedFd {
    // SAFETY: the call returns a descriptor that nobody else owns, or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as i32;
    assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
    // SAFETY: just made.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct uffdio_api { api, features, ioctls }; UFFD_API = 0xaa.
    let mut api = [0xaau64, 0, 0];
    // SAFETY: UFFDIO_API reads and writes the 24 bytes.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), 0xc018_aa3f, api.as_mut_ptr()) };
    assert_eq!(rc, 0, "UFFDIO_API: {}", std::io::Error::last_os_error());
    fd
}

fn attach_request(name: &str) -> Request {
    Request::Attach {
        version: VERSION,
        pid: std::process::id(),
        name: name.into(),
    }
}

fn attach(daemon: &Daemon, name: &str) -> (Client, Vec<OwnedFd>) {
    let client = Client::connect(&daemon.socket);
    let uffd = userfaultfd();
    let maps = std::fs::File::open("/proc/self/maps").unwrap();
    let (reply, fds) = client.request(&attach_request(name), &[uffd.as_fd(), maps.as_fd()]);
    assert!(matches!(reply, Reply::Attached { .. }), "{reply:?}");
    (client, fds)
}

fn memfd(len: u64) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("memory", flags).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// A pipe whose read end ends when the daemon keeps no copy of the write end.
struct Leak(OwnedFd, OwnedFd);

impl Leak {
    fn new() -> Self {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        Self(read, write)
    }
    fn check(self, what: &str) {
        drop(self.1);
        let mut fds = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: e2e::PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let ready = rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
        assert!(ready == 1, "the daemon keeps a descriptor of {what}");
        assert_eq!(rustix::io::read(&self.0, &mut [0; 1]).unwrap(), 0);
    }
}

/// splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// In a process of its own, so that nothing else opens or closes descriptors: sessions that come and go, in
/// good order and in bad, leave neither descriptors nor threads nor mappings of the table.
fn sessions_come_and_go() {
    let memory = memfd(1 << 20);
    // The first one makes what a process has once and keeps (the socket pair behind signal handling).
    Daemon::start(in_process_device().0, |_| {}).stop().unwrap();
    let before = open_fds();
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let round = |n: usize| {
        let (client, fds) = attach(&daemon, "round");
        let (reply, _) = client.request(&Request::AddMemory { len: 1 << 20 }, &[memory.as_fd()]);
        assert!(matches!(reply, Reply::Memory { .. }), "{reply:?}");
        for _ in 0..3 {
            let create = Request::CreateContext {
                pid: None,
                cbs: 2,
                ds_bytes: 1024,
                fault_mode: FaultMode::Interrupt,
            };
            let (reply, _) = client.request(&create, &[]);
            assert!(matches!(reply, Reply::Context { .. }), "{reply:?}");
        }
        let peer = Client::connect(&daemon.socket);
        let (reply, peer_fds) = peer.request(
            &Request::AttachPeer {
                version: VERSION,
                pid: std::process::id(),
                start: 0x1000,
                end: 0x2000,
            },
            &[],
        );
        assert!(matches!(reply, Reply::PeerAttached { .. }), "{reply:?}");
        assert_eq!(
            peer.refused(&Request::PeerResolve { va: 0x1000 }, &[]),
            libc::EFAULT
        );
        assert_eq!(
            peer.refused(&Request::PeerResolve { va: 0x1001 }, &[]),
            libc::EFAULT
        );
        assert_eq!(
            peer.refused(&Request::PeerResolve { va: 0x2000 }, &[]),
            libc::EFAULT
        );
        // The peer leaves first, and hangs up the socket on which it would be asked to unmap: one that keeps it
        // and does not answer is fenced.
        drop(peer_fds);
        drop(peer);
        daemon.stats_until("the peer leaves", |s| s["sessions"][0]["xpmem"]["peers"] == 0);
        if n.is_multiple_of(2) {
            client.send(b"{\"request\":", &[memory.as_fd()]).unwrap();
        }
        drop((client, fds));
        daemon.wait_clean();
    };
    (0..20).for_each(round);
    // While the daemon runs: connections keep a few descriptors for a moment, sessions keep nothing.
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = links.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let left: Vec<_> = links
        .filter(|l| l.to_string_lossy().contains("userfaultfd"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(
        !maps.contains("tlbridge-table"),
        "a session's table is still mapped:\n{maps}"
    );
    assert!(threads() < 30, "{} threads", threads());
    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    let left: Vec<_> = names
        .filter(|n| n.starts_with("uffd-") || n.starts_with("mailbox-"))
        .collect();
    assert!(left.is_empty(), "session threads are left: {left:?}");
    daemon.stop().unwrap();
    assert_eq!(
        open_fds(),
        before,
        "descriptors after 20 sessions, and before the first"
    );
}

/// Not a test by itself: what a child process of this binary does.
#[test]
fn role_entry() {
    match e2e::role().as_ref().map(|(role, _)| role.as_str()) {
        Some("come_and_go") => sessions_come_and_go(),
        Some(other) => panic!("no role {other}"),
        None => {}
    }
}

#[test]
fn test_sessions_when_they_come_and_go_leave_no_descriptor_and_no_thread() {
    if e2e::skipped() {
        return;
    }
    e2e::Role::start("role_entry", "come_and_go", std::path::Path::new("-")).wait_ok();
}

#[test]
fn test_daemon_when_sent_garbage_answers_errors_and_keeps_nothing() {
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let client = Client::connect(&daemon.socket);
    let leak = Leak::new();
    let mut seed = 42;
    let template = serde_json::to_vec(&attach_request("x")).unwrap();
    for round in 0..400usize {
        let bytes: Vec<u8> = match round % 3 {
            0 => (0..1 + random(&mut seed) % 300)
                .map(|_| random(&mut seed) as u8)
                .collect(),
            1 => {
                let mut bytes = template.clone();
                let at = random(&mut seed) as usize % bytes.len();
                bytes[at] = random(&mut seed) as u8;
                bytes
            }
            _ => template[..1 + random(&mut seed) as usize % (template.len() - 1)].to_vec(),
        };
        // From none to more than the protocol allows.
        let fds = vec![leak.1.as_fd(); random(&mut seed) as usize % 12];
        client.send(&bytes, &fds).unwrap();
        let (reply, fds) = client.receive().expect("a reply to each packet");
        assert!(
            matches!(reply, Reply::Error { .. }),
            "{reply:?} to {}",
            String::from_utf8_lossy(&bytes)
        );
        assert!(fds.is_empty());
    }
    client
        .send(&vec![b'x'; MAX_PACKET + 10], &[leak.1.as_fd()])
        .unwrap();
    assert!(matches!(
        client.receive(),
        Some((
            Reply::Error {
                errno: libc::EMSGSIZE,
                ..
            },
            _
        ))
    ));
    leak.check("a refused packet");
    assert!(
        matches!(client.request(&Request::Stats, &[]).0, Reply::Stats { .. }),
        "still served"
    );
    daemon.wait_clean();
}

#[test]
fn test_attach_when_descriptors_are_wrong_is_refused() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let client = Client::connect(&daemon.socket);
    let uffd = userfaultfd();
    let maps = std::fs::File::open("/proc/self/maps").unwrap();
    let leak = Leak::new();
    let request = attach_request("wrong");
    for fds in [
        vec![],
        vec![uffd.as_fd()],
        vec![maps.as_fd(), uffd.as_fd()],
        vec![leak.1.as_fd(), maps.as_fd()],
        vec![uffd.as_fd(), leak.1.as_fd()],
        vec![uffd.as_fd(), maps.as_fd(), leak.1.as_fd()],
    ] {
        assert_eq!(client.refused(&request, &fds), libc::EINVAL, "{fds:?}");
    }
    leak.check("a refused attach");
    let wrong_pid = Request::Attach {
        version: VERSION,
        pid: 1,
        name: "other".into(),
    };
    assert_eq!(
        client.refused(&wrong_pid, &[uffd.as_fd(), maps.as_fd()]),
        libc::EPERM
    );
    let wrong_version = Request::Attach {
        version: VERSION + 1,
        pid: std::process::id(),
        name: "new".into(),
    };
    assert_eq!(
        client.refused(&wrong_version, &[uffd.as_fd(), maps.as_fd()]),
        libc::EPROTONOSUPPORT
    );
    // After all that, the right one.
    let (reply, fds) = client.request(&attach_request("right"), &[uffd.as_fd(), maps.as_fd()]);
    assert!(matches!(reply, Reply::Attached { .. }), "{reply:?}");
    assert!(fds.len() >= 3);
    assert_eq!(
        client.refused(&attach_request("twice"), &[uffd.as_fd(), maps.as_fd()]),
        libc::EALREADY
    );
    drop(client);
    daemon.wait_clean();
}

#[test]
fn test_requests_when_not_attached_are_refused() {
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let client = Client::connect(&daemon.socket);
    let memory = memfd(4096);
    assert_eq!(
        client.refused(&Request::AddMemory { len: 4096 }, &[memory.as_fd()]),
        libc::ENOTCONN
    );
    let create = |pid| Request::CreateContext {
        pid,
        cbs: 2,
        ds_bytes: 1024,
        fault_mode: FaultMode::Interrupt,
    };
    assert_eq!(client.refused(&create(None), &[]), libc::ENOTCONN);
    assert_eq!(client.refused(&create(Some(1)), &[]), libc::ESRCH);
    for context in [0, 1, u32::MAX] {
        assert_eq!(
            client.refused(&Request::DestroyContext { context }, &[]),
            libc::ENOENT
        );
        assert_eq!(
            client.refused(&Request::CallOs { context, cb: 0 }, &[]),
            libc::ENOENT
        );
        assert_eq!(
            client.refused(
                &Request::GsegRead {
                    context,
                    offset: 0,
                    len: u32::MAX
                },
                &[]
            ),
            libc::ENOENT
        );
    }
    assert_eq!(
        client.refused(&Request::PeerResolve { va: 0 }, &[]),
        libc::ENOTCONN
    );
    assert_eq!(
        client.refused(&Request::SetPurgeable { start: 0, end: 4096 }, &[]),
        libc::ENOTCONN
    );
}

#[test]
fn test_memory_when_two_sessions_add_it_is_mapped_once() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let (a, _) = attach(&daemon, "a");
    let (b, _) = attach(&daemon, "b");
    let memory = memfd(16384);
    let add =
        |client: &Client, len: u64| match client.request(&Request::AddMemory { len }, &[memory.as_fd()]).0 {
            Reply::Memory { memory, iova } => (memory, iova),
            other => panic!("{other:?}"),
        };
    let first = add(&a, 8192);
    assert_eq!(add(&a, 8192), first, "the same file keeps its number");
    assert_eq!(add(&b, 8192).1, first.1, "another session shares the mapping");
    let ranges = || daemon.stats()["device"]["mapped_ranges"].clone();
    assert_eq!(ranges(), 1);
    assert_eq!(add(&a, 16384), first, "growth");
    assert_eq!(ranges(), 2);
    assert_eq!(
        a.refused(&Request::AddMemory { len: 20480 }, &[memory.as_fd()]),
        libc::EINVAL,
        "longer than the file"
    );
    drop(a);
    daemon.stats_until("one session is left", |s| {
        s["sessions"].as_array().unwrap().len() == 1
    });
    assert_eq!(
        daemon.stats()["device"]["mapped_files"],
        1,
        "the other session still uses it"
    );
    drop(b);
    daemon.wait_clean();
}

#[test]
fn test_context_when_made_by_message_can_be_read_and_written() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let (client, _) = attach(&daemon, "gseg");
    let create = Request::CreateContext {
        pid: None,
        cbs: 1,
        ds_bytes: 1,
        fault_mode: FaultMode::Interrupt,
    };
    let (reply, fds) = client.request(&create, &[]);
    let Reply::Context {
        context,
        cbs,
        ds_bytes,
        mappable,
        ..
    } = reply
    else {
        panic!("{reply:?}");
    };
    assert_eq!((cbs, ds_bytes), (2, 1024), "rounded up");
    assert!(mappable && fds.len() == 3, "{fds:?}");
    // The data segment, through the message path, with an unaligned head and tail.
    let ds = u32::try_from(protos::gru::map::GSEG_DS).unwrap();
    let write = Request::GsegWrite {
        context,
        offset: ds + 3,
        hex: "00112233445566778899aabbccddeeff".into(),
    };
    assert_eq!(client.request(&write, &[]).0, Reply::Done);
    let read = Request::GsegRead {
        context,
        offset: ds,
        len: 24,
    };
    match client.request(&read, &[]).0 {
        Reply::Data { hex } => assert_eq!(&hex[6..38], "00112233445566778899aabbccddeeff"),
        other => panic!("{other:?}"),
    }
    for (offset, len, errno) in [(u32::MAX, 8, libc::EINVAL), (ds, 16 * 1024 + 1, libc::E2BIG)] {
        assert_eq!(
            client.refused(&Request::GsegRead { context, offset, len }, &[]),
            errno
        );
    }
    let bad = Request::GsegWrite {
        context,
        offset: ds,
        hex: "zz".into(),
    };
    assert_eq!(client.refused(&bad, &[]), libc::EINVAL);
    // Another connection has no business with it.
    let other = Client::connect(&daemon.socket);
    assert_eq!(
        other.refused(&Request::DestroyContext { context }, &[]),
        libc::ENOENT
    );
    assert_eq!(
        client.request(&Request::DestroyContext { context }, &[]).0,
        Reply::Done
    );
    assert_eq!(
        client.refused(&Request::DestroyContext { context }, &[]),
        libc::ENOENT
    );
    drop(client);
    daemon.wait_clean();
}

#[test]
fn test_context_when_made_by_another_connection_ends_with_it() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let (owner, _) = attach(&daemon, "owner");
    let tool = Client::connect(&daemon.socket);
    let create = Request::CreateContext {
        pid: Some(std::process::id()),
        cbs: 2,
        ds_bytes: 1024,
        fault_mode: FaultMode::UserPolling,
    };
    assert!(matches!(tool.request(&create, &[]).0, Reply::Context { .. }));
    assert_eq!(daemon.stats()["sessions"][0]["contexts"], 1);
    drop(tool);
    daemon.stats_until("the tool's context is closed", |s| {
        s["sessions"][0]["contexts"] == 0
    });
    drop(owner);
    daemon.wait_clean();
}

#[test]
fn test_daemon_when_another_lives_there_says_its_pid() {
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let (stop, _handle) = host::daemon::Stop::new().unwrap();
    let config = host::daemon::HostConfig::new(&daemon.socket, "in-process");
    let error = host::daemon::run_with_backing(config, in_process_device().0, stop)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    assert!(
        daemon.stats()["daemon"]["pid"].is_u64(),
        "the first one still serves"
    );
}

#[test]
fn test_daemon_when_stopped_closes_sessions_and_removes_its_socket() {
    if e2e::skipped() {
        return;
    }
    let daemon = Daemon::start(in_process_device().0, |_| {});
    let socket = daemon.socket.clone();
    let (client, fds) = attach(&daemon, "left");
    daemon.stop().unwrap();
    assert!(!socket.exists());
    assert!(client.receive().is_none(), "hung up");
    // [table, notices, daemon, ...]: the reason comes before the end.
    let notices = Client(fds.into_iter().nth(1).unwrap());
    let mut bytes = [0; 4096];
    let got = rustix::io::read(&notices.0, &mut bytes).unwrap();
    let notice: serde_json::Value = serde_json::from_slice(&bytes[..got]).unwrap();
    assert_eq!(notice["notice"], "closing");
    assert_eq!(rustix::io::read(&notices.0, &mut bytes).unwrap(), 0);
}

#[test]
fn test_run_when_no_device_is_there_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let (stop, _handle) = host::daemon::Stop::new().unwrap();
    let config = host::daemon::HostConfig::new(dir.path().join("host"), dir.path().join("nothing"));
    let error = host::daemon::run(config, stop).unwrap_err().to_string();
    assert!(
        error.contains("nothing") && error.contains("tlbridge device"),
        "{error}"
    );
    assert!(
        !dir.path().join("host").exists(),
        "no socket of a daemon that does not work"
    );
}
