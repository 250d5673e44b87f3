//! The port's own loopback: packets between the shards of this HCA.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use protos::ib::{Lid, Qpn};

use super::hardware::Hca;
use crate::transport::{Link, Packet, Time};

/// Packets that may wait for a shard.
const CAPACITY: usize = 1024;

/// Packets for a shard.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    packets: Mutex<VecDeque<Packet>>,
}

impl Arrivals {
    fn packets(&self) -> MutexGuard<'_, VecDeque<Packet>> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear(&self) {
        self.packets().clear();
    }
}

/// A shard's way to all shards.
#[derive(Debug)]
pub(super) struct Loopback<'a> {
    pub(super) hca: &'a Hca,
    pub(super) shard: usize,
}

impl Loopback<'_> {
    #[expect(
        clippy::result_large_err,
        reason = "the packet goes back by value, without an allocation"
    )]
    fn put(&self, shard: usize, packet: Packet) -> Result<(), Packet> {
        let to = &self.hca.shards[shard];
        let mut packets = to.arrivals.packets();
        if packets.len() >= CAPACITY {
            return Err(packet);
        }
        let idle = packets.is_empty();
        packets.push_back(packet);
        drop(packets);
        if idle && shard != self.shard {
            to.inbox.wake();
        }
        Ok(())
    }
}

impl Link for Loopback<'_> {
    fn transmit(&mut self, packet: Packet, _now: Time) -> Result<(), Packet> {
        let own = Lid(self.hca.port_view().lid);
        if packet.dest == Qpn::MULTICAST {
            // Unreliable: a shard without room loses its copy.
            for shard in 0..self.hca.shards.len() {
                let _ = self.put(shard, packet.copy());
            }
            return Ok(());
        }
        if packet.dlid != own && packet.dlid != Lid::PERMISSIVE {
            // There is nobody else.
            return Ok(());
        }
        let shard = packet.dest.get() as usize % self.hca.shards.len();
        self.put(shard, packet)
    }

    fn receive(&mut self, _now: Time) -> Option<Packet> {
        let mut packets = self.hca.shards[self.shard].arrivals.packets();
        let full = packets.len() >= CAPACITY;
        let packet = packets.pop_front();
        drop(packets);
        if full {
            // Whoever met the full queue tries again.
            for shard in &self.hca.shards {
                shard.inbox.wake();
            }
        }
        packet
    }
}
