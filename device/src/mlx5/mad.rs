//! The subnet management agent, as MAD_IFC asks it.

use protos::ib::{Gid, Pkey};
use protos::mlx5::commands::MAD_SIZE;

/// Offsets in a MAD (IBA 13.4.3, 14.2.1.1).
const BASE_VERSION: usize = 0;
const CLASS: usize = 1;
const METHOD: usize = 3;
const STATUS: usize = 4;
const ATTRIBUTE: usize = 16;
const MODIFIER: usize = 20;
const DATA: usize = 64;
/// Method: answer.
const GET_RESPONSE: u8 = 0x81;
const GET: u8 = 0x01;
const SET: u8 = 0x02;
/// Status: the attribute is not supported.
const UNSUPPORTED_ATTRIBUTE: u16 = 3 << 2;
/// Status: the method is not supported.
const UNSUPPORTED_METHOD: u16 = 2 << 2;
/// PortInfo's capability mask as it begins: IsSystemImageGUIDSupported.
pub(super) const CAPABILITIES: u32 = 1 << 11;
/// GUIDs in one GUIDInfo, P_Keys in one table.
const GUIDS: usize = 8;
const PKEYS: usize = 32;

/// What the agent knows of its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PortView {
    pub(super) node_guid: u64,
    pub(super) port_guid: u64,
    pub(super) subnet_prefix: u64,
    pub(super) lid: u16,
    pub(super) sm_lid: u16,
    /// IB code: 4 = active.
    pub(super) state: u8,
    pub(super) device_id: u16,
    pub(super) capabilities: u32,
    pub(super) description: &'static str,
}

impl PortView {
    /// The GID of that index; there is one.
    pub(super) fn gid(&self, index: u8) -> Gid {
        if index == 0 {
            Gid::new(self.subnet_prefix, self.port_guid)
        } else {
            Gid::NONE
        }
    }

    /// The P_Key of that index; there is one.
    pub(super) fn pkey(&self, index: u32) -> Pkey {
        if index == 0 { Pkey::DEFAULT } else { Pkey(0) }
    }
}

/// Answers a MAD for the port.
pub(super) fn answer(port: &PortView, request: &[u8; MAD_SIZE]) -> [u8; MAD_SIZE] {
    let mut mad = *request;
    let attribute = u16::from_be_bytes([mad[ATTRIBUTE], mad[ATTRIBUTE + 1]]);
    let modifier = u32::from_be_bytes(mad[MODIFIER..MODIFIER + 4].try_into().expect("four bytes"));
    let status = match mad[METHOD] {
        GET => {
            mad[DATA..DATA + 64].fill(0);
            match fill(port, attribute, modifier, &mut mad[DATA..DATA + 64]) {
                true => 0,
                false => UNSUPPORTED_ATTRIBUTE,
            }
        }
        // What could be set is set by nobody: there is no other subnet manager.
        SET => UNSUPPORTED_ATTRIBUTE,
        _ => UNSUPPORTED_METHOD,
    };
    mad[BASE_VERSION] = 1;
    debug_assert!(CLASS < METHOD);
    mad[METHOD] = GET_RESPONSE;
    mad[STATUS..STATUS + 2].copy_from_slice(&status.to_be_bytes());
    mad
}

/// The attribute's data; false when there is no such attribute.
fn fill(port: &PortView, attribute: u16, modifier: u32, data: &mut [u8]) -> bool {
    let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
    match attribute {
        // NodeDescription (IBA 14.2.5.2).
        0x0010 => {
            let text = port.description.as_bytes();
            put(0, &text[..text.len().min(63)]);
        }
        // NodeInfo (IBA 14.2.5.3).
        0x0011 => {
            put(0, &[1, 1, 1, 1]);
            put(4, &port.node_guid.to_be_bytes());
            put(12, &port.node_guid.to_be_bytes());
            put(20, &port.port_guid.to_be_bytes());
            put(28, &(PKEYS as u16).to_be_bytes());
            put(30, &port.device_id.to_be_bytes());
            put(32, &0u32.to_be_bytes());
            put(
                36,
                &(1u32 << 24 | u32::from(protos::mlx5::pci::VENDOR)).to_be_bytes(),
            );
        }
        // GUIDInfo (IBA 14.2.5.5).
        0x0014 => {
            if modifier == 0 {
                put(0, &port.port_guid.to_be_bytes());
            }
        }
        // PortInfo (IBA 14.2.5.6).
        0x0015 => {
            put(8, &port.subnet_prefix.to_be_bytes());
            put(16, &port.lid.to_be_bytes());
            put(18, &port.sm_lid.to_be_bytes());
            put(20, &port.capabilities.to_be_bytes());
            put(28, &[1]);
            // Width 4x, enabled, supported, active.
            put(29, &[2, 2, 2]);
            // Link speed supported 10 Gb/s; state; physical state LinkUp, polling by default.
            put(32, &[4 << 4 | port.state, 5 << 4 | 2, 0, 4 << 4 | 4]);
            // MTU 4096 active; VL0 only.
            put(36, &[5 << 4, 1 << 4]);
            // MTU capability.
            put(41, &[5]);
            put(50, &[GUIDS as u8, 18, 16]);
        }
        // P_KeyTable (IBA 14.2.5.7).
        0x0016 => {
            if modifier & 0xffff == 0 {
                put(0, &0xffffu16.to_be_bytes());
            }
        }
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> PortView {
        PortView {
            node_guid: 0x0002_c903_0000_0001,
            port_guid: 0x0002_c903_0000_0002,
            subnet_prefix: 0xfe80 << 48,
            lid: 7,
            sm_lid: 1,
            state: 4,
            device_id: 0x1017,
            capabilities: CAPABILITIES,
            description: "tlbridge",
        }
    }

    fn get(attribute: u16, modifier: u32) -> [u8; MAD_SIZE] {
        let mut mad = [0; MAD_SIZE];
        mad[..4].copy_from_slice(&[1, 1, 1, GET]);
        mad[ATTRIBUTE..ATTRIBUTE + 2].copy_from_slice(&attribute.to_be_bytes());
        mad[MODIFIER..MODIFIER + 4].copy_from_slice(&modifier.to_be_bytes());
        answer(&port(), &mad)
    }

    #[test]
    fn test_port_info_when_asked_has_lid_state_and_prefix() {
        let mad = get(0x15, 1);
        assert_eq!(mad[METHOD], GET_RESPONSE);
        assert_eq!(mad[DATA + 8..DATA + 10], [0xfe, 0x80]);
        assert_eq!(mad[DATA + 16..DATA + 20], [0, 7, 0, 1]);
        assert_eq!(mad[DATA + 32] & 0xf, 4);
    }

    #[test]
    fn test_agent_when_asked_for_what_it_has_not_says_so() {
        let mad = get(0x7777, 0);
        assert_eq!(
            u16::from_be_bytes([mad[STATUS], mad[STATUS + 1]]),
            UNSUPPORTED_ATTRIBUTE
        );
        let mut set = [0; MAD_SIZE];
        set[METHOD] = 5;
        let mad = answer(&port(), &set);
        assert_eq!(
            u16::from_be_bytes([mad[STATUS], mad[STATUS + 1]]),
            UNSUPPORTED_METHOD
        );
    }
}
