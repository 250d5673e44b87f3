//! Subnet management (chapter 14).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MadHeader;
use crate::ib::header::wire;

/// Attributes and places of subnet management (section 14.2.5).
pub mod smp {
    /// NodeDescription: 64 bytes of text.
    pub const NODE_DESCRIPTION: u16 = 0x0010;
    /// NodeInfo.
    pub const NODE_INFO: u16 = 0x0011;
    /// GUIDInfo: blocks of 8 GUIDs.
    pub const GUID_INFO: u16 = 0x0014;
    /// PortInfo.
    pub const PORT_INFO: u16 = 0x0015;
    /// P_KeyTable: blocks of 32 keys.
    pub const PKEY_TABLE: u16 = 0x0016;
    /// SMInfo.
    pub const SM_INFO: u16 = 0x0020;
    /// Where the attribute begins in a MAD.
    pub const DATA: usize = 64;
    /// Bytes of an attribute.
    pub const DATA_LEN: usize = 64;
    /// Node type of a channel adapter (section 14.2.5.3).
    pub const NODE_TYPE_CA: u8 = 1;
}

wire! {
    /// Head of a subnet management packet up to its data (sections 14.2.1 and 14.2.2).
    SmpHeader, 64 {
        /// Common header.
        pub mad: MadHeader,
        /// M_Key.
        pub mkey: U64,
        /// Directed routes: source LID.
        pub dr_slid: U16,
        /// Directed routes: destination LID.
        pub dr_dlid: U16,
        /// Reserved.
        pub reserved: [u8; 28],
    }
}

wire! {
    /// NodeInfo (section 14.2.5.3).
    NodeInfo, 40 {
        /// 1.
        pub base_version: u8,
        /// 1.
        pub class_version: u8,
        /// Kind of node.
        pub node_type: u8,
        /// Physical ports.
        pub num_ports: u8,
        /// GUID of the system.
        pub system_guid: U64,
        /// GUID of the node.
        pub node_guid: U64,
        /// GUID of the port that was asked.
        pub port_guid: U64,
        /// Entries of the P_Key table.
        pub partition_cap: U16,
        /// Device id.
        pub device_id: U16,
        /// Revision.
        pub revision: U32,
        /// The port that was asked (byte 0) and the vendor.
        pub local_port_vendor: U32,
    }
}

wire! {
    /// PortInfo (section 14.2.5.6).
    PortInfo, 64 {
        /// M_Key.
        pub mkey: U64,
        /// GID prefix.
        pub gid_prefix: U64,
        /// LID.
        pub lid: U16,
        /// LID of the subnet manager.
        pub sm_lid: U16,
        /// Capabilities, [`port_info`].
        pub capabilities: U32,
        /// Diagnostics.
        pub diag_code: U16,
        /// Lease of the M_Key.
        pub mkey_lease: U16,
        /// Port that was asked.
        pub local_port: u8,
        /// Widths enabled (bit 0: 1x, 1: 4x, 2: 8x, 3: 12x).
        pub width_enabled: u8,
        /// Widths supported.
        pub width_supported: u8,
        /// Width in use.
        pub width_active: u8,
        /// Speeds supported (upper 4 bits), port state.
        pub speed_supported_state: u8,
        /// Physical state (upper 4 bits), default state when down.
        pub physical_state_default: u8,
        /// M_Key protection (upper 2 bits), LMC (lower 3).
        pub protection_lmc: u8,
        /// Speed in use (upper 4 bits), enabled.
        pub speed_active_enabled: u8,
        /// MTU in use (upper 4 bits), service level of the subnet manager.
        pub mtu_sm_sl: u8,
        /// Virtual lanes supported (upper 4 bits), initialisation type.
        pub vl_cap_init: u8,
        /// VLHighLimit.
        pub vl_high_limit: u8,
        /// VLArbitrationHighCap.
        pub vl_arb_high_cap: u8,
        /// VLArbitrationLowCap.
        pub vl_arb_low_cap: u8,
        /// Reply to the initialisation type (upper 4 bits), greatest MTU.
        pub init_reply_mtu_cap: u8,
        /// VLStallCount, HOQLife.
        pub stall_hoq_life: u8,
        /// Virtual lanes in use (upper 4 bits), enforcement.
        pub vl_enforcement: u8,
        /// M_Key violations.
        pub mkey_violations: U16,
        /// P_Key violations.
        pub pkey_violations: U16,
        /// Q_Key violations.
        pub qkey_violations: U16,
        /// Entries of the GUID table.
        pub guid_cap: u8,
        /// Client re-register (bit 7), subnet timeout (lower 5 bits).
        pub reregister_timeout: u8,
        /// Response time (lower 5 bits).
        pub response_time: u8,
        /// Error thresholds.
        pub error_thresholds: u8,
        /// MaxCreditHint.
        pub max_credit_hint: U16,
        /// Round trip (lower 24 bits).
        pub round_trip: U32,
        /// More capabilities.
        pub capabilities2: U16,
        /// Extended speed: in use (upper 4 bits), supported.
        pub ext_speed_active_supported: u8,
        /// Extended speeds enabled (lower 5 bits).
        pub ext_speed_enabled: u8,
    }
}

/// Values in a PortInfo (section 14.2.5.6).
pub mod port_info {
    /// PortState: down.
    pub const STATE_DOWN: u8 = 1;
    /// PortState: initialize.
    pub const STATE_INIT: u8 = 2;
    /// PortState: armed.
    pub const STATE_ARMED: u8 = 3;
    /// PortState: active.
    pub const STATE_ACTIVE: u8 = 4;
    /// PortPhysicalState: polling.
    pub const PHYSICAL_POLLING: u8 = 2;
    /// PortPhysicalState: link up.
    pub const PHYSICAL_LINK_UP: u8 = 5;
    /// Width 4x.
    pub const WIDTH_4X: u8 = 2;
    /// Extended speed: FDR or faster (EDR = bit 1).
    pub const EXT_SPEED_EDR: u8 = 2;
    /// Capability: system image GUID.
    pub const CAP_SYSTEM_GUID: u32 = 1 << 11;
    /// Capability: communication management.
    pub const CAP_CM: u32 = 1 << 16;
    /// Capability: extended speeds.
    pub const CAP_EXTENDED_SPEEDS: u32 = 1 << 14;
    /// Capability: client re-registration.
    pub const CAP_CLIENT_REREGISTER: u32 = 1 << 25;
    /// Capability: automatic migration.
    pub const CAP_AUTO_MIGRATION: u32 = 1 << 5;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn test_port_info_when_laid_out_has_the_offsets_of_the_specification() {
        // In bits: LID 128, LocalPortNum 224, PortState 260, NeighborMTU 288, GUIDCap 400.
        assert_eq!(offset_of!(PortInfo, lid), 128 / 8);
        assert_eq!(offset_of!(PortInfo, local_port), 224 / 8);
        assert_eq!(offset_of!(PortInfo, speed_supported_state), 256 / 8);
        assert_eq!(offset_of!(PortInfo, mtu_sm_sl), 288 / 8);
        assert_eq!(offset_of!(PortInfo, guid_cap), 400 / 8);
        assert_eq!(offset_of!(PortInfo, capabilities2), 480 / 8);
    }

    #[test]
    fn test_node_info_when_laid_out_has_the_offsets_of_the_specification() {
        assert_eq!(offset_of!(NodeInfo, node_guid), 96 / 8);
        assert_eq!(offset_of!(NodeInfo, partition_cap), 224 / 8);
        assert_eq!(offset_of!(NodeInfo, local_port_vendor), 288 / 8);
        assert_eq!(offset_of!(SmpHeader, dr_slid), 32);
    }
}
