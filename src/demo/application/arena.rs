//! What all threads of the application share.

use super::frames::Frames;
use super::oracles::Oracles;
use super::slots::{Hot, Slot};

/// Slots, the frames mapped there, and the record.
#[derive(Debug)]
pub struct Arena<'m> {
    /// The address ranges.
    pub slots: Vec<Slot>,
    /// Which of them the workers should look at next.
    pub hot: Hot,
    /// The memory.
    pub frames: Frames<'m>,
    /// The record of violations.
    pub oracles: Oracles,
}
