//! What a worker needs of a GRU context; the real one is in [`super::context`], tests use a model.

use protos::gru::cb::Instruction;

/// How an instruction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// istatus IDLE.
    Completed {
        /// The old value of an atomic.
        avalue: u64,
        /// Smallest generation of the translations it used; `u64::MAX` when none.
        tag: u64,
    },
    /// istatus EXCEPTION.
    Exception {
        /// Cause bits (`protos::gru::cbe::ecause`).
        ecause: u32,
    },
}

/// Nothing can be executed any more: the device or the daemon is gone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

/// A control block with a data segment.
pub trait Executor {
    /// Bytes of the data segment.
    fn ds_bytes(&self) -> usize;
    /// Writes words to the data segment, from byte `offset` on.
    ///
    /// # Errors
    /// The device is gone.
    fn write_ds(&mut self, offset: u32, words: &[u64]) -> Result<(), Broken>;
    /// Reads words of the data segment.
    ///
    /// # Errors
    /// The device is gone.
    fn read_ds(&mut self, offset: u32, words: &mut [u64]) -> Result<(), Broken>;
    /// Issues an instruction and waits until it is done.
    ///
    /// # Errors
    /// The device or the daemon is gone.
    fn execute(&mut self, instruction: &Instruction) -> Result<Outcome, Broken>;
}
