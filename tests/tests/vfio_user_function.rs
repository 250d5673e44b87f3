//! A function driven in process, without a socket.

mod vfio_user_scratch;

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use device::dma::Prot;
use device::model::{AccessError, BarSpec, Identity, Model, ModelContext, MsixSpec};
use device::pci::{ComposeError, Function, RegionError, Trigger};
use protos::pci::{Bar, config, msix};
use protos::vfio_user::{IrqIndex, RegionIndex};
use rustix::event::{EventfdFlags, eventfd};
use vfio_user_scratch::*;

const BAR0: RegionIndex = RegionIndex(0);
const MSIX_CAPABILITY: u64 = 0x90;

fn enabled() -> (Arc<Function>, Arc<Scratch>) {
    let (function, model) = function();
    function
        .region_write(RegionIndex::CONFIG, 4, &6u16.to_le_bytes())
        .unwrap();
    (function, model)
}

fn read64(function: &Function, region: RegionIndex, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    function.region_read(region, offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn read32(function: &Function, region: RegionIndex, offset: u64) -> u32 {
    read64(function, region, offset) as u32
}

fn write64(function: &Function, offset: u64, value: u64) {
    function.region_write(BAR0, offset, &value.to_le_bytes()).unwrap();
}

fn routed(function: &Function, vector: u32) -> OwnedFd {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    assert!(
        function
            .interrupts()
            .set_eventfd(vector, Some(fd.try_clone().unwrap()))
    );
    fd
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        Err(rustix::io::Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

#[test]
fn test_bars_when_probed_through_config_space_have_the_models_sizes() {
    let (function, _) = function();
    let probe = |index: u64| {
        let at = config::BASE_ADDRESS_0 as u64 + 4 * index;
        function
            .region_write(RegionIndex::CONFIG, at, &[0xff; 8])
            .unwrap();
        Bar::size_from_probe(
            read32(&function, RegionIndex::CONFIG, at),
            read32(&function, RegionIndex::CONFIG, at + 4),
        )
    };
    assert_eq!(probe(0), BAR0_SIZE);
    assert_eq!(probe(2), BAR2_SIZE);
    assert_eq!(read32(&function, RegionIndex::CONFIG, 0x10) & 0xf, 4, "64-bit");
    assert_eq!(
        read32(&function, RegionIndex::CONFIG, 0x18) & 0xf,
        8,
        "32-bit, prefetchable"
    );
    assert_eq!(read32(&function, RegionIndex::CONFIG, 0x1c), 0, "no BAR3");
}

#[test]
fn test_regions_when_asked_are_the_ones_of_vfio() {
    let (function, _) = function();
    let sizes: Vec<_> = (0..10)
        .map(|index| function.region(RegionIndex(index)).map(|info| info.size))
        .collect();
    assert_eq!(
        sizes,
        [
            Some(BAR0_SIZE),
            Some(0),
            Some(BAR2_SIZE),
            Some(0),
            Some(0),
            Some(0),
            Some(0),
            Some(4096),
            Some(0),
            None
        ]
    );
    assert_eq!(function.irq_count(IrqIndex::MSIX), u32::from(VECTORS));
    assert_eq!(function.irq_count(IrqIndex::INTX), 0);
}

#[test]
fn test_bar_access_when_memory_is_disabled_reads_ones_and_writes_nothing() {
    let (function, model) = function();
    write64(&function, LOG, 1);
    assert_eq!(read64(&function, BAR0, 8), u64::MAX);
    assert_eq!(read64(&function, BAR0, MSIX.table_offset), u64::MAX);
    assert!(model.log().is_empty());
    function
        .region_write(RegionIndex::CONFIG, 4, &2u16.to_le_bytes())
        .unwrap();
    write64(&function, LOG, 2);
    assert_eq!((read64(&function, BAR0, 8), model.log()), (0, vec![2]));
}

#[test]
fn test_access_when_outside_a_region_is_refused() {
    let (function, model) = enabled();
    let mut data = [0; 8];
    for (region, offset) in [
        (BAR0, BAR0_SIZE - 7),
        (BAR0, BAR0_SIZE),
        (BAR0, u64::MAX),
        (BAR0, u64::MAX - 7),
        (RegionIndex::CONFIG, 4089),
        (RegionIndex::CONFIG, 1 << 40),
    ] {
        assert!(matches!(
            function.region_read(region, offset, &mut data),
            Err(RegionError::OutOfBounds { .. })
        ));
        assert!(matches!(
            function.region_write(region, offset, &data),
            Err(RegionError::OutOfBounds { .. })
        ));
    }
    for region in [1, 3, 6, 8, 9, u32::MAX] {
        let result = function.region_read(RegionIndex(region), 0, &mut data);
        assert_eq!(result, Err(RegionError::NoRegion(region)));
    }
    assert!(matches!(
        function.region_write(BAR0, 0x400, &data),
        Err(RegionError::Access(_))
    ));
    assert!(model.log().is_empty());
}

#[test]
fn test_msix_table_when_accessed_through_the_bar_masks_and_unmasks() {
    let (function, _) = enabled();
    let fd = routed(&function, 3);
    let control = MSIX.table_offset + 3 * msix::ENTRY_SIZE + 12;
    function.region_write(BAR0, control, &1u32.to_le_bytes()).unwrap();
    write64(&function, RAISE, 3);
    assert_eq!(count(&fd), 0);
    assert_eq!(read64(&function, BAR0, MSIX.pba_offset), 1 << 3);
    function.region_write(BAR0, control, &0u32.to_le_bytes()).unwrap();
    assert_eq!(count(&fd), 1);
    assert_eq!(read64(&function, BAR0, MSIX.pba_offset), 0);
}

#[test]
fn test_msix_function_mask_when_set_in_config_space_holds_back() {
    let (function, _) = enabled();
    let fd = routed(&function, 0);
    function
        .region_write(RegionIndex::CONFIG, MSIX_CAPABILITY + 2, &0xc000u16.to_le_bytes())
        .unwrap();
    write64(&function, RAISE, 0);
    assert_eq!(count(&fd), 0);
    function
        .region_write(RegionIndex::CONFIG, MSIX_CAPABILITY + 2, &0x8000u16.to_le_bytes())
        .unwrap();
    assert_eq!(count(&fd), 1);
}

#[test]
fn test_access_when_it_spans_model_and_table_is_answered_by_both() {
    let (function, _) = enabled();
    let end = MSIX.table_offset + msix::table_size(VECTORS);
    function.region_write(BAR0, end - 16, &[0x5a; 16]).unwrap();
    let mut data = [0; 16];
    function.region_read(BAR0, end - 16, &mut data).unwrap();
    assert_eq!(data[..12], [0x5a; 12]);
    assert_eq!(
        data[12..],
        [0; 4],
        "mask bit of 0x5a5a5a5a is 0, the rest is reserved"
    );
    // One byte further belongs to the model, which decodes nothing there.
    let error = function.region_read(BAR0, end - 8, &mut data).unwrap_err();
    assert_eq!(
        error,
        RegionError::Access(AccessError::Unassigned {
            bar: 0,
            offset: end,
            len: 8
        })
    );
}

#[test]
fn test_bus_master_when_switched_opens_and_closes_dma() {
    let (function, _) = function();
    let memory = memfd(0x2000);
    rustix::io::pwrite(&memory, &77u64.to_ne_bytes(), 0x1008).unwrap();
    function
        .dma()
        .map(0x10000, 0x2000, memory.try_clone().unwrap(), 0, Prot::READ_WRITE)
        .unwrap();
    let fetch = |command: u16| {
        function
            .region_write(RegionIndex::CONFIG, 4, &command.to_le_bytes())
            .unwrap();
        write64(&function, FETCH, 0x11008);
        read64(&function, BAR0, 0)
    };
    assert_eq!(fetch(2), u64::MAX, "bus mastering is off after reset");
    assert_eq!(fetch(6), 77);
    assert_eq!(fetch(2), u64::MAX);
}

#[test]
fn test_reset_when_asked_resets_the_model_and_keeps_config_space() {
    let (function, model) = enabled();
    let fd = routed(&function, 1);
    write64(&function, 8, 5);
    function.interrupts().mask(1);
    write64(&function, RAISE, 1);
    function.reset();
    assert_eq!((read64(&function, BAR0, 8), model.resets()), (0, 1));
    assert!(!function.interrupts().is_pending(1));
    function.interrupts().unmask(1);
    write64(&function, RAISE, 1);
    assert_eq!(count(&fd), 1, "the eventfd stays");
}

#[test]
fn test_function_level_reset_when_written_resets_config_space_too() {
    let (function, model) = enabled();
    function
        .region_write(RegionIndex::CONFIG, 0x10, &0xabcd_0000u32.to_le_bytes())
        .unwrap();
    assert!(function.dma().bus_master());
    let devctl = 0x50 + 8;
    function
        .region_write(RegionIndex::CONFIG, devctl, &0x8000u16.to_le_bytes())
        .unwrap();
    assert_eq!(model.resets(), 1);
    assert!(!function.dma().bus_master());
    assert_eq!(read32(&function, RegionIndex::CONFIG, 0x10), 4);
    assert_eq!(read64(&function, BAR0, 8), u64::MAX, "memory decoding is off");
}

#[test]
fn test_disconnect_when_everything_is_set_up_leaves_nothing() {
    let (function, model) = enabled();
    function
        .dma()
        .map(0, 0x1000, memfd(0x1000), 0, Prot::READ_WRITE)
        .unwrap();
    let _fd = routed(&function, 0);
    function.disconnect();
    assert_eq!(function.dma().mappings().len(), 0);
    assert!(!function.interrupts().is_routed(0) && !function.dma().bus_master());
    assert_eq!(model.resets(), 1);
}

#[test]
fn test_model_when_it_has_no_msix_gets_one_self_masking_interrupt() {
    let function =
        Function::new(|context| Ok::<_, Infallible>(Scratch::build(context, Msix::None) as Arc<dyn Model>))
            .unwrap();
    assert_eq!(function.irq_count(IrqIndex::INTX), 1);
    assert_eq!(function.irq_count(IrqIndex::MSIX), 0);
    assert_eq!(
        read32(&function, RegionIndex::CONFIG, 0x3c) >> 8 & 0xff,
        1,
        "INTA"
    );
    let fd = routed(&function, 0);
    assert_eq!(function.interrupts().trigger(0), Trigger::Sent);
    assert_eq!(function.interrupts().trigger(0), Trigger::Pending);
    function.interrupts().unmask(0);
    assert_eq!(count(&fd), 2);
}

#[test]
fn test_intx_when_disabled_in_config_space_is_pending_in_the_status_until_enabled() {
    let function =
        Function::new(|context| Ok::<_, Infallible>(Scratch::build(context, Msix::None) as Arc<dyn Model>))
            .unwrap();
    let fd = routed(&function, 0);
    let command = |value: u16| {
        function
            .region_write(RegionIndex::CONFIG, 4, &value.to_le_bytes())
            .unwrap();
    };
    let pending = || {
        let mut byte = [0];
        function.region_read(RegionIndex::CONFIG, 6, &mut byte).unwrap();
        let word = read32(&function, RegionIndex::CONFIG, 4) >> 16;
        assert_eq!(word & 0xff, u32::from(byte[0]));
        byte[0] & 8 != 0
    };
    command(1 << 10);
    assert_eq!(function.interrupts().trigger(0), Trigger::Pending);
    assert!(pending() && count(&fd) == 0);
    command(0);
    assert!(!pending());
    assert_eq!(count(&fd), 1);
    // With MSI-X the bit says nothing about it.
    let (function, _) = enabled();
    let fd = routed(&function, 3);
    function.region_write(RegionIndex::CONFIG, 4, &[0, 4]).unwrap();
    assert_eq!(function.interrupts().trigger(3), Trigger::Sent);
    assert_eq!(count(&fd), 1);
}

/// A model that says what it is told to.
#[derive(Debug)]
struct Said(fn() -> Vec<BarSpec>, Option<MsixSpec>);

impl Model for Said {
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
        (self.0)()
    }
    fn msix(&self) -> Option<MsixSpec> {
        self.1
    }
    fn bar_read(&self, _: usize, _: u64, _: &mut [u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn bar_write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }
    fn reset(&self) {}
}

fn bar(index: usize, size: u64, is_64bit: bool) -> BarSpec {
    BarSpec {
        index,
        size,
        is_64bit,
        prefetchable: false,
        mmap: None,
    }
}

#[test]
fn test_composition_when_the_model_contradicts_itself_is_refused() {
    let compose = |bars, msix| {
        Function::new(|_: ModelContext| Ok::<_, Infallible>(Arc::new(Said(bars, msix)) as Arc<dyn Model>))
            .map(drop)
    };
    let one: fn() -> Vec<BarSpec> = || vec![bar(0, 0x1000, true)];
    assert!(compose(one, None).is_ok());
    assert!(matches!(
        compose(|| vec![bar(0, 0x1000, true), bar(1, 0x1000, false)], None),
        Err(ComposeError::BarNumber(1))
    ));
    assert!(matches!(
        compose(|| vec![bar(5, 0x1000, true)], None),
        Err(ComposeError::BarNumber(6))
    ));
    assert!(matches!(
        compose(|| vec![bar(0, 0x1800, true)], None),
        Err(ComposeError::Bar { bar: 0, .. })
    ));
    for spec in [
        MsixSpec {
            vectors: 0,
            bar: 0,
            table_offset: 0,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 2049,
            bar: 0,
            table_offset: 0,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 1,
            bar: 1,
            table_offset: 0,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 1,
            bar: 6,
            table_offset: 0,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 1,
            bar: 0,
            table_offset: 4,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 1,
            bar: 0,
            table_offset: 0xff8,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 1,
            bar: 0,
            table_offset: u64::MAX - 7,
            pba_offset: 0x800,
        },
        MsixSpec {
            vectors: 200,
            bar: 0,
            table_offset: 0,
            pba_offset: 0x800,
        },
    ] {
        assert!(
            matches!(compose(one, Some(spec)), Err(ComposeError::Msix(_))),
            "{spec:?}"
        );
    }
    let error = Function::new(|_| Err("no memory")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the device model could not be built: no memory"
    );
}
