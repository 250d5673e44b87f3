//! Questions to subnet administration.

use super::*;
use protos::ib::Qkey;
use protos::ib::mad::{
    ClassPortInfo, MAD, MadHeader, PathRecord, SaHeader, attribute, class, method, sa as at, service, status,
};
use zerocopy::{FromBytes, IntoBytes};

/// IPoIB's group for the default partition.
pub(in crate::fabric) fn broadcast() -> Gid {
    Gid("ff12:401b:ffff::ffff:ffff"
        .parse::<std::net::Ipv6Addr>()
        .unwrap()
        .octets())
}

fn request(attribute: u16, method: u8, mask: u64, record: &[u8]) -> [u8; MAD] {
    let mut mad = [0; MAD];
    let header = SaHeader {
        mad: MadHeader {
            base_version: 1,
            class: class::SUBN_ADM,
            class_version: 2,
            method,
            attribute: attribute.into(),
            transaction: 5.into(),
            ..MadHeader::default()
        },
        component_mask: mask.into(),
        ..SaHeader::default()
    };
    mad[..at::DATA].copy_from_slice(header.as_bytes());
    mad[at::DATA..at::DATA + record.len()].copy_from_slice(record);
    mad
}

fn joining(gid: Gid, mgid: Gid, state: u8) -> McMemberRecord {
    McMemberRecord {
        mgid,
        port_gid: gid,
        scope_join: 2 << 4 | state,
        ..McMemberRecord::default()
    }
}

const JOIN: u64 = mc_member::MGID | mc_member::PORT_GID | mc_member::JOIN_STATE;

/// Joins the broadcast group.
pub(in crate::fabric) fn join(gid: Gid) -> [u8; MAD] {
    let record = joining(gid, broadcast(), mc_member::FULL);
    request(at::MC_MEMBER_RECORD, method::SET, JOIN, record.as_bytes())
}

fn ask<T: FromBytes>(subnet: &mut Subnet, request: &[u8; MAD]) -> Result<T, u16> {
    let (reply, _) = sa::respond(subnet, request, Lid(2));
    let reply = reply.expect("an answer");
    let header = SaHeader::read_from_prefix(&reply).unwrap().0;
    assert_eq!(header.mad.transaction.get(), 5);
    assert_ne!(header.mad.method & 0x80, 0);
    match header.mad.status.get() {
        0 => Ok(T::read_from_prefix(&reply[at::DATA..])
            .unwrap_or_else(|_| panic!("short"))
            .0),
        code => Err(code),
    }
}

fn two_ports() -> (Subnet, [Gid; 2]) {
    let mut subnet = Subnet::managing(Gid::DEFAULT_PREFIX);
    let gids = [1, 2].map(|guid| Gid::new(Gid::DEFAULT_PREFIX, guid));
    for gid in gids {
        subnet.join(gid, None, 1).unwrap();
    }
    (subnet, gids)
}

#[test]
fn test_path_when_both_ends_are_there_names_their_lids() {
    let (mut subnet, [a, b]) = two_ports();
    let wanted = PathRecord {
        dgid: b,
        sgid: a,
        ..PathRecord::default()
    };
    let mask = path_record::DGID | path_record::SGID;
    let get = |wanted: &PathRecord, mask| request(at::PATH_RECORD, method::GET, mask, wanted.as_bytes());
    let path: PathRecord = ask(&mut subnet, &get(&wanted, mask)).unwrap();
    assert_eq!((path.slid.get(), path.dlid.get()), (2, 3));
    assert_eq!((path.sgid, path.dgid, path.pkey.get()), (a, b, 0xffff));
    assert_eq!(path.mtu & 0x3f, Mtu::B4096.code());
    assert_eq!(path.reversible_paths, 0x81);
    // By LID, from whoever asks.
    let by_lid = PathRecord {
        dlid: 3.into(),
        ..PathRecord::default()
    };
    let path: PathRecord = ask(&mut subnet, &get(&by_lid, path_record::DLID)).unwrap();
    assert_eq!((path.sgid, path.dgid), (a, b));
    let nobody = PathRecord {
        dgid: Gid::new(Gid::DEFAULT_PREFIX, 9),
        ..wanted
    };
    assert_eq!(
        ask::<PathRecord>(&mut subnet, &get(&nobody, mask)),
        Err(status::SA_NO_RECORDS)
    );
    assert_eq!(
        ask::<PathRecord>(&mut subnet, &get(&wanted, path_record::SGID)),
        Err(status::SA_INSUFFICIENT)
    );
}

#[test]
fn test_broadcast_group_when_joined_without_parameters_tells_them() {
    let (mut subnet, [a, b]) = two_ports();
    let record: McMemberRecord = ask(&mut subnet, &join(a)).unwrap();
    assert_eq!(record.mlid.get(), 0xc000);
    assert_eq!((record.qkey.get(), record.pkey.get()), (0x0b1b, 0xffff));
    assert_eq!((record.port_gid, record.scope_join), (a, 0x21));
    assert_eq!(subnet.members(Lid(0xc000)), [a]);
    let _: McMemberRecord = ask(&mut subnet, &join(b)).unwrap();
    assert_eq!(subnet.members(Lid(0xc000)).len(), 2);
    let gone = joining(a, broadcast(), mc_member::FULL);
    let delete = request(at::MC_MEMBER_RECORD, method::DELETE, JOIN, gone.as_bytes());
    let _: McMemberRecord = ask(&mut subnet, &delete).unwrap();
    assert_eq!(subnet.members(Lid(0xc000)), [b]);
    assert_eq!(
        ask::<McMemberRecord>(&mut subnet, &delete),
        Err(status::SA_NO_RECORDS)
    );
}

#[test]
fn test_group_when_created_lives_as_long_as_its_members() {
    let (mut subnet, [a, _]) = two_ports();
    let mgid = Gid("ff12:601b:ffff::1"
        .parse::<std::net::Ipv6Addr>()
        .unwrap()
        .octets());
    let mut record = joining(a, mgid, mc_member::SEND_ONLY);
    record.qkey = Qkey::GSI.0.into();
    record.pkey = 0xffff.into();
    let create = JOIN | mc_member::QKEY | mc_member::PKEY;
    let set =
        |record: &McMemberRecord, mask| request(at::MC_MEMBER_RECORD, method::SET, mask, record.as_bytes());
    assert_eq!(
        ask::<McMemberRecord>(&mut subnet, &set(&record, create)),
        Err(status::SA_INVALID),
        "who only sends creates nothing"
    );
    record.scope_join = 2 << 4 | mc_member::FULL;
    assert_eq!(
        ask::<McMemberRecord>(&mut subnet, &set(&record, JOIN)),
        Err(status::SA_INVALID),
        "nothing to create it from"
    );
    let made: McMemberRecord = ask(&mut subnet, &set(&record, create)).unwrap();
    assert_eq!(made.mlid.get(), 0xc001);
    let mut other = record;
    other.qkey = 1.into();
    assert_eq!(
        ask::<McMemberRecord>(&mut subnet, &set(&other, create)),
        Err(status::SA_INVALID),
        "another key"
    );
    subnet.leave(a);
    assert!(!subnet.groups.contains_key(&mgid));
    assert!(subnet.groups.contains_key(&broadcast()));
}

#[test]
fn test_service_when_registered_is_found_until_its_port_leaves() {
    let (mut subnet, [a, _]) = two_ports();
    let mut record = ServiceRecord {
        id: 0x1234.into(),
        gid: a,
        ..ServiceRecord::default()
    };
    record.name[..3].copy_from_slice(b"svc");
    let send = |method, mask| request(at::SERVICE_RECORD, method, mask, record.as_bytes());
    let _: ServiceRecord = ask(&mut subnet, &send(method::SET, 0)).unwrap();
    let found: ServiceRecord = ask(&mut subnet, &send(method::GET, service::NAME)).unwrap();
    assert_eq!(found.id.get(), 0x1234);
    subnet.leave(a);
    assert_eq!(
        ask::<ServiceRecord>(&mut subnet, &send(method::GET, service::ID)),
        Err(status::SA_NO_RECORDS)
    );
}

#[test]
fn test_class_port_info_when_asked_says_who_may_create_groups() {
    let (mut subnet, _) = two_ports();
    let info: ClassPortInfo = ask(
        &mut subnet,
        &request(attribute::CLASS_PORT_INFO, method::GET, 0, &[]),
    )
    .unwrap();
    assert_eq!(info.class_version, 2);
    assert_eq!(info.capabilities2_response_time.get() >> 5, 1 << 12);
}

#[test]
fn test_questions_when_unknown_are_answered_with_a_status() {
    let (mut subnet, _) = two_ports();
    for (attribute, method, code) in [
        (0x7777, method::GET, status::BAD_ATTRIBUTE),
        (at::PATH_RECORD, method::GET_TABLE, status::BAD_METHOD),
        (at::PATH_RECORD, 0x7f, status::BAD_METHOD),
    ] {
        assert_eq!(
            ask::<PathRecord>(&mut subnet, &request(attribute, method, u64::MAX, &[0xff; 200])),
            Err(code)
        );
    }
    let mut version = request(at::PATH_RECORD, method::GET, 0, &[]);
    version[2] = 1;
    assert_eq!(ask::<PathRecord>(&mut subnet, &version), Err(status::BAD_VERSION));
}

#[test]
fn test_any_mad_when_asked_is_answered_or_ignored() {
    let (mut subnet, _) = two_ports();
    let mut dice = crate::fabric::Dice::new(7);
    for _ in 0..20_000 {
        let mut mad = [0; MAD];
        for byte in &mut mad {
            *byte = dice.roll() as u8;
        }
        mad[..3].copy_from_slice(&[1, class::SUBN_ADM, 2]);
        mad[3] = [method::GET, method::SET, method::DELETE][dice.below(3) as usize];
        mad[16] = 0;
        mad[17] = [0x01, 0x31, 0x35, 0x38][dice.below(4) as usize];
        let _ = sa::respond(&mut subnet, &mad, Lid(2));
    }
    assert!(subnet.groups.len() <= MOST && subnet.services.len() <= MOST);
}

#[test]
fn test_block_when_free_is_given_again_and_else_another_is() {
    let (mut subnet, _) = two_ports();
    let mut taken = std::collections::BTreeSet::new();
    let give = |subnet: &mut Subnet, wanted, taken: &mut std::collections::BTreeSet<u16>| {
        let block = subnet.block(wanted, |first| taken.contains(&first))?;
        assert!(block.0 >= BLOCK && block.1 == block.0 + BLOCK && block.1 <= Lid::LAST_UNICAST.0);
        assert!(taken.insert(block.0), "{block:?} twice");
        Some(block.0)
    };
    let first = give(&mut subnet, 0, &mut taken).unwrap();
    let second = give(&mut subnet, first, &mut taken).unwrap();
    assert_ne!(first, second);
    taken.remove(&first);
    // Somebody new does not get what the one that has just gone will ask for.
    assert_ne!(give(&mut subnet, 0, &mut taken), Some(first));
    assert_eq!(give(&mut subnet, first, &mut taken), Some(first));
    for nonsense in [1, first + 1, 0xbf01, 0xc000, 0xff00] {
        assert_ne!(give(&mut subnet, nonsense, &mut taken), Some(nonsense));
    }
    while give(&mut subnet, 0, &mut taken).is_some() {}
    assert!(taken.len() > 180, "{}", taken.len());
    // The subnet that is full has room when somebody goes.
    taken.remove(&second);
    assert_eq!(give(&mut subnet, 0, &mut taken), Some(second));
}
