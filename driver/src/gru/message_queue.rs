//! Message queues in memory, filled by MESQ (section 10): many senders, one receiver.
//!
//! The queue has two halves. A sender that finds its half full takes the lock word of the other one (the receiver sets
//! it when it has emptied that half), fills what is left with a message without content, and moves the head word over.
//! Who does not get the lock finds the queue full.
//!
//! A message is one or two cache lines; the first four bytes are the header, so it carries up to
//! [`MAX_MESSAGE`] bytes.

use std::io;

use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, Status, SubStatus, XType};
use protos::gru::message_queue::{self as layout, HEAD, Head, LINE, header, present};

use super::user::{Gseg, WaitError};

const LINE_BYTES: usize = LINE as usize;
const HEADER: usize = 4;

/// Longest message in bytes: two lines without the header.
pub const MAX_MESSAGE: usize = 2 * LINE_BYTES - HEADER;

/// Why a queue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The caller's argument.
    #[error("{what} {value:#x}: {why}")]
    Argument {
        /// Which.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The chip is busy; try again later.
    #[error("the message could not be sent now ({0:?}); try again later")]
    Congestion(SubStatus),
    /// Both halves hold messages that nobody has taken.
    #[error("the message queue is full; wait until its receiver has taken messages")]
    Full,
    /// The queue lies so that this message would cross a page; a shorter one may fit.
    #[error(
        "the message would cross a page of the queue; send a shorter one, or put the queue into one page"
    )]
    PageOverflow,
    /// The instruction failed (see `Context::exception_detail`).
    #[error("{what} failed")]
    Exception {
        /// What was tried.
        what: &'static str,
    },
    /// The wait for an instruction ended.
    #[error("{0}")]
    Wait(#[from] WaitError),
}

impl From<io::Error> for QueueError {
    fn from(error: io::Error) -> Self {
        Self::Wait(error.into())
    }
}

/// The processor's accesses to a queue's memory. Offsets are multiples of 8 and inside the queue.
pub trait QueueMemory {
    /// Reads a word; what the device stored before that word is seen by later reads.
    fn load(&self, offset: u64) -> u64;
    /// Writes a word, after everything that was read before.
    fn store(&self, offset: u64, value: u64);
}

/// Writes an empty queue of `bytes` (a multiple of the line, at least [`layout::MIN_BYTES`]).
///
/// # Errors
/// `Argument`.
pub fn create(memory: &dyn QueueMemory, bytes: u64) -> Result<(), QueueError> {
    check_size(bytes)?;
    for offset in (0..bytes).step_by(8) {
        memory.store(offset, 0);
    }
    let qlines = layout::qlines(bytes);
    memory.store(layout::QLINES, u64::from(qlines));
    memory.store(layout::CONSUMER, u64::from(layout::FIRST_LINE) * LINE);
    memory.store(layout::hstatus(1), 1);
    memory.store(HEAD, layout::start_of_half(qlines, 0).into_bits());
    Ok(())
}

fn check_size(bytes: u64) -> Result<(), QueueError> {
    let why = match bytes {
        _ if !bytes.is_multiple_of(LINE) => "a queue is made of cache lines of 64 bytes",
        _ if bytes < layout::MIN_BYTES => {
            "a queue needs six lines at least: two of its own, four for messages"
        }
        _ if bytes / LINE > u64::from(u32::MAX) => "a queue has at most 2^32 lines",
        _ => return Ok(()),
    };
    let (what, value) = ("queue size", bytes);
    Err(QueueError::Argument { what, value, why })
}

/// One sender: a control block, and two lines of the data segment.
#[derive(Debug)]
pub struct Sender<'a> {
    gseg: &'a Gseg,
    cb: usize,
    /// Byte offset in the data segment.
    ds: u32,
    /// The queue's address in the context's address space.
    queue: u64,
    qlines: u32,
}

impl<'a> Sender<'a> {
    /// Sends to the queue of `bytes` bytes at address `queue` with control block `cb` and 128 bytes of the data segment
    /// at `ds`.
    ///
    /// # Errors
    /// `Argument`.
    pub fn new(gseg: &'a Gseg, cb: usize, ds: u32, queue: u64, bytes: u64) -> Result<Self, QueueError> {
        check_size(bytes)?;
        let argument = |what, value, why| Err(QueueError::Argument { what, value, why });
        if !queue.is_multiple_of(LINE) {
            return argument("queue address", queue, "it must be a multiple of 64");
        }
        if cb >= gseg.cbs() {
            return argument("control block", cb as u64, "the context has fewer");
        }
        if ds as usize + 2 * LINE_BYTES > gseg.ds_bytes() {
            return argument("data segment offset", u64::from(ds), "two lines do not fit there");
        }
        let qlines = layout::qlines(bytes);
        Ok(Self {
            gseg,
            cb,
            ds,
            queue,
            qlines,
        })
    }

    /// Sends a message of up to [`MAX_MESSAGE`] bytes. `alive` is asked from time to time while waiting.
    ///
    /// # Errors
    /// [`QueueError`]; unless it is `Exception` or `Wait` nothing has been sent.
    pub fn send(&self, message: &[u8], alive: &dyn Fn() -> bool) -> Result<(), QueueError> {
        let (image, lines) = image_of(message)?;
        loop {
            self.gseg
                .ds_write(self.ds as usize, &image[..lines * LINE_BYTES])?;
            match self.mesq(lines, alive)? {
                None => return Ok(()),
                Some(SubStatus::QLIMIT_REACHED) => self.switch_halves(alive)?,
                Some(SubStatus::PUT_NACKED) => return self.put(lines, alive),
                Some(SubStatus::PAGE_OVERFLOW) => return Err(QueueError::PageOverflow),
                Some(congestion) => return Err(QueueError::Congestion(congestion)),
            }
        }
    }

    /// The substatus if there was one.
    fn mesq(&self, lines: usize, alive: &dyn Fn() -> bool) -> Result<Option<SubStatus>, QueueError> {
        let send = Instruction::mesq(self.queue, self.ds, lines as u64);
        if self.gseg.execute(self.cb, &send, alive)? == Status::IDLE {
            return Ok(None);
        }
        match self.gseg.control(self.cb)?.substatus() {
            SubStatus::NONE => Err(QueueError::Exception {
                what: "sending a message",
            }),
            substatus => Ok(Some(substatus)),
        }
    }

    fn run(
        &self,
        what: &'static str,
        instruction: &Instruction,
        alive: &dyn Fn() -> bool,
    ) -> Result<u64, QueueError> {
        match self.gseg.execute(self.cb, instruction, alive)? {
            Status::IDLE => Ok(self.gseg.avalue(self.cb)?),
            _ => Err(QueueError::Exception { what }),
        }
    }

    /// The slot of the last MESQ is ours, and empty: the lines in the data segment go there.
    fn put(&self, lines: usize, alive: &dyn Fn() -> bool) -> Result<(), QueueError> {
        let at = self.queue + u64::from(Head::from_bits(self.gseg.avalue(self.cb)?).head()) * LINE;
        // The receiver looks at the first line first: the second one goes before it.
        for line in (0..lines).rev() {
            let ds = self.ds + (line * LINE_BYTES) as u32;
            let store = Instruction::vstore(at + line as u64 * LINE, ds, XType::CACHE_LINE, 1, 1);
            self.run("storing a message into its slot", &store, alive)?;
        }
        Ok(())
    }

    /// The half of the last MESQ is full: others are sent to the other half, if that is empty.
    fn switch_halves(&self, alive: &dyn Fn() -> bool) -> Result<(), QueueError> {
        let mut seen = Head::from_bits(self.gseg.avalue(self.cb)?);
        let half = usize::from(seen.limit() != self.qlines);
        let lock = self.queue + layout::hstatus(half);
        let take = Instruction::gamir(lock, ImplicitOp::CLEAR, XType::DWORD);
        if self.run("taking a queue's lock", &take, alive)? == 0 {
            return Err(QueueError::Full);
        }
        let release = Instruction::gamir(lock, ImplicitOp::INC, XType::DWORD);
        if seen.head() != seen.limit() {
            // One line is left, and the message has two.
            let filler = [present::NOOP, 0, 1, 0];
            self.gseg.ds_write(self.ds as usize, &filler)?;
            match self.mesq(1, alive)? {
                None => seen.set_head(seen.head() + 1),
                // Somebody else has used it: the head word is not what was seen, and what comes next finds that out.
                Some(SubStatus::QLIMIT_REACHED) => {}
                Some(substatus) => {
                    if substatus == SubStatus::PUT_NACKED {
                        self.put(1, alive)?;
                    }
                    self.run("giving a queue's lock back", &release, alive)?;
                    return match substatus {
                        SubStatus::PUT_NACKED => Ok(()),
                        SubStatus::PAGE_OVERFLOW => Err(QueueError::PageOverflow),
                        congestion => Err(QueueError::Congestion(congestion)),
                    };
                }
            }
        }
        let next = layout::start_of_half(self.qlines, half);
        let (new, old) = (next.into_bits(), seen.into_bits());
        let switch = Instruction::gamer(self.queue + HEAD, ExplicitOp::CSWAP, new, old, XType::DWORD);
        if self.run("switching a queue's halves", &switch, alive)? != old {
            self.run("giving a queue's lock back", &release, alive)?;
        }
        Ok(())
    }
}

/// The lines of a message: header, content, and the second line's present byte (whose content is in the header).
fn image_of(message: &[u8]) -> Result<([u8; 2 * LINE_BYTES], usize), QueueError> {
    if message.len() > MAX_MESSAGE {
        return Err(QueueError::Argument {
            what: "message length",
            value: message.len() as u64,
            why: "a message has two lines at most: 124 bytes",
        });
    }
    let lines = (message.len() + HEADER).div_ceil(LINE_BYTES);
    let mut image = [0; 2 * LINE_BYTES];
    image[HEADER..HEADER + message.len()].copy_from_slice(message);
    image[header::PRESENT] = present::FULL;
    image[header::LINES] = lines as u8;
    if lines == 2 {
        image[header::PRESENT2] = image[LINE_BYTES];
        image[LINE_BYTES] = present::FULL;
    }
    Ok((image, lines))
}

/// The one receiver of a queue.
#[derive(Debug)]
pub struct Receiver<M> {
    memory: M,
    qlines: u32,
}

impl<M: QueueMemory> Receiver<M> {
    /// Receives from the queue that [`create`] wrote to `memory`. Its position is in the queue: a receiver may be dropped
    /// and made again.
    ///
    /// # Errors
    /// `Argument` when there is no queue of `bytes` bytes.
    pub fn new(memory: M, bytes: u64) -> Result<Self, QueueError> {
        check_size(bytes)?;
        let qlines = layout::qlines(bytes);
        let found = memory.load(layout::QLINES);
        if found != u64::from(qlines) {
            let (what, why) = ("lines in the queue's header", "there is no queue of this size");
            let value = found;
            return Err(QueueError::Argument { what, value, why });
        }
        Ok(Self { memory, qlines })
    }

    /// Takes the next message, if there is one: its bytes and how many they are (60 or 124, zeros where the message
    /// was shorter).
    pub fn receive(&mut self) -> Option<([u8; MAX_MESSAGE], usize)> {
        loop {
            let at = self.position();
            let first = self.memory.load(at).to_le_bytes();
            let lines = match first[header::PRESENT] {
                present::EMPTY => return None,
                present::NOOP => {
                    self.release(at, 1);
                    continue;
                }
                _ => usize::from(first[header::LINES]).clamp(1, 2),
            };
            // The second line has a present byte of its own.
            if lines == 2 && self.memory.load(at + LINE).to_le_bytes()[0] == present::EMPTY {
                return None;
            }
            let mut image = [0; 2 * LINE_BYTES];
            for (index, word) in image[..lines * LINE_BYTES].chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&self.memory.load(at + 8 * index as u64).to_le_bytes());
            }
            if lines == 2 {
                image[LINE_BYTES] = image[header::PRESENT2];
            }
            self.release(at, lines as u64);
            let mut message = [0; MAX_MESSAGE];
            message.copy_from_slice(&image[HEADER..]);
            return Some((message, lines * LINE_BYTES - HEADER));
        }
    }

    fn position(&self) -> u64 {
        let (first, end) = (
            u64::from(layout::FIRST_LINE) * LINE,
            u64::from(self.qlines) * LINE,
        );
        match self.memory.load(layout::CONSUMER) {
            at if at.is_multiple_of(LINE) && (first..end).contains(&at) => at,
            // Spoilt by somebody: begin again rather than read outside of the queue.
            _ => first,
        }
    }

    /// Empties the lines, moves on, and lets senders into a half that is behind us.
    fn release(&self, at: u64, lines: u64) {
        for line in (0..lines).rev() {
            self.memory.store(at + line * LINE, 0);
        }
        let middle = u64::from(layout::start_of_half(self.qlines, 1).head()) * LINE;
        let end = u64::from(self.qlines) * LINE;
        let next = at + lines * LINE;
        let (next, emptied) = if next >= end {
            (u64::from(layout::FIRST_LINE) * LINE, Some(1))
        } else if at < middle && next >= middle {
            (next, Some(0))
        } else {
            (next, None)
        };
        self.memory.store(layout::CONSUMER, next);
        if let Some(half) = emptied {
            self.memory.store(layout::hstatus(half), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_image_when_message_needs_two_lines_keeps_the_byte_under_the_second_mark() {
        let message: Vec<u8> = (1..=100).collect();
        let (image, lines) = image_of(&message).unwrap();
        assert_eq!(lines, 2);
        assert_eq!(image[..4], [present::FULL, message[60], 2, 0]);
        assert_eq!(image[64], present::FULL);
        assert_eq!(image[65..104], message[61..]);
        assert_eq!(image_of(&[7; 60]).unwrap().1, 1);
        assert_eq!(image_of(&[7; 61]).unwrap().1, 2);
        assert!(image_of(&[7; 125]).is_err());
    }

    #[test]
    fn test_size_when_it_is_no_queue_is_refused() {
        for bytes in [0, 64, 320, 500, 513] {
            assert!(check_size(bytes).is_err(), "{bytes}");
        }
        for bytes in [384, 512, 4096] {
            assert!(check_size(bytes).is_ok(), "{bytes}");
        }
    }
}
