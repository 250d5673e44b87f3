//! Commands. To add one: its opcode in `protos::mlx5::cmd`, its fields in `protos::mlx5::commands`, an arm in
//! [`run`], and the capability that makes drivers use it in `caps.rs`.

mod caps;
mod memory;
mod ports;
mod qp;
mod queues;
mod setup;
mod srq;

use std::sync::atomic::Ordering;

use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::commands::{Input, Output};
use protos::mlx5::{Layout, pci};

use super::hardware::Hca;
use super::memory::Port;
use super::numbers::Numbers;

pub(super) use caps::{LOG_MAX_MCG, LOG_MAX_MKEY, LOG_MAX_QP, MAX_QP_MCG};

/// What commands change and nothing else looks at.
#[derive(Debug)]
pub(super) struct Execution {
    caps: caps::Caps,
    pds: Numbers,
    xrcds: Numbers,
    uars: Numbers,
    eqns: Numbers,
    cqns: Numbers,
    qpns: Numbers,
    srqns: Numbers,
}

impl Execution {
    pub(super) fn new() -> Self {
        Self {
            caps: caps::Caps::new(),
            pds: Numbers::new(1, 1 << caps::LOG_MAX_PD),
            xrcds: Numbers::new(1, 1 << caps::LOG_MAX_XRCD),
            uars: Numbers::new(pci::FIRST_UAR, pci::END_UAR),
            eqns: Numbers::new(1, caps::MAX_EQS + 1),
            cqns: Numbers::new(1, 1 << caps::LOG_MAX_CQ),
            // QP0 and QP1 have those numbers; the first others look unlike them.
            qpns: Numbers::new(0x40, 1 << caps::LOG_MAX_QP),
            srqns: Numbers::new(1, 1 << caps::LOG_MAX_SRQ),
        }
    }

    /// Objects that live, for dumps.
    pub(super) fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "pds": self.pds.len(), "xrcds": self.xrcds.len(), "uars": self.uars.len(), "eqs": self.eqns.len(),
            "cqs": self.cqns.len(), "qps": self.qpns.len(), "srqs": self.srqns.len(),
        })
    }
}

/// An output: status OK, and room for what follows.
#[derive(Debug)]
struct Reply(Vec<u8>);

impl Reply {
    /// Nothing but the status.
    fn empty() -> Self {
        Self(vec![0; size_of::<Output>()])
    }

    /// The number of an object that was made.
    fn number(number: u32) -> Self {
        Self::of(&Output::zeroed().with(Output::NUMBER, number))
    }

    /// A whole output.
    fn of<T: Layout>(output: &T) -> Self {
        Self(output.as_bytes().to_vec())
    }

    /// With `bytes` at `offset`.
    fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        let end = offset + bytes.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[offset..end].copy_from_slice(bytes);
        self
    }
}

/// What a command comes to.
type Outcome = Result<Reply, Status>;

/// The input's bytes: length checked by whoever takes more than the head.
#[derive(Debug, Clone, Copy)]
struct Command<'a> {
    head: &'a Input,
    bytes: &'a [u8],
}

impl Command<'_> {
    fn number(&self) -> u32 {
        self.head.get(Input::NUMBER)
    }

    fn op_mod(&self) -> u16 {
        self.head.get(Input::OP_MOD) as u16
    }

    /// What stands at `offset`, all of it.
    fn layout<T: Layout>(&self, offset: usize) -> Result<T, Status> {
        let bytes = self.bytes.get(offset..).unwrap_or(&[]);
        if bytes.len() < size_of::<T>() {
            return Err(Status::BAD_INPUT_LENGTH);
        }
        Ok(T::from_prefix(bytes))
    }

    /// From `offset` to the end.
    fn rest(&self, offset: usize) -> &[u8] {
        self.bytes.get(offset..).unwrap_or(&[])
    }
}

/// Executes a command. The output has a status whatever happens, and no more than `room` bytes.
pub(super) fn execute(
    hca: &Hca,
    execution: &mut Execution,
    port: &mut Port,
    input: &[u8],
    room: usize,
) -> Vec<u8> {
    let head = Input::from_prefix(input);
    let opcode = Opcode(head.get(Input::OPCODE) as u16);
    let command = Command {
        head: &head,
        bytes: input,
    };
    hca.counters.commands.fetch_add(1, Ordering::Relaxed);
    let outcome = run(hca, execution, port, opcode, command);
    tracing::trace!(?opcode, op_mod = command.op_mod(), failed = ?outcome.as_ref().err(), "command");
    match outcome {
        Ok(mut reply) => {
            reply.0.truncate(room);
            reply.0
        }
        Err(status) => {
            hca.counters.commands_failed.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(
                ?opcode,
                op_mod = command.op_mod(),
                number = command.number(),
                ?status,
                "a command failed"
            );
            let output = Output::zeroed().with(Output::STATUS, u32::from(status.0));
            Reply::of(&output).0
        }
    }
}

fn run(
    hca: &Hca,
    execution: &mut Execution,
    port: &mut Port,
    opcode: Opcode,
    command: Command<'_>,
) -> Outcome {
    match opcode {
        Opcode::ENABLE_HCA
        | Opcode::DISABLE_HCA
        | Opcode::INIT_HCA
        | Opcode::TEARDOWN_HCA
        | Opcode::SET_ISSI
        | Opcode::NOP => setup::acknowledge(opcode, command),
        Opcode::QUERY_ISSI => setup::query_issi(),
        Opcode::QUERY_PAGES => setup::query_pages(command),
        Opcode::QUERY_ADAPTER => setup::query_adapter(),
        Opcode::QUERY_SPECIAL_CONTEXTS => setup::query_special_contexts(),
        Opcode::ACCESS_REG => setup::access_register(hca, command),
        Opcode::QUERY_HCA_CAP => execution.caps.query(command.op_mod()),
        Opcode::SET_HCA_CAP => {
            let reply = execution.caps.set(command.op_mod(), command.rest(0x10))?;
            hca.faults.choose(execution.caps.faults_by_memory());
            Ok(reply)
        }
        Opcode::ALLOC_PD => setup::allocate(&mut execution.pds),
        Opcode::DEALLOC_PD => setup::free(&mut execution.pds, command),
        Opcode::ALLOC_UAR => setup::allocate(&mut execution.uars),
        Opcode::DEALLOC_UAR => setup::free(&mut execution.uars, command),
        Opcode::ALLOC_XRCD => setup::allocate(&mut execution.xrcds),
        Opcode::DEALLOC_XRCD => setup::free(&mut execution.xrcds, command),
        Opcode::CREATE_EQ => queues::create_eq(hca, execution, command),
        Opcode::QUERY_EQ => queues::query_eq(hca, command),
        Opcode::DESTROY_EQ => queues::destroy_eq(hca, execution, command),
        Opcode::CREATE_CQ => queues::create_cq(hca, execution, command),
        Opcode::QUERY_CQ => queues::query_cq(hca, command),
        Opcode::MODIFY_CQ => queues::modify_cq(hca, port, command),
        Opcode::DESTROY_CQ => queues::destroy_cq(hca, execution, command),
        Opcode::CREATE_MKEY => memory::create_mkey(hca, execution, command),
        Opcode::QUERY_MKEY => memory::query_mkey(hca, command),
        Opcode::DESTROY_MKEY => memory::destroy_mkey(hca, command),
        Opcode::PAGE_FAULT_RESUME => memory::page_fault_resume(hca, port, command),
        Opcode::CREATE_RMP => srq::create_rmp(hca, execution, command),
        Opcode::MODIFY_RMP => srq::modify_rmp(hca, command),
        Opcode::QUERY_RMP => srq::query_rmp(hca, port, command),
        Opcode::DESTROY_RMP => srq::destroy(hca, execution, command, false),
        Opcode::CREATE_XRC_SRQ => srq::create_xrc(hca, execution, command),
        Opcode::ARM_XRC_SRQ => srq::arm_xrc(hca, command),
        Opcode::QUERY_XRC_SRQ => srq::query_xrc(hca, port, command),
        Opcode::DESTROY_XRC_SRQ => srq::destroy(hca, execution, command, true),
        Opcode::CREATE_QP => qp::create(hca, execution, command),
        Opcode::DESTROY_QP => qp::destroy(hca, execution, command),
        Opcode::QUERY_QP => qp::query(hca, command),
        Opcode::RST2INIT_QP
        | Opcode::INIT2INIT_QP
        | Opcode::INIT2RTR_QP
        | Opcode::RTR2RTS_QP
        | Opcode::RTS2RTS_QP
        | Opcode::SQERR2RTS_QP
        | Opcode::TO_ERR_QP
        | Opcode::TO_RST_QP => qp::modify(hca, opcode, command),
        Opcode::MAD_IFC => ports::mad_ifc(hca, command),
        Opcode::QUERY_HCA_VPORT_CONTEXT => ports::query_vport_context(hca),
        Opcode::ATTACH_TO_MCG => ports::multicast(hca, command, true),
        Opcode::DETACH_FROM_MCG => ports::multicast(hca, command, false),
        _ => Err(Status::BAD_OP),
    }
}
