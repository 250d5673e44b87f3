//! Packets as the bytes of a wire: LRH to ICRC.

use protos::ib::{
    Aeth, AtomicAckEth, AtomicEth, Bth, Deth, Extended, Grh, Ieth, ImmDt, LinkNextHeader, Lrh, Mtu, Opcode,
    Operation, Place, Reth, ServiceType, Xrceth, icrc,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::transport::{Extension, Packet, Pool};

/// Longest packet: LRH, GRH, BTH, the longest extension headers, the greatest MTU, ICRC, with room to spare.
pub(super) const LONGEST: usize = 4096 + 128 + 64;

/// What is wrong with bytes that should be a packet.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum WireError {
    /// Shorter than its headers.
    #[error("{0} bytes are too few for the packet's headers")]
    Short(usize),
    /// The length in the LRH or GRH is another.
    #[error("the packet has {actual} bytes, its header says {stated}")]
    Length {
        /// As in the LRH.
        stated: usize,
        /// As they are.
        actual: usize,
    },
    /// LNH, or a version.
    #[error("no InfiniBand transport packet (link next header {0})")]
    Kind(u8),
    /// Unknown.
    #[error("opcode {0:#x} is not implemented")]
    Opcode(u8),
    /// Checksum.
    #[error("the invariant CRC is wrong")]
    Crc,
    /// Payload.
    #[error("{0} bytes of payload are more than the greatest MTU")]
    Payload(usize),
}

/// Which headers an opcode has besides the BTH (section 9.2.1 and annex A14).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Headers {
    xrc: bool,
    datagram: bool,
    rdma: bool,
    atomic: bool,
    ack: bool,
    atomic_ack: bool,
    immediate: bool,
}

fn headers(service: ServiceType, operation: Operation) -> Headers {
    let mut headers = Headers {
        datagram: service == ServiceType::Ud,
        ..Headers::default()
    };
    let mut request = true;
    match operation {
        Operation::Send(_, extended) => headers.immediate = extended != Extended::None,
        Operation::Write(place, extended) => {
            headers.rdma = place.begins();
            headers.immediate = extended != Extended::None;
        }
        Operation::ReadRequest => headers.rdma = true,
        Operation::CompareSwap | Operation::FetchAdd => headers.atomic = true,
        Operation::ReadResponse(place) => {
            headers.ack = place != Place::Middle;
            request = false;
        }
        Operation::Acknowledge => {
            headers.ack = true;
            request = false;
        }
        Operation::AtomicAcknowledge => {
            headers.ack = true;
            headers.atomic_ack = true;
            request = false;
        }
    }
    headers.xrc = service == ServiceType::Xrc && request;
    headers
}

/// Appends one packet (`count` is 1). `false`, and nothing appended: its headers do not fit its opcode.
pub(super) fn encode(packet: &Packet, out: &mut Vec<u8>) -> bool {
    let (Some(service), Some(operation)) = (packet.opcode.service(), packet.opcode.operation()) else {
        return false;
    };
    let has = headers(service, operation);
    let start = out.len();
    let data = packet.data();
    let pad = data.len().wrapping_neg() & 3;
    out.extend([0; size_of::<Lrh>()]);
    if let Some(grh) = &packet.global {
        out.extend(grh.as_bytes());
    }
    let bth = Bth::new(packet.opcode, packet.pkey, packet.dest, packet.psn)
        .with_solicited(packet.solicited)
        .with_ack_request(packet.ack_request)
        .with_pad(pad as u8);
    out.extend(bth.as_bytes());
    if has.xrc {
        out.extend(Xrceth::new(packet.xrc_srqn.unwrap_or_default()).as_bytes());
    }
    let fits = match packet.extension {
        Extension::None => !(has.datagram || has.rdma || has.atomic || has.ack),
        Extension::Datagram(deth) => {
            out.extend(deth.as_bytes());
            has.datagram
        }
        Extension::Rdma(reth) => {
            out.extend(reth.as_bytes());
            has.rdma
        }
        Extension::Atomic(eth) => {
            out.extend(eth.as_bytes());
            has.atomic
        }
        Extension::Ack(aeth) => {
            out.extend(aeth.as_bytes());
            has.ack && !has.atomic_ack
        }
        Extension::AtomicAck(aeth, original) => {
            out.extend(aeth.as_bytes());
            out.extend(
                AtomicAckEth {
                    original: original.into(),
                }
                .as_bytes(),
            );
            has.atomic_ack
        }
        Extension::Recall => false,
    };
    if !fits || packet.loan.is_some() || packet.count != 1 || data.len() > Mtu::B4096.bytes() as usize {
        out.truncate(start);
        return false;
    }
    if has.immediate {
        out.extend(packet.immediate.unwrap_or_default().to_be_bytes());
    }
    out.extend(data);
    out.extend([0; 4].iter().take(pad));
    let len = out.len() - start;
    // The ICRC counts, too (sections 7.7.8 and 8.3.3).
    let words = ((len + 4) / 4) as u16;
    let next = if packet.global.is_some() {
        LinkNextHeader::GLOBAL
    } else {
        LinkNextHeader::LOCAL
    };
    let lrh = Lrh::new(packet.slid, packet.dlid, packet.sl, next, words);
    out[start..start + size_of::<Lrh>()].copy_from_slice(lrh.as_bytes());
    if packet.global.is_some() {
        let payload = (len + 4 - size_of::<Lrh>() - size_of::<Grh>()) as u16;
        out[start + 12..start + 14].copy_from_slice(&payload.to_be_bytes());
    }
    let crc = icrc(&out[start..]).expect("LRH and BTH are there");
    out.extend(crc);
    true
}

/// Takes a header off the front.
fn head<T: FromBytes + KnownLayout + Immutable>(bytes: &mut &[u8]) -> Result<T, WireError> {
    let (value, rest) = T::read_from_prefix(bytes).map_err(|_| WireError::Short(bytes.len()))?;
    *bytes = rest;
    Ok(value)
}

/// One packet from bytes that somebody sent.
///
/// # Errors
/// [`WireError`].
pub(super) fn decode(bytes: &[u8], pool: &Pool) -> Result<Packet, WireError> {
    let mut rest = bytes;
    let lrh: Lrh = head(&mut rest)?;
    let stated = usize::from(lrh.words()) * 4;
    if stated != bytes.len() {
        return Err(WireError::Length {
            stated,
            actual: bytes.len(),
        });
    }
    let global: Option<Grh> = match lrh.next() {
        LinkNextHeader::LOCAL => None,
        LinkNextHeader::GLOBAL => Some(head(&mut rest)?),
        LinkNextHeader(other) => return Err(WireError::Kind(other)),
    };
    let bth: Bth = head(&mut rest)?;
    let opcode = bth.opcode();
    let (Some(service), Some(operation)) = (opcode.service(), opcode.operation()) else {
        return Err(WireError::Opcode(opcode.0));
    };
    let has = headers(service, operation);
    let xrc_srqn = if has.xrc {
        Some(head::<Xrceth>(&mut rest)?.srqn())
    } else {
        None
    };
    let extension = if has.datagram {
        Extension::Datagram(head::<Deth>(&mut rest)?)
    } else if has.rdma {
        Extension::Rdma(head::<Reth>(&mut rest)?)
    } else if has.atomic {
        Extension::Atomic(head::<AtomicEth>(&mut rest)?)
    } else if has.atomic_ack {
        let aeth = head::<Aeth>(&mut rest)?;
        Extension::AtomicAck(aeth, head::<AtomicAckEth>(&mut rest)?.original.get())
    } else if has.ack {
        Extension::Ack(head::<Aeth>(&mut rest)?)
    } else {
        Extension::None
    };
    let immediate = match operation {
        _ if !has.immediate => None,
        Operation::Send(_, Extended::Invalidate) => Some(head::<Ieth>(&mut rest)?.rkey.get()),
        _ => Some(head::<ImmDt>(&mut rest)?.data.get()),
    };
    let end = 4 + usize::from(bth.pad());
    let data = rest
        .len()
        .checked_sub(end)
        .and_then(|len| rest.get(..len))
        .ok_or(WireError::Short(bytes.len()))?;
    if data.len() > Mtu::B4096.bytes() as usize {
        return Err(WireError::Payload(data.len()));
    }
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    if icrc(body).as_ref().map(<[u8; 4]>::as_slice) != Some(crc) {
        return Err(WireError::Crc);
    }
    Ok(Packet {
        port: 0,
        sl: lrh.sl(),
        mtu: Mtu::B4096,
        slid: lrh.slid(),
        dlid: lrh.dlid(),
        pkey: bth.pkey(),
        opcode: Opcode(opcode.0),
        ack_request: bth.ack_request(),
        solicited: bth.solicited(),
        dest: bth.dest_qp(),
        psn: bth.psn(),
        count: 1,
        xrc_srqn,
        immediate,
        extension,
        global,
        payload: (!data.is_empty()).then(|| {
            let mut buffer = pool.take(data.len());
            buffer.copy_from_slice(data);
            buffer
        }),
        loan: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::Dice;
    use crate::fabric::tests::packet;
    use protos::ib::{Gid, Lid, Qpn};

    fn shown(packet: &Packet) -> String {
        format!(
            "{:?}",
            Packet {
                mtu: Mtu::B4096,
                port: 0,
                payload: None,
                loan: None,
                ..packet.copy()
            }
        )
    }

    #[test]
    fn test_packets_of_every_opcode_when_encoded_come_back() {
        let pool = Pool::default();
        let mut seen = 0;
        for code in 0..=255 {
            let opcode = Opcode(code);
            let (Some(service), Some(operation)) = (opcode.service(), opcode.operation()) else {
                continue;
            };
            let has = headers(service, operation);
            for len in [0, 1, 2, 3, 4, 255, 4096] {
                let mut one = packet(Lid(9), Qpn::new(7), &vec![0x5a; len]);
                if len == 0 {
                    one.payload = None;
                }
                one.slid = Lid(3);
                one.opcode = opcode;
                one.xrc_srqn = has.xrc.then_some(0x123);
                one.immediate = has.immediate.then_some(0xdead_beef);
                one.ack_request = len % 2 == 0;
                one.extension = if has.datagram {
                    one.extension
                } else if has.rdma {
                    Extension::Rdma(Reth {
                        va: 1.into(),
                        rkey: 2.into(),
                        len: 3.into(),
                    })
                } else if has.atomic {
                    Extension::Atomic(AtomicEth::default())
                } else if has.atomic_ack {
                    Extension::AtomicAck(Aeth::default(), 5)
                } else if has.ack {
                    Extension::Ack(Aeth::new(protos::ib::Syndrome::ACK, 9))
                } else {
                    Extension::None
                };
                one.global = (len == 3).then(|| Grh::new(Gid::NONE, Gid::new(1, 2), 0, 0, 3));
                let mut bytes = Vec::new();
                assert!(encode(&one, &mut bytes), "{opcode:?}");
                let back = decode(&bytes, &pool).unwrap();
                assert_eq!(back.data(), one.data());
                if let (Some(grh), Some(back)) = (&mut one.global, &back.global) {
                    grh.payload_length = back.payload_length;
                }
                assert_eq!(shown(&back), shown(&one));
                seen += 1;
            }
        }
        assert!(seen > 300, "{seen}");
    }

    #[test]
    fn test_any_bytes_when_decoded_are_a_packet_or_an_error() {
        let pool = Pool::default();
        let mut dice = Dice::new(3);
        let mut good = Vec::new();
        assert!(encode(&packet(Lid(9), Qpn::new(7), b"hello"), &mut good));
        for round in 0..50_000 {
            let mut bytes = good.clone();
            match round % 4 {
                0 => bytes.truncate(dice.below(good.len() as u64) as usize),
                1 => {
                    let at = dice.below(good.len() as u64) as usize;
                    bytes[at] ^= 1 + dice.below(255) as u8;
                }
                _ => {
                    for byte in &mut bytes {
                        *byte = dice.roll() as u8;
                    }
                    let words = (bytes.len() / 4) as u16;
                    bytes[1] = 2 + (round % 2) as u8;
                    bytes[4..6].copy_from_slice(&words.to_be_bytes());
                    let len = bytes.len();
                    if let Some(crc) = icrc(&bytes[..len - 4]) {
                        bytes[len - 4..].copy_from_slice(&crc);
                    }
                }
            }
            let _ = decode(&bytes, &pool);
        }
        assert!(decode(&good, &pool).is_ok());
        *good.last_mut().unwrap() ^= 1;
        assert_eq!(decode(&good, &pool).unwrap_err(), WireError::Crc);
    }
}
