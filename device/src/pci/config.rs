//! Config space: the type 0 header and its capabilities.

use protos::pci::{Bar, CONFIG_SPACE_SIZE, capability as cap, config as reg, msix};

use crate::model::{BARS, Identity, MsixSpec};

/// Where the capabilities stand.
const PM: usize = 0x40;
const EXPRESS: usize = 0x50;
const MSIX: usize = 0x90;
const _: () = assert!(PM + cap::PM_SIZE <= EXPRESS && EXPRESS + cap::EXPRESS_SIZE <= MSIX);

/// Config space of one function, 4096 bytes: values, and for each bit whether software can write it.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SPACE_SIZE]>,
    writable: Box<[u8; CONFIG_SPACE_SIZE]>,
    reset: Box<[u8; CONFIG_SPACE_SIZE]>,
    msix: bool,
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("command", &format_args!("{:#06x}", self.u16(reg::COMMAND)))
            .field("msix_control", &self.msix.then(|| self.u16(MSIX + msix::CTRL)))
            .finish_non_exhaustive()
    }
}

impl ConfigSpace {
    /// A function with this identity, these BARs (by number; a 64-bit one also takes the next) and, with
    /// `msix`, an MSI-X capability; without it the function has an INTA pin.
    ///
    /// # Panics
    /// When a 64-bit BAR is the last one: [`super::Function`] has checked that.
    #[must_use]
    pub fn new(identity: &Identity, bars: &[Option<Bar>; BARS], msix: Option<MsixSpec>) -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_SPACE_SIZE]),
            writable: Box::new([0; CONFIG_SPACE_SIZE]),
            reset: Box::new([0; CONFIG_SPACE_SIZE]),
            msix: msix.is_some(),
        };
        space.set16(reg::VENDOR_ID, identity.vendor, 0);
        space.set16(reg::DEVICE_ID, identity.device, 0);
        let command = reg::COMMAND_MEMORY
            | reg::COMMAND_MASTER
            | reg::COMMAND_PARITY
            | reg::COMMAND_SERR
            | reg::COMMAND_INTX_DISABLE;
        space.set16(reg::COMMAND, 0, command);
        space.set16(reg::STATUS, reg::STATUS_CAP_LIST, 0);
        space.set32(
            reg::REVISION_ID,
            u32::from(identity.revision) | identity.class << 8,
            0,
        );
        space.set8(reg::CACHE_LINE_SIZE, 0, 0xff);
        for (index, bar) in bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let register = reg::BASE_ADDRESS_0 + 4 * index;
            space.set32(register, bar.type_bits(), bar.address_mask() as u32);
            if bar.is_64bit() {
                assert!(
                    index + 1 < BARS,
                    "BAR{index} is 64-bit and has no second register"
                );
                space.set32(register + 4, 0, (bar.address_mask() >> 32) as u32);
            }
        }
        space.set16(reg::SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor, 0);
        space.set16(reg::SUBSYSTEM_ID, identity.subsystem, 0);
        space.set8(reg::CAPABILITY_LIST, PM as u8, 0);
        space.set8(reg::INTERRUPT_LINE, 0, 0xff);
        space.set8(reg::INTERRUPT_PIN, u8::from(msix.is_none()), 0);
        space.add_pm();
        space.add_express(msix.is_some());
        if let Some(spec) = msix {
            space.add_msix(spec);
        }
        space.reset = space.bytes.clone();
        space
    }

    fn add_pm(&mut self) {
        self.set16(PM, u16::from(cap::ID_PM) | (EXPRESS as u16) << 8, 0);
        self.set16(PM + cap::PM_PMC, cap::PM_PMC_VERSION_1_2, 0);
        self.set16(
            PM + cap::PM_CTRL,
            cap::PM_CTRL_NO_SOFT_RESET,
            cap::PM_CTRL_STATE_MASK,
        );
    }

    fn add_express(&mut self, more: bool) {
        let next = if more { MSIX as u16 } else { 0 };
        self.set16(EXPRESS, u16::from(cap::ID_EXPRESS) | next << 8, 0);
        self.set16(EXPRESS + cap::EXPRESS_FLAGS, cap::EXPRESS_FLAGS_VERSION_2, 0);
        self.set32(
            EXPRESS + cap::EXPRESS_DEVCAP,
            cap::EXPRESS_DEVCAP_RBER | cap::EXPRESS_DEVCAP_FLR,
            0,
        );
        self.set16(EXPRESS + cap::EXPRESS_DEVCTL, 0, !cap::EXPRESS_DEVCTL_FLR);
        // 2.5 GT/s, one lane: what every port can train to.
        self.set32(EXPRESS + cap::EXPRESS_LNKCAP, 1 | 1 << 4, 0);
        self.set16(EXPRESS + cap::EXPRESS_LNKCTL, 0, 0x01cb);
        self.set16(EXPRESS + cap::EXPRESS_LNKSTA, 1 | 1 << 4, 0);
        self.set16(EXPRESS + cap::EXPRESS_DEVCTL2, 0, 0x001f);
    }

    fn add_msix(&mut self, spec: MsixSpec) {
        self.set16(MSIX, u16::from(cap::ID_MSIX), 0);
        self.set16(
            MSIX + msix::CTRL,
            spec.vectors - 1,
            msix::CTRL_ENABLE | msix::CTRL_FUNCTION_MASK,
        );
        self.set32(MSIX + msix::TABLE, spec.table_offset as u32 | spec.bar as u32, 0);
        self.set32(MSIX + msix::PBA, spec.pba_offset as u32 | spec.bar as u32, 0);
    }

    fn set8(&mut self, at: usize, value: u8, writable: u8) {
        self.bytes[at] = value;
        self.writable[at] = writable;
    }

    fn set16(&mut self, at: usize, value: u16, writable: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32, writable: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&writable.to_le_bytes());
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Read. Any length and alignment; the caller has checked the bounds.
    ///
    /// # Panics
    /// Outside the 4096 bytes.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[offset..offset + data.len()]);
    }

    /// Write what software can write. True when that asks for a function level reset (which the caller
    /// does: here only the bit is known).
    ///
    /// # Panics
    /// Outside the 4096 bytes.
    #[must_use = "true asks for a function level reset"]
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let range = offset..offset + data.len();
        let old = &mut self.bytes[range.clone()];
        for ((old, &new), &writable) in old.iter_mut().zip(data).zip(&self.writable[range.clone()]) {
            *old = (*old & !writable) | (new & writable);
        }
        let flr_byte = EXPRESS + cap::EXPRESS_DEVCTL + 1;
        range.contains(&flr_byte) && data[flr_byte - offset] & (cap::EXPRESS_DEVCTL_FLR >> 8) as u8 != 0
    }

    /// Reset values everywhere.
    pub fn reset(&mut self) {
        *self.bytes = *self.reset;
    }

    fn in_d0(&self) -> bool {
        self.u16(PM + cap::PM_CTRL) & cap::PM_CTRL_STATE_MASK == 0
    }

    /// BARs are decoded: memory enable is set and the function is in D0.
    #[must_use]
    pub fn memory_enabled(&self) -> bool {
        self.in_d0() && self.u16(reg::COMMAND) & reg::COMMAND_MEMORY != 0
    }

    /// The function may reach memory: bus master is set and the function is in D0.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.in_d0() && self.u16(reg::COMMAND) & reg::COMMAND_MASTER != 0
    }

    /// All interrupts are held back: MSI-X function mask, or INTx disable for a function without MSI-X.
    #[must_use]
    pub fn function_mask(&self) -> bool {
        if self.msix {
            self.u16(MSIX + msix::CTRL) & msix::CTRL_FUNCTION_MASK != 0
        } else {
            self.u16(reg::COMMAND) & reg::COMMAND_INTX_DISABLE != 0
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x10a9,
        device: 0x4752,
        subsystem_vendor: 0x10a9,
        subsystem: 0x0001,
        class: 0x12_00_00,
        revision: 3,
    };
    const MSIX_SPEC: MsixSpec = MsixSpec {
        vectors: 32,
        bar: 0,
        table_offset: 0x8000,
        pba_offset: 0x9000,
    };

    fn space() -> ConfigSpace {
        let mut bars = [None; BARS];
        bars[0] = Some(Bar::new(0x10000, true, false).unwrap());
        bars[2] = Some(Bar::new(1 << 28, true, true).unwrap());
        bars[4] = Some(Bar::new(0x1000, false, false).unwrap());
        ConfigSpace::new(&IDENTITY, &bars, Some(MSIX_SPEC))
    }

    fn read32(space: &ConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write32(space: &mut ConfigSpace, at: usize, value: u32) {
        assert!(!space.write(at, &value.to_le_bytes()));
    }

    #[test]
    fn test_header_when_read_identifies_the_function() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x4752_10a9);
        assert_eq!(read32(&space, 8), 0x1200_0003);
        assert_eq!(read32(&space, 0x2c), 0x0001_10a9);
        assert_eq!(read32(&space, 4) >> 16, 0x10);
        assert_eq!(read32(&space, 0x3c), 0, "no pin with MSI-X");
        let pin = ConfigSpace::new(&IDENTITY, &[None; BARS], None);
        assert_eq!(read32(&pin, 0x3c), 0x100);
    }

    #[test]
    fn test_bars_when_sized_give_their_masks_and_keep_addresses() {
        let mut space = space();
        for (at, low, high) in [
            (0x10, 0xffff_0004, 0xffff_ffff),
            (0x18, 0xf000_000c, 0xffff_ffff),
            (0x20, 0xffff_f000, 0),
        ] {
            write32(&mut space, at, u32::MAX);
            write32(&mut space, at + 4, u32::MAX);
            assert_eq!((read32(&space, at), read32(&space, at + 4)), (low, high));
        }
        write32(&mut space, 0x18, 0xd234_5678);
        write32(&mut space, 0x1c, 0x12);
        assert_eq!((read32(&space, 0x18), read32(&space, 0x1c)), (0xd000_000c, 0x12));
    }

    #[test]
    fn test_capabilities_when_walked_are_pm_express_and_msix() {
        let space = space();
        let mut found = Vec::new();
        let mut at = read32(&space, 0x34) as usize & 0xff;
        while at != 0 {
            let head = read32(&space, at);
            found.push((head & 0xff) as u8);
            at = (head >> 8) as usize & 0xff;
        }
        assert_eq!(found, [cap::ID_PM, cap::ID_EXPRESS, cap::ID_MSIX]);
        assert_eq!(read32(&space, MSIX) >> 16, 31);
        assert_eq!(
            (read32(&space, MSIX + 4), read32(&space, MSIX + 8)),
            (0x8000, 0x9000)
        );
    }

    #[test]
    fn test_command_when_written_switches_memory_and_bus_master() {
        let mut space = space();
        assert!(!space.memory_enabled() && !space.bus_master());
        write32(&mut space, 4, 6);
        assert!(space.memory_enabled() && space.bus_master());
        assert!(!space.write(PM + cap::PM_CTRL, &[3, 0]));
        assert!(!space.memory_enabled() && !space.bus_master(), "D3hot");
        space.reset();
        assert_eq!(read32(&space, 4), 0x0010_0000);
    }

    #[test]
    fn test_flr_when_written_is_reported_and_reads_zero() {
        let mut space = space();
        assert!(space.write(EXPRESS + cap::EXPRESS_DEVCTL, &[0, 0x80]));
        assert!(space.write(EXPRESS + cap::EXPRESS_DEVCTL + 1, &[0x80]));
        assert!(!space.write(EXPRESS + cap::EXPRESS_DEVCTL, &[0xff]));
        assert_eq!(space.u16(EXPRESS + cap::EXPRESS_DEVCTL) & 0x8000, 0);
    }

    #[test]
    fn test_msix_control_when_written_keeps_the_table_size() {
        let mut space = space();
        assert!(!space.write(MSIX + 2, &[0xff, 0xff]));
        assert_eq!(space.u16(MSIX + 2), 0xc01f);
        assert!(space.function_mask());
    }

    proptest! {
        #[test]
        fn test_any_writes_when_made_change_no_read_only_bit(
            writes in proptest::collection::vec((0usize..4096, proptest::collection::vec(any::<u8>(), 0..64)), 0..50),
        ) {
            let mut space = space();
            for (offset, data) in writes {
                let len = data.len().min(4096 - offset);
                let _ = space.write(offset, &data[..len]);
            }
            for at in 0..CONFIG_SPACE_SIZE {
                prop_assert_eq!((space.bytes[at] ^ space.reset[at]) & !space.writable[at], 0, "byte {:#x}", at);
            }
        }
    }
}
