//! Where packets for one thread arrive.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::transport::Packet;

/// Packets that an inbox holds; a sender that finds it full is woken when there is room.
pub(super) const CAPACITY: usize = 128;

/// Wakes a thread that may be asleep. Called without locks; must not block. A wake that comes while the thread is
/// awake must not be lost (an eventfd, or a flag that it looks at before it sleeps).
pub trait Wake: Send + Sync {
    /// There is something to do.
    fn wake(&self);
}

#[derive(Default)]
struct State {
    packets: VecDeque<Packet>,
    waiting: Vec<Arc<dyn Wake>>,
    closed: bool,
}

/// A bounded queue of packets from many threads to one.
pub(super) struct Inbox {
    state: Mutex<State>,
    /// A hint, so that an idle look costs no lock.
    filled: AtomicBool,
    wake: Arc<dyn Wake>,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox")
            .field("filled", &self.filled)
            .finish_non_exhaustive()
    }
}

impl Inbox {
    pub(super) fn new(wake: Arc<dyn Wake>) -> Self {
        Self {
            state: Mutex::new(State {
                packets: VecDeque::with_capacity(CAPACITY),
                ..State::default()
            }),
            filled: AtomicBool::new(false),
            wake,
        }
    }

    /// Puts a packet in; gives it back when there is no room, and wakes `sender` when there is. A closed inbox takes
    /// and loses everything, like a cable that was pulled.
    #[expect(
        clippy::result_large_err,
        reason = "the packet goes back by value, without an allocation"
    )]
    pub(super) fn push(&self, packet: Packet, sender: Option<&Arc<dyn Wake>>) -> Result<(), Packet> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return Ok(());
        }
        if state.packets.len() >= CAPACITY {
            if let Some(sender) = sender
                && !state.waiting.iter().any(|other| Arc::ptr_eq(other, sender))
            {
                state.waiting.push(sender.clone());
            }
            return Err(packet);
        }
        let first = state.packets.is_empty();
        state.packets.push_back(packet);
        drop(state);
        if first {
            self.filled.store(true, Ordering::Release);
            self.wake.wake();
        }
        Ok(())
    }

    /// Takes everything, into an empty queue.
    pub(super) fn take(&self, into: &mut VecDeque<Packet>) {
        if !self.filled.load(Ordering::Acquire) {
            return;
        }
        let waiting = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.filled.store(false, Ordering::Relaxed);
            std::mem::swap(&mut state.packets, into);
            std::mem::take(&mut state.waiting)
        };
        for sender in waiting {
            sender.wake();
        }
    }

    /// Wakes its reader although nothing came.
    pub(super) fn nudge(&self) {
        self.wake.wake();
    }

    /// Nobody reads it any more.
    pub(super) fn close(&self) {
        let (waiting, packets) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.closed = true;
            (
                std::mem::take(&mut state.waiting),
                std::mem::take(&mut state.packets),
            )
        };
        drop(packets);
        for sender in waiting {
            sender.wake();
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed
    }
}
