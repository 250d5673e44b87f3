//! Memory that came without a file, and what else crosses the client's commands.

mod vfio_user_scratch;

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use device::dma::{DmaError, Space};
use device::server::{Server, ServerOptions};
use protos::vfio_user::{
    Command, DmaAccess, DmaFlags, DmaMap, DmaUnmap, DmaUnmapFlags, Header, MessageFlags, RegionWriteOne,
};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vfio_user_scratch::*;
use zerocopy::IntoBytes;

const IOVA: u64 = 0x10_0000;
const LEN: u64 = 0x4000;
const EINVAL: i32 = 22;

/// A device's worker that reads 8 bytes.
fn fetch(rig: &Rig, iova: u64) -> JoinHandle<Result<[u8; 8], DmaError>> {
    let dma: Arc<Space> = Arc::clone(rig.function.dma());
    std::thread::spawn(move || {
        let mut bytes = [0; 8];
        dma.fetch(iova, &mut bytes).map(|()| bytes)
    })
}

fn store(rig: &Rig, iova: u64, data: Vec<u8>) -> JoinHandle<Result<(), DmaError>> {
    let dma: Arc<Space> = Arc::clone(rig.function.dma());
    std::thread::spawn(move || dma.store(iova, &data))
}

fn connected(rig: &Rig) -> Raw {
    let mut raw = ready(&rig.path);
    raw.map_without_file(2, IOVA, LEN);
    raw
}

#[test]
fn test_memory_without_a_file_when_accessed_is_asked_of_the_client() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    assert!(rig.function.dma().mappings()[0].by_message);
    let worker = fetch(&rig, IOVA + 0x10);
    let (header, asked, data) = raw.expect_asked(Command::DMA_READ);
    assert_eq!((asked.address, asked.count, data.len()), (IOVA + 0x10, 8, 0));
    raw.answer(&header, &[asked.as_bytes(), b"abcdefgh"]);
    assert_eq!(worker.join().unwrap(), Ok(*b"abcdefgh"));

    let worker = store(&rig, IOVA + LEN - 5, b"12345".to_vec());
    let (header, asked, data) = raw.expect_asked(Command::DMA_WRITE);
    assert_eq!((asked.address, asked.count), (IOVA + LEN - 5, 5));
    assert_eq!(data, b"12345");
    raw.answer(&header, &[asked.as_bytes()]);
    assert_eq!(worker.join().unwrap(), Ok(()));
    // Where there is nothing nobody is asked.
    let outside = fetch(&rig, IOVA + LEN - 4).join().unwrap();
    assert!(matches!(outside, Err(DmaError::NotMapped { .. })), "{outside:?}");
    assert!(matches!(
        rig.function.dma().resolve(IOVA, 8, false).unwrap_err(),
        DmaError::ByMessage { .. }
    ));
}

#[test]
fn test_commands_when_they_cross_on_one_socket_are_all_answered() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    // The model asks while the client waits for its own reply, and goes on asking of the server meanwhile.
    raw.send(3, Command::REGION_WRITE, &access(ASK, 0, 8, &IOVA.to_le_bytes()));
    let mut asked = None;
    let mut written = false;
    while asked.is_none() || !written {
        let (header, body) = raw.reply();
        if header.flags == MessageFlags::REPLY {
            assert_eq!(header.message_id, 3);
            written = true;
        } else {
            asked = Some((header, body));
        }
    }
    for id in 10..60 {
        assert_eq!(raw.read_register(id, 24), 0, "register 3 is not there yet");
    }
    let (header, body) = asked.unwrap();
    assert_eq!(header.command, Command::DMA_READ);
    raw.answer(&header, &[&body, &77u64.to_le_bytes()]);
    // The answer and this question are in one stream; the worker takes its time.
    let mut id = 100;
    while raw.read_register(id, 24) != 77 {
        id += 1;
        std::thread::yield_now();
    }
    // Several at once, answered in the opposite order.
    let workers: Vec<_> = (0..8).map(|index| fetch(&rig, IOVA + index * 8)).collect();
    let mut requests: Vec<_> = (0..8).map(|_| raw.expect_asked(Command::DMA_READ)).collect();
    requests.reverse();
    for (header, asked, _) in requests {
        raw.answer(&header, &[asked.as_bytes(), &asked.address.to_le_bytes()]);
    }
    for (index, worker) in (0u64..).zip(workers) {
        assert_eq!(worker.join().unwrap(), Ok((IOVA + index * 8).to_le_bytes()));
    }
}

#[test]
fn test_unmap_when_an_answer_is_outstanding_ends_the_access_and_drops_the_late_answer() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    raw.map_without_file(4, 0x90_0000, 0x1000);
    let worker = fetch(&rig, IOVA);
    let other = fetch(&rig, 0x90_0000);
    let requests = [
        raw.expect_asked(Command::DMA_READ),
        raw.expect_asked(Command::DMA_READ),
    ];
    raw.send(5, Command::DMA_UNMAP, dma_unmap(IOVA, LEN).as_bytes());
    raw.expect_ok(5);
    let ended = worker.join().unwrap();
    assert!(matches!(ended, Err(DmaError::Aborted { .. })), "{ended:?}");
    // The one elsewhere goes on; the late answer is nobody's, whatever comes later.
    for (header, asked, _) in &requests {
        raw.answer(header, &[asked.as_bytes(), b"answered"]);
    }
    assert_eq!(other.join().unwrap(), Ok(*b"answered"));
    raw.map_without_file(6, IOVA, LEN);
    let worker = fetch(&rig, IOVA);
    let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
    assert!(
        requests
            .iter()
            .all(|(old, ..)| old.message_id != header.message_id)
    );
    raw.answer(&header, &[asked.as_bytes(), b"new data"]);
    assert_eq!(worker.join().unwrap(), Ok(*b"new data"));
}

#[test]
fn test_access_by_message_when_the_function_is_taken_away_ends_at_once() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let aborted = |worker: JoinHandle<Result<[u8; 8], DmaError>>| {
        let ended = worker.join().unwrap();
        assert!(matches!(ended, Err(DmaError::Aborted { .. })), "{ended:?}");
    };
    let worker = fetch(&rig, IOVA);
    raw.expect_asked(Command::DMA_READ);
    raw.send(3, Command::DEVICE_RESET, &[]);
    raw.expect_ok(3);
    aborted(worker);

    let worker = fetch(&rig, IOVA);
    raw.expect_asked(Command::DMA_READ);
    raw.send(4, Command::REGION_WRITE, &access(4, 7, 2, &[2, 0]));
    raw.expect_ok(4);
    aborted(worker);
    assert_eq!(fetch(&rig, IOVA).join().unwrap(), Err(DmaError::BusMasterOff));
    switch_on(&mut raw);

    let worker = fetch(&rig, IOVA);
    raw.expect_asked(Command::DMA_READ);
    let all = DmaUnmap {
        flags: DmaUnmapFlags::ALL,
        ..dma_unmap(0, 0)
    };
    raw.send(5, Command::DMA_UNMAP, all.as_bytes());
    raw.expect_ok(5);
    aborted(worker);

    raw.map_without_file(6, IOVA, LEN);
    let worker = fetch(&rig, IOVA);
    raw.expect_asked(Command::DMA_READ);
    drop(raw);
    aborted(worker);
    // The next client has nothing to do with it.
    let mut raw = connected(&rig);
    let worker = fetch(&rig, IOVA);
    let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
    raw.answer(&header, &[asked.as_bytes(), b"8 bytes."]);
    assert_eq!(worker.join().unwrap(), Ok(*b"8 bytes."));
}

#[test]
fn test_access_by_message_when_the_client_is_silent_times_out_and_goes_on() {
    let rig = Rig::with(ServerOptions {
        dma_timeout: Duration::from_millis(100),
        client_timeout: Duration::from_secs(60),
        ..ServerOptions::default()
    });
    let mut raw = connected(&rig);
    let ended = fetch(&rig, IOVA).join().unwrap();
    assert!(matches!(ended, Err(DmaError::NoAnswer { .. })), "{ended:?}");
    let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
    raw.answer(&header, &[asked.as_bytes(), b"too late"]);
    assert_eq!(raw.read_register(9, 8), 0, "the client is served as before");
}

#[test]
fn test_answer_when_wrong_fails_the_access_only() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    let refused = |errno| {
        let (iova, len) = (IOVA, 8);
        Err(DmaError::Refused { iova, len, errno })
    };
    // An error, as QEMU answers what is not there.
    let worker = fetch(&rig, IOVA);
    let (header, ..) = raw.expect_asked(Command::DMA_READ);
    let error = header.error_reply(19);
    std::io::Write::write_all(&mut raw.stream, error.as_bytes()).unwrap();
    assert_eq!(worker.join().unwrap(), refused(Errno::NODEV));
    // An error without a number.
    let worker = fetch(&rig, IOVA);
    let (header, ..) = raw.expect_asked(Command::DMA_READ);
    let error = Header {
        error: 0,
        ..header.error_reply(1)
    };
    std::io::Write::write_all(&mut raw.stream, error.as_bytes()).unwrap();
    assert_eq!(worker.join().unwrap(), refused(Errno::IO));
    // Too short, too long, for another address.
    for data in [&b"1234567"[..], b"123456789", b""] {
        let worker = fetch(&rig, IOVA);
        let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
        raw.answer(&header, &[asked.as_bytes(), data]);
        assert_eq!(worker.join().unwrap(), refused(Errno::PROTO));
    }
    let worker = fetch(&rig, IOVA);
    let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
    let elsewhere = DmaAccess { address: 0, ..asked };
    // An answer to another command, or with another id, is no answer.
    raw.answer(
        &Header {
            command: Command::DMA_WRITE,
            ..header
        },
        &[asked.as_bytes()],
    );
    let other = Header {
        message_id: header.message_id + 1,
        ..header
    };
    raw.answer(&other, &[asked.as_bytes(), b"abcdefgh"]);
    raw.answer(&header, &[elsewhere.as_bytes(), b"abcdefgh"]);
    assert_eq!(worker.join().unwrap(), refused(Errno::PROTO));
    assert_eq!(raw.read_register(9, 8), 0);
}

#[test]
fn test_transfer_by_message_when_longer_than_the_clients_limit_is_cut() {
    let rig = Rig::start();
    let mut raw = Raw::with_capabilities(&rig.path, "\"max_data_xfer_size\":100");
    switch_on(&mut raw);
    raw.map_without_file(2, IOVA, LEN);
    let worker = store(&rig, IOVA, (0..250).map(|byte| byte as u8).collect());
    let mut all = Vec::new();
    for len in [100, 100, 50] {
        let (header, asked, data) = raw.expect_asked(Command::DMA_WRITE);
        assert_eq!((asked.address, asked.count), (IOVA + all.len() as u64, len));
        all.extend(data);
        raw.answer(&header, &[asked.as_bytes()]);
    }
    assert_eq!(worker.join().unwrap(), Ok(()));
    assert!(all.iter().enumerate().all(|(at, byte)| at as u8 == *byte));
}

#[test]
fn test_qemus_layout_when_the_client_has_it_is_found_and_used() {
    // QEMU has a 32-bit count with the data directly behind it; proposing write_multiple is what it is known by.
    let rig = Rig::start();
    for short in [true, false] {
        let mut raw = Raw::with_capabilities(&rig.path, "\"max_msg_fds\":16,\"write_multiple\":true");
        switch_on(&mut raw);
        raw.map_without_file(2, IOVA, LEN);
        let worker = store(&rig, IOVA, b"payload!".to_vec());
        let (header, probe, _) = raw.expect_asked(Command::DMA_READ);
        assert_eq!(probe.count, 1 << 32, "nothing is read by either layout");
        if short {
            raw.answer(&header, &[probe.as_bytes()]);
        } else {
            std::io::Write::write_all(&mut raw.stream, header.error_reply(7).as_bytes()).unwrap();
        }
        let (header, body) = raw.reply();
        assert_eq!((header.command, body.len()), (Command::DMA_WRITE, 24));
        let data = if short { &body[12..20] } else { &body[16..] };
        assert_eq!(data, b"payload!");
        raw.answer(&header, &[&body[..16]]);
        assert_eq!(worker.join().unwrap(), Ok(()));
        let worker = fetch(&rig, IOVA);
        let (header, asked, _) = raw.expect_asked(Command::DMA_READ);
        if short {
            raw.answer(&header, &[&asked.as_bytes()[..12], b"contents", &[0; 4]]);
        } else {
            raw.answer(&header, &[asked.as_bytes(), b"contents"]);
        }
        assert_eq!(worker.join().unwrap(), Ok(*b"contents"));
    }
}

#[test]
fn test_serving_thread_when_it_asks_for_client_memory_is_refused_instead_of_stuck() {
    let rig = Rig::start();
    let mut raw = connected(&rig);
    // FETCH is done by the thread that serves the client.
    raw.send(
        3,
        Command::REGION_WRITE,
        &access(FETCH, 0, 8, &IOVA.to_le_bytes()),
    );
    raw.expect_ok(3);
    assert_eq!(raw.read_register(4, 0), u64::MAX);
}

fn receive_fd(stream: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0; 4096];
    let mut fds = Vec::new();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(stream.as_fd(), &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    bytes.truncate(got.bytes);
    (bytes, fds)
}

#[test]
fn test_twin_socket_when_agreed_on_carries_the_servers_commands() {
    let rig = Rig::start();
    let mut raw = Raw::connect(&rig.path);
    raw.send(
        1,
        Command::VERSION,
        b"\0\0\x01\0{\"capabilities\":{\"twin_socket\":{\"supported\":true},\"max_msg_fds\":8}}\0",
    );
    let (reply, fds) = receive_fd(&raw.stream);
    let text = String::from_utf8_lossy(&reply[20..]).into_owned();
    assert!(
        text.contains("\"twin_socket\":{\"supported\":true,\"fd_index\":0}"),
        "{text}"
    );
    let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
    let mut twin = Raw {
        stream: UnixStream::from(fd),
    };
    twin.stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    switch_on(&mut raw);
    raw.map_without_file(2, IOVA, LEN);
    let worker = fetch(&rig, IOVA);
    let (header, asked, _) = twin.expect_asked(Command::DMA_READ);
    // Nothing of it on the first socket, where the next message is the reply; an answer there counts for nothing.
    raw.answer(&header, &[asked.as_bytes(), b"elsewher"]);
    assert_eq!(raw.read_register(9, 8), 0);
    twin.answer(&header, &[asked.as_bytes(), b"answered"]);
    assert_eq!(worker.join().unwrap(), Ok(*b"answered"));
    // Commands of the client do not belong there.
    twin.send(5, Command::DEVICE_RESET, &[]);
    twin.expect_error(5, 95);
    assert_eq!(rig.model.resets(), 0);
    // Its end ends the asking, not the connection.
    let worker = fetch(&rig, IOVA);
    twin.expect_asked(Command::DMA_READ);
    drop(twin);
    assert!(matches!(worker.join().unwrap(), Err(DmaError::Aborted { .. })));
    assert_eq!(raw.read_register(10, 8), 0);
    drop(raw);
    let mut next = connected(&rig);
    assert_eq!(next.read_register(9, 8), 0);
}

fn multi(writes: &[(u64, u32, u32, u64)]) -> Vec<u8> {
    let mut body = (writes.len() as u64).to_ne_bytes().to_vec();
    for &(offset, region, count, data) in writes {
        let one = RegionWriteOne {
            offset,
            region,
            count,
            data: data.to_le_bytes(),
        };
        body.extend_from_slice(one.as_bytes());
    }
    body
}

#[test]
fn test_write_multi_when_200_writes_come_does_them_in_order() {
    let rig = Rig::start();
    let mut raw = Raw::with_capabilities(&rig.path, "\"write_multiple\":true");
    switch_on(&mut raw);
    let writes: Vec<_> = (0..200).map(|value| (LOG, 0, 8, value)).collect();
    raw.send(3, Command::REGION_WRITE_MULTI, &multi(&writes));
    assert_eq!(raw.expect_ok(3), 200u64.to_ne_bytes());
    let posted = Header::command(
        4,
        Command::REGION_WRITE_MULTI,
        multi(&writes).len(),
        MessageFlags::NO_REPLY,
    );
    std::io::Write::write_all(&mut raw.stream, &[posted.as_bytes(), &multi(&writes)].concat()).unwrap();
    assert_eq!(raw.read_register(5, 8), 0);
    let twice: Vec<u64> = (0..200).chain(0..200).collect();
    assert_eq!(rig.model.log(), twice);
    // One that is not decoded has no effect; the others have.
    let mixed = multi(&[(LOG, 0, 1, 0xabcd), (0x300, 0, 4, 1), (8, 0, 8, 6)]);
    raw.send(6, Command::REGION_WRITE_MULTI, &mixed);
    assert_eq!(raw.expect_ok(6), 2u64.to_ne_bytes());
    assert_eq!((rig.model.log()[400], raw.read_register(7, 8)), (0xcd, 6));
}

#[test]
fn test_write_multi_when_malformed_does_nothing() {
    let rig = Rig::start();
    let mut raw = Raw::with_capabilities(&rig.path, "\"write_multiple\":true");
    switch_on(&mut raw);
    let good = multi(&[(LOG, 0, 8, 1), (LOG, 0, 8, 2)]);
    let long = multi(&vec![(LOG, 0, 8, 1); 201]);
    let mut count = good.clone();
    count[0] = 3;
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_ne_bytes());
    for (id, body, errno) in [
        (10, &good[..good.len() - 1], EINVAL),
        (11, &good[..4], EINVAL),
        (12, &[][..], EINVAL),
        (13, &count, EINVAL),
        (14, &huge, 7),
        (15, &multi(&[(LOG, 0, 8, 1), (LOG, 0, 9, 2)]), 7),
        (16, &multi(&[(LOG, 0, 8, 1), (LOG, 99, 8, 2)]), EINVAL),
        (17, &multi(&[(LOG, 0, 8, 1), (BAR0_SIZE - 4, 0, 8, 2)]), EINVAL),
        (18, &multi(&[(LOG, 0, 8, 1), (u64::MAX, 0, 8, 2)]), EINVAL),
    ] {
        raw.send(id, Command::REGION_WRITE_MULTI, body);
        raw.expect_error(id, errno);
    }
    raw.send(19, Command::REGION_WRITE_MULTI, &long);
    raw.expect_error(19, 7);
    assert!(rig.model.log().is_empty());
    raw.send(20, Command::REGION_WRITE_MULTI, &multi(&[]));
    assert_eq!(raw.expect_ok(20), [0; 8]);
}

#[test]
fn test_several_devices_when_served_by_one_process_are_independent() {
    let rigs: Vec<_> = (0..3).map(|_| Rig::start()).collect();
    let mut raws: Vec<_> = rigs.iter().map(connected).collect();
    let workers: Vec<_> = rigs.iter().map(|rig| fetch(rig, IOVA)).collect();
    for (index, raw) in raws.iter_mut().enumerate() {
        raw.send(3, Command::REGION_WRITE, &access(8, 0, 1, &[index as u8 + 1]));
        // The reply and the question, in whichever order they come.
        for _ in 0..2 {
            let (header, body) = raw.reply();
            if header.flags == MessageFlags::COMMAND {
                raw.answer(&header, &[&body, &[index as u8; 8]]);
            }
        }
    }
    for (index, worker) in workers.into_iter().enumerate() {
        assert_eq!(worker.join().unwrap(), Ok([index as u8; 8]));
    }
    // A hostile client and a lost one disturb nobody else.
    std::io::Write::write_all(&mut raws[0].stream, &[0xff; 64]).unwrap();
    raws.remove(1);
    assert_eq!(raws[1].read_register(7, 8), 3);
    // Two on one path do not get along.
    let function = function().0;
    assert!(Server::bind(&rigs[2].path, function, ServerOptions::default()).is_err());
}

#[test]
fn test_rights_when_memory_comes_without_a_file_hold_for_messages_too() {
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    for (id, iova, flags) in [(2, 0x1000, DmaFlags::READ), (3, 0x2000, DmaFlags::WRITE)] {
        let map = DmaMap {
            flags,
            ..dma_map(iova, 0x1000)
        };
        raw.send(id, Command::DMA_MAP, map.as_bytes());
        raw.expect_ok(id);
    }
    let denied = |access| {
        Err(DmaError::Protection {
            iova: if access == "writes" { 0x1000 } else { 0x2000 },
            access,
        })
    };
    assert_eq!(store(&rig, 0x1000, vec![1]).join().unwrap(), denied("writes"));
    let read = fetch(&rig, 0x2000).join().unwrap();
    assert_eq!(read.map(drop), denied("reads"));
}
