//! REGION_IO_FDS when the device has more of them than a message may carry.

mod vfio_user_scratch;

use std::convert::Infallible;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use device::model::{AccessError, BarSpec, Identity, IoEventFd, Model, MsixSpec};
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use protos::vfio_user::{Command, Header, IoFd, IoFdType, IoFdsInfo, MessageFlags, RegionIndex};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vfio_user_scratch::Raw;
use zerocopy::{FromBytes, IntoBytes};

/// More than the 16 that the server sends at most.
const BELLS: usize = 20;

/// Doorbells, and nothing else.
#[derive(Debug)]
struct Bells(Vec<OwnedFd>);

impl Model for Bells {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 1,
            device: 1,
            subsystem_vendor: 0,
            subsystem: 0,
            class: 0,
            revision: 0,
        }
    }
    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec {
            index: 0,
            size: 0x1000,
            is_64bit: false,
            prefetchable: false,
            mmap: None,
        }]
    }
    fn msix(&self) -> Option<MsixSpec> {
        None
    }
    fn bar_read(&self, _: usize, _: u64, data: &mut [u8]) -> Result<(), AccessError> {
        data.fill(0);
        Ok(())
    }
    fn bar_write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn io_eventfds(&self, _: usize) -> Vec<IoEventFd> {
        let bell = |(at, fd): (usize, &OwnedFd)| IoEventFd {
            offset: 8 * at as u64,
            size: 4,
            fd: fd.try_clone().unwrap(),
        };
        self.0.iter().enumerate().map(bell).collect()
    }
    fn reset(&self) {}
}

/// The next reply and the descriptors that come with it.
fn reply_with_fds(raw: &Raw) -> (Header, Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg(&raw.stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = Vec::new();
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = item {
            fds.extend(some);
        }
    }
    bytes.truncate(message.bytes);
    let (header, payload) = Header::read_from_prefix(&bytes).unwrap();
    assert_eq!(header.message_size as usize, bytes.len(), "one message, whole");
    (header, payload.to_vec(), fds)
}

fn ask(raw: &mut Raw, id: u16, argsz: usize) -> (IoFdsInfo, Vec<IoFd>, Vec<OwnedFd>) {
    let request = IoFdsInfo {
        argsz: argsz as u32,
        flags: 0,
        index: RegionIndex(0),
        count: 0,
    };
    raw.send(id, Command::DEVICE_GET_REGION_IO_FDS, request.as_bytes());
    let (header, payload, fds) = reply_with_fds(raw);
    assert_eq!((header.message_id, header.flags), (id, MessageFlags::REPLY));
    let (info, mut rest) = IoFdsInfo::read_from_prefix(&payload).unwrap();
    let mut list = Vec::new();
    while !rest.is_empty() {
        let (one, after) = IoFd::read_from_prefix(rest).unwrap();
        list.push(one);
        rest = after;
    }
    (info, list, fds)
}

#[test]
fn test_io_eventfds_when_more_than_the_client_takes_in_one_message_are_as_many_as_it_takes() {
    let bells: Vec<_> = (0..BELLS)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let model = Arc::new(Bells(bells.iter().map(|fd| fd.try_clone().unwrap()).collect()));
    let function = Function::new(|_| Ok::<_, Infallible>(model as Arc<dyn Model>)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = Server::bind(&path, function, ServerOptions::default()).unwrap();
    let stop = StopFd::new().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| server.run(&stop).unwrap());
        let proposals = [
            // The specification's default is 1.
            ("\"max_dma_maps\":65535", 1),
            ("\"max_msg_fds\":0", 0),
            ("\"max_msg_fds\":1", 1),
            ("\"max_msg_fds\":3", 3),
            ("\"max_msg_fds\":16", 16),
            // The server's own limit.
            ("\"max_msg_fds\":253", 16),
        ];
        for (proposal, expected) in proposals {
            let mut raw = Raw::with_capabilities(&path, proposal);
            let full = IoFdsInfo::SIZE + expected * IoFd::SIZE;
            let (info, list, fds) = ask(&mut raw, 2, IoFdsInfo::SIZE);
            assert_eq!(
                (info.argsz as usize, info.count as usize),
                (full, expected),
                "{proposal}"
            );
            assert!(list.is_empty() && fds.is_empty(), "{proposal}: only the size");
            // Room for all that there are does not help.
            for argsz in [full, IoFdsInfo::SIZE + BELLS * IoFd::SIZE] {
                let (info, list, fds) = ask(&mut raw, 3, argsz);
                assert_eq!(
                    (info.argsz as usize, info.count as usize),
                    (full, expected),
                    "{proposal}"
                );
                assert_eq!((list.len(), fds.len()), (expected, expected), "{proposal}");
                // Each of those that came is the one that its entry names, and no other.
                for (at, one) in list.iter().enumerate() {
                    assert_eq!(
                        (one.offset, one.size, one.kind),
                        (8 * at as u64, 4, IoFdType::IOEVENTFD)
                    );
                    rustix::io::write(&fds[one.fd_index as usize], &7u64.to_ne_bytes()).unwrap();
                    for (other, bell) in bells.iter().enumerate() {
                        let mut count = [0; 8];
                        let rung = rustix::io::read(bell, &mut count);
                        let due = if other == at { Ok(8) } else { Err(Errno::AGAIN) };
                        assert_eq!(rung, due, "{proposal}: entry {at}, bell {other}");
                    }
                }
            }
        }
        stop.stop();
    });
}
