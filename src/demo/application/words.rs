//! What the 64-bit words of the demo's memory look like, so that a word that turns up where it should
//! not says where it came from.
//!
//! Layout: `kind` 2 bits (62..64), `payload` 42 bits (20..62), `index` 9 bits (11..20), check sum 11 bits.
//! Zero is not a valid word: it is what a punched hole reads as.

/// Words of a page.
pub const WORDS_PER_PAGE: usize = 512;

const KIND_SHIFT: u32 = 62;
const PAYLOAD_SHIFT: u32 = 20;
const INDEX_SHIFT: u32 = 11;
const SUM_MASK: u64 = (1 << INDEX_SHIFT) - 1;

const KIND_FILL: u64 = 0;
const KIND_STORE: u64 = 1;
const KIND_SET: u64 = 2;
const KIND_POISON: u64 = 3;

/// Bits of a page number inside a word: 2^20 pages, 4 GiB.
pub const PAGE_BITS: u32 = 20;
const EPOCH_BITS: u32 = 22;
/// Bits of an operation number inside a word.
const OPERATION_BITS: u32 = 30;

fn sum(body: u64) -> u64 {
    // Any mixing will do; the offset keeps the sum of an all-zero body from being zero.
    (body ^ 0x5bd1_e995_7b93_a2c7).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53
}

fn seal(kind: u64, payload: u64, index: usize) -> u64 {
    let payload = payload & ((1 << (KIND_SHIFT - PAYLOAD_SHIFT)) - 1);
    let index = (index % WORDS_PER_PAGE) as u64;
    let body = kind << KIND_SHIFT | payload << PAYLOAD_SHIFT | index << INDEX_SHIFT;
    body | sum(body)
}

fn page_payload(page: usize, epoch: u32) -> u64 {
    (page as u64 & ((1 << PAGE_BITS) - 1)) << EPOCH_BITS | u64::from(epoch) & ((1 << EPOCH_BITS) - 1)
}

/// First content of word `index` of page `page` when it enters service in `epoch`.
pub fn fill(page: usize, epoch: u32, index: usize) -> u64 {
    seal(KIND_FILL, page_payload(page, epoch), index)
}

/// What stands in a page that a mapping has left behind.
pub fn poison(page: usize, epoch: u32, index: usize) -> u64 {
    seal(KIND_POISON, page_payload(page, epoch), index)
}

fn operation_payload(slot: usize, operation: u64) -> u64 {
    (slot as u64) << OPERATION_BITS | operation & ((1 << OPERATION_BITS) - 1)
}

/// What operation number `operation` of a slot's worker stores as its `index`-th word.
pub fn store(slot: usize, operation: u64, index: usize) -> u64 {
    seal(KIND_STORE, operation_payload(slot, operation), index)
}

/// The one value that a VSET of that operation spreads.
pub fn set(slot: usize, operation: u64) -> u64 {
    seal(KIND_SET, operation_payload(slot, operation), 0)
}

/// Whether a word is poison, of whatever page and epoch.
pub fn is_poison(word: u64) -> bool {
    word >> KIND_SHIFT == KIND_POISON && word & SUM_MASK == sum(word & !SUM_MASK)
}

/// A word in words, for reports.
pub fn describe(word: u64) -> String {
    if word == 0 {
        return "0 (a hole)".into();
    }
    if word & SUM_MASK != sum(word & !SUM_MASK) {
        return format!("{word:#018x} (written by nobody here)");
    }
    let payload = word >> PAYLOAD_SHIFT & ((1 << (KIND_SHIFT - PAYLOAD_SHIFT)) - 1);
    let index = word >> INDEX_SHIFT & 0x1ff;
    let (page, epoch) = (payload >> EPOCH_BITS, payload & ((1 << EPOCH_BITS) - 1));
    let (slot, operation) = (payload >> OPERATION_BITS, payload & ((1 << OPERATION_BITS) - 1));
    match word >> KIND_SHIFT {
        KIND_FILL => format!("first content of page {page} word {index} (epoch {epoch})"),
        KIND_STORE => format!("word {index} stored in slot {slot} by operation {operation}"),
        KIND_SET => format!("set in slot {slot} by operation {operation}"),
        _ => format!("poison of page {page} word {index} (epoch {epoch})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_words_when_sealed_are_told_apart() {
        for (page, epoch, index) in [(0, 0, 0), (16_383, 77, 511), (1, 4_194_303, 256)] {
            assert!(is_poison(poison(page, epoch, index)));
            assert!(!is_poison(fill(page, epoch, index)));
            assert_ne!(fill(page, epoch, index), 0);
            assert_ne!(fill(page, epoch, index), fill(page, epoch + 1, index));
            assert_ne!(fill(page, epoch, index), fill(page + 1, epoch, index));
        }
        assert!(!is_poison(0) && !is_poison(u64::MAX) && !is_poison(store(4095, 1, 3)));
        assert_ne!(store(1, 2, 3), store(2, 2, 3));
        assert_ne!(store(1, 2, 3), store(1, 3, 3));
        assert_ne!(set(1, 2), set(1, 3));
    }

    #[test]
    fn test_describe_when_word_is_known_names_its_origin() {
        assert_eq!(describe(poison(9, 4, 7)), "poison of page 9 word 7 (epoch 4)");
        assert_eq!(
            describe(store(12, 345, 6)),
            "word 6 stored in slot 12 by operation 345"
        );
        assert!(describe(0x1234).contains("nobody"));
        assert!(describe(0).contains("hole"));
    }
}
