//! Page-size codes (section 9).

/// Largest code: 1 TiB.
pub const MAX_CODE: u8 = 15;

/// Code of a page of `1 << shift` bytes, or `None` when the GRU has no such page.
#[must_use]
pub const fn code_of_shift(shift: u8) -> Option<u8> {
    if shift < 12 || shift > 40 {
        return None;
    }
    let s = if shift > 20 { shift + 2 } else { shift };
    // Shifts between two sizes give the code of a neighbour: only what round-trips is a size.
    let code = (s >> 1) - 6;
    match shift_of_code(code) {
        Some(s) if s == shift => Some(code),
        _ => None,
    }
}

/// Shift of a code: 12, 14, 16, 18, 20, 21, 22, 24, ... 40.
#[must_use]
pub const fn shift_of_code(code: u8) -> Option<u8> {
    match code {
        0..=4 => Some(12 + 2 * code),
        5 => Some(21),
        6..=15 => Some(22 + 2 * (code - 6)),
        _ => None,
    }
}
