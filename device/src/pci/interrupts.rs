//! Interrupt vectors: eventfds towards the client, MSI-X table, masks and pending bits.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use protos::pci::msix;

use super::signal::signal;

/// What became of an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The eventfd was written, or its counter is full (its reader will wake up anyhow).
    Sent,
    /// Masked, or no eventfd: the pending bit is set. It is sent when the reason has gone.
    Pending,
    /// There is no such vector.
    NoVector,
}

/// Interrupt vectors towards the client, with MSI-X table and pending-bit array.
///
/// All methods take `&self` and may be called from any thread. A vector's lock is held for one
/// non-blocking write at most.
#[derive(Debug, Default)]
pub struct Interrupts {
    /// Set once the number is known, which a model decides after it got hold of this object.
    vectors: OnceLock<Box<[Mutex<Vector>]>>,
    /// MSI-X function mask (message control bit 14). Written before the vectors are looked at again, read
    /// under a vector's lock: a trigger that saw it set has its pending bit found.
    function_mask: AtomicBool,
    sent: AtomicU64,
    held_back: AtomicU64,
}

#[derive(Debug)]
struct Vector {
    eventfd: Option<OwnedFd>,
    /// Address low, address high, data, vector control: what software wrote.
    entry: [u32; 4],
    /// Masked by SET_IRQS.
    masked: bool,
    /// Masks itself when sent (INTx).
    automask: bool,
    pending: bool,
}

impl Vector {
    fn table_masked(&self) -> bool {
        self.entry[3] & msix::VECTOR_CTRL_MASK != 0
    }

    /// Send, or remember. `function_mask` was read under this vector's lock.
    fn deliver(&mut self, function_mask: bool) -> Trigger {
        let open = !function_mask && !self.masked && !self.table_masked();
        match &self.eventfd {
            Some(fd) if open => {
                signal(fd);
                self.pending = false;
                self.masked |= self.automask;
                Trigger::Sent
            }
            _ => {
                self.pending = true;
                Trigger::Pending
            }
        }
    }

    fn reset_entry(&mut self) {
        // PCI 3.0 6.8.2.9: masked after reset; but see the module's head: a routed vector is enabled.
        let mask = if self.eventfd.is_none() {
            msix::VECTOR_CTRL_MASK
        } else {
            0
        };
        self.entry = [0, 0, 0, mask];
    }
}

impl Interrupts {
    /// `vectors` vectors, none routed.
    ///
    /// # Panics
    /// With more than 2048.
    #[must_use]
    pub fn new(vectors: u16) -> Arc<Self> {
        let interrupts = Arc::new(Self::default());
        interrupts.set_vectors(vectors, false);
        interrupts
    }

    /// Fix the number of vectors. Before that there are none.
    ///
    /// # Panics
    /// With more than 2048, or when called twice.
    pub(crate) fn set_vectors(&self, vectors: u16, automask: bool) {
        assert!(
            vectors <= msix::MAX_VECTORS,
            "{vectors} interrupt vectors; MSI-X has at most 2048"
        );
        let make = || {
            Mutex::new(Vector {
                eventfd: None,
                entry: [0, 0, 0, !automask as u32],
                masked: false,
                automask,
                pending: false,
            })
        };
        let made = self.vectors.set((0..vectors).map(|_| make()).collect());
        assert!(made.is_ok(), "the number of interrupt vectors is fixed once");
    }

    fn vectors(&self) -> &[Mutex<Vector>] {
        self.vectors.get().map_or(&[], |vectors| vectors)
    }

    fn lock(&self, vector: u32) -> Option<MutexGuard<'_, Vector>> {
        let vector = self.vectors().get(vector as usize)?;
        Some(vector.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn each(&self, mut action: impl FnMut(&mut Vector)) {
        for vector in self.vectors() {
            action(&mut vector.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn count(&self, outcome: Trigger) -> Trigger {
        match outcome {
            Trigger::Sent => self.sent.fetch_add(1, Ordering::Relaxed),
            Trigger::Pending => self.held_back.fetch_add(1, Ordering::Relaxed),
            Trigger::NoVector => 0,
        };
        outcome
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.vectors().len() as u32
    }

    /// No vector at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raise an interrupt. Never waits for the client.
    pub fn trigger(&self, vector: u32) -> Trigger {
        let outcome = match self.lock(vector) {
            Some(mut vector) => vector.deliver(self.function_mask.load(Ordering::SeqCst)),
            None => Trigger::NoVector,
        };
        self.count(outcome)
    }

    /// Send what is pending and no longer held back.
    fn retry(&self, vector: &mut Vector) {
        if vector.pending && vector.deliver(self.function_mask.load(Ordering::SeqCst)) == Trigger::Sent {
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Route a vector to an eventfd, which enables it (its mask bits are cleared and a pending interrupt is
    /// sent), or to nothing. When this returns the eventfd of before is not written any more. False when
    /// there is no such vector.
    pub fn set_eventfd(&self, vector: u32, eventfd: Option<OwnedFd>) -> bool {
        let Some(mut vector) = self.lock(vector) else {
            return false;
        };
        vector.eventfd = eventfd;
        if vector.eventfd.is_some() {
            vector.entry[3] &= !msix::VECTOR_CTRL_MASK;
            vector.masked = false;
            self.retry(&mut vector);
        }
        true
    }

    /// A vector has an eventfd.
    #[must_use]
    pub fn is_routed(&self, vector: u32) -> bool {
        self.lock(vector).is_some_and(|vector| vector.eventfd.is_some())
    }

    /// Hold a vector's interrupts back.
    pub fn mask(&self, vector: u32) {
        if let Some(mut vector) = self.lock(vector) {
            vector.masked = true;
        }
    }

    /// Let a vector's interrupts through, a pending one at once.
    pub fn unmask(&self, vector: u32) {
        if let Some(mut vector) = self.lock(vector) {
            vector.masked = false;
            self.retry(&mut vector);
        }
    }

    /// The vector's pending bit.
    #[must_use]
    pub fn is_pending(&self, vector: u32) -> bool {
        self.lock(vector).is_some_and(|vector| vector.pending)
    }

    /// MSI-X function mask. When it is set and this returns, nothing is sent any more; taking it away sends what
    /// is pending.
    pub fn set_function_mask(&self, masked: bool) {
        self.function_mask.store(masked, Ordering::SeqCst);
        // Masked: only passes through every lock, behind a trigger that had not seen the mask yet.
        self.each(|vector| {
            if !masked {
                self.retry(vector);
            }
        });
    }

    /// Forget pending interrupts (device reset). Routing and masks stay.
    pub fn clear_pending(&self) {
        self.each(|vector| vector.pending = false);
    }

    /// Reset values of table, masks and pending bits (function level reset). Routing stays.
    pub fn reset(&self) {
        self.function_mask.store(false, Ordering::SeqCst);
        self.each(|vector| {
            vector.pending = false;
            vector.masked = false;
            if !vector.automask {
                vector.reset_entry();
            }
        });
    }

    /// [`Self::reset`] and no routing (the client is gone): every eventfd is closed.
    pub fn disconnect(&self) {
        self.each(|vector| vector.eventfd = None);
        self.reset();
    }

    /// Interrupts sent and held back, since the start.
    #[must_use]
    pub fn counters(&self) -> (u64, u64) {
        (
            self.sent.load(Ordering::Relaxed),
            self.held_back.load(Ordering::Relaxed),
        )
    }

    /// Read the MSI-X table. Bytes after the last entry read 0.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for_each_word(offset, data.len(), 4, |word, at, range| {
            let entry = u32::try_from(word / 4).ok().and_then(|vector| self.lock(vector));
            let value = entry.map_or(0, |vector| vector.entry[(word % 4) as usize]);
            data[range.clone()].copy_from_slice(&value.to_le_bytes()[at..at + range.len()]);
        });
    }

    /// Write the MSI-X table. Clearing a vector's mask bit sends its pending interrupt.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        for_each_word(offset, data.len(), 4, |word, at, range| {
            let Some(mut vector) = u32::try_from(word / 4).ok().and_then(|vector| self.lock(vector)) else {
                return;
            };
            let field = (word % 4) as usize;
            let mut bytes = vector.entry[field].to_le_bytes();
            bytes[at..at + range.len()].copy_from_slice(&data[range]);
            let value = u32::from_le_bytes(bytes);
            // Only the mask bit of the vector control is ours to keep; the others are reserved.
            vector.entry[field] = if field == 3 {
                value & msix::VECTOR_CTRL_MASK
            } else {
                value
            };
            if field == 3 {
                self.retry(&mut vector);
            }
        });
    }

    /// Read the pending-bit array. Writes to it do nothing.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = u32::try_from(first + bit).unwrap_or(u32::MAX);
                bits | (self.is_pending(vector) as u8) << bit
            });
        }
    }
}

/// Cut `[offset, offset + len)` at multiples of `size`: (word number, first byte in the word, range of the data).
fn for_each_word(
    offset: u64,
    len: usize,
    size: usize,
    mut action: impl FnMut(u64, usize, std::ops::Range<usize>),
) {
    let mut done = 0;
    while done < len {
        let Some(position) = offset.checked_add(done as u64) else {
            return;
        };
        let at = (position % size as u64) as usize;
        let step = (size - at).min(len - done);
        action(position / size as u64, at, done..done + step);
        done += step;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{OFlags, fcntl_getfl};

    use super::*;

    fn routed(interrupts: &Interrupts, vector: u32) -> OwnedFd {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        assert!(interrupts.set_eventfd(vector, Some(fd.try_clone().unwrap())));
        fd
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(fd, &mut bytes) {
            Ok(8) => u64::from_ne_bytes(bytes),
            Err(rustix::io::Errno::AGAIN) => 0,
            other => panic!("eventfd read: {other:?}"),
        }
    }

    fn control(interrupts: &Interrupts, vector: u64) -> u32 {
        let mut bytes = [0; 4];
        interrupts.table_read(vector * 16 + 12, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn test_trigger_when_routed_writes_the_eventfd() {
        let interrupts = Interrupts::new(4);
        let fd = routed(&interrupts, 2);
        assert_eq!(interrupts.trigger(2), Trigger::Sent);
        assert_eq!(interrupts.trigger(2), Trigger::Sent);
        assert_eq!(count(&fd), 2);
        assert_eq!(interrupts.trigger(4), Trigger::NoVector);
        assert!(!interrupts.set_eventfd(4, None));
        assert_eq!(interrupts.counters(), (2, 0));
    }

    #[test]
    fn test_trigger_when_not_routed_is_pending_until_an_eventfd_comes() {
        let interrupts = Interrupts::new(1);
        assert_eq!(interrupts.trigger(0), Trigger::Pending);
        assert!(interrupts.is_pending(0));
        let fd = routed(&interrupts, 0);
        assert_eq!(count(&fd), 1);
        assert!(!interrupts.is_pending(0));
    }

    #[test]
    fn test_trigger_when_masked_is_pending_and_sent_once_by_unmask() {
        let interrupts = Interrupts::new(80);
        let fd = routed(&interrupts, 70);
        interrupts.mask(70);
        interrupts.trigger(70);
        interrupts.trigger(70);
        assert_eq!(count(&fd), 0);
        let mut pba = [0; 16];
        interrupts.pba_read(0, &mut pba);
        assert_eq!(u128::from_le_bytes(pba), 1 << 70);
        interrupts.unmask(70);
        assert_eq!(
            count(&fd),
            1,
            "two triggers of a masked vector are one pending interrupt"
        );
        interrupts.unmask(70);
        assert_eq!(count(&fd), 0);
    }

    #[test]
    fn test_table_mask_when_written_holds_back_and_lets_through() {
        let interrupts = Interrupts::new(2);
        assert_eq!(control(&interrupts, 1), 1, "masked after reset");
        let fd = routed(&interrupts, 1);
        assert_eq!(control(&interrupts, 1), 0, "routing enables the vector");
        interrupts.table_write(16 + 12, &[0xff; 4]);
        assert_eq!(control(&interrupts, 1), 1, "reserved bits stay 0");
        interrupts.trigger(1);
        assert_eq!(count(&fd), 0);
        interrupts.table_write(16 + 12, &[0]);
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn test_table_when_accessed_in_odd_pieces_keeps_its_bytes() {
        let interrupts = Interrupts::new(2);
        interrupts.table_write(3, &[1, 2, 3, 4, 5, 6]);
        let mut bytes = [0xee; 40];
        interrupts.table_read(0, &mut bytes);
        assert_eq!(bytes[..12], [0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]);
        assert_eq!(bytes[12..16], [1, 0, 0, 0]);
        assert_eq!(bytes[32..], [0; 8], "after the last entry");
        interrupts.table_write(u64::MAX - 1, &[1; 8]);
    }

    #[test]
    fn test_function_mask_when_taken_away_sends_everything_pending() {
        let interrupts = Interrupts::new(3);
        let fds: Vec<_> = (0..3).map(|vector| routed(&interrupts, vector)).collect();
        interrupts.set_function_mask(true);
        interrupts.trigger(0);
        interrupts.trigger(2);
        interrupts.set_function_mask(false);
        assert_eq!(fds.iter().map(count).collect::<Vec<_>>(), [1, 0, 1]);
    }

    #[test]
    fn test_trigger_when_the_counter_is_full_and_blocking_returns_at_once() {
        let interrupts = Interrupts::new(1);
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        interrupts.set_eventfd(0, Some(fd.try_clone().unwrap()));
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || send.send(interrupts.trigger(0)).unwrap());
        assert_eq!(
            receive
                .recv_timeout(Duration::from_secs(20))
                .expect("trigger hangs"),
            Trigger::Sent
        );
        assert!(
            !fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK),
            "the client's flags are its own"
        );
    }

    #[test]
    fn test_disconnect_when_routed_closes_eventfds_and_resets_the_table() {
        let interrupts = Interrupts::new(2);
        let (read, write) = rustix::pipe::pipe().unwrap();
        interrupts.set_eventfd(0, Some(write));
        interrupts.set_function_mask(true);
        interrupts.trigger(0);
        interrupts.disconnect();
        assert_eq!(
            rustix::io::read(&read, &mut [0; 8]),
            Ok(0),
            "the write end is closed"
        );
        assert!(!interrupts.is_pending(0) && !interrupts.is_routed(0));
        assert_eq!(control(&interrupts, 0), 1);
        let fd = routed(&interrupts, 0);
        interrupts.trigger(0);
        assert_eq!(count(&fd), 1, "the function mask has gone");
    }

    #[test]
    fn test_reset_when_routed_keeps_vectors_enabled() {
        let interrupts = Interrupts::new(1);
        let fd = routed(&interrupts, 0);
        interrupts.mask(0);
        interrupts.trigger(0);
        interrupts.reset();
        assert_eq!(count(&fd), 0);
        interrupts.trigger(0);
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn test_automask_when_sent_holds_the_next_back_until_unmask() {
        let interrupts = Interrupts::default();
        interrupts.set_vectors(1, true);
        let fd = routed(&interrupts, 0);
        assert_eq!(interrupts.trigger(0), Trigger::Sent);
        assert_eq!(interrupts.trigger(0), Trigger::Pending);
        assert_eq!(count(&fd), 1);
        interrupts.unmask(0);
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn test_function_mask_when_set_during_triggers_is_followed_by_no_interrupt() {
        let interrupts = Interrupts::new(1);
        let fd = routed(&interrupts, 0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    interrupts.trigger(0);
                }
            });
            for _ in 0..2000 {
                interrupts.set_function_mask(true);
                count(&fd);
                for _ in 0..20 {
                    let late = count(&fd);
                    if late != 0 {
                        stop.store(true, Ordering::Relaxed);
                        panic!("{late} interrupts after the mask was set");
                    }
                }
                interrupts.set_function_mask(false);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn test_mask_races_when_triggers_run_lose_no_interrupt() {
        let interrupts = Interrupts::new(1);
        let fd = routed(&interrupts, 0);
        for _ in 0..200 {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..20 {
                        interrupts.set_function_mask(true);
                        interrupts.set_function_mask(false);
                    }
                });
                interrupts.trigger(0);
            });
            assert_eq!(count(&fd), 1, "sent exactly once");
            assert!(!interrupts.is_pending(0));
        }
    }
}
