//! A packet, or several in a row that travel as one.

use protos::ib::{
    Aeth, AtomicEth, Deth, Extended, Grh, Lid, Mtu, Opcode, Operation, Pkey, Place, Psn, Qpn, Reth,
};

use super::loan::Loan;
use super::pool::{Buffer, Pool};

/// The header that depends on the opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// None.
    None,
    /// UD.
    Datagram(Deth),
    /// First or only packet of a WRITE; READ request.
    Rdma(Reth),
    /// Atomic request.
    Atomic(AtomicEth),
    /// Acknowledge; READ response but a middle one.
    Ack(Aeth),
    /// Atomic acknowledge, with what was there before.
    AtomicAck(Aeth, u64),
    /// Acknowledges what is before it, and wants this packet and what follows again, with bytes instead of a loan. An
    /// answer to a loan only, so it never leaves the process.
    Recall,
}

/// `count` packets in a row of one message, in one piece: what segmentation offload is to Ethernet. Inside a process
/// they are never cut; links that leave it cut them ([`Packet::cut`]).
///
/// Payload of every packet but the last is `mtu` long. The opcode is that of the whole: "only" with a count of 3 is
/// a first, a middle and a last packet.
#[derive(Debug)]
pub struct Packet {
    /// Port of the adapter: where it leaves, where it came in.
    pub port: u8,
    /// Service level.
    pub sl: u8,
    /// Payload of a full packet.
    pub mtu: Mtu,
    /// Source LID.
    pub slid: Lid,
    /// Destination LID.
    pub dlid: Lid,
    /// Partition.
    pub pkey: Pkey,
    /// Opcode of the whole.
    pub opcode: Opcode,
    /// An acknowledgement is wanted (of the last packet).
    pub ack_request: bool,
    /// Solicited event (last packet).
    pub solicited: bool,
    /// Destination queue pair.
    pub dest: Qpn,
    /// Sequence number of the first packet.
    pub psn: Psn,
    /// How many packets.
    pub count: u32,
    /// XRC: shared receive queue.
    pub xrc_srqn: Option<u32>,
    /// Immediate data, or the R_Key to invalidate: the opcode says which.
    pub immediate: Option<u32>,
    /// Opcode's header.
    pub extension: Extension,
    /// Global route header.
    pub global: Option<Grh>,
    /// Payload.
    pub payload: Option<Buffer>,
    /// Payload that is still in the sender's memory; then there is no other.
    pub loan: Option<Loan>,
}

impl Packet {
    /// The payload's bytes, unless they are lent.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.payload.as_deref().unwrap_or(&[])
    }

    /// Bytes of payload, here or lent.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.loan.as_ref().map_or_else(|| self.data().len(), Loan::len)
    }

    /// A copy, payload too, for another destination.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self {
            payload: self.payload.as_ref().map(Buffer::copy),
            loan: self.loan.clone(),
            ..*self
        }
    }

    /// Drops the first `packets` packets. `false`, and nothing dropped: there are not so many, or the payload is
    /// shorter than the count says.
    #[must_use]
    pub fn skip(&mut self, packets: u32) -> bool {
        let bytes = u64::from(packets) * u64::from(self.mtu.bytes());
        let has = self.payload.is_some() || self.loan.is_some();
        if packets >= self.count || has && (self.payload_len() as u64) < bytes {
            return false;
        }
        if packets == 0 {
            return true;
        }
        self.psn = self.psn.add(packets);
        self.count -= packets;
        if let Some(payload) = &mut self.payload {
            payload.skip(bytes as usize);
        }
        if let Some(loan) = &mut self.loan {
            loan.skip(bytes as usize);
        }
        if let Some((operation, ends)) = self.place() {
            self.set_place(operation, Place::new(false, ends));
        }
        true
    }

    /// Whether it is one of those that have a place, and whether it ends a message.
    fn place(&self) -> Option<(Operation, bool)> {
        let operation = self.opcode.operation()?;
        match operation {
            Operation::Send(place, _) | Operation::Write(place, _) | Operation::ReadResponse(place) => {
                Some((operation, place.ends()))
            }
            _ => None,
        }
    }

    fn set_place(&mut self, operation: Operation, place: Place) {
        let extended = |extended| if place.ends() { extended } else { Extended::None };
        let new = match operation {
            Operation::Send(_, e) => Operation::Send(place, extended(e)),
            Operation::Write(_, e) => Operation::Write(place, extended(e)),
            Operation::ReadResponse(_) => Operation::ReadResponse(place),
            other => other,
        };
        self.opcode = Opcode((self.opcode.0 & 0xe0) | (Opcode::new(protos::ib::ServiceType::Rc, new).0));
        let keeps = match new {
            Operation::Write(place, _) => place.begins(),
            Operation::ReadResponse(place) => place != Place::Middle,
            Operation::Send(..) => matches!(self.extension, Extension::Datagram(_)),
            _ => true,
        };
        if !keeps {
            self.extension = Extension::None;
        }
        if !place.ends() {
            self.immediate = None;
            self.solicited = false;
            self.ack_request = false;
        }
    }

    /// One packet after the other, as they are on a wire. Payload is copied into `pool`'s buffers. None for a packet
    /// whose payload is lent: it was sent when its way did not lead out of the process yet, and is lost.
    pub fn cut(&self, pool: &Pool, mut each: impl FnMut(Packet)) {
        if self.loan.is_some() || self.extension == Extension::Recall {
            return;
        }
        let whole = self.place();
        let mtu = self.mtu.bytes() as usize;
        for at in 0..self.count {
            let data = self.data();
            let data = data.get(at as usize * mtu..).unwrap_or(&[]);
            let data = &data[..data.len().min(mtu)];
            let mut one = Packet {
                psn: self.psn.add(at),
                count: 1,
                payload: (!data.is_empty()).then(|| {
                    let mut buffer = pool.take(data.len());
                    buffer.copy_from_slice(data);
                    buffer
                }),
                loan: None,
                ..*self
            };
            if self.count > 1
                && let Some((operation, ends)) = whole
            {
                let (first, last) = (at == 0, at + 1 == self.count);
                let begins = match operation {
                    Operation::Send(place, _)
                    | Operation::Write(place, _)
                    | Operation::ReadResponse(place) => place.begins(),
                    _ => true,
                };
                one.set_place(operation, Place::new(begins && first, ends && last));
                one.ack_request = self.ack_request && last;
            }
            each(one);
        }
    }
}
