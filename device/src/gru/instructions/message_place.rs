//! Memory that has no file: one request to the client for each access.
//!
//! Only couriers ([`crate::gru::courier`]) wait for the client; an engine that meets such memory leaves the control
//! block to them. What a request brings is used only if its translation is still there; a request that nobody wants any
//! more (purged, context stopped, reset) ends, and the instruction goes on from its last step.
//!
//! Loads, stores and copies work; atomics, and message queues, which are made of them, end with HA_RESPONSE_FATAL: no
//! message is atomic. A client that refuses: RA_RESPONSE_FATAL; that does not answer: RA_REQUEST_TIMEOUT; that is gone, or
//! has unmapped the memory meanwhile: PE_CHECK_DATA_ERROR.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use protos::gru::cbe::ecause;

use super::Stop;
use crate::atc::Asking;
use crate::dma::{self, DmaError, Interest};
use crate::gru::chiplet::Inside;
use crate::gru::wake::Wake;

/// Why somebody who waits for the client might have to stop waiting.
#[derive(Debug, Clone, Copy)]
pub(in crate::gru) struct Waiting<'a> {
    /// INTERRUPT wants the context.
    pub(in crate::gru) inside: &'a Inside<'a>,
    /// A reset waits.
    pub(in crate::gru) pausing: &'a AtomicBool,
    /// Who finishes the flush that waits for a request.
    pub(in crate::gru) wake: &'a Wake,
}

impl Waiting<'_> {
    fn may_go_on(&self) -> bool {
        !self.inside.must_leave() && !self.pausing.load(Ordering::SeqCst)
    }
}

/// A piece of the client's memory, here for one access.
#[derive(Debug)]
pub(in crate::gru) struct Message<'a> {
    /// The translation; none in unmapped mode.
    pub(super) asking: Option<Asking<'a>>,
    pub(super) dma: &'a dma::Space,
    pub(super) waiting: Waiting<'a>,
    pub(super) iova: u64,
    /// What was read, or is to be written.
    pub(super) data: RefCell<&'a mut [u8]>,
}

impl Message<'_> {
    /// Bring the bytes here.
    pub(super) fn fetch(&self) -> Result<(), Stop> {
        let data = &mut **self.data.borrow_mut();
        let result = self.dma.read_while_wanted(self.iova, data, self);
        if self.is_purged() {
            // What came is of the time before.
            return Err(Stop::Again);
        }
        self.outcome(result)
    }

    /// Send the bytes off, and wait until they are there.
    pub(super) fn store(&self) -> Result<(), Stop> {
        let data = &**self.data.borrow();
        let result = self.dma.write_while_wanted(self.iova, data, self);
        self.outcome(result)
    }

    fn is_purged(&self) -> bool {
        self.asking.as_ref().is_some_and(Asking::is_purged)
    }

    /// (What was stored was stored before a purge could return.)
    fn outcome(&self, result: Result<(), DmaError>) -> Result<(), Stop> {
        result.map_err(|error| {
            tracing::debug!(iova = self.iova, %error, "an access by message failed");
            match error {
                _ if self.is_purged() => Stop::Again,
                DmaError::Unwanted { .. } => Stop::Again,
                DmaError::NoAnswer { .. } => Stop::Exception(ecause::RA_REQUEST_TIMEOUT),
                DmaError::Refused { .. } => Stop::Exception(ecause::RA_RESPONSE_FATAL),
                DmaError::Aborted { .. } => Stop::LOST,
                _ => Stop::NOWHERE,
            }
        })
    }
}

impl Drop for Message<'_> {
    /// A step can make many requests, and the flush that has met this one waits for no other.
    fn drop(&mut self) {
        if self.asking.take().is_some_and(Asking::end) {
            self.waiting.wake.ring();
        }
    }
}

impl Interest for Message<'_> {
    fn wanted(&self) -> bool {
        self.waiting.may_go_on() && !self.is_purged()
    }

    fn commit(&self) -> bool {
        self.waiting.may_go_on() && self.asking.as_ref().is_none_or(Asking::commit)
    }
}
