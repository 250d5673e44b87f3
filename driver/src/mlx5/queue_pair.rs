//! Queue pairs: made, connected, posted to.

use protos::mlx5::cmd::Opcode;
use protos::mlx5::commands::{ModifyQp, QP_CONTEXT};
use protos::mlx5::mkey::Mkc;
use protos::mlx5::qp::{Ads, PRIMARY_PATH, Qpc, ServiceType, opt};
use protos::mlx5::wqe::{
    self, AV_EXTENDED, AddressVector, Atomic, BLOCK, CE_ALWAYS, Control, Data, RemoteAddress, SEGMENT,
    UMR_INLINE, UmrControl, Xrc,
};
use protos::mlx5::{Layout, uar};
use zerocopy::{FromZeros, IntoBytes};

use super::objects::{input, made, page_list};
use super::{CompletionQueue, Hca, MemoryKey, Mlx5Error, Region};

/// Kind of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagram.
    Ud,
    /// Extended reliable connection, sending half: [`Hca::post_xrc_send`].
    XrcInitiator,
    /// Extended reliable connection, receiving half ([`Hca::xrc_target`]).
    XrcTarget,
}

/// A queue pair with queues of its own.
#[derive(Debug)]
pub struct QueuePair {
    number: u32,
    service: Service,
    region: Region,
    record: Region,
    log_entries: u32,
    sent: u16,
    received: u16,
}

/// What a queue pair is connected with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// The other one.
    pub qpn: u32,
    /// Its port.
    pub lid: u16,
    /// Retries without an answer, and after receiver-not-ready.
    pub retries: u8,
    /// IB code of the ACK timeout.
    pub timeout: u8,
}

/// What can be posted to a send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendRequest {
    /// SEND, with immediate data or without.
    Send(Option<u32>),
    /// SEND to a datagram queue pair: number, LID, Q_Key.
    Datagram(u32, u16, u32),
    /// RDMA WRITE to address and key.
    Write(u64, u32),
    /// RDMA READ.
    Read(u64, u32),
    /// Fetch and add.
    FetchAdd(u64, u32, u64),
    /// Compare and swap: compare, swap.
    CompareSwap(u64, u32, u64, u64),
}

/// Logarithm of a receive WQE's bytes.
const LOG_RECEIVE: u32 = 4;
/// Q_Key of datagram queue pairs.
const Q_KEY: u32 = 0x1111;

impl QueuePair {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Hca {
    /// A queue pair of `1 << log_entries` requests in each direction, in RESET.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn queue_pair(
        &self,
        service: Service,
        pd: u32,
        log_entries: u32,
        send: &CompletionQueue,
        receive: &CompletionQueue,
    ) -> Result<QueuePair, Mlx5Error> {
        let blocks = log_entries + 1;
        let bytes = (1u64 << (log_entries + LOG_RECEIVE)) + ((BLOCK as u64) << blocks);
        let region = self.memory.take(bytes)?;
        let record = self.memory.take(64)?;
        let context = Qpc::zeroed()
            .with(Qpc::PD, pd)
            .with(Qpc::LOG_RQ_SIZE, log_entries)
            .with(Qpc::LOG_RQ_STRIDE, LOG_RECEIVE - 4)
            .with(Qpc::LOG_SQ_SIZE, blocks)
            .with(Qpc::UAR_PAGE, self.uar)
            .with(Qpc::CQN_SEND, send.number())
            .with(Qpc::CQN_RECEIVE, receive.number())
            .with_wide(Qpc::DBR_ADDR, record.iova);
        self.make(service, context, region, record, log_entries)
    }

    /// CREATE_QP and the way to INIT.
    pub(super) fn make(
        &self,
        service: Service,
        context: Qpc,
        region: Region,
        record: Region,
        log_entries: u32,
    ) -> Result<QueuePair, Mlx5Error> {
        let code = match service {
            Service::Rc => ServiceType::RC,
            Service::Uc => ServiceType::UC,
            Service::Ud => ServiceType::UD,
            Service::XrcInitiator | Service::XrcTarget => ServiceType::XRC,
        };
        let context = context.with(Qpc::SERVICE, u32::from(code.0));
        let input = input(&[], QP_CONTEXT, &context.0, &page_list(region));
        let number = made(&self.command(Opcode::CREATE_QP, 0, &input, 16)?);
        let mut qp = QueuePair {
            number,
            service,
            region,
            record,
            log_entries,
            sent: 0,
            received: 0,
        };
        let context = context
            .with(Qpc::RRE, 1)
            .with(Qpc::RWE, 1)
            .with(Qpc::RAE, 1)
            .with(Qpc::Q_KEY, Q_KEY);
        let path = Ads::zeroed().with(Ads::PORT, 1);
        self.transition(&mut qp, Opcode::RST2INIT_QP, context, &path, 0)?;
        Ok(qp)
    }

    fn transition(
        &self,
        qp: &mut QueuePair,
        opcode: Opcode,
        mut context: Qpc,
        path: &Ads,
        mask: u32,
    ) -> Result<(), Mlx5Error> {
        context.0[PRIMARY_PATH..PRIMARY_PATH + size_of::<Ads>()].copy_from_slice(&path.0);
        let mut head = ModifyQp::zeroed().with(ModifyQp::OPT_PARAM_MASK, mask);
        head.0[8..12].copy_from_slice(&qp.number.to_be_bytes());
        let input = input(&head.0, QP_CONTEXT, &context.0, &[]);
        self.command(opcode, 0, &input, 16).map(drop)
    }

    /// INIT to ready to send.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn connect(&self, qp: &mut QueuePair, to: Connection) -> Result<(), Mlx5Error> {
        let path = Ads::zeroed()
            .with(Ads::PORT, 1)
            .with(Ads::RLID, u32::from(to.lid));
        let context = Qpc::zeroed()
            .with(Qpc::MTU, 5)
            .with(Qpc::LOG_MSG_MAX, 30)
            .with(Qpc::REMOTE_QPN, to.qpn)
            .with(Qpc::LOG_RRA_MAX, 2)
            .with(Qpc::MIN_RNR_NAK, 1);
        self.transition(qp, Opcode::INIT2RTR_QP, context, &path, 0)?;
        let path = Ads::zeroed().with(Ads::ACK_TIMEOUT, u32::from(to.timeout));
        let context = Qpc::zeroed()
            .with(Qpc::LOG_SRA_MAX, 2)
            .with(Qpc::RETRY_COUNT, u32::from(to.retries))
            .with(Qpc::RNR_RETRY, u32::from(to.retries));
        self.transition(qp, Opcode::RTR2RTS_QP, context, &path, opt::RNR_TIMEOUT)
    }

    /// The context as the HCA has it.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn query(&self, qp: &QueuePair) -> Result<Qpc, Mlx5Error> {
        let mut input = qp.number.to_be_bytes().to_vec();
        input.extend([0; 4]);
        let output = self.command(Opcode::QUERY_QP, 0, &input, 0x110)?;
        Ok(Qpc::from_prefix(&output[QP_CONTEXT..]))
    }

    /// Destroys a queue pair.
    ///
    /// # Errors
    /// What the HCA says.
    pub fn destroy_queue_pair(&self, qp: QueuePair) -> Result<(), Mlx5Error> {
        let mut input = qp.number.to_be_bytes().to_vec();
        input.extend([0; 4]);
        self.command(Opcode::DESTROY_QP, 0, &input, 16).map(drop)
    }

    /// Posts a receive request.
    pub fn post_receive(&self, qp: &mut QueuePair, key: MemoryKey, va: u64, len: u32) {
        let index = u64::from(qp.received) & ((1 << qp.log_entries) - 1);
        let data = data(key, va, len);
        self.memory
            .write(qp.region.iova + (index << LOG_RECEIVE), data.as_bytes());
        qp.received = qp.received.wrapping_add(1);
        self.memory.write(
            qp.record.iova + uar::DBR_RECEIVE,
            &u32::from(qp.received).to_be_bytes(),
        );
    }

    /// Posts a send request of one piece of local memory and rings. A completion is always wanted. The index that the
    /// completion will carry.
    ///
    /// # Errors
    /// The doorbell.
    pub fn post_send(
        &self,
        qp: &mut QueuePair,
        request: SendRequest,
        key: MemoryKey,
        va: u64,
        len: u32,
    ) -> Result<u16, Mlx5Error> {
        self.post_request(qp, Vec::new(), request, data(key, va, len))
    }

    /// As [`Hca::post_send`], on an XRC initiator: the shared receive queue there is named by each request.
    ///
    /// # Errors
    /// The doorbell.
    pub fn post_xrc_send(
        &self,
        qp: &mut QueuePair,
        srqn: u32,
        request: SendRequest,
        key: MemoryKey,
        va: u64,
        len: u32,
    ) -> Result<u16, Mlx5Error> {
        let mut xrc = Xrc::new_zeroed();
        xrc.srqn = srqn.into();
        self.post_request(qp, xrc.as_bytes().to_vec(), request, data(key, va, len))
    }

    /// `body` is what comes before the segments of the request.
    fn post_request(
        &self,
        qp: &mut QueuePair,
        mut body: Vec<u8>,
        request: SendRequest,
        local: Data,
    ) -> Result<u16, Mlx5Error> {
        let mut imm = 0;
        let opcode = match request {
            SendRequest::Send(None) => wqe::Opcode::SEND,
            SendRequest::Send(Some(value)) => {
                imm = value;
                wqe::Opcode::SEND_IMM
            }
            SendRequest::Datagram(number, lid, qkey) => {
                let mut av = AddressVector::new_zeroed();
                av.qkey = qkey.into();
                av.dqp = (number | AV_EXTENDED).into();
                av.rlid = lid.into();
                body.extend_from_slice(av.as_bytes());
                wqe::Opcode::SEND
            }
            SendRequest::Write(at, rkey) => {
                body.extend_from_slice(remote(at, rkey).as_bytes());
                wqe::Opcode::RDMA_WRITE
            }
            SendRequest::Read(at, rkey) => {
                body.extend_from_slice(remote(at, rkey).as_bytes());
                wqe::Opcode::RDMA_READ
            }
            SendRequest::FetchAdd(at, rkey, add) => {
                body.extend_from_slice(remote(at, rkey).as_bytes());
                body.extend_from_slice(operands(add, 0).as_bytes());
                wqe::Opcode::ATOMIC_FA
            }
            SendRequest::CompareSwap(at, rkey, compare, swap) => {
                body.extend_from_slice(remote(at, rkey).as_bytes());
                body.extend_from_slice(operands(swap, compare).as_bytes());
                wqe::Opcode::ATOMIC_CS
            }
        };
        body.extend_from_slice(local.as_bytes());
        self.post(qp, opcode, imm, &body)
    }

    /// Posts a UMR that changes the key of this index: the mask and the new values, and translations in the request
    /// itself. A completion is always wanted.
    ///
    /// # Errors
    /// The doorbell.
    pub fn post_registration(
        &self,
        qp: &mut QueuePair,
        key: MemoryKey,
        mask: u64,
        values: &Mkc,
        pages: &[u64],
    ) -> Result<u16, Mlx5Error> {
        let mut table: Vec<u8> = pages.iter().flat_map(|page| page.to_be_bytes()).collect();
        table.resize(table.len().next_multiple_of(BLOCK), 0);
        let mut umr = UmrControl::new_zeroed();
        umr.flags = UMR_INLINE;
        umr.xlt_octowords = ((table.len() / SEGMENT) as u16).into();
        umr.mkey_mask = mask.into();
        let body = [umr.as_bytes(), &values.0, &table].concat();
        self.post(qp, wqe::Opcode::UMR, key.key, &body)
    }

    fn post(&self, qp: &mut QueuePair, opcode: wqe::Opcode, imm: u32, body: &[u8]) -> Result<u16, Mlx5Error> {
        let index = qp.sent;
        let segments = 1 + body.len() / SEGMENT;
        let mut control = Control::new(opcode, index, qp.number, segments as u8);
        control.fm_ce_se = CE_ALWAYS;
        control.imm = imm.into();
        let mut bytes = control.as_bytes().to_vec();
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let begin = qp.region.iova + (1u64 << (qp.log_entries + LOG_RECEIVE));
        let mask = (1u64 << (qp.log_entries + 1)) - 1;
        for (number, block) in bytes.chunks(BLOCK).enumerate() {
            let place = (u64::from(index) + number as u64) & mask;
            self.memory.write(begin + place * BLOCK as u64, block);
        }
        qp.sent = index.wrapping_add((bytes.len() / BLOCK) as u16);
        self.memory
            .write(qp.record.iova + uar::DBR_SEND, &u32::from(qp.sent).to_be_bytes());
        self.doorbell(uar::SQ, &bytes[..8])?;
        Ok(index)
    }

    /// The Q_Key of the datagram queue pairs that this driver makes.
    #[must_use]
    pub fn q_key(&self, qp: &QueuePair) -> Option<u32> {
        (qp.service == Service::Ud).then_some(Q_KEY)
    }
}

pub(super) fn data(key: MemoryKey, va: u64, len: u32) -> Data {
    Data {
        byte_count: len.into(),
        lkey: key.key.into(),
        address: va.into(),
    }
}

fn remote(at: u64, rkey: u32) -> RemoteAddress {
    RemoteAddress {
        address: at.into(),
        rkey: rkey.into(),
        reserved: 0.into(),
    }
}

fn operands(swap_add: u64, compare: u64) -> Atomic {
    Atomic {
        swap_add: swap_add.into(),
        compare: compare.into(),
    }
}
