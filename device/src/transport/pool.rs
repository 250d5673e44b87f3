//! Buffers for payload, used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Most payload of one [`super::Packet`].
pub const SEGMENT: usize = 64 << 10;
/// Payload that goes into a small buffer.
pub const SMALL: usize = 4096;

#[derive(Debug, Default)]
struct Free {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    made: u64,
}

/// Where buffers come from and go back to. The one that came back last is given out first: it is in the cache.
#[derive(Debug, Clone)]
pub struct Pool {
    free: Arc<Mutex<Free>>,
}

/// Buffers of a kind that are kept; more go back to the allocator.
const KEPT: usize = 1024;

impl Default for Pool {
    fn default() -> Self {
        Self {
            free: Arc::new(Mutex::new(Free {
                small: Vec::with_capacity(KEPT),
                large: Vec::with_capacity(KEPT),
                made: 0,
            })),
        }
    }
}

impl Pool {
    /// How many buffers were allocated so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).made
    }

    /// A buffer of `len` bytes, whose contents are whatever somebody left there.
    ///
    /// # Panics
    /// When `len` is greater than [`SEGMENT`].
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        assert!(len <= SEGMENT, "a buffer of {len} bytes");
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, size) = if len <= SMALL {
            (free.small.pop(), SMALL)
        } else {
            (free.large.pop(), SEGMENT)
        };
        free.made += u64::from(bytes.is_none());
        drop(free);
        Buffer {
            bytes: bytes.unwrap_or_else(|| vec![0; size].into()),
            start: 0,
            len: len as u32,
            pool: self.clone(),
        }
    }
}

/// Bytes of a packet. Dropping it gives the buffer back.
#[derive(Debug)]
pub struct Buffer {
    bytes: Box<[u8]>,
    start: u32,
    len: u32,
    pool: Pool,
}

impl Buffer {
    /// Forget the first bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn skip(&mut self, count: usize) {
        assert!(count <= self.len as usize, "skip {count} of {} bytes", self.len);
        self.start += count as u32;
        self.len -= count as u32;
    }

    /// A copy, from the same pool.
    #[must_use]
    pub fn copy(&self) -> Self {
        let mut copy = self.pool.take(self.len as usize);
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start as usize..][..self.len as usize]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start as usize..][..self.len as usize]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        let list = if bytes.len() == SMALL {
            &mut free.small
        } else {
            &mut free.large
        };
        if list.len() < KEPT {
            list.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_take_when_a_buffer_came_back_gives_it_again() {
        let pool = Pool::default();
        let first = pool.take(100);
        let at = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(5).as_ptr(), at);
        assert_ne!(pool.take(5000).len(), SMALL);
    }

    #[test]
    fn test_skip_when_part_is_forgotten_leaves_the_rest() {
        let pool = Pool::default();
        let mut buffer = pool.take(4);
        buffer.copy_from_slice(&[1, 2, 3, 4]);
        buffer.skip(3);
        assert_eq!(&*buffer, &[4]);
        assert_eq!(&*buffer.copy(), &[4]);
    }
}
