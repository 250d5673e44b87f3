//! Event queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use protos::mlx5::Layout;
use protos::mlx5::eq::{EQE_SIZE, Eqc, Eqe, Event, STATE_ARMED, STATE_FIRED};
use zerocopy::IntoBytes;

use super::buffer::Buffer;
use super::memory::Port;
use crate::pci::Interrupts;

/// Counters are compared in so many bits.
const MASK: u32 = 0xff_ffff;

/// An event queue.
///
/// Lock order: `producer`, then `door`. `producer` is held while an event is written, which may wait for the
/// client; `door` for a few loads and stores only, and the thread that serves the client takes no other.
#[derive(Debug)]
pub(super) struct Eq {
    pub(super) eqn: u8,
    pub(super) context: Eqc,
    /// A bit for each type.
    pub(super) events: u64,
    log_size: u32,
    vector: u32,
    buffer: Buffer,
    producer: Mutex<u32>,
    door: Mutex<Door>,
    destroyed: AtomicBool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Door {
    /// Events that are complete in memory.
    written: u32,
    /// The driver's last word.
    consumed: u32,
    armed: bool,
    lost: u64,
}

impl Eq {
    pub(super) fn new(eqn: u8, context: Eqc, events: u64, buffer: Buffer) -> Self {
        Self {
            eqn,
            log_size: context.get(Eqc::LOG_SIZE),
            vector: context.get(Eqc::INTR),
            context,
            events,
            buffer,
            producer: Mutex::new(0),
            door: Mutex::new(Door::default()),
            destroyed: AtomicBool::new(false),
        }
    }

    /// The context as it is now.
    pub(super) fn query(&self) -> Eqc {
        let door = *self.door();
        let state = if door.armed { STATE_ARMED } else { STATE_FIRED };
        self.context
            .clone()
            .with(Eqc::STATE, state)
            .with(Eqc::CONSUMER, door.consumed)
            .with(Eqc::PRODUCER, door.written)
    }

    pub(super) fn takes(&self, event: Event) -> bool {
        self.events.checked_shr(event.0.into()).unwrap_or(0) & 1 != 0
    }

    pub(super) fn uar_page(&self) -> u32 {
        self.context.get(Eqc::UAR_PAGE)
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an event; the interrupt follows if the queue is armed. Whether there was room for it.
    pub(super) fn post(&self, port: &mut Port, interrupts: &Interrupts, eqe: &Eqe) -> bool {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if self.destroyed.load(Ordering::SeqCst) {
            return false;
        }
        let index = *producer;
        let size = 1u32 << self.log_size;
        if index.wrapping_sub(self.door().consumed) & MASK >= size {
            let mut door = self.door();
            door.lost += 1;
            if door.lost.is_power_of_two() {
                tracing::warn!(
                    eqn = self.eqn,
                    lost = door.lost,
                    "an event queue is full; events are lost"
                );
            }
            return false;
        }
        let (iova, _) = self.buffer.at(u64::from(index & (size - 1)) * EQE_SIZE);
        let mut eqe = *eqe;
        eqe.owner = (index >> self.log_size & 1) as u8;
        if let Err(error) = port.hand_over(iova, eqe.as_bytes()) {
            tracing::warn!(eqn = self.eqn, iova, %error, "an event cannot be written");
            return false;
        }
        *producer = index.wrapping_add(1) & MASK;
        let mut door = self.door();
        door.written = *producer;
        if std::mem::take(&mut door.armed) {
            interrupts.trigger(self.vector);
        }
        true
    }

    /// The driver's doorbell. Never waits.
    pub(super) fn doorbell(&self, interrupts: &Interrupts, consumed: u32, arm: bool) {
        let mut door = self.door();
        door.consumed = consumed & MASK;
        if arm {
            door.armed = door.written == door.consumed;
            if !door.armed {
                interrupts.trigger(self.vector);
            }
        }
    }

    /// Nothing is written any more when this returns.
    pub(super) fn destroy(&self) {
        let producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        self.destroyed.store(true, Ordering::SeqCst);
        drop(producer);
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        let door = *self.door();
        serde_json::json!({
            "eqn": self.eqn, "vector": self.vector, "entries": 1u32 << self.log_size, "written": door.written,
            "consumed": door.consumed, "armed": door.armed, "lost": door.lost,
        })
    }
}
