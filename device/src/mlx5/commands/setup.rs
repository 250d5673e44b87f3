//! Bring-up, and objects that are numbers only.

use protos::mlx5::Layout;
use protos::mlx5::cmd::{Opcode, Status};
use protos::mlx5::commands::{
    ADAPTER_PSID, AccessRegister, CONTEXT, PCAP_MASK, QueryAdapterOut, QueryIssiOut, QuerySpecialContextsOut,
    REGISTER, REGISTER_HOST_ENDIANNESS, REGISTER_PCAP, REGISTER_WRITE,
};

use super::{Command, Outcome, Reply};
use crate::mlx5::OUI;
use crate::mlx5::hardware::Hca;
use crate::mlx5::mkey::NULL_MKEY;
use crate::mlx5::numbers::Numbers;
use protos::mlx5::commands::Input;

/// Interface steps 0 and 1.
const ISSI_SUPPORTED: u32 = 0b11;
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
        _ => Err(Status::BAD_PARAM),
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

/// Registers: the host's byte order, which is what it is, and the port's capabilities.
pub(super) fn access_register(hca: &Hca, command: Command<'_>) -> Outcome {
    let register: AccessRegister = command.layout(0)?;
    let mut data = command.rest(CONTEXT).to_vec();
    data.truncate(REGISTER);
    match register.get(AccessRegister::ID) {
        REGISTER_HOST_ENDIANNESS => {}
        REGISTER_PCAP => {
            let mask = data
                .get_mut(PCAP_MASK..PCAP_MASK + 4)
                .ok_or(Status::BAD_INPUT_LENGTH)?;
            if command.op_mod() == REGISTER_WRITE {
                let wanted = u32::from_be_bytes((&*mask).try_into().expect("four bytes"));
                hca.port_capabilities.set(wanted);
            } else {
                mask.copy_from_slice(&hca.port_capabilities.get().to_be_bytes());
            }
        }
        _ => return Err(Status::BAD_PARAM),
    }
    Ok(Reply::empty().with(CONTEXT, &data))
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
