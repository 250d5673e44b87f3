//! The local side of the transfers: where WRITEs come from and READs go to, and how the work is cut into messages.

use std::rc::Rc;

use anyhow::{Context, Result};
use verbs::{Buffer, Pages, Paging, Pattern, ProtectionDomain, Region, Transfer, page_size};

/// Bytes of one message, if the port has them.
const CHUNK: usize = 1 << 20;
/// Pages by which a message's contents can be shifted, so that neighbours differ.
const SHIFTS: usize = 256;
/// What is kept of a READ, to be compared.
const SINK: usize = 64 << 20;

/// How a range is cut, and what a WRITE puts into it.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    chunk: usize,
    pattern: Pattern,
}

impl Cut {
    /// Messages of at most so many bytes.
    pub fn new(max_message: u32, seed: u64) -> Self {
        let page = page_size();
        let chunk = CHUNK.min(max_message as usize) / page * page;
        Self {
            chunk: chunk.max(page),
            pattern: Pattern::new(seed),
        }
    }

    /// The source of WRITEs.
    ///
    /// # Errors
    /// No memory.
    pub fn source(self) -> Result<Buffer> {
        let source = Buffer::map(self.chunk + SHIFTS * page_size(), Pages::Default).context("the source")?;
        source.fill(self.pattern);
        Ok(source)
    }

    /// The messages of a WRITE. Different salts put different contents everywhere.
    pub fn writes(self, length: usize, salt: usize) -> impl Iterator<Item = Transfer> {
        self.pieces(length).map(move |(index, remote, length)| Transfer {
            local: (index + salt) % SHIFTS * page_size(),
            remote,
            length,
        })
    }

    /// Where the buffer is not what that WRITE has put there.
    pub fn first_wrong(self, buffer: &Buffer, length: usize, salt: usize) -> Option<usize> {
        self.writes(length, salt).find_map(|t| {
            buffer.first_wrong(t.remote..t.remote + t.length, |word| {
                self.pattern.word(t.local / 8 + word - t.remote / 8)
            })
        })
    }

    /// Index, offset and length of each message.
    fn pieces(self, length: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..length)
            .step_by(self.chunk)
            .enumerate()
            .map(move |(index, offset)| (index, offset, self.chunk.min(length - offset)))
    }
}

/// The registered memory of the local side.
#[derive(Debug)]
pub struct Staging {
    /// How it is cut.
    pub cut: Cut,
    /// Where WRITEs come from.
    pub source: Region,
    /// Where READs go to.
    pub sink: Region,
    sink_buffer: Rc<Buffer>,
}

impl Staging {
    /// Registered for transfers of those sizes.
    ///
    /// # Errors
    /// No memory, or RLIMIT_MEMLOCK.
    pub fn new(domain: &ProtectionDomain, max_message: u32, sizes: Vec<u64>, seed: u64) -> Result<Self> {
        let cut = Cut::new(max_message, seed);
        let source = Rc::new(cut.source()?);
        let largest = sizes.into_iter().max().unwrap_or(0);
        let sink = usize::try_from(largest).unwrap_or(SINK).clamp(1, SINK);
        let sink_buffer =
            Rc::new(Buffer::map(sink.next_multiple_of(cut.chunk), Pages::Default).context("the sink")?);
        sink_buffer.populate().context("the sink")?;
        Ok(Self {
            cut,
            source: domain.register(&source, 0, source.length(), Paging::Pinned)?,
            sink: domain.register(&sink_buffer, 0, sink_buffer.length(), Paging::Pinned)?,
            sink_buffer,
        })
    }

    /// Bytes of one message.
    pub fn chunk(&self) -> usize {
        self.cut.chunk
    }

    /// The messages of a READ.
    pub fn reads(&self, length: usize) -> impl Iterator<Item = Transfer> + use<> {
        let places = self.sink_buffer.length() / self.cut.chunk;
        let chunk = self.cut.chunk;
        self.cut
            .pieces(length)
            .map(move |(index, remote, length)| Transfer {
                local: index % places * chunk,
                remote,
                length,
            })
    }

    /// How much of a READ is still in the sink, and the first offset of it that is not what is expected at that word
    /// of the remote buffer.
    pub fn first_wrong_read(&self, length: usize, expected: impl Fn(usize) -> u64) -> (usize, Option<usize>) {
        let places = self.sink_buffer.length() / self.cut.chunk;
        let all = length.div_ceil(self.cut.chunk);
        let kept = self.reads(length).skip(all.saturating_sub(places));
        let (mut compared, mut wrong) = (0, None);
        for t in kept {
            let here = self.sink_buffer.first_wrong(t.local..t.local + t.length, |word| {
                expected(t.remote / 8 + word - t.local / 8)
            });
            compared += t.length;
            wrong = wrong.or(here.map(|offset| t.remote + offset - t.local));
        }
        (compared, wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_writes_when_cut_cover_everything_once() {
        let cut = Cut::new(1 << 31, 1);
        for length in [4096, 1 << 20, (5 << 20) + 8192] {
            let mut at = 0;
            for t in cut.writes(length, 250) {
                assert_eq!(t.remote, at);
                assert!(t.local + t.length <= (1 << 20) + SHIFTS * page_size());
                at += t.length;
            }
            assert_eq!(at, length);
        }
        // A port with short messages, and one that claims none.
        assert_eq!(Cut::new(10_000, 1).chunk, 8192);
        assert_eq!(Cut::new(0, 1).chunk, page_size());
    }

    #[test]
    fn test_contents_when_of_another_salt_or_place_are_wrong() {
        let cut = Cut::new(8192, 3);
        let length = 5 * 4096;
        let source = cut.source().unwrap();
        let target = Buffer::map(length, Pages::Small).unwrap();
        for t in cut.writes(length, 7) {
            target.copy_from(t.remote, &source, t.local, t.length);
        }
        assert_eq!(cut.first_wrong(&target, length, 7), None);
        assert_eq!(cut.first_wrong(&target, length, 8), Some(0));
        // One message did not arrive.
        target.copy_from(8192, &target, 0, 8192);
        assert_eq!(cut.first_wrong(&target, length, 7), Some(8192));
        target.discard().unwrap();
        assert_eq!(cut.first_wrong(&target, length, 7), Some(0));
    }
}
