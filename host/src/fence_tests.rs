use super::*;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::process::{Child, Command, Stdio};

/// A process that does nothing for a long time.
struct Idle(Child);

impl Idle {
    fn new() -> Self {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn();
        Self(child.expect("sleep(1) is there"))
    }
    fn peer(&self) -> Peer {
        Peer::open(self.0.id(), "idle").unwrap()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn channel() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap()
}

fn look(fd: &OwnedFd) -> Progress<u8> {
    let mut byte = [0];
    match recv(fd, &mut byte[..], RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Progress::Never("hang-up".into()),
        Ok(_) => Progress::Reply(byte[0]),
        Err(_) => Progress::NotYet,
    }
}

#[test]
fn test_wait_when_peer_answers_returns_the_answer() {
    let idle = Idle::new();
    let (ours, theirs) = channel();
    let token = MaySleep::claim("test");
    std::thread::scope(|s| {
        s.spawn(|| send(&theirs, b"x", SendFlags::empty()).unwrap());
        let outcome = Fence::new(None)
            .wait(&idle.peer(), ours.as_fd(), &token, || look(&ours))
            .unwrap();
        assert_eq!(outcome, Outcome::Replied(b'x'));
    });
    assert!(!idle.peer().is_gone());
}

#[test]
fn test_wait_when_peer_is_silent_kills_it_and_sees_it_gone() {
    let idle = Idle::new();
    let peer = idle.peer();
    let (ours, _theirs) = channel();
    let token = MaySleep::claim("test");
    let fence = Fence::new(Some(Duration::from_millis(20)));
    let outcome = fence.wait(&peer, ours.as_fd(), &token, || look(&ours)).unwrap();
    assert_eq!(outcome, Outcome::Gone { killed: true });
    assert!(peer.is_gone());
    assert_eq!((fence.stats().kills, fence.stats().gone), (1, 1));
}

#[test]
fn test_wait_when_peer_is_stopped_is_not_fooled_by_the_timeout() {
    let idle = Idle::new();
    let peer = idle.peer();
    pidfd_send_signal(&peer.pidfd, Signal::STOP).unwrap();
    let (ours, _theirs) = channel();
    let token = MaySleep::claim("test");
    let fence = Fence::new(Some(Duration::from_millis(5)));
    // Gone means dead: had the wait ended at the timeout, the process would still be there, stopped.
    let outcome = fence.wait(&peer, ours.as_fd(), &token, || look(&ours)).unwrap();
    assert_eq!(outcome, Outcome::Gone { killed: true });
    assert!(peer.is_gone());
}

#[test]
fn test_wait_when_peer_hangs_up_but_lives_is_fenced_at_once() {
    let idle = Idle::new();
    let peer = idle.peer();
    let (ours, theirs) = channel();
    drop(theirs);
    let token = MaySleep::claim("test");
    let fence = Fence::new(None);
    let outcome = fence.wait(&peer, ours.as_fd(), &token, || look(&ours)).unwrap();
    assert_eq!(outcome, Outcome::Gone { killed: true });
}

#[test]
fn test_wait_when_peer_dies_by_itself_is_not_killed() {
    let mut idle = Idle::new();
    let peer = idle.peer();
    let (ours, _theirs) = channel();
    let token = MaySleep::claim("test");
    idle.0.kill().unwrap();
    let fence = Fence::new(None);
    let outcome = fence.wait(&peer, ours.as_fd(), &token, || look(&ours)).unwrap();
    assert_eq!(outcome, Outcome::Gone { killed: false });
    assert_eq!(fence.stats().kills, 0);
}

#[test]
fn test_wait_when_answer_came_before_the_end_returns_it() {
    let mut idle = Idle::new();
    let peer = idle.peer();
    let (ours, theirs) = channel();
    send(&theirs, b"y", SendFlags::empty()).unwrap();
    idle.0.kill().unwrap();
    idle.0.wait().unwrap();
    let token = MaySleep::claim("test");
    let mut first = true;
    let outcome = Fence::new(None)
        .wait(&peer, ours.as_fd(), &token, || {
            if std::mem::take(&mut first) {
                Progress::NotYet
            } else {
                look(&ours)
            }
        })
        .unwrap();
    assert_eq!(outcome, Outcome::Replied(b'y'));
}

#[test]
fn test_wait_when_killing_is_not_permitted_keeps_waiting_and_says_so() {
    // The refusal is played by the replaceable kill; the second report ends the test's patience.
    static IDLE: std::sync::Mutex<(Option<Idle>, u32)> = std::sync::Mutex::new((None, 0));
    let idle = Idle::new();
    let peer = idle.peer();
    IDLE.lock().unwrap().0 = Some(idle);
    let mut fence = Fence::new(Some(Duration::from_millis(1)));
    fence.kill = |_| {
        let mut idle = IDLE.lock().unwrap();
        idle.1 += 1;
        if idle.1 == 2 {
            // Somebody else ends it.
            idle.0 = None;
        }
        Err(Errno::PERM)
    };
    let (ours, _theirs) = channel();
    let token = MaySleep::claim("test");
    let outcome = fence.wait(&peer, ours.as_fd(), &token, || look(&ours)).unwrap();
    assert_eq!(outcome, Outcome::Gone { killed: false });
    assert_eq!((fence.stats().kills, fence.stats().reports), (0, 2));
}

#[test]
fn test_wait_when_peer_is_traced_does_not_fence() {
    // The peer itself asks to be traced by its parent, so that no debugger has to be installed.
    let mut command = Command::new("sleep");
    command.arg("1000").stdin(Stdio::null());
    // SAFETY: ptrace(PTRACE_TRACEME) is a plain system call, fit for a forked child.
    #[allow(unsafe_code)]
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let idle = Idle(command.spawn().unwrap());
    let peer = idle.peer();
    // The tracer is the forking thread, so the number is a thread's.
    assert!(debugger(peer.pid).is_some_and(|why| why.starts_with("the peer is traced by")));
    let (ours, theirs) = channel();
    let token = MaySleep::claim("test");
    let fence = Fence::new(Some(Duration::ZERO));
    let mut looks = 0;
    let outcome = fence
        .wait(&peer, ours.as_fd(), &token, || {
            looks += 1;
            if looks == 2 {
                // The deadline was over at the first look.
                send(&theirs, b"z", SendFlags::empty()).unwrap();
            }
            look(&ours)
        })
        .unwrap();
    assert_eq!(outcome, Outcome::Replied(b'z'));
    assert_eq!((fence.stats().kills, fence.stats().reports), (0, 1));
}

#[test]
fn test_tracer_when_status_is_any_is_parsed() {
    assert_eq!(parse_tracer("Name:\tx\nTracerPid:\t0\n"), None);
    assert_eq!(parse_tracer("Name:\tx\nTracerPid:\t17\nUid:\t0\n"), Some(17));
    assert_eq!(parse_tracer(""), None);
}

#[test]
fn test_peer_when_pid_is_nobody_is_an_error() {
    for pid in [0, u32::MAX] {
        assert!(Peer::open(pid, "nobody").is_err());
    }
}

#[test]
#[should_panic(expected = "S9")]
fn test_s9_wait_when_in_atomic_section_panics() {
    let token = MaySleep::claim("test");
    let peer = Peer::open(std::process::id(), "self").unwrap();
    let (ours, _theirs) = channel();
    let _section = crate::notifier::NonSleeping::enter();
    let _ = Fence::new(None).wait(&peer, ours.as_fd(), &token, || look(&ours));
}
