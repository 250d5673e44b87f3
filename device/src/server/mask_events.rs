//! Eventfds by which a client masks and unmasks interrupts: SET_IRQS with DATA_EVENTFD and ACTION_MASK or
//! ACTION_UNMASK.
//!
//! The connection's thread looks at them, while it waits for a message and before it looks at one: what was
//! signalled before a message was sent is done before that message is. A client that stops in the middle of
//! a message delays its own eventfds only. While there are any, the thread does not busy-poll.
//!
//! Eventfds have no order among each other: what is signalled several times between two looks is done once, in the
//! order of the first signals. Who masks and unmasks by turns has to send a message in between. (The kernel's VFIO
//! acts inside the client's write, and so on each.)
//!
//! One eventfd may stand for several interrupts. It is watched once: a look that ran while the client's write was still
//! telling one watch after the other would drain it, and the rest of the watches would find nothing.
//!
//! As with the kernel's VFIO they stay until they are replaced, taken away (no file descriptor), all interrupts
//! are switched off (DATA_NONE, ACTION_TRIGGER, count 0) or the client goes; DEVICE_RESET keeps them, like
//! those to be triggered.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

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

/// An eventfd, and all that it stands for.
struct Watched {
    fd: OwnedFd,
    keys: BTreeSet<Key>,
}

/// What one client has registered.
pub(super) struct MaskEvents {
    epoll: OwnedFd,
    /// By what tells eventfds apart.
    eventfds: BTreeMap<u64, Watched>,
    /// The eventfd of each.
    watched: BTreeMap<Key, u64>,
    ready: Vec<Event>,
    /// Eventfds that the kernel could not tell apart from others.
    nameless: u64,
}

impl MaskEvents {
    fn new() -> Result<Self, Refusal> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).map_err(Refusal::MaskEvent)?,
            eventfds: BTreeMap::new(),
            watched: BTreeMap::new(),
            ready: Vec::new(),
            nameless: 0,
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
        let mut of_vectors = Vec::new();
        for (index, _) in vectors.clone().enumerate() {
            let fd = fds.take(index).expect("as many file descriptors as interrupts");
            let id = eventfd_id(&fd).unwrap_or_else(|| {
                self.nameless += 1;
                1 << 63 | self.nameless
            });
            of_vectors.push(id);
            if self.eventfds.contains_key(&id) {
                continue;
            }
            // Edge-triggered: one signal is one event, whatever count the client leaves in it.
            let flags = EventFlags::IN | EventFlags::ET;
            if let Err(errno) = epoll::add(&self.epoll, &fd, EventData::new_u64(id), flags) {
                self.forget_unused();
                return Err(Refusal::MaskEvent(errno));
            }
            let keys = BTreeSet::new();
            self.eventfds.insert(id, Watched { fd, keys });
        }
        for (vector, id) in vectors.zip(of_vectors) {
            let key = (vector, unmask);
            self.release(key);
            self.watched.insert(key, id);
            let watched = self.eventfds.get_mut(&id);
            watched.expect("nothing was forgotten yet").keys.insert(key);
        }
        self.forget_unused();
        Ok(())
    }

    fn take_away(&mut self, vectors: Range<u32>, unmask: bool) {
        for vector in vectors {
            self.release((vector, unmask));
        }
        self.forget_unused();
    }

    /// The key has no eventfd any more.
    fn release(&mut self, key: Key) {
        if let Some(watched) = self
            .watched
            .remove(&key)
            .and_then(|id| self.eventfds.get_mut(&id))
        {
            watched.keys.remove(&key);
        }
    }

    fn forget_unused(&mut self) {
        let epoll = &self.epoll;
        self.eventfds.retain(|_, watched| {
            let used = !watched.keys.is_empty();
            if !used {
                // Closing is not enough: the client has the same eventfd open, and events go on coming.
                let _ = epoll::delete(epoll, &watched.fd);
            }
            used
        });
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
        self.ready.reserve(self.eventfds.len());
        let at_once = Timespec::default();
        if epoll::wait(&self.epoll, spare_capacity(&mut self.ready), Some(&at_once)).is_err() {
            // INTR: looked at again before the next message.
            return;
        }
        for event in &self.ready {
            let Some(watched) = self.eventfds.get(&event.data.u64()) else {
                continue;
            };
            drain(&watched.fd);
            for &(vector, unmask) in &watched.keys {
                match unmask {
                    true => interrupts.unmask(vector),
                    false => interrupts.mask(vector),
                }
            }
        }
    }
}

/// The kernel's name of an eventfd: the same for all descriptors of it (`eventfd-id` in fdinfo, Linux 5.2).
fn eventfd_id(fd: &OwnedFd) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?;
    line.trim().parse().ok()
}

/// Take the count, as the kernel's VFIO does. Without ever waiting: the client can have taken it itself.
fn drain(fd: &OwnedFd) {
    let mut count = [0; 8];
    let mut to = [IoSliceMut::new(&mut count)];
    // All ones: no position, as in read. That nothing could be read is no error.
    let _ = preadv2(fd, &mut to, u64::MAX, ReadWriteFlags::NOWAIT);
}
