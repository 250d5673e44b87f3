//! A message queue in user memory, filled by MESQ as the driver's library does it (reference section 10).

use anyhow::{Result, bail, ensure};
use protos::gru::cb::{ExplicitOp, ImplicitOp, Instruction, SubStatus, XType};
use protos::gru::message_queue::{self as layout, Head, header, present};

use crate::driver::Gseg;
use crate::issue::End;
use crate::memory::{PAGE, Region};

/// Bytes of the queue: one-line messages, four of them.
const BYTES: usize = 512;
/// MESQ instructions of the test, about.
pub const MESSAGES: u64 = 40;

#[derive(Debug, PartialEq, Eq)]
enum Sent {
    Yes,
    Full,
}

struct Queue<'a> {
    gseg: &'a Gseg<'a>,
    memory: Region,
    qlines: u32,
    /// Where the receiver looks.
    next: u32,
}

/// Fills it, empties it, and again, so that both halves are used and switched.
pub fn test(gseg: &Gseg<'_>) -> Result<()> {
    let memory = Region::anonymous(PAGE)?;
    let qlines = layout::qlines(BYTES as u64);
    memory.store(0, layout::start_of_half(qlines, 0).into_bits());
    memory.store(layout::QLINES as usize, u64::from(qlines));
    memory.store(layout::hstatus(0) as usize, 0);
    memory.store(layout::hstatus(1) as usize, 1);
    let mut queue = Queue {
        gseg,
        memory,
        qlines,
        next: layout::FIRST_LINE,
    };
    for round in 0..5u64 {
        for number in 0..4 {
            let sent = queue.send(round << 8 | number)?;
            ensure!(
                sent == Sent::Yes,
                "round {round}: message {number} of 4 finds a full queue"
            );
        }
        let sent = queue.send(0xdead)?;
        ensure!(
            sent == Sent::Full,
            "round {round}: a fifth message fits into a queue of four"
        );
        for number in 0..4 {
            let got = queue.receive();
            ensure!(
                got == Some(round << 8 | number),
                "round {round}: message {number} is {got:x?}"
            );
        }
        ensure!(
            queue.receive().is_none(),
            "round {round}: a message that nobody has sent"
        );
    }
    Ok(())
}

impl Queue<'_> {
    fn send(&self, value: u64) -> Result<Sent> {
        let word = u64::from(present::FULL) << (8 * header::PRESENT) | 1 << (8 * header::LINES);
        self.gseg
            .write_ds(0, &[word, value, !value, value, value, value, value, !value]);
        for _ in 0..100 {
            match self.gseg.run(0, &Instruction::mesq(self.memory.va(0), 0, 1))? {
                End::Done(_) => return Ok(Sent::Yes),
                End::Exception { control, detail } => match control.substatus() {
                    SubStatus::LB_OVERFLOWED | SubStatus::AMO_NACKED => {}
                    SubStatus::QLIMIT_REACHED => {
                        if !self.switch(Head::from_bits(self.gseg.load(self.gseg.cb(0) + 0x38)))? {
                            return Ok(Sent::Full);
                        }
                    }
                    SubStatus::PUT_NACKED => {
                        let head = Head::from_bits(self.gseg.load(self.gseg.cb(0) + 0x38)).head();
                        let line = self.memory.va(64 * head as usize);
                        self.run(&Instruction::vstore(line, 0, XType::CACHE_LINE, 1, 1))?;
                        return Ok(Sent::Yes);
                    }
                    other => bail!("{other:?}, {detail:?}"),
                },
            }
        }
        bail!("a hundred tries were not enough to send a message")
    }

    /// To the other half, if the receiver has given it free. (The half is full: no filler is needed.)
    fn switch(&self, full: Head) -> Result<bool> {
        ensure!(
            full.head() == full.limit(),
            "one-line messages leave no room: {full:?}"
        );
        let half = usize::from(full.limit() != self.qlines);
        let lock = self.memory.va(layout::hstatus(half) as usize);
        if self.run(&Instruction::gamir(lock, ImplicitOp::CLEAR, XType::DWORD))? == 0 {
            return Ok(false);
        }
        let (new, old) = (
            layout::start_of_half(self.qlines, half).into_bits(),
            full.into_bits(),
        );
        let swap = Instruction::gamer(self.memory.va(0), ExplicitOp::CSWAP, new, old, XType::DWORD);
        let found = self.run(&swap)?;
        ensure!(
            found == old,
            "nobody else sends, and the head word is {found:#x}, not {old:#x}"
        );
        Ok(true)
    }

    fn run(&self, instruction: &Instruction) -> Result<u64> {
        self.gseg.run(1, instruction)?.done()
    }

    /// The next message's value; the line is given free, and with the last one of a half the half.
    fn receive(&mut self) -> Option<u64> {
        let at = 64 * self.next as usize;
        let word = self.memory.load(at);
        if word as u8 != present::FULL {
            return None;
        }
        let value = self.memory.load(at + 8);
        assert!(
            self.memory.load(at + 16) == !value && self.memory.load(at + 56) == !value,
            "the message's line is torn"
        );
        self.memory.store(at, word & !0xff);
        let middle = self.qlines / 2 + 1;
        self.next += 1;
        if self.next == middle {
            self.memory.store(layout::hstatus(0) as usize, 1);
        } else if self.next == self.qlines {
            self.next = layout::FIRST_LINE;
            self.memory.store(layout::hstatus(1) as usize, 1);
        }
        Some(value)
    }
}
