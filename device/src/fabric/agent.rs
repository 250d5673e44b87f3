//! The agents of an adapter: subnet management and performance (chapters 14 and 16).

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use protos::ib::Pkey;
use protos::ib::mad::{
    ClassPortInfo, MAD, MadHeader, NodeInfo, PortCounters, PortCountersExtended, PortInfo, attribute, class,
    method, perf, port_info, smp, status,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::adapter::{Adapter, PortStatus};
use super::switch::PortShared;

/// Virtual lane 0 only (sections 7.6 and 14.2.5.6).
const ONE_LANE: u8 = 1;
/// Subnet timeout and response time: 4.096 us * 2^18.
const RESPONSE_TIME: u8 = 18;

pub(super) fn answer(adapter: &Adapter, port: u8, request: &[u8; MAD]) -> Option<[u8; MAD]> {
    let (mut header, _) = MadHeader::read_from_prefix(request).ok()?;
    if header.method & 0x80 != 0 {
        return None;
    }
    let directed = header.class == class::SUBN_DIRECTED;
    let result = match header.class {
        class::SUBN_LID | class::SUBN_DIRECTED => subnet(adapter, port, &header, request),
        class::PERFORMANCE => performance(adapter, port, &header, request),
        _ => return None,
    };
    let mut reply = *request;
    let code = match result {
        Ok((at, data)) => {
            reply[at..at + data.len()].copy_from_slice(&data);
            status::OK
        }
        Err(code) => code,
    };
    header.method = method::GET_RESP;
    // Section 14.2.2: a directed route's answer says that it is on the way back.
    header.status = (code | if directed { status::DIRECTION } else { 0 }).into();
    reply[..size_of::<MadHeader>()].copy_from_slice(header.as_bytes());
    Some(reply)
}

type Reply = Result<(usize, Vec<u8>), u16>;

fn subnet(adapter: &Adapter, port: u8, header: &MadHeader, request: &[u8; MAD]) -> Reply {
    if header.base_version != 1 || header.class_version != 1 {
        return Err(status::BAD_VERSION);
    }
    let set = match header.method {
        method::GET => false,
        method::SET => true,
        _ => return Err(status::BAD_METHOD),
    };
    let modifier = header.modifier.get();
    let config = adapter.config();
    let data = match header.attribute.get() {
        smp::NODE_DESCRIPTION => {
            if set {
                let mut description = adapter.description.lock().unwrap_or_else(PoisonError::into_inner);
                description.copy_from_slice(&request[smp::DATA..smp::DATA + 64]);
            }
            adapter.description().to_vec()
        }
        smp::NODE_INFO if set => return Err(status::BAD_METHOD),
        smp::NODE_INFO => NodeInfo {
            base_version: 1,
            class_version: 1,
            node_type: smp::NODE_TYPE_CA,
            num_ports: config.port_guids.len() as u8,
            system_guid: config.system_guid.into(),
            node_guid: config.node_guid.into(),
            port_guid: config
                .port_guids
                .get(usize::from(port).wrapping_sub(1))
                .copied()
                .unwrap_or_default()
                .into(),
            partition_cap: (config.pkeys.len() as u16).into(),
            device_id: config.device.into(),
            revision: config.revision.into(),
            local_port_vendor: (u32::from(port) << 24 | config.vendor & 0xff_ffff).into(),
        }
        .as_bytes()
        .to_vec(),
        smp::PORT_INFO => {
            // Port 0 of a channel adapter: the port that the packet came through.
            let number = if modifier == 0 { u32::from(port) } else { modifier };
            let number = u8::try_from(number).map_err(|_| status::BAD_FIELD)?;
            let at = adapter.port(number).ok_or(status::BAD_FIELD)?;
            port_info(number, &at).as_bytes().to_vec()
        }
        smp::GUID_INFO => {
            let mut guids = [0; 64];
            if modifier == 0 {
                let at = adapter.port(port).ok_or(status::BAD_FIELD)?;
                guids[..8].copy_from_slice(&at.gid.guid().to_be_bytes());
            }
            guids.to_vec()
        }
        smp::PKEY_TABLE => {
            let first = (modifier & 0xffff) as usize * 32;
            let keys = config.pkeys.iter().skip(first).take(32);
            let mut table = vec![0; 64];
            for (at, Pkey(key)) in keys.enumerate() {
                table[at * 2..at * 2 + 2].copy_from_slice(&key.to_be_bytes());
            }
            table
        }
        _ => return Err(status::BAD_ATTRIBUTE),
    };
    Ok((smp::DATA, data))
}

fn port_info(number: u8, at: &PortStatus) -> PortInfo {
    let (state, physical) = if at.active {
        (port_info::STATE_ACTIVE, port_info::PHYSICAL_LINK_UP)
    } else {
        (port_info::STATE_DOWN, port_info::PHYSICAL_POLLING)
    };
    let capabilities = port_info::CAP_SYSTEM_GUID
        | port_info::CAP_CM
        | port_info::CAP_EXTENDED_SPEEDS
        | port_info::CAP_CLIENT_REREGISTER;
    PortInfo {
        gid_prefix: at.gid.prefix().into(),
        lid: at.lid.0.into(),
        sm_lid: at.sm_lid.0.into(),
        capabilities: capabilities.into(),
        local_port: number,
        width_enabled: port_info::WIDTH_4X,
        width_supported: port_info::WIDTH_4X,
        width_active: port_info::WIDTH_4X,
        // SDR, DDR and QDR are supported (7); EDR is in use, which the extended fields say.
        speed_supported_state: 7 << 4 | state,
        physical_state_default: physical << 4 | 2,
        protection_lmc: at.lmc,
        speed_active_enabled: 4 << 4 | 7,
        mtu_sm_sl: at.mtu.code() << 4 | at.sm_sl,
        vl_cap_init: ONE_LANE << 4,
        init_reply_mtu_cap: at.mtu.code(),
        vl_enforcement: ONE_LANE << 4,
        guid_cap: 8,
        reregister_timeout: RESPONSE_TIME,
        response_time: RESPONSE_TIME,
        ext_speed_active_supported: port_info::EXT_SPEED_EDR << 4 | 3,
        ext_speed_enabled: 3,
        ..PortInfo::new_zeroed()
    }
}

fn performance(adapter: &Adapter, port: u8, header: &MadHeader, request: &[u8; MAD]) -> Reply {
    if header.base_version != 1 || header.class_version != 1 {
        return Err(status::BAD_VERSION);
    }
    let set = match header.method {
        method::GET => false,
        method::SET => true,
        _ => return Err(status::BAD_METHOD),
    };
    if header.attribute.get() == attribute::CLASS_PORT_INFO && !set {
        let info = ClassPortInfo {
            base_version: 1,
            class_version: 1,
            capabilities: perf::CAP_EXTENDED.into(),
            capabilities2_response_time: u32::from(RESPONSE_TIME).into(),
            ..ClassPortInfo::new_zeroed()
        };
        return Ok((perf::DATA, info.as_bytes().to_vec()));
    }
    // Both kinds of counters begin alike: port, then the counters that a set clears.
    let select_port = request[perf::DATA + 1];
    let number = if select_port == 0 || select_port == 0xff {
        port
    } else {
        select_port
    };
    let at = adapter
        .ports
        .get(usize::from(number).wrapping_sub(1))
        .ok_or(status::BAD_FIELD)?;
    let data = match header.attribute.get() {
        perf::PORT_COUNTERS => {
            if set {
                clear(at);
            }
            narrow(at, number).as_bytes().to_vec()
        }
        perf::PORT_COUNTERS_EXTENDED => {
            if set {
                clear(at);
            }
            wide(at, number).as_bytes().to_vec()
        }
        _ => return Err(status::BAD_ATTRIBUTE),
    };
    Ok((perf::DATA, data))
}

fn clear(port: &PortShared) {
    let c = &port.counters;
    for counter in [
        &c.sent_packets,
        &c.sent_words,
        &c.received_packets,
        &c.received_words,
        &c.multicast_sent,
        &c.multicast_received,
        &c.discarded,
    ] {
        counter.store(0, Relaxed);
    }
}

fn narrow(port: &PortShared, number: u8) -> PortCounters {
    let c = &port.counters;
    let word = |counter: &AtomicU64| u32::try_from(counter.load(Relaxed)).unwrap_or(u32::MAX).into();
    PortCounters {
        port: number,
        transmit_discards: u16::try_from(c.discarded.load(Relaxed))
            .unwrap_or(u16::MAX)
            .into(),
        transmit_words: word(&c.sent_words),
        receive_words: word(&c.received_words),
        transmit_packets: word(&c.sent_packets),
        receive_packets: word(&c.received_packets),
        ..PortCounters::new_zeroed()
    }
}

fn wide(port: &PortShared, number: u8) -> PortCountersExtended {
    let c = &port.counters;
    let load = |counter: &AtomicU64| counter.load(Relaxed);
    PortCountersExtended {
        port: number,
        transmit_words: load(&c.sent_words).into(),
        receive_words: load(&c.received_words).into(),
        transmit_packets: load(&c.sent_packets).into(),
        receive_packets: load(&c.received_packets).into(),
        unicast_transmit: load(&c.sent_packets)
            .saturating_sub(load(&c.multicast_sent))
            .into(),
        unicast_receive: load(&c.received_packets).into(),
        multicast_transmit: load(&c.multicast_sent).into(),
        multicast_receive: load(&c.multicast_received).into(),
        ..PortCountersExtended::new_zeroed()
    }
}
