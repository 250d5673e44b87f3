//! What a transport asks of whoever owns queues and memory.

use protos::ib::{Gid, Lid, Pkey, Qkey, Qpn};

/// A queue pair, as the owner knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QpId {
    /// Its number.
    pub qpn: Qpn,
    /// What the owner gave to [`super::Transport::create`]: a place in its own tables.
    pub key: u32,
}

/// The answer to a question about memory.
///
/// `Parked`: a page is absent. The owner has told whoever can bring it (a page fault) and calls
/// [`super::Transport::resume`] afterwards, once for each `Parked`, from wherever; nothing else of the queue pair's
/// same [`Side`] is asked until then, but for a flush ([`Owner::fetch`], [`Owner::take_receive`]). The question is then asked again from the byte where it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<T = ()> {
    /// Done.
    Done(T),
    /// Not now. `done` bytes of this call's are copied and need no second time; 0 where nothing is copied.
    Parked {
        /// Bytes from the start of the call's range.
        done: u32,
    },
    /// Not at all; becomes the status of the completion, or the code of a NAK.
    Failed(Status),
}

/// Which half of a queue pair waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// [`Owner::fetch`], [`Owner::gather`], [`Owner::execute`].
    Send,
    /// [`Owner::scatter_response`].
    Response,
    /// [`Owner::take_receive`], [`Owner::scatter_receive`], [`Owner::remote_check`], [`Owner::remote_write`],
    /// [`Owner::remote_atomic`], [`Owner::invalidate`].
    Receive,
    /// [`Owner::remote_read`].
    Read,
}

/// How a request ended (section 11.6.2, "Completion return status").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Well.
    Success,
    /// Longer than the queue, the port or the receive request takes.
    LocalLength,
    /// The queue pair's own fault: a malformed request.
    LocalOperation,
    /// L_Key, bounds, rights of the local side.
    LocalProtection,
    /// The queue pair was or went to the error state.
    Flushed,
    /// A memory window could not be bound.
    WindowBind,
    /// A response that does not fit its request.
    BadResponse,
    /// The responder: invalid request.
    RemoteInvalidRequest,
    /// The responder: R_Key, bounds, rights.
    RemoteAccess,
    /// The responder: could not do it.
    RemoteOperation,
    /// No answer, so many times.
    RetryExceeded,
    /// No receive request there, so many times.
    RnrRetryExceeded,
}

/// How a packet gets to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// Own port, from 1.
    pub port: u8,
    /// Own LID with path bits.
    pub slid: Lid,
    /// Destination.
    pub dlid: Lid,
    /// Service level.
    pub sl: u8,
    /// With a global route header.
    pub global: Option<Global>,
}

/// What goes into a global route header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Global {
    /// Source.
    pub sgid: Gid,
    /// Destination.
    pub dgid: Gid,
    /// Flow label.
    pub flow_label: u32,
    /// Traffic class.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
}

/// Where a datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Datagram {
    /// The way (address handle).
    pub path: Path,
    /// Queue pair there.
    pub dest: Qpn,
    /// Its key. With the privileged bit the queue pair's own is sent instead.
    pub qkey: Qkey,
}

/// Memory of the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Remote {
    /// R_Key.
    pub rkey: u32,
    /// Virtual address.
    pub va: u64,
}

/// Memory that the other side asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Asked {
    /// What the request names.
    pub at: Remote,
    /// XRC: the shared receive queue that the packet names. Its protection domain counts, not the queue pair's, and
    /// its XRC domain must be the queue pair's (annex A14).
    pub xrc_srqn: Option<u32>,
}

impl Asked {
    /// The same, `bytes` further.
    #[must_use]
    pub fn after(self, bytes: u64) -> Self {
        Self {
            at: Remote {
                va: self.at.va.wrapping_add(bytes),
                ..self.at
            },
            ..self
        }
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// SEND.
    Send,
    /// SEND with immediate data (as a number; the bytes on the wire are its big-endian form).
    SendImmediate(u32),
    /// SEND that invalidates an R_Key there.
    SendInvalidate(u32),
    /// RDMA WRITE.
    Write(Remote),
    /// RDMA WRITE with immediate data.
    WriteImmediate(Remote, u32),
    /// RDMA READ.
    Read(Remote),
    /// Compare and swap of 8 bytes.
    CompareSwap {
        /// Where.
        at: Remote,
        /// Expected.
        compare: u64,
        /// New.
        swap: u64,
    },
    /// Fetch and add of 8 bytes.
    FetchAdd {
        /// Where.
        at: Remote,
        /// How much.
        add: u64,
    },
    /// Nothing for the wire: UMR, local invalidate, memory window bind, NOP. Executed in order by
    /// [`Owner::execute`], once.
    Local,
}

/// What must be done before a request starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fence {
    /// Nothing.
    #[default]
    None,
    /// Earlier reads and atomics (section 10.8.3.3, "fence").
    Reads,
    /// Everything earlier.
    All,
}

/// One request of a send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request {
    /// Where it stands. The owner's numbering; the first request of a queue pair that left RESET is at 0.
    pub index: u32,
    /// Where the next one stands.
    pub next: u32,
    /// What it does.
    pub action: Action,
    /// Bytes. Up to 2^31; 8 for atomics.
    pub len: u32,
    /// Before it starts.
    pub fence: Fence,
    /// The receiver's completion raises a solicited event.
    pub solicited: bool,
    /// For the owner (such as: a completion is wanted).
    pub cookie: u32,
    /// Where to: datagram queue pairs only.
    pub datagram: Option<Datagram>,
    /// The shared receive queue there: XRC only.
    pub xrc_srqn: u32,
}

impl Request {
    /// The plainest one that does this; it takes one place.
    #[must_use]
    pub fn new(index: u32, action: Action, len: u32) -> Self {
        Self {
            index,
            next: index.wrapping_add(1),
            action,
            len,
            fence: Fence::None,
            solicited: false,
            cookie: 0,
            datagram: None,
            xrc_srqn: 0,
        }
    }
}

/// A request that was taken from a receive queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Receive {
    /// The owner's word: queue, index.
    pub token: u64,
}

/// Who sent what was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// Queue pair: datagrams only, else the connected one.
    pub qpn: Qpn,
    /// LID.
    pub slid: Lid,
    /// The LID it was sent to (path bits; a multicast LID).
    pub dlid: Lid,
    /// Service level.
    pub sl: u8,
    /// A global route header came with it (datagrams: it is in the first 40 bytes).
    pub global: bool,
    /// Partition key of the packet.
    pub pkey: Pkey,
    /// Port it came through.
    pub port: u8,
}

/// A completion of a receive queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Received {
    /// How it ended.
    pub status: Status,
    /// RDMA WRITE with immediate; else SEND.
    pub write: bool,
    /// Bytes: of the message, with the 40 bytes of the header for datagrams.
    pub len: u32,
    /// Immediate data.
    pub immediate: Option<u32>,
    /// R_Key that was invalidated.
    pub invalidated: Option<u32>,
    /// The sender asked for an event.
    pub solicited: bool,
    /// From where; meaningless after an error.
    pub source: Source,
}

/// What is asked of the other side's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Right {
    /// RDMA READ.
    Read,
    /// RDMA WRITE.
    Write,
    /// ATOMIC.
    Atomic,
}

/// An atomic operation on 8 bytes, as numbers in the byte order of the memory's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Atomic {
    /// Store `swap` if the word is `compare`.
    CompareSwap {
        /// Expected.
        compare: u64,
        /// New.
        swap: u64,
    },
    /// Add.
    FetchAdd {
        /// How much.
        add: u64,
    },
}

/// What happens to a queue pair besides completions (section 11.6.3, "Asynchronous events").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The first packet came while the queue pair was in RTR.
    CommunicationEstablished,
    /// SQD, and everything that was begun has ended.
    SendQueueDrained,
    /// A queue pair with a shared receive queue is in the error state and has given back what it took.
    LastWqeReached,
    /// The responder refused a request and went to the error state.
    InvalidRequest,
    /// The responder refused an access and went to the error state.
    AccessViolation,
    /// A local error of the responder that no receive request could tell; it went to the error state.
    Fatal,
    /// The requester went to the error state (RC, XRC) or to SQE (others). Its completions say why.
    SendError,
}

/// Queues and memory of a set of queue pairs. Called by [`super::Transport`] only, from within `poll`, `modify` and
/// the like. Nothing may be called back from inside.
///
/// Addresses, keys and rights are checked here: of the queue pair's access flags, protection domains and windows the
/// transport knows nothing. Questions may be asked again (a packet sent twice, a fetch after a park): all of them
/// but those marked *once* must bear that.
pub trait Owner {
    // ---- send queue ----

    /// The request at `index`, or `None` when nothing is posted there yet. Then [`super::Transport::ring`] is needed.
    fn fetch(&mut self, qp: QpId, index: u32) -> Answer<Option<Request>>;
    /// Copy out bytes `offset..` of the request's message; all of `into`, which never passes its end.
    fn gather(&mut self, qp: QpId, request: &Request, offset: u32, into: &mut [u8]) -> Answer;
    /// Bytes `offset..` of what a READ brought, or the 8 bytes (little-endian) that an atomic found.
    fn scatter_response(&mut self, qp: QpId, request: &Request, offset: u32, data: &[u8]) -> Answer;
    /// An [`Action::Local`]; *once*, after `Done` or `Failed`.
    fn execute(&mut self, qp: QpId, request: &Request) -> Answer;
    /// Every request, in order, *once*; also those that nobody wants a completion of.
    fn complete_send(&mut self, qp: QpId, request: &Request, status: Status);

    // ---- receive queue ----

    /// Take the next receive request; *once* after `Done(Some)`. `xrc_srqn`: XRC names the queue in the packet.
    /// `None`: nothing posted.
    fn take_receive(&mut self, qp: QpId, xrc_srqn: Option<u32>) -> Answer<Option<Receive>>;
    /// Bytes `offset..` of a message. `Failed(LocalLength)` beyond the request's end.
    fn scatter_receive(&mut self, qp: QpId, receive: &Receive, offset: u32, data: &[u8]) -> Answer;
    /// What became of a request that was taken; *once*.
    fn complete_receive(&mut self, qp: QpId, receive: &Receive, received: &Received);

    // ---- memory that others reach ----

    /// Whether an access of `len` bytes (never 0) that begins now is allowed.
    fn remote_check(&mut self, qp: QpId, right: Right, asked: Asked, len: u32) -> Answer;
    /// Store bytes of an RDMA WRITE.
    fn remote_write(&mut self, qp: QpId, asked: Asked, data: &[u8]) -> Answer;
    /// Load bytes of an RDMA READ.
    fn remote_read(&mut self, qp: QpId, asked: Asked, into: &mut [u8]) -> Answer;
    /// Check, then do it, *once* after `Done`; what was there before. Alignment is the owner's to check, too
    /// (`Failed(RemoteInvalidRequest)`).
    fn remote_atomic(&mut self, qp: QpId, asked: Asked, atomic: Atomic) -> Answer<u64>;
    /// Invalidate an R_Key for a SEND with invalidate. `xrc_srqn` as in [`Asked`].
    fn invalidate(&mut self, qp: QpId, rkey: u32, xrc_srqn: Option<u32>) -> Answer;

    /// An asynchronous event.
    fn event(&mut self, qp: QpId, event: Event);
}
