//! Payload that stays where it is until it is delivered: a packet inside a process may name its sender's memory.
//!
//! The receiver copies from there to where the payload belongs, once. What a packet with bytes has that one with a
//! loan lacks, and what makes up for it:
//!
//! * *Its bytes cannot change.* A sender changes them only after the completion of its request, which follows the
//!   acknowledgement of what has been delivered. Requests that end in another way (a flush, a failure, a queue pair
//!   that is reset or destroyed) end their [`Term`] first: that waits for whoever copies, and nobody copies afterwards.
//! * *They are there.* Memory that is absent, was taken away or may not be read (any more) is the sender's affair: the
//!   receiver calls the packet back ([`super::Extension::Recall`]), and the sender sends from there on bytes, as if
//!   there were no loans, with the faults and errors that gathering them has.
//!
//! Only reliable services lend, as only they complete by acknowledgement.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use crate::atc::Guard;

/// A place in the memory of a [`Lender`], in its own terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// An address space.
    pub space: u64,
    /// What the address space belongs to.
    pub key: u32,
    /// An address in it.
    pub va: u64,
}

/// A piece of lent memory that stays there while it is shown.
#[derive(Debug, Clone, Copy)]
pub enum Shown<'a> {
    /// Under a guard of the lender's device TLB.
    Guard(&'a Guard<'a>),
    /// Plain memory.
    Bytes(&'a [u8]),
}

impl Shown<'_> {
    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Guard(guard) => guard.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The loan is over, or a page of it is not to be had at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// Whose memory it is. Called by the receiver's thread, at any time.
pub trait Lender: Send + Sync + Debug {
    /// Shows the `len` bytes at `place` to `take`, piece by piece; that says how many of a piece it has taken. Ends when
    /// there are no more, or `take` takes none. How many were taken in all.
    ///
    /// Does not wait for software, nor for anything that the receiver may hold. Rights were checked when it was lent;
    /// whether it is there still is checked now.
    ///
    /// # Errors
    /// [`Gone`]: not even the first piece is there.
    fn show(&self, place: Place, len: usize, take: &mut dyn FnMut(Shown<'_>) -> usize)
    -> Result<usize, Gone>;
}

/// Memory that an owner lends.
#[derive(Debug, Clone)]
pub struct Lent {
    /// Whose.
    pub lender: Arc<dyn Lender>,
    /// Where it begins.
    pub place: Place,
}

/// The time for which a queue pair's loans are good. Ends with it.
#[derive(Debug, Default)]
pub(crate) struct Term {
    number: u64,
    gate: Arc<Mutex<u64>>,
}

impl Term {
    /// When this returns nobody copies from a loan of before, or will.
    pub(crate) fn end(&mut self) {
        self.number += 1;
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = self.number;
    }

    /// A loan of `len` bytes.
    pub(crate) fn lend(&self, lent: Lent, len: u32) -> Loan {
        Loan {
            gate: Arc::clone(&self.gate),
            term: self.number,
            lent,
            len,
        }
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        self.end();
    }
}

/// Payload of a packet, in its sender's memory.
#[derive(Debug, Clone)]
pub struct Loan {
    /// The number of the term, as long as that lasts. Locked while somebody copies.
    gate: Arc<Mutex<u64>>,
    term: u64,
    lent: Lent,
    len: u32,
}

impl Loan {
    /// Bytes of payload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forget the first bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub(super) fn skip(&mut self, count: usize) {
        assert!(count <= self.len(), "skip {count} of {} bytes", self.len);
        self.lent.place.va = self.lent.place.va.wrapping_add(count as u64);
        self.len -= count as u32;
    }

    /// Shows `len` bytes from `offset` on ([`Lender::show`]). The caller holds no guard.
    ///
    /// # Errors
    /// [`Gone`]: the packet has to be called back.
    ///
    /// # Panics
    /// When the loan is shorter.
    pub fn show(
        &self,
        offset: usize,
        len: usize,
        take: &mut dyn FnMut(Shown<'_>) -> usize,
    ) -> Result<usize, Gone> {
        assert!(
            offset <= self.len() && len <= self.len() - offset,
            "bytes {offset}+{len} of a loan of {}",
            self.len
        );
        let term = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if *term != self.term {
            return Err(Gone);
        }
        let place = Place {
            va: self.lent.place.va.wrapping_add(offset as u64),
            ..self.lent.place
        };
        self.lent.lender.show(place, len, take)
    }
}
