//! Queue pairs on a fabric: connected among themselves on one thread, or to those of another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use device::fabric::{Adapter, AdapterConfig, Endpoint, Fabric, Wake};
use device::transport::{Attributes, Config, Path, Settings, State, Time, Transport};
use protos::ib::{Lid, Mtu, Pkey, Psn, Qpn, ServiceType};

use super::owner::{Flat, Kind};

/// Requests of a queue pair that are under way.
const DEPTH: u32 = 16;
/// Nothing completes for so long: something is broken.
const LIMIT: Duration = Duration::from_secs(60);

/// Both threads of the benchmark ask; nobody sleeps.
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

/// One thread's part.
pub struct Rig {
    transport: Transport,
    endpoint: Endpoint,
    /// Queues and memory.
    pub owner: Flat,
    adapter: Adapter,
    qpns: Vec<Qpn>,
    start: Instant,
}

fn first(key: u32) -> Qpn {
    Qpn::new(0x100 + key)
}

impl Rig {
    fn new(fabric: &Fabric, guid: u64, half: usize, keys: usize, transport: Config) -> Result<Self> {
        let config = AdapterConfig {
            system_guid: guid,
            node_guid: guid,
            port_guids: vec![guid + 1],
            shards: 1,
            description: "bench".into(),
            vendor: 0,
            device: 0,
            revision: 0,
            pkeys: vec![Pkey::DEFAULT],
        };
        let adapter = fabric.attach(config, vec![Arc::new(NoWake)], None)?;
        Ok(Self {
            transport: Transport::new(transport),
            endpoint: adapter.endpoint(0),
            owner: Flat::new(half, keys)?,
            adapter,
            qpns: Vec::new(),
            start: Instant::now(),
        })
    }

    fn lid(&self) -> Result<Lid> {
        Ok(self.adapter.port(1).context("port 1 of the adapter")?.lid)
    }

    fn connect(&mut self, own: Qpn, key: u32, dest: Qpn, dlid: Lid) -> Result<()> {
        let settings = Settings {
            service: ServiceType::Rc,
            key,
            shared_receive: true,
        };
        let attributes = Attributes {
            path: Some(Path {
                port: 1,
                slid: self.lid()?,
                dlid,
                sl: 0,
                global: None,
            }),
            mtu: Some(Mtu::B4096),
            dest: Some(dest),
            send_psn: Some(Psn::new(0)),
            receive_psn: Some(Psn::new(0)),
            timeout: Some(20),
            retry_count: Some(7),
            rnr_retry: Some(7),
            min_rnr_timer: Some(12),
            max_initiated: Some(16),
            max_responded: Some(16),
            ..Attributes::default()
        };
        self.transport.create(own, &settings)?;
        for state in [State::Init, State::Rtr, State::Rts] {
            self.transport.modify(own, state, &attributes, &mut self.owner)?;
        }
        Ok(())
    }

    /// `count` queue pairs, each connected to another one of the same adapter.
    pub fn looped(count: u32, half: usize, config: Config) -> Result<Self> {
        let fabric = Fabric::new();
        let mut rig = Self::new(&fabric, 0x10, half, 2 * count as usize, config)?;
        let lid = rig.lid()?;
        for key in 0..count {
            let (a, b) = (first(key), first(count + key));
            rig.connect(a, key, b, lid)?;
            rig.connect(b, count + key, a, lid)?;
            rig.qpns.push(a);
        }
        Ok(rig)
    }

    /// Two of them, with `count` queue pairs connected to each other.
    pub fn two(count: u32, half: usize, config: Config) -> Result<(Self, Self)> {
        let fabric = Fabric::new();
        let mut a = Self::new(&fabric, 0x10, half, count as usize, config)?;
        let mut b = Self::new(&fabric, 0x20, half, count as usize, config)?;
        let (lid_a, lid_b) = (a.lid()?, b.lid()?);
        for key in 0..count {
            a.connect(first(key), key, first(key), lid_b)?;
            b.connect(first(key), key, first(key), lid_a)?;
            a.qpns.push(first(key));
        }
        Ok((a, b))
    }

    fn poll(&mut self) -> bool {
        let now = Time::since(self.start);
        self.transport
            .poll(now, &mut self.owner, &mut self.endpoint)
            .again
    }

    /// Sends `count` messages and waits for their completions.
    pub fn run(&mut self, kind: Kind, len: u32, count: u32) -> Result<Duration> {
        self.owner.measure(kind, len);
        self.owner.completed.clear();
        let (mut posted, mut done) = (0, 0);
        let start = Instant::now();
        'fill: for _ in 0..DEPTH {
            for key in 0..self.qpns.len() as u32 {
                if posted == count {
                    break 'fill;
                }
                posted += 1;
                self.owner.post(key);
            }
        }
        for qpn in &self.qpns {
            self.transport.ring(*qpn);
        }
        let (mut polls, mut idle) = (0u32, 0u32);
        while done < count {
            if !self.poll() {
                idle += 1;
                if idle.is_multiple_of(1024) {
                    std::thread::yield_now();
                }
            }
            // Whatever it says: a transport that sends the same again for ever is not idle.
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(1024) && start.elapsed() > LIMIT {
                bail!("{done} of {count} messages of {len} bytes ({kind:?}) after {LIMIT:?}");
            }
            done += self.owner.completed.len() as u32;
            for at in 0..self.owner.completed.len() {
                if posted == count {
                    break;
                }
                let key = self.owner.completed[at];
                posted += 1;
                self.owner.post(key);
                self.transport.ring(self.qpns[key as usize]);
            }
            self.owner.completed.clear();
        }
        let elapsed = start.elapsed();
        if let Some(what) = self.owner.failed.first() {
            bail!("the transport failed: {what}");
        }
        Ok(elapsed)
    }

    /// Answers until told to stop.
    pub fn serve(&mut self, kind: &AtomicU32, stop: &AtomicBool) {
        let mut idle = 0u32;
        while !stop.load(Ordering::Relaxed) {
            if self.poll() {
                idle = 0;
                continue;
            }
            self.owner.measure(Kind::Send, kind.load(Ordering::Relaxed));
            idle += 1;
            if idle > 10_000 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocations::of_this_thread;

    #[test]
    fn test_messages_when_they_flow_allocate_nothing() {
        for kind in [Kind::Write, Kind::Read, Kind::Send, Kind::Atomic] {
            for len in [8, 3000, 65_536, 200_000] {
                if kind == Kind::Atomic && len != 8 {
                    continue;
                }
                let mut rig = Rig::looped(10, 8 << 20, Config::default()).unwrap();
                // Queues grow to their size, buffers are made.
                rig.run(kind, len, 1000).unwrap();
                let before = of_this_thread();
                rig.run(kind, len, 1000).unwrap();
                assert_eq!(of_this_thread(), before, "{kind:?} of {len} bytes");
            }
        }
    }
}
