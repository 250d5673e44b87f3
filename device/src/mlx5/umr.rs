//! User-mode registration: work requests that change memory keys (reference 6).

use std::sync::Arc;

use protos::mlx5::Layout;
use protos::mlx5::mkey::{Mkc, mask};
use protos::mlx5::wqe::{
    Control, Data, UMR_CHECK_FREE, UMR_CHECK_NOT_FREE, UMR_INLINE, UMR_OFFSET, UmrControl,
};
use zerocopy::FromBytes;

use super::mkey::Mkey;

/// Bytes of a translation's unit.
const OCTOWORD: u64 = 16;
/// Where the parts of the WQE begin.
const UMR: usize = size_of::<Control>();
const MKEY: usize = UMR + size_of::<UmrControl>();
const TABLE: usize = MKEY + size_of::<Mkc>();

/// Where new translations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Nowhere.
    None,
    /// The WQE, from this offset on.
    Inline(usize),
    /// Memory.
    Memory { lkey: u32, va: u64 },
}

/// A UMR that was understood.
#[derive(Debug, Clone)]
pub(super) struct Umr {
    /// The key that it changes.
    pub(super) index: u32,
    flags: u8,
    mask: u64,
    context: Mkc,
    /// Where translations come from, how many bytes, and where they go in the table (in bytes).
    pub(super) source: Source,
    pub(super) bytes: usize,
    pub(super) offset: u64,
}

/// Masks that are done.
const KNOWN: u64 = mask::LENGTH
    | mask::PAGE_SIZE
    | mask::START
    | mask::PD
    | mask::REMOTE_INVALIDATE
    | mask::KEY
    | mask::QPN
    | mask::LR
    | mask::LW
    | mask::RR
    | mask::RW
    | mask::A
    | mask::SMALL_FENCE
    | mask::RELAXED_WRITE
    | mask::RELAXED_READ
    | mask::FREE;

impl Umr {
    /// What a WQE says; `None` when it makes no sense.
    pub(super) fn parse(wqe: &[u8]) -> Option<Self> {
        let control = Control::read_from_prefix(wqe).ok()?.0;
        let umr = UmrControl::read_from_prefix(wqe.get(UMR..)?).ok()?.0;
        let context = Mkc::read_from_prefix(wqe.get(MKEY..)?).ok()?.0;
        if umr.mkey_mask.get() & !KNOWN != 0 {
            return None;
        }
        let bytes = usize::from(umr.xlt_octowords.get()) * OCTOWORD as usize;
        let source = if bytes == 0 {
            Source::None
        } else if umr.flags & UMR_INLINE != 0 {
            wqe.get(TABLE..TABLE + bytes)?;
            Source::Inline(TABLE)
        } else {
            let data = Data::read_from_prefix(wqe.get(TABLE..)?).ok()?.0;
            if (data.byte_count.get() as usize) < bytes {
                return None;
            }
            Source::Memory {
                lkey: data.lkey.get(),
                va: data.address.get(),
            }
        };
        let offset = if umr.flags & UMR_OFFSET != 0 {
            u64::from(umr.xlt_offset_47_16.get()) << 16 | u64::from(umr.xlt_offset.get())
        } else {
            0
        };
        Some(Self {
            index: control.imm.get() >> 8,
            flags: umr.flags,
            mask: umr.mkey_mask.get(),
            context,
            source,
            bytes,
            offset: offset * OCTOWORD,
        })
    }

    /// Whether a queue pair of that PD may do it to that key. The driver's own queue pair for registrations may move keys
    /// between PDs; any other one stays inside its own.
    pub(super) fn is_allowed(&self, mkey: &Mkey, pd: u32, registers: bool) -> bool {
        let free = mkey.context.is_set(Mkc::FREE);
        let state =
            (self.flags & UMR_CHECK_NOT_FREE == 0 || !free) && (self.flags & UMR_CHECK_FREE == 0 || free);
        let own = mkey.context.get(Mkc::PD) == pd;
        let stays = self.mask & mask::PD == 0 || self.context.get(Mkc::PD) == pd;
        mkey.context.is_set(Mkc::UMR_ENABLE) && state && (registers || own && stays)
    }

    /// The key's context afterwards; `None` when it stays.
    pub(super) fn changed(&self, before: &Mkc) -> Option<Mkc> {
        if self.mask == 0 {
            return None;
        }
        let mut after = before.clone();
        let has = |bit: u64| self.mask & bit != 0;
        for (bit, field) in [
            (mask::PAGE_SIZE, Mkc::LOG_PAGE_SIZE),
            (mask::PD, Mkc::PD),
            (mask::REMOTE_INVALIDATE, Mkc::REMOTE_INVALIDATE),
            (mask::KEY, Mkc::KEY),
            (mask::QPN, Mkc::QPN),
            (mask::LR, Mkc::LOCAL_READ),
            (mask::LW, Mkc::LOCAL_WRITE),
            (mask::RR, Mkc::REMOTE_READ),
            (mask::RW, Mkc::REMOTE_WRITE),
            (mask::A, Mkc::ATOMIC),
            (mask::FREE, Mkc::FREE),
        ] {
            if has(bit) {
                after.set(field, self.context.get(field));
            }
        }
        if has(mask::LENGTH) {
            after.set_wide(Mkc::LENGTH, self.context.wide(Mkc::LENGTH));
            after.set(Mkc::LENGTH64, self.context.get(Mkc::LENGTH64));
        }
        if has(mask::START) {
            after.set_wide(Mkc::START, self.context.wide(Mkc::START));
        }
        Some(after)
    }
}

/// A key that is free from now on, as SEND with invalidate makes it.
pub(super) fn invalidated(mkey: &Arc<Mkey>) -> Mkc {
    mkey.context.clone().with(Mkc::FREE, 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protos::mlx5::wqe::Opcode;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;

    fn wqe(flags: u8, octowords: u16, mkey_mask: u64, context: &Mkc) -> Vec<u8> {
        let mut control = Control::new(Opcode::UMR, 0, 1, 8);
        control.imm = 0x1234_5600.into();
        let mut umr = UmrControl::new_zeroed();
        umr.flags = flags;
        umr.xlt_octowords = octowords.into();
        umr.mkey_mask = mkey_mask.into();
        [control.as_bytes(), umr.as_bytes(), &context.0].concat()
    }

    #[test]
    fn test_umr_when_it_names_a_table_that_is_not_there_is_refused() {
        let context = Mkc::zeroed();
        assert!(Umr::parse(&wqe(UMR_INLINE, 0, 0, &context)).is_some());
        assert!(Umr::parse(&wqe(UMR_INLINE, 4, 0, &context)).is_none());
        assert!(Umr::parse(&wqe(0, 4, 0, &context)).is_none());
        assert!(Umr::parse(&wqe(0, 0, 1 << 63, &context)).is_none());
    }

    #[test]
    fn test_umr_when_masked_changes_what_the_mask_names() {
        let given = Mkc::zeroed()
            .with(Mkc::PD, 7)
            .with(Mkc::REMOTE_WRITE, 1)
            .with(Mkc::LOCAL_WRITE, 1)
            .with_wide(Mkc::START, 0x1000);
        let umr = Umr::parse(&wqe(UMR_INLINE, 0, mask::PD | mask::RW | mask::FREE, &given)).unwrap();
        assert_eq!(umr.index, 0x12_3456);
        let before = Mkc::zeroed().with(Mkc::FREE, 1).with(Mkc::LOCAL_READ, 1);
        let after = umr.changed(&before).unwrap();
        assert_eq!(
            after,
            Mkc::zeroed()
                .with(Mkc::LOCAL_READ, 1)
                .with(Mkc::PD, 7)
                .with(Mkc::REMOTE_WRITE, 1)
        );
    }

    proptest! {
        #[test]
        fn test_umrs_when_of_any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..1008)) {
            let _ = Umr::parse(&bytes);
        }
    }
}
