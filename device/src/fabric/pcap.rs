//! A link that writes down what passes, for Wireshark.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use protos::ib::{Lid, vcrc};

use super::wire::{LONGEST, encode};
use crate::transport::{Link, Packet, Pool, Time};

/// LINKTYPE_INFINIBAND: frames from the LRH to the variant CRC (tcpdump.org, link-layer header types).
const LINKTYPE: u32 = 247;
/// Magic number of a file with nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;

struct File {
    out: Box<dyn Write + Send>,
    bytes: Vec<u8>,
    pool: Pool,
    failed: bool,
}

/// A capture file that several links write to. Clones write to the same one.
#[derive(Clone)]
pub struct Capture {
    file: Arc<Mutex<File>>,
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Capture")
    }
}

impl Capture {
    /// Writes the file's header.
    ///
    /// # Errors
    /// What the file says.
    pub fn new(mut out: Box<dyn Write + Send>) -> io::Result<Self> {
        let mut head = Vec::new();
        head.extend(MAGIC.to_le_bytes());
        head.extend(2u16.to_le_bytes());
        head.extend(4u16.to_le_bytes());
        head.extend([0; 8]);
        head.extend((LONGEST as u32 + 2).to_le_bytes());
        head.extend(LINKTYPE.to_le_bytes());
        out.write_all(&head)?;
        out.flush()?;
        Ok(Self {
            file: Arc::new(Mutex::new(File {
                out,
                bytes: Vec::with_capacity(2 * LONGEST),
                pool: Pool::default(),
                failed: false,
            })),
        })
    }

    /// Writes a packet, cut as on a wire.
    pub fn write(&self, packet: &Packet, now: Time) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = &mut *file;
        if file.failed {
            return;
        }
        let mut result = Ok(());
        packet.cut(&file.pool, |one| {
            file.bytes.clear();
            if result.is_err() || !encode(&one, &mut file.bytes) {
                return;
            }
            let crc = vcrc(&file.bytes);
            file.bytes.extend(crc);
            let mut head = [0; 16];
            let len = (file.bytes.len() as u32).to_le_bytes();
            head[..4].copy_from_slice(&((now.0 / 1_000_000_000) as u32).to_le_bytes());
            head[4..8].copy_from_slice(&((now.0 % 1_000_000_000) as u32).to_le_bytes());
            head[8..12].copy_from_slice(&len);
            head[12..].copy_from_slice(&len);
            result = file
                .out
                .write_all(&head)
                .and_then(|()| file.out.write_all(&file.bytes));
        });
        if let Err(error) = result.and_then(|()| file.out.flush()) {
            tracing::error!(%error, "the packet capture ends here: writing it failed");
            file.failed = true;
        }
    }
}

/// A link whose packets are captured: those it takes, and those it brings from elsewhere.
#[derive(Debug)]
pub struct Captured<L> {
    link: L,
    capture: Option<Capture>,
}

impl<L: Link> Captured<L> {
    /// Around a link; with `None` it changes nothing.
    pub fn new(link: L, capture: Option<Capture>) -> Self {
        Self { link, capture }
    }
}

impl<L: Link> Link for Captured<L> {
    fn transmit(&mut self, packet: Packet, now: Time) -> Result<(), Packet> {
        let Some(capture) = &self.capture else {
            return self.link.transmit(packet, now);
        };
        // (Written before it is taken: afterwards it is gone. One that a full link gives back is seen again.)
        capture.write(&packet, now);
        self.link.transmit(packet, now)
    }

    fn receive(&mut self, now: Time) -> Option<Packet> {
        self.link.receive(now)
    }

    /// A capture shows payload.
    fn is_near(&mut self, port: u8, dlid: Lid) -> bool {
        self.capture.is_none() && self.link.is_near(port, dlid)
    }

    fn poll_at(&self) -> Option<Time> {
        self.link.poll_at()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::tests::{attach, packet};
    use crate::fabric::{Fabric, wire};
    use protos::ib::{Lid, Mtu, Opcode, Qpn};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn test_capture_when_a_segment_passes_has_its_packets_one_by_one() {
        let out = Shared::default();
        let fabric = Fabric::new();
        let (a, _) = attach(&fabric, 0x10, 1);
        let capture = Capture::new(Box::new(out.clone())).unwrap();
        let mut link = Captured::new(a.endpoint(0), Some(capture));
        let mut segment = packet(Lid(2), Qpn::new(7), &[1; 2500]);
        segment.opcode = Opcode(0x04);
        segment.extension = crate::transport::Extension::None;
        segment.mtu = Mtu::B1024;
        segment.count = 3;
        segment.slid = Lid(2);
        link.transmit(segment, Time(5_000_000_007)).unwrap();
        assert_eq!(link.receive(Time::ZERO).unwrap().data().len(), 2500);
        let bytes = out.0.lock().unwrap();
        assert_eq!(bytes[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
        assert_eq!(bytes[20..24], [247, 0, 0, 0]);
        let (mut at, mut lengths) = (24, Vec::new());
        let pool = Pool::default();
        while at < bytes.len() {
            assert_eq!(bytes[at..at + 8], [5, 0, 0, 0, 7, 0, 0, 0]);
            let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
            let frame = &bytes[at + 16..at + 16 + len];
            lengths.push(wire::decode(&frame[..len - 2], &pool).unwrap().data().len());
            assert_eq!(vcrc(&frame[..len - 2]), frame[len - 2..]);
            at += 16 + len;
        }
        assert_eq!(lengths, [1024, 1024, 452]);
    }
}
