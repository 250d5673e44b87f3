//! Performance management (section 16.1).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MadHeader;
use crate::ib::header::wire;

/// Attributes and places (section 16.1.3).
pub mod perf {
    /// PortCounters.
    pub const PORT_COUNTERS: u16 = 0x0012;
    /// PortCountersExtended.
    pub const PORT_COUNTERS_EXTENDED: u16 = 0x001d;
    /// Where the attribute begins in a MAD.
    pub const DATA: usize = 64;
    /// Capability: PortCountersExtended is there.
    pub const CAP_EXTENDED: u16 = 1 << 9;
}

wire! {
    /// Head up to the data (section 16.1.1).
    PerfHeader, 64 {
        /// Common header.
        pub mad: MadHeader,
        /// Reserved.
        pub reserved: [u8; 40],
    }
}

wire! {
    /// PortCounters (section 16.1.3.5). Counters stop at their greatest value.
    PortCounters, 44 {
        /// Reserved.
        pub reserved: u8,
        /// Port.
        pub port: u8,
        /// Counters that a set clears.
        pub select: U16,
        /// SymbolErrorCounter.
        pub symbol_errors: U16,
        /// LinkErrorRecoveryCounter.
        pub link_recoveries: u8,
        /// LinkDownedCounter.
        pub link_downed: u8,
        /// PortRcvErrors.
        pub receive_errors: U16,
        /// PortRcvRemotePhysicalErrors.
        pub remote_physical_errors: U16,
        /// PortRcvSwitchRelayErrors.
        pub relay_errors: U16,
        /// PortXmitDiscards.
        pub transmit_discards: U16,
        /// PortXmitConstraintErrors.
        pub transmit_constraint: u8,
        /// PortRcvConstraintErrors.
        pub receive_constraint: u8,
        /// CounterSelect2.
        pub select2: u8,
        /// LocalLinkIntegrityErrors, ExcessiveBufferOverrunErrors.
        pub integrity_overrun: u8,
        /// Reserved.
        pub reserved2: U16,
        /// VL15Dropped.
        pub vl15_dropped: U16,
        /// PortXmitData, in words of 4 bytes.
        pub transmit_words: U32,
        /// PortRcvData, in words of 4 bytes.
        pub receive_words: U32,
        /// PortXmitPkts.
        pub transmit_packets: U32,
        /// PortRcvPkts.
        pub receive_packets: U32,
        /// PortXmitWait.
        pub transmit_wait: U32,
    }
}

wire! {
    /// PortCountersExtended (section 16.1.4.11).
    PortCountersExtended, 72 {
        /// Reserved.
        pub reserved: u8,
        /// Port.
        pub port: u8,
        /// Counters that a set clears.
        pub select: U16,
        /// Reserved.
        pub reserved2: U32,
        /// PortXmitData, in words of 4 bytes.
        pub transmit_words: U64,
        /// PortRcvData, in words of 4 bytes.
        pub receive_words: U64,
        /// PortXmitPkts.
        pub transmit_packets: U64,
        /// PortRcvPkts.
        pub receive_packets: U64,
        /// PortUnicastXmitPkts.
        pub unicast_transmit: U64,
        /// PortUnicastRcvPkts.
        pub unicast_receive: U64,
        /// PortMulticastXmitPkts.
        pub multicast_transmit: U64,
        /// PortMulticastRcvPkts.
        pub multicast_receive: U64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn test_counters_when_laid_out_have_the_offsets_of_the_specification() {
        // In bits: LinkDowned 56, PortXmitDiscards 112, VL15Dropped 176, PortXmitData 192.
        assert_eq!(offset_of!(PortCounters, link_downed), 56 / 8);
        assert_eq!(offset_of!(PortCounters, transmit_discards), 112 / 8);
        assert_eq!(offset_of!(PortCounters, vl15_dropped), 176 / 8);
        assert_eq!(offset_of!(PortCounters, transmit_words), 192 / 8);
        assert_eq!(offset_of!(PortCountersExtended, transmit_words), 64 / 8);
    }
}
