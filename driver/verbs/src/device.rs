//! A device: what it can do, its ports and addresses.
#![allow(unsafe_code, reason = "calls of libibverbs")]

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::rc::Rc;

use crate::abi::{self, DeviceAttr, DeviceAttrEx, OdpCaps, PortAttr, extended};
use crate::{Error, Library, ProtectionDomain};

/// A device that is open.
#[derive(Debug, Clone)]
pub struct Context(pub(crate) Rc<Open>);

#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) raw: NonNull<abi::Context>,
    pub(crate) library: Library,
    name: String,
}

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: open, and whatever was made of it has kept it until now.
        let code = unsafe { (self.library.0.close_device)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::error!(device = self.name, code, "ibv_close_device");
        }
    }
}

/// Facts about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Firmware version.
    pub firmware: String,
    /// GUID of the node.
    pub node_guid: u64,
    /// Vendor.
    pub vendor_id: u32,
    /// Model.
    pub vendor_part_id: u32,
    /// Largest region.
    pub max_region_bytes: u64,
    /// Regions.
    pub max_regions: u32,
    /// Work requests of a queue.
    pub max_work_requests: u32,
    /// Entries of a completion queue.
    pub max_completions: u32,
    /// READs that a queue pair answers at once.
    pub max_reads_answered: u32,
    /// READs that a queue pair asks for at once.
    pub max_reads_asked: u32,
    /// Ports.
    pub ports: u8,
}

/// On-demand paging that a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OnDemand {
    /// Regions whose pages come when they are wanted.
    pub explicit: bool,
    /// A region of the whole address space.
    pub implicit: bool,
    /// Others may write to it by RC.
    pub rc_write: bool,
    /// Others may read from it by RC.
    pub rc_read: bool,
    /// Whether the library can pass `ibv_advise_mr` on.
    pub advise: bool,
}

/// What carries packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand: addressed by LID.
    InfiniBand,
    /// Ethernet (RoCE): addressed by GID.
    Ethernet,
}

/// A port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// From 1.
    pub number: u8,
    /// Whether it carries packets.
    pub active: bool,
    /// What kind it is.
    pub link_layer: LinkLayer,
    /// Local identifier.
    pub lid: u16,
    /// As in `enum ibv_mtu`.
    pub mtu: u32,
    /// Longest message.
    pub max_message: u32,
    /// Entries of its GID table.
    pub gids: u32,
}

impl Port {
    /// The MTU in bytes.
    #[must_use]
    pub fn mtu_bytes(&self) -> u32 {
        128 << self.mtu.min(15)
    }
}

impl Library {
    /// Opens a device.
    ///
    /// # Errors
    /// It is not there, or may not be used.
    pub fn open(&self, name: &str) -> Result<Context, Error> {
        let opened = self.with_devices(|devices| {
            let Some((_, device)) = devices.iter().find(|(n, _)| n == name) else {
                return Err(Error::NoDevice {
                    name: name.into(),
                    there: devices.iter().map(|(n, _)| n.clone()).collect(),
                });
            };
            // SAFETY: the device is in a list that exists.
            let raw = unsafe { (self.0.open_device)(*device) };
            NonNull::new(raw).ok_or_else(|| Error::last(format!("ibv_open_device of {name}")))
        })?;
        Ok(Context(Rc::new(Open {
            raw: opened?,
            library: self.clone(),
            name: name.into(),
        })))
    }
}

impl Context {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The uverbs file that its commands go through.
    #[must_use]
    pub fn command_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open as long as `self`.
        let fd = unsafe { (*self.0.raw.as_ptr()).cmd_fd };
        // SAFETY: the library keeps it open until the device is closed.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// What it is and has.
    ///
    /// # Errors
    /// The call's.
    pub fn device(&self) -> Result<Device, Error> {
        // SAFETY: plain data, and zeros are valid.
        let mut a: DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: an open context and a place for the answer.
        let code = unsafe { (self.0.library.0.query_device)(self.0.raw.as_ptr(), &raw mut a) };
        if code != 0 {
            return Err(Error::code(format!("ibv_query_device of {}", self.name()), code));
        }
        let bytes = a.fw_ver.map(|c| c.cast_unsigned());
        let firmware = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
        let positive = |n: i32| u32::try_from(n).unwrap_or(0);
        Ok(Device {
            firmware: firmware.to_string_lossy().into_owned(),
            node_guid: u64::from_be_bytes(a.node_guid),
            vendor_id: a.vendor_id,
            vendor_part_id: a.vendor_part_id,
            max_region_bytes: a.max_mr_size,
            max_regions: positive(a.max_mr),
            max_work_requests: positive(a.max_qp_wr),
            max_completions: positive(a.max_cqe),
            max_reads_answered: positive(a.max_qp_rd_atom),
            max_reads_asked: positive(a.max_qp_init_rd_atom),
            ports: a.phys_port_cnt,
        })
    }

    /// On-demand paging. Nothing of it if the library cannot be asked.
    ///
    /// # Errors
    /// The call's.
    pub fn on_demand(&self) -> Result<OnDemand, Error> {
        let Some(query) = self.extended(extended::QUERY_DEVICE_EX) else {
            return Ok(OnDemand::default());
        };
        // SAFETY: the pointer at this place of the table is this function.
        let query: abi::QueryDeviceEx = unsafe { std::mem::transmute(query) };
        // SAFETY: plain data, and zeros are valid.
        let mut a: DeviceAttrEx = unsafe { std::mem::zeroed() };
        // SAFETY: an open context, no input, a place for the answer with its size.
        let code = unsafe {
            query(
                self.0.raw.as_ptr(),
                std::ptr::null(),
                &raw mut a,
                size_of::<DeviceAttrEx>(),
            )
        };
        match code.saturating_abs() {
            0 => {}
            libc::EOPNOTSUPP | libc::ENOSYS => return Ok(OnDemand::default()),
            code => {
                return Err(Error::code(
                    format!("ibv_query_device_ex of {}", self.name()),
                    code,
                ));
            }
        }
        Ok(on_demand(
            a.odp_caps,
            self.extended(extended::ADVISE_MR).is_some(),
        ))
    }

    /// A port.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn port(&self, number: u8) -> Result<Port, Error> {
        // The function fills the older, shorter structure.
        let mut a = PortAttr::default();
        // SAFETY: an open context and a place for the answer.
        let code = unsafe { (self.0.library.0.query_port)(self.0.raw.as_ptr(), number, &raw mut a) };
        if code != 0 {
            let what = format!("ibv_query_port {number} of {}", self.name());
            return Err(Error::code(what, code));
        }
        Ok(Port {
            number,
            active: a.state == abi::PORT_ACTIVE,
            link_layer: match a.link_layer {
                abi::LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                _ => LinkLayer::InfiniBand,
            },
            lid: a.lid,
            mtu: a.active_mtu,
            max_message: a.max_msg_sz,
            gids: u32::try_from(a.gid_tbl_len).unwrap_or(0),
        })
    }

    /// An address of a port.
    ///
    /// # Errors
    /// There is none of that index.
    pub fn gid(&self, port: u8, index: u8) -> Result<[u8; 16], Error> {
        #[repr(align(8))]
        struct Gid([u8; 16]);
        let mut gid = Gid([0; 16]);
        // SAFETY: an open context and a place for the answer, as aligned as the union is.
        let code = unsafe {
            (self.0.library.0.query_gid)(self.0.raw.as_ptr(), port, i32::from(index), &raw mut gid.0)
        };
        if code != 0 {
            return Err(Error::last(format!(
                "ibv_query_gid {index} of port {port} of {}",
                self.name()
            )));
        }
        Ok(gid.0)
    }

    /// A protection domain.
    ///
    /// # Errors
    /// The call's.
    pub fn protection_domain(&self) -> Result<ProtectionDomain, Error> {
        ProtectionDomain::new(self)
    }

    /// A function of the table in front of the context, if the library has one that long and the provider fills it.
    pub(crate) fn extended(&self, offset: usize) -> Option<NonNull<std::ffi::c_void>> {
        let context = self.0.raw.as_ptr();
        // SAFETY: the context is open.
        if unsafe { (*context).abi_compat }.addr() != abi::EXTENDED {
            return None;
        }
        // SAFETY: such a context is the last field of a `struct verbs_context`.
        let table = unsafe { context.cast::<u8>().sub(extended::CONTEXT) };
        // SAFETY: in that structure, and aligned in it.
        let known = unsafe { table.add(extended::SZ).cast::<usize>().read() };
        if known < extended::SIZE - offset {
            return None;
        }
        // SAFETY: the library's table is that long.
        NonNull::new(unsafe { table.add(offset).cast::<*mut std::ffi::c_void>().read() })
    }
}

impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.command_fd()
    }
}

fn on_demand(caps: OdpCaps, advise: bool) -> OnDemand {
    OnDemand {
        explicit: caps.general_caps & abi::ODP_SUPPORT != 0,
        implicit: caps.general_caps & abi::ODP_SUPPORT_IMPLICIT != 0,
        rc_write: caps.rc_odp_caps & abi::ODP_SUPPORT_WRITE != 0,
        rc_read: caps.rc_odp_caps & abi::ODP_SUPPORT_READ != 0,
        advise,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_on_demand_when_capabilities_are_given_says_what_they_mean() {
        let caps = |general_caps, rc_odp_caps| OdpCaps {
            general_caps,
            rc_odp_caps,
            ..OdpCaps::default()
        };
        assert_eq!(on_demand(caps(0, 0), false), OnDemand::default());
        // mlx5: all but receive SRQs; rxe: no implicit one.
        let all = on_demand(caps(3, 0x1f), true);
        assert!(all.explicit && all.implicit && all.rc_write && all.rc_read && all.advise);
        let some = on_demand(caps(1, 0x0c), false);
        assert!(some.explicit && !some.implicit && some.rc_write && some.rc_read);
        assert!(!on_demand(caps(1, 8), false).rc_write);
    }

    #[test]
    fn test_port_when_its_mtu_is_a_code_has_bytes() {
        let port = |mtu| Port {
            number: 1,
            active: true,
            link_layer: LinkLayer::Ethernet,
            lid: 0,
            mtu,
            max_message: 1 << 23,
            gids: 1,
        };
        assert_eq!([1, 3, 5].map(|m| port(m).mtu_bytes()), [256, 1024, 4096]);
    }
}
