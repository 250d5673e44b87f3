//! Bring-up, and objects that are numbers only.

use protos::mlx5::Layout;
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::commands::{
    ADAPTER_PSID, AccessRegister, CONTEXT, QueryAdapterOut, QueryIssiOut, QuerySpecialContextsOut,
    REGISTER_HOST_ENDIANNESS,
};

use super::{Command, Outcome, Reply};
use crate::mlx5::mkey::NULL_MKEY;
use crate::mlx5::numbers::Numbers;
use protos::mlx5::cmd::Status as S;
use protos::mlx5::commands::Input;

/// Interface steps 0 and 1.
const ISSI_SUPPORTED: u32 = 1 << 0 | 1 << 1;
/// The vendor's OUI.
const OUI: u32 = 0x0002c9;
/// Board id.
const PSID: &[u8; 16] = b"TLB0000000001\0\0\0";

/// Commands that change nothing that this device would do otherwise.
pub(super) fn acknowledge(opcode: Opcode, command: Command<'_>) -> Outcome {
    if opcode == Opcode::SET_ISSI {
        let wanted = command.head.get(Input::ARGUMENT) & 0xffff;
        if wanted > 1 {
            return Err(Status::BAD_PARAM);
        }
    }
    Ok(Reply::empty())
}

pub(super) fn query_issi() -> Outcome {
    Ok(Reply::of(
        &QueryIssiOut::zeroed().with(QueryIssiOut::SUPPORTED, ISSI_SUPPORTED),
    ))
}

/// The device lives in its own process' memory: it wants no pages, at boot or later.
pub(super) fn query_pages(command: Command<'_>) -> Outcome {
    match command.op_mod() {
        1..=3 => Ok(Reply::empty()),
        _ => Err(S::BAD_PARAM),
    }
}

pub(super) fn query_adapter() -> Outcome {
    let output = QueryAdapterOut::zeroed().with(QueryAdapterOut::IEEE_VENDOR_ID, OUI);
    Ok(Reply::of(&output).with(ADAPTER_PSID, PSID))
}

pub(super) fn query_special_contexts() -> Outcome {
    let output = QuerySpecialContextsOut::zeroed().with(QuerySpecialContextsOut::NULL_MKEY, NULL_MKEY);
    Ok(Reply::of(&output))
}

/// The host's byte order is the only register: the answer repeats what was written.
pub(super) fn access_register(command: Command<'_>) -> Outcome {
    let register: AccessRegister = command.layout(0)?;
    if register.get(AccessRegister::ID) != REGISTER_HOST_ENDIANNESS {
        return Err(Status::BAD_PARAM);
    }
    let data = command.rest(CONTEXT);
    Ok(Reply::empty().with(CONTEXT, &data[..data.len().min(0x10)]))
}

pub(super) fn allocate(numbers: &mut Numbers) -> Outcome {
    numbers.take().map(Reply::number).ok_or(Status::NO_RESOURCE)
}

pub(super) fn free(numbers: &mut Numbers, command: Command<'_>) -> Outcome {
    if numbers.give_back(command.number()) {
        Ok(Reply::empty())
    } else {
        Err(Status::BAD_RESOURCE)
    }
}
