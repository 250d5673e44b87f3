//! Where packets go and come from.

use protos::ib::Lid;

use super::{Packet, Time};

/// A way to other adapters. Wrappers of links are links (`crate::fabric`).
pub trait Link {
    /// Sends a packet. A full link gives it back; whoever waits is woken when there is room.
    ///
    /// # Errors
    /// The packet, when there is no room.
    #[expect(
        clippy::result_large_err,
        reason = "the packet goes back by value, without an allocation"
    )]
    fn transmit(&mut self, packet: Packet, now: Time) -> Result<(), Packet>;
    /// The next packet that has arrived.
    fn receive(&mut self, now: Time) -> Option<Packet>;
    /// Whether packets for `dlid` that leave through `port` stay in this process and are looked at by nobody else: then
    /// they may name memory ([`super::Loan`]) instead of carrying it. (Said now; it may change before one is sent.)
    fn is_near(&mut self, port: u8, dlid: Lid) -> bool {
        let _ = (port, dlid);
        false
    }
    /// When `receive` may have something although nothing new arrives (links that delay).
    fn poll_at(&self) -> Option<Time> {
        None
    }
}

impl<L: Link + ?Sized> Link for &mut L {
    fn transmit(&mut self, packet: Packet, now: Time) -> Result<(), Packet> {
        (**self).transmit(packet, now)
    }
    fn receive(&mut self, now: Time) -> Option<Packet> {
        (**self).receive(now)
    }
    fn is_near(&mut self, port: u8, dlid: Lid) -> bool {
        (**self).is_near(port, dlid)
    }
    fn poll_at(&self) -> Option<Time> {
        (**self).poll_at()
    }
}

impl<L: Link + ?Sized> Link for Box<L> {
    fn transmit(&mut self, packet: Packet, now: Time) -> Result<(), Packet> {
        (**self).transmit(packet, now)
    }
    fn receive(&mut self, now: Time) -> Option<Packet> {
        (**self).receive(now)
    }
    fn is_near(&mut self, port: u8, dlid: Lid) -> bool {
        (**self).is_near(port, dlid)
    }
    fn poll_at(&self) -> Option<Time> {
        (**self).poll_at()
    }
}
