//! Our client's memory without a file, which the device asks for, on one socket and on a twin.

mod vfio_user_scratch;

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use driver::backing::{Backing, DmaProt};
use driver::vfio_user::{ByMessage, ClientOptions, MessageMemory, VfioUserClient};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_user_scratch::*;

const BOTH: [ByMessage; 2] = [ByMessage::OneSocket, ByMessage::Twin];

struct Client {
    client: VfioUserClient,
    fetched: OwnedFd,
    stored: OwnedFd,
}

impl Client {
    fn connect(rig: &Rig, by_message: ByMessage) -> Self {
        let options = ClientOptions {
            by_message,
            ..ClientOptions::default()
        };
        let client = VfioUserClient::connect_with(&rig.path, options).unwrap();
        assert_eq!(client.has_twin_socket(), by_message == ByMessage::Twin);
        enable(&client);
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (fetched, stored) = (event(), event());
        client.set_msix(1, Some(fetched.as_fd())).unwrap();
        client.set_msix(2, Some(stored.as_fd())).unwrap();
        Self {
            client,
            fetched,
            stored,
        }
    }

    fn map(&self, iova: u64, bytes: Vec<u8>, prot: DmaProt) -> Arc<Mutex<Vec<u8>>> {
        let len = bytes.len() as u64;
        let memory = Arc::new(Mutex::new(bytes));
        let shared: Arc<dyn MessageMemory> = Arc::clone(&memory) as _;
        self.client.dma_map_by_message(iova, len, shared, prot).unwrap();
        memory
    }

    fn register(&self, number: u64) -> u64 {
        let mut bytes = [0; 8];
        self.client.read(0, 8 * number, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u64) {
        self.client.write(0, offset, &value.to_le_bytes()).unwrap();
    }

    /// A thread of the device reads there; all ones when it cannot.
    fn fetch(&self, iova: u64) -> u64 {
        self.write(ASK, iova);
        arrives(&self.fetched);
        self.register(3)
    }

    fn store(&self, iova: u64, value: u64) -> bool {
        self.write(8, value);
        self.write(TELL, iova);
        arrives(&self.stored);
        self.register(4) == 1
    }
}

#[track_caller]
fn arrives(fd: &OwnedFd) {
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert_eq!(
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)),
        Ok(1),
        "no interrupt"
    );
    rustix::io::read(fd, &mut [0; 8]).unwrap();
}

#[test]
fn test_memory_without_a_file_when_the_device_asks_is_read_and_written() {
    for by_message in BOTH {
        let rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        let memory = client.map(
            0x10000,
            (0..=255).cycle().take(0x2000).collect(),
            DmaProt::READ_WRITE,
        );
        assert_eq!(client.fetch(0x10001), 0x0807_0605_0403_0201);
        assert!(client.store(0x11ff8, 0x1122_3344_5566_7788));
        assert_eq!(
            memory.lock().unwrap()[0x1ff8..],
            0x1122_3344_5566_7788_u64.to_le_bytes()
        );
        // Beside memory with a file.
        let file = memfd(0x1000);
        rustix::io::pwrite(&file, &[7; 8], 0).unwrap();
        client
            .client
            .dma_map(0x40000, 0x1000, file.as_fd(), 0, DmaProt::READ_WRITE)
            .unwrap();
        assert_eq!(client.fetch(0x40000), 0x0707_0707_0707_0707);
        assert_eq!(client.fetch(0x10000), 0x0706_0504_0302_0100);
        assert!(client.client.alive());
    }
}

#[test]
fn test_calls_when_the_device_asks_all_the_time_go_on() {
    for by_message in BOTH {
        let rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        client.map(0x10000, vec![1; 0x1000], DmaProt::READ_WRITE);
        client.write(0, 42);
        let done = AtomicBool::new(false);
        let reads = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut reads = 0;
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(client.register(0), 42);
                    client.client.write_posted(0, 0, &42u64.to_le_bytes()).unwrap();
                    reads += 1;
                }
                reads
            });
            for round in 0..300 {
                assert_eq!(client.fetch(0x10008), 0x0101_0101_0101_0101, "round {round}");
                assert!(client.store(0x10800, round));
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert!(reads > 0);
    }
}

#[test]
fn test_memory_without_a_file_when_taken_away_or_protected_is_not_reached() {
    for by_message in BOTH {
        let rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        let read_only = DmaProt {
            read: true,
            write: false,
        };
        let memory = client.map(0x10000, vec![3; 0x1000], read_only);
        assert_eq!(client.fetch(0x10000), 0x0303_0303_0303_0303);
        assert!(!client.store(0x10000, 1));
        assert_eq!(memory.lock().unwrap()[..8], [3; 8]);
        // The client itself refuses what overlaps, the server what is unaligned.
        let again: Arc<dyn MessageMemory> = Arc::new(Mutex::new(vec![0; 0x1000]));
        let error = client
            .client
            .dma_map_by_message(0x10000, 0x1000, Arc::clone(&again), read_only);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::AlreadyExists);
        let error = client
            .client
            .dma_map_by_message(0x20800, 0x1000, Arc::clone(&again), read_only);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
        client.client.dma_unmap(0x10000, 0x1000).unwrap();
        assert_eq!(client.fetch(0x10000), u64::MAX);
        client
            .client
            .dma_map_by_message(0x10000, 0x1000, again, read_only)
            .unwrap();
        assert_eq!(client.fetch(0x10000), 0);
        client.client.dma_unmap_all().unwrap();
        assert_eq!(client.fetch(0x10000), u64::MAX);
        assert_eq!(Arc::strong_count(&memory), 1, "what is unmapped is let go");
    }
}

#[test]
fn test_memory_when_it_fails_fails_the_access_only() {
    #[derive(Debug)]
    struct Broken;
    impl MessageMemory for Broken {
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), rustix::io::Errno> {
            Err(rustix::io::Errno::IO)
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), rustix::io::Errno> {
            Err(rustix::io::Errno::IO)
        }
    }
    for by_message in BOTH {
        let rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        let map = |iova| {
            client
                .client
                .dma_map_by_message(iova, 0x1000, Arc::new(Broken), DmaProt::READ_WRITE)
        };
        map(0).unwrap();
        assert_eq!(client.fetch(0), u64::MAX);
        assert!(!client.store(0, 1));
        assert_eq!(client.register(1), 1);
    }
}

#[test]
fn test_client_when_it_was_not_told_to_be_asked_refuses_such_memory() {
    let rig = Rig::start();
    let client = rig.client();
    let memory: Arc<dyn MessageMemory> = Arc::new(Mutex::new(vec![0; 0x1000]));
    let error = client
        .dma_map_by_message(0, 0x1000, memory, DmaProt::READ_WRITE)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(client.alive());
}

#[test]
fn test_client_when_the_server_ends_fails_its_calls() {
    for by_message in BOTH {
        let mut rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        client.map(0, vec![0; 0x1000], DmaProt::READ_WRITE);
        rig.finish();
        let error = client.client.read(0, 0, &mut [0; 8]).unwrap_err();
        assert!(error.to_string().contains("connect again"), "{error}");
        assert!(!client.client.alive());
    }
}

#[test]
fn test_write_multi_when_many_writes_are_given_does_them_in_order() {
    for by_message in [ByMessage::No, ByMessage::OneSocket, ByMessage::Twin] {
        let rig = Rig::start();
        let client = Client::connect(&rig, by_message);
        let values: Vec<[u8; 8]> = (0..450u64).map(u64::to_le_bytes).collect();
        let writes: Vec<_> = values.iter().map(|value| (0, LOG, &value[..])).collect();
        assert_eq!(client.client.write_multi(&writes).unwrap(), 450);
        assert_eq!(rig.model.log(), (0..450).collect::<Vec<_>>());
        assert_eq!(client.client.write_multi(&[]).unwrap(), 0);
        for wrong in [(0, LOG, &[0; 9][..]), (6, 0, &[0]), (0, BAR0_SIZE, &[0])] {
            let error = client.client.write_multi(&[(0, LOG, &[1]), wrong]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{wrong:?}");
        }
        assert_eq!(rig.model.log().len(), 450, "a refused message does nothing");
        assert!(client.client.alive());
    }
}
