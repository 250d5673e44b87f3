//! Two RC queue pairs of one device that are connected with each other.
#![allow(unsafe_code, reason = "calls of libibverbs")]

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::abi::{self, QpAttr, QpCap, QpInitAttr, SendWr, Sge, Wc, qp_mask};
use crate::{Buffer, Error, LinkLayer, Port, ProtectionDomain, Region};

/// Work requests that are out at once.
const DEPTH: usize = 16;
/// How long nothing may complete. A software device on a busy machine needs seconds for a few MiB.
const PATIENCE: Duration = Duration::from_secs(30);
/// READs at once, in either direction, if the device has them.
const READS: u32 = 16;
/// 4.096 us * 2^18 = 1.07 s until a packet is sent again.
const TIMEOUT: u8 = 18;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// RDMA WRITE: from local to remote memory.
    Write,
    /// RDMA READ: from remote to local memory.
    Read,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Write => "RDMA WRITE",
            Self::Read => "RDMA READ",
        }
    }
}

/// The other side's memory. Both sides are this process.
#[derive(Debug, Clone, Copy)]
pub struct Remote<'a> {
    /// The region whose key is used: of this buffer, or of everything.
    pub region: &'a Region,
    /// The memory.
    pub buffer: &'a Buffer,
}

/// One work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Offset in the local region's buffer.
    pub local: usize,
    /// Offset in the remote buffer.
    pub remote: usize,
    /// How much.
    pub length: usize,
}

/// The queue pairs, the first of which issues.
#[derive(Debug)]
pub struct Pair {
    queues: Option<Queues>,
    domain: ProtectionDomain,
}

#[derive(Debug)]
struct Queues {
    issuer: NonNull<abi::Qp>,
    answerer: NonNull<abi::Qp>,
    completions: NonNull<abi::Cq>,
}

impl Pair {
    /// Makes and connects them.
    ///
    /// # Errors
    /// A call's. (Between the states of a queue pair that is mostly an address without a way to it.)
    pub fn connect(domain: &ProtectionDomain, port: &Port, gid_index: Option<u8>) -> Result<Self, Error> {
        let context = domain.context();
        let device = context.device()?;
        let library = &context.0.library.0;
        let name = context.name();
        let depth = DEPTH.min(device.max_work_requests as usize).max(1);
        // SAFETY: an open context; no channel.
        let completions = unsafe {
            (library.create_cq)(
                context.0.raw.as_ptr(),
                depth as i32,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                0,
            )
        };
        let completions =
            NonNull::new(completions).ok_or_else(|| Error::last(format!("ibv_create_cq of {name}")))?;
        let create = || {
            let mut attributes = QpInitAttr {
                qp_context: std::ptr::null_mut(),
                send_cq: completions.as_ptr(),
                recv_cq: completions.as_ptr(),
                srq: std::ptr::null_mut(),
                cap: QpCap {
                    max_send_wr: depth as u32,
                    max_recv_wr: 1,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: 0,
                },
                qp_type: abi::QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: a protection domain and a completion queue of the same device.
            let raw = unsafe { (library.create_qp)(domain.0.raw.as_ptr(), &raw mut attributes) };
            NonNull::new(raw).ok_or_else(|| Error::last(format!("ibv_create_qp of {name}")))
        };
        let issuer = create().inspect_err(|_| {
            // SAFETY: made above, and nothing uses it.
            unsafe { (library.destroy_cq)(completions.as_ptr()) };
        })?;
        let answerer = create().inspect_err(|_| {
            // SAFETY: made above, and nothing uses it.
            unsafe { (library.destroy_qp)(issuer.as_ptr()) };
            // SAFETY: made above, and nothing uses it.
            unsafe { (library.destroy_cq)(completions.as_ptr()) };
        })?;
        let mut new = Self {
            queues: Some(Queues {
                issuer,
                answerer,
                completions,
            }),
            domain: domain.clone(),
        };
        let reads = READS
            .min(device.max_reads_asked)
            .min(device.max_reads_answered)
            .clamp(1, 255) as u8;
        new.bring_up(issuer, answerer, port, gid_index, reads)?;
        new.bring_up(answerer, issuer, port, gid_index, reads)?;
        Ok(new)
    }

    fn bring_up(
        &mut self,
        one: NonNull<abi::Qp>,
        other: NonNull<abi::Qp>,
        port: &Port,
        gid_index: Option<u8>,
        reads: u8,
    ) -> Result<(), Error> {
        let context = self.domain.context().clone();
        let modify = |step: &str, mut attributes: QpAttr, mask| {
            // SAFETY: a queue pair that exists, attributes that the mask names.
            let code = unsafe { (context.0.library.0.modify_qp)(one.as_ptr(), &raw mut attributes, mask) };
            match code {
                0 => Ok(()),
                code => Err(Error::code(
                    format!(
                        "ibv_modify_qp to {step} on port {} of {}",
                        port.number,
                        context.name()
                    ),
                    code,
                )),
            }
        };
        let init = QpAttr {
            qp_state: abi::QPS_INIT,
            qp_access_flags: abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_WRITE | abi::ACCESS_REMOTE_READ,
            port_num: port.number,
            ..QpAttr::default()
        };
        modify("INIT", init, qp_mask::TO_INIT)?;
        let mut way = abi::AhAttr {
            dlid: port.lid,
            port_num: port.number,
            ..abi::AhAttr::default()
        };
        if let Some(index) = gid_index {
            way.is_global = 1;
            way.dgid = context.gid(port.number, index)?;
            way.sgid_index = index;
            way.hop_limit = 64;
        }
        let ready = QpAttr {
            qp_state: abi::QPS_RTR,
            path_mtu: port.mtu,
            // SAFETY: a queue pair that exists.
            dest_qp_num: unsafe { (*other.as_ptr()).qp_num },
            ah_attr: way,
            max_dest_rd_atomic: reads,
            min_rnr_timer: 12,
            ..QpAttr::default()
        };
        let kind = match port.link_layer {
            LinkLayer::Ethernet => "RTR (Ethernet)",
            LinkLayer::InfiniBand => "RTR (InfiniBand)",
        };
        modify(kind, ready, qp_mask::TO_RTR)?;
        let send = QpAttr {
            qp_state: abi::QPS_RTS,
            timeout: TIMEOUT,
            retry_cnt: 7,
            rnr_retry: 7,
            max_rd_atomic: reads,
            ..QpAttr::default()
        };
        modify("RTS", send, qp_mask::TO_RTS)
    }

    /// Issues the work requests, several at once, in order, and returns when all have completed. After an error the
    /// queue pairs are gone, so that nothing writes any more.
    ///
    /// # Errors
    /// A work request failed, or nothing came.
    ///
    /// # Panics
    /// When a transfer is not in its buffers, or the local region is that of everything.
    pub fn transfer(
        &mut self,
        direction: Direction,
        local: &Region,
        remote: Remote<'_>,
        transfers: impl IntoIterator<Item = Transfer>,
    ) -> Result<(), Error> {
        let result = self.run(direction, local, remote, transfers);
        if result.is_err() {
            self.disconnect();
        }
        result
    }

    fn run(
        &mut self,
        direction: Direction,
        local: &Region,
        remote: Remote<'_>,
        transfers: impl IntoIterator<Item = Transfer>,
    ) -> Result<(), Error> {
        let queues = self.queues.as_ref().ok_or(Error::Disconnected)?;
        let name = direction.name();
        let buffer = local.buffer().expect("the local side names its memory");
        let mut transfers = transfers.into_iter();
        let mut outstanding = 0;
        let mut last = Instant::now();
        loop {
            while outstanding < DEPTH
                && let Some(transfer) = transfers.next()
            {
                self.post(queues, direction, (local, buffer), remote, transfer)?;
                outstanding += 1;
            }
            if outstanding == 0 {
                return Ok(());
            }
            let (found, wcs) = self.poll(queues)?;
            for wc in &wcs[..found] {
                if wc.status != 0 {
                    return Err(Error::Completion {
                        what: name,
                        length: wc.wr_id as usize,
                        status: self.domain.context().0.library.status_name(wc.status),
                        vendor_error: wc.vendor_err,
                    });
                }
            }
            if found > 0 {
                outstanding -= found;
                last = Instant::now();
            } else if last.elapsed() > PATIENCE {
                return Err(Error::Silent {
                    what: name,
                    seconds: PATIENCE.as_secs(),
                    outstanding,
                });
            }
        }
    }

    fn post(
        &self,
        queues: &Queues,
        direction: Direction,
        (local, buffer): (&Region, &Buffer),
        remote: Remote<'_>,
        transfer: Transfer,
    ) -> Result<(), Error> {
        let Transfer { length, .. } = transfer;
        let inside =
            |offset: usize, buffer: &Buffer| offset.checked_add(length).is_some_and(|e| e <= buffer.length());
        assert!(
            inside(transfer.local, buffer) && inside(transfer.remote, remote.buffer),
            "{transfer:?} is not in its buffers"
        );
        let mut sge = Sge {
            addr: (buffer.address() + transfer.local) as u64,
            length: u32::try_from(length).expect("a message is below 4 GiB"),
            lkey: local.lkey(),
        };
        let mut request = SendWr {
            wr_id: length as u64,
            next: std::ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
            opcode: match direction {
                Direction::Write => abi::WR_RDMA_WRITE,
                Direction::Read => abi::WR_RDMA_READ,
            },
            send_flags: abi::SEND_SIGNALED,
            imm_data: 0,
            remote_addr: (remote.buffer.address() + transfer.remote) as u64,
            rkey: remote.region.rkey(),
            rest: [0; 9],
        };
        let mut bad = std::ptr::null_mut();
        let qp = queues.issuer.as_ptr();
        // SAFETY: the queue pair exists, and its context with it.
        let post = unsafe { (*(*qp).context).ops.post_send }.expect("every provider can post");
        // SAFETY: a queue pair that is ready to send, a request that is copied before this returns. The memory is
        // that of buffers, which outlive the transfer: it ends with a completion or with the queue pair.
        let code = unsafe { post(qp, &raw mut request, &raw mut bad) };
        match code {
            0 => Ok(()),
            code => Err(Error::code(
                format!("ibv_post_send, {}", self.domain.context().name()),
                code,
            )),
        }
    }

    fn poll(&self, queues: &Queues) -> Result<(usize, [Wc; DEPTH]), Error> {
        let mut wcs = [Wc::default(); DEPTH];
        let cq = queues.completions.as_ptr();
        // SAFETY: the completion queue exists, and its context with it.
        let poll = unsafe { (*(*cq).context).ops.poll_cq }.expect("every provider can poll");
        // SAFETY: a completion queue, and places for so many completions.
        let found = unsafe { poll(cq, DEPTH as i32, wcs.as_mut_ptr()) };
        // What the device wrote before the completion is read after it.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let found = usize::try_from(found).map_err(|_| {
            Error::code(
                format!("ibv_poll_cq, {}", self.domain.context().name()),
                libc::EIO,
            )
        })?;
        assert!(found <= DEPTH, "ibv_poll_cq found {found} of {DEPTH} completions");
        Ok((found, wcs))
    }

    fn disconnect(&mut self) {
        let Some(queues) = self.queues.take() else {
            return;
        };
        let library = &self.domain.context().0.library.0;
        for qp in [queues.issuer, queues.answerer] {
            // SAFETY: it exists, and is not used again.
            let code = unsafe { (library.destroy_qp)(qp.as_ptr()) };
            // It could go on writing to memory that is somebody else's by then.
            assert_eq!(code, 0, "ibv_destroy_qp of {}", self.domain.context().name());
        }
        // SAFETY: it exists, its queue pairs are gone, and it is not used again.
        let code = unsafe { (library.destroy_cq)(queues.completions.as_ptr()) };
        if code != 0 {
            tracing::error!(code, "ibv_destroy_cq");
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.disconnect();
    }
}
