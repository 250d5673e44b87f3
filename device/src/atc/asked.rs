//! Accesses to memory that has no file: the client is asked, which takes as long as the client likes.
//!
//! No guard and no epoch covers such an access: a purge that drained it would wait for the client, and the thread
//! that brings the client's answer may be the one that purges. Instead it is on a list, under the same lock as
//! entries and purges. A purge that meets it takes its translation away at once: what a read still brings is thrown
//! away, a write that was not sent is not sent. Only a write that *was* sent is waited for, as it happens sooner or
//! later, and then must have happened before the purge returns. (Not where the memory itself goes away: the client
//! has taken the address back and refuses what comes for it. And that purge may run on the very thread that brings the
//! answer.)

use super::core::Core;
use super::defect::Initiator;
use super::reach::{Reach, Span};
use super::shadow::Seen;
use super::slot::Entry;
use super::types::{Access, Miss};

/// One access, of one engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    space: u64,
    va: Span,
    target: Span,
    /// A purge has met it.
    pub(super) purged: bool,
    /// A request to write has been sent.
    pub(super) committed: bool,
}

impl Asked {
    /// Take the translation away if `reach` meets it. Whether it does, and whether a write is on its way.
    pub(super) fn purge(&mut self, reach: Reach) -> Option<bool> {
        let meets = reach.meets(self.space, self.va, self.target);
        self.purged |= meets;
        meets.then_some(self.committed)
    }

    /// A purge of `reach` has to wait for it.
    pub(super) fn holds_up(&self, reach: Reach) -> bool {
        self.purged && self.committed && reach.meets(self.space, self.va, self.target)
    }
}

/// What is found when an access is put on the list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listed {
    pub(super) iova: u64,
    pub(super) tag: u64,
}

impl Core {
    /// Put an access of at most `len` bytes on the list. `None`: the memory there is mapped by now.
    pub(super) fn ask(
        &self,
        engine: usize,
        space: u64,
        (va, len): (u64, u64),
        access: Access,
        by: Initiator,
    ) -> Result<Option<(Listed, u64)>, Miss> {
        let result = self.with_state(|state| {
            let entry = self.entry_of(state, space, va).ok_or(Miss::NoEntry)?;
            if access == Access::Write && !entry.writable {
                return Err(Miss::ReadOnly);
            }
            if !entry.is_by_message() {
                return Ok(None);
            }
            let offset = va - entry.va;
            let page_left = (1u64 << entry.shift) - offset;
            let len = len.min(page_left).max(1);
            let iova = entry.iova + offset;
            let span = |first: u64| Span {
                first,
                last: first + (len - 1),
            };
            let before = state.asked[engine].replace(Asked {
                space,
                va: span(va),
                target: span(iova),
                purged: false,
                committed: false,
            });
            assert!(before.is_none(), "an engine asks for one thing at a time");
            let seen = Seen {
                engine,
                after: self.events(),
                space,
                va,
                len,
                shift: entry.shift,
                host: entry.host,
                access,
                by,
            };
            self.record(state, |shadow| shadow.asked(seen, self.slots_of(&seen)));
            let tag = entry.tag;
            Ok(Some((Listed { iova, tag }, len)))
        });
        self.say();
        result
    }

    /// A request to write is about to be sent. False: the translation has been taken away, and it must not be.
    pub(super) fn commit(&self, engine: usize) -> bool {
        let sent = self.with_state(|state| {
            let asked = state.asked[engine].as_mut();
            let asked = asked.expect("an access is on the list until its handle is dropped");
            asked.committed |= !asked.purged;
            let sent = asked.committed && !asked.purged;
            if sent {
                self.record(state, |shadow| shadow.sent(engine));
            }
            sent
        });
        self.say();
        sent
    }

    /// Off the list. Whether a purge has met it, which may wait for this: one step, as a purge that began between a look
    /// and the end would wait for somebody who had not seen it. `None`: it was off the list already.
    pub(super) fn give_back(&self, engine: usize) -> Option<bool> {
        let purged = self.with_state(|state| {
            let asked = state.asked[engine].take()?;
            self.record(state, |shadow| shadow.answered(engine, !asked.purged));
            Some(asked.purged)
        });
        self.say();
        purged
    }

    pub(super) fn asked<T>(&self, engine: usize, look: impl FnOnce(&mut Asked) -> T) -> T {
        self.with_state(|state| {
            let asked = state.asked[engine].as_mut();
            look(asked.expect("an access is on the list until its handle is dropped"))
        })
    }
}

impl Entry {
    /// There is no memory to point to.
    pub(super) fn is_by_message(&self) -> bool {
        self.host == 0
    }
}
