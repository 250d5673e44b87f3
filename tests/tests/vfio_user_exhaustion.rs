//! A device process that is out of file descriptors: it says so, serves on, and recovers.

mod vfio_user_scratch;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use protos::vfio_user::{Command, IrqIndex, IrqSet, IrqSetFlags, MessageFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tests::processes::Device;
use vfio_user_scratch::*;
use zerocopy::IntoBytes;

fn fds_of(pid: u32) -> BTreeSet<u64> {
    let list = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    list.flatten().filter_map(number).collect()
}

/// Routes `count` vectors from `start` on; the errno of the answer.
fn route(raw: &mut Raw, start: u32, fds: &[OwnedFd]) -> u32 {
    let set = IrqSet {
        argsz: IrqSet::SIZE as u32,
        flags: IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER,
        index: IrqIndex::MSIX,
        start,
        count: fds.len() as u32,
    };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    raw.send_with_fds(5, Command::DEVICE_SET_IRQS, set.as_bytes(), &fds);
    let (header, _) = raw.reply();
    assert_eq!(header.message_id, 5);
    header.error
}

fn read_identity(raw: &mut Raw) -> Vec<u8> {
    raw.send(6, Command::REGION_READ, &access(0, 7, 4, &[]));
    raw.expect_ok(6)[16..].to_vec()
}

fn until(what: &str, mut look: impl FnMut() -> bool) {
    let since = Instant::now();
    while !look() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn test_device_when_out_of_file_descriptors_refuses_what_needs_them_and_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("gru.sock");
    let device = Device::start(&socket, &[]);
    let pid = device.pid();
    drop(ready(&socket));
    // A client that comes while the one before is being cleaned up waits for that, so this is all that one takes.
    let mut raw = ready(&socket);
    read_identity(&mut raw);
    let connected = fds_of(pid);
    // Room for three more, wherever the free numbers are.
    let free = (0..).filter(|number| !connected.contains(number));
    let limit = free.take(3).last().map(|last| last + 1);
    let child = Pid::from_raw(i32::try_from(pid).unwrap());
    let few = Rlimit {
        current: limit,
        maximum: limit,
    };
    prlimit(child, Resource::Nofile, few).unwrap();

    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let events: Vec<OwnedFd> = (0..16).map(|_| event()).collect();
    // Too many for this process: the kernel delivers a part, and nothing of it is kept.
    assert_ne!(route(&mut raw, 0, &events), 0);
    assert_eq!(fds_of(pid), connected, "a part of a refused message stays open");
    // One after the other, until there is no room.
    let taken = (0..16)
        .take_while(|&at| route(&mut raw, at as u32, &events[at..=at]) == 0)
        .count();
    assert!((1..16).contains(&taken), "{taken}");
    assert_eq!(fds_of(pid).len(), connected.len() + taken);
    // What needs no descriptor works as before; what was routed is still routed.
    assert_eq!(read_identity(&mut raw), [0xa9, 0x10, 0x52, 0x47]);
    // Mapping memory needs none for long, but one to come in.
    let memory = memfd(0x1000);
    raw.send_with_fds(
        7,
        Command::DMA_MAP,
        dma_map(0, 0x1000).as_bytes(),
        &[memory.as_fd()],
    );
    let (header, _) = raw.reply();
    assert_eq!(
        (header.message_id, header.flags),
        (7, MessageFlags::REPLY | MessageFlags::ERROR)
    );
    // Another client cannot even be told so; it waits, and gets the device when there is room.
    let next = std::thread::spawn({
        let socket = socket.clone();
        move || {
            let mut raw = ready(&socket);
            (read_identity(&mut raw), raw)
        }
    });
    assert_eq!(read_identity(&mut raw), [0xa9, 0x10, 0x52, 0x47]);
    drop(raw);
    let (identity, mut next) = next.join().unwrap();
    assert_eq!(identity, [0xa9, 0x10, 0x52, 0x47]);
    assert_eq!(
        fds_of(pid).len(),
        connected.len(),
        "nothing of the first client's is left"
    );
    assert_eq!(route(&mut next, 0, &events[..1]), 0);
    drop(next);
    // The next one again waits until all of it is gone.
    let mut last = ready(&socket);
    read_identity(&mut last);
    assert_eq!(fds_of(pid), connected, "something of the clients before is left");
    drop(last);
    until("a device without clients", || fds_of(pid).len() < connected.len());
    device.end();
}
