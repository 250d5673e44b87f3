//! How the GRU appears as a PCI function (our binding: the real device sat on the processor's own
//! interconnect).

/// SGI.
pub const VENDOR: u16 = 0x10a9;
/// "GR".
pub const DEVICE: u16 = 0x4752;
/// Processing accelerator.
pub const CLASS: u32 = 0x12_0000;
/// BAR with doorbells, status page and MSI-X.
pub const BAR_DOORBELL: usize = 0;
/// Its size.
pub const BAR_DOORBELL_SIZE: u64 = 0x1_0000;
/// BAR with the chiplets.
pub const BAR_CHIPLETS: usize = 2;
/// Its size.
pub const BAR_CHIPLETS_SIZE: u64 = super::map::CHIPLET_SIZE * super::map::CHIPLETS as u64;
/// MSI-X vectors: chiplet * 16 + TFM.
pub const VECTORS: u16 = 32;

/// Doorbell page in BAR0: any write tells the device to look at mapped memory. The same as the
/// function's ioeventfd at this offset. When to ring: [`super::doorbell`].
pub const DOORBELL_OFFSET: u64 = 0x0000;
/// Status page in BAR0: written by the device only.
pub const STATUS_OFFSET: u64 = 0x1000;
/// u32: engines that are awake, as far as software has to know. 0: a store that starts something must be followed
/// by a ring (always 0 in bell mode, always 1 in trap mode).
pub const STATUS_AWAKE: u64 = 0x0;
/// u32: completed resets (by request, or after the client was gone). When it has changed, nothing of the
/// time before is cached or running any more.
pub const STATUS_RESETS: u64 = 0x4;
/// u64: [`STATUS_MAGIC_VALUE`].
pub const STATUS_MAGIC: u64 = 0x8;
/// u32: resets begun; raised before anything is cleared. Software that has read something from a control block
/// or a data segment and finds this unchanged afterwards has read it from before any reset.
pub const STATUS_RESETS_BEGUN: u64 = 0x10;
/// u32: a [`super::doorbell::Mode`].
pub const STATUS_MODE: u64 = 0x14;
/// "tlbgrust" as a little-endian word.
pub const STATUS_MAGIC_VALUE: u64 = u64::from_le_bytes(*b"tlbgrust");
/// u64 in BAR0, trapped: IOVA of the log of changes ([`crate::bridge::changes`]). A device that does not look into one
/// reads as 0; one that waits for an address, as [`CHANGE_LOG_WANTED`], also after a reset.
pub const CHANGE_LOG_OFFSET: u64 = 0x2000;
/// No log has been named.
pub const CHANGE_LOG_WANTED: u64 = u64::MAX;
/// MSI-X table in BAR0.
pub const MSIX_TABLE_OFFSET: u64 = 0x8000;
/// MSI-X pending bits in BAR0.
pub const MSIX_PBA_OFFSET: u64 = 0x9000;
