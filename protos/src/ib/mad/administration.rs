//! Subnet administration (chapter 15).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MadHeader;
use crate::ib::Gid;
use crate::ib::header::wire;

/// Attributes and places (section 15.2.5).
pub mod sa {
    /// ServiceRecord.
    pub const SERVICE_RECORD: u16 = 0x0031;
    /// PathRecord.
    pub const PATH_RECORD: u16 = 0x0035;
    /// MCMemberRecord.
    pub const MC_MEMBER_RECORD: u16 = 0x0038;
    /// Where a record begins in a MAD.
    pub const DATA: usize = 56;
    /// Bytes there.
    pub const DATA_LEN: usize = 200;
}

wire! {
    /// Head of a subnet administration MAD (section 15.2.1.1), with the RMPP header of section 13.6.2.
    SaHeader, 56 {
        /// Common header.
        pub mad: MadHeader,
        /// RMPP version; 0 with type 0: not used.
        pub rmpp_version: u8,
        /// RMPP type: 1 data.
        pub rmpp_type: u8,
        /// Response time (upper 5 bits), flags: active 1, first 2, last 4.
        pub rmpp_flags: u8,
        /// RMPP status.
        pub rmpp_status: u8,
        /// Segment number.
        pub rmpp_segment: U32,
        /// Bytes from the SM_Key on, in the first segment; those of the last in the last.
        pub rmpp_length: U32,
        /// SM_Key.
        pub sm_key: U64,
        /// Size of a record in a table, in units of 8 bytes.
        pub attribute_offset: U16,
        /// Reserved.
        pub reserved: U16,
        /// Which components of the record count.
        pub component_mask: U64,
    }
}

wire! {
    /// ClassPortInfo (section 13.4.8.1).
    ClassPortInfo, 72 {
        /// 1.
        pub base_version: u8,
        /// Version of the class.
        pub class_version: u8,
        /// Capabilities.
        pub capabilities: U16,
        /// More capabilities (upper 27 bits), response time: 4.096 us * 2^n (lower 5 bits).
        pub capabilities2_response_time: U32,
        /// Redirection: none when zero.
        pub redirect_gid: Gid,
        /// Traffic class, service level, flow label.
        pub redirect_tc_sl_flow: U32,
        /// LID.
        pub redirect_lid: U16,
        /// P_Key.
        pub redirect_pkey: U16,
        /// Queue pair.
        pub redirect_qp: U32,
        /// Q_Key.
        pub redirect_qkey: U32,
        /// Where traps go.
        pub trap_gid: Gid,
        /// Traffic class, service level, flow label.
        pub trap_tc_sl_flow: U32,
        /// LID.
        pub trap_lid: U16,
        /// P_Key.
        pub trap_pkey: U16,
        /// Hop limit, queue pair.
        pub trap_hop_qp: U32,
        /// Q_Key.
        pub trap_qkey: U32,
    }
}

wire! {
    /// PathRecord (section 15.2.5.16).
    PathRecord, 64 {
        /// Service id.
        pub service_id: U64,
        /// Destination GID.
        pub dgid: Gid,
        /// Source GID.
        pub sgid: Gid,
        /// Destination LID.
        pub dlid: U16,
        /// Source LID.
        pub slid: U16,
        /// Raw traffic (bit 31), flow label (bits 27:8), hop limit (lower 8 bits).
        pub flow_hop: U32,
        /// Traffic class.
        pub traffic_class: u8,
        /// Reversible (bit 7), number of paths.
        pub reversible_paths: u8,
        /// P_Key.
        pub pkey: U16,
        /// QoS class (upper 12 bits), service level.
        pub qos_sl: U16,
        /// Selector (upper 2 bits), MTU.
        pub mtu: u8,
        /// Selector, rate.
        pub rate: u8,
        /// Selector, packet life time: 4.096 us * 2^n.
        pub life_time: u8,
        /// Preference.
        pub preference: u8,
        /// Reserved.
        pub reserved: [u8; 6],
    }
}

/// Components of a PathRecord: bits of the mask (section 15.2.5.16, in the order of the fields).
pub mod path_record {
    /// Destination GID.
    pub const DGID: u64 = 1 << 2;
    /// Source GID.
    pub const SGID: u64 = 1 << 3;
    /// Destination LID.
    pub const DLID: u64 = 1 << 4;
    /// Source LID.
    pub const SLID: u64 = 1 << 5;
    /// P_Key.
    pub const PKEY: u64 = 1 << 13;
    /// Selector: exactly. (0: greater, 1: less, 3: the greatest there is.)
    pub const EXACTLY: u8 = 2 << 6;
    /// Rate code of 100 Gbit/s (section 15.2.5.16, "Rate").
    pub const RATE_100_GBPS: u8 = 16;
}

wire! {
    /// MCMemberRecord (section 15.2.5.17).
    McMemberRecord, 52 {
        /// Multicast GID.
        pub mgid: Gid,
        /// Port that joins.
        pub port_gid: Gid,
        /// Q_Key.
        pub qkey: U32,
        /// Multicast LID.
        pub mlid: U16,
        /// Selector (upper 2 bits), MTU.
        pub mtu: u8,
        /// Traffic class.
        pub traffic_class: u8,
        /// P_Key.
        pub pkey: U16,
        /// Selector, rate.
        pub rate: u8,
        /// Selector, packet life time.
        pub life_time: u8,
        /// Service level (upper 4 bits), flow label (20 bits), hop limit.
        pub sl_flow_hop: U32,
        /// Scope (upper 4 bits), join state.
        pub scope_join: u8,
        /// Proxy join (bit 7).
        pub proxy_join: u8,
        /// Reserved.
        pub reserved: U16,
    }
}

/// Components of an MCMemberRecord, and join states.
pub mod mc_member {
    /// Multicast GID.
    pub const MGID: u64 = 1 << 0;
    /// Port GID.
    pub const PORT_GID: u64 = 1 << 1;
    /// Q_Key.
    pub const QKEY: u64 = 1 << 2;
    /// P_Key.
    pub const PKEY: u64 = 1 << 7;
    /// Service level.
    pub const SL: u64 = 1 << 12;
    /// Join state.
    pub const JOIN_STATE: u64 = 1 << 16;
    /// Join state: full member.
    pub const FULL: u8 = 1;
    /// Join state: non member, gets packets.
    pub const NON_MEMBER: u8 = 2;
    /// Join state: only sends.
    pub const SEND_ONLY: u8 = 4;
    /// Join state: only sends, and may create the group.
    pub const SEND_ONLY_FULL: u8 = 8;
}

wire! {
    /// ServiceRecord (section 15.2.5.14).
    ServiceRecord, 176 {
        /// Service id.
        pub id: U64,
        /// Port that offers it.
        pub gid: Gid,
        /// P_Key.
        pub pkey: U16,
        /// Reserved.
        pub reserved: U16,
        /// Seconds; all ones: for ever.
        pub lease: U32,
        /// Key of the record.
        pub key: [u8; 16],
        /// Name.
        pub name: [u8; 64],
        /// Data, in whatever words.
        pub data: [u8; 64],
    }
}

/// Components of a ServiceRecord.
pub mod service {
    /// Service id.
    pub const ID: u64 = 1 << 0;
    /// Port GID.
    pub const GID: u64 = 1 << 1;
    /// P_Key.
    pub const PKEY: u64 = 1 << 2;
    /// Name (after lease and key).
    pub const NAME: u64 = 1 << 5;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn test_records_when_laid_out_have_the_offsets_of_the_specification() {
        assert_eq!(offset_of!(SaHeader, sm_key), 36);
        assert_eq!(offset_of!(SaHeader, component_mask), 48);
        assert_eq!(offset_of!(PathRecord, dlid), 40);
        assert_eq!(offset_of!(PathRecord, pkey), 50);
        assert_eq!(offset_of!(PathRecord, preference), 57);
        assert_eq!(offset_of!(McMemberRecord, mlid), 36);
        assert_eq!(offset_of!(McMemberRecord, scope_join), 48);
        assert_eq!(offset_of!(ServiceRecord, name), 48);
        assert_eq!(offset_of!(ClassPortInfo, trap_gid), 40);
    }
}
