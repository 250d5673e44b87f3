//! MSI-X (PCI 3.0 section 6.8.2).

/// Bytes of the capability.
pub const SIZE: usize = 12;
/// Message control, 2 bytes: table size - 1 in bits 0 to 10.
pub const CTRL: usize = 2;
/// Message control: all vectors are masked.
pub const CTRL_FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
pub const CTRL_ENABLE: u16 = 1 << 15;
/// Table offset and BAR, 4 bytes: BAR in bits 0 to 2.
pub const TABLE: usize = 4;
/// Pending-bit array offset and BAR, 4 bytes.
pub const PBA: usize = 8;
/// Most vectors of a function.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry: address low, address high, data, vector control.
pub const ENTRY_SIZE: u64 = 16;
/// Vector control: this vector is masked.
pub const VECTOR_CTRL_MASK: u32 = 1;

/// Bytes of the table.
#[must_use]
pub const fn table_size(vectors: u16) -> u64 {
    vectors as u64 * ENTRY_SIZE
}

/// Bytes of the pending-bit array: 8-byte words.
#[must_use]
pub const fn pba_size(vectors: u16) -> u64 {
    (vectors as u64).div_ceil(64) * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_sizes_when_vectors_are_odd_round_up_to_words() {
        assert_eq!((table_size(32), pba_size(32)), (512, 8));
        assert_eq!((table_size(1), pba_size(1)), (16, 8));
        assert_eq!((table_size(2048), pba_size(2048)), (32768, 256));
        assert_eq!(pba_size(65), 16);
    }
}
