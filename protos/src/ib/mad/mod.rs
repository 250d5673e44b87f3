//! Management datagrams (section 13.4): 256 bytes, a common header, then what the class says.

mod administration;
mod performance;
mod subnet;

pub use administration::{
    ClassPortInfo, McMemberRecord, PathRecord, SaHeader, ServiceRecord, mc_member, path_record, sa, service,
};
pub use performance::{PerfHeader, PortCounters, PortCountersExtended, perf};
pub use subnet::{NodeInfo, PortInfo, SmpHeader, port_info, smp};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::wire;

/// Bytes of every MAD (section 13.4.2).
pub const MAD: usize = 256;

wire! {
    /// Common header (section 13.4.3).
    MadHeader, 24 {
        /// 1.
        pub base_version: u8,
        /// Class.
        pub class: u8,
        /// Version of the class.
        pub class_version: u8,
        /// Method; bit 7: a response.
        pub method: u8,
        /// Status, with bit 15 the direction of directed routes.
        pub status: U16,
        /// Class specific (directed routes: hop pointer and hop count).
        pub class_specific: U16,
        /// The requester's number.
        pub transaction: U64,
        /// Attribute.
        pub attribute: U16,
        /// Reserved.
        pub reserved: U16,
        /// Which of the attribute.
        pub modifier: U32,
    }
}

/// Classes (section 13.4.4).
pub mod class {
    /// Subnet management, routed by LID.
    pub const SUBN_LID: u8 = 0x01;
    /// Subnet administration.
    pub const SUBN_ADM: u8 = 0x03;
    /// Performance.
    pub const PERFORMANCE: u8 = 0x04;
    /// Subnet management, directed route.
    pub const SUBN_DIRECTED: u8 = 0x81;
}

/// Methods (section 13.4.5).
pub mod method {
    /// Get.
    pub const GET: u8 = 0x01;
    /// Set.
    pub const SET: u8 = 0x02;
    /// Response to a get or set.
    pub const GET_RESP: u8 = 0x81;
    /// Table of records (section 15.2.2).
    pub const GET_TABLE: u8 = 0x12;
    /// Response to it.
    pub const GET_TABLE_RESP: u8 = 0x92;
    /// Delete (section 15.2.2).
    pub const DELETE: u8 = 0x15;
    /// Response to a delete.
    pub const DELETE_RESP: u8 = 0x95;
}

/// Status of the common header (section 13.4.7).
pub mod status {
    /// Well.
    pub const OK: u16 = 0;
    /// Base or class version not supported.
    pub const BAD_VERSION: u16 = 1 << 2;
    /// The class has no such method.
    pub const BAD_METHOD: u16 = 2 << 2;
    /// The method has no such attribute.
    pub const BAD_ATTRIBUTE: u16 = 3 << 2;
    /// A field is invalid.
    pub const BAD_FIELD: u16 = 7 << 2;
    /// Bit 15 of directed routes: on the way back.
    pub const DIRECTION: u16 = 0x8000;
    /// Subnet administration (section 15.2.3): no record.
    pub const SA_NO_RECORDS: u16 = 0x0300;
    /// More records than a get returns.
    pub const SA_TOO_MANY: u16 = 0x0400;
    /// A GID that is not valid.
    pub const SA_INVALID_GID: u16 = 0x0500;
    /// Not enough components.
    pub const SA_INSUFFICIENT: u16 = 0x0600;
    /// Request invalid.
    pub const SA_INVALID: u16 = 0x0200;
}

/// Attributes of every class (section 13.4.8).
pub mod attribute {
    /// ClassPortInfo.
    pub const CLASS_PORT_INFO: u16 = 0x0001;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_header_when_fields_are_set_has_the_bytes_of_the_specification() {
        let header = MadHeader {
            base_version: 1,
            class: class::SUBN_ADM,
            class_version: 2,
            method: method::GET_RESP,
            status: status::SA_NO_RECORDS.into(),
            transaction: 0x0102_0304_0506_0708.into(),
            attribute: 0x35.into(),
            modifier: 9.into(),
            ..MadHeader::default()
        };
        let bytes = header.as_bytes();
        assert_eq!(bytes[..6], [1, 3, 2, 0x81, 3, 0]);
        assert_eq!(bytes[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[16..18], [0, 0x35]);
        assert_eq!(bytes[23], 9);
        assert_eq!(MadHeader::read_from_bytes(bytes), Ok(header));
    }
}
