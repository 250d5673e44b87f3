//! The init segment (reference 3; `struct mlx5_init_seg`): offsets in BAR0 of big-endian 32-bit words.

/// Firmware revision: minor in the upper half, major in the lower.
pub const FW_REV: u64 = 0x0;
/// Revision of the command interface in the upper half (5), firmware sub-minor in the lower.
pub const CMDIF_REV_FW_SUB: u64 = 0x4;
/// The command interface that the driver knows.
pub const CMDIF_REV: u32 = 5;
/// Address of the command queue, upper half.
pub const CMDQ_ADDR_H: u64 = 0x10;
/// Address of the command queue, lower half. Reads give the queue's dimensions ([`CMDQ_DIMENSIONS`]); bits 9:8 written
/// are the state of the NIC interface.
pub const CMDQ_ADDR_L_SZ: u64 = 0x14;
/// Logarithm of the entries in bits 7:4, of an entry's bytes in bits 3:0.
pub const CMDQ_DIMENSIONS: u32 = 5 << 4 | 6;
/// Bits 9:8 of [`CMDQ_ADDR_L_SZ`]: what the driver wants the interface to be; 0 = full driver.
pub const NIC_INTERFACE_SHIFT: u32 = 8;
/// Command doorbell: a bit for each entry.
pub const CMD_DOORBELL: u64 = 0x18;
/// Bit 31: the device initialises.
pub const INITIALIZING: u64 = 0x1fc;
/// Health buffer, 64 bytes: all zero = healthy.
pub const HEALTH: u64 = 0x200;
/// Firmware version in the health buffer.
pub const HEALTH_FW_VER: u64 = 0x230;
/// Milliseconds that a command may take; 0 = the driver's defaults.
pub const CMD_EXEC_TO: u64 = 0xff8;
/// Free-running timer, upper half.
pub const TIMER_H: u64 = 0x1000;
/// Free-running timer, lower half.
pub const TIMER_L: u64 = 0x1004;
/// Changes while the device is alive.
pub const HEALTH_COUNTER: u64 = 0x1010;
/// The segment ends here.
pub const END: u64 = 0x4000;
/// Ticks of the timer in a second, in kHz (`device_frequency_khz`).
pub const TIMER_KHZ: u32 = 1_000_000;
