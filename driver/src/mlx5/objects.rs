//! Event queues, completion queues, memory keys.

use std::time::{Duration, Instant};

use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::{CONTEXT, CreateEq, CreateMkey, MODIFY_CQ_RESIZE, ModifyCq, Output, PAGES};
use protos::mlx5::cq::{
    Cqc, Cqe, CqeOpcode, MODIFY_COUNT, MODIFY_PERIOD, RESIZE_LOG_PAGE_SIZE, RESIZE_PAGE_OFFSET, RESIZE_SIZE,
};
use protos::mlx5::eq::{EQE_SIZE, Eqc, Eqe};
use protos::mlx5::mkey::{ANY_QP, AccessMode, Klm, Mkc};
use protos::mlx5::{Layout, uar};
use zerocopy::{FromBytes, IntoBytes};

use super::{Hca, Mlx5Error, Region};

/// How long a completion may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Pages of queues.
const PAGE: u64 = 4096;

/// An event queue.
#[derive(Debug)]
pub struct EventQueue {
    number: u32,
    region: Region,
    log_size: u32,
    consumed: u32,
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    number: u32,
    region: Region,
    record: Region,
    log_size: u32,
    consumed: u32,
    armed: u32,
}

/// A memory key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryKey {
    /// All 32 bits: lkey and rkey.
    pub key: u32,
}

/// The addresses of a region's pages.
fn pages(region: Region) -> Vec<u8> {
    (0..region.len / PAGE)
        .flat_map(|page| (region.iova + page * PAGE).to_be_bytes())
        .collect()
}

/// A command's input after its first 8 bytes: a context at `context`, pages at the end.
pub(super) fn input(head: &[u8], at: usize, context: &[u8], pages: &[u8]) -> Vec<u8> {
    let mut input = vec![0; PAGES];
    input[..head.len()].copy_from_slice(head);
    input[at..at + context.len()].copy_from_slice(context);
    input.extend_from_slice(pages);
    input.split_off(8)
}

/// The number of what a command has made.
pub(super) fn made(output: &[u8]) -> u32 {
    Output::from_prefix(output).get(Output::NUMBER)
}

/// The addresses of a queue's pages.
pub(super) fn page_list(region: Region) -> Vec<u8> {
    pages(region)
}

impl Hca {
    /// An event queue of `1 << log_size` events for these types (a bit for each), on that vector.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn event_queue(&self, log_size: u32, events: u64, vector: u32) -> Result<EventQueue, Mlx5Error> {
        let region = self.memory.take(EQE_SIZE << log_size)?;
        // The driver owns all entries: the owner bit is that of the lap before the first.
        for index in 0..1u64 << log_size {
            let mut eqe = Eqe::read_from_bytes(&[0; 64]).expect("any bytes are one");
            eqe.owner = 1;
            self.memory.write(region.iova + index * EQE_SIZE, eqe.as_bytes());
        }
        let context = Eqc::zeroed()
            .with(Eqc::LOG_SIZE, log_size)
            .with(Eqc::UAR_PAGE, self.uar)
            .with(Eqc::INTR, vector);
        let head = CreateEq::zeroed().with_wide(CreateEq::EVENTS, events);
        let input = input(&head.0, 0x10, &context.0, &pages(region));
        let number = made(&self.command(Opcode::CREATE_EQ, 0, &input, 16)?);
        Ok(EventQueue {
            number,
            region,
            log_size,
            consumed: 0,
        })
    }

    /// Asks for an interrupt with the next event.
    ///
    /// # Errors
    /// The doorbell.
    pub fn arm_events(&self, eq: &EventQueue) -> Result<(), Mlx5Error> {
        let word = uar::eq_doorbell(eq.number as u8, eq.consumed);
        self.doorbell(uar::EQ_ARM, &word.to_be_bytes())
    }

    /// The next event, if there is one.
    pub fn poll_event(&self, eq: &mut EventQueue) -> Option<Eqe> {
        let index = eq.consumed & ((1 << eq.log_size) - 1);
        let mut bytes = [0; EQE_SIZE as usize];
        self.memory
            .read(eq.region.iova + u64::from(index) * EQE_SIZE, &mut bytes);
        let eqe = Eqe::read_from_bytes(&bytes).expect("any bytes are one");
        if u32::from(eqe.owner & 1) != eq.consumed >> eq.log_size & 1 {
            return None;
        }
        eq.consumed = (eq.consumed + 1) & 0xff_ffff;
        Some(eqe)
    }

    /// A completion queue of `1 << log_size` entries.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn completion_queue(&self, log_size: u32, eq: &EventQueue) -> Result<CompletionQueue, Mlx5Error> {
        let region = self.completion_buffer(log_size)?;
        let record = self.memory.take(64)?;
        let context = Cqc::zeroed()
            .with(Cqc::LOG_SIZE, log_size)
            .with(Cqc::UAR_PAGE, self.uar)
            .with(Cqc::EQN, eq.number)
            .with_wide(Cqc::DBR_ADDR, record.iova);
        let input = input(&[], 0x10, &context.0, &pages(region));
        let number = made(&self.command(Opcode::CREATE_CQ, 0, &input, 16)?);
        Ok(CompletionQueue {
            number,
            region,
            record,
            log_size,
            consumed: 0,
            armed: 0,
        })
    }

    fn completion_buffer(&self, log_size: u32) -> Result<Region, Mlx5Error> {
        let region = self.memory.take(64 << log_size)?;
        for index in 0..1u64 << log_size {
            // Never a valid completion.
            self.memory.write(region.iova + index * 64 + 63, &[0xf1]);
        }
        Ok(region)
    }

    /// A completion queue's context as the HCA has it.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn query_completions(&self, cq: &CompletionQueue) -> Result<Cqc, Mlx5Error> {
        let mut input = cq.number.to_be_bytes().to_vec();
        input.extend([0; 4]);
        let output = self.command(Opcode::QUERY_CQ, 0, &input, PAGES)?;
        Ok(Cqc::from_prefix(&output[CONTEXT..]))
    }

    fn modify_completions(
        &self,
        cq: &CompletionQueue,
        op_mod: u16,
        fields: u32,
        context: &Cqc,
        pages: &[u8],
    ) -> Result<(), Mlx5Error> {
        let head = ModifyCq::zeroed()
            .with(ModifyCq::NUMBER, cq.number)
            .with(ModifyCq::FIELDS, fields);
        let input = input(&head.0, CONTEXT, &context.0, pages);
        self.command(Opcode::MODIFY_CQ, op_mod, &input, 16).map(drop)
    }

    /// Lets an event wait for so many completions, but no longer than so many microseconds.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn moderate_completions(
        &self,
        cq: &CompletionQueue,
        period: u32,
        count: u32,
    ) -> Result<(), Mlx5Error> {
        let context = Cqc::zeroed()
            .with(Cqc::PERIOD, period)
            .with(Cqc::MAX_COUNT, count);
        self.modify_completions(cq, 0, MODIFY_PERIOD | MODIFY_COUNT, &context, &[])
    }

    /// Gives a completion queue `1 << log_size` entries. What has not been polled moves along.
    ///
    /// # Errors
    /// What the HCA says; the queue is as before then.
    pub fn resize_completions(&self, cq: &mut CompletionQueue, log_size: u32) -> Result<(), Mlx5Error> {
        let region = self.completion_buffer(log_size)?;
        let context = Cqc::zeroed().with(Cqc::LOG_SIZE, log_size);
        let fields = RESIZE_SIZE | RESIZE_PAGE_OFFSET | RESIZE_LOG_PAGE_SIZE;
        self.modify_completions(cq, MODIFY_CQ_RESIZE, fields, &context, &pages(region))?;
        let mut index = cq.consumed;
        loop {
            if index.wrapping_sub(cq.consumed) > 1 << cq.log_size {
                return Err(Mlx5Error::Unended { cqn: cq.number });
            }
            let mut bytes = [0; 64];
            let old = u64::from(index & ((1 << cq.log_size) - 1)) * 64;
            self.memory.read(cq.region.iova + old, &mut bytes);
            if bytes[63] >> 4 == CqeOpcode::RESIZE.0 {
                break;
            }
            // The end of the old buffer has had an index of its own: everything is one further.
            index += 1;
            bytes[63] = bytes[63] & !1 | (index >> log_size & 1) as u8;
            let new = u64::from(index & ((1 << log_size) - 1)) * 64;
            self.memory.write(region.iova + new, &bytes);
        }
        cq.region = region;
        cq.log_size = log_size;
        cq.consumed = (cq.consumed + 1) & 0xff_ffff;
        self.memory
            .write(cq.record.iova + uar::DBR_CQ_CONSUMER, &cq.consumed.to_be_bytes());
        Ok(())
    }

    /// Asks for an event with the next completion.
    ///
    /// # Errors
    /// The doorbell.
    pub fn arm_completions(&self, cq: &mut CompletionQueue, solicited: bool) -> Result<(), Mlx5Error> {
        let mut word = cq.consumed | cq.armed << uar::cq_arm::SEQUENCE_SHIFT;
        if solicited {
            word |= uar::cq_arm::SOLICITED;
        }
        cq.armed = (cq.armed + 1) & 3;
        self.memory
            .write(cq.record.iova + uar::DBR_CQ_ARM, &word.to_be_bytes());
        let mut bytes = word.to_be_bytes().to_vec();
        bytes.extend(cq.number.to_be_bytes());
        self.doorbell(uar::CQ_ARM, &bytes)
    }

    /// The next completion, if there is one.
    pub fn poll_completion(&self, cq: &mut CompletionQueue) -> Option<Cqe> {
        let index = cq.consumed & ((1 << cq.log_size) - 1);
        let mut bytes = [0; 64];
        self.memory
            .read(cq.region.iova + u64::from(index) * 64, &mut bytes);
        let cqe = Cqe::read_from_bytes(&bytes).expect("any bytes are one");
        if cqe.op_own >> 4 == 0xf || u32::from(cqe.op_own & 1) != cq.consumed >> cq.log_size & 1 {
            return None;
        }
        cq.consumed = (cq.consumed + 1) & 0xff_ffff;
        self.memory
            .write(cq.record.iova + uar::DBR_CQ_CONSUMER, &cq.consumed.to_be_bytes());
        Some(cqe)
    }

    /// The next completion, waited for by polling.
    ///
    /// # Errors
    /// There is none for long.
    pub fn wait_completion(&self, cq: &mut CompletionQueue) -> Result<Cqe, Mlx5Error> {
        let begin = Instant::now();
        loop {
            if let Some(cqe) = self.poll_completion(cq) {
                return Ok(cqe);
            }
            if begin.elapsed() > LIMIT {
                return Err(Mlx5Error::Timeout {
                    what: "completion",
                    limit: LIMIT,
                });
            }
            std::thread::yield_now();
        }
    }

    /// A key for a region by its pages, at `va`, with these rights (fields of [`Mkc`]).
    ///
    /// # Errors
    /// What the HCA says.
    pub fn memory_key(
        &self,
        pd: u32,
        region: Region,
        va: u64,
        rights: &[protos::mlx5::Field<Mkc>],
    ) -> Result<MemoryKey, Mlx5Error> {
        let low = 0x5a;
        let octowords = (region.len / PAGE).div_ceil(2);
        let mut context = Mkc::zeroed()
            .with(Mkc::MODE_LOW, u32::from(AccessMode::MTT.0))
            .with(Mkc::QPN, ANY_QP)
            .with(Mkc::KEY, low)
            .with(Mkc::PD, pd)
            .with_wide(Mkc::START, va)
            .with_wide(Mkc::LENGTH, region.len)
            .with(Mkc::TRANSLATIONS, octowords as u32)
            .with(Mkc::LOG_PAGE_SIZE, PAGE.ilog2());
        for &right in rights {
            context.set(right, 1);
        }
        let head = CreateMkey::zeroed().with(CreateMkey::TRANSLATIONS_ACTUAL, octowords as u32);
        let mut list = pages(region);
        list.resize(octowords as usize * 16, 0);
        let input = input(&head.0, 0x10, &context.0, &list);
        let index = made(&self.command(Opcode::CREATE_MKEY, 0, &input, 16)?);
        Ok(MemoryKey {
            key: index << 8 | low,
        })
    }

    /// A key of `len` bytes at `va`, all of them at `inner_va` in another key.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn indirect_key(
        &self,
        pd: u32,
        inner: MemoryKey,
        inner_va: u64,
        va: u64,
        len: u32,
        rights: &[protos::mlx5::Field<Mkc>],
    ) -> Result<MemoryKey, Mlx5Error> {
        let low = 0xa5;
        let mut context = Mkc::zeroed()
            .with(Mkc::MODE_LOW, u32::from(AccessMode::KLM.0))
            .with(Mkc::QPN, ANY_QP)
            .with(Mkc::KEY, low)
            .with(Mkc::PD, pd)
            .with_wide(Mkc::START, va)
            .with_wide(Mkc::LENGTH, u64::from(len))
            .with(Mkc::TRANSLATIONS, 1);
        for &right in rights {
            context.set(right, 1);
        }
        let piece = Klm {
            byte_count: len.into(),
            key: inner.key.into(),
            va: inner_va.into(),
        };
        let head = CreateMkey::zeroed().with(CreateMkey::TRANSLATIONS_ACTUAL, 1);
        let input = input(&head.0, 0x10, &context.0, piece.as_bytes());
        let index = made(&self.command(Opcode::CREATE_MKEY, 0, &input, 16)?);
        Ok(MemoryKey {
            key: index << 8 | low,
        })
    }

    /// A free key with room for `pages` translations, for [`Hca::post_registration`].
    ///
    /// # Errors
    /// What the HCA says.
    pub fn free_key(&self, pd: u32, pages: u32) -> Result<MemoryKey, Mlx5Error> {
        let context = Mkc::zeroed()
            .with(Mkc::FREE, 1)
            .with(Mkc::UMR_ENABLE, 1)
            .with(Mkc::MODE_LOW, u32::from(AccessMode::MTT.0))
            .with(Mkc::QPN, ANY_QP)
            .with(Mkc::PD, pd)
            .with(Mkc::TRANSLATIONS, pages.div_ceil(2));
        let input = input(&CreateMkey::zeroed().0, 0x10, &context.0, &[]);
        let index = made(&self.command(Opcode::CREATE_MKEY, 0, &input, 16)?);
        Ok(MemoryKey { key: index << 8 })
    }

    /// Destroys a key: when this returns nothing is accessed through it.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn destroy_key(&self, key: MemoryKey) -> Result<(), Mlx5Error> {
        let mut input = (key.key >> 8).to_be_bytes().to_vec();
        input.extend([0; 4]);
        self.command(Opcode::DESTROY_MKEY, 0, &input, 16).map(drop)
    }
}

impl CompletionQueue {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl EventQueue {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}
