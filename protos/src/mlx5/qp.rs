//! Queue pairs: context (`qpc`), address path (`ads`), states, service types.

use super::layout::{layout, open};

layout! {
    /// QP context.
    Qpc[232] {
        /// [`State`].
        STATE = bits(0x00, 28, 4),
        /// [`ServiceType`].
        SERVICE = bits(0x00, 16, 8),
        /// Path migration.
        PM_STATE = bits(0x00, 11, 2),
        /// WQEs are signed.
        WQ_SIGNATURE = bits(0x04, 31, 1),
        /// Multicast is not looped back.
        BLOCK_LB_MC = bits(0x04, 30, 1),
        /// Protection domain.
        PD = bits(0x04, 0, 24),
        /// IB code of the path MTU.
        MTU = bits(0x08, 29, 3),
        /// Logarithm of the longest message.
        LOG_MSG_MAX = bits(0x08, 24, 5),
        /// Logarithm of the receive queue's entries.
        LOG_RQ_SIZE = bits(0x08, 19, 4),
        /// Logarithm of a receive WQE's bytes, minus 4.
        LOG_RQ_STRIDE = bits(0x08, 16, 3),
        /// There is no send queue.
        NO_SQ = bits(0x08, 15, 1),
        /// Logarithm of the send queue's 64-byte blocks.
        LOG_SQ_SIZE = bits(0x08, 11, 4),
        /// Reserved lkey may be used.
        RLKY = bits(0x08, 4, 1),
        /// Doorbell page.
        UAR_PAGE = bits(0x0c, 0, 24),
        /// What CQEs carry when the CQE version is 1.
        USER_INDEX = bits(0x10, 0, 24),
        /// Logarithm of a page's bytes, minus 12.
        LOG_PAGE_SIZE = bits(0x14, 24, 5),
        /// The other QP.
        REMOTE_QPN = bits(0x14, 0, 24),
        /// 0: an ACK for each message; n: asked for each 2^n packets.
        LOG_ACK_REQ_FREQ = bits(0x70, 28, 4),
        /// Logarithm of the reads and atomics that we may have outstanding.
        LOG_SRA_MAX = bits(0x70, 21, 3),
        /// Retries without an answer.
        RETRY_COUNT = bits(0x70, 16, 3),
        /// Retries after receiver-not-ready; 7 = for ever.
        RNR_RETRY = bits(0x70, 13, 3),
        /// Next PSN to send.
        NEXT_SEND_PSN = bits(0x78, 0, 24),
        /// Completion queue of sends.
        CQN_SEND = bits(0x7c, 0, 24),
        /// Source QP number in datagrams, if not 0.
        DETH_SQPN = bits(0x80, 0, 24),
        /// Last PSN that was acknowledged.
        LAST_ACKED_PSN = bits(0x88, 0, 24),
        /// Send sequence number.
        SSN = bits(0x8c, 0, 24),
        /// Logarithm of the reads and atomics that the other side may have outstanding.
        LOG_RRA_MAX = bits(0x90, 21, 3),
        /// 0 none, 1 IB specification.
        ATOMIC_MODE = bits(0x90, 16, 4),
        /// Remote reads are allowed.
        RRE = bits(0x90, 15, 1),
        /// Remote writes are allowed.
        RWE = bits(0x90, 14, 1),
        /// Remote atomics are allowed.
        RAE = bits(0x90, 13, 1),
        /// Offset in the first page, in units of its size / 64.
        PAGE_OFFSET = bits(0x90, 6, 6),
        /// IB code of the delay that a receiver-not-ready NAK asks for.
        MIN_RNR_NAK = bits(0x94, 24, 5),
        /// Next PSN expected.
        NEXT_RCV_PSN = bits(0x94, 0, 24),
        /// XRC domain.
        XRCD = bits(0x98, 0, 24),
        /// Completion queue of receives.
        CQN_RECEIVE = bits(0x9c, 0, 24),
        /// Doorbell record.
        DBR_ADDR = wide(0xa0),
        /// Q_Key.
        Q_KEY = bits(0xa8, 0, 32),
        /// [`ReceiveQueue`].
        RQ_TYPE = bits(0xac, 24, 3),
        /// Shared receive queue.
        SRQN = bits(0xac, 0, 24),
        /// Receive message sequence number.
        RMSN = bits(0xb0, 0, 24),
        /// Send blocks executed.
        HW_SQ_COUNTER = bits(0xb4, 16, 16),
        /// Send blocks posted.
        SW_SQ_COUNTER = bits(0xb4, 0, 16),
        /// Receive WQEs consumed.
        HW_RQ_COUNTER = bits(0xb8, 0, 32),
        /// Receive WQEs posted.
        SW_RQ_COUNTER = bits(0xbc, 0, 32),
    }
}

/// Offset of the primary address path in a [`Qpc`].
pub const PRIMARY_PATH: usize = 0x18;
/// Offset of the alternate address path in a [`Qpc`].
pub const SECONDARY_PATH: usize = 0x44;

layout! {
    /// Address path.
    Ads[44] {
        /// Index of the P_Key.
        PKEY_INDEX = bits(0x00, 0, 16),
        /// There is a GRH.
        GRH = bits(0x04, 23, 1),
        /// Source path bits.
        MLID = bits(0x04, 16, 7),
        /// Destination LID.
        RLID = bits(0x04, 0, 16),
        /// IB code of the local ACK timeout.
        ACK_TIMEOUT = bits(0x08, 27, 5),
        /// Source GID.
        SRC_ADDR_INDEX = bits(0x08, 16, 8),
        /// Static rate.
        STAT_RATE = bits(0x08, 8, 4),
        /// Hop limit.
        HOP_LIMIT = bits(0x08, 0, 8),
        /// Traffic class.
        TCLASS = bits(0x0c, 20, 8),
        /// Flow label.
        FLOW_LABEL = bits(0x0c, 0, 20),
        /// Destination GID, subnet prefix.
        RGID_H = wide(0x10),
        /// Destination GID, interface id.
        RGID_L = wide(0x18),
        /// Service level.
        SL = bits(0x24, 24, 4),
        /// Port.
        PORT = bits(0x24, 16, 8),
    }
}

open! {
    /// [`Qpc::STATE`] (`MLX5_QP_STATE_*`).
    State(u8) {
        /// Reset.
        RST = 0,
        /// Initialised.
        INIT = 1,
        /// Ready to receive.
        RTR = 2,
        /// Ready to send.
        RTS = 3,
        /// Send queue in error.
        SQER = 4,
        /// Send queue drained.
        SQD = 5,
        /// Error.
        ERR = 6,
        /// Send queue draining.
        SQ_DRAINING = 7,
    }
}

open! {
    /// [`Qpc::SERVICE`] (`MLX5_QP_ST_*`).
    ServiceType(u8) {
        /// Reliable connection.
        RC = 0x0,
        /// Unreliable connection.
        UC = 0x1,
        /// Unreliable datagram.
        UD = 0x2,
        /// Extended reliable connection.
        XRC = 0x3,
        /// Subnet management.
        QP0 = 0x7,
        /// General services.
        QP1 = 0x8,
        /// Registers memory.
        REG_UMR = 0xc,
    }
}

open! {
    /// [`Qpc::RQ_TYPE`].
    ReceiveQueue(u8) {
        /// Its own.
        OWN = 0,
        /// Shared.
        SHARED = 1,
        /// None.
        NONE = 3,
    }
}

/// `opt_param_mask` of transitions (`MLX5_QP_OPTPAR_*`).
pub mod opt {
    /// Alternate path.
    pub const ALT_PATH: u32 = 1 << 0;
    /// Remote read enable.
    pub const RRE: u32 = 1 << 1;
    /// Remote atomic enable.
    pub const RAE: u32 = 1 << 2;
    /// Remote write enable.
    pub const RWE: u32 = 1 << 3;
    /// P_Key index.
    pub const PKEY_INDEX: u32 = 1 << 4;
    /// Q_Key.
    pub const Q_KEY: u32 = 1 << 5;
    /// RNR timer.
    pub const RNR_TIMEOUT: u32 = 1 << 6;
    /// Primary path.
    pub const PRIMARY_PATH: u32 = 1 << 7;
    /// Outstanding reads, ours.
    pub const SRA_MAX: u32 = 1 << 8;
    /// Outstanding reads, theirs.
    pub const RRA_MAX: u32 = 1 << 9;
    /// Path migration state.
    pub const PM_STATE: u32 = 1 << 10;
    /// Retries.
    pub const RETRY_COUNT: u32 = 1 << 12;
    /// RNR retries.
    pub const RNR_RETRY: u32 = 1 << 13;
    /// ACK timeout.
    pub const ACK_TIMEOUT: u32 = 1 << 14;
    /// Port.
    pub const PRIMARY_PORT: u32 = 1 << 16;
    /// SRQ.
    pub const SRQN: u32 = 1 << 18;
    /// Receive CQ.
    pub const CQN_RECEIVE: u32 = 1 << 19;
}
