//! Capabilities: nothing is promised that is not done.

use protos::mlx5::caps::{AtomicCap, HcaCap as C, Kind, OdpCap, SET_ATOMIC, SET_GENERAL, SET_ODP, SIZE, odp};
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::CONTEXT;
use protos::mlx5::{Layout, iseg};

use super::{Outcome, Reply};

pub(super) const LOG_MAX_PD: u32 = 16;
pub(super) const LOG_MAX_XRCD: u32 = 10;
pub(super) const LOG_MAX_CQ: u32 = 14;
pub(super) const LOG_MAX_CQ_SIZE: u32 = 20;
pub(in crate::mlx5) const LOG_MAX_QP: u32 = 16;
pub(super) const LOG_MAX_QP_SIZE: u32 = 14;
pub(super) const LOG_MAX_SRQ: u32 = 14;
pub(super) const LOG_MAX_SRQ_SIZE: u32 = 14;
pub(super) const LOG_MAX_EQ_SIZE: u32 = 16;
pub(in crate::mlx5) const LOG_MAX_MKEY: u32 = 20;
pub(super) const LOG_MAX_MESSAGE: u32 = 30;
/// Logarithm of the longest list of keys, and of the translations of a key.
pub(super) const LOG_MAX_KLM_LIST: u32 = 16;
/// Depth of keys that name keys.
pub(super) const MAX_INDIRECTION: u32 = 4;
pub(super) const MAX_EQS: u32 = 32;
/// Logarithm of the multicast groups, and the queue pairs that one may have.
pub(in crate::mlx5) const LOG_MAX_MCG: u32 = 8;
pub(in crate::mlx5) const MAX_QP_MCG: u32 = 240;
/// Largest send WQE.
pub(super) const MAX_SEND_WQE: u32 = 1008;
/// Largest receive WQE.
pub(super) const MAX_RECEIVE_WQE: u32 = 512;

/// What the driver has chosen, and what it could choose.
#[derive(Debug)]
pub(super) struct Caps {
    general: C,
    atomic: AtomicCap,
    paging: OdpCap,
}

impl Caps {
    pub(super) fn new() -> Self {
        Self {
            general: general(),
            atomic: atomic(),
            // Which scheme of page faults is used is the driver's choice.
            paging: paging().with(OdpCap::MEM_PAGE_FAULT, 0),
        }
    }

    /// Whether the driver has chosen to be told of page faults by key and address.
    pub(super) fn faults_by_memory(&self) -> bool {
        self.paging.is_set(OdpCap::MEM_PAGE_FAULT)
    }

    /// QUERY_HCA_CAP: largest and current.
    pub(super) fn query(&self, op_mod: u16) -> Outcome {
        let current = op_mod & 1 != 0;
        let bytes: [u8; SIZE] = match (Kind(op_mod >> 1), current) {
            (Kind::GENERAL, true) => self.general.0,
            (Kind::GENERAL, false) => general().0,
            (Kind::ATOMIC, true) => self.atomic.0,
            (Kind::ATOMIC, false) => atomic().0,
            (Kind::ODP, true) => self.paging.0,
            (Kind::ODP, false) => paging().0,
            // Kinds of what this device does not have.
            _ => return Err(Status::BAD_PARAM),
        };
        Ok(Reply::empty().with(CONTEXT, &bytes))
    }

    /// SET_HCA_CAP. The driver chooses among what is offered; of what it writes only that counts.
    pub(super) fn set(&mut self, op_mod: u16, wanted: &[u8]) -> Outcome {
        if wanted.len() < SIZE {
            return Err(Status::BAD_INPUT_LENGTH);
        }
        match op_mod {
            SET_GENERAL => {
                let wanted = C::from_prefix(wanted);
                let mut chosen = general();
                chosen.set(C::LOG_UAR_PAGE_SZ, wanted.get(C::LOG_UAR_PAGE_SZ));
                let log_max_qp = wanted.get(C::LOG_MAX_QP).min(LOG_MAX_QP);
                chosen.set(C::LOG_MAX_QP, log_max_qp);
                self.general = chosen;
            }
            SET_ATOMIC => {
                let wanted = AtomicCap::from_prefix(wanted);
                let mode = wanted.get(AtomicCap::REQ_8B_ENDIANNESS_MODE);
                if mode > 1 {
                    return Err(Status::BAD_PARAM);
                }
                self.atomic.set(AtomicCap::REQ_8B_ENDIANNESS_MODE, mode);
            }
            SET_ODP => {
                let wanted = OdpCap::from_prefix(wanted);
                let memory = wanted.get(OdpCap::MEM_PAGE_FAULT);
                self.paging.set(OdpCap::MEM_PAGE_FAULT, memory);
            }
            _ => return Err(Status::BAD_PARAM),
        }
        Ok(Reply::empty())
    }
}

fn general() -> C {
    C::zeroed()
        .with(C::PAGE_REQUEST_DISABLE, 1)
        .with(C::LOG_MAX_SRQ_SZ, LOG_MAX_SRQ_SIZE)
        .with(C::LOG_MAX_QP_SZ, LOG_MAX_QP_SIZE)
        .with(C::LOG_MAX_QP, LOG_MAX_QP)
        .with(C::LOG_MAX_SRQ, LOG_MAX_SRQ)
        .with(C::LOG_MAX_CQ_SZ, LOG_MAX_CQ_SIZE)
        .with(C::LOG_MAX_CQ, LOG_MAX_CQ)
        .with(C::LOG_MAX_EQ_SZ, LOG_MAX_EQ_SIZE)
        .with(C::LOG_MAX_MKEY, LOG_MAX_MKEY)
        .with(C::LOG_MAX_EQ, 6)
        .with(C::LOG_MAX_RA_REQ_QP, 4)
        .with(C::LOG_MAX_RA_RES_QP, 4)
        .with(C::LOCAL_CA_ACK_DELAY, 16)
        .with(C::NUM_PORTS, 1)
        .with(C::LOG_MAX_MSG, LOG_MAX_MESSAGE)
        .with(C::LOG_MAX_KLM_LIST_SIZE, LOG_MAX_KLM_LIST)
        .with(C::MAX_INDIRECTION, MAX_INDIRECTION)
        .with(C::FIXED_BUFFER_SIZE, 1)
        .with(C::UMR_EXTENDED_TRANSLATION_OFFSET, 1)
        .with(C::NULL_MKEY, 1)
        .with(C::IMAICL, 1)
        .with(C::ATOMIC, 1)
        .with(C::PG, 1)
        .with(C::BLOCK_LB_MC, 1)
        .with(C::SET_DETH_SQPN, 1)
        .with(C::CQ_OI, 1)
        .with(C::CQ_RESIZE, 1)
        .with(C::CQE_128_ALWAYS, 1)
        .with(C::CQ_MODERATION, 1)
        .with(C::XRC, 1)
        .with(C::UD, 1)
        .with(C::UC, 1)
        .with(C::RC, 1)
        .with(C::LOG_PG_SZ, 12)
        .with(C::LOG_BF_REG_SIZE, 9)
        .with(C::MAX_WQE_SZ_SQ, MAX_SEND_WQE)
        .with(C::MAX_WQE_SZ_RQ, MAX_RECEIVE_WQE)
        .with(C::MAX_QP_MCG, MAX_QP_MCG)
        .with(C::LOG_MAX_MCG, LOG_MAX_MCG)
        .with(C::LOG_MAX_PD, LOG_MAX_PD)
        .with(C::LOG_MAX_XRCD, LOG_MAX_XRCD)
        .with(C::MAX_NUM_EQS, MAX_EQS)
        .with(C::DEVICE_FREQUENCY_MHZ, iseg::TIMER_KHZ / 1000)
        .with(C::DEVICE_FREQUENCY_KHZ, iseg::TIMER_KHZ)
}

fn atomic() -> AtomicCap {
    AtomicCap::zeroed()
        .with(AtomicCap::SUPPORTED_REQ_8B_ENDIANNESS_MODE_1, 1)
        .with(AtomicCap::OPERATIONS, 3)
        .with(AtomicCap::SIZE_QP, 8)
}

/// Page faults by key and address only: of the other scheme (by work request) nothing is set. A driver that does not
/// know this one sees that no transport can do it.
fn paging() -> OdpCap {
    OdpCap::zeroed()
        .with(OdpCap::MEMORY_SIG, 1)
        // What drivers ask for before they choose this scheme. An event names all pages that its request still needs.
        .with(OdpCap::MEMORY_PAGE_PREFETCH, 1)
        .with(
            OdpCap::MEMORY_RC,
            odp::SEND | odp::RECEIVE | odp::WRITE | odp::READ | odp::ATOMIC | odp::SRQ_RECEIVE,
        )
        .with(OdpCap::MEMORY_UD, odp::SEND)
        .with(
            OdpCap::MEMORY_XRC,
            odp::SEND | odp::WRITE | odp::READ | odp::ATOMIC | odp::SRQ_RECEIVE,
        )
        .with(OdpCap::MEM_PAGE_FAULT, 1)
}
