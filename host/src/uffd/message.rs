//! One userfaultfd message: `struct uffd_msg` of `include/uapi/linux/userfaultfd.h`, 32 bytes.

/// Size of a message.
pub const MESSAGE_BYTES: usize = 32;

/// What a message says. Unknown events survive as [`Message::Other`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// 0x12: a thread waits for a page (missing mode).
    PageFault {
        /// `UFFD_PAGEFAULT_FLAG_*`.
        flags: u64,
        /// Faulting address (page aligned unless the agent asked for exact addresses).
        address: u64,
    },
    /// 0x13: the process forked; a userfaultfd for the child came with the message.
    Fork {
        /// Descriptor number in the reading process.
        child: i32,
    },
    /// 0x14: `len` bytes moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// 0x15: the content of the range is being discarded.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// 0x16: the range has been unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// An event this code does not know.
    Other(u8),
}

impl Message {
    /// Reads a message.
    #[must_use]
    pub fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Self {
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        match bytes[0] {
            0x12 => Self::PageFault {
                flags: word(8),
                address: word(16),
            },
            0x13 => Self::Fork {
                child: i32::from_ne_bytes(bytes[8..12].try_into().expect("4 bytes")),
            },
            0x14 => Self::Remap {
                from: word(8),
                to: word(16),
                len: word(24),
            },
            0x15 => Self::Remove {
                start: word(8),
                end: word(16),
            },
            0x16 => Self::Unmap {
                start: word(8),
                end: word(16),
            },
            other => Self::Other(other),
        }
    }

    /// The ranges whose cached mappings have to be forgotten. At most two.
    pub fn discards(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let pair = match *self {
            Self::Remap { from, to, len } => [
                Some((from, from.saturating_add(len))),
                Some((to, to.saturating_add(len))),
            ],
            Self::Remove { start, end } | Self::Unmap { start, end } => [Some((start, end)), None],
            // An event of an unknown kind can mean anything.
            Self::Other(_) => [Some((0, u64::MAX)), None],
            Self::PageFault { .. } | Self::Fork { .. } => [None, None],
        };
        pair.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(event: u8, words: [u64; 3]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = event;
        for (chunk, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn test_message_when_event_is_known_returns_its_fields() {
        assert_eq!(
            Message::parse(&raw(0x12, [2, 0x7000, 0])),
            Message::PageFault {
                flags: 2,
                address: 0x7000
            }
        );
        assert_eq!(Message::parse(&raw(0x13, [9, 0, 0])), Message::Fork { child: 9 });
        let remap = Message::parse(&raw(0x14, [0x1000, 0x9000, 0x2000]));
        assert_eq!(
            remap.discards().collect::<Vec<_>>(),
            [(0x1000, 0x3000), (0x9000, 0xb000)]
        );
        let unmap = Message::parse(&raw(0x16, [1, 2, 3]));
        assert_eq!(unmap, Message::Unmap { start: 1, end: 2 });
        assert_eq!(
            Message::parse(&raw(0x15, [1, 2, 3])),
            Message::Remove { start: 1, end: 2 }
        );
    }

    #[test]
    fn test_message_when_event_is_unknown_discards_everything() {
        let other = Message::parse(&raw(0xff, [0; 3]));
        assert_eq!(other, Message::Other(0xff));
        assert_eq!(other.discards().collect::<Vec<_>>(), [(0, u64::MAX)]);
    }
}
