//! The command queue, by polling.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protos::mlx5::cmd::{
    Delivery, ENTRY_STATUS_OWN, Entry, INLINE, MAILBOX_DATA, Mailbox, Opcode, Status, TYPE_PCI,
};
use protos::mlx5::{iseg, pci};
use zerocopy::{FromZeros, IntoBytes};

use super::{HcaMemory, Mlx5Error, Region};
use crate::backing::Backing;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Room for mailboxes, in each direction.
const MAILBOXES: u64 = 1 << 20;

/// One command at a time, in entry 0.
#[derive(Debug)]
pub(super) struct Commands {
    backing: Arc<dyn Backing>,
    memory: Arc<HcaMemory>,
    queue: Region,
    mailboxes: [Region; 2],
    token: Mutex<u8>,
}

impl Commands {
    pub(super) fn new(backing: Arc<dyn Backing>, memory: Arc<HcaMemory>) -> Result<Self, Mlx5Error> {
        let queue = memory.take(4096)?;
        let mailboxes = [memory.take(MAILBOXES)?, memory.take(MAILBOXES)?];
        let address = queue.iova.to_be_bytes();
        for (offset, bytes) in [
            (iseg::CMDQ_ADDR_H, &address[..4]),
            (iseg::CMDQ_ADDR_L_SZ, &address[4..]),
        ] {
            backing
                .write(pci::BAR, offset, bytes)
                .map_err(Mlx5Error::io("the command queue's address"))?;
        }
        Ok(Self {
            backing,
            memory,
            queue,
            mailboxes,
            token: Mutex::new(0),
        })
    }

    /// The output, whose status is good.
    pub(super) fn execute(&self, opcode: Opcode, input: &[u8], room: usize) -> Result<Vec<u8>, Mlx5Error> {
        let mut token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        *token = token.wrapping_add(1);
        let mut entry = Entry::new_zeroed();
        entry.kind = TYPE_PCI;
        entry.token = *token;
        entry.inlen = (input.len() as u32).into();
        entry.outlen = (room as u32).into();
        let (head, rest) = input.split_at(input.len().min(INLINE));
        entry.input[..head.len()].copy_from_slice(head);
        entry.in_ptr = self.chain(0, rest, rest.len(), *token)?.into();
        entry.out_ptr = self.chain(1, &[], room.saturating_sub(INLINE), *token)?.into();
        entry.status_own = 1;
        self.memory.write(self.queue.iova, entry.as_bytes());
        self.backing
            .write(pci::BAR, iseg::CMD_DOORBELL, &1u32.to_be_bytes())
            .map_err(Mlx5Error::io("the command doorbell"))?;
        let begin = Instant::now();
        let status = loop {
            let mut status = [0];
            self.memory.read(self.queue.iova + ENTRY_STATUS_OWN, &mut status);
            if status[0] & 1 == 0 {
                break status[0] >> 1;
            }
            if begin.elapsed() > LIMIT {
                return Err(Mlx5Error::Timeout {
                    what: "answer to a command",
                    limit: LIMIT,
                });
            }
            std::thread::yield_now();
        };
        if Delivery(status) != Delivery::OK {
            return Err(Mlx5Error::NotDelivered {
                opcode,
                delivery: Delivery(status),
            });
        }
        let output = self.collect(room);
        match Status(output[0]) {
            Status::OK => Ok(output),
            status => Err(Mlx5Error::Refused { opcode, status }),
        }
    }

    /// Mailboxes for `len` bytes, the first of them `data`; the first one's IOVA.
    fn chain(&self, direction: usize, data: &[u8], len: usize, token: u8) -> Result<u64, Mlx5Error> {
        if len == 0 {
            return Ok(0);
        }
        let region = self.mailboxes[direction];
        let count = len.div_ceil(MAILBOX_DATA);
        // Mailboxes are aligned to 1 KiB.
        let place = |index: usize| region.iova + index as u64 * 1024;
        if count as u64 * 1024 > region.len {
            return Err(Mlx5Error::NoMemory {
                wanted: count as u64 * 1024,
                left: region.len,
            });
        }
        for index in 0..count {
            let mut mailbox = Mailbox::new_zeroed();
            let from = data.len().min(index * MAILBOX_DATA);
            let to = data.len().min(from + MAILBOX_DATA);
            mailbox.data[..to - from].copy_from_slice(&data[from..to]);
            mailbox.block_num = (index as u32).into();
            mailbox.token = token;
            mailbox.next = if index + 1 < count { place(index + 1) } else { 0 }.into();
            self.memory.write(place(index), mailbox.as_bytes());
        }
        Ok(place(0))
    }

    fn collect(&self, room: usize) -> Vec<u8> {
        let mut output = vec![0; room];
        let (head, rest) = output.split_at_mut(room.min(INLINE));
        self.memory
            .read(self.queue.iova + protos::mlx5::cmd::ENTRY_OUTPUT, head);
        for (index, piece) in rest.chunks_mut(MAILBOX_DATA).enumerate() {
            self.memory
                .read(self.mailboxes[1].iova + index as u64 * 1024, piece);
        }
        output
    }
}
