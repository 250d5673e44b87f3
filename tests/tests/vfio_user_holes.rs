//! Where hardware would refuse DMA, so does the device: holes between mappings, ROMs, other devices' registers, bus
//! mastering off, the ends of the address space.

mod vfio_user_scratch;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use device::dma::DmaError;
use protos::vfio_user::{Command, DmaFlags, DmaMap};
use rustix::io::Errno;
use vfio_user_scratch::*;
use zerocopy::IntoBytes;

const RAM: u64 = 0x10_0000;
/// A hole of one page behind the RAM, then a ROM with a file.
const ROM: u64 = RAM + 0x3000;
/// A ROM without a file, right behind the other one.
const PRIVATE_ROM: u64 = ROM + 0x1000;
/// Another device's BAR: QEMU maps those without a file.
const BAR: u64 = 0xfe00_0000;

/// By the model's own thread-free access; all ones when it fails.
fn fetch(raw: &mut Raw, iova: u64) -> u64 {
    raw.send(
        20,
        Command::REGION_WRITE,
        &access(FETCH, 0, 8, &iova.to_le_bytes()),
    );
    raw.expect_ok(20);
    raw.read_register(21, 0)
}

/// Stores register 1 (5) there; whether it worked.
fn store(raw: &mut Raw, iova: u64) -> bool {
    raw.send(
        22,
        Command::REGION_WRITE,
        &access(STORE, 0, 8, &iova.to_le_bytes()),
    );
    raw.expect_ok(22);
    raw.read_register(23, 16) == 1
}

fn map(raw: &mut Raw, iova: u64, file: Option<&std::os::fd::OwnedFd>, flags: DmaFlags) {
    let map = DmaMap {
        flags,
        ..dma_map(iova, 0x1000)
    };
    match file {
        Some(file) => raw.send_with_fds(24, Command::DMA_MAP, map.as_bytes(), &[file.as_fd()]),
        None => raw.send(24, Command::DMA_MAP, map.as_bytes()),
    }
    raw.expect_ok(24);
}

fn machine(rig: &Rig) -> (Raw, [std::os::fd::OwnedFd; 3]) {
    let mut raw = ready(&rig.path);
    raw.send(2, Command::REGION_WRITE, &access(8, 0, 8, &5u64.to_le_bytes()));
    raw.expect_ok(2);
    let files = [memfd(0x1000), memfd(0x1000), memfd(0x1000)];
    for file in &files {
        rustix::io::pwrite(file, &[0x11; 0x1000], 0).unwrap();
    }
    let both = DmaFlags::READ | DmaFlags::WRITE;
    map(&mut raw, RAM, Some(&files[0]), both);
    map(&mut raw, RAM + 0x1000, Some(&files[1]), both);
    map(&mut raw, ROM, Some(&files[2]), DmaFlags::READ);
    map(&mut raw, PRIVATE_ROM, None, DmaFlags::READ);
    map(&mut raw, BAR, None, both);
    (raw, files)
}

#[test]
fn test_dma_when_it_meets_a_hole_or_the_end_of_a_mapping_is_refused_and_changes_nothing() {
    let rig = Rig::start();
    let (mut raw, files) = machine(&rig);
    assert_eq!(fetch(&mut raw, RAM), 0x1111_1111_1111_1111);
    assert!(store(&mut raw, RAM + 0xff8));
    for hole in [
        0,
        RAM - 8,
        // Half in, half out: nothing of it is done.
        RAM - 4,
        RAM + 0x2000 - 4,
        RAM + 0x2000,
        ROM - 8,
        BAR + 0x1000,
    ] {
        assert_eq!(fetch(&mut raw, hole), u64::MAX, "{hole:#x}");
        assert!(!store(&mut raw, hole), "{hole:#x}");
    }
    let mut bytes = [0; 0x1000];
    rustix::io::pread(&files[0], &mut bytes, 0).unwrap();
    assert!(bytes[..0xff8].iter().all(|byte| *byte == 0x11), "half a store");
    rustix::io::pread(&files[1], &mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0x11), "half a store");
    raw.read_register(30, 0);
}

#[test]
fn test_dma_when_it_writes_to_a_rom_is_refused_with_and_without_a_file() {
    let rig = Rig::start();
    let (mut raw, files) = machine(&rig);
    assert_eq!(fetch(&mut raw, ROM), 0x1111_1111_1111_1111);
    assert!(!store(&mut raw, ROM));
    let mut bytes = [0; 8];
    rustix::io::pread(&files[2], &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0x11; 8]);
    // Without a file the client is not even asked.
    let dma = rig.function.dma();
    let refused = dma.write_by_message(PRIVATE_ROM, &[0; 8]);
    assert!(matches!(refused, Err(DmaError::Protection { .. })), "{refused:?}");
    assert_eq!(refused.unwrap_err().errno(), Errno::ACCESS);
    // An access that begins in one ROM and ends in the next is inside neither.
    assert_eq!(fetch(&mut raw, PRIVATE_ROM - 4), u64::MAX);
    raw.read_register(30, 0);
}

/// The client decides what its registers do; the device only asks, and lives with a refusal.
#[test]
fn test_dma_when_it_meets_registers_of_another_device_asks_the_client_and_takes_no_for_an_answer() {
    let rig = Rig::start();
    let (mut raw, _files) = machine(&rig);
    for command in [Command::DMA_READ, Command::DMA_WRITE] {
        let dma = std::sync::Arc::clone(rig.function.dma());
        let worker = std::thread::spawn(move || match command {
            Command::DMA_READ => dma.fetch(BAR + 8, &mut [0; 4]),
            _ => dma.store(BAR + 8, &[0; 4]),
        });
        let (header, asked, _) = raw.expect_asked(command);
        assert_eq!((asked.address, asked.count), (BAR + 8, 4));
        let no = header.error_reply(Errno::NODEV.raw_os_error() as u32);
        std::io::Write::write_all(&mut raw.stream, no.as_bytes()).unwrap();
        let refused = worker.join().unwrap().unwrap_err();
        assert_eq!(refused.errno(), Errno::NODEV);
    }
    raw.read_register(30, 0);
}

#[test]
fn test_dma_when_bus_mastering_is_off_is_refused_everywhere_and_works_again_when_on() {
    let rig = Rig::start();
    let (mut raw, _files) = machine(&rig);
    raw.send(3, Command::REGION_WRITE, &access(4, 7, 2, &[2, 0]));
    raw.expect_ok(3);
    for iova in [RAM, ROM, PRIVATE_ROM, BAR] {
        assert_eq!(fetch(&mut raw, iova), u64::MAX, "{iova:#x}");
        assert!(!store(&mut raw, iova), "{iova:#x}");
        let dma = rig.function.dma();
        assert_eq!(
            dma.read_by_message(iova, &mut [0; 4]),
            Err(DmaError::BusMasterOff)
        );
    }
    switch_on(&mut raw);
    assert_eq!(fetch(&mut raw, RAM), 0x1111_1111_1111_1111);
}

#[test]
fn test_dma_when_it_reaches_the_ends_of_the_address_space_neither_wraps_nor_panics() {
    let rig = Rig::start();
    let (mut raw, files) = machine(&rig);
    let both = DmaFlags::READ | DmaFlags::WRITE;
    let last = u64::MAX - 0x1fff;
    map(&mut raw, last, Some(&files[0]), both);
    map(&mut raw, 0, Some(&files[1]), both);
    assert_eq!(fetch(&mut raw, last + 0xff8), 0x1111_1111_1111_1111);
    assert!(store(&mut raw, 0));
    for wrapping in [last + 0xffc, u64::MAX - 7, u64::MAX - 3, u64::MAX] {
        assert_eq!(fetch(&mut raw, wrapping), u64::MAX, "{wrapping:#x}");
        assert!(!store(&mut raw, wrapping), "{wrapping:#x}");
    }
    // The page that ends at 2^64 cannot be mapped (its end has no name), nor can anything that wraps.
    for (iova, len) in [
        (u64::MAX - 0xfff, 0x1000),
        (u64::MAX - 0xfff, 0x2000),
        (0x1000, u64::MAX - 0xfff),
    ] {
        raw.send(9, Command::DMA_MAP, dma_map(iova, len).as_bytes());
        let (header, _) = raw.reply();
        assert_eq!((header.message_id, header.error), (9, 22), "{iova:#x}+{len:#x}");
    }
    let since = Instant::now();
    raw.read_register(30, 0);
    assert!(since.elapsed() < Duration::from_secs(20));
}
