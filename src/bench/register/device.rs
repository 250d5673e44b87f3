//! The HCA that is measured: which one, its port and address, and what it cannot do.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use verbs::{Context, Device, Library, LinkLayer, OnDemand, Pair, Port, ProtectionDomain};

use super::options::RegisterArgs;
use super::staging::Staging;
use super::{Mode, limits};
use crate::bench::report::size;

/// What the result says about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// As `ibv_devices` names it.
    pub name: String,
    /// Vendor and model.
    pub vendor_id: u32,
    /// Model.
    pub vendor_part_id: u32,
    /// Firmware.
    pub firmware: String,
    /// Of the node, as 16 digits.
    pub node_guid: String,
    /// Port.
    pub port: u8,
    /// "infiniband" or "ethernet".
    pub link_layer: &'static str,
    /// MTU.
    pub mtu_bytes: u32,
    /// Which address, and what it is.
    pub gid_index: Option<u8>,
    /// The address, as 32 digits.
    pub gid: Option<String>,
    /// Largest region.
    pub max_region_bytes: u64,
    /// On-demand paging: explicit.
    pub on_demand: bool,
    /// Implicit.
    pub on_demand_implicit: bool,
    /// By RC WRITE.
    pub on_demand_rc_write: bool,
    /// By RC READ.
    pub on_demand_rc_read: bool,
    /// ibv_advise_mr.
    pub advise_mr: bool,
    /// Bytes of one work request.
    pub message_bytes: usize,
}

/// A device, ready.
#[derive(Debug)]
pub struct Hca {
    /// What it is.
    pub facts: Facts,
    /// Where regions are made.
    pub domain: ProtectionDomain,
    /// The queue pairs.
    pub pair: Pair,
    /// Their local memory.
    pub staging: Staging,
    port: Port,
    gid_index: Option<u8>,
    on_demand: OnDemand,
}

impl Hca {
    /// Looks for it and makes what the measurement needs.
    ///
    /// # Errors
    /// No library, no device, no active port, or a call that failed: the reason to skip everything that needs one.
    pub fn open(args: &RegisterArgs) -> Result<Self> {
        let library = Library::load()?;
        let (context, port) = choose(&library, args)?;
        let device = context.device()?;
        let on_demand = context.on_demand()?;
        let gid_index = match (args.gid_index, port.link_layer) {
            (Some(index), _) => Some(index),
            (None, LinkLayer::InfiniBand) => None,
            (None, LinkLayer::Ethernet) => Some(ethernet_gid(&context, &port)?),
        };
        let gid = gid_index
            .map(|index| context.gid(port.number, index))
            .transpose()?;
        let domain = context.protection_domain()?;
        let pair = Pair::connect(&domain, &port, gid_index)?;
        let staging = Staging::new(&domain, port.max_message, limits::sizes(args)?, args.seed)
            .context("memory for the other side of the transfers")?;
        Ok(Self {
            facts: facts(
                &context,
                &device,
                &port,
                gid_index,
                gid,
                on_demand,
                staging.chunk(),
            ),
            domain,
            pair,
            staging,
            port,
            gid_index,
            on_demand,
        })
    }

    /// New queue pairs, after an error.
    ///
    /// # Errors
    /// See [`Pair::connect`].
    pub fn reconnect(&mut self) -> Result<()> {
        self.pair = Pair::connect(&self.domain, &self.port, self.gid_index)?;
        Ok(())
    }

    /// Why a mode cannot be had.
    pub fn lacks(&self, mode: Mode) -> Option<String> {
        lacks(self.on_demand, mode).map(|what| format!("{} {what}", self.facts.name))
    }

    /// Whether others may read memory in that mode.
    pub fn can_read(&self, mode: Mode) -> bool {
        !mode.needs_on_demand() || self.on_demand.rc_read
    }

    /// Why a region of that size cannot be had.
    pub fn too_large(&self, bytes: u64) -> Option<String> {
        let largest = self.facts.max_region_bytes;
        (bytes > largest).then(|| format!("regions of {} are {} at most", self.facts.name, size(largest)))
    }
}

fn lacks(on_demand: OnDemand, mode: Mode) -> Option<&'static str> {
    if !mode.needs_on_demand() {
        None
    } else if !on_demand.explicit {
        Some("has no on-demand paging (ibv_query_device_ex: odp_caps)")
    } else if mode == Mode::Implicit && !on_demand.implicit {
        Some("has explicit on-demand paging only (odp_caps without IMPLICIT)")
    } else if !on_demand.rc_write {
        Some("has no on-demand paging for RDMA WRITE by RC (rc_odp_caps)")
    } else if mode == Mode::Prefetched && !on_demand.advise {
        Some("has no ibv_advise_mr, or libibverbs is too old for it")
    } else {
        None
    }
}

/// The device and port that are named, or the first that is active.
fn choose(library: &Library, args: &RegisterArgs) -> Result<(Context, Port)> {
    let names = library
        .device_names()
        .context("no RDMA devices (the kernel's ib_uverbs is not there)")?;
    ensure!(
        !names.is_empty(),
        "no RDMA devices: no HCA with its driver (Soft-RoCE: `rdma link add rxe0 type rxe netdev NETDEV`)"
    );
    let wanted = match &args.device {
        Some(name) => vec![name.clone()],
        None => names,
    };
    let mut seen = Vec::new();
    for name in &wanted {
        let context = match library.open(name) {
            Ok(context) => context,
            Err(error) if wanted.len() == 1 => return Err(error.into()),
            Err(error) => {
                seen.push(format!("{error}"));
                continue;
            }
        };
        let ports = match args.port {
            Some(port) => port..=port,
            None => 1..=context.device()?.ports,
        };
        for number in ports {
            let port = context.port(number)?;
            if port.active {
                return Ok((context, port));
            }
            seen.push(format!("{name} port {number} is not active"));
        }
    }
    bail!("no active port: {}", seen.join(", "))
}

/// The address of an Ethernet port that is most likely to have a way to itself.
fn ethernet_gid(context: &Context, port: &Port) -> Result<u8> {
    let attributes = format!(
        "/sys/class/infiniband/{}/ports/{}/gid_attrs/types",
        context.name(),
        port.number
    );
    let indices = 0..u8::try_from(port.gids).unwrap_or(u8::MAX);
    let table: Vec<([u8; 16], bool)> = indices
        .map(|index| {
            // Empty entries may not be readable.
            let gid = context.gid(port.number, index).unwrap_or_default();
            let kind = std::fs::read_to_string(Path::new(&attributes).join(index.to_string()));
            (gid, kind.is_ok_and(|kind| kind.trim() == "RoCE v2"))
        })
        .collect();
    best_gid(&table).with_context(|| {
        format!(
            "port {} of {} has no address: give its network device one, or --gid-index",
            port.number,
            context.name()
        )
    })
}

/// The index of the best one of GIDs, each with whether it is of RoCE v2.
fn best_gid(table: &[([u8; 16], bool)]) -> Option<u8> {
    let rank = |(gid, v2): &([u8; 16], bool)| {
        let address = std::net::Ipv6Addr::from(*gid);
        match (
            v2,
            address.to_ipv4_mapped().is_some(),
            address.is_unicast_link_local(),
        ) {
            (true, true, _) => 0,
            (true, false, false) => 1,
            (true, false, true) => 2,
            (false, ..) => 3,
        }
    };
    table
        .iter()
        .enumerate()
        .filter(|(_, (gid, _))| *gid != [0; 16])
        .min_by_key(|(_, entry)| rank(entry))
        .and_then(|(index, _)| u8::try_from(index).ok())
}

fn facts(
    context: &Context,
    device: &Device,
    port: &Port,
    gid_index: Option<u8>,
    gid: Option<[u8; 16]>,
    on_demand: OnDemand,
    message_bytes: usize,
) -> Facts {
    Facts {
        name: context.name().into(),
        vendor_id: device.vendor_id,
        vendor_part_id: device.vendor_part_id,
        firmware: device.firmware.clone(),
        node_guid: format!("{:016x}", device.node_guid),
        port: port.number,
        link_layer: match port.link_layer {
            LinkLayer::InfiniBand => "infiniband",
            LinkLayer::Ethernet => "ethernet",
        },
        mtu_bytes: port.mtu_bytes(),
        gid_index,
        gid: gid.map(|gid| format!("{:032x}", u128::from_be_bytes(gid))),
        max_region_bytes: device.max_region_bytes,
        on_demand: on_demand.explicit,
        on_demand_implicit: on_demand.implicit,
        on_demand_rc_write: on_demand.rc_write,
        on_demand_rc_read: on_demand.rc_read,
        advise_mr: on_demand.advise,
        message_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_gid_when_there_are_several_is_one_of_roce_v2_with_ipv4() {
        let gid = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let (local, v4, v6) = (gid("fe80::1"), gid("::ffff:10.0.0.1"), gid("2001:db8::1"));
        assert_eq!(best_gid(&[]), None);
        assert_eq!(best_gid(&[([0; 16], true)]), None);
        assert_eq!(best_gid(&[([0; 16], true), (local, false)]), Some(1));
        assert_eq!(best_gid(&[(local, false), (local, true), (v4, false)]), Some(1));
        assert_eq!(
            best_gid(&[(local, true), (v6, true), (v4, true), (v4, true)]),
            Some(2)
        );
    }

    #[test]
    fn test_modes_when_a_capability_is_missing_are_refused_with_it() {
        let none = OnDemand::default();
        for mode in [Mode::Pinned, Mode::Cache] {
            assert_eq!(lacks(none, mode), None);
        }
        for mode in [Mode::OnDemand, Mode::Prefetched, Mode::Implicit] {
            assert!(lacks(none, mode).unwrap().contains("no on-demand paging"));
        }
        let rxe = OnDemand {
            explicit: true,
            rc_write: true,
            rc_read: true,
            ..none
        };
        assert_eq!(lacks(rxe, Mode::OnDemand), None);
        assert!(lacks(rxe, Mode::Implicit).unwrap().contains("IMPLICIT"));
        assert!(lacks(rxe, Mode::Prefetched).unwrap().contains("ibv_advise_mr"));
        let no_write = OnDemand {
            rc_write: false,
            ..rxe
        };
        assert!(lacks(no_write, Mode::OnDemand).unwrap().contains("RDMA WRITE"));
    }
}
