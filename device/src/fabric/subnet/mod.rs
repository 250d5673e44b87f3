//! The subnet manager: LIDs, multicast groups, services. One process of a fabric has it; in the others only their
//! own ports are listed, and LIDs come over the trunk.

pub(super) mod sa;
#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use protos::ib::mad::{McMemberRecord, ServiceRecord, mc_member, path_record};
use protos::ib::{Gid, Lid, Mtu, Pkey};

use super::adapter::{AttachError, PortEvents};

/// LIDs of a process that joins the fabric.
pub(super) const BLOCK: u16 = 256;
/// Most groups and services; a subnet that grows without end is a fault of its users.
const MOST: usize = 4096;
/// Q_Key of IPoIB's broadcast group, as subnet managers give it.
const IPOIB_QKEY: u32 = 0x0b1b;

/// A port that has been seen.
pub(super) struct PortEntry {
    pub(super) gid: Gid,
    pub(super) lid: Lid,
    /// `None`: of another process.
    pub(super) local: Option<Local>,
}

/// What only ports of this process have.
pub(super) struct Local {
    pub(super) number: u8,
    pub(super) events: Option<Arc<dyn PortEvents>>,
}

/// A multicast group.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) record: McMemberRecord,
    /// Ports and how they joined.
    pub(super) members: BTreeMap<Gid, u8>,
    /// It stays without members.
    pub(super) permanent: bool,
}

/// Everything that the subnet manager knows.
pub(super) struct Subnet {
    pub(super) prefix: u64,
    /// Its LID; [`Lid::NONE`] until it is known.
    pub(super) manager: Lid,
    /// LIDs that are given to ports here: first, and one past the last.
    pub(super) lids: (u16, u16),
    pub(super) ports: Vec<PortEntry>,
    pub(super) groups: BTreeMap<Gid, Group>,
    pub(super) services: Vec<ServiceRecord>,
    /// The number of the block that was given last.
    last_block: u16,
}

impl std::fmt::Debug for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subnet")
            .field("manager", &self.manager)
            .field("lids", &self.lids)
            .field("ports", &self.ports.len())
            .field("groups", &self.groups.len())
            .finish_non_exhaustive()
    }
}

/// LID of the subnet manager.
pub(super) const MANAGER: Lid = Lid(1);

impl Subnet {
    /// With the manager in this process.
    pub(super) fn managing(prefix: u64) -> Self {
        let mut subnet = Self {
            prefix,
            manager: MANAGER,
            lids: (2, BLOCK),
            ports: Vec::new(),
            groups: BTreeMap::new(),
            services: Vec::new(),
            last_block: 0,
        };
        subnet.broadcast_groups();
        subnet
    }

    /// With the manager elsewhere: ports are down until LIDs come.
    pub(super) fn managed(prefix: u64) -> Self {
        Self {
            prefix,
            manager: Lid::NONE,
            lids: (0, 0),
            ports: Vec::new(),
            groups: BTreeMap::new(),
            services: Vec::new(),
            last_block: 0,
        }
    }

    /// IPoIB wants its broadcast group to be there (RFC 4391 section 5); IPv4's and the one for all nodes of IPv6
    /// follow from it.
    fn broadcast_groups(&mut self) {
        let mut mgid = [0; 16];
        mgid[..6].copy_from_slice(&[0xff, 0x12, 0x40, 0x1b, 0xff, 0xff]);
        mgid[12..].fill(0xff);
        let record = McMemberRecord {
            mgid: Gid(mgid),
            qkey: IPOIB_QKEY.into(),
            mlid: Lid::FIRST_MULTICAST.0.into(),
            mtu: path_record::EXACTLY | Mtu::B4096.code(),
            pkey: Pkey::DEFAULT.0.into(),
            rate: path_record::EXACTLY | path_record::RATE_100_GBPS,
            life_time: path_record::EXACTLY | sa::LIFE_TIME,
            scope_join: 2 << 4,
            ..McMemberRecord::default()
        };
        self.groups.insert(
            Gid(mgid),
            Group {
                record,
                members: BTreeMap::new(),
                permanent: true,
            },
        );
    }

    /// A LID for a new port of this process; none yet where the manager is elsewhere and has not been heard.
    pub(super) fn join(
        &mut self,
        gid: Gid,
        events: Option<Arc<dyn PortEvents>>,
        number: u8,
    ) -> Result<Lid, AttachError> {
        if self.ports.iter().any(|port| port.gid == gid) {
            return Err(AttachError::Guid(gid.guid()));
        }
        let lid = if self.manager == Lid::NONE {
            Lid::NONE
        } else {
            self.free_lid().ok_or(AttachError::Full)?
        };
        self.ports.push(PortEntry {
            gid,
            lid,
            local: Some(Local { number, events }),
        });
        Ok(lid)
    }

    pub(super) fn free_lid(&self) -> Option<Lid> {
        (self.lids.0..self.lids.1)
            .map(Lid)
            .find(|lid| self.ports.iter().all(|port| port.lid != *lid))
    }

    /// A port is gone, and what it had joined and offered.
    pub(super) fn leave(&mut self, gid: Gid) {
        self.ports.retain(|port| port.gid != gid);
        for group in self.groups.values_mut() {
            group.members.remove(&gid);
        }
        self.groups
            .retain(|_, group| group.permanent || !group.members.is_empty());
        self.services.retain(|service| service.gid != gid);
    }

    /// LIDs for another process, of which `taken` says whether somebody has them: the wanted block if it is free, else
    /// the next free one. (Blocks go round, so that who comes back in a while finds its own.)
    pub(super) fn block(&mut self, wanted: u16, taken: impl Fn(u16) -> bool) -> Option<(u16, u16)> {
        // (The first block is this process's.)
        let blocks = Lid::LAST_UNICAST.0 / BLOCK - 1;
        let free = |number: &u16| !taken(number * BLOCK);
        let own = wanted / BLOCK;
        let own = (wanted.is_multiple_of(BLOCK) && (1..=blocks).contains(&own)).then_some(own);
        let number = match own.filter(free) {
            Some(own) => own,
            None => {
                let mut next = (0..blocks).map(|step| (self.last_block + step) % blocks + 1);
                self.last_block = next.find(free)?;
                self.last_block
            }
        };
        Some((number * BLOCK, (number + 1) * BLOCK))
    }

    /// Ports that get what is sent to a multicast LID.
    pub(super) fn members(&self, mlid: Lid) -> Vec<Gid> {
        let receives = mc_member::FULL | mc_member::NON_MEMBER;
        self.groups
            .values()
            .filter(|group| group.record.mlid.get() == mlid.0)
            .flat_map(|group| group.members.iter())
            .filter(|(_, join)| **join & receives != 0)
            .map(|(gid, _)| *gid)
            .collect()
    }

    fn free_mlid(&self) -> Option<Lid> {
        if self.groups.len() >= MOST {
            return None;
        }
        (Lid::FIRST_MULTICAST.0..=Lid::LAST_MULTICAST.0)
            .map(Lid)
            .find(|lid| self.groups.values().all(|group| group.record.mlid.get() != lid.0))
    }
}
