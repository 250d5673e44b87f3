//! The port: what the fabric says of it, and what the driver has said.

use std::sync::atomic::{AtomicU32, Ordering};

use protos::ib::mad::smp;
use protos::ib::{Gid, Lid, Pkey};
use protos::mlx5::commands::MAD_SIZE;

use crate::fabric::Adapter;

/// The number of the only port.
pub(super) const PORT: u8 = 1;
/// Offset of the capability mask in PortInfo (IBA 14.2.5.6).
const CAPABILITIES: usize = 20;
/// Offset of the attribute's number in a MAD.
const ATTRIBUTE: usize = 16;

/// A port as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PortView {
    pub(super) lid: Lid,
    pub(super) gid: Gid,
}

impl PortView {
    /// A port that is connected to nothing.
    pub(super) const NOWHERE: Self = Self {
        lid: Lid::NONE,
        gid: Gid::NONE,
    };

    /// Without a lock: each datagram asks.
    pub(super) fn of(adapter: &Adapter) -> Self {
        let (lid, gid) = adapter
            .address(PORT)
            .expect("the adapter was made with this port");
        Self { lid, gid }
    }

    pub(super) fn is_active(&self) -> bool {
        self.lid != Lid::NONE
    }

    /// The GID of that index; there is one.
    pub(super) fn gid(&self, index: u8) -> Gid {
        if index == 0 { self.gid } else { Gid::NONE }
    }

    /// The P_Key of that index; there is one.
    pub(super) fn pkey(&self, index: u32) -> Pkey {
        if index == 0 { Pkey::DEFAULT } else { Pkey(0) }
    }

    /// IB code of its state: 4 active, 1 down.
    pub(super) fn state(&self) -> u32 {
        if self.is_active() { 4 } else { 1 }
    }

    /// IB code of the physical state: 5 up, 2 polling.
    pub(super) fn physical_state(&self) -> u32 {
        if self.is_active() { 5 } else { 2 }
    }
}

/// Bits that the driver has set in the port's capability mask (PCAP), for the software behind it.
#[derive(Debug, Default)]
pub(super) struct Capabilities(AtomicU32);

impl Capabilities {
    pub(super) fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    pub(super) fn set(&self, mask: u32) {
        self.0.store(mask, Ordering::SeqCst);
    }

    /// Answers a MAD for the device itself; `None` when it is none that anybody answers.
    pub(super) fn answer(&self, adapter: &Adapter, request: &[u8; MAD_SIZE]) -> Option<[u8; MAD_SIZE]> {
        let mut reply = adapter.mad(PORT, request)?;
        let attribute = u16::from_be_bytes([request[ATTRIBUTE], request[ATTRIBUTE + 1]]);
        let class = request[1];
        let management =
            class == protos::ib::mad::class::SUBN_LID || class == protos::ib::mad::class::SUBN_DIRECTED;
        if management && attribute == smp::PORT_INFO {
            let at = smp::DATA + CAPABILITIES;
            let own = u32::from_be_bytes(reply[at..at + 4].try_into().expect("four bytes"));
            reply[at..at + 4].copy_from_slice(&(own | self.get()).to_be_bytes());
        }
        Some(reply)
    }
}
