//! Memory without a file: reached by asking the client.

use std::ops::Range;

use super::{DmaError, Prot, Space};

/// Asks a client to read and write its memory for the device (vfio-user DMA_READ and DMA_WRITE).
///
/// An access is opened while the mapping is known to be there (the map's lock is held), then done without
/// any lock. [`Messenger::abort`] ends every open access that meets a range: its caller gets an error, no
/// request for it is sent any more, and an answer that still comes is thrown away.
///
/// Whoever asks can lose interest, too ([`Interest`]): a translation that was purged, a context that is stopped.
pub trait Messenger: Send + Sync + std::fmt::Debug {
    /// Most data bytes of one request; at least 1.
    fn max_transfer(&self) -> usize;
    /// Register an access to `[iova, iova + len)`. Never waits.
    ///
    /// # Errors
    /// [`DmaError`]: no client, too many answers outstanding, a thread that must not wait.
    fn open(&self, iova: u64, len: u64) -> Result<u16, DmaError>;
    /// Ask for the bytes at `iova`, under the ticket that [`Messenger::open`] gave, which is used up.
    ///
    /// # Errors
    /// [`DmaError`]: aborted, not wanted any more, refused by the client, no answer in time.
    fn read(&self, ticket: u16, iova: u64, to: &mut [u8], interest: &dyn Interest) -> Result<(), DmaError>;
    /// As [`Messenger::read`], the other way. On error the bytes may have been written or not; but a request
    /// that was sent and has not been answered in time is the end of the client, as it may still be done.
    ///
    /// # Errors
    /// As [`Messenger::read`].
    fn write(&self, ticket: u16, iova: u64, from: &[u8], interest: &dyn Interest) -> Result<(), DmaError>;
    /// End what is open in that range. Never waits.
    fn abort(&self, iova: Range<u64>);
    /// Somebody's [`Interest`] may have changed: everybody who waits looks again. Never waits.
    fn recheck(&self);
}

/// Whether the one who asks still wants the answer. Called while the messenger holds its locks: takes none that
/// is held across a wait.
pub trait Interest {
    /// A read goes on only while this is true; a write, until it is sent.
    fn wanted(&self) -> bool;
    /// A request to write is sent now and cannot be taken back; from here on the answer is waited for. False: it
    /// is not sent.
    fn commit(&self) -> bool;
}

/// Waits for the answer, whatever happens.
#[derive(Debug)]
struct Steadfast;

impl Interest for Steadfast {
    fn wanted(&self) -> bool {
        true
    }
    fn commit(&self) -> bool {
        true
    }
}

impl Space {
    /// Read memory that was mapped without a file, by asking the client. Waits for the client: not for a
    /// thread that serves it, and never under a guard.
    ///
    /// Longer transfers are several requests. An unmap, a reset, bus mastering off or the loss of the client
    /// end it with an error.
    ///
    /// # Errors
    /// [`DmaError`]; `to` may have been written in part.
    ///
    /// # Panics
    /// When this thread holds a guard of an ATC.
    pub fn read_by_message(&self, iova: u64, to: &mut [u8]) -> Result<(), DmaError> {
        self.read_while_wanted(iova, to, &Steadfast)
    }

    /// As [`Space::read_by_message`], for as long as somebody is interested.
    pub(crate) fn read_while_wanted(
        &self,
        iova: u64,
        to: &mut [u8],
        interest: &dyn Interest,
    ) -> Result<(), DmaError> {
        let mut at = iova;
        let mut rest = to;
        while !rest.is_empty() {
            let (messenger, ticket, len) = self.open_message(at, rest.len(), Prot::READ_ONLY)?;
            let (chunk, after) = rest.split_at_mut(len);
            messenger.read(ticket, at, chunk, interest)?;
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    /// As [`Space::read_by_message`], the other way.
    ///
    /// # Errors
    /// [`DmaError`]; some of the bytes may have been written.
    ///
    /// # Panics
    /// When this thread holds a guard of an ATC.
    pub fn write_by_message(&self, iova: u64, from: &[u8]) -> Result<(), DmaError> {
        self.write_while_wanted(iova, from, &Steadfast)
    }

    /// As [`Space::write_by_message`], for as long as somebody is interested.
    pub(crate) fn write_while_wanted(
        &self,
        iova: u64,
        from: &[u8],
        interest: &dyn Interest,
    ) -> Result<(), DmaError> {
        let mut at = iova;
        let mut rest = from;
        while !rest.is_empty() {
            let need = Prot {
                read: false,
                write: true,
            };
            let (messenger, ticket, len) = self.open_message(at, rest.len(), need)?;
            messenger.write(ticket, at, &rest[..len], interest)?;
            at += len as u64;
            rest = &rest[len..];
        }
        Ok(())
    }

    /// Read memory of either kind: a copy where it is mapped, a request where it is not. `[iova, iova + len)`
    /// is inside one mapping.
    ///
    /// # Errors
    /// [`DmaError`].
    ///
    /// # Panics
    /// As [`Space::read_by_message`].
    pub fn fetch(&self, iova: u64, to: &mut [u8]) -> Result<(), DmaError> {
        match self.resolve(iova, to.len() as u64, false) {
            Ok(memory) => {
                memory.read_into(to);
                memory.check()
            }
            Err(DmaError::ByMessage { .. }) => self.read_by_message(iova, to),
            Err(error) => Err(error),
        }
    }

    /// Write memory of either kind, as [`Space::fetch`].
    ///
    /// # Errors
    /// [`DmaError`].
    ///
    /// # Panics
    /// As [`Space::read_by_message`].
    pub fn store(&self, iova: u64, from: &[u8]) -> Result<(), DmaError> {
        match self.resolve(iova, from.len() as u64, true) {
            Ok(memory) => {
                memory.write_from(from);
                memory.check()
            }
            Err(DmaError::ByMessage { .. }) => self.write_by_message(iova, from),
            Err(error) => Err(error),
        }
    }
}
