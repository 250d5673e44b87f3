//! Doorbells: what a store to a UAR page says.

use protos::mlx5::pci::UAR_SIZE;
use protos::mlx5::uar as reg;

/// A doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doorbell {
    /// Consumer index of an event queue.
    Eq { eqn: u8, consumed: u32, arm: bool },
    /// First half of a CQ arm that came in two stores.
    ArmCqFirst { word: u32 },
    /// Second half of it.
    ArmCqSecond { cqn: u32 },
    /// CQ arm.
    ArmCq { cqn: u32, word: u32 },
    /// Send queue.
    Send { qpn: u32 },
}

/// Decodes a store at `offset` of a UAR page. Stores that are no doorbell say nothing.
pub(super) fn decode(offset: u64, data: &[u8]) -> Option<Doorbell> {
    let first = u32::from_be_bytes(*data.first_chunk::<4>()?);
    let second = data
        .get(4..8)
        .map(|bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")));
    let offset = offset % UAR_SIZE;
    match offset {
        reg::EQ_ARM | reg::EQ_UPDATE => Some(Doorbell::Eq {
            eqn: (first >> 24) as u8,
            consumed: first & 0xff_ffff,
            arm: offset == reg::EQ_ARM,
        }),
        reg::CQ_ARM => Some(match second {
            Some(second) => Doorbell::ArmCq {
                cqn: second & 0xff_ffff,
                word: first,
            },
            None => Doorbell::ArmCqFirst { word: first },
        }),
        _ if offset == reg::CQ_ARM + 4 => Some(Doorbell::ArmCqSecond {
            cqn: first & 0xff_ffff,
        }),
        // The QP number is in the second word; without it the store is the first half of two.
        reg::SQ..reg::SQ_END if offset.is_multiple_of(8) => {
            second.map(|second| Doorbell::Send { qpn: second >> 8 })
        }
        reg::SQ..reg::SQ_END if offset.is_multiple_of(4) => Some(Doorbell::Send { qpn: first >> 8 }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn test_doorbells_when_stored_are_decoded() {
        let page = 17 * UAR_SIZE;
        assert_eq!(
            decode(page + reg::EQ_ARM, &[3, 0, 0, 5]),
            Some(Doorbell::Eq {
                eqn: 3,
                consumed: 5,
                arm: true
            })
        );
        assert_eq!(
            decode(page + reg::EQ_UPDATE, &[3, 0, 0, 5]),
            Some(Doorbell::Eq {
                eqn: 3,
                consumed: 5,
                arm: false
            })
        );
        assert_eq!(
            decode(page + reg::CQ_ARM, &[0x11, 0, 0, 7, 0, 0, 0, 9]),
            Some(Doorbell::ArmCq {
                cqn: 9,
                word: 0x1100_0007
            })
        );
        for offset in [0x800, 0x900, 0xa00] {
            assert_eq!(
                decode(page + offset, &[0, 0, 0, 8, 0, 0x12, 0x34, 2]),
                Some(Doorbell::Send { qpn: 0x1234 })
            );
        }
        assert_eq!(
            decode(page + 0x804, &[0, 0x12, 0x34, 2]),
            Some(Doorbell::Send { qpn: 0x1234 })
        );
        assert_eq!(decode(page + 0x800, &[0, 0x12, 0x34, 2]), None);
        assert_eq!(decode(page, &[0; 8]), None);
    }

    proptest! {
        #[test]
        fn test_stores_when_of_any_bytes_are_decoded_or_dropped(
            offset: u64, data in proptest::collection::vec(any::<u8>(), 0..70),
        ) {
            let _ = decode(offset, &data);
        }
    }
}
