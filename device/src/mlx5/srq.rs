//! Shared receive queues: a linked list of WQEs in the driver's memory.

use std::sync::{Mutex, MutexGuard, PoisonError};

use protos::mlx5::srq::NextSegment;
use protos::mlx5::uar;

use super::buffer::Buffer;
use super::memory::Port;
use crate::dma::DmaError;

/// Where a shared receive queue's context came from.
#[derive(Debug, Clone)]
pub(super) enum Context {
    /// CREATE_RMP.
    Pool(Box<protos::mlx5::srq::Rmpc>),
    /// CREATE_XRC_SRQ.
    Xrc(Box<protos::mlx5::srq::XrcSrqc>),
}

/// A shared receive queue.
#[derive(Debug)]
pub(super) struct Srq {
    pub(super) srqn: u32,
    pub(super) pd: u32,
    /// Domain and completion queue of one that XRC reaches.
    pub(super) xrc: Option<(u32, u32)>,
    pub(super) context: Context,
    /// Logarithm of the entries.
    pub(super) log_size: u32,
    /// Logarithm of a WQE's bytes.
    pub(super) stride: u32,
    buffer: Buffer,
    pub(super) dbr: u64,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// The next WQE of the list.
    head: u16,
    /// Taken since the beginning.
    consumed: u16,
    /// Tell when fewer than these are left; 0 = do not.
    limit: u16,
    destroyed: bool,
}

/// A WQE that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    /// Its index.
    pub(super) index: u16,
    /// The queue has come below its limit with it.
    pub(super) limit_reached: bool,
}

impl Srq {
    #[allow(clippy::too_many_arguments, reason = "the fields of two kinds of contexts")]
    pub(super) fn new(
        srqn: u32,
        pd: u32,
        xrc: Option<(u32, u32)>,
        context: Context,
        log_size: u32,
        stride: u32,
        buffer: Buffer,
        dbr: u64,
        limit: u16,
    ) -> Self {
        Self {
            srqn,
            pd,
            xrc,
            context,
            log_size,
            stride,
            buffer,
            dbr,
            state: Mutex::new(State {
                limit,
                ..State::default()
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing of it is read any more when this returns. (Queue pairs may still have a WQE of it.)
    pub(super) fn destroy(&self) {
        self.state().destroyed = true;
    }

    pub(super) fn is_destroyed(&self) -> bool {
        self.state().destroyed
    }

    pub(super) fn set_limit(&self, limit: u16) {
        self.state().limit = limit;
    }

    pub(super) fn limit(&self) -> u16 {
        self.state().limit
    }

    /// Posted since the beginning.
    fn posted(&self, port: &mut Port) -> Result<u16, DmaError> {
        let word = port.read_be32(self.dbr.wrapping_add(uar::DBR_RECEIVE))?;
        Ok(word as u16)
    }

    /// Posted and not taken, for queries.
    pub(super) fn available(&self, port: &mut Port) -> u16 {
        let consumed = self.state().consumed;
        self.posted(port)
            .map_or(0, |posted| posted.wrapping_sub(consumed))
    }

    /// The next WQE, if one is posted.
    pub(super) fn take(&self, port: &mut Port) -> Result<Option<Taken>, DmaError> {
        let mut state = self.state();
        if state.destroyed {
            return Ok(None);
        }
        let available = self.posted(port)?.wrapping_sub(state.consumed);
        if available == 0 || u32::from(available) > 1 << self.log_size {
            return Ok(None);
        }
        let mask = (1u32 << self.log_size) - 1;
        let index = state.head & mask as u16;
        let mut next = [0; size_of::<NextSegment>()];
        self.buffer
            .read(port, u64::from(index) << self.stride, &mut next)?;
        state.head = u16::from_be_bytes([next[2], next[3]]) & mask as u16;
        state.consumed = state.consumed.wrapping_add(1);
        let limit_reached = state.limit != 0 && available - 1 < state.limit;
        if limit_reached {
            state.limit = 0;
        }
        Ok(Some(Taken { index, limit_reached }))
    }

    /// A WQE that was taken; whether the queue is still there.
    pub(super) fn read(&self, port: &mut Port, index: u16, wqe: &mut [u8]) -> Result<bool, DmaError> {
        let state = self.state();
        if state.destroyed {
            return Ok(false);
        }
        self.buffer.read(port, u64::from(index) << self.stride, wqe)?;
        Ok(true)
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        let state = *self.state();
        serde_json::json!({
            "srqn": self.srqn, "entries": 1u32 << self.log_size, "consumed": state.consumed, "limit": state.limit,
            "xrcd": self.xrc.map(|(domain, _)| domain),
        })
    }
}
