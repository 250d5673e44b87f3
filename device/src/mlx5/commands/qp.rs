//! Queue pairs.

use protos::mlx5::Layout;
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::commands::{ModifyQp, PAGES, QP_CONTEXT};
use protos::mlx5::qp::{Qpc, ReceiveQueue, ServiceType, State};

use super::caps::LOG_MAX_QP_SIZE;
use super::{Command, Execution, Outcome, Reply};
use crate::mlx5::hardware::Hca;
use crate::mlx5::qp::{LoadedWqe, Qp, Queues, changes, transition};

/// Bytes of QUERY_QP's answer without the pages.
const QUERY_OUTPUT: usize = 0x110;

pub(super) fn create(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let mut context: Qpc = command.layout(QP_CONTEXT)?;
    let service = ServiceType(context.get(Qpc::SERVICE) as u8);
    if !matches!(
        service,
        ServiceType::RC
            | ServiceType::UC
            | ServiceType::UD
            | ServiceType::XRC
            | ServiceType::QP0
            | ServiceType::QP1
            | ServiceType::REG_UMR
    ) || context.is_set(Qpc::WQ_SIGNATURE)
        || context.get(Qpc::LOG_SQ_SIZE) > LOG_MAX_QP_SIZE
        || context.get(Qpc::LOG_RQ_SIZE) > LOG_MAX_QP_SIZE
    {
        return Err(Status::BAD_PARAM);
    }
    let pd = context.get(Qpc::PD);
    // REG_UMR learns its PD with RST2INIT.
    if service != ServiceType::REG_UMR && !execution.pds.contains(pd) {
        return Err(Status::BAD_RESOURCE);
    }
    let uar_page = context.get(Qpc::UAR_PAGE);
    if !context.is_set(Qpc::NO_SQ) && !execution.uars.contains(uar_page) {
        return Err(Status::BAD_RESOURCE);
    }
    let srq = if ReceiveQueue(context.get(Qpc::RQ_TYPE) as u8) == ReceiveQueue::SHARED {
        let srq = hca.objects.srq(context.get(Qpc::SRQN));
        Some(srq.ok_or(Status::BAD_RESOURCE)?)
    } else {
        None
    };
    let queues = Queues::parse(&context, command.rest(PAGES)).ok_or(Status::BAD_PARAM)?;
    let cq = |number: u32| match number {
        0 => Ok(None),
        number => hca.objects.cq(number).map(Some).ok_or(Status::BAD_RESOURCE),
    };
    let (send_cq, receive_cq) = (
        cq(context.get(Qpc::CQN_SEND))?,
        cq(context.get(Qpc::CQN_RECEIVE))?,
    );
    let qpn = match service {
        ServiceType::QP0 | ServiceType::QP1 => {
            let qpn = u32::from(service == ServiceType::QP1);
            if hca.shard(qpn).has(qpn) {
                return Err(Status::NO_RESOURCE);
            }
            qpn
        }
        _ => execution.qpns.take().ok_or(Status::NO_RESOURCE)?,
    };
    context.set(Qpc::STATE, u32::from(State::RST.0));
    let qp = Qp {
        qpn,
        service,
        pd,
        uar_page,
        dbr: context.wide(Qpc::DBR_ADDR),
        send_cq,
        receive_cq,
        srq,
        taken_from: None,
        queues,
        received: 0,
        sent: 0,
        posted: 0,
        wqe: LoadedWqe::default(),
        context,
    };
    if let Err(status) = hca.shard(qpn).create(hca, Box::new(qp)) {
        execution.qpns.give_back(qpn);
        return Err(status);
    }
    Ok(Reply::number(qpn))
}

pub(super) fn destroy(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let qpn = command.number();
    hca.shard(qpn).destroy(hca, qpn)?;
    execution.qpns.give_back(qpn);
    Ok(Reply::empty())
}

pub(super) fn query(hca: &Hca, command: Command<'_>) -> Outcome {
    let context = hca.shard(command.number()).query(command.number())?;
    Ok(Reply::empty()
        .with(QP_CONTEXT, &context.0)
        .with(QUERY_OUTPUT - 1, &[0]))
}

pub(super) fn modify(hca: &Hca, opcode: Opcode, command: Command<'_>) -> Outcome {
    let qpn = command.number();
    let (_, target) = transition(opcode).ok_or(Status::BAD_OP)?;
    let (given, mask) = if matches!(target, State::RST | State::ERR) {
        (Qpc::zeroed(), 0)
    } else {
        let fields: ModifyQp = command.layout(0)?;
        (command.layout(QP_CONTEXT)?, fields.get(ModifyQp::OPT_PARAM_MASK))
    };
    hca.shard(qpn)
        .modify(hca, qpn, opcode, &given, changes(opcode, mask))?;
    Ok(Reply::empty())
}
