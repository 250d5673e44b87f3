//! Subnet administration (chapter 15): what IPoIB and the connection manager ask the subnet manager.
//!
//! Not implemented: tables of records and their segmentation (RMPP), notices and their subscription, multipath
//! records, everything of a manager with keys or several partitions.

use protos::ib::mad::{
    ClassPortInfo, MAD, MadHeader, McMemberRecord, PathRecord, SaHeader, ServiceRecord, attribute, class,
    mc_member, method, path_record, sa, service, status,
};
use protos::ib::{
    Deth, Extended, Gid, Lid, Mtu, Opcode, Operation, Pkey, Place, Psn, Qkey, Qpn, ServiceType,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Group, MOST, Subnet};
use crate::transport::{Extension, Packet, Pool};

/// Packet life time: 4.096 us * 2^16 (0.27 s). Timers of connections are made from it.
pub(super) const LIFE_TIME: u8 = 16;
/// Response time of the manager: 4.096 us * 2^18.
const RESPONSE_TIME: u32 = 18;
/// Send-only joins may create groups (a bit of CapabilityMask2).
const SEND_ONLY_FULL_MEMBER: u32 = 1 << 12;

/// The answer to a packet, and the multicast LID whose members changed.
pub(in crate::fabric) fn answer(
    subnet: &mut Subnet,
    packet: &Packet,
    pool: &Pool,
) -> (Option<Packet>, Option<Lid>) {
    let Extension::Datagram(deth) = packet.extension else {
        return (None, None);
    };
    if packet.dest != Qpn::GSI || deth.qkey() != Qkey::GSI {
        return (None, None);
    }
    let Some(request) = packet.data().first_chunk::<MAD>() else {
        return (None, None);
    };
    let (reply, moved) = respond(subnet, request, packet.slid);
    let answer = reply.map(|reply| {
        let mut payload = pool.take(MAD);
        payload.copy_from_slice(&reply);
        Packet {
            port: 0,
            sl: packet.sl,
            mtu: packet.mtu,
            slid: packet.dlid,
            dlid: packet.slid,
            pkey: packet.pkey,
            opcode: Opcode::new(ServiceType::Ud, Operation::Send(Place::Only, Extended::None)),
            ack_request: false,
            solicited: false,
            dest: deth.source(),
            psn: Psn::default(),
            count: 1,
            xrc_srqn: None,
            immediate: None,
            extension: Extension::Datagram(Deth::new(Qkey::GSI, Qpn::GSI)),
            global: None,
            payload: Some(payload),
            loan: None,
        }
    });
    (answer, moved)
}

/// The answer to a MAD from `slid`.
pub(super) fn respond(
    subnet: &mut Subnet,
    request: &[u8; MAD],
    slid: Lid,
) -> (Option<[u8; MAD]>, Option<Lid>) {
    let Ok((mut header, _)) = SaHeader::read_from_prefix(request) else {
        return (None, None);
    };
    if header.mad.class != class::SUBN_ADM || header.mad.method & 0x80 != 0 {
        return (None, None);
    }
    let mut reply = [0; MAD];
    let (code, moved) = match execute(subnet, &header, &request[sa::DATA..], slid) {
        Ok((data, moved)) => {
            reply[sa::DATA..sa::DATA + data.len()].copy_from_slice(&data);
            (status::OK, moved)
        }
        Err(code) => {
            reply[sa::DATA..].copy_from_slice(&request[sa::DATA..]);
            (code, None)
        }
    };
    header.mad.method = match header.mad.method {
        method::DELETE => method::DELETE_RESP,
        method::GET_TABLE => method::GET_TABLE_RESP,
        _ => method::GET_RESP,
    };
    header.mad.status = code.into();
    reply[..sa::DATA].copy_from_slice(header.as_bytes());
    (Some(reply), moved)
}

type Done = (Vec<u8>, Option<Lid>);

fn execute(subnet: &mut Subnet, header: &SaHeader, data: &[u8], slid: Lid) -> Result<Done, u16> {
    let MadHeader {
        base_version,
        class_version,
        ..
    } = header.mad;
    if base_version != 1 || class_version != 2 {
        return Err(status::BAD_VERSION);
    }
    let mask = header.component_mask.get();
    let how = header.mad.method;
    match (header.mad.attribute.get(), how) {
        (attribute::CLASS_PORT_INFO, method::GET) => {
            let info = ClassPortInfo {
                base_version: 1,
                class_version: 2,
                capabilities2_response_time: (SEND_ONLY_FULL_MEMBER << 5 | RESPONSE_TIME).into(),
                ..ClassPortInfo::default()
            };
            Ok((info.as_bytes().to_vec(), None))
        }
        (sa::PATH_RECORD, method::GET) => {
            let wanted = record::<PathRecord>(data)?;
            path(subnet, &wanted, mask, slid).map(|path| (path.as_bytes().to_vec(), None))
        }
        (sa::MC_MEMBER_RECORD, method::GET | method::SET | method::DELETE) => {
            let wanted = record::<McMemberRecord>(data)?;
            let (record, moved) = match how {
                method::GET => (find_group(subnet, &wanted, mask)?, false),
                method::SET => join(subnet, &wanted, mask)?,
                _ => (leave(subnet, &wanted, mask)?, true),
            };
            let mlid = moved.then_some(Lid(record.mlid.get()));
            Ok((record.as_bytes().to_vec(), mlid))
        }
        (sa::SERVICE_RECORD, method::GET | method::SET | method::DELETE) => {
            let wanted = record::<ServiceRecord>(data)?;
            services(subnet, &wanted, mask, how).map(|record| (record.as_bytes().to_vec(), None))
        }
        (attribute::CLASS_PORT_INFO | sa::PATH_RECORD | sa::MC_MEMBER_RECORD | sa::SERVICE_RECORD, _) => {
            Err(status::BAD_METHOD)
        }
        _ => Err(status::BAD_ATTRIBUTE),
    }
}

fn record<T: FromBytes>(data: &[u8]) -> Result<T, u16> {
    T::read_from_prefix(data)
        .map(|(record, _)| record)
        .map_err(|_| status::SA_INVALID)
}

/// Section 15.2.5.16. All paths are alike; both ends must be there.
fn path(subnet: &Subnet, wanted: &PathRecord, mask: u64, slid: Lid) -> Result<PathRecord, u16> {
    let by_gid = |gid: Gid| subnet.ports.iter().find(|port| port.gid == gid);
    let by_lid = |lid: Lid| {
        subnet
            .ports
            .iter()
            .find(|port| port.lid == lid && lid != Lid::NONE)
    };
    let source = if mask & path_record::SGID != 0 {
        by_gid(wanted.sgid)
    } else if mask & path_record::SLID != 0 {
        by_lid(Lid(wanted.slid.get()))
    } else {
        by_lid(slid)
    }
    .ok_or(status::SA_NO_RECORDS)?;
    let (dgid, dlid) = if mask & path_record::DGID != 0 && wanted.dgid.is_multicast() {
        let group = subnet.groups.get(&wanted.dgid).ok_or(status::SA_NO_RECORDS)?;
        (wanted.dgid, Lid(group.record.mlid.get()))
    } else {
        let port = if mask & path_record::DGID != 0 {
            by_gid(wanted.dgid)
        } else if mask & path_record::DLID != 0 {
            by_lid(Lid(wanted.dlid.get()))
        } else {
            return Err(status::SA_INSUFFICIENT);
        }
        .ok_or(status::SA_NO_RECORDS)?;
        (port.gid, port.lid)
    };
    if dlid == Lid::NONE || source.lid == Lid::NONE {
        return Err(status::SA_NO_RECORDS);
    }
    let pkey = if mask & path_record::PKEY != 0 {
        wanted.pkey.get()
    } else {
        Pkey::DEFAULT.0
    };
    if pkey & 0x7fff != Pkey::DEFAULT.0 & 0x7fff {
        return Err(status::SA_NO_RECORDS);
    }
    Ok(PathRecord {
        service_id: wanted.service_id,
        dgid,
        sgid: source.gid,
        dlid: dlid.0.into(),
        slid: source.lid.0.into(),
        reversible_paths: 0x80 | 1,
        pkey: pkey.into(),
        mtu: path_record::EXACTLY | Mtu::B4096.code(),
        rate: path_record::EXACTLY | path_record::RATE_100_GBPS,
        life_time: path_record::EXACTLY | LIFE_TIME,
        traffic_class: wanted.traffic_class,
        ..PathRecord::default()
    })
}

fn group_record(group: &Group, member: Gid) -> McMemberRecord {
    let join = group.members.get(&member).copied().unwrap_or_default();
    McMemberRecord {
        port_gid: member,
        scope_join: group.record.scope_join & 0xf0 | join,
        ..group.record
    }
}

fn find_group(subnet: &Subnet, wanted: &McMemberRecord, mask: u64) -> Result<McMemberRecord, u16> {
    if mask & mc_member::MGID == 0 {
        return Err(status::SA_INSUFFICIENT);
    }
    let group = subnet.groups.get(&wanted.mgid).ok_or(status::SA_NO_RECORDS)?;
    if mask & mc_member::PORT_GID != 0 && !group.members.contains_key(&wanted.port_gid) {
        return Err(status::SA_NO_RECORDS);
    }
    Ok(group_record(group, wanted.port_gid))
}

/// Section 15.2.5.17.2: joining, and creating with the first full member.
fn join(subnet: &mut Subnet, wanted: &McMemberRecord, mask: u64) -> Result<(McMemberRecord, bool), u16> {
    let needed = mc_member::PORT_GID | mc_member::JOIN_STATE;
    if mask & needed != needed {
        return Err(status::SA_INSUFFICIENT);
    }
    if subnet.ports.iter().all(|port| port.gid != wanted.port_gid) {
        return Err(status::SA_INVALID_GID);
    }
    let state = wanted.scope_join & 0x0f;
    if state == 0 {
        return Err(status::SA_INVALID);
    }
    if mask & mc_member::MGID == 0 || !wanted.mgid.is_multicast() {
        return Err(status::SA_INVALID_GID);
    }
    if !subnet.groups.contains_key(&wanted.mgid) {
        create(subnet, wanted, mask)?;
    }
    let group = subnet.groups.get_mut(&wanted.mgid).ok_or(status::SA_NO_RECORDS)?;
    let differs = mask & mc_member::QKEY != 0 && wanted.qkey != group.record.qkey
        || mask & mc_member::PKEY != 0 && wanted.pkey.get() & 0x7fff != group.record.pkey.get() & 0x7fff;
    if differs {
        return Err(status::SA_INVALID);
    }
    *group.members.entry(wanted.port_gid).or_default() |= state;
    Ok((group_record(group, wanted.port_gid), true))
}

fn create(subnet: &mut Subnet, wanted: &McMemberRecord, mask: u64) -> Result<(), u16> {
    let needed = mc_member::QKEY | mc_member::PKEY;
    let may = wanted.scope_join & (mc_member::FULL | mc_member::SEND_ONLY_FULL) != 0;
    if mask & needed != needed || !may {
        // Nothing to make it from: there is no such group.
        return Err(status::SA_INVALID);
    }
    let mlid = subnet.free_mlid().ok_or(status::SA_INVALID)?;
    let or = |byte: u8, default: u8| if byte & 0x3f == 0 { default } else { byte & 0x3f };
    let record = McMemberRecord {
        mlid: mlid.0.into(),
        mtu: path_record::EXACTLY | or(wanted.mtu, Mtu::B4096.code()).min(Mtu::B4096.code()),
        rate: path_record::EXACTLY | or(wanted.rate, path_record::RATE_100_GBPS),
        life_time: path_record::EXACTLY | or(wanted.life_time, LIFE_TIME),
        port_gid: Gid::NONE,
        scope_join: wanted.mgid.0[1] << 4,
        ..*wanted
    };
    subnet.groups.insert(
        wanted.mgid,
        Group {
            record,
            members: std::collections::BTreeMap::new(),
            permanent: false,
        },
    );
    Ok(())
}

fn leave(subnet: &mut Subnet, wanted: &McMemberRecord, mask: u64) -> Result<McMemberRecord, u16> {
    let needed = mc_member::MGID | mc_member::PORT_GID | mc_member::JOIN_STATE;
    if mask & needed != needed {
        return Err(status::SA_INSUFFICIENT);
    }
    let group = subnet.groups.get_mut(&wanted.mgid).ok_or(status::SA_NO_RECORDS)?;
    let joined = group
        .members
        .get_mut(&wanted.port_gid)
        .ok_or(status::SA_NO_RECORDS)?;
    let left = *joined & wanted.scope_join & 0x0f;
    *joined &= !left;
    if *joined == 0 {
        group.members.remove(&wanted.port_gid);
    }
    let record = McMemberRecord {
        port_gid: wanted.port_gid,
        scope_join: group.record.scope_join & 0xf0 | left,
        ..group.record
    };
    if group.members.is_empty() && !group.permanent {
        subnet.groups.remove(&wanted.mgid);
    }
    Ok(record)
}

/// Section 15.2.5.14. Leases do not run out: a service ends with its port.
fn services(subnet: &mut Subnet, wanted: &ServiceRecord, mask: u64, how: u8) -> Result<ServiceRecord, u16> {
    let matches = |record: &ServiceRecord| {
        (mask & service::ID == 0 || record.id == wanted.id)
            && (mask & service::GID == 0 || record.gid == wanted.gid)
            && (mask & service::PKEY == 0 || record.pkey == wanted.pkey)
            && (mask & service::NAME == 0 || record.name == wanted.name)
    };
    match how {
        method::SET => {
            if subnet.ports.iter().all(|port| port.gid != wanted.gid) {
                return Err(status::SA_INVALID_GID);
            }
            let same = |r: &ServiceRecord| r.id == wanted.id && r.gid == wanted.gid && r.pkey == wanted.pkey;
            subnet.services.retain(|record| !same(record));
            if subnet.services.len() >= MOST {
                return Err(status::SA_INVALID);
            }
            subnet.services.push(*wanted);
            Ok(*wanted)
        }
        method::DELETE => {
            let at = subnet
                .services
                .iter()
                .position(matches)
                .ok_or(status::SA_NO_RECORDS)?;
            Ok(subnet.services.remove(at))
        }
        _ => {
            let mut found = subnet.services.iter().filter(|record| matches(record));
            let first = found.next().ok_or(status::SA_NO_RECORDS)?;
            if found.next().is_some() {
                return Err(status::SA_TOO_MANY);
            }
            Ok(*first)
        }
    }
}
