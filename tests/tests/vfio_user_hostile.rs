//! A client that does not keep to the protocol, over a real socket.

mod vfio_user_scratch;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use device::server::ServerOptions;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use protos::vfio_user::{Command, DmaMap, DmaUnmap, Header, IrqSet, MessageFlags, RegionInfo};
use vfio_user_scratch::*;
use zerocopy::{FromBytes, IntoBytes};

const EINVAL: i32 = 22;
const ENOTSUP: i32 = 95;
const EMSGSIZE: i32 = 90;
const E2BIG: i32 = 7;

/// A complete message that would leave a trace in the model's log.
fn smuggled() -> Vec<u8> {
    Raw::frame(99, Command::REGION_WRITE, &access(LOG, 0, 8, &[0xbb; 8]))
}

#[test]
fn test_unknown_command_when_its_body_is_a_command_does_not_run_it() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let kinds = [0, 11, 12, 14, 15, 16, 17, 18, 19, 500, u16::MAX];
    for (id, command) in (10..).zip(kinds) {
        // Both at once: the second one may be in the buffer when the first is refused.
        let mut bytes = Raw::frame(id, Command(command), &smuggled());
        bytes.extend(Raw::frame(
            id + 100,
            Command::REGION_WRITE,
            &access(LOG, 0, 8, &[1; 8]),
        ));
        raw.stream.write_all(&bytes).unwrap();
        raw.expect_error(id, ENOTSUP);
        raw.expect_ok(id + 100);
    }
    assert_eq!(rig.model.log(), vec![0x0101_0101_0101_0101; kinds.len()]);
}

#[test]
fn test_refused_body_when_of_the_wrong_size_does_not_run() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let commands = [
        Command::DMA_MAP,
        Command::DMA_UNMAP,
        Command::DEVICE_GET_INFO,
        Command::DEVICE_GET_REGION_INFO,
        Command::DEVICE_GET_REGION_IO_FDS,
        Command::DEVICE_GET_IRQ_INFO,
        Command::DEVICE_SET_IRQS,
        Command::REGION_READ,
        Command::REGION_WRITE,
        Command::DEVICE_RESET,
    ];
    for (id, command) in (10..).zip(commands) {
        let body = [smuggled(), smuggled()].concat();
        raw.send(id, command, &body);
        let (header, _) = raw.reply();
        assert_eq!((header.message_id, header.flags.0), (id, 0x21), "{command}");
        assert!(
            header.error == EINVAL as u32 || header.error == E2BIG as u32,
            "{command}: {}",
            header.error
        );
    }
    assert!(rig.model.log().is_empty());
    assert_eq!(rig.model.resets(), 0);
    for (id, command) in (50..).zip(commands) {
        if command != Command::DEVICE_RESET {
            raw.send(id, command, &[]);
            raw.expect_error(id, EINVAL);
        }
    }
    assert_eq!(raw.read_register(90, 8), 0);
}

#[test]
fn test_command_when_before_version_is_refused_and_does_nothing() {
    let rig = Rig::start();
    let mut raw = Raw::connect(&rig.path);
    raw.send(5, Command::DEVICE_RESET, &[]);
    raw.expect_error(5, EINVAL);
    raw.send(6, Command::REGION_WRITE, &access(4, 7, 2, &[6, 0]));
    raw.expect_error(6, EINVAL);
    assert_eq!(rig.model.resets(), 0);
    raw.send(7, Command::VERSION, &[0, 0, 1, 0]);
    assert_eq!(raw.expect_ok(7), [0, 0, 1, 0], "no data asked, none answered");
    raw.send(8, Command::VERSION, &[0, 0, 1, 0]);
    raw.expect_error(8, EINVAL);
    raw.send(9, Command::DEVICE_RESET, &[]);
    raw.expect_ok(9);
}

#[test]
fn test_version_when_malformed_is_refused_and_can_be_tried_again() {
    let rig = Rig::start();
    let mut raw = Raw::connect(&rig.path);
    let bodies: [&[u8]; 8] = [
        b"",
        b"\0\0\x01",
        b"\x01\0\0\0",
        b"\0\0\x01\0{}",
        b"\0\0\x01\0{\0}\0",
        b"\0\0\x01\0nonsense\0",
        b"\0\0\x01\0{\"capabilities\":7}\0",
        b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0",
    ];
    for (id, body) in (0..).zip(bodies) {
        raw.send(id, Command::VERSION, body);
        raw.expect_error(id, EINVAL);
    }
    raw.send(20, Command::VERSION, b"\0\0\x05\0{}\0");
    assert_eq!(raw.expect_ok(20), b"\0\0\x01\0{}\0", "the smaller minor version");
}

#[test]
fn test_version_reply_when_the_request_is_short_is_no_longer() {
    let rig = Rig::start();
    for request in [
        &b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":1,\"max_dma_maps\":1}}\0"[..],
        b"\0\0\x01\0{\"capabilities\":{}}\0",
        b"\0\0\x01\0{}\0",
        b"\0\0\x01\0",
    ] {
        let mut raw = Raw::connect(&rig.path);
        raw.send(0, Command::VERSION, request);
        let reply = raw.expect_ok(0);
        assert!(
            reply.len() <= request.len(),
            "{}",
            String::from_utf8_lossy(&reply)
        );
    }
}

#[test]
fn test_size_when_impossible_is_answered_and_ends_the_connection() {
    let rig = Rig::start();
    for size in [0, 1, 15, (1 << 20) + 33, u32::MAX] {
        let mut raw = ready(&rig.path);
        let header = Header {
            message_size: size,
            ..Header::command(7, Command::REGION_WRITE, 0, MessageFlags::COMMAND)
        };
        raw.stream.write_all(header.as_bytes()).unwrap();
        raw.expect_error(7, EMSGSIZE);
        raw.expect_closed();
    }
    assert_eq!(ready(&rig.path).read_register(2, 8), 0);
}

#[test]
fn test_count_when_larger_than_data_or_limit_is_refused() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    for (id, count, errno) in [
        (2, (1 << 20) + 1, E2BIG),
        (3, u32::MAX, E2BIG),
        (4, 1 << 20, EINVAL),
    ] {
        raw.send(id, Command::REGION_READ, &access(0, 0, count, &[]));
        raw.expect_error(id, errno);
    }
    for (id, count, errno) in [
        (5, 400 << 20, E2BIG),
        (6, 9, EINVAL),
        (7, 7, EINVAL),
        (8, 0, EINVAL),
    ] {
        raw.send(id, Command::REGION_WRITE, &access(LOG, 0, count, &[1; 8]));
        raw.expect_error(id, errno);
    }
    assert!(rig.model.log().is_empty());
    // The whole of BAR2 is exactly the limit.
    raw.send(9, Command::REGION_READ, &access(0, 2, 1 << 20, &[]));
    assert_eq!(raw.expect_ok(9).len(), (1 << 20) + 16);
}

#[test]
fn test_message_when_cut_short_ends_the_connection_only() {
    let rig = Rig::start();
    let frame = Raw::frame(3, Command::REGION_WRITE, &access(LOG, 0, 8, &[1; 8]));
    for len in [1, 7, 15, 16, 17, 31, 39] {
        let mut raw = ready(&rig.path);
        raw.stream.write_all(&frame[..len]).unwrap();
        raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        raw.expect_closed();
    }
    assert!(rig.model.log().is_empty());
    assert_eq!(ready(&rig.path).read_register(2, 8), 0);
}

#[test]
fn test_message_when_it_comes_byte_by_byte_is_served() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    for byte in Raw::frame(3, Command::REGION_WRITE, &access(LOG, 0, 8, &[1; 8])) {
        raw.stream.write_all(&[byte]).unwrap();
    }
    raw.expect_ok(3);
    assert_eq!(rig.model.log().len(), 1);
}

#[test]
fn test_client_when_it_stalls_is_disconnected_and_the_next_one_served() {
    let rig = Rig::with(ServerOptions {
        client_timeout: Duration::from_millis(500),
        ..ServerOptions::default()
    });
    // Says nothing at all.
    Raw::connect(&rig.path).expect_closed();
    // Half a header, a header without its body.
    let frame = Raw::frame(3, Command::REGION_WRITE, &access(LOG, 0, 8, &[1; 8]));
    for len in [3, 16, 20] {
        let mut raw = ready(&rig.path);
        raw.stream.write_all(&frame[..len]).unwrap();
        raw.expect_closed();
    }
    // Never reads its answers: 1 MiB each, far more than a socket holds.
    let mut raw = ready(&rig.path);
    for id in 0..8 {
        let frame = Raw::frame(id, Command::REGION_READ, &access(0, 2, 1 << 20, &[]));
        if raw.stream.write_all(&frame).is_err() {
            break;
        }
    }
    let mut hung_up = [rustix::event::PollFd::new(
        &raw.stream,
        rustix::event::PollFlags::RDHUP,
    )];
    let limit = rustix::event::Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut hung_up, Some(&limit)),
        Ok(1),
        "the server hangs up"
    );
    // Once negotiated, silence is no stall.
    let client = rig.client();
    let mut gone = [rustix::event::PollFd::new(
        &rig.stop,
        rustix::event::PollFlags::IN,
    )];
    let longer = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 900_000_000,
    };
    assert_eq!(
        rustix::event::poll(&mut gone, Some(&longer)),
        Ok(0),
        "nobody stops the server"
    );
    assert!(
        driver::backing::Backing::alive(&client),
        "an idle client stays connected"
    );
}

/// Send `frame` in pieces of `piece` bytes, each well within the limit, until the server hangs up. Panics when
/// it takes them all.
fn drip(raw: &mut Raw, frame: &[u8], piece: usize) {
    for bytes in frame.chunks(piece) {
        if raw.stream.write_all(bytes).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} bytes were taken in pieces of {piece}", frame.len());
}

#[test]
fn test_client_when_it_never_agrees_on_version_is_disconnected_whatever_it_sends() {
    let rig = Rig::with(ServerOptions {
        client_timeout: Duration::from_millis(500),
        ..ServerOptions::default()
    });
    let early = Raw::frame(7, Command::DEVICE_RESET, &[]);
    // One command, which is refused, then silence.
    let mut raw = Raw::connect(&rig.path);
    raw.stream.write_all(&early).unwrap();
    raw.expect_error(7, EINVAL);
    raw.expect_closed();
    // One after the other.
    let mut raw = Raw::connect(&rig.path);
    drip(&mut raw, &early.repeat(1500), early.len());
    rig.client();
}

#[test]
fn test_message_when_it_drips_is_not_waited_for_longer_than_the_limit() {
    let rig = Rig::with(ServerOptions {
        client_timeout: Duration::from_millis(500),
        ..ServerOptions::default()
    });
    let frame = Raw::frame(3, Command::REGION_WRITE, &access(0, 2, 1500, &[1; 1500]));
    let mut raw = ready(&rig.path);
    drip(&mut raw, &frame, 1);
    let mut bytes = [0; 1];
    let client = rig.client();
    enable(&client);
    driver::backing::Backing::read(&client, 2, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0], "a part of it was written");
}

#[test]
fn test_fds_when_too_many_or_unwanted_are_refused_and_closed() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let map = DmaMap {
        argsz: 32,
        flags: protos::vfio_user::DmaFlags(3),
        offset: 0,
        address: 0,
        size: 0x1000,
    };
    let set = IrqSet {
        argsz: 20,
        flags: protos::vfio_user::IrqSetFlags(4 | 32),
        index: protos::vfio_user::IrqIndex::MSIX,
        start: 0,
        count: 16,
    };
    let cases: [(Command, Vec<u8>, usize); 10] = [
        (Command::DMA_MAP, map.as_bytes().to_vec(), 2),
        (Command::DMA_MAP, map.as_bytes().to_vec(), 16),
        (Command::DMA_MAP, map.as_bytes().to_vec(), 17),
        (Command::DMA_MAP, map.as_bytes().to_vec(), 253),
        (Command::DEVICE_SET_IRQS, set.as_bytes().to_vec(), 15),
        (Command::DEVICE_SET_IRQS, set.as_bytes().to_vec(), 16),
        (
            Command::DEVICE_SET_IRQS,
            IrqSet { count: 17, ..set }.as_bytes().to_vec(),
            17,
        ),
        (Command::REGION_READ, access(0, 0, 8, &[]), 1),
        (Command::DEVICE_RESET, vec![], 3),
        (Command::VERSION, vec![0, 0, 1, 0], 1),
    ];
    for (id, (command, body, fds)) in (10..).zip(cases) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let list: Vec<BorrowedFd<'_>> = vec![write.as_fd(); fds];
        raw.send_with_fds(id, command, &body, &list);
        raw.expect_error(id, EINVAL);
        // The reply to a second message: the fds of the first have been dropped before.
        assert_eq!(raw.read_register(id + 100, 8), 0);
        drop(write);
        assert_eq!(
            rustix::io::read(&read, &mut [0; 1]),
            Ok(0),
            "{command}: a write end is still open"
        );
    }
    assert_eq!((rig.model.resets(), rig.function.dma().mappings().len()), (0, 0));
    raw.send(30, Command::DEVICE_SET_IRQS, &[]);
    raw.expect_error(30, EINVAL);
}

#[test]
fn test_fds_when_they_come_with_the_body_count_as_the_messages() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let (read, write) = rustix::pipe::pipe().unwrap();
    let frame = Raw::frame(3, Command::REGION_WRITE, &access(LOG, 0, 8, &[1; 8]));
    raw.stream.write_all(&frame[..20]).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let list = [write.as_fd()];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&list)));
    let rest = [std::io::IoSlice::new(&frame[20..])];
    let flags = rustix::net::SendFlags::NOSIGNAL;
    assert_eq!(
        rustix::net::sendmsg(&raw.stream, &rest, &mut control, flags),
        Ok(frame.len() - 20)
    );
    // Whether the server reads the two pieces at once or not makes no difference.
    raw.expect_error(3, EINVAL);
    raw.read_register(4, 0);
    drop(write);
    assert_eq!(
        rustix::io::read(&read, &mut [0; 1]),
        Ok(0),
        "the descriptor is still open"
    );
}

#[test]
fn test_dma_when_malformed_is_refused() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let memory = memfd(0x2000);
    let good = DmaMap {
        argsz: 32,
        flags: protos::vfio_user::DmaFlags(3),
        offset: 0,
        address: 0x1000,
        size: 0x1000,
    };
    let flags = |bits| protos::vfio_user::DmaFlags(bits);
    for (id, map) in (10..).zip([
        DmaMap { argsz: 31, ..good },
        DmaMap {
            flags: flags(0),
            ..good
        },
        DmaMap {
            flags: flags(7),
            ..good
        },
        DmaMap { size: 0, ..good },
        DmaMap {
            size: u64::MAX,
            ..good
        },
        DmaMap {
            address: u64::MAX - 0xfff,
            ..good
        },
        DmaMap {
            address: 0x1001,
            ..good
        },
        DmaMap {
            offset: 0x800,
            ..good
        },
        DmaMap {
            offset: u64::MAX - 0xfff,
            ..good
        },
        DmaMap {
            size: 0x10_0000,
            ..good
        },
    ]) {
        raw.send_with_fds(id, Command::DMA_MAP, map.as_bytes(), &[memory.as_fd()]);
        raw.expect_error(id, EINVAL);
    }
    // Without a file there is nothing to be offset.
    let offset = DmaMap {
        offset: 0x1000,
        ..good
    };
    raw.send(30, Command::DMA_MAP, offset.as_bytes());
    raw.expect_error(30, EINVAL);
    // What is no file at all.
    let (read, _write) = rustix::pipe::pipe().unwrap();
    raw.send_with_fds(31, Command::DMA_MAP, good.as_bytes(), &[read.as_fd()]);
    assert!(raw.reply().0.error != 0);
    assert_eq!(rig.function.dma().mappings().len(), 0);

    raw.send_with_fds(40, Command::DMA_MAP, good.as_bytes(), &[memory.as_fd()]);
    raw.expect_ok(40);
    let all = DmaUnmap {
        argsz: 24,
        flags: protos::vfio_user::DmaUnmapFlags(2),
        address: 0,
        size: 0,
    };
    let unmap_flags = |bits| protos::vfio_user::DmaUnmapFlags(bits);
    for (id, unmap, errno) in [
        (
            41,
            DmaUnmap {
                flags: unmap_flags(1),
                ..all
            },
            ENOTSUP,
        ),
        (
            42,
            DmaUnmap {
                flags: unmap_flags(8),
                ..all
            },
            EINVAL,
        ),
        (
            43,
            DmaUnmap {
                flags: unmap_flags(0),
                ..all
            },
            EINVAL,
        ),
        (
            44,
            DmaUnmap {
                flags: unmap_flags(0),
                address: 2,
                size: u64::MAX,
                ..all
            },
            EINVAL,
        ),
    ] {
        raw.send(id, Command::DMA_UNMAP, unmap.as_bytes());
        raw.expect_error(id, errno);
    }
    assert_eq!(rig.function.dma().mappings().len(), 1);
    raw.send(50, Command::DMA_UNMAP, all.as_bytes());
    assert_eq!(raw.expect_ok(50), all.as_bytes());
    assert_eq!(rig.function.dma().mappings().len(), 0);
}

#[test]
fn test_region_info_when_the_room_is_small_is_short_but_valid() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    let ask = |argsz, index| RegionInfo {
        argsz,
        flags: protos::vfio_user::RegionFlags(0),
        index: protos::vfio_user::RegionIndex(index),
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    raw.send(2, Command::DEVICE_GET_REGION_INFO, ask(31, 0).as_bytes());
    raw.expect_error(2, EINVAL);
    raw.send(3, Command::DEVICE_GET_REGION_INFO, ask(64, 9).as_bytes());
    raw.expect_error(3, EINVAL);
    for argsz in [32, 63] {
        raw.send(4, Command::DEVICE_GET_REGION_INFO, ask(argsz, 0).as_bytes());
        let short = raw.expect_ok(4);
        let info = RegionInfo::read_from_bytes(&short).unwrap();
        assert_eq!(
            (info.argsz, info.flags.0, info.cap_offset, info.size),
            (64, 15, 32, BAR0_SIZE)
        );
    }
    raw.send(5, Command::DEVICE_GET_REGION_INFO, ask(64, 0).as_bytes());
    assert_eq!(raw.expect_ok(5).len(), 64);
}

#[test]
fn test_no_reply_when_set_on_anything_is_never_answered() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    for command in 0..30 {
        let header = Header::command(77, Command(command), 3, MessageFlags::NO_REPLY);
        raw.stream
            .write_all(&[header.as_bytes(), &[1, 2, 3]].concat())
            .unwrap();
    }
    assert_eq!(raw.read_register(5, 8), 0, "the first reply is to this");
}

#[test]
fn test_reply_when_nothing_was_asked_is_ignored_and_other_types_refused() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    for bits in [1, 0x21, 0x31] {
        let header = Header {
            flags: MessageFlags(bits),
            ..Header::command(8, Command::DMA_READ, 40, MessageFlags(0))
        };
        raw.stream
            .write_all(&[header.as_bytes(), &smuggled()].concat())
            .unwrap();
    }
    let odd = Header {
        flags: MessageFlags(2),
        ..Header::command(9, Command::DEVICE_RESET, 0, MessageFlags(0))
    };
    raw.stream.write_all(odd.as_bytes()).unwrap();
    raw.expect_error(9, EINVAL);
    assert!(rig.model.log().is_empty() && rig.model.resets() == 0);
}

/// The server is there, and is this hostile client's.
fn still_held(rig: &Rig, by: &Raw) {
    let mut events = [rustix::event::PollFd::new(
        &by.stream,
        rustix::event::PollFlags::RDHUP,
    )];
    let now = rustix::event::Timespec::default();
    assert_eq!(
        rustix::event::poll(&mut events, Some(&now)),
        Ok(0),
        "not hung up yet"
    );
    let mut second = Raw::connect(&rig.path);
    second.send(0, Command::VERSION, b"\0\0\x01\0");
    second.expect_error(0, 16);
}

#[test]
fn test_other_devices_when_clients_stall_and_flood_are_served_as_before() {
    // A minute: what the hostile clients hold up stays held up during the test.
    let (stalled, cut, flooded, good) = (Rig::start(), Rig::start(), Rig::start(), Rig::start());
    // Never reads its answers: the server waits in the middle of one.
    let mut reader = ready(&stalled.path);
    reader.stream.set_nonblocking(true).unwrap();
    let frame = Raw::frame(9, Command::REGION_READ, &access(0, 2, 1 << 20, &[]));
    for _ in 0..8 {
        if reader.stream.write_all(&frame).is_err() {
            break;
        }
    }
    // Half a message, with file descriptors.
    let memory = memfd(0x1000);
    let mut half = ready(&cut.path);
    half.send_with_fds(3, Command::REGION_READ, &[], &[memory.as_fd(); 20]);
    half.expect_error(3, EINVAL);
    half.stream
        .write_all(&Raw::frame(4, Command::DMA_MAP, &[0; 32])[..30])
        .unwrap();
    // As many messages as go through, good and bad.
    let flooder = ready(&flooded.path);
    let patience = Some(Duration::from_secs(30));
    flooder.stream.set_write_timeout(patience).unwrap();
    let (sent, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let quiet = |command, body: &[u8]| {
                let mut frame = Raw::frame(5, command, body);
                frame[8..12].copy_from_slice(&MessageFlags::NO_REPLY.0.to_ne_bytes());
                frame
            };
            let write = quiet(Command::REGION_WRITE, &access(8, 0, 8, &[1; 8]));
            let messages = [write, quiet(Command(99), &smuggled())].concat();
            while !over.load(Ordering::Relaxed) {
                (&flooder.stream).write_all(&messages).unwrap();
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Also when an assertion fails.
        let _over = OnDrop(&over);
        let begin = std::time::Instant::now();
        let mut raw = ready(&good.path);
        let mut id = 10;
        // Until the flood has had its time, too.
        let flood = |sent: &AtomicU64| sent.load(Ordering::Relaxed);
        while id < 2010 || flood(&sent) < 2000 {
            assert_eq!(raw.read_register(id, 8), 0);
            id = id.wrapping_add(1).max(10);
            // Waiting for one of the others would take a minute.
            assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        }
        still_held(&stalled, &reader);
        still_held(&cut, &half);
        still_held(&flooded, &flooder);
    });
    assert!(flooded.model.log().is_empty(), "nothing smuggled in was done");
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Anything with a true size is answered once, with a true size, and does not take the server down.
#[test]
fn test_any_messages_when_sent_are_each_answered_once() {
    let rig = Rig::start();
    let shared = std::cell::RefCell::new(ready(&rig.path));
    let memory = memfd(0x4000);
    let config = Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    };
    let word = prop_oneof![
        Just(0u32),
        Just(1),
        Just(7),
        Just(16),
        Just(20),
        Just(24),
        Just(32),
        0u32..64,
        any::<u32>()
    ];
    let body = proptest::collection::vec(word, 0..20);
    let message = (1u16..20, body, any::<bool>(), 0usize..4);
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let outcome = runner.run(&proptest::collection::vec(message, 1..20), |messages| {
        let mut raw = shared.borrow_mut();
        for (id, (command, mut body, fill, fds)) in (0..).zip(messages) {
            // Give the structures that start with argsz a chance to be looked at further.
            if fill && let Some(argsz) = body.first_mut() {
                *argsz = 4096;
            }
            // WAIT would wait for the test.
            if command == 9 && body.first() == Some(&(WAIT as u32)) {
                continue;
            }
            let bytes: Vec<u8> = body.iter().flat_map(|word| word.to_ne_bytes()).collect();
            if fds == 0 {
                raw.send(id, Command(command), &bytes);
            } else {
                raw.send_with_fds(id, Command(command), &bytes, &vec![memory.as_fd(); fds]);
            }
            let (header, payload) = raw.reply();
            prop_assert_eq!((header.message_id, header.command.0), (id, command));
            let failed = header.flags == MessageFlags(0x21);
            prop_assert!(failed || header.flags == MessageFlags::REPLY);
            prop_assert_eq!(failed, header.error != 0);
            prop_assert!(!failed || payload.is_empty());
        }
        Ok(())
    });
    outcome.unwrap();
    let raw = shared.into_inner();
    assert_eq!(raw.stream.shutdown(std::net::Shutdown::Both).ok(), Some(()));
    assert_eq!(ready(&rig.path).read_register(1, 8), 0);
}
