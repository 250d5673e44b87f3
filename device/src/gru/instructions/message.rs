//! Message queues: MESQ, and the queue checks of GAMIR and GAMER (reference section 10).
//!
//! A message is sent in two parts: its lines are reserved by one atomic change of the queue's head word, then
//! they are stored. The second part can miss by itself; what was reserved is remembered in the CBE (idef4upd = 1,
//! idef6cpy = the old head word, idef5upd = lines to store), so that it is reserved once, whatever comes between.
//!
//! Decided here: lines that do not all fit below the limit are refused as a whole (software puts a filler there and
//! switches the halves), so a half is never overrun. PAGE_OVERFLOW is found before anything is reserved, and is a
//! matter of translations: unmapped mode has no pages. avalue is the head word as it was before.

use std::sync::atomic::Ordering;

use protos::gru::cb::{SubStatus, XType};
use protos::gru::message_queue::{HEAD, Head, LINE};

use super::{Env, Operation, Step, Stop};
use crate::atc::Access;
use crate::faults::Injection;

/// idef4upd: the lines are reserved, and not all stored.
const STORING: u32 = 1;
/// Changes of the head word by others that one step competes with.
const ATTEMPTS: usize = 16;

fn refused(substatus: SubStatus, word: Option<Head>) -> Stop {
    Stop::Message {
        substatus,
        avalue: word.map(Head::into_bits),
    }
}

impl Operation {
    pub(super) fn message(&mut self, env: &mut Env<'_>) -> Result<Step, Stop> {
        if self.issued.xtype() != XType::CACHE_LINE || self.nelem == 0 || !self.baddr0.is_multiple_of(LINE) {
            return Err(Stop::INVALID);
        }
        self.check_segment(env, self.tri0, LINE)?;
        if self.idef4_now != STORING {
            let Some(old) = self.reserve_message(env)? else {
                return Ok(Step::More);
            };
            (self.idef4_now, self.idef6) = (STORING, old.into_bits());
            if env.injector.strikes(Injection::PutNack).is_some() {
                return Err(refused(SubStatus::PUT_NACKED, Some(old)));
            }
        }
        let first = self.message_at(Head::from_bits(self.idef6));
        // The first line last: its header is what a receiver looks at first.
        while self.left > 0 {
            let line = (self.left - 1) * LINE;
            let mut bytes = [0; LINE as usize];
            env.memory
                .load_bytes(env.ds + u64::from(self.tri0) + line, &mut bytes);
            let place = env.atomic(first.wrapping_add(line), LINE, Access::Write)?;
            place.write_at(8, &bytes[8..]);
            // The word with the present byte makes the rest of the line visible.
            let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            place.word64(0).store(header, Ordering::Release);
            place.check()?;
            drop(place);
            self.left -= 1;
        }
        Ok(Step::Done(Some(self.idef6)))
    }

    /// Where a message goes whose reservation found `old`.
    fn message_at(&self, old: Head) -> u64 {
        self.baddr0.wrapping_add(u64::from(old.head()) * LINE)
    }

    /// Takes the lines out of the queue: the head word as it was, or `None` while others change it all the time.
    fn reserve_message(&self, env: &mut Env<'_>) -> Result<Option<Head>, Stop> {
        for _ in 0..ATTEMPTS {
            let word = env.atomic(self.baddr0 + HEAD, 8, Access::Write)?;
            let old = Head::from_bits(word.word64(0).load(Ordering::Acquire));
            word.check()?;
            drop(word);
            let next = old
                .reserve(self.nelem)
                .ok_or(refused(SubStatus::QLIMIT_REACHED, Some(old)))?;
            // The target's translation first: nothing is reserved that cannot be stored.
            let bytes = self.nelem * LINE;
            let target = env.atomic(self.message_at(old), bytes, Access::Write)?;
            if target.page_left() < bytes {
                return Err(refused(SubStatus::PAGE_OVERFLOW, Some(old)));
            }
            drop(target);
            for (kind, substatus) in [
                (Injection::LbOverflow, SubStatus::LB_OVERFLOWED),
                (Injection::AmoNack, SubStatus::AMO_NACKED),
            ] {
                if env.injector.strikes(kind).is_some() {
                    return Err(refused(substatus, None));
                }
            }
            let word = env.atomic(self.baddr0 + HEAD, 8, Access::Write)?;
            let changed = word.word64(0).compare_exchange(
                old.into_bits(),
                next.into_bits(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            word.check()?;
            if changed.is_ok() {
                return Ok(Some(old));
            }
        }
        Ok(None)
    }

    /// QCHK1, QCHK2, CADD: reserves `lines` and stores nothing.
    pub(super) fn queue_check(&mut self, env: &mut Env<'_>, lines: u64) -> Result<Step, Stop> {
        if self.word_bytes()? != 8 {
            return Err(Stop::INVALID);
        }
        let place = env.atomic(self.baddr0, 8, Access::Write)?;
        let reserve = |word| Head::from_bits(word).reserve(lines).map(Head::into_bits);
        let changed = place
            .word64(0)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, reserve);
        place.check()?;
        self.left = 0;
        match changed {
            Ok(old) => Ok(Step::Done(Some(old))),
            Err(full) => Err(refused(SubStatus::QLIMIT_REACHED, Some(Head::from_bits(full)))),
        }
    }
}
