//! Queue pairs by number.

use protos::ib::Qpn;

use super::qp::Qp;

const PAGE: usize = 1 << 12;

/// Numbers to places in two steps of an array, whatever their number; places are used again.
#[derive(Debug, Default)]
pub(super) struct Table {
    pages: Vec<Option<Box<[u32]>>>,
    slots: Vec<Option<Box<Qp>>>,
    free: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Table {
    pub(super) fn slot(&self, qpn: Qpn) -> Option<u32> {
        let number = qpn.get() as usize;
        let slot = self.pages.get(number / PAGE)?.as_ref()?[number % PAGE];
        (slot != NONE).then_some(slot)
    }

    pub(super) fn get(&mut self, slot: u32) -> Option<&mut Qp> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }

    pub(super) fn by_number(&self, qpn: Qpn) -> Option<&Qp> {
        self.slots[self.slot(qpn)? as usize].as_deref()
    }

    /// How many places there are, free ones too.
    pub(super) fn places(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Qp> {
        self.slots.iter().filter_map(|slot| slot.as_deref())
    }

    pub(super) fn insert(&mut self, mut qp: Qp) -> u32 {
        let number = qp.id.qpn.get() as usize;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        qp.slot = slot;
        self.slots[slot as usize] = Some(Box::new(qp));
        if self.pages.len() <= number / PAGE {
            self.pages.resize_with(number / PAGE + 1, || None);
        }
        self.pages[number / PAGE].get_or_insert_with(|| vec![NONE; PAGE].into())[number % PAGE] = slot;
        slot
    }

    pub(super) fn remove(&mut self, qpn: Qpn) -> Option<Box<Qp>> {
        let slot = self.slot(qpn)?;
        let number = qpn.get() as usize;
        if let Some(page) = &mut self.pages[number / PAGE] {
            page[number % PAGE] = NONE;
        }
        self.free.push(slot);
        self.slots[slot as usize].take()
    }
}
