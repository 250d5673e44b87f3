//! The header and every payload's codec on any bytes.

use protos::vfio_user::{
    Capabilities, DmaMap, DmaUnmap, Header, IoFd, IoFdsInfo, IrqData, IrqSet, RegionAccess, RegionInfo,
    VersionData, VersionHeader, encode_sparse_mmap, parse_sparse_mmap,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Decodes `bytes` as everything that it can be.
///
/// # Panics
/// When a codec panics, or what it decoded does not encode to the same.
pub fn decode(bytes: &[u8]) {
    if let Ok((header, rest)) = Header::read_from_prefix(bytes) {
        assert_eq!(header.as_bytes(), &bytes[..Header::SIZE]);
        let limit = 1 << 20;
        match header.payload_len(limit) {
            Ok(len) => {
                assert!(len + Header::SIZE <= limit && len + Header::SIZE == header.message_size as usize)
            }
            Err(_) => assert!(header.message_size < 16 || header.message_size as usize > limit),
        }
        let _ = (
            header.flags.message_type(),
            header.no_reply(),
            header.command.to_string(),
        );
        assert_eq!(header.error_reply(22).message_size as usize, Header::SIZE);
        payload(rest);
    }
    payload(bytes);
}

fn payload(bytes: &[u8]) {
    version(bytes);
    sparse(bytes);
    if let Ok((set, data)) = IrqSet::read_from_prefix(bytes) {
        for (available, fds) in [(0, 0), (1, 1), (2048, 16), (u32::MAX, set.count as usize)] {
            if let Ok((form, _)) = set.validate(available, data.len(), fds) {
                assert!(u64::from(set.start) + u64::from(set.count) <= u64::from(available));
                match form {
                    IrqData::None => assert!(data.is_empty() && fds == 0),
                    IrqData::Bool => assert!(data.len() == set.count as usize && fds == 0),
                    IrqData::EventFd => assert!(fds == 0 || fds == set.count as usize),
                }
            }
        }
    }
    round_trip::<DmaMap>(bytes);
    round_trip::<DmaUnmap>(bytes);
    round_trip::<RegionAccess>(bytes);
    round_trip::<RegionInfo>(bytes);
    round_trip::<IoFdsInfo>(bytes);
    round_trip::<IoFd>(bytes);
    round_trip::<VersionHeader>(bytes);
}

fn round_trip<T: FromBytes + IntoBytes + KnownLayout + Immutable>(bytes: &[u8]) {
    if let Ok((value, _)) = T::read_from_prefix(bytes) {
        assert_eq!(value.as_bytes(), &bytes[..size_of::<T>()]);
    }
}

fn version(bytes: &[u8]) {
    let Ok((header, data)) = VersionData::parse(bytes) else {
        return;
    };
    let mut out = Vec::new();
    data.encode(header, &mut out);
    let (again_header, again) = VersionData::parse(&out).expect("what was encoded can be read");
    assert_eq!((again_header, again), (header, data.clone()));
    #[allow(clippy::needless_update)] // Capabilities are added.
    let ours = Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(1 << 20),
        pgsizes: Some(4096),
        max_dma_maps: Some(65535),
        write_multiple: Some(false),
        ..Capabilities::default()
    };
    let answer = VersionData {
        capabilities: data.capabilities.as_ref().map(|theirs| ours.answer_to(theirs)),
    };
    let mut out = Vec::new();
    answer.encode_within(header, bytes.len(), &mut out);
    assert!(out.len() <= bytes.len(), "the reply is longer than the request");
    VersionData::parse(&out).expect("a shortened reply can be read");
}

fn sparse(bytes: &[u8]) {
    let Ok(reply) = parse_sparse_mmap(bytes) else {
        return;
    };
    if let Some(areas) = reply.areas {
        assert!(areas.len() * 16 <= bytes.len());
        let areas: Vec<_> = areas.iter().map(|a| (a.offset, a.size)).collect();
        let mut out = RegionInfo {
            argsz: (RegionInfo::SIZE + 16 + 16 * areas.len()) as u32,
            cap_offset: RegionInfo::SIZE as u32,
            ..reply.info
        }
        .as_bytes()
        .to_vec();
        encode_sparse_mmap(&areas, &mut out);
        let again = parse_sparse_mmap(&out).expect("what was encoded can be read");
        let again: Vec<_> = again
            .areas
            .into_iter()
            .flatten()
            .map(|a| (a.offset, a.size))
            .collect();
        assert_eq!(again, areas);
    }
}
