use super::*;
use crate::fence::{Fence, Peer};
use crate::notifier::{Again, Subscriber};
use crate::subscribers::{PeerLink, ShadowMmu, Xpmem};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;

const BASE: u64 = 0x10_0000;
const LEN: u64 = 16 * PAGE;

struct Bench {
    chain: Arc<Chain>,
    table: Arc<MappedTable>,
    memfd: Arc<OwnedFd>,
    reclaimer: Reclaimer,
    token: MaySleep,
}

fn set_up(seed: u64) -> Bench {
    let fd = memfd_create("purgeable", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 2 * LEN).unwrap();
    for page in 0..2 * LEN / PAGE {
        pwrite(&fd, &[0xa5; PAGE as usize], page * PAGE).unwrap();
    }
    let memfd = Arc::new(fd);
    let chain = Chain::new();
    let table = MappedTable::create().unwrap();
    let reclaimer = Reclaimer::new(chain.clone(), table.clone(), seed);
    reclaimer
        .add(PurgeableRange {
            va: BASE,
            len: LEN,
            memfd: memfd.clone(),
            offset: LEN,
        })
        .unwrap();
    Bench {
        chain,
        table,
        memfd,
        reclaimer,
        token: MaySleep::claim("test"),
    }
}

fn byte_at(memfd: &OwnedFd, va: u64) -> u8 {
    let mut byte = [0];
    pread(memfd, &mut byte, LEN + (va - BASE)).unwrap();
    byte[0]
}

/// Looks at the first byte of the range in both callbacks, and refuses on demand.
struct Watcher {
    memfd: Arc<OwnedFd>,
    refuse: bool,
    seen: Mutex<Vec<(&'static str, u8)>>,
}

impl Subscriber for Watcher {
    fn name(&self) -> &'static str {
        "watcher"
    }
    fn sleeping(&self) -> bool {
        false
    }
    fn invalidate_range_start(&self, range: &NotifierRange, _ctx: Ctx<'_>) -> Result<(), Again> {
        assert!(!range.blockable);
        let byte = byte_at(&self.memfd, range.start);
        self.seen.lock().unwrap().push(("start", byte));
        if self.refuse { Err(Again) } else { Ok(()) }
    }
    fn invalidate_range_end(&self, range: &NotifierRange, _ctx: Ctx<'_>) {
        let byte = byte_at(&self.memfd, range.start);
        self.seen.lock().unwrap().push(("end", byte));
    }
    fn release(&self) {}
}

fn watch(bench: &Bench, refuse: bool) -> Arc<Watcher> {
    let watcher = Arc::new(Watcher {
        memfd: bench.memfd.clone(),
        refuse,
        seen: Mutex::default(),
    });
    bench.chain.register(watcher.clone(), &bench.token).unwrap();
    watcher
}

#[test]
fn test_c1_c5_reclaim_when_accepted_changes_between_start_and_end() {
    let b = set_up(1);
    let watcher = watch(&b, false);
    let Reclaimed::Discarded {
        va,
        len,
        refilled_bytes,
    } = b.reclaimer.reclaim_one(&b.token).unwrap()
    else {
        panic!("not discarded")
    };
    assert!(va >= BASE && va + len <= BASE + LEN && len.is_multiple_of(PAGE));
    assert_eq!(refilled_bytes, 0);
    assert_eq!(*watcher.seen.lock().unwrap(), [("start", 0xa5), ("end", 0)]);
    assert_eq!(byte_at(&b.memfd, va), 0);
    assert_eq!(b.reclaimer.stats().discarded_bytes, len);
    let words = &b.table.in_progress;
    assert!(words.iter().all(|w| w.load(Ordering::Relaxed) == 0));
    assert_eq!(b.table.header.generation.load(Ordering::Relaxed), 1);
}

#[test]
fn test_c3_c5_reclaim_when_refused_changes_nothing_and_ends_only_the_others() {
    let b = set_up(2);
    let willing = watch(&b, false);
    let refusing = watch(&b, true);
    let answer = b.reclaimer.reclaim_one(&b.token).unwrap();
    let Reclaimed::Refused { va, subscriber } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(subscriber, "watcher");
    assert_eq!(byte_at(&b.memfd, va), 0xa5, "the page is not freed");
    assert_eq!(*willing.seen.lock().unwrap(), [("start", 0xa5), ("end", 0xa5)]);
    assert_eq!(*refusing.seen.lock().unwrap(), [("start", 0xa5)]);
    let stats = b.reclaimer.stats();
    assert_eq!(
        (stats.tried, stats.skipped_again, stats.discarded_bytes),
        (1, 1, 0)
    );
    assert_eq!(
        b.table.in_progress[0].load(Ordering::Relaxed),
        0,
        "fills may go on"
    );
}

#[test]
fn test_s9_reclaim_when_a_peer_has_attached_is_refused_and_sends_nothing() {
    let b = set_up(3);
    let xpmem = Xpmem::new(Arc::new(Fence::new(None)));
    b.chain.register(xpmem.clone(), &b.token).unwrap();
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let peer = Peer::open(std::process::id(), "itself").unwrap();
    let link = PeerLink::new(peer, ours, BASE, BASE + LEN);
    xpmem.attach(link.clone(), &b.token);
    for _ in 0..5 {
        let answer = b.reclaimer.reclaim_one(&b.token).unwrap();
        assert!(
            matches!(
                answer,
                Reclaimed::Refused {
                    subscriber: "xpmem",
                    ..
                }
            ),
            "{answer:?}"
        );
    }
    let mut byte = [0];
    let got = rustix::net::recv(&theirs, &mut byte[..], rustix::net::RecvFlags::DONTWAIT);
    assert_eq!(got.unwrap_err(), rustix::io::Errno::AGAIN, "no message");
    // It has nothing, and says so by hanging up.
    drop(theirs);
    assert!(xpmem.detach(&link, &b.token));
    assert!(matches!(
        b.reclaimer.reclaim_one(&b.token).unwrap(),
        Reclaimed::Discarded { .. }
    ));
}

#[test]
fn test_reclaim_when_a_device_has_used_the_piece_waits_for_it_to_cool() {
    let b = set_up(4);
    let shadow = ShadowMmu::new(64);
    b.chain.register(shadow.clone(), &b.token).unwrap();
    for page in 0..LEN / PAGE {
        let _ = shadow.fault(BASE + page * PAGE, &b.token, || Some(page));
    }
    let first = b.reclaimer.reclaim_one(&b.token).unwrap();
    assert!(matches!(first, Reclaimed::Young { .. }), "{first:?}");
    // Each attempt clears the marks of its piece: at some point a piece is cold, and its pages are zapped.
    let discarded = (0..1000)
        .find_map(|_| match b.reclaimer.reclaim_one(&b.token).unwrap() {
            Reclaimed::Discarded { va, .. } => Some(va),
            _ => None,
        })
        .expect("something cools down");
    assert_eq!(shadow.translate(discarded), None);
    assert!(b.reclaimer.stats().skipped_young >= 1);
}

#[test]
fn test_reclaim_when_seed_is_the_same_picks_the_same() {
    let picks = |seed| {
        let b = set_up(seed);
        let attempts = (0..8).map(|_| b.reclaimer.reclaim_one(&b.token).unwrap());
        attempts.collect::<Vec<_>>()
    };
    assert_eq!(picks(5), picks(5));
    assert_ne!(picks(5), picks(6));
}

#[test]
fn test_forget_when_part_is_taken_back_never_discards_it() {
    let b = set_up(7);
    let (keep_from, keep_to) = (BASE + 3 * PAGE, BASE + 9 * PAGE);
    b.reclaimer.forget(keep_from, keep_to, &b.token);
    assert_eq!(b.reclaimer.purgeable_bytes(), LEN - 6 * PAGE);
    for _ in 0..200 {
        let _ = b.reclaimer.reclaim_one(&b.token).unwrap();
    }
    for page in 0..LEN / PAGE {
        let va = BASE + page * PAGE;
        let want = if (keep_from..keep_to).contains(&va) {
            0xa5
        } else {
            0
        };
        assert_eq!(byte_at(&b.memfd, va), want, "page {page}");
    }
    b.reclaimer.forget(0, u64::MAX, &b.token);
    assert_eq!(b.reclaimer.reclaim_one(&b.token).unwrap(), Reclaimed::Nothing);
}

#[test]
fn test_add_when_range_is_wrong_is_refused() {
    let b = set_up(8);
    for (va, len, offset) in [
        (BASE, 0, 0),
        (BASE + 1, PAGE, 0),
        (BASE, 5, 0),
        (BASE, PAGE, 7),
        (u64::MAX - 4095, 8192, 0),
    ] {
        let range = PurgeableRange {
            va,
            len,
            memfd: b.memfd.clone(),
            offset,
        };
        assert!(b.reclaimer.add(range).is_err(), "{va:#x} {len:#x} {offset:#x}");
    }
    assert_eq!(b.reclaimer.purgeable_bytes(), LEN);
}

#[test]
fn test_c2_reclaim_when_discard_fails_ends_all_the_same() {
    let b = set_up(9);
    let watcher = watch(&b, false);
    // A pipe cannot be punched.
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    b.reclaimer.forget(0, u64::MAX, &b.token);
    b.reclaimer
        .add(PurgeableRange {
            va: BASE,
            len: PAGE,
            memfd: Arc::new(reader),
            offset: 0,
        })
        .unwrap();
    assert!(b.reclaimer.reclaim_one(&b.token).is_err());
    assert_eq!(watcher.seen.lock().unwrap().len(), 2);
    assert_eq!((b.chain.stats().active, b.reclaimer.stats().failed), (0, 1));
}

#[test]
fn test_c1_pause_when_a_range_is_taken_back_under_it_discards_nothing_meanwhile() {
    let b = set_up(3);
    let mut paused = b.reclaimer.pause(&b.token);
    std::thread::scope(|s| {
        let attempt = s.spawn(|| b.reclaimer.reclaim_one(&MaySleep::claim("reclaimer")).unwrap());
        paused.forget(0, u64::MAX);
        drop(paused);
        assert_eq!(attempt.join().unwrap(), Reclaimed::Nothing);
    });
    assert!((0..LEN / PAGE).all(|page| byte_at(&b.memfd, BASE + page * PAGE) == 0xa5));
}
