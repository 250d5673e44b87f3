//! Our own driver on the HCA in one process: commands, queues, keys, and data through all services.

use std::sync::Arc;
use std::time::{Duration, Instant};

use device::fabric::Fabric;
use device::mlx5::{Mlx5, Mlx5Config};
use device::model::Model;
use device::pci::Function;
use driver::backing::Backing;
use driver::mlx5::{
    CompletionQueue, Connection, EventQueue, Hca, MemoryKey, Mlx5Error, QueuePair, Region, SendRequest,
    Service,
};
use protos::mlx5::Layout;
use protos::mlx5::caps::{HcaCap, Kind};
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::commands::{CONTEXT, ModifyQp, Output, PAGES, QP_CONTEXT, RMP_CONTEXT};
use protos::mlx5::cq::{CqeOpcode, Syndrome};
use protos::mlx5::eq::{DATA_NUMBER, Event};
use protos::mlx5::mkey::{ANY_QP, AccessMode, MTT_READ, MTT_WRITE, Mkc, mask};
use protos::mlx5::qp::{Ads, PRIMARY_PATH, Qpc, ReceiveQueue, ServiceType, State};
use protos::mlx5::srq::Rmpc;
use protos::mlx5::uar;
use protos::mlx5::wqe::Data;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tests::in_process::InProcess;
use zerocopy::IntoBytes;

const MEMORY: u64 = 64 << 20;
/// Virtual address of the test's regions: not their IOVA.
const VA: u64 = 0x7f00_0000_0000;
const RIGHTS: [protos::mlx5::Field<Mkc>; 5] = [
    Mkc::LOCAL_READ,
    Mkc::LOCAL_WRITE,
    Mkc::REMOTE_READ,
    Mkc::REMOTE_WRITE,
    Mkc::ATOMIC,
];

/// An HCA with two connected queue pairs and two regions.
struct Rig {
    hca: Hca,
    pd: u32,
    eq: EventQueue,
    cqs: [CompletionQueue; 2],
    qps: [QueuePair; 2],
    regions: [Region; 2],
    keys: [MemoryKey; 2],
}

fn bring_up() -> Hca {
    let (backing, _model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    Hca::new(Arc::new(backing), MEMORY).expect("bring-up")
}

fn rig(service: Service) -> Rig {
    let hca = bring_up();
    let pd = hca.protection_domain().unwrap();
    let eq = hca.event_queue(6, 0, 1).unwrap();
    let cqs = [0, 1].map(|_| hca.completion_queue(6, &eq).unwrap());
    let mut qps = [0, 1].map(|side: usize| hca.queue_pair(service, pd, 5, &cqs[side], &cqs[side]).unwrap());
    let numbers = [qps[0].number(), qps[1].number()];
    let lid = hca.lid().unwrap();
    for (side, qp) in qps.iter_mut().enumerate() {
        let to = Connection {
            qpn: numbers[1 - side],
            lid,
            retries: 7,
            timeout: 14,
        };
        hca.connect(qp, to).unwrap();
    }
    let regions = [0, 1].map(|_| hca.memory().take(1 << 20).unwrap());
    let keys = [0, 1].map(|side: usize| hca.memory_key(pd, regions[side], VA, &RIGHTS).unwrap());
    Rig {
        hca,
        pd,
        eq,
        cqs,
        qps,
        regions,
        keys,
    }
}

impl Rig {
    /// Bytes that tell where they came from.
    fn fill(&self, side: usize, seed: u8, len: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
        self.hca.memory().write(self.regions[side].iova, &bytes);
        bytes
    }

    fn contents(&self, side: usize, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.hca
            .memory()
            .read(self.regions[side].iova + offset, &mut bytes);
        bytes
    }

    fn send(&mut self, request: SendRequest, va: u64, len: u32) -> u16 {
        let key = self.keys[0];
        self.hca
            .post_send(&mut self.qps[0], request, key, va, len)
            .unwrap()
    }

    /// The next completion of that side's queue.
    fn completion(&mut self, side: usize) -> protos::mlx5::cq::Cqe {
        self.hca.wait_completion(&mut self.cqs[side]).unwrap()
    }
}

/// The number of what a command with a context at `at` makes.
fn make(hca: &Hca, opcode: Opcode, at: usize, context: &[u8], pages: &[u64]) -> u32 {
    let mut input = vec![0; PAGES];
    input[at..at + context.len()].copy_from_slice(context);
    input.extend(pages.iter().flat_map(|page| page.to_be_bytes()));
    let output = hca.command(opcode, 0, &input[8..], 16).unwrap();
    Output::from_prefix(&output).get(Output::NUMBER)
}

/// A command about the object of that number.
fn about(hca: &Hca, opcode: Opcode, number: u32, room: usize) -> Result<Vec<u8>, Mlx5Error> {
    let mut input = number.to_be_bytes().to_vec();
    input.extend([0; 4]);
    hca.command(opcode, 0, &input, room)
}

/// Asks until the answer is yes.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(120), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn test_hca_when_brought_up_answers_commands_and_refuses_nonsense() {
    let hca = bring_up();
    let caps = HcaCap::from_prefix(&hca.capabilities(Kind::GENERAL).unwrap());
    assert_eq!(
        (
            caps.get(HcaCap::NUM_PORTS),
            caps.get(HcaCap::PORT_TYPE),
            caps.get(HcaCap::RC)
        ),
        (1, 0, 1)
    );
    let refused = |opcode, input: &[u8]| match hca.command(opcode, 0, input, 16) {
        Err(Mlx5Error::Refused { status, .. }) => status,
        other => panic!("{opcode:?}: {other:?}"),
    };
    assert_eq!(refused(Opcode(0x7777), &[0; 8]), Status::BAD_OP);
    assert_eq!(
        refused(Opcode::DESTROY_QP, &[0, 0, 0x12, 0x34, 0, 0, 0, 0]),
        Status::BAD_RESOURCE
    );
    assert_eq!(refused(Opcode::CREATE_QP, &[0; 8]), Status::BAD_INPUT_LENGTH);
    assert_eq!(refused(Opcode::CREATE_CQ, &[0; 0x108]), Status::BAD_PARAM);
    let before = hca.timer().unwrap();
    assert!(hca.timer().unwrap() > before);
}

#[test]
fn test_send_when_received_carries_bytes_and_immediate() {
    for service in [Service::Rc, Service::Uc] {
        let mut rig = rig(service);
        for (round, len) in [1usize, 64, 4096, 5000, 100_000].into_iter().enumerate() {
            let sent = rig.fill(0, round as u8, len);
            let key = rig.keys[1];
            rig.hca.post_receive(&mut rig.qps[1], key, VA + 16, 1 << 19);
            let index = rig.send(
                SendRequest::Send(Some(0xfeed_0000 + round as u32)),
                VA,
                len as u32,
            );
            let cqe = rig.completion(0);
            assert_eq!(
                (cqe.opcode(), cqe.wqe_counter.get()),
                (CqeOpcode::REQUESTER, index)
            );
            let cqe = rig.completion(1);
            assert_eq!(cqe.opcode(), CqeOpcode::RESPONDER_SEND_IMM, "{service:?} {len}");
            assert_eq!(cqe.byte_cnt.get(), len as u32);
            assert_eq!(cqe.imm_inval_pkey.get(), 0xfeed_0000 + round as u32);
            assert_eq!(rig.contents(1, 16, len), sent, "{service:?} {len}");
        }
    }
}

#[test]
fn test_write_and_read_when_done_move_bytes_between_keys() {
    let mut rig = rig(Service::Rc);
    for len in [8usize, 4095, 65_536, 300_000] {
        let sent = rig.fill(0, len as u8, len);
        let rkey = rig.keys[1].key;
        rig.send(SendRequest::Write(VA + 0x800, rkey), VA, len as u32);
        assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
        assert_eq!(rig.contents(1, 0x800, len), sent);
        // Back to another place.
        rig.send(SendRequest::Read(VA + 0x800, rkey), VA + 0x8_0000, len as u32);
        let cqe = rig.completion(0);
        assert_eq!(
            (cqe.opcode(), cqe.byte_cnt.get()),
            (CqeOpcode::REQUESTER, len as u32)
        );
        assert_eq!(rig.contents(0, 0x8_0000, len), sent);
    }
}

#[test]
fn test_atomics_when_done_change_the_word_and_return_the_old_one() {
    let mut rig = rig(Service::Rc);
    let rkey = rig.keys[1].key;
    rig.hca
        .memory()
        .write(rig.regions[1].iova + 64, &40u64.to_le_bytes());
    for (request, before, after) in [
        (SendRequest::FetchAdd(VA + 64, rkey, 2), 40u64, 42u64),
        (SendRequest::CompareSwap(VA + 64, rkey, 42, 7), 42, 7),
        (SendRequest::CompareSwap(VA + 64, rkey, 42, 9), 7, 7),
    ] {
        rig.send(request, VA + 128, 8);
        assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER, "{request:?}");
        assert_eq!(rig.contents(0, 128, 8), before.to_le_bytes(), "{request:?}");
        assert_eq!(rig.contents(1, 64, 8), after.to_le_bytes(), "{request:?}");
    }
}

#[test]
fn test_datagram_when_received_has_its_source() {
    let mut rig = rig(Service::Ud);
    let sent = rig.fill(0, 9, 1000);
    let key = rig.keys[1];
    rig.hca.post_receive(&mut rig.qps[1], key, VA, 4096);
    let lid = rig.hca.lid().unwrap();
    let (to, qkey) = (rig.qps[1].number(), rig.hca.q_key(&rig.qps[1]).unwrap());
    rig.send(SendRequest::Datagram(to, lid, qkey), VA, 1000);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    let cqe = rig.completion(1);
    assert_eq!(
        (cqe.opcode(), cqe.byte_cnt.get()),
        (CqeOpcode::RESPONDER_SEND, 1040)
    );
    assert_eq!(cqe.flags_rqpn.get() & 0xff_ffff, rig.qps[0].number());
    assert_eq!((cqe.slid.get(), rig.contents(1, 40, 1000)), (lid, sent));
}

#[test]
fn test_access_when_the_key_does_not_allow_it_fails_and_flushes() {
    // What is asked, and what both sides hear.
    let read_only = |rig: &Rig| {
        rig.hca
            .memory_key(rig.pd, rig.regions[1], VA, &RIGHTS[..3])
            .unwrap()
            .key
    };
    type Case = (&'static str, fn(&Rig, u32) -> SendRequest, u64, Syndrome);
    let cases: [Case; 5] = [
        (
            "no such key",
            |_, _| SendRequest::Write(VA, 0x1234_5600),
            VA,
            Syndrome::REMOTE_ACCESS,
        ),
        (
            "no right",
            |_, key| SendRequest::Write(VA, key),
            VA,
            Syndrome::REMOTE_ACCESS,
        ),
        (
            "beyond the end",
            |rig, _| SendRequest::Write(VA + (1 << 20) - 4, rig.keys[1].key),
            VA,
            Syndrome::REMOTE_ACCESS,
        ),
        (
            "local beyond the end",
            |rig, _| SendRequest::Write(VA, rig.keys[1].key),
            VA + (1 << 20) - 4,
            Syndrome::LOCAL_PROTECTION,
        ),
        (
            "unaligned atomic",
            |rig, _| SendRequest::FetchAdd(VA + 4, rig.keys[1].key, 1),
            VA,
            Syndrome::REMOTE_INVALID_REQUEST,
        ),
    ];
    for (name, request, va, expected) in cases {
        let mut rig = rig(Service::Rc);
        let weak = read_only(&rig);
        let before = rig.fill(1, 77, 64);
        let request = request(&rig, weak);
        rig.send(request, va, 8);
        assert_eq!(rig.completion(0).syndrome(), Some(expected), "{name}");
        let state = State(rig.hca.query(&rig.qps[0]).unwrap().get(Qpc::STATE) as u8);
        assert_eq!(state, State::ERR, "{name}");
        // What is posted from now on is flushed.
        let rkey = rig.keys[1].key;
        rig.send(SendRequest::Write(VA, rkey), VA, 8);
        assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::FLUSHED), "{name}");
        assert_eq!(rig.contents(1, 0, 64), before, "{name}");
        // And received, of which no doorbell tells.
        let key = rig.keys[0];
        rig.hca.post_receive(&mut rig.qps[0], key, VA, 64);
        let cqe = rig.completion(0);
        assert_eq!(
            (cqe.opcode(), cqe.syndrome()),
            (CqeOpcode::RESPONDER_ERROR, Some(Syndrome::FLUSHED)),
            "{name}"
        );
    }
}

#[test]
fn test_key_when_destroyed_is_used_no_more() {
    let mut rig = rig(Service::Rc);
    let key = rig.keys[1];
    rig.send(SendRequest::Write(VA, key.key), VA, 4096);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    rig.hca.destroy_key(key).unwrap();
    let before = rig.fill(1, 3, 4096);
    rig.send(SendRequest::Write(VA, key.key), VA, 4096);
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::REMOTE_ACCESS));
    assert_eq!(rig.contents(1, 0, 4096), before);
}

#[test]
fn test_key_when_registered_by_work_request_works_until_it_is_invalidated() {
    let mut rig = rig(Service::Rc);
    let key = rig.hca.free_key(rig.pd, 16).unwrap();
    let values = Mkc::zeroed()
        .with(Mkc::KEY, 0x77)
        .with(Mkc::REMOTE_WRITE, 1)
        .with(Mkc::LOG_PAGE_SIZE, 12)
        .with_wide(Mkc::START, VA)
        .with_wide(Mkc::LENGTH, 16 * 4096);
    // Backwards, so that nothing but the table leads there.
    let pages: Vec<u64> = (0..16u64)
        .rev()
        .map(|page| (rig.regions[1].iova + page * 4096) | MTT_READ | MTT_WRITE)
        .collect();
    let all = mask::FREE | mask::KEY | mask::RW | mask::PAGE_SIZE | mask::START | mask::LENGTH;
    rig.hca
        .post_registration(&mut rig.qps[0], key, all, &values, &pages)
        .unwrap();
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    let sent = rig.fill(0, 5, 8192);
    let rkey = key.key | 0x77;
    rig.send(SendRequest::Write(VA, rkey), VA, 8192);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.contents(1, 15 * 4096, 4096), sent[..4096]);
    assert_eq!(rig.contents(1, 14 * 4096, 4096), sent[4096..]);
    // Free again: the completion says that nobody uses it any more.
    rig.hca
        .post_registration(
            &mut rig.qps[0],
            key,
            mask::FREE,
            &Mkc::zeroed().with(Mkc::FREE, 1),
            &[],
        )
        .unwrap();
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    rig.hca.memory().write(rig.regions[0].iova, &[0xee; 4096]);
    rig.send(SendRequest::Write(VA, rkey), VA, 4096);
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::REMOTE_ACCESS));
    assert_eq!(rig.contents(1, 15 * 4096, 4096), sent[..4096]);
}

#[test]
fn test_registration_when_the_key_is_of_another_domain_is_refused() {
    let mut rig = rig(Service::Rc);
    let other = rig.hca.protection_domain().unwrap();
    let key = rig.hca.free_key(other, 16).unwrap();
    let own = Mkc::zeroed().with(Mkc::PD, rig.pd);
    rig.hca
        .post_registration(&mut rig.qps[0], key, mask::FREE | mask::PD, &own, &[])
        .unwrap();
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::MW_BIND));
}

#[test]
fn test_memory_when_unmapped_ends_in_an_error_and_not_in_a_write() {
    let mut rig = rig(Service::Rc);
    // A second mapping that can go away while the queues stay.
    let file = rustix::fs::memfd_create("gone", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 16).unwrap();
    let backing = Arc::clone(rig.hca.backing());
    let region = Region {
        iova: 0x9_0000_0000,
        len: 1 << 16,
    };
    backing
        .dma_map(
            region.iova,
            region.len,
            std::os::fd::AsFd::as_fd(&file),
            0,
            driver::backing::DmaProt::READ_WRITE,
        )
        .unwrap();
    let key = rig.hca.memory_key(rig.pd, region, VA, &RIGHTS).unwrap();
    rig.send(SendRequest::Write(VA, key.key), VA, 1 << 16);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    backing.dma_unmap(region.iova, region.len).unwrap();
    rig.send(SendRequest::Write(VA, key.key), VA, 1 << 16);
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::REMOTE_ACCESS));
}

#[test]
fn test_completion_queue_when_armed_raises_an_event_and_an_interrupt_once() {
    let mut rig = rig(Service::Rc);
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    rig.hca
        .backing()
        .set_msix(1, Some(std::os::fd::AsFd::as_fd(&fd)))
        .unwrap();
    rig.hca.arm_events(&rig.eq).unwrap();
    rig.hca.arm_completions(&mut rig.cqs[0], false).unwrap();
    let rkey = rig.keys[1].key;
    rig.send(SendRequest::Write(VA, rkey), VA, 8);
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no interrupt");
    let event = rig.hca.poll_event(&mut rig.eq).expect("an event");
    assert_eq!(Event(event.kind), Event::COMPLETION);
    assert_eq!(event.data[DATA_NUMBER].get(), rig.cqs[0].number());
    rig.completion(0);
    // Not armed again: a completion alone says nothing.
    rig.send(SendRequest::Write(VA, rkey), VA, 8);
    rig.completion(0);
    assert!(rig.hca.poll_event(&mut rig.eq).is_none());
}

#[test]
fn test_send_when_nobody_receives_ends_after_its_retries() {
    let mut rig = rig(Service::Rc);
    let to = rig.qps[1].number();
    let mut lonely = rig
        .hca
        .queue_pair(Service::Rc, rig.pd, 5, &rig.cqs[0], &rig.cqs[0])
        .unwrap();
    let connection = Connection {
        qpn: to ^ 0x4000,
        lid: rig.hca.lid().unwrap(),
        retries: 1,
        timeout: 8,
    };
    rig.hca.connect(&mut lonely, connection).unwrap();
    let begin = Instant::now();
    let key = rig.keys[0];
    rig.hca
        .post_send(&mut lonely, SendRequest::Send(None), key, VA, 8)
        .unwrap();
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::TRANSPORT_RETRY));
    assert!(begin.elapsed() < Duration::from_secs(15));
    rig.hca.destroy_queue_pair(lonely).unwrap();
}

#[test]
fn test_reset_when_queues_are_busy_leaves_nothing_and_a_driver_that_comes_up_again() {
    let (backing, model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    let backing = Arc::new(backing);
    for _ in 0..3 {
        let hca = Hca::new(Arc::clone(&backing) as Arc<dyn Backing>, MEMORY).expect("bring-up");
        let pd = hca.protection_domain().unwrap();
        let eq = hca.event_queue(6, 0, 1).unwrap();
        let mut cq = hca.completion_queue(6, &eq).unwrap();
        let mut qp = hca.queue_pair(Service::Rc, pd, 5, &cq, &cq).unwrap();
        let to = Connection {
            qpn: qp.number(),
            lid: hca.lid().unwrap(),
            retries: 7,
            timeout: 14,
        };
        hca.connect(&mut qp, to).unwrap();
        let region = hca.memory().take(1 << 20).unwrap();
        let key = hca.memory_key(pd, region, VA, &RIGHTS).unwrap();
        for _ in 0..8 {
            hca.post_send(
                &mut qp,
                SendRequest::Write(VA, key.key),
                key,
                VA + (1 << 19),
                1 << 19,
            )
            .unwrap();
        }
        hca.wait_completion(&mut cq).unwrap();
        backing.reset().unwrap();
        assert_eq!(model.atc().stats().live_entries, 0);
        backing.dma_unmap(driver::mlx5::IOVA_BASE, MEMORY).unwrap();
    }
}

#[test]
fn test_dump_when_queues_have_worked_shows_registers_objects_and_counters() {
    let (backing, model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    let before = model.dump();
    assert_eq!(before["stats"]["registers"]["command_queue"], "0x0");
    assert_eq!(
        (&before["stats"]["commands"], &before["stats"]["objects"]["qps"]),
        (&0.into(), &0.into())
    );
    let hca = Hca::new(Arc::new(backing), MEMORY).expect("bring-up");
    let pd = hca.protection_domain().unwrap();
    let eq = hca.event_queue(6, 0, 1).unwrap();
    let mut cq = hca.completion_queue(6, &eq).unwrap();
    let mut qp = hca.queue_pair(Service::Rc, pd, 5, &cq, &cq).unwrap();
    let to = Connection {
        qpn: qp.number(),
        lid: hca.lid().unwrap(),
        retries: 7,
        timeout: 14,
    };
    hca.connect(&mut qp, to).unwrap();
    let region = hca.memory().take(8192).unwrap();
    let key = hca.memory_key(pd, region, VA, &RIGHTS).unwrap();
    hca.post_send(&mut qp, SendRequest::Write(VA, key.key), key, VA + 4096, 4096)
        .unwrap();
    hca.wait_completion(&mut cq).unwrap();
    let dump = model.dump();
    let stats = &dump["stats"];
    assert_ne!(stats["registers"]["command_queue"], "0x0");
    assert_eq!(stats["port"]["lid"], hca.lid().unwrap());
    assert!(stats["commands"].as_u64() > Some(10), "{stats}");
    assert_eq!(
        (&stats["completions"], &stats["commands_failed"]),
        (&1.into(), &0.into())
    );
    for (objects, count) in [
        ("pds", 1),
        ("uars", 1),
        ("eqs", 1),
        ("cqs", 1),
        ("qps", 1),
        ("mkeys", 1),
    ] {
        assert_eq!(stats["objects"][objects], count, "{objects} in {stats}");
    }
    assert_eq!(dump["qps"][0]["qpn"], qp.number());
    assert_eq!(
        (&dump["cqs"][0]["cqn"], &dump["cqs"][0]["produced"]),
        (&cq.number().into(), &1.into())
    );
    let sent: u64 = stats["transport"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| worker["packets_sent"].as_u64().unwrap())
        .sum();
    // The data and its acknowledgement, at least.
    assert!(sent >= 2, "{stats}");
}

/// One of two HCAs on a fabric, with a queue pair that is connected to the other one's.
struct End {
    hca: Hca,
    function: Arc<Function>,
    model: Arc<Mlx5>,
    _eq: EventQueue,
    cq: CompletionQueue,
    qp: QueuePair,
    region: Region,
    key: MemoryKey,
}

/// Two of them, which give up after so many retries.
fn two_ends(retries: u8, timeout: u8) -> [End; 2] {
    let fabric = Fabric::new();
    let make = |node_guid| {
        let config = Mlx5Config {
            node_guid,
            fabric: fabric.clone(),
            ..Mlx5Config::default()
        };
        let (backing, model) = InProcess::build(|context| Mlx5::new(context, config)).expect("an HCA");
        let function = Arc::clone(backing.function());
        let hca = Hca::new(Arc::new(backing), MEMORY).expect("bring-up");
        let pd = hca.protection_domain().unwrap();
        let eq = hca.event_queue(6, 0, 1).unwrap();
        let cq = hca.completion_queue(6, &eq).unwrap();
        let qp = hca.queue_pair(Service::Rc, pd, 5, &cq, &cq).unwrap();
        let region = hca.memory().take(1 << 20).unwrap();
        let key = hca.memory_key(pd, region, VA, &RIGHTS).unwrap();
        End {
            hca,
            function,
            model,
            _eq: eq,
            cq,
            qp,
            region,
            key,
        }
    };
    let mut ends = [make(0x10_0000), make(0x20_0000)];
    for side in [0, 1] {
        let other = &ends[1 - side];
        let to = Connection {
            qpn: other.qp.number(),
            lid: other.hca.lid().unwrap(),
            retries,
            timeout,
        };
        let end = &mut ends[side];
        end.hca.connect(&mut end.qp, to).unwrap();
    }
    ends
}

/// As with a cable that is pulled: nobody is told that its memory may not be written.
#[test]
fn test_writes_when_the_other_hcas_client_is_killed_end_after_their_retries() {
    let mut cut = 0;
    for _ in 0..10 {
        let [mut near, far] = two_ends(2, 10);
        let mut open = 0;
        for _ in 0..30 {
            let request = SendRequest::Write(VA, far.key.key);
            near.hca
                .post_send(&mut near.qp, request, near.key, VA, 1 << 20)
                .unwrap();
            open += 1;
        }
        // Some have been done, others are on their way.
        near.hca.wait_completion(&mut near.cq).unwrap();
        far.function.disconnect();
        let mut ends = Vec::new();
        for _ in 1..open {
            let cqe = near.hca.wait_completion(&mut near.cq).unwrap();
            ends.extend(cqe.syndrome());
        }
        // (None, if it had done all of them first.)
        if let Some((first, rest)) = ends.split_first() {
            cut += 1;
            assert_eq!(*first, Syndrome::TRANSPORT_RETRY);
            assert!(rest.iter().all(|end| *end == Syndrome::FLUSHED), "{ends:?}");
        }
    }
    assert!(cut > 0, "all writes had ended, ten times");
}

#[test]
fn test_write_and_send_when_between_two_hcas_of_a_process_are_copied_once() {
    let [mut near, mut far] = two_ends(7, 14);
    const LEN: usize = 300_000;
    let bytes: Vec<u8> = (0..LEN).map(|at| (at / 7) as u8).collect();
    near.hca.memory().write(near.region.iova, &bytes);
    for (request, offset) in [
        (SendRequest::Write(VA + 0x700, far.key.key), 0x700),
        (SendRequest::Send(None), 0x6_0000),
    ] {
        far.hca
            .post_receive(&mut far.qp, far.key, VA + 0x6_0000, LEN as u32);
        near.hca
            .post_send(&mut near.qp, request, near.key, VA, LEN as u32)
            .unwrap();
        let cqe = near.hca.wait_completion(&mut near.cq).unwrap();
        assert_eq!(cqe.opcode(), CqeOpcode::REQUESTER, "{cqe:?}");
        let mut got = vec![0; LEN];
        far.hca.memory().read(far.region.iova + offset, &mut got);
        assert_eq!(got, bytes, "{request:?}");
    }
    let dump = near.model.dump();
    let count = |name: &str| -> u64 {
        let shards = dump["stats"]["transport"].as_array().unwrap();
        shards.iter().map(|shard| shard[name].as_u64().unwrap()).sum()
    };
    // Five segments each.
    assert_eq!((count("lent"), count("recalls_received")), (10, 0));
}

#[test]
fn test_physical_key_when_changed_by_work_request_reaches_what_it_reached() {
    let mut rig = rig(Service::Rc);
    let context = Mkc::zeroed()
        .with(Mkc::MODE_LOW, u32::from(AccessMode::PA.0))
        .with(Mkc::UMR_ENABLE, 1)
        .with(Mkc::LENGTH64, 1)
        .with(Mkc::QPN, ANY_QP)
        .with(Mkc::PD, rig.pd)
        .with(Mkc::LOCAL_WRITE, 1);
    let index = make(&rig.hca, Opcode::CREATE_MKEY, CONTEXT, &context.0, &[]);
    let key = MemoryKey { key: index << 8 };
    let values = Mkc::zeroed().with(Mkc::REMOTE_WRITE, 1);
    rig.hca
        .post_registration(&mut rig.qps[0], key, mask::RW, &values, &[])
        .unwrap();
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    let sent = rig.fill(0, 21, 5000);
    let iova = rig.regions[1].iova;
    rig.send(SendRequest::Write(iova, key.key), VA, 5000);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    assert_eq!(rig.contents(1, 0, 5000), sent);
}

#[test]
fn test_event_queue_when_destroyed_by_a_number_that_is_too_large_stays() {
    let rig = rig(Service::Rc);
    for number in [0x100, 0x80_0000] {
        let number = number | rig.eq.number();
        assert!(
            about(&rig.hca, Opcode::QUERY_EQ, number, 0x200).is_err(),
            "{number:#x}"
        );
        assert!(
            about(&rig.hca, Opcode::DESTROY_EQ, number, 16).is_err(),
            "{number:#x}"
        );
    }
    about(&rig.hca, Opcode::QUERY_EQ, rig.eq.number(), 0x200).unwrap();
}

/// A list of receive requests of 32 bytes, `1 << log_size` of them.
fn receive_pool(rig: &Rig, log_size: u32, list: Region, record: Region) -> u32 {
    let context = Rmpc::zeroed()
        .with(Rmpc::LOG_STRIDE, 5)
        .with(Rmpc::LOG_SIZE, log_size)
        .with(Rmpc::PD, rig.pd)
        .with_wide(Rmpc::DBR_ADDR, record.iova);
    make(
        &rig.hca,
        Opcode::CREATE_RMP,
        RMP_CONTEXT,
        &context.0,
        &[list.iova],
    )
}

#[test]
fn test_shared_queue_when_destroyed_in_the_middle_of_a_message_ends_it_whoever_has_its_number() {
    let mut rig = rig(Service::Rc);
    let (list, record) = (
        rig.hca.memory().take(4096).unwrap(),
        rig.hca.memory().take(64).unwrap(),
    );
    let pool = receive_pool(&rig, 4, list, record);
    for index in 0..4u16 {
        let data = Data {
            byte_count: (1 << 19).into(),
            lkey: rig.keys[1].key.into(),
            address: VA.into(),
        };
        let mut wqe = [0; 32];
        wqe[2..4].copy_from_slice(&(index + 1).to_be_bytes());
        wqe[16..].copy_from_slice(data.as_bytes());
        rig.hca.memory().write(list.iova + u64::from(index) * 32, &wqe);
    }
    rig.hca
        .memory()
        .write(record.iova + uar::DBR_RECEIVE, &4u32.to_be_bytes());
    // Whoever sends to the queue pair that receives from it. Both begin with the same sequence number.
    let mut senders = [0, 1].map(|_| {
        rig.hca
            .queue_pair(Service::Rc, rig.pd, 5, &rig.cqs[0], &rig.cqs[0])
            .unwrap()
    });
    let context = Qpc::zeroed()
        .with(Qpc::SERVICE, u32::from(ServiceType::RC.0))
        .with(Qpc::PD, rig.pd)
        .with(Qpc::RQ_TYPE, u32::from(ReceiveQueue::SHARED.0))
        .with(Qpc::SRQN, pool)
        .with(Qpc::NO_SQ, 1)
        .with(Qpc::CQN_SEND, rig.cqs[1].number())
        .with(Qpc::CQN_RECEIVE, rig.cqs[1].number());
    let receiver = make(&rig.hca, Opcode::CREATE_QP, QP_CONTEXT, &context.0, &[]);
    let lid = rig.hca.lid().unwrap();
    let mut context = context
        .with(Qpc::MTU, 5)
        .with(Qpc::LOG_MSG_MAX, 30)
        .with(Qpc::REMOTE_QPN, senders[0].number());
    let path = Ads::zeroed().with(Ads::PORT, 1).with(Ads::RLID, u32::from(lid));
    context.0[PRIMARY_PATH..PRIMARY_PATH + size_of::<Ads>()].copy_from_slice(&path.0);
    for opcode in [Opcode::RST2INIT_QP, Opcode::INIT2RTR_QP] {
        let mut input = ModifyQp::zeroed().0.to_vec();
        input[8..12].copy_from_slice(&receiver.to_be_bytes());
        input.resize(PAGES, 0);
        input[QP_CONTEXT..QP_CONTEXT + context.0.len()].copy_from_slice(&context.0);
        rig.hca.command(opcode, 0, &input[8..], 16).unwrap();
    }
    for sender in &mut senders {
        let to = Connection {
            qpn: receiver,
            lid,
            retries: 7,
            timeout: 14,
        };
        rig.hca.connect(sender, to).unwrap();
    }
    let key = rig.keys[0];
    let mut send = |rig: &Rig, side: usize, va: u64, len: u32| {
        rig.hca
            .post_send(&mut senders[side], SendRequest::Send(None), key, va, len)
            .unwrap();
    };
    // A whole message, and the first 64 KiB of one whose rest cannot be read.
    send(&rig, 0, VA, 8);
    assert_eq!(rig.completion(0).opcode(), CqeOpcode::REQUESTER);
    send(&rig, 0, VA + (1 << 20) - (64 << 10), 100_000);
    assert_eq!(rig.completion(0).syndrome(), Some(Syndrome::LOCAL_PROTECTION));
    wait_until("the second receive request is taken", || {
        let output = about(&rig.hca, Opcode::QUERY_RMP, pool, 0x110).unwrap();
        Rmpc::from_prefix(&output[RMP_CONTEXT..]).get(Rmpc::SW_COUNTER) == 2
    });
    let state = |rig: &Rig| {
        let output = about(&rig.hca, Opcode::QUERY_QP, receiver, 0x110).unwrap();
        State(Qpc::from_prefix(&output[QP_CONTEXT..]).get(Qpc::STATE) as u8)
    };
    assert_eq!(state(&rig), State::RTR);
    about(&rig.hca, Opcode::DESTROY_RMP, pool, 16).unwrap();
    // Its number again, for a list of one: what was taken before is beyond its end.
    loop {
        let other = receive_pool(&rig, 0, list, record);
        if other == pool {
            break;
        }
        about(&rig.hca, Opcode::DESTROY_RMP, other, 16).unwrap();
    }
    // The rest comes, after what the receiver has had already.
    send(&rig, 1, VA, 8);
    send(&rig, 1, VA, 100_000);
    wait_until("the message ends", || state(&rig) == State::ERR);
    // Both workers live.
    let sent = rig.fill(0, 33, 64);
    let rkey = rig.keys[1].key;
    rig.send(SendRequest::Write(VA, rkey), VA, 64);
    wait_until("a write between the others", || rig.contents(1, 0, 64) == sent);
}
