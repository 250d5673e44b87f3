//! HCA capabilities (reference 2): the answers to QUERY_HCA_CAP.

use super::layout::{layout, open};

/// Bytes of each kind of capabilities.
pub const SIZE: usize = 256;

open! {
    /// Kind of capabilities: `op_mod >> 1` of QUERY_HCA_CAP and SET_HCA_CAP; bit 0 of QUERY_HCA_CAP's op_mod asks for the
    /// current ones instead of the largest.
    Kind(u16) {
        /// General.
        GENERAL = 0x0,
        /// On-demand paging.
        ODP = 0x2,
        /// Atomics.
        ATOMIC = 0x3,
    }
}

/// SET_HCA_CAP, op_mod: general.
pub const SET_GENERAL: u16 = 0;
/// SET_HCA_CAP, op_mod: on-demand paging.
pub const SET_ODP: u16 = 2 << 1;
/// SET_HCA_CAP, op_mod: atomics.
pub const SET_ATOMIC: u16 = 3 << 1;

layout! {
    /// General capabilities (`cmd_hca_cap`): what this device sets or looks at.
    HcaCap[SIZE] {
        /// The device never asks for pages.
        PAGE_REQUEST_DISABLE = bits(0x00, 25, 1),
        /// Logarithm of the largest SRQ.
        LOG_MAX_SRQ_SZ = bits(0x10, 24, 8),
        /// Logarithm of the largest QP.
        LOG_MAX_QP_SZ = bits(0x10, 16, 8),
        /// Logarithm of the QPs.
        LOG_MAX_QP = bits(0x10, 0, 5),
        /// Logarithm of the SRQs.
        LOG_MAX_SRQ = bits(0x14, 16, 5),
        /// Logarithm of the largest CQ.
        LOG_MAX_CQ_SZ = bits(0x18, 16, 8),
        /// Logarithm of the CQs.
        LOG_MAX_CQ = bits(0x18, 0, 5),
        /// Logarithm of the largest EQ.
        LOG_MAX_EQ_SZ = bits(0x1c, 24, 8),
        /// Logarithm of the mkeys.
        LOG_MAX_MKEY = bits(0x1c, 16, 6),
        /// Logarithm of the EQs.
        LOG_MAX_EQ = bits(0x1c, 0, 4),
        /// Depth of keys that name keys.
        MAX_INDIRECTION = bits(0x20, 24, 8),
        /// KSM.
        FIXED_BUFFER_SIZE = bits(0x20, 23, 1),
        /// Logarithm of the largest region.
        LOG_MAX_MRW_SZ = bits(0x20, 16, 7),
        /// UMR's 48-bit offset.
        UMR_EXTENDED_TRANSLATION_OFFSET = bits(0x20, 7, 1),
        /// There is a key that means nothing.
        NULL_MKEY = bits(0x20, 6, 1),
        /// Logarithm of the longest list of keys.
        LOG_MAX_KLM_LIST_SIZE = bits(0x20, 0, 6),
        /// Logarithm of the reads that a QP may have outstanding.
        LOG_MAX_RA_REQ_QP = bits(0x28, 16, 6),
        /// Logarithm of the reads that may be outstanding at a QP.
        LOG_MAX_RA_RES_QP = bits(0x28, 0, 6),
        /// Code of the number of GIDs: 8 << code.
        GID_TABLE_SIZE = bits(0x2c, 0, 16),
        /// Code of the number of P_Keys: 128 << code.
        PKEY_TABLE_SIZE = bits(0x30, 0, 16),
        /// Vport group manager.
        VPORT_GROUP_MANAGER = bits(0x34, 31, 1),
        /// Port by vport commands instead of MADs.
        IB_VIRT = bits(0x34, 29, 1),
        /// IB code of our delay before an ACK.
        LOCAL_CA_ACK_DELAY = bits(0x34, 16, 5),
        /// 0 = InfiniBand.
        PORT_TYPE = bits(0x34, 8, 2),
        /// Ports.
        NUM_PORTS = bits(0x34, 0, 8),
        /// Logarithm of the longest message.
        LOG_MAX_MSG = bits(0x38, 24, 5),
        /// Static rates.
        STAT_RATE_SUPPORT = bits(0x3c, 16, 16),
        /// 1: CQEs carry user indexes.
        CQE_VERSION = bits(0x3c, 0, 4),
        /// Address vectors may be short.
        COMPACT_ADDRESS_VECTOR = bits(0x40, 31, 1),
        /// UMR cannot change the size of a page.
        UMR_MODIFY_ENTITY_SIZE_DISABLED = bits(0x40, 24, 1),
        /// UMR cannot change the atomic right.
        UMR_MODIFY_ATOMIC_DISABLED = bits(0x40, 23, 1),
        /// UMR cannot change keys that name keys.
        UMR_INDIRECT_MKEY_DISABLED = bits(0x40, 22, 1),
        /// Kind of fence that UMR needs: 2 = none.
        UMR_FENCE = bits(0x40, 20, 2),
        /// Commands are signed.
        CMDIF_CHECKSUM = bits(0x40, 14, 2),
        /// Queues may scatter small data into CQEs.
        SCTR_DATA_CQE = bits(0x40, 10, 1),
        /// Atomics.
        ATOMIC = bits(0x40, 1, 1),
        /// CQ overrun can be ignored.
        CQ_OI = bits(0x44, 31, 1),
        /// CQs can be resized.
        CQ_RESIZE = bits(0x44, 30, 1),
        /// CQ moderation.
        CQ_MODERATION = bits(0x44, 29, 1),
        /// On-demand paging.
        PG = bits(0x44, 24, 1),
        /// Multicast loopback can be blocked.
        BLOCK_LB_MC = bits(0x44, 23, 1),
        /// Local invalidate.
        IMAICL = bits(0x44, 14, 1),
        /// Q_Key violations are counted.
        QKV = bits(0x44, 9, 1),
        /// P_Key violations are counted.
        PKV = bits(0x44, 8, 1),
        /// The source QP of datagrams can be set.
        SET_DETH_SQPN = bits(0x44, 7, 1),
        /// XRC.
        XRC = bits(0x44, 3, 1),
        /// UD.
        UD = bits(0x44, 2, 1),
        /// UC.
        UC = bits(0x44, 1, 1),
        /// RC.
        RC = bits(0x44, 0, 1),
        /// UARs of 4 KiB whatever the page size.
        UAR_4K = bits(0x48, 31, 1),
        /// Logarithm of the UAR area in MiB.
        UAR_SZ = bits(0x48, 16, 6),
        /// Logarithm of the smallest page.
        LOG_PG_SZ = bits(0x48, 0, 8),
        /// BlueFlame.
        BF = bits(0x4c, 31, 1),
        /// Logarithm of a doorbell register's bytes.
        LOG_BF_REG_SIZE = bits(0x4c, 16, 5),
        /// Largest send WQE.
        MAX_WQE_SZ_SQ = bits(0x50, 0, 16),
        /// Largest receive WQE.
        MAX_WQE_SZ_RQ = bits(0x54, 0, 16),
        /// QPs in a multicast group.
        MAX_QP_MCG = bits(0x5c, 0, 25),
        /// Logarithm of the multicast groups.
        LOG_MAX_MCG = bits(0x60, 0, 8),
        /// Logarithm of the protection domains.
        LOG_MAX_PD = bits(0x64, 16, 5),
        /// Logarithm of the XRC domains.
        LOG_MAX_XRCD = bits(0x64, 0, 5),
        /// Logarithm of the receive memory pools.
        LOG_MAX_RMP = bits(0x70, 24, 5),
        /// Event queues.
        MAX_NUM_EQS = bits(0x8c, 0, 16),
        /// Logarithm of a UAR's pages.
        LOG_UAR_PAGE_SZ = bits(0x90, 0, 16),
        /// Frequency of the timer.
        DEVICE_FREQUENCY_MHZ = bits(0x98, 0, 32),
        /// Frequency of the timer.
        DEVICE_FREQUENCY_KHZ = bits(0x9c, 0, 32),
        /// UARs in a page.
        NUM_OF_UARS_PER_PAGE = bits(0xa4, 0, 32),
        /// CQEs of 128 bytes may be written whole.
        CQE_128_ALWAYS = bits(0xb4, 2, 1),
    }
}

layout! {
    /// Atomic capabilities.
    AtomicCap[SIZE] {
        /// 1: results in host byte order.
        REQ_8B_ENDIANNESS_MODE = bits(0x08, 30, 2),
        /// Mode 1 can be chosen.
        SUPPORTED_REQ_8B_ENDIANNESS_MODE_1 = bits(0x08, 25, 1),
        /// Bit 0 compare and swap, bit 1 fetch and add.
        OPERATIONS = bits(0x10, 0, 16),
        /// Bytes that are one, a bit for each size.
        SIZE_QP = bits(0x14, 0, 16),
    }
}

/// Bits of what can fault ([`OdpCap`]).
pub mod odp {
    /// Data of sends.
    pub const SEND: u32 = 1 << 31;
    /// Data of receives.
    pub const RECEIVE: u32 = 1 << 30;
    /// RDMA writes.
    pub const WRITE: u32 = 1 << 29;
    /// RDMA reads.
    pub const READ: u32 = 1 << 28;
    /// Atomics.
    pub const ATOMIC: u32 = 1 << 27;
    /// Data of receives from an SRQ.
    pub const SRQ_RECEIVE: u32 = 1 << 26;
}

layout! {
    /// On-demand paging: the transport scheme, then the memory scheme (64 bytes each), then which one is chosen.
    OdpCap[SIZE] {
        /// Transport scheme: there is on-demand paging.
        TRANSPORT_SIG = bits(0x08, 31, 1),
        /// Transport scheme: RC.
        TRANSPORT_RC = bits(0x10, 0, 32),
        /// Transport scheme: UC.
        TRANSPORT_UC = bits(0x14, 0, 32),
        /// Transport scheme: UD.
        TRANSPORT_UD = bits(0x18, 0, 32),
        /// Transport scheme: XRC.
        TRANSPORT_XRC = bits(0x1c, 0, 32),
        /// Memory scheme: there is on-demand paging.
        MEMORY_SIG = bits(0x48, 31, 1),
        /// Memory scheme: prefetch.
        MEMORY_PAGE_PREFETCH = bits(0x48, 26, 1),
        /// Memory scheme: RC.
        MEMORY_RC = bits(0x50, 0, 32),
        /// Memory scheme: UC.
        MEMORY_UC = bits(0x54, 0, 32),
        /// Memory scheme: UD.
        MEMORY_UD = bits(0x58, 0, 32),
        /// Memory scheme: XRC.
        MEMORY_XRC = bits(0x5c, 0, 32),
        /// The memory scheme is used.
        MEM_PAGE_FAULT = bits(0xc0, 31, 1),
    }
}
