//! Eventfds by which a client masks and unmasks interrupts: SET_IRQS with DATA_EVENTFD and ACTION_MASK or
//! ACTION_UNMASK.
//!
//! The connection's thread looks at them, while it waits for a message and before it looks at one: what was
//! signalled before a message was sent is done before that message is. A client that stops in the middle of
//! a message delays its own eventfds only. While there are any, the thread does not busy-poll.
//!
//! As with the kernel's VFIO they stay until they are replaced, taken away (no file descriptor), all interrupts
//! are switched off (DATA_NONE, ACTION_TRIGGER, count 0) or the client goes; DEVICE_RESET keeps them, like
//! those to be triggered.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::OwnedFd;

use protos::vfio_user::IrqAction;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::dispatch::Refusal;
use super::frame::{Ended, Fds};
use crate::pci::Interrupts;

/// Most of them for one client, so that it does not use up the file descriptors that others need: both
/// kinds for 128 interrupts.
pub(super) const MAX_MASK_EVENTS: usize = 256;

/// Interrupt, and whether it is unmasked (else masked).
type Key = (u32, bool);

/// What one client has registered.
pub(super) struct MaskEvents {
    epoll: OwnedFd,
    watched: BTreeMap<Key, OwnedFd>,
    ready: Vec<Event>,
}

impl MaskEvents {
    fn new() -> Result<Self, Refusal> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).map_err(Refusal::MaskEvent)?,
            watched: BTreeMap::new(),
            ready: Vec::new(),
        })
    }

    /// Register `fds` for `vectors`; none at all takes away what is there. When it fails nothing has changed.
    pub(super) fn set(
        slot: &mut Option<Self>,
        vectors: Range<u32>,
        action: IrqAction,
        fds: &mut Fds,
    ) -> Result<(), Refusal> {
        let unmask = action == IrqAction::Unmask;
        if fds.len() == 0 {
            if let Some(events) = slot {
                events.take_away(vectors, unmask);
                if events.watched.is_empty() {
                    *slot = None;
                }
            }
            return Ok(());
        }
        let before = slot.as_ref().map_or(0, |events| events.watched.len());
        let known = |vector: &u32| {
            let key = (*vector, unmask);
            slot.as_ref()
                .is_some_and(|events| events.watched.contains_key(&key))
        };
        let new = vectors.clone().filter(|vector| !known(vector)).count();
        if before + new > MAX_MASK_EVENTS {
            return Err(Refusal::MaskEvents);
        }
        let mut events = match slot.take() {
            Some(events) => events,
            None => Self::new()?,
        };
        let result = events.add(vectors, unmask, fds);
        *slot = Some(events).filter(|events| !events.watched.is_empty());
        result
    }

    fn add(&mut self, vectors: Range<u32>, unmask: bool, fds: &mut Fds) -> Result<(), Refusal> {
        let mut added: Vec<(Key, OwnedFd)> = Vec::new();
        for (index, vector) in vectors.enumerate() {
            let key = (vector, unmask);
            let fd = fds.take(index).expect("as many file descriptors as interrupts");
            // Edge-triggered: one signal is one event, whatever count the client leaves in it.
            let flags = EventFlags::IN | EventFlags::ET;
            if let Err(errno) = epoll::add(&self.epoll, &fd, encode(key), flags) {
                for (_, fd) in &added {
                    let _ = epoll::delete(&self.epoll, fd);
                }
                return Err(Refusal::MaskEvent(errno));
            }
            added.push((key, fd));
        }
        for (key, fd) in added {
            if let Some(old) = self.watched.insert(key, fd) {
                let _ = epoll::delete(&self.epoll, &old);
            }
        }
        Ok(())
    }

    fn take_away(&mut self, vectors: Range<u32>, unmask: bool) {
        for vector in vectors {
            if let Some(old) = self.watched.remove(&(vector, unmask)) {
                // Closing is not enough: the client has the same eventfd open, and events go on coming.
                let _ = epoll::delete(&self.epoll, &old);
            }
        }
    }

    /// Do what is signalled, and wait for `socket` unless a message has begun to arrive (`buffered`).
    pub(super) fn before_message(
        &mut self,
        socket: &OwnedFd,
        buffered: bool,
        interrupts: &Interrupts,
    ) -> Result<(), Ended> {
        let mut wait = !buffered;
        while wait {
            let mut fds = [
                PollFd::new(socket, PollFlags::IN),
                PollFd::new(&self.epoll, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Ended::Socket(errno)),
            }
            wait = fds[0].revents().is_empty();
            if wait {
                self.apply(interrupts);
            }
        }
        // Again: a signal that came before the message did may have come after the look above.
        self.apply(interrupts);
        Ok(())
    }

    fn apply(&mut self, interrupts: &Interrupts) {
        self.ready.clear();
        // Room for all: an eventfd that stands for several interrupts is ready for none of them once it is
        // drained.
        self.ready.reserve(self.watched.len());
        let at_once = Timespec::default();
        if epoll::wait(&self.epoll, spare_capacity(&mut self.ready), Some(&at_once)).is_err() {
            // INTR: looked at again before the next message.
            return;
        }
        let keys = self.ready.iter().map(|event| decode(event.data));
        for fd in keys.clone().filter_map(|key| self.watched.get(&key)) {
            drain(fd);
        }
        for (vector, unmask) in keys {
            match unmask {
                true => interrupts.unmask(vector),
                false => interrupts.mask(vector),
            }
        }
    }
}

fn encode((vector, unmask): Key) -> EventData {
    EventData::new_u64(u64::from(unmask) << 32 | u64::from(vector))
}

fn decode(data: EventData) -> Key {
    let data = data.u64();
    (data as u32, data >> 32 != 0)
}

/// Take the count, as the kernel's VFIO does. Without ever waiting: the client can have taken it itself.
fn drain(fd: &OwnedFd) {
    let mut count = [0; 8];
    let mut to = [IoSliceMut::new(&mut count)];
    // All ones: no position, as in read. That nothing could be read is no error.
    let _ = preadv2(fd, &mut to, u64::MAX, ReadWriteFlags::NOWAIT);
}
