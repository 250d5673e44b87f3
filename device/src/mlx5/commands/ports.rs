//! Ports: management datagrams for the device itself, vport context, multicast groups.

use protos::mlx5::Layout;
use protos::mlx5::cmd::Status;
use protos::mlx5::commands::{CONTEXT, MAD_SIZE, MadIfc, Multicast, QueryHcaVportContextOut as V};

use super::{Command, Outcome, Reply};
use crate::mlx5::hardware::Hca;
use crate::mlx5::port::PORT;

pub(super) fn mad_ifc(hca: &Hca, command: Command<'_>) -> Outcome {
    let fields: MadIfc = command.layout(0)?;
    let port = fields.get(MadIfc::PORT);
    if port != u32::from(PORT) {
        return Err(Status::BAD_INDEX);
    }
    let request: &[u8; MAD_SIZE] = command
        .rest(CONTEXT)
        .first_chunk()
        .ok_or(Status::BAD_INPUT_LENGTH)?;
    let answer = hca.port_capabilities.answer(&hca.adapter, request);
    let answer = answer.ok_or(Status::BAD_PACKET)?;
    Ok(Reply::empty().with(CONTEXT, &answer))
}

pub(super) fn query_vport_context(hca: &Hca) -> Outcome {
    let port = hca.port_view();
    let status = hca.adapter.port(PORT).ok_or(Status::BAD_INDEX)?;
    let output = V::zeroed()
        .with(V::PORT_PHYSICAL_STATE, port.physical_state())
        .with(V::PORT_STATE, port.state())
        .with(V::VPORT_STATE, port.state())
        .with_wide(V::SYSTEM_IMAGE_GUID, hca.config.node_guid)
        .with_wide(V::PORT_GUID, port.gid.guid())
        .with_wide(V::NODE_GUID, hca.config.node_guid)
        .with(V::LID, u32::from(port.lid.0))
        .with(V::SM_LID, u32::from(status.sm_lid.0));
    Ok(Reply::of(&output))
}

pub(super) fn multicast(hca: &Hca, command: Command<'_>, attach: bool) -> Outcome {
    let fields: Multicast = command.layout(0)?;
    let gid = u128::from(fields.wide(Multicast::MGID_H)) << 64 | u128::from(fields.wide(Multicast::MGID_L));
    let qpn = fields.get(Multicast::QPN);
    hca.shard(qpn).multicast(qpn, gid.to_be_bytes(), attach)?;
    Ok(Reply::empty())
}
