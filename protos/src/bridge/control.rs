//! Control messages between an agent (or a tool) and the host daemon.
//!
//! Transport: `AF_UNIX`, `SOCK_SEQPACKET`; one [`Request`] or [`Reply`] as JSON in each packet of at
//! most [`MAX_PACKET`] bytes. File descriptors travel with the packet, in the order each variant names.
//! Every request has exactly one reply. After `Attach` or `AttachPeer` the daemon may also send [`Notice`]s on the
//! *notice* socket that it handed over with the reply.

use serde::{Deserialize, Serialize};

/// Protocol version of the control channel.
pub const VERSION: u32 = 1;
/// Largest packet, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;
/// Most file descriptors with one packet.
pub const MAX_FDS: usize = 8;

/// What an agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Request {
    /// First message of an application. Fds: [userfaultfd, /proc/self/maps]. Reply `Attached`.
    Attach {
        /// [`VERSION`].
        version: u32,
        /// The application's pid as it sees itself (checked against the socket's credentials).
        pid: u32,
        /// Name for messages and statistics.
        name: String,
    },
    /// A memfd whose pages the device may reach. Fds: [memfd]. Reply `Memory`. Naming the same file
    /// (device, inode) again is answered with the first id.
    AddMemory {
        /// Bytes of the file that may be used, from offset 0. A multiple of 4096.
        len: u64,
    },
    /// A GRU context on the caller's address space (or, for a tool of the same user, on that of `pid`).
    /// Reply `Context`, with fds [BAR2, BAR0, doorbell eventfd] where the device lets its memory be mapped.
    CreateContext {
        /// Whose address space; `None` = the caller's own.
        pid: Option<u32>,
        /// Control blocks wanted (rounded up to 2).
        cbs: u32,
        /// Data segment bytes wanted (rounded up to 1024).
        ds_bytes: u32,
        /// How misses are served.
        fault_mode: FaultMode,
    },
    /// Give a context back. Reply `Done`.
    DestroyContext {
        /// From `Reply::Context`.
        context: u32,
    },
    /// The control block's istatus is CALL_OS: serve its miss (user polling mode). Reply `Done` when the
    /// miss has been answered.
    CallOs {
        /// From `Reply::Context`.
        context: u32,
        /// Logical control block number.
        cb: u32,
    },
    /// Exception detail of a control block: Reply `Exception`.
    ExceptionDetail {
        /// From `Reply::Context`.
        context: u32,
        /// Logical control block number.
        cb: u32,
    },
    /// Read GSEG memory of a context by message (device memory that cannot be mapped). Reply `Data`.
    GsegRead {
        /// From `Reply::Context`.
        context: u32,
        /// Byte offset inside the GSEG.
        offset: u32,
        /// Bytes, at most 16 KiB.
        len: u32,
    },
    /// Write GSEG memory of a context by message. 8-byte aligned pieces are stored as 8-byte stores, in
    /// order. Reply `Done`.
    GsegWrite {
        /// From `Reply::Context`.
        context: u32,
        /// Byte offset inside the GSEG.
        offset: u32,
        /// The bytes, as lower-case hexadecimal.
        hex: String,
    },
    /// The range may be discarded by the reclaimer at any time (its content is then zero). Reply `Done`.
    SetPurgeable {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// First message of a sleeping subscriber in another process (XPMEM's part). It asks for the memory
    /// behind `[start, end)` of application `pid`. Reply `PeerAttached` with fds [notice socket].
    AttachPeer {
        /// [`VERSION`].
        version: u32,
        /// Whose memory.
        pid: u32,
        /// First byte of the range it wants to map (page aligned).
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// A peer asks where one page of its range is now. Reply `PeerPage` with fds [memfd], or `Error`
    /// EFAULT when nothing is there, EAGAIN while it is being changed.
    PeerResolve {
        /// Address in the application, page aligned.
        va: u64,
    },
    /// Statistics of the daemon. Reply `Stats`.
    Stats,
}

/// How the misses of a context are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultMode {
    /// Fault map and interrupt: the driver serves them by itself.
    Interrupt,
    /// The control block goes to CALL_OS and its user asks (`CallOs`).
    UserPolling,
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reply {
    /// Fds: [shared table memfd, notice socket, daemon's pidfd, device's pidfd (may be missing)].
    Attached {
        /// [`VERSION`].
        version: u32,
        /// The daemon's pid.
        daemon_pid: u32,
        /// The device process' pid; 0 = unknown.
        device_pid: u32,
        /// Session number, for messages.
        session: u32,
        /// How memory has to be registered with userfaultfd.
        uffd_mode: UffdMode,
        /// Milliseconds after which a peer that does not answer is fenced (killed); 0 = never.
        fence_timeout_ms: u64,
    },
    /// The memory is known under this id.
    Memory {
        /// Number of the file in this session.
        memory: u32,
        /// Its address in the device's IOVA space.
        iova: u64,
    },
    /// A context.
    Context {
        /// Number for later requests.
        context: u32,
        /// Chiplet it lives on.
        chiplet: u32,
        /// Context number on the chiplet.
        ctxnum: u32,
        /// Offset of its GSEG inside BAR2.
        gseg_offset: u64,
        /// Control blocks granted.
        cbs: u32,
        /// Data segment bytes granted.
        ds_bytes: u32,
        /// Whether fds for mapping came with this reply; else use GsegRead and GsegWrite.
        mappable: bool,
        /// Offset inside BAR0 of the page with the device's awake and reset words (mappable).
        status_offset: u64,
    },
    /// Exception detail (the driver's 48-byte structure, by name).
    Exception {
        /// Operation code of the failed instruction.
        opc: u32,
        /// Extended operation code.
        exopc: u32,
        /// Cause bits.
        ecause: u32,
        /// idef1upd: address the instruction had reached.
        exceptdet0: u64,
        /// Low half of idef3upd.
        exceptdet1: u32,
        /// CBE state.
        cbrstate: u32,
        /// CBE execution status bits.
        cbrexecstatus: u32,
    },
    /// Bytes, as lower-case hexadecimal.
    Data {
        /// The bytes.
        hex: String,
    },
    /// A peer is attached.
    PeerAttached {
        /// Session it looks into.
        session: u32,
    },
    /// Where the page is.
    PeerPage {
        /// Offset in the memfd.
        offset: u64,
        /// Bytes from there that are contiguous, a multiple of 4096.
        len: u64,
        /// Whether it may be mapped for writing.
        writable: bool,
        /// Generation of the address space at the look-up.
        generation: u64,
    },
    /// Statistics, as a JSON object (keys: snake_case with units).
    Stats {
        /// The object.
        stats: String,
    },
    /// Done, nothing to say.
    Done,
    /// Refused.
    Error {
        /// errno.
        errno: i32,
        /// What, why and the way out.
        message: String,
    },
}

/// Registration mode of userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UffdMode {
    /// Write-protect mode that never protects: events only.
    Wp,
    /// Missing mode: punched pages fault to the daemon.
    Missing,
}

/// What the daemon says without being asked, on the notice socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Notice {
    /// To a peer: unmap `[start, end)` really, then send `NoticeReply::Zapped` with the same number.
    Zap {
        /// Number of the request.
        seq: u64,
        /// First byte, in the application's address space.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// To a peer: the change is over; pages may be asked for again.
    ZapEnd {
        /// Number of the request.
        seq: u64,
    },
    /// The device process is gone.
    DeviceLost {
        /// What was seen.
        reason: String,
    },
    /// The session ends (daemon shuts down, or the session broke a rule).
    Closing {
        /// Why.
        reason: String,
    },
}

/// A peer's answer on the notice socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice_reply", rename_all = "snake_case")]
#[non_exhaustive]
pub enum NoticeReply {
    /// Nothing of the range is mapped here any more.
    Zapped {
        /// The `Zap`'s number.
        seq: u64,
        /// Bytes that were really unmapped.
        unmapped_bytes: u64,
    },
}
