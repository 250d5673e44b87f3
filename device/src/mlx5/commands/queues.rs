//! Event and completion queues.

use std::sync::Arc;

use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::{CONTEXT, CreateEq, MODIFY_CQ_RESIZE, ModifyCq, PAGES};
use protos::mlx5::cq::{
    CQE_PADDED, Cqc, MODIFY_COUNT, MODIFY_PERIOD, RESIZE_LOG_PAGE_SIZE, RESIZE_PAGE_OFFSET, RESIZE_SIZE,
};
use protos::mlx5::eq::{EQE_SIZE, Eqc, Event};

use super::caps::{LOG_MAX_CQ_SIZE, LOG_MAX_EQ_SIZE};
use super::{Command, Execution, Outcome, Reply};
use crate::mlx5::buffer::Buffer;
use crate::mlx5::cq::{Cq, ResizeError, entry_shift};
use crate::mlx5::eq::Eq;
use crate::mlx5::hardware::Hca;
use crate::mlx5::memory::Port;

/// Where the events are in QUERY_EQ's answer.
const QUERY_EQ_EVENTS: usize = 0x58;

pub(super) fn create_eq(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let events: CreateEq = command.layout(0)?;
    let context: Eqc = command.layout(CONTEXT)?;
    let log_size = context.get(Eqc::LOG_SIZE);
    if log_size > LOG_MAX_EQ_SIZE || !execution.uars.contains(context.get(Eqc::UAR_PAGE)) {
        return Err(Status::BAD_PARAM);
    }
    if context.get(Eqc::INTR) >= hca.interrupts.len() {
        return Err(Status::BAD_INDEX);
    }
    let buffer = Buffer::parse(
        command.rest(PAGES),
        context.get(Eqc::LOG_PAGE_SIZE),
        context.get(Eqc::PAGE_OFFSET),
        EQE_SIZE << log_size,
    )
    .ok_or(Status::BAD_PARAM)?;
    let number = execution.eqns.take().ok_or(Status::NO_RESOURCE)?;
    let eqn = u8::try_from(number).expect("there are fewer than 256 event queues");
    let eq = Eq::new(eqn, context, events.wide(CreateEq::EVENTS), buffer);
    hca.objects.insert_eq(eqn, Arc::new(eq));
    Ok(Reply::number(number))
}

fn eqn(command: Command<'_>) -> Result<u8, Status> {
    u8::try_from(command.number()).map_err(|_| Status::BAD_RESOURCE)
}

pub(super) fn query_eq(hca: &Hca, command: Command<'_>) -> Outcome {
    let eq = hca.objects.eq(eqn(command)?).ok_or(Status::BAD_RESOURCE)?;
    Ok(Reply::empty()
        .with(CONTEXT, &eq.query().0)
        .with(QUERY_EQ_EVENTS, &eq.events.to_be_bytes()))
}

pub(super) fn destroy_eq(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let eqn = eqn(command)?;
    if hca.objects.all_cqs().iter().any(|cq| cq.reports_to(eqn)) {
        return Err(Status::RESOURCE_BUSY);
    }
    let eq = hca.objects.remove_eq(eqn).ok_or(Status::BAD_RESOURCE)?;
    eq.destroy();
    if eq.takes(Event::PAGE_FAULT) {
        hca.fail_faults();
    }
    execution.eqns.give_back(u32::from(eqn));
    Ok(Reply::empty())
}

pub(super) fn create_cq(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let context: Cqc = command.layout(CONTEXT)?;
    let log_size = context.get(Cqc::LOG_SIZE);
    if log_size > LOG_MAX_CQ_SIZE
        || context.get(Cqc::CQE_SIZE) > CQE_PADDED
        || context.is_set(Cqc::COLLAPSED)
        || !execution.uars.contains(context.get(Cqc::UAR_PAGE))
    {
        return Err(Status::BAD_PARAM);
    }
    let eq = hca
        .objects
        .eq(context.get(Cqc::EQN) as u8)
        .ok_or(Status::BAD_RESOURCE)?;
    let buffer = Buffer::parse(
        command.rest(PAGES),
        context.get(Cqc::LOG_PAGE_SIZE),
        context.get(Cqc::PAGE_OFFSET),
        1 << (log_size + entry_shift(&context)),
    )
    .ok_or(Status::BAD_PARAM)?;
    let cqn = execution.cqns.take().ok_or(Status::NO_RESOURCE)?;
    hca.objects
        .insert_cq(cqn, Arc::new(Cq::new(cqn, context, buffer, eq)));
    Ok(Reply::number(cqn))
}

pub(super) fn query_cq(hca: &Hca, command: Command<'_>) -> Outcome {
    let cq = hca.objects.cq(command.number()).ok_or(Status::BAD_RESOURCE)?;
    Ok(Reply::empty().with(CONTEXT, &cq.query().0))
}

/// Moderation, or another buffer.
pub(super) fn modify_cq(hca: &Hca, port: &mut Port, command: Command<'_>) -> Outcome {
    let cq = hca.objects.cq(command.number()).ok_or(Status::BAD_RESOURCE)?;
    let fields = command.layout::<ModifyCq>(0)?.get(ModifyCq::FIELDS);
    let given: Cqc = command.layout(CONTEXT)?;
    match command.op_mod() {
        0 if fields & !(MODIFY_PERIOD | MODIFY_COUNT) == 0 => {
            let chosen = |bit, field| (fields & bit != 0).then(|| given.get(field));
            let (period, count) = (
                chosen(MODIFY_PERIOD, Cqc::PERIOD),
                chosen(MODIFY_COUNT, Cqc::MAX_COUNT),
            );
            cq.moderate(port, &hca.interrupts, period, count);
        }
        MODIFY_CQ_RESIZE
            if fields & RESIZE_SIZE != 0
                && fields & !(RESIZE_SIZE | RESIZE_PAGE_OFFSET | RESIZE_LOG_PAGE_SIZE) == 0 =>
        {
            resize_cq(port, &cq, command, fields, given)?;
        }
        // The event queue, the flags: of them the driver changes none.
        _ => return Err(Status::BAD_PARAM),
    }
    Ok(Reply::empty())
}

fn resize_cq(port: &mut Port, cq: &Cq, command: Command<'_>, fields: u32, given: Cqc) -> Result<(), Status> {
    let old = cq.query();
    let mut context = given;
    for (bit, field) in [
        (RESIZE_PAGE_OFFSET, Cqc::PAGE_OFFSET),
        (RESIZE_LOG_PAGE_SIZE, Cqc::LOG_PAGE_SIZE),
    ] {
        if fields & bit == 0 {
            context.set(field, old.get(field));
        }
    }
    let log_size = context.get(Cqc::LOG_SIZE);
    if log_size > LOG_MAX_CQ_SIZE || context.get(Cqc::CQE_SIZE) > CQE_PADDED {
        return Err(Status::BAD_PARAM);
    }
    let buffer = Buffer::parse(
        command.rest(PAGES),
        context.get(Cqc::LOG_PAGE_SIZE),
        context.get(Cqc::PAGE_OFFSET),
        1 << (log_size + entry_shift(&context)),
    )
    .ok_or(Status::BAD_PARAM)?;
    cq.resize(port, &context, buffer).map_err(|error| match error {
        ResizeError::Overflow => Status::BAD_RESOURCE_STATE,
        ResizeError::Outstanding => Status::BAD_OUTSTANDING_CQES,
        ResizeError::Memory => Status::BAD_PARAM,
    })
}

pub(super) fn destroy_cq(hca: &Hca, execution: &mut Execution, command: Command<'_>) -> Outcome {
    let cqn = command.number();
    let cq = hca.objects.remove_cq(cqn).ok_or(Status::BAD_RESOURCE)?;
    cq.destroy();
    execution.cqns.give_back(cqn);
    Ok(Reply::empty())
}
