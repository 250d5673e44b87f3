//! A link that loses, repeats, delays and so reorders packets, the same way for the same seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use protos::ib::Lid;

use crate::transport::{Link, Packet, Time};

/// What happens to packets; each in parts per thousand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Impairments {
    /// Lost.
    pub loss: u16,
    /// Sent twice.
    pub duplicate: u16,
    /// Delayed by up to `delay`; what comes later overtakes it.
    pub reorder: u16,
    /// See `reorder`.
    pub delay: Duration,
}

/// A small generator of pseudo-random numbers (SplitMix64): seeds must give the same run everywhere.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `end`; 0 when that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.roll().checked_rem(end).unwrap_or(0)
    }
    /// Whether something with that probability happens.
    pub fn permille(&mut self, probability: u16) -> bool {
        probability > 0 && self.below(1000) < u64::from(probability)
    }
}

#[derive(Debug)]
struct Delayed {
    at: Time,
    order: u64,
    packet: Packet,
}

impl PartialEq for Delayed {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Delayed {}
impl PartialOrd for Delayed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Delayed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// A link with impairments of what it sends.
#[derive(Debug)]
pub struct Impaired<L> {
    link: L,
    what: Impairments,
    dice: Dice,
    delayed: BinaryHeap<Reverse<Delayed>>,
    order: u64,
}

impl<L: Link> Impaired<L> {
    /// Around a link.
    pub fn new(link: L, what: Impairments, seed: u64) -> Self {
        Self {
            link,
            what,
            dice: Dice::new(seed),
            delayed: BinaryHeap::new(),
            order: 0,
        }
    }

    /// The link inside.
    pub fn inner(&mut self) -> &mut L {
        &mut self.link
    }

    /// Changes what happens from now on.
    pub fn set(&mut self, what: Impairments) {
        self.what = what;
    }

    fn release(&mut self, now: Time) {
        while self.delayed.peek().is_some_and(|Reverse(d)| d.at <= now) {
            if let Some(Reverse(delayed)) = self.delayed.pop() {
                // A full link loses it: that is a fault, too.
                let _ = self.link.transmit(delayed.packet, now);
            }
        }
    }
}

impl<L: Link> Link for Impaired<L> {
    fn transmit(&mut self, packet: Packet, now: Time) -> Result<(), Packet> {
        self.release(now);
        if self.dice.permille(self.what.loss) {
            return Ok(());
        }
        let twice = self.dice.permille(self.what.duplicate).then(|| packet.copy());
        for packet in [Some(packet), twice].into_iter().flatten() {
            if self.dice.permille(self.what.reorder) {
                let nanoseconds = self.what.delay.as_nanos() as u64;
                self.order += 1;
                self.delayed.push(Reverse(Delayed {
                    at: now + Duration::from_nanos(1 + self.dice.below(nanoseconds)),
                    order: self.order,
                    packet,
                }));
            } else {
                self.link.transmit(packet, now)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, now: Time) -> Option<Packet> {
        self.release(now);
        self.link.receive(now)
    }

    fn is_near(&mut self, port: u8, dlid: Lid) -> bool {
        self.link.is_near(port, dlid)
    }

    fn poll_at(&self) -> Option<Time> {
        let delayed = self.delayed.peek().map(|Reverse(d)| d.at);
        match (delayed, self.link.poll_at()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}
