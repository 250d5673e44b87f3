//! Completion queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protos::mlx5::cq::{
    CQE_PADDED, Cqc, Cqe, CqeOpcode, STATE_ARMED, STATE_FIRED, STATE_SOLICITED_ARMED, STATUS_OVERFLOW,
};
use protos::mlx5::eq::{DATA_NUMBER, Eqe, Event};
use protos::mlx5::{Layout, uar};
use zerocopy::IntoBytes;

use super::buffer::Buffer;
use super::eq::Eq;
use super::memory::Port;
use crate::dma::DmaError;
use crate::pci::Interrupts;
use crate::transport::Time;

const MASK: u32 = 0xff_ffff;

/// What a driver asked to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Armed {
    No,
    Next,
    Solicited,
}

/// A completion queue. `state` is held while an entry or an event is written.
#[derive(Debug)]
pub(super) struct Cq {
    pub(super) cqn: u32,
    pub(super) uar_page: u32,
    eq: Arc<Eq>,
    dbr: u64,
    state: Mutex<State>,
    destroyed: AtomicBool,
}

#[derive(Debug)]
struct State {
    context: Cqc,
    buffer: Buffer,
    log_size: u32,
    /// Logarithm of an entry's bytes.
    stride: u32,
    produced: u32,
    /// Of the doorbell record, when it was last read.
    consumed: u32,
    armed: Armed,
    /// One more than the index of the last solicited (or failed) completion.
    solicited: Option<u32>,
    overflow: bool,
    /// Completions that moderation has kept back an event for.
    gathered: u32,
    /// When that event is due at the latest.
    due: Option<Time>,
}

/// Why a queue cannot be resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResizeError {
    /// It is in error.
    Overflow,
    /// What the driver has not taken does not fit into one of the buffers.
    Outstanding,
    /// The old buffer cannot be written.
    Memory,
}

/// What the caller has to tell the driver besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Posted {
    /// Nothing.
    Yes,
    /// An event is due later: somebody has to call [`Cq::expire`] then.
    Moderated,
    /// An entry was lost: a CQ error.
    Overflow,
}

impl Cq {
    pub(super) fn new(cqn: u32, context: Cqc, buffer: Buffer, eq: Arc<Eq>) -> Self {
        Self {
            cqn,
            uar_page: context.get(Cqc::UAR_PAGE),
            eq,
            dbr: context.wide(Cqc::DBR_ADDR),
            state: Mutex::new(State {
                log_size: context.get(Cqc::LOG_SIZE),
                stride: entry_shift(&context),
                context,
                buffer,
                produced: 0,
                consumed: 0,
                armed: Armed::No,
                solicited: None,
                overflow: false,
                gathered: 0,
                due: None,
            }),
            destroyed: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is written any more when this returns.
    pub(super) fn destroy(&self) {
        self.destroyed.store(true, Ordering::SeqCst);
        drop(self.state());
    }

    pub(super) fn reports_to(&self, eqn: u8) -> bool {
        self.eq.eqn == eqn
    }

    /// The context as it is now.
    pub(super) fn query(&self) -> Cqc {
        let state = self.state();
        let armed = match state.armed {
            Armed::No => STATE_FIRED,
            Armed::Next => STATE_ARMED,
            Armed::Solicited => STATE_SOLICITED_ARMED,
        };
        state
            .context
            .clone()
            .with(Cqc::STATUS, if state.overflow { STATUS_OVERFLOW } else { 0 })
            .with(Cqc::STATE, armed)
            .with(Cqc::CONSUMER, state.consumed)
            .with(Cqc::PRODUCER, state.produced)
    }

    /// Writes a completion and, if the queue is armed for it, an event.
    pub(super) fn post(
        &self,
        port: &mut Port,
        interrupts: &Interrupts,
        cqe: &Cqe,
        solicited: bool,
        now: impl FnOnce() -> Time,
    ) -> Posted {
        let mut state = self.state();
        if self.destroyed.load(Ordering::SeqCst) || state.overflow {
            return Posted::Yes;
        }
        let state = &mut *state;
        // (A driver that ignores overruns has its unread entries overwritten.)
        if state.full() && !state.context.is_set(Cqc::OVERRUN_IGNORE) {
            // Read only when it matters: the record is a line that the driver writes.
            self.refresh(state, port);
            if state.full() {
                state.overflow = true;
                tracing::warn!(cqn = self.cqn, "a completion queue is full; it is in error now");
                return Posted::Overflow;
            }
        }
        if let Err(error) = state.write(port, cqe) {
            tracing::warn!(cqn = self.cqn, %error, "a completion cannot be written");
            state.overflow = true;
            return Posted::Overflow;
        }
        let solicited = solicited || cqe.syndrome().is_some();
        if solicited {
            state.solicited = Some(state.produced);
        }
        if state.armed == Armed::No || (state.armed == Armed::Solicited && !solicited) {
            return Posted::Yes;
        }
        if let Some((period, count)) = state.moderation() {
            state.gathered += 1;
            if state.gathered < count {
                if state.due.is_some() {
                    return Posted::Yes;
                }
                state.due = Some(now() + period);
                return Posted::Moderated;
            }
        }
        self.fire(state, port, interrupts);
        Posted::Yes
    }

    /// Reads how far the driver is. A record that cannot be read says nothing new.
    fn refresh(&self, state: &mut State, port: &mut Port) {
        if let Ok(consumed) = port.read_be32(self.dbr.wrapping_add(uar::DBR_CQ_CONSUMER)) {
            state.consumed = consumed & MASK;
        }
    }

    /// MODIFY_CQ: microseconds and completions, whichever comes first, that an event may wait; 0 in one of them turns
    /// moderation off. An event that waits is told now.
    pub(super) fn moderate(
        &self,
        port: &mut Port,
        interrupts: &Interrupts,
        period: Option<u32>,
        count: Option<u32>,
    ) {
        let mut state = self.state();
        for (field, value) in [(Cqc::PERIOD, period), (Cqc::MAX_COUNT, count)] {
            if let Some(value) = value {
                state.context.set(field, value);
            }
        }
        if state.due.is_some() && !self.destroyed.load(Ordering::SeqCst) {
            self.fire(&mut state, port, interrupts);
        }
    }

    /// Tells an event that moderation has kept back, if its time has come; else when it is due.
    pub(super) fn expire(&self, port: &mut Port, interrupts: &Interrupts, now: Time) -> Option<Time> {
        let mut state = self.state();
        if self.destroyed.load(Ordering::SeqCst) {
            return None;
        }
        let due = state.due?;
        if due > now {
            return Some(due);
        }
        self.fire(&mut state, port, interrupts);
        None
    }

    /// MODIFY_CQ with a new buffer: the last entry of the old one says so, and takes an index of its own. The driver
    /// copies what it has not taken, one index further.
    pub(super) fn resize(&self, port: &mut Port, context: &Cqc, buffer: Buffer) -> Result<(), ResizeError> {
        let mut state = self.state();
        let state = &mut *state;
        if state.overflow {
            return Err(ResizeError::Overflow);
        }
        self.refresh(state, port);
        let log_size = context.get(Cqc::LOG_SIZE);
        let outstanding = state.produced.wrapping_sub(state.consumed) & MASK;
        if state.full() || outstanding >= 1 << log_size {
            return Err(ResizeError::Outstanding);
        }
        let last = Cqe::new(CqeOpcode::RESIZE, 0, 0);
        if let Err(error) = state.write(port, &last) {
            tracing::warn!(cqn = self.cqn, %error, "the end of an old buffer cannot be written");
            return Err(ResizeError::Memory);
        }
        state.log_size = log_size;
        state.stride = entry_shift(context);
        state.buffer = buffer;
        // Copied with the rest.
        state.solicited = state.solicited.map(|end| end.wrapping_add(1) & MASK);
        for field in [Cqc::LOG_SIZE, Cqc::CQE_SIZE, Cqc::PAGE_OFFSET, Cqc::LOG_PAGE_SIZE] {
            state.context.set(field, context.get(field));
        }
        Ok(())
    }

    /// The driver's arm doorbell: its first word.
    pub(super) fn arm(&self, port: &mut Port, interrupts: &Interrupts, word: u32) {
        let mut state = self.state();
        if self.destroyed.load(Ordering::SeqCst) {
            return;
        }
        let consumed = word & uar::cq_arm::CONSUMER;
        state.consumed = consumed;
        let unread = |end: u32| {
            let ahead = end.wrapping_sub(consumed) & MASK;
            ahead != 0 && ahead <= MASK / 2
        };
        let (armed, due) = if word & uar::cq_arm::SOLICITED == 0 {
            (Armed::Next, unread(state.produced))
        } else {
            (Armed::Solicited, state.solicited.is_some_and(unread))
        };
        state.armed = armed;
        state.gathered = 0;
        state.due = None;
        if due {
            // Not moderated: the driver has been asked to look again already.
            self.fire(&mut state, port, interrupts);
        }
    }

    fn fire(&self, state: &mut State, port: &mut Port, interrupts: &Interrupts) {
        state.armed = Armed::No;
        state.gathered = 0;
        state.due = None;
        let eqe = Eqe::new(Event::COMPLETION, 0).with(DATA_NUMBER, self.cqn);
        self.eq.post(port, interrupts, &eqe);
    }

    pub(super) fn describe(&self) -> serde_json::Value {
        let state = self.state();
        serde_json::json!({
            "cqn": self.cqn, "eqn": self.eq.eqn, "entries": 1u32 << state.log_size, "produced": state.produced,
            "consumed": state.consumed, "armed": format!("{:?}", state.armed), "overflow": state.overflow,
            "period_us": state.context.get(Cqc::PERIOD), "max_count": state.context.get(Cqc::MAX_COUNT),
            "moderated": state.gathered,
        })
    }
}

impl State {
    fn full(&self) -> bool {
        self.produced.wrapping_sub(self.consumed) & MASK >= 1 << self.log_size
    }

    /// How long and for how many completions an event may wait.
    fn moderation(&self) -> Option<(Duration, u32)> {
        let (period, count) = (self.context.get(Cqc::PERIOD), self.context.get(Cqc::MAX_COUNT));
        (period != 0 && count != 0).then(|| (Duration::from_micros(period.into()), count))
    }

    /// Hands an entry over at the next index.
    fn write(&mut self, port: &mut Port, cqe: &Cqe) -> Result<(), DmaError> {
        let index = self.produced;
        let mut place = u64::from(index & ((1 << self.log_size) - 1)) << self.stride;
        if self.context.get(Cqc::CQE_SIZE) == CQE_PADDED {
            let (iova, _) = self.buffer.at(place);
            port.write(iova, &[0; 64])?;
        }
        // In a 128-byte entry the upper half is the one that counts.
        place += (1 << self.stride) - 64;
        let (iova, _) = self.buffer.at(place);
        let mut cqe = *cqe;
        cqe.op_own |= (index >> self.log_size & 1) as u8;
        port.hand_over(iova, cqe.as_bytes())?;
        self.produced = index.wrapping_add(1) & MASK;
        Ok(())
    }
}

/// Logarithm of an entry's bytes.
pub(super) fn entry_shift(context: &Cqc) -> u32 {
    if context.get(Cqc::CQE_SIZE) == 0 { 6 } else { 7 }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use protos::mlx5::eq::Eqc;

    use super::*;
    use crate::atc::{Atc, AtcConfig};
    use crate::dma::{Prot, Space};

    const IOVA: u64 = 0x1_0000;

    struct Rig {
        port: Port,
        interrupts: Arc<Interrupts>,
        eq: Arc<Eq>,
        cq: Cq,
    }

    fn rig(period: u32, count: u32) -> Rig {
        rig_of(
            Cqc::zeroed()
                .with(Cqc::LOG_SIZE, 6)
                .with(Cqc::PERIOD, period)
                .with(Cqc::MAX_COUNT, count),
        )
    }

    /// With the queue in the second page.
    fn rig_of(context: Cqc) -> Rig {
        let dma = Space::new();
        let memory = rustix::fs::memfd_create("queues", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 1 << 16).unwrap();
        let fd = memory.as_fd().try_clone_to_owned().unwrap();
        dma.map(IOVA, 1 << 16, fd, 0, Prot::READ_WRITE).unwrap();
        let config = AtcConfig {
            tickets: 1,
            engines: 1,
            ..AtcConfig::default()
        };
        let engine = Atc::new(config, Arc::clone(&dma)).engine().unwrap();
        let port = Port {
            engine,
            ticket: 0,
            dma,
        };
        let page = |number: u64| Buffer::parse(&(IOVA + number * 4096).to_be_bytes(), 0, 0, 4096).unwrap();
        let events = Eqc::zeroed().with(Eqc::LOG_SIZE, 6);
        let eq = Arc::new(Eq::new(1, events, 0, page(0)));
        let context = context.with_wide(Cqc::DBR_ADDR, IOVA + 0x8000);
        let cq = Cq::new(7, context, page(1), Arc::clone(&eq));
        Rig {
            port,
            interrupts: Interrupts::new(2),
            eq,
            cq,
        }
    }

    impl Rig {
        fn post(&mut self, now: u64, solicited: bool) -> Posted {
            let cqe = Cqe::new(CqeOpcode::RESPONDER_SEND, 0x40, 0);
            self.cq
                .post(&mut self.port, &self.interrupts, &cqe, solicited, || Time(now))
        }

        /// Armed after everything that is there.
        fn arm(&mut self, solicited: bool) {
            let flag = if solicited { uar::cq_arm::SOLICITED } else { 0 };
            let produced = self.cq.query().get(Cqc::PRODUCER);
            self.cq.arm(&mut self.port, &self.interrupts, produced | flag);
        }

        fn expire(&mut self, now: u64) -> Option<Time> {
            self.cq.expire(&mut self.port, &self.interrupts, Time(now))
        }

        fn events(&self) -> u32 {
            self.eq.query().get(Eqc::PRODUCER)
        }
    }

    #[test]
    fn test_full_queue_when_it_ignores_overruns_goes_on() {
        for (ignores, last) in [(0, Posted::Overflow), (1, Posted::Yes)] {
            let context = Cqc::zeroed()
                .with(Cqc::LOG_SIZE, 6)
                .with(Cqc::OVERRUN_IGNORE, ignores);
            let mut rig = rig_of(context);
            for _ in 0..64 {
                assert_eq!(rig.post(0, false), Posted::Yes);
            }
            assert_eq!(rig.post(0, false), last);
            assert_eq!(rig.cq.query().get(Cqc::PRODUCER), 64 + ignores);
        }
    }

    #[test]
    fn test_entry_when_padded_is_written_whole() {
        for (size, first) in [(1, 0xff), (CQE_PADDED, 0)] {
            let context = Cqc::zeroed().with(Cqc::LOG_SIZE, 5).with(Cqc::CQE_SIZE, size);
            let mut rig = rig_of(context);
            rig.port.write(IOVA + 4096, &[0xff; 256]).unwrap();
            rig.post(0, false);
            let mut entries = [0; 256];
            rig.port.read(IOVA + 4096, &mut entries).unwrap();
            assert_eq!(entries[..64], [first; 64], "{size}");
            assert_eq!(
                entries[127],
                (CqeOpcode::RESPONDER_SEND.0) << 4,
                "{size}: the owner"
            );
            assert_eq!(entries[128..], [0xff; 128], "{size}");
        }
    }

    #[test]
    fn test_moderated_event_when_the_count_is_reached_comes_at_once() {
        let mut rig = rig(100, 3);
        for round in 0..4 {
            rig.arm(false);
            assert_eq!(rig.post(1000, false), Posted::Moderated);
            assert_eq!((rig.post(2000, false), rig.events()), (Posted::Yes, round));
            assert_eq!((rig.post(3000, false), rig.events()), (Posted::Yes, round + 1));
            // Fired: nothing is due any more.
            assert_eq!(rig.expire(u64::MAX), None);
            assert_eq!((rig.post(4000, false), rig.events()), (Posted::Yes, round + 1));
        }
    }

    #[test]
    fn test_moderated_event_when_its_period_has_passed_comes_once() {
        let mut rig = rig(100, 3);
        rig.arm(false);
        assert_eq!(rig.post(1000, false), Posted::Moderated);
        assert_eq!(rig.post(2000, false), Posted::Yes);
        // From the first completion.
        assert_eq!((rig.expire(100_999), rig.events()), (Some(Time(101_000)), 0));
        assert_eq!((rig.expire(101_000), rig.events()), (None, 1));
        assert_eq!((rig.expire(u64::MAX), rig.events()), (None, 1));
    }

    #[test]
    fn test_moderation_when_one_of_both_is_zero_is_off() {
        for (period, count) in [(0, 0), (0, 3), (100, 0), (100, 1)] {
            let mut rig = rig(period, count);
            rig.arm(false);
            assert_eq!(
                (rig.post(0, false), rig.events()),
                (Posted::Yes, 1),
                "{period} {count}"
            );
        }
    }

    #[test]
    fn test_moderation_when_armed_for_solicited_ones_counts_only_these() {
        let mut rig = rig(100, 2);
        rig.arm(true);
        assert_eq!(rig.post(0, false), Posted::Yes);
        assert_eq!(rig.post(0, true), Posted::Moderated);
        assert_eq!((rig.post(0, false), rig.events()), (Posted::Yes, 0));
        assert_eq!((rig.post(0, true), rig.events()), (Posted::Yes, 1));
    }

    #[test]
    fn test_moderation_when_changed_tells_what_it_kept_back() {
        let mut rig = rig(100, 3);
        rig.arm(false);
        assert_eq!(rig.post(0, false), Posted::Moderated);
        rig.cq.moderate(&mut rig.port, &rig.interrupts, Some(50), None);
        assert_eq!((rig.expire(u64::MAX), rig.events()), (None, 1));
        let context = rig.cq.query();
        assert_eq!((context.get(Cqc::PERIOD), context.get(Cqc::MAX_COUNT)), (50, 3));
        rig.cq.destroy();
        assert_eq!((rig.post(0, false), rig.events()), (Posted::Yes, 1));
    }
}
