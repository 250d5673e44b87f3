use super::*;
use crate::notifier::{Chain, Event, StartError};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const BASE: u64 = 0x7000_0000;
const END: u64 = BASE + 0x10_0000;

/// A process to be fenced; its side of the protocol is played by the test.
struct Puppet {
    child: Child,
    socket: Option<OwnedFd>,
    link: Arc<PeerLink>,
}

impl Puppet {
    fn new() -> Self {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn();
        let child = child.expect("sleep(1) is there");
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let peer = Peer::open(child.id(), "puppet").unwrap();
        Self {
            child,
            socket: Some(theirs),
            link: PeerLink::new(peer, ours, BASE, END),
        }
    }

    fn receive(&self) -> Notice {
        receive(self.socket.as_ref().unwrap())
    }

    fn say(&self, text: &[u8]) {
        send(self.socket.as_ref().unwrap(), text, SendFlags::empty()).unwrap();
    }
}

fn receive(socket: &OwnedFd) -> Notice {
    let mut buffer = [0; 1024];
    let (_, length) = recv(socket, &mut buffer[..], RecvFlags::empty()).unwrap();
    serde_json::from_slice(&buffer[..length]).unwrap()
}

fn answer(socket: &OwnedFd, seq: u64) {
    let reply = NoticeReply::Zapped {
        seq,
        unmapped_bytes: 4096,
    };
    send(socket, &serde_json::to_vec(&reply).unwrap(), SendFlags::empty()).unwrap();
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn range(start: u64, end: u64, blockable: bool) -> NotifierRange {
    NotifierRange {
        start,
        end,
        event: Event::Unmap,
        blockable,
    }
}

fn set_up(timeout: Option<Duration>) -> (Arc<Chain>, Arc<Xpmem>, MaySleep) {
    let token = MaySleep::claim("test");
    let chain = Chain::new();
    let xpmem = Xpmem::new(Arc::new(Fence::new(timeout)));
    chain.register(xpmem.clone(), &token).unwrap();
    (chain, xpmem, token)
}

#[test]
fn test_s2_start_when_peer_has_the_range_returns_after_its_zap() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    let start = range(BASE, BASE + 0x2000, true);
    std::thread::scope(|s| {
        let starter = s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(start, Ctx::MaySleep(&token))
                .unwrap();
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        let Notice::Zap { seq, start, end } = puppet.receive() else {
            panic!("no zap")
        };
        assert_eq!((start, end), (BASE, BASE + 0x2000));
        // The message is here and nothing has been answered: the start must not have returned, and no page can
        // be asked for (S1).
        assert!(!starter.is_finished());
        assert_eq!(xpmem.resolve_begin(BASE, BASE + 0x1000), Err(PeerBusy::Changing));
        assert!(
            xpmem.resolve_begin(BASE + 0x2000, BASE + 0x3000).is_ok(),
            "other pages can"
        );
        answer(puppet.socket.as_ref().unwrap(), seq);
        assert_eq!(puppet.receive(), Notice::ZapEnd { seq });
    });
    assert!(xpmem.resolve_begin(BASE, BASE + 0x1000).is_ok());
    let stats = xpmem.stats();
    assert_eq!((stats.zaps, stats.unmapped_bytes, stats.peers_gone), (1, 4096, 0));
}

#[test]
fn test_s5_resolve_when_an_invalidation_ran_in_between_is_thrown_away() {
    let (chain, xpmem, token) = set_up(None);
    let begun = xpmem.resolve_begin(BASE, BASE + 0x1000).unwrap();
    assert!(!xpmem.resolve_retry(begun, BASE, BASE + 0x1000));
    let started = chain
        .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
        .unwrap();
    assert!(xpmem.resolve_retry(begun, BASE, BASE + 0x1000));
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert!(xpmem.resolve_retry(begun, BASE, BASE + 0x1000));
}

#[test]
fn test_s10_attach_when_an_invalidation_runs_cannot_resolve_its_range() {
    let (chain, xpmem, token) = set_up(None);
    let started = chain
        .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
        .unwrap();
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    assert_eq!(xpmem.resolve_begin(BASE, END), Err(PeerBusy::Changing));
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert!(xpmem.resolve_begin(BASE, END).is_ok());
    assert_eq!(xpmem.stats().zaps, 0);
}

#[test]
fn test_s9_start_when_non_blockable_and_peer_has_the_range_refuses() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    let refused = chain.invalidate_range_start(range(BASE, END, false), Ctx::MaySleep(&token));
    assert_eq!(refused.unwrap_err(), StartError::Again { subscriber: "xpmem" });
    assert!(
        xpmem.resolve_begin(BASE, END).is_ok(),
        "C3: nothing is in progress after a refusal"
    );
    let elsewhere = range(END, END + 0x1000, false);
    let started = chain
        .invalidate_range_start(elsewhere, Ctx::MaySleep(&token))
        .unwrap();
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert_eq!((xpmem.stats().refused, xpmem.stats().zaps), (1, 0));
}

#[test]
fn test_s9_start_when_non_blockable_and_list_is_locked_refuses_instead_of_waiting() {
    let (chain, xpmem, token) = set_up(None);
    let peers = lock(&xpmem.peers);
    let refused = chain.invalidate_range_start(range(BASE, END, false), Ctx::MaySleep(&token));
    assert!(refused.is_err());
    drop(peers);
    let started = chain
        .invalidate_range_start(range(BASE, END, false), Ctx::MaySleep(&token))
        .unwrap();
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
}

#[test]
fn test_c4_start_when_peer_never_answers_fences_it_and_succeeds() {
    let (chain, xpmem, token) = set_up(Some(Duration::from_millis(20)));
    let mut puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    let started = chain
        .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
        .unwrap();
    assert!(puppet.link.is_gone());
    assert!(
        puppet.child.try_wait().unwrap().is_some(),
        "it is dead, not just late"
    );
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    let stats = xpmem.stats();
    assert_eq!((stats.peers_gone, stats.peers), (1, 0));
}

#[test]
fn test_start_when_peer_dies_or_babbles_goes_on() {
    // Each of these ends with the peer's process gone, and the start succeeds.
    let cases: [fn(&mut Puppet); 4] = [
        |p| p.child.kill().unwrap(),
        |p| p.socket = None,
        |p| p.say(b"not json"),
        |p| p.say(br#"{"notice_reply":"zapped","seq":99,"unmapped_bytes":0}"#),
    ];
    for case in cases {
        let (chain, xpmem, token) = set_up(None);
        let mut puppet = Puppet::new();
        xpmem.attach(puppet.link.clone(), &token);
        case(&mut puppet);
        let started = chain
            .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
            .unwrap();
        chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        assert!(puppet.link.is_gone());
        assert!(puppet.link.peer().is_gone());
        assert_eq!(xpmem.stats().peers, 0);
    }
}

#[test]
fn test_start_when_an_old_answer_is_in_the_socket_waits_for_its_own() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    answer(puppet.socket.as_ref().unwrap(), 0);
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
                .unwrap();
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        let Notice::Zap { seq, .. } = puppet.receive() else {
            panic!("no zap")
        };
        assert_ne!(seq, 0);
        answer(puppet.socket.as_ref().unwrap(), seq);
    });
    assert_eq!(xpmem.stats().unmapped_bytes, 4096);
    assert!(!puppet.link.is_gone());
}

#[test]
fn test_start_when_two_peers_have_the_range_tells_both_before_it_waits() {
    let (chain, xpmem, token) = set_up(None);
    let puppets = [Puppet::new(), Puppet::new()];
    for puppet in &puppets {
        xpmem.attach(puppet.link.clone(), &token);
    }
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
                .unwrap();
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        // Both messages arrive before any is answered; the answers come in the other order.
        let seqs: Vec<u64> = puppets
            .iter()
            .map(|p| match p.receive() {
                Notice::Zap { seq, .. } => seq,
                other => panic!("{other:?}"),
            })
            .collect();
        for (puppet, seq) in puppets.iter().zip(seqs).rev() {
            answer(puppet.socket.as_ref().unwrap(), seq);
        }
    });
    assert_eq!(xpmem.stats().unmapped_bytes, 8192);
}

#[test]
fn test_start_when_the_socket_is_full_waits_for_room() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    let filler = Notice::ZapEnd { seq: 0 };
    let mut fillers = 0;
    while puppet.link.try_send(&filler) == Ok(true) {
        fillers += 1;
    }
    assert!(fillers > 0);
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
                .unwrap();
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        for _ in 0..fillers {
            assert_eq!(puppet.receive(), filler);
        }
        let Notice::Zap { seq, .. } = puppet.receive() else {
            panic!("no zap")
        };
        answer(puppet.socket.as_ref().unwrap(), seq);
    });
}

#[test]
fn test_s12_resolve_when_released_is_refused_and_peers_are_zapped() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    std::thread::scope(|s| {
        s.spawn(|| {
            let token = MaySleep::claim("releaser");
            chain.release(&token);
        });
        let Notice::Zap { seq, start, end } = puppet.receive() else {
            panic!("no zap")
        };
        assert_eq!((start, end), (0, u64::MAX));
        answer(puppet.socket.as_ref().unwrap(), seq);
        // No end will come for that zap: whoever waits for it there has to know.
        assert!(matches!(puppet.receive(), Notice::Closing { .. }));
    });
    assert!(puppet.link.is_gone());
    assert!(!puppet.link.peer().is_gone(), "it has done nothing wrong");
    assert_eq!(xpmem.resolve_begin(BASE, END), Err(PeerBusy::Released));
    assert_eq!(xpmem.stats().peers, 0);
}

#[test]
fn test_start_when_several_peers_are_silent_fences_all_within_one_timeout() {
    let timeout = Duration::from_secs(1);
    let (chain, xpmem, token) = set_up(Some(timeout));
    let puppets: Vec<_> = (0..4).map(|_| Puppet::new()).collect();
    for puppet in &puppets {
        xpmem.attach(puppet.link.clone(), &token);
    }
    let begun = Instant::now();
    let started = chain
        .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
        .unwrap();
    // One after the other would be four, and agents do not wait for ever: they would kill this process.
    assert!(begun.elapsed() < 3 * timeout, "{:?}", begun.elapsed());
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert!(puppets.iter().all(|p| p.link.peer().is_gone()));
}

#[test]
fn test_detach_when_peer_has_pages_waits_for_its_zap_and_lets_it_live() {
    let (_chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    std::thread::scope(|s| {
        let detacher = s.spawn(|| xpmem.detach(&puppet.link, &MaySleep::claim("detacher")));
        let Notice::Zap { seq, start, end } = puppet.receive() else {
            panic!("no zap")
        };
        assert_eq!((start, end), (BASE, END));
        assert!(!detacher.is_finished());
        answer(puppet.socket.as_ref().unwrap(), seq);
        assert!(detacher.join().unwrap());
    });
    assert!(matches!(puppet.receive(), Notice::Closing { .. }));
    assert!(!puppet.link.peer().is_gone());
}

#[test]
fn test_detach_when_peer_has_hung_up_lets_it_live() {
    let (chain, xpmem, token) = set_up(None);
    let mut puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    puppet.socket = None;
    assert!(xpmem.detach(&puppet.link, &token));
    let started = chain
        .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
        .unwrap();
    chain.invalidate_range_end(started, Ctx::MaySleep(&token));
    assert!(!puppet.link.peer().is_gone());
}

#[test]
fn test_start_when_the_peer_is_dismissed_meanwhile_does_not_fence_it() {
    let (chain, xpmem, token) = set_up(None);
    let puppet = Puppet::new();
    xpmem.attach(puppet.link.clone(), &token);
    std::thread::scope(|s| {
        let wire = lock(&puppet.link.wire);
        let starter = s.spawn(|| {
            let token = MaySleep::claim("starter");
            let started = chain
                .invalidate_range_start(range(BASE, END, true), Ctx::MaySleep(&token))
                .unwrap();
            chain.invalidate_range_end(started, Ctx::MaySleep(&token));
        });
        // It has taken its list of peers when it has said that the range is changing, or takes an empty one
        // later: it is killed in neither case.
        while xpmem.resolve_begin(BASE, END).is_ok() {
            std::thread::yield_now();
        }
        puppet.link.dismiss("test");
        drop(wire);
        starter.join().unwrap();
    });
    assert!(!puppet.link.peer().is_gone());
}
