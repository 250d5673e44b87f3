//! Regions: GET_REGION_INFO with its capabilities, GET_REGION_IO_FDS.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::flags;

/// Region of a PCI device (`VFIO_PCI_*_REGION_INDEX` of `<linux/vfio.h>`). 0 to 5 are the BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct RegionIndex(pub u32);

impl RegionIndex {
    /// Expansion ROM.
    pub const ROM: Self = Self(6);
    /// Config space.
    pub const CONFIG: Self = Self(7);
    /// VGA.
    pub const VGA: Self = Self(8);
    /// Regions of a PCI device (`VFIO_PCI_NUM_REGIONS`).
    pub const COUNT: u32 = 9;

    /// The BAR with that number.
    #[must_use]
    pub const fn bar(self) -> Option<usize> {
        if self.0 < 6 { Some(self.0 as usize) } else { None }
    }
}

flags! {
    /// `VFIO_REGION_INFO_FLAG_*` of `<linux/vfio.h>`.
    RegionFlags {
        /// Readable.
        READ = 1;
        /// Writable.
        WRITE = 2;
        /// A file descriptor comes with the reply.
        MMAP = 4;
        /// Capabilities follow.
        CAPS = 8;
    }
}

/// Payload of DEVICE_GET_REGION_INFO and head of its reply's, 32 bytes (`struct vfio_region_info`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RegionInfo {
    /// Room for (request), or full size of (reply) the reply's payload.
    pub argsz: u32,
    /// Attributes.
    pub flags: RegionFlags,
    /// Region number.
    pub index: RegionIndex,
    /// Offset of the first capability from the start of this structure.
    pub cap_offset: u32,
    /// Bytes of the region.
    pub size: u64,
    /// Offset in the file descriptor of the region's start.
    pub offset: u64,
}

impl RegionInfo {
    /// Bytes.
    pub const SIZE: usize = size_of::<Self>();
}

/// Head of a capability, 8 bytes (`struct vfio_info_cap_header`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct CapabilityHeader {
    /// Which one.
    pub id: u16,
    /// Its version.
    pub version: u16,
    /// Offset of the next one from the start of [`RegionInfo`]; 0 = last.
    pub next: u32,
}

impl CapabilityHeader {
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    pub const SPARSE_MMAP: u16 = 1;
}

/// After the head: how many areas (`struct vfio_region_info_cap_sparse_mmap`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SparseMmapHeader {
    /// Capability head.
    pub header: CapabilityHeader,
    /// Areas that follow.
    pub nr_areas: u32,
    /// 0.
    pub reserved: u32,
}

/// A part of the region that can be mapped (`struct vfio_region_sparse_mmap_area`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SparseArea {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// Payload of DEVICE_GET_REGION_IO_FDS and head of its reply's, 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IoFdsInfo {
    /// Room for (request), or full size of (reply) the reply's payload.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
    /// Region number.
    pub index: RegionIndex,
    /// Sub-regions that follow (reply).
    pub count: u32,
}

impl IoFdsInfo {
    /// Bytes.
    pub const SIZE: usize = size_of::<Self>();
}

/// Kind of a sub-region's file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct IoFdType(pub u32);

impl IoFdType {
    /// `VFIO_USER_IO_FD_TYPE_IOEVENTFD` (libvfio-user `include/vfio-user.h`).
    pub const IOEVENTFD: Self = Self(0);
    /// `VFIO_USER_IO_FD_TYPE_IOREGIONFD`.
    pub const IOREGIONFD: Self = Self(1);
}

/// A sub-region of the reply to DEVICE_GET_REGION_IO_FDS (ioeventfd form), 40 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IoFd {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes; 0 = a write of any size.
    pub size: u64,
    /// Index in the ancillary data.
    pub fd_index: u32,
    /// Kind.
    pub kind: IoFdType,
    /// `KVM_IOEVENTFD_FLAG_*` of `<linux/kvm.h>`.
    pub flags: u32,
    /// 0.
    pub padding: u32,
    /// Value that a write has to have, with KVM_IOEVENTFD_FLAG_DATAMATCH.
    pub datamatch: u64,
}

impl IoFd {
    /// Bytes.
    pub const SIZE: usize = size_of::<Self>();
}

const _: () = assert!(size_of::<RegionInfo>() == 32);
const _: () = assert!(size_of::<CapabilityHeader>() == 8);
const _: () = assert!(size_of::<SparseMmapHeader>() == 16);
const _: () = assert!(size_of::<SparseArea>() == 16);
const _: () = assert!(size_of::<IoFdsInfo>() == 16);
const _: () = assert!(size_of::<IoFd>() == 40);

/// Append the sparse mmap capability for `areas` to `out`. It stands directly after a [`RegionInfo`] and is
/// the last one.
///
/// # Panics
/// With 2^32 areas or more.
pub fn encode_sparse_mmap(areas: &[(u64, u64)], out: &mut Vec<u8>) {
    let header = SparseMmapHeader {
        header: CapabilityHeader {
            id: CapabilityHeader::SPARSE_MMAP,
            version: 1,
            next: 0,
        },
        nr_areas: u32::try_from(areas.len()).expect("a region has few areas"),
        reserved: 0,
    };
    out.extend_from_slice(header.as_bytes());
    for &(offset, size) in areas {
        out.extend_from_slice(SparseArea { offset, size }.as_bytes());
    }
}

/// What a client finds in the reply to DEVICE_GET_REGION_INFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseReply {
    /// The fixed part.
    pub info: RegionInfo,
    /// Areas of the sparse mmap capability; `None` = there is no such capability.
    pub areas: Option<Vec<SparseArea>>,
}

/// A reply whose capabilities are not what they say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SparseReplyError {
    /// Shorter than the fixed part.
    #[error("{0} bytes: shorter than the region info structure (32)")]
    Short(usize),
    /// A capability is not inside the payload, or the list does not advance.
    #[error("capability offset {offset:#x} in a payload of {len} bytes")]
    Offset {
        /// The offset.
        offset: u32,
        /// Payload bytes.
        len: usize,
    },
    /// More areas than the payload holds.
    #[error("{areas} areas in a payload of {len} bytes")]
    Areas {
        /// What it says.
        areas: u32,
        /// Payload bytes.
        len: usize,
    },
}

/// Parse the payload of a DEVICE_GET_REGION_INFO reply.
///
/// # Errors
/// When the payload is shorter than it says, or its capability list leaves it or goes backwards.
pub fn parse_sparse_mmap(payload: &[u8]) -> Result<SparseReply, SparseReplyError> {
    let len = payload.len();
    let (info, _) = RegionInfo::read_from_prefix(payload).map_err(|_| SparseReplyError::Short(len))?;
    let mut reply = SparseReply { info, areas: None };
    // A short reply (argsz larger than the payload) carries the flag and an offset, but no capabilities.
    if !info.flags.contains(RegionFlags::CAPS) || info.argsz as usize > len {
        return Ok(reply);
    }
    let mut offset = info.cap_offset;
    let mut previous = RegionInfo::SIZE as u32 - 1;
    while offset != 0 {
        let bad = SparseReplyError::Offset { offset, len };
        if offset <= previous {
            return Err(bad);
        }
        previous = offset;
        let rest = payload.get(offset as usize..).ok_or(bad)?;
        let (header, _) = CapabilityHeader::read_from_prefix(rest).map_err(|_| bad)?;
        if header.id == CapabilityHeader::SPARSE_MMAP {
            let (sparse, rest) = SparseMmapHeader::read_from_prefix(rest).map_err(|_| bad)?;
            let wanted = sparse.nr_areas as usize;
            if rest.len() / size_of::<SparseArea>() < wanted {
                return Err(SparseReplyError::Areas {
                    areas: sparse.nr_areas,
                    len,
                });
            }
            let areas = rest.chunks_exact(size_of::<SparseArea>()).take(wanted);
            reply.areas = Some(
                areas
                    .map(|area| SparseArea::read_from_bytes(area).expect("an exact chunk"))
                    .collect(),
            );
        }
        offset = header.next;
    }
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(areas: &[(u64, u64)]) -> Vec<u8> {
        let info = RegionInfo {
            argsz: (32 + 16 + 16 * areas.len()) as u32,
            flags: RegionFlags(15),
            index: RegionIndex(2),
            cap_offset: 32,
            size: 1 << 28,
            offset: 0,
        };
        let mut payload = info.as_bytes().to_vec();
        encode_sparse_mmap(areas, &mut payload);
        payload
    }

    #[test]
    fn test_sparse_mmap_when_encoded_has_the_specified_bytes() {
        let payload = encoded(&[(0x1000, 0x2000)]);
        assert_eq!(payload.len(), 64);
        assert_eq!(payload[32..48], [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(payload[48..56], 0x1000u64.to_ne_bytes());
        assert_eq!(payload[56..64], 0x2000u64.to_ne_bytes());
    }

    #[test]
    fn test_sparse_mmap_when_the_list_loops_is_refused() {
        let mut payload = encoded(&[(0, 4096)]);
        payload[36..40].copy_from_slice(&32u32.to_ne_bytes());
        assert!(matches!(
            parse_sparse_mmap(&payload),
            Err(SparseReplyError::Offset { offset: 32, .. })
        ));
    }

    #[test]
    fn test_sparse_mmap_when_areas_are_missing_is_refused() {
        let mut payload = encoded(&[(0, 4096)]);
        payload[40..44].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(matches!(
            parse_sparse_mmap(&payload),
            Err(SparseReplyError::Areas { areas: u32::MAX, .. })
        ));
    }

    proptest! {
        #[test]
        fn test_sparse_mmap_when_round_tripped_is_the_same(areas in proptest::collection::vec(any::<(u64, u64)>(), 0..64)) {
            let reply = parse_sparse_mmap(&encoded(&areas)).unwrap();
            let found: Vec<_> = reply.areas.unwrap().iter().map(|area| (area.offset, area.size)).collect();
            prop_assert_eq!(found, areas);
        }

        #[test]
        fn test_any_region_reply_when_parsed_never_panics(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..256), force in any::<bool>(), offset in 0u32..256,
        ) {
            if force && bytes.len() >= 32 {
                bytes[..4].copy_from_slice(&32u32.to_ne_bytes());
                bytes[4] |= 8;
                bytes[12..16].copy_from_slice(&offset.to_ne_bytes());
            }
            let _ = parse_sparse_mmap(&bytes);
        }

        #[test]
        fn test_any_io_fd_when_parsed_round_trips(bytes in any::<[u8; 40]>()) {
            let io_fd = IoFd::read_from_bytes(&bytes).unwrap();
            prop_assert_eq!(io_fd.as_bytes(), &bytes[..]);
            let head = IoFdsInfo::read_from_bytes(&bytes[..16]).unwrap();
            prop_assert_eq!(head.as_bytes(), &bytes[..16]);
        }
    }
}
