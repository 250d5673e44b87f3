//! A client that nobody here wrote (the registry crate `vfio_user`) against our server.

mod vfio_user_scratch;

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use vfio_user::Client;
use vfio_user_scratch::*;

const CONFIG: u32 = 7;
const MSIX_INDEX: u32 = 2;

fn connect(rig: &Rig) -> Client {
    let mut client = Client::new(&rig.path).expect("the foreign client attaches");
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client
}

fn read64(client: &mut Client, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    client.region_read(0, offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn test_foreign_client_when_attached_sees_regions_and_interrupts() {
    let rig = Rig::start();
    let mut client = connect(&rig);
    let region = client.region(0).unwrap();
    assert_eq!((region.size, region.flags), (BAR0_SIZE, 15));
    let areas: Vec<_> = region
        .sparse_areas
        .iter()
        .map(|area| (area.offset, area.size))
        .collect();
    assert_eq!(areas, [(PAGE, 0x1000)]);
    let file = region.file_offset.as_ref().expect("a file for the mappable page");
    rustix::io::pwrite(file.file(), &1234u64.to_le_bytes(), file.start() + PAGE).unwrap();
    assert_eq!(read64(&mut client, PAGE), 1234);
    let region = client.region(2).unwrap();
    assert_eq!(
        (region.size, region.flags, region.sparse_areas.len()),
        (BAR2_SIZE, 7, 0)
    );
    assert!(region.file_offset.is_some());
    assert_eq!(client.region(7).unwrap().size, 4096);
    assert_eq!(client.region(1).unwrap().size, 0);
    let irq = client.get_irq_info(MSIX_INDEX).unwrap();
    assert_eq!(
        (irq.index, irq.flags, irq.count),
        (MSIX_INDEX, 3, u32::from(VECTORS))
    );
    assert_eq!(client.get_irq_info(0).unwrap().count, 0);
}

#[test]
fn test_foreign_client_when_it_reads_and_writes_gets_the_registers() {
    let rig = Rig::start();
    let mut client = connect(&rig);
    for value in 0..100u64 {
        client.region_write(0, 8, &value.to_le_bytes()).unwrap();
        assert_eq!(read64(&mut client, 8), value);
    }
    let data = vec![0xa5; 70_000];
    client.region_write(2, 100, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(2, 100, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn test_foreign_client_when_it_maps_memory_the_device_reaches_it() {
    let rig = Rig::start();
    let mut client = connect(&rig);
    let memory = memfd(0x3000);
    rustix::io::pwrite(&memory, &42u64.to_le_bytes(), 0x1000).unwrap();
    client
        .dma_map(0x1000, 0x8000_0000, 0x2000, memory.as_raw_fd())
        .unwrap();
    client
        .region_write(0, FETCH, &0x8000_0000u64.to_le_bytes())
        .unwrap();
    assert_eq!(read64(&mut client, 0), 42);
    client.dma_unmap(0x8000_0000, 0x2000).unwrap();
    client
        .region_write(0, FETCH, &0x8000_0000u64.to_le_bytes())
        .unwrap();
    assert_eq!(read64(&mut client, 0), u64::MAX);
}

#[test]
fn test_foreign_client_when_it_sets_interrupts_receives_them() {
    let rig = Rig::start();
    let mut client = connect(&rig);
    let fds: Vec<OwnedFd> = (0..16)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    // VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER: 16 at a time, as Cloud Hypervisor sends them.
    client.set_irqs(MSIX_INDEX, 4 | 32, 3, 16, &raw).unwrap();
    client.region_write(0, RAISE, &3u64.to_le_bytes()).unwrap();
    client.region_write(0, RAISE, &18u64.to_le_bytes()).unwrap();
    let count = |fd: &OwnedFd| {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes)
            .map(|_| u64::from_ne_bytes(bytes))
            .unwrap_or(0)
    };
    let counts: Vec<_> = fds.iter().map(count).collect();
    assert_eq!((counts[0], counts[15], counts.iter().sum::<u64>()), (1, 1, 2));
    client.set_irqs(MSIX_INDEX, 1 | 32, 0, 0, &[]).unwrap();
    client.region_write(0, RAISE, &3u64.to_le_bytes()).unwrap();
    assert_eq!(read64(&mut client, 8), 0);
    assert_eq!(count(&fds[0]), 0);
}

#[test]
fn test_foreign_client_when_it_resets_and_leaves_the_next_one_attaches() {
    let rig = Rig::start();
    let mut client = connect(&rig);
    client.region_write(0, 8, &[1; 8]).unwrap();
    client.reset().unwrap();
    assert_eq!((read64(&mut client, 8), rig.model.resets()), (0, 1));
    client.shutdown().unwrap();
    drop(client);
    let mut next = connect(&rig);
    assert_eq!(read64(&mut next, 8), 0);
    assert_eq!(rig.model.resets(), 2, "losing the client resets, too");
}
