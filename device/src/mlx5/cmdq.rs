//! The command queue: 32 entries, executed in turn by a thread of their own.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};

use protos::mlx5::cmd::{
    self, Delivery, ENTRIES, ENTRY_OUTPUT, ENTRY_STATUS_OWN, Entry, INLINE, MAILBOX_DATA, MAILBOX_NEXT,
    Mailbox,
};
use protos::mlx5::eq::{Eqe, Event};

use super::commands;
use super::hardware::Hca;
use super::memory::Port;

/// Longest input: 4 million translations.
const MAX_INPUT: usize = 32 << 20;
/// Longest output.
const MAX_OUTPUT: usize = 1 << 20;

/// Which entries wait.
#[derive(Debug, Default)]
pub(super) struct Doorbell {
    pending: Mutex<u32>,
    rung: Condvar,
    stop: AtomicBool,
}

impl Doorbell {
    /// Never waits for anything but another ring.
    pub(super) fn ring(&self, mask: u32) {
        if mask != 0 {
            *self.pending.lock().unwrap_or_else(PoisonError::into_inner) |= mask;
            self.rung.notify_one();
        }
    }

    pub(super) fn clear(&self) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = 0;
    }

    pub(super) fn stop(&self) {
        let _pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        self.stop.store(true, Ordering::SeqCst);
        self.rung.notify_all();
    }

    /// The lowest entry that waits; `None` at the end.
    fn wait(&self) -> Option<usize> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if *pending != 0 {
                let slot = pending.trailing_zeros();
                *pending &= !(1 << slot);
                return Some(slot as usize);
            }
            pending = self.rung.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The thread.
pub(super) fn run(hca: &Hca, mut port: Port) {
    while let Some(slot) = hca.commands.wait() {
        // A reset takes this lock: behind it no command of before runs.
        let mut execution = hca.execution.lock().unwrap_or_else(PoisonError::into_inner);
        execute(hca, &mut execution, &mut port, slot);
    }
}

fn execute(hca: &Hca, execution: &mut commands::Execution, port: &mut Port, slot: usize) {
    debug_assert!(slot < ENTRIES);
    let place = hca.iseg.command_queue() + (slot * size_of::<Entry>()) as u64;
    let entry: Entry = match port.read_value(place) {
        Ok(entry) => entry,
        Err(error) => {
            tracing::warn!(slot, %error, "a command cannot be read");
            return;
        }
    };
    if entry.status_own & 1 == 0 {
        return;
    }
    // The command that makes the queue of command events is polled for.
    let events = hca.objects.eq_for(Event::COMMAND);
    let delivery = match deliver(hca, execution, port, place, &entry) {
        Ok(()) => Delivery::OK,
        Err(delivery) => {
            tracing::debug!(slot, ?delivery, "a command cannot be delivered");
            delivery
        }
    };
    // Output, ownership, event: the driver looks at them the other way round.
    fence(Ordering::Release);
    if let Err(error) = port.write(place + ENTRY_STATUS_OWN, &[delivery.0 << 1]) {
        tracing::warn!(slot, %error, "a command's status cannot be written");
        return;
    }
    if let Some(eq) = events.filter(|eq| hca.objects.has_eq(eq.eqn)) {
        let eqe = Eqe::new(Event::COMMAND, 0).with(0, 1 << slot);
        eq.post(port, &hca.interrupts, &eqe);
    }
}

fn deliver(
    hca: &Hca,
    execution: &mut commands::Execution,
    port: &mut Port,
    place: u64,
    entry: &Entry,
) -> Result<(), Delivery> {
    if entry.kind != cmd::TYPE_PCI {
        return Err(Delivery::DESCRIPTOR);
    }
    let input = collect(port, entry)?;
    let room = entry.outlen.get() as usize;
    if !(8..=MAX_OUTPUT).contains(&room) {
        return Err(Delivery::OUT_LENGTH);
    }
    let mut output = commands::execute(hca, execution, port, &input, room);
    output.resize(room, 0);
    scatter(port, place, entry, &output)
}

fn collect(port: &mut Port, entry: &Entry) -> Result<Vec<u8>, Delivery> {
    let len = entry.inlen.get() as usize;
    if !(8..=MAX_INPUT).contains(&len) {
        return Err(Delivery::IN_LENGTH);
    }
    let mut input = entry.input[..len.min(INLINE)].to_vec();
    let mut next = entry.in_ptr.get();
    let mut number = 0;
    while input.len() < len {
        // Grows with what is really there: a length alone allocates nothing.
        let mailbox: Mailbox = port.read_value(next).map_err(|_| Delivery::IN_POINTER)?;
        check(&mailbox, entry, number)?;
        let step = (len - input.len()).min(MAILBOX_DATA);
        input.extend_from_slice(&mailbox.data[..step]);
        next = mailbox.next.get();
        number += 1;
    }
    Ok(input)
}

fn scatter(port: &mut Port, place: u64, entry: &Entry, output: &[u8]) -> Result<(), Delivery> {
    let (head, mut rest) = output.split_at(output.len().min(INLINE));
    port.write(place + ENTRY_OUTPUT, head)
        .map_err(|_| Delivery::OUT_POINTER)?;
    let mut next = entry.out_ptr.get();
    let mut number = 0;
    while !rest.is_empty() {
        let mailbox: Mailbox = port.read_value(next).map_err(|_| Delivery::OUT_POINTER)?;
        check(&mailbox, entry, number)?;
        let (piece, after) = rest.split_at(rest.len().min(MAILBOX_DATA));
        port.write(next, piece).map_err(|_| Delivery::OUT_POINTER)?;
        debug_assert!(MAILBOX_NEXT >= MAILBOX_DATA as u64);
        next = mailbox.next.get();
        number += 1;
        rest = after;
    }
    Ok(())
}

fn check(mailbox: &Mailbox, entry: &Entry, number: u32) -> Result<(), Delivery> {
    if mailbox.token != entry.token {
        return Err(Delivery::TOKEN);
    }
    if mailbox.block_num.get() != number {
        return Err(Delivery::BLOCK_NUMBER);
    }
    Ok(())
}
