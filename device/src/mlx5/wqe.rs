//! Send WQEs as requests of the transport.

use protos::ib::{Gid, Lid, Qkey, Qpn};
use protos::mlx5::qp::ServiceType;
use protos::mlx5::wqe::{
    AV_EXTENDED, AV_GRH, AV_SHORT, AddressVector, Atomic, BLOCK, Control, Data, FENCE_MASK, INLINE,
    INLINE_MASK, Opcode, RemoteAddress, SEGMENT, Xrc,
};
use zerocopy::FromBytes;

use super::port::PortView;
use crate::transport::{Action, Datagram, Fence, Global, Path, Remote, Request};

/// [`Request::cookie`]: a completion is wanted.
pub(super) const WANTS_CQE: u32 = 1;
/// [`Request::cookie`]: shift of the WQE's opcode.
pub(super) const OPCODE_SHIFT: u32 = 8;

/// A piece of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// In the driver's memory.
    Memory { lkey: u32, va: u64, len: u64 },
    /// In the WQE, at this offset.
    Inline { at: usize, len: u64 },
}

impl Piece {
    pub(super) fn len(self) -> u64 {
        match self {
            Self::Memory { len, .. } | Self::Inline { len, .. } => len,
        }
    }
}

/// The data segments from `at` on, one after the other. Ends at what is no segment.
#[derive(Debug, Clone)]
pub(super) struct Pieces<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Length 0 means 2 GiB (send queues), or nothing (receive queues, which end at a key).
    zero_is_all: bool,
    malformed: bool,
}

impl<'a> Pieces<'a> {
    pub(super) fn of_send(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            zero_is_all: true,
            malformed: false,
        }
    }

    pub(super) fn of_receive(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            zero_is_all: false,
            malformed: false,
        }
    }

    /// The sum of all pieces; `None` when an inline segment ends after the WQE.
    fn total(mut self) -> Option<u64> {
        let mut total = 0u64;
        for piece in &mut self {
            total += piece.len();
        }
        (!self.malformed).then_some(total)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let (data, _) = Data::read_from_prefix(self.bytes.get(self.at..)?).ok()?;
        let count = data.byte_count.get();
        if count & INLINE != 0 && self.zero_is_all {
            let len = (count & INLINE_MASK) as usize;
            let at = self.at + 4;
            if at + len > self.bytes.len() {
                self.malformed = true;
                return None;
            }
            self.at = (at + len).next_multiple_of(SEGMENT);
            return Some(Piece::Inline { at, len: len as u64 });
        }
        self.at += SEGMENT;
        if !self.zero_is_all && data.lkey.get() == protos::mlx5::wqe::INVALID_LKEY && count == 0 {
            return None;
        }
        let len = match count & !INLINE {
            0 if self.zero_is_all => 1 << 31,
            len => u64::from(len),
        };
        Some(Piece::Memory {
            lkey: data.lkey.get(),
            va: data.address.get(),
            len,
        })
    }
}

/// A WQE that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) request: Request,
    /// Where the data segments begin.
    pub(super) data: usize,
    /// It makes no sense: it completes with an error when its turn comes.
    pub(super) malformed: bool,
}

/// Whether requests of that service name their destination themselves.
pub(super) fn is_datagram(service: ServiceType) -> bool {
    matches!(service, ServiceType::UD | ServiceType::QP0 | ServiceType::QP1)
}

/// What a WQE at block `index` says; `bytes` are all of it. `None` when there is not even a head.
pub(super) fn parse(bytes: &[u8], index: u32, service: ServiceType, port: &PortView) -> Option<Parsed> {
    let (control, _) = Control::read_from_prefix(bytes).ok()?;
    let blocks = bytes.len().div_ceil(BLOCK) as u32;
    let opcode = control.opcode();
    let mut request = Request {
        next: index.wrapping_add(blocks),
        fence: fence(control.fm_ce_se),
        solicited: control.solicited(),
        cookie: u32::from(control.wants_cqe()) | u32::from(opcode.0) << OPCODE_SHIFT,
        ..Request::new(index, Action::Local, 0)
    };
    let parsed = body(bytes, &control, service, port, &mut request);
    if parsed.is_none() {
        request.action = Action::Local;
        request.len = 0;
        request.datagram = None;
    }
    Some(Parsed {
        request,
        data: parsed.unwrap_or(0),
        malformed: parsed.is_none(),
    })
}

/// Where the data segments begin; `None` when it makes no sense.
fn body(
    bytes: &[u8],
    control: &Control,
    service: ServiceType,
    port: &PortView,
    request: &mut Request,
) -> Option<usize> {
    let mut at = size_of::<Control>();
    let opcode = control.opcode();
    if matches!(opcode, Opcode::NOP | Opcode::UMR) {
        return Some(at);
    }
    match service {
        _ if is_datagram(service) => {
            let (datagram, size) = datagram(bytes.get(at..)?, port)?;
            request.datagram = Some(datagram);
            at += size;
        }
        ServiceType::XRC => {
            let (xrc, _) = Xrc::read_from_prefix(bytes.get(at..)?).ok()?;
            request.xrc_srqn = xrc.srqn.get() & 0xff_ffff;
            at += SEGMENT;
        }
        ServiceType::RC | ServiceType::UC => {}
        _ => return None,
    }
    let mut remote = || {
        let (segment, _) = RemoteAddress::read_from_prefix(bytes.get(at..)?).ok()?;
        at += SEGMENT;
        Some(Remote {
            rkey: segment.rkey.get(),
            va: segment.address.get(),
        })
    };
    let imm = control.imm.get();
    request.action = match opcode {
        Opcode::SEND => Action::Send,
        Opcode::SEND_IMM => Action::SendImmediate(imm),
        Opcode::SEND_INVALIDATE => Action::SendInvalidate(imm),
        Opcode::RDMA_WRITE => Action::Write(remote()?),
        Opcode::RDMA_WRITE_IMM => Action::WriteImmediate(remote()?, imm),
        Opcode::RDMA_READ => Action::Read(remote()?),
        Opcode::ATOMIC_CS | Opcode::ATOMIC_FA => {
            let place = remote()?;
            let (atomic, _) = Atomic::read_from_prefix(bytes.get(at..)?).ok()?;
            at += SEGMENT;
            if opcode == Opcode::ATOMIC_CS {
                Action::CompareSwap {
                    at: place,
                    compare: atomic.compare.get(),
                    swap: atomic.swap_add.get(),
                }
            } else {
                Action::FetchAdd {
                    at: place,
                    add: atomic.swap_add.get(),
                }
            }
        }
        _ => return None,
    };
    let total = Pieces::of_send(bytes, at).total()?;
    request.len = match request.action {
        Action::CompareSwap { .. } | Action::FetchAdd { .. } => 8,
        _ => u32::try_from(total).ok()?,
    };
    Some(at)
}

fn fence(fm_ce_se: u8) -> Fence {
    match fm_ce_se & FENCE_MASK {
        0 => Fence::None,
        // Small fences are about our own local operations, which are done in order anyway.
        0x20 => Fence::None,
        0x40 | 0x80 => Fence::Reads,
        _ => Fence::All,
    }
}

fn datagram(bytes: &[u8], port: &PortView) -> Option<(Datagram, usize)> {
    let mut av = AddressVector::read_from_bytes(&[0; size_of::<AddressVector>()]).expect("any bytes are one");
    let short = bytes.len() < size_of::<AddressVector>();
    let size = if short {
        AV_SHORT
    } else {
        size_of::<AddressVector>()
    };
    {
        use zerocopy::IntoBytes;
        av.as_mut_bytes()[..size].copy_from_slice(bytes.get(..size)?);
    }
    let extended = av.dqp.get() & AV_EXTENDED != 0;
    let word = av.grh_gid_fl.get();
    let global = (extended && word & AV_GRH != 0).then(|| Global {
        sgid: port.gid((word >> 20 & 0xff) as u8),
        dgid: Gid(av.rgid),
        flow_label: word & 0xf_ffff,
        traffic_class: av.tclass,
        hop_limit: av.hop_limit,
    });
    let datagram = Datagram {
        path: Path {
            port: 1,
            slid: port.lid,
            dlid: Lid(av.rlid.get()),
            sl: av.stat_rate_sl & 0xf,
            global,
        },
        dest: Qpn::new(av.dqp.get() & Qpn::MASK),
        qkey: Qkey(av.qkey.get()),
    };
    Some((datagram, if extended { size } else { AV_SHORT }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn port() -> PortView {
        PortView::NOWHERE
    }

    fn data(len: u32, lkey: u32, va: u64) -> [u8; 16] {
        let data = Data {
            byte_count: len.into(),
            lkey: lkey.into(),
            address: va.into(),
        };
        data.as_bytes().try_into().unwrap()
    }

    #[test]
    fn test_write_when_parsed_has_its_address_and_pieces() {
        let mut bytes = Control::new(Opcode::RDMA_WRITE, 5, 0x42, 4).as_bytes().to_vec();
        bytes[11] = 8;
        bytes.extend(0x1122_3344_5566_7788u64.to_be_bytes());
        bytes.extend(0xaabbu32.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(data(100, 7, 0x1000));
        bytes.extend(data(28, 8, 0x2000));
        let parsed = parse(&bytes, 5, ServiceType::RC, &port()).unwrap();
        assert!(!parsed.malformed);
        let request = parsed.request;
        assert_eq!((request.index, request.next, request.len), (5, 6, 128));
        assert_eq!(
            request.action,
            Action::Write(Remote {
                rkey: 0xaabb,
                va: 0x1122_3344_5566_7788
            })
        );
        assert_eq!(request.cookie, WANTS_CQE | 8 << OPCODE_SHIFT);
        assert_eq!(Pieces::of_send(&bytes, parsed.data).count(), 2);
    }

    #[test]
    fn test_inline_when_longer_than_its_wqe_is_malformed() {
        let mut bytes = Control::new(Opcode::SEND, 0, 0x42, 2).as_bytes().to_vec();
        bytes.extend((INLINE | 12).to_be_bytes());
        bytes.extend([7; 12]);
        assert!(!parse(&bytes, 0, ServiceType::RC, &port()).unwrap().malformed);
        bytes[19] = 13;
        assert!(parse(&bytes, 0, ServiceType::RC, &port()).unwrap().malformed);
    }

    proptest! {
        #[test]
        fn test_wqes_when_of_any_bytes_are_parsed_or_malformed(
            bytes in proptest::collection::vec(any::<u8>(), 0..protos::mlx5::wqe::MAX_SEGMENTS * SEGMENT), service in 0u8..13, index: u32,
        ) {
            if let Some(parsed) = parse(&bytes, index, ServiceType(service), &port()) {
                let total: u64 = Pieces::of_send(&bytes, parsed.data).map(Piece::len).sum();
                prop_assert!(parsed.malformed || parsed.request.len == 8
                    || parsed.request.action == Action::Local || u64::from(parsed.request.len) == total);
            }
            let _ = Pieces::of_receive(&bytes, 16).count();
        }
    }
}
