//! Memory keys.

use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::{CONTEXT, CreateMkey, PAGES, PageFaultResume};
use protos::mlx5::mkey::Mkc;

use super::{Command, Execution, Outcome, Reply};
use crate::mlx5::hardware::Hca;
use crate::mlx5::memory::Port;
use crate::mlx5::mkey::Refused;

fn status(refused: Refused) -> Status {
    match refused {
        Refused::Parameter => Status::BAD_PARAM,
        Refused::TooShort => Status::BAD_INPUT_LENGTH,
        Refused::Limit => Status::LIMIT,
        Refused::Unknown => Status::BAD_RESOURCE,
    }
}

pub(super) fn create_mkey(hca: &Hca, execution: &Execution, command: Command<'_>) -> Outcome {
    let fields: CreateMkey = command.layout(0)?;
    let context: Mkc = command.layout(CONTEXT)?;
    if !context.is_set(Mkc::FREE) && !execution.pds.contains(context.get(Mkc::PD)) {
        return Err(Status::BAD_RESOURCE);
    }
    let index = hca
        .mkeys
        .create(
            &context,
            fields.is_set(CreateMkey::PG_ACCESS),
            fields.get(CreateMkey::TRANSLATIONS_ACTUAL),
            command.rest(PAGES),
        )
        .map_err(status)?;
    Ok(Reply::number(index))
}

pub(super) fn query_mkey(hca: &Hca, command: Command<'_>) -> Outcome {
    let mkey = hca.mkeys.at(command.number()).ok_or(Status::BAD_RESOURCE)?;
    Ok(Reply::empty().with(CONTEXT, &mkey.context.0))
}

pub(super) fn destroy_mkey(hca: &Hca, command: Command<'_>) -> Outcome {
    hca.mkeys.destroy(&hca.atc, command.number()).map_err(status)?;
    Ok(Reply::empty())
}

pub(super) fn page_fault_resume(hca: &Hca, port: &mut Port, command: Command<'_>) -> Outcome {
    let fields: PageFaultResume = command.layout(0)?;
    let token = u64::from(fields.get(PageFaultResume::TOKEN_47_32)) << 32
        | u64::from(fields.get(PageFaultResume::TOKEN_31_0));
    if hca.resume_fault(port, token, fields.is_set(PageFaultResume::ERROR)) {
        Ok(Reply::empty())
    } else {
        Err(Status::BAD_RESOURCE)
    }
}
