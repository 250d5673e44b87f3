//! Our own driver on the HCA in one process: completion queues that change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use device::mlx5::{Mlx5, Mlx5Config};
use driver::mlx5::{
    CompletionQueue, Connection, EventQueue, Hca, MemoryKey, Mlx5Error, QueuePair, SendRequest, Service,
};
use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::cq::{Cqc, CqeOpcode};
use protos::mlx5::eq::{DATA_NUMBER, Event};
use protos::mlx5::mkey::Mkc;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tests::in_process::InProcess;

const MEMORY: u64 = 64 << 20;
const VA: u64 = 0x7f00_0000_0000;
const LIMIT: Duration = Duration::from_secs(20);

/// A queue pair that is connected with itself.
struct Rig {
    hca: Hca,
    eq: EventQueue,
    cq: CompletionQueue,
    qp: QueuePair,
    key: MemoryKey,
    posted: Vec<u16>,
}

fn rig(log_size: u32) -> Rig {
    let (backing, _model) =
        InProcess::build(|context| Mlx5::new(context, Mlx5Config::default())).expect("an HCA");
    let hca = Hca::new(Arc::new(backing), MEMORY).expect("bring-up");
    let pd = hca.protection_domain().unwrap();
    let eq = hca.event_queue(6, 0, 1).unwrap();
    let cq = hca.completion_queue(log_size, &eq).unwrap();
    let mut qp = hca.queue_pair(Service::Rc, pd, 7, &cq, &cq).unwrap();
    let to = Connection {
        qpn: qp.number(),
        lid: hca.lid().unwrap(),
        retries: 7,
        timeout: 14,
    };
    hca.connect(&mut qp, to).unwrap();
    let region = hca.memory().take(1 << 16).unwrap();
    let rights = [
        Mkc::LOCAL_READ,
        Mkc::LOCAL_WRITE,
        Mkc::REMOTE_READ,
        Mkc::REMOTE_WRITE,
    ];
    let key = hca.memory_key(pd, region, VA, &rights).unwrap();
    Rig {
        hca,
        eq,
        cq,
        qp,
        key,
        posted: Vec::new(),
    }
}

impl Rig {
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let request = SendRequest::Write(VA, self.key.key);
            let index = self
                .hca
                .post_send(&mut self.qp, request, self.key, VA + 4096, 64)
                .unwrap();
            self.posted.push(index);
        }
    }

    fn produced(&self) -> u32 {
        self.hca.query_completions(&self.cq).unwrap().get(Cqc::PRODUCER)
    }

    /// Until the HCA has written so many completions in all.
    fn until_produced(&self, count: u32) {
        let begin = Instant::now();
        while self.produced() != count {
            assert!(begin.elapsed() < LIMIT, "{} completions", self.produced());
        }
    }

    /// Takes the completions of everything that was posted, in order.
    fn take_all(&mut self) {
        for index in std::mem::take(&mut self.posted) {
            let cqe = self.hca.wait_completion(&mut self.cq).unwrap();
            assert_eq!(
                (cqe.opcode(), cqe.wqe_counter.get()),
                (CqeOpcode::REQUESTER, index)
            );
        }
        assert!(self.hca.poll_completion(&mut self.cq).is_none());
    }
}

#[test]
fn test_completion_queue_when_resized_keeps_what_was_not_polled() {
    let mut rig = rig(4);
    let mut produced = 0;
    for log_size in [6, 4, 3, 7, 4] {
        // Unread, or some of them; then more in the new buffer, which goes round.
        rig.post(5);
        produced += 5;
        rig.until_produced(produced);
        rig.hca.resize_completions(&mut rig.cq, log_size).unwrap();
        // The end of the old buffer is an entry, too.
        produced += 1;
        let context = rig.hca.query_completions(&rig.cq).unwrap();
        assert_eq!(
            (context.get(Cqc::LOG_SIZE), context.get(Cqc::PRODUCER)),
            (log_size, produced)
        );
        rig.take_all();
        for _ in 0..40 {
            rig.post(4);
            produced += 4;
            rig.take_all();
        }
    }
}

#[test]
fn test_completion_queue_when_resized_while_completions_come_loses_none() {
    let mut rig = rig(6);
    for round in 0..40 {
        rig.post(24);
        let log_size = if round % 2 == 0 { 7 } else { 6 };
        rig.hca.resize_completions(&mut rig.cq, log_size).unwrap();
        rig.take_all();
    }
}

#[test]
fn test_resize_when_what_is_outstanding_does_not_fit_is_refused() {
    let refused = |rig: &mut Rig, log_size| match rig.hca.resize_completions(&mut rig.cq, log_size) {
        Err(Mlx5Error::Refused { status, .. }) => status,
        other => panic!("{other:?}"),
    };
    // Too many for the new buffer.
    let mut small = rig(5);
    small.post(10);
    small.until_produced(10);
    assert_eq!(refused(&mut small, 3), Status::BAD_OUTSTANDING_CQES);
    small.take_all();
    // No room for the end of the old one.
    let mut full = rig(2);
    full.post(4);
    full.until_produced(4);
    assert_eq!(refused(&mut full, 5), Status::BAD_OUTSTANDING_CQES);
    full.take_all();
    // Neither has changed anything.
    for rig in [&mut small, &mut full] {
        rig.post(3);
        rig.take_all();
        rig.hca.resize_completions(&mut rig.cq, 5).unwrap();
        rig.post(20);
        rig.take_all();
    }
}

#[test]
fn test_event_when_moderated_comes_after_its_period() {
    let mut rig = rig(6);
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    rig.hca
        .backing()
        .set_msix(1, Some(std::os::fd::AsFd::as_fd(&fd)))
        .unwrap();
    let period = Duration::from_micros(4000);
    rig.hca.moderate_completions(&rig.cq, 4000, 1000).unwrap();
    let context = rig.hca.query_completions(&rig.cq).unwrap();
    assert_eq!(
        (context.get(Cqc::PERIOD), context.get(Cqc::MAX_COUNT)),
        (4000, 1000)
    );
    for _ in 0..5 {
        rig.hca.arm_events(&rig.eq).unwrap();
        rig.hca.arm_completions(&mut rig.cq, false).unwrap();
        let armed = Instant::now();
        while rig.hca.query_completions(&rig.cq).unwrap().get(Cqc::STATE) != protos::mlx5::cq::STATE_ARMED {
            assert!(armed.elapsed() < LIMIT, "never armed");
        }
        let begin = Instant::now();
        rig.post(3);
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no interrupt");
        assert!(begin.elapsed() >= period, "after {:?}", begin.elapsed());
        rustix::io::read(&fd, &mut [0; 8]).unwrap();
        let event = rig.hca.poll_event(&mut rig.eq).expect("an event");
        assert_eq!(Event(event.kind), Event::COMPLETION);
        assert_eq!(event.data[DATA_NUMBER].get(), rig.cq.number());
        assert!(rig.hca.poll_event(&mut rig.eq).is_none(), "a second one");
        rig.take_all();
    }
}
