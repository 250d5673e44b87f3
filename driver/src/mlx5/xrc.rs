//! Extended reliable connections: domains, their shared receive queues, targets.

use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::CONTEXT;
use protos::mlx5::qp::{Qpc, ReceiveQueue};
use protos::mlx5::srq::{NextSegment, XrcSrqc};
use protos::mlx5::{Layout, uar};
use zerocopy::{FromZeros, IntoBytes};

use super::objects::{input, made, page_list};
use super::queue_pair::data;
use super::{CompletionQueue, Hca, MemoryKey, Mlx5Error, QueuePair, Region, Service};

/// Logarithm of a receive WQE's bytes: the next segment and one piece of data.
const LOG_STRIDE: u32 = 5;

/// A shared receive queue that XRC targets of its domain take from.
#[derive(Debug)]
pub struct XrcReceiveQueue {
    number: u32,
    region: Region,
    record: Region,
    log_entries: u32,
    posted: u16,
}

impl XrcReceiveQueue {
    /// Its number, which requests name.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Hca {
    /// An XRC domain.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn xrc_domain(&self) -> Result<u32, Mlx5Error> {
        self.number(Opcode::ALLOC_XRCD)
    }

    /// A shared receive queue of `1 << log_entries` requests, whose completions go to `cq`.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn xrc_receive_queue(
        &self,
        domain: u32,
        pd: u32,
        log_entries: u32,
        cq: &CompletionQueue,
    ) -> Result<XrcReceiveQueue, Mlx5Error> {
        let region = self.memory.take(1 << (log_entries + LOG_STRIDE))?;
        let record = self.memory.take(64)?;
        for index in 0..1u64 << log_entries {
            // A ring: requests are posted in the order in which they are taken.
            let mut next = NextSegment::new_zeroed();
            next.next = (((index + 1) & ((1 << log_entries) - 1)) as u16).into();
            self.memory
                .write(region.iova + (index << LOG_STRIDE), next.as_bytes());
        }
        let context = XrcSrqc::zeroed()
            .with(XrcSrqc::LOG_SIZE, log_entries)
            .with(XrcSrqc::LOG_STRIDE, LOG_STRIDE - 4)
            .with(XrcSrqc::XRCD, domain)
            .with(XrcSrqc::CQN, cq.number())
            .with(XrcSrqc::PD, pd)
            .with_wide(XrcSrqc::DBR_ADDR, record.iova);
        let input = input(&[], CONTEXT, &context.0, &page_list(region));
        let number = made(&self.command(Opcode::CREATE_XRC_SRQ, 0, &input, 16)?);
        Ok(XrcReceiveQueue {
            number,
            region,
            record,
            log_entries,
            posted: 0,
        })
    }

    /// Posts a receive request.
    pub fn post_shared_receive(&self, srq: &mut XrcReceiveQueue, key: MemoryKey, va: u64, len: u32) {
        let index = u64::from(srq.posted) & ((1 << srq.log_entries) - 1);
        let place = srq.region.iova + (index << LOG_STRIDE) + size_of::<NextSegment>() as u64;
        self.memory.write(place, data(key, va, len).as_bytes());
        srq.posted = srq.posted.wrapping_add(1);
        self.memory.write(
            srq.record.iova + uar::DBR_RECEIVE,
            &u32::from(srq.posted).to_be_bytes(),
        );
    }

    /// The receiving half of a connection, in INIT. As the kernel's driver makes it: it has neither queues nor a
    /// doorbell record nor a completion queue, and its protection domain is the driver's own.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn xrc_target(&self, domain: u32, pd: u32, srq: &XrcReceiveQueue) -> Result<QueuePair, Mlx5Error> {
        let context = Qpc::zeroed()
            .with(Qpc::PD, pd)
            .with(Qpc::XRCD, domain)
            .with(Qpc::NO_SQ, 1)
            .with(Qpc::RQ_TYPE, u32::from(ReceiveQueue::SHARED.0))
            .with(Qpc::SRQN, srq.number);
        let none = Region { iova: 0, len: 0 };
        self.make(Service::XrcTarget, context, none, none, 0)
    }
}
