//! Memory keys: who may access what, and where that is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use protos::mlx5::Layout;
use protos::mlx5::mkey::{ANY_QP, AccessMode, Klm, MTT_ADDRESS, MTT_READ, MTT_WRITE, Mkc};

use zerocopy::{FromBytes, FromZeros};

use super::numbers::Numbers;
use crate::atc::{Atc, Purge, SpaceId};

/// The key of nothing: it is in no table.
pub(super) const NULL_MKEY: u32 = 2 << 8;
/// Below are reserved indexes: 1 ends receive lists, 2 is [`NULL_MKEY`].
const FIRST: u32 = 0x10;
/// Logarithms of the pages of keys. (Keys whose every access is to fault have one page of 2 EiB.)
const PAGES: std::ops::RangeInclusive<u32> = 12..=61;
/// Translations that all keys of an HCA have together: 512 GiB of 4 KiB pages.
const MAX_TRANSLATIONS: u64 = 1 << 27;

/// What is asked of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Right {
    /// A local segment that is read.
    LocalRead,
    /// A local segment that is written.
    LocalWrite,
    /// RDMA read.
    RemoteRead,
    /// RDMA write.
    RemoteWrite,
    /// Atomic.
    Atomic,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asker {
    pub(super) pd: u32,
    pub(super) qpn: u32,
}

/// Translations.
#[derive(Debug)]
pub(super) enum Table {
    /// IOVAs are addresses.
    Physical,
    /// Pages, with [`MTT_READ`] and [`MTT_WRITE`] saying what is present.
    Pages(Vec<u64>),
    /// Pieces of other keys; `fixed`: all of one page's size.
    Keys { pieces: Vec<Klm>, fixed: bool },
}

impl Table {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Physical => 0,
            Self::Pages(pages) => pages.len() as u64,
            Self::Keys { pieces, .. } => pieces.len() as u64,
        }
    }
}

/// A memory key. What it allows never changes: a changed key is another `Mkey` under the same index, with an
/// address space of its own in the ATC, so that nobody who checked the old rights can hit a new translation.
#[derive(Debug)]
pub(super) struct Mkey {
    pub(super) index: u32,
    /// In the ATC.
    pub(super) space: SpaceId,
    pub(super) context: Mkc,
    start: u64,
    /// `None`: all addresses.
    len: Option<u64>,
    /// Logarithm of a page's bytes.
    pub(super) page: u32,
    table: Arc<RwLock<Table>>,
}

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// At this IOVA, and `left` bytes of its page follow.
    Memory { iova: u64, left: u64, writable: bool },
    /// In another key, for so many bytes.
    Key { key: u32, va: u64, left: u64 },
    /// Nowhere, at present.
    Absent,
    /// Beyond the table.
    Outside,
}

impl Mkey {
    /// Whether `key` (all 32 bits) names it.
    fn is_named(&self, key: u32) -> bool {
        self.context.get(Mkc::KEY) == key & 0xff && !self.context.is_set(Mkc::FREE)
    }

    /// All 32 bits of it.
    pub(super) fn key(&self) -> u32 {
        self.index << 8 | self.context.get(Mkc::KEY)
    }

    /// Whether that may be done to `len` bytes at `va`.
    pub(super) fn allows(&self, asker: Asker, va: u64, len: u64, right: Right) -> bool {
        let field = match right {
            Right::LocalRead => Mkc::LOCAL_READ,
            Right::LocalWrite => Mkc::LOCAL_WRITE,
            Right::RemoteRead => Mkc::REMOTE_READ,
            Right::RemoteWrite => Mkc::REMOTE_WRITE,
            Right::Atomic => Mkc::ATOMIC,
        };
        let qpn = self.context.get(Mkc::QPN);
        self.context.is_set(field)
            && self.context.get(Mkc::PD) == asker.pd
            && (qpn == ANY_QP || qpn == asker.qpn)
            && self.covers(va, len)
    }

    /// Whether all of these addresses are its own.
    pub(super) fn covers(&self, va: u64, len: u64) -> bool {
        match self.len {
            None => va.checked_add(len).is_some(),
            Some(own) => va
                .checked_sub(self.start)
                .and_then(|offset| offset.checked_add(len))
                .is_some_and(|end| end <= own),
        }
    }

    /// Where `va` is, which it covers.
    pub(super) fn place(&self, va: u64) -> Place {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        match &*table {
            Table::Physical => Place::Memory {
                iova: va,
                left: (1 << self.page) - (va & ((1 << self.page) - 1)),
                writable: true,
            },
            Table::Pages(pages) => {
                let first = self.start >> self.page;
                let Some(index) = (va >> self.page).checked_sub(first) else {
                    return Place::Outside;
                };
                let Some(&entry) = usize::try_from(index).ok().and_then(|index| pages.get(index)) else {
                    return Place::Outside;
                };
                if entry & (MTT_READ | MTT_WRITE) == 0 {
                    return Place::Absent;
                }
                let within = va & ((1 << self.page) - 1);
                Place::Memory {
                    iova: (entry & MTT_ADDRESS).wrapping_add(within),
                    left: (1 << self.page) - within,
                    writable: entry & MTT_WRITE != 0,
                }
            }
            Table::Keys { pieces, fixed: true } => {
                let first = self.start >> self.page;
                let index = (va >> self.page).checked_sub(first);
                let piece = index
                    .and_then(|index| usize::try_from(index).ok())
                    .and_then(|index| pieces.get(index));
                let Some(piece) = piece else {
                    return Place::Outside;
                };
                let within = va & ((1 << self.page) - 1);
                Place::Key {
                    key: piece.key.get(),
                    va: piece.va.get().wrapping_add(within),
                    left: (1 << self.page) - within,
                }
            }
            Table::Keys { pieces, fixed: false } => {
                let Some(mut offset) = va.checked_sub(self.start) else {
                    return Place::Outside;
                };
                for piece in pieces {
                    let len = u64::from(piece.byte_count.get());
                    if offset < len {
                        return Place::Key {
                            key: piece.key.get(),
                            va: piece.va.get().wrapping_add(offset),
                            left: len - offset,
                        };
                    }
                    offset -= len;
                }
                Place::Outside
            }
        }
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        serde_json::json!({
            "key": format!("{:#x}", self.key()), "mode": format!("{:?}", self.context.mode()), "start": self.start,
            "bytes": self.len, "pd": self.context.get(Mkc::PD), "page_bytes": 1u64 << self.page,
            "translations": table.len(), "free": self.context.is_set(Mkc::FREE),
        })
    }
}

/// Why a key cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Its context makes no sense.
    Parameter,
    /// Its translations are shorter than said.
    TooShort,
    /// Too many keys, or translations.
    Limit,
    /// No such key.
    Unknown,
}

/// All keys of an HCA.
#[derive(Debug)]
pub(super) struct Mkeys {
    table: RwLock<HashMap<u32, Arc<Mkey>>>,
    numbers: Mutex<Numbers>,
    /// The ATC's address spaces: one more with each key and with each change of one.
    spaces: AtomicU64,
    translations: AtomicU64,
}

impl Mkeys {
    /// None; `log` is the logarithm of how many there can be.
    pub(super) fn new(log: u32) -> Self {
        Self {
            table: RwLock::new(HashMap::new()),
            numbers: Mutex::new(Numbers::new(FIRST, 1 << log)),
            spaces: AtomicU64::new(1),
            translations: AtomicU64::new(0),
        }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No keys. The ATC is purged by the caller.
    pub(super) fn clear(&self) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.numbers().clear();
        self.translations.store(0, Ordering::SeqCst);
    }

    /// The key of that index, whatever its lowest byte is and even if it is free.
    pub(super) fn at(&self, index: u32) -> Option<Arc<Mkey>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(&index).cloned()
    }

    /// The key that can be used under these 32 bits.
    pub(super) fn find(&self, key: u32) -> Option<Arc<Mkey>> {
        self.at(key >> 8).filter(|mkey| mkey.is_named(key))
    }

    /// Whether that is still what its index means.
    pub(super) fn is_current(&self, mkey: &Arc<Mkey>) -> bool {
        self.at(mkey.index).is_some_and(|now| Arc::ptr_eq(&now, mkey))
    }

    fn space(&self) -> SpaceId {
        SpaceId(self.spaces.fetch_add(1, Ordering::Relaxed))
    }

    fn charge(&self, translations: u64) -> Result<(), Refused> {
        let before = self.translations.fetch_add(translations, Ordering::SeqCst);
        if before.saturating_add(translations) > MAX_TRANSLATIONS {
            self.translations.fetch_sub(translations, Ordering::SeqCst);
            return Err(Refused::Limit);
        }
        Ok(())
    }

    /// CREATE_MKEY: `given` translations in `bytes`. The index.
    pub(super) fn create(
        &self,
        context: &Mkc,
        pg_access: bool,
        given: u32,
        bytes: &[u8],
    ) -> Result<u32, Refused> {
        let page = page(context)?;
        let given = bytes.get(..given as usize * 16).ok_or(Refused::TooShort)?;
        let table = match context.mode() {
            AccessMode::PA => Table::Physical,
            AccessMode::MTT => {
                let present = if pg_access { 0 } else { MTT_READ | MTT_WRITE };
                Table::Pages(
                    given
                        .as_chunks::<8>()
                        .0
                        .iter()
                        .map(|entry| u64::from_be_bytes(*entry) | present)
                        .collect(),
                )
            }
            mode @ (AccessMode::KLM | AccessMode::KSM) => Table::Keys {
                pieces: pieces(given),
                fixed: mode == AccessMode::KSM,
            },
            _ => return Err(Refused::Parameter),
        };
        self.charge(table.len())?;
        let Some(index) = self.numbers().take() else {
            self.translations.fetch_sub(table.len(), Ordering::SeqCst);
            return Err(Refused::Limit);
        };
        let mkey = self.make(index, context.clone(), page, Arc::new(RwLock::new(table)));
        self.insert(mkey);
        Ok(index)
    }

    fn make(&self, index: u32, context: Mkc, page: u32, table: Arc<RwLock<Table>>) -> Arc<Mkey> {
        Arc::new(Mkey {
            index,
            space: self.space(),
            start: context.wide(Mkc::START),
            len: (!context.is_set(Mkc::LENGTH64)).then(|| context.wide(Mkc::LENGTH)),
            context,
            page,
            table,
        })
    }

    fn insert(&self, mkey: Arc<Mkey>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(mkey.index, mkey);
    }

    /// Another context, other translations from byte `offset` of the table on, or both. When this returns nobody uses
    /// what was before.
    pub(super) fn change(
        &self,
        atc: &Atc,
        mkey: &Arc<Mkey>,
        context: Option<Mkc>,
        offset: u64,
        translations: &[u8],
    ) -> Result<(), Refused> {
        let new = match context {
            Some(context) => {
                let page = page(&context)?;
                Some(self.make(mkey.index, context, page, Arc::clone(&mkey.table)))
            }
            None => None,
        };
        self.translate(mkey, offset, translations)?;
        if let Some(new) = new {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            match table.get(&mkey.index) {
                Some(now) if Arc::ptr_eq(now, mkey) => table.insert(mkey.index, new),
                // Destroyed, or changed by somebody else at the same time.
                _ => return Err(Refused::Unknown),
            };
        }
        // Whoever looked a translation up before has an open ticket, which this refuses, or an entry, which this clears.
        atc.purge(Purge::Space(mkey.space));
        Ok(())
    }

    fn translate(&self, mkey: &Mkey, offset: u64, translations: &[u8]) -> Result<(), Refused> {
        if translations.is_empty() {
            return Ok(());
        }
        // Lists are padded: what is beyond the key's room is dropped.
        let room = u64::from(mkey.context.get(Mkc::TRANSLATIONS)) * 16;
        let bytes = usize::try_from(room.saturating_sub(offset))
            .map_or(translations, |room| &translations[..translations.len().min(room)]);
        let mut table = mkey.table.write().unwrap_or_else(PoisonError::into_inner);
        let unit = match &*table {
            Table::Physical => return Err(Refused::Parameter),
            Table::Pages(_) => 8,
            Table::Keys { .. } => 16,
        };
        if bytes.is_empty() {
            return Ok(());
        }
        let first = usize::try_from(offset / unit).map_err(|_| Refused::Parameter)?;
        let end = first + bytes.len() / unit as usize;
        let grown = (end as u64).saturating_sub(table.len());
        self.charge(grown)?;
        match &mut *table {
            Table::Physical => unreachable!("refused above"),
            Table::Pages(pages) => {
                if pages.len() < end {
                    pages.resize(end, 0);
                }
                for (page, entry) in pages[first..end].iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *page = u64::from_be_bytes(*entry);
                }
            }
            Table::Keys { pieces: own, .. } => {
                let new = pieces(bytes);
                if own.len() < end {
                    own.resize(end, Klm::new_zeroed());
                }
                own[first..end].copy_from_slice(&new);
            }
        }
        Ok(())
    }

    /// DESTROY_MKEY: when this returns nobody accesses memory through it.
    pub(super) fn destroy(&self, atc: &Atc, index: u32) -> Result<(), Refused> {
        let removed = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.remove(&index).ok_or(Refused::Unknown)?
        };
        atc.purge(Purge::Space(removed.space));
        let len = removed.table.read().unwrap_or_else(PoisonError::into_inner).len();
        self.translations.fetch_sub(len, Ordering::SeqCst);
        self.numbers().give_back(index);
        Ok(())
    }

    pub(super) fn count(&self) -> usize {
        self.numbers().len()
    }

    pub(super) fn describe(&self, max: usize) -> Vec<serde_json::Value> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.values().take(max).map(|mkey| mkey.describe()).collect()
    }
}

/// Logarithm of the bytes of a page of a key with that context.
fn page(context: &Mkc) -> Result<u32, Refused> {
    let page = context.get(Mkc::LOG_PAGE_SIZE);
    match context.mode() {
        // One that never ends, whatever the context says; the ATC enters what is mapped.
        AccessMode::PA => Ok(*PAGES.end()),
        // (A free key is used by nobody, and gets its page size when it is not free any more.)
        AccessMode::MTT | AccessMode::KSM if !context.is_set(Mkc::FREE) && !PAGES.contains(&page) => {
            Err(Refused::Parameter)
        }
        _ => Ok(page),
    }
}

/// A table of pieces of keys.
fn pieces(bytes: &[u8]) -> Vec<Klm> {
    bytes
        .as_chunks::<16>()
        .0
        .iter()
        .map(|piece| Klm::read_from_bytes(piece).expect("sixteen bytes"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_translations_when_all_are_beyond_the_room_of_the_key_add_nothing() {
        let mkeys = Mkeys::new(10);
        for mode in [AccessMode::KLM, AccessMode::MTT] {
            let context = Mkc::zeroed()
                .with(Mkc::MODE_LOW, u32::from(mode.0))
                .with(Mkc::LOG_PAGE_SIZE, 12)
                .with(Mkc::TRANSLATIONS, 4);
            let index = mkeys.create(&context, true, 4, &[1; 64]).unwrap();
            let mkey = mkeys.at(index).unwrap();
            let len = || mkey.table.read().unwrap().len();
            let before = (len(), mkeys.translations.load(Ordering::SeqCst));
            for offset in [64, 1 << 20, 1 << 40] {
                mkeys.translate(&mkey, offset, &[2; 64]).unwrap();
            }
            assert_eq!(
                (len(), mkeys.translations.load(Ordering::SeqCst)),
                before,
                "{mode:?}"
            );
            // Of what is partly beyond it the rest is dropped.
            mkeys.translate(&mkey, 32, &[2; 64]).unwrap();
            assert_eq!(len(), before.0, "{mode:?}");
        }
    }
}
