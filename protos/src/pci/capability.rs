//! Capabilities: ids, layouts and bits. Each starts with its id (1 byte) and the offset of the next one.

/// Power management (PM 1.2 section 3.2).
pub const ID_PM: u8 = 0x01;
/// PCI Express (section 7.5.3).
pub const ID_EXPRESS: u8 = 0x10;
/// MSI-X (PCI 3.0 section 6.8.2).
pub const ID_MSIX: u8 = 0x11;

/// Bytes of the power management capability.
pub const PM_SIZE: usize = 8;
/// Power management capabilities, 2 bytes: version in bits 0 to 2.
pub const PM_PMC: usize = 2;
/// Version 1.2 of the power management specification.
pub const PM_PMC_VERSION_1_2: u16 = 3;
/// Power management control and status, 2 bytes.
pub const PM_CTRL: usize = 4;
/// Power state: 0 = D0, 3 = D3hot.
pub const PM_CTRL_STATE_MASK: u16 = 3;
/// D3hot to D0 keeps the function's state.
pub const PM_CTRL_NO_SOFT_RESET: u16 = 1 << 3;

/// Bytes of the PCI Express capability, version 2.
pub const EXPRESS_SIZE: usize = 0x3c;
/// Flags, 2 bytes: version in bits 0 to 3, port type in bits 4 to 7 (0 = endpoint).
pub const EXPRESS_FLAGS: usize = 2;
/// Version 2.
pub const EXPRESS_FLAGS_VERSION_2: u16 = 2;
/// Device capabilities, 4 bytes.
pub const EXPRESS_DEVCAP: usize = 4;
/// Role-based error reporting: set by everything since 1.1.
pub const EXPRESS_DEVCAP_RBER: u32 = 1 << 15;
/// Function level reset.
pub const EXPRESS_DEVCAP_FLR: u32 = 1 << 28;
/// Device control, 2 bytes.
pub const EXPRESS_DEVCTL: usize = 8;
/// Writing 1 resets the function; reads as 0.
pub const EXPRESS_DEVCTL_FLR: u16 = 1 << 15;
/// Link capabilities, 4 bytes: speed in bits 0 to 3, width in bits 4 to 9.
pub const EXPRESS_LNKCAP: usize = 0x0c;
/// Link control, 2 bytes.
pub const EXPRESS_LNKCTL: usize = 0x10;
/// Link status, 2 bytes: as the link capabilities.
pub const EXPRESS_LNKSTA: usize = 0x12;
/// Device control 2, 2 bytes.
pub const EXPRESS_DEVCTL2: usize = 0x28;
