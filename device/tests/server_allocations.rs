//! The server's way from a message to its answer allocates nothing. (In a file of its own: the allocator of
//! this process counts.)
#![allow(unsafe_code)] // A global allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use device::gru::{Gru, GruConfig};
use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use protos::vfio_user::{
    Command, DmaFlags, DmaMap, Header, IoFdsInfo, IrqIndex, IrqSet, IrqSetFlags, MessageFlags, RegionAccess,
    RegionIndex, RegionWriteOne,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use zerocopy::IntoBytes;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: forwards to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: as promised by the caller.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: as promised by the caller.
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(ptr, layout) }
    }

    // SAFETY: as promised by the caller.
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROUNDS: usize = 3000;
/// Where the client has memory without a file.
const IOVA: u64 = 0x10_0000;
/// A register without side effects: the lower address word of the MSI-X table's first entry.
const TABLE: RegionAccess = RegionAccess {
    offset: 0x8000,
    region: 0,
    count: 4,
};

/// Held for the whole of a test: the allocator counts what all threads do.
static ALONE: Mutex<()> = Mutex::new(());

fn message(command: Command, flags: MessageFlags, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let header = Header::command(1, command, body.len(), flags);
    [header.as_bytes(), &body].concat()
}

/// A GRU that is served, and a client that has said VERSION with these capabilities and switched memory decoding and
/// bus mastering on.
fn with_client(options: ServerOptions, capabilities: &str, body: impl FnOnce(&mut Client, &Function)) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let function =
        Function::new(|context| Gru::new(context, GruConfig::default()).map(|gru| -> Arc<dyn Model> { gru }))
            .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("gru.sock");
    let server = Server::bind(&path, Arc::clone(&function), options).unwrap();
    let stop = StopFd::new().unwrap();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&stop));
        let mut client = Client {
            socket: UnixStream::connect(&path).unwrap(),
            answer: Box::new([0; 4096]),
            fds: Vec::new(),
        };
        let json = format!("{{\"capabilities\":{{{capabilities}}}}}\0");
        let version = message(
            Command::VERSION,
            MessageFlags::COMMAND,
            &[b"\0\0\x01\0", json.as_bytes()],
        );
        client.ask_for_fds(&version);
        let command = RegionAccess {
            offset: 4,
            region: 7,
            count: 2,
        };
        client.ask(&write(command, MessageFlags::COMMAND, &[6, 0]));
        settle();
        body(&mut client, &function);
        drop(client);
        stop.stop();
        serving.join().unwrap().unwrap();
    });
}

/// Threads allocate when they start: wait until every other one of this process sleeps.
fn settle() {
    let own = std::fs::read_link("/proc/thread-self").unwrap();
    let own = own.file_name().unwrap().to_owned();
    let sleeps = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        task.file_name() == own || stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with('S'))
    };
    while !std::fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .all(sleeps)
    {
        std::thread::yield_now();
    }
}

fn write(access: RegionAccess, flags: MessageFlags, data: &[u8]) -> Vec<u8> {
    message(Command::REGION_WRITE, flags, &[access.as_bytes(), data])
}

struct Client {
    socket: UnixStream,
    answer: Box<[u8; 4096]>,
    fds: Vec<OwnedFd>,
}

impl Client {
    /// The next message from `socket`: its bytes.
    fn message(socket: &mut UnixStream, buffer: &mut [u8; 4096]) -> usize {
        socket.read_exact(&mut buffer[..16]).unwrap();
        let size = u32::from_ne_bytes(buffer[4..8].try_into().unwrap()) as usize;
        socket.read_exact(&mut buffer[16..size]).unwrap();
        size
    }

    /// Sends a command; its good answer's payload.
    fn ask(&mut self, request: &[u8]) -> &[u8] {
        self.socket.write_all(request).unwrap();
        let size = Self::message(&mut self.socket, &mut self.answer);
        assert_eq!(self.answer[8..12], [1, 0, 0, 0], "a good answer");
        &self.answer[16..size]
    }

    /// As [`Client::ask`], and keeps the file descriptors that come.
    fn ask_for_fds(&mut self, request: &[u8]) {
        self.socket.write_all(request).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut self.answer[..])];
        let got = recvmsg(&self.socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        let size = u32::from_ne_bytes(self.answer[4..8].try_into().unwrap()) as usize;
        assert_eq!((got.bytes, &self.answer[8..12]), (size, &[1, 0, 0, 0][..]));
    }

    fn send_fds(&mut self, request: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(request)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(request.len()));
        let size = Self::message(&mut self.socket, &mut self.answer);
        assert_eq!((size, self.answer[8]), (16, 1), "a good answer");
    }
}

/// Allocations of the whole process while `round` runs, after some rounds that do not count.
fn count(mut round: impl FnMut()) -> u64 {
    for _ in 0..100 {
        round();
    }
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    for _ in 0..ROUNDS {
        round();
    }
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

const FDS: &str = "\"max_msg_fds\":16";

#[test]
fn test_region_accesses_when_served_allocate_nothing() {
    for busy_poll in [Duration::ZERO, Duration::from_micros(50)] {
        let options = ServerOptions {
            busy_poll,
            ..ServerOptions::default()
        };
        with_client(options, FDS, |client, _| {
            let read = message(Command::REGION_READ, MessageFlags::COMMAND, &[TABLE.as_bytes()]);
            let answered = write(TABLE, MessageFlags::COMMAND, &[0; 4]);
            let posted = write(TABLE, MessageFlags::NO_REPLY, &[0; 4]);
            assert_eq!(
                count(|| {
                    client.ask(&read);
                }),
                0,
                "reads"
            );
            assert_eq!(
                count(|| {
                    client.ask(&answered);
                }),
                0,
                "answered writes"
            );
            // A burst of posted writes, and a read that shows that they are done.
            let burst = count(|| {
                for _ in 0..4 {
                    client.socket.write_all(&posted).unwrap();
                }
                client.ask(&read);
            });
            assert_eq!(burst, 0, "posted writes");
        });
    }
}

#[test]
fn test_write_multi_when_served_allocates_nothing() {
    with_client(
        ServerOptions::default(),
        "\"max_msg_fds\":16,\"write_multiple\":true",
        |client, _| {
            let one = RegionWriteOne {
                offset: TABLE.offset,
                region: TABLE.region,
                count: 4,
                data: [0; 8],
            };
            let writes = [one; 200];
            let all = message(
                Command::REGION_WRITE_MULTI,
                MessageFlags::COMMAND,
                &[&200u64.to_ne_bytes(), writes.as_bytes()],
            );
            let counted = count(|| assert_eq!(client.ask(&all), 200u64.to_ne_bytes()));
            assert_eq!(counted, 0);
        },
    );
}

#[test]
fn test_signals_of_mask_eventfds_when_served_allocate_nothing() {
    with_client(ServerOptions::default(), FDS, |client, _| {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (mask, unmask) = (event(), event());
        for (fd, action) in [
            (&mask, IrqSetFlags::ACTION_MASK),
            (&unmask, IrqSetFlags::ACTION_UNMASK),
        ] {
            let set = IrqSet {
                argsz: 20,
                flags: IrqSetFlags::DATA_EVENTFD | action,
                index: IrqIndex::MSIX,
                start: 3,
                count: 1,
            };
            let request = message(Command::DEVICE_SET_IRQS, MessageFlags::COMMAND, &[set.as_bytes()]);
            client.send_fds(&request, &[fd.as_fd()]);
        }
        let read = message(Command::REGION_READ, MessageFlags::COMMAND, &[TABLE.as_bytes()]);
        let counted = count(|| {
            for fd in [&mask, &unmask] {
                rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
                client.ask(&read);
                let taken = rustix::io::read(fd, &mut [0; 8]);
                assert_eq!(taken, Err(Errno::AGAIN), "the server has taken the signal");
            }
        });
        assert_eq!(counted, 0);
    });
}

#[test]
fn test_ioeventfd_when_kicked_allocates_nothing() {
    with_client(ServerOptions::default(), FDS, |client, _| {
        let ask = IoFdsInfo {
            argsz: 4096,
            flags: 0,
            index: RegionIndex(0),
            count: 0,
        };
        let request = message(
            Command::DEVICE_GET_REGION_IO_FDS,
            MessageFlags::COMMAND,
            &[ask.as_bytes()],
        );
        client.ask_for_fds(&request);
        let doorbell = client.fds.pop().expect("the GRU's doorbell");
        let read = message(Command::REGION_READ, MessageFlags::COMMAND, &[TABLE.as_bytes()]);
        let counted = count(|| {
            rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
            client.ask(&read);
        });
        assert_eq!(counted, 0);
    });
}

/// DMA_READ and DMA_WRITE, on the client's socket and on a twin: neither the device's thread that asks allocates, nor
/// the one that brings the answer.
#[test]
fn test_memory_without_a_file_when_asked_for_allocates_nothing() {
    for twin in [false, true] {
        let capabilities = if twin {
            "\"max_msg_fds\":16,\"twin_socket\":{\"supported\":true}"
        } else {
            FDS
        };
        with_client(ServerOptions::default(), capabilities, |client, function| {
            let map = DmaMap {
                argsz: 32,
                flags: DmaFlags::READ | DmaFlags::WRITE,
                offset: 0,
                address: IOVA,
                size: 0x1000,
            };
            client.ask(&message(
                Command::DMA_MAP,
                MessageFlags::COMMAND,
                &[map.as_bytes()],
            ));
            let mut socket = match client.fds.pop() {
                Some(fd) => UnixStream::from(fd),
                None => client.socket.try_clone().unwrap(),
            };
            let dma = Arc::clone(function.dma());
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut buffer = Box::new([0; 4096]);
                    while !done.load(Ordering::SeqCst) {
                        // It says so itself when it is the last.
                        let size = Client::message(&mut socket, &mut buffer);
                        let command = buffer[2];
                        // A good answer is what came: the data, or address and count.
                        buffer[8] = 1;
                        let size = match command {
                            11 => {
                                buffer[32..96].fill(7);
                                96
                            }
                            _ => {
                                assert_eq!(size, 96);
                                32
                            }
                        };
                        buffer[4..8].copy_from_slice(&(size as u32).to_ne_bytes());
                        if buffer[32] == 9 {
                            done.store(true, Ordering::SeqCst);
                        }
                        socket.write_all(&buffer[..size]).unwrap();
                    }
                });
                let mut data = [0; 64];
                let counted = count(|| {
                    dma.fetch(IOVA + 64, &mut data).unwrap();
                    dma.store(IOVA + 128, &data).unwrap();
                });
                assert_eq!(data, [7; 64]);
                dma.store(IOVA, &[9; 64]).unwrap();
                assert_eq!(counted, 0, "twin socket: {twin}");
            });
        });
    }
}
