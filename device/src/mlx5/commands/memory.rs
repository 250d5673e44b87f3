//! Memory keys.

use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::{CONTEXT, CreateMkey, PAGES};
use protos::mlx5::mkey::Mkc;

use super::{Command, Execution, Outcome, Reply};
use crate::mlx5::hardware::Hca;
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
