//! What peers do, or other servers have got wrong: one test for each.

mod vfio_user_scratch;

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use device::dma::DmaError;
use device::server::{ErrorReplies, ServerOptions};
use protos::vfio_user::{
    Command, DmaAccess, DmaMap, Header, IrqIndex, IrqInfo, IrqSet, IrqSetFlags, MessageFlags, RegionFlags,
    RegionIndex, RegionInfo,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tests::processes::Device;
use vfio_user_scratch::*;
use zerocopy::{FromBytes, IntoBytes};

const EINVAL: i32 = 22;
const ENOTSUP: i32 = 95;
/// What QEMU 11.1.3 proposes.
const QEMU: &str = "\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096,\"max_dma_maps\":65535,\
                    \"write_multiple\":true";

fn connected(rig: &Rig) -> Raw {
    ready(&rig.path)
}

fn region_info(argsz: u32, index: u32) -> RegionInfo {
    RegionInfo {
        argsz,
        flags: RegionFlags(0),
        index: RegionIndex(index),
        cap_offset: 0,
        size: 0,
        offset: 0,
    }
}

fn send_bytes_with_fds(raw: &Raw, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let iov = [IoSlice::new(bytes)];
    assert_eq!(
        sendmsg(raw.stream.as_fd(), &iov, &mut control, SendFlags::NOSIGNAL),
        Ok(bytes.len())
    );
}

fn readable(raw: &Raw, millis: i64) -> bool {
    let mut fds = [PollFd::new(&raw.stream, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: millis * 1_000_000,
    };
    poll(&mut fds, Some(&timeout)) == Ok(1)
}

#[test]
fn test_trap1_version_reply_when_qemu_asks_is_no_larger_than_its_request() {
    let rig = Rig::start();
    for spaces in [0, 40] {
        let mut raw = Raw::connect(&rig.path);
        let json = format!("{{\"capabilities\":{{{QEMU}}}}}{}\0", " ".repeat(spaces));
        let body = [b"\0\0\x01\0", json.as_bytes()].concat();
        raw.send(7, Command::VERSION, &body);
        let reply = raw.expect_ok(7);
        assert!(reply.len() <= body.len(), "{} > {}", reply.len(), body.len());
        let text = String::from_utf8_lossy(&reply[4..]).into_owned();
        assert!(
            text.contains("\"write_multiple\":true") && text.contains("\"max_msg_fds\":16"),
            "{text}"
        );
        assert!(!text.contains("twin"), "{text}");
    }
}

#[test]
fn test_trap2_messages_when_queued_together_keep_their_own_fds() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let (first, second) = (memfd(0x1000), memfd(0x1000));
    rustix::io::pwrite(&first, &1u64.to_le_bytes(), 0).unwrap();
    rustix::io::pwrite(&second, &2u64.to_le_bytes(), 0).unwrap();
    // The server is busy while all of this is queued.
    raw.send(2, Command::REGION_READ, &access(WAIT, 0, 8, &[]));
    rig.model.barrier.wait();
    raw.send(3, Command::REGION_WRITE, &access(LOG, 0, 8, &[3; 8]));
    let map = |iova| Raw::frame(4, Command::DMA_MAP, dma_map(iova, 0x1000).as_bytes());
    // A message with a file directly behind one without, in one segment; then another.
    let write = Raw::frame(5, Command::REGION_WRITE, &access(LOG, 0, 8, &[5; 8]));
    raw.stream.write_all(&write).unwrap();
    send_bytes_with_fds(&raw, &map(0x1000), &[first.as_fd()]);
    send_bytes_with_fds(&raw, &map(0x2000), &[second.as_fd()]);
    rig.model.barrier.wait();
    for id in [2, 3, 5, 4, 4] {
        raw.expect_ok(id);
    }
    let mut bytes = [0; 8];
    for (iova, value) in [(0x1000, 1), (0x2000, 2)] {
        rig.function.dma().fetch(iova, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), value);
    }
    assert!(rig.function.dma().mappings().iter().all(|map| !map.by_message));
}

#[test]
fn test_trap3_unmaps_when_they_cover_nothing_or_several_are_accepted_and_cuts_refused() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    // As QEMU with a virtual IOMMU when translation goes off, before anything is mapped.
    for (id, (iova, len)) in (10..).zip([
        (0, 0x8000_0000),
        (0x8000_0000, u64::MAX - 0x7fff_ffff),
        (0, 1 << 63),
    ]) {
        raw.send(id, Command::DMA_UNMAP, dma_unmap(iova, len).as_bytes());
        assert_eq!(raw.expect_ok(id), dma_unmap(iova, len).as_bytes());
    }
    let memory = memfd(0x8000);
    // One message for each IOMMU entry, with and without files.
    for page in 0..8u64 {
        let mut map = dma_map(0x10_0000 + page * 0x1000, 0x1000);
        map.offset = if page % 2 == 0 { page * 0x1000 } else { 0 };
        let fds = [memory.as_fd()];
        if page % 2 == 0 {
            raw.send_with_fds(20, Command::DMA_MAP, map.as_bytes(), &fds);
        } else {
            raw.send(20, Command::DMA_MAP, map.as_bytes());
        }
        raw.expect_ok(20);
    }
    raw.send(30, Command::DMA_UNMAP, dma_unmap(0x10_0000, 0x1800).as_bytes());
    raw.expect_error(30, EINVAL);
    assert_eq!(rig.function.dma().mappings().len(), 8);
    raw.send(31, Command::DMA_UNMAP, dma_unmap(0, 0x10_4000).as_bytes());
    raw.expect_ok(31);
    assert_eq!(rig.function.dma().mappings().len(), 4);
    raw.send(32, Command::DMA_UNMAP, dma_unmap(0, 0x8000_0000).as_bytes());
    raw.expect_ok(32);
    // RAM comes again where it was.
    raw.send_with_fds(
        33,
        Command::DMA_MAP,
        dma_map(0x10_0000, 0x8000).as_bytes(),
        &[memory.as_fd()],
    );
    raw.expect_ok(33);
}

#[test]
fn test_trap4_writes_when_posted_are_done_in_order_and_a_trapped_region_offers_no_mapping() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let mut bytes = Vec::new();
    for value in 0..300u64 {
        let body = access(LOG, 0, 8, &value.to_le_bytes());
        let header = Header::command(9, Command::REGION_WRITE, body.len(), MessageFlags::NO_REPLY);
        bytes.extend([header.as_bytes(), &body].concat());
    }
    raw.stream.write_all(&bytes).unwrap();
    assert_eq!(raw.read_register(3, 8), 0, "nothing but this is answered");
    assert!(rig.model.log().into_iter().eq(0..300));
    // A mappable region switches QEMU's posting off: there is none where nothing can be mapped.
    raw.send(4, Command::DEVICE_GET_REGION_INFO, region_info(64, 7).as_bytes());
    let info = RegionInfo::read_from_bytes(&raw.expect_ok(4)).unwrap();
    assert_eq!(info.flags, RegionFlags::READ | RegionFlags::WRITE);
}

#[test]
fn test_trap5_memory_when_without_a_file_is_asked_for_and_bus_mastering_is_checked_here() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    raw.map_without_file(2, 0, 0x1000);
    let memory = memfd(0x1000);
    raw.send_with_fds(
        3,
        Command::DMA_MAP,
        dma_map(0x1000, 0x1000).as_bytes(),
        &[memory.as_fd()],
    );
    raw.expect_ok(3);
    let dma = rig.function.dma();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| dma.store(8, b"rom"));
        let (header, asked, data) = raw.expect_asked(Command::DMA_WRITE);
        assert_eq!((asked.address, &data[..]), (8, &b"rom"[..]));
        raw.answer(&header, &[asked.as_bytes()]);
        assert_eq!(worker.join().unwrap(), Ok(()));
    });
    raw.send(4, Command::REGION_WRITE, &access(4, 7, 2, &[2, 0]));
    raw.expect_ok(4);
    // The file is mapped, and nobody but the device itself could stop it.
    for iova in [0, 0x1000] {
        let result = std::thread::scope(|scope| scope.spawn(|| dma.store(iova, &[1])).join().unwrap());
        assert_eq!(result, Err(DmaError::BusMasterOff));
    }
}

#[test]
fn test_trap6_client_when_it_waits_is_answered_in_time_and_after_replug_again() {
    let rig = Rig::start();
    for _ in 0..3 {
        let mut raw = connected(&rig);
        raw.map_without_file(2, 0, 0x1000);
        // The device waits for an answer that does not come; the client still gets its own.
        raw.send(3, Command::REGION_WRITE, &access(ASK, 0, 8, &[0; 8]));
        for _ in 0..2 {
            let (header, _) = raw.reply();
            assert!(header.flags == MessageFlags::REPLY || header.command == Command::DMA_READ);
        }
        assert_eq!(raw.read_register(4, 8), 0);
        raw.send(5, Command::DMA_UNMAP, dma_unmap(0, 0x1000).as_bytes());
        raw.expect_ok(5);
        raw.send(6, Command::DEVICE_RESET, &[]);
        raw.expect_ok(6);
        // Unplugged: closed without a word. The next one connects anew.
    }
}

/// Each command whose reply Cloud Hypervisor reads at full size, made to fail.
fn failing() -> [(Command, Vec<u8>, usize); 5] {
    let irq = IrqInfo {
        argsz: 16,
        flags: Default::default(),
        index: IrqIndex(77),
        count: 0,
    };
    [
        (Command::REGION_READ, access(0x3000, 0, 8, &[]), 24),
        (Command::REGION_READ, access(0, 0, u32::MAX, &[]), 16),
        (Command::REGION_WRITE, access(0x3000, 0, 8, &[0; 8]), 16),
        (Command::DMA_UNMAP, dma_unmap(0, 0).as_bytes().to_vec(), 24),
        (Command::DEVICE_GET_IRQ_INFO, irq.as_bytes().to_vec(), 16),
    ]
}

#[test]
fn test_trap7_errors_when_asked_for_at_full_size_have_it_and_else_are_a_header() {
    // What the crate that Cloud Hypervisor is built on proposes, and what others do.
    let hypervisor = "\"max_msg_fds\":1,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}";
    let sample = "\"max_msg_fds\":32,\"max_data_xfer_size\":1024,\"migration\":{\"pgsize\":4096}";
    for (replies, client, padded) in [
        (ErrorReplies::Auto, QEMU, false),
        (ErrorReplies::Auto, sample, false),
        (ErrorReplies::Auto, hypervisor, true),
        (ErrorReplies::Header, hypervisor, false),
        (ErrorReplies::Full, QEMU, true),
    ] {
        let rig = Rig::with(ServerOptions {
            error_replies: replies,
            client_timeout: Duration::from_secs(60),
            ..ServerOptions::default()
        });
        let mut raw = Raw::with_capabilities(&rig.path, client);
        switch_on(&mut raw);
        for (id, (command, body, len)) in (10..).zip(failing()) {
            raw.send(id, command, &body);
            let (header, payload) = raw.reply();
            assert_eq!((header.message_id, header.flags.0), (id, 0x21));
            assert_ne!(header.error, 0);
            let expected = vec![0; if padded { len } else { 0 }];
            assert_eq!(payload, expected, "{replies:?}, {client}: {command}");
        }
        // Others are headers in any case.
        raw.send(30, Command(500), &[]);
        raw.expect_error(30, ENOTSUP);
        assert_eq!(raw.read_register(31, 8), 0);
    }
}

#[test]
fn test_trap7_foreign_client_when_it_meets_errors_goes_on_after_each() {
    let rig = Rig::start();
    // The client that Cloud Hypervisor uses, without anybody saying so.
    let mut client = vfio_user::Client::new(&rig.path).unwrap();
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.region_write(0, 8, &9u64.to_le_bytes()).unwrap();
    let mut bytes = [0xee; 8];
    let _ = client.region_read(0, 0x3000, &mut bytes);
    let _ = client.region_write(0, 0x3000, &bytes);
    let _ = client.dma_unmap(0, 0);
    client.region_read(0, 8, &mut bytes).unwrap();
    assert_eq!(
        u64::from_le_bytes(bytes),
        9,
        "each reply is taken for its own request's"
    );
}

#[test]
fn test_trap7_device_when_told_on_the_command_line_pads_errors_for_everybody() {
    for (choice, len) in [("full", 24), ("header", 0), ("auto", 0)] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("gru.sock");
        let device = Device::start(&socket, &["--error-replies", choice]);
        let mut raw = Raw::negotiated(&socket);
        // Config space ends at 4096.
        raw.send(2, Command::REGION_READ, &access(4096, 7, 8, &[]));
        let (header, payload) = raw.reply();
        assert_eq!(
            (header.message_id, header.flags.0, header.error),
            (2, 0x21, EINVAL as u32)
        );
        assert_eq!(payload, vec![0; len], "{choice}");
        device.end();
    }
}

#[test]
fn test_trap8_commands_when_early_or_unknown_are_refused_and_consumed() {
    let rig = Rig::start();
    let mut raw = Raw::connect(&rig.path);
    raw.send(1, Command::DEVICE_RESET, &[]);
    raw.expect_error(1, EINVAL);
    drop(raw);
    let mut raw = connected(&rig);
    let smuggled = Raw::frame(99, Command::DEVICE_RESET, &[]);
    raw.send(2, Command(4711), &smuggled);
    raw.expect_error(2, ENOTSUP);
    assert_eq!(raw.read_register(3, 8), 0);
    // The reset of the first client's going is the only one.
    assert_eq!(rig.model.resets(), 1);
}

#[test]
fn test_trap8_eventfd_when_full_does_not_stop_the_server() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let set = IrqSet {
        argsz: 20,
        flags: IrqSetFlags(4 | 32),
        index: IrqIndex::MSIX,
        start: 0,
        count: 1,
    };
    raw.send_with_fds(2, Command::DEVICE_SET_IRQS, set.as_bytes(), &[full.as_fd()]);
    raw.expect_ok(2);
    let other = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let second = IrqSet { start: 1, ..set };
    raw.send_with_fds(3, Command::DEVICE_SET_IRQS, second.as_bytes(), &[other.as_fd()]);
    raw.expect_ok(3);
    let mut raise = |id, vector: u64| {
        raw.send(
            id,
            Command::REGION_WRITE,
            &access(RAISE, 0, 8, &vector.to_le_bytes()),
        );
        raw.expect_ok(id);
    };
    // More than could be queued anywhere; each of the other vector's arrives all the same.
    let mut bytes = [0; 8];
    for id in 10..310 {
        raise(id, 0);
        raise(id, 1);
        assert_eq!(rustix::io::read(&other, &mut bytes), Ok(8));
        assert_eq!(u64::from_ne_bytes(bytes), 1);
    }
    rustix::io::read(&full, &mut bytes).unwrap();
    assert!(u64::from_ne_bytes(bytes) >= u64::MAX - 1);
    // There is room again: nothing was kept for later, and nothing is lost from now on.
    raise(400, 0);
    rustix::io::read(&full, &mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 1);
}

#[test]
fn test_trap9_region_info_when_short_has_an_offset_and_bars_of_others_can_be_mapped() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    raw.send(2, Command::DEVICE_GET_REGION_INFO, region_info(32, 0).as_bytes());
    let info = RegionInfo::read_from_bytes(&raw.expect_ok(2)).unwrap();
    assert!(info.flags.contains(RegionFlags::CAPS) && info.cap_offset >= 32 && info.argsz > 32);
    raw.map_without_file(3, 0xfe00_0000, 0x10_0000);
    let bars = rig.function.dma().mappings();
    assert!(bars.len() == 1 && bars[0].by_message);
}

#[test]
fn test_trap10_file_when_too_short_or_truncated_fails_the_access_and_the_process_lives() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let memory = memfd(0x4000);
    raw.send_with_fds(
        2,
        Command::DMA_MAP,
        dma_map(0, 0x5000).as_bytes(),
        &[memory.as_fd()],
    );
    raw.expect_error(2, EINVAL);
    raw.send_with_fds(
        3,
        Command::DMA_MAP,
        dma_map(0, 0x4000).as_bytes(),
        &[memory.as_fd()],
    );
    raw.expect_ok(3);
    let other = memfd(0x1000);
    raw.send_with_fds(
        4,
        Command::DMA_MAP,
        dma_map(0x1_0000, 0x1000).as_bytes(),
        &[other.as_fd()],
    );
    raw.expect_ok(4);
    rustix::fs::ftruncate(&memory, 0x1000).unwrap();
    // By the thread that serves, and by another one.
    raw.send(
        5,
        Command::REGION_WRITE,
        &access(FETCH, 0, 8, &0x2000u64.to_le_bytes()),
    );
    raw.expect_ok(5);
    assert_eq!(raw.read_register(6, 0), u64::MAX);
    let dma = rig.function.dma();
    assert!(matches!(dma.store(0x2000, &[1]), Err(DmaError::Lost { .. })));
    assert!(
        matches!(dma.fetch(0, &mut [0]), Err(DmaError::Lost { .. })),
        "all of it is gone"
    );
    assert_eq!(dma.store(0x1_0000, &[1]), Ok(()), "the others are not");
    // Unmapped and mapped again it works.
    raw.send(7, Command::DMA_UNMAP, dma_unmap(0, 0x4000).as_bytes());
    raw.expect_ok(7);
    raw.send_with_fds(
        8,
        Command::DMA_MAP,
        dma_map(0, 0x1000).as_bytes(),
        &[memory.as_fd()],
    );
    raw.expect_ok(8);
    assert_eq!(dma.store(0, &[1]), Ok(()));
}

#[test]
fn test_trap11_unmap_when_an_engine_is_inside_is_answered_after_it_has_left() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let memory = memfd(0x1000);
    let map: DmaMap = dma_map(0x1000, 0x1000);
    raw.send_with_fds(2, Command::DMA_MAP, map.as_bytes(), &[memory.as_fd()]);
    raw.expect_ok(2);
    let held = rig.function.dma().resolve(0x1000, 8, true).unwrap();
    raw.send(3, Command::DMA_UNMAP, dma_unmap(0x1000, 0x1000).as_bytes());
    assert!(!readable(&raw, 200), "answered while an access runs");
    held.write_from(b"in time.");
    drop(held);
    raw.expect_ok(3);
    let mut bytes = [0; 8];
    rustix::io::pread(&memory, &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"in time.");
    // And by message: what was asked before the reply is the last of it.
    raw.map_without_file(4, 0x1000, 0x1000);
    let dma = rig.function.dma();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| dma.store(0x1000, &[7; 16]));
        let (_, asked, _): (_, DmaAccess, _) = raw.expect_asked(Command::DMA_WRITE);
        assert_eq!(asked.count, 16);
        raw.send(5, Command::DMA_UNMAP, dma_unmap(0x1000, 0x1000).as_bytes());
        raw.expect_ok(5);
        assert!(matches!(worker.join().unwrap(), Err(DmaError::Aborted { .. })));
    });
    assert!(!readable(&raw, 50), "nothing is asked of unmapped memory");
}
