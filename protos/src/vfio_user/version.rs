//! VERSION: the fixed part and its JSON.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_DMA_MAPS, DEFAULT_MAX_MSG_FDS, DEFAULT_PGSIZES};

/// Head of the payload of VERSION and of its reply, 4 bytes. The JSON follows, NUL-terminated, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct VersionHeader {
    /// Major version: must be the same on both sides.
    pub major: u16,
    /// Minor version: the smaller one counts.
    pub minor: u16,
}

const _: () = assert!(size_of::<VersionHeader>() == 4);

/// Capabilities (spec, VERSION). Each is optional; unknown ones are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// File descriptors that the sender accepts in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u32>,
    /// Data bytes that the sender accepts in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u32>,
    /// Page sizes for DMA_MAP, or'ed together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// DMA mappings at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u32>,
    /// REGION_WRITE_MULTI is supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Commands of the server on a socket of their own (libvfio-user `docs/vfio-user.rst`; not in QEMU's
    /// specification).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
}

/// Parameters of the twin socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TwinSocket {
    /// The sender can do it.
    #[serde(default)]
    pub supported: bool,
    /// Which of the file descriptors that come with the reply is the client's end. Only in a reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

impl Capabilities {
    /// `max_msg_fds`, or its default.
    #[must_use]
    pub fn max_msg_fds(&self) -> u32 {
        self.max_msg_fds.unwrap_or(DEFAULT_MAX_MSG_FDS)
    }

    /// `max_data_xfer_size`, or its default.
    #[must_use]
    pub fn max_data_xfer_size(&self) -> u32 {
        self.max_data_xfer_size.unwrap_or(DEFAULT_MAX_DATA_XFER_SIZE)
    }

    /// `pgsizes`, or its default.
    #[must_use]
    pub fn pgsizes(&self) -> u64 {
        self.pgsizes.unwrap_or(DEFAULT_PGSIZES)
    }

    /// `max_dma_maps`, or its default.
    #[must_use]
    pub fn max_dma_maps(&self) -> u32 {
        self.max_dma_maps.unwrap_or(DEFAULT_MAX_DMA_MAPS)
    }

    /// The answer of a sender with capabilities `self` to a peer that proposed `proposed`: only what the
    /// peer named ("the capability list must be a subset of those proposed").
    #[must_use]
    pub fn answer_to(&self, proposed: &Self) -> Self {
        Self {
            max_msg_fds: self.max_msg_fds.filter(|_| proposed.max_msg_fds.is_some()),
            max_data_xfer_size: self
                .max_data_xfer_size
                .filter(|_| proposed.max_data_xfer_size.is_some()),
            pgsizes: self.pgsizes.filter(|_| proposed.pgsizes.is_some()),
            max_dma_maps: self.max_dma_maps.filter(|_| proposed.max_dma_maps.is_some()),
            write_multiple: self
                .write_multiple
                .zip(proposed.write_multiple)
                .map(|(ours, theirs)| ours && theirs),
            twin_socket: self
                .twin_socket
                .filter(|_| proposed.twin_socket.is_some_and(|twin| twin.supported)),
        }
    }
}

/// The JSON of VERSION.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VersionData {
    /// Capabilities; optional.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
}

/// A VERSION payload that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// Shorter than the two numbers.
    #[error("{0} bytes: shorter than the version numbers (4)")]
    Short(usize),
    /// The JSON has no terminating NUL.
    #[error("the version data has no terminating NUL")]
    Unterminated,
    /// Not JSON, or the wrong types.
    #[error("the version data cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

impl VersionData {
    /// Parse a VERSION payload. No data at all is the same as `{}`.
    ///
    /// # Errors
    /// See [`VersionError`]. Any bytes are safe to give.
    pub fn parse(payload: &[u8]) -> Result<(VersionHeader, Self), VersionError> {
        let (header, data) =
            VersionHeader::read_from_prefix(payload).map_err(|_| VersionError::Short(payload.len()))?;
        let data = match data {
            [] => return Ok((header, Self::default())),
            [json @ .., 0] => json,
            _ => return Err(VersionError::Unterminated),
        };
        if data.is_empty() {
            return Ok((header, Self::default()));
        }
        // An inner NUL is no JSON: serde_json refuses it.
        Ok((header, serde_json::from_slice(data)?))
    }

    /// Whether a VERSION payload is that of a client built on the registry's `vfio_user` crate (Cloud Hypervisor):
    /// it names three capabilities, each with the specification's default. No other known client says exactly
    /// that (libvfio-user's sample names the same three with limits of its own).
    #[must_use]
    pub fn is_from_vfio_user_crate(payload: &[u8]) -> bool {
        let Some([json @ .., 0]) = payload.get(size_of::<VersionHeader>()..) else {
            return false;
        };
        let Ok(serde_json::Value::Object(data)) = serde_json::from_slice(json) else {
            return false;
        };
        let Some(serde_json::Value::Object(named)) = data.get("capabilities") else {
            return false;
        };
        let is = |name: &str, default: u32| named.get(name).and_then(|v| v.as_u64()) == Some(default.into());
        data.len() == 1
            && named.len() == 3
            && is("max_msg_fds", DEFAULT_MAX_MSG_FDS)
            && is("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE)
            && named
                .get("migration")
                .is_some_and(|migration| migration.get("pgsize").is_some())
    }

    /// Append the payload to `out`.
    ///
    /// # Panics
    /// Never: numbers and booleans always serialise.
    pub fn encode(&self, header: VersionHeader, out: &mut Vec<u8>) {
        out.extend_from_slice(header.as_bytes());
        serde_json::to_writer(&mut *out, self).expect("numbers and booleans serialise");
        out.push(0);
    }

    /// As [`Self::encode`], but no longer than `limit` bytes: QEMU reads the reply into the buffer of its
    /// request and exits when it does not fit. Capabilities whose absence changes least go first; at the
    /// end nothing but the two numbers is left (which peers read as the defaults). Returns what was sent.
    pub fn encode_within(&self, header: VersionHeader, limit: usize, out: &mut Vec<u8>) -> Self {
        let start = out.len();
        let mut data = self.clone();
        for dropped in 0..=5 {
            out.truncate(start);
            data.encode(header, out);
            if out.len() - start <= limit {
                return data;
            }
            let Some(capabilities) = &mut data.capabilities else {
                break;
            };
            match dropped {
                0 => capabilities.write_multiple = None,
                1 => capabilities.pgsizes = None,
                2 => capabilities.max_dma_maps = None,
                3 => capabilities.max_data_xfer_size = None,
                _ => data.capabilities = None,
            }
        }
        out.truncate(start);
        out.extend_from_slice(header.as_bytes());
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OURS: Capabilities = Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(1 << 20),
        pgsizes: Some(4096),
        max_dma_maps: Some(65535),
        write_multiple: Some(true),
        twin_socket: None,
    };
    const V: VersionHeader = VersionHeader { major: 0, minor: 1 };

    #[test]
    fn test_crates_version_when_compared_is_told_from_other_clients() {
        let says = |json: &str| {
            let payload = [&[0, 0, 1, 0], json.as_bytes(), &[0]].concat();
            VersionData::is_from_vfio_user_crate(&payload)
        };
        assert!(says(
            r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}"#
        ));
        for other in [
            // libvfio-user's sample client, and others built on it.
            r#"{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024,"migration":{"pgsize":4096}}}"#,
            r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#,
            // QEMU names more.
            r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535,"migration":{"pgsize":4096},"write_multiple":true}}"#,
            r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096},"pgsizes":4096}}"#,
            r#"{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":7}}"#,
            "{}",
            "[]",
            "nonsense",
            "",
        ] {
            assert!(!says(other), "{other}");
        }
        assert!(!VersionData::is_from_vfio_user_crate(&[0, 0]));
        assert!(!VersionData::is_from_vfio_user_crate(&[0, 0, 1, 0]));
    }

    #[test]
    fn test_version_when_data_is_missing_or_empty_gives_defaults() {
        for payload in [&[0u8, 0, 1, 0][..], &[0, 0, 1, 0, 0], b"\0\0\x01\0{}\0"] {
            let (header, data) = VersionData::parse(payload).unwrap();
            assert_eq!((header, data.capabilities), (V, None));
        }
        let defaults = Capabilities::default();
        assert_eq!(
            (defaults.max_msg_fds(), defaults.max_data_xfer_size()),
            (1, 1 << 20)
        );
    }

    #[test]
    fn test_version_when_malformed_is_refused() {
        assert!(matches!(
            VersionData::parse(b"\0\0\x01"),
            Err(VersionError::Short(3))
        ));
        assert!(matches!(
            VersionData::parse(b"\0\0\x01\0{}"),
            Err(VersionError::Unterminated)
        ));
        assert!(matches!(
            VersionData::parse(b"\0\0\x01\0{\0}\0"),
            Err(VersionError::Json(_))
        ));
        assert!(matches!(
            VersionData::parse(b"\0\0\x01\0[]]\0"),
            Err(VersionError::Json(_))
        ));
        let negative = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":-1}}\0";
        assert!(matches!(VersionData::parse(negative), Err(VersionError::Json(_))));
    }

    #[test]
    fn test_version_when_unknown_capabilities_come_ignores_them() {
        let payload =
            b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"migration\":{\"pgsize\":4096},\"x\":[1]}}\0";
        let (_, data) = VersionData::parse(payload).unwrap();
        assert_eq!(data.capabilities.unwrap().max_msg_fds, Some(8));
    }

    #[test]
    fn test_version_reply_when_answering_qemu_fits_its_request_and_keeps_everything() {
        // 214 bytes in all is what QEMU 11.1.3 sends: 198 of payload.
        let data = VersionData {
            capabilities: Some(OURS.answer_to(&OURS)),
        };
        let mut out = Vec::new();
        data.encode_within(V, 198, &mut out);
        assert!(out.len() <= 198, "{} bytes", out.len());
        assert_eq!(VersionData::parse(&out).unwrap().1, data);
    }

    #[test]
    fn test_version_reply_when_the_peer_named_little_names_no_more() {
        let proposed = Capabilities {
            max_msg_fds: Some(1),
            ..Capabilities::default()
        };
        let answer = OURS.answer_to(&proposed);
        assert_eq!(
            answer,
            Capabilities {
                max_msg_fds: Some(16),
                ..Capabilities::default()
            }
        );
    }

    #[test]
    fn test_twin_socket_when_proposed_is_answered_only_to_those_who_can() {
        let ours = Capabilities {
            twin_socket: Some(TwinSocket {
                supported: true,
                fd_index: Some(0),
            }),
            ..OURS
        };
        let ask = |json: &[u8]| {
            let (_, data) = VersionData::parse(&[b"\0\0\x01\0", json, b"\0"].concat()).unwrap();
            ours.answer_to(&data.capabilities.unwrap()).twin_socket
        };
        assert_eq!(ask(b"{\"capabilities\":{\"max_msg_fds\":8}}"), None);
        assert_eq!(ask(b"{\"capabilities\":{\"twin_socket\":{}}}"), None);
        let twin = ask(b"{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}");
        assert_eq!(twin.unwrap().fd_index, Some(0));
    }

    proptest! {
        #[test]
        fn test_version_reply_when_limited_never_exceeds_the_limit(limit in 4usize..300) {
            let data = VersionData { capabilities: Some(OURS) };
            let mut out = vec![7];
            data.encode_within(V, limit, &mut out);
            prop_assert!(out.len() - 1 <= limit);
            prop_assert!(VersionData::parse(&out[1..]).is_ok());
        }

        #[test]
        fn test_any_version_payload_when_parsed_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = VersionData::parse(&bytes);
        }

        #[test]
        fn test_version_when_round_tripped_is_the_same(
            fds in any::<Option<u32>>(), xfer in any::<Option<u32>>(), pgsizes in any::<Option<u64>>(),
            maps in any::<Option<u32>>(), multi in any::<Option<bool>>(), twin in any::<Option<(bool, Option<u32>)>>(), major: u16, minor: u16,
        ) {
            let capabilities = Capabilities {
                max_msg_fds: fds, max_data_xfer_size: xfer, pgsizes, max_dma_maps: maps, write_multiple: multi,
                twin_socket: twin.map(|(supported, fd_index)| TwinSocket { supported, fd_index }),
            };
            let data = VersionData { capabilities: Some(capabilities) };
            let mut out = Vec::new();
            data.encode(VersionHeader { major, minor }, &mut out);
            let (header, parsed) = VersionData::parse(&out).unwrap();
            prop_assert_eq!((header.major, header.minor), (major, minor));
            prop_assert_eq!(parsed, data);
        }
    }
}
