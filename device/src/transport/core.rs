//! What all queue pairs of a transport share.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use protos::ib::Gid;

use super::pool::{Pool, SEGMENT};
use super::qp::Qp;
use super::timers::Timers;

/// Dimensions of a transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Most payload of one segment; at most [`SEGMENT`].
    pub segment: u32,
    /// Bytes of a queue pair's SENDs and WRITEs that may be without acknowledgement.
    pub window: u32,
    /// Requests of a queue pair that may be begun.
    pub max_outstanding: usize,
    /// Packets that a queue pair keeps while it waits for a page; more are dropped, and come again.
    pub max_held: usize,
    /// Requests that one flush ends: more than a queue holds.
    pub max_flush: usize,
    /// Multicast groups that have members here.
    pub max_groups: usize,
    /// Queue pairs here that one group may have.
    pub max_members: usize,
    /// Shorter ACK timeouts become this: both ends are programs that may not run for a while.
    pub min_ack_timeout: Duration,
    /// Packets that one `poll` takes in.
    pub receive_batch: usize,
    /// Bytes that one `poll` sends: at least one segment, at most 32 small messages. A segment that is received
    /// before the next one is sent is still in the cache.
    pub send_budget: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            segment: SEGMENT as u32,
            window: 1 << 20,
            max_outstanding: 512,
            max_held: 64,
            max_flush: 1 << 17,
            max_groups: 256,
            max_members: 240,
            min_ack_timeout: Duration::from_millis(4),
            receive_batch: 64,
            send_budget: 64 << 10,
        }
    }
}

/// Counters since the transport was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Stats {
    /// Packets sent, acknowledgements and repetitions too.
    pub packets_sent: u64,
    /// Requests' packets executed.
    pub packets_received: u64,
    /// Packets that belonged to nobody, came at the wrong time or found no room.
    pub dropped: u64,
    /// Packets that had been executed already.
    pub duplicates: u64,
    /// Acknowledgements that went with a later one.
    pub acks_coalesced: u64,
    /// Times that a queue pair sent again.
    pub go_backs: u64,
    /// Of these, because nothing was heard.
    pub timeouts: u64,
    /// Sequence errors seen here.
    pub sequence_naks_sent: u64,
    /// Sequence errors seen there.
    pub sequence_naks_received: u64,
    /// Receive requests missing here.
    pub rnr_naks_sent: u64,
    /// Receive requests missing there.
    pub rnr_naks_received: u64,
    /// Requests that were refused here.
    pub refused: u64,
    /// Times that a queue pair waited for a page of a request from the other side.
    pub parks: u64,
}

/// How a turn of a queue pair ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing to do until something happens to it.
    Idle,
    /// Something was done; there may be more.
    More,
    /// The link is full.
    Full,
}

/// Shared by all queue pairs.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: Config,
    pub(super) pool: Pool,
    pub(super) stats: Stats,
    pub(super) timers: Timers,
    /// Places of queue pairs with something to send.
    pub(super) send: VecDeque<u32>,
    /// Places of queue pairs with something to answer.
    pub(super) respond: VecDeque<u32>,
    /// Payload of the last segment that was sent.
    pub(super) last_payload: u32,
    pub(super) groups: HashMap<Gid, Vec<u32>>,
}

impl Core {
    pub(super) fn list_send(&mut self, qp: &mut Qp) {
        if !qp.send_listed {
            qp.send_listed = true;
            self.send.push_back(qp.slot);
        }
    }

    pub(super) fn list_respond(&mut self, qp: &mut Qp) {
        if !qp.respond_listed {
            qp.respond_listed = true;
            self.respond.push_back(qp.slot);
        }
    }

    /// Sees to it that the queue pair's next deadline is noticed.
    pub(super) fn arm(&mut self, qp: &mut Qp) {
        if let Some(deadline) = super::requester::deadline(qp) {
            self.timers.arm(qp.slot, &mut qp.alarm, deadline);
        }
    }
}
