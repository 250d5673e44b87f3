//! The two checksums at the end of a packet.

use super::{Bth, Grh, Lrh};

/// Invariant CRC (section 7.8.1) over a packet from its LRH to the end of its padded payload, as the four bytes to
/// append. Fields that change on the way count as ones. `None`: shorter than its headers.
#[must_use]
pub fn icrc(packet: &[u8]) -> Option<[u8; 4]> {
    let mut head = [0; size_of::<Lrh>() + size_of::<Grh>() + size_of::<Bth>()];
    let global = packet.get(1)? & 1 != 0;
    let bth = size_of::<Lrh>() + if global { size_of::<Grh>() } else { 0 };
    let len = bth + size_of::<Bth>();
    let head = &mut head[..len];
    head.copy_from_slice(packet.get(..len)?);
    head[0] |= 0xf0; // VL
    if global {
        let grh = size_of::<Lrh>();
        head[grh] |= 0x0f; // traffic class, flow label
        head[grh + 1..grh + 4].fill(0xff);
        head[grh + 7] = 0xff; // hop limit
    }
    head[bth + 4] = 0xff; // reserved, with the congestion bits
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(&packet[len..]);
    // The polynomial and the bit order are Ethernet's; so is the order of the bytes on the wire.
    Some(crc.finalize().to_le_bytes())
}

const VCRC_TABLE: [u16; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u16;
        let mut bit = 0;
        while bit < 8 {
            // 0x100b, reflected.
            crc = if crc & 1 != 0 { crc >> 1 ^ 0xd008 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// Variant CRC (section 7.8.2) over a packet from its LRH to the end of its ICRC, as the two bytes to append.
#[must_use]
pub fn vcrc(packet: &[u8]) -> [u8; 2] {
    let crc = packet.iter().fold(0xffff_u16, |crc, byte| {
        crc >> 8 ^ VCRC_TABLE[usize::from(crc as u8 ^ byte)]
    });
    (!crc).to_le_bytes()
}
