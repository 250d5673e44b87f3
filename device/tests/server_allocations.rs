//! The server's way from a message to its answer allocates nothing. (In a file of its own: the allocator of
//! this process counts.)
#![allow(unsafe_code)] // A global allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use device::gru::{Gru, GruConfig};
use device::model::Model;
use device::pci::Function;
use device::server::{Server, ServerOptions, StopFd};
use protos::vfio_user::{Command, Header, MessageFlags, RegionAccess};
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

const MESSAGES: usize = 3000;

fn message(command: Command, flags: MessageFlags, access: RegionAccess, data: &[u8]) -> Vec<u8> {
    let header = Header::command(1, command, size_of::<RegionAccess>() + data.len(), flags);
    [header.as_bytes(), access.as_bytes(), data].concat()
}

#[test]
fn test_region_accesses_when_served_allocate_nothing() {
    for busy_poll in [Duration::ZERO, Duration::from_micros(50)] {
        let function = Function::new(|context| {
            Gru::new(context, GruConfig::default()).map(|gru| -> Arc<dyn Model> { gru })
        })
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gru.sock");
        let options = ServerOptions {
            busy_poll,
            ..ServerOptions::default()
        };
        let server = Server::bind(&path, function, options).unwrap();
        let stop = StopFd::new().unwrap();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| server.run(&stop));
            let counted = count(&path);
            stop.stop();
            serving.join().unwrap().unwrap();
            assert_eq!(counted, 0, "allocations in {} messages", 4 * MESSAGES);
        });
    }
}

/// Allocations of the whole process while messages are exchanged.
fn count(path: &std::path::Path) -> u64 {
    let mut socket = UnixStream::connect(path).unwrap();
    let mut answer = [0; 4096];
    let version = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":1}}\0";
    let header = Header::command(0, Command::VERSION, version.len(), MessageFlags::COMMAND);
    socket.write_all(header.as_bytes()).unwrap();
    socket.write_all(version).unwrap();
    socket.read_exact(&mut answer[..16]).unwrap();
    let size = u32::from_ne_bytes(answer[4..8].try_into().unwrap()) as usize;
    socket.read_exact(&mut answer[16..size]).unwrap();

    let table = RegionAccess {
        offset: 0x8000,
        region: 0,
        count: 4,
    };
    let command = RegionAccess {
        offset: 4,
        region: 7,
        count: 2,
    };
    let (answered, posted) = (MessageFlags::COMMAND, MessageFlags::NO_REPLY);
    let enable = message(Command::REGION_WRITE, answered, command, &[2, 0]);
    let read = message(Command::REGION_READ, answered, table, &[]);
    let write = message(Command::REGION_WRITE, answered, table, &[0; 4]);
    let post = message(Command::REGION_WRITE, posted, table, &[0; 4]);
    let mut ask = |message: &[u8], len: usize| {
        socket.write_all(message).unwrap();
        if len > 0 {
            socket.read_exact(&mut answer[..len]).unwrap();
            assert_eq!(answer[8], 1, "a good answer");
        }
    };
    ask(&enable, 32);
    let mut all = |times: usize| {
        for _ in 0..times {
            ask(&read, 36);
            ask(&write, 32);
            ask(&post, 0);
            ask(&post, 0);
        }
    };
    all(10);
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    all(MESSAGES);
    ALLOCATIONS.load(Ordering::SeqCst) - before
}
