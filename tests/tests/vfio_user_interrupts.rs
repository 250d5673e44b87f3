//! DEVICE_SET_IRQS over a socket, in all its forms.

mod vfio_user_scratch;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protos::vfio_user::{Command, IrqIndex, IrqSet, IrqSetFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vfio_user_scratch::*;
use zerocopy::IntoBytes;

const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;

fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap()
}

fn events(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| event(EventfdFlags::NONBLOCK)).collect()
}

fn add(fd: &OwnedFd, value: u64) {
    rustix::io::write(fd, &value.to_ne_bytes()).unwrap();
}

/// Take what is in it.
fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Err(Errno::AGAIN) => 0,
        other => other.map(|_| u64::from_ne_bytes(bytes)).unwrap(),
    }
}

fn counts(fds: &[OwnedFd]) -> Vec<u64> {
    fds.iter().map(count).collect()
}

/// Wait until it has been signalled.
fn arrives(fd: &OwnedFd) -> bool {
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)) == Ok(1)
}

fn set(flags: u32, start: u32, count: u32) -> IrqSet {
    IrqSet {
        argsz: 20,
        flags: IrqSetFlags(flags),
        index: IrqIndex::MSIX,
        start,
        count,
    }
}

struct Client {
    raw: Raw,
    id: u16,
}

impl Client {
    fn connect(rig: &Rig) -> Self {
        Self {
            raw: ready(&rig.path),
            id: 10,
        }
    }

    fn send(&mut self, set: IrqSet, data: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.id += 1;
        let body = [set.as_bytes(), data].concat();
        match fds {
            [] => self.raw.send(self.id, Command::DEVICE_SET_IRQS, &body),
            fds => self
                .raw
                .send_with_fds(self.id, Command::DEVICE_SET_IRQS, &body, fds),
        }
        self.id
    }

    #[track_caller]
    fn set(&mut self, set: IrqSet, data: &[u8]) {
        let id = self.send(set, data, &[]);
        self.raw.expect_ok(id);
    }

    #[track_caller]
    fn set_fds(&mut self, set: IrqSet, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let id = self.send(set, &[], &fds);
        self.raw.expect_ok(id);
    }

    #[track_caller]
    fn refused(&mut self, set: IrqSet, fds: &[OwnedFd], errno: i32) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let id = self.send(set, &[], &fds);
        self.raw.expect_error(id, errno);
    }

    /// The device raises these; an answered write.
    #[track_caller]
    fn raise(&mut self, vectors: impl IntoIterator<Item = u8>) {
        for vector in vectors {
            self.id += 1;
            let body = access(RAISE, 0, 8, &[vector, 0, 0, 0, 0, 0, 0, 0]);
            self.raw.send(self.id, Command::REGION_WRITE, &body);
            self.raw.expect_ok(self.id);
        }
    }
}

#[test]
fn test_interrupts_when_set_by_bool_and_none_act_on_exactly_those() {
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let fds = events(4);
    client.set_fds(set(EVENTFD | TRIGGER, 0, 4), &fds);
    client.set(set(NONE | TRIGGER, 1, 2), &[]);
    assert_eq!(counts(&fds), [0, 1, 1, 0]);
    client.set(set(BOOL | TRIGGER, 0, 4), &[1, 0, 0, 2]);
    assert_eq!(counts(&fds), [1, 0, 0, 1]);
    client.set(set(NONE | MASK, 0, 2), &[]);
    client.set(set(NONE | TRIGGER, 0, 4), &[]);
    assert_eq!(counts(&fds), [0, 0, 1, 1]);
    client.set(set(BOOL | UNMASK, 0, 2), &[0, 1]);
    assert_eq!(counts(&fds), [0, 1, 0, 0], "unmasked: the pending one comes");
    client.set(set(NONE | TRIGGER, 0, 0), &[]);
    client.set(set(NONE | TRIGGER, 0, 4), &[]);
    assert_eq!(counts(&fds), [0; 4], "all routing is gone");
}

#[test]
fn test_mask_eventfd_when_signalled_masks_before_the_next_message() {
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let (fds, masks, unmasks) = (events(4), events(2), events(2));
    client.set_fds(set(EVENTFD | TRIGGER, 0, 4), &fds);
    client.set_fds(set(EVENTFD | MASK, 1, 2), &masks);
    client.set_fds(set(EVENTFD | UNMASK, 1, 2), &unmasks);
    for _ in 0..100 {
        client.raise(0..4);
        assert_eq!(counts(&fds), [1; 4]);
        // Vectors 1 and 2; the message that raises was sent after.
        add(&masks[0], 1);
        add(&masks[1], 5);
        client.raise(0..4);
        assert_eq!(counts(&fds), [1, 0, 0, 1]);
        add(&unmasks[1], 1);
        // No message: the server waits for the eventfds as well as for the socket.
        assert!(arrives(&fds[2]), "what was pending comes with the unmasking");
        assert_eq!(counts(&fds), [0, 0, 1, 0]);
        add(&unmasks[0], 1);
        assert!(arrives(&fds[1]));
        assert_eq!(counts(&fds), [0, 1, 0, 0]);
    }
    assert_eq!(
        (counts(&masks), counts(&unmasks)),
        (vec![0; 2], vec![0; 2]),
        "the counts are taken"
    );
}

#[test]
fn test_mask_eventfd_when_it_comes_signalled_or_stands_for_several_acts_on_all() {
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let fds = events(3);
    client.set_fds(set(EVENTFD | TRIGGER, 0, 3), &fds);
    let one = event(EventfdFlags::empty());
    add(&one, 1);
    let same: Vec<_> = (0..3).map(|_| one.try_clone().unwrap()).collect();
    client.set_fds(set(EVENTFD | MASK, 0, 3), &same);
    client.raise(0..3);
    assert_eq!(counts(&fds), [0; 3]);
    client.set(set(NONE | UNMASK, 0, 3), &[]);
    assert_eq!(counts(&fds), [1; 3]);
    add(&one, 1);
    client.raise(0..3);
    assert_eq!(counts(&fds), [0; 3]);
}

/// The look may run in the middle of the client's write.
#[test]
fn test_mask_eventfd_when_signalled_while_the_server_looks_acts_on_all() {
    const VECTORS: u32 = 32;
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let fds = events(VECTORS as usize);
    let one = event(EventfdFlags::empty());
    for start in (0..VECTORS).step_by(16) {
        client.set_fds(set(EVENTFD | TRIGGER, start, 16), &fds[start as usize..][..16]);
        let same: Vec<_> = (0..16).map(|_| one.try_clone().unwrap()).collect();
        client.set_fds(set(EVENTFD | MASK, start, 16), &same);
    }
    let (go, ask) = std::sync::mpsc::channel();
    let (signalled, done) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let one = &one;
        scope.spawn(move || {
            while ask.recv().is_ok() {
                add(one, 1);
                signalled.send(()).unwrap();
            }
        });
        for round in 0..2000 {
            go.send(()).unwrap();
            // Each message is a look.
            while done.try_recv().is_err() {
                client.set(set(NONE | TRIGGER, VECTORS, 1), &[]);
            }
            client.set(set(NONE | TRIGGER, 0, VECTORS), &[]);
            assert_eq!(counts(&fds), [0; VECTORS as usize], "round {round}");
            client.set(set(NONE | UNMASK, 0, VECTORS), &[]);
            counts(&fds);
        }
        drop(go);
    });
}

#[test]
fn test_mask_eventfd_when_taken_away_or_replaced_does_nothing_more() {
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let (fds, masks, others) = (events(3), events(3), events(3));
    client.set_fds(set(EVENTFD | TRIGGER, 0, 3), &fds);
    client.set_fds(set(EVENTFD | MASK, 0, 3), &masks);
    // Another one for vector 0, none for vector 1.
    client.set_fds(set(EVENTFD | MASK, 0, 1), &others[..1]);
    client.set(set(EVENTFD | MASK, 1, 1), &[]);
    masks.iter().for_each(|fd| add(fd, 1));
    client.raise(0..3);
    assert_eq!(counts(&fds), [1, 1, 0]);
    assert_eq!(counts(&masks), [1, 1, 0], "nobody reads those any more");
    add(&others[0], 1);
    client.raise([0]);
    assert_eq!(counts(&fds), [0; 3]);
    client.set(set(NONE | UNMASK, 0, 3), &[]);
    // Two change places, and one is replaced by itself.
    let pair = |a: usize, b: usize| [&others[a], &others[b]].map(|fd| fd.try_clone().unwrap());
    for fds in [pair(0, 1), pair(1, 0), pair(1, 0)] {
        client.set_fds(set(EVENTFD | MASK, 0, 2), &fds);
    }
    add(&others[1], 1);
    counts(&fds);
    client.raise(0..2);
    assert_eq!(counts(&fds), [0, 1, 0], "vector 0 has the second one now");
    client.set(set(NONE | UNMASK, 0, 3), &[]);
    client.set_fds(set(EVENTFD | MASK, 0, 1), &others[..1]);
    client.set(set(EVENTFD | MASK, 1, 1), &[]);
    counts(&fds);
    // A reset of the device keeps them, like those that it triggers.
    client.raw.send(5, Command::DEVICE_RESET, &[]);
    client.raw.expect_ok(5);
    add(&others[0], 1);
    client.raise(0..3);
    assert_eq!(counts(&fds), [0, 1, 1]);
    client.set(set(NONE | UNMASK, 0, 3), &[]);
    counts(&fds);
    // Everything off, and the trigger back: nothing masks it.
    client.set(set(NONE | TRIGGER, 0, 0), &[]);
    client.set_fds(set(EVENTFD | TRIGGER, 0, 3), &fds);
    add(&masks[2], 1);
    add(&others[0], 1);
    client.raise(0..3);
    assert_eq!(counts(&fds), [1; 3]);
}

#[test]
fn test_mask_eventfds_when_the_client_has_gone_mean_nothing_to_the_next() {
    let rig = Rig::start();
    let masks = events(3);
    let mut client = Client::connect(&rig);
    client.set_fds(set(EVENTFD | MASK, 0, 3), &masks);
    drop(client);
    let mut client = Client::connect(&rig);
    let fds = events(3);
    client.set_fds(set(EVENTFD | TRIGGER, 0, 3), &fds);
    masks.iter().for_each(|fd| add(fd, 1));
    client.raise(0..3);
    assert_eq!(counts(&fds), [1; 3]);
}

#[test]
fn test_mask_eventfds_when_wrong_or_too_many_are_refused_and_change_nothing() {
    // 2 * 140 of the vectors' eventfds are more than a client may have watched.
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let good = events(16);
    let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mixed = [good[0].try_clone().unwrap(), pipe.0];
    client.refused(set(EVENTFD | MASK, 0, 2), &mixed, EINVAL);
    client.refused(set(EVENTFD | MASK, 0, 2), &good[..1], EINVAL);
    client.refused(set(EVENTFD | MASK, 139, 2), &good[..2], EINVAL);
    client.refused(set(EVENTFD | MASK | UNMASK, 0, 1), &good[..1], EINVAL);
    client.set(set(EVENTFD | UNMASK, 0, 140), &[]);
    for start in (0..128).step_by(16) {
        client.set_fds(set(EVENTFD | MASK, start, 16), &good);
        client.set_fds(set(EVENTFD | UNMASK, start, 16), &good);
    }
    client.refused(set(EVENTFD | MASK, 120, 16), &good, ENOSPC);
    // Those that are there can be replaced, and taken away to make room.
    client.set_fds(set(EVENTFD | MASK, 0, 16), &good);
    client.set(set(EVENTFD | UNMASK, 0, 16), &[]);
    client.set_fds(set(EVENTFD | MASK, 120, 16), &good);
    let fds = events(1);
    client.set_fds(set(EVENTFD | TRIGGER, 135, 1), &fds);
    add(&good[15], 1);
    client.raise([135]);
    assert_eq!(counts(&fds), [0], "vector 135 is masked by the last of them");
}

#[test]
fn test_mask_eventfd_when_the_server_stops_does_not_keep_it() {
    let mut rig = Rig::start();
    let mut client = Client::connect(&rig);
    client.set_fds(set(EVENTFD | MASK, 0, 2), &events(2));
    rig.finish();
    client.raw.expect_closed();
}

/// Where the config space has the MSI-X message control word of a [`Scratch`].
const MESSAGE_CONTROL: u64 = 0x90 + 2;
const FUNCTION_MASK: u16 = 1 << 14;
const MSIX_ENABLE: u16 = 1 << 15;

#[test]
fn test_pending_bits_when_read_over_the_socket_show_what_is_held_back_until_it_is_unmasked() {
    /// In each of the three words of the pending-bit array, the last one included.
    const HELD: [u8; 5] = [0, 63, 64, 70, VECTORS as u8 - 1];
    fn pending(client: &mut Client) -> Vec<u8> {
        client.id += 1;
        let body = access(MSIX.pba_offset, 0, 24, &[]);
        client.raw.send(client.id, Command::REGION_READ, &body);
        let bits = client.raw.expect_ok(client.id)[16..].to_vec();
        let is_set = |vector: &u8| bits[usize::from(*vector / 8)] >> (vector % 8) & 1 != 0;
        (0..192).filter(is_set).collect()
    }
    fn write(client: &mut Client, region: u32, offset: u64, data: &[u8]) {
        client.id += 1;
        let body = access(offset, region, data.len() as u32, data);
        client.raw.send(client.id, Command::REGION_WRITE, &body);
        client.raw.expect_ok(client.id);
    }
    fn mask_in_the_table(client: &mut Client, vector: u8, masked: bool) {
        let control = MSIX.table_offset + u64::from(vector) * 16 + 12;
        write(client, 0, control, &u32::from(masked).to_le_bytes());
    }
    fn mask_by_set_irqs(client: &mut Client, vector: u8, masked: bool) {
        let action = if masked { MASK } else { UNMASK };
        client.set(set(NONE | action, vector.into(), 1), &[]);
    }
    let rig = Rig::start();
    let mut client = Client::connect(&rig);
    let fds = events(HELD.len());
    for (vector, fd) in HELD.iter().zip(&fds) {
        let one = [fd.try_clone().unwrap()];
        client.set_fds(set(EVENTFD | TRIGGER, (*vector).into(), 1), &one);
    }
    write(&mut client, 7, MESSAGE_CONTROL, &MSIX_ENABLE.to_le_bytes());
    for mask in [mask_in_the_table, mask_by_set_irqs] {
        assert_eq!(pending(&mut client), Vec::<u8>::new());
        HELD.iter().for_each(|vector| mask(&mut client, *vector, true));
        assert_eq!(pending(&mut client), Vec::<u8>::new(), "masked, but not raised");
        // Twice is once. One after the other, so that each has the bit that it should.
        for raised in 1..=HELD.len() {
            client.raise([HELD[raised - 1], HELD[raised - 1]]);
            assert_eq!(pending(&mut client), HELD[..raised]);
        }
        assert_eq!(pending(&mut client), HELD, "reading clears nothing");
        assert_eq!(counts(&fds), [0; HELD.len()]);
        // Software cannot write them.
        write(&mut client, 0, MSIX.pba_offset, &[0xff; 24]);
        assert_eq!(pending(&mut client), HELD);
        for unmasked in 1..=HELD.len() {
            mask(&mut client, HELD[unmasked - 1], false);
            assert_eq!(pending(&mut client), HELD[unmasked..]);
            let mut expected = [0; HELD.len()];
            expected[unmasked - 1] = 1;
            assert_eq!(counts(&fds), expected, "that one comes, once");
        }
    }
    // The whole function.
    write(
        &mut client,
        7,
        MESSAGE_CONTROL,
        &(MSIX_ENABLE | FUNCTION_MASK).to_le_bytes(),
    );
    client.raise(HELD);
    assert_eq!(
        (pending(&mut client), counts(&fds)),
        (HELD.to_vec(), vec![0; HELD.len()])
    );
    // Masked twice, unmasked once: it stays where it is.
    mask_in_the_table(&mut client, HELD[1], true);
    write(&mut client, 7, MESSAGE_CONTROL, &MSIX_ENABLE.to_le_bytes());
    assert_eq!(
        (pending(&mut client), counts(&fds)),
        (vec![HELD[1]], vec![1, 0, 1, 1, 1])
    );
    mask_in_the_table(&mut client, HELD[1], false);
    assert_eq!(
        (pending(&mut client), counts(&fds)),
        (vec![], vec![0, 1, 0, 0, 0])
    );
}
