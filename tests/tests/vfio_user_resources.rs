//! What the server uses up: nothing for a message, nothing for a client that has gone.
#![allow(unsafe_code)] // A counting global allocator.

mod vfio_user_scratch;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use device::model::{AccessError, BarSpec, Identity, Model};
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use driver::backing::{Backing, DmaProt};
use driver::vfio_user::VfioUserClient;
use protos::vfio_user::Command;
use rustix::event::{EventfdFlags, eventfd};
use vfio_user_scratch::*;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// The largest of them, in bytes.
static LARGEST: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

fn count(bytes: usize) {
    // No thread-local any more at a thread's end: nothing to count either.
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LARGEST.fetch_max(bytes as u64, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The tests of this file look at the whole process: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Marks the thread that serves it as counted.
#[derive(Debug)]
struct Marking;

impl Model for Marking {
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
            size: 0x2000,
            is_64bit: true,
            prefetchable: false,
            mmap: None,
        }]
    }
    fn msix(&self) -> Option<device::model::MsixSpec> {
        None
    }
    fn bar_read(&self, _: usize, _: u64, data: &mut [u8]) -> Result<(), AccessError> {
        COUNTED.set(true);
        data.fill(1);
        Ok(())
    }
    fn bar_write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn reset(&self) {
        COUNTED.set(false);
    }
}

#[test]
fn test_region_access_when_in_steady_state_allocates_nothing_on_either_side() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let function = Function::new(|_| Ok::<_, Infallible>(Arc::new(Marking) as Arc<dyn Model>)).unwrap();
    let server = Server::bind(&path, function, ServerOptions::default()).unwrap();
    let stop = StopFd::new().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| server.run(&stop).unwrap());
        let client = VfioUserClient::connect(&path).unwrap();
        enable(&client);
        let mut large = [0; 4096];
        let mut run = |rounds| {
            for _ in 0..rounds {
                let mut small = [0; 4];
                client.read(0, 0, &mut small).unwrap();
                client.read(0, 8, &mut large).unwrap();
                client.write(0, 0, &small).unwrap();
                client.write(0, 0, &large).unwrap();
                client.write_posted(0, 0, &small).unwrap();
                client.config_read(0, &mut small).unwrap();
                assert_eq!(
                    client.read(0, 0x3000, &mut small).unwrap_err().raw_os_error(),
                    Some(22)
                );
            }
        };
        // The buffers grow to the largest message, and the refusals' first lines are logged.
        run(20);
        COUNTED.set(true);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        run(1000);
        let after = ALLOCATIONS.load(Ordering::Relaxed);
        COUNTED.set(false);
        drop(client);
        stop.stop();
        assert_eq!(after - before, 0, "allocations in 7000 messages");
        // The counter counts.
        COUNTED.set(true);
        drop(std::hint::black_box(Box::new(1)));
        COUNTED.set(false);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), after + 1);
    });
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn test_clients_when_they_come_and_go_in_every_way_leave_no_file_descriptor() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let outside = open_fds();
    {
        let rig = Rig::start();
        let connected = |rig: &Rig| {
            let client = rig.client();
            enable(&client);
            open_fds()
        };
        let at_first = connected(&rig);
        for _ in 0..50 {
            // In good order.
            let client = rig.client();
            enable(&client);
            let memory = memfd(0x4000);
            for page in 0..4 {
                client
                    .dma_map(
                        page << 12,
                        0x1000,
                        memory.as_fd(),
                        page << 12,
                        DmaProt::READ_WRITE,
                    )
                    .unwrap();
                client
                    .set_msix(
                        page as u32,
                        client.io_eventfd(0, BELL).unwrap().as_ref().map(AsFd::as_fd),
                    )
                    .unwrap();
            }
            assert!(VfioUserClient::connect(&rig.path).is_err());
            drop(client);
            // With eventfds that mask, unmask and are triggered.
            let mut raw = Raw::negotiated(&rig.path);
            let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let events = [event(), event(), event()];
            for action in [8, 16, 32] {
                let body = irq_set(4 | action, 3);
                let fds = events.each_ref().map(AsFd::as_fd);
                raw.send_with_fds(1, Command::DEVICE_SET_IRQS, &body, &fds);
                raw.expect_ok(1);
            }
            drop(raw);
            // In the middle of a message, with file descriptors that nobody asked for.
            let mut raw = Raw::negotiated(&rig.path);
            raw.send_with_fds(1, Command::REGION_READ, &[], &[memory.as_fd(); 20]);
            raw.send_with_fds(2, Command::DMA_MAP, &[0; 32], &[memory.as_fd(); 5]);
            raw.expect_error(1, 22);
            raw.expect_error(2, 22);
            let frame = Raw::frame(3, Command::DMA_MAP, &[0; 32]);
            std::io::Write::write_all(&mut raw.stream, &frame[..30]).unwrap();
        }
        // The last one may still be being cleaned up: the next is accepted after that.
        drop(rig.client());
        drop(Raw::negotiated(&rig.path));
        assert_eq!(connected(&rig), at_first);
    }
    assert_eq!(open_fds(), outside);
}

/// Body of SET_IRQS for the first MSI-X vectors.
fn irq_set(flags: u32, count: u32) -> Vec<u8> {
    [20, flags, 2, 0, count]
        .iter()
        .flat_map(|word: &u32| word.to_ne_bytes())
        .collect()
}

#[test]
fn test_mask_eventfds_when_full_or_semaphores_neither_stop_nor_spin_the_server() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let rig = Rig::start();
    let mut raw = ready(&rig.path);
    // Each read of a semaphore takes 1 of the count: it stays readable.
    let fds = [EventfdFlags::empty(), EventfdFlags::SEMAPHORE].map(|kind| {
        let fd = eventfd(0, kind | EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        fd
    });
    raw.send_with_fds(
        2,
        Command::DEVICE_SET_IRQS,
        &irq_set(4 | 8, 2),
        &fds.each_ref().map(AsFd::as_fd),
    );
    raw.expect_ok(2);
    assert_eq!(raw.read_register(3, 8), 0);
    let server = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "vfio-user\n"))
        .expect("the connection's thread");
    let used = || {
        let line = std::fs::read_to_string(server.join("schedstat")).unwrap();
        Duration::from_nanos(line.split(' ').next().unwrap().parse().unwrap())
    };
    let before = used();
    // Not to wait for something: the span in which nothing should be done.
    std::thread::sleep(Duration::from_millis(300));
    let spent = used() - before;
    assert!(
        spent < Duration::from_millis(100),
        "{spent:?} of processor time for nothing"
    );
    assert_eq!(raw.read_register(4, 8), 0);
}

#[test]
fn test_hostile_sizes_when_sent_never_make_the_server_allocate_more_than_its_limit() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const LIMIT: u32 = 64 << 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let function = Function::new(|_| Ok::<_, Infallible>(Arc::new(Marking) as Arc<dyn Model>)).unwrap();
    let options = ServerOptions {
        max_data_xfer_size: LIMIT,
        ..ServerOptions::default()
    };
    let server = Server::bind(&path, function, options).unwrap();
    let stop = StopFd::new().unwrap();
    // From the model's first access on the connection's thread is counted.
    let marked = || {
        let mut raw = Raw::with_capabilities(&path, "\"write_multiple\":true");
        switch_on(&mut raw);
        raw.send(2, Command::REGION_READ, &access(0, 0, 4, &[]));
        raw.expect_ok(2);
        raw
    };
    std::thread::scope(|scope| {
        scope.spawn(|| server.run(&stop).unwrap());
        LARGEST.store(0, Ordering::Relaxed);
        let mut raw = marked();
        for (id, count) in (10..).zip([LIMIT + 1, 1 << 20, 1 << 30, u32::MAX]) {
            raw.send(id, Command::REGION_READ, &access(0, 0, count, &[]));
            raw.expect_error(id, 7);
            raw.send(id, Command::REGION_WRITE, &access(0, 0, count, &[0; 8]));
            raw.expect_error(id, 7);
        }
        for (id, count) in (20..).zip([201u64, 1 << 32, u64::MAX]) {
            raw.send(id, Command::REGION_WRITE_MULTI, &count.to_ne_bytes());
            raw.expect_error(id, 7);
        }
        // As much as is permitted, many times.
        for id in 30..60 {
            raw.send(
                id,
                Command::REGION_WRITE,
                &access(0, 7, LIMIT, &vec![0; LIMIT as usize]),
            );
            raw.expect_error(id, 22);
        }
        drop(raw);
        // Frames over the limit end the connection, before their bodies are there.
        for size in [LIMIT + 33 + 4800, 1 << 30, u32::MAX] {
            let mut raw = marked();
            let mut frame = Raw::frame(5, Command::REGION_WRITE, &access(0, 0, 8, &[]));
            frame[4..8].copy_from_slice(&size.to_ne_bytes());
            std::io::Write::write_all(&mut raw.stream, &frame).unwrap();
            raw.expect_error(5, 90);
            raw.expect_closed();
        }
        stop.stop();
    });
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest > 0, "nothing was counted");
    // A buffer doubles as it grows.
    assert!(
        largest <= 2 * (u64::from(LIMIT) + 64),
        "{largest} bytes at once, where {LIMIT} are the most of a message"
    );
}
