//! How a start in mapped memory reaches the device: what software writes where (our binding; the real device saw
//! a command when its cache line left the processor, section 1.2).
//!
//! # The three modes
//! [`pci::STATUS_MODE`](super::pci::STATUS_MODE) says which one the device is in, as [`Mode`]:
//!
//! | | can be mapped | after a start in mapped memory |
//! |---|---|---|
//! | [`Mode::TRAP`] | nothing | nothing: each store is seen by itself |
//! | [`Mode::BELL`] | CB, DS, GSEG status page, TFM, TGH, BAR0 status page | ring, always |
//! | [`Mode::POLL`] | the same | fence; ring if `awake` reads 0 |
//!
//! CCH and CBE are trapped in all modes, and TFH unless the device was started with its pages mappable: the kernel
//! driver starts a TFH by OR into a status of EXCEPTION, which in plain memory gives 3 instead of ACTIVE (section
//! 17.1). A store to a trapped page needs no ring, in any mode.
//!
//! One rule is right in all modes: *after the store that sets cmd or icmd: full fence; read `awake`; if it is 0,
//! ring.* In trap mode `awake` reads 1, in bell mode 0. It is not fast in trap mode, where that read is a message:
//! look at the mode once, and leave the rule out.
//!
//! # Two places to ring, two to read `awake`
//! * Kernel: ring by a 4-byte store to BAR0 + [`DOORBELL_OFFSET`](super::pci::DOORBELL_OFFSET); `awake` is the u32
//!   at BAR0 + [`STATUS_OFFSET`](super::pci::STATUS_OFFSET) + [`STATUS_AWAKE`](super::pci::STATUS_AWAKE).
//! * User, who has mapped only the 256 KiB of a GSEG: ring by a 4-byte store to GSEG +
//!   [`GSEG_BELL`](super::map::GSEG_BELL); `awake` is the u32 at GSEG + [`GSEG_STATUS`](super::map::GSEG_STATUS).
//!   Kernel contexts may use these as well.
//!
//! The value does not matter, nor does the width; a ring without a start is harmless. An engine looks at every
//! handle and control block after a ring, so one ring stands for any number of starts before it.
//!
//! # For a kernel driver whose cache-flush hook is ours
//! The hook gets the address of the line that is flushed; with `offset` inside the chiplet:
//!
//! * `offset < TFM` (a control block) or `TGH <= offset < CBE`: ring as above (`mfence` first).
//! * everything else (TFM, CBE, TFH, CCH): nothing.
//! * In [`Mode::POLL`], for a TGH and `awake` not 0: ring all the same if its command still stands after a while (20 us).
//!   An engine that is awake may be without a processor, and who flushes spins with a lock held. The ring has the
//!   TGH executed by whoever takes it.
//!
//! The hook is called for flushes before a read too; those rings are superfluous, and harmless. User programs have
//! no hook: they ring themselves after they have stored DW0 of a control block.

use super::open_enum;

open_enum! {
    /// Value of [`STATUS_MODE`](super::pci::STATUS_MODE) and [`GSEG_STATUS_MODE`](super::map::GSEG_STATUS_MODE).
    Mode {
        /// Every access is trapped.
        TRAP = 0,
        /// Mapped; nothing polls: each start needs a ring.
        BELL = 1,
        /// Mapped; engines poll while there is work and sleep otherwise.
        POLL = 2,
    }
}
