//! A device model for fuzzing: a few registers, a mappable page, MSI-X, and DMA in both directions.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use device::model::{AccessError, BarMmap, BarSpec, Identity, IoEventFd, Model, ModelContext, MsixSpec};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Vendor id, which a client that comes after the hostile one reads back.
pub const VENDOR: u16 = 0x1b36;
/// Bytes of BAR 0.
pub const BAR0_SIZE: u64 = 0x4000;
/// Vectors of MSI-X.
pub const VECTORS: u16 = 20;
/// Writing an IOVA copies 8 bytes from there to register 0.
pub const FETCH: u64 = 0x100;
/// Writing an IOVA copies register 0 there.
pub const STORE: u64 = 0x108;
/// Writing a number raises that vector.
pub const RAISE: u64 = 0x110;
/// Stands for an eventfd.
pub const BELL: u64 = 0x118;
const REGISTERS: usize = 8;
const PAGE: u64 = 0x1000;

/// The model.
#[derive(Debug)]
pub struct FuzzModel {
    context: ModelContext,
    page: OwnedFd,
    bell: OwnedFd,
    registers: Mutex<[u64; REGISTERS]>,
}

impl FuzzModel {
    /// A model with registers of 0.
    ///
    /// # Panics
    /// When the process is out of file descriptors.
    #[must_use]
    pub fn new(context: ModelContext) -> Arc<Self> {
        let page = memfd_create("fuzz-bar", MemfdFlags::CLOEXEC).expect("memfd_create");
        ftruncate(&page, BAR0_SIZE).expect("ftruncate");
        Arc::new(Self {
            context,
            page,
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"),
            registers: Mutex::default(),
        })
    }
}

fn unassigned(bar: usize, offset: u64, len: usize) -> AccessError {
    AccessError::Unassigned { bar, offset, len }
}

impl Model for FuzzModel {
    fn identity(&self) -> Identity {
        Identity {
            vendor: VENDOR,
            device: 0xf0_22,
            subsystem_vendor: 1,
            subsystem: 2,
            class: 0xff_00_00,
            revision: 1,
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![BarSpec {
            index: 0,
            size: BAR0_SIZE,
            is_64bit: true,
            prefetchable: false,
            mmap: Some(BarMmap {
                fd: self.page.try_clone().expect("a file descriptor is left"),
                areas: vec![(PAGE, PAGE)],
            }),
        }]
    }

    fn msix(&self) -> Option<MsixSpec> {
        Some(MsixSpec {
            vectors: VECTORS,
            bar: 0,
            table_offset: 2 * PAGE,
            pba_offset: 3 * PAGE,
        })
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let (index, at) = ((offset / 8) as usize, (offset % 8) as usize);
        let register = registers.get(index).map(|r| r.to_le_bytes());
        let wanted = register.as_ref().and_then(|r| r.get(at..at + data.len()));
        data.copy_from_slice(wanted.ok_or(unassigned(bar, offset, data.len()))?);
        Ok(())
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let bytes = <[u8; 8]>::try_from(data).map_err(|_| unassigned(bar, offset, data.len()))?;
        let value = u64::from_le_bytes(bytes);
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            FETCH => {
                let mut bytes = [0xff; 8];
                if let Ok(memory) = self.context.dma.resolve(value, 8, false) {
                    memory.read_into(&mut bytes);
                }
                registers[0] = u64::from_le_bytes(bytes);
            }
            STORE => {
                if let Ok(memory) = self.context.dma.resolve(value, 8, true) {
                    memory.write_from(&registers[0].to_le_bytes());
                }
            }
            RAISE => {
                self.context.interrupts.trigger(value as u32);
            }
            _ => {
                let register = registers
                    .get_mut((offset / 8) as usize)
                    .filter(|_| offset.is_multiple_of(8));
                *register.ok_or(unassigned(bar, offset, data.len()))? = value;
            }
        }
        Ok(())
    }

    fn io_eventfds(&self, bar: usize) -> Vec<IoEventFd> {
        if bar != 0 {
            return Vec::new();
        }
        vec![IoEventFd {
            offset: BELL,
            size: 8,
            fd: self.bell.try_clone().expect("a file descriptor is left"),
        }]
    }

    fn reset(&self) {
        *self.registers.lock().unwrap_or_else(PoisonError::into_inner) = Default::default();
    }
}
