//! Message queues in memory (section 10). The device knows the first word; the rest is between senders and
//! receiver.

use bitfield_struct::bitfield;

/// Bytes of a line: the unit of head, limit and messages.
pub const LINE: u64 = 64;
/// Byte offset of the [`Head`] word.
pub const HEAD: u64 = 0;
/// Byte offset of the number of lines that messages can use (i32): bytes / 64 - 2.
pub const QLINES: u64 = 8;
/// Byte offset of the lock word of a half (u64): 1 = whoever clears it may switch to that half.
#[must_use]
pub const fn hstatus(half: usize) -> u64 {
    16 + 8 * half as u64
}
/// Byte offset of the consumer's own line: 32 bytes of its position.
pub const CONSUMER: u64 = 64;
/// Line of the first message.
pub const FIRST_LINE: u32 = 2;
/// Smallest queue in bytes: one line in each half.
pub const MIN_BYTES: u64 = 6 * LINE;

/// The first word: where the next message goes and where the half ends, in lines from the queue's base.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Head {
    /// Line of the next message.
    pub head: u32,
    /// First line that this half does not have.
    pub limit: u32,
}

impl Head {
    /// The word after a message of `lines`, or `None` when they do not fit into the half.
    #[must_use]
    pub fn reserve(self, lines: u64) -> Option<Self> {
        let next = u64::from(self.head()).checked_add(lines)?;
        let next = u32::try_from(next).ok().filter(|&next| next <= self.limit())?;
        Some(self.with_head(next))
    }
}

/// Lines of a queue of `bytes` that messages can use.
#[must_use]
pub const fn qlines(bytes: u64) -> u32 {
    (bytes / LINE - 2) as u32
}

/// Head word at the beginning of a half: lines 2 to qlines/2+1, and from there to qlines.
#[must_use]
pub fn start_of_half(qlines: u32, half: usize) -> Head {
    let middle = qlines / 2 + 1;
    let (head, limit) = if half == 0 {
        (FIRST_LINE, middle)
    } else {
        (middle, qlines)
    };
    Head::new().with_head(head).with_limit(limit)
}

/// Bytes of a message's header: the first bytes of its first line.
pub mod header {
    /// Byte: a value of [`super::present`].
    pub const PRESENT: usize = 0;
    /// Byte: what stands at the second line's beginning.
    pub const PRESENT2: usize = 1;
    /// Byte: lines of the message.
    pub const LINES: usize = 2;
    /// Byte: unused.
    pub const FILL: usize = 3;
}

/// Values of the present byte.
pub mod present {
    /// No message yet.
    pub const EMPTY: u8 = 0;
    /// A message.
    pub const FULL: u8 = 1;
    /// A filler without content.
    pub const NOOP: u8 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_head_when_queue_has_512_bytes_is_that_of_the_reference() {
        let lines = qlines(512);
        assert_eq!(lines, 6);
        assert_eq!(start_of_half(lines, 0).into_bits(), 2 | 4 << 32);
        assert_eq!(start_of_half(lines, 1).into_bits(), 4 | 6 << 32);
    }

    #[test]
    fn test_reserve_when_lines_do_not_fit_changes_nothing() {
        let head = Head::new().with_head(3).with_limit(4);
        assert_eq!(head.reserve(1), Some(head.with_head(4)));
        assert_eq!(head.reserve(2), None);
        assert_eq!(head.reserve(u64::MAX), None);
        assert_eq!(
            Head::new().with_head(u32::MAX).with_limit(u32::MAX).reserve(1),
            None
        );
        assert_eq!(Head::new().with_head(9).with_limit(4).reserve(1), None);
    }
}
