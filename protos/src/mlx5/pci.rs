//! How the HCA appears as a PCI function (reference 3).

/// Mellanox.
pub const VENDOR: u16 = 0x15b3;
/// ConnectX-5, physical function.
pub const DEVICE_PF: u16 = 0x1017;
/// ConnectX-5, virtual function.
pub const DEVICE_VF: u16 = 0x1018;
/// InfiniBand controller.
pub const CLASS: u32 = 0x02_0700;
/// The only BAR: 64-bit, prefetchable.
pub const BAR: usize = 0;
/// Its size.
pub const BAR_SIZE: u64 = 8 << 20;
/// Bytes of a UAR page; UAR n is at n times this.
pub const UAR_SIZE: u64 = 4096;
/// Pages below this one are the init segment and MSI-X.
pub const FIRST_UAR: u32 = 16;
/// UAR pages that can be handed out end here.
pub const END_UAR: u32 = (BAR_SIZE / UAR_SIZE) as u32;
/// MSI-X vectors: 0 for asynchronous events, the others for completions.
pub const VECTORS: u16 = 64;
/// MSI-X table.
pub const MSIX_TABLE_OFFSET: u64 = 0x8000;
/// MSI-X pending bits.
pub const MSIX_PBA_OFFSET: u64 = 0x9000;
