//! Shared receive queues.

use std::sync::Arc;

use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::{CONTEXT, Input, ModifyRmp, PAGES, RMP_CONTEXT};
use protos::mlx5::srq::{MODIFY_RMP_LWM, RMP_READY, Rmpc, XrcSrqc};

use super::caps::{LOG_MAX_SRQ_SIZE, MAX_RECEIVE_WQE};
use super::{Command, Execution, Outcome, Reply};
use crate::mlx5::buffer::Buffer;
use crate::mlx5::hardware::Hca;
use crate::mlx5::memory::Port;
use crate::mlx5::srq::{Context, Srq};

/// Smallest WQE of a list: the next segment and one more.
const MIN_STRIDE: u32 = 5;

fn stride(log: u32) -> Result<u32, Status> {
    if (MIN_STRIDE..=MAX_RECEIVE_WQE.ilog2()).contains(&log) {
        Ok(log)
    } else {
        Err(Status::BAD_PARAM)
    }
}

pub(super) fn create_rmp(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let context: Rmpc = command.layout(RMP_CONTEXT)?;
    let log_size = context.get(Rmpc::LOG_SIZE);
    let pd = context.get(Rmpc::PD);
    if log_size > LOG_MAX_SRQ_SIZE || context.is_set(Rmpc::BASIC_CYCLIC) || context.is_set(Rmpc::WQ_SIGNATURE)
    {
        return Err(Status::BAD_PARAM);
    }
    if !execution.pds.contains(pd) {
        return Err(Status::BAD_RESOURCE);
    }
    let stride = stride(context.get(Rmpc::LOG_STRIDE))?;
    let buffer = Buffer::parse(
        command.rest(PAGES),
        context.get(Rmpc::LOG_PAGE_SIZE),
        context.get(Rmpc::PAGE_OFFSET),
        1 << (log_size + stride),
    )
    .ok_or(Status::BAD_PARAM)?;
    let srqn = execution.srqns.take().ok_or(Status::NO_RESOURCE)?;
    let (dbr, limit) = (context.wide(Rmpc::DBR_ADDR), context.get(Rmpc::LWM) as u16);
    let context = Context::Pool(Box::new(context));
    let srq = Srq::new(srqn, pd, None, context, log_size, stride, buffer, dbr, limit);
    hca.objects.insert_srq(srqn, Arc::new(srq));
    Ok(Reply::number(srqn))
}

fn find(hca: &Hca, command: Command<'_>) -> Result<Arc<Srq>, Status> {
    hca.objects.srq(command.number()).ok_or(Status::BAD_RESOURCE)
}

pub(super) fn modify_rmp(hca: &Hca, command: Command<'_>) -> Outcome {
    let srq = find(hca, command)?;
    let modify: ModifyRmp = command.layout(0)?;
    let context: Rmpc = command.layout(RMP_CONTEXT)?;
    if modify.wide(ModifyRmp::MASK) & MODIFY_RMP_LWM != 0 {
        srq.set_limit(context.get(Rmpc::LWM) as u16);
    }
    Ok(Reply::empty())
}

pub(super) fn query_rmp(hca: &Hca, port: &mut Port, command: Command<'_>) -> Outcome {
    let srq = find(hca, command)?;
    let Context::Pool(context) = &srq.context else {
        return Err(Status::BAD_RESOURCE);
    };
    let mut context = Rmpc::clone(context);
    context.set(Rmpc::STATE, RMP_READY);
    context.set(Rmpc::LWM, u32::from(srq.limit()));
    context.set(Rmpc::SW_COUNTER, u32::from(srq.available(port)));
    Ok(Reply::empty().with(RMP_CONTEXT, &context.0))
}

pub(super) fn create_xrc(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let context: XrcSrqc = command.layout(CONTEXT)?;
    let log_size = context.get(XrcSrqc::LOG_SIZE);
    let (pd, xrcd, cqn) = (
        context.get(XrcSrqc::PD),
        context.get(XrcSrqc::XRCD),
        context.get(XrcSrqc::CQN),
    );
    if log_size > LOG_MAX_SRQ_SIZE || context.is_set(XrcSrqc::WQ_SIGNATURE) {
        return Err(Status::BAD_PARAM);
    }
    if !execution.pds.contains(pd) || !execution.xrcds.contains(xrcd) || hca.objects.cq(cqn).is_none() {
        return Err(Status::BAD_RESOURCE);
    }
    let stride = stride(context.get(XrcSrqc::LOG_STRIDE) + 4)?;
    let buffer = Buffer::parse(
        command.rest(PAGES),
        context.get(XrcSrqc::LOG_PAGE_SIZE),
        context.get(XrcSrqc::PAGE_OFFSET),
        1 << (log_size + stride),
    )
    .ok_or(Status::BAD_PARAM)?;
    let srqn = execution.srqns.take().ok_or(Status::NO_RESOURCE)?;
    let (dbr, limit) = (context.wide(XrcSrqc::DBR_ADDR), context.get(XrcSrqc::LWM) as u16);
    let context = Context::Xrc(Box::new(context));
    let srq = Srq::new(
        srqn,
        pd,
        Some((xrcd, cqn)),
        context,
        log_size,
        stride,
        buffer,
        dbr,
        limit,
    );
    hca.objects.insert_srq(srqn, Arc::new(srq));
    Ok(Reply::number(srqn))
}

pub(super) fn arm_xrc(hca: &Hca, command: Command<'_>) -> Outcome {
    let srq = find(hca, command)?;
    srq.set_limit(command.head.get(Input::SECOND) as u16);
    Ok(Reply::empty())
}

pub(super) fn query_xrc(hca: &Hca, port: &mut Port, command: Command<'_>) -> Outcome {
    let srq = find(hca, command)?;
    let Context::Xrc(context) = &srq.context else {
        return Err(Status::BAD_RESOURCE);
    };
    let mut context = XrcSrqc::clone(context);
    context.set(XrcSrqc::LWM, u32::from(srq.limit()));
    context.set(XrcSrqc::WQE_COUNT, u32::from(srq.available(port)));
    Ok(Reply::empty().with(CONTEXT, &context.0))
}

pub(super) fn destroy(hca: &Hca, execution: &mut Execution, command: Command<'_>, xrc: bool) -> Outcome {
    let srq = find(hca, command)?;
    if srq.xrc.is_some() != xrc {
        return Err(Status::BAD_RESOURCE);
    }
    hca.objects.remove_srq(srq.srqn);
    srq.destroy();
    execution.srqns.give_back(srq.srqn);
    Ok(Reply::empty())
}
