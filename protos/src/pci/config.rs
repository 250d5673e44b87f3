//! The type 0 header: offsets and bits (PCI 3.0 section 6.1 and 6.2).

/// Vendor id, 2 bytes.
pub const VENDOR_ID: usize = 0x00;
/// Device id, 2 bytes.
pub const DEVICE_ID: usize = 0x02;
/// Command, 2 bytes.
pub const COMMAND: usize = 0x04;
/// Status, 2 bytes.
pub const STATUS: usize = 0x06;
/// Revision, 1 byte.
pub const REVISION_ID: usize = 0x08;
/// Class code, 3 bytes.
pub const CLASS_PROG: usize = 0x09;
/// Cache line size, 1 byte.
pub const CACHE_LINE_SIZE: usize = 0x0c;
/// Header type, 1 byte.
pub const HEADER_TYPE: usize = 0x0e;
/// First BAR, 4 bytes each.
pub const BASE_ADDRESS_0: usize = 0x10;
/// Subsystem vendor id, 2 bytes.
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Subsystem id, 2 bytes.
pub const SUBSYSTEM_ID: usize = 0x2e;
/// First capability, 1 byte.
pub const CAPABILITY_LIST: usize = 0x34;
/// Interrupt line, 1 byte.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Interrupt pin, 1 byte: 0 none, 1 INTA.
pub const INTERRUPT_PIN: usize = 0x3d;

/// Command: memory space is decoded.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: report parity errors.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: SERR# enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: INTx is pending.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a capability list.
pub const STATUS_CAP_LIST: u16 = 1 << 4;
