//! Interrupts: GET_IRQ_INFO and SET_IRQS.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::flags;

/// Interrupt type of a PCI device (`VFIO_PCI_*_IRQ_INDEX` of `<linux/vfio.h>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct IrqIndex(pub u32);

impl IrqIndex {
    /// The pin.
    pub const INTX: Self = Self(0);
    /// MSI.
    pub const MSI: Self = Self(1);
    /// MSI-X.
    pub const MSIX: Self = Self(2);
    /// Device error.
    pub const ERR: Self = Self(3);
    /// Request to give the device back.
    pub const REQ: Self = Self(4);
    /// Interrupt types of a PCI device (`VFIO_PCI_NUM_IRQS`).
    pub const COUNT: u32 = 5;
}

flags! {
    /// `VFIO_IRQ_INFO_*` of `<linux/vfio.h>`.
    IrqInfoFlags {
        /// Signalled by eventfd.
        EVENTFD = 1;
        /// MASK and UNMASK are supported.
        MASKABLE = 2;
        /// Masks itself when triggered.
        AUTOMASKED = 4;
        /// Set up as a whole only.
        NORESIZE = 8;
    }
}

/// Payload of DEVICE_GET_IRQ_INFO and of its reply, 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IrqInfo {
    /// Room for (request), or size of (reply) the reply's payload.
    pub argsz: u32,
    /// Attributes.
    pub flags: IrqInfoFlags,
    /// Interrupt type.
    pub index: IrqIndex,
    /// Interrupts of that type.
    pub count: u32,
}

flags! {
    /// `VFIO_IRQ_SET_*` of `<linux/vfio.h>`.
    IrqSetFlags {
        /// No data.
        DATA_NONE = 1;
        /// One byte for each interrupt.
        DATA_BOOL = 2;
        /// One file descriptor for each interrupt, in the ancillary data; none = take them away.
        DATA_EVENTFD = 4;
        /// Mask.
        ACTION_MASK = 8;
        /// Unmask.
        ACTION_UNMASK = 16;
        /// Trigger, or what to signal when the device triggers.
        ACTION_TRIGGER = 32;
    }
}

/// Head of the payload of DEVICE_SET_IRQS, 20 bytes; with DATA_BOOL `count` bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IrqSet {
    /// Size of the payload (clients differ in whether that counts the data; only a value below 20 is wrong).
    pub argsz: u32,
    /// Data form and action.
    pub flags: IrqSetFlags,
    /// Interrupt type.
    pub index: IrqIndex,
    /// First interrupt.
    pub start: u32,
    /// Interrupts. 0 (with start 0 and DATA_NONE) = disable all.
    pub count: u32,
}

const _: () = assert!(size_of::<IrqInfo>() == 16);
const _: () = assert!(size_of::<IrqSet>() == 20);

/// The data form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqData {
    /// No data.
    None,
    /// Booleans.
    Bool,
    /// Eventfds.
    EventFd,
}

/// The action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask.
    Mask,
    /// Unmask.
    Unmask,
    /// Trigger.
    Trigger,
}

/// A SET_IRQS that contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IrqSetError {
    /// argsz below the fixed part.
    #[error("argsz {0} is below 20")]
    Argsz(u32),
    /// Not exactly one data form and one action, or unknown bits.
    #[error("flags {0:?}: exactly one data form and one action are needed")]
    Flags(IrqSetFlags),
    /// `start + count` is not inside the interrupts of that type.
    #[error("interrupts {start}+{count} of type {index:?}, which has {available}")]
    Range {
        /// Type.
        index: IrqIndex,
        /// First.
        start: u32,
        /// Number.
        count: u32,
        /// What there is.
        available: u32,
    },
    /// Payload or file descriptors that do not match the data form.
    #[error("{count} interrupts with {data_len} bytes of data and {fds} file descriptors")]
    Data {
        /// Interrupts named.
        count: u32,
        /// Bytes after the fixed part.
        data_len: usize,
        /// File descriptors.
        fds: usize,
    },
}

impl IrqSet {
    /// Bytes of the fixed part.
    pub const SIZE: usize = size_of::<Self>();

    /// Check everything that can be checked without the device.
    ///
    /// `available`: interrupts of that type; `data_len`: payload bytes after the fixed part; `fds`: file
    /// descriptors that came with the message.
    ///
    /// # Errors
    /// See [`IrqSetError`].
    pub fn validate(
        &self,
        available: u32,
        data_len: usize,
        fds: usize,
    ) -> Result<(IrqData, IrqAction), IrqSetError> {
        if (self.argsz as usize) < Self::SIZE {
            return Err(IrqSetError::Argsz(self.argsz));
        }
        let data = match self.flags.0 & 7 {
            1 => IrqData::None,
            2 => IrqData::Bool,
            4 => IrqData::EventFd,
            _ => return Err(IrqSetError::Flags(self.flags)),
        };
        let action = match self.flags.0 & !7 {
            8 => IrqAction::Mask,
            16 => IrqAction::Unmask,
            32 => IrqAction::Trigger,
            _ => return Err(IrqSetError::Flags(self.flags)),
        };
        let end = u64::from(self.start) + u64::from(self.count);
        let disable_all =
            self.count == 0 && self.start == 0 && data == IrqData::None && action == IrqAction::Trigger;
        if end > u64::from(available) || (self.count == 0 && !disable_all) {
            let Self {
                index, start, count, ..
            } = *self;
            return Err(IrqSetError::Range {
                index,
                start,
                count,
                available,
            });
        }
        let good = match data {
            IrqData::None => data_len == 0 && fds == 0,
            IrqData::Bool => data_len == self.count as usize && fds == 0,
            IrqData::EventFd => data_len == 0 && (fds == 0 || fds == self.count as usize),
        };
        if !good {
            return Err(IrqSetError::Data {
                count: self.count,
                data_len,
                fds,
            });
        }
        Ok((data, action))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVENTFD_TRIGGER: IrqSet = IrqSet {
        argsz: 20,
        flags: IrqSetFlags(4 | 32),
        index: IrqIndex::MSIX,
        start: 0,
        count: 4,
    };

    #[test]
    fn test_set_irqs_when_well_formed_is_accepted() {
        assert_eq!(
            EVENTFD_TRIGGER.validate(32, 0, 4),
            Ok((IrqData::EventFd, IrqAction::Trigger))
        );
        assert_eq!(
            EVENTFD_TRIGGER.validate(32, 0, 0),
            Ok((IrqData::EventFd, IrqAction::Trigger))
        );
        let bools = IrqSet {
            flags: IrqSetFlags::DATA_BOOL | IrqSetFlags::ACTION_MASK,
            ..EVENTFD_TRIGGER
        };
        assert_eq!(bools.validate(32, 4, 0), Ok((IrqData::Bool, IrqAction::Mask)));
        let disable = IrqSet {
            flags: IrqSetFlags(1 | 32),
            count: 0,
            ..EVENTFD_TRIGGER
        };
        assert_eq!(disable.validate(0, 0, 0), Ok((IrqData::None, IrqAction::Trigger)));
    }

    #[test]
    fn test_set_irqs_when_contradictory_is_refused() {
        let check = |set: IrqSet, data, fds| set.validate(32, data, fds).unwrap_err();
        assert!(matches!(
            check(
                IrqSet {
                    argsz: 19,
                    ..EVENTFD_TRIGGER
                },
                0,
                4
            ),
            IrqSetError::Argsz(19)
        ));
        for flags in [0, 4, 32, 4 | 8 | 32, 1 | 2 | 32, 4 | 32 | 64, 1 << 31] {
            assert!(matches!(
                check(
                    IrqSet {
                        flags: IrqSetFlags(flags),
                        ..EVENTFD_TRIGGER
                    },
                    0,
                    4
                ),
                IrqSetError::Flags(_)
            ));
        }
        for (start, count) in [
            (29, 4),
            (u32::MAX, 1),
            (0, u32::MAX),
            (u32::MAX, u32::MAX),
            (0, 0),
            (4, 0),
        ] {
            assert!(matches!(
                check(
                    IrqSet {
                        start,
                        count,
                        ..EVENTFD_TRIGGER
                    },
                    0,
                    0
                ),
                IrqSetError::Range { .. }
            ));
        }
        assert!(matches!(check(EVENTFD_TRIGGER, 0, 3), IrqSetError::Data { .. }));
        assert!(matches!(check(EVENTFD_TRIGGER, 16, 4), IrqSetError::Data { .. }));
        let bools = IrqSet {
            flags: IrqSetFlags(2 | 32),
            ..EVENTFD_TRIGGER
        };
        assert!(matches!(check(bools, 3, 0), IrqSetError::Data { .. }));
        assert!(matches!(check(bools, 4, 1), IrqSetError::Data { .. }));
    }

    proptest! {
        #[test]
        fn test_any_set_irqs_when_validated_never_panics_and_stays_in_range(
            bytes in any::<[u8; 20]>(), available in 0u32..2049, data_len in 0usize..4096, fds in 0usize..17,
        ) {
            let set = IrqSet::read_from_bytes(&bytes).unwrap();
            prop_assert_eq!(set.as_bytes(), &bytes[..]);
            if set.validate(available, data_len, fds).is_ok() {
                prop_assert!(set.start.checked_add(set.count).unwrap() <= available);
            }
        }
    }
}
