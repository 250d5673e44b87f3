//! Queue pairs: context, work queues in the driver's memory.

use std::sync::Arc;

use protos::ib::{Gid, Lid, Mtu, Psn, Qkey, Qpn};
use protos::mlx5::Layout;
use protos::mlx5::cmd::Opcode;
use protos::mlx5::qp::{Ads, PRIMARY_PATH, Qpc, ReceiveQueue, SECONDARY_PATH, ServiceType, State, opt};
use protos::mlx5::wqe;

use super::buffer::Buffer;
use super::cq::Cq;
use super::port::PortView;
use super::srq::Srq;
use super::wqe::Parsed;
use crate::transport::{Attributes, Global, Path};

/// A queue pair, in its shard.
#[derive(Debug)]
pub(super) struct Qp {
    pub(super) qpn: u32,
    /// Everything that was ever set, for queries.
    pub(super) context: Qpc,
    pub(super) service: ServiceType,
    pub(super) pd: u32,
    pub(super) uar_page: u32,
    pub(super) dbr: u64,
    pub(super) send_cq: Option<Arc<Cq>>,
    pub(super) receive_cq: Option<Arc<Cq>>,
    pub(super) srq: Option<Arc<Srq>>,
    /// The shared queue that the receive WQE at hand came from.
    pub(super) taken_from: Option<Arc<Srq>>,
    pub(super) queues: Option<Queues>,
    /// Receive WQEs taken from the own queue.
    pub(super) received: u16,
    /// Send blocks that have been completed.
    pub(super) sent: u16,
    /// Send blocks posted, when the doorbell record was last read.
    pub(super) posted: u16,
    /// The send WQE that was read last.
    pub(super) wqe: LoadedWqe,
}

/// A send WQE, taken out of its queue.
#[derive(Debug, Default)]
pub(super) struct LoadedWqe {
    /// Which; `None`: none.
    pub(super) index: Option<u32>,
    pub(super) bytes: Vec<u8>,
    pub(super) parsed: Option<Parsed>,
}

/// The work queues' memory.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) buffer: Buffer,
    /// Logarithm of the receive WQEs; `None`: it has no receive queue of its own.
    pub(super) log_receives: Option<u32>,
    /// Logarithm of a receive WQE's bytes.
    pub(super) receive_stride: u32,
    /// Logarithm of the send blocks; `None`: it has no send queue.
    pub(super) log_blocks: Option<u32>,
}

impl Queues {
    /// As the context says; `None` when the pages do not fit.
    pub(super) fn parse(context: &Qpc, pages: &[u8]) -> Option<Option<Self>> {
        let own = ReceiveQueue(context.get(Qpc::RQ_TYPE) as u8) == ReceiveQueue::OWN;
        let log_receives = own.then(|| context.get(Qpc::LOG_RQ_SIZE));
        let receive_stride = context.get(Qpc::LOG_RQ_STRIDE) + 4;
        let log_blocks = (!context.is_set(Qpc::NO_SQ)).then(|| context.get(Qpc::LOG_SQ_SIZE));
        let receives = log_receives.map_or(0, |log| 1u64 << (log + receive_stride));
        let len = receives + log_blocks.map_or(0, |log| (wqe::BLOCK as u64) << log);
        if len == 0 {
            return Some(None);
        }
        let buffer = Buffer::parse(
            pages,
            context.get(Qpc::LOG_PAGE_SIZE),
            context.get(Qpc::PAGE_OFFSET),
            len,
        )?;
        Some(Some(Self {
            buffer,
            log_receives,
            receive_stride,
            log_blocks,
        }))
    }

    /// Where the send queue begins.
    pub(super) fn sends(&self) -> u64 {
        self.log_receives
            .map_or(0, |log| 1u64 << (log + self.receive_stride))
    }
}

impl Qp {
    /// As after RESET: queues begin again.
    pub(super) fn rewind(&mut self) {
        self.received = 0;
        self.sent = 0;
        self.posted = 0;
        self.taken_from = None;
        self.wqe.index = None;
    }

    /// What the transport is told of a transition that has been merged.
    pub(super) fn attributes(&self, changes: Changes, port: &PortView) -> Attributes {
        let (context, path) = (&self.context, self.path());
        let get = |field| context.get(field);
        let has = |bit: u32| changes.mask & bit != 0;
        let code = |field| get(field) as u8;
        let mut attributes = Attributes::default();
        if changes.initial || changes.path || has(opt::PRIMARY_PATH) {
            attributes.path = Some(way(&path, port));
        }
        if changes.initial || has(opt::PKEY_INDEX) {
            attributes.pkey = Some(port.pkey(path.get(Ads::PKEY_INDEX)));
            attributes.block_loopback = Some(context.is_set(Qpc::BLOCK_LB_MC));
        }
        if has(opt::Q_KEY) {
            attributes.qkey = Some(Qkey(get(Qpc::Q_KEY)));
        }
        attributes.deth_source = match get(Qpc::DETH_SQPN) {
            0 => None,
            number => Some(Qpn::new(number)),
        };
        if changes.responder {
            attributes.mtu = Mtu::from_code(code(Qpc::MTU));
            attributes.dest = Some(Qpn::new(get(Qpc::REMOTE_QPN)));
            attributes.receive_psn = Some(Psn::new(get(Qpc::NEXT_RCV_PSN)));
        }
        if has(opt::RNR_TIMEOUT) {
            attributes.min_rnr_timer = Some(code(Qpc::MIN_RNR_NAK));
        }
        if has(opt::RRA_MAX) {
            attributes.max_responded = Some(1 << get(Qpc::LOG_RRA_MAX));
        }
        if changes.requester {
            attributes.send_psn = Some(Psn::new(get(Qpc::NEXT_SEND_PSN)));
        }
        if has(opt::SRA_MAX) {
            attributes.max_initiated = Some(1 << get(Qpc::LOG_SRA_MAX));
        }
        if has(opt::RETRY_COUNT) {
            attributes.retry_count = Some(code(Qpc::RETRY_COUNT));
        }
        if has(opt::RNR_RETRY) {
            attributes.rnr_retry = Some(code(Qpc::RNR_RETRY));
        }
        if has(opt::ACK_TIMEOUT) {
            attributes.timeout = Some(path.get(Ads::ACK_TIMEOUT) as u8);
        }
        attributes
    }

    pub(super) fn state(&self) -> State {
        State(self.context.get(Qpc::STATE) as u8)
    }

    pub(super) fn path(&self) -> Ads {
        Ads::from_prefix(&self.context.0[PRIMARY_PATH..])
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "qpn": self.qpn, "service": format!("{:?}", self.service), "state": format!("{:?}", self.state()),
            "remote_qpn": self.context.get(Qpc::REMOTE_QPN), "send_cq": self.send_cq.as_ref().map(|cq| cq.cqn),
            "receive_cq": self.receive_cq.as_ref().map(|cq| cq.cqn), "srq": self.srq.as_ref().map(|srq| srq.srqn),
            "sent_blocks": self.sent, "received": self.received,
        })
    }
}

/// The way that an address path names.
fn way(path: &Ads, port: &PortView) -> Path {
    let mut dgid = [0; 16];
    dgid[..8].copy_from_slice(&path.wide(Ads::RGID_H).to_be_bytes());
    dgid[8..].copy_from_slice(&path.wide(Ads::RGID_L).to_be_bytes());
    Path {
        port: 1,
        slid: port.lid,
        dlid: Lid(path.get(Ads::RLID) as u16),
        sl: path.get(Ads::SL) as u8,
        global: path.is_set(Ads::GRH).then(|| Global {
            sgid: port.gid(path.get(Ads::SRC_ADDR_INDEX) as u8),
            dgid: Gid(dgid),
            flow_label: path.get(Ads::FLOW_LABEL),
            traffic_class: path.get(Ads::TCLASS) as u8,
            hop_limit: path.get(Ads::HOP_LIMIT) as u8,
        }),
    }
}

/// States that a transition starts from, and where it ends.
pub(super) fn transition(opcode: Opcode) -> Option<(&'static [State], State)> {
    Some(match opcode {
        Opcode::RST2INIT_QP => (&[State::RST], State::INIT),
        Opcode::INIT2INIT_QP => (&[State::INIT], State::INIT),
        Opcode::INIT2RTR_QP => (&[State::INIT], State::RTR),
        Opcode::RTR2RTS_QP => (&[State::RTR], State::RTS),
        Opcode::RTS2RTS_QP => (&[State::RTS], State::RTS),
        Opcode::SQERR2RTS_QP => (&[State::SQER], State::RTS),
        Opcode::TO_ERR_QP => (
            &[
                State::RST,
                State::INIT,
                State::RTR,
                State::RTS,
                State::SQER,
                State::SQD,
                State::ERR,
            ],
            State::ERR,
        ),
        Opcode::TO_RST_QP => (
            &[
                State::RST,
                State::INIT,
                State::RTR,
                State::RTS,
                State::SQER,
                State::SQD,
                State::ERR,
            ],
            State::RST,
        ),
        _ => return None,
    })
}

/// What a transition always sets besides what its mask names, and what the mask of [`opt`] adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Changes {
    /// The parts of the context that the command sets.
    pub(super) mask: u32,
    /// The whole address path, not only what the mask names.
    pub(super) path: bool,
    /// What makes a responder: MTU, PSN, peer.
    pub(super) responder: bool,
    /// What makes a requester: PSN, retries.
    pub(super) requester: bool,
    /// What a queue pair is made with.
    pub(super) initial: bool,
}

/// What `opcode` with that mask sets.
pub(super) fn changes(opcode: Opcode, mask: u32) -> Changes {
    let mut changes = Changes {
        mask,
        path: false,
        responder: false,
        requester: false,
        initial: false,
    };
    match opcode {
        Opcode::RST2INIT_QP => {
            changes.initial = true;
            changes.mask |= opt::PKEY_INDEX
                | opt::PRIMARY_PORT
                | opt::RRE
                | opt::RWE
                | opt::RAE
                | opt::Q_KEY
                | opt::PM_STATE;
        }
        Opcode::INIT2RTR_QP => {
            changes.path = true;
            changes.responder = true;
            changes.mask |= opt::RRA_MAX | opt::RNR_TIMEOUT;
        }
        Opcode::RTR2RTS_QP => {
            changes.requester = true;
            changes.mask |= opt::SRA_MAX | opt::RETRY_COUNT | opt::RNR_RETRY | opt::ACK_TIMEOUT;
        }
        _ => {}
    }
    changes
}

/// Enters what a transition sets into what was set before.
pub(super) fn merge(context: &mut Qpc, given: &Qpc, changes: Changes) {
    let mut take = |wanted: bool, fields: &[protos::mlx5::Field<Qpc>]| {
        if wanted {
            for &field in fields {
                context.set(field, given.get(field));
            }
        }
    };
    let has = |bit: u32| changes.mask & bit != 0;
    take(
        changes.initial,
        &[Qpc::PD, Qpc::CQN_SEND, Qpc::CQN_RECEIVE, Qpc::RLKY],
    );
    take(
        changes.responder,
        &[Qpc::MTU, Qpc::LOG_MSG_MAX, Qpc::REMOTE_QPN, Qpc::NEXT_RCV_PSN],
    );
    take(changes.requester, &[Qpc::NEXT_SEND_PSN, Qpc::LOG_ACK_REQ_FREQ]);
    take(has(opt::RRE), &[Qpc::RRE]);
    take(has(opt::RWE), &[Qpc::RWE]);
    take(has(opt::RAE), &[Qpc::RAE, Qpc::ATOMIC_MODE]);
    take(has(opt::Q_KEY), &[Qpc::Q_KEY]);
    take(has(opt::RNR_TIMEOUT), &[Qpc::MIN_RNR_NAK]);
    take(has(opt::SRA_MAX), &[Qpc::LOG_SRA_MAX]);
    take(has(opt::RRA_MAX), &[Qpc::LOG_RRA_MAX]);
    take(has(opt::PM_STATE), &[Qpc::PM_STATE]);
    take(has(opt::RETRY_COUNT), &[Qpc::RETRY_COUNT]);
    take(has(opt::RNR_RETRY), &[Qpc::RNR_RETRY]);
    // A datagram queue pair's deth_sqpn is given again in each transition of the driver that uses it.
    if given.is_set(Qpc::DETH_SQPN) {
        context.set(Qpc::DETH_SQPN, given.get(Qpc::DETH_SQPN));
    }
    merge_path(context, given, changes, PRIMARY_PATH);
    if has(opt::ALT_PATH) {
        let path = SECONDARY_PATH..SECONDARY_PATH + size_of::<Ads>();
        context.0[path.clone()].copy_from_slice(&given.0[path]);
    }
}

fn merge_path(context: &mut Qpc, given: &Qpc, changes: Changes, at: usize) {
    let range = at..at + size_of::<Ads>();
    let old = Ads::from_prefix(&context.0[range.clone()]);
    let new = Ads::from_prefix(&given.0[range.clone()]);
    let has = |bit: u32| changes.mask & bit != 0;
    let mut path = if changes.path || has(opt::PRIMARY_PATH) {
        let mut path = new.clone();
        for field in [Ads::PKEY_INDEX, Ads::PORT, Ads::ACK_TIMEOUT] {
            path.set(field, old.get(field));
        }
        path
    } else {
        old
    };
    for (wanted, field) in [
        (has(opt::PKEY_INDEX), Ads::PKEY_INDEX),
        (has(opt::PRIMARY_PORT), Ads::PORT),
        (has(opt::ACK_TIMEOUT), Ads::ACK_TIMEOUT),
    ] {
        if wanted {
            path.set(field, new.get(field));
        }
    }
    context.0[range].copy_from_slice(&path.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_path(context: Qpc, path: &Ads) -> Qpc {
        let mut context = context;
        context.0[PRIMARY_PATH..SECONDARY_PATH].copy_from_slice(&path.0);
        context
    }

    fn path(context: &Qpc) -> Ads {
        Ads::from_prefix(&context.0[PRIMARY_PATH..])
    }

    #[test]
    fn test_transitions_when_merged_keep_what_they_do_not_set() {
        let mut context = Qpc::zeroed();
        let init = with_path(
            Qpc::zeroed().with(Qpc::PD, 7).with(Qpc::RRE, 1),
            &Ads::zeroed()
                .with(Ads::PORT, 1)
                .with(Ads::PKEY_INDEX, 3)
                .with(Ads::RLID, 9),
        );
        merge(&mut context, &init, changes(Opcode::RST2INIT_QP, 0));
        assert_eq!((context.get(Qpc::PD), context.get(Qpc::RRE)), (7, 1));
        assert_eq!(
            (path(&context).get(Ads::PORT), path(&context).get(Ads::RLID)),
            (1, 0)
        );
        let rtr = with_path(
            Qpc::zeroed()
                .with(Qpc::REMOTE_QPN, 0x55)
                .with(Qpc::NEXT_RCV_PSN, 4),
            &Ads::zeroed().with(Ads::RLID, 12).with(Ads::PORT, 5),
        );
        merge(&mut context, &rtr, changes(Opcode::INIT2RTR_QP, 0));
        assert_eq!(
            (
                path(&context).get(Ads::PORT),
                path(&context).get(Ads::RLID),
                path(&context).get(Ads::PKEY_INDEX)
            ),
            (1, 12, 3)
        );
        assert_eq!((context.get(Qpc::PD), context.get(Qpc::RRE)), (7, 1));
        let rts = with_path(
            Qpc::zeroed().with(Qpc::RETRY_COUNT, 7).with(Qpc::RWE, 1),
            &Ads::zeroed().with(Ads::ACK_TIMEOUT, 14),
        );
        merge(&mut context, &rts, changes(Opcode::RTR2RTS_QP, opt::RWE));
        assert_eq!(
            (
                path(&context).get(Ads::ACK_TIMEOUT),
                path(&context).get(Ads::RLID)
            ),
            (14, 12)
        );
        assert_eq!((context.get(Qpc::REMOTE_QPN), context.get(Qpc::RWE)), (0x55, 1));
    }
}
