//! Our client against our server, over a real socket.

mod vfio_user_scratch;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use driver::backing::{Backing, DmaProt};
use driver::vfio_user::{ClientOptions, ConnectError, VfioUserClient};
use protos::vfio_user::{
    Command, DmaFlags, DmaMap, Header, MessageFlags, RegionFlags, RegionIndex, RegionInfo,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_user_scratch::*;
use zerocopy::{FromBytes, IntoBytes};

fn read64(client: &dyn Backing, bar: usize, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    client.read(bar, offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn write64(client: &dyn Backing, bar: usize, offset: u64, value: u64) {
    client.write(bar, offset, &value.to_le_bytes()).unwrap();
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        Err(Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

#[test]
fn test_client_when_connected_knows_the_device() {
    let rig = Rig::start();
    let client = rig.client();
    assert_eq!(
        (client.bar(0).size, client.bar(0).mappable),
        (BAR0_SIZE, vec![(PAGE, 0x1000)])
    );
    assert_eq!(
        (client.bar(2).size, client.bar(2).mappable),
        (BAR2_SIZE, vec![(0, BAR2_SIZE)])
    );
    assert_eq!((client.bar(1).size, client.bar(6).size), (0, 0));
    assert_eq!(client.msix_vectors(), u32::from(VECTORS));
    assert_eq!(client.pid(), Some(std::process::id()));
    assert!(client.pidfd().is_none(), "the device is this process");
    assert!(client.alive());
    let capabilities = client.server_capabilities();
    assert_eq!(
        (capabilities.max_msg_fds, capabilities.max_data_xfer_size),
        (Some(16), Some(1 << 20))
    );
    assert_eq!(
        (capabilities.pgsizes, capabilities.write_multiple),
        (Some(4096), Some(true))
    );
}

#[test]
fn test_registers_when_written_read_back() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    write64(&client, 0, 8, 0x1122_3344_5566_7788);
    assert_eq!(read64(&client, 0, 8), 0x1122_3344_5566_7788);
    let mut half = [0; 2];
    client.read(0, 0xa, &mut half).unwrap();
    assert_eq!(half, [0x66, 0x55]);
    let mut id = [0; 4];
    client.config_read(0, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
    // An error of the device leaves the connection as it was.
    assert_eq!(
        client.read(0, 0x400, &mut half).unwrap_err().raw_os_error(),
        Some(22)
    );
    assert_eq!(client.read(4, 0, &mut half).unwrap_err().raw_os_error(), Some(22));
    assert!(client.read(9, 0, &mut half).is_err());
    assert_eq!(read64(&client, 0, 8), 0x1122_3344_5566_7788);
}

#[test]
fn test_mapped_memory_when_written_is_what_the_device_sees() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    let (fd, offset) = client.bar_fd(0).unwrap();
    rustix::io::pwrite(fd, &99u64.to_le_bytes(), offset + PAGE + 8).unwrap();
    assert_eq!(read64(&client, 0, PAGE + 8), 99);
    let (fd, offset) = client.bar_fd(2).unwrap();
    write64(&client, 2, BAR2_SIZE - 8, 7);
    let mut bytes = [0; 8];
    rustix::io::pread(fd, &mut bytes, offset + BAR2_SIZE - 8).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 7);
    assert!(client.bar_fd(1).is_none());
}

#[test]
fn test_transfer_when_larger_than_a_message_is_cut() {
    let options = device::server::ServerOptions {
        max_data_xfer_size: 4096,
        ..Default::default()
    };
    let rig = Rig::with(options);
    let client = rig.client();
    enable(&client);
    let data: Vec<u8> = (0..100_000u32).map(|byte| (byte % 251) as u8).collect();
    client.write(2, 16, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.read(2, 16, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn test_posted_writes_when_mixed_with_reads_keep_their_order() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    for value in 0..2000u64 {
        if value % 7 == 0 {
            write64(&client, 0, LOG, value);
        } else {
            client.write_posted(0, LOG, &value.to_le_bytes()).unwrap();
        }
    }
    // Refused and not answered: nothing may come in the way of the next reply.
    client.write_posted(0, 0x400, &[0; 8]).unwrap();
    assert_eq!(read64(&client, 0, 8), 0);
    assert_eq!(rig.model.log(), (0..2000).collect::<Vec<_>>());
}

#[test]
fn test_dma_when_mapped_reaches_memory_and_after_unmap_does_not() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    let memory = memfd(0x4000);
    rustix::io::pwrite(&memory, &0xabcdu64.to_le_bytes(), 0x1000).unwrap();
    client
        .dma_map(0x10_0000, 0x3000, memory.as_fd(), 0x1000, DmaProt::READ_WRITE)
        .unwrap();
    write64(&client, 0, FETCH, 0x10_0000);
    assert_eq!(read64(&client, 0, 0), 0xabcd);
    write64(&client, 0, 8, 0x5555);
    write64(&client, 0, STORE, 0x10_2ff8);
    let mut bytes = [0; 8];
    rustix::io::pread(&memory, &mut bytes, 0x3ff8).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x5555);

    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    let map = |iova, len| client.dma_map(iova, len, memory.as_fd(), 0, DmaProt::READ_WRITE);
    assert_eq!(errno(map(0x10_2000, 0x2000)), Errno::EXIST.raw_os_error());
    assert_eq!(errno(map(0x20_0001, 0x1000)), Errno::INVAL.raw_os_error());
    assert_eq!(errno(map(0x20_0000, 0)), Errno::INVAL.raw_os_error());
    assert_eq!(errno(map(u64::MAX - 0xfff, 0x1000)), Errno::INVAL.raw_os_error());
    assert_eq!(
        errno(client.dma_unmap(0x10_1000, 0x1000)),
        Errno::INVAL.raw_os_error(),
        "cut"
    );

    client.dma_unmap(0x10_0000, 0x3000).unwrap();
    write64(&client, 0, FETCH, 0x10_0000);
    assert_eq!(read64(&client, 0, 0), u64::MAX);
    client.dma_unmap(0, 1 << 63).unwrap();
    client.dma_unmap(1 << 63, 1 << 63).unwrap();
}

#[test]
fn test_read_only_mapping_when_stored_to_refuses() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    let memory = memfd(0x1000);
    client
        .dma_map(
            0,
            0x1000,
            memory.as_fd(),
            0,
            DmaProt {
                read: true,
                write: false,
            },
        )
        .unwrap();
    write64(&client, 0, STORE, 0);
    assert_eq!(read64(&client, 0, 16), 0);
    write64(&client, 0, FETCH, 0);
    assert_eq!(read64(&client, 0, 0), 0);
}

#[test]
fn test_interrupts_when_routed_arrive_and_when_taken_away_do_not() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    let (first, last) = (event(), event());
    client.set_msix(0, Some(first.as_fd())).unwrap();
    client
        .set_msix(u32::from(VECTORS) - 1, Some(last.as_fd()))
        .unwrap();
    write64(&client, 0, RAISE, 0);
    write64(&client, 0, RAISE, u64::from(VECTORS) - 1);
    write64(&client, 0, RAISE, 1000);
    assert_eq!((count(&first), count(&last)), (1, 1));
    client.set_msix(0, None).unwrap();
    write64(&client, 0, RAISE, 0);
    assert_eq!(count(&first), 0);
    assert_eq!(
        client
            .set_msix(u32::from(VECTORS), None)
            .unwrap_err()
            .raw_os_error(),
        Some(22)
    );
    let file = memfd(8);
    assert_eq!(
        client.set_msix(0, Some(file.as_fd())).unwrap_err().raw_os_error(),
        Some(22),
        "no eventfd"
    );
}

#[test]
fn test_io_eventfd_when_asked_for_is_the_models() {
    let rig = Rig::start();
    let client = rig.client();
    let bell = client.io_eventfd(0, BELL).unwrap().unwrap();
    rustix::io::write(&bell, &3u64.to_ne_bytes()).unwrap();
    assert_eq!(count(&rig.model.bell), 3);
    assert!(client.io_eventfd(0, BELL + 8).unwrap().is_none());
    assert!(client.io_eventfd(2, 0).unwrap().is_none());
}

#[test]
fn test_reset_when_asked_resets_the_model_only() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    write64(&client, 0, 8, 1);
    client.reset().unwrap();
    assert_eq!(read64(&client, 0, 8), 0);
    assert_eq!(rig.model.resets(), 1);
}

#[test]
fn test_second_client_when_one_is_connected_is_refused_at_once_and_harms_nobody() {
    let rig = Rig::start();
    let client = rig.client();
    enable(&client);
    for _ in 0..20 {
        let error = VfioUserClient::connect(&rig.path).unwrap_err();
        assert!(matches!(error, ConnectError::Busy { .. }), "{error}");
        assert!(error.to_string().contains(rig.path.to_str().unwrap()));
    }
    write64(&client, 0, 8, 3);
    assert_eq!(read64(&client, 0, 8), 3);
    assert!(client.alive());
}

#[test]
fn test_second_client_when_it_sends_version_is_refused_by_that_messages_id() {
    const EBUSY: i32 = 16;
    let rig = Rig::start();
    let mut first = ready(&rig.path);
    // It says nothing, and others do not wait for it.
    let silent = Raw::connect(&rig.path);
    let version = Raw::frame(0x1234, Command::VERSION, b"\0\0\x01\0{\"capabilities\":{}}\0");
    for cut in [version.len(), 1, 16, 20] {
        let mut second = Raw::connect(&rig.path);
        second.stream.write_all(&version[..cut]).unwrap();
        // While the rest has not come, the first client is served.
        first.read_register(2, 8);
        second.stream.write_all(&version[cut..]).unwrap();
        let (header, body) = second.reply();
        assert_eq!((header.message_id, header.command), (0x1234, Command::VERSION));
        assert_eq!(header.flags, MessageFlags::REPLY | MessageFlags::ERROR);
        assert_eq!((header.error as i32, body.len()), (EBUSY, 0));
        // The end, and not a reset: everything that it sent was read.
        assert_eq!(second.stream.read(&mut [0; 64]).unwrap(), 0);
    }
    drop(silent);
    drop(first);
    enable(&rig.client());
}

#[test]
fn test_second_clients_when_they_say_nothing_are_dropped_in_time_and_by_number() {
    const EBUSY: i32 = 16;
    let rig = Rig::with(device::server::ServerOptions {
        client_timeout: Duration::from_secs(2),
        ..Default::default()
    });
    let mut first = ready(&rig.path);
    // More than are kept.
    let mut silent: Vec<_> = (0..40).map(|_| Raw::connect(&rig.path)).collect();
    for client in &mut silent {
        // Reading gives up after 30 seconds, with a panic.
        client.expect_error(0, EBUSY);
        client.expect_closed();
    }
    first.read_register(2, 8);
}

#[test]
fn test_next_client_when_the_first_is_gone_finds_a_clean_device() {
    let rig = Rig::start();
    for round in 1..=20 {
        // Connecting right after the drop: it waits for the clean-up, it is not refused.
        let client = rig.client();
        let mut command = [0; 2];
        client.config_read(4, &mut command).unwrap();
        assert_eq!(command, [0, 0]);
        enable(&client);
        assert_eq!(read64(&client, 0, 8), 0);
        write64(&client, 0, 8, round);
        client
            .dma_map(0, 0x1000, memfd(0x1000).as_fd(), 0, DmaProt::READ_WRITE)
            .unwrap();
        client.set_msix(0, Some(event().as_fd())).unwrap();
    }
}

#[test]
fn test_next_client_when_the_first_is_killed_gets_the_device() {
    let rig = Rig::start();
    let mut raw = Raw::negotiated(&rig.path);
    let memory = memfd(0x1000);
    let map = DmaMap {
        argsz: 32,
        flags: DmaFlags::READ,
        offset: 0,
        address: 0x1000,
        size: 0x1000,
    };
    raw.send_with_fds(1, Command::DMA_MAP, map.as_bytes(), &[memory.as_fd()]);
    raw.expect_ok(1);
    // Another process holds the connection; the kernel closes it when that process dies.
    let stdin = Stdio::from(OwnedFd::from(raw.stream));
    let mut holder = Process::new("sleep").arg("1000").stdin(stdin).spawn().unwrap();
    assert!(matches!(
        VfioUserClient::connect(&rig.path),
        Err(ConnectError::Busy { .. })
    ));
    assert_eq!(rig.function.dma().mappings().len(), 1);
    holder.kill().unwrap();
    holder.wait().unwrap();
    let client = rig.client();
    enable(&client);
    assert_eq!(rig.function.dma().mappings().len(), 0);
    assert_eq!(read64(&client, 0, 8), 0);
}

#[test]
fn test_stop_when_a_client_is_connected_ends_promptly_and_the_client_knows() {
    let mut rig = Rig::start();
    let client = rig.client();
    assert!(client.alive());
    let started = Instant::now();
    rig.finish();
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "took {:?}",
        started.elapsed()
    );
    assert!(!client.alive());
    let error = client.read(0, 0, &mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset), "{error:?}");
    assert!(error.to_string().contains(rig.path.to_str().unwrap()), "{error}");
    assert_eq!(
        client.read(0, 0, &mut [0]).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
}

#[test]
fn test_connect_when_there_is_no_socket_or_no_listener_says_which() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let error = VfioUserClient::connect(&path).unwrap_err();
    assert!(matches!(error, ConnectError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
    drop(UnixListener::bind(&path).unwrap());
    let error = VfioUserClient::connect(&path).unwrap_err();
    assert!(matches!(error, ConnectError::NotListening { .. }), "{error}");
}

/// A server that sends one prepared answer to VERSION.
fn answer_version(answer: Vec<u8>) -> ConnectError {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&answer).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let options = ClientOptions {
            reply_timeout: Some(Duration::from_millis(1500)),
            ..ClientOptions::default()
        };
        VfioUserClient::connect_with(&path, options).unwrap_err()
    })
}

#[test]
fn test_connect_when_the_answer_is_wrong_says_what() {
    let header = Header::command(0, Command::VERSION, 4, MessageFlags::REPLY);
    let with = |header: Header, payload: &[u8]| [header.as_bytes(), payload].concat();
    let error = answer_version(Vec::new());
    assert!(
        matches!(
            error,
            ConnectError::Timeout {
                request: "VERSION",
                ..
            }
        ),
        "{error}"
    );
    let error = answer_version(with(header, &[1, 0, 0, 0]));
    assert!(
        matches!(
            error,
            ConnectError::Version {
                major: 1,
                minor: 0,
                ..
            }
        ),
        "{error}"
    );
    for wrong in [
        with(
            Header {
                message_size: 15,
                ..header
            },
            &[0; 4],
        ),
        with(
            Header {
                message_size: u32::MAX,
                ..header
            },
            &[0; 4],
        ),
        with(
            Header {
                message_id: 5,
                ..header
            },
            &[0; 4],
        ),
        with(
            Header {
                flags: MessageFlags::COMMAND,
                ..header
            },
            &[0; 4],
        ),
        with(
            Header {
                command: Command::DMA_MAP,
                ..header
            },
            &[0; 4],
        ),
        with(
            Header {
                message_size: 18,
                ..header
            },
            &[0; 2],
        ),
        with(header, &[0, 0, 1, 0, 0]),
        vec![0xff; 64],
    ] {
        let error = answer_version(wrong);
        assert!(matches!(error, ConnectError::Protocol { .. }), "{error}");
    }
    let refused = Header {
        message_size: 16,
        flags: MessageFlags(0x21),
        error: 13,
        ..header
    };
    let error = answer_version(with(refused, &[]));
    assert!(
        matches!(&error, ConnectError::Failed { source, .. } if source.raw_os_error() == Some(13)),
        "{error}"
    );
}

#[test]
fn test_call_when_no_reply_comes_times_out_and_the_client_is_dead() {
    let rig = Rig::start();
    let options = ClientOptions {
        reply_timeout: Some(Duration::from_millis(1500)),
        ..ClientOptions::default()
    };
    let client = VfioUserClient::connect_with(&rig.path, options).unwrap();
    enable(&client);
    let error = client.read(0, WAIT, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains(rig.path.to_str().unwrap()), "{error}");
    assert!(!client.alive());
    rig.model.barrier.wait();
    rig.model.barrier.wait();
    // The late reply must not be taken for the answer to this.
    assert_eq!(
        client.read(0, 8, &mut [0; 8]).unwrap_err().kind(),
        ErrorKind::NotConnected
    );
    drop(client);
    enable(&rig.client());
}

#[test]
fn test_pidfd_when_the_device_is_another_process_becomes_readable_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    // The credentials that a client sees are those of whoever called listen().
    let script = "import os,socket,sys,struct\n\
        l=socket.socket(socket.AF_UNIX); l.bind(sys.argv[1]); l.listen()\n\
        print('up',flush=True)\n\
        c=l.accept()[0]\n\
        def say(cmd,payload,h):\n    c.sendall(struct.pack('=HHIII',h[0],cmd,16+len(payload),1,0)+payload)\n\
        while True:\n\
        \x20   d=c.recv(16)\n\
        \x20   if len(d)<16: break\n\
        \x20   h=struct.unpack('=HHIII',d)\n\
        \x20   body=c.recv(h[2]-16) if h[2]>16 else b''\n\
        \x20   say(h[1],{1:b'\\0\\0\\1\\0',4:struct.pack('=IIII',16,2,0,0)}[h[1]],h)\n";
    let python = Process::new("python3")
        .arg("-c")
        .arg(script)
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn();
    let mut device = match python {
        Ok(device) => device,
        Err(error) => {
            eprintln!("SKIPPED: python3 cannot be run ({error}), and it is the other process of this test");
            return;
        }
    };
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(device.stdout.take().unwrap()),
        &mut String::new(),
    )
    .unwrap();
    let client = VfioUserClient::connect(&path).unwrap();
    assert_eq!(client.pid(), Some(device.id()));
    let pidfd = client.pidfd().expect("another process has a pidfd");
    assert!(client.alive());
    device.kill().unwrap();
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&limit)),
        Ok(1),
        "the pidfd tells the end"
    );
    device.wait().unwrap();
    assert!(!client.alive());
}

#[test]
fn test_dma_maps_when_as_many_as_version_says_refuse_one_more_and_keep_the_others() {
    let rig = Rig::start();
    let mut raw = Raw::connect(&rig.path);
    let proposal = b"\0\0\x01\0{\"capabilities\":{\"max_dma_maps\":65535,\"max_msg_fds\":16}}\0";
    raw.send(1, Command::VERSION, proposal);
    let answer = raw.expect_ok(1);
    let json: serde_json::Value = serde_json::from_slice(&answer[4..answer.len() - 1]).unwrap();
    let limit = json["capabilities"]["max_dma_maps"].as_u64().unwrap();
    switch_on(&mut raw);
    let memory = memfd(0x2000);
    rustix::io::pwrite(&memory, &7u64.to_le_bytes(), 0).unwrap();
    let map = |raw: &mut Raw, id, page: u64| {
        raw.send_with_fds(
            id,
            Command::DMA_MAP,
            dma_map(page << 12, 0x1000).as_bytes(),
            &[memory.as_fd()],
        );
    };
    map(&mut raw, 2, 0);
    raw.expect_ok(2);
    // Up to the limit without a file, many in flight.
    for start in (1..limit).step_by(256) {
        let pages = start..(start + 256).min(limit);
        for page in pages.clone() {
            raw.send(
                page as u16,
                Command::DMA_MAP,
                dma_map(page << 12, 0x1000).as_bytes(),
            );
        }
        for page in pages {
            raw.expect_ok(page as u16);
        }
    }
    let fetched = |raw: &mut Raw| {
        raw.send(3, Command::REGION_WRITE, &access(FETCH, 0, 8, &[0; 8]));
        raw.expect_ok(3);
        raw.read_register(4, 0)
    };
    for _ in 0..2 {
        map(&mut raw, 5, limit);
        raw.expect_error(5, Errno::NOSPC.raw_os_error());
        raw.send(6, Command::DMA_MAP, dma_map(limit << 12, 0x1000).as_bytes());
        raw.expect_error(6, Errno::NOSPC.raw_os_error());
    }
    assert_eq!(rig.function.dma().stats().mappings as u64, limit);
    assert_eq!(fetched(&mut raw), 7, "the first mapping is as it was");
    raw.send(7, Command::DMA_UNMAP, dma_unmap(9 << 12, 0x1000).as_bytes());
    raw.expect_ok(7);
    map(&mut raw, 8, limit);
    raw.expect_ok(8);
    assert_eq!(fetched(&mut raw), 7);
}

#[test]
fn test_client_when_it_takes_no_file_descriptors_gets_none() {
    let rig = Rig::start();
    for (fds, expected) in [(0u32, 0usize), (1, 1)] {
        let mut raw = Raw::connect(&rig.path);
        let proposal = format!(
            "\0\0\x01\0{{\"capabilities\":{{\"max_msg_fds\":{fds},\"twin_socket\":{{\"supported\":true}}}}}}\0"
        );
        raw.send(1, Command::VERSION, proposal.as_bytes());
        let (answer, received) = raw.reply_and_fds();
        assert_eq!(received, expected, "VERSION with {fds}");
        let json: serde_json::Value = serde_json::from_slice(&answer[4..answer.len() - 1]).unwrap();
        assert_eq!(json["capabilities"]["twin_socket"].is_null(), fds == 0);
        for index in [0, 2] {
            let request = RegionInfo {
                argsz: 256,
                flags: RegionFlags::default(),
                index: RegionIndex(index),
                cap_offset: 0,
                size: 0,
                offset: 0,
            };
            raw.send(2, Command::DEVICE_GET_REGION_INFO, request.as_bytes());
            let (answer, received) = raw.reply_and_fds();
            assert_eq!(received, expected, "region {index} with {fds}");
            let (info, rest) = RegionInfo::read_from_prefix(&answer).unwrap();
            assert_eq!(info.flags.contains(RegionFlags::MMAP), fds > 0);
            if fds == 0 {
                assert!(!info.flags.contains(RegionFlags::CAPS) && rest.is_empty());
                assert!(info.flags.contains(RegionFlags::READ | RegionFlags::WRITE));
            }
        }
        switch_on(&mut raw);
        raw.read_register(3, 8);
    }
}
