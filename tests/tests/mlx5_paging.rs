//! On-demand paging of the HCA in one process: pages that come late, never, or go away under traffic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device::mlx5::{Mlx5, Mlx5Config};
use driver::mlx5::{
    CompletionQueue, Connection, EventQueue, Hca, MemoryKey, PageFault, QueuePair, Region, SendRequest,
    Service,
};
use protos::mlx5::Layout;
use protos::mlx5::cq::{Cqe, CqeOpcode, Syndrome};
use protos::mlx5::eq::Event;
use protos::mlx5::mkey::{MTT_READ, MTT_WRITE, Mkc, mask};
use protos::mlx5::qp::{Qpc, State};
use tests::in_process::InProcess;

const MEMORY: u64 = 64 << 20;
const PAGE: u64 = 4096;
/// Pages of a key.
const PAGES: usize = 16;
const VA: u64 = 0x7f00_0000_0000;
const LIMIT: Duration = Duration::from_secs(20);
const RIGHTS: [protos::mlx5::Field<Mkc>; 5] = [
    Mkc::LOCAL_READ,
    Mkc::LOCAL_WRITE,
    Mkc::REMOTE_READ,
    Mkc::REMOTE_WRITE,
    Mkc::ATOMIC,
];

/// A key whose pages come and go by work requests of a queue pair of its own.
struct Paged {
    key: MemoryKey,
    region: Region,
    present: [bool; PAGES],
    /// Has been present before.
    taken: bool,
}

struct Rig {
    hca: Hca,
    faults: EventQueue,
    cqs: [CompletionQueue; 2],
    qps: [QueuePair; 2],
    /// Present from the beginning, for the side without a fault.
    region: Region,
    key: MemoryKey,
    pager: Pager,
}

/// The queue pair that changes keys.
struct Pager {
    cq: CompletionQueue,
    qp: QueuePair,
}

impl Pager {
    /// What is marked present in the key's table, and nothing else: done when this returns.
    fn load(&mut self, hca: &Hca, paged: &Paged) {
        let entry = |page: usize| (paged.region.iova + page as u64 * PAGE) | MTT_READ | MTT_WRITE;
        let table: Vec<u64> = (0..PAGES)
            .map(|page| if paged.present[page] { entry(page) } else { 0 })
            .collect();
        self.post(hca, paged.key, 0, &Mkc::zeroed(), &table);
    }

    fn post(&mut self, hca: &Hca, key: MemoryKey, mask: u64, values: &Mkc, table: &[u64]) {
        hca.post_registration(&mut self.qp, key, mask, values, table)
            .unwrap();
        let cqe = hca.wait_completion(&mut self.cq).unwrap();
        assert_eq!(cqe.opcode(), CqeOpcode::REQUESTER, "{cqe:?}");
    }
}

fn connect(hca: &Hca, qp: &mut QueuePair, qpn: u32) {
    let to = Connection {
        qpn,
        lid: hca.lid().unwrap(),
        retries: 7,
        timeout: 14,
    };
    hca.connect(qp, to).unwrap();
}

fn rig() -> Rig {
    let (backing, _model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    let hca = Hca::new(Arc::new(backing), MEMORY).expect("bring-up");
    let pd = hca.protection_domain().unwrap();
    let faults = hca.event_queue(6, 1 << Event::PAGE_FAULT.0, 0).unwrap();
    let cqs = [0, 1].map(|_| hca.completion_queue(6, &faults).unwrap());
    let make = |cq: &CompletionQueue| hca.queue_pair(Service::Rc, pd, 5, cq, cq).unwrap();
    let mut qps = [make(&cqs[0]), make(&cqs[1])];
    let numbers = [qps[0].number(), qps[1].number()];
    connect(&hca, &mut qps[0], numbers[1]);
    connect(&hca, &mut qps[1], numbers[0]);
    let cq = hca.completion_queue(6, &faults).unwrap();
    let mut qp = make(&cq);
    let own = qp.number();
    connect(&hca, &mut qp, own);
    let region = hca.memory().take(PAGES as u64 * PAGE).unwrap();
    let key = hca.memory_key(pd, region, VA, &RIGHTS).unwrap();
    Rig {
        hca,
        faults,
        cqs,
        qps,
        region,
        key,
        pager: Pager { cq, qp },
    }
}

/// A key with nothing present.
fn paged(hca: &Hca, pager: &mut Pager) -> Paged {
    // The domain of the queue pair that registers.
    let pd = hca.query(&pager.qp).unwrap().get(Qpc::PD);
    let key = hca.free_key(pd, PAGES as u32).unwrap();
    let mut values = Mkc::zeroed()
        .with(Mkc::LOG_PAGE_SIZE, 12)
        .with_wide(Mkc::START, VA)
        .with_wide(Mkc::LENGTH, PAGES as u64 * PAGE);
    for right in RIGHTS {
        values.set(right, 1);
    }
    let all = mask::FREE
        | mask::PAGE_SIZE
        | mask::START
        | mask::LENGTH
        | mask::LR
        | mask::LW
        | mask::RR
        | mask::RW
        | mask::A;
    pager.post(hca, key, all, &values, &[0; PAGES]);
    Paged {
        key,
        region: hca.memory().take(PAGES as u64 * PAGE).unwrap(),
        present: [false; PAGES],
        taken: false,
    }
}

fn next_fault(hca: &Hca, faults: &mut EventQueue) -> PageFault {
    let begin = Instant::now();
    loop {
        if let Some(eqe) = hca.poll_event(faults) {
            return PageFault::of(&eqe).unwrap_or_else(|| panic!("another event: {eqe:?}"));
        }
        assert!(begin.elapsed() < LIMIT, "no page fault");
        std::thread::yield_now();
    }
}

impl Rig {
    fn fault(&mut self) -> PageFault {
        next_fault(&self.hca, &mut self.faults)
    }

    fn completion(&mut self, side: usize) -> Cqe {
        self.hca.wait_completion(&mut self.cqs[side]).unwrap()
    }

    /// What was asked for, of that key, one page after the other. How many faults that took.
    fn serve(&mut self, paged: &mut Paged, side: usize) -> (Cqe, usize) {
        let begin = Instant::now();
        let mut faults = 0;
        loop {
            if let Some(cqe) = self.hca.poll_completion(&mut self.cqs[side]) {
                return (cqe, faults);
            }
            if let Some(eqe) = self.hca.poll_event(&mut self.faults) {
                let fault = PageFault::of(&eqe).unwrap();
                assert_eq!(fault.key, paged.key.key);
                faults += 1;
                // Less than was asked for: the rest must be asked for again.
                let page = ((fault.va - VA) / PAGE) as usize;
                assert!(!paged.present[page], "page {page} is there");
                paged.present[page] = true;
                self.pager.load(&self.hca, paged);
                self.hca.resume_fault(&fault, false).unwrap();
            }
            assert!(begin.elapsed() < LIMIT, "neither a fault nor a completion");
            std::thread::yield_now();
        }
    }

    fn bytes(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.hca.memory().read(iova, &mut bytes);
        bytes
    }

    fn pattern(&self, iova: u64, seed: u8, len: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
        self.hca.memory().write(iova, &bytes);
        bytes
    }
}

/// In the middle of a page, over four of them.
const OFFSET: u64 = 0x800;
const LEN: usize = 3 * 4096;

#[test]
fn test_requests_when_pages_are_absent_end_well_after_each_has_come() {
    type Case = (&'static str, bool, fn(u64, u32) -> SendRequest);
    // Whether the local side faults, and what is asked.
    let cases: [Case; 6] = [
        ("write to", false, SendRequest::Write),
        ("write from", true, SendRequest::Write),
        ("read of", false, SendRequest::Read),
        ("read into", true, SendRequest::Read),
        ("send to", false, |_, _| SendRequest::Send(None)),
        ("send from", true, |_, _| SendRequest::Send(None)),
    ];
    for (name, local, request) in cases {
        let mut rig = rig();
        let mut paged = paged(&rig.hca, &mut rig.pager);
        let (near, far) = if local {
            (paged.key, rig.key)
        } else {
            (rig.key, paged.key)
        };
        let (near_at, far_at) = if local {
            (paged.region.iova, rig.region.iova)
        } else {
            (rig.region.iova, paged.region.iova)
        };
        let request = request(VA + OFFSET, far.key);
        let reads = matches!(request, SendRequest::Read(..));
        let (from, to) = if reads {
            (far_at, near_at)
        } else {
            (near_at, far_at)
        };
        let sent = rig.pattern(from + OFFSET, 7, LEN);
        rig.hca
            .post_receive(&mut rig.qps[1], far, VA + OFFSET, LEN as u32);
        rig.hca
            .post_send(&mut rig.qps[0], request, near, VA + OFFSET, LEN as u32)
            .unwrap();
        let (cqe, faults) = rig.serve(&mut paged, 0);
        assert_eq!((cqe.opcode(), faults), (CqeOpcode::REQUESTER, 4), "{name}");
        assert_eq!(rig.bytes(to + OFFSET, LEN), sent, "{name}");
        if matches!(request, SendRequest::Send(_)) {
            assert_eq!(rig.completion(1).byte_cnt.get(), LEN as u32, "{name}");
        }
        // And with all of them there without one.
        rig.hca
            .post_receive(&mut rig.qps[1], far, VA + OFFSET, LEN as u32);
        rig.hca
            .post_send(&mut rig.qps[0], request, near, VA + OFFSET, LEN as u32)
            .unwrap();
        assert_eq!(rig.serve(&mut paged, 0).1, 0, "{name}");
    }
}

#[test]
fn test_atomic_when_pages_are_absent_on_both_sides_is_done_once() {
    let mut rig = rig();
    let mut far = paged(&rig.hca, &mut rig.pager);
    let mut near = paged(&rig.hca, &mut rig.pager);
    rig.hca.memory().write(far.region.iova, &40u64.to_le_bytes());
    rig.hca
        .post_send(
            &mut rig.qps[0],
            SendRequest::FetchAdd(VA, far.key.key, 2),
            near.key,
            VA,
            8,
        )
        .unwrap();
    // The word first, then the place for what it was.
    for paged in [&mut far, &mut near] {
        let fault = rig.fault();
        assert_eq!((fault.key, fault.va, fault.pages), (paged.key.key, VA, 1));
        paged.present[0] = true;
        rig.pager.load(&rig.hca, paged);
        rig.hca.resume_fault(&fault, false).unwrap();
    }
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.bytes(near.region.iova, 8), 40u64.to_le_bytes());
    assert_eq!(rig.bytes(far.region.iova, 8), 42u64.to_le_bytes());
}

#[test]
fn test_fault_when_it_is_resumed_with_an_error_ends_the_request_on_its_side() {
    type Case = (&'static str, bool, fn(u64, u32) -> SendRequest, Syndrome);
    let cases: [Case; 4] = [
        ("write to", false, SendRequest::Write, Syndrome::REMOTE_ACCESS),
        ("write from", true, SendRequest::Write, Syndrome::LOCAL_PROTECTION),
        ("read of", false, SendRequest::Read, Syndrome::REMOTE_ACCESS),
        ("read into", true, SendRequest::Read, Syndrome::LOCAL_PROTECTION),
    ];
    for (name, local, request, expected) in cases {
        let mut rig = rig();
        let paged = paged(&rig.hca, &mut rig.pager);
        let (near, far) = if local {
            (paged.key, rig.key)
        } else {
            (rig.key, paged.key)
        };
        rig.hca
            .post_send(&mut rig.qps[0], request(VA, far.key), near, VA, LEN as u32)
            .unwrap();
        let fault = rig.fault();
        rig.hca.resume_fault(&fault, true).unwrap();
        assert_eq!(rig.completion(0).syndrome(), Some(expected), "{name}");
        let state = State(rig.hca.query(&rig.qps[0]).unwrap().get(Qpc::STATE) as u8);
        assert_eq!(state, State::ERR, "{name}");
        assert!(
            rig.hca.resume_fault(&fault, false).is_err(),
            "{name}: known twice"
        );
    }
}

/// Where a key of a key is.
const OUTER: u64 = 0x1_0000_0000;

#[test]
fn test_fault_when_a_key_inside_another_is_not_known_is_asked_of_the_other_one() {
    for served in [true, false] {
        let mut rig = rig();
        let mut paged = paged(&rig.hca, &mut rig.pager);
        let pd = rig.hca.query(&rig.pager.qp).unwrap().get(Qpc::PD);
        let outer = rig
            .hca
            .indirect_key(pd, paged.key, VA, OUTER, PAGES as u32 * PAGE as u32, &RIGHTS)
            .unwrap();
        let sent = rig.pattern(rig.region.iova, 9, 64);
        let request = SendRequest::Write(OUTER + PAGE + 8, outer.key);
        rig.hca
            .post_send(&mut rig.qps[0], request, rig.key, VA, 64)
            .unwrap();
        let fault = rig.fault();
        assert_eq!((fault.key, fault.va), (paged.key.key, VA + PAGE));
        rig.hca.resume_fault(&fault, true).unwrap();
        let fault = rig.fault();
        assert_eq!((fault.key, fault.va, fault.pages), (outer.key, OUTER + PAGE, 1));
        paged.present[1] = served;
        rig.pager.load(&rig.hca, &paged);
        rig.hca.resume_fault(&fault, !served).unwrap();
        let cqe = rig.completion(0);
        if served {
            assert_eq!(cqe.opcode(), CqeOpcode::REQUESTER, "{cqe:?}");
            assert_eq!(rig.bytes(paged.region.iova + PAGE + 8, 64), sent);
        } else {
            assert_eq!(cqe.syndrome(), Some(Syndrome::REMOTE_ACCESS));
        }
    }
}

#[test]
fn test_key_when_it_names_a_key_of_another_protection_domain_is_good_for_nothing() {
    let mut rig = rig();
    let pd = rig.hca.query(&rig.pager.qp).unwrap().get(Qpc::PD);
    let other = rig.hca.protection_domain().unwrap();
    let region = rig.hca.memory().take(PAGE).unwrap();
    let theirs = rig.hca.memory_key(other, region, VA, &RIGHTS).unwrap();
    let outer = rig
        .hca
        .indirect_key(pd, theirs, VA, OUTER, PAGE as u32, &RIGHTS)
        .unwrap();
    let request = SendRequest::Write(OUTER, outer.key);
    rig.hca
        .post_send(&mut rig.qps[0], request, rig.key, VA, 64)
        .unwrap();
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::REMOTE_ACCESS));
}

#[test]
fn test_fault_when_two_queue_pairs_meet_the_page_is_told_once_and_resumes_both() {
    let mut rig = rig();
    let mut paged = paged(&rig.hca, &mut rig.pager);
    let sent = rig.pattern(rig.region.iova, 3, 64);
    let key = rig.key;
    // In both directions: each is the other's responder.
    for side in 0..2 {
        let to = VA + 64 * side as u64;
        let request = SendRequest::Write(to, paged.key.key);
        rig.hca
            .post_send(&mut rig.qps[side], request, key, VA, 64)
            .unwrap();
        if side == 0 {
            let fault = rig.fault();
            // The other one joins it; a request of its own that needs no page shows that it has come that far.
            rig.hca
                .post_send(
                    &mut rig.qps[1],
                    SendRequest::Write(VA + 64, paged.key.key),
                    key,
                    VA,
                    64,
                )
                .unwrap();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(200) {
                assert!(rig.hca.poll_event(&mut rig.faults).is_none(), "told twice");
                std::thread::yield_now();
            }
            paged.present[0] = true;
            rig.pager.load(&rig.hca, &paged);
            rig.hca.resume_fault(&fault, false).unwrap();
            assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
        }
        if side == 1 {
            assert_eq!(rig.completion(1).opcode(), CqeOpcode::REQUESTER);
        }
    }
    assert_eq!(rig.completion(1).opcode(), CqeOpcode::REQUESTER);
    for side in 0..2 {
        assert_eq!(rig.bytes(paged.region.iova + 64 * side, 64), sent);
    }
    assert!(rig.hca.poll_event(&mut rig.faults).is_none());
}

/// What nobody sends.
const CANARY: u8 = 0xc5;

#[test]
fn test_pages_when_they_are_taken_away_under_traffic_are_written_no_more_and_show_nothing_later() {
    let rig = rig();
    let Rig {
        hca,
        mut faults,
        cqs: [mut cq, _other],
        qps: [mut qp, _],
        region,
        key,
        mut pager,
    } = rig;
    let mut target = paged(&hca, &mut pager);
    let mut source = paged(&hca, &mut pager);
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let (hca, stop) = (&hca, &stop);
        let (to, from) = (target.key, source.key);
        // Writes into one key and out of the other, as fast as they end.
        let traffic = scope.spawn(move || {
            let mut written = 0u64;
            while !stop.load(Ordering::SeqCst) {
                for (request, local) in [
                    (SendRequest::Write(VA, to.key), key),
                    (SendRequest::Write(VA, key.key), from),
                ] {
                    hca.post_send(&mut qp, request, local, VA, (PAGES as u64 * PAGE) as u32)
                        .unwrap();
                    let cqe = hca.wait_completion(&mut cq).unwrap();
                    assert_eq!(cqe.opcode(), CqeOpcode::REQUESTER, "{cqe:?}");
                    written += 1;
                }
                let mut first = [0];
                for page in 0..PAGES as u64 {
                    hca.memory().read(region.iova + page * PAGE, &mut first);
                    assert_ne!(first[0], CANARY, "page {page} was read after it had gone");
                }
            }
            written
        });
        let blank = vec![CANARY; PAGES * PAGE as usize];
        let clean = vec![0x11; PAGES * PAGE as usize];
        hca.memory().write(region.iova, &clean);
        let begin = Instant::now();
        let mut rounds = 0;
        // At least so many rounds, and to the end of the traffic afterwards.
        while !traffic.is_finished() {
            if rounds == 200 {
                stop.store(true, Ordering::SeqCst);
            }
            assert!(begin.elapsed() < 6 * LIMIT, "stuck after {rounds} rounds");
            if let Some(eqe) = hca.poll_event(&mut faults) {
                // (There are more faults than the queue has entries.)
                hca.arm_events(&faults).unwrap();
                let fault = PageFault::of(&eqe).unwrap();
                let paged = if fault.key == to.key {
                    &mut target
                } else {
                    &mut source
                };
                // A segment's event names all pages of it, so that one brings them all.
                assert!(!paged.present[0], "{fault:?}");
                // Nothing has been written since it went.
                if paged.taken {
                    let mut now = vec![0; blank.len()];
                    hca.memory().read(paged.region.iova, &mut now);
                    assert!(now == blank, "written after it had gone");
                }
                hca.memory().write(paged.region.iova, &clean);
                paged.present = [true; PAGES];
                pager.load(hca, paged);
                hca.resume_fault(&fault, false).unwrap();
            } else if rounds < 200 {
                let paged = if rounds % 2 == 0 { &mut target } else { &mut source };
                if paged.present[0] {
                    paged.present = [false; PAGES];
                    paged.taken = true;
                    pager.load(hca, paged);
                    hca.memory().write(paged.region.iova, &blank);
                    rounds += 1;
                }
            }
            std::thread::yield_now();
        }
        traffic.join().unwrap()
    });
    assert!(written >= 100, "{written}");
}
