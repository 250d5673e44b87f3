//! A queue's memory: pages of one size that a command has listed.

use super::memory::Port;
use crate::dma::DmaError;

/// Largest queue that is accepted, in bytes: every queue that the capabilities allow is smaller.
const LIMIT: u64 = 1 << 31;

/// The pages of a queue.
#[derive(Debug, Clone)]
pub(super) struct Buffer {
    pages: Box<[u64]>,
    shift: u32,
    /// Of the queue's first byte in the first page.
    offset: u64,
    len: u64,
}

impl Buffer {
    /// A queue of `len` bytes. `addresses` are big-endian words; `log_page_size` counts from 4 KiB, `page_offset` in
    /// pages / 64. `None` when the list is too short or the page is no page.
    pub(super) fn parse(addresses: &[u8], log_page_size: u32, page_offset: u32, len: u64) -> Option<Self> {
        let shift = log_page_size + 12;
        if shift > 31 || len == 0 || len > LIMIT {
            return None;
        }
        let offset = u64::from(page_offset) << (shift - 6);
        let pages = usize::try_from((offset + len).div_ceil(1 << shift)).ok()?;
        let addresses = addresses.as_chunks::<8>().0.get(..pages)?;
        Some(Self {
            pages: addresses
                .iter()
                .map(|address| u64::from_be_bytes(*address) & !0xfff)
                .collect(),
            shift,
            offset,
            len,
        })
    }

    /// The IOVA of `offset`, and how many bytes follow it in its page.
    ///
    /// # Panics
    /// When `offset` is not inside.
    pub(super) fn at(&self, offset: u64) -> (u64, u64) {
        assert!(
            offset < self.len,
            "byte {offset:#x} of a queue of {:#x}",
            self.len
        );
        let place = self.offset + offset;
        let page = 1u64 << self.shift;
        let within = place & (page - 1);
        (
            self.pages[(place >> self.shift) as usize].wrapping_add(within),
            page - within,
        )
    }

    /// Copy out.
    ///
    /// # Panics
    /// When the range is not inside.
    pub(super) fn read(&self, port: &mut Port, offset: u64, to: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < to.len() {
            let (iova, left) = self.at(offset + done as u64);
            let step = (to.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            port.read(iova, &mut to[done..done + step])?;
            done += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[u64]) -> Vec<u8> {
        list.iter().flat_map(|address| address.to_be_bytes()).collect()
    }

    #[test]
    fn test_buffer_when_it_begins_inside_a_page_goes_on_in_the_next() {
        let buffer = Buffer::parse(&addresses(&[0x5000, 0x9000]), 0, 32, 0x1000).unwrap();
        assert_eq!(buffer.at(0), (0x5800, 0x800));
        assert_eq!(buffer.at(0x7ff), (0x5fff, 1));
        assert_eq!(buffer.at(0x800), (0x9000, 0x1000));
    }

    #[test]
    fn test_buffer_when_the_list_is_short_or_the_page_absurd_is_refused() {
        assert!(Buffer::parse(&addresses(&[0x5000]), 0, 1, 0x1000).is_none());
        assert!(Buffer::parse(&[], 0, 0, 1).is_none());
        assert!(Buffer::parse(&addresses(&[0x5000]), 31, 0, 0x1000).is_none());
        assert!(Buffer::parse(&addresses(&[0x5000]), 0, 0, 0).is_none());
        assert!(Buffer::parse(&addresses(&[0x5000]), 0, 0, u64::MAX).is_none());
    }
}
