//! Memory BARs (PCI 3.0 section 6.2.5.1).

/// A memory BAR: what its register(s) hold and which bits software can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    size: u64,
    is_64bit: bool,
    prefetchable: bool,
}

/// Why a BAR cannot exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// Not a power of two, or below 16 bytes.
    #[error("BAR size {0:#x} is not a power of two of at least 16 bytes")]
    Size(u64),
    /// A 32-bit BAR of 4 GiB or more.
    #[error("BAR size {0:#x} needs a 64-bit BAR")]
    TooLarge(u64),
}

impl Bar {
    /// Type bits: 64-bit.
    pub const TYPE_64: u32 = 2 << 1;
    /// Type bits: prefetchable.
    pub const PREFETCH: u32 = 1 << 3;

    /// A BAR of `size` bytes.
    ///
    /// # Errors
    /// See [`BarError`].
    pub fn new(size: u64, is_64bit: bool, prefetchable: bool) -> Result<Self, BarError> {
        if !size.is_power_of_two() || size < 16 {
            return Err(BarError::Size(size));
        }
        if !is_64bit && size > 1 << 31 {
            return Err(BarError::TooLarge(size));
        }
        Ok(Self {
            size,
            is_64bit,
            prefetchable,
        })
    }

    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Takes two registers.
    #[must_use]
    pub const fn is_64bit(&self) -> bool {
        self.is_64bit
    }

    /// Read-only bits of the first register.
    #[must_use]
    pub const fn type_bits(&self) -> u32 {
        (if self.is_64bit { Self::TYPE_64 } else { 0 }) | (if self.prefetchable { Self::PREFETCH } else { 0 })
    }

    /// Writable bits: those of the first register in the low half, those of the second in the high half
    /// (0 for a 32-bit BAR). Writing all ones and reading back gives them: that is how software sizes it.
    #[must_use]
    pub const fn address_mask(&self) -> u64 {
        let mask = !(self.size - 1);
        if self.is_64bit { mask } else { mask & 0xffff_ffff }
    }

    /// Size from what software reads back after writing all ones (type bits included).
    #[must_use]
    pub const fn size_from_probe(low: u32, high: u32) -> u64 {
        let mut value = (low & !0xf) as u64;
        let is_64bit = low & 6 == Self::TYPE_64;
        if is_64bit {
            value |= (high as u64) << 32;
        } else if value != 0 {
            value |= 0xffff_ffff << 32;
        }
        value.wrapping_neg()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn test_bar_when_built_has_the_bits_of_the_specification() {
        let bar = Bar::new(1 << 28, true, true).unwrap();
        assert_eq!(bar.type_bits(), 0xc);
        assert_eq!(bar.address_mask(), 0xffff_ffff_f000_0000);
        let small = Bar::new(4096, false, false).unwrap();
        assert_eq!((small.type_bits(), small.address_mask()), (0, 0xffff_f000));
        assert_eq!(Bar::new(4095, true, false), Err(BarError::Size(4095)));
        assert_eq!(Bar::new(0, true, false), Err(BarError::Size(0)));
        assert_eq!(Bar::new(1 << 32, false, false), Err(BarError::TooLarge(1 << 32)));
    }

    proptest! {
        #[test]
        fn test_bar_when_probed_gives_its_size(shift in 4u32..63, is_64bit: bool, prefetchable: bool) {
            prop_assume!(is_64bit || shift < 32);
            let bar = Bar::new(1 << shift, is_64bit, prefetchable).unwrap();
            let mask = bar.address_mask();
            let probed = Bar::size_from_probe(mask as u32 | bar.type_bits(), (mask >> 32) as u32);
            prop_assert_eq!(probed, bar.size());
        }
    }
}
