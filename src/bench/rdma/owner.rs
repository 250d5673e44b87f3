//! Queues and memory of the benchmark: a posted counter for each queue pair, and one flat piece of memory.

use anyhow::Result;
use device::transport::{
    Action, Answer, Asked, Atomic, Event, Fence, Lent, Loan, Owner, Pulled, QpId, Receive, Received, Remote,
    Request, Right, Status, Target,
};

use super::memory::Memory;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// RDMA WRITE.
    Write,
    /// RDMA READ.
    Read,
    /// SEND.
    Send,
    /// Fetch and add.
    Atomic,
}

/// Memory is two halves: where messages come from, and where they go.
#[derive(Debug)]
pub struct Flat {
    memory: Memory,
    half: usize,
    /// Requests posted, by the queue pair's key.
    posted: Vec<u32>,
    /// Keys of queue pairs whose requests have completed.
    pub completed: Vec<u32>,
    /// Requests that did not end well, and events.
    pub failed: Vec<String>,
    kind: Kind,
    len: u32,
    /// Where the next message comes from and goes to, in its half.
    next: u64,
    next_receive: u64,
}

impl Flat {
    /// Two halves of `half` bytes each.
    ///
    /// # Errors
    /// The system has no such memory.
    pub fn new(half: usize, queue_pairs: usize) -> Result<Self> {
        Ok(Self {
            memory: Memory::new(2 * half)?,
            half,
            posted: vec![0; queue_pairs],
            completed: Vec::with_capacity(4096),
            failed: Vec::new(),
            kind: Kind::Write,
            len: 0,
            next: 0,
            next_receive: 0,
        })
    }

    /// What is posted from now on.
    pub fn measure(&mut self, kind: Kind, len: u32) {
        self.kind = kind;
        self.len = len;
    }

    /// Posts a request.
    pub fn post(&mut self, key: u32) {
        let posted = &mut self.posted[key as usize];
        *posted = posted.wrapping_add(1);
    }

    /// Copies a message of `len` bytes from one half to the other: the floor.
    pub fn copy(&mut self, len: usize) {
        let at = advance(&mut self.next, len, self.half);
        assert!(
            self.memory.copy(at, self.half() + at, len),
            "{len} bytes at {at:#x} are not there"
        );
    }

    fn half(&self) -> u64 {
        self.half as u64
    }

    fn load(&mut self, at: u64, into: &mut [u8]) -> Answer {
        answer(self.memory.load(at, into))
    }

    fn store(&mut self, at: u64, data: &[u8]) -> Answer {
        answer(self.memory.store(at, data))
    }
}

fn answer(done: bool) -> Answer {
    if done {
        Answer::Done(())
    } else {
        Answer::Failed(Status::LocalProtection)
    }
}

/// The place of a message, and on to the next one: around the half, so that nothing is found in a cache.
fn advance(next: &mut u64, len: usize, half: usize) -> u64 {
    let step = (len as u64).next_multiple_of(64);
    if *next + step > half as u64 {
        *next = 0;
    }
    let at = *next;
    *next += step;
    at
}

impl Owner for Flat {
    fn fetch(&mut self, qp: QpId, index: u32) -> Answer<Option<Request>> {
        if self.posted[qp.key as usize] == index {
            return Answer::Done(None);
        }
        let half = self.half();
        let at = advance(&mut self.next, self.len as usize, half as usize);
        let remote = Remote {
            rkey: 1,
            va: half + at,
        };
        let (action, cookie) = match self.kind {
            Kind::Write => (Action::Write(remote), at),
            // Data goes from the first half to the second here, too.
            Kind::Read => (Action::Read(Remote { va: at, ..remote }), half + at),
            Kind::Send => (Action::Send, at),
            Kind::Atomic => (Action::FetchAdd { at: remote, add: 1 }, at),
        };
        Answer::Done(Some(Request {
            index,
            next: index.wrapping_add(1),
            action,
            len: self.len,
            fence: Fence::None,
            solicited: false,
            cookie: cookie as u32,
            datagram: None,
            xrc_srqn: 0,
        }))
    }
    fn gather(&mut self, _: QpId, request: &Request, offset: u32, into: &mut [u8]) -> Answer {
        self.load(u64::from(request.cookie) + u64::from(offset), into)
    }
    fn lend(&mut self, _: QpId, request: &Request, offset: u32, len: u32) -> Option<Lent> {
        let at = u64::from(request.cookie) + u64::from(offset);
        self.memory.has(at, u64::from(len)).then(|| self.memory.lend(at))
    }
    fn pull(&mut self, _: QpId, to: Target<'_>, loan: &Loan, from: u32) -> Pulled {
        let at = match to {
            Target::Write(Asked { at, .. }) => at.va,
            Target::Receive(receive, offset) => receive.token + u64::from(offset),
        };
        match self.memory.pull(at, loan, from as usize) {
            Ok(done) => Pulled::Answer(answer(done)),
            Err(_) => Pulled::Gone,
        }
    }
    fn scatter_response(&mut self, _: QpId, request: &Request, offset: u32, data: &[u8]) -> Answer {
        self.store(u64::from(request.cookie) + u64::from(offset), data)
    }
    fn execute(&mut self, _: QpId, _: &Request) -> Answer {
        Answer::Done(())
    }
    fn complete_send(&mut self, qp: QpId, request: &Request, status: Status) {
        if status != Status::Success {
            self.failed
                .push(format!("{:?} request {}: {status:?}", qp.qpn, request.index));
        }
        self.completed.push(qp.key);
    }
    fn take_receive(&mut self, _: QpId, _: Option<u32>) -> Answer<Option<Receive>> {
        let half = self.half();
        let at = advance(&mut self.next_receive, self.len as usize, half as usize);
        Answer::Done(Some(Receive { token: half + at }))
    }
    fn scatter_receive(&mut self, _: QpId, receive: &Receive, offset: u32, data: &[u8]) -> Answer {
        self.store(receive.token + u64::from(offset), data)
    }
    fn complete_receive(&mut self, _: QpId, _: &Receive, _: &Received) {}
    fn remote_check(&mut self, _: QpId, _: Right, Asked { at, .. }: Asked, len: u32) -> Answer {
        if self.memory.has(at.va, u64::from(len)) {
            Answer::Done(())
        } else {
            Answer::Failed(Status::RemoteAccess)
        }
    }
    fn remote_write(&mut self, _: QpId, Asked { at, .. }: Asked, data: &[u8]) -> Answer {
        self.store(at.va, data)
    }
    fn remote_read(&mut self, _: QpId, Asked { at, .. }: Asked, into: &mut [u8]) -> Answer {
        self.load(at.va, into)
    }
    fn remote_atomic(&mut self, _: QpId, Asked { at, .. }: Asked, atomic: Atomic) -> Answer<u64> {
        let Atomic::FetchAdd { add } = atomic else {
            return Answer::Failed(Status::RemoteInvalidRequest);
        };
        match self.memory.add(at.va, add) {
            Some(old) => Answer::Done(old),
            None => Answer::Failed(Status::RemoteAccess),
        }
    }
    fn invalidate(&mut self, _: QpId, _: u32, _: Option<u32>) -> Answer {
        Answer::Done(())
    }
    fn event(&mut self, qp: QpId, event: Event) {
        // (The first packet of a connection is one.)
        if event != Event::CommunicationEstablished {
            self.failed.push(format!("{:?}: {event:?}", qp.qpn));
        }
    }
}
